"""A real model in several files: fetched, placed, and loaded by llama.cpp, which looks for them by their names."""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
from pathlib import Path

import swarm_kit as kit
import trio

from tightwad_agent.swarm.gguf import TENSOR_TYPES
from tightwad_agent.swarm.service import Phase, SwarmService
from tightwad_agent.swarm.store import Store
from tightwad_agent.testing import MemoryMesh, MemoryNode, sockets

PATIENCE_S = 120
NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}


def split(model: Path, folder: Path, n: int = 3) -> Path:
    """The model in `n` files, the first of which has the metadata; gives that one."""
    data = model.read_bytes()
    header = kit.read(data)
    tensors = header.tensors
    metadata = data[24 : data.index(kit.text(tensors[0].name) + struct.pack("<I", len(tensors[0].dims)))]
    (n_entries,) = struct.unpack_from("<Q", data, 16)
    for i in range(n):
        some = tensors[i * len(tensors) // n : (i + 1) * len(tensors) // n]
        entries = kit.text("split.no") + kit.value_of((2, struct.pack("<H", i)))
        entries += kit.text("split.count") + kit.value_of((2, struct.pack("<H", n)))
        entries += kit.text("split.tensors.count") + kit.value_of((5, struct.pack("<i", len(tensors))))
        infos, body = b"", b""
        for t in some:
            infos += kit.text(t.name) + struct.pack(f"<I{len(t.dims)}Q", len(t.dims), *t.dims)
            infos += struct.pack("<IQ", NUMBERS[t.type], len(body))
            body += data[t.offset : t.offset + t.n_bytes]
            body += bytes(-len(body) % header.alignment)
        counts = struct.pack("<IQQ", header.version, len(some), 3 if i else 3 + n_entries)
        head = b"GGUF" + counts + (b"" if i else metadata) + entries + infos
        kit.write(folder / f"demo-{i + 1:05d}-of-{n:05d}.gguf", head + bytes(-len(head) % header.alignment) + body)
    return folder / f"demo-00001-of-{n:05d}.gguf"


def weights(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    return {t.name: hashlib.sha256(data[t.offset : t.offset + t.n_bytes]).hexdigest() for t in kit.read(data).tensors}


async def node(nursery: trio.Nursery, mesh: MemoryMesh, folder: Path, name: str) -> tuple[SwarmService, MemoryNode]:
    at = mesh.add(name)
    made = SwarmService(Store(folder / name), at.open_stream, at.node, random.Random(name))
    at.streams["swarm"] = made.handle
    await nursery.start(made.run)
    return made, at


async def test_llama_cpp_loads_what_was_placed(tmp_path: Path, engine_dir: Path, demo_model: Path) -> None:
    """The node holds the same model in one file, and somebody took one of the names there."""
    first = split(demo_model, tmp_path / "split")
    taken = tmp_path / "leech" / "demo-00002-of-00003.gguf"
    taken.parent.mkdir()
    taken.write_bytes(b"of the user")
    async with trio.open_nursery() as nursery:
        mesh = MemoryMesh(nursery, sockets)
        seed, at = await node(nursery, mesh, tmp_path, "seed")
        leech, _ = await node(nursery, mesh, tmp_path, "leech")
        await leech.add(str(demo_model))
        model = await seed.add(str(first))
        assert model.facts == leech.held()[0].facts, "the same weights and the same vocabulary"
        leech.set_holders(model.model, frozenset({at.node}))
        leech.want(model.model)
        with trio.fail_after(PATIENCE_S):
            seen = -1
            while leech.path_of(model.model) is None or leech.snapshot().transfers[-1].phase is not Phase.COMPLETE:
                seen = await leech.wait_changed(seen)
        status = leech.snapshot().transfers[-1]
        placed = leech.path_of(model.model)
        nursery.cancel_scope.cancel()
    assert placed == tmp_path / "leech" / "demo (2)-00001-of-00003.gguf"
    assert taken.read_bytes() == b"of the user"
    assert sum(status.from_each_peer.values()) < 0.05 * model.size
    joined = tmp_path / "joined.gguf"
    argv = [engine_dir / "llama-quantize", "--allow-requantize", placed, joined, "COPY"]
    subprocess.run(argv, check=True, capture_output=True, timeout=PATIENCE_S)
    assert weights(joined) == weights(demo_model)
