"""A model that is not all here yet: the `.part` file, and the journal of its finished pieces.

The journal names the model and the very file it speaks of (its inode), so a `.part` that was deleted, replaced or cut
is never believed; and every piece it lists is hashed again before it counts. A torn last record is dropped. A model of
several files has a `.part` for each (`part_paths`), one journal, and in place of the inode a hash of all inodes.

    journal  "TWJ1" | root 32 B | u64 inode | CRC-32 of these | records of 16 B: u32 piece | 8 B of its hash | CRC-32

Everything here blocks: call it in a thread. Reads and writes of different pieces may run at once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import threading
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tightwad_agent.errors import DiskFull
from tightwad_agent.swarm.files import (
    FreeBytes,
    Tick,
    copy_range,
    fsync_folder,
    is_full,
    no_tick,
    pread_exactly,
    pwrite_all,
    require_room,
    sha256_range,
    sync_data,
    write_all,
    write_atomic,
)
from tightwad_agent.swarm.manifest import Manifest

log = logging.getLogger(__name__)

_HEADER = struct.Struct("!4s32sQ")
_RECORD = struct.Struct("!I8s")
_CRC = struct.Struct("!I")
_MAGIC = b"TWJ1"
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


class PartFile:
    """Pieces in, pieces out, and a memory of which are good. Made by `open`; `close` when no thread uses it."""

    def __init__(
        self, paths: tuple[Path, ...], journal: Path, manifest: Manifest, fds: tuple[int, ...], have: set[int]
    ) -> None:
        self.paths = paths
        """The files on disk, in the order of the model's."""
        self.journal = journal
        self.manifest = manifest
        self.fds = fds
        self.have = have
        self._lock = threading.Lock()
        """For the journal."""
        self._in_use = threading.Lock()
        """Held while everything is synced, and to close."""
        self._journal_fd = -1

    @classmethod
    def open(cls, path: Path, journal: Path, manifest: Manifest, free: FreeBytes, tick: Tick = no_tick) -> PartFile:
        """Takes up a `.part` where it was left, or begins one. `tick` counts bytes that are checked again.

        Raises `DiskFull` before anything is written that would not fit.
        """
        paths = part_paths(path, manifest)
        journalled = claimed_pieces(path, journal, manifest)
        if not journalled:
            for old in (*paths, journal):
                old.unlink(missing_ok=True)
        fds = _allocate(paths, journal, manifest, free)
        part = cls(paths, journal, manifest, fds, set())
        try:
            part.have = part._verified(journalled, tick)
            part._begin_journal()
        except BaseException:
            part.close()
            raise
        return part

    @classmethod
    def restart(cls, path: Path, journal: Path, manifest: Manifest, have: Collection[int]) -> None:
        """Makes existing files a `.part` of which `have` is to be kept; the next `open` hashes that again."""
        paths = part_paths(path, manifest)
        part = cls(paths, journal, manifest, tuple(_open_all(paths, os.O_RDONLY)), set(have))
        try:
            part._begin_journal()
        finally:
            part.close()

    @property
    def path(self) -> Path:
        """The (first) file."""
        return self.paths[0]

    @property
    def fd(self) -> int:
        """Of the (first) file."""
        return self.fds[0]

    @property
    def n_bytes(self) -> int:
        """Bytes of pieces that are here and good."""
        return sum(self.manifest.pieces[i].length for i in self.have)

    def write(self, piece: int, data: bytes | bytearray) -> None:
        """Stores a piece whose hash was compared, durably, and notes it. `DiskFull` if there is no room after all.

        The caller adds it to `have`, in the one thread that iterates over it.
        """
        self.write_some(piece, 0, data)
        self.note([piece])
        self.sync()

    def copy_in(self, piece: int, source: int, start: int, tick: Tick = no_tick) -> bool:
        """Copies a piece from `start` of another open file; whether it is that piece is seen here, after copying.

        It does not count before `note`. Raises as `write` does; `tick` gets the bytes of this piece.
        """
        length, sha256 = self.manifest.pieces[piece][1:]
        fd, offset = self._place(piece)
        with self._full_is_said():
            copied = copy_range(source, start, fd, offset, length, tick=tick)
        return copied and sha256_range(fd, offset, length) == sha256

    def write_some(self, piece: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Bytes of a piece that is not compared yet; they count only once it was, and after `note`."""
        with self._full_is_said():
            fd, start = self._place(piece)
            pwrite_all(fd, data, start + offset)

    def note(self, pieces: Collection[int]) -> None:
        """Puts pieces that were written and compared into the journal: they are there after a crash of this process.
        After one of the machine as well once `sync` has run; what the journal lists by mistake then, `open` finds."""
        with self._full_is_said(), self._lock:
            write_all(self._journal_fd, b"".join(_record(i, self.manifest) for i in pieces))

    def sync(self) -> None:
        """Everything that was written and noted so far is on the disk. Nothing happens once it is closed."""
        with self._full_is_said(), self._in_use:
            for fd in (*self.fds, self._journal_fd):
                if fd >= 0:
                    sync_data(fd)

    @contextmanager
    def _full_is_said(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            if is_full(exc):
                raise DiskFull(f"the disk of {self.path.parent} is full: {exc.strerror}") from None
            raise

    def read(self, piece: int, offset: int, length: int) -> bytes | None:
        """Bytes from inside a piece; None if it is not here."""
        if piece not in self.have:
            return None
        fd, start = self._place(piece)
        return pread_exactly(fd, start + offset, length)

    def close(self) -> None:
        with self._in_use:
            for fd in (*self.fds, self._journal_fd):
                if fd >= 0:
                    os.close(fd)
            self.fds, self._journal_fd = (-1,) * len(self.fds), -1

    def _place(self, piece: int) -> tuple[int, int]:
        """(open file, offset in it)."""
        index, offset = self.manifest.place(piece)
        return self.fds[index], offset

    def _verified(self, journalled: set[int], tick: Tick) -> set[int]:
        good: set[int] = set()
        done = 0
        for index in sorted(journalled):
            piece = self.manifest.pieces[index]
            fd, offset = self._place(index)
            if sha256_range(fd, offset, piece.length, tick, done) == piece.sha256:
                good.add(index)
            else:
                log.warning("%s: piece %d is not what the journal says, it is fetched again", self.path.name, index)
            done += piece.length
        return good

    def _begin_journal(self) -> None:
        mark = _mark([os.fstat(fd).st_ino for fd in self.fds])
        head = _HEADER.pack(_MAGIC, bytes.fromhex(self.manifest.root), mark)
        records = b"".join(_record(i, self.manifest) for i in sorted(self.have))
        write_atomic(self.journal, head + _CRC.pack(zlib.crc32(head)) + records)
        self._journal_fd = os.open(self.journal, os.O_WRONLY | os.O_APPEND | _NO_FOLLOW)


def part_paths(path: Path, manifest: Manifest) -> tuple[Path, ...]:
    """ROOT.part, and for further files ROOT.00002.part and so on."""
    return named_parts(path, len(manifest.sizes))


def named_parts(path: Path, n_files: int) -> tuple[Path, ...]:
    """`part_paths` of any model of so many files."""
    return (path, *(path.with_suffix(f".{i:05d}.part") for i in range(2, n_files + 1)))


def _mark(inodes: Sequence[int]) -> int:
    """One number for all files: the inode where there is one file, else 64 bits of a hash over all."""
    if len(inodes) == 1:
        return inodes[0]
    return int.from_bytes(hashlib.sha256(b"".join(i.to_bytes(16, "big") for i in inodes)).digest()[:8], "big")


def _record(piece: int, manifest: Manifest) -> bytes:
    body = _RECORD.pack(piece, manifest.pieces[piece].sha256[:8])
    return body + _CRC.pack(zlib.crc32(body))


def claimed_pieces(path: Path, journal: Path, manifest: Manifest) -> set[int]:
    """Pieces that should be in a `.part` which may be in use; hash them before they are believed."""
    inodes = [_inode(p) for p in part_paths(path, manifest)]
    return _read_journal(journal, manifest, _mark([i for i in inodes if i is not None]) if all(inodes) else None)


def _read_journal(journal: Path, manifest: Manifest, inode: int | None) -> set[int]:
    """Pieces that the journal lists for this model in this file; none where it speaks of others, or is damaged."""
    n_head = _HEADER.size + _CRC.size
    n_record = _RECORD.size + _CRC.size
    try:
        data = journal.read_bytes()
    except OSError:
        return set()
    if (
        inode is None
        or len(data) < n_head
        or _CRC.unpack_from(data, _HEADER.size)[0] != zlib.crc32(data[: _HEADER.size])
    ):
        return set()
    if _HEADER.unpack_from(data) != (_MAGIC, bytes.fromhex(manifest.root), inode):
        return set()
    pieces = set()
    for at in range(n_head, len(data) - n_record + 1, n_record):
        body = data[at : at + _RECORD.size]
        index, prefix = _RECORD.unpack(body)
        if _CRC.unpack_from(data, at + _RECORD.size)[0] != zlib.crc32(body):
            break
        if index < len(manifest.pieces) and manifest.pieces[index].sha256[:8] == prefix:
            pieces.add(index)
    return pieces


def _inode(path: Path) -> int | None:
    try:
        return os.lstat(path).st_ino
    except OSError:
        return None


def _open_all(paths: Sequence[Path], flags: int) -> list[int]:
    fds: list[int] = []
    try:
        fds.extend(os.open(path, flags | _NO_FOLLOW, 0o644) for path in paths)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def _allocate(paths: Sequence[Path], journal: Path, manifest: Manifest, free: FreeBytes) -> tuple[int, ...]:
    """The open files in their full size, with room reserved where the system can."""
    folder = paths[0].parent
    fds = _open_all(paths, os.O_RDWR | os.O_CREAT)
    try:
        allocated = sum(getattr(os.fstat(fd), "st_blocks", 0) * 512 for fd in fds)
        require_room(folder, max(0, manifest.size - allocated), str(manifest.name), free)
        for fd, size in zip(fds, manifest.sizes, strict=True):
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, size)
            os.ftruncate(fd, size)
    except BaseException as exc:
        for fd in fds:
            os.close(fd)
        if isinstance(exc, DiskFull) or (isinstance(exc, OSError) and is_full(exc)):
            _drop_if_unused(paths, journal)
        if isinstance(exc, OSError) and is_full(exc):
            raise DiskFull(f"the disk of {folder} has no room for {manifest.name}: {exc.strerror}") from None
        raise
    fsync_folder(folder)
    return tuple(fds)


def _drop_if_unused(paths: Sequence[Path], journal: Path) -> None:
    """A `.part` without journalled pieces only takes room."""
    if not journal.exists():
        for path in paths:
            path.unlink(missing_ok=True)
