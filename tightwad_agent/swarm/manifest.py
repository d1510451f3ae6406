"""What a model consists of, byte for byte: pieces cut where tensors begin, a hash for each and one for the whole.

The root, SHA-256 over size, whole-file hash and all pieces, is the model's id: equal ids mean equal bytes. The name is
not part of it (the same bytes under another name are the same model), nor are the facts (whoever holds the bytes can
read them there, and does), nor is the web address that answers range requests for the file, if it came from one.

    canonical  "tightwad manifest 1\\n" | u64 size | SHA-256 of the file | u32 pieces | pieces
    piece      u64 offset | u32 length | SHA-256
    encoded    "TWM1" | u32 length of head | head (msgpack: name, facts, origin) | canonical

A model of several files (NAME-00001-of-0000N.gguf and so on) is one: its bytes are those of all files in their order,
and no piece is in two. What they are called follows from the model's name, so no name of a file is ever sent.

    canonical  "tightwad manifest 2\\n" | u32 files | files | u32 pieces | pieces
    file       u64 size | SHA-256
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Annotated, NamedTuple

from tightwad_agent.errors import BadManifest, ProtocolError, UsageError
from tightwad_agent.ids import ModelId, SafeName
from tightwad_agent.swarm.addresses import MAX_ADDRESS, check_shared, file_at, n_files_at
from tightwad_agent.swarm.gguf import Gguf
from tightwad_agent.swarm.names import shard_names, shard_texts
from tightwad_agent.wire.codec import Max, Mismatch, from_plain, pack, to_plain, unpack
from tightwad_agent.wire.rows import ModelFacts
from tightwad_agent.wire.swarm import MAX_MANIFEST_BYTES, MAX_PIECES

PIECE_BYTES = 16 << 20
MIN_PIECE_BYTES = 1 << 19
MAX_PIECE_BYTES = 64 << 20
SMALL_TENSOR_BYTES = 1 << 20
MIN_SMALL_TENSOR_BYTES = 64 << 10
MAX_HEAD_BYTES = 16 << 10
MAX_SIZE = MAX_PIECES * MAX_PIECE_BYTES
MAX_FILES = 1_024

_MAGIC = b"tightwad manifest 1\n"
_MAGIC_FILES = b"tightwad manifest 2\n"
_OUTER = b"TWM1"
_U32 = struct.Struct("!I")
_FIXED = struct.Struct("!Q32sI")
_PIECE = struct.Struct("!QI32s")
_FILE = struct.Struct("!Q32s")


class Piece(NamedTuple):
    """`length` bytes from `offset`, and their SHA-256."""

    offset: int
    length: int
    sha256: bytes


class FileHash(NamedTuple):
    """One of several files of a model."""

    size: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class _Head:
    """The part of an encoded manifest that the root does not cover."""

    name: SafeName
    facts: ModelFacts = field(default_factory=ModelFacts)
    origin: Annotated[str, Max(MAX_ADDRESS)] = ""


@dataclass(frozen=True)
class Manifest:
    """Checked when made: whoever has one may rely on every rule in `check`.

    `origin` is an address that answers range requests for the file, the first of several, empty where there is none: a
    hint, since the root does not cover it; what comes from there is checked as from anywhere.

    `files` is empty for a model of one file. With several, `size` is that of all, and `sha256` is the hash of the table
    of files, not of bytes.
    """

    name: SafeName
    size: int
    sha256: bytes
    pieces: tuple[Piece, ...]
    facts: ModelFacts = field(default_factory=ModelFacts)
    origin: str = ""
    files: tuple[FileHash, ...] = ()

    @classmethod
    def of_files(
        cls, name: SafeName, files: tuple[FileHash, ...], pieces: tuple[Piece, ...], facts: ModelFacts, origin: str = ""
    ) -> Manifest:
        """A model of several files; `pieces` count from the start of the first. Raises `BadManifest`."""
        table = b"".join(_FILE.pack(*f) for f in files)
        return cls(name, sum(f.size for f in files), hashlib.sha256(table).digest(), pieces, facts, origin, files)

    def __post_init__(self) -> None:
        check(self.size, self.sha256, self.pieces)
        _check_origin(self.origin, max(1, len(self.files)))
        if self.files:
            _check_files(self)

    @cached_property
    def canonical(self) -> bytes:
        """The bytes that the root is the hash of."""
        if self.files:
            parts = [_MAGIC_FILES, _U32.pack(len(self.files)), *(_FILE.pack(*f) for f in self.files)]
            parts.append(_U32.pack(len(self.pieces)))
        else:
            parts = [_MAGIC, _FIXED.pack(self.size, self.sha256, len(self.pieces))]
        parts += [_PIECE.pack(*piece) for piece in self.pieces]
        return b"".join(parts)

    @cached_property
    def root(self) -> ModelId:
        return ModelId(hashlib.sha256(self.canonical).hexdigest())

    def place(self, piece: int) -> tuple[int, int]:
        """(which of the model's files a piece is in, its offset there)."""
        offset = self.pieces[piece].offset
        index = bisect_right(self.starts, offset) - 1
        return index, offset - self.starts[index]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each file."""
        return tuple(f.size for f in self.files) or (self.size,)

    @property
    def hashes(self) -> tuple[bytes, ...]:
        """SHA-256 of each file."""
        return tuple(f.sha256 for f in self.files) or (self.sha256,)

    @property
    def file_names(self) -> tuple[SafeName, ...]:
        """What the files are called beside one another."""
        return shard_names(self.name, len(self.files)) if self.files else (self.name,)

    @property
    def origins(self) -> tuple[str, ...]:
        """The address of each file, or nothing."""
        if not self.origin or not self.files:
            return (self.origin,) if self.origin else ()
        return tuple(file_at(self.origin, i) for i in range(1, len(self.files) + 1))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each file begins in the bytes of the model."""
        return tuple(accumulate(self.sizes, initial=0))[:-1]

    def encode(self) -> bytes:
        head = pack(to_plain(_Head(self.name, self.facts, self.origin)))
        return _OUTER + _U32.pack(len(head)) + head + self.canonical


def check(size: int, sha256: bytes, pieces: Sequence[Piece]) -> None:
    """Raises `BadManifest` that names the rule that is broken."""
    if not 0 < size <= MAX_SIZE:
        raise BadManifest(f"manifest: a size of {size} bytes, expected 1 to {MAX_SIZE}")
    if len(sha256) != 32:
        raise BadManifest(f"manifest: a file hash of {len(sha256)} bytes, expected 32")
    if not 0 < len(pieces) <= MAX_PIECES:
        raise BadManifest(f"manifest: {len(pieces)} pieces, expected 1 to {MAX_PIECES}")
    at = 0
    for index, piece in enumerate(pieces):
        if not 0 < piece.length <= MAX_PIECE_BYTES:
            raise BadManifest(f"manifest: piece {index} has {piece.length} bytes, expected 1 to {MAX_PIECE_BYTES}")
        if len(piece.sha256) != 32:
            raise BadManifest(f"manifest: piece {index} has a hash of {len(piece.sha256)} bytes, expected 32")
        if piece.offset != at:
            what = "overlaps the one before" if piece.offset < at else "leaves a gap"
            raise BadManifest(f"manifest: piece {index} is at {piece.offset}, expected {at}: it {what}")
        at += piece.length
        if at > size:
            raise BadManifest(f"manifest: piece {index} ends at {at}, beyond the {size} bytes of the file")
    if at != size:
        raise BadManifest(f"manifest: the pieces end at {at}, the file at {size}")


def _check_origin(url: str, n_files: int) -> None:
    if not url:
        return
    try:
        check_shared(url)
    except UsageError as exc:
        raise BadManifest(f"manifest: origin: {exc.message}") from None
    if n_files > 1 and n_files_at(url) != n_files:
        raise BadManifest(f"manifest: origin: an address of {n_files_at(url)} files for a model of {n_files}")


def _check_files(manifest: Manifest) -> None:
    """The rules for several files, beside those for any manifest."""
    files = manifest.files
    if not 1 < len(files) <= MAX_FILES:
        raise BadManifest(f"manifest: {len(files)} files, expected 2 to {MAX_FILES}")
    for index, file in enumerate(files):
        if file.size <= 0 or len(file.sha256) != 32:
            raise BadManifest(f"manifest: file {index} has {file.size} bytes and a hash of {len(file.sha256)}")
    if sum(f.size for f in files) != manifest.size:
        raise BadManifest(f"manifest: its files have {sum(f.size for f in files)} bytes, it has {manifest.size}")
    if not all(SafeName.is_valid(name) for name in shard_texts(manifest.name, len(files))):
        raise BadManifest(f"manifest: {manifest.name!r} makes no names of files")
    starts = {piece.offset for piece in manifest.pieces}
    for index, start in enumerate(manifest.starts):
        if start not in starts:
            raise BadManifest(f"manifest: no piece begins where file {index} does, at {start}")


def decode(data: bytes, expected: ModelId | None = None) -> Manifest:
    """A manifest from anywhere. Raises `BadManifest`; also if its root is not the one that was `expected`."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise BadManifest(f"manifest: {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are taken")
    if len(data) < 8 or data[:4] != _OUTER:
        raise BadManifest("manifest: these bytes are none")
    (n_head,) = _U32.unpack_from(data, 4)
    if n_head > MAX_HEAD_BYTES or 8 + n_head > len(data):
        raise BadManifest(f"manifest: a head of {n_head} bytes does not fit")
    try:
        head = from_plain(_Head, unpack(data[8 : 8 + n_head]))
    except (ProtocolError, Mismatch) as exc:
        raise BadManifest(f"manifest: head{exc}") from None
    canonical = data[8 + n_head :]
    root = hashlib.sha256(canonical).hexdigest()
    if expected is not None and root != expected:
        raise BadManifest(f"manifest: it is of model {root[:12]}, not of {expected.short}")
    if canonical.startswith(_MAGIC_FILES):
        return Manifest.of_files(head.name, *_read_files(canonical), head.facts, head.origin)
    size, sha256, pieces = _read_canonical(canonical)
    return Manifest(head.name, size, sha256, pieces, head.facts, head.origin)


def _read_canonical(data: bytes) -> tuple[int, bytes, tuple[Piece, ...]]:
    start = len(_MAGIC) + _FIXED.size
    if not data.startswith(_MAGIC) or len(data) < start:
        raise BadManifest("manifest: unknown version, or cut short")
    size, sha256, n = _FIXED.unpack_from(data, len(_MAGIC))
    return size, sha256, _read_pieces(data, start, n)


def _read_files(data: bytes) -> tuple[tuple[FileHash, ...], tuple[Piece, ...]]:
    at = len(_MAGIC_FILES) + _U32.size
    n_files = _U32.unpack_from(data, at - _U32.size)[0] if len(data) >= at else 0
    if n_files > MAX_FILES or len(data) < at + n_files * _FILE.size + _U32.size:
        raise BadManifest(f"manifest: {n_files} files do not match {len(data)} bytes")
    files = tuple(FileHash(*_FILE.unpack_from(data, at + i * _FILE.size)) for i in range(n_files))
    at += n_files * _FILE.size
    return files, _read_pieces(data, at + _U32.size, *_U32.unpack_from(data, at))


def _read_pieces(data: bytes, start: int, n: int) -> tuple[Piece, ...]:
    if n > MAX_PIECES or len(data) != start + n * _PIECE.size:
        raise BadManifest(f"manifest: {n} pieces do not match {len(data)} bytes")
    return tuple(Piece(*_PIECE.unpack_from(data, start + i * _PIECE.size)) for i in range(n))


# Where to cut


def cut(size: int, gguf: Gguf | None) -> tuple[tuple[int, int], ...]:
    """(offset, length) of each piece of a file. Raises `BadManifest` for one too large for `MAX_PIECES` of them."""
    return cut_files([(size, gguf)])[0]


def cut_files(files: Sequence[tuple[int, Gguf | None]]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """`cut` of each of the files of one model, (size, header); offsets count from the start of the file."""
    total = sum(size for size, _ in files)
    if not all(0 < size <= MAX_SIZE for size in (total, *(size for size, _ in files))):
        raise BadManifest(f"a model of {total} bytes cannot be shared; 1 to {MAX_SIZE} are possible")
    large_bytes = _large_tensor_bytes(total)
    for piece_bytes in (_piece_bytes(files), PIECE_BYTES, 2 * PIECE_BYTES, MAX_PIECE_BYTES):
        for by_tensors in (True, False):
            spans = tuple(
                _spans(_tensor_regions(n, gguf if by_tensors else None, large_bytes, piece_bytes), piece_bytes)
                for n, gguf in files
            )
            if sum(map(len, spans)) <= MAX_PIECES:
                return spans
    raise BadManifest(f"a model of {total} bytes in {len(files)} files needs more than {MAX_PIECES} pieces")


def _spans(regions: Sequence[tuple[int, int]], piece_bytes: int) -> tuple[tuple[int, int], ...]:
    return tuple(span for start, end in regions for span in _split(start, end, piece_bytes))


def _split(start: int, end: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    for offset in range(start, end, piece_bytes):
        yield offset, min(piece_bytes, end - offset)


def _piece_bytes(files: Sequence[tuple[int, Gguf | None]]) -> int:
    """How long a piece is at most. One is of use to others only when it is whole, so long ones cost time where a model
    is small. It follows from the number of weights, which is the same in all quantisations, so that tensors that two of
    them have in common are cut alike."""
    n = sum(size if gguf is None else sum(t.n_elements for t in gguf.tensors) for size, gguf in files)
    fitting: int = 1 << max(0, (n >> 8).bit_length() - 1)
    return min(PIECE_BYTES, max(MIN_PIECE_BYTES, fitting))


def _large_tensor_bytes(size: int) -> int:
    """From how many bytes on a tensor has pieces of its own: a thousandth of a small model, or a change of one tensor
    would change pieces of many. A power of two, so that versions of a model that differ a little are cut alike."""
    thousandth = 1 << max(0, (size >> 10).bit_length() - 1)
    return min(SMALL_TENSOR_BYTES, max(MIN_SMALL_TENSOR_BYTES, thousandth))


def _tensor_regions(size: int, gguf: Gguf | None, large_bytes: int, run_bytes: int) -> list[tuple[int, int]]:
    """Header | each large tensor with its padding | runs of small ones of at most `run_bytes`."""
    if gguf is None or not gguf.tensors:
        return [(0, size)]
    edges = [t.offset for t in gguf.tensors if t.n_bytes] + [size]
    regions = [(0, edges[0])]
    run_start = edges[0]
    for start, end in pairwise(edges):
        large = end - start >= large_bytes
        if large or end - run_start > run_bytes:
            regions += [(run_start, start)]
            run_start = start
        if large:
            regions += [(start, end)]
            run_start = end
    regions += [(run_start, size)]
    return [(a, b) for a, b in regions if b > a]
