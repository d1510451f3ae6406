from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent.ids import Address
from tightwad_agent.mesh import contacts
from tightwad_agent.mesh.contacts import (
    COURTESY_S,
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    MAX_ADDRESSES,
    MAX_NODES,
    SETTLED_S,
    Contacts,
    Dial,
)
from tightwad_agent.testing import node_id

ME = node_id("me")
NAMES = sorted((node_id(f"node-{i}") for i in range(12)), key=lambda n: n < ME)
HIGHER = next(n for n in NAMES if n > ME)  # this node dials those at once
LOWER = next(n for n in NAMES if n < ME)  # and gives these a moment to dial first
SEED = Address("10.9.9.9", 8089)
A, B, C = (Address(f"10.0.0.{i}", 8089) for i in (1, 2, 3))


def waits(known: Contacts, now: float) -> float:
    """Seconds until the next dial; everything that is due now is taken first."""
    assert known.due(now) == []
    deadline = known.next_deadline()
    assert deadline is not None
    return deadline - now


def test_a_sighted_node_is_dialled_at_once_and_exactly_once() -> None:
    known = Contacts(ME)
    known.sighted(HIGHER, [A, B], now=5.0)
    assert known.next_deadline() == 5.0
    assert known.due(5.0) == [Dial(HIGHER, (A, B))]
    assert known.is_dialling(HIGHER)
    assert known.due(1e9) == []
    assert known.next_deadline() is None


def test_a_lower_id_gets_a_moment_to_dial_first() -> None:
    known = Contacts(ME)
    known.sighted(LOWER, [A], now=5.0)
    assert known.due(5.0) == []
    assert known.next_deadline() == 5.0 + COURTESY_S
    assert known.due(5.0 + COURTESY_S) == [Dial(LOWER, (A,))]


def test_this_node_is_never_dialled() -> None:
    known = Contacts(ME)
    known.sighted(ME, [A], now=0.0)
    known.linked(ME)
    known.worked(ME, A)
    known.lost(ME, 1.0)
    assert known.due(100.0) == []
    assert known.next_deadline() is None
    assert known.known() == {}


def test_failed_dials_wait_ever_longer_but_never_too_long() -> None:
    known = Contacts(ME)
    known.sighted(HIGHER, [A], now=0.0)
    now, pauses = 0.0, []
    for _ in range(8):
        (dial,) = known.due(now)
        known.done(dial, now, ok=False)
        pauses.append(waits(known, now))
        now += pauses[-1]
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, LONGEST_PAUSE_S, LONGEST_PAUSE_S, LONGEST_PAUSE_S]


def test_a_new_address_ends_the_pause_and_a_stale_or_known_one_does_not() -> None:
    known = Contacts(ME)
    known.sighted(HIGHER, [A], now=0.0)
    for now in (0.0, 10.0, 20.0, 30.0):
        (dial,) = known.due(now)
        known.done(dial, now, ok=False)
    known.sighted(HIGHER, [A], now=31.0)
    known.sighted(HIGHER, [B], now=31.0, fresh=False)
    assert known.due(31.0) == []
    known.sighted(HIGHER, [C], now=31.0)
    assert known.due(31.0) == [Dial(HIGHER, (C, A, B))], "fresh ones first, hearsay last"
    known.done(Dial(HIGHER, (C, A, B)), 31.0, ok=False)
    assert waits(known, 31.0) == FIRST_PAUSE_S


def test_what_worked_is_tried_first() -> None:
    known = Contacts(ME)
    known.sighted(HIGHER, [A, B], now=0.0)
    known.worked(HIGHER, B)
    assert known.addresses(HIGHER) == (B, A)
    known.worked(HIGHER, C)
    assert known.addresses(HIGHER) == (C, B, A)
    known.worked(LOWER, C)
    assert known.addresses(LOWER) == ()


def test_repeated_addresses_of_one_hint_take_one_place() -> None:
    known = Contacts(ME)
    known.sighted(HIGHER, [A] * 40 + [B], now=0.0)
    assert known.addresses(HIGHER) == (A, B)


def test_a_linked_node_is_left_alone_and_dialled_again_when_the_link_is_lost() -> None:
    known = Contacts(ME)
    known.sighted(HIGHER, [A], now=0.0)
    (dial,) = known.due(0.0)
    known.done(dial, 0.1, ok=True)
    known.linked(HIGHER)
    known.sighted(HIGHER, [B], now=0.2)
    assert known.due(100.0) == []
    assert known.next_deadline() is None
    known.lost(HIGHER, 200.0)
    assert known.due(200.0) == [Dial(HIGHER, (B, A))]


