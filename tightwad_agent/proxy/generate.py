"""One request answered on this node's verifier: from HTTP to tokens and back.

Streams and whole answers are the same way; a whole answer collects what a stream would send. Until something was sent
every error is raised, so that the caller can send the request again or answer with a status.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

import trio

from tightwad_agent import __version__
from tightwad_agent.errors import ContextOverflow, NotBegun, PeerError, RequestTooLarge, TightwadError
from tightwad_agent.proxy.answers import Heading, Usage
from tightwad_agent.proxy.chat_template import ChatTemplate
from tightwad_agent.proxy.fields import HINT, BadField, parse_object
from tightwad_agent.proxy.heads import MethodNotAllowed
from tightwad_agent.proxy.helper_requests import check_text, check_tokens, detokenize_request, tokenize_request
from tightwad_agent.proxy.http1 import Exchange
from tightwad_agent.proxy.openai import dump
from tightwad_agent.proxy.outlet import ClientOutlet, Outlet
from tightwad_agent.proxy.parameters import (
    BANNED,
    MAX_CHOICES,
    Ask,
    ChatRequest,
    chat_request,
    completion_request,
    seed_of,
)
from tightwad_agent.proxy.ports import Generator
from tightwad_agent.proxy.retelling import AnswerChanged
from tightwad_agent.proxy.running import Job, Run
from tightwad_agent.proxy.sinks import Sink, Stream, Whole
from tightwad_agent.wire.journal import Began, Resume
from tightwad_agent.wire.verify import Sampling, pack_tokens, unpack_tokens

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BODY = 8 << 20
"""Bytes of a request. Text for a million tokens has about five."""
PARSED_HERE = 32 << 10
"""Larger bodies are parsed in a thread."""
MAX_PIECES = 4096
"""Tokens that `/tokenize` takes apart into pieces; each asks the verifier once."""
MAX_WIRE_BIASES = 4096


class NotOnVerifier(TightwadError):
    """A path that only llama-server answers."""

    code = "not_found"
    http_status = 404


@dataclass(frozen=True, slots=True)
class Served:
    """What this node serves now: where it is generated, and the model's name."""

    generator: Generator
    model: str


