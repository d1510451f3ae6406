"""One running draft server and its streams: asks go into the book, turns to the server, tokens to the streams."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from tightwad_agent.engine.draft_server import Broken, DraftServer, Refused
from tightwad_agent.engine.draft_sessions import DraftBook
from tightwad_agent.engine.draft_turn import Key, Turn
from tightwad_agent.engine.outbox import Outbox, first_error
from tightwad_agent.wire.draft import FROM_DRAFTER, MAX_HEADER, TO_DRAFTER, Ask, Extend, Forget, Hello, NoDraft

MAX_OUTBOX = 1 << 20
"""Bytes that a coordinator may leave unread."""
TURN_DEADLINE_S = 10.0
PROMPT_TOKEN_S = 0.1
"""More time for each token that is new to the server; a server that needs longer stands still."""


class DraftDesk:
    """`run` works for the streams that are in `serve`, until the server is of no use any more."""

    def __init__(self, server: DraftServer, hello: Hello) -> None:
        self.book = DraftBook(n_vocab=hello.n_vocab, context=hello.context, slots=hello.slots)
        self._server = server
        self._hello = hello
        self._outboxes: dict[int, Outbox] = {}
        self._n_streams = 0
        self._alone: dict[Key, trio.CancelScope] = {}
        self._wake = trio.Event()

    # The server

    async def run(self) -> str:
        """Until cancelled, or until the server is of no use; why. Then every branch is over, and the streams end."""
        why = "the draft server ended"
        try:
            async with trio.open_nursery() as nursery:
                await self._work(nursery)
        except* Broken as group:
            why = str(first_error(group))
        finally:
            self._deliver(self.book.lost(why))
            for outbox in self._outboxes.values():
                outbox.close()
        return why

    async def _work(self, nursery: trio.Nursery) -> None:
        while True:
            self._wake = trio.Event()
            if not await self._take_turns(nursery):
                await self._wake.wait()

    async def _take_turns(self, nursery: trio.Nursery) -> bool:
        """Begins what is asked alone, and sees what is asked together through; whether there was any."""
        together = None
        for turn in self.book.turns():
            if turn.alone:
                nursery.start_soon(self._perform_alone, turn)
            else:
                together = turn
        if together is None:
            return False
        await self._perform(together)
        return True

    async def _perform_alone(self, turn: Turn) -> None:
        """Ends early if its session does; the server gives it up within two seconds then."""
        key = turn.members[0].key
        with trio.CancelScope() as scope:
            self._alone[key] = scope
            try:
                await self._perform(turn)
            finally:
                if self._alone.get(key) is scope:
                    del self._alone[key]
        self._wake.set()

    async def _perform(self, turn: Turn) -> None:
        started = trio.current_time()
        deadline_s = TURN_DEADLINE_S + PROMPT_TOKEN_S * turn.n_new * len(turn.prompts)
        try:
            made = await self._server.complete(turn.prompts, turn.n, slot=turn.slot, deadline_s=deadline_s)
        except Refused as exc:
            self._deliver(self.book.failed(turn, exc.message))
        else:
            now = trio.current_time()
            self._deliver(self.book.done(turn, made, now - started, now))

    def _deliver(self, messages: Sequence[tuple[int, object]]) -> None:
        for number, message in messages:
            if number in self._outboxes:
                self._outboxes[number].post(message)

    # The streams

    async def serve(self, stream: trio.abc.Stream) -> str:
        """One coordinator's stream, until either side ends it; why it ended."""
        self._n_streams += 1
        number = self._n_streams
        outbox = self._outboxes[number] = Outbox(stream, FROM_DRAFTER, MAX_OUTBOX)
        outbox.post(self._hello)
        try:
            return await outbox.carry(TO_DRAFTER, MAX_HEADER, lambda messages: self._take_all(number, messages))
        finally:
            del self._outboxes[number]
            self.book.drop(number)
            for key, scope in self._alone.items():
                if key[0] == number:
                    scope.cancel()

    def _take_all(self, number: int, messages: list[Ask | Extend | Forget]) -> None:
        for message in messages:
            self._take(number, message)
        self._wake.set()

    def _take(self, number: int, message: Ask | Extend | Forget) -> None:
        answer: NoDraft | None = None
        match message:
            case Ask():
                answer = self.book.ask(number, message, trio.current_time())
            case Extend():
                answer = self.book.extend(number, message, trio.current_time())
            case Forget(session):
                self.book.forget(number, session)
                if (scope := self._alone.get((number, session))) is not None:
                    scope.cancel()
        if answer is not None:
            self._outboxes[number].post(answer)
