"""Answers in OpenAI's forms: whole bodies, events of a stream, usage, log probabilities, timings.

`timings` has llama-server's names, because chat apps read them, and beside them what speculation did.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from tightwad_agent.proxy.openai import dump
from tightwad_agent.proxy.ports import Timings, Token
from tightwad_agent.proxy.text import TextDecoder, token_text
from tightwad_agent.wire.verify import Probability

NEVER = -9999.0
"""The log probability of what cannot be; JSON has no infinity."""
DONE = b"data: [DONE]\n\n"
PING = b":\n\n"


@dataclass(frozen=True, slots=True)
class Heading:
    """What all parts of one answer share. `created` in Unix seconds; `chat`: of `/v1/chat/completions`."""

    id: str
    created: int
    model: str
    chat: bool
    fingerprint: str

    def fields(self, *, part: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if part else "chat.completion") if self.chat else "text_completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer; `n_prompt` 0 where another answer to the same prompt has counted them."""

    n_prompt: int
    n_answer: int
    n_cached: int = 0


def usage_object(usages: Iterable[Usage]) -> dict[str, Any]:
    """The sum, in tokens."""
    known = list(usages)
    n_prompt, n_answer = sum(u.n_prompt for u in known), sum(u.n_answer for u in known)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_answer,
        "total_tokens": n_prompt + n_answer,
        "prompt_tokens_details": {"cached_tokens": sum(u.n_cached for u in known)},
    }


# Timings


def timings_object(t: Timings) -> dict[str, Any]:
    """Milliseconds, tokens, and shares between 0 and 1; `null` where there is nothing to divide by."""
    n_read = max(0, t.n_prompt - t.n_cached)
    made: dict[str, Any] = {
        "cache_n": t.n_cached,
        "prompt_n": n_read,
        "prompt_ms": round(t.prompt_ms, 3),
        "prompt_per_token_ms": _share(t.prompt_ms, n_read),
        "prompt_per_second": _share(1e3 * n_read, t.prompt_ms),
        "predicted_n": t.n_generated,
        "predicted_ms": round(t.generate_ms, 3),
        "predicted_per_token_ms": _share(t.generate_ms, t.n_generated),
        "predicted_per_second": _share(1e3 * t.n_generated, t.generate_ms),
        "engine": "verifier",
        "rounds": t.rounds,
        "drafted": t.drafted,
        "accepted": t.accepted,
        "tried_at": list(t.tried_at),
        "accepted_at": list(t.accepted_at),
        "acceptance": _share(t.accepted, t.drafted),
        "acceptance_by_position": [_share(a, n) for a, n in zip(t.accepted_at, t.tried_at, strict=False)],
        "tokens_per_round": _share(t.accepted + t.rounds, t.rounds),
        "draft_ms": round(t.draft_ms, 3),
        "verify_ms": round(t.verify_ms, 3),
        "hidden_share": None if not t.draft_ms else round(min(1.0, max(0.0, 1 - t.waited_ms / t.draft_ms)), 4),
        "drafters": dict(t.drafters),
    }
    if t.drafted:
        made |= {"draft_n": t.drafted, "draft_n_accepted": t.accepted}
    return made


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def sum_timings(many: Sequence[Timings]) -> Timings:
    """Of several answers to one request: everything added up, so times are not those of a clock on the wall."""
    total = Timings()
    for t in many:
        for name in ("n_prompt", "n_cached", "n_generated", "rounds", "drafted", "accepted"):
            setattr(total, name, getattr(total, name) + getattr(t, name))
        for name in ("prompt_ms", "generate_ms", "verify_ms", "draft_ms", "waited_ms"):
            setattr(total, name, getattr(total, name) + getattr(t, name))
        total.tried_at = _added(total.tried_at, t.tried_at)
        total.accepted_at = _added(total.accepted_at, t.accepted_at)
        for who, n in t.drafters.items():
            total.drafters[who] = total.drafters.get(who, 0) + n
    return total