class Answerer:
    """Answers on a verifier. `dice` gives seeds for requests without one, `clock` Unix seconds."""

    def __init__(
        self,
        *,
        dice: Callable[[], int] = lambda: secrets.randbits(32),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._dice = dice
        self._clock = clock
        self._templates: dict[tuple[str, str, str], ChatTemplate] = {}
        self._threads = trio.CapacityLimiter(2)
        """A template that takes long must not take the threads of everybody else."""
        self._paths = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completion,
        }
        self._helpers = {
            "/apply-template": self._apply_template,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
        }

    async def run(
        self, exchange: Exchange, path: str, body: bytes, served: Served, outlet: Outlet | None = None
    ) -> None:
        """Answers; what is generated goes into `outlet`. Raises a `TightwadError` while nothing was sent, a `PeerError`
        whenever the verifier was lost, `NotBegun` where it could not begin; any other becomes the last event."""
        if path not in self._paths and path not in self._helpers:
            raise NotOnVerifier(f"`{path[:100]}` is not for the verifier, the engine that serves now", hint=HINT)
        if exchange.request.method != "POST":
            raise MethodNotAllowed(exchange.request.method, ("POST",))
        if len(body) > MAX_BODY:
            raise RequestTooLarge(f"a request to the verifier has at most {MAX_BODY >> 20} MiB", hint=HINT)
        if path in self._helpers:
            await self._helpers[path](exchange, body, served)
        else:
            await self._paths[path](outlet or ClientOutlet(exchange), body, served)

    # What clients generate with

    async def _chat(self, outlet: Outlet, body: bytes, served: Served) -> None:
        request = await self._parsed(body, chat_request)
        now = self._now(outlet.resume)
        text = await self._rendered(request, served.generator, now)
        prompt = await _prompt_tokens(served.generator, text, "messages")
        jobs = [Job(i, prompt, again=i > 0) for i in range(request.ask.n)]
        await self._generate(outlet, served, request.ask, jobs, now, chat=True)

    async def _completion(self, outlet: Outlet, body: bytes, served: Served) -> None:
        request = await self._parsed(body, completion_request)
        n, jobs = request.ask.n, []
        if n * len(request.prompts) > MAX_CHOICES:
            raise BadField(f"`n` for each prompt comes to more than {MAX_CHOICES} answers", param="n")
        for i, prompt in enumerate(request.prompts):
            tokens = await _prompt_tokens(served.generator, prompt, "prompt")
            echo = await _echo(served.generator, prompt) if request.echo else ""
            jobs += [Job(n * i + k, tokens, echo, again=k > 0) for k in range(n)]
        await self._generate(outlet, served, request.ask, jobs, self._now(outlet.resume), chat=False)

    def _now(self, resume: Resume | None) -> datetime:
        """With the time zone; where an answer goes on, the time at which it began."""
        if resume is None:
            return datetime.fromtimestamp(self._clock()).astimezone()
        zone = timezone(timedelta(seconds=resume.began.offset_s))
        return datetime.fromtimestamp(resume.began.created, zone)

    def _begin(self, served: Served, ask: Ask, jobs: Sequence[Job], now: datetime, *, chat: bool) -> Began:
        offset = now.utcoffset() or timedelta()
        return Began(
            id=("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(14),
            created=int(now.timestamp()),
            offset_s=int(offset.total_seconds()),
            seed=seed_of(self._dice() if ask.seed is None else ask.seed, 0),
            model=served.model,
            fingerprint=f"tightwad-{__version__}",
            prompt=_digest(served.generator.info.n_vocab, jobs),
            stream=ask.stream,
        )

    async def _generate(
        self, outlet: Outlet, served: Served, ask: Ask, jobs: Sequence[Job], now: datetime, *, chat: bool
    ) -> None:
        resume = outlet.resume
        began = resume.began if resume else self._begin(served, ask, jobs, now, chat=chat)
        if began.prompt != _digest(served.generator.info.n_vocab, jobs):
            raise AnswerChanged("another model, or another prompt, is served than the one that this answer began with")
        context, longest = served.generator.info.context, max(len(job.prompt) for job in jobs)
        if longest >= context:
            raise ContextOverflow(f"the prompt has {longest} tokens, and the context {context}")
        sampling = await self._sampling(served.generator, ask, began.seed)
        heading = Heading(began.id, began.created, began.model, chat, began.fingerprint)
        sink: Sink = Stream(outlet, ask, heading) if ask.stream else Whole(outlet, ask, heading)
        left, usages = _continued(jobs, resume)
        await outlet.begin(began)
        try:
            await Run(served.generator, ask, sampling, sink, usages=usages, beside=[outlet.beat]).all(left)
        except (PeerError, NotBegun):
            raise
        except TightwadError as exc:
            if not outlet.started:
                raise
            logger.info("an answer broke off: %s", exc.message)
            await outlet.broke(exc)

    async def _sampling(self, generator: Generator, ask: Ask, seed: int) -> Sampling:
        bias: dict[int, float] = {}
        for key, value in ask.bias:
            ids = (key,) if isinstance(key, int) else await generator.tokenize(key.encode(), special=False, begin=False)
            check_tokens(ids, generator.info.n_vocab, "logit_bias")
            bias |= dict.fromkeys(ids, value)
        if ask.ignore_eos:
            bias |= dict.fromkeys(unpack_tokens(generator.info.eog), BANNED)
        if len(bias) > MAX_WIRE_BIASES:
            raise BadField(f"`logit_bias` comes to more than {MAX_WIRE_BIASES} tokens", param="logit_bias")
        return replace(ask.sampling, seed=seed, logit_bias=tuple(bias.items()))

    # Chat templates

    async def _rendered(self, request: ChatRequest, generator: Generator, now: datetime) -> str:
        info = generator.info
        key = (info.chat_template, info.bos_text, info.eos_text)
        template = self._templates.get(key)
        if template is None:
            if not info.chat_template:
                logger.warning("the model has no chat template of its own; ChatML is used, which it may not know")
            template = await self._in_thread(lambda: ChatTemplate(key[0], bos=key[1], eos=key[2]))
            self._templates = {key: template}
        known = template
        return await self._in_thread(
            lambda: known.render(
                request.messages,
                now=now,
                add_generation_prompt=request.add_generation_prompt,
                continues=request.continues,
                options=request.template_options,
            )
        )

    async def _parsed(self, body: bytes, read: Callable[[dict[str, Any]], T]) -> T:
        if len(body) <= PARSED_HERE:
            return read(parse_object(body))
        return await self._in_thread(lambda: read(parse_object(body)))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._threads)

    # llama-server's helpers

    async def _apply_template(self, exchange: Exchange, body: bytes, served: Served) -> None:
        request = await self._parsed(body, chat_request)
        await exchange.respond(200, dump({"prompt": await self._rendered(request, served.generator, self._now(None))}))

    async def _tokenize(self, exchange: Exchange, body: bytes, served: Served) -> None:
        request = await self._parsed(body, tokenize_request)
        tokens: list[int] = []
        for i, part in enumerate(request.parts):
            if isinstance(part, int):
                tokens.append(part)
                continue
            begin = request.add_special and i == 0
            text = check_text(part, "content")
            tokens += await served.generator.tokenize(text, special=request.parse_special, begin=begin)
        shown: list[Any] = tokens
        if request.with_pieces:
            shown = await _pieces(served.generator, tokens)
        await exchange.respond(200, dump({"tokens": shown}))

    async def _detokenize(self, exchange: Exchange, body: bytes, served: Served) -> None:
        tokens = await self._parsed(body, detokenize_request)
        check_tokens(tokens, served.generator.info.n_vocab, "tokens")
        text = await served.generator.detokenize(tokens) if tokens else b""
        await exchange.respond(200, dump({"content": text.decode("utf-8", "replace")}))


