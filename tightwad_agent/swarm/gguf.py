"""Reads the header of a GGUF (versions 2 and 3, little endian) that may have been made to hurt.

Only the header is read: metadata, tensor names, shapes, types and places. Every count, length and offset is checked
before it is used, against the limits below and against the size of the file, and the same layout rules as the engine's
own loader hold (tensors in order, without gaps but padding). What breaks a rule is named, with its place.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

from tightwad_agent.errors import BadGguf

MAX_HEADER_BYTES = 64 << 20
MAX_METADATA = 65_536
MAX_TENSORS = 65_536
MAX_KEY_BYTES = 65_535
MAX_STRING_BYTES = 4 << 20
MAX_STRINGS = 1 << 20
MAX_KEPT_NUMBERS = 4_096
MAX_TENSOR_NAME_BYTES = 63
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
MAX_ELEMENTS = 2**63 - 1

_READ_AHEAD = 1 << 20
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: Mapping[int, struct.Struct] = MappingProxyType(
    {
        0: struct.Struct("<B"),
        1: struct.Struct("<b"),
        2: struct.Struct("<H"),
        3: struct.Struct("<h"),
        4: struct.Struct("<I"),
        5: struct.Struct("<i"),
        6: struct.Struct("<f"),
        7: struct.Struct("<B"),
        10: struct.Struct("<Q"),
        11: struct.Struct("<q"),
        12: struct.Struct("<d"),
    }
)
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_TOKENS = "tokenizer.ggml.tokens"

# Block length in elements and block size in bytes of each tensor type (ggml-common.h of build b11434).
TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        9: ("Q8_1", 32, 36),
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
        15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74),
        18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82),
        23: ("IQ4_XS", 256, 136),
        24: ("I8", 1, 1),
        25: ("I16", 1, 2),
        26: ("I32", 1, 4),
        27: ("I64", 1, 8),
        28: ("F64", 1, 8),
        29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2),
        34: ("TQ1_0", 256, 54),
        35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17),
        40: ("NVFP4", 64, 36),
        41: ("Q1_0", 128, 18),
        42: ("Q2_0", 64, 18),
    }
)

Scalar = bool | int | float | str
Read = Callable[[int, int], bytes]
"""`read(offset, n)`: up to `n` bytes of the file from `offset`; fewer only at its end."""


class HeaderIncomplete(BadGguf):
    """The header is longer than the prefix that was given; `n_bytes` of the file are needed at least."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__(f"the header goes on after the bytes that are here; at least {n_bytes} are needed")
        self.n_bytes = n_bytes


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor; `offset` counts from the start of the file, `n_bytes` is without padding."""

    name: str
    dims: tuple[int, ...]
    type: str
    offset: int
    n_bytes: int

    @property
    def n_elements(self) -> int:
        return _product(self.dims)


@dataclass(frozen=True, slots=True)
class Gguf:
    """A checked header. `metadata` has scalars, texts and short lists of numbers; of lists of texts only `tokens` are
    kept, as the bytes they are."""

    version: int
    file_size: int
    alignment: int
    metadata: Mapping[str, Scalar | tuple[Scalar, ...]]
    tokens: tuple[bytes, ...]
    tensors: tuple[Tensor, ...]
    data_start: int


def parse(source: bytes | Read, file_size: int) -> Gguf:
    """The header of a GGUF of `file_size` bytes, from a prefix of it or from a reader of ranges.

    Raises `BadGguf` that names what is wrong and where, `HeaderIncomplete` where a given prefix ends too early.
    """
    return _Parser(_Cursor(source, file_size), file_size).parse()


class _Cursor:
    """The header's bytes from the front, read in steps, never beyond the limits."""

    def __init__(self, source: bytes | Read, file_size: int) -> None:
        self._read = (lambda _at, _n: b"") if isinstance(source, bytes) else source
        self._buffer = bytearray(source[:MAX_HEADER_BYTES] if isinstance(source, bytes) else b"")
        self._is_prefix = isinstance(source, bytes) and len(source) < file_size
        self._file_size = file_size
        self.at = 0

    @property
    def left(self) -> int:
        """Bytes of the file, and of the limit, that remain."""
        return min(self._file_size, MAX_HEADER_BYTES) - self.at

    def fail(self, what: str) -> NoReturn:
        raise BadGguf(f"not a usable GGUF: {what} (at byte {self.at} of the header)")

    def take(self, n: int, what: str) -> memoryview:
        """The next `n` bytes. The view must be dropped before the next call."""
        start = self.at
        self._ensure(n, what)
        self.at += n
        return memoryview(self._buffer)[start : start + n]

    def skip(self, n: int, what: str) -> None:
        self._ensure(n, what)
        self.at += n

    def u32(self, what: str) -> int:
        self._ensure(4, what)
        (value,) = _U32.unpack_from(self._buffer, self.at)
        self.at += 4
        return int(value)

    def u64(self, what: str) -> int:
        self._ensure(8, what)
        (value,) = _U64.unpack_from(self._buffer, self.at)
        self.at += 8
        return int(value)

    def text(self, limit: int, what: str) -> bytes:
        n = self.u64(what)
        if n > limit:
            self.fail(f"{what} of {n} bytes, at most {limit} are taken")
        return bytes(self.take(n, what))

    def _ensure(self, n: int, what: str) -> None:
        end = self.at + n
        if end <= len(self._buffer):
            return
        if end > MAX_HEADER_BYTES:
            self.fail(f"{what} ends beyond the {MAX_HEADER_BYTES >> 20} MiB a header may have")
        if end > self._file_size:
            self.fail(f"the file ends inside {what}: {self._file_size} bytes are there, {end} are needed")
        if self._is_prefix:
            raise HeaderIncomplete(end)
        while len(self._buffer) < end:
            wanted = max(_READ_AHEAD, end - len(self._buffer))
            data = self._read(len(self._buffer), min(wanted, self._file_size - len(self._buffer)))
            if not data:
                self.fail(f"the file became shorter while {what} was read")
            self._buffer += data


