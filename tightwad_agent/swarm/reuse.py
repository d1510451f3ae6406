"""Pieces of a wanted model that are on this disk already, whatever file they are in.

Equal hashes mean equal bytes: a changed header or another mixture of quantisations costs only what differs. Nothing
found here is believed; each piece is hashed again where it was copied to before it counts. What is missing is compared
with one held model at a time, so no index stays in memory.

Blocks: call it in a thread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tightwad_agent.ids import ModelId
from tightwad_agent.swarm.files import Identity, Tick, no_tick, sha256_range
from tightwad_agent.swarm.manifest import Manifest
from tightwad_agent.swarm.part import PartFile

log = logging.getLogger(__name__)

NOTE_BYTES = 256 << 20
"""How much is copied before it is made durable and noted: after a crash, so much is copied again."""

OnRot = Callable[[ModelId], None]


@dataclass(frozen=True, slots=True)
class Held:
    """Files that should have these `pieces` of `manifest`. `identities` (None: any) tell whether they are still the
    ones that were hashed."""

    manifest: Manifest
    paths: tuple[Path, ...]
    identities: tuple[Identity, ...] | None
    pieces: Collection[int]


class Missing:
    """The pieces that a model lacks, by hash."""

    def __init__(self, manifest: Manifest, have: Collection[int]) -> None:
        self._by_hash: dict[bytes, list[int]] = {}
        for index, piece in enumerate(manifest.pieces):
            if index not in have:
                self._by_hash.setdefault(piece.sha256, []).append(index)

    def __bool__(self) -> bool:
        return bool(self._by_hash)

    def in_(self, manifest: Manifest, pieces: Iterable[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(piece there, pieces here) for each hash that is missing and among `pieces` of `manifest`, in their order."""
        seen = set()
        for index in pieces:
            sha256 = manifest.pieces[index].sha256
            if sha256 in self._by_hash and sha256 not in seen:
                seen.add(sha256)
                yield index, tuple(self._by_hash[sha256])

    def found(self, sha256: bytes) -> None:
        """All pieces with this hash are here now."""
        del self._by_hash[sha256]


def take_local(part: PartFile, held: Iterable[Held], tick: Tick = no_tick, on_rot: OnRot = lambda _m: None) -> int:
    """Copies into `part` what `held` files and `part` itself have of it; returns the bytes that came so.

    `tick` counts the bytes copied. `on_rot` hears of a model whose file has its old identity, but other bytes. Raises
    `DiskFull`, `OSError` of `part`'s own disk, and what `tick` raises; what was copied until then is kept.
    """
    return _Copying(part, tick, on_rot).run(held)


class _Copying:
    def __init__(self, part: PartFile, tick: Tick, on_rot: OnRot) -> None:
        self._part = part
        self._tick = tick
        self._on_rot = on_rot
        self._missing = Missing(part.manifest, part.have)
        self._n_bytes = 0
        self._not_noted: list[int] = []
        self._noted_at = 0

    def run(self, held: Iterable[Held]) -> int:
        try:
            for source in held:
                if not self._missing:
                    break
                self._from(source)
            self._from(Held(self._part.manifest, self._part.paths, None, sorted(self._part.have)))
        finally:
            self._note()
        return self._n_bytes

    def _from(self, source: Held) -> None:
        matches = list(self._missing.in_(source.manifest, source.pieces))
        by_file: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
        for there, here in matches:
            by_file.setdefault(source.manifest.place(there)[0], []).append((there, here))
        for index, found in by_file.items():
            self._from_file(source, index, found)

    def _from_file(self, source: Held, index: int, found: list[tuple[int, tuple[int, ...]]]) -> None:
        path = source.paths[index]
        try:
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as exc:
            log.warning("%s is left out, it cannot be read: %s", path, exc.strerror)
            return
        try:
            for there, here in found:
                if source.identities is not None and Identity.of(os.fstat(fd)) != source.identities[index]:
                    log.warning("%s is left out, it changed", path)
                    return
                self._copy(source, fd, there, here)
        finally:
            os.close(fd)

    def _copy(self, source: Held, fd: int, there: int, here: tuple[int, ...]) -> None:
        _, offset = source.manifest.place(there)
        for piece in here:
            if not self._part.copy_in(piece, fd, offset, lambda n: self._tick(self._n_bytes + n)):
                self._not_the_same(source, fd, there)
                return
            self._part.have.add(piece)
            self._not_noted.append(piece)
            self._n_bytes += self._part.manifest.pieces[piece].length
            if self._n_bytes - self._noted_at >= NOTE_BYTES:
                self._note()
        self._missing.found(source.manifest.pieces[there].sha256)

    def _not_the_same(self, source: Held, fd: int, there: int) -> None:
        log.warning("piece %d of %s is not what it was, it is not reused", there, source.manifest.name)
        _, offset = source.manifest.place(there)
        piece = source.manifest.pieces[there]
        if source.identities is not None and sha256_range(fd, offset, piece.length) != piece.sha256:
            self._on_rot(source.manifest.root)

    def _note(self) -> None:
        done, self._not_noted = self._not_noted, []
        self._noted_at = self._n_bytes
        if done:
            self._part.note(done)
            self._part.sync()
