"""The speculation machine against fixed draft lengths, drafters that fail, several at once, and several requests.

Everything begins cold: nothing is known of the pool or the drafters. Seeds are printed, and are all it takes to repeat
a case. The whole grid: `python tests/sim/test_speculation_sim.py`, some minutes.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
from simspec import N_VOCAB, Sim, Speeds, Text, best_fixed, fixed, simulate

from tightwad_agent.proxy.costs import Costs
from tightwad_agent.proxy.policy import Policy
from tightwad_agent.proxy.speculate_events import Bounds

ACCEPT = (0.0, 0.3, 0.6, 0.8, 0.9, 0.97)
TOKEN_S = (0.001, 0.005, 0.015, 0.03, 0.06)
PASS_S = (0.01, 0.05, 0.2)
SLOPE_S = (0.0002, 0.002, 0.01)
DELAY_S = (0.0, 0.01, 0.04)
GRID = list(itertools.product(TOKEN_S, PASS_S, SLOPE_S, DELAY_S))
USUAL = Speeds(0.08, 0.006, 0.015, 0.005, 0.1)
"""A pool of three workers at a round trip of 10 ms, and a drafter as far away."""
SEED = "speculation"


def texts_of(n: int, length: int, accept: float) -> list[Text]:
    return [Text.make(f"{SEED}/{i}/{accept}", length, accept) for i in range(n)]


def total_s(texts: Sequence[Text], speeds: Speeds, costs: Costs | None = None, **others: Speeds) -> float:
    """Seconds for all texts, one after the other, with what was learned from those before."""
    costs = costs or Costs()
    return sum(simulate(text, speeds, costs, seed=text.seed, others=others)[0] for text in texts)


def against_hindsight(accept: float, cell: tuple[float, ...], n: int = 6, length: int = 200) -> tuple[float, int]:
    """Time as a multiple of the best fixed length's, and that length."""
    token_s, pass_s, slope_s, delay_s = cell
    speeds = Speeds(pass_s, slope_s, token_s, delay_s, 0.1)
    texts = texts_of(n, length, accept)
    best_s, k = best_fixed(texts, speeds)
    return total_s(texts, speeds) / best_s, k


@pytest.mark.slow
@pytest.mark.parametrize("accept", ACCEPT)
def test_no_fixed_length_is_much_better_even_in_hindsight(accept: float) -> None:
    cells = GRID[ACCEPT.index(accept) % 2 :: 11]
    ratios = {cell: against_hindsight(accept, cell) for cell in cells}
    worst = max(ratios, key=lambda cell: ratios[cell][0])
    print(f"seed {SEED}, accepted {accept}: worst {worst}: {ratios[worst]}")
    assert ratios[worst][0] <= 1.05
    mean = sum(ratio for ratio, _ in ratios.values()) / len(ratios)
    assert mean <= 1.01


