"""A stream of framed messages whose senders never wait: one task writes what they left, in as few writes as it can."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from tightwad_agent.direct import Direct
from tightwad_agent.errors import PeerError, PeerGone, PeerSilent
from tightwad_agent.streams import READ_SIZE, peer_errors
from tightwad_agent.wire.codec import Codec
from tightwad_agent.wire.frames import FrameDecoder, encode

SEND_S = 10.0

Rest = Callable[[], Awaitable[None]]


class Outbox:
    """`carry` moves messages both ways. `max_bytes`: a peer that leaves more of ours unread is given up."""

    def __init__(self, stream: trio.abc.Stream, codec: Codec, max_bytes: int) -> None:
        self._stream = stream
        self._codec = codec
        self._max_bytes = max_bytes
        self._data = bytearray()
        self._closing = False
        self._failed = ""
        self._writing = trio.CancelScope()
        self._wake = trio.Event()
        self._read_on: Callable[[bytes | memoryview], None] | None = None

    def post(self, message: object) -> None:
        """Never blocks. Does nothing once too much is waiting: `carry` is about to end then."""
        if self._failed:
            return
        self._data += encode(self._codec.encode(message))
        if len(self._data) > self._max_bytes:
            self._failed = f"{len(self._data)} bytes wait for a peer that does not read"
            self._data.clear()
            self._writing.cancel()
        self._wake.set()

    def close(self) -> None:
        """What was posted is still sent; then `carry` returns."""
        self._closing = True
        self._wake.set()

    async def carry(
        self, codec: Codec, max_header: int, take: Callable[[list[Any]], None], rest: Rest | None = None
    ) -> str:
        """Writes what is posted, and gives what arrives to `take`, which may raise a `PeerError`; returns why it
        ended. `rest` is awaited before the next read: it can take its time."""
        why = "it was closed here"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read, codec, max_header, take, rest)
                await self._write()
                nursery.cancel_scope.cancel()
        except* PeerError as group:
            why = str(first_error(group))
        return why

    async def _write(self) -> None:
        """One scope for all writes, with a deadline while one is under way: a scope for each would cost as much as the
        writing."""
        with self._writing, peer_errors():
            while await self._something():
                data, self._data = self._data, bytearray()
                self._writing.deadline = trio.current_time() + SEND_S
                await self._stream.send_all(data)
                self._writing.deadline = math.inf
            return
        raise PeerSilent(self._failed or f"nothing could be sent for {SEND_S:g} s")

    async def _something(self) -> bool:
        """Waits for something to write; false if there will be nothing."""
        while not (self._data or self._closing):
            self._wake = trio.Event()
            await self._wake.wait()
        return bool(self._data)

    def collect(self) -> None:
        """Takes what has arrived, where that needs no waiting; `carry` ends if something is wrong with it."""
        if self._read_on is None or self._failed or not isinstance(self._stream, Direct):
            return
        try:
            data = self._stream.take(READ_SIZE)
            if data is not None:
                self._read_on(data)
        except (PeerError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self._failed = str(exc) or "the connection broke"
            self._writing.cancel()

    async def _read(self, codec: Codec, max_header: int, take: Callable[[list[Any]], None], rest: Rest | None) -> None:
        decoder = FrameDecoder(max_header)

        def read_on(data: bytes | memoryview) -> None:
            if not data:
                raise PeerGone("the connection was closed")
            if frames := decoder.feed(data):
                take([codec.decode(frame.header) for frame in frames])

        self._read_on = read_on
        with peer_errors():
            while True:
                read_on(await received(self._stream))
                if rest is not None:
                    await rest()


async def received(stream: trio.abc.Stream) -> bytes | memoryview:
    """The next bytes; empty at the end. A stream that can be read in place is, with one task switch and not two."""
    if not isinstance(stream, Direct):
        return bytes(await stream.receive_some(READ_SIZE))
    while True:
        await stream.readable()
        data = stream.take(READ_SIZE)
        if data is not None:
            return data


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error in a group of groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
