"""From samples of the speculation benchmark to its ratios, goals and differences."""

from __future__ import annotations

from typing import Any

import pytest
import speculation_table as table
from speculation_table import LOCAL, MESH, POOL, SPECULATION, VERIFIER, WITHOUT_MESH, Ratio, Sample


def sample(way: str, tokens_per_s: float, *, n: int = 11, **place: Any) -> Sample:
    """`n` tokens; the first is not timed."""
    tokens = place.pop("tokens", tuple(range(n)))
    facts = {"rtt_ms": 10.0, "repeat": 0, "prompt": 0, "prompt_s": 0.5, **place}
    return Sample(way=way, tokens=tokens, generate_s=(len(tokens) - 1) / tokens_per_s, **facts)


def found(samples: list[Sample], what: str) -> Ratio:
    (ratio,) = [r for r in table.ratios(samples) if r.what == what]
    return ratio


def test_a_rate_is_of_all_prompts_of_a_repeat_together() -> None:
    samples = [sample(POOL, 10.0, prompt=0, n=11), sample(POOL, 20.0, prompt=1, n=41)]
    assert table.rates(samples, POOL, 10.0) == {0: pytest.approx(50 / 3)}


def test_rates_of_other_ways_round_trips_and_concurrent_streams_are_left_out() -> None:
    samples = [
        sample(POOL, 10.0),
        sample(VERIFIER, 99.0),
        sample(POOL, 99.0, rtt_ms=20.0),
        sample(POOL, 99.0, n_streams=4),
    ]
    assert table.rates(samples, POOL, 10.0) == {0: pytest.approx(10)}


def test_a_ratio_pairs_the_rates_of_one_repeat() -> None:
    """The machine was half as fast in the second and third repeat: medians of each way by itself would say 1."""
    speeds = [(10, 20), (5, 10), (5, 20)]
    samples = [
        s
        for i, (base, ours) in enumerate(speeds)
        for s in (sample(POOL, base, repeat=i), sample(VERIFIER, ours, repeat=i))
    ]
    assert table.ratio(samples, VERIFIER, POOL, 10.0) == pytest.approx(2.0)


def test_the_best_local_draft_counts() -> None:
    samples = [
        sample(POOL, 10),
        sample(LOCAL.format(3), 15),
        sample(LOCAL.format(8), 18),
        sample(LOCAL.format(16), 17),
        sample(SPECULATION, 36),
    ]
    assert table.best_local(samples, 10.0) == LOCAL.format(8)
    best = found(samples, f"{SPECULATION} / {LOCAL.format(8)}")
    assert (best.value, best.goal, best.ok) == (pytest.approx(2.0), 1.6, True)
    pool = found(samples, f"{SPECULATION} / {POOL}")
    assert (pool.value, pool.goal, pool.ok) == (pytest.approx(3.6), 2.8, True)


def test_goals_are_those_of_the_round_trip_and_a_missed_one_says_so() -> None:
    samples = [sample(POOL, 10, rtt_ms=20.0), sample(SPECULATION, 35, rtt_ms=20.0)]
    assert found(samples, f"{SPECULATION} / {POOL}").ok is False
    assert "MISSED" in table.text(samples)
    samples = [sample(POOL, 10, rtt_ms=7.0), sample(SPECULATION, 35, rtt_ms=7.0)]
    assert found(samples, f"{SPECULATION} / {POOL}").ok is None


def test_bad_drafters_are_held_against_the_verifier_without_drafts() -> None:
    samples = [sample(VERIFIER, 10), sample(table.WRONG, 9.6), sample(table.POOR, 12.5)]
    assert found(samples, f"{table.WRONG} / {VERIFIER}").ok is False
    assert found(samples, f"{table.POOR} / {VERIFIER}").ok is True


def test_streams_at_once_are_totalled_over_their_common_time() -> None:
    alone = sample(VERIFIER, 10)
    at_once = [sample(VERIFIER, speed, n_streams=4, prompt=i) for i, speed in enumerate((5, 5, 5, 4))]
    assert table.total_rate(at_once) == pytest.approx(4 * 10 / 2.5)
    assert found([alone, *at_once], f"{VERIFIER}: 4 streams / 1").value == pytest.approx(1.6)
    uneven = found([alone, *at_once], f"{VERIFIER}: fastest / slowest of 4")
    assert (uneven.value, uneven.ok) == (pytest.approx(1.25), True)


def test_a_stream_that_began_later_stretches_the_common_time() -> None:
    early, late = sample(VERIFIER, 10, n_streams=2, began_s=0.0), sample(VERIFIER, 10, n_streams=2, began_s=1.0)
    assert table.total_rate([early, late]) == pytest.approx(20 / 2.0)


def test_cpu_is_scaled_to_fifty_tokens_a_second() -> None:
    samples = [sample(SPECULATION, 20, n=50, cpu_s=0.04)]
    cpu = found(samples, "CPU of the agent's process at 50 tokens/s, % of a core")
    assert (cpu.value, cpu.ok) == (pytest.approx(4.0), True)
    assert found([sample(SPECULATION, 20, n=50, cpu_s=0.06)], cpu.what).ok is False


def test_agents_are_compared_with_the_same_machines_without_them_and_with_nothing_else() -> None:
    samples = [sample(WITHOUT_MESH, 20), sample(MESH, 19), sample(SPECULATION, 40), sample(POOL, 10)]
    mesh = found(samples, f"{MESH} / {WITHOUT_MESH}")
    assert (mesh.value, mesh.goal, mesh.ok) == (pytest.approx(0.95), 0.95, True)
    assert [r.what for r in table.ratios(samples) if MESH in r.what] == [mesh.what]
    assert found([sample(WITHOUT_MESH, 20), sample(MESH, 18.9)], mesh.what).ok is False


def test_without_samples_there_is_a_table_all_the_same() -> None:
    assert "ratios" in table.text([])


def test_answers_that_differ_are_named_with_the_place() -> None:
    samples = [
        sample(VERIFIER, 10, tokens=(1, 2, 3, 4)),
        sample(POOL, 10, tokens=(1, 2, 5, 4)),
        sample(POOL, 10, tokens=(7, 8), prompt=1),
        sample(VERIFIER, 10, tokens=(7, 8), prompt=1),
    ]
    (difference,) = table.different(samples)
    assert (difference["way"], difference["reference"], difference["at"]) == (VERIFIER, POOL, 2)
    assert (difference["tokens"], difference["expected"]) == ((3, 4), (5, 4))


def test_an_answer_that_ends_early_differs() -> None:
    (difference,) = table.different([sample(POOL, 10, tokens=(1, 2, 3)), sample(VERIFIER, 10, tokens=(1, 2))])
    assert difference["at"] == 2


def test_acceptance_is_of_all_drafted_tokens() -> None:
    samples = [sample(SPECULATION, 1, drafted=30, accepted=20), sample(SPECULATION, 1, drafted=10, accepted=10)]
    assert table.acceptance(samples, SPECULATION, 10.0) == 0.75
    assert table.acceptance(samples, POOL, 10.0) is None
    assert "(75)" in table.text(samples)
