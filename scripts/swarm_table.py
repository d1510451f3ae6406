"""What `scripts/bench swarm` makes of its samples: bounds, ratios, rows. Pure.

The bound of a makespan: one seed, N leechers, equal uplinks, M equal pieces that are forwarded whole. The last piece
leaves the seed in round M at the earliest; its two copies then at most double in each round, so floor(log2 N) more
rounds follow.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

MAKESPAN = {3: 1.08, 7: 1.12}
"""Of the bound, by number of leechers."""
UPLOAD = 1.3
"""What the first seed sends for seven leechers, in files."""
OTHERS_OF_A_SLOW_NODE = 1.25
LOOPBACK_MB_S = 600.0
OF_TLS_CEILING = 0.8
MAX_RSS_MB = 250.0
DECISIONS_PER_S = 50_000.0


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: a median of `n`. `ok` is None where nothing is promised; `note` says what a reader must know."""

    case: str
    value: float | None
    unit: str
    bound: float | None = None
    ok: bool | None = None
    n: int = 1
    note: str = ""


def fewest_rounds(n_leechers: int) -> int:
    """floor(log2 N): rounds after the last piece has left the seed. `ValueError` without a leecher."""
    if n_leechers < 1:
        raise ValueError("a makespan needs at least one leecher")
    return n_leechers.bit_length() - 1


def bound_s(n_bytes: int, bytes_per_s: float, n_leechers: int, n_pieces: int) -> float:
    """Seconds until `n_leechers` have a file of `n_pieces` equal pieces, at best: (F/B)(1 + floor(log2 N)/M)."""
    return n_bytes / bytes_per_s * (1 + fewest_rounds(n_leechers) / n_pieces)


def at_most(case: str, samples: Sequence[float], unit: str, bound: float | None = None, note: str = "") -> Row:
    """The median, which must not exceed the bound."""
    value = statistics.median(samples)
    return Row(case, round(value, 4), unit, bound, None if bound is None else value <= bound, len(samples), note)


def at_least(case: str, samples: Sequence[float], unit: str, bound: float | None = None, note: str = "") -> Row:
    """The median, which must reach the bound."""
    value = statistics.median(samples)
    return Row(case, round(value, 4), unit, bound, None if bound is None else value >= bound, len(samples), note)


def missing(case: str, why: str) -> Row:
    """A figure that could not be had."""
    return Row(case, None, "", note=why)


def either(case: str, samples: Sequence[tuple[float, float]], unit: str) -> Row:
    """Pairs of (figure, ceiling measured beside it): the figure must reach `LOOPBACK_MB_S`, or its share of the
    ceiling."""
    value = statistics.median(ours for ours, _ in samples)
    share = statistics.median(ours / ceiling for ours, ceiling in samples)
    ok = value >= LOOPBACK_MB_S or share >= OF_TLS_CEILING
    return Row(
        case, round(value, 1), unit, LOOPBACK_MB_S, ok, len(samples), f"{share:.2f} of the TLS ceiling beside it"
    )


def ratios(ours: Iterable[float], theirs: Iterable[float]) -> list[float]:
    """Pairwise: what was measured in one repeat belongs together."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def growth(few: int, many: int) -> float:
    """How much dearer a decision among `many` pieces may be than among `few`, if it grows with their logarithm."""
    return math.log(many) / math.log(few)


def row_of(plain: Mapping[str, Any]) -> Row:
    """A row from another module's figures; what it does not say is left open. Its bounds are what a value may be at
    most."""
    known = {name: plain[name] for name in Row.__dataclass_fields__ if name in plain}
    row = Row(**{"value": None, "unit": "", **known})
    if row.ok is not None or row.bound is None or row.value is None:
        return row
    return replace(row, ok=row.value <= row.bound)


def plain(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows for a program."""
    return [asdict(row) for row in rows]


def text(rows: Sequence[Row]) -> str:
    """The rows for a person."""
    width = max((len(row.case) for row in rows), default=0)
    return "\n".join(_line(row, width) for row in rows)


def _line(row: Row, width: int) -> str:
    value = "         -" if row.value is None else f"{row.value:10.3f}"
    goal = "" if row.bound is None else f"  bound {row.bound:g}: {'ok' if row.ok else 'MISSED'}"
    note = f"  ({row.note})" if row.note else ""
    return f"{row.case:{width}s} {value} {row.unit}{goal}{note}"
