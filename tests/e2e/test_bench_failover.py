"""`scripts/bench failover` on real agents: the cases that need no model, and what an interruption leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.netns, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(400)]

BENCH = Path(__file__).parents[2] / "scripts" / "bench_failover.py"


def run(*options: str) -> list[str]:
    return [sys.executable, str(BENCH), "--seed", "3", *options]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, engine_dir: Path) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench") / "out.json"
    env = {**os.environ, "TIGHTWAD_TEST_ENGINE": str(engine_dir)}
    argv = run("--cases", "killed,cut,elected,joined", "--runs", "1", "--json", str(out))
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=360, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert "agent killed: known to all" in done.stdout
    plain: dict[str, Any] = json.loads(out.read_text())
    return plain


def test_each_case_ends_with_a_figure(found: dict[str, Any]) -> None:
    rows = {row["case"]: row for row in found["rows"]}
    assert set(rows) == {"killed", "cut", "elected", "joined"}
    assert [row["failed"] for row in rows.values()] == [0] * 4, found["samples"]
    assert all(row["median"] > 0 for row in rows.values())
    # a killed agent's connections end with it; of a cable that leads nowhere only silence tells
    assert rows["killed"]["median"] < rows["cut"]["median"]


def test_what_the_figures_depend_on_is_recorded(found: dict[str, Any]) -> None:
    assert found["seed"] == 3
    assert {"cores", "load_before", "load_after", "stolen_percent", "engine", "revision"} <= found["environment"].keys()


def test_ctrl_c_leaves_no_process_and_no_namespace(engine_dir: Path) -> None:
    env = {**os.environ, "TIGHTWAD_TEST_ENGINE": str(engine_dir)}
    bench = subprocess.Popen(run("--cases", "killed"), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _until(lambda: len(_namespaces(bench.pid)) == 6 and _agents(bench.pid), "there is no lab")
        agents = _agents(bench.pid)
        bench.send_signal(signal.SIGINT)
        assert bench.wait(60) == 130
    finally:
        bench.kill()
        bench.wait()
    assert _namespaces(bench.pid) == []
    assert not [pid for pid in agents if psutil.pid_exists(pid)]


def _namespaces(pid: int) -> list[str]:
    folder = Path("/run/netns")
    return [p.name for p in folder.iterdir() if p.name.startswith(f"twlab-{pid}-")] if folder.is_dir() else []


def _agents(pid: int) -> list[int]:
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "up" in process.cmdline():
                found.append(process.pid)
    return found


def _until(true: Any, otherwise: str, deadline_s: float = 90.0) -> None:
    end = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)
