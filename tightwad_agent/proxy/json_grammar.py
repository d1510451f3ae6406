"""JSON schemas as grammars of llama.cpp (GBNF), which say what an answer may look like. Pure.

What a keyword asks for is in the grammar, or the schema is refused with the path of the keyword: an answer that looks
checked and is not would be worse than none. Properties come in the order of the schema, and no others with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from tightwad_agent.errors import UsageError
from tightwad_agent.wire.verify import MAX_GRAMMAR

MAX_DEPTH: Final = 48
MAX_PROPERTIES: Final = 512
MAX_ITEMS: Final = 256
MAX_CHARS: Final = 512
"""The largest bounds that `maxItems` and `maxLength` may set: the engine writes them out."""
MAX_REPEATS: Final = 4096
"""All bounds of one schema together."""

_BASE: Final = {
    "ws": r'" "? | "\n" [ \t]{0,20}',
    "char": r'[^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})',
    "string": r'"\"" char* "\""',
    "integer": r'"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": r'integer ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?',
    "boolean": r'"true" | "false"',
    "null": r'"null"',
    "member": r'string ":" ws value',
    "object": r'"{" ws (member (ws "," ws member)* ws)? "}"',
    "array": r'"[" ws (value (ws "," ws value)* ws)? "]"',
    "value": "object | array | string | number | boolean | null",
}
_ANNOTATIONS: Final = frozenset(
    (
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "format"),
        *("$schema", "$id", "$anchor", "$comment", "$defs", "definitions", "id"),
    )
)
"""They say nothing about what is valid, `format` by the standard's default."""
_OF_TYPE: Final[Mapping[str, frozenset[str]]] = {
    "object": frozenset(("properties", "required", "additionalProperties")),
    "array": frozenset(("items", "minItems", "maxItems")),
    "string": frozenset(("minLength", "maxLength")),
    "number": frozenset(),
    "integer": frozenset(),
    "boolean": frozenset(),
    "null": frozenset(),
}
_TYPES: Final[Mapping[str, Callable[[Any], bool]]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": lambda value: type(value) in (int, float),
    "integer": lambda value: type(value) is int,
    "boolean": lambda value: type(value) is bool,
    "null": lambda value: value is None,
}


class BadSchema(UsageError):
    """No schema, or one that asks for what cannot be held to. The message begins with the path of what is wrong."""


def any_object() -> str:
    """The grammar of any JSON object."""
    return _text("object", {})


def grammar_of(schema: Any) -> str:
    """The grammar of what a schema takes. Raises `BadSchema`."""
    return _Grammar(schema).text()


def _text(root: str, rules: Mapping[str, str]) -> str:
    return "".join(f"{name} ::= {rule}\n" for name, rule in {"root": root, **rules, **_BASE}.items())


