"""What an https origin sends when several nodes add one file together, and what one that is gone costs.

Four swarm services in this process with stores in a temporary folder, streams in memory, a web server on loopback.
`python scripts/bench_swarm_origin.py` prints the rows, one JSON object a line.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import trio
from swarm_together import FileHost, Node, Together, together

from tightwad_agent.engine.tinymodel import tiny_model

N_NODES = 4
SIZE_BYTES = 64 << 20
BOUND = 1.05
RUN_S = 300.0
KILL_AT = 0.5


def run_origin() -> list[dict[str, Any]]:
    """Rows of case, value, unit and bound (what the value may be at most; None: nothing is promised)."""
    data = _model(SIZE_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        sent, seconds = trio.run(fetched, data, Path(folder) / "1", True)
        without_ranges, _ = trio.run(fetched, data, Path(folder) / "2", False)
        after = trio.run(fetched_after_a_death, data, Path(folder) / "3")
    case = f"{N_NODES} nodes add one web file together"
    return [
        _row(f"{case}: origin sent", sent / len(data), "x the file", BOUND),
        _row(f"{case}: origin sent, no range requests", without_ranges / len(data), "x the file", BOUND),
        _row(f"{case}: origin sent, its owner killed at half", after / len(data), "x the file", KILL_AT + 0.1 + BOUND),
        _row(f"{case}: file", len(data) / 1e6, "MB"),
        _row(f"{case}: time until all have it", seconds, "s"),
    ]


def _row(case: str, value: float, unit: str, bound: float | None = None) -> dict[str, Any]:
    return {"case": case, "value": round(value, 3), "unit": unit, "bound": bound}


def _model(size: int) -> bytes:
    """A valid GGUF with bytes behind its last tensor, which count as part of it; no two pieces are alike."""
    tiny = tiny_model()
    return tiny + b"".join(n.to_bytes(8, "big") * 512 for n in range((size - len(tiny)) // 4096))


async def fetched(data: bytes, folder: Path, ranges: bool) -> tuple[int, float]:
    """Bytes of bodies that the server sent, and seconds until the last node had the file."""
    async with trio.open_nursery() as nursery:
        host = await FileHost(data, ranges=ranges).start(nursery)
        begun = time.perf_counter()
        async with together(folder, [f"node{i}" for i in range(N_NODES)]) as cluster:
            await _add(cluster, host)
        seconds = time.perf_counter() - begun
        nursery.cancel_scope.cancel()
    return host.sent, seconds


async def fetched_after_a_death(data: bytes, folder: Path) -> int:
    """Bytes of bodies that the server sent, where the node that downloads dies when half of them are sent."""
    half = trio.Event()

    async def watch(at: int) -> None:
        if at >= KILL_AT * len(data) and not half.is_set():
            half.set()
            await trio.sleep(1)  # what the dead one does not read is not sent

    async with trio.open_nursery() as nursery:
        host = await FileHost(data, before_chunk=watch).start(nursery)
        async with together(folder, [f"node{i}" for i in range(N_NODES)]) as cluster:
            await _add(cluster, host, half)
        nursery.cancel_scope.cancel()
    return host.sent


async def _add(cluster: Together, host: FileHost, death: trio.Event | None = None) -> None:
    scopes = {node.name: trio.CancelScope() for node in cluster.nodes}

    async def add(node: Node) -> None:
        with scopes[node.name]:
            await node.add(f"{host.url}/model.gguf")

    with trio.fail_after(RUN_S):
        async with trio.open_nursery() as adds:
            for node in cluster.nodes:
                adds.start_soon(add, node)
            if death is not None:
                await death.wait()
                owner = next(node for node in cluster.nodes if "fetching" in node.said)
                scopes[owner.name].cancel()
                await cluster.kill(owner)


def main() -> None:
    for row in run_origin():
        print(json.dumps(row))


if __name__ == "__main__":
    main()
