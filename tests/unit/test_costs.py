"""What is learned of times and acceptance, and the policy that follows from it."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.proxy.averages import Odds, Smooth
from tightwad_agent.proxy.costs import BUCKETS, POLICIES, SLOPE, Costs, RoundTimes, rising
from tightwad_agent.proxy.policy import WAIT, Policy
from tightwad_agent.proxy.record import PROBE_FIRST, PROBE_LAST, SILENT_LAST, DrafterRecord


def test_a_mean_follows_and_one_wild_value_does_not_move_it_far() -> None:
    mean = Smooth(5.0)
    mean.add(1.0)
    assert mean.value == 1.0, "the first value replaces the guess"
    for _ in range(50):
        mean.add(1.0)
    mean.add(1000.0)
    assert mean.value < 1.4
    for _ in range(60):
        mean.add(3.0)
    assert mean.value == pytest.approx(3.0, rel=0.01)


def test_a_mean_recovers_from_zero() -> None:
    mean = Smooth(0.0)
    for value in [0.0] * 5 + [0.01] * 200:
        mean.add(value)
    assert mean.value == pytest.approx(0.01, rel=0.05)


def test_odds_forget() -> None:
    odds = Odds(0.9)
    for _ in range(100):
        odds.add(hit=True)
    assert odds.rate(0.0, 1.0) == pytest.approx(10 / 11, rel=0.01)
    for _ in range(30):
        odds.add(hit=False)
    assert odds.rate(0.0, 1.0) < 0.05


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30))
def test_rising_never_falls_keeps_the_sum_and_what_rises_already(values: list[float]) -> None:
    result = rising(values)
    assert len(result) == len(values)
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(result))
    assert sum(result) == pytest.approx(sum(values), abs=1e-6)
    assert rising(sorted(values)) == sorted(values)


def test_round_times_of_a_line_are_learned_with_noise_and_outliers() -> None:
    dice, times = random.Random(3), RoundTimes()
    for i in range(200):
        n = dice.choice([1, 1, 5, 6, 9])
        wild = 10 if i % 40 == 20 else 1
        times.add(n, wild * (0.05 + 0.006 * (n - 1)) * dice.uniform(0.9, 1.1))
    for n in (1, 3, 5, 9, 14):
        assert times.of(n) == pytest.approx(0.05 + 0.006 * (n - 1), rel=0.15)
    assert times.of(2.5) == pytest.approx((times.of(2) + times.of(3)) / 2)
    assert times.of(BUCKETS + 10) > times.of(BUCKETS) > times.of(BUCKETS - 1)


def test_round_times_that_are_no_line_are_learned_too() -> None:
    """Flat up to 8 tokens, then twice as much, as where a kernel changes."""
    times = RoundTimes()
    for _ in range(40):
        for n in (1, 4, 8, 9, 12, 16):
            times.add(n, 0.1 if n <= 8 else 0.2)
    assert times.of(8) < 0.13
    assert times.of(9) > 0.17
    table = [times.of(n) for n in range(1, 40)]
    assert table == sorted(table)


def test_round_times_follow_a_pool_that_slows_down() -> None:
    times = RoundTimes()
    for _ in range(200):
        times.add(1, 0.05)
        times.add(6, 0.08)
    for _ in range(40):
        times.add(1, 0.15)
        times.add(6, 0.24)
    assert times.of(1) == pytest.approx(0.15, rel=0.1)
    assert times.of(6) == pytest.approx(0.24, rel=0.1)


@pytest.mark.parametrize(("batch", "seconds"), [(0, 1.0), (1, 0.0), (1, -1.0), (1, math.inf), (1, math.nan)])
def test_times_that_are_none_are_ignored(batch: int, seconds: float) -> None:
    times = RoundTimes()
    times.add(batch, seconds)
    assert times.seen == 0


def test_a_prompt_hints_at_a_round_until_one_is_measured() -> None:
    costs = Costs()
    costs.prompt_came(20, 0.4)
    assert costs.plain_s == pytest.approx(0.4 / (1 + 20 * SLOPE))
    assert not costs.known
    costs.round_came(1, 1, 1, 0.05)
    costs.round_came(1, 1, 1, 0.05)
    assert costs.known
    costs.prompt_came(20, 4.0)
    assert costs.plain_s == pytest.approx(0.05, rel=0.1)


def test_passes_with_a_prompt_in_them_teach_nothing() -> None:
    costs = Costs()
    costs.round_came(3, 512, 2, 2.0)
    assert not costs.passes.seen


def test_a_draft_token_costs_every_live_request() -> None:
    costs = Costs()
    for n in (1, 4, 8, 16, 32) * 5:
        costs.round_came(min(n, 4), n, 4 if n > 4 else 1, 0.05 + 0.005 * (n - 1))
    costs._others = 0.0
    alone = costs.pass_s(4) - costs.pass_s(0)
    costs.live = 3
    assert costs.pass_s(4) - costs.pass_s(0) == pytest.approx(3 * alone)
    assert costs.crowded


def test_policies_are_kept_and_worked_out_again_when_things_change() -> None:
    costs = Costs()
    record = costs.record("a", "a", 0.01)
    first = costs.policy(record, 0.9)
    assert costs.policy(record, 0.9) is first
    assert costs.policy(record, 0.5) is not first
    assert costs.policy(record, 0.7, instead=first) is first
    for i in range(3 * POLICIES):
        record.token_s.value = 0.001 * 1.2**i
        costs.policy(record, 0.9)
    assert len(costs._policies) == POLICIES


def test_the_bound_on_drafts_holds() -> None:
    costs = Costs(max_draft=3)
    policy = costs.policy(costs.record("a", "a"), 0.98)
    assert policy.reach <= 3
    assert policy.choose(30, 0.0, 30)[0] <= 3


def test_words_say_what_is_done_and_why() -> None:
    costs = Costs()
    assert costs.words() == "not drafting: no drafter"
    record = costs.record("a", "den")
    assert costs.words() == "not drafting: den has not been tried yet"
    record.first_came(0.03, 1)
    for _ in range(50):
        record.odds.add(hit=False)
    share = f"{record.accepted:.2f}"
    assert share in {"0.03", "0.04"}
    assert costs.words() == f"not drafting: den would cost more than it brings (accepted {share})"
    record.failed(0, silent=True)
    assert costs.words() == "not drafting: den does not deliver in time"
    costs.leading = record
    assert costs.words() == f"drafting on den: {share} accepted, 1.0 tokens a round"


def test_one_that_fell_silent_is_tried_again_before_long() -> None:
    record = DrafterRecord("a")
    for _ in range(20):
        record.failed(0, silent=True)
    assert record.gap == SILENT_LAST
    for _ in range(20):
        record.failed(0)
    bad = record.gap
    assert bad > SILENT_LAST
    record.failed(0, silent=True)
    assert record.gap == bad, "a bad one does not get better by being silent"


def test_tries_become_rarer_with_each_failure() -> None:
    record, gaps, clock = DrafterRecord("a"), [], 0
    assert record.due(clock)
    for _ in range(20):
        record.failed(clock)
        gaps.append(record.gap)
        assert not record.due(clock + record.gap - 1)
        clock += record.gap
        assert record.due(clock)
    assert gaps == [min(PROBE_FIRST * 2 ** (i + 1), PROBE_LAST) for i in range(20)]
    record.helped()
    assert record.gap == PROBE_FIRST


def test_long_prefixes_say_nothing_about_distance() -> None:
    record = DrafterRecord("a", rtt_s=0.01)
    record.first_came(0.04, 1)
    record.first_came(1.04, 1000)
    assert record.first_due(1) == pytest.approx(0.04)
    assert record.first_due(2000) == pytest.approx(2.04)


def line(pass_s: float, slope_s: float) -> list[float]:
    return [pass_s + slope_s * n for n in range(33)]


def test_a_policy_promises_what_it_then_reaches() -> None:
    """The policy's rate against a simulation of nothing but the policy."""
    accept, token_s, first_s, rounds = 0.9, 0.015, 0.025, line(0.08, 0.006)
    policy = Policy(accept, token_s, first_s, rounds, 32)
    dice, now, made = random.Random(5), 0.0, 0
    next_at, have = first_s, 0
    while made < 20_000:
        size, _ = policy.choose(have, next_at - now, 32)
        if size == WAIT:
            now, have, next_at = next_at, have + 1, next_at + token_s
            continue
        now += rounds[size]
        while next_at <= now:
            have, next_at = have + 1, next_at + token_s
        right = 0
        while right < size and dice.random() < accept:
            right += 1
        made += right + 1
        have -= size + 1
        if have < 0:  # what is confirmed now is what the drafter makes next
            now, have, next_at = max(now, next_at), 0, next_at + token_s
        if right < size or dice.random() > accept:
            have, next_at = 0, now + first_s
    assert made / now == pytest.approx(policy.gain, rel=0.04)


