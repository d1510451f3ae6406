"""One request as a client sees it: every piece with the time at which it came. Also which answers are beyond doubt.

Greedy answers are equal only where the model has no doubt: two builds of a pool add numbers in another order, and where
two tokens are as likely as each other, either may win. `certain` measures that beforehand and ends an answer before.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import math
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ANSWER_S = 240.0
MIN_MARGIN = 0.5
"""Natural logarithm of how much likelier the chosen token must be than the next; ties of unequal pools are at 0.15."""
MAX_PROBLEM = 300


@dataclass
class Asked:
    """What came of it. `text` is all that was said; `times` when each piece of it came, by the monotonic clock;
    `problem` is empty for a whole answer; `comments`: lines that only keep the connection alive."""

    began: float = 0.0
    ended: float = 0.0
    text: str = ""
    finish: str = ""
    usage: int = -1
    times: list[float] = field(default_factory=list)
    comments: int = 0
    problem: str = ""

    @property
    def first_s(self) -> float:
        """Until the first piece; infinite where none came."""
        return self.times[0] - self.began if self.times else math.inf

    def pause_s(self, since: float) -> float:
        """The longest wait for the next piece among those that ended after `since`; the first counts from its request.
        Infinite for an answer that was not whole."""
        if self.problem:
            return math.inf
        marks = [self.began, *self.times]
        waits = [b - a for a, b in itertools.pairwise(marks) if b >= since]
        return max(waits, default=0.0)


def ask(
    dial: Callable[[], socket.socket],
    body: Mapping[str, Any],
    *,
    timeout_s: float = ANSWER_S,
    on_text: Callable[[int], None] = lambda _n: None,
) -> Asked:
    """Asks; never raises. `on_text` hears how many characters have come. `timeout_s`: without a byte."""
    asked = Asked(began=time.monotonic())
    try:
        connection = http.client.HTTPConnection("127.0.0.1")
        connection.sock = dial()
        with contextlib.closing(connection):
            connection.sock.settimeout(timeout_s)
            connection.request("POST", path_of(body), json.dumps(body), {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                if response.status != 200:
                    asked.problem = f"status {response.status}: {response.read(MAX_PROBLEM)!r}"
                elif body.get("stream"):
                    _read_stream(response, asked, on_text)
                else:
                    _read_whole(json.loads(response.read()), asked)
    except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError) as exc:
        asked.problem = f"{type(exc).__name__}: {exc}"[:MAX_PROBLEM]
    asked.ended = time.monotonic()
    return asked


def path_of(body: Mapping[str, Any]) -> str:
    """Where such a request goes."""
    return CHAT if "messages" in body else COMPLETIONS


def _read_whole(answer: Mapping[str, Any], asked: Asked) -> None:
    choice = answer["choices"][0]
    asked.text = _said(choice)
    asked.finish = choice["finish_reason"]
    asked.usage = answer["usage"]["completion_tokens"]
    asked.times.append(time.monotonic())


def _read_stream(lines: Iterable[bytes], asked: Asked, on_text: Callable[[int], None]) -> None:
    done = False
    for line in lines:
        if line.startswith(b":"):
            asked.comments += 1
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            done = True
            break
        event = json.loads(line[6:])
        if "error" in event:
            asked.problem = f"error event: {event['error']}"[:MAX_PROBLEM]
            return
        _take(event, asked, on_text)
    if not done:
        asked.problem = "the stream ended before its end"


def _take(event: Mapping[str, Any], asked: Asked, on_text: Callable[[int], None]) -> None:
    if event.get("usage"):
        asked.usage = event["usage"]["completion_tokens"]
    for choice in event.get("choices", ()):
        asked.finish = choice.get("finish_reason") or asked.finish
        if said := _said(choice):
            asked.text += said
            asked.times.append(time.monotonic())
            on_text(len(asked.text))


def _said(choice: Mapping[str, Any]) -> str:
    if "text" in choice:
        return str(choice["text"] or "")
    message = choice.get("message") or choice.get("delta") or {}
    return str(message.get("content") or "")


# Answers beyond doubt


def candidates() -> list[dict[str, Any]]:
    """Prompts that a small model goes on with for long, most of them without doubt."""
    counting = [{"prompt": ", ".join(str(n) for n in range(first, first + 25)) + ","} for first in (1, 60, 113)]
    repeated = [{"prompt": f"{text}\n\n{text}\n\n{text}\n\n{text[:40]}"} for text in TEXTS]
    chats = [{"messages": [{"role": "user", "content": text}]} for text in QUESTIONS]
    return [body for some in zip(counting, repeated, chats, strict=True) for body in some]


def clear_tokens(answer: Mapping[str, Any], margin: float = MIN_MARGIN) -> list[str]:
    """Those tokens of a completion with `logprobs` that are beyond doubt, from its beginning on."""
    tokens, best = _two_best(answer["choices"][0]["logprobs"])
    n = next((i for i, (first, second) in enumerate(best) if first - second < margin), len(tokens))
    return tokens[:n]


def _two_best(logprobs: Mapping[str, Any]) -> tuple[list[str], list[tuple[float, float]]]:
    """What was said, and for each token the two highest log probabilities."""
    if "content" in logprobs:
        said = [token["token"] for token in logprobs["content"]]
        tables = [[top["logprob"] for top in token["top_logprobs"]] for token in logprobs["content"]]
    else:
        said = list(logprobs["tokens"])
        tables = [list(table.values()) for table in logprobs["top_logprobs"]]
    ranked = [sorted([*table, -math.inf], reverse=True) for table in tables]
    return said, [(first, second) for first, second, *_ in ranked]


def asking_for_margins(body: Mapping[str, Any], n_tokens: int) -> dict[str, Any]:
    """The request whose answer `clear_tokens` reads."""
    wish: dict[str, Any] = {"logprobs": True, "top_logprobs": 2} if "messages" in body else {"logprobs": 2}
    return {**body, **wish, "max_tokens": n_tokens, "temperature": 0}


TEXTS = (
    "The lighthouse stands on a rock far out in the sea. Each evening the keeper climbs the stairs, lights the lamp, "
    "and writes the weather down in a book with a blue cover. In the morning he puts it out again.",
    "To make bread, mix flour, water, salt and yeast in a bowl. Knead it for ten minutes, let it rest for an hour, "
    "shape it, let it rest again, and bake it in a hot oven until the crust is brown.",
    "A train leaves the station at seven and crosses three bridges before it reaches the harbour, where the ships "
    "wait for passengers who travel to the islands in the north.",
)
QUESTIONS = (
    "Write the numbers from one to twenty, separated by commas.",
    "Name the days of the week.",
    "Name the months of the year in their order.",
)