def literal(text: str) -> str:
    """Exactly this text, as GBNF writes it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'


class _Grammar:
    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._rules: dict[str, str] = {}
        self._refs: dict[str, str] = {}
        self._n_chars = self._n_repeats = 0

    def text(self) -> str:
        text = _text(self._any(self._schema, "", 0, ()), self._rules)
        if len(text) > MAX_GRAMMAR:
            raise BadSchema(f"the schema makes a grammar of {len(text)} characters, at most {MAX_GRAMMAR} are taken")
        return text

    def _rule(self, body: str) -> str:
        """A rule of its own; its name."""
        self._n_chars += len(body)
        if self._n_chars > MAX_GRAMMAR:
            raise BadSchema(f"the schema makes a grammar of more than {MAX_GRAMMAR} characters")
        name = f"r{len(self._rules)}"
        self._rules[name] = body
        return name

    def _any(self, schema: Any, path: str, depth: int, within: tuple[str, ...]) -> str:
        """The name of a rule, or one of `_BASE`. `within`: references that led here without a bracket in between."""
        if depth > MAX_DEPTH:
            raise _bad(path, f"is nested more than {MAX_DEPTH} deep")
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, dict):
            raise _bad(path, "is no schema: an object, or true")
        asked = {key: value for key, value in schema.items() if key not in _ANNOTATIONS}
        for key, make in (("$ref", self._ref), ("enum", self._enum), ("const", self._const)):
            if key in asked:
                return make(asked, path, depth, within)
        for key in ("anyOf", "oneOf", "allOf"):
            if key in asked:
                return self._choice(asked, key, path, depth, within)
        return self._typed(asked, path, depth)

    # One of several, and others' schemas

    def _ref(self, asked: Mapping[str, Any], path: str, depth: int, within: tuple[str, ...]) -> str:
        _no_more(asked, {"$ref"}, path)
        pointer = asked["$ref"]
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            raise _bad(f"{path}/$ref", "refers to something outside of the schema")
        if pointer in within:
            raise _bad(f"{path}/$ref", f"leads from {pointer[:60]} to itself")
        if pointer not in self._refs:
            name = self._refs[pointer] = self._rule("")
            self._rules[name] = self._any(self._found(pointer, path), pointer[1:], depth + 1, (*within, pointer))
        return self._refs[pointer]

    def _found(self, pointer: str, path: str) -> Any:
        found = self._schema
        for part in pointer.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or key not in found:
                raise _bad(f"{path}/$ref", f"refers to {pointer[:60]}, which is not there")
            found = found[key]
        return found

    def _enum(self, asked: Mapping[str, Any], path: str, _depth: int, _within: tuple[str, ...]) -> str:
        _no_more(asked, {"enum", "type"}, path)
        values = asked["enum"]
        if not isinstance(values, list):
            raise _bad(f"{path}/enum", "must be a list")
        if "type" in asked:
            kinds = _kinds(asked["type"], path)
            values = [value for value in values if any(_TYPES[kind](value) for kind in kinds)]
        if not values:
            raise _bad(f"{path}/enum", "has no value that the type allows")
        return self._rule(" | ".join(literal(_json(value)) for value in values))

    def _const(self, asked: Mapping[str, Any], path: str, depth: int, within: tuple[str, ...]) -> str:
        rest = {key: value for key, value in asked.items() if key != "const"}
        return self._enum({**rest, "enum": [asked["const"]]}, path, depth, within)

    def _choice(self, asked: Mapping[str, Any], key: str, path: str, depth: int, within: tuple[str, ...]) -> str:
        _no_more(asked, {key}, path)
        of = asked[key]
        if not isinstance(of, list) or not of:
            raise _bad(f"{path}/{key}", "must be a list of schemas")
        if key == "allOf" and len(of) > 1:
            raise _bad(f"{path}/allOf", "of more than one schema is not supported")
        made = [self._any(one, f"{path}/{key}/{i}", depth + 1, within) for i, one in enumerate(of)]
        return made[0] if len(made) == 1 else self._rule(" | ".join(dict.fromkeys(made)))

    # By type

    def _typed(self, asked: Mapping[str, Any], path: str, depth: int) -> str:
        if "type" in asked:
            kinds = _kinds(asked["type"], path)
        else:
            kinds = [kind for kind, keys in _OF_TYPE.items() if keys & asked.keys()] or list(_TYPES)
        _no_more(asked, {"type"}.union(*(_OF_TYPE[kind] for kind in kinds)), path)
        made = [self._of_type(kind, asked, path, depth) for kind in kinds]
        return made[0] if len(made) == 1 else self._rule(" | ".join(dict.fromkeys(made)))

    def _of_type(self, kind: str, asked: Mapping[str, Any], path: str, depth: int) -> str:
        if kind == "object" and _OF_TYPE["object"] & asked.keys():
            return self._object(asked, path, depth)
        if kind == "array" and _OF_TYPE["array"] & asked.keys():
            return self._array(asked, path, depth)
        if kind == "string" and _OF_TYPE["string"] & asked.keys():
            low, high = self._bounds(asked, "minLength", "maxLength", MAX_CHARS, path)
            return self._rule(rf'"\"" char{{{low},{"" if high is None else high}}} "\""')
        return kind

    def _array(self, asked: Mapping[str, Any], path: str, depth: int) -> str:
        low, high = self._bounds(asked, "minItems", "maxItems", MAX_ITEMS, path)
        item = self._any(asked.get("items", True), f"{path}/items", depth + 1, ())
        if high == 0:
            return self._rule('"[" ws "]"')
        most = "" if high is None else str(high - 1)
        more = "" if high == 1 else f'(ws "," ws {item}){{{max(0, low - 1)},{most}}} '
        items = f"{item} {more}ws"
        return self._rule(f'"[" ws {items} "]"' if low else f'"[" ws ({items})? "]"')

    def _bounds(
        self, asked: Mapping[str, Any], low_name: str, high_name: str, most: int, path: str
    ) -> tuple[int, int | None]:
        low, high = asked.get(low_name, 0), asked.get(high_name)
        for name, value in ((low_name, low), (high_name, high)):
            if value is not None and not (type(value) is int and 0 <= value <= most):
                raise _bad(f"{path}/{name}", f"must be a whole number from 0 to {most}")
        if high is not None and low > high:
            raise _bad(f"{path}/{high_name}", f"is less than {low_name}")
        self._n_repeats += high or low
        if self._n_repeats > MAX_REPEATS:
            raise _bad(path, f"has bounds that come to more than {MAX_REPEATS} with those before")
        return low, high

    def _object(self, asked: Mapping[str, Any], path: str, depth: int) -> str:
        properties, required, others = asked.get("properties", {}), asked.get("required", []), asked.get(_OTHERS, True)
        if not isinstance(properties, dict) or len(properties) > MAX_PROPERTIES:
            raise _bad(f"{path}/properties", f"must be an object of at most {MAX_PROPERTIES} schemas")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise _bad(f"{path}/required", "must be a list of names")
        if unknown := [name for name in required if name not in properties]:
            raise _bad(f"{path}/required", f"names {unknown[0][:60]!r}, which is not among the properties")
        if properties:
            return self._with(properties, set(required), path, depth)
        if others is False:
            return self._rule('"{" ws "}"')
        value = self._any(others, f"{path}/{_OTHERS}", depth + 1, ())
        member = self._rule(f'string ":" ws {value}')
        return self._rule(f'"{{" ws ({member} (ws "," ws {member})* ws)? "}}"')

    def _with(self, properties: Mapping[str, Any], required: set[str], path: str, depth: int) -> str:
        """From the last property to the first: what may follow where there is something before, and where not."""
        more, first = "ws", '""'
        for name, schema in reversed(list(properties.items())):
            value = self._any(schema, f"{path}/properties/{name}", depth + 1, ())
            member = f"{literal(_json(name) + ':')} ws {value} {more}"
            if name in required:
                more, first = self._rule(f'ws "," ws {member}'), self._rule(member)
            else:
                more, first = self._rule(f'ws "," ws {member} | {more}'), self._rule(f"{member} | {first}")
        return self._rule(f'"{{" ws {first} "}}"')


_OTHERS: Final = "additionalProperties"


def _bad(path: str, what: str) -> BadSchema:
    return BadSchema(f"{path[:200] or 'the schema'} {what}")


def _no_more(asked: Mapping[str, Any], known: set[str] | frozenset[str], path: str) -> None:
    if unknown := [key for key in asked if key not in known]:
        raise _bad(f"{path}/{unknown[0][:60]}", "is not supported")


def _kinds(given: Any, path: str) -> Sequence[str]:
    kinds = given if isinstance(given, list) else [given]
    if not kinds or not all(isinstance(kind, str) and kind in _TYPES for kind in kinds):
        raise _bad(f"{path}/type", f"must be one or several of {', '.join(_TYPES)}")
    return kinds


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))
