"""What a node's process holds in memory while it moves models larger than this machine.

Files are sparse, with a few bytes of their own in each piece; no room is reserved for what comes, and what comes is
cut off after a while.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import swarm_table as table
from swarm_bench import Bench, gguf_header
from swarm_lab import Children, Event, Nodes, SwarmLabError
from swarm_table import Row

from tightwad_agent.ids import SafeName
from tightwad_agent.swarm.manifest import Manifest, Piece
from tightwad_agent.swarm.store import Store

PIECE = 16 << 20
N_MANIFEST = 30_000
N_HERE = 100
"""Pieces of the large manifest that the first node really has."""
MAX_MOVED = 10 << 30
SHARE_S = 600.0
WAIT_S = 120.0
MB = 1e6
ROOM = 1 << 60


def moving(bench: Bench, gb: int, seconds: float) -> list[Row]:
    """Over loopback, for so long or until `MAX_MOVED` has come; on the disk, because what comes takes real room."""
    with tempfile.TemporaryDirectory(prefix="tightwad-swarm-") as folder, Children(None, Path(folder)) as children:
        model = sparse_gguf(Path(folder) / "big.gguf", gb * 10**9 // PIECE)
        nodes = Nodes(children, 1, sparse=True)
        nodes.start()
        facts = nodes.share(model, SHARE_S)
        done = _watch(nodes, facts["model"], seconds, MAX_MOVED)
        stats = nodes.stats()
    bench.keep("memory", gb=gb, moved=done, pieces=facts["pieces"], rss_peak=[s["rss_peak"] for s in stats])
    note = f"peak; {done / 1e9:.1f} GB of it came, sparse, no room reserved"
    return _rows(f"a {facts['size'] / 1e9:.0f} GB model", stats, note)


def manifest(bench: Bench) -> list[Row]:
    """The first node has some pieces of a model of 500 GB, the second fetches those."""
    with tempfile.TemporaryDirectory(prefix="tightwad-swarm-") as folder, Children(None, Path(folder)) as children:
        made = partial(Path(folder) / "models0")
        nodes = Nodes(children, 1, sparse=True)
        nodes.start()
        nodes.nodes[0].tell(do="want", model=str(made.root))
        done = _watch(nodes, str(made.root), WAIT_S, N_HERE * PIECE)
        stats = nodes.stats()
    if done < N_HERE * PIECE:
        raise SwarmLabError(f"only {done} bytes of the pieces that are there came within {WAIT_S:g} s")
    bench.keep("manifest", pieces=N_MANIFEST, moved=done, rss_peak=[s["rss_peak"] for s in stats])
    return _rows(f"a manifest of {made.size / 1e9:.0f} GB", stats, f"peak; {N_MANIFEST} pieces, {N_HERE} of them came")


def _rows(what: str, stats: list[Event], note: str) -> list[Row]:
    peaks = [event["rss_peak"] / MB for event in stats]
    return [
        table.at_most(f"memory with {what}: {who}", [peak], "MB", table.MAX_RSS_MB, note)
        for who, peak in zip(("seed", "leecher"), peaks, strict=True)
    ]


def _watch(nodes: Nodes, model: str, seconds: float, enough: int) -> int:
    """Bytes that the second node has after so long, or once it has enough."""
    nodes.nodes[1].tell(do="want", model=model)
    done, until = 0, time.monotonic() + seconds
    for index, event in nodes.children.each(until + WAIT_S):
        nodes.hear(index, event)
        if index == 1 and event["event"] == "progress":
            done = max([done, *(t["done"] for t in event["transfers"] if t["model"] == model)])
            if done >= enough or time.monotonic() >= until:
                break
    return done


def sparse_gguf(path: Path, n: int) -> Path:
    """`n` tensors of a piece each, all zeros but for the number of the tensor in front."""
    head = gguf_header(n, PIECE)
    with path.open("wb") as file:
        file.write(head)
        for i in range(n):
            os.pwrite(file.fileno(), struct.pack("<Q", i + 1), len(head) + i * PIECE)
        file.truncate(len(head) + n * PIECE)
    return path


def partial(models: Path) -> Manifest:
    """A store with the first `N_HERE` pieces of a model of `N_MANIFEST`; nobody has the rest."""
    contents = [_content(i) for i in range(N_HERE)]
    made = Manifest(
        SafeName("large.gguf"),
        N_MANIFEST * PIECE,
        bytes(32),
        tuple(
            Piece(i * PIECE, PIECE, contents[i] if i < N_HERE else hashlib.sha256(struct.pack("<Q", i)).digest())
            for i in range(N_MANIFEST)
        ),
    )
    store = Store(models, free=lambda _folder: ROOM)
    store.open()
    store.keep_manifest(made)
    _begin(store, made)
    store.close()
    return made


def _content(i: int) -> bytes:
    data = bytearray(PIECE)
    struct.pack_into("<Q", data, 0, i + 1)
    return hashlib.sha256(data).digest()


def _begin(store: Store, made: Manifest) -> None:
    reserve: Any = os.posix_fallocate
    os.posix_fallocate = lambda *_: None
    try:
        part = store.open_part(made)
    finally:
        os.posix_fallocate = reserve
    for i in range(N_HERE):
        os.pwrite(part.fd, struct.pack("<Q", i + 1), i * PIECE)
    part.note(range(N_HERE))
    part.close()
