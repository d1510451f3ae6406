"""The HTTP/1.1 server edge: h11 on any trio stream.

One task reads ahead for as long as the connection lives. It is what notices that a client has left while its handler
is silent: the handler's cancel scope is cancelled, whatever the handler waits for. A handler therefore needs no thought
about disconnects; bytes that were read ahead (pipelined requests) are kept for later. Each request gets an h11 machine
of its own, so that every head passes `heads.head_end` first.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http import HTTPStatus
from typing import NoReturn

import h11
import trio

from tightwad_agent.errors import PeerGone, RequestTooLarge, TightwadError
from tightwad_agent.proxy.heads import BadRequest, Headers, HeadScanner, Peer, Request, check_framing, has_body
from tightwad_agent.proxy.limits import Budget, Limits
from tightwad_agent.proxy.openai import error_body, error_headers
from tightwad_agent.proxy.usage import TAIL_BYTES
from tightwad_agent.streams import READ_SIZE, close_quietly

logger = logging.getLogger(__name__)

SEND_BYTES = 64 << 10
"""A client must take so many within `Limits.send_s`."""


def reason(status: int) -> bytes:
    """The reason phrase, for people who read heads."""
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""


def canned(status: int, body: bytes, extra: bytes = b"") -> bytes:
    """An answer for a connection that has no h11 state worth asking."""
    head = (
        f"HTTP/1.1 {status} {reason(status).decode()}\r\ndate: {formatdate(usegmt=True)}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n"
    )
    return head.encode() + extra + b"\r\n" + body


class Seat:
    """A connection's place among all. While it waits for its client it may be made to give way to another."""

    def __init__(self, on_wait: Callable[[Seat, bool], None] = lambda _seat, _waits: None) -> None:
        self.evicted = False
        self._on_wait = on_wait
        self._scope: trio.CancelScope | None = None

    @contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        """A wait for the client: ended after `seconds`, or when somebody else needs the place more."""
        with trio.move_on_after(0 if self.evicted else seconds) as scope:
            self._scope = scope
            self._on_wait(self, True)
            try:
                yield
            finally:
                self._on_wait(self, False)
                self._scope = None

    def evict(self) -> None:
        """Ends the wait."""
        self.evicted = True
        if self._scope is not None:
            self._scope.cancel()


class _Inlet:
    """Reads ahead, up to a bound, and tells when the client is gone."""

    HIGH = READ_SIZE

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.buffer = bytearray()
        self.ended = False
        self._stream = stream
        self._on_end: Callable[[], None] | None = None
        self._waiting = trio.lowlevel.ParkingLot()
        self._full = trio.lowlevel.ParkingLot()

    async def run(self) -> None:
        try:
            while data := await self._stream.receive_some(READ_SIZE):
                self.buffer += data
                self._waiting.unpark_all()
                while len(self.buffer) >= self.HIGH:
                    await self._full.park()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # a reset ends the connection as a goodbye does
        self.ended = True
        self._waiting.unpark_all()
        if self._on_end is not None:
            self._on_end()

    @contextmanager
    def telling(self, on_end: Callable[[], None]) -> Iterator[None]:
        """Calls `on_end` if the client leaves inside the block (or has left before)."""
        self._on_end = on_end
        if self.ended:
            on_end()
        try:
            yield
        finally:
            self._on_end = None

    async def more(self) -> bool:
        """Waits for bytes beyond those in `buffer`; false at the end."""
        if not self.ended:
            self._full.unpark_all()
            await self._waiting.park()
        return not self.ended

    async def read(self) -> bytes:
        """What there is; empty at the end."""
        while not self.buffer and await self.more():
            pass
        data = bytes(self.buffer[:READ_SIZE])
        del self.buffer[:READ_SIZE]
        self._full.unpark_all()
        return data