def _digest(n_vocab: int, jobs: Sequence[Job]) -> bytes:
    """Of the prompts as token ids, which only the same model's tokenizer and template give."""
    found = hashlib.sha256(f"{n_vocab} {len(jobs)}".encode())
    for job in jobs:
        if not job.again:
            found.update(len(job.prompt).to_bytes(4, "big") + pack_tokens(job.prompt))
    return found.digest()[:16]


def _continued(jobs: Sequence[Job], resume: Resume | None) -> tuple[list[Job], list[Usage]]:
    """The answers that are not complete, with how they began; and what the others come to."""
    known = {choice.index: choice for choice in resume.choices} if resume else {}
    left, usages = [], []
    for job in jobs:
        choice = known.get(job.index)
        if choice is None:
            left.append(job)
            continue
        begun = replace(job, said=tuple(unpack_tokens(choice.tokens)), n_cached=choice.n_cached)
        if choice.over:
            usages.append(begun.usage(choice.n_answer, choice.n_cached))
        else:
            left.append(begun)
    return left, usages


async def _pieces(generator: Generator, tokens: list[int]) -> list[dict[str, Any]]:
    if len(tokens) > MAX_PIECES:
        raise BadField(f"`with_pieces` takes {MAX_PIECES} tokens at most", param="with_pieces")
    check_tokens(tokens, generator.info.n_vocab, "content")
    made: list[dict[str, Any]] = []
    for token in tokens:
        piece = await generator.detokenize([token])
        try:
            made.append({"id": token, "piece": piece.decode()})
        except UnicodeDecodeError:
            made.append({"id": token, "piece": list(piece)})
    return made


async def _prompt_tokens(generator: Generator, prompt: str | tuple[int, ...], param: str) -> tuple[int, ...]:
    """With one begin-of-sequence token where the model wants it, whether or not the text has it already."""
    info = generator.info
    if isinstance(prompt, str):
        has_bos = bool(info.bos_text) and prompt.startswith(info.bos_text)
        tokens = tuple(await generator.tokenize(check_text(prompt, param), special=True, begin=not has_bos))
    else:
        check_tokens(prompt, info.n_vocab, param)
        tokens = prompt
    if not tokens:
        raise BadField(f"`{param}` is empty, and the model has no token to begin with", param=param)
    return tokens


async def _echo(generator: Generator, prompt: str | tuple[int, ...]) -> str:
    return prompt if isinstance(prompt, str) else (await generator.detokenize(prompt)).decode("utf-8", "replace")
