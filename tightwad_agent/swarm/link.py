"""One stream to one peer about one model: a reader and a writer around a `Conversation`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import trio

from tightwad_agent.errors import PeerError
from tightwad_agent.ids import NodeId
from tightwad_agent.streams import Framed
from tightwad_agent.swarm.intake import Intake, Item, Landed, reader_of
from tightwad_agent.swarm.peer import Conversation, Effect, Span
from tightwad_agent.swarm.uploads import Turn, Uploads
from tightwad_agent.wire.swarm import Bye, Update

KEEP_ALIVE_S = 8.0
NEWS_S = 0.05
"""What changes is told together with what else changes in so long."""
SEND_S = 30.0
AT_ONCE = 64
"""Messages that are handled before others have their turn."""


class Owner(Protocol):
    """What a link needs of the exchange it belongs to."""

    def on_effects(self, link: Link, effects: Sequence[Effect], /) -> None: ...

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
        self._said_at = trio.current_time()
        self._first = first
        self._wake = trio.Event()
        self._scope = trio.CancelScope()

    def wake(self) -> None:
        """The conversation may have something to send."""
        self._wake.set()

    def has_news(self) -> None:
        """As `wake`, for news, which wait for their time."""
        if trio.current_time() >= self._news_at:
            self._wake.set()

    def tick(self, now: float) -> None:
        """To be called every `NEWS_S`."""
        if self.conversation.has_news:
            self.has_news()
        elif now - self._said_at >= KEEP_ALIVE_S:
            self.conversation.keep_alive()
            self.wake()

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
        items: list[Item] = [] if self._first is None else [(self._first, Landed(0))]
        while True:
            for at in range(0, len(items), AT_ONCE):
                self._handle(items[at : at + AT_ONCE])
                await trio.lowlevel.checkpoint()
            items = await self._reader.get()

    def _handle(self, items: Sequence[Item]) -> None:
        effects: list[Effect] = []
        try:
            for message, payload in items:
                effects += self.conversation.handle(message, payload)
        finally:
            self._owner.on_effects(self, effects)
        if self.conversation.speaks or self.conversation.n_queued:
            self.wake()

    async def _write(self, whole: trio.CancelScope) -> None:
        while True:
            self._wake = trio.Event()
            self._take_turns()
            news = trio.current_time() >= self._news_at
            outgoing = self.conversation.outgoing(news=news, blocks=self._turn is not None and self._turn.granted)
            if outgoing is None:
                await self._wake.wait()
                continue
            self._said_at = trio.current_time()
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


def _first_of(group: BaseExceptionGroup[PeerError]) -> PeerError:
    exc: BaseException = group
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    assert isinstance(exc, PeerError)
    return exc
