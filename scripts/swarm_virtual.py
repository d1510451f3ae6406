"""The swarm in virtual time: the product's service and store over lines of known rate, where computing costs nothing.

What is left of a makespan then is what the order of pieces and the number of uploads at once cost. It runs in a process
of its own, because threads, syncing and the clock are replaced in it:

    python scripts/swarm_virtual.py --leechers 7 --mbit 200 --model FILE [--seed 1] [--slow-mbit 20]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import swarm_table as table
import trio
import trio.testing
from swarm_lab import SwarmLabError

from tightwad_agent.ids import ModelId, NodeId
from tightwad_agent.swarm.service import SwarmService
from tightwad_agent.swarm.store import Store
from tightwad_agent.testing import MemoryMesh

SLICE = 64 << 10
"""Bytes that hold a line at a time; three of them are on their way between an uplink and a downlink."""
SMALL = 2000
"""Shorter messages take no time."""
LOOK_S = 0.1
LONGEST_S = 600.0
"""Of the wall clock, for one run."""
MBIT = 125_000
"""Bytes."""

T = TypeVar("T")


class Line:
    """One direction of a node's cable."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = trio.Lock()

    async def carry(self, n_bytes: int) -> None:
        if n_bytes > SMALL:
            async with self._lock:
                await trio.sleep(n_bytes / self._bytes_per_s)


class Cable(trio.abc.Stream):
    """A stream whose bytes pass an uplink, and then a downlink."""

    def __init__(self, inner: trio.abc.Stream, up: Line, down: Line, nursery: trio.Nursery) -> None:
        self._inner, self._up, self._down = inner, up, down
        self._put, self._got = trio.open_memory_channel[bytes](2)
        nursery.start_soon(self._forward)

    async def _forward(self) -> None:
        try:
            async for data in self._got:
                await self._down.carry(len(data))
                await self._inner.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._got.close()
        await self._inner.aclose()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), SLICE):
            part = bytes(view[start : start + SLICE])
            await self._up.carry(len(part))
            await self._put.send(part)

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._inner.receive_some(max_bytes)

    async def aclose(self) -> None:
        self._put.close()
        await trio.lowlevel.checkpoint()


@dataclass(frozen=True, slots=True)
class Case:
    """`slow_mbit` above 0: the last leecher's line."""

    n_leechers: int
    mbit: float
    model: Path
    seed: int = 1
    slow_mbit: float = 0.0


class Cluster:
    """A seed (the first) and leechers with nothing in their stores."""

    def __init__(self, case: Case, folder: Path, nursery: trio.Nursery) -> None:
        self.services: dict[NodeId, SwarmService] = {}
        self._case, self._nursery = case, nursery
        self._lines: dict[NodeId, tuple[Line, Line]] = {}
        mesh = MemoryMesh(nursery, self._wire)
        for i in range(case.n_leechers + 1):
            node = mesh.add(f"node {i}")
            is_slow = case.slow_mbit > 0 and i == case.n_leechers
            rate = (case.slow_mbit if is_slow else case.mbit) * MBIT
            self._lines[node.node] = Line(rate), Line(rate)
            dice = random.Random(1000 * case.seed + i)
            service = SwarmService(Store(folder / str(i)), node.open_stream, node.node, dice)
            node.streams["swarm"] = service.handle
            self.services[node.node] = service

    def _wire(self, source: NodeId, target: NodeId) -> tuple[trio.abc.Stream, trio.abc.Stream]:
        near, far = trio.testing.memory_stream_pair()
        here, there = self._lines[source], self._lines[target]
        return Cable(near, here[0], there[1], self._nursery), Cable(far, there[0], here[1], self._nursery)

    async def distribute(self) -> dict[str, Any]:
        """When each leecher had the file (seconds), how many pieces it has, and how many bytes the seed sent."""
        for service in self.services.values():
            await self._nursery.start(service.run)
        seed, *leechers = self.services.values()
        held = await seed.add(str(self._case.model))
        manifest = seed.store.manifest(held.model)
        assert manifest is not None
        began, done = trio.current_time(), dict[int, float]()
        for service in leechers:
            service.want(held.model)
        while len(done) < len(leechers):
            self._introduce(held.model)
            for i, service in enumerate(leechers):
                if i not in done and service.path_of(held.model):
                    done[i] = trio.current_time() - began
            await trio.sleep(LOOK_S)
        sent = seed.snapshot().transfers[0].uploaded
        return {"done_s": [done[i] for i in sorted(done)], "pieces": len(manifest.pieces), "sent": sent}

    def _introduce(self, model: ModelId) -> None:
        holders = [node for node, service in self.services.items() if any(h.model == model for h in service.held())]
        for service in self.services.values():
            service.set_holders(model, frozenset(holders))


def ratios(case: Case) -> tuple[float, float]:
    """(makespan of those who are not slow over their bound, files that the seed sent), in a process of its own."""
    argv = [sys.executable, __file__, "--leechers", str(case.n_leechers), "--mbit", str(case.mbit)]
    argv += ["--model", str(case.model), "--seed", str(case.seed), "--slow-mbit", str(case.slow_mbit)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    if done.returncode:
        raise SwarmLabError(f"virtual time: {(done.stderr.splitlines() or ['it said nothing'])[-1]}")
    made = json.loads(done.stdout)
    n = case.n_leechers - (case.slow_mbit > 0)
    size = case.model.stat().st_size
    bound = table.bound_s(size, case.mbit * MBIT, n, made["pieces"])
    return max(made["done_s"][:n]) / bound, made["sent"] / size


# In that process


async def _at_once(work: Callable[..., T], *args: Any, **_how: Any) -> T:
    await trio.lowlevel.checkpoint()
    return work(*args)


def _nothing(fd: Any) -> None:
    """In place of syncing."""


def _without_cost() -> None:
    """Threads and disks take no time."""
    trio.to_thread.run_sync = _at_once  # type: ignore[assignment]
    trio.from_thread.run_sync = lambda work, *args: work(*args)
    trio.from_thread.check_cancelled = lambda: None
    os.fsync = os.fdatasync = _nothing


async def _run(case: Case, folder: Path) -> dict[str, Any]:
    async with trio.open_nursery() as nursery:
        made = await Cluster(case, folder, nursery).distribute()
        nursery.cancel_scope.cancel()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="swarm_virtual.py", description=__doc__)
    parser.add_argument("--leechers", type=int, required=True)
    parser.add_argument("--mbit", type=float, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--slow-mbit", type=float, default=0.0)
    asked = parser.parse_args()
    case = Case(asked.leechers, asked.mbit, asked.model, asked.seed, asked.slow_mbit)
    _without_cost()
    with tempfile.TemporaryDirectory(dir=asked.model.parent) as folder:
        clock = trio.testing.MockClock(autojump_threshold=0)
        print(json.dumps(trio.run(_run, case, Path(folder), clock=clock)))


if __name__ == "__main__":
    main()
