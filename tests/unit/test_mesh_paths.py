"""Which address of a node is used: measured, and changed neither too late nor too often."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent.ids import Address
from tightwad_agent.mesh import paths
from tightwad_agent.mesh.paths import (
    Broken,
    Effect,
    Linked,
    Measure,
    Measured,
    Offered,
    Paths,
    PathView,
    Sample,
    Silent,
    Tick,
    Unlinked,
    Use,
)
from tightwad_agent.testing import node_id

B = node_id("b")
SLOW, FAST, THIRD = (Address(f"10.0.{i}.4", 8089) for i in (1, 2, 3))
WIFI = Sample(0.003, 6e6)
CABLE = Sample(0.0003, 110e6)

World = dict[Address, Sample | None]


class Rig:
    """One machine, a clock, and addresses that answer as `world` says at the time."""

    def __init__(self, world: World, *, idle: bool = True) -> None:
        self.now = 100.0
        self.world = world
        self.idle = idle
        self.silent = False
        self.paths = Paths()
        self.used: list[Use] = []
        self.measured: list[Measure] = []
        self.n_rates: dict[Address, int] = {}

    def do(self, event: paths.Event) -> list[Effect]:
        effects = self.paths.handle(event, self.now)
        for effect in effects:
            if isinstance(effect, Use):
                self.used.append(effect)
            else:
                self.measured.append(effect)
                self.do(Measured(effect.node, self.answers(effect), effect.urgent, self.silent))
        return effects

    def answers(self, round_: Measure) -> World:
        return {a: self.answer(a, a in round_.rates and self.idle) for a in round_.addresses}

    def answer(self, address: Address, rate: bool) -> Sample | None:
        sample = self.world.get(address)
        if rate and sample:
            self.n_rates[address] = self.n_rates.get(address, 0) + 1
        return Sample(sample.rtt_s, sample.rate if rate else None) if sample else None

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while (due := self.paths.next_deadline()) is not None and due <= end:
            assert due >= self.now
            self.now = due
            self.do(Tick())
        self.now = end

    def link(self, address: Address | None = SLOW, *, offered: Sequence[Address] = (SLOW, FAST)) -> None:
        self.do(Offered(B, tuple(offered)))
        self.do(Linked(B, address, outgoing=True))

    @property
    def use(self) -> Address | None:
        return self.paths.in_use(B)

    def view(self, address: Address) -> PathView:
        return next(v for v in self.paths.views(B) if v.address == address)


def test_the_faster_of_two_addresses_is_used_within_seconds() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE})
    rig.link(SLOW)
    rig.run(10)
    assert rig.use == FAST
    (change,) = rig.used
    assert (change.before, change.why, change.broken) == (SLOW, "it is faster", False)
    assert rig.view(FAST) == PathView(FAST, True, 0.0003, 110e6, True)
    assert rig.view(SLOW).rate == 6e6


def test_the_faster_one_stays_when_it_is_used_already() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE})
    rig.link(FAST)
    rig.run(3600)
    assert rig.use == FAST
    assert rig.used == []


def test_an_address_that_comes_later_is_used_within_fifteen_seconds() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE})
    rig.link(SLOW, offered=[SLOW])
    rig.run(1000)
    rig.do(Offered(B, (FAST, SLOW)))
    rig.run(15)
    assert rig.use == FAST


def test_without_rates_only_a_much_shorter_round_trip_counts() -> None:
    rig = Rig({SLOW: WIFI, FAST: Sample(0.0018, 110e6)}, idle=False)
    rig.link(SLOW)
    rig.run(60)
    assert rig.use == SLOW
    rig.world[FAST] = CABLE
    rig.run(120)
    assert rig.use == FAST
    assert rig.n_rates == {}


def test_rates_are_measured_when_the_machine_is_idle_again() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE}, idle=False)
    rig.link(FAST)
    rig.run(60)
    rig.idle = True
    rig.run(60)
    assert rig.view(FAST).rate == 110e6


def test_the_rate_counts_and_not_the_round_trip_alone() -> None:
    rig = Rig({SLOW: Sample(0.0003, 2e6), FAST: Sample(0.0012, 110e6)})
    rig.link(SLOW)
    rig.run(30)
    assert rig.use == FAST


def test_little_is_measured() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE, THIRD: CABLE})
    rig.link(FAST, offered=[SLOW, FAST, THIRD])
    rig.run(600)
    rig.measured.clear()
    n_rates = dict(rig.n_rates)
    rig.run(3600)
    assert len(rig.measured) <= 3600 / paths.LONGEST_S + 1
    assert all(rig.n_rates[a] - n_rates[a] <= 2 * 3600 / paths.RATE_AGE_S for a in rig.world)


def test_a_node_with_one_address_is_measured_once() -> None:
    rig = Rig({SLOW: WIFI})
    rig.link(SLOW, offered=[SLOW])
    rig.run(3600)
    assert len(rig.measured) == 1
    assert rig.view(SLOW).rate == 6e6
    assert rig.paths.next_deadline() is None


def test_noise_of_a_factor_of_two_changes_nothing() -> None:
    rig = Rig({SLOW: CABLE, FAST: CABLE})
    rig.link(SLOW)
    for i in range(600):
        rig.world[SLOW] = Sample(0.0003 * (1 + i * 7 % 5 / 4), 110e6 / (1 + i * 3 % 5 / 5))
        rig.world[FAST] = Sample(0.0003 * (1 + i * 3 % 5 / 4), 110e6 / (1 + i * 7 % 5 / 5))
        rig.run(5)
    assert rig.used == []


def test_addresses_that_are_better_in_turn_are_not_followed_each_time() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE})
    rig.link(SLOW)
    for i in range(240):
        good, bad = (SLOW, FAST) if i % 2 else (FAST, SLOW)
        rig.world |= {good: CABLE, bad: WIFI}
        rig.run(15)
    assert len(rig.used) <= 12  # of 240 turns within the hour


def test_a_broken_address_is_left_at_once() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE})
    rig.link(FAST)
    rig.run(30)
    rig.world[FAST] = None
    effects = rig.do(Broken(B, FAST, "this machine no longer has 10.0.2.3"))
    (change,) = [e for e in effects if isinstance(e, Use)]
    assert (change.address, change.before, change.broken) == (SLOW, FAST, True)
    assert "no longer has" in change.why
    assert rig.view(FAST).works is False


def test_a_cable_that_comes_back_is_used_again_and_a_loose_one_less_and_less() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE})
    rig.link(FAST)
    rig.run(30)
    rig.do(Broken(B, FAST, "cut"))
    rig.run(15)
    assert rig.use == FAST
    changes = []
    for _ in range(12):
        n = len(rig.used)
        rig.do(Broken(B, FAST, "cut"))
        rig.run(20)
        changes.append(len(rig.used) - n)
    assert changes[-3:] == [0, 0, 0]
    assert rig.use == SLOW
    rig.run(paths.MAX_DISTRUST_S + 2 * paths.LONGEST_S)
    assert rig.use == FAST


def test_an_address_that_the_node_no_longer_announces_is_left_and_forgotten() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE})
    rig.link(FAST)
    rig.run(30)
    rig.do(Offered(B, (SLOW,)))
    assert rig.use == SLOW
    rig.do(Offered(B, (SLOW, THIRD)))
    assert [v.address for v in rig.paths.views(B)] == [SLOW, THIRD]


def test_an_address_in_use_that_was_never_announced_is_kept() -> None:
    rig = Rig({THIRD: CABLE, SLOW: WIFI})
    rig.link(THIRD, offered=[SLOW])
    rig.do(Offered(B, (SLOW, FAST)))
    rig.run(30)
    assert rig.use == THIRD


def test_a_silent_link_moves_to_an_address_that_answers() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE})
    rig.link(FAST)
    rig.run(30)
    rig.world[FAST], rig.silent = None, True
    rig.do(Silent(B))
    assert rig.use == SLOW
    assert rig.used[-1].why == f"{FAST} is silent"
    assert rig.measured[-1] == Measure(B, (SLOW,), urgent=True)


def test_a_node_that_answers_nowhere_is_not_moved() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE})
    rig.link(FAST)
    rig.run(30)
    rig.world, rig.silent = {}, True
    rig.do(Silent(B))
    rig.do(Silent(B))  # too soon to ask again
    assert rig.use == FAST
    assert sum(m.urgent for m in rig.measured) == 1
    assert rig.view(SLOW).works  # a stalled machine says nothing of its addresses
    rig.now += paths.URGENT_S
    rig.do(Silent(B))
    assert sum(m.urgent for m in rig.measured) == 2
    assert rig.view(SLOW).works


def test_a_link_that_speaks_again_in_time_stays() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE})
    rig.link(FAST)
    rig.run(30)
    rig.do(Silent(B))  # it is not silent any more when the answer comes
    assert rig.use == FAST


def test_a_silent_link_without_another_address_is_left_alone() -> None:
    rig = Rig({SLOW: WIFI})
    rig.link(SLOW, offered=[SLOW])
    rig.run(30)
    rig.silent = True
    assert rig.do(Silent(B)) == []
    rig.do(Unlinked(B))
    assert rig.do(Silent(B)) == []
    assert rig.do(Silent(node_id("nobody"))) == []


def test_a_broken_address_without_another_good_one_asks_all_others() -> None:
    rig = Rig({FAST: CABLE})
    rig.link(FAST)
    rig.run(30)
    rig.world = {SLOW: WIFI}
    rig.do(Broken(B, FAST, "cut"))
    assert rig.use == SLOW
    assert rig.do(Broken(B, THIRD, "unknown")) == []
    assert rig.do(Broken(node_id("nobody"), THIRD, "unknown")) == []


def test_one_lost_measurement_is_no_break_and_two_are() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE})
    rig.link(FAST)
    rig.run(300)
    rig.world[FAST] = None
    rig.run(paths.LONGEST_S)
    assert rig.use == FAST
    rig.run(2 * paths.LONGEST_S)
    assert rig.use == SLOW
    assert "does not answer" in rig.used[-1].why


def test_the_link_says_what_is_used_first() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE})
    rig.do(Linked(B, None, outgoing=False))
    assert rig.use is None
    rig.do(Offered(B, (SLOW, FAST)))
    rig.run(5)
    assert rig.use == FAST
    assert rig.used == []  # the first is no change
    rig.do(Linked(B, FAST, outgoing=False))
    assert rig.use == FAST


def test_an_incoming_link_names_the_address_and_another_dial_moves_it() -> None:
    rig = Rig({SLOW: WIFI, FAST: WIFI})
    rig.do(Offered(B, (SLOW, FAST)))
    rig.do(Linked(B, SLOW, outgoing=False))
    assert rig.use == SLOW
    rig.do(Linked(B, FAST, outgoing=False))
    assert rig.use == SLOW  # the peer chose, and this node's own streams go on as before
    rig.do(Linked(B, FAST, outgoing=True))
    assert rig.use == FAST
    assert rig.used[-1].before == SLOW


def test_dials_go_where_it_works() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE})
    other = Address("10.0.9.9", 8089)
    assert rig.paths.order(B, [SLOW, FAST]) == [SLOW, FAST]
    rig.link(SLOW, offered=[SLOW, FAST, THIRD])
    assert rig.paths.order(B, [THIRD, FAST, SLOW]) == [SLOW, THIRD, FAST]
    rig.run(10)
    assert rig.paths.order(B, [THIRD, other, SLOW, FAST]) == [FAST, SLOW, other, THIRD]
    assert rig.paths.works(B, rig.now)
    assert not rig.paths.works(B, rig.now + paths.GOOD_S + 1)
    assert not rig.paths.works(node_id("nobody"), rig.now)


def test_a_node_of_an_older_version_has_no_figures_and_is_reached_all_the_same() -> None:
    old = Sample(math.inf)
    rig = Rig({SLOW: old, FAST: old})
    rig.link(SLOW)
    rig.run(60)
    assert rig.use == SLOW
    rig.do(Broken(B, SLOW, "cut"))
    assert rig.use == FAST


def test_everything_is_bounded() -> None:
    rig = Rig({})
    many = tuple(Address(f"10.1.0.{i}", 1) for i in range(40))
    rig.do(Offered(B, many))
    assert len(rig.paths.views(B)) == paths.MAX_PATHS
    rig.do(Linked(B, None, outgoing=False))
    for i in range(2 * paths.MAX_NODES):
        rig.do(Offered(node_id(f"x{i}"), many))
    assert len(rig.paths._nodes) == paths.MAX_NODES
    assert rig.paths.views(B)  # what is linked is not forgotten
    assert rig.paths.views(node_id("x0")) == ()
    for i in range(2 * paths.MAX_NODES):
        rig.do(Linked(node_id(f"x{i}"), SLOW, outgoing=True))
    assert len(rig.paths._nodes) == paths.MAX_NODES
    assert rig.do(Offered(node_id("late"), many)) == []
    assert rig.do(Linked(node_id("late"), SLOW, outgoing=True)) == []
    assert rig.do(Measured(node_id("late"), {}, urgent=False)) == []
    assert rig.do(Unlinked(node_id("late"))) == []


def test_a_link_without_addresses_measures_nothing() -> None:
    rig = Rig({})
    rig.do(Linked(B, None, outgoing=False))
    rig.run(60)
    assert rig.measured == []


def test_an_answer_that_comes_after_the_link_is_gone_starts_nothing() -> None:
    machine = Paths()
    machine.handle(Offered(B, (SLOW, FAST)), 0.0)
    machine.handle(Linked(B, SLOW, outgoing=True), 0.0)
    (round_,) = machine.handle(Tick(), 5.0)
    assert isinstance(round_, Measure)
    machine.handle(Linked(B, SLOW, outgoing=True), 5.5)
    assert machine.handle(Tick(), 9.0) == []  # one round at a time
    machine.handle(Unlinked(B), 9.5)
    machine.handle(Measured(B, {SLOW: WIFI}, urgent=False), 10.0)
    assert machine.next_deadline() is None


ADDRESSES = st.sampled_from([SLOW, FAST, THIRD])
SAMPLES = st.none() | st.builds(Sample, st.floats(1e-5, 1.0), st.none() | st.floats(1e3, 1e9))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), ADDRESSES, SAMPLES, st.floats(0, 100)), max_size=60))
def test_whatever_happens_an_address_in_use_is_a_known_one_and_rounds_go_on(steps: list[Any]) -> None:
    rig = Rig({})
    doings: list[Callable[[Address], paths.Event]] = [
        lambda a: Offered(B, (a,)),
        lambda a: Offered(B, (SLOW, FAST)),
        lambda a: Linked(B, a, outgoing=True),
        lambda a: Linked(B, None, outgoing=False),
        lambda a: Unlinked(B),
        lambda a: Silent(B),
        lambda a: Broken(B, a, "cut"),
    ]
    for which, address, sample, seconds in steps:
        rig.world[address] = sample
        rig.silent = sample is None
        rig.do(doings[which](address))
        rig.run(seconds)
        views = rig.paths.views(B)
        assert len(views) <= paths.MAX_PATHS
        if rig.use is not None:
            assert views[0].address == rig.use
    rig.do(Offered(B, (SLOW, FAST)))
    rig.do(Linked(B, None, outgoing=False))
    rig.world = {SLOW: None, FAST: CABLE}
    rig.run(paths.RATE_AGE_S + paths.MAX_DISTRUST_S + 3 * paths.LONGEST_S)
    assert rig.use == FAST


def test_a_silent_link_from_nowhere_known_finds_an_address_to_use() -> None:
    rig = Rig({SLOW: WIFI})
    rig.do(Offered(B, (SLOW, FAST)))
    rig.do(Linked(B, None, outgoing=False))
    rig.silent = True
    rig.do(Silent(B))
    assert rig.use == SLOW
    assert rig.used == []


def test_an_address_that_never_answers_is_asked_less_and_less() -> None:
    rig = Rig({SLOW: WIFI})
    rig.link(SLOW, offered=[SLOW, FAST, THIRD])
    rig.run(3600)
    n_asked = sum(FAST in m.addresses for m in rig.measured)
    assert 5 < n_asked < 18
    assert sum(SLOW in m.addresses for m in rig.measured) > 50
    rig.world[FAST] = CABLE
    rig.run(paths.RATE_AGE_S + 2 * paths.LONGEST_S)
    assert rig.use == FAST


def test_a_node_that_answers_nowhere_is_asked_again_later() -> None:
    rig = Rig({})
    rig.do(Offered(B, (SLOW, FAST)))
    rig.do(Linked(B, None, outgoing=False))
    rig.run(60)
    rig.world = {SLOW: WIFI}
    rig.run(paths.RATE_AGE_S)
    assert rig.use == SLOW


def test_better_once_is_not_followed() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE})
    rig.link(FAST)
    rig.run(300)
    rig.world = {SLOW: Sample(0.00001, 1e9), FAST: WIFI}
    n = len(rig.measured)
    while len(rig.measured) == n:
        rig.run(1)
    rig.world = {SLOW: WIFI, FAST: CABLE}
    rig.run(300)
    assert rig.used == []


def test_a_little_better_is_not_followed() -> None:
    rig = Rig({SLOW: Sample(0.0003, 100e6), FAST: Sample(0.0003, 120e6)})
    rig.link(SLOW)
    rig.run(600)
    assert rig.used == []


def test_after_a_change_for_speed_the_next_waits() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE})
    rig.link(SLOW)
    while not rig.used:
        rig.run(0.5)
    rig.world = {SLOW: Sample(0.00001, 1e9), FAST: Sample(0.03, 1e6)}
    rig.run(paths.HOLD_S - 1)
    assert rig.use == FAST
    rig.run(2 * paths.RATE_AGE_S)
    assert rig.use == SLOW


def test_what_broke_is_not_trusted_at_once() -> None:
    rig = Rig({SLOW: WIFI, FAST: CABLE})
    rig.link(FAST)
    rig.run(30)
    rig.do(Broken(B, FAST, "cut"))
    rig.run(paths.DISTRUST_S - 0.5)
    assert rig.use == SLOW