class Exchange:
    """One request and its answer. Whatever a handler awaits here is cancelled when the client leaves."""

    def __init__(self, connection: _Connection, request: Request, machine: h11.Connection) -> None:
        self.request = request
        self._connection = connection
        self._machine = machine
        self._body: bytes | None = None
        self.client = ""
        """Who asks, once that is known (`callers`)."""
        self.key_name = ""
        """Of the API key that the request came with, once it was checked."""
        self.status = 0
        """Of the answer; 0 before there is one."""
        self.tail = b""
        """The end of what was sent of the answer's body."""

    @property
    def started(self) -> bool:
        """Something of the answer may have reached the client."""
        return self._machine.our_state is not h11.SEND_RESPONSE and self._machine.our_state is not h11.IDLE

    async def body(self, max_bytes: int | None = None) -> bytes:
        """The whole body. Raises `RequestTooLarge`, `BadRequest` (also when it comes too slowly) or `NotReady`."""
        if self._body is None:
            limit = self._connection.limits.max_body_bytes if max_bytes is None else max_bytes
            self._body = await self._connection.read_body(self._machine, self.request, limit)
        return self._body

    async def respond(
        self, status: int, body: bytes, *, content_type: bytes = b"application/json", headers: Headers = ()
    ) -> None:
        """A whole answer."""
        lengths = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
        await self._send(*self._head(status, [*lengths, *headers]), *self._data(body), h11.EndOfMessage())

    async def start(self, status: int, headers: Headers) -> None:
        """Begins an answer whose body follows in parts; chunked unless `headers` give a length."""
        await self._send(*self._head(status, headers))

    async def send(self, data: bytes) -> None:
        """A part of the body, on the wire when this returns."""
        await self._send(*self._data(data))

    async def finish(self) -> None:
        """The end of the answer. An answer without it is cut off visibly: the connection is closed."""
        await self._send(h11.EndOfMessage())

    async def fail(self, exc: TightwadError) -> None:
        """Answers with an error in OpenAI's form, if there is still an answer to be given."""
        if not self.started:
            await self.respond(exc.http_status, error_body(exc), headers=error_headers(exc))

    def _head(self, status: int, headers: Headers) -> list[h11.Event]:
        self.status = status
        own = [] if any(n == b"date" for n, _ in headers) else [(b"date", formatdate(usegmt=True).encode())]
        if self._machine.their_state in (h11.SEND_BODY, h11.ERROR):
            own.append((b"connection", b"close"))  # the rest of the body will not be waited for
        return [h11.Response(status_code=status, headers=[*headers, *own], reason=reason(status))]

    def _data(self, data: bytes) -> list[h11.Event]:
        self.tail = (self.tail + data[-TAIL_BYTES:])[-TAIL_BYTES:]
        return [h11.Data(data=data)] if data and self.request.method != "HEAD" else []

    async def _send(self, *events: h11.Event) -> None:
        data = b"".join(self._machine.send(event) or b"" for event in events)
        await self._connection.write(data)


Handler = Callable[[Exchange], Awaitable[None]]


