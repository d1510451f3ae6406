"""Where the parts of answers go: to the client as they come, or into one body at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

import trio

from tightwad_agent.proxy import answers
from tightwad_agent.proxy.answers import Events, Heading, Usage
from tightwad_agent.proxy.outlet import Outlet
from tightwad_agent.proxy.parameters import Ask
from tightwad_agent.proxy.ports import Timings, Token
from tightwad_agent.proxy.transcript import Part
from tightwad_agent.wire.journal import Said
from tightwad_agent.wire.verify import pack_tokens


class Sink(Protocol):
    """Takes the parts of all choices of one answer; several tasks may bring them."""

    async def part(self, index: int, part: Part, timings: Timings, n_answer: int = 0) -> None:
        """More of a choice; `part.finish` says that it is complete, after `n_answer` tokens."""
        ...

    def repeat(self, index: int, part: Part) -> None:
        """What was said of a choice before this engine went on with it."""
        ...

    async def close(self, usages: Sequence[Usage], timings: Timings) -> None:
        """All choices are complete."""
        ...

    async def keep_alive(self) -> None:
        """Runs beside, for as long as parts may come."""
        ...

    def between_writes(self) -> AbstractAsyncContextManager[None]:
        """Inside, nothing is half written, so tasks that write may be cancelled."""
        ...


class Stream:
    """Server-sent events: one for each part that has text. Nothing is sent before the first, so that until then an
    error has a status, unless that takes so long that the client must see a sign of life."""

    def __init__(self, outlet: Outlet, ask: Ask, heading: Heading) -> None:
        self._outlet = outlet
        self._ask = ask
        self._heading = heading
        self._events = Events(heading)
        self._opened = outlet.resume is not None and outlet.resume.opened
        self._n_chars: dict[int, int] = {}
        """Characters sent, by choice."""
        self._wrote_at = trio.current_time()

    async def part(self, index: int, part: Part, timings: Timings, n_answer: int = 0) -> None:
        data = b""
        if part.text or part.tokens or part.finish:
            data = b"" if self._opened else self._beginnings()
            self._opened = True
        if part.text or part.tokens:
            data += self._text(index, part, timings)
        if part.finish:
            data += self._events.finish(index, part.finish, timings)
        self.repeat(index, part)
        said = Said(index, pack_tokens(part.ids), part.text, timings.n_cached, bool(part.finish), n_answer)
        await self._outlet.say(said, data)
        if data:
            self._wrote_at = trio.current_time()

    def repeat(self, index: int, part: Part) -> None:
        self._n_chars[index] = self._n_chars.get(index, 0) + len(part.text)

    def _beginnings(self) -> bytes:
        """Of all choices, in order: the SDK's reader takes the first it sees for the first there is."""
        return b"".join(self._events.role(index) for index in range(self._ask.n))

    def _text(self, index: int, part: Part, timings: Timings) -> bytes:
        logprobs = None
        if self._ask.n_probs >= 0:
            logprobs = answers.logprobs_object(part.tokens, self._n_chars.get(index, 0), chat=self._heading.chat)
        return self._events.text(index, part.text, logprobs, timings if self._ask.timings_per_token else None)

    async def close(self, usages: Sequence[Usage], timings: Timings) -> None:
        last = self._events.usage(usages, timings) if self._ask.include_usage else b""
        await self._outlet.end(last + answers.DONE)

    async def keep_alive(self) -> None:
        every = self._ask.ping_s or math.inf
        while True:
            await trio.sleep_until(self._wrote_at + every)
            if trio.current_time() >= self._wrote_at + every:
                await self._outlet.aside(answers.PING)
                self._wrote_at = trio.current_time()

    def between_writes(self) -> AbstractAsyncContextManager[None]:
        return self._outlet.between_writes()


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish: str = ""


class Whole:
    """One JSON body, once all choices are complete. The end of a choice is not noted: who goes on elsewhere makes its
    last tokens again, and has what belongs to the body."""

    def __init__(self, outlet: Outlet, ask: Ask, heading: Heading) -> None:
        self._outlet = outlet
        self._ask = ask
        self._heading = heading
        self._choices: dict[int, _Choice] = {}

    async def part(self, index: int, part: Part, timings: Timings, n_answer: int = 0) -> None:  # noqa: ARG002
        self.repeat(index, part)
        if not part.finish:
            await self._outlet.say(Said(index, pack_tokens(part.ids), "", timings.n_cached), b"")

    def repeat(self, index: int, part: Part) -> None:
        choice = self._choices.setdefault(index, _Choice())
        choice.texts.append(part.text)
        choice.tokens += part.tokens
        choice.finish = part.finish

    async def close(self, usages: Sequence[Usage], timings: Timings) -> None:
        choices = [self._choice(index, choice) for index, choice in sorted(self._choices.items())]
        await self._outlet.whole(answers.whole_body(self._heading, choices, usages, timings))

    def _choice(self, index: int, choice: _Choice) -> dict[str, object]:
        chat, logprobs = self._heading.chat, None
        if self._ask.n_probs >= 0:
            logprobs = answers.logprobs_object(choice.tokens, 0, chat=chat)
        return answers.choice_object(index, "".join(choice.texts), choice.finish, logprobs, chat=chat)

    async def keep_alive(self) -> None:
        """Nothing can be sent before the whole."""

    def between_writes(self) -> AbstractAsyncContextManager[None]:
        return self._outlet.between_writes()