def test_a_dial_that_worked_but_led_to_no_link_is_not_repeated_at_once() -> None:
    known = Contacts(ME)
    known.sighted(HIGHER, [A], now=0.0)
    (dial,) = known.due(0.0)
    known.done(dial, 1.0, ok=True)
    assert waits(known, 1.0) == FIRST_PAUSE_S


@pytest.mark.parametrize("life_s", [0.0, 0.001, 1.0])
def test_a_peer_that_takes_each_link_and_drops_it_is_not_dialled_in_a_hot_loop(life_s: float) -> None:
    known = Contacts(ME)
    known.sighted(HIGHER, [A], now=0.0)
    now, n_dials = 0.0, 0
    while now < 60.0 and n_dials < 1000:
        for dial in known.due(now):
            n_dials += 1
            known.done(dial, now, ok=True)
            known.linked(HIGHER)
            now += life_s
            known.lost(HIGHER, now)
        now = max(now, known.next_deadline() or now)
    assert 5 < n_dials < 40


def test_a_link_lost_after_it_had_settled_is_dialled_again_at_once() -> None:
    known = Contacts(ME)
    known.sighted(HIGHER, [A], now=0.0)
    for now in (0.0, SETTLED_S, 2 * SETTLED_S):
        (dial,) = known.due(now)
        known.done(dial, now, ok=True)
        known.linked(HIGHER)
        known.lost(HIGHER, now + SETTLED_S)


def test_forgotten_is_forgotten_even_while_a_dial_is_under_way() -> None:
    known = Contacts(ME)
    known.sighted(HIGHER, [A], now=0.0)
    (dial,) = known.due(0.0)
    known.forget(HIGHER)
    known.done(dial, 1.0, ok=False)
    known.lost(HIGHER, 1.0)
    assert known.known() == {}
    assert known.next_deadline() is None


# Seeds


def test_a_seed_is_dialled_until_a_node_was_found_there() -> None:
    known = Contacts(ME, [SEED])
    assert known.due(0.0) == [Dial(None, (SEED,))]
    assert known.due(100.0) == []
    known.done(Dial(None, (SEED,)), 100.0, ok=False)
    assert waits(known, 100.0) == FIRST_PAUSE_S
    assert known.due(101.0) == [Dial(None, (SEED,))]
    known.done(Dial(None, (SEED,)), 101.0, ok=True)
    known.sighted(HIGHER, [SEED], 101.0)
    known.linked(HIGHER)
    assert known.due(1e6) == []
    assert known.next_deadline() is None


def test_a_seed_by_host_name_is_not_dialled_while_the_node_behind_it_is_linked() -> None:
    seed = Address("attic.local", 8089)
    known = Contacts(ME, [seed])
    (dial,) = known.due(0.0)
    known.done(dial, 0.5, ok=True, node=HIGHER)
    known.sighted(HIGHER, [A], 0.5)
    known.linked(HIGHER)
    assert known.due(1e6) == []
    assert known.next_deadline() is None
    known.lost(HIGHER, 1e6)
    assert Dial(None, (seed,)) in known.due(1e6)


def test_a_seed_that_is_this_node_is_asked_again_rarely() -> None:
    known = Contacts(ME, [SEED])
    (dial,) = known.due(0.0)
    known.done(dial, 0.0, ok=True)
    assert waits(known, 0.0) == LONGEST_PAUSE_S


def test_a_seed_given_twice_is_one_and_far_too_many_are_cut() -> None:
    assert len(Contacts(ME, [SEED, SEED]).due(0.0)) == 1
    many = [Address(f"10.1.{i // 250}.{i % 250 + 1}", 8089) for i in range(MAX_NODES + 50)]
    assert len(Contacts(ME, many).due(0.0)) == MAX_NODES


# Bounds


def test_a_flood_of_strangers_stays_within_the_bound_and_keeps_what_is_linked() -> None:
    known = Contacts(ME)
    known.sighted(HIGHER, [A], 0.0)
    known.linked(HIGHER)
    for i in range(MAX_NODES * 2):
        known.sighted(node_id(f"stranger-{i}"), [B], 0.0)
    assert len(known.known()) == MAX_NODES
    assert known.addresses(HIGHER) == (A,)


