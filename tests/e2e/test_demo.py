"""`scripts/demo --once --json`, as a newcomer would run it, on namespaces and on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import netlab
import psutil
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(400)]


def demo(*flags: str) -> Any:
    """The JSON on the last line. The demo is a child with nothing of ours but the caches."""
    before = {p.pid for p in psutil.process_iter()}
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "demo.py", "--once", "--json", *flags],
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    left = [
        p.name()
        for p in psutil.process_iter()
        if p.pid not in before and (p.name() in ("llama-server", "ggml-rpc-server") or "engine.verifier" in shown(p))
    ]
    assert not left
    return json.loads(done.stdout.splitlines()[-1])


def shown(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def check(result: Any) -> None:
    assert result["ok"] is True
    assert result["answer"]
    assert result["tokens"] > 0
    assert result["tokens_per_s"] > 0
    assert result["asked"] != result["coordinator"]
    assert len(result["workers"]) == 2
    assert len(result["peers"]) == 3
    target, draft = result["swarm"].values()
    assert target["bytes"] >= 2 * 539_000_000
    assert draft["bytes"] >= 2 * 98_000_000
    assert set(target["from_each_peer"]) == set(draft["from_each_peer"]) == {"box-2", "box-3"}
    assert result["served_by"] == "verifier"
    assert result["drafters"]
    assert result["tokens_per_s_without_drafts"] > 0
    assert result["speed_up"] > 0
    assert result["engine"]["build"]
    assert result["wall_s"] > 0


def test_on_loopback_ports() -> None:
    check(demo("--loopback"))


@pytest.mark.netns
def test_in_namespaces_and_nothing_is_left() -> None:
    result = demo()
    check(result)
    assert all(p["address"].startswith("10.") for p in result["peers"])
    assert netlab.sweep() == []
    names = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    assert "twlab" not in names
