"""`scripts/bench speculation`, as small as it gets: real workers, servers, verifier and drafters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from speculation_table import HANGS, HANGS_MIDWAY, LOCAL, POOL, POOR, SPECULATION, VERIFIER, WRONG

ROOT = Path(__file__).parents[2]


def bench(*flags: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, ROOT / "scripts" / "benchmarks.py", "speculation", *flags]
    environ = {**os.environ, "PYTHONPATH": str(ROOT / "scripts"), **(env or {})}
    return subprocess.run(argv, capture_output=True, text=True, timeout=280, check=False, env=environ, cwd=cwd)


def test_help_names_the_options() -> None:
    done = bench("--help")
    assert done.returncode == 0
    assert "--rtt" in done.stdout


def test_a_model_that_is_not_there_is_named() -> None:
    done = bench("--rtt", "0", env={"TIGHTWAD_TEST_F32": "/nowhere.gguf"})
    assert done.returncode == 1
    assert "TIGHTWAD_TEST_F32" in done.stderr


@pytest.mark.engine
@pytest.mark.slow
def test_a_tiny_run(engine_dir: Path, demo_model: Path, f32_model: Path, tmp_path: Path) -> None:
    small = ("--repeats", "1", "--prompts", "1", "--tokens", "16", "--local", "3")
    trace = tmp_path / "trace.jsonl"
    done = bench("--rtt", "0", "--extras-rtt", "0", *small, "--json", "--trace", str(trace), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    result: Any = json.loads(done.stdout.splitlines()[-1])
    ways = {row["way"]: row for row in result["rates"]}
    assert set(ways) == {POOL, LOCAL.format(3), VERIFIER, SPECULATION, POOR, WRONG, HANGS, HANGS_MIDWAY}
    assert all(row["tokens_per_s"] > 0 for row in ways.values())
    assert result["different"] == []
    assert {len(s["tokens"]) for s in result["samples"]} == {16}
    assert not ways[WRONG]["accepted"]
    assert {r["what"] for r in result["ratios"]} >= {f"{VERIFIER} / {POOL}", f"{SPECULATION} / {POOL}"}
    relay = result["relay"][0]
    assert relay["bytes"] > 0
    assert relay["saved"] > 1 << 20, "the verifier's graphs went through the codec of agents' tunnels"
    assert result["environment"]["cores"] == os.cpu_count()
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    assert {"open", "round", "accepted", "ask", "drafted"} <= {e["what"] for e in events}
    assert left_in(tmp_path) == []


def left_in(folder: Path) -> list[str]:
    """Programs that run in this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder):
                found.append(process.name())
        except psutil.Error:
            continue  # it ended, or is not ours
    return found
