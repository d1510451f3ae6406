"""Peers that do anything at all, to a real node: right and wrong answers, out of turn, in pieces, too late, or never.

Between them is one good seed. However they behave, the node must end with the right file, without an error that is not
one of ours, and must not hold it against the good seed. Everything a peer does follows from the seed of the run.

`scripts/fuzz-peers --seeds 1000` does it for long, `tests/shell/test_swarm_chaos.py` for a few.
"""

from __future__ import annotations

import argparse
import functools
import logging
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import swarm_kit as kit
import trio
from fuzz_messages import damage_tree

from tightwad_agent.errors import PeerError
from tightwad_agent.ids import NodeId
from tightwad_agent.streams import Framed, peer_errors
from tightwad_agent.swarm.manifest import Manifest
from tightwad_agent.swarm.pieces import Limits, bits_of
from tightwad_agent.swarm.service import Phase, SwarmService
from tightwad_agent.swarm.store import Store
from tightwad_agent.testing import MemoryMesh, MemoryNode, sockets, unlimited
from tightwad_agent.wire.frames import encode
from tightwad_agent.wire.swarm import (
    BLOCK_BYTES,
    CODEC,
    MAX_SWARM_HEADER,
    VERSION,
    Block,
    Bye,
    Cancel,
    GetManifest,
    Hello,
    KeepAlive,
    ManifestIs,
    Reject,
    Request,
    Update,
    Why,
)

PATIENCE_S = 60.0
N_EVIL = 3
FAST = {
    "PIECE_BYTES": 1 << 19,
    "SMALL_TENSOR_BYTES": 1 << 15,
    "FIRST_RETRY_S": 0.01,
    "LAST_RETRY_S": 0.1,
    "MANIFEST_S": 1.0,
    "RECHECK_S": 0.1,
}
"""Small pieces (of up to two blocks) and short waits; the rules stay the same."""


def make_fast(change: Callable[[object, str, object], None]) -> None:
    """`change(module, name, value)` is called wherever the swarm has one of these."""
    modules = [module for name, module in sys.modules.items() if name.startswith("tightwad_agent.swarm.")]
    for name, value in FAST.items():
        found = [module for module in modules if hasattr(module, name)]
        assert found, f"the swarm has no {name}"
        for module in found:
            change(module, name, value)


DATA = kit.make_gguf([(f"t{i}", (256, 96 if i % 3 else 480), "F32") for i in range(12)])
LIMITS = Limits(stall_s=0.5, slack_s=2.0, late_s=0.05)


