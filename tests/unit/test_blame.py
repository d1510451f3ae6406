"""When a request is taken for the cause of its losses."""

from __future__ import annotations

from tightwad_agent.proxy.blame import Blame


def test_losses_without_getting_on_are_counted() -> None:
    blame = Blame()
    for n in range(1, 4):
        blame.tried("all here")
        blame.lost(got_on=False)
        assert blame.n == n


def test_getting_on_begins_anew() -> None:
    blame = Blame()
    for got_on in (False, False, True):
        blame.tried("all here")
        blame.lost(got_on=got_on)
    assert blame.n == 1


def test_the_death_of_a_machine_is_not_the_request_s_doing() -> None:
    blame = Blame()
    for there in ("abc", "ab", "b"):
        blame.tried(there)
        assert blame.n == 0
        blame.lost(got_on=False)
    assert blame.n == 1


def test_who_came_while_all_was_well_excuses_nothing() -> None:
    blame = Blame()
    blame.tried("ab")
    blame.tried("abc")
    blame.lost(got_on=False)
    blame.tried("abc")
    assert blame.n == 1


def test_a_death_may_be_known_after_the_next_try() -> None:
    blame = Blame()
    blame.tried("abc")
    blame.lost(got_on=False)
    blame.tried("abc")
    assert blame.n == 1
    blame.tried("ab")
    assert blame.n == 0
    blame.lost(got_on=False)
    blame.tried("ab")
    assert blame.n == 1


def test_what_came_from_outside_is_not_counted_and_leaves_an_earlier_loss_open() -> None:
    blame = Blame()
    for from_outside in (True, False, True):
        blame.tried("abc")
        blame.lost(got_on=False, from_outside=from_outside)
    assert blame.n == 1
    blame.tried("ab")
    assert blame.n == 0
    blame.tried("a")
    assert blame.n == 0


def test_getting_on_before_an_end_from_outside_leaves_nothing_to_forgive() -> None:
    blame = Blame()
    blame.tried("abc")
    blame.lost(got_on=False)
    blame.tried("abc")
    blame.lost(got_on=True, from_outside=True)
    blame.tried("ab")
    assert blame.n == 0


def test_nothing_is_forgiven_twice() -> None:
    blame = Blame()
    blame.tried("abc")
    blame.lost(got_on=False)
    blame.tried("ab")
    blame.tried("a")
    assert blame.n == 0
