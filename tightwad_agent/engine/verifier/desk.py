"""The requests that are here, and the slots that they have: who is admitted, who is served, what stays cached."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from tightwad_agent.engine.verifier.model import Model
from tightwad_agent.engine.verifier.request import Request, refusal
from tightwad_agent.engine.verifier.slots import Grant, Slots
from tightwad_agent.errors import ProtocolError
from tightwad_agent.wire.verify import Accepted, Ended, Failed, Open

MAX_WAITING = 256
"""Requests without a slot; more are refused."""


class Desk:
    """A request is waiting for a slot, or has one and is filling (its prompt is being evaluated) or generating."""

    def __init__(self, model: Model, clock: Callable[[], float]) -> None:
        self._model = model
        self._clock = clock
        self._facts = model.facts
        self._slots = Slots(model.facts.slots, model.facts.rollback, model.facts.window, model.oldest)
        self._requests: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()

    def open(self, opened: Open) -> Accepted | Failed | None:
        """The answer to a request that needs no evaluation, or cannot be served. Raises `ProtocolError` for a number
        that is taken."""
        number = opened.request
        if number in self._requests:
            raise ProtocolError(f"request {number} is open already")
        request = Request.of(opened)
        if refused := refusal(opened, request.tokens, self._facts):
            return Failed(number, *refused)
        if opened.sampling.grammar and not self._model.parses(opened.sampling.grammar):
            return Failed(number, "input", "the grammar is none that libllama takes")
        if opened.max_tokens == 0:
            return Accepted(number, request.n_prompt, b"", (), ended=Ended.LENGTH, n_prompt=request.n_prompt)
        if len(self._waiting) >= MAX_WAITING:
            return Failed(number, "cache", f"{MAX_WAITING} requests wait already")
        self._requests[number] = request
        self._waiting.append(request)
        self._admit()
        return None

    def find(self, number: int) -> Request | None:
        return self._requests.get(number)

    def has(self, request: Request) -> bool:
        """Whether it is not over. Its number may be another's by now."""
        return self._requests.get(request.opened.request) is request

    def due(self) -> list[Request]:
        """Those with a round to evaluate."""
        return [request for request in self._requests.values() if request.due]

    def filling(self) -> list[tuple[Request, int]]:
        """Those with a prompt (and what was said) to evaluate, and how many tokens of it are left."""
        return [
            (request, request.n_given - len(self.cached(request)))
            for request in self._requests.values()
            if request.seq >= 0 and not request.generating
        ]

    def busy(self) -> bool:
        """Whether there is anything to evaluate."""
        return any(r.due or (r.seq >= 0 and not r.generating) for r in self._requests.values())

    def newest(self) -> Request:
        """The last one that was given a slot; there must be one."""
        return max((r for r in self._requests.values() if r.seq >= 0), key=lambda r: (r.began_s, r.opened.request))

    def cached(self, request: Request) -> list[int]:
        """The tokens of its sequence that are in memory; whoever changes memory changes this list."""
        return self._slots.cached[request.seq]

    def held(self) -> int:
        """Tokens in memory of all sequences."""
        return sum(map(len, self._slots.cached))

    def over(self, request: Request) -> None:
        """Its slot goes to the next one; what is cached stays."""
        del self._requests[request.opened.request]
        if request.seq < 0:
            self._waiting.remove(request)
            return
        self._slots.release(request.seq)
        if request.sampler:
            request.sampler.close()
        self._admit()

    def drop(self, request: Request) -> None:
        """It is over, and what is cached goes too."""
        self._forget(request.seq)
        self.over(request)

    def evict(self) -> bool:
        """An idle slot gives up its tokens. `False`: none has any."""
        seq = self._slots.evict()
        return seq is not None and self._model.keep(seq, 0)

    def _admit(self) -> None:
        while self._waiting and (grant := self._slots.take(self._waiting[0].cacheable)):
            request = self._waiting.popleft()
            request.n_cached = self._prepare(grant)
            request.seq = grant.seq
            request.sampler = self._model.sampler(request.opened.sampling, request.cacheable)
            request.began_s = self._clock()

    def _prepare(self, grant: Grant) -> int:
        """Makes the slot's memory what was granted; how many tokens of the prompt are in it."""
        seq, source, n = grant
        cached = self._slots.cached
        if source != seq:
            self._forget(seq)
            self._model.share(source, seq, n)
            cached[seq] = cached[source][:n]
        elif n < len(cached[seq]):
            if n and self._model.keep(seq, n):
                del cached[seq][n:]
            else:
                self._forget(seq)
        return len(cached[seq])

    def _forget(self, seq: int) -> None:
        self._model.keep(seq, 0)
        self._slots.cached[seq] = []
