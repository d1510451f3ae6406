"""The worker's end of `weights_codec`: blocks of its own copy of the model are read, checked and given on."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import TracebackType

import trio

from tightwad_agent.engine.weights_codec import Extent, Places, Weights, WeightsDecoder
from tightwad_agent.errors import WeightsDiffer
from tightwad_agent.ids import ModelId
from tightwad_agent.streams import Change, Chunk, Later

MAX_READERS = 4
"""Blocks that are read at once on this node, over all streams."""
CHECKED_S = 3600.0
MAX_CHECKED = 1 << 17
"""So long and so many blocks (128 GiB) count as checked; more, and all are forgotten."""

Identity = tuple[int, int, int, int]
"""Device, number, size, time of change."""
_limiter: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("weights_file.readers")


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


class WeightsFile:
    """A model file for the length of a `with` block. Raises `OSError`.

    `changed` is what a stream from the coordinator is changed with on its way to the worker; `then` is applied to what
    comes out. It raises `ProtocolError` for what no encoder sends, and `WeightsDiffer` where the file does not hold
    what the coordinator's does.
    """

    def __init__(self, path: Path, checked: Checked, then: Change | None = None) -> None:
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._decoder = WeightsDecoder(os.fstat(self._fd).st_size)
        self._checked = checked
        self._then = then

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def changed(self, data: Chunk) -> Sequence[Chunk | Later]:
        """See `streams.Change`."""
        items = self._decoder.feed(data)
        if any(isinstance(item, Extent) for item in items):
            return [partial(self._later, item if isinstance(item, Extent) else bytes(item)) for item in items]
        return [chunk for item in items if not isinstance(item, Extent) for chunk in self._now(item)]

    def _now(self, data: Chunk) -> Sequence[Chunk | Later]:
        return self._then(data) if self._then else (data,)

    async def _later(self, item: Chunk | Extent) -> Chunk:
        """What comes after a block must go through `then` after it."""
        if isinstance(item, Extent):
            item = await trio.to_thread.run_sync(read, self._fd, item, self._checked, limiter=_readers())
        return b"".join(chunk for chunk in self._now(item) if not callable(chunk))


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


def _readers() -> trio.CapacityLimiter:
    try:
        return _limiter.get()
    except LookupError:
        _limiter.set(trio.CapacityLimiter(MAX_READERS))
        return _limiter.get()
