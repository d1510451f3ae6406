"""What comes over one link: blocks go straight to the disk, messages to the conversation.

`Intake` takes bytes in any cut. Where the stream is a socket's a thread of its own reads them (`ThreadedReader`):
decrypting, hashing and writing then cost no task switch for each part of them. Other streams, as those of tests, are
read by the task that asks (`PlainReader`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Protocol

import trio

from tightwad_agent.direct import Direct
from tightwad_agent.errors import DiskFull, PeerError, PeerGone, PeerSilent
from tightwad_agent.streams import STREAM_ERRORS, gone, peer_errors
from tightwad_agent.swarm.arrivals import Found, Source
from tightwad_agent.wire.frames import Begun, StreamingDecoder
from tightwad_agent.wire.swarm import BLOCK_BYTES, CODEC, MAX_SWARM_HEADER, Block

SILENCE_S: Final = 50.0
LOOK_S: Final = 1.0
"""How often a thread that waits looks whether the silence has become too long."""
MAX_ITEMS: Final = 64
"""Messages that nobody has asked for yet; then no more is read."""
KEPT_S: Final = 0.02
"""That more of a piece has come is told so late, if nothing else happens."""


@dataclass(frozen=True, slots=True)
class Landed:
    """A payload, which is where it belongs by now: its length, and what became of the piece. `failure`: it could not be
    written."""

    n_bytes: int
    found: Found = Found.MORE
    failure: DiskFull | OSError | None = None

    def __len__(self) -> int:
        return self.n_bytes


Item = tuple[Any, Landed]
"""A message, and its payload."""


class Intake:
    """Bytes in, items out. `wants(piece)` says whether the bytes of a piece are of interest; no `source`: none are."""

    def __init__(self, source: Source | None, lengths: Sequence[int], wants: Callable[[int], bool]) -> None:
        self._source = source
        self._lengths = lengths
        self._wants = wants
        self._decoder = StreamingDecoder(MAX_SWARM_HEADER, BLOCK_BYTES)
        self._message: Any = None
        self._n_payload = 0
        self._takes = False
        self._failure: DiskFull | OSError | None = None

    @property
    def missing(self) -> int:
        """Bytes that will come for certain, if the peer keeps to the rules."""
        return self._decoder.missing

    def feed(self, data: bytes | memoryview, items: list[Item]) -> None:
        """Adds to `items` what is complete by now. Raises `ProtocolError`; blocks where the disk is slow."""
        for part in self._decoder.feed(memoryview(data)):
            if isinstance(part, Begun):
                self._begin(part)
            elif self._takes:
                self._put(part)
            if not self._decoder.left:
                items.append((self._message, self._end()))

    def drop(self, piece: int) -> None:
        """It will not come to its end."""
        if self._source is not None:
            self._source.drop(piece)

    def close(self) -> None:
        """Nothing more that comes is of interest."""
        if self._source is not None:
            self._source.close()

    def eof(self) -> PeerGone:
        """The stream has ended: how to say it."""
        try:
            self._decoder.eof()
        except PeerGone as exc:
            return exc
        return PeerGone("the connection was closed")

    def _begin(self, begun: Begun) -> None:
        self._message, self._n_payload = CODEC.decode(begun.header), begun.n_payload
        self._takes = self._source is not None and isinstance(self._message, Block) and self._fits(self._message)

    def _fits(self, block: Block) -> bool:
        """A block that was asked for, and does not reach beyond its piece; what is wrong with others is said later."""
        return self._wants(block.piece) and 0 <= block.offset <= self._lengths[block.piece] - self._n_payload

    def _put(self, part: memoryview) -> None:
        assert self._source is not None
        at = self._message.offset + self._n_payload - self._decoder.left - len(part)
        try:
            self._source.put(self._message.piece, at, part)
        except (DiskFull, OSError) as exc:
            self._failure, self._takes = exc, False

    def _end(self) -> Landed:
        found, block = Found.MORE, self._message
        if self._takes and block.offset + self._n_payload == self._lengths[block.piece]:
            assert self._source is not None
            try:
                found = self._source.finish(block.piece)
            except (DiskFull, OSError) as exc:
                self._failure = exc
        self._takes = False
        return Landed(self._n_payload, found, self._failure)


class Reader(Protocol):
    """`run` as a task of its own; `get` until it raises a `PeerError`."""

    async def run(self) -> None: ...

    async def get(self) -> list[Item]: ...


def reader_of(stream: trio.abc.Stream, rest: bytes, intake: Intake) -> Reader:
    """`rest` was read of the stream before."""
    return ThreadedReader(stream, rest, intake) if isinstance(stream, Direct) else PlainReader(stream, rest, intake)


class PlainReader:
    """Reads when it is asked."""

    def __init__(self, stream: trio.abc.Stream, rest: bytes, intake: Intake) -> None:
        self._stream, self._rest, self._intake = stream, rest, intake
        self._error: PeerError | None = None

    async def run(self) -> None:
        """Nothing to do."""

    async def get(self) -> list[Item]:
        items: list[Item] = []
        while not items:
            if self._error is not None:
                raise self._error
            data, self._rest = self._rest, b""
            if not data:
                with peer_errors(SILENCE_S):
                    data = bytes(await self._stream.receive_some(BLOCK_BYTES))
                if not data:
                    raise self._intake.eof()
            try:
                await trio.to_thread.run_sync(self._intake.feed, data, items)
            except PeerError as exc:
                self._error = exc
        return items


class ThreadedReader:
    """A thread reads as long as what it has read is asked for."""

    def __init__(self, stream: Direct, rest: bytes, intake: Intake) -> None:
        self._stream, self._rest, self._intake = stream, rest, intake
        self._items: list[Item] = []
        self._kept: list[Item] = []
        """As `_items`, before they are told."""
        self._kept_since = 0.0
        self._error: PeerError | None = None
        self._stopped = False
        self._changed = threading.Condition()
        self._wake = trio.Event()
        self._token: trio.lowlevel.TrioToken | None = None

    async def run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        await self._stream.read_in_thread(self._read, self._stop)

    def _stop(self) -> None:
        self._stopped = True
        with self._changed:
            self._changed.notify()

    async def get(self) -> list[Item]:
        while not self._items:
            if self._error is not None:
                raise self._error
            self._wake = trio.Event()
            await self._wake.wait()
        with self._changed:
            items, self._items = self._items, []
            self._changed.notify()
        return items

    def _read(self) -> None:
        """In the thread."""
        error: PeerError
        try:
            self._read_on()
        except PeerError as exc:
            error = exc
        except STREAM_ERRORS as exc:
            error = gone(exc)
        self._hand_on()
        self._error = error
        self._tell()

    def _read_on(self) -> NoReturn:
        stream, intake = self._stream, self._intake
        self._feed(self._rest, time.monotonic())
        heard = time.monotonic()
        while not self._stopped:
            stream.expect(intake.missing)
            data = stream.take()
            if data is None:
                if not stream.wait(KEPT_S if self._kept else LOOK_S):
                    self._hand_on()
                    if time.monotonic() - heard > SILENCE_S:
                        raise PeerSilent(f"no answer within {SILENCE_S:g} s")
                continue
            if not data:
                raise intake.eof()
            heard = time.monotonic()
            self._feed(data, heard)
        raise PeerGone("the connection was given up")

    def _feed(self, data: bytes | memoryview, now: float) -> None:
        if not self._kept:
            self._kept_since = now
        try:
            self._intake.feed(data, self._kept)
        except PeerError:
            self._hand_on()
            raise
        if now - self._kept_since > KEPT_S or not all(map(_can_wait, self._kept)):
            self._hand_on()

    def _hand_on(self) -> None:
        if not self._kept:
            return
        with self._changed:
            while len(self._items) >= MAX_ITEMS and not self._stopped:
                self._changed.wait(LOOK_S)
            self._items += self._kept
        self._kept = []
        self._tell()

    def _tell(self) -> None:
        assert self._token is not None
        try:
            self._token.run_sync_soon(self._came, idempotent=True)
        except trio.RunFinishedError:
            self._stopped = True

    def _came(self) -> None:
        self._wake.set()


def _can_wait(item: Item) -> bool:
    """More of a piece, and all is well."""
    message, landed = item
    return isinstance(message, Block) and landed.found is Found.MORE and landed.failure is None
