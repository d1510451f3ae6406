"""Frames over a local socket whose other end is a child: sending never waits, receiving is one task."""

from __future__ import annotations

import socket
from collections.abc import Callable

import trio

from tightwad_agent.errors import ProtocolError
from tightwad_agent.wire.frames import FrameDecoder, encode

READ_SIZE = 64 << 10


class FrameSocket:
    """Takes over a connected stream socket. What the other end does not read at once waits in an outbox of at most
    `max_outbox` bytes, which `run` empties."""

    def __init__(self, sock: socket.socket, *, max_header: int, max_outbox: int) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder = FrameDecoder(max_header)
        self._max_outbox = max_outbox
        self._outbox = bytearray()
        self._waiting = trio.Event()
        self._broken = False

    def send(self, header: bytes) -> bool:
        """Sends a frame, now or later; `False` if the outbox cannot take it. Does nothing once the other end is gone:
        `run` finds its end behind what it still said."""
        data = encode(header)
        if not self._outbox:
            data = data[self._try(data) :]
        if not data or self._broken:
            return True
        if len(self._outbox) + len(data) > self._max_outbox:
            return False
        self._outbox += data
        self._waiting.set()
        return True

    async def run(self, take: Callable[[bytes], None]) -> str:
        """Calls `take` with each frame's header, at once; returns why there are no more: what was wrong with the bytes,
        or empty text at their end."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drain)
            why = await self._read(take)
            nursery.cancel_scope.cancel()
        return why

    def close(self) -> None:
        """Idempotent. `run` must be over."""
        self._broken = True
        self._outbox.clear()
        self._sock.close()

    async def _read(self, take: Callable[[bytes], None]) -> str:
        try:
            while data := await self._receive():
                for frame in self._decoder.feed(data):
                    take(frame.header)
        except ProtocolError as exc:
            return exc.message
        return ""

    async def _receive(self) -> bytes:
        """The next bytes; none at the end."""
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                return self._sock.recv(READ_SIZE)
            except BlockingIOError:
                continue
            except OSError:
                return b""  # reset: it went away without having read everything

    async def _drain(self) -> None:
        while True:
            await self._waiting.wait()
            await trio.lowlevel.wait_writable(self._sock)
            del self._outbox[: self._try(self._outbox)]
            if self._broken or not self._outbox:
                self._outbox.clear()
                self._waiting = trio.Event()

    def _try(self, data: bytes | bytearray) -> int:
        """How many bytes went."""
        if self._broken:
            return 0
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._broken = True
            return 0
