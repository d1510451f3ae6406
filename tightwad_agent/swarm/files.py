"""Files written so that a crash at any point leaves the old or the new, and hashed without stopping the loop.

Everything here blocks: call it in a thread. A `Tick` is called between chunks with the bytes done so far; it reports
progress, and what it raises (a cancellation) ends the work.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tightwad_agent.errors import DiskFull, ModelError
from tightwad_agent.swarm.manifest import Piece

CHUNK_BYTES = 1 << 20
READ_BYTES = 2 << 20
_N_BUFFERS = 6
COPY_BYTES = 16 << 20

# what copy_file_range says where it does not exist or cannot serve these two files
_NO_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})

Tick = Callable[[int], None]
FreeBytes = Callable[[Path], int]


class Identity(NamedTuple):
    """Tells, without reading it, whether a file is still the one it was."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)

    @classmethod
    def at(cls, path: Path) -> Identity | None:
        """None where no regular file can be reached."""
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return None
        return cls.of(status) if stat.S_ISREG(status.st_mode) else None


def no_tick(_n_bytes: int) -> None:
    """Nobody is interested."""


def free_bytes(path: Path) -> int:
    """What an ordinary user may still write on the disk that `path` is on."""
    return shutil.disk_usage(path).free


def is_full(exc: OSError) -> bool:
    """Whether a write failed for lack of room (or quota)."""
    return exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def require_room(folder: Path, needed: int, what: str, free: FreeBytes) -> None:
    """Raises `DiskFull` with the arithmetic if `needed` bytes do not fit."""
    left = free(folder)
    if needed > left:
        raise DiskFull(
            f"{what} needs {needed:,} more bytes on the disk of {folder}, "
            f"{left:,} are free: {needed - left:,} are missing",
            hint="Free some room (it goes on by itself), or choose another models_dir.",
        )


def require_writable(*folders: Path) -> None:
    """Raises `PermissionError` for the first in which no file can be made."""
    for folder in folders:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"{folder} is not writable", str(folder))


def fsync_folder(folder: Path) -> None:
    """Makes renames and new names in a folder durable, where the system can."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # Windows cannot open folders, and needs no such thing
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_data(fd: int) -> None:
    """`fdatasync`, where there is one."""
    getattr(os, "fdatasync", os.fsync)(fd)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces a small file whole; `DiskFull` if there is no room."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError as exc:
        temporary.unlink(missing_ok=True)
        if is_full(exc):
            raise DiskFull(f"no room for {path.name} in {path.parent}: {exc.strerror}") from None
        raise
    fsync_folder(path.parent)


def write_all(fd: int, data: bytes) -> None:
    """`os.write` until everything is written."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def pread_exactly(fd: int, offset: int, n: int) -> bytes | None:
    """`n` bytes from `offset`; None if the file ends before."""
    parts = []
    while n:
        data = os.pread(fd, n, offset)
        if not data:
            return None
        parts.append(data)
        offset, n = offset + len(data), n - len(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def sha256_range(fd: int, offset: int, length: int, tick: Tick = no_tick, done: int = 0) -> bytes | None:
    """SHA-256 of part of a file; None if the file ends before. `tick` gets `done` plus what was read here."""
    digest = hashlib.sha256()
    for at in range(0, length, CHUNK_BYTES):
        data = pread_exactly(fd, offset + at, min(CHUNK_BYTES, length - at))
        if data is None:
            return None
        digest.update(data)
        tick(done + at + len(data))
    return digest.digest()


def copy_range(source: int, start: int, target: int, offset: int, length: int, *, tick: Tick = no_tick) -> bool:
    """Copies bytes between two open files (or within one), shared on the disk where the system can; False if the source
    ends before. `tick` gets the bytes copied so far."""
    by_system = hasattr(os, "copy_file_range")
    done = 0
    while done < length:
        n = min(COPY_BYTES, length - done)
        if by_system:
            try:
                copied = os.copy_file_range(source, target, n, start + done, offset + done)
            except OSError as exc:
                if exc.errno not in _NO_COPY:
                    raise
                by_system = False
                continue
        else:
            copied = _copy_by_hand(source, start + done, target, offset + done, n)
        if copied == 0:
            return False
        done += copied
        tick(done)
    return True


def _copy_by_hand(source: int, start: int, target: int, offset: int, n: int) -> int:
    data = os.pread(source, min(n, CHUNK_BYTES), start)
    pwrite_all(target, data, offset)
    return len(data)


def pwrite_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """`os.pwrite` until everything is written."""
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n


def hash_pieces(fd: int, spans: Iterable[tuple[int, int]], tick: Tick = no_tick) -> tuple[bytes, tuple[Piece, ...]]:
    """SHA-256 of the whole and of each piece, in one pass. `ModelError` if the file became shorter meanwhile."""
    pieces: list[Piece] = []
    with _Hashing(fd) as hashing:
        for offset, length in spans:
            digest = hashlib.sha256()
            for at in range(offset, offset + length, READ_BYTES):
                n = min(READ_BYTES, offset + length - at)
                hashing.add(at, n, digest)
                tick(at + n)
            hashing.after(_end_piece, pieces, offset, length, digest)
    return hashing.whole.digest(), tuple(pieces)


def _end_piece(pieces: list[Piece], offset: int, length: int, digest: Any) -> None:
    pieces.append(Piece(offset, length, digest.digest()))


class _Hashing:
    """The calling thread reads; one thread hashes the whole, another the pieces, over the same few buffers."""

    def __init__(self, fd: int) -> None:
        self.whole = hashlib.sha256()
        self._fd = fd
        self._for_whole, self._for_pieces = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._buffers = deque((bytearray(READ_BYTES), list[Future[None]]()) for _ in range(_N_BUFFERS))

    def __enter__(self) -> _Hashing:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._for_whole.shutdown()
        self._for_pieces.shutdown()

    def add(self, offset: int, n: int, digest: Any) -> None:
        """The next bytes of the whole, and of the piece that `digest` is of; waits for a buffer."""
        buffer, busy = self._buffers.popleft()
        for future in busy:
            future.result()
        data = memoryview(buffer)[:n]
        if not _read_into(self._fd, data, offset):
            raise ModelError("the file became shorter while it was read", hint="Add it again once it is complete.")
        busy = [self._for_whole.submit(self.whole.update, data), self._for_pieces.submit(digest.update, data)]
        self._buffers.append((buffer, busy))

    def after(self, then: Callable[..., None], *args: Any) -> None:
        """Calls it once what was added for pieces is hashed."""
        self._for_pieces.submit(then, *args)


def _read_into(fd: int, view: memoryview, offset: int) -> bool:
    """Fills `view`; False if the file ends before."""
    while view:
        n = os.preadv(fd, [view], offset)
        if not n:
            return False
        view, offset = view[n:], offset + n
    return True