@pytest.mark.parametrize("accept", [0.05, 0.3, 0.6, 0.8, 0.9, 0.95, 0.985])
@pytest.mark.parametrize(("token_s", "first_s"), [(0.001, 0.001), (0.015, 0.03), (0.06, 0.14)])
@pytest.mark.parametrize(("pass_s", "slope_s"), [(0.01, 0.01), (0.05, 0.006), (0.2, 0.0002)])
def test_a_policy_is_no_worse_than_no_drafts_and_better_with_better_drafts(
    accept: float, token_s: float, first_s: float, pass_s: float, slope_s: float
) -> None:
    policy = Policy(accept, token_s, first_s, line(pass_s, slope_s), 32)
    assert policy.gain >= 0.98 / pass_s
    assert policy.gain <= 1.005 * max(1 / pass_s, (1 + policy.top) / pass_s)
    assert Policy(accept, token_s / 2, first_s / 2, line(pass_s, slope_s), 32).gain >= 0.99 * policy.gain
    assert 1 <= policy.reach <= policy.top <= 32


def test_choices_make_sense() -> None:
    policy = Policy(0.95, 0.015, 0.03, line(0.08, 0.006), 32)
    assert policy.choose(0, 0.001, 32)[0] == WAIT
    assert policy.choose(8, 10.0, 32)[0] > 0, "nobody waits for who does not come"
    assert policy.choose(3, math.inf, 32, may_wait=False)[0] == 3
    assert policy.choose(20, 0.01, 5)[0] <= 5
    assert Policy(0.05, 0.015, 0.03, line(0.05, 0.006), 32).choose(2, 0.01, 32)[0] == 0
    hurried = Policy(0.95, 0.015, 0.03, line(0.08, 0.006), 32, patient=False)
    assert hurried.choose(0, 0.001, 32)[0] == 0


