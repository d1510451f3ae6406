"""Fields of a JSON request, each taken once, with errors that name it.

`null` is the same as leaving a field out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from tightwad_agent.errors import Unsupported, UsageError

MAX_SHOWN = 80

HINT = "`tightwad-agent serve MODEL --engine llama-server` serves the model with everything llama-server can do."


class BadField(UsageError):
    """A field of a request with a wrong type or a value out of range; `param` names it."""

    code = "invalid_value"

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


# JSON


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises `UsageError` for anything else, for NaN and infinities, a key given twice, and text that
    is not Unicode (half a surrogate pair)."""
    try:
        value = json.loads(body.decode(), object_pairs_hook=_object, parse_constant=_no_constant)
        if b"\\u" in body:
            json.dumps(value, ensure_ascii=False).encode()  # an escape can write half a pair
    except UnicodeDecodeError as exc:
        raise UsageError(f"the request body is not UTF-8 (byte {exc.start})") from None
    except UnicodeEncodeError:
        raise UsageError("the request body has text that is not Unicode: half a surrogate pair") from None
    except RecursionError:
        raise UsageError("the request body is nested too deeply") from None
    except ValueError as exc:
        raise UsageError(f"the request body is not JSON: {str(exc)[:MAX_SHOWN]}") from None
    if not isinstance(value, dict):
        raise UsageError("the request body must be a JSON object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadField(f"`{twice[:MAX_SHOWN]}` is given twice", param=twice[:MAX_SHOWN])
    return made


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


# Fields


def shown(value: Any) -> str:
    """A value for an error message."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}" if value else str(value)
    text = json.dumps(value[: MAX_SHOWN + 1] if isinstance(value, str) else value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


class Fields:
    """The fields of one object; each `take`n once. `where` is put before names in errors."""

    def __init__(self, body: Mapping[str, Any], where: str = "") -> None:
        self._left = {name: value for name, value in body.items() if value is not None}
        self._where = where

    def take(self, name: str) -> Any:
        return self._left.pop(name, None)

    def wrong(self, name: str, should: str, value: Any) -> BadField:
        param = self._where + name
        return BadField(f"`{param}` must be {should}, not {shown(value)}", param=param)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.wrong(name, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        if type(value) is float and value.is_integer():
            value = int(value)
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise self.wrong(name, f"a whole number from {low} to {high}", value)
        return value

    def flag(self, name: str, *, default: bool = False) -> bool:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "text", value)
        return value

    def refuse_rest(self, neutral: Mapping[str, Callable[[Any], bool]]) -> None:
        """Raises `Unsupported` for the first field that asks for something nobody has read."""
        for name, value in self._left.items():
            asks_nothing = neutral.get(name)
            if asks_nothing is None:
                raise unsupported(self._where + name, "is not known to the verifier, the engine that serves now")
            if not asks_nothing(value):
                what = "is not possible" if isinstance(value, list | dict) else f"cannot be {shown(value)}"
                raise unsupported(self._where + name, f"{what} with the verifier, the engine that serves now")


def unsupported(name: str, what: str) -> Unsupported:
    """`what` goes on after the field's name."""
    name = name[:MAX_SHOWN]
    return Unsupported(f"`{name}` {what}", param=name, hint=HINT)
