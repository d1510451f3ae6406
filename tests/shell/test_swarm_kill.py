"""SIGKILL at random moments of a real process that fetches a model; `scripts/kills` does the same for long."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import swarm_kills as kills


@pytest.mark.slow
@pytest.mark.parametrize(("n_files", "n_kills"), [(1, 10), (3, 6)])
def test_kill_at_random_moments_and_damage_before_restarts(tmp_path: Path, n_files: int, n_kills: int) -> None:
    outcome = kills.kill_many(tmp_path, kills.model_of(72, n_files), n_kills, seed=4)
    assert outcome.killed == n_kills
    assert outcome.resumed, "at least once it went on from what was there"
    assert len(outcome.damages) >= 3


def test_what_is_lost_is_noticed(tmp_path: Path) -> None:
    """Negative control: a journal that is lost unseen looks like pieces that were not durable."""

    def forgets(left: kills.Left, rng: random.Random) -> None:
        good = set(left.good)
        kills.lost_state(left, rng)
        left.good = good

    with pytest.raises(AssertionError, match=r"seed 9, after \d+ kills: .* (missing|lost)"):
        kills.kill_many(tmp_path, kills.model_of(72, 1), 16, seed=9, damages=(forgets,))
