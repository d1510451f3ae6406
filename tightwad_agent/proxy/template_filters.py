"""What chat templates may call, filter and compute with; each looks at sizes before it makes anything."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from string import Formatter
from typing import Any, cast

from jinja2 import pass_context
from jinja2.filters import FILTERS
from jinja2.runtime import Context
from jinja2.tests import TESTS
from markupsafe import escape

from tightwad_agent.proxy.template_meter import MAX_BITS, MAX_VALUE, OPEN_TYPES, STEP, Refused, TooMuch, meter

_FILTERS = """abs attr capitalize count d default dictsort first float int items last length list lower map max min
    reject rejectattr reverse select selectattr sort title trim unique upper""".split()  # noqa: SIM905


def raise_exception(message: Any = "") -> None:
    raise Refused(_text(message)[:500])


def strftime(now: datetime, form: str) -> str:
    """`now` as text. Raises `TooMuch` for a format that asks for padding."""
    if len(form) > 100 or re.search(r"%[^A-Za-z%]*\d", form):
        raise TooMuch("it formats a time too widely")
    return now.strftime(form)


def _text(value: Any) -> str:
    """As text. Namespaces and the like may hold one another, and have none."""
    if isinstance(value, OPEN_TYPES):
        raise TooMuch("it writes out a namespace")
    return str(meter().weigh(value))


def _escaped(value: Any) -> str:
    return str(escape(_text(value)))


def _rounded(value: Any, precision: int = 0) -> Any:
    return round(value, max(-64, min(precision, 64)))


def _tojson(value: Any, indent: int | None = None, **more: Any) -> str:
    separators, sort_keys = more.get("separators"), bool(more.get("sort_keys"))
    if (indent is not None and not 0 <= indent <= 16) or len("".join(separators or ())) > 16:
        raise TooMuch("it indents too far")
    meter().weigh(value)
    encoder = json.JSONEncoder(ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    parts, n_chars = [], 0
    for part in encoder.iterencode(value):
        parts.append(part)
        n_chars += len(part)
        if n_chars > MAX_VALUE:
            raise TooMuch("it makes a text that is too long")
    return "".join(parts)


def joined(parts: Any, separator: Any = "", attribute: Any = None) -> str:
    if attribute is not None:
        raise TooMuch("it joins by attribute")
    texts, between = [_text(part) for part in parts], _text(separator)
    meter().allow(sum(map(len, texts)) + len(between) * len(texts))
    return between.join(texts)


def replaced(text: Any, old: Any, new: Any, count: int | None = -1) -> str:
    source, part, other = _text(text), _text(old), _text(new)
    meter().allow(len(source) + source.count(part) * len(other))
    return source.replace(part, other, -1 if count is None else count)


def _indented(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    pad = width if isinstance(width, str) else " " * min(int(width), 64)
    lines = _text(text).split("\n")
    meter().allow(sum(map(len, lines)) + len(lines) * (len(pad) + 1))
    rest = [pad + line if line or blank else line for line in lines[1:]]
    return "\n".join([pad + lines[0] if first else lines[0], *rest])


def _formatted(text: Any, *values: Any) -> Any:
    return _percent(_text(text), values)


def _percent(text: str, values: Any) -> str:
    if re.search(r"%[^%a-zA-Z]*(\d\d\d|\*)", text):
        raise TooMuch("it formats too widely")
    parts = values if isinstance(values, tuple) else (values,)
    meter().allow(len(text) + sum(len(_text(part)) + 100 for part in parts) * (1 + text.count("%(")))
    return str(text % values)


def filled(text: str, *values: Any, **named: Any) -> str:
    """`str.format` with plain fields only: no attributes, no widths. Raises `TooMuch` for others."""
    parsed = [part[1:] for part in Formatter().parse(text) if part[1] is not None]
    if any(spec or conversion or not re.fullmatch(r"\w*", field or "") for field, spec, conversion in parsed):
        raise TooMuch("it formats too widely")
    texts, names = [_text(v) for v in values], {name: _text(v) for name, v in named.items()}
    meter().allow(len(text) + len(parsed) * max(map(len, [*texts, *names.values()]), default=0))
    return text.format(*texts, **names)


def _concatenated(parts: list[Any]) -> str:
    return joined(parts)


# Operators


def _times(left: Any, right: Any) -> Any:
    for value, count in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(count, int):
            meter().allow(len(value) * max(0, count))
            return value * count
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > MAX_BITS:
        raise TooMuch("it makes a number that is too large")
    return left**right


def _plus(left: Any, right: Any) -> Any:
    if isinstance(left, str) and isinstance(right, str):
        meter().allow(len(left) + len(right))
    return left + right


def _modulo(left: Any, right: Any) -> Any:
    return _percent(left, right) if isinstance(left, str) else left % right


OPERATORS = {"*": _times, "**": _power, "+": _plus, "%": _modulo}


# Filters


def _weighed(value: Any) -> Any:
    return meter().weigh(value)


def _toll(n_chars: int) -> None:
    """Paid for each turn of a loop, with what its fixed text comes to."""
    meter().pay(STEP)
    meter().write(n_chars)


def _paid(func: Callable[..., Any], takes: tuple[type, ...] = ()) -> Callable[..., Any]:
    """The same filter or test, paid for. `takes`: of the types that are no plain values, those it may have."""

    def run(*args: Any, **kwargs: Any) -> Any:
        costs = meter()
        costs.pay(STEP)
        for arg in args:
            if isinstance(arg, str):
                costs.pay(len(arg))
            elif isinstance(arg, OPEN_TYPES) and not isinstance(arg, takes):
                raise TooMuch("it filters a namespace")
        made = func(*args, **kwargs)
        return _counted(made) if isinstance(made, Iterator) else costs.weigh(made)

    if hasattr(func, "jinja_pass_arg"):
        run.jinja_pass_arg = func.jinja_pass_arg  # type: ignore[attr-defined]
    return run


def _counted(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        meter().pay(STEP)
        yield item


@pass_context  # with it, constants are not written while compiling
def written(_context: Context, value: Any) -> str:
    """What `{{ value }}` writes."""
    text = _text(value)
    meter().write(len(text))
    return text


_OWN_FILTERS: dict[str, Callable[..., Any]] = {
    "tojson": _tojson,
    "join": joined,
    "replace": replaced,
    "indent": _indented,
    "format": _formatted,
    "string": _text,
    "safe": _text,
    "e": _escaped,
    "escape": _escaped,
    "round": _rounded,
    "concatenated": _concatenated,
}
_UNPAID = {"weighed": _weighed, "toll": _toll}
_ANY_OPEN = {"default": OPEN_TYPES, "d": OPEN_TYPES}


def filters() -> dict[str, Callable[..., Any]]:
    """By name, paid for."""
    usual = {name: _paid(FILTERS[name], _ANY_OPEN.get(name, ())) for name in _FILTERS}
    return usual | {name: _paid(func) for name, func in _OWN_FILTERS.items()} | _UNPAID


def tests() -> dict[str, Callable[..., Any]]:
    """jinja2's, paid for."""
    usual = cast("dict[str, Callable[..., Any]]", TESTS)
    return {name: _paid(func, OPEN_TYPES) for name, func in usual.items()}
