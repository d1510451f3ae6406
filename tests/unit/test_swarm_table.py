"""Bounds, ratios and rows of the swarm's benchmark."""

from __future__ import annotations

import pytest
import swarm_table as table
from swarm_table import Row


@pytest.mark.parametrize(("n", "rounds"), [(1, 0), (2, 1), (3, 1), (4, 2), (7, 2), (8, 3), (15, 3)])
def test_copies_double_in_each_round_after_the_last_piece_left(n: int, rounds: int) -> None:
    assert table.fewest_rounds(n) == rounds


def test_a_makespan_needs_somebody_to_send_to() -> None:
    with pytest.raises(ValueError, match="at least one leecher"):
        table.fewest_rounds(0)


@pytest.mark.parametrize(
    ("n", "pieces", "seconds"),
    [
        (1, 10, 20.0),  # the bare file
        (3, 10, 22.0),  # and one round of ten
        (7, 10, 24.0),
        (7, 1, 60.0),  # a file of one piece: three rounds of the whole
        (3, 1000, 20.02),
    ],
)
def test_the_bound_of_a_makespan(n: int, pieces: int, seconds: float) -> None:
    assert table.bound_s(500_000_000, 25e6, n, pieces) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("samples", "bound", "ok"), [([1.0, 1.2, 1.05], 1.08, True), ([1.09], 1.08, False), ([1.08], 1.08, True)]
)
def test_a_median_that_must_not_exceed(samples: list[float], bound: float, ok: bool) -> None:
    row = table.at_most("case", samples, "s", bound)
    assert (row.ok, row.n) == (ok, len(samples))


@pytest.mark.parametrize(("samples", "ok"), [([49_000.0, 51_000.0, 52_000.0], True), ([49_999.0], False)])
def test_a_median_that_must_be_reached(samples: list[float], ok: bool) -> None:
    assert table.at_least("case", samples, "per s", 50_000).ok is ok


def test_without_a_bound_nothing_is_promised() -> None:
    assert table.at_most("case", [3.0], "s").ok is None
    assert table.at_least("case", [3.0], "s").ok is None


@pytest.mark.parametrize(
    ("ours", "ceiling", "ok"),
    [(650.0, 2000.0, True), (400.0, 500.0, True), (400.0, 501.0, False), (599.0, 900.0, False)],
)
def test_loopback_is_held_against_the_machine_where_that_is_the_limit(ours: float, ceiling: float, ok: bool) -> None:
    assert table.either("case", [(ours, ceiling)], "MB/s").ok is ok


def test_the_share_of_the_ceiling_pairs_what_was_measured_together() -> None:
    """The machine was half as fast in two of three repeats: medians of each by itself would give 1.0 and 0.5."""
    row = table.either("case", [(400, 500), (200, 250), (200, 1000)], "MB/s")
    assert "0.80 of the TLS ceiling" in row.note


def test_ratios_pair_repeats() -> None:
    assert table.ratios([2, 6], [1, 2]) == [2, 3]
    with pytest.raises(ValueError, match="shorter"):
        table.ratios([1, 2], [1])


def test_a_decision_may_grow_with_the_logarithm_of_the_pieces() -> None:
    assert table.growth(10, 1000) == pytest.approx(3.0)
    assert table.growth(3_000, 30_000) == pytest.approx(1.2876, abs=1e-4)


def test_rows_of_other_modules_are_taken_as_far_as_they_say_something() -> None:
    assert table.row_of({"case": "a", "value": 2.0, "unit": "%", "ok": True, "more": 1}) == Row("a", 2.0, "%", ok=True)
    assert table.row_of({"case": "b", "bound": 1.0}) == Row("b", None, "", 1.0)
    assert table.row_of({"case": "c", "value": 1.04, "unit": "x", "bound": 1.05}).ok is True
    assert table.row_of({"case": "c", "value": 1.06, "unit": "x", "bound": 1.05}).ok is False
    assert table.row_of({"case": "c", "value": 1.06, "unit": "x"}).ok is None


def test_the_table_names_what_was_missed_and_what_is_missing() -> None:
    rows = [
        table.at_most("makespan / bound", [1.2], "", 1.08, "in namespaces"),
        table.at_least("decisions", [60_000], "per s", 50_000),
        table.missing("libtorrent / ours", "cannot be installed"),
    ]
    first, second, third = table.text(rows).splitlines()
    assert "1.200" in first
    assert "bound 1.08: MISSED  (in namespaces)" in first
    assert "bound 50000: ok" in second
    assert third.split() == ["libtorrent", "/", "ours", "-", "(cannot", "be", "installed)"]
    assert table.text([]) == ""


def test_rows_for_a_program() -> None:
    rows = table.plain([table.at_most("a", [1.0, 3.0], "s", 2.5, "b")])
    assert rows[0] == {"case": "a", "value": 2.0, "unit": "s", "bound": 2.5, "ok": True, "n": 2, "note": "b"}
