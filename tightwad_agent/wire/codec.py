"""Frozen dataclasses <-> msgpack, with every field checked on the way in.

A conversation is a `Codec`: a table from append-only integer tags to message classes. On the wire a message is
`[tag, field, field, ...]` in the order of the class's fields. New fields go to the end and have defaults: an old node
ignores fields it does not know (up to a bound), a new one fills what an old node did not send. Those marked `OMITTED`
are left out where they and all behind them have their defaults: messages that do not use them stay as they were.

`decoders` says what a field can be.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import operator
import typing
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import msgpack  # type: ignore[import-untyped]

from tightwad_agent.errors import ProtocolError
from tightwad_agent.wire.decoders import (
    MAX_BYTES,
    MAX_EXTRA_FIELDS,
    MAX_INT,
    MAX_ITEMS,
    MAX_STR,
    NATURAL,
    Max,
    Mismatch,
    decoder_of,
)

T = TypeVar("T")

OMITTED: Mapping[str, bool] = MappingProxyType({"omitted": True})
"""Metadata of a field."""

_PLAIN = frozenset((bool, int, float, str, bytes, type(None)))


def to_plain(value: Any) -> Any:
    """Dataclasses as lists, all else as msgpack takes it."""
    kind: Any = type(value)
    if kind in _PLAIN:
        return value
    if (fields := _fields(kind)) is not None:
        plain = [v if type(v) in _PLAIN else to_plain(v) for v in fields(value)]
        return _shortened(plain, kind) if _omitted(kind) else plain
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    return value


def from_plain(kind: type[T], plain: Any) -> T:
    """The inverse of `to_plain` for one dataclass (or any field type); raises `Mismatch`."""
    decode: Callable[[Any], T] = decoder_of(typing.cast("Any", kind))
    return decode(plain)


def pack(plain: Any) -> bytes:
    """msgpack bytes of a plain value."""
    return msgpack.packb(plain, use_bin_type=True)  # type: ignore[no-any-return]


def unpack(data: bytes) -> Any:
    """A plain value from msgpack; no extension types, string keys only. Raises `ProtocolError`."""
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            ext_hook=_no_ext,
            timestamp=0,
            object_hook=_text_keys,
            max_ext_len=0,  # a timestamp would not reach ext_hook
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as exc:
        raise ProtocolError(f"not msgpack: {exc}") from None


class Codec:
    """The messages of one conversation."""

    def __init__(self, name: str, messages: Mapping[int, type]) -> None:
        self.name = name
        self._by_tag = dict(messages)
        self._tag_of = {kind: tag for tag, kind in messages.items()}

    def encode(self, message: object) -> bytes:
        """Header bytes of a message of this conversation; `KeyError` for any other (a bug)."""
        return pack([self._tag_of[type(message)], *to_plain(message)])

    def decode(self, header: bytes) -> Any:
        """The message. Raises `ProtocolError` for an unknown tag or a field that does not fit."""
        plain = unpack(header)
        if not isinstance(plain, list) or not plain or type(plain[0]) is not int:
            raise ProtocolError(f"{self.name}: a message must be a list that begins with its tag")
        kind = self._by_tag.get(plain[0])
        if kind is None:
            raise ProtocolError(f"{self.name}: unknown message {plain[0]}")
        try:
            return decoder_of(kind)(plain[1:])
        except Mismatch as exc:
            raise ProtocolError(f"{self.name}: {kind.__name__}{exc}") from None


def _no_ext(code: int, data: bytes) -> Any:  # noqa: ARG001 - msgpack's signature
    raise ValueError(f"extension type {code}")


def _text_keys(plain: dict[Any, Any]) -> dict[Any, Any]:
    if not all(type(key) is str for key in plain):  # strict_map_key lets bytes pass
        raise ValueError("a map's keys must be text")
    return plain


@functools.cache
def _fields(kind: type) -> Callable[[Any], tuple[Any, ...]] | None:
    """What takes the values of all fields out of a dataclass; `None` for other types."""
    if not dataclasses.is_dataclass(kind):
        return None
    names = [field.name for field in dataclasses.fields(kind)]
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda value: tuple(getattr(value, name) for name in names)


def _shortened(plain: list[Any], kind: type) -> list[Any]:
    defaults = _omitted(kind)
    for default in reversed(defaults):
        if plain[-1] != default:
            break
        plain.pop()
    return plain


@functools.cache
def _omitted(kind: Any) -> tuple[Any, ...]:
    """The plain defaults of the last fields, as far as they are left out."""
    fields = dataclasses.fields(kind)
    behind = itertools.takewhile(lambda field: field.metadata.get("omitted"), reversed(fields))
    return tuple(to_plain(field.default) for field in behind)[::-1]


__all__ = [
    "MAX_BYTES",
    "MAX_EXTRA_FIELDS",
    "MAX_INT",
    "MAX_ITEMS",
    "MAX_STR",
    "NATURAL",
    "OMITTED",
    "Codec",
    "Max",
    "Mismatch",
    "from_plain",
    "pack",
    "to_plain",
    "unpack",
]
