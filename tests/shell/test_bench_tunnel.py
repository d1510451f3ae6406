"""The tunnel benchmark runs: processes, certificates, both kinds of tunnel. What it finds is not judged here."""

from __future__ import annotations

import bench_tunnel
from bench_tunnel import DIRECT, OURS, OURS_GRAPHS, PLAIN, Extent


def test_every_way_is_measured() -> None:
    figures = bench_tunnel.measure(Extent(repeats=1, n_rounds=50, n_through=8 << 20))
    found = {f.case: f for f in figures}
    assert len(found) == 16
    assert all(f.value > 0 or "processor time" in f.case for f in figures), figures
    for way in (PLAIN, OURS, OURS_GRAPHS):
        assert found[f"{way}: added to a round trip"].unit == "ms"
    promised = [f.case for f in figures if f.bound is not None]
    assert promised == [
        f"{way}: {what}" for way in (OURS, OURS_GRAPHS) for what in ("added to a round trip", "throughput one way")
    ]
    sent, crossed = (found[f"{way}: towards the worker in a round with a graph"] for way in (OURS, OURS_GRAPHS))
    assert crossed.value < sent.value / 5
    assert found[f"{DIRECT}: throughput one way"].value > found[f"{PLAIN}: throughput one way"].value