class _Connection:
    """The requests of one stream, one after the other."""

    def __init__(
        self, stream: trio.abc.Stream, handler: Handler, limits: Limits, *, peer: Peer, budget: Budget, seat: Seat
    ) -> None:
        self.limits = limits
        self._seat = seat
        self._stream = stream
        self._handler = handler
        self._peer = peer
        self._budget = budget
        self._inlet = _Inlet(stream)
        self._scope = trio.CancelScope()
        self._take: Callable[[int], None] = lambda _n: None
        self._mid_write = False

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._inlet.run)
            self._scope = nursery.cancel_scope
            try:
                wait_s = self.limits.head_s
                while await self._next(wait_s):
                    wait_s = self.limits.idle_s
            except PeerGone:
                pass  # while an answer was written outside a handler
            nursery.cancel_scope.cancel()

    async def _next(self, wait_s: float) -> bool:
        """Serves one request. False when the connection is done."""
        machine = h11.Connection(h11.SERVER, max_incomplete_event_size=self.limits.max_head_bytes)
        try:
            request = await self._read_head(machine, wait_s)
        except BadRequest as exc:
            await self.write(canned(exc.http_status, error_body(exc)))
            await self._linger()
            return False
        if request is None:
            return False
        exchange = Exchange(self, request, machine)
        share = self._budget.share(self._peer.address)
        with trio.CancelScope() as scope, self._inlet.telling(scope.cancel), share as self._take:
            outer, self._scope = self._scope, scope
            try:
                await self._walled(exchange)
            finally:
                self._scope = outer
        done = machine.our_state in (h11.DONE, h11.MUST_CLOSE) and not self._mid_write
        if not done or self._inlet.ended:
            return False
        if machine.their_state not in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED):
            await self._linger()
            return False
        return machine.our_state is h11.DONE and machine.their_state is h11.DONE

    async def _walled(self, exchange: Exchange) -> None:
        try:
            await self._handler(exchange)
            if not exchange.started:
                raise TightwadError("no part of the agent answered this request")  # noqa: TRY301
        except TightwadError as exc:
            if exc.http_status >= 500 and exchange.started:
                logger.info("an answer broke off: %s", exc.message)
            await exchange.fail(exc)
        except Exception:
            logger.exception("a request failed", extra={"path": exchange.request.path})
            await exchange.fail(TightwadError("the agent failed at this request; its log says why"))

    # Heads

    async def _read_head(self, machine: h11.Connection, wait_s: float) -> Request | None:
        buffer = self._inlet.buffer
        with self._seat.waiting(wait_s):
            while not buffer and await self._inlet.more():
                pass
        if not buffer:
            return None
        end = None
        with self._seat.waiting(self.limits.head_s):
            end = await self._await_head(buffer)
        if end is None:
            if self._inlet.ended:
                return None
            if self._seat.evicted:
                raise BadRequest("too many connections at once, and this one sent no request; try again", 503)
            raise BadRequest(f"the request's head did not come within {self.limits.head_s:g} s", 408)
        machine.receive_data(bytes(buffer[:end]))
        del buffer[:end]
        return self._parse(machine)

    async def _await_head(self, buffer: bytearray) -> int | None:
        may_skip, scanner = True, HeadScanner(self.limits.max_head_bytes)
        while True:
            if may_skip and buffer[:2] == b"\r\n":
                del buffer[:2]  # some clients end a body with an empty line too many
                may_skip = False
            if not (may_skip and buffer == b"\r"):
                end = scanner.feed(buffer)
                if end is not None:
                    return end
            if not await self._inlet.more():
                return None

    def _parse(self, machine: h11.Connection) -> Request:
        try:
            event = machine.next_event()
        except h11.RemoteProtocolError as exc:
            raise BadRequest(f"that is not an acceptable request: {str(exc)[:200]}", exc.error_status_hint) from None
        assert isinstance(event, h11.Request)
        check_framing(event)
        if machine.their_state is h11.SEND_BODY and not has_body(event):
            machine.next_event()  # the end of a message without a body
        return Request(event.method.decode("ascii"), event.target.decode("ascii"), list(event.headers), self._peer)

    # Bodies

    async def read_body(self, machine: h11.Connection, request: Request, limit: int) -> bytes:
        declared = int(request.header(b"content-length") or 0)
        if declared > limit:
            raise _too_large(limit)
        self._take(declared)
        if machine.they_are_waiting_for_100_continue:
            await self.write(machine.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
        body = bytearray()
        began, n_events = trio.current_time(), 0
        while (event := await self._body_event(machine, began, len(body))) is not None:
            body += event
            if len(body) > limit:
                raise _too_large(limit)
            if not declared:
                self._take(len(event))
            n_events += 1
            if not n_events % 64:
                await trio.lowlevel.checkpoint()  # thousands of tiny chunks must not hold the others up
        self._inlet.buffer[:0] = machine.trailing_data[0]
        return bytes(body)

    async def _body_event(self, machine: h11.Connection, began: float, n_bytes: int) -> bytes | None:
        while True:
            try:
                event = machine.next_event() if machine.their_state is h11.SEND_BODY else None
            except h11.RemoteProtocolError as exc:
                raise BadRequest(f"the request's body is malformed: {str(exc)[:200]}") from None
            if isinstance(event, h11.Data):
                return bytes(event.data)
            if event is not h11.NEED_DATA:
                return None
            allowed = self.limits.body_grace_s + n_bytes / self.limits.body_bytes_per_s
            with trio.move_on_at(began + allowed) as scope:
                data = await self._inlet.read()
            if scope.cancelled_caught:
                raise BadRequest("the request's body came too slowly", 408)
            if not data:
                await self._client_gone()
            machine.receive_data(data)

    # Answers

    async def write(self, data: bytes) -> None:
        if not self._mid_write:
            self._mid_write = True
            try:
                if await self._sent(data):
                    self._mid_write = False
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
        if self._mid_write:
            await self._client_gone()

    async def _sent(self, data: bytes) -> bool:
        """False when the client takes nothing. Parts have deadlines of their own: a slow client is no gone one."""
        for at in range(0, len(data), SEND_BYTES):
            with trio.move_on_after(self.limits.send_s) as scope:
                await self._stream.send_all(data[at : at + SEND_BYTES])
            if scope.cancelled_caught:
                return False
        return True

    async def _client_gone(self) -> NoReturn:
        """Whoever works for this client learns it in the one way there is: cancellation."""
        self._scope.cancel()
        await trio.lowlevel.checkpoint()
        raise PeerGone("the client is gone")

    async def _linger(self) -> None:
        """Reads what the client still sends, for a moment: closing on unread bytes resets the connection, and the
        answer is lost with it."""
        with self._seat.waiting(self.limits.linger_s):
            if isinstance(self._stream, trio.abc.HalfCloseableStream):
                try:
                    await self._stream.send_eof()
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return
            while await self._inlet.read():
                pass


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(
        f"the request's body is larger than {limit} bytes", hint="`max_body_bytes` raises the limit."
    )


async def serve_connection(
    stream: trio.abc.Stream,
    handler: Handler,
    limits: Limits,
    *,
    peer: Peer,
    budget: Budget | None = None,
    seat: Seat | None = None,
) -> None:
    """Serves requests until the client leaves, then closes `stream`. Nothing a client does raises out of here."""
    connection = _Connection(
        stream, handler, limits, peer=peer, budget=budget or Budget.of(limits), seat=seat or Seat()
    )
    try:
        await connection.run()
    except* (trio.BrokenResourceError, trio.ClosedResourceError) as group:
        logger.debug("a connection broke: %s", group)
    except* Exception:
        logger.exception("a connection failed")
    finally:
        await close_quietly(stream)