def test_links_too_stay_within_the_bound() -> None:
    known = Contacts(ME)
    for i in range(MAX_NODES + 10):
        known.linked(node_id(f"n{i}"))
    assert len(known.known()) == MAX_NODES
    known.sighted(node_id("late"), [A], 0.0)
    assert known.addresses(node_id("late")) == ()
    known.lost(node_id(f"n{MAX_NODES + 5}"), 1.0)  # was never taken in; no harm


def test_when_full_the_one_that_fails_longest_makes_room() -> None:
    known = Contacts(ME)
    known.sighted(HIGHER, [A], 0.0)
    now = 0.0
    for _ in range(4):
        (dial,) = known.due(now)
        known.done(dial, now, ok=False)
        now += LONGEST_PAUSE_S
    for i in range(MAX_NODES):
        known.sighted(node_id(f"n{i}"), [B], now)
    assert HIGHER not in known.known()
    assert len(known.known()) == MAX_NODES


# Any order of events

nodes = st.sampled_from([ME, *NAMES[:5]])
addresses = st.builds(Address, st.sampled_from([f"10.0.0.{i}" for i in range(1, 30)]), st.just(8089))
steps = st.one_of(
    st.tuples(st.just("sighted"), nodes, st.lists(addresses, max_size=30), st.booleans()),
    st.tuples(st.just("worked"), nodes, addresses),
    st.tuples(st.just("linked"), nodes),
    st.tuples(st.just("lost"), nodes),
    st.tuples(st.just("done"), st.integers(0, 9), st.booleans(), st.none() | nodes),
    st.tuples(st.just("wait"), st.sampled_from([0.0, 0.01, 0.6, 20.0])),
    st.tuples(st.just("deadline")),
)


class Run:
    """Contacts, and what a caller knows about its own dials."""

    def __init__(self, seeds: list[Address]) -> None:
        self.known = Contacts(ME, seeds)
        self.now = 0.0
        self.under_way: list[Dial] = []
        self.linked: set[Any] = set()

    def step(self, what: str, *args: Any) -> None:
        if what == "sighted":
            self.known.sighted(args[0], args[1], self.now, fresh=args[2])
        elif what == "worked":
            self.known.worked(*args)
        elif what == "linked":
            self.known.linked(args[0])
            self.linked.add(args[0])
        elif what == "lost":
            self.known.lost(args[0], self.now)
            self.linked.discard(args[0])
        elif what == "done" and self.under_way:
            dial = self.under_way.pop(args[0] % len(self.under_way))
            self.known.done(dial, self.now, ok=args[1], node=args[2] if dial.node is None else None)
        elif what == "wait":
            self.now += args[0]
        elif what == "deadline" and (deadline := self.known.next_deadline()) is not None:
            self.now = max(self.now, deadline)
            assert self.known.next_deadline() == deadline, "looking changes nothing"

    def dial(self) -> None:
        for dial in self.known.due(self.now):
            assert dial.node != ME
            assert dial.node not in self.linked
            assert dial.addresses
            key = dial.node or dial.addresses
            assert key not in [d.node or d.addresses for d in self.under_way], "a second dial of the same"
            self.under_way.append(dial)
        assert self.known.due(self.now) == []
        deadline = self.known.next_deadline()
        assert deadline is None or deadline > self.now, "a busy loop"

    def check(self) -> None:
        found = self.known.known()
        assert len(found) <= MAX_NODES
        assert ME not in found
        for node, where in found.items():
            assert len(where) <= MAX_ADDRESSES
            assert len(set(where)) == len(where)
            assert where == self.known.addresses(node)


@settings(deadline=None)
@given(st.lists(addresses, max_size=3), st.lists(steps, max_size=60))
def test_in_any_order_dials_are_unique_bounded_and_never_hot(seeds: list[Address], script: list[Any]) -> None:
    run = Run(seeds)
    run.dial()
    for step in script:
        run.step(*step)
        run.dial()
        run.check()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["sighted", "linked", "lost", "fail"])), max_size=80))
def test_the_bounds_hold_when_there_is_room_for_few(script: list[tuple[int, str]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contacts, "MAX_NODES", 4)
        patch.setattr(contacts, "MAX_ADDRESSES", 2)
        known = Contacts(ME)
        for now, (i, what) in enumerate(script):
            node = node_id(f"crowd-{i}")
            if what == "sighted":
                known.sighted(node, [A, B, C], float(now))
            elif what == "linked":
                known.linked(node)
            elif what == "lost":
                known.lost(node, float(now))
            else:
                for dial in known.due(float(now)):
                    known.done(dial, float(now), ok=False)
            assert len(known.known()) <= 4
            assert all(len(where) <= 2 for where in known.known().values())
