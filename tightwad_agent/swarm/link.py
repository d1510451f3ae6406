"""One stream to one peer about one model: a reader and a writer around a `Conversation`."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any, Protocol

import trio

from tightwad_agent.errors import PeerError
from tightwad_agent.ids import NodeId
from tightwad_agent.streams import Framed
from tightwad_agent.swarm.intake import Intake, reader_of
from tightwad_agent.swarm.peer import Conversation, Effect, Span
from tightwad_agent.swarm.uploads import Turn, Uploads
from tightwad_agent.wire.swarm import Bye, Request, Update

KEEP_ALIVE_S = 8.0
NEWS_S = 0.05
"""What changes is told together with what else changes in so long."""
SEND_S = 30.0
AT_ONCE = 64
"""Messages that are handled before others have their turn."""


class Owner(Protocol):
    """What a link needs of the exchange it belongs to."""

    def on_effect(self, link: Link, effect: Effect, /) -> None: ...

    async def read(self, piece: int, offset: int, /) -> bytes | None: ...

    def copies(self, piece: int, /) -> int: ...

    def uploaded(self, link: Link, n_bytes: int, /) -> None: ...


class Link:
    """`dialled`: we opened it. `ended` says why it is over; `finished` is set when it is."""

    def __init__(
        self,
        peer: NodeId,
        framed: Framed,
        conversation: Conversation,
        intake: Intake,
        owner: Owner,
        *,
        uploads: Uploads,
        dialled: bool,
        first: Any = None,
    ) -> None:
        self.peer = peer
        self.conversation = conversation
        self.dialled = dialled
        self.intake = intake
        self.ended: PeerError | None = None
        self.finished = trio.Event()
        self._framed = framed
        self._reader = reader_of(framed.stream, framed.buffered, intake)
        self._owner = owner
        self._uploads = uploads
        self._turn: Turn | None = None
        self._piece, self._from, self._ahead = -1, 0, memoryview(b"")
        """Bytes that were read of a piece, beyond what was sent."""
        self._news_at = -math.inf
        self._awaits_news = False
        self._first = first
        self._wake = trio.Event()
        self._scope = trio.CancelScope()

    def wake(self) -> None:
        """The conversation may have something to send."""
        self._wake.set()

    def has_news(self) -> None:
        """As `wake`, for news, which wait for their time."""
        if not self._awaits_news:
            self._wake.set()

    def drop(self) -> None:
        """Ends at once."""
        self._scope.cancel()

    def bye(self, reason: str) -> None:
        """Ends after telling why."""
        self.conversation.bye(reason)
        self.wake()

    async def run(self) -> None:
        """Until either side ends it; what a peer does never raises here."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, nursery.cancel_scope)
                    nursery.start_soon(self._reader.run)
                    await self._receive()
        except* PeerError as group:
            self.ended = _first_of(group)
        finally:
            self.intake.close()
            self._end_turn()
            self.finished.set()

    async def _receive(self) -> None:
        if self._first is not None:
            self._handle(self._first, b"")
        while True:
            for i, (message, payload) in enumerate(await self._reader.get(), 1):
                self._handle(message, payload)
                if i % AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()

    def _handle(self, message: Any, payload: Sized) -> None:
        for effect in self.conversation.handle(message, payload):
            self._owner.on_effect(self, effect)
        if self.conversation.speaks or isinstance(message, Request):
            self.wake()

    async def _write(self, whole: trio.CancelScope) -> None:
        while True:
            self._wake = trio.Event()
            self._take_turns()
            news = trio.current_time() >= self._news_at
            outgoing = self.conversation.outgoing(news=news, blocks=self._turn is not None and self._turn.granted)
            if outgoing is None:
                await self._idle()
                continue
            if outgoing.span is None:
                await self._send_messages(outgoing.message, whole)
            else:
                await self._send_block(outgoing.message, outgoing.span)

    async def _send_messages(self, first: object, whole: trio.CancelScope) -> None:
        """It, and what else there is to say."""
        messages = [first]
        while (more := self.conversation.outgoing(news=False, blocks=False)) is not None:
            messages.append(more.message)
        if isinstance(first, Update):
            self._news_at = trio.current_time() + NEWS_S
        await self._framed.send_together(messages, deadline_s=SEND_S)
        if isinstance(messages[-1], Bye):
            whole.cancel()

    def _take_turns(self) -> None:
        """A turn is for one piece: then others are next."""
        begun = self.conversation.sending
        if self._turn is not None and self._turn.granted and self._piece >= 0 and begun != self._piece:
            self._end_turn()
        if self._turn is None and self.conversation.n_queued:
            self._turn = self._uploads.ask(self.wake, self._rank)
        elif self._turn is not None and not self.conversation.n_queued:
            self._end_turn()
        if self._turn is not None and self._turn.granted and begun < 0:
            self.conversation.send_first(min(self.conversation.queued, key=self._owner.copies))

    def _rank(self) -> float:
        return min(map(self._owner.copies, self.conversation.queued), default=math.inf)

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._uploads.over(self._turn)
        self._turn, self._piece, self._ahead = None, -1, memoryview(b"")

    async def _send_block(self, block: object, span: Span) -> None:
        payload = await self._read(span)
        if payload is None:
            self.conversation.upload_failed(span)
            return
        await self._framed.send(block, payload, deadline_s=SEND_S)
        self._uploads.sent(len(payload), trio.current_time())
        self._owner.uploaded(self, len(payload))

    async def _read(self, span: Span) -> memoryview | None:
        start = span.offset - self._from
        if span.piece != self._piece or not 0 <= start <= len(self._ahead) - span.length:
            data = await self._owner.read(span.piece, span.offset)
            if data is None:
                return None
            self._piece, self._from, self._ahead, start = span.piece, span.offset, memoryview(data), 0
        return self._ahead[start : start + span.length]

    async def _idle(self) -> None:
        self._awaits_news = news = self.conversation.has_news
        with trio.move_on_after(max(0.0, self._news_at - trio.current_time()) if news else KEEP_ALIVE_S) as scope:
            await self._wake.wait()
        self._awaits_news = False
        if scope.cancelled_caught and not news:
            self.conversation.keep_alive()


def _first_of(group: BaseExceptionGroup[PeerError]) -> PeerError:
    exc: BaseException = group
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    assert isinstance(exc, PeerError)
    return exc
