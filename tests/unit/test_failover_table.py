"""The figures of `scripts/bench failover`, and what traces show."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from failover_ask import Asked, clear_tokens
from failover_table import Goal, deaths, latest_heartbeat_s, markdown, old_commands, percentile, plain, row, text
from soak_faults import LAST_S, MIN_CALM, REST_S, Fault, plan


def sample(s: float | None, problem: str = "", case: str = "killed") -> dict[str, Any]:
    return {"case": case, "s": s, "problem": problem}


def test_a_percentile_is_a_value_that_was_measured() -> None:
    fifty = [float(n) for n in range(1, 51)]
    assert percentile(fifty, 0.99) == 50
    assert percentile(fifty, 0.5) == 25
    assert percentile([float(n) for n in range(1, 201)], 0.99) == 198
    assert percentile([3.0], 0.99) == 3
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 0.5)


@pytest.mark.parametrize(
    ("goal", "values", "ok"),
    [
        (Goal("x", p99=1.0), [0.2, 0.3, 1.0], True),
        (Goal("x", p99=1.0), [0.2, 0.3, 1.01], False),
        (Goal("x", median=0.3), [0.2, 0.3, 9.0], True),
        (Goal("x", median=0.3, p99=5.0), [0.2, 0.3, 9.0], False),
        (Goal("x"), [0.2], None),
        (Goal("x", p99=1.0), [], None),
    ],
)
def test_bounds_hold_for_what_they_name(goal: Goal, values: list[float], ok: bool | None) -> None:
    made = row("killed", goal, [*(sample(v) for v in values), sample(99.0, case="another")])
    assert made.ok is ok
    assert made.n == len(values)


def test_a_run_that_did_not_end_well_keeps_no_bound() -> None:
    made = row("killed", Goal("x", p99=1.0), [sample(0.2), sample(None, "no coordinator")])
    assert (made.n, made.failed, made.ok, made.median) == (2, 1, False, 0.2)
    assert row("killed", Goal("x", p99=1.0), [sample(None, "no coordinator")]).ok is False


def test_tables_say_what_was_missed() -> None:
    rows = [
        row("killed", Goal("agent killed", p99=1.0), [sample(2.0), sample(None, "x")]),
        row("stopped", Goal("stopped", median=3.0), [sample(1.0, case="stopped")]),
        row("loaded", Goal("loaded"), []),
        row("flaps", Goal("flaps", p99=0, unit=""), [sample(0.0, case="flaps")]),
        row("rate", Goal("rate", unit=""), [sample(9.0, case="rate")]),
    ]
    said = text(rows)
    assert "bound 1 p99: MISSED  1 FAILED" in said
    assert "bound 3 median: ok" in said
    assert markdown(rows).splitlines()[2:] == [
        "| agent killed | 1 p99 | 2.00 s | 2.00 s | 2, 1 failed | MISSED |",
        "| stopped | 3 median | 1.00 s | 1.00 s | 1 | ok |",
        "| loaded |  | - | - | 0 |  |",
        "| flaps | 0 | 0.00 | 0.00 | 1 | ok |",
        "| rate |  | 9.00 | 9.00 | 1 |  |",
    ]
    assert plain(rows)[0]["worst"] == 2.0


def command(pid: int, counter: int, node: str, *, accepted: bool) -> dict[str, Any]:
    return {"pid": pid, "what": "command", "epoch": [counter, node], "obeyed": [9, "z"], "accepted": accepted}


def test_a_command_of_an_old_epoch_is_found() -> None:
    obeys = {"pid": 1, "what": "obeys", "epoch": [3, "b"], "who": "b"}
    fine = [command(1, 3, "b", accepted=True), obeys, command(1, 2, "a", accepted=False)]
    assert old_commands([*fine, command(2, 1, "a", accepted=True), {"what": "beat", "pid": 1}]) == []
    (first,) = old_commands([*fine, command(1, 2, "a", accepted=True)])
    assert "epoch 2 after 3" in first
    assert len(old_commands([obeys, command(1, 3, "a", accepted=True)])) == 1, "epochs of one count differ by the node"


def test_deaths_and_silence_are_counted() -> None:
    notes = [
        {"what": "state", "node": "a", "old": "suspect", "new": "dead"},
        {"what": "state", "node": "b", "old": None, "new": "dead"},
        {"what": "state", "node": "a", "old": "dead", "new": "alive"},
        {"what": "beat", "heard_ago_s": 1.5},
        {"what": "beat", "heard_ago_s": float("inf")},
    ]
    assert deaths(notes) == 1
    assert deaths(notes, of="b") == 0
    assert latest_heartbeat_s(notes) == pytest.approx(0.5)
    assert latest_heartbeat_s([]) == 0


def test_a_pause_is_the_longest_wait_that_ends_after_the_fault() -> None:
    asked = Asked(began=0.0, times=[5.0, 6.0, 9.0, 10.0])
    assert asked.pause_s(6.5) == 3
    assert asked.pause_s(0.0) == 5
    assert asked.pause_s(11.0) == 0
    asked.problem = "cut"
    assert asked.pause_s(0.0) == float("inf")


def test_an_answer_is_beyond_doubt_until_two_tokens_are_as_likely() -> None:
    sure, doubt = {"a": -0.1, "b": -3.0}, {"a": -0.7, "b": -0.9}
    flat = {"tokens": ["w", "x", "y", "z"], "top_logprobs": [sure, sure, doubt, sure]}
    assert clear_tokens({"choices": [{"logprobs": flat}]}) == ["w", "x"]
    tops = [
        {"token": "x", "top_logprobs": [{"logprob": -0.1}, {"logprob": -2.0}]},
        {"token": "y", "top_logprobs": [{"logprob": -0.1}]},
    ]
    assert clear_tokens({"choices": [{"logprobs": {"content": tops}}]}) == ["x", "y"]
    assert clear_tokens({"choices": [{"logprobs": {"content": tops}}]}, margin=2.0) == []


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("n_machines", [3, 4, 7])
def test_enough_machines_stay_calm(seed: int, n_machines: int) -> None:
    made = plan(seed, n_machines, 600)
    assert made == plan(seed, n_machines, 600)
    assert {d.fault for d in made} == set(Fault)
    assert all(d.at_s <= d.until_s <= 600 for d in made)
    assert all(d.until_s - d.at_s <= LAST_S[d.fault][1] + 0.02 for d in made)
    for d in made:
        at_once = {e.machine for e in made if e.at_s <= d.at_s <= e.until_s}
        assert len(at_once) <= n_machines - MIN_CALM
    for machine in range(n_machines):
        mine = [d for d in made if d.machine == machine]
        assert all(b.at_s - a.until_s >= REST_S - 0.02 for a, b in pairwise(mine))


def test_too_few_machines_are_named() -> None:
    with pytest.raises(ValueError, match="2 must stay calm"):
        plan(1, 2, 60)
