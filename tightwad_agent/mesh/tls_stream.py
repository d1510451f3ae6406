"""TLS as a `Direct` stream: OpenSSL between two memory buffers, a socket outside.

What goes into OpenSSL and comes out of it is a few copies in memory; the wire is touched once for many records. An end
without `close_notify` is a broken stream and not an end.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from typing import NoReturn, cast

import trio

from tightwad_agent.direct import TAKE_SIZE, Direct


class TlsStream(Direct):
    """One side of a TLS connection. `do_handshake` comes before everything else."""

    may_be_here = 17 << 10
    """A TLS record."""

    def __init__(self, transport: trio.SocketStream, context: ssl.SSLContext, *, server_side: bool = False) -> None:
        super().__init__(transport)
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=server_side)
        self._read = cast(Callable[[int, memoryview], int], self._tls.read)  # its type knows only the other form
        self._established = self._ended = False
        self._undecrypted = False
        self._fault: ssl.SSLError | None = None
        self._one_at_a_time = threading.Lock()
        """OpenSSL's connection is not made for a thread that reads while another writes."""

    async def do_handshake(self) -> None:
        """Raises `BrokenResourceError` from the `SSLError`; the alert that says why is left for `alert`."""
        while not self._shake():
            await self._flush()
            await self._feed()
        await self._flush()
        self._established = self._undecrypted = True  # the peer may have sent more in one go
        await trio.lowlevel.checkpoint()

    def _shake(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as exc:
            self._fail(exc)
        return True

    async def _feed(self) -> None:
        while (n := self._receive(self._wire)) is None:
            await self.readable()
        self._take_in(n)

    def _take_in(self, n: int) -> None:
        if n:
            self._in.write(self._wire[:n])
        else:
            self._in.write_eof()

    def alert(self) -> bytes:
        """After a failed handshake: what the peer should be told, once."""
        return self._out.read()

    def peer_der(self) -> bytes | None:
        """The peer's certificate after the handshake, if it showed one."""
        return self._tls.getpeercert(binary_form=True)

    def version(self) -> str | None:
        """`TLSv1.3`, after the handshake."""
        return self._tls.version()

    # Direct

    def take(self, max_bytes: int = TAKE_SIZE) -> memoryview | None:
        while True:
            if self._undecrypted and (n := self._decrypt(min(max_bytes, len(self._plain)))):
                return self._plain[:n]
            if self._fault is not None:
                self._fail(self._fault)
            if self._ended:
                return self._plain[:0]
            came = self._receive(self._wire)
            if came is None:
                return None
            self._take_in(came)
            self._undecrypted = True

    def _decrypt(self, limit: int) -> int:
        """Bytes decrypted into the shared buffer. 0: none yet, or the end, or a fault."""
        room, came = self._plain, self._in
        got = 0
        self._undecrypted = False
        try:
            while n := self._read_record(limit - got, room[got:]):
                got += n
                if got == limit:
                    self._undecrypted = self._more = True
                    return got
                if not came.pending:  # no record is left; asking OpenSSL would cost an exception
                    return got
            self._ended = self._more = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as exc:
            self._fault, self._more = exc, True
        return got

    def _read_record(self, limit: int, room: memoryview) -> int:
        with self._one_at_a_time:
            return self._read(limit, room)

    def give(self, data: bytes | bytearray | memoryview) -> bool:
        self._check_ready()
        try:
            with self._one_at_a_time:
                self._tls.write(data)
        except ssl.SSLError as exc:
            self._fail(exc)
        return self._push()

    def _push(self) -> bool:
        with self._one_at_a_time:
            records = self._out.read()
        n = self._send(records)
        if n == len(records):
            return True
        self._unsent = memoryview(records)[n:]
        return False

    async def _flush(self) -> None:
        if self._out.pending and not self._push():
            await self.drain()

    def _fail(self, exc: ssl.SSLError) -> NoReturn:
        raise trio.BrokenResourceError from exc

    # trio.abc.Stream

    async def aclose(self) -> None:
        """Says that this is the end, where that can be said; does not wait for the peer to say it."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._established and not (self._cut or self._unsent or self._fault):
                await self._say_goodbye()
        finally:
            await self._leave_thread()
            await self.transport_stream.aclose()

    async def _say_goodbye(self) -> None:
        try:
            with self._one_at_a_time:
                self._tls.unwrap()
        except ssl.SSLError:
            pass  # the peer has not said it yet
        try:
            await self._flush()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
