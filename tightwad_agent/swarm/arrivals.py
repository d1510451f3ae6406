"""Pieces on their way to the disk: written as they come, compared when they are whole, made durable several at once.

A piece may come from two sources at the same time, one of which lies. So only one of them writes as it comes; what the
other sends is kept in memory until it is whole and compared. And nothing is written into a piece that was found good.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import trio

from tightwad_agent.swarm.manifest import Manifest
from tightwad_agent.swarm.part import PartFile
from tightwad_agent.swarm.peer import Received

Durable = Callable[[str, int], None]
"""(source, piece): it is good, and will be there after a crash."""


class Found(Enum):
    """What a piece, or part of one, turned out to be."""

    MORE = "more to come"
    GOOD = "good"
    BAD = "bad"


@dataclass(slots=True)
class _Coming:
    """`kept`: in memory, since somebody else writes this piece; None: on the disk."""

    kept: bytearray | None
    digest: Any = field(default_factory=hashlib.sha256)


class Arrivals:
    """`run` must be running. `take` raises `DiskFull` or `OSError`; so does `run`, where making it durable fails."""

    def __init__(self, manifest: Manifest, part: PartFile, durable: Durable) -> None:
        self._pieces = manifest.pieces
        self._part = part
        self._durable = durable
        self._coming: dict[tuple[str, int], _Coming] = {}
        self._writers: dict[int, str] = {}
        self._locks: dict[int, trio.Lock] = {}
        self._good: dict[int, str] = {}
        """Compared, and not durable yet: from whom."""
        self._wake = trio.Event()

    async def take(self, source: str, came: Received) -> Found:
        """Bytes of a piece from `source`, in order. Of a piece that is good already more may come; what came before a
        `drop` is of no interest."""
        piece, key = came.piece, (source, came.piece)
        if came.offset == 0:
            self._begin(source, piece)
        coming = self._coming.get(key)
        if coming is None:
            return Found.MORE
        async with self._locks.setdefault(piece, trio.Lock()):
            if self._is_good(piece):
                self.drop(source, piece)
                return Found.GOOD
            await trio.to_thread.run_sync(self._store, coming, came)
            if not came.last:
                return Found.MORE
            good: bool = coming.digest.digest() == self._pieces[piece].sha256
            if good and coming.kept is not None:
                await trio.to_thread.run_sync(self._part.write_some, piece, 0, coming.kept)
            if good:
                self._good[piece] = source
        self.drop(source, piece)
        self._wake.set()
        return Found.GOOD if good else Found.BAD

    def drop(self, source: str, piece: int) -> None:
        """No more of it will come from there."""
        self._coming.pop((source, piece), None)
        if self._writers.get(piece) == source:
            del self._writers[piece]

    def drop_all(self, source: str) -> None:
        for name, piece in list(self._coming):
            if name == source:
                self.drop(source, piece)

    async def run(self) -> None:
        """Makes good pieces durable until cancelled."""
        while True:
            self._wake = trio.Event()
            if batch := dict(self._good):
                await trio.to_thread.run_sync(self._part.note, sorted(batch))
                for piece, source in batch.items():
                    self._durable(source, piece)
                    del self._good[piece]
                    self._locks.pop(piece, None)
            else:
                await self._wake.wait()

    def _begin(self, source: str, piece: int) -> None:
        writes = self._writers.setdefault(piece, source) == source
        self._coming[source, piece] = _Coming(None if writes else bytearray())

    def _is_good(self, piece: int) -> bool:
        return piece in self._good or piece in self._part.have

    def _store(self, coming: _Coming, came: Received) -> None:
        offset = came.offset
        for block in (came.data,) if isinstance(came.data, bytes) else came.data:
            coming.digest.update(block)
            if coming.kept is None:
                self._part.write_some(came.piece, offset, block)
            else:
                coming.kept += block
            offset += len(block)
