"""Valid messages of every codec, made from their types, and damage to the tree that a msgpack text holds."""

from __future__ import annotations

import dataclasses
import enum
import random
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import msgpack

from tightwad_agent.ids import Address, ClusterId, Epoch, ModelId, NodeId, NodeName, SafeName
from tightwad_agent.wire.codec import NATURAL, Codec, Max

WORDS = [
    b"\xc1",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\xd6\xff\x00\x00\x00\x00",
    b"\xc7\x0c\xff" + bytes(12),
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + bytes(7),
    b"\xcb\x7f\xf0" + bytes(6),
    b"\xcb\x7f\xf8" + bytes(6),
    b"\x91" * 2_000,
    b"\xc0",
    b"\x80",
    b"\x90",
    b"\xa0",
]
_ODD: list[Any] = [None, True, 0, -1, 2**63 - 1, -(2**63), 2**64 - 1, 0.5, 1e308, float("inf"), float("nan"), "", "\0"]
_ODD += ["../x", "a" * 5_000, b"", b"\0" * 70_000, [], {}, [[]] * 40, [0] * 1_100, {"a": 1}, {b"a": 1}]
_ODD += ["\ud800".encode(errors="surrogatepass").decode(errors="replace"), "\N{RIGHT-TO-LEFT OVERRIDE}"]

_EXAMPLES: dict[Any, Any] = {
    NodeId: NodeId("a" * 52),
    ClusterId: ClusterId("b" * 52),
    ModelId: ModelId("ab" * 32),
    SafeName: SafeName("a model.gguf"),
    NodeName: NodeName("attic"),
    Address: Address("192.0.2.1", 8089),
    Epoch: Epoch(3, "a" * 52),
}


def example(kind: Any, rng: random.Random, limit: int = 3) -> Any:
    """Some valid value of a field's type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        if NATURAL in args:
            return rng.choice([0, 1, 2**63 - 1])
        return example(args[0], rng, next((min(3, m.n) for m in args if isinstance(m, Max)), limit))
    if origin in (typing.Union, types.UnionType):
        return rng.choice([None, example(args[0], rng)])
    if origin is tuple and args[-1] is Ellipsis:
        return tuple(example(args[0], rng) for _ in range(rng.randint(0, limit)))
    if origin is tuple:
        return tuple(example(a, rng) for a in args)
    if origin is dict:
        return {f"k{i}": example(args[1], rng) for i in range(rng.randint(0, limit))}
    if kind in _EXAMPLES:
        return _EXAMPLES[kind]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        return kind(*(example(hints[f.name], rng) for f in dataclasses.fields(kind)))  # type: ignore[operator]
    if issubclass(kind, enum.Enum):
        return rng.choice(list(kind))
    if issubclass(kind, str):
        return kind("ab"[:limit])
    return kind({bool: 1, int: 7, float: 0.25, bytes: b"\x01\x02"[:limit]}[kind])


def headers_of(codec: Codec, seed: int = 1) -> Iterator[bytes]:
    """Three valid messages of each kind, encoded."""
    rng = random.Random(seed)
    for kind in codec._by_tag.values():
        for _ in range(3):
            yield codec.encode(example(kind, rng))


def damage_tree(data: bytes, rng: random.Random) -> bytes:
    """Puts an odd value in place of a random node, or takes one away, or doubles it; the bytes as they are if they are
    no msgpack."""
    try:
        plain = msgpack.unpackb(data, raw=False, strict_map_key=False)
        changed = _changed(plain, rng)
        return typing.cast("bytes", msgpack.packb(changed, use_bin_type=True))
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        return data


def _changed(plain: Any, rng: random.Random) -> Any:
    if isinstance(plain, list) and plain and rng.random() < 0.85:
        copy = list(plain)
        at = rng.randrange(len(copy))
        how = rng.randrange(8)
        if how == 0:
            del copy[at]
        elif how == 1:
            copy.insert(at, copy[at])
        else:
            copy[at] = _changed(copy[at], rng)
        return copy
    if isinstance(plain, dict) and plain and rng.random() < 0.7:
        key = rng.choice(list(plain))
        return plain | {key: _changed(plain[key], rng)}
    if type(plain) is int and rng.random() < 0.4:
        return max(-(2**63), min(2**64 - 1, plain + rng.choice([-1, 1, 255, 2**32, -(2**31)])))
    return rng.choice(_ODD)
