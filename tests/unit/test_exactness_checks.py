"""What the exactness tests measure with, against values worked out by other means."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from exactness_checks import P_LEAST, Difference, beyond, chi_square, law, parting

from tightwad_agent.wire.verify import Sampling

EVEN = dict.fromkeys(range(10), 0.1)


@pytest.mark.parametrize(
    ("own", "other", "at"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2, 3], [1, 5, 3], 1), ([1, 2], [1, 2, 3], 2), ([], [], None), ([], [1], 0)],
)
def test_where_answers_part(own: list[int], other: list[int], at: int | None) -> None:
    assert parting(own, other) == at


def test_what_noise_explains() -> None:
    near = Difference("good", 0, 3, 7, 9, -1.00, -1.04, adjacent=True)
    far = Difference("good", 0, 3, 7, 9, -1.00, -1.06, adjacent=True)
    assert (near.explained(), far.explained(), far.explained(0.1)) == (True, False, True)
    assert "float noise" in near.words()
    assert "prompt 1, token 4" in far.words()
    assert "WRONG" in far.words()
    unknown = Difference("good", 0, 3, 7, -1, -1.0, -math.inf)
    assert not unknown.explained(100.0)
    assert Difference("sampled", 0, 3, 7, 9, -1.0, -3.0, adjacent=True, greedy=False).explained()
    assert not Difference("sampled", 0, 3, 7, 9, -1.0, -1.0, adjacent=False, greedy=False).explained()


@pytest.mark.parametrize(
    ("x", "dof", "p"),
    [  # from printed tables
        (3.841, 1, 0.05),
        (5.991, 2, 0.05),
        (7.815, 3, 0.05),
        (6.635, 1, 0.01),
        (18.307, 10, 0.05),
        (24.996, 15, 0.05),
        (30.578, 15, 0.01),
        (124.342, 100, 0.05),
        (0.0, 4, 1.0),
        (0.0, 5, 1.0),
    ],
)
def test_chi_square_tables(x: float, dof: int, p: float) -> None:
    assert beyond(x, dof) == pytest.approx(p, rel=2e-3)


def test_draws_that_follow_their_law_and_draws_that_do_not() -> None:
    rng = random.Random(3)
    right = Counter(rng.randrange(10) for _ in range(5000))
    assert chi_square(right, EVEN)[1] == 9
    assert chi_square(right, EVEN)[2] > 0.01
    wrong = Counter(min(rng.randrange(11), 9) for _ in range(5000))
    assert chi_square(wrong, EVEN)[2] < P_LEAST
    assert chi_square({0: 5, 77: 1}, EVEN) == (math.inf, 9, 0.0)


def test_rare_cells_count_together() -> None:
    expected = {0: 0.9, **dict.fromkeys(range(1, 101), 0.001)}
    statistic, dof, _p = chi_square({0: 900, 1: 100}, expected)
    assert statistic == pytest.approx(0.0)
    assert dof == 1


def test_the_law_of_a_chain_of_samplers() -> None:
    logprobs = {5: math.log(0.5), 6: math.log(0.25), 7: math.log(0.15), 8: math.log(0.06), 9: math.log(0.04)}
    everything = law(logprobs, Sampling(1.0, 5, 1.0, 0.0))
    assert everything == pytest.approx({5: 0.5, 6: 0.25, 7: 0.15, 8: 0.06, 9: 0.04})
    assert law(logprobs, Sampling(1.0, 2, 1.0, 0.0)) == pytest.approx({5: 2 / 3, 6: 1 / 3})
    assert list(law(logprobs, Sampling(1.0, 5, 0.8, 0.0))) == [5, 6, 7]
    assert list(law(logprobs, Sampling(1.0, 5, 1.0, 0.25))) == [5, 6, 7]
    cold = law(logprobs, Sampling(0.5, 2, 1.0, 0.0))
    assert cold == pytest.approx({5: 0.8, 6: 0.2})
    for unknown in (Sampling(1.0, 6), Sampling(1.0, 0), Sampling(0.0, 5)):
        with pytest.raises(ValueError, match="no law"):
            law(logprobs, unknown)
