"""Streams over sockets that are read and written without a task switch where nothing has to be waited for.

trio's own streams pass through its scheduler at every call, which is right in general and too dear for a tunnel that
carries each token of an answer: here a pump takes what is there, gives it on, and only then waits. Where much comes, a
thread may read in place of a trio task (`read_in_thread`), while tasks go on writing.
"""

from __future__ import annotations

import abc
import errno
import select
import socket
from collections.abc import Callable
from typing import NoReturn

import trio

TAKE_SIZE = 256 << 10
"""What one system call reads at most, and what is encrypted before it is sent: a stream holds a small multiple."""
_UNSENT_LOW = 128 << 10
"""A socket counts as writable again below this; with trio's own 16 KiB a sender is woken half as often again."""
_AT_ONCE = 256 << 10
"""Where a large message is under way, a receiver is woken when so much of it is there, and not for each packet."""
_LEAVE_S = 10.0
"""A thread that reads may still have to write to a slow disk before it can leave."""
_CLOSED = (errno.EBADF, errno.ENOTSOCK)


class Direct(trio.abc.Stream):
    """A trio stream with `take` and `give` beside the usual methods; all raise trio's stream errors.

    It takes the socket over: the stream it was made of is empty afterwards, and `transport_stream` is in its place.
    """

    may_be_here = 0
    """So much of what is expected may have come over the wire without a `take` having given it."""

    def __init__(self, transport: trio.SocketStream) -> None:
        raw = socket.socket(fileno=transport.socket.detach())
        self.transport_stream = trio.SocketStream(trio.socket.from_stdlib_socket(raw))
        self._raw = raw
        self._unsent = memoryview(b"")
        self._more = True
        self._expected = 0
        self._low_water = 1
        self._thread_left: trio.Event | None = None
        self._stop_thread: Callable[[], None] = _nothing
        self._sending = self._cut = self._closed = False
        self._wire, self._plain = _buffers()
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            _set(raw, socket.TCP_NOTSENT_LOWAT, _UNSENT_LOW)

    # Without waiting

    @abc.abstractmethod
    def take(self, max_bytes: int = TAKE_SIZE) -> memoryview | None:
        """What has come, at most `max_bytes`; empty at the end; None: nothing yet, wait until `readable`.

        The bytes are there until the next checkpoint or `take` of any stream.
        """

    @abc.abstractmethod
    def give(self, data: bytes | bytearray | memoryview) -> bool:
        """Sends `data`, at most `TAKE_SIZE`. False: some of it is left; `drain` before the next `give`."""

    async def readable(self) -> None:
        """Returns when another `take` is worth it; a checkpoint in any case."""
        if self._more:
            await trio.lowlevel.checkpoint()
        else:
            self.ask_for_plenty()
            await trio.lowlevel.wait_readable(self._raw)

    def expect(self, n_bytes: int) -> None:
        """At least so many more bytes will come, unless the stream breaks: `readable` may wait for a good part of them.
        Holds until it is called again."""
        self._expected = n_bytes

    def ask_for_plenty(self) -> None:
        """The socket is readable when so much is there as is worth a `take`."""
        n_bytes = max(1, min(self._expected - self.may_be_here, _AT_ONCE))
        if n_bytes != self._low_water:
            _set(self._raw, socket.SO_RCVLOWAT, n_bytes, socket.SOL_SOCKET)
            self._low_water = n_bytes

    async def drain(self) -> None:
        """Returns when all that was given is on its way."""
        while self._unsent:
            await trio.lowlevel.wait_writable(self._raw)
            self.push()

    def push(self) -> bool:
        """Sends what is left of what was given, without waiting; whether nothing is left."""
        if self._unsent:
            self._unsent = self._unsent[self._send(self._unsent) :]
        return not self._unsent

    @property
    def unsent(self) -> bool:
        """Some of what was given is left."""
        return bool(self._unsent)

    @property
    def has_more(self) -> bool:
        """Another `take` is worth it without waiting."""
        return self._more

    def fileno(self) -> int:
        """Of the socket."""
        return self._raw.fileno()

    def _receive(self, buffer: memoryview) -> int | None:
        """Bytes read, 0 at the end, None: nothing there."""
        try:
            n = self._raw.recv_into(buffer)
        except BlockingIOError:
            self._more = False
            return None
        except OSError as exc:
            _broken(exc)
        self._more = n == len(buffer)
        return n

    def _send(self, data: bytes | bytearray | memoryview) -> int:
        try:
            return self._raw.send(data)
        except BlockingIOError:
            return 0
        except OSError as exc:
            _broken(exc)

    # Read by a thread

    async def read_in_thread(self, work: Callable[[], None], stop: Callable[[], None]) -> None:
        """Runs `work` in a thread; only there are `take` and `wait` called meanwhile. When this is cancelled, or the
        stream is closed, `stop` is called, and the thread finds the end of the stream."""
        self.use_own_buffers(self)
        self._thread_left, self._stop_thread = trio.Event(), stop
        try:
            await run_in_thread(work, self._stop_reading)
        finally:
            self._thread_left.set()

    @staticmethod
    def use_own_buffers(*streams: Direct) -> None:
        """Those of one thread, which are not those of trio's."""
        wire, plain = _new_buffers()
        for stream in streams:
            stream._wire, stream._plain = wire, plain

    def _stop_reading(self) -> None:
        self._stop_thread()
        self.shut(socket.SHUT_RD)

    def shut(self, how: int = socket.SHUT_RDWR) -> None:
        """Whoever waits for the socket is woken: it is at its end."""
        try:
            self._raw.shutdown(how)
        except OSError:
            pass  # it is broken already

    async def _leave_thread(self) -> None:
        """Before the socket is closed: its number may be another socket's right after."""
        if self._thread_left is not None:
            self._stop_reading()
            with trio.move_on_after(_LEAVE_S, shield=True):
                await self._thread_left.wait()

    def wait(self, timeout_s: float) -> bool:
        """Blocks until another `take` is worth it; False if it was not in that time."""
        if self._more:
            return True
        self.ask_for_plenty()
        poll = select.poll()
        poll.register(self._raw, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    # trio.abc.Stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        self._check_open()
        await trio.lowlevel.checkpoint_if_cancelled()
        data = self.take(max_bytes or TAKE_SIZE)
        if data is not None:
            got = bytes(data)  # at the checkpoint others use the buffer
            await trio.lowlevel.cancel_shielded_checkpoint()
            return got
        while data is None:
            await self.readable()  # two receivers at once: trio says so here
            data = self.take(max_bytes or TAKE_SIZE)
        return bytes(data)

    def send_now(self, data: bytes) -> bool:
        """Sends at most `TAKE_SIZE` bytes without a checkpoint. False: some of it is left, `send_rest` comes next."""
        if self._sending:
            raise trio.BusyResourceError("another task is already sending")
        if self._cut:
            raise trio.BrokenResourceError("an earlier send was given up half way")
        self._cut = not self.give(data)
        return not self._cut

    async def send_rest(self) -> None:
        """Of what `send_now` did not send."""
        self._sending = True
        try:
            await self.drain()
            self._cut = False
        finally:
            self._sending = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is already sending")
        self._check_open()
        if self._cut:
            raise trio.BrokenResourceError("an earlier send was given up half way")
        await trio.lowlevel.checkpoint_if_cancelled()
        self._sending = self._cut = True
        try:
            await self._send_slices(memoryview(data))
            self._cut = False
        finally:
            self._sending = False

    async def _send_slices(self, data: memoryview) -> None:
        waited = False
        for start in range(0, len(data), TAKE_SIZE):
            if not self.give(data[start : start + TAKE_SIZE]):
                await self.drain()
                waited = True
        if not waited:
            await trio.lowlevel.cancel_shielded_checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is already sending")
        self._check_open()
        await trio.lowlevel.wait_writable(self._raw)

    async def aclose(self) -> None:
        self._closed = True
        await self._leave_thread()
        await self.transport_stream.aclose()

    def _check_ready(self) -> None:
        self._check_open()
        if self._unsent:
            raise trio.BusyResourceError("what was sent before is not through yet")

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("the stream was closed")


class SocketEnd(Direct):
    """A plain socket."""

    def take(self, max_bytes: int = TAKE_SIZE) -> memoryview | None:
        n = self._receive(self._plain[:max_bytes])
        return None if n is None else self._plain[:n]

    def give(self, data: bytes | bytearray | memoryview) -> bool:
        self._check_ready()
        n = self._send(data)
        if n == len(data):
            return True
        self._unsent = memoryview(bytes(data[n:]))  # `data` may lie in a buffer that others use next
        return False


async def run_in_thread(work: Callable[[], None], stop: Callable[[], None]) -> None:
    """Runs `work` in a thread of its own until it returns; when this is cancelled, `stop` asks it to."""

    async def stop_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            stop()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_when_cancelled)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(work, limiter=trio.CapacityLimiter(1))
        nursery.cancel_scope.cancel()


