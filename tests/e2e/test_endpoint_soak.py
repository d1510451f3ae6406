"""Requests of all kinds at two real agents, verifier and drafter included: what is open afterwards, and what is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from endpoint_lab import Pair, running_pair, stream
from endpoint_soak import CONTEXT, KINDS, OPEN, Memory, Soak, slope, tiny_pair

N_REQUESTS = 300
SEED = 20
SLOTS = 4


@pytest.fixture(scope="module")
def pair(engine_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    target, draft = tiny_pair(tmp_path_factory.mktemp("models"))
    with running_pair(target, draft, context=CONTEXT, engine=engine_dir) as made:
        yield made


@pytest.mark.engine
@pytest.mark.slow
def test_the_window_shows_what_is_open_while_it_is(pair: Pair) -> None:
    """Otherwise nothing would be found open, whatever is. The first request of all: nobody knows the drafter yet."""
    seen: list[dict[str, int]] = []

    def look(_event: object) -> bool:
        seen.append({**pair.window(pair.serving)["live"], **pair.window(pair.drafting)["live"]})
        return True

    asked = {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 1500, "ignore_eos": True}
    stream(pair.serving, asked, until=look)
    kinds = {"VerifierGeneration", "Speculation", "Branch", "Run", "Exchange", "OpenRequest", "LinkSession", "_Session"}
    assert kinds <= {kind.rsplit(".", 1)[1] for kind in OPEN if seen[0].get(kind)}


@pytest.mark.engine
@pytest.mark.slow
def test_nothing_stays_open_after_requests_of_all_kinds(pair: Pair) -> None:
    print(f"seed {SEED}")
    soak = Soak(pair, N_REQUESTS, SEED)
    soak.run()
    assert soak.wrong == []
    assert set(soak.made) == set(KINDS)
    assert soak.made.total() == N_REQUESTS
    assert soak.left() == {}
    assert soak.slots_taken(SLOTS) == 0
    assert soak.left() == {}


def test_the_slope_leaves_the_warm_up_out() -> None:
    warm = [Memory(n, 1000 * n, 0, 0) for n in range(1, 20)]
    flat = [Memory(n, 20_000 + 3 * n, 7, 0) for n in range(20, 101)]
    assert slope([*warm, *flat], "serving") == pytest.approx(3)
    assert slope([*warm, *flat], "drafting") == 0
