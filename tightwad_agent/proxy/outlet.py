"""Where an answer goes: to the client of this node, or to the node whose client it is.

Both get the same calls, so an answer that is made here and one that comes from elsewhere are kept, and go on after a
loss, in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import trio

from tightwad_agent.errors import TightwadError
from tightwad_agent.proxy.book import WORTH, Book
from tightwad_agent.proxy.heads import Headers
from tightwad_agent.proxy.http1 import Exchange
from tightwad_agent.proxy.openai import error_event
from tightwad_agent.proxy.retelling import Retelling
from tightwad_agent.wire.journal import CONTENT_TYPE, Aside, Began, Broke, Ended, Resume, Said, Whole, entry

STREAM = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
WAITING = b": waiting for the cluster\n\n"
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
WAITING_S = 3.0
"""A client of a stream that stands still because its engine was lost hears something this often."""
BEAT_S = 5.0
"""A node that waits for an answer hears something this often."""


class Outlet(Protocol):
    """Takes one answer. Several tasks may call."""

    @property
    def resume(self) -> Resume | None:
        """How the answer began elsewhere; it goes on behind that."""
        ...

    @property
    def started(self) -> bool:
        """An error can no longer be a status."""
        ...

    async def begin(self, began: Began) -> None:
        """Before anything else, also where an answer goes on."""
        ...

    async def say(self, said: Said, data: bytes) -> None:
        """More of a choice, with the events that show it to the client of a stream."""
        ...

    async def aside(self, data: bytes) -> None:
        """Something for the client of a stream that means nothing."""
        ...

    async def whole(self, body: bytes) -> None:
        """All of an answer that is no stream."""
        ...

    async def end(self, data: bytes) -> None:
        """The last events of a stream."""
        ...

    async def broke(self, exc: TightwadError) -> None:
        """Ends an answer that has started, and cannot be completed by anybody."""
        ...

    async def beat(self) -> None:
        """Runs beside while the engine is at work."""
        ...

    def between_writes(self) -> AbstractAsyncContextManager[None]:
        """Inside, nothing is half written, so tasks that write may be cancelled."""
        ...


class _Turn:
    """A lock that costs nothing, not even a turn of the scheduler, while nobody else wants it."""

    def __init__(self) -> None:
        self._lock = trio.Lock()

    async def __aenter__(self) -> None:
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            await self._lock.acquire()

    async def __aexit__(self, *_exc: object) -> None:
        self._lock.release()


class _Written:
    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._writing = _Turn()
        self.wrote_at = trio.current_time()

    @property
    def started(self) -> bool:
        """An error can no longer be a status."""
        return self._exchange.started

    def between_writes(self) -> AbstractAsyncContextManager[None]:
        return self._writing

    async def _send(self, data: bytes, headers: Headers) -> None:
        """The lock must be held."""
        if not self._exchange.started:
            await self._exchange.start(200, headers)
        if data:
            await self._exchange.send(data)
        self.wrote_at = trio.current_time()


class ClientOutlet(_Written):
    """To the client. `book` keeps what it was given; `paused` is told of each pause that ended, in seconds. `goes_on`:
    it can be made to go on from here after a loss; else who asked sees to that."""

    def __init__(
        self,
        exchange: Exchange,
        book: Book | None = None,
        *,
        paused: Callable[[float], None] = lambda _s: None,
        retelling: Callable[[], Retelling] = Retelling,
        goes_on: bool = True,
    ) -> None:
        super().__init__(exchange)
        self.book = book or Book()
        self.told: Retelling | None = None
        """From the first answer on that says no token ids."""
        self._retelling = retelling
        self._goes_on_here = goes_on
        self._inside = False
        """A part of an event was sent that is too long to be held back."""
        self._paused = paused
        self._lost_at: float | None = None
        self._is_lost = trio.Event()
        self.streams = False
        """Something of a stream of events was sent."""
        self.troubled = False
        """An engine was lost, or could not be reached: it is waited for."""
        self._n_chars_at_loss = 0

    @property
    def resume(self) -> Resume | None:
        return None if self.told else self.book.resume()

    @property
    def can_go_on(self) -> bool:
        """Another engine can complete what the client has."""
        if not self.streams:
            return not self.started
        return self._goes_on_here and not self._inside and not (self.told.is_full if self.told else self.book.is_full)

    @property
    def complete(self) -> bool:
        """The client has the last event."""
        return self.told is not None and self.told.done

    def lost(self) -> bool:
        """The engine is gone, and another may go on. Whether this one had brought more than a little."""
        if self._lost_at is None:
            self._lost_at = self.wrote_at if self.started else trio.current_time()
            self._is_lost.set()
        if self.told is None:
            return self.book.progressed()
        had, self._n_chars_at_loss = self._n_chars_at_loss, self.told.n_chars
        self.told.again()
        self.book.restart()
        return self.told.n_chars >= had + WORTH

    async def begin(self, began: Began) -> None:
        self.book.begin(began)

    async def say(self, said: Said, data: bytes) -> None:
        async with self._writing:
            if self.told is not None:
                data = self.told.pass_on(data)
            self.book.add(said, sent=bool(data))
            self._goes_on()
            if data:
                await self._stream(data)

    async def events(self, data: bytes, headers: Headers) -> None:
        """Whole events of a stream that says no token ids."""
        async with self._writing:
            if self._goes_on_here:
                data = self.telling().pass_on(data)
            if data:
                self._goes_on()
                await self._stream(data, headers)
                self._inside = not data.endswith(_EVENT_ENDS)

    def telling(self) -> Retelling:
        """Keeps text from now on, and what there is so far."""
        if self.told is None:
            began = self.book.began
            self.told = self._retelling()
            if began is not None and self.book.opened:
                head = {"id": began.id, "created": began.created}
                is_chat = began.id.startswith("chat")
                self.told.knows(self.book.texts(), self.book.finished(), head, chat=is_chat)
            self.book.restart()
            self.told.again()
        return self.told

    async def aside(self, data: bytes) -> None:
        if data:
            async with self._writing:
                await self._stream(data)

    async def whole(self, body: bytes) -> None:
        await self.respond(200, body, b"application/json", [])

    async def respond(self, status: int, body: bytes, content_type: bytes, headers: Headers) -> None:
        """An answer that is no stream, whichever."""
        self._goes_on()
        await self._exchange.respond(status, body, content_type=content_type, headers=headers)

    async def end(self, data: bytes) -> None:
        async with self._writing:
            if self.told is not None:
                data = self.told.pass_on(data)
            self._goes_on()
            await self._stream(data)
            await self._exchange.finish()

    async def finish(self, headers: Headers) -> None:
        """The end of a stream that says no token ids."""
        async with self._writing:
            await self._stream(b"", headers)
            await self._exchange.finish()

    async def _stream(self, data: bytes, headers: Headers = STREAM) -> None:
        self.streams = True
        await self._send(data, headers)

    async def broke(self, exc: TightwadError) -> None:
        async with self._writing:
            await self._exchange.send((b"\n\n" if self._inside else b"") + error_event(exc))
            await self._exchange.finish()

    async def beat(self) -> None:
        """Nothing: `keep_alive` sees to it, over all engines."""

    async def keep_alive(self) -> None:
        """Comments, while a stream that has begun waits for another engine."""
        while True:
            await self._is_lost.wait()
            await trio.sleep_until(self.wrote_at + WAITING_S)
            if trio.current_time() < self.wrote_at + WAITING_S:
                continue
            self.wrote_at = trio.current_time()
            if self._lost_at is not None and self.streams and not self._inside:
                async with self._writing:
                    await self._stream(WAITING)

    def _goes_on(self) -> None:
        if self._lost_at is not None:
            self._paused(trio.current_time() - self._lost_at)
            self._lost_at, self._is_lost = None, trio.Event()


class JournalOutlet(_Written):
    """To the node whose client it is."""

    def __init__(self, exchange: Exchange, resume: Resume | None) -> None:
        super().__init__(exchange)
        self.resume = resume

    async def begin(self, began: Began) -> None:
        await self._enter(entry(began))

    async def say(self, said: Said, data: bytes) -> None:
        await self._enter(entry(said, data))

    async def aside(self, data: bytes) -> None:
        await self._enter(entry(Aside(), data))

    async def whole(self, body: bytes) -> None:
        await self._enter(entry(Whole(), body), last=True)

    async def end(self, data: bytes) -> None:
        await self._enter(entry(Ended(), data), last=True)

    async def broke(self, exc: TightwadError, *, lost: bool = False) -> None:
        said = Broke(exc.code[:64], exc.message[:4000], exc.hint[:4000], exc.http_status, lost)
        await self._enter(entry(said), last=True)

    async def beat(self) -> None:
        """Signs of life, once it has begun."""
        while True:
            await trio.sleep_until(self.wrote_at + BEAT_S)
            if trio.current_time() < self.wrote_at + BEAT_S:
                continue
            if self.started:
                await self.aside(b"")
            self.wrote_at = trio.current_time()

    async def _enter(self, data: bytes, *, last: bool = False) -> None:
        async with self._writing:
            await self._send(data, [(b"content-type", CONTENT_TYPE)])
            if last:
                await self._exchange.finish()
