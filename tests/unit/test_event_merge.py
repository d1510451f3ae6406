"""The events of several nodes as one list."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tightwad_agent.event_merge import SAME_S, Happening, Told, chosen, merge, ordered
from tightwad_agent.events import Event, Kind

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""The machine may be busy."""


def event(at: float, text: str, seq: int, kind: Kind = Kind.ELECTION, **facts: Any) -> Event:
    return Event(at, text, kind, facts, "id", seq)


def words(happenings: list[Happening]) -> list[tuple[float, str, tuple[str, ...]]]:
    return [(h.at, h.event.text, h.seen_by) for h in happenings]


# What is the same


def test_what_all_tell_is_one_happening_in_the_words_of_who_did_it() -> None:
    a = Told("a", [event(10.0, "b coordinates", 1, same="epoch 2")])
    b = Told("b", [event(10.5, "I do", 1, same="epoch 2", first_hand=True)])
    c = Told("c", [event(10.2, "b does", 1, same="epoch 2"), event(11.0, "else", 2)])
    assert words(merge([a, b, c])) == [(10.0, "I do", ("b", "a", "c")), (11.0, "else", ("c",))]


def test_the_first_word_stays_where_two_were_there_or_none() -> None:
    two = [Told(n, [event(i, n, 1, same="x", first_hand=True)]) for i, n in enumerate("ab")]
    assert words(merge(two)) == [(0, "a", ("a", "b"))]
    none = [Told(n, [event(i, n, 1, same="x")]) for i, n in enumerate("ab")]
    assert words(merge(none)) == [(0, "a", ("a", "b"))]


def test_the_same_long_after_or_from_the_same_node_is_another_happening() -> None:
    a = Told("a", [event(10.0, "dead", 1, same="x"), event(12.0, "dead again", 2, same="x")])
    b = Told("b", [event(12.5, "dead", 1, same="x")])
    c = Told("c", [event(13.0 + SAME_S, "late", 2, same="x")])
    assert words(merge([a, b, c])) == [
        (10.0, "dead", ("a",)),
        (12.0, "dead again", ("a", "b")),
        (13.0 + SAME_S, "late", ("c",)),
    ]


def test_equal_words_without_a_common_name_are_two() -> None:
    assert len(merge([Told("a", [event(1.0, "started", 1)]), Told("b", [event(1.0, "started", 1)])])) == 2
    assert merge([]) == []
    assert merge([Told("a", [])]) == []


def test_equal_words_about_trust_are_one() -> None:
    told = [Told(n, [event(i, "den was removed", 1, Kind.TRUST), event(i + 20, "x", 2)]) for i, n in enumerate("ab")]
    assert words(merge(told))[0] == (0, "den was removed", ("a", "b"))
    assert len(merge(told)) == 3


# Clocks


def test_a_clock_that_is_ahead_is_corrected() -> None:
    a = Told("a", [event(100.0, "first", 1), event(102.0, "third", 2)])
    b = Told("b", [event(3701.0, "second", 1)], ahead_s=3600.0)
    assert [h.event.text for h in merge([a, b])] == ["first", "second", "third"]
    assert [h.at for h in merge([a, b])] == [100.0, 101.0, 102.0]


def test_a_clock_that_began_in_1970_does_not_move_the_rest() -> None:
    assert ordered([99.0, 100.0, 101.0, 0.0, 5.0, 200.0]) == [99.0, 100.0, 101.0, 101.0, 101.0, 200.0]


def test_a_clock_that_was_ahead_for_a_while_does_not_move_the_rest() -> None:
    assert ordered([100.0, 7300.0, 102.0, 103.0, 104.0]) == [100.0, 100.0, 102.0, 103.0, 104.0]
    assert ordered([7300.0, 102.0, 103.0]) == [102.0, 102.0, 103.0]


def test_times_in_order_stay() -> None:
    assert ordered([]) == []
    assert ordered([1.0, 1.0, 2.0]) == [1.0, 1.0, 2.0]


@PATIENT
@given(st.lists(st.integers(0, 20)))
def test_the_order_of_a_node_is_that_of_its_numbers(times: list[int]) -> None:
    result = ordered(times)
    assert result == sorted(result)
    assert set(result) <= set(times)
    if times == sorted(times):
        assert result == times


@PATIENT
@given(st.lists(st.lists(st.integers(0, 30), max_size=8), max_size=4))
def test_nothing_is_lost_and_each_node_keeps_its_order(clocks: list[list[int]]) -> None:
    told = [Told(f"n{i}", [event(at, f"n{i}", s) for s, at in enumerate(ats)]) for i, ats in enumerate(clocks)]
    merged = merge(told)
    assert len(merged) == sum(map(len, clocks))
    assert [h.at for h in merged] == sorted(h.at for h in merged)
    for one in told:
        assert [h.event.seq for h in merged if h.seen_by == (one.name,)] == [e.seq for e in one.events]


# What is wanted


def test_events_are_chosen_by_time_kind_and_machine() -> None:
    told = merge(
        [
            Told("a", [event(1.0, "old", 1), event(5.0, "a's", 2, Kind.POOL), event(6.0, "of b", 3, peer="idb")]),
            Told("b", [event(7.0, "b's", 1, Kind.LINK)]),
        ]
    )
    assert [h.event.text for h in chosen(told, n=9)] == ["old", "a's", "of b", "b's"]
    assert [h.event.text for h in chosen(told, n=2)] == ["of b", "b's"]
    assert chosen(told, n=0) == []
    assert [h.event.text for h in chosen(told, since=5.0, n=9)] == ["a's", "of b", "b's"]
    assert [h.event.text for h in chosen(told, kinds={Kind.POOL, Kind.LINK}, n=9)] == ["a's", "b's"]
    assert [h.event.text for h in chosen(told, node=("idb", "b"), n=9)] == ["of b", "b's"]
