"""A complete model as a source of pieces. Blocking; call in threads."""

from __future__ import annotations

import os

from tightwad_agent.swarm.files import Identity, pread_exactly, sha256_range
from tightwad_agent.swarm.manifest import Manifest
from tightwad_agent.swarm.store import Entry


class CompleteFile:
    """Reads pieces from a model's files, each opened anew each time: what changed under us is not sent."""

    def __init__(self, entry: Entry, manifest: Manifest) -> None:
        self.entry = entry
        self.manifest = manifest
        self._good: set[int] = set()

    def read(self, piece: int, offset: int, length: int) -> bytes | None:
        """Bytes from inside a piece; None if the file is no longer what it was. The first read of each piece compares
        all of it with its hash: a disk that rots must not look like a lying peer."""
        _, n, sha256 = self.manifest.pieces[piece]
        index, start = self.manifest.place(piece)
        if index >= len(self.entry.files):
            return None
        file = self.entry.files[index]
        try:
            fd = os.open(file.where, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError:
            return None
        try:
            if Identity.of(os.fstat(fd)) != file.identity:
                return None
            if piece not in self._good:
                if sha256_range(fd, start, n) != sha256:
                    return None
                self._good.add(piece)
            return pread_exactly(fd, start + offset, length)
        except OSError:
            return None
        finally:
            os.close(fd)
