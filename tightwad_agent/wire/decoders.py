"""What checks the fields of a message on the way in: one decoder per type, made once.

Field types: `bool int float str bytes`, `None` unions, `tuple[T, ...]`, fixed tuples, NamedTuples (made by their
`checked` where they have one), `dict[str, T]`, `str` subclasses of `ids`, enums, and nested dataclasses.
`Annotated[T, Max(n)]` bounds the length of strings, bytes and collections, or the value of an integer. Without it:
strings 4,096 characters, bytes 64 KiB, collections 1,024.

They run for each token, so each is a closure that checks and passes on in as few steps as it can; what is wrong with a
value, and where in the message, is found out only when something is.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

Decoder = Callable[[Any], Any]

MAX_STR = 4096
MAX_BYTES = 64 << 10
MAX_ITEMS = 1024
MAX_EXTRA_FIELDS = 32
MAX_INT = 2**63 - 1


class Max(NamedTuple):
    """Upper bound of a field: length of text, bytes or collections, value of an integer."""

    n: int


NATURAL = "natural"
"""`Annotated[int, NATURAL]`: zero or more, as sizes and counts are."""


class Mismatch(ValueError):
    """A value does not have its field's type; the text names the path."""


@functools.cache
def decoder_of(kind: Any) -> Decoder:
    """For a dataclass, or any other type a field can have: from a plain value to one of it. It raises `Mismatch`;
    `TypeError` if no field can have the type."""
    return _build(kind, None)


def _build(kind: Any, limit: int | None) -> Decoder:
    origin = typing.get_origin(kind)
    if origin is Annotated:
        inner, *marks = typing.get_args(kind)
        if NATURAL in marks:
            return _natural
        return _build(inner, next((m.n for m in marks if isinstance(m, Max)), limit))
    if origin in (typing.Union, types.UnionType):
        return _optional(kind, limit)
    if origin is tuple:
        return _tuple(typing.get_args(kind), limit)
    if origin is dict:
        return _dict(typing.get_args(kind), limit)
    if dataclasses.is_dataclass(kind):
        return _record(kind)
    if isinstance(kind, type):
        if issubclass(kind, tuple) and hasattr(kind, "_fields"):
            return _named_tuple(kind)
        if issubclass(kind, enum.Enum):
            return _checked(kind)
        return _scalar(kind, limit)
    raise TypeError(f"{kind!r} cannot be a field of a message")


def _scalar(kind: type, limit: int | None) -> Decoder:
    if kind is bool:
        return functools.partial(_exact, bool)
    if kind is int:
        most = MAX_INT if limit is None else limit
        return _int(-most - 1, most)
    if kind is float:
        return _float
    if kind is bytes:
        return _sized(bytes, MAX_BYTES if limit is None else limit)
    if kind is str:
        return _sized(str, MAX_STR if limit is None else limit)
    if issubclass(kind, str):
        return _checked(kind)
    raise TypeError(f"{kind!r} cannot be a field of a message")


