"""Unpacks `.tar.gz` and `.zip` archives: nothing lands outside the folder, and there are limits on all it may hold.

Blocking; call it in a thread that trio started: between files it notices a cancellation.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import trio

from tightwad_agent.errors import OriginError

_CHUNK = 1 << 20
_MAX_NAME = 1024
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    RuntimeError,
    NotImplementedError,
)
_ODD = re.compile(r"[\\:\0]")


@dataclass(frozen=True, slots=True)
class UnpackLimits:
    """What an archive may become on the disk."""

    n_files: int = 100_000
    n_bytes: int = 4 << 30


@dataclass(frozen=True, slots=True)
class _Entry:
    """One member. `target` is set for symbolic links; `open` gives the content of files; neither: a folder."""

    name: str
    executable: bool
    target: str | None = None
    open: Callable[[], IO[bytes] | None] | None = None


def unpack(
    archive: Path,
    dest: Path,
    *,
    limits: UnpackLimits | None = None,
    progress: Callable[[int], None] = lambda _n_bytes: None,
) -> None:
    """Unpacks into the new folder `dest`. `progress` gets the bytes written so far, in this thread.

    Raises `OriginError` for a member that points outside, is neither file, folder nor inner link, or is too much, and
    for a damaged archive. What was written stays: the caller throws the folder away.
    """
    limits = limits or UnpackLimits()
    dest.mkdir(parents=True)
    n_bytes = 0
    try:
        for n_files, entry in enumerate(_entries(archive), 1):
            _stop_if_cancelled()
            if n_files > limits.n_files:
                raise OriginError(f"{archive.name}: more than {limits.n_files} files")
            path = _inside(archive, dest, entry.name)
            if entry.target is not None:
                _link(archive, dest, path, entry.target)
            elif entry.open is None:
                path.mkdir(parents=True, exist_ok=True)
            else:
                n_bytes += _write(archive, path, entry, limits.n_bytes - n_bytes)
                progress(n_bytes)
    except _DAMAGED as exc:
        raise OriginError(f"{archive.name}: damaged archive: {exc}") from None
    except OSError as exc:
        raise OriginError(f"{archive.name}: cannot be unpacked to {dest}: {exc.strerror or exc}") from None


def _entries(archive: Path) -> Iterator[_Entry]:
    if zipfile.is_zipfile(archive):
        yield from _zip_entries(archive)
        return
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            executable = bool(member.mode & stat.S_IXUSR)
            if member.isdir():
                yield _Entry(member.name, executable)
            elif member.issym():
                yield _Entry(member.name, executable, target=member.linkname)
            elif member.isreg():
                yield _Entry(member.name, executable, open=lambda member=member: tar.extractfile(member))  # type: ignore[misc]
            else:
                raise OriginError(f"{archive.name}: {member.name[:200]!r} is neither file, folder nor symbolic link")


def _zip_entries(archive: Path) -> Iterator[_Entry]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            mode = info.external_attr >> 16
            if info.is_dir():
                yield _Entry(info.filename, executable=True)
            elif stat.S_ISLNK(mode):
                if info.file_size > _MAX_NAME:
                    raise OriginError(f"{archive.name}: a link of {info.file_size} bytes")
                yield _Entry(info.filename, False, target=file.read(info).decode("utf-8", "replace"))
            else:
                yield _Entry(info.filename, bool(mode & stat.S_IXUSR), open=lambda info=info: file.open(info))  # type: ignore[misc]


def _parts(archive: Path, name: str) -> tuple[str, ...]:
    """The components of a member's name; `OriginError` unless it is relative and stays below the top."""
    parts = tuple(p for p in PurePosixPath(name.replace("\\", "/")).parts if p != ".")
    if len(name) > _MAX_NAME or "\0" in name or ":" in name or ".." in parts or "/" in parts:
        raise OriginError(f"{archive.name}: {name[:200]!r} points outside of the archive")
    return parts


def _inside(archive: Path, dest: Path, name: str) -> Path:
    """Where a member goes; no component above it may be a link that another member put there."""
    path = dest
    for part in _parts(archive, name):
        if path.is_symlink():
            raise OriginError(f"{archive.name}: {name[:200]!r} goes through a link")
        path /= part
    return path


def _link(archive: Path, dest: Path, path: Path, target: str) -> None:
    """A link to something below `dest`. `..` may only come first: after a name that is a link it means anything."""
    steps = PurePosixPath(target).parts
    n_up = next((i for i, step in enumerate(steps) if step != ".."), len(steps))
    depth = len(path.relative_to(dest).parts) - 1
    if not steps or ".." in steps[n_up:] or "/" in steps or n_up > depth or n_up == len(steps) or _ODD.search(target):
        raise OriginError(f"{archive.name}: the link {path.name[:200]!r} points outside of the archive")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _write(archive: Path, path: Path, entry: _Entry, n_allowed: int) -> int:
    source = entry.open() if entry.open is not None else None
    if source is None:
        raise OriginError(f"{archive.name}: {entry.name[:200]!r} has no content")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # never through a link that an earlier member put there
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    n_bytes = 0
    with source, os.fdopen(os.open(path, flags, 0o755 if entry.executable else 0o644), "wb") as sink:
        while data := source.read(_CHUNK):
            _stop_if_cancelled()
            n_bytes += len(data)
            if n_bytes > n_allowed:
                raise OriginError(f"{archive.name}: it unpacks to more than is allowed")
            sink.write(data)
    return n_bytes


def _stop_if_cancelled() -> None:
    try:
        trio.from_thread.check_cancelled()
    except RuntimeError:
        pass  # not in a thread of trio's: nobody to cancel it