def direct(stream: trio.abc.Stream) -> trio.abc.Stream:
    """The stream as a `Direct` one if it can be; the given one must not be used any more then."""
    return SocketEnd(stream) if type(stream) is trio.SocketStream else stream


def _nothing() -> None:
    """No thread reads."""


_Buffers = tuple[memoryview, memoryview]
_shared: trio.lowlevel.RunVar[_Buffers] = trio.lowlevel.RunVar("direct.buffers")


def _buffers() -> _Buffers:
    """What all streams of a trio run read into, from the wire and for the taker: in use only between checkpoints."""
    try:
        return _shared.get()
    except LookupError:
        made = _new_buffers()
        _shared.set(made)
        return made


def _new_buffers() -> _Buffers:
    return memoryview(bytearray(TAKE_SIZE)), memoryview(bytearray(TAKE_SIZE + (32 << 10)))


def _set(raw: socket.socket, option: int, value: int, level: int = socket.IPPROTO_TCP) -> None:
    try:
        raw.setsockopt(level, option, value)
    except OSError:
        pass  # a connection already reset, or no TCP: neither is worth failing for


def _broken(exc: OSError) -> NoReturn:
    if exc.errno in _CLOSED:
        raise trio.ClosedResourceError("the socket was closed") from None
    raise trio.BrokenResourceError(f"socket connection broken: {exc}") from exc
