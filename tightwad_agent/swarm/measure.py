"""Files that are to become a model: found, with what belongs to them, and read once from the first byte to the last."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tightwad_agent.errors import BadGguf, ModelError
from tightwad_agent.ids import SafeName
from tightwad_agent.swarm import files
from tightwad_agent.swarm.facts import facts_of
from tightwad_agent.swarm.files import Identity, Tick
from tightwad_agent.swarm.gguf import Gguf, parse
from tightwad_agent.swarm.manifest import MAX_FILES, FileHash, Manifest, Piece, cut_files
from tightwad_agent.swarm.names import safe_name, shard_of, shard_texts

MAX_SHOWN = 5
AGAIN = "Add it again once it is complete."


class Opened:
    """A file descriptor for reading, closed at the end. Raises `ModelError`."""

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as exc:
            raise ModelError(f"{path} cannot be read: {exc.strerror}") from None

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_exc: object) -> None:
        os.close(self._fd)


def header(fd: int, size: int) -> Gguf:
    return parse(lambda at, n: os.pread(fd, n, at), size)


# What is meant by a path


def find(path: Path) -> tuple[tuple[Path, ...], SafeName]:
    """The files of the model that `path` is of, and the model's name. Raises `ModelError`, also for files that are not
    there."""
    real = existing_file(path)
    shard = shard_of(path.name)
    if shard is None or shard[2] == 1 or _n_files(real) != shard[2]:
        return (real,), safe_name(path.name)
    name, _, n = shard
    if n > MAX_FILES:
        raise ModelError(f"{path.name}: a model of {n} files, at most {MAX_FILES} are taken")
    folder = path.parent.resolve()
    names = shard_texts(name, n)
    if missing := [text for text in names if not (folder / text).is_file()]:
        raise ModelError(
            f"{path} is one of {n} files, and {len(missing)} of them are not in {folder}: {_shown(missing)}",
            hint="All must lie side by side, complete and under their own names.",
        )
    return tuple(folder / text for text in names), safe_name(name)


def existing_file(path: Path) -> Path:
    """The file behind links. Raises `ModelError`."""
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError, ValueError) as exc:
        raise ModelError(f"{path} cannot be added: {getattr(exc, 'strerror', None) or exc}") from None
    if stat.S_ISDIR(mode):
        inside = sorted(p.name for p in real.glob("*.gguf"))[:MAX_SHOWN]
        raise ModelError(
            f"{path} is a folder; a file is expected",
            hint=f"In it: {', '.join(inside)}." if inside else "No GGUF is in it.",
        )
    if not stat.S_ISREG(mode):
        raise ModelError(f"{path} is no regular file")
    return real


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]) + more


def _n_files(path: Path) -> int:
    """How many files the model of this one has, as its header says; 1 where it says nothing or is none."""
    with Opened(path) as fd:
        try:
            return split_of(header(fd, os.fstat(fd).st_size))[1]
        except BadGguf:
            return 1


def split_of(gguf: Gguf) -> tuple[int, int]:
    """(number of the file from 1, how many there are)."""
    index, n = gguf.metadata.get("split.no", 0), gguf.metadata.get("split.count", 0)
    if type(index) is not int or type(n) is not int or n <= 1:
        return 1, 1
    return index + 1, n


# Reading


def measure(paths: Sequence[Path], name: SafeName, tick: Tick) -> tuple[Manifest, tuple[Identity, ...]]:
    """The manifest of a model, and which files it is of. Raises `ModelError`, `BadGguf` or `BadManifest`."""
    with ExitStack() as stack:
        fds = [stack.enter_context(Opened(path)) for path in paths]
        before = tuple(Identity.of(os.fstat(fd)) for fd in fds)
        ggufs = [header(fd, i.size) for fd, i in zip(fds, before, strict=True)]
        for index, (path, gguf) in enumerate(zip(paths, ggufs, strict=True)):
            _check_split(path, gguf, index + 1, len(paths))
        spans = cut_files([(i.size, gguf) for i, gguf in zip(before, ggufs, strict=True)])
        hashes, pieces = _hashed(fds, before, spans, tick)
        for path, fd, was in zip(paths, fds, before, strict=True):
            if not was == Identity.of(os.fstat(fd)) == Identity.at(path):
                raise ModelError(f"{path} changed while it was read", hint=AGAIN)
    facts = facts_of(*ggufs)
    if len(paths) == 1:
        return Manifest(name, before[0].size, hashes[0].sha256, pieces, facts), before
    return Manifest.of_files(name, hashes, pieces, facts), before


def _check_split(path: Path, gguf: Gguf, index: int, n: int) -> None:
    if split_of(gguf) == (index, n):
        return
    its_index, its_n = split_of(gguf)
    raise BadGguf(
        f"{path.name} is file {its_index} of {its_n} of a model, expected file {index} of {n}",
        hint=f"Bring all {its_n} files into one folder, named NAME-00001-of-{its_n:05d}.gguf and so on; add the first.",
    )


def _hashed(
    fds: Sequence[int], identities: Sequence[Identity], spans: Sequence[Sequence[tuple[int, int]]], tick: Tick
) -> tuple[tuple[FileHash, ...], tuple[Piece, ...]]:
    """Hashes of all files and pieces, whose offsets then count from the start of the first file."""
    hashes: list[FileHash] = []
    pieces: list[Piece] = []
    base = 0
    for fd, identity, cuts in zip(fds, identities, spans, strict=True):
        sha256, found = files.hash_pieces(fd, cuts, lambda done, start=base: tick(start + done))  # type: ignore[misc]
        hashes.append(FileHash(identity.size, sha256))
        pieces += [piece._replace(offset=base + piece.offset) for piece in found]
        base += identity.size
    return tuple(hashes), tuple(pieces)
