"""One answer from the verifier: the shell around `Speculation`.

What the verifier and the drafters say arrives by callback in trio's thread, and is dealt with there and then: the next
round is on its way before anything else is scheduled, whatever the reader of the answer does meanwhile. A reader who
falls behind stops that. There is no task but the reader's own, which keeps the deadlines.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from functools import partial
from typing import Final

import trio

from tightwad_agent.errors import ContextOverflow, EngineError, NotReady, ProtocolError, TightwadError, UsageError
from tightwad_agent.proxy.costs import Costs
from tightwad_agent.proxy.draft_clock import DraftClock
from tightwad_agent.proxy.ports import Chunk, Drafter, DraftEvent, DraftSession, Token, VerifierEvent, VerifierRequest
from tightwad_agent.proxy.record import DrafterRecord
from tightwad_agent.proxy.speculate import Speculation
from tightwad_agent.proxy.speculate_events import (
    Ask,
    Confirmed,
    Draft,
    Effect,
    Event,
    Extend,
    Forget,
    Joined,
    Lost,
    Silenced,
    SubmitRound,
    Tick,
)
from tightwad_agent.wire.draft import NoDraft
from tightwad_agent.wire.verify import Accepted, Ended, Failed, TokenProbabilities, unpack_tokens

MAX_BACKLOG: Final = 256
"""Tokens that the reader may be behind before no more rounds are asked for."""
MAX_INBOX: Final = 1024
"""Events not dealt with; a drafter that causes more is dropped."""


class VerifierGeneration:
    """See `ports.Generation`. Made by `VerifierGenerator.start` only."""

    def __init__(
        self, machine: Speculation, drafters: Callable[[], Sequence[Drafter]], costs: Costs, *, n_said: int = 0
    ) -> None:
        self.timings = machine.timings
        self._n_said = n_said
        """Tokens that the verifier is still to repeat; the machine has them already."""
        self._machine, self._drafters, self._costs = machine, drafters, costs
        self._request: VerifierRequest | None = None
        self._known: dict[Hashable, Drafter] = {}
        self._dropped: set[Hashable] = set()
        self._sessions: dict[Hashable, DraftSession] = {}
        self._clocks: dict[Hashable, DraftClock] = {}
        self._inbox: deque[VerifierEvent | Event] = deque()
        self._settled = self._patient = False
        """The verifier has a round that nothing can be added to any more; the drafters know."""
        self._chunks: deque[Chunk] = deque()
        self._backlog = 0
        self._error: Exception | None = None
        self._ended = False
        self._pumping = False
        self._wake: trio.Event | None = None
        self._scope: trio.CancelScope | None = None

    # Opening and closing

    def open(self, opens: Callable[..., VerifierRequest]) -> None:
        """Hands the prompt to the verifier, and to the drafter that leads."""
        self._request = opens(deliver=self._deliver)
        drafters = [(key, self._record(key, drafter)) for key, drafter in self._newcomers()]
        self._pumping = True
        self._perform(self._machine.begin(trio.current_time(), drafters))
        self._pumping = False
        self._pump()

    def close(self) -> None:
        """Idempotent; nothing is delivered any more."""
        self._ended = True
        self._perform(self._machine.close())
        self._inbox.clear()
        if self._request is not None:
            self._request.close()
        for session in self._sessions.values():
            session.forget()
        self._sessions.clear()

    # The reader

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        """The next tokens, at least one. Raises as `ports.Generation` says."""
        if self._chunks:
            await trio.lowlevel.checkpoint()
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            await self._wait()
        chunk = self._chunks.popleft()
        self._backlog -= len(chunk.tokens)
        if self._inbox:
            self._pump()
        return chunk

    async def _wait(self) -> None:
        """Until something is to be read, or a deadline has come and was kept."""
        self._wake = trio.Event()
        deadline = self._machine.next_deadline()
        with trio.CancelScope(deadline=deadline) as self._scope:
            await self._wake.wait()
        expired, self._wake, self._scope = self._scope.cancelled_caught, None, None
        if expired:
            self._inbox.append(Tick())
            self._pump()

    # What arrives

    def _deliver(self, event: VerifierEvent) -> None:
        if not self._ended:
            if self._patient:
                for session in list(self._sessions.values()):
                    session.collect()
            self._inbox.append(event)
            self._pump()

    def _deliver_draft(self, key: Hashable, event: DraftEvent) -> None:
        if self._ended or key not in self._sessions:
            return
        if len(self._inbox) >= MAX_INBOX:
            self._drop(key)
            return
        if isinstance(event, NoDraft):
            self._inbox.append(Silenced(key, event))
        else:
            try:
                tokens = unpack_tokens(event.tokens)
            except ProtocolError:
                self._drop(key)
                return
            self._inbox.append(Draft(key, event, tokens, self._clocks[key].came_at(event, trio.current_time())))
        self._pump()

    def _drop(self, key: Hashable) -> None:
        """No more of a drafter that sends what it must not."""
        self._forget(key)
        self._inbox.append(Lost(key))
        self._pump()

    def _pump(self) -> None:
        """Deals with what has come, unless the reader is too far behind."""
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._inbox and self._backlog < MAX_BACKLOG and self._error is None:
                self._take(self._inbox.popleft())
        except Exception as exc:  # noqa: BLE001 - it is the reader's to know, not the deliverer's
            self._error = exc
        finally:
            self._pumping = False
        self._tell_drafters()
        self._notify()

    def _tell_drafters(self) -> None:
        """While a round runs that nothing can be added to, nobody waits for each token."""
        if self._patient is not self._settled:
            self._patient = self._settled
            for session in list(self._sessions.values()):
                session.patient(self._patient)

    def _notify(self) -> None:
        if self._chunks or self._error is not None:
            if self._wake is not None:
                self._wake.set()
        elif self._scope is not None:
            deadline = self._machine.next_deadline()
            self._scope.deadline = min(self._scope.deadline, deadline)

    def _take(self, event: VerifierEvent | Event) -> None:
        match event:
            case Accepted():
                self._settled = False
                self._accepted(event)
            case Failed():
                self._error = _error_of(event)
            case TightwadError():
                self._error = event
            case _:
                self._perform(self._machine.handle(event, trio.current_time()))

    def _accepted(self, answer: Accepted) -> None:
        tokens, now = unpack_tokens(answer.tokens), trio.current_time()
        if len(answer.pieces) != len(tokens):
            raise ProtocolError(f"{len(tokens)} tokens came with {len(answer.pieces)} pieces")
        if self._n_said:
            self._n_said -= len(tokens)
            if self._n_said < 0 or answer.ended is not Ended.NOT:
                raise ProtocolError("more was repeated than was said")
        else:
            self._perform(self._machine.handle(Confirmed(answer, tokens), now))
        self._look_around(now)
        probabilities: Sequence[TokenProbabilities | None] = answer.probabilities or (None,) * len(tokens)
        made = tuple(map(Token, tokens, answer.pieces, probabilities))
        self._chunks.append(Chunk(made, answer.ended))
        self._backlog += len(made)
        self._ended = answer.ended is not Ended.NOT

    # Drafters

    def _newcomers(self) -> list[tuple[Hashable, Drafter]]:
        new: list[tuple[Hashable, Drafter]] = []
        for drafter in self._drafters():
            key = (drafter.info.node, drafter.info.model)
            if drafter.alive and key not in self._known and key not in self._dropped:
                self._known[key] = drafter
                new.append((key, drafter))
        return new

    def _record(self, key: Hashable, drafter: Drafter) -> DrafterRecord:
        info = drafter.info
        return self._costs.record(key, info.name, info.rtt_s, info.slots)

    def _look_around(self, now: float) -> None:
        """Who came, who went."""
        for key in [key for key, drafter in self._known.items() if not drafter.alive]:
            del self._known[key]
            self._perform(self._machine.handle(Lost(key), now))
        for key, drafter in self._newcomers():
            self._perform(self._machine.handle(Joined(key, self._record(key, drafter)), now))

    # What is to be done

    def _perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case SubmitRound(at, draft, free):
                    assert self._request is not None
                    self._request.round(at, draft, free)
                    self._settled = not free
                case Ask(key, branch, keep, tokens, n):
                    session = self._session(key)
                    if session is not None:
                        session.ask(branch, keep, tokens, n)
                case Extend(key, branch, n):
                    if key in self._sessions:
                        self._sessions[key].extend(branch, n)
                case Forget(key):
                    self._forget(key)

    def _forget(self, key: Hashable) -> None:
        if key in self._known:
            self._dropped.add(key)  # it is there, and not wanted any more
        session = self._sessions.pop(key, None)
        if session is not None:
            session.forget()

    def _session(self, key: Hashable) -> DraftSession | None:
        """`None`: the drafter has just been dropped or lost; the machine will hear of it."""
        if key not in self._sessions and key in self._known and key not in self._dropped:
            self._clocks[key] = DraftClock()
            self._sessions[key] = self._known[key].open(partial(self._deliver_draft, key))
            self._sessions[key].patient(self._patient)
        return self._sessions.get(key)


def _error_of(failed: Failed) -> TightwadError:
    """As the endpoint should answer it."""
    match failed.code:
        case "context":
            return ContextOverflow(failed.reason or "the prompt is longer than the context")
        case "cache":
            return NotReady(failed.reason or "the cache has no room beside the other requests")
        case "input":
            return UsageError(failed.reason or "the verifier refused the prompt")
        case _:
            return EngineError(failed.reason or "the verifier gave the request up")
