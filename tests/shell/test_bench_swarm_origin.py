"""The bench of the origin, with a small file: its rows hold what they promise."""

from __future__ import annotations

import bench_swarm_origin
import pytest


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_swarm_origin, "SIZE_BYTES", 20 << 20)
    rows = bench_swarm_origin.run_origin()
    assert all(set(row) == {"case", "value", "unit", "bound"} for row in rows)
    bounded = [row for row in rows if row["bound"] is not None]
    assert len(bounded) == 3
    assert all(1.0 <= row["value"] <= row["bound"] for row in bounded), rows