def test_a_controller_that_never_waits_fails_the_same_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the comparison is worth: a worse controller does not pass it."""
    honest = Policy.choose

    def hasty(self: Policy, have: int, due_s: float, limit: int, *, may_wait: bool = True) -> tuple[int, float]:
        return honest(self, have, due_s, limit, may_wait=False)

    cell = (0.001, 0.05, 0.0002, 0.0)
    assert against_hindsight(0.9, cell)[0] <= 1.05
    monkeypatch.setattr(Policy, "choose", hasty)
    assert against_hindsight(0.9, cell)[0] > 1.05


def test_a_controller_that_takes_all_there_is_fails_the_same_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(self: Policy, have: int, due_s: float, limit: int, *, may_wait: bool = True) -> tuple[int, float]:
        return min(have, limit, self.top), 100.0

    cell = (0.001, 0.05, 0.01, 0.0)
    assert against_hindsight(0.6, cell)[0] <= 1.05
    monkeypatch.setattr(Policy, "choose", greedy)
    assert against_hindsight(0.6, cell)[0] > 1.05


@pytest.mark.parametrize(
    ("rtt_s", "least"), [(0.0, 2.35), (0.004, 2.7), (0.01, 3.05), (0.02, 3.4)], ids=["0 ms", "4 ms", "10 ms", "20 ms"]
)
def test_a_good_draft_pays_at_every_distance(rtt_s: float, least: float) -> None:
    """Four requests of 96 tokens from a cold start, against the pool alone."""
    speeds = Speeds(0.05 + 3 * rtt_s, 0.006, 0.015, rtt_s / 2, 0.1)
    texts = texts_of(4, 96, 0.95)
    plain_s = sum(fixed(text, speeds, 0) for text in texts)
    assert plain_s / total_s(texts, speeds) >= least


@pytest.mark.parametrize(("token_s", "rtt_s"), [(0.016, 0.02), (0.022, 0.01), (0.005, 0.04)])
@pytest.mark.parametrize("length", [20, 48, 96])
def test_the_end_of_an_answer_is_no_slower_than_the_rest(token_s: float, rtt_s: float, length: int) -> None:
    """A good and quick drafter is at the end before the pool is. Its tokens are used up, not saved."""
    speeds = Speeds(0.057 + 3 * rtt_s, 0.011, token_s, rtt_s / 2, 0.1)
    texts, costs = texts_of(12, length, 0.97), Costs()
    assert total_s(texts, speeds, costs) <= 1.02 * best_fixed(texts, speeds)[0]


@pytest.mark.parametrize(("accept", "least"), [(0.5, 0.98), (0.6, 1.05), (0.7, 1.2), (0.8, 1.35), (0.93, 2.0)])
def test_rounds_whose_second_token_is_dear(accept: float, least: float) -> None:
    """As on a CPU: a pass with two tokens takes 1.5 times as long as one with one, and each further one little more."""
    speeds = Speeds(0.065, 0.0045, 0.017, 0.005, 0.15, jump_s=0.026)
    runs = [[Text.make(f"{SEED}/jump/{run}/{i}/{accept}", 96, accept) for i in range(4)] for run in range(5)]
    plain_s = sum(fixed(text, speeds, 0) for texts in runs for text in texts)
    took = [total_s(texts, speeds) for texts in runs]
    assert plain_s / sum(took) >= least
    for texts, seconds in zip(runs, took, strict=True):
        assert seconds <= 1.05 * best_fixed(texts, speeds)[0], "each from a cold start"


@pytest.mark.parametrize("accept", [0.5, 0.29])
def test_a_poor_draft_never_costs(accept: float) -> None:
    texts = texts_of(8, 96, accept)
    plain_s = sum(fixed(text, USUAL, 0) for text in texts)
    assert plain_s / total_s(texts, replace(USUAL, token_s=0.012)) >= (1.15 if accept == 0.5 else 0.99)


@pytest.mark.parametrize("hangs_from", [0.0, 1.0, 2.0])
def test_a_drafter_that_hangs_costs_next_to_nothing(hangs_from: float) -> None:
    texts = texts_of(4, 96, 0.0)
    plain_s = sum(fixed(text, USUAL, 0) for text in texts)
    assert plain_s / total_s(texts, replace(USUAL, hangs_from=hangs_from)) >= 0.98


def test_a_drafter_that_is_always_wrong_costs_next_to_nothing() -> None:
    texts = texts_of(4, 96, 0.0)
    costs = Costs()
    plain_s = sum(fixed(text, USUAL, 0) for text in texts)
    took = []
    asked = []
    for text in [*texts, *texts_of(20, 96, 0.0)]:
        seconds, line = simulate(text, USUAL, costs, seed=text.seed)
        took.append(seconds)
        asked.append(line.drafters["a"].total)
    assert plain_s / sum(took[:4]) >= 0.97
    assert sum(asked[-8:]) <= 16, "tried ever less often"
    assert "would cost more than it brings (accepted 0." in costs.words()


@pytest.mark.parametrize(("accept", "token_s"), [(0.5, 0.03), (0.7, 0.03), (0.95, 0.015)])
def test_a_drafter_that_slows_the_pool_down_is_used_only_if_it_still_pays(
    accept: float, token_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds take twice as long while it drafts; how long they take without it is found out."""
    texts = texts_of(20, 120, accept)
    speeds = replace(USUAL, disturbs=1.0, token_s=token_s)
    plain_s = sum(fixed(text, speeds, 0) for text in texts)
    assert plain_s / total_s(texts, speeds) >= (1.5 if accept == 0.95 else 0.97)
    if accept == 0.7:
        monkeypatch.setattr(Costs, "rests", lambda *_: False)
        assert plain_s / total_s(texts, speeds) < 0.95


