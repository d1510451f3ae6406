"""Sums over requests, and the page that Prometheus reads, read back with its own parser."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from tightwad_agent.proxy.families import page
from tightwad_agent.proxy.metrics import MetricsView, WorkerTraffic
from tightwad_agent.proxy.ports import Timings
from tightwad_agent.proxy.tally import MAX_DRAFTERS, MAX_POSITIONS, OTHERS, Tally, shares

HOSTILE = 'a "quoted"\n\\name{}\x1b ünï 🙂'


def timings(**more: object) -> Timings:
    told = {
        "n_prompt": 10,
        "n_cached": 4,
        "n_generated": 30,
        "prompt_ms": 250.0,
        "generate_ms": 1000.0,
        "rounds": 8,
        "drafted": 20,
        "accepted": 15,
        "tried_at": [8, 7, 5],
        "accepted_at": [8, 5, 2],
        "verify_ms": 800.0,
        "draft_ms": 400.0,
        "waited_ms": 100.0,
        "drafters": {"cellar": 18, "n-gram": 2},
    }
    return Timings(**told | more)


# Sums


def test_requests_add_up() -> None:
    tally = Tally()
    tally.generated(timings())
    tally.generated(timings(tried_at=[1], accepted_at=[1], drafters={"attic": 1, "cellar": 1}))
    for status in (200, 206, 400, 503):
        tally.answered(status)
    assert tally == Tally(
        requests={"2xx": 2, "4xx": 1, "5xx": 1},
        n_prompt=20,
        n_cached=8,
        n_generated=60,
        rounds=16,
        drafted=40,
        accepted=30,
        tried_at=[9, 7, 5],
        accepted_at=[9, 5, 2],
        prompt_ms=500.0,
        generate_ms=2000.0,
        verify_ms=1600.0,
        draft_ms=800.0,
        waited_ms=200.0,
        drafters={"cellar": 19, "n-gram": 2, "attic": 1},
    )


def test_what_follows_from_the_sums() -> None:
    tally = Tally()
    tally.generated(timings())
    assert tally.acceptance_at == (1.0, 5 / 7, 0.4)
    assert tally.tokens_per_round == 23 / 8
    assert tally.hidden == 0.75
    empty = Tally()
    assert (empty.acceptance_at, empty.tokens_per_round, empty.hidden) == ((), None, None)
    assert Tally(draft_ms=1.0, waited_ms=3.0).hidden == 0.0


def test_shares_end_with_the_last_position_that_was_tried() -> None:
    assert shares([4, 0, 2, 0], [3]) == (0.75, None, 0.0)
    assert shares([], [1]) == ()


def test_a_snapshot_stays_as_it_is() -> None:
    tally = Tally()
    tally.generated(timings())
    before = tally.snapshot()
    tally.generated(timings())
    tally.answered(200)
    assert before.tried_at == [8, 7, 5]
    assert before.drafters == {"cellar": 18, "n-gram": 2}
    assert before.requests == {}


def test_what_other_machines_name_is_bounded() -> None:
    tally = Tally()
    for n in range(MAX_DRAFTERS + 10):
        tally.generated(timings(drafters={f"node-{n}": 1}, tried_at=[1] * 500, accepted_at=[1] * 500))
    assert len(tally.drafters) == MAX_DRAFTERS + 1
    assert tally.drafters[OTHERS] == 10
    assert len(tally.tried_at) == len(tally.accepted_at) == MAX_POSITIONS
    tally.generated(timings(drafters={"node-0": 5}))
    assert tally.drafters["node-0"] == 6


# The page


def tallied() -> Tally:
    tally = Tally()
    tally.generated(timings())
    tally.answered(200)
    tally.answered(503)
    tally.paused(4.5)
    tally.paused(1.5)
    return tally


FULL = MetricsView(
    version="0.1.0",
    llama_cpp="b11434",
    tally=tallied(),
    engine="verifier",
    model=HOSTILE,
    is_ready=True,
    coordinating=True,
    in_flight=3,
    pool_restarts=2,
    workers=(WorkerTraffic("cellar", 1000, 2000), WorkerTraffic("attic", 1, 2), WorkerTraffic("attic", 10, 20)),
    peers={"alive": 3, "dead": 1},
    transfers={"fetching": 1},
)


def samples(view: MetricsView) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = list(text_string_to_metric_families(page(view).decode()))
    found = [(s.name, frozenset(s.labels.items()), s.value) for family in families for s in family.samples]
    assert len(found) == len({(name, labels) for name, labels, _ in found}), "one value for each name and labels"
    return {(name, labels): value for name, labels, value in found}


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("tightwad_build_info", {"version": "0.1.0", "llama_cpp": "b11434"}, 1),
        ("tightwad_serving_info", {"engine": "verifier", "model": HOSTILE}, 1),
        ("tightwad_ready", {}, 1),
        ("tightwad_coordinating", {}, 1),
        ("tightwad_requests_in_flight", {}, 3),
        ("tightwad_requests_total", {"status": "2xx"}, 1),
        ("tightwad_requests_total", {"status": "5xx"}, 1),
        ("tightwad_prompt_tokens_total", {}, 10),
        ("tightwad_prompt_tokens_cached_total", {}, 4),
        ("tightwad_generated_tokens_total", {}, 30),
        ("tightwad_prompt_seconds_total", {}, 0.25),
        ("tightwad_generate_seconds_total", {}, 1.0),
        ("tightwad_rounds_total", {}, 8),
        ("tightwad_draft_tokens_total", {}, 20),
        ("tightwad_draft_tokens_accepted_total", {}, 15),
        ("tightwad_draft_position_tokens_total", {"position": "1"}, 8),
        ("tightwad_draft_position_tokens_total", {"position": "3"}, 5),
        ("tightwad_draft_position_tokens_accepted_total", {"position": "2"}, 5),
        ("tightwad_verify_seconds_total", {}, 0.8),
        ("tightwad_draft_seconds_total", {}, 0.4),
        ("tightwad_draft_wait_seconds_total", {}, 0.1),
        ("tightwad_drafter_tokens_total", {"drafter": "cellar"}, 18),
        ("tightwad_drafter_tokens_total", {"drafter": "n-gram"}, 2),
        ("tightwad_pool_restarts_total", {}, 2),
        ("tightwad_resumed_answers_total", {}, 2),
        ("tightwad_paused_seconds_total", {}, 6.0),
        ("tightwad_longest_pause_seconds", {}, 4.5),
        ("tightwad_worker_sent_bytes_total", {"worker": "cellar"}, 1000),
        ("tightwad_worker_received_bytes_total", {"worker": "cellar"}, 2000),
        ("tightwad_worker_sent_bytes_total", {"worker": "attic"}, 11),
        ("tightwad_worker_received_bytes_total", {"worker": "attic"}, 22),
        ("tightwad_peers", {"state": "alive"}, 3),
        ("tightwad_transfers", {"state": "fetching"}, 1),
    ],
)
def test_each_figure_is_on_the_page(name: str, labels: dict[str, str], value: float) -> None:
    assert samples(FULL)[name, frozenset(labels.items())] == value


def test_names_and_helps_keep_the_conventions() -> None:
    text = page(FULL).decode()
    assert text.endswith("\n")
    families = list(text_string_to_metric_families(text))
    own = [f for f in families if f.name.startswith("tightwad_")]
    assert {f.name.partition("_")[0] for f in families} == {"tightwad", "process"}
    assert len(own) > 20
    for family in own:
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "gauge")
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")


def test_nothing_served_is_a_page_too() -> None:
    found = samples(MetricsView(version="0", llama_cpp=""))
    assert found["tightwad_rounds_total", frozenset()] == 0
    assert found["tightwad_ready", frozenset()] == 0
    assert not [name for name, _ in found if name == "tightwad_serving_info"]


def test_two_pages_do_not_add_up() -> None:
    assert samples(FULL)["tightwad_rounds_total", frozenset()] == samples(FULL)["tightwad_rounds_total", frozenset()]


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_name_comes_back_whole(name: str) -> None:
    view = MetricsView(version="0", llama_cpp="", workers=[WorkerTraffic(name, 1, 2)])
    assert samples(view)["tightwad_worker_sent_bytes_total", frozenset({("worker", name)})] == 1


def test_the_library_is_loaded_by_the_first_page_only() -> None:
    program = (
        "import sys; from tightwad_agent.proxy import app, metrics\n"
        "assert not [m for m in sys.modules if m.startswith('prometheus')]\n"
        "app.metrics_page(metrics.MetricsView(version='0', llama_cpp=''))\n"
        "assert 'prometheus_client' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
