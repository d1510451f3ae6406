"""docs/endpoint.md says what the endpoint takes: each field that it knows, and each example as it says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tightwad_agent.errors import TightwadError
from tightwad_agent.proxy.fields import Fields
from tightwad_agent.proxy.neutral import NEUTRAL
from tightwad_agent.proxy.parameters import chat_request, completion_request

PAGE = Path(__file__).parent.parent.parent / "docs" / "endpoint.md"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
TEXT: dict[str, Any] = {"prompt": "Hello"}


def table(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, its head left out."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def code(cell: str) -> Any:
    """A value in backticks, as JSON."""
    return json.loads(cell.removeprefix("`").removesuffix("`"))


READ = [(row[0].strip("`"), row[1], row[3], row[4]) for row in table("Fields that are read")]
NEUTRAL_ROWS = [
    (row[0].strip("`"), row[1], row[2]) for row in table("Fields that may be there, at values that ask for nothing")
]
READERS: dict[str, list[tuple[Callable[[Any], Any], dict[str, Any]]]] = {
    "chat": [(chat_request, CHAT)],
    "completions": [(completion_request, TEXT)],
    "both": [(chat_request, CHAT), (completion_request, TEXT)],
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the fields that are read of a request."""
    names: set[str] = set()
    take = Fields.take

    def noted(self: Fields, name: str) -> Any:
        if not self._where:
            names.add(name)
        return take(self, name)

    monkeypatch.setattr(Fields, "take", noted)
    return names


@pytest.mark.parametrize(
    ("where", "read", "body"), [("chat", chat_request, CHAT), ("completions", completion_request, TEXT)]
)
def test_the_fields_that_are_read_are_those_of_the_table(
    taken: set[str], where: str, read: Callable[[Any], Any], body: dict[str, Any]
) -> None:
    read(body)
    assert taken == {name for name, at, *_examples in READ if at in (where, "both")}


def test_the_fields_that_may_be_there_are_those_of_the_table() -> None:
    assert [name for name, *_examples in NEUTRAL_ROWS] == list(NEUTRAL)


@pytest.mark.parametrize(("name", "where", "good", "bad"), READ)
def test_a_field_that_is_read(name: str, where: str, good: str, bad: str) -> None:
    for read, body in READERS[where]:
        read({**body, name: code(good)})
        assert refused(read, {**body, name: code(bad)}).startswith(name)


@pytest.mark.parametrize(("name", "good", "bad"), NEUTRAL_ROWS)
def test_a_field_that_asks_for_nothing(name: str, good: str, bad: str) -> None:
    for read, body in READERS["both"]:
        read({**body, name: code(good)})
        if bad:
            assert refused(read, {**body, name: code(bad)}) == name


def refused(read: Callable[[Any], Any], body: dict[str, Any]) -> str:
    """The field that the refusal names."""
    with pytest.raises(TightwadError) as caught:
        read(body)
    assert caught.value.http_status == 400
    return str(re.sub(r"\[\d+\]", "", caught.value.param))  # type: ignore[attr-defined]
