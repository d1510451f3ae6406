"""Weights that a worker takes from its own copy of the model: an encoder at the coordinator, a decoder at the worker.

The engine sends each tensor of a model as one message (SET_TENSOR): which tensor, and its bytes as they lie in the
file. A worker that holds the same file needs to be told only where they lie, and their SHA-256. In the place of such a
message go others of the same form, `u8 command | u64 little-endian size | payload`:

    0xF8 OPAQUE   empty                                   all that follows is passed as it is, to the end
    0xF9 WEIGHTS  SET_TENSOR's first 305 bytes | u64 n | u64 place     its n bytes lie at `place` of the file
    0xFA BLOCK    SHA-256, 32 bytes                       of its next 1 MiB, or of what is left of it

After WEIGHTS come exactly the blocks of those n bytes. Nothing else changes, and what does not begin as the engine's
RPC does is not looked at. The graph codec works before the encoder and behind the decoder.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

from tightwad_agent.errors import ProtocolError, WeightsDiffer

VERSION = 1
"""Of the messages above; with a worker that says another one, or none, weights cross the network."""

HELLO, SET_TENSOR, GRAPHS_PLAIN = 14, 6, 0xF0
"""Of the engine; and of the graph codec, after which nothing is looked at."""
OPAQUE, WEIGHTS, BLOCK = 0xF8, 0xF9, 0xFA
BLOCK_BYTES = 1 << 20
MIN_WEIGHTS = 16 << 10
"""Smaller tensors cross as they are."""

_HEADER = struct.Struct("<BQ")
_NAME = slice(228, 292)
_FIXED = 305
"""Tensor (296 bytes, with its name at 228), flag, u64 offset within the tensor."""
_OFFSET = struct.Struct("<Q")
_OFFSET_AT = 297
_WHERE = struct.Struct("<QQ")
_SIZES = {OPAQUE: 0, WEIGHTS: _FIXED + _WHERE.size, BLOCK: 32}

Chunk = bytes | bytearray | memoryview
Places = Mapping[bytes, tuple[int, int]]
"""Where the tensors of a file lie, by name: first byte and number of bytes."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A file of this machine, as long as it stays as it is: its tensors, and the SHA-256 of blocks that were loaded
    before, by first byte and length. What is known need not be computed again, so `digests` outlives a connection."""

    places: Places
    digests: dict[tuple[int, int], bytes] = field(default_factory=dict)


class Extent(NamedTuple):
    """Bytes of the model file, and what they must be."""

    place: int
    n_bytes: int
    sha256: bytes


class _Headers:
    """Follows messages; `_left` bytes of the current one are still to come."""

    def __init__(self) -> None:
        self._left = 0
        self._held = bytearray()  # a header, or the message's beginning with it
        self._due = 0  # so many bytes of the beginning are wanted behind the header; 0: none yet
        self._is_opaque = False

    def _hold(self, view: memoryview, at: int) -> tuple[int, bool]:
        """Takes what is wanted from `at` on: where it ends, and whether it is all there."""
        end = min(len(view), at + _HEADER.size + self._due - len(self._held))
        self._held += view[at:end]
        return end, len(self._held) == _HEADER.size + self._due

    def _released(self) -> bytes:
        held, self._held, self._due = bytes(self._held), bytearray(), 0
        return held


class WeightsEncoder(_Headers):
    """At the coordinator. Takes anything: what is no RPC passes."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._weights = weights
        self._has_begun = False
        self._replaced = 0  # bytes of a tensor's data, still to come, that are not sent
        self._missing = 0  # bytes of the block, still to come
        self._block = (0, 0)  # the block that comes: its first byte in the file, its length
        self._known: bytes | None = None
        self._sum = sha256()

    def feed(self, data: Chunk) -> list[Chunk]:
        """What to send for it, in order; parts of `data` are not copied."""
        if self._is_opaque:
            return [data]
        view, at, out = memoryview(data), 0, list[Chunk]()
        while at < len(view) and not self._is_opaque:
            if self._replaced:
                at = self._replace(view, at, out)
            elif self._left:
                end = min(len(view), at + self._left)
                self._left -= end - at
                out.append(view[at:end])
                at = end
            else:
                at = self._begin(view, at, out)
        if at < len(view):
            out.append(view[at:])
        return out

    def _begin(self, view: memoryview, at: int, out: list[Chunk]) -> int:
        if not self._held and not self._is_rpc(view[at]):
            if view[at] != GRAPHS_PLAIN:
                out.append(_HEADER.pack(OPAQUE, 0))
            self._is_opaque = True
            return at
        self._has_begun = True
        at, is_whole = self._hold(view, at)
        if is_whole:
            self._met(out)
        return at

    def _is_rpc(self, command: int) -> bool:
        return (self._has_begun or command == HELLO) and command != GRAPHS_PLAIN and command < OPAQUE

    def _met(self, out: list[Chunk]) -> None:
        """The header is there, or the beginning of a tensor too."""
        command, size = _HEADER.unpack_from(self._held)
        if not self._due and command == SET_TENSOR and size >= _FIXED + MIN_WEIGHTS:
            self._due = _FIXED
            return
        n_data, fixed = size - self._due, memoryview(bytes(self._held))[_HEADER.size :]
        place = self._place(fixed, n_data) if self._due else None
        held = self._released()
        if place is None:
            out.append(held)
            self._left = n_data
        else:
            out.append(_HEADER.pack(WEIGHTS, _SIZES[WEIGHTS]) + bytes(fixed) + _WHERE.pack(n_data, place))
            self._replaced = n_data
            self._start_block(place)

    def _place(self, fixed: memoryview, n_data: int) -> int | None:
        """Where this data lies in the file, if that is known."""
        start, n_tensor = self._weights.places.get(bytes(fixed[_NAME]).rstrip(b"\0"), (0, 0))
        (offset,) = _OFFSET.unpack_from(fixed, _OFFSET_AT)
        return start + offset if offset + n_data <= n_tensor else None

    def _replace(self, view: memoryview, at: int, out: list[Chunk]) -> int:
        end = min(len(view), at + self._missing)
        if self._known is None:
            self._sum.update(view[at:end])
        self._missing -= end - at
        self._replaced -= end - at
        if not self._missing:
            digest = self._known or self._sum.digest()
            self._weights.digests[self._block] = digest
            out.append(_HEADER.pack(BLOCK, _SIZES[BLOCK]) + digest)
            self._start_block(sum(self._block))
        return end

    def _start_block(self, place: int) -> None:
        self._missing = min(self._replaced, BLOCK_BYTES)
        self._block = (place, self._missing)
        self._known, self._sum = self._weights.digests.get(self._block), sha256()


