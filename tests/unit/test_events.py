"""Events: what is kept of them, in which order, and what a file or a peer may say."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tightwad_agent.events import (
    MAX_AT,
    MAX_EVENTS,
    MAX_FACT,
    MAX_FACTS,
    MAX_SEQ,
    MAX_TEXT,
    Event,
    Journal,
    Kind,
    bounded,
    of_kind,
    parse,
    plain,
)
from tightwad_agent.log import redact

PLAIN = {"at": 5.0, "seq": 7, "kind": "pool", "text": "it went down", "facts": {"took_s": 4.2}, "node": "n1"}

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""The machine may be busy."""

json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


# The journal


def test_the_journal_keeps_the_last_and_no_repetition() -> None:
    journal = Journal("n")
    assert journal.add(1.0, "started") is True
    assert journal.add(2.0, "started") is False
    assert journal.add(3.0, "stopped") is True
    assert journal.add(4.0, "started") is True
    kept = (
        Event(1.0, "started", node="n", seq=1),
        Event(3.0, "stopped", node="n", seq=2),
        Event(4.0, "started", node="n", seq=3),
    )
    assert journal.last() == kept
    assert journal.last(1) == kept[-1:]
    assert journal.last(0) == ()
    assert journal.last(99) == kept
    assert journal.after(1) == kept[1:]
    assert journal.after(3) == ()
    assert Journal().last() == ()


def test_the_same_words_of_another_part_are_no_repetition() -> None:
    journal = Journal()
    assert journal.add(1.0, "x", Kind.POOL)
    assert journal.add(1.0, "x", Kind.LINK)


def test_the_journal_is_bounded_in_both_directions() -> None:
    journal = Journal()
    for i in range(MAX_EVENTS + 50):
        journal.add(float(i), f"{i} " + "x" * 10_000)
    assert len(journal.last()) == MAX_EVENTS
    assert journal.last()[0].at == 50.0
    assert max(len(e.text) for e in journal.last()) == MAX_TEXT


def test_what_repeats_after_the_cut_is_a_repetition() -> None:
    journal = Journal()
    assert journal.add(0.0, "x" * MAX_TEXT + "a")
    assert not journal.add(0.0, "x" * MAX_TEXT + "b")


def test_a_text_is_one_line_that_can_be_sent() -> None:
    journal = Journal()
    journal.add(0.0, "two\nlines \ud800 and\ta tab")
    assert journal.last()[0].text == "two lines ? and a tab"


def test_secrets_are_taken_out_of_words_and_facts() -> None:
    journal = Journal("n", clean=redact)
    token, key = "tw1" + "Ab3-" * 60, "twk_" + "k" * 43
    journal.add(0.0, f"{'x' * (MAX_TEXT - 40)} join {token} failed, Authorization: Bearer {key}", facts={"key": key})
    (event,) = journal.last()
    assert "Ab3-" not in event.text
    assert "kkk" not in event.text + str(event.facts)
    assert event.facts["key"] == "twk_[hidden]"


def test_numbers_go_on_after_a_restart_whatever_the_clock_says() -> None:
    first = Journal("n")
    first.add(1000.0, "a")
    first.add(1001.0, "b")
    second = Journal("n")
    second.restore(reversed(first.last()))
    assert second.add(5.0, "b"), "of another run: no repetition"
    assert [(e.seq, e.text) for e in second.last()] == [(1, "a"), (2, "b"), (3, "b")]
    second.restore(())
    assert second.seq == 3
    empty = Journal()
    empty.restore(())
    assert empty.seq == 0


def test_a_part_tells_its_own_kind_unless_it_says_otherwise() -> None:
    heard: list[Any] = []

    def tell(text: str, /, *, kind: Kind | None = None, **facts: Any) -> None:
        heard.append((text, kind, facts))

    pool = of_kind(tell, Kind.POOL)
    pool("a")
    pool("b", kind=Kind.LINK, rtt_ms=3)
    assert heard == [("a", Kind.POOL, {}), ("b", Kind.LINK, {"rtt_ms": 3})]


# Facts


def test_facts_are_what_json_can_say() -> None:
    facts = {
        "none": None,
        "yes": True,
        "n": 3,
        "big": 2**60,
        "s": 1.23456,
        "nan": math.nan,
        "kind": Kind.POOL,
        "list": [1, 2],
        "long": "x" * 999,
        "Bad": 1,
        "also bad": 1,
        "": 1,
        "k" * 33: 1,
        "new\n": 1,
    }
    assert bounded(facts) == {
        "none": None,
        "yes": True,
        "n": 3,
        "big": str(2**60),
        "s": 1.235,
        "nan": None,
        "kind": "pool",
        "list": "[1, 2]",
        "long": "x" * MAX_FACT,
    }
    assert len(bounded({f"k{i}": i for i in range(99)})) == MAX_FACTS
    assert bounded({"cut": "x" * (MAX_FACT - 1) + " y"})["cut"] == "x" * (MAX_FACT - 1), "and again it is the same"


@PATIENT
@given(st.dictionaries(st.text(max_size=40), json_like))
def test_any_facts_are_bounded_and_stay_as_they_are(facts: dict[str, Any]) -> None:
    kept = bounded(facts)
    assert bounded(json.loads(json.dumps(kept))) == kept


# Plain data


def test_an_event_goes_into_a_file_and_comes_back() -> None:
    journal = Journal("n1")
    journal.add(1766000000.1234567, "it went down", Kind.POOL, {"took_s": 4.2})
    event = journal.last()[0]
    back = parse(json.loads(json.dumps(plain(event))))
    assert back == Event(1766000000.123, "it went down", Kind.POOL, {"took_s": 4.2}, "n1", 1)


@pytest.mark.parametrize(
    "change",
    [
        {"at": None},
        {"at": True},
        {"at": "5"},
        {"at": -1},
        {"at": math.nan},
        {"at": math.inf},
        {"at": MAX_AT + 1},
        {"seq": -1},
        {"seq": 1.0},
        {"seq": True},
        {"seq": MAX_SEQ + 1},
        {"text": ""},
        {"text": " \n "},
        {"text": 5},
        {"text": None},
    ],
    ids=repr,
)
def test_an_event_without_time_number_or_words_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="an event without"):
        parse(PLAIN | change)


@pytest.mark.parametrize("data", [None, [], "x", 5])
def test_what_is_no_map_is_no_event(data: object) -> None:
    with pytest.raises(ValueError, match="a map"):
        parse(data)


def test_what_is_not_known_is_left_out() -> None:
    event = parse({"at": 5, "seq": 7, "text": "x", "kind": "of tomorrow", "facts": [1], "node": 5, "more": 1})
    assert event == Event(5.0, "x", Kind.AGENT, {}, "", 7)
    assert parse({"at": 5, "seq": 7, "text": "x", "kind": ["pool"]}).kind is Kind.AGENT
    assert parse(PLAIN).kind is Kind.POOL


@PATIENT
@given(json_like | st.fixed_dictionaries({}, optional=dict.fromkeys(PLAIN, json_like)))
def test_no_data_breaks_the_parser(data: object) -> None:
    try:
        event = parse(data)
    except ValueError:
        return
    assert parse(json.loads(json.dumps(plain(event)))) == event or round(event.at, 3) != event.at
