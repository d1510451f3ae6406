"""What the grammar of a schema takes and what not, and which schemas are refused, by what is wrong with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gbnf import Grammar
from hypothesis import given, settings
from hypothesis import strategies as st
from json_schemas import TAKES

from tightwad_agent.proxy.json_grammar import MAX_DEPTH, BadSchema, any_object, grammar_of
from tightwad_agent.wire.verify import MAX_GRAMMAR


@pytest.mark.parametrize(("schema", "good", "bad"), TAKES, ids=[json.dumps(schema)[:40] for schema, *_ in TAKES])
def test_takes(schema: Any, good: list[Any], bad: list[str]) -> None:
    grammar = Grammar(grammar_of(schema))
    for value in good:
        for text in (json.dumps(value, ensure_ascii=False), json.dumps(value, ensure_ascii=False, indent=2)):
            assert grammar.takes(text), text
    for text in bad:
        assert not grammar.takes(text), text


def test_what_is_listed_is_said_on_one_line() -> None:
    grammar = Grammar(grammar_of({"enum": [{"a": [1, "b"]}, []]}))
    assert grammar.takes('{"a": [1, "b"]}')
    assert grammar.takes("[]")
    assert not grammar.takes('{"a": [1, "b"], "c": 1}')


def test_any_object() -> None:
    grammar = Grammar(any_object())
    assert grammar.takes('{"a": [1, {"b": null}], "c": "d"}')
    assert not grammar.takes("[]")
    assert not grammar.takes('"a"')


def test_spaces_have_an_end() -> None:
    """A model that is stuck says blanks for ever where it may."""
    grammar = Grammar(grammar_of({"type": "object"}))
    assert not grammar.takes("{" + " " * 100 + "}")
    assert not grammar.takes("{" + "\n" * 3 + "}")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(VALUES)
def test_any_json_is_taken_where_anything_goes(value: Any) -> None:
    text = json.dumps(value, ensure_ascii=False)
    assert Grammar(grammar_of(True)).takes(text)
    assert Grammar(grammar_of({"const": value})).takes(text)


REFUSED: list[tuple[Any, str]] = [
    ("string", "the schema is no schema"),
    (False, "is no schema"),
    (None, "is no schema"),
    ({"type": "text"}, "/type must be one"),
    ({"type": []}, "/type must be"),
    ({"type": [["string"]]}, "/type must be"),
    ({"type": "string", "pattern": "a+"}, "/pattern is not supported"),
    ({"properties": {"a": {"type": "integer", "minimum": 3}}}, "/properties/a/minimum is not supported"),
    ({"type": "array", "items": {"uniqueItems": True}}, "/items/uniqueItems is not supported"),
    ({"type": "string", "minItems": 1}, "/minItems is not supported"),
    ({"anyOf": [{"type": "null"}], "type": "null"}, "/type is not supported"),
    ({"allOf": [{}, {}]}, "/allOf of more than one"),
    ({"anyOf": []}, "/anyOf must be a list"),
    ({"anyOf": [{"type": "null"}, {"not": {}}]}, "/anyOf/1/not is not supported"),
    ({"enum": []}, "/enum has no value"),
    ({"enum": ["a"], "type": "integer"}, "/enum has no value"),
    ({"enum": "abc"}, "/enum must be a list"),
    ({"enum": [1], "minimum": 0}, "/minimum is not supported"),
    ({"$ref": "#/$defs/A"}, "which is not there"),
    ({"$ref": "https://example.org/x"}, "outside of the schema"),
    ({"$ref": 5}, "outside of the schema"),
    ({"$ref": "#", "type": "null"}, "/type is not supported"),
    ({"$ref": "#"}, "to itself"),
    (
        {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}},
        "to itself",
    ),
    ({"properties": []}, "/properties must be"),
    ({"properties": {str(i): True for i in range(600)}}, "/properties must be"),
    ({"properties": {}, "required": ["a"]}, "/required names 'a'"),
    ({"required": "a"}, "/required must be"),
    ({"minItems": 3, "maxItems": 2}, "/maxItems is less"),
    ({"minItems": -1}, "/minItems must be"),
    ({"maxItems": 10**9}, "/maxItems must be a whole number from 0 to 256"),
    ({"maxLength": True}, "/maxLength must be"),
    ({"properties": {f"p{i}": {"maxLength": 500} for i in range(9)}}, "/properties/p0 has bounds that come to more"),
    ({"enum": ["x" * 1000 for _ in range(100)]}, f"at most {MAX_GRAMMAR}|more than {MAX_GRAMMAR}"),
]


@pytest.mark.parametrize(("schema", "words"), REFUSED, ids=[words[:30] for _, words in REFUSED])
def test_refused_by_the_path_of_what_is_wrong(schema: Any, words: str) -> None:
    with pytest.raises(BadSchema, match=words):
        grammar_of(schema)


def test_depth_is_bounded() -> None:
    schema: Any = {"type": "null"}
    for _ in range(MAX_DEPTH + 1):
        schema = {"type": "array", "items": schema}
    with pytest.raises(BadSchema, match="deep"):
        grammar_of(schema)


def test_a_reference_used_often_is_written_once() -> None:
    schema = {
        "properties": {f"p{i}": {"$ref": "#/$defs/T"} for i in range(100)},
        "$defs": {"T": {"properties": {f"q{i}": {"type": "string"} for i in range(50)}}},
    }
    assert grammar_of(schema).count('"\\"q7\\":"') == 2, "with something before it, and without"
