"""`scripts/bench swarm`, as small as it gets: real nodes in real network namespaces. Nothing here is timed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_swarm
import psutil
import pytest
import swarm_bench
import swarm_memory
import swarm_table
from swarm_lab import Children, Nodes, SwarmLabError

from tightwad_agent.swarm.gguf import parse
from tightwad_agent.swarm.manifest import MIN_PIECE_BYTES
from tightwad_agent.swarm.store import Store

ROOT = Path(__file__).parents[2]
SIZE_MB = 20


def bench(*flags: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, ROOT / "scripts" / "benchmarks.py", "swarm", *flags]
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "scripts"), **(env or {})}
    return subprocess.run(argv, capture_output=True, text=True, timeout=280, check=False, env=environ)


def test_help_names_cases_and_options() -> None:
    done = bench("--help")
    assert done.returncode == 0
    assert all(case in done.stdout for case in bench_swarm.CASES)


def test_an_unknown_case_is_named() -> None:
    done = bench("--cases", "makespan,warp")
    assert done.returncode == 2
    assert "warp" in done.stderr


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = bench("--cases", "loopback", "--dir", str(tmp_path), env={"TIGHTWAD_TEST_F32": "/nowhere.gguf"})
    assert done.returncode == 1
    assert "TIGHTWAD_TEST_F32" in done.stderr


def test_decisions_without_namespaces() -> None:
    done = bench("--cases", "decisions", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {row["unit"] for row in rows} == {"per s", ""}
    assert all(row["value"] > 0 for row in rows)


def test_virtual_time_knows_lines_and_a_slow_node() -> None:
    """No line can be beaten, the slow node's file needs the time of its own line, and nobody waits for it."""
    done = bench("--cases", "virtual", "--leechers", "2", "--size", str(SIZE_MB), "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    plain, sent, others = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert 1.0 < plain["value"] < 2.0
    assert 1.0 <= sent["value"] <= 2.0
    assert 1.0 < others["value"] < 2.5


def test_rows_of_a_module_that_is_not_there_say_so(tmp_path: Path) -> None:
    made = bench_swarm.Bench(bench_swarm.options_of(bench_swarm.parse([])), tmp_path)
    bench_swarm.from_module("no_such_bench", "run")(made)
    assert made.rows[0].value is None
    assert "no_such_bench" in made.rows[0].note


def test_rows_of_another_module_get_their_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "its_bench.py").write_text(
        'def run(): return [{"case": "bytes", "value": 2.0, "unit": "%", "bound": 3.0}]\n'
        'def fail(): raise KeyError("TIGHTWAD_TEST_ENGINE")\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    made = bench_swarm.Bench(bench_swarm.options_of(bench_swarm.parse([])), tmp_path)
    bench_swarm.from_module("its_bench", "run")(made)
    assert made.rows == [swarm_table.Row("bytes", 2.0, "%", 3.0, ok=True)]
    with pytest.raises(SwarmLabError, match="TIGHTWAD_TEST_ENGINE"):
        bench_swarm.from_module("its_bench", "fail")(made)


@pytest.mark.netns
@pytest.mark.slow
def test_a_tiny_run(tmp_path: Path) -> None:
    small = ("--leechers", "2", "--size", str(SIZE_MB), "--repeats", "1", "--rate", "400")
    out, trace = tmp_path / "out.json", tmp_path / "trace"
    done = bench(
        "--cases", "makespan", *small, "--dir", str(tmp_path), "--trace", str(trace), "--json", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: Any = json.loads(done.stdout.splitlines()[-1])
    assert json.loads(out.read_text()) == result
    assert "stolen_percent" in result["environment"]
    check_transfer(next(s for s in result["samples"] if s["case"] == "makespan"))
    rows = {row["case"].partition(": ")[2]: row for row in result["rows"]}
    assert rows["makespan"]["value"] > 0
    assert 0.9 <= rows["sent by the first seed"]["value"] <= 2.1
    assert rows["sent to each in turn, plain TCP / ours"]["value"] > 0
    pieces = sorted({piece for _, what, piece, _ in traced(trace / "0" / "trace-1.jsonl") if what == "here"})
    assert pieces == list(range(result["samples"][0]["pieces"]))
    assert {piece for _, what, piece, _ in traced(trace / "0" / "trace-0.jsonl") if what == "read"} <= set(pieces)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "trace"]
    assert left_in(tmp_path) == []


def traced(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_transfer(sample: dict[str, Any]) -> None:
    """Each leecher got the file once, from the others; what one node counts as sent is what others counted as got."""
    size, leechers = sample["size"], {"1", "2"}
    assert sample["complete_s"].keys() == sample["fetched_s"].keys() == leechers
    assert all(sample["fetched_s"][i] <= sample["complete_s"][i] for i in leechers)
    assert all(sum(sample["sources"][i].values()) == size for i in leechers)
    assert sum(sample["uploaded"].values()) >= 2 * size
    assert sample["sources"]["0"] == {}
    assert sample["goodput_mb_s"] < 400 / 8 * 1.1
    assert all(seconds > 0 for seconds in sample["cpu_s"].values())
    expected = swarm_table.bound_s(size, sample["goodput_mb_s"] * 1e6, 2, sample["pieces"])
    assert sample["bound_s"] == pytest.approx(expected)


@pytest.mark.netns
@pytest.mark.slow
def test_nobody_waits_for_the_slow_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_swarm, "N_SLOW", 2)
    monkeypatch.setattr(bench_swarm, "SLOWER", 1000)  # what it has to fetch would take it minutes
    monkeypatch.setattr(bench_swarm, "GOODPUT_S", 0.2)
    asked = bench_swarm.parse(["--size", "8", "--rate", "400", "--repeats", "1"])
    made = bench_swarm.Bench(bench_swarm.options_of(asked), tmp_path)
    bench_swarm.slow(made)
    assert made.samples[0]["complete_s"].keys() == {1}
    assert made.rows[0].value == pytest.approx(
        made.samples[0]["complete_s"][1] / made.samples[0]["others_bound_s"], rel=1e-3
    )


def test_loopback_without_namespaces(tmp_path: Path) -> None:
    done = bench("--cases", "loopback", "--repeats", "1", "--size", "8", "--dir", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {row["case"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}
    assert len(rows) == 4
    assert all(row["value"] > 0 for row in rows.values())


@pytest.mark.slow
def test_a_model_larger_than_what_is_moved_is_measured_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm_memory, "PIECE", 1 << 20)
    monkeypatch.setattr(swarm_memory, "N_MANIFEST", 500)
    monkeypatch.setattr(swarm_memory, "N_HERE", 20)
    monkeypatch.setattr(swarm_memory, "MAX_MOVED", 1)
    made = bench_swarm.Bench(bench_swarm.options_of(bench_swarm.parse(["--big", "1", "--big-seconds", "60"])), tmp_path)
    bench_swarm.memory(made)
    assert [row.unit for row in made.rows] == ["MB"] * 4
    assert all(row.value is not None and row.value > 10 for row in made.rows)
    assert [s["moved"] > 0 for s in made.samples] == [True, True]


def test_what_was_measured_stays_when_it_is_broken_off(tmp_path: Path) -> None:
    out, place = tmp_path / "out.json", tmp_path / "place"
    place.mkdir()
    flags = ("--cases", "decisions,loopback", "--repeats", "1", "--size", "8", "--dir", str(place), "--out", str(out))
    argv = [sys.executable, ROOT / "scripts" / "benchmarks.py", "swarm", *flags]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr
        assert any("bench: loopback" in line for line in running.stderr)
        while running.poll() is None:  # once is not enough of a test: whoever ends it may say so twice
            running.terminate()
            time.sleep(0.01)
        running.stderr.read()
    assert running.returncode == 128 + signal.SIGTERM
    assert len(json.loads(out.read_text())["rows"]) == 3
    assert list(place.iterdir()) == []
    assert left_in(tmp_path) == []


def test_a_synthetic_model_is_a_gguf_of_its_size_cut_at_its_tensors(tmp_path: Path) -> None:
    path = swarm_bench.synthetic(tmp_path / "made.gguf", 10 << 20)
    gguf = parse(path.read_bytes(), path.stat().st_size)
    assert [tensor.n_bytes for tensor in gguf.tensors] == [2 << 20] * 5
    assert path.stat().st_size == gguf.data_start + (10 << 20)
    store = Store(tmp_path / "models")
    store.open()
    try:
        manifest = store.manifest(store.share(path).root)
        assert manifest is not None
        starts = {piece.offset for piece in manifest.pieces}
        assert {tensor.offset for tensor in gguf.tensors} <= starts
        assert len(starts) <= 1 + 5 * (2 << 20) // MIN_PIECE_BYTES
    finally:
        store.close()


def test_what_goes_wrong_in_a_node_is_said(tmp_path: Path) -> None:
    with Children(None, tmp_path) as children:
        nodes = Nodes(children, 1)
        nodes.start()
        model = tmp_path / "model.gguf"
        model.write_bytes(random.Random(1).randbytes(1000))
        with pytest.raises(SwarmLabError, match="process 0: not a GGUF"):
            nodes.share(model)
        nodes.nodes[1].process.kill()
        with pytest.raises(SwarmLabError, match=r"process 1 ended|node 1 has ended"):
            nodes.stats()


def left_in(folder: Path) -> list[str]:
    """Programs that have this folder in their arguments."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in part for part in process.cmdline()) and process.pid != os.getpid():
                found.append(process.name())
        except psutil.Error:
            continue  # it ended, or is not ours
    return found