def _added(left: list[int], right: list[int]) -> list[int]:
    return [a + b for a, b in zip_longest(left, right, fillvalue=0)]


# Log probabilities


def chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""
    return {"content": [_chat_token(t) for t in tokens if t.probabilities is not None], "refusal": None}


def _chat_token(token: Token) -> dict[str, Any]:
    assert token.probabilities is not None
    return {
        **_one(token.probabilities.chosen, token.piece),
        "top_logprobs": [_one(p, p.piece) for p in token.probabilities.top],
    }


def _one(probability: Probability, piece: bytes) -> dict[str, Any]:
    logprob = _finite(probability.logprob)
    return {"id": probability.token, "token": token_text(piece), "logprob": logprob, "bytes": list(piece)}


def _finite(logprob: float) -> float:
    return logprob if logprob > NEVER else NEVER  # NaN too


def completion_logprobs(tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """The `logprobs` of a completion choice; `offset`: characters of the answer before the first token."""
    made: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    decoder = TextDecoder()
    for token in tokens:
        if token.probabilities is None:
            continue
        made["tokens"].append(token_text(token.piece))
        made["token_logprobs"].append(_finite(token.probabilities.chosen.logprob))
        made["top_logprobs"].append({token_text(p.piece): _finite(p.logprob) for p in token.probabilities.top})
        made["text_offset"].append(offset)
        offset += len(decoder.feed(token.piece))
    return made


def logprobs_object(tokens: Sequence[Token], offset: int, *, chat: bool) -> dict[str, Any]:
    return chat_logprobs(tokens) if chat else completion_logprobs(tokens, offset)


# Whole answers


def choice_object(index: int, text: str, finish: str, logprobs: dict[str, Any] | None, *, chat: bool) -> dict[str, Any]:
    said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}


def whole_body(heading: Heading, choices: Sequence[dict[str, Any]], usages: Iterable[Usage], timings: Timings) -> bytes:
    """An answer that is no stream."""
    rest = {"choices": list(choices), "usage": usage_object(usages), "timings": timings_object(timings)}
    return dump({**heading.fields(part=False), **rest})


# Streams


class Events:
    """Events of one stream, as bytes. What all have in common is written once."""

    def __init__(self, heading: Heading) -> None:
        self._chat = heading.chat
        common = dump(heading.fields(part=True))[:-1]
        self._head = b"data: " + common + b',"choices":[{"index":'
        self._empty = b"data: " + common + b',"choices":[]'
        self._open, self._close = (b',"delta":{"content":', b"}") if heading.chat else (b',"text":', b"")

    def role(self, index: int) -> bytes:
        """What a chat choice begins with."""
        if not self._chat:
            return b""
        return self._choice(index, b',"delta":{"role":"assistant","content":""}', b"null", b"null", b"")

    def text(
        self, index: int, text: str, logprobs: dict[str, Any] | None = None, timings: Timings | None = None
    ) -> bytes:
        said = self._open + json.dumps(text).encode() + self._close
        return self._choice(index, said, dump(logprobs) if logprobs else b"null", b"null", _timed(timings))

    def finish(self, index: int, reason: str, timings: Timings) -> bytes:
        said = b',"delta":{}' if self._chat else b',"text":""'
        return self._choice(index, said, b"null", b'"' + reason.encode() + b'"', _timed(timings))

    def usage(self, usages: Iterable[Usage], timings: Timings) -> bytes:
        """The one without choices, at the end."""
        return self._empty + b',"usage":' + dump(usage_object(usages)) + _timed(timings) + b"}\n\n"

    def _choice(self, index: int, said: bytes, logprobs: bytes, finish: bytes, more: bytes) -> bytes:
        return b'%s%d%s,"logprobs":%s,"finish_reason":%s}]%s}\n\n' % (self._head, index, said, logprobs, finish, more)


def _timed(timings: Timings | None) -> bytes:
    return b"" if timings is None else b',"timings":' + dump(timings_object(timings))
