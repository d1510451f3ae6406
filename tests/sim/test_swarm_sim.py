"""Promises of the piece protocol, held against simulated swarms; `scripts/sim-swarm` runs more of the same seeds."""

from __future__ import annotations

from typing import Any

import pytest
from simswarm import CONTROLS, MODEL, Blind, Planned, Rules, Violation, all_honest, main, make, run

from tightwad_agent.errors import PeerRefused
from tightwad_agent.swarm.peer import Conversation
from tightwad_agent.swarm.pieces import PieceTracker
from tightwad_agent.wire.swarm import Bye


@pytest.mark.parametrize("block", range(10))
def test_honest_nodes_end_with_the_right_bytes_whatever_the_others_do(block: int) -> None:
    swarms = [run(seed) for seed in range(block * 30, block * 30 + 30)]
    assert sum(node.whole.total() for swarm in swarms for node in swarm.honest()) > 300
    assert any(node.twice_asked for swarm in swarms for node in swarm.honest()), "there were endgames"


@pytest.mark.parametrize("name", [name for name in CONTROLS if name != "none"])
def test_without_a_mechanism_the_seeds_find_a_violation(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "100", "--without", name]) == 1
    said = capsys.readouterr().out
    assert f"--without {name}" in said
    seed = int(said.split(",")[0].removeprefix("seed "))
    with pytest.raises(Violation, match=f"seed {seed}, "):
        run(seed, CONTROLS[name])
    run(seed)  # with it, the same seed is well


def upload_of_the_seed(seed: int, tracker: type[PieceTracker]) -> float:
    """In files."""
    swarm = all_honest(seed, n_leechers=5, rules=Rules(tracker=tracker))
    return swarm.nodes["n00"].sent / sum(swarm.lengths)


@pytest.mark.parametrize(("control", "factor", "n"), [(Blind, 1.04, 6), (Planned, 2.0, 2)])
def test_a_seed_sends_more_without_copies_in_flight_or_rarity(
    control: type[PieceTracker], factor: float, n: int
) -> None:
    seeds = range(n)
    with_it = sum(upload_of_the_seed(seed, PieceTracker) for seed in seeds)
    without = sum(upload_of_the_seed(seed, control) for seed in seeds)
    assert without > factor * with_it, f"{without / len(seeds):.2f} files, {with_it / len(seeds):.2f} with it"


def test_leechers_feed_one_another() -> None:
    for seed in range(5):
        swarm = all_honest(seed, n_leechers=5)
        size = sum(swarm.lengths)
        assert all(n.done for n in swarm.nodes.values())
        assert swarm.nodes["n00"].sent < 3 * size, "one seed, five leechers: most came from the others"
        for node in list(swarm.nodes.values())[1:]:
            assert len(node.came) > 1


def test_equal_seeds_share_the_work() -> None:
    for seed in range(10):
        swarm = all_honest(seed, n_leechers=1, n_seeds=3)
        came = swarm.nodes["n03"].came
        assert len(came) == 3
        assert min(came.values()) > sum(swarm.lengths) / 10


def test_the_same_seed_gives_the_same_run() -> None:
    def story(seed: int) -> list[tuple[Any, ...]]:
        swarm = make(seed)
        swarm.run(until=600)
        return [(n.name, n.sent, sorted(n.came.items()), sorted(n.banned)) for n in swarm.nodes.values()] + [
            (swarm.now,)
        ]

    assert story(17) == story(17)


def test_the_script_says_what_it_saw(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "5", "--start", "900"]) == 0
    assert capsys.readouterr().out.startswith("5 seeds in ")


def test_a_bye_ends_it() -> None:
    talk = Conversation(MODEL, [1])
    with pytest.raises(PeerRefused):
        talk.handle(Bye("enough"), b"")
