"""Schemas, values that each takes, and texts that it does not."""

from __future__ import annotations

from typing import Any

PERSON = {
    "type": "object",
    "title": "Person",
    "properties": {
        "name": {"type": "string"},
        "nick": {"type": "string", "description": "if there is one"},
        "age": {"type": "integer"},
        "likes": {"type": "array", "items": {"$ref": "#/$defs/Thing"}},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"Thing": {"enum": ["tea", 'a "quoted" one', "c:\\d", "ä\n"]}},
}
TREE = {
    "$ref": "#/definitions/Node",
    "definitions": {
        "Node": {
            "type": "object",
            "properties": {"v": {"type": "number"}, "kids": {"type": "array", "items": {"$ref": "#/definitions/Node"}}},
            "required": ["v"],
        }
    },
}

TAKES: list[tuple[Any, list[Any], list[str]]] = [
    ({"type": "boolean"}, [True, False], ["True", "null", '"true"', "true false", ""]),
    ({"type": "null"}, [None], ["0", "nul"]),
    ({"type": "integer"}, [0, 7, -12, 10**15], ["01", "1.5", "1e3", "-", "+1"]),
    ({"type": "number"}, [0, -1.5, 1e-7, 1e300, 123.25], ["1.", ".5", "1e", "01.5", "NaN", "0x1"]),
    (
        {"type": "string"},
        ["", "a b", 'ä\n\t"\\/', "\u2028", "😀", "\x01"],
        ['"', "a", '"a', '"a\nb"', '"\\x"', '"\\u12"'],
    ),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "äöü", '""'], ['"a"', '"abcd"']),
    ({"type": ["string", "null"]}, ["a", None], ["1", "[]"]),
    ({"enum": [1, "one", None]}, [1, "one", None], ["2", "one", "{}"]),
    ({"enum": [1, "one", 2.5], "type": ["integer", "number"]}, [1, 2.5], ['"one"']),
    ({"const": "v"}, ["v"], ["{}", '"w"']),
    ({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "null"}}]}, [3, [], [None]], ["[1]", "{}"]),
    ({"oneOf": [{"const": 1}, {"const": 2}]}, [1, 2], ["3"]),
    ({"allOf": [{"type": "boolean"}]}, [True], ["1"]),
    ({"type": "array", "items": {"type": "integer"}}, [[], [1], [1, 2, 3]], ["[,]", "[1,]", "[1 2]", '["1"]', "1"]),
    (
        {"type": "array", "minItems": 2, "maxItems": 3, "items": {"const": 0}},
        [[0, 0], [0, 0, 0]],
        ["[]", "[0]", "[0,0,0,0]"],
    ),
    ({"type": "array", "minItems": 1, "items": {"const": 0}}, [[0], [0, 0, 0]], ["[]"]),
    ({"type": "array", "maxItems": 1, "items": {"const": 0}}, [[], [0]], ["[0,0]"]),
    ({"type": "array", "maxItems": 0}, [[]], ["[0]"]),
    ({"items": {"type": "boolean"}}, [[True]], ["[1]", "{}"]),
    ({"type": "array"}, [[], [1, "a", {"b": []}]], ["[", "{}"]),
    ({"type": "object"}, [{}, {"a": {"b": [1, None]}}], ["[]", "{,}", '{"a"}', '{"a":}', "{a:1}", '{"a":1,}']),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"a": 1, "b": 2}], ['{"a": "1"}']),
    ({"type": "object", "additionalProperties": False}, [{}], ['{"a": 1}']),
    ({"properties": {"a": {"const": 1}}}, [{}, {"a": 1}], ['{"b": 1}', '{"a": 2}', '{"a": 1, "a": 1}']),
    (
        PERSON,
        [
            {"name": "x", "age": 1},
            {"name": "x", "nick": "y", "age": 1},
            {"name": "x", "age": 1, "likes": ["tea", 'a "quoted" one', "c:\\d", "ä\n"]},
            {"name": "x", "nick": "y", "age": 1, "likes": []},
        ],
        [
            "{}",
            '{"name": "x"}',
            '{"age": 1, "name": "x"}',
            '{"name": "x", "age": "1"}',
            '{"name": "x", "age": 1, "likes": ["coffee"]}',
            '{"name": "x", "age": 1, "more": 1}',
            '{"name": "x", "age": 1,}',
            '{, "name": "x", "age": 1}',
        ],
    ),
    (
        {"properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}}, "required": ["b"]},
        [{"b": 2}, {"a": 1, "b": 2}, {"b": 2, "c": 3}, {"a": 1, "b": 2, "c": 3}],
        ["{}", '{"a": 1}', '{"a": 1, "c": 3}', '{"c": 3, "b": 2}'],
    ),
    (TREE, [{"v": 1}, {"v": 1, "kids": [{"v": 2, "kids": []}, {"v": 3}]}], ["{}", '{"v": 1, "kids": [{}]}']),
    ({"properties": {"next": {"$ref": "#"}}}, [{}, {"next": {"next": {}}}], ['{"next": 1}']),
    ({"properties": {'k"\\ä': {"const": 1}}}, [{'k"\\ä': 1}], ["{k: 1}"]),
    ({"$defs": {"a/b~c": {"const": 1}}, "anyOf": [{"$ref": "#/$defs/a~1b~0c"}]}, [1], ["2"]),
    (True, [1, "a", [], {"a": None}], ["a", ""]),
    ({}, [1.5, [[]]], ["[[]"]),
    ({"format": "email", "type": "string", "default": "x"}, ["not checked"], ["1"]),
]