def test_a_draft_that_becomes_good_is_found_out() -> None:
    costs = Costs()
    for text in texts_of(4, 96, 0.0):
        simulate(text, USUAL, costs)
    late = [Text.make(f"{SEED}/late/{i}", 400, 0.95) for i in range(4)]
    plain_s = sum(fixed(text, USUAL, 0) for text in late)
    assert plain_s / total_s(late, USUAL, costs) > 2


def test_acceptance_that_comes_and_goes_is_followed() -> None:
    """Easy and hard passages of 60 tokens: better than any fixed length, because no length suits both."""
    texts = [Text.make(f"{SEED}/mix/{i}", 360, lambda at: 0.95 if at // 60 % 2 else 0.2) for i in range(4)]
    best_s, _ = best_fixed(texts, USUAL)
    assert total_s(texts, USUAL) < best_s


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (replace(USUAL, hangs_from=0.0), USUAL),
        (replace(USUAL, hangs_from=1.5), USUAL),
        (replace(USUAL, token_s=0.06), USUAL),
        (replace(USUAL, delay_s=0.06), USUAL),
        (USUAL, replace(USUAL, hangs_from=0.0)),
        (USUAL, replace(USUAL, token_s=0.06)),
    ],
    ids=["hangs, usual", "hangs later, usual", "slow, usual", "far, usual", "usual, hangs", "usual, slow"],
)
def test_of_two_drafters_the_better_one_is_soon_used(first: Speeds, second: Speeds) -> None:
    texts = texts_of(12, 120, 0.95)
    lucks = texts, [replace(text, guessed=text.luck("b").guessed) for text in texts]
    alone_s = max(total_s(luck, USUAL) for luck in lucks)
    assert total_s(texts, first, b=second) < 1.1 * alone_s


def test_copying_from_the_text_helps_without_any_drafter() -> None:
    passage = Text.make(f"{SEED}/passage", 150, 0.0)
    text = replace(passage, prompt=passage.target, target=passage.target[20:140], seed="copy")
    speeds = replace(USUAL, hangs_from=0.0)
    took, line = simulate(text, speeds, Costs(), ngram=True)
    assert took < fixed(text, speeds, 0) / 3
    assert set(line.machine.timings.drafters) == {"n-gram"}


def repeating(seed: str, accept: float) -> Text:
    """As code and tables are: half of it stood before, in pieces of 6 to 24 tokens."""
    dice, tokens = random.Random(seed), [random.Random(seed).randrange(N_VOCAB) for _ in range(40)]
    while len(tokens) < 240:
        at = dice.randrange(len(tokens) - 15)
        tokens += tokens[at : at + dice.randrange(6, 25)]
        tokens += [dice.randrange(N_VOCAB) for _ in range(dice.randrange(5, 25))]
    return replace(Text.make(seed, 200, accept), prompt=tokens[:40], target=tokens[40:240])


@pytest.mark.parametrize(("accept", "least"), [(0.92, 1.05), (0.5, 1.2)])
def test_copies_behind_a_drafters_tokens_bring_more_than_either_alone(accept: float, least: float) -> None:
    speeds = Speeds(0.085, 0.0135, 0.022, 0.005, 0.1, jump_s=0.012)
    texts = [repeating(f"{SEED}/repeating/{i}", accept) for i in range(8)]

    def seconds(speeds: Speeds, *, ngram: bool) -> float:
        costs = Costs()
        return sum(simulate(text, speeds, costs, seed=text.seed, ngram=ngram)[0] for text in texts)

    both_s, drafter_s = seconds(speeds, ngram=True), seconds(speeds, ngram=False)
    copies_s = seconds(replace(speeds, hangs_from=0.0), ngram=True)
    assert min(drafter_s, copies_s) / both_s >= (1.01 if accept == 0.5 else least)
    assert drafter_s / both_s >= least


