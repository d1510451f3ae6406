"""Rates from looks at something that changes less often than one looks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent import rates
from tightwad_agent.rates import LATE_S, MAX_CHANGES, WINDOW_S, Rates, eta_s, rate


@pytest.mark.parametrize(
    ("changes", "now", "expected"),
    [
        ((), 5.0, None),
        (((0.0, 100),), 1.0, None),
        (((0.0, 100),), LATE_S + 1, 0.0),
        (((0.0, 0), (2.0, 200)), 2.0, 100.0),
        (((0.0, 0), (2.0, 200)), 3.9, 100.0),
        (((0.0, 0), (2.0, 200), (4.0, 800)), 4.0, 200.0),
        (((0.0, 0), (2.0, 200)), 20.0, 10.0),
        (((1.0, 0), (1.0, 200)), 1.0, None),
    ],
)
def test_the_rate_between_changes(changes: tuple[tuple[float, int], ...], now: float, expected: float | None) -> None:
    assert rate(changes, now) == expected


@pytest.mark.parametrize(
    ("left", "speed", "expected"),
    [(100, 10.0, 10.0), (0, 10.0, None), (-1, 10.0, None), (100, 0.0, None), (100, None, None)],
)
def test_the_time_that_is_left(left: int, speed: float | None, expected: float | None) -> None:
    assert eta_s(left, speed) == expected


def test_looking_more_often_than_it_changes_does_not_change_the_rate() -> None:
    """A row changes every two seconds and is looked at ten times a second."""
    found = Rates()
    for tick in range(200):
        now = tick / 10
        found.seen("x", int(now // 2) * 2000, now)
        if now >= 4:
            assert found.rate("x", now) == pytest.approx(1000)


def test_what_shrinks_begins_anew() -> None:
    found = Rates()
    for now, amount in ((0.0, 0), (1.0, 1000), (2.0, 10), (3.0, 20)):
        found.seen("x", amount, now)
    assert found.rate("x", 3.0) == 10.0


def test_old_changes_are_forgotten() -> None:
    found = Rates()
    found.seen("x", 0, 0.0)
    found.seen("x", 10**9, 1.0)
    for n in range(1, 100):
        found.seen("x", 10**9 + n * 10, 1.0 + n)
    assert found.rate("x", 100.0) == pytest.approx(10)


def test_what_nobody_saw_has_no_rate_and_what_nobody_wants_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Rates()
    assert found.rate("x", 1.0) is None
    for key in ("x", "y"):
        found.seen(key, 0, 0.0)
        found.seen(key, 8, 2.0)
    found.keep(["y", "z"])
    assert (found.rate("x", 2.0), found.rate("y", 2.0)) == (None, 4.0)
    monkeypatch.setattr(rates, "MAX_KEYS", 1)
    found.seen("x", 0, 0.0)
    assert len(found._changes) == 1


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(0, 2**63)), max_size=200))
def test_a_rate_is_never_negative_and_memory_is_bounded(looks: list[tuple[float, int]]) -> None:
    found, now = Rates(), 0.0
    for step, amount in looks:
        now += step
        found.seen("x", amount, now)
        speed = found.rate("x", now)
        assert speed is None or speed >= 0
    changes = found._changes.get("x", ())
    assert len(changes) <= MAX_CHANGES
    assert all(at >= now - WINDOW_S for at, _ in list(changes)[1:])
