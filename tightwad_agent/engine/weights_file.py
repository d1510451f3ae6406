"""The worker's end of `weights_codec`: blocks of its own copy of the model are read, checked and given on."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import TracebackType

from tightwad_agent.engine.weights_codec import Extent, Places, Weights, WeightsDecoder
from tightwad_agent.errors import WeightsDiffer
from tightwad_agent.filters import Chunk, Filter, Item
from tightwad_agent.ids import ModelId

MAX_READERS = 4
"""Blocks that are read at once on this node, over all streams."""
CHECKED_S = 3600.0
MAX_CHECKED = 1 << 17
"""So long and so many blocks (128 GiB) count as checked; more, and all are forgotten."""

Identity = tuple[int, int, int, int]
"""Device, number, size, time of change."""
_reading = threading.BoundedSemaphore(MAX_READERS)


class WeightsOf:
    """The coordinator's end: what the file of a model holds. Of the last model it remembers what was summed up, while
    the file stays the same. Call it in a thread; raises what its parts raise, and `OSError`."""

    def __init__(self, path_of: Callable[[ModelId], Path | None], places: Callable[[ModelId], Places]) -> None:
        self._path_of = path_of
        self._places = places
        self._last: tuple[tuple[ModelId, Identity], Weights] | None = None

    def __call__(self, model: ModelId) -> Weights | None:
        path = self._path_of(model)
        if path is None:
            return None
        file = (model, identity_of(path))
        if self._last is None or self._last[0] != file:
            self._last = file, Weights(self._places(model))
        return self._last[1]


class Checked:
    """Which blocks of which file were read and found right a short while ago: those are not summed up again. A file
    that was changed, by time, size or number, is another one. Asked from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._blocks: dict[tuple[Identity, Extent], float] = {}

    def __contains__(self, block: tuple[Identity, Extent]) -> bool:
        return self._clock() - self._blocks.get(block, -math.inf) < CHECKED_S

    def add(self, block: tuple[Identity, Extent]) -> None:
        if len(self._blocks) >= MAX_CHECKED:
            self._blocks = {}
        self._blocks[block] = self._clock()


class WeightsFile(Filter):
    """A model file for the length of a `with` block. Raises `OSError`.

    Through it goes what comes from the coordinator; `then` is applied to what comes out. `feed` and what it returns
    raise `ProtocolError` for what no encoder sends, and `WeightsDiffer` where the file does not hold what the
    coordinator's does.
    """

    def __init__(self, path: Path, checked: Checked, then: Filter | None = None) -> None:
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._decoder = WeightsDecoder(os.fstat(self._fd).st_size)
        self._checked = checked
        self._then = then or Filter()

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def feed(self, data: Chunk) -> Sequence[Item]:
        """What the worker gets."""
        items = self._decoder.feed(data)
        if any(isinstance(item, Extent) for item in items):
            return [partial(self._later, item if isinstance(item, Extent) else bytes(item)) for item in items]
        return [chunk for item in items if not isinstance(item, Extent) for chunk in self._now(item)]

    def _now(self, data: Chunk) -> Sequence[Item]:
        return self._then.feed(data)

    def _later(self, item: Chunk | Extent) -> Chunk:
        """What comes after a block must go through `then` after it."""
        if isinstance(item, Extent):
            with _reading:
                item = read(self._fd, item, self._checked)
        return b"".join(chunk for chunk in self._now(item) if isinstance(chunk, Chunk))


def read(fd: int, extent: Extent, checked: Checked) -> bytes:
    """The bytes, if they are those. Raises `WeightsDiffer`. Call it in a thread."""
    try:
        identity = identity_of(fd)
        data = os.pread(fd, extent.n_bytes, extent.place)
    except OSError as exc:
        raise WeightsDiffer(f"{extent.n_bytes} bytes at {extent.place} cannot be read: {exc.strerror}") from None
    if (identity, extent) in checked and len(data) == extent.n_bytes:
        return data
    if sha256(data).digest() != extent.sha256:
        raise WeightsDiffer(f"{extent.n_bytes} bytes at {extent.place} are not what the coordinator's file holds")
    checked.add((identity, extent))
    return data


def identity_of(file: int | Path) -> Identity:
    """What a file is known by. Raises `OSError`."""
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