class _Parser:
    def __init__(self, cursor: _Cursor, file_size: int) -> None:
        self._c = cursor
        self._file_size = file_size
        self._metadata: dict[str, Scalar | tuple[Scalar, ...]] = {}
        self._tokens: tuple[bytes, ...] = ()

    def parse(self) -> Gguf:
        c = self._c
        if c.left < 4 or (magic := bytes(c.take(4, "the magic"))) != b"GGUF":
            shown = "" if c.at < 4 else f" (it begins with {magic!r})"
            raise BadGguf(f"not a GGUF: the file does not begin with the letters GGUF{shown}")
        version = c.u32("the version")
        if version not in (2, 3):
            swapped = " (big endian?)" if version & 0xFFFF == 0 else ""
            c.fail(f"version {version}{swapped}, only 2 and 3 are known")
        n_tensors = self._count("tensors", MAX_TENSORS, least_bytes=24)
        n_metadata = self._count("metadata entries", MAX_METADATA, least_bytes=13)
        seen: set[str] = set()
        for _ in range(n_metadata):
            self._entry(seen)
        alignment = self._alignment()
        raw = self._tensors(n_tensors)
        data_start = -(-c.at // alignment) * alignment if raw else c.at
        tensors = self._place(raw, data_start, alignment)
        return Gguf(
            version,
            self._file_size,
            alignment,
            MappingProxyType(self._metadata),
            self._tokens,
            tensors,
            min(data_start, self._file_size),
        )

    def _count(self, what: str, limit: int, least_bytes: int) -> int:
        n = self._c.u64(f"the number of {what}")
        if n > limit:
            self._c.fail(f"{n} {what}, at most {limit} are taken")
        if n * least_bytes > self._c.left:
            self._c.fail(f"{n} {what} do not fit into a file of {self._file_size} bytes")
        return n

    # metadata

    def _entry(self, seen: set[str]) -> None:
        key = self._c.text(MAX_KEY_BYTES, "a metadata key").decode(errors="backslashreplace")
        if not key:
            self._c.fail("an empty metadata key")
        if key in seen:
            self._c.fail(f"metadata key {key[:80]!r} a second time")
        seen.add(key)
        where = f"metadata {key[:80]!r}"
        kind = self._c.u32(where)
        if kind == _ARRAY:
            self._array(key, where)
        elif kind == _STRING:
            self._metadata[key] = self._c.text(MAX_STRING_BYTES, where).decode(errors="replace")
        elif kind in _SCALARS:
            self._metadata[key] = self._scalar(kind, where)
        else:
            self._c.fail(f"{where} has the unknown value type {kind}")

    def _scalar(self, kind: int, where: str) -> Scalar:
        form = _SCALARS[kind]
        with self._c.take(form.size, where) as view:
            (value,) = form.unpack(view)
        if kind == _BOOL:
            return bool(value)
        return float(value) if isinstance(value, float) else int(value)

    def _array(self, key: str, where: str) -> None:
        kind = self._c.u32(where)
        if kind == _ARRAY:
            self._c.fail(f"{where} is a list of lists, which no GGUF of this kind has")
        if kind != _STRING and kind not in _SCALARS:
            self._c.fail(f"{where} is a list of the unknown value type {kind}")
        n = self._c.u64(where)
        size = 8 if kind == _STRING else _SCALARS[kind].size
        if n * size > self._c.left:
            self._c.fail(f"{where} claims {n} items, more than the rest of the header holds")
        if kind == _STRING:
            self._strings(key, n, where)
        elif n > MAX_KEPT_NUMBERS:
            self._c.skip(n * size, where)
        else:
            self._metadata[key] = tuple(self._scalar(kind, where) for _ in range(n))

    def _strings(self, key: str, n: int, where: str) -> None:
        if n > MAX_STRINGS:
            self._c.fail(f"{where} claims {n} texts, at most {MAX_STRINGS} are taken")
        if key == _TOKENS:
            self._tokens = tuple(self._c.text(MAX_STRING_BYTES, where) for _ in range(n))
            return
        for _ in range(n):
            length = self._c.u64(where)
            if length > MAX_STRING_BYTES:
                self._c.fail(f"{where} has a text of {length} bytes, at most {MAX_STRING_BYTES} are taken")
            self._c.skip(length, where)

    def _alignment(self) -> int:
        value = self._metadata.get("general.alignment", 32)
        if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
            self._c.fail(f"general.alignment is {str(value)[:40]}, expected a power of two up to {MAX_ALIGNMENT}")
        return value

    # tensors

    def _tensors(self, n: int) -> list[tuple[str, tuple[int, ...], str, int, int]]:
        seen: set[str] = set()
        raw = []
        for index in range(n):
            tensor = self._tensor(index)
            if tensor[0] in seen:
                self._c.fail(f"tensor {tensor[0]!r} a second time")
            seen.add(tensor[0])
            raw.append(tensor)
        return raw

    def _tensor(self, index: int) -> tuple[str, tuple[int, ...], str, int, int]:
        name = self._c.text(MAX_TENSOR_NAME_BYTES, f"the name of tensor {index}").decode(errors="backslashreplace")
        where = f"tensor {name!r}"
        n_dims = self._c.u32(where)
        if n_dims > MAX_DIMENSIONS:
            self._c.fail(f"{where} has {n_dims} dimensions, at most {MAX_DIMENSIONS} exist")
        dims = tuple(self._c.u64(where) for _ in range(n_dims))
        n_elements = _product(dims)
        if max(dims, default=0) > MAX_ELEMENTS or n_elements > MAX_ELEMENTS:
            self._c.fail(f"{where} of {' x '.join(map(str, dims))} elements is too large to exist")
        number = self._c.u32(where)
        if number not in TENSOR_TYPES:
            self._c.fail(f"{where} has the unknown type {number}")
        kind, block, block_bytes = TENSOR_TYPES[number]
        if (dims[0] if dims else 1) % block:
            self._c.fail(f"{where} has rows of {dims[0] if dims else 1}, no multiple of the {block} of {kind}")
        offset = self._c.u64(where)
        return name, dims, kind, offset, n_elements // block * block_bytes

    def _place(
        self, raw: list[tuple[str, tuple[int, ...], str, int, int]], data_start: int, alignment: int
    ) -> tuple[Tensor, ...]:
        expected = 0
        placed = []
        for name, dims, kind, offset, n_bytes in raw:
            if offset != expected:
                self._c.fail(f"tensor {name!r} is at offset {offset} of the data, expected {expected}")
            end = data_start + offset + n_bytes
            if end > self._file_size:
                raise BadGguf(
                    f"the file is cut short: tensor {name!r} ends at byte {end}, the file has {self._file_size}",
                    hint="It was probably not downloaded to its end; fetch it again.",
                )
            placed.append(Tensor(name, dims, kind, data_start + offset, n_bytes))
            expected = -(-(offset + n_bytes) // alignment) * alignment
        return tuple(placed)


def _product(dims: tuple[int, ...]) -> int:
    total = 1
    for n in dims:
        total *= n
    return total
