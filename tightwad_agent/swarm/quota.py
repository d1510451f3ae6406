"""How many bytes models may take on this node: own copies, and what is on its way in its full size.

Files shared in place belong to people and are not counted.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tightwad_agent.errors import DiskFull
from tightwad_agent.units import size

HINT = "Remove a model (tightwad-agent remove), clean up (gc), or raise --max-models-size; it goes on by itself."


def excess(limit: int, used: int, needed: int) -> int:
    """Bytes beyond the limit that `needed` more would be; a limit of 0 is none."""
    return max(0, used + needed - limit) if limit else 0


def words(limit: int, used: int, needed: int, what: str) -> str:
    """The arithmetic of a refusal, for people."""
    over = excess(limit, used, needed)
    return (
        f"{what} needs {needed:,} bytes, models may take {limit:,} here (max_models_bytes) and take {used:,}: "
        f"{over:,} ({size(over)}) are missing"
    )


class Quota:
    """The limit, and what of it is spoken for. `own` gives the bytes of own copies, by model, as the store knows them;
    what is on its way lies in `folder`. Methods look at file status only and may be called from threads."""

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit = limit
        self._folder = folder
        self._mutex = threading.Lock()
        self._promised: dict[str, int] = {}

    def used(self, own: Mapping[str, int], without: str = "") -> int:
        """Bytes that are taken or promised; those of one model may be left out."""
        sizes = {**own, **self._promised}
        parts = Counter[str]()
        for part in self._folder.glob("*.part"):  # ROOT.part, and ROOT.00002.part of a model of several files
            parts[part.name.partition(".")[0]] += _size(part)
        for root, n in parts.items():
            sizes[root] = max(sizes.get(root, 0), n)
        return sum(n for name, n in sizes.items() if name != without)

    def exceeded(self, needed: int, own: Mapping[str, int], name: str = "") -> bool:
        """Whether `require` would raise."""
        return bool(self.limit) and excess(self.limit, self.used(own, name), needed) > 0

    def require(self, needed: int, what: str, own: Mapping[str, int], name: str = "") -> None:
        """Raises `DiskFull` if `needed` bytes in all for `name` are too many."""
        if self.limit and excess(self.limit, used := self.used(own, name), needed):
            raise DiskFull(words(self.limit, used, needed, what), hint=HINT)

    @contextmanager
    def promised(self, needed: int, what: str, own: Mapping[str, int], name: str) -> Iterator[None]:
        """Holds `needed` bytes for `name` while its file is made; raises as `require`."""
        with self._mutex:
            self.require(needed, what, own, name)
            self._promised[name] = needed
        try:
            yield
        finally:
            self._promised = {key: n for key, n in self._promised.items() if key != name}


def _size(path: Path) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0