class WeightsDecoder(_Headers):
    """At the worker, whose file has `file_bytes`. `feed` raises `ProtocolError` for what no encoder sends, and
    `WeightsDiffer` where that file is too short."""

    def __init__(self, file_bytes: int) -> None:
        super().__init__()
        self._file_bytes = file_bytes
        self._place = self._missing = 0  # of the tensor whose blocks come now

    def feed(self, data: Chunk) -> list[Chunk | Extent]:
        """What the worker gets for it, in order: bytes, and parts of the file."""
        if self._is_opaque:
            return [data]
        view, at, out = memoryview(data), 0, list[Chunk | Extent]()
        while at < len(view) and not self._is_opaque:
            if self._left:
                end = min(len(view), at + self._left)
                self._left -= end - at
                out.append(view[at:end])
                at = end
            else:
                at = self._begin(view, at, out)
        if at < len(view):
            out.append(view[at:])
        return out

    def _begin(self, view: memoryview, at: int, out: list[Chunk | Extent]) -> int:
        at, is_whole = self._hold(view, at)
        if is_whole:
            self._met(out)
        return at

    def _met(self, out: list[Chunk | Extent]) -> None:
        command, size = _HEADER.unpack_from(self._held)
        if self._missing and command != BLOCK:
            raise ProtocolError(f"RPC command {command:#x} where {self._missing} bytes of a tensor are missing")
        if command < OPAQUE:
            self._is_opaque = command == GRAPHS_PLAIN
            out.append(self._released())
            self._left = size
            return
        if size != _SIZES.get(command, -1):
            raise ProtocolError(
                f"an RPC message {command:#x} of {size} bytes", hint="the coordinator runs a newer agent"
            )
        if len(self._held) < _HEADER.size + size:
            self._due = size
        else:
            self._take(command, self._released()[_HEADER.size :], out)

    def _take(self, command: int, payload: bytes, out: list[Chunk | Extent]) -> None:
        if command == OPAQUE:
            self._is_opaque = True
        elif command == WEIGHTS:
            self._start(payload, out)
        else:
            out.append(self._block(payload))

    def _start(self, payload: bytes, out: list[Chunk | Extent]) -> None:
        n_data, place = _WHERE.unpack_from(payload, _FIXED)
        if not n_data or place + n_data > self._file_bytes:
            raise WeightsDiffer(f"{n_data} bytes at {place} of a file of {self._file_bytes}")
        self._place, self._missing = place, n_data
        out.append(_HEADER.pack(SET_TENSOR, _FIXED + n_data) + payload[:_FIXED])

    def _block(self, digest: bytes) -> Extent:
        if not self._missing:
            raise ProtocolError("a block of weights without a tensor")
        extent = Extent(self._place, min(self._missing, BLOCK_BYTES), digest)
        self._place += extent.n_bytes
        self._missing -= extent.n_bytes
        return extent
