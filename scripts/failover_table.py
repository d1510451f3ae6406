"""What `scripts/bench failover` makes of its samples: medians, the 99th percentile, bounds, tables. Pure.

A sample is one run of one case: `s`, the seconds it took, or `problem`, why it did not end well; beside it facts of the
case. A run that did not end well counts: no bound is kept with one among them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Sample = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Goal:
    """What a case measures, in seconds unless `unit` says otherwise, and what must be reached; None: nothing is
    promised."""

    title: str
    median: float | None = None
    p99: float | None = None
    unit: str = "s"


@dataclass(frozen=True, slots=True)
class Row:
    """One case's figures. `failed` runs have no value; `ok` None where nothing is promised or nothing ran."""

    case: str
    title: str
    unit: str
    n: int
    failed: int
    median: float | None
    p99: float | None
    worst: float | None
    bound: str
    ok: bool | None
    note: str = ""


def percentile(values: Sequence[float], share: float) -> float:
    """By nearest rank: the smallest value that so large a share of all does not exceed. `ValueError` for none."""
    if not values:
        raise ValueError("a percentile of nothing")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def row(case: str, goal: Goal, samples: Iterable[Sample], note: str = "") -> Row:
    """A case's row."""
    mine = [s for s in samples if s["case"] == case]
    values = [s["s"] for s in mine if not s.get("problem")]
    failed = len(mine) - len(values)
    median = statistics.median(values) if values else None
    p99 = percentile(values, 0.99) if values else None
    kept = _kept(goal, median, p99)
    ok = None if kept is None or not mine else kept and not failed
    shown = [None if v is None else round(v, 3) for v in (median, p99, max(values, default=None))]
    return Row(case, goal.title, goal.unit, len(mine), failed, *shown, _bound(goal), ok, note)


def _kept(goal: Goal, median: float | None, p99: float | None) -> bool | None:
    """Whether what is promised was reached; None where nothing is."""
    pairs = [(value, most) for value, most in ((median, goal.median), (p99, goal.p99)) if most is not None]
    return all(value is not None and value <= most for value, most in pairs) if pairs else None


def _bound(goal: Goal) -> str:
    if not goal.unit:
        return "" if goal.p99 is None else f"{goal.p99:g}"
    named = [f"{most:g} {name}" for most, name in ((goal.median, "median"), (goal.p99, "p99")) if most is not None]
    return ", ".join(named)


def plain(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """For a program."""
    return [asdict(row) for row in rows]


def verdict(row: Row) -> str:
    return "" if row.ok is None else "ok" if row.ok else "MISSED"


def text(rows: Sequence[Row]) -> str:
    """For a person."""
    width = max((len(row.title) for row in rows), default=0)
    return "\n".join(_line(row, width) for row in rows)


def _line(row: Row, width: int) -> str:
    bound = f"  bound {row.bound}: {verdict(row)}" if row.bound else ""
    failed = f"  {row.failed} FAILED" if row.failed else ""
    note = f"  ({row.note})" if row.note else ""
    figures = f"{_figure(row.median):>8s} {_figure(row.p99):>8s} {row.unit:8s} n={row.n}"
    return f"{row.title:{width}s} {figures}{bound}{failed}{note}"


def markdown(rows: Sequence[Row]) -> str:
    """For docs/reliability.md."""
    head = "| what | wanted | median | p99 | runs | |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(_cells(row) for row in rows)


def _cells(row: Row) -> str:
    runs = f"{row.n}" + (f", {row.failed} failed" if row.failed else "")
    unit = f" {row.unit}" if row.unit else ""
    shown = [_figure(v) + (unit if v is not None else "") for v in (row.median, row.p99)]
    return f"| {row.title} | {row.bound} | {shown[0]} | {shown[1]} | {runs} | {row.note or verdict(row)} |"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# What traces show


def old_commands(notes: Iterable[Mapping[str, Any]]) -> list[str]:
    """Commands of a lower epoch than their receiver obeyed that it carried out all the same, in words. `notes` of
    `traced_agent.py`, in their order."""
    highest: dict[int, list[Any]] = {}  # what each process has obeyed
    broken = []
    for note in notes:
        if note["what"] not in ("command", "obeys"):
            continue
        pid, epoch = note["pid"], note["epoch"]
        before = highest.get(pid, [0, ""])
        if note.get("accepted") and epoch < before:
            broken.append(f"process {pid} carried out a command of epoch {epoch[0]} after {before[0]}")
        obeyed = note["what"] == "obeys" or note["accepted"]
        highest[pid] = max(before, epoch) if obeyed else before
    return broken


def deaths(notes: Iterable[Mapping[str, Any]], of: str | None = None) -> int:
    """How often a node was declared dead that was thought to live; `of`: that one only, by its id."""
    told = (n for n in notes if n["what"] == "state" and n["new"] == "dead" and n["old"] in ("alive", "suspect"))
    return sum(of is None or note["node"] == of for note in told)


def latest_heartbeat_s(notes: Iterable[Mapping[str, Any]], period_s: float = 1.0) -> float:
    """The longest silence of a living neighbour beyond the period of heartbeats."""
    heard = (note["heard_ago_s"] for note in notes if note["what"] == "beat")
    return max((ago - period_s for ago in heard if math.isfinite(ago)), default=0.0)