class Evil:
    """One peer with dice in place of a mind. The longer it lives, the more it has done: `deeds` counts what."""

    def __init__(self, plan: Manifest, rng: random.Random) -> None:
        self.plan = plan
        self.rng = rng
        self.n = len(plan.pieces)
        self.deeds: dict[str, int] = {}

    async def handle(self, _peer: NodeId, stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
        framed = Framed(stream, CODEC, max_header=MAX_SWARM_HEADER, max_payload=BLOCK_BYTES)
        try:
            message, _ = await framed.receive()
            if isinstance(message, GetManifest):
                await framed.send(ManifestIs(), self.plan.encode())
                return
            await self._live(framed)
        except (PeerError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the node has left us, as well it might

    async def _live(self, framed: Framed) -> None:
        have = [i for i in range(self.n) if self.rng.random() < 0.8]
        await framed.send(Hello(VERSION, self.plan.root, bits_of(have, self.n), self._some()))
        while True:
            with trio.move_on_after(0.05) as scope:
                message, _ = await framed.receive()
            if scope.cancelled_caught:
                await self._deed(framed, None)
            elif isinstance(message, Request):
                await self._deed(framed, message.piece)

    async def _deed(self, framed: Framed, piece: int | None) -> None:
        """Something, most often the right thing."""
        answers = [self.answer] * 6 + [self.lie, self.refuse, self.mix_up, self.half, self.twice, self.silence]
        whims = [self.news, self.news, self.wants, self.cancels, self.babble, self.leaves, self.says, self.again]
        deed = self.rng.choice(answers if piece is not None and self.rng.random() < 0.9 else whims)
        self.deeds[deed.__name__] = self.deeds.get(deed.__name__, 0) + 1
        await deed(framed, self.rng.randrange(self.n) if piece is None else piece)

    # Answers

    async def answer(self, framed: Framed, piece: int) -> None:
        await self._blocks(framed, piece, self._bytes(piece))

    async def lie(self, framed: Framed, piece: int) -> None:
        data = bytearray(self._bytes(piece))
        data[self.rng.randrange(len(data))] ^= 1
        await self._blocks(framed, piece, bytes(data))

    async def refuse(self, framed: Framed, piece: int) -> None:
        await framed.send(Reject(piece, self.rng.choice([Why.NOT_HERE, Why.NOT_HERE, Why.CANCELLED])))

    async def mix_up(self, framed: Framed, piece: int) -> None:
        await self._blocks(framed, (piece + 1) % self.n, self._bytes(piece))

    async def half(self, framed: Framed, piece: int) -> None:
        """Some of the blocks, then nothing or a refusal."""
        await self._blocks(framed, piece, self._bytes(piece)[: BLOCK_BYTES * self.rng.randrange(2)])
        if self.rng.random() < 0.5:
            await framed.send(Reject(piece, Why.NOT_HERE))

    async def twice(self, framed: Framed, piece: int) -> None:
        await self.answer(framed, piece)
        await self.answer(framed, piece)

    async def silence(self, framed: Framed, piece: int) -> None:
        await trio.sleep(self.rng.random() * 0.3)

    # Whims

    async def news(self, framed: Framed, piece: int) -> None:
        await framed.send(Update((piece,), self._some()))

    async def wants(self, framed: Framed, piece: int) -> None:
        await framed.send(Request(self.rng.choice([piece, piece, self.n, -1])))

    async def cancels(self, framed: Framed, piece: int) -> None:
        await framed.send(Cancel(piece))

    async def babble(self, framed: Framed, piece: int) -> None:
        header = damage_tree(CODEC.encode(Block(piece, 0)), self.rng)
        await framed.stream.send_all(encode(header, bytes(self.rng.choice([0, 1, 1000]))))

    async def leaves(self, framed: Framed, piece: int) -> None:
        """In the middle of a frame."""
        data = encode(CODEC.encode(Block(piece, 0)), self._bytes(piece)[:BLOCK_BYTES])
        await framed.stream.send_all(data[: self.rng.randrange(len(data))])
        await framed.stream.aclose()

    async def says(self, framed: Framed, piece: int) -> None:
        await framed.send(self.rng.choice([KeepAlive(), KeepAlive(), Bye("a whim"), ManifestIs()]))

    async def again(self, framed: Framed, piece: int) -> None:
        await framed.send(Hello(VERSION, self.plan.root, bits_of([piece], self.n)))

    # How

    def _some(self) -> tuple[int, ...]:
        return tuple(self.rng.sample(range(self.n), self.rng.randrange(4)))

    def _bytes(self, piece: int) -> bytes:
        place = self.plan.pieces[piece]
        return DATA[place.offset : place.offset + place.length]

    async def _blocks(self, framed: Framed, piece: int, data: bytes) -> None:
        for at in range(0, len(data), BLOCK_BYTES):
            await framed.send(Block(piece, at), data[at : at + BLOCK_BYTES])
            if self.rng.random() < 0.1:
                await trio.sleep(self.rng.random() * 0.05)


async def run(seed: int, folder: Path) -> dict[str, int]:
    """One transfer among evil peers; what they did. Raises `AssertionError` with the seed, or what went wrong."""
    async with trio.open_nursery() as nursery:
        mesh = MemoryMesh(nursery, sockets if seed % 4 else unlimited)
        source = kit.write(folder / "files" / "toy.gguf", DATA)
        good_node, good = await _node(nursery, mesh, folder, "good", seed)
        model = (await good.add(str(source))).model
        plan = good.store.manifest(model)
        assert plan is not None
        evil = [Evil(plan, random.Random(f"{seed}/{i}")) for i in range(N_EVIL)]
        others = [_peer(mesh, f"evil{i}", one.handle) for i, one in enumerate(evil)]
        _, node = await _node(nursery, mesh, folder, "node", seed)
        node.set_holders(model, frozenset(o.node for o in others))
        node.want(model)
        await trio.sleep(random.Random(seed).random() * 0.8)
        node.set_holders(model, frozenset(o.node for o in others) | {good_node})
        with trio.move_on_after(PATIENCE_S) as scope, peer_errors():
            while node.path_of(model) is None:
                await trio.sleep(0.005)
        status = node.snapshot().transfers[0]
        assert not scope.cancelled_caught, f"seed {seed}: {status}"
        assert status.phase is not Phase.FAILED, f"seed {seed}: {status}"
        path = node.path_of(model)
        assert path is not None
        assert path.read_bytes() == DATA, f"seed {seed}: wrong bytes"
        assert sum(status.from_each_peer.values()) == len(DATA), f"seed {seed}: each piece counts once"
        nursery.cancel_scope.cancel()
    return {deed: sum(one.deeds.get(deed, 0) for one in evil) for one in evil for deed in one.deeds}


async def _node(
    nursery: trio.Nursery, mesh: MemoryMesh, folder: Path, name: str, seed: int
) -> tuple[NodeId, SwarmService]:
    node = mesh.add(name)
    rng = random.Random(f"{seed}/{name}")
    made = SwarmService(Store(folder / name), node.open_stream, node.node, rng, limits=LIMITS)
    node.streams["swarm"] = made.handle
    await nursery.start(made.run)
    return node.node, made


def _peer(mesh: MemoryMesh, name: str, handle: Callable[..., Awaitable[None]]) -> MemoryNode:
    node = mesh.add(name)
    node.streams["swarm"] = handle
    return node


def main(argv: list[str]) -> int:
    """Many seeds, or one again. Exit status 1 at the first that ends badly."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz-peers", description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many (default %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="the first seed (default %(default)s)")
    options = parser.parse_args(argv)
    logging.disable()
    make_fast(setattr)
    began, deeds = time.monotonic(), 0
    for seed in range(options.start, options.start + options.seeds):
        with tempfile.TemporaryDirectory(prefix="tightwad-chaos-") as folder:
            try:
                deeds += sum(trio.run(functools.partial(run, seed, Path(folder))).values())
            except BaseException:
                print(f"seed {seed}; again: scripts/fuzz-peers --seeds 1 --start {seed}", file=sys.stderr)
                raise
    print(
        f"{options.seeds} transfers among {N_EVIL} bad peers each, {deeds} deeds, in {time.monotonic() - began:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
