"""`scripts/bench speculation --mesh`, as small as it gets, and the slow cables it stands on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mesh_way
import netlab
import psutil
import pytest
import slow_cable
from mesh_host import ids_of
from netlab import NetLab, NetLabError
from slow_cable import Cables, slowed
from speculation_table import MESH, WITHOUT_MESH

ROOT = Path(__file__).parents[2]
PORT = 7000
MS = 1e-3

netns = pytest.mark.netns


# Slow cables


@pytest.fixture
def cabled() -> Iterator[tuple[NetLab, Cables]]:
    with NetLab(2, host_leg=False) as lab, slowed(lab) as cables:
        yield lab, cables


def exchange(lab: NetLab, n_bytes: int) -> float:
    """Seconds from the first byte sent to an answer of one byte to the last of `n_bytes`."""
    with lab.socket(1) as listener, lab.socket(0) as near:
        listener.bind((lab.nodes[1].address, 0))
        listener.listen()
        near.connect(listener.getsockname())
        far, _ = listener.accept()
        began = time.monotonic()
        sending = threading.Thread(target=near.sendall, args=(bytes(n_bytes),))
        sending.start()
        left = n_bytes
        while left:
            left -= len(far.recv(1 << 20))
        far.sendall(b"k")
        assert near.recv(1) == b"k"
        took = time.monotonic() - began
        sending.join()
        far.close()
        return took


@netns
def test_cables_delay_both_ways_and_hold_their_rate(cabled: tuple[NetLab, Cables]) -> None:
    lab, cables = cabled
    exchange(lab, 1)  # addresses are known from here on
    cables.set(60, 0)
    cables.stats()
    assert exchange(lab, 1) >= 60 * MS
    told = cables.stats()
    assert told["frames"] > 0
    assert told["lost"] == 0
    cables.set(60, 0, node=0)
    assert exchange(lab, 1) >= 60 * MS
    cables.set(60, 0, node=7)
    assert exchange(lab, 1) >= 0, "the cable of a third machine is none of theirs"
    cables.set(0, 40)
    assert exchange(lab, 1_000_000) >= 190 * MS, "a megabyte takes 200 ms at 40 Mbit/s"
    assert cables.stats()["bytes"] > 1_000_000
    cables.set(0, 0)
    assert exchange(lab, 1_000_000) >= 0, "and they can be fast again"


@netns
def test_cables_go_with_their_block_and_with_their_process() -> None:
    with NetLab(2, host_leg=False) as lab:
        with slowed(lab) as cables:
            assert "eth0" in lab.run(0, ["ip", "link"])
            switch = psutil.Process(cables.pid)
        assert not switch.is_running()
        assert "eth0" not in lab.run(0, ["ip", "link"])


def test_without_tap_devices_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(slow_cable, "DEVICE", tmp_path / "tun")
    with pytest.raises(NetLabError, match="modprobe tun"):
        slow_cable.check()


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NetLabError, match="need root"):
        mesh_way.check()


# Both ways


def command(*flags: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "benchmarks.py"), "speculation", "--mesh", "--rtt", "", *flags]


@netns
@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_tiny_run_through_agents_and_without(engine_dir: Path, f32_model: Path, demo_model: Path) -> None:
    small = ("--repeats", "1", "--prompts", "1", "--tokens", "16", "--json")
    done = subprocess.run(command(*small), capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    result: Any = json.loads(done.stdout.splitlines()[-1])["mesh"]
    assert (result["problem"], result["different"]) == ("", [])
    assert {s["way"]: len(s["tokens"]) for s in result["samples"]} == {MESH: 16, WITHOUT_MESH: 16}
    (ratio,) = [r for r in result["ratios"] if r["what"] == f"{MESH} / {WITHOUT_MESH}"]
    assert (ratio["rtt_ms"], ratio["goal"]) == (10.0, 0.95)
    assert result["cables"][0]["bytes"] > 16 * 2 * 2 * 2000, "activations to two workers and back, each token, twice"
    assert {*result["roles"]["workers"], result["roles"]["coordinator"]} == {"box-1", "box-2", "box-3"}
    assert result["roles"]["drafter"] in result["roles"]["workers"]


@netns
@pytest.mark.engine
@pytest.mark.slow
def test_a_run_that_is_terminated_leaves_nothing(engine_dir: Path, f32_model: Path, demo_model: Path) -> None:
    before = set(netlab._namespaces())
    process = subprocess.Popen(command(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "the agents load" in line:
            break
    mine = psutil.Process(process.pid).children(recursive=True)
    assert len(mine) > 3
    assert len(set(netlab._namespaces()) - before) >= 3
    process.send_signal(signal.SIGTERM)
    process.stderr.close()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not [p for p in mine if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert set(netlab._namespaces()) <= before


@pytest.mark.parametrize(
    ("text", "n", "ids"),
    [("ab", 2, (1, 2)), ("ac", 2, (7, 8)), ("ab", 3, (-1, -1, -1)), ("ac", 1, (-1,))],
    ids=["the same text", "another text", "the same text of another length", "a text that is read otherwise"],
)
def test_only_the_same_text_has_the_same_ids(text: str, n: int, ids: tuple[int, ...]) -> None:
    assert ids_of(text, n, {"ab": (1, 2)}, [7, 8]) == ids
