"""A short `scripts/soak`: three real agents, five minutes of kills, stalls and cuts, and no request lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from failover_ask import Asked
from failover_bench import Prompt
from soak import report, soak

pytestmark = [pytest.mark.netns, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1200)]

SEED = 4
MINUTES = 5.0
CLIENTS = 2
"""At each node; together more than the engine has slots, so that requests wait for their turn, too."""


@pytest.fixture(scope="module")
def found(engine_dir: Path, demo_model: Path) -> dict[str, Any]:
    return soak(engine_dir, demo_model, minutes=MINUTES, seed=SEED, n_agents=3, clients=CLIENTS, n_prompts=3)


def test_no_request_fails_but_at_a_killed_nodes_own_port(found: dict[str, Any]) -> None:
    print(report(found))
    assert not found["failures"], "\n".join([*found["log"], *map(str, found["failures"]), *found["tails"].values()])
    assert set(found["asked"]) == {"box-1", "box-2", "box-3"}
    assert found["good"] >= 3


def test_machines_were_disturbed_in_each_way_and_obeyed_no_old_command(found: dict[str, Any]) -> None:
    said = " ".join(found["log"])
    for what in (" killed", " stopped", " cut off", " goes on", " is back on the network", " started again"):
        assert what in said
    assert found["old_commands"] == []


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Asked(text="one two three", usage=3), ""),
        (Asked(text="one three", usage=2), "at character 5 of 13"),
        (Asked(text="one two two three", usage=4), "at character 9 of 13"),
        (Asked(text="one two three", usage=4), "4 tokens are counted, not 3"),
        (Asked(text="one two three", problem="the stream ended before its end"), "ended before its end"),
    ],
)
def test_an_answer_that_is_not_the_undisturbed_one_is_found(answer: Asked, why: str) -> None:
    said = Prompt({"prompt": "Count."}, 3, "one two three").differs(answer)
    assert (said == "") == (why == "")
    assert why in said
