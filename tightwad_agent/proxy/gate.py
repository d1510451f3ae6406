"""Turns on this node's engine: `fair` decides, here requests wait for what it says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from tightwad_agent.proxy.fair import MAX_WAITING, MAX_WAITING_EACH, Admitted, Effect, FairQueue, Ticket
from tightwad_agent.proxy.limits import Crowded
from tightwad_agent.proxy.ports import Generation, Generator
from tightwad_agent.wire.verify import Loaded, Sampling

MAX_WAIT_S = 600.0
"""Beyond it a request that waits for its turn is refused."""


class _Place:
    """Where one request waits."""

    def __init__(self) -> None:
        self.called = trio.Event()
        self.problem: Crowded | None = None


class Gate:
    """All turns of this node's engine."""

    def __init__(self, *, max_waiting: int = MAX_WAITING, max_waiting_each: int = MAX_WAITING_EACH) -> None:
        self._queue = FairQueue(0, max_waiting=max_waiting, max_waiting_each=max_waiting_each)
        self._max = (max_waiting, max_waiting_each)
        self._places: dict[Ticket, _Place] = {}

    @property
    def n_waiting(self) -> int:
        return self._queue.n_waiting

    @asynccontextmanager
    async def turn(self, client: str, n_slots: int) -> AsyncIterator[None]:
        """Entered when it is this client's turn on an engine of so many slots. Raises `Crowded`."""
        self._carry_out(self._queue.resize(n_slots))
        ticket, effects = self._queue.ask(client)
        place = self._places[ticket] = _Place()
        self._carry_out(effects)
        try:
            with trio.move_on_after(MAX_WAIT_S):
                await place.called.wait()
            if not place.called.is_set():
                raise Crowded(f"no turn came within {MAX_WAIT_S:g} s", status=503)
            if place.problem is not None:
                raise place.problem
            yield
        finally:
            del self._places[ticket]
            self._carry_out(self._queue.leave(ticket))

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            place = self._places[effect.ticket]
            if not isinstance(effect, Admitted):
                place.problem = self._crowded(own_fault=effect.own_fault)
            place.called.set()

    def _crowded(self, *, own_fault: bool) -> Crowded:
        hint = "send fewer at once; `max_requests` and `max_requests_per_client` are the limits"
        if own_fault:
            return Crowded(
                f"{self._max[1]} requests of this client wait already, or the most of {self._max[0]} of all", hint=hint
            )
        return Crowded(f"{self._max[0]} requests wait already", status=503, hint=hint)


class FairGenerator:
    """A generator each of whose answers waits for the client's turn."""

    def __init__(self, inner: Generator, gate: Gate, client: str) -> None:
        self._inner = inner
        self._gate = gate
        self._client = client

    @property
    def info(self) -> Loaded:
        return self._inner.info

    async def tokenize(self, text: bytes, *, special: bool = True, begin: bool = True) -> list[int]:
        return await self._inner.tokenize(text, special=special, begin=begin)

    async def detokenize(self, tokens: Sequence[int]) -> bytes:
        return await self._inner.detokenize(tokens)

    @asynccontextmanager
    async def start(
        self, prompt: Sequence[int], sampling: Sampling, *, max_tokens: int, **more: Any
    ) -> AsyncIterator[Generation]:
        """As `Generator.start`, which gets all that is given."""
        async with (
            self._gate.turn(self._client, self.info.slots),
            self._inner.start(prompt, sampling, max_tokens=max_tokens, **more) as generation,
        ):
            yield generation
