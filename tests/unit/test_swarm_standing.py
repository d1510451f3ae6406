"""When a peer may be dialled again."""

from __future__ import annotations

import math

from tightwad_agent.swarm.standing import BAN_S, GRAVE, LAST_RETRY_S, Standings


def wait(standings: Standings, now: float = 100.0) -> float:
    return standings.next_change(["a"], now) - now


def test_the_more_failures_the_later() -> None:
    standings, waits = Standings(), []
    assert standings.may_be_dialled("a", 0)
    for _ in range(9):
        standings.ended("a", 100.0)
        assert not standings.may_be_dialled("a", 100.0)
        waits.append(wait(standings))
    assert waits == [0.5, 1, 2, 4, 8, 16, LAST_RETRY_S, LAST_RETRY_S, LAST_RETRY_S]
    assert standings.may_be_dialled("a", 100.0 + LAST_RETRY_S)


def test_something_good_makes_up_for_it() -> None:
    standings = Standings()
    for _ in range(5):
        standings.ended("a", 100.0)
    assert standings.has_failed("a")
    standings.useful("a")
    assert not standings.has_failed("a")
    standings.ended("a", 100.0)
    assert wait(standings) == 0.5


def test_a_broken_protocol_counts_more() -> None:
    standings = Standings()
    standings.ended("a", 100.0, grave=True)
    assert wait(standings) == 0.5 * 2 ** (GRAVE - 1)


def test_one_that_is_said_to_have_it_may_be_dialled_at_once_unless_banned() -> None:
    standings = Standings()
    standings.ended("a", 100.0)
    standings.welcome("a")
    assert standings.may_be_dialled("a", 100.0)
    standings.ban("a", 100.0)
    standings.welcome("a")
    assert standings.is_banned("a", 100.0)
    assert not standings.may_be_dialled("a", 100.0)


def test_a_ban_ends_and_is_forgiven_once() -> None:
    standings = Standings()
    assert not standings.is_banned("a", 0)
    assert not standings.forgiven("a", 0)
    standings.ban("a", 100.0)
    assert wait(standings) == BAN_S
    assert not standings.forgiven("a", 100.0 + BAN_S / 2)
    assert standings.forgiven("a", 100.0 + BAN_S)
    assert not standings.forgiven("a", 100.0 + BAN_S)
    assert standings.may_be_dialled("a", 100.0 + BAN_S)


def test_nobody_waits_for_strangers() -> None:
    assert Standings().next_change(["x", "y"], 5.0) == math.inf
