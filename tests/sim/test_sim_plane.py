"""500 seeds of the whole control plane, and what each mechanism is there for; `scripts/sim` runs more of the same."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator

import pytest
from simcluster import Violation
from simplane import CONTROLS, PlaneControls
from simrun import main, run, steady

N_SEEDS = 500
N_BLOCKS = 10
N_CONTROL = 400
SHOWN = ("n_admitted", "n_cut", "n_served", "n_edits", "n_torn", "n_executed")


@pytest.fixture(autouse=True)
def quiet_ledger() -> Iterator[None]:
    """Hundreds of torn lines are on purpose."""
    log = logging.getLogger("tightwad_agent.mesh.ledger")
    before, log.disabled = log.disabled, True
    yield
    log.disabled = before


@pytest.mark.parametrize("block", range(N_BLOCKS))
def test_seeds_keep_every_promise(block: int) -> None:
    n = N_SEEDS // N_BLOCKS
    seen: Counter[str] = Counter()
    for seed in range(n * block, n * block + n):
        cluster = run(seed)
        seen.update({name: getattr(cluster, name) for name in SHOWN})
        seen["checks"] += sum(cluster.n_checked.values())
    assert all(seen[name] for name in (*SHOWN, "checks"))  # the promises were put to the test at all


@pytest.mark.parametrize("name", [name for name in CONTROLS if name != "none"])
def test_without_a_mechanism_the_seeds_find_a_violation(name: str) -> None:
    found = (first_violation(seed, name) for seed in range(N_CONTROL))
    seed, text = next(((s, v) for s, v in enumerate(found) if v), (-1, ""))
    assert text, f"{N_CONTROL} seeds without {name}, and nothing was noticed"
    assert f"scripts/sim --seeds 1 --start {seed} --without {name}" in text
    assert first_violation(seed, name) == text  # it replays exactly


def first_violation(seed: int, without: str) -> str:
    """The text of what one seed found, or nothing."""
    try:
        run(seed, CONTROLS[without])
    except Violation as violation:
        return str(violation)
    return ""


def test_a_seed_runs_the_same_twice() -> None:
    first, second = run(7), run(7)
    assert list(first.trace) == list(second.trace)
    assert (first.n_events, first.n_admitted, first.n_cut) == (second.n_events, second.n_admitted, second.n_cut)


def test_loss_jitter_and_stalls_kill_nobody_in_a_calm_week() -> None:
    for seed in range(4):
        assert steady(seed, 600.0).deaths == []


def test_a_follower_that_stalled_looks_for_the_others_before_it_claims() -> None:
    """It wakes, all its links break, and of its coordinator it hears first that the process is gone."""
    assert run(3517).n_checked


@pytest.mark.parametrize(("seed", "at_s"), [(8, 868.9), (538, 1773.7), (11556, 174.3)])
def test_stalls_one_on_another_kill_nobody(seed: int, at_s: float) -> None:
    """A node stalls again within half a second after it woke; one stalls with the machine that could vouch for it,
    and its first messages afterwards are lost twice."""
    assert steady(seed, at_s + 20.0).deaths == []


def test_without_lateness_a_calm_week_has_deaths() -> None:
    with pytest.raises(Violation, match="dead"):
        a_calm_week(CONTROLS["lateness"])


def a_calm_week(controls: PlaneControls) -> None:
    for seed in range(50):
        steady(seed, 600.0, controls)


def test_the_script_reports_a_violation_and_its_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "3"]) == 0
    assert "3 seeds" in capsys.readouterr().out
    assert main(["--seeds", "60", "--without", "fencing"]) == 1
    out = capsys.readouterr().out
    assert "last events:" in out
    assert "reproduce: scripts/sim --seeds 1 --start" in out


def test_the_script_uses_several_processes_and_goes_on_after_a_violation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "100", "--jobs", "2", "--without", "fencing", "--keep-going"]) == 1
    assert "100 seeds" in capsys.readouterr().out