@pytest.mark.parametrize("accept", [0.3, 0.9])
def test_no_fixed_length_is_better_where_the_text_repeats(accept: float) -> None:
    for token_s, pass_s, slope_s, delay_s in GRID[::23]:
        speeds = Speeds(pass_s, slope_s, token_s, delay_s, 0.1)
        texts, costs = [repeating(f"{SEED}/grid/{i}", accept) for i in range(4)], Costs()
        took = sum(simulate(text, speeds, costs, seed=text.seed, ngram=True)[0] for text in texts)
        assert took <= 1.05 * best_fixed(texts, speeds)[0], speeds


def test_random_text_is_not_slowed_down_by_looking_for_copies() -> None:
    texts = [replace(Text.make(f"{SEED}/few/{i}", 200, 0.0), seed=str(i)) for i in range(4)]
    texts = [replace(t, target=[token % 30 for token in t.target], prompt=[p % 30 for p in t.prompt]) for t in texts]
    speeds = replace(USUAL, hangs_from=0.0)
    costs = Costs()
    took = sum(simulate(text, speeds, costs, seed=text.seed, ngram=True)[0] for text in texts)
    assert sum(fixed(text, speeds, 0) for text in texts) / took >= 0.98


def streams(n: int, speeds: Speeds, accept: float, repeats: int = 5) -> tuple[float, list[float]]:
    """Tokens per second of `n` requests at once, and how much longer the slowest took than the fastest."""
    costs, seconds, spread = Costs(), 0.0, []
    for repeat in range(repeats):
        sim = Sim(speeds, f"{SEED}/{repeat}")
        for i in range(n):
            text = Text.make(f"{SEED}/streams/{repeat}/{i}", 96, accept)
            sim.add(text, costs, {"a": speeds}, Bounds(96, 1 << 20, N_VOCAB, ngram=False))
        sim.run()
        done = [line.done_at for line in sim.lines]
        seconds += max(done)
        spread.append(max(done) / min(done))
    assert costs.live == 0
    return n * 96 * repeats / seconds, sorted(spread)


@pytest.mark.parametrize("accept", [0.95, 0.8, 0.0])
def test_four_streams_share_the_rounds(accept: float) -> None:
    one, _ = streams(1, USUAL, accept, repeats=12)
    four, spread = streams(4, USUAL, accept)
    plain, _ = streams(4, replace(USUAL, hangs_from=0.0), accept)
    assert four >= 1.5 * one
    assert spread[2] <= 1.4
    assert four >= 0.98 * plain * (1.8 if accept == 0.95 else 1.25 if accept else 1.0)


def test_runs_repeat_exactly() -> None:
    text = Text.make(f"{SEED}/again", 200, 0.8)
    assert simulate(text, USUAL, Costs())[0] == simulate(text, USUAL, Costs())[0]


def whole_grid() -> int:
    """Prints each cell of the grid that is over 1.05, and a summary."""
    ratios = []
    for accept in ACCEPT:
        for cell in GRID:
            ratio, k = against_hindsight(accept, cell)
            ratios.append(ratio)
            if ratio > 1.05:
                print(f"{ratio:.3f} accepted {accept}, {cell}, best fixed {k}")
    ratios.sort()
    n_over, median = sum(ratio > 1.05 for ratio in ratios), ratios[len(ratios) // 2]
    print(f"seed {SEED}: {len(ratios)} cells, {n_over} over 1.05, worst {ratios[-1]:.3f}, median {median:.3f}")
    return 1 if n_over else 0


if __name__ == "__main__":
    sys.exit(whole_grid())