def test_a_policy_found_from_another_is_as_good() -> None:
    old = Policy(0.9, 0.02, 0.04, line(0.08, 0.006), 32)
    figures = (0.91, 0.022, 0.035, line(0.11, 0.007), 32)
    new, cold = Policy(*figures, like=old), Policy(*figures)
    assert old.top == cold.top, "else it starts from nothing"
    assert new.gain == pytest.approx(cold.gain, rel=0.02)
    for have in range(cold.top):
        assert new.choose(have, 0.01, 32)[0] == cold.choose(have, 0.01, 32)[0]


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_a_policy_at_another_pace(factor: float) -> None:
    one = Policy(0.9, 0.02, 0.04, line(0.08, 0.006), 32)
    paced = one.paced(factor)
    slower = Policy(0.9, 0.02 * factor, 0.04 * factor, line(0.08 * factor, 0.006 * factor), 32)
    assert paced.gain == pytest.approx(slower.gain)
    for have in range(slower.top):
        assert paced.choose(have, 0.01 * factor, 32) == pytest.approx(slower.choose(have, 0.01 * factor, 32))


class TestTokensFromElsewhere:
    """Behind all that the drafter has made."""

    policy = Policy(0.9, 0.02, 0.04, line(0.08, 0.006), 12)

    def test_none_is_nothing(self) -> None:
        assert self.policy.choose_behind(3, 0.01, []) == (0, -math.inf)

    def test_sure_ones_are_all_taken_as_far_as_a_round_may_go(self) -> None:
        assert self.policy.choose_behind(2, 0.01, [1.0] * 6)[0] == 6
        assert self.policy.choose_behind(4, 0.01, [1.0] * 40)[0] == len(self.policy.round_s) - 1 - 4
        assert self.policy.choose_behind(len(self.policy.round_s) - 1, 0.01, [1.0]) == (0, -math.inf)

    def test_doubtful_ones_are_worth_less_than_none(self) -> None:
        _, without = self.policy.choose(3, 0.01, 12, may_wait=False)
        assert self.policy.choose_behind(3, 0.01, [0.05])[1] < without < self.policy.choose_behind(3, 0.01, [0.9])[1]

    def test_what_a_round_with_one_is_worth(self) -> None:
        policy, took, due_s = self.policy, self.policy.round_s[3], 0.01
        made = 1 + 0.9 + 0.81 + 0.81 * 0.6
        arrived = 1 + (took - due_s) / policy.token_s
        after = 0.4 * 0.9 * policy.worth(arrived) + 0.6 * 0.81 * policy.worth(arrived - 1)
        assert policy.choose_behind(2, due_s, [0.6])[1] == pytest.approx(made - policy.gain * took + 0.81 * after)

    def test_of_a_drafter_that_makes_no_more_nothing_is_left(self) -> None:
        policy = self.policy
        made = 1 + 0.9 + 0.9 * 0.6
        assert policy.choose_behind(1, math.inf, [0.6])[1] == pytest.approx(made - policy.gain * policy.round_s[2])