def _exact(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise Mismatch(f": expected {kind.__name__}, got {type(value).__name__}")
    return value


def _int(least: int, most: int) -> Decoder:
    def decode(value: Any) -> Any:
        if type(value) is int and least <= value <= most:
            return value
        _exact(int, value)
        raise Mismatch(f": {value} is {'less than zero' if value < least == 0 else 'out of range'}")

    return decode


_natural = _int(0, MAX_INT)


def _float(value: Any) -> float:
    if type(value) not in (int, float):
        raise Mismatch(f": expected float, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        raise Mismatch(": number too large") from None
    if not math.isfinite(number):
        raise Mismatch(": not a finite number")
    return number


def _sized(kind: type[str] | type[bytes], limit: int) -> Decoder:
    def decode(value: Any) -> Any:
        if type(value) is kind and len(value) <= limit:
            return value
        _exact(kind, value)
        raise Mismatch(f": {len(value)} long, at most {limit}")

    return decode


def _checked(kind: Any) -> Decoder:
    def decode(value: Any) -> Any:
        if not isinstance(value, str | int):  # also: the repr of a deep list would overflow the stack
            raise Mismatch(f": expected {kind.__name__}, got {type(value).__name__}")
        try:
            return kind(value)
        except (ValueError, TypeError):
            raise Mismatch(f": {repr(value)[:60]} is not a {kind.__name__}") from None

    return decode


def _optional(kind: Any, limit: int | None) -> Decoder:
    arms = [a for a in typing.get_args(kind) if a is not type(None)]
    if len(arms) != 1:
        raise TypeError(f"{kind!r}: only unions with None can be a field of a message")
    inner = _build(arms[0], limit)
    return lambda value: None if value is None else inner(value)


def _items(value: Any, limit: int) -> list[Any]:
    if not isinstance(value, list):
        raise Mismatch(f": expected a list, got {type(value).__name__}")
    if len(value) > limit:
        raise Mismatch(f": {len(value)} items, at most {limit}")
    return value


def _tuple(args: tuple[Any, ...], limit: int | None) -> Decoder:
    most = MAX_ITEMS if limit is None else limit
    if len(args) != 2 or args[1] is not Ellipsis:
        return _fixed(tuple, [_build(a, None) for a in args])
    inner = _build(args[0], None)

    def decode(value: Any) -> Any:
        made: list[Any] = []
        try:
            for item in _items(value, most):
                made.append(inner(item))  # noqa: PERF401 - how far it came is told
        except Mismatch as exc:
            raise Mismatch(f"[{len(made)}]{exc}") from None
        return tuple(made)

    return decode


def _named_tuple(kind: Any) -> Decoder:
    hints = typing.get_type_hints(kind, include_extras=True)
    make = getattr(kind, "checked", kind)

    def build(items: list[Any]) -> Any:
        try:
            return make(*items)
        except ValueError as exc:
            raise Mismatch(f": {exc}") from None

    return _fixed(build, [_build(hints[f], None) for f in kind._fields])


def _fixed(make: Callable[[list[Any]], Any], parts: list[Decoder]) -> Decoder:
    def decode(value: Any) -> Any:
        items = _items(value, len(parts))
        if len(items) != len(parts):
            raise Mismatch(f": {len(items)} items, expected {len(parts)}")
        made: list[Any] = []
        try:
            for part, item in zip(parts, items, strict=True):
                made.append(part(item))
        except Mismatch as exc:
            raise Mismatch(f"[{len(made)}]{exc}") from None
        return make(made)

    return decode


def _dict(args: tuple[Any, ...], limit: int | None) -> Decoder:
    if args[0] is not str:
        raise TypeError("only dict[str, T] can be a field of a message")
    key, inner = _sized(str, MAX_STR), _build(args[1], None)
    most = MAX_ITEMS if limit is None else limit

    def decode(value: Any) -> Any:
        if not isinstance(value, dict) or len(value) > most:
            raise Mismatch(f": expected a map of at most {most} entries")
        made: dict[str, Any] = {}
        for k, v in value.items():
            name = key(k)
            try:
                made[name] = inner(v)
            except Mismatch as exc:
                raise Mismatch(f".{name[:40]}{exc}") from None
        return made

    return decode


def _record(kind: Any) -> Decoder:
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(kind)
    names = [f.name for f in fields]
    parts = [_build(hints[name], None) for name in names]
    most = len(parts) + MAX_EXTRA_FIELDS
    n_required = sum(f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING for f in fields)

    def decode(value: Any) -> Any:
        items = _items(value, most)
        if len(items) < n_required:
            raise Mismatch(f": {len(items)} fields, at least {n_required} expected")
        made: list[Any] = []
        try:
            for part, item in zip(parts, items, strict=False):
                made.append(part(item))
        except Mismatch as exc:
            raise Mismatch(f".{names[len(made)]}{exc}") from None
        return kind(*made)

    return decode
