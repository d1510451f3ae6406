"""What a new version of a model costs a node that holds the old one: the share of its bytes that crosses the network.

Two swarm services with their stores in a temporary folder, joined in memory; the bytes are those that the node with the
new version sent. `python scripts/bench_swarm_delta.py` prints the rows, one JSON object a line.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import trio
from rig import quantised

from tightwad_agent.config import load
from tightwad_agent.swarm.gguf import parse
from tightwad_agent.swarm.service import Phase, SwarmService
from tightwad_agent.swarm.store import Store
from tightwad_agent.testing import MemoryMesh, MemoryNode, sockets

FETCH_S = 300.0
TEMPLATE_BYTES = 1_000
HEADER_BOUND = 3.0
REQUANTISED_BOUND = 20.0
_COUNTS = struct.Struct("<4sIQQ")
_STRING = 8


def run_delta() -> list[dict[str, Any]]:
    """Rows of case, value, unit and bound (what the value may be at most; None: nothing is promised).

    Needs $TIGHTWAD_TEST_ENGINE and $TIGHTWAD_TEST_MODEL, as `scripts/prepare.py --shell` prints them.
    """
    engine, model = (Path(os.environ[f"TIGHTWAD_TEST_{name}"]) for name in ("ENGINE", "MODEL"))
    made = load().cache_dir / "delta"
    small, medium = (quantised(engine, model, made / f"{model.stem}.{k}.gguf", k) for k in ("Q4_K_S", "Q4_K_M"))
    with tempfile.TemporaryDirectory() as folder:
        changed = with_text(model, Path(folder) / "changed.gguf", "tokenizer.chat_template.new", "x" * TEMPLATE_BYTES)
        return [
            *_rows("header changed by 1 KB", HEADER_BOUND, *trio.run(fetched, model, changed, Path(folder) / "1")),
            *_rows("Q4_K_S to Q4_K_M", REQUANTISED_BOUND, *trio.run(fetched, small, medium, Path(folder) / "2")),
        ]


def _rows(case: str, bound: float, sent: int, reused: int, size: int, seconds: float) -> list[dict[str, Any]]:
    def row(what: str, value: float, unit: str, bound: float | None = None) -> dict[str, Any]:
        return {"case": f"{case}: {what}", "value": round(value, 2), "unit": unit, "bound": bound}

    return [
        row("bytes over the network", 100 * sent / size, "%", bound),
        row("bytes from the disk", 100 * reused / size, "%"),
        row("model", size / 1e6, "MB"),
        row("time, checks included", seconds, "s"),
    ]


async def fetched(old: Path, new: Path, folder: Path) -> tuple[int, int, int, float]:
    """A node that holds `old` fetches `new`: bytes sent to it, bytes from its disk, bytes of the model, seconds."""
    async with trio.open_nursery() as nursery:
        mesh = MemoryMesh(nursery, sockets)
        seed, at = await _node(nursery, mesh, folder, "seed")
        node, _ = await _node(nursery, mesh, folder, "node")
        await node.add(str(old))
        model = await seed.add(str(new))
        began = time.perf_counter()
        node.set_holders(model.model, frozenset({at.node}))
        node.want(model.model)
        with trio.fail_after(FETCH_S):
            seen = -1
            while node.path_of(model.model) is None or node.snapshot().transfers[-1].phase is not Phase.COMPLETE:
                seen = await node.wait_changed(seen)
        took = time.perf_counter() - began
        sent, reused = seed.snapshot().transfers[-1].uploaded, node.snapshot().transfers[-1].reused
        nursery.cancel_scope.cancel()
    return sent, reused, model.size, took


async def _node(nursery: trio.Nursery, mesh: MemoryMesh, folder: Path, name: str) -> tuple[SwarmService, MemoryNode]:
    at = mesh.add(name)
    made = SwarmService(Store(folder / name), at.open_stream, at.node, random.Random(name))
    at.streams["swarm"] = made.handle
    await nursery.start(made.run)
    return made, at


def with_text(source: Path, target: Path, key: str, text: str) -> Path:
    """A copy of a GGUF with one more metadata entry, its first. The text is lengthened a little to keep the tensors
    aligned."""
    size = source.stat().st_size
    with source.open("rb") as file, target.open("wb") as out:
        alignment = parse(lambda at, n: os.pread(file.fileno(), n, at), size).alignment
        magic, version, n_tensors, n_entries = _COUNTS.unpack(file.read(_COUNTS.size))
        data = text.encode() + b" " * (-(len(key) + len(text.encode()) + 20) % alignment)
        out.write(_COUNTS.pack(magic, version, n_tensors, n_entries + 1))
        out.write(struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IQ", _STRING, len(data)) + data)
        shutil.copyfileobj(file, out, 1 << 20)
    return target


if __name__ == "__main__":
    for row in run_delta():
        print(json.dumps(row))