class TestTheEndOfAnAnswer:
    """No more tokens will come, or none that can still be of use."""

    policy = Policy(0.97, 0.016, 0.036, line(0.12, 0.008), 32)

    def test_nothing_is_saved_up_for_later(self) -> None:
        for have in range(1, 17):
            left, sizes = have + 1, []
            while left > 1:
                size, _ = self.policy.finish(left - 1, left, 32)
                sizes.append(size)
                left -= size + 1
            assert min(sizes) > 0
            assert len(sizes) <= 2, "rounds of about the usual size"

    def test_a_round_is_no_longer_than_it_may_be(self) -> None:
        assert self.policy.finish(8, 9, 3)[0] <= 3
        assert self.policy.finish(8, 4, 32)[0] <= 3
        assert self.policy.finish(1, 1, 32)[0] == 0
        assert self.policy.finish(500, 1000, 32)[0] > 4

    def test_tokens_that_are_hardly_ever_right_are_not_used(self) -> None:
        assert Policy(0.1, 0.016, 0.036, line(0.12, 0.1), 32).finish(4, 5, 32)[0] == 0

    def test_what_the_last_round_is_worth(self) -> None:
        """Two tokens are left and one is drafted: a round of two, and if it was wrong a plain one."""
        policy, a = self.policy, self.policy.accept
        again = 1 - policy.gain * policy.round_s[0]
        assert policy.finish(1, 2, 32) == (1, pytest.approx(1 + a - policy.gain * policy.round_s[1] + (1 - a) * again))

    @pytest.mark.parametrize("accept", [0.6, 0.9, 0.98])
    @pytest.mark.parametrize(("have", "left"), [(3, 4), (9, 10), (5, 40), (14, 15)])
    def test_it_takes_as_long_as_it_promises(self, accept: float, have: int, left: int) -> None:
        """Against dice; what is left after a mistake takes as long as the policy's rate and a plain round allow."""
        policy, dice = Policy(accept, 0.016, 0.036, line(0.12, 0.008), 32), random.Random(have)
        plain_s, n, total = policy.round_s[0], 4000, 0.0
        for _ in range(n):
            at, here, on = left, have, True
            while at and on:
                size, _ = policy.finish(here, at, 32)
                right = 0
                while right < size and dice.random() < accept:
                    right += 1
                total += policy.round_s[size]
                on = right == size and here > size and dice.random() < accept
                at, here = at - right - 1, here - right - 1
            total += max(at / policy.gain, plain_s) if at else 0.0
        assert left - policy.gain * total / n == pytest.approx(policy.finish(have, left, 32)[1], abs=0.3)
