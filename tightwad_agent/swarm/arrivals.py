"""Pieces on their way to the disk: hashed and written as they come, compared when they are whole.

A piece may come from two sources at the same time, one of which lies. So only one of them writes as it comes; what the
other sends is kept in memory until it is whole and compared. And nothing is written into a piece that was found good.

Each source has a thread that reads from it and calls its `Source`; the rest happens in the thread of trio.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

import trio

from tightwad_agent.swarm.manifest import Manifest
from tightwad_agent.swarm.part import PartFile

SYNC_S: Final = 1.0
"""What came is on the disk itself after so long and the time that syncing takes: a power failure costs no more."""


class Found(Enum):
    """What a piece, or part of one, turned out to be."""

    MORE = "more to come"
    GOOD = "good"
    BAD = "bad"


@dataclass(slots=True)
class _Coming:
    """`kept`: in memory, since somebody else writes this piece; None: on the disk."""

    kept: bytearray | None
    n_bytes: int = 0
    digest: Any = field(default_factory=hashlib.sha256)


class Arrivals:
    """What has come of a model. `run` must be running, and raises `DiskFull` or `OSError` where syncing fails."""

    def __init__(self, manifest: Manifest, part: PartFile) -> None:
        self.pieces = manifest.pieces
        self._part = part
        self._good: set[int] = set()
        self._lock = threading.Lock()
        self._writers: dict[int, Source] = {}
        self._busy: dict[int, threading.Lock] = {}
        """Held while a piece is written to or judged."""
        self._wake = trio.Event()

    def source(self) -> Source:
        """For what one peer sends over one stream."""
        return Source(self)

    def noted(self) -> None:
        """There is something new to be synced."""
        self._wake.set()

    async def run(self) -> None:
        """Syncs until cancelled."""
        while True:
            await self._wake.wait()
            await trio.sleep(SYNC_S)
            self._wake = trio.Event()
            await trio.to_thread.run_sync(self._part.sync)

    # For sources

    def begin(self, source: Source, piece: int) -> bool:
        """Whether it is this source that writes the piece."""
        with self._lock:
            self._busy.setdefault(piece, threading.Lock())
            writer = self._writers.get(piece)
            if writer is None or writer.closed:
                self._writers[piece] = source
            return self._writers[piece] is source

    def leave(self, source: Source, piece: int) -> None:
        """The source has nothing more of this piece."""
        with self._lock:
            if self._writers.get(piece) is source:
                del self._writers[piece]

    def write(self, source: Source, piece: int, offset: int, data: bytes | memoryview) -> None:
        with self._busy[piece]:
            if self._writers.get(piece) is source and not self._is_good(piece):
                self._part.write_some(piece, offset, data)

    def accept(self, piece: int, kept: bytearray | None) -> None:
        """The hash is right; `kept` is not on the disk yet."""
        with self._busy[piece]:
            if self._is_good(piece):
                return
            if kept is not None:
                self._part.write_some(piece, 0, kept)
            self._part.note([piece])
            self._good.add(piece)

    def _is_good(self, piece: int) -> bool:
        return piece in self._good or piece in self._part.have


class Source:
    """`put` and `finish` belong to one thread, which may block in them; both raise `DiskFull` or `OSError`. `drop` and
    `close` may be called by another: of what is dropped nothing more is taken."""

    def __init__(self, arrivals: Arrivals) -> None:
        self._arrivals = arrivals
        self._coming: dict[int, _Coming] = {}
        self.closed = False

    def put(self, piece: int, offset: int, data: bytes | memoryview) -> None:
        """Bytes of a piece, in order; others are ignored."""
        if offset == 0 and not self.closed:
            writes = self._arrivals.begin(self, piece)
            self._coming[piece] = _Coming(None if writes else bytearray())
        coming = self._coming.get(piece)
        if coming is None or coming.n_bytes != offset:
            return
        coming.n_bytes += len(data)
        coming.digest.update(data)
        if coming.kept is None:
            self._arrivals.write(self, piece, offset, data)
        else:
            coming.kept += data

    def finish(self, piece: int) -> Found:
        """All bytes of a piece came. `MORE`: it was dropped before."""
        coming = self._coming.pop(piece, None)
        place = self._arrivals.pieces[piece]
        if coming is None or coming.n_bytes != place.length:
            return Found.MORE
        try:
            if coming.digest.digest() != place.sha256:
                return Found.BAD
            self._arrivals.accept(piece, coming.kept)
            return Found.GOOD
        finally:
            self._arrivals.leave(self, piece)

    def take(self, piece: int, data: bytes) -> Found:
        """A whole piece."""
        self.put(piece, 0, data)
        return self.finish(piece)

    def drop(self, piece: int) -> None:
        """No more of it will come."""
        self._coming.pop(piece, None)
        self._arrivals.leave(self, piece)

    def close(self) -> None:
        """Nothing more will come."""
        self.closed = True
        for piece in list(self._coming):
            self.drop(piece)
