"""Nodes with real stores on real files, over memory streams."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import swarm_kit as kit
import trio

from tightwad_agent.errors import AgentRunning, PeerError, ProtocolError, UnknownModel
from tightwad_agent.ids import ModelId, NodeId, SafeName
from tightwad_agent.streams import Framed
from tightwad_agent.swarm import arrivals, exchange, intake, link, manifest, part, service, standing, transfer
from tightwad_agent.swarm.exchange import Exchange
from tightwad_agent.swarm.manifest import Manifest, Piece
from tightwad_agent.swarm.part import PartFile
from tightwad_agent.swarm.pieces import Limits, bits_of
from tightwad_agent.swarm.service import Phase, SwarmService, TransferStatus
from tightwad_agent.swarm.store import Store
from tightwad_agent.testing import MemoryMesh, MemoryNode, node_id, sockets
from tightwad_agent.wire.rows import HeldModel
from tightwad_agent.wire.swarm import (
    BLOCK_BYTES,
    CODEC,
    MAX_SWARM_HEADER,
    VERSION,
    Block,
    Bye,
    GetManifest,
    Hello,
    KeepAlive,
    ManifestIs,
    Request,
)

PATIENCE_S = 30


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces and short waits; the rules stay the same."""
    monkeypatch.setattr(manifest, "PIECE_BYTES", 1 << 17)
    monkeypatch.setattr(manifest, "SMALL_TENSOR_BYTES", 1 << 15)
    monkeypatch.setattr(standing, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(standing, "LAST_RETRY_S", 0.3)
    monkeypatch.setattr(exchange, "IDLE_S", 0.2)
    monkeypatch.setattr(transfer, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(transfer, "LAST_RETRY_S", 0.2)
    monkeypatch.setattr(transfer, "ROOM_CHECK_S", 0.05)
    monkeypatch.setattr(service, "RECHECK_S", 0.1)


@dataclass
class Node:
    name: str
    service: SwarmService
    mesh: MemoryNode
    scope: trio.CancelScope
    folder: Path

    @property
    def id(self) -> NodeId:
        return self.mesh.node

    def status(self, model: ModelId) -> TransferStatus:
        return next(t for t in self.service.snapshot().transfers if t.model == model)

    def leech(self, model: ModelId, *others: Node | MemoryNode) -> None:
        self.service.set_holders(model, frozenset(o.id if isinstance(o, Node) else o.node for o in others))
        self.service.want(model)

    async def stop(self) -> None:
        self.scope.cancel()
        await until(lambda: self.service._nursery is None)

    async def until_read_back(self, model: ModelId) -> Path:
        path = await self.until_complete(model)
        await until(lambda: model not in self.service.store.not_compared)
        return path

    async def until_complete(self, model: ModelId) -> Path:
        await until(lambda: self.service.path_of(model) is not None and self.status(model).phase is Phase.COMPLETE)
        path = self.service.path_of(model)
        assert path is not None
        return path


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not condition():
            await trio.sleep(0.005)


class Net:
    def __init__(self, nursery: trio.Nursery, folder: Path) -> None:
        self.nursery = nursery
        self.mesh = MemoryMesh(nursery, sockets)
        self.folder = folder
        self.nodes: list[Node] = []

    async def node(self, name: str, *, limits: Limits | None = None, free: Any = None) -> Node:
        mesh = self.mesh.add(name)
        folder = self.folder / name
        store = Store(folder) if free is None else Store(folder, free=free)
        made = SwarmService(store, mesh.open_stream, mesh.node, random.Random(name), limits=limits)
        mesh.streams["swarm"] = made.handle
        scope = trio.CancelScope()

        async def run(task_status: trio.TaskStatus[None]) -> None:
            with scope:
                await made.run(task_status=task_status)

        await self.nursery.start(run)
        node = Node(name, made, mesh, scope, folder)
        self.nodes.append(node)
        return node

    def peer(self, name: str, handler: Callable[..., Awaitable[None]]) -> MemoryNode:
        """A node with a mind of its own."""
        mesh = self.mesh.add(name)
        mesh.streams["swarm"] = handler
        return mesh


@asynccontextmanager
async def net(tmp_path: Path) -> AsyncIterator[Net]:
    async with trio.open_nursery() as nursery:
        yield Net(nursery, tmp_path)
        nursery.cancel_scope.cancel()


async def seed_of(network: Net, name: str, data: bytes, file: str = "toy.gguf") -> tuple[Node, HeldModel]:
    node = await network.node(name)
    path = kit.write(network.folder / f"{name}-files" / file, data)
    return node, await node.service.add(str(path))


BIG = kit.llama(24, tensor_kb=128)  # 24 tensors of 128 KiB, each a piece of its own


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The main thing


async def test_one_seed_three_leechers(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        leechers = [await network.node(f"leech{i}") for i in range(3)]
        for node in leechers:
            node.leech(model.model, seed, *leechers)
        for node in leechers:
            path = await node.until_complete(model.model)
            assert path == node.folder / "toy.gguf"
            assert path.read_bytes() == BIG
            got = node.status(model.model)
            assert len(got.from_each_peer) > 1, "everybody gives"
            assert sum(got.from_each_peer.values()) == len(BIG)
            assert (got.done, got.total, got.phase) == (len(BIG), len(BIG), Phase.COMPLETE)
            assert not list((node.folder / ".swarm").glob("*.part"))
        assert seed.status(model.model).uploaded < 3 * len(BIG), "the seed did not send everything itself"
        assert all(m.complete for m in node.service.held())
        await until(lambda: all(not n.service._transfers[model.model].exchange for n in network.nodes))


async def test_three_equal_seeds_all_give(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seeds = [(await seed_of(network, f"seed{i}", BIG))[0] for i in range(3)]
        model = seeds[0].service.held()[0].model
        node = await network.node("leech")
        node.leech(model, *seeds)
        assert (await node.until_complete(model)).read_bytes() == BIG
        shares = node.status(model).from_each_peer
        assert set(shares) == {s.id for s in seeds}
        assert sum(shares.values()) == len(BIG)


async def test_a_leecher_gives_to_one_that_knows_only_it(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        middle, far = await network.node("middle"), await network.node("far")
        far.leech(model.model, middle)
        await trio.sleep(0.05)
        middle.leech(model.model, seed)
        assert (await far.until_complete(model.model)).read_bytes() == BIG
        assert set(far.status(model.model).from_each_peer) == {middle.id}


async def test_changes_are_told_and_facts_come_from_the_bytes(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        node = await network.node("leech")
        before = node.service.revision
        node.leech(model.model, seed)
        with trio.fail_after(PATIENCE_S):
            while not (node.service.held() and node.service.held()[0].complete):
                before = await node.service.wait_changed(before)
        held = node.service.held()[0]
        assert held == model
        assert held.facts.n_layers == 24
        assert await node.service.vocab_difference(model.model, model.model) is None


# Resuming


async def test_killed_and_started_again_it_goes_on(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        first = await network.node("leech", limits=Limits(per_peer=1, total=1))
        first.leech(model.model, seed)
        await until(lambda: first.status(model.model).done > len(BIG) // 3)
        await first.stop()
        came = first.status(model.model).from_each_peer[seed.id]
        assert 0 < came < len(BIG)
        again = await network.node("leech")
        again.leech(model.model, seed)
        assert (await again.until_complete(model.model)).read_bytes() == BIG
        assert again.status(model.model).from_each_peer[seed.id] <= len(BIG) - came + (1 << 17)


async def half_done(network: Net, seed: Node, model: ModelId, name: str = "leech") -> Path:
    """The folder of a node that was stopped half way."""
    node = await network.node(name, limits=Limits(per_peer=1, total=1))
    node.leech(model, seed)
    await until(lambda: node.status(model).done > len(BIG) // 3)
    await node.stop()
    return node.folder / ".swarm"


async def resumes(network: Net, seed: Node, model: ModelId) -> int:
    node = await network.node("leech")
    node.leech(model, seed)
    assert (await node.until_complete(model)).read_bytes() == BIG
    await node.stop()
    return node.status(model).from_each_peer[seed.id]


async def test_a_flipped_byte_in_a_finished_piece_is_fetched_again(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        state = await half_done(network, seed, model.model)
        part = next(state.glob("*.part"))
        data = bytearray(part.read_bytes())
        at = next(i for i in range(len(BIG) - 1, 0, -1) if data[i] == BIG[i] != 0)
        data[at] ^= 1
        with part.open("r+b") as file:  # the same file, so that the journal is believed
            file.write(data)
        journalled = (state / f"{model.model}.journal").stat().st_size
        assert journalled > 100
        assert 0 < await resumes(network, seed, model.model) < len(BIG)


async def test_state_without_the_file_and_file_without_the_state(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        state = await half_done(network, seed, model.model)
        next(state.glob("*.part")).unlink()
        assert await resumes(network, seed, model.model) == len(BIG)
        (tmp_path / "leech" / "toy.gguf").unlink()
        state = await half_done(network, seed, model.model)
        next(state.glob("*.journal")).unlink()
        assert await resumes(network, seed, model.model) == len(BIG)


async def test_the_final_file_deleted_but_not_the_catalogue(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        node = await network.node("leech")
        node.leech(model.model, seed)
        path = await node.until_complete(model.model)
        path.unlink()
        assert node.service.path_of(model.model) is None
        assert await node.until_complete(model.model) == path, "it is wanted, so it comes again"
        assert path.read_bytes() == BIG


# Peers that fail


async def test_the_seed_leaves_and_comes_back(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        node = await network.node("leech", limits=Limits(per_peer=1, total=1))
        node.leech(model.model, seed)
        await until(lambda: node.status(model.model).done > len(BIG) // 4)
        await network.mesh.cut(node.id, seed.id)
        await until(lambda: "can be reached, waiting" in node.status(model.model).problem)
        assert node.service.held()[0].have < len(BIG)
        node.service.set_holders(model.model, frozenset())
        await until(lambda: "no node has it any more" in node.status(model.model).problem)
        network.mesh.heal(node.id, seed.id)
        node.service.set_holders(model.model, frozenset({seed.id}))
        assert (await node.until_complete(model.model)).read_bytes() == BIG
        assert sum(node.status(model.model).from_each_peer.values()) == len(BIG), "nothing came twice"


async def test_nobody_is_called_unreachable_before_an_attempt(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        node = await network.node("leech")
        node.leech(model.model, seed)
        told: set[str] = set()
        with trio.fail_after(30):
            while node.service.path_of(model.model) is None:
                told |= {status.problem for status in node.service.snapshot().transfers}
                await trio.sleep(0)
        assert told == {""}


async def test_a_peer_killed_in_the_middle_of_a_piece(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        plan = seed.service.store.manifest(model.model)
        assert plan is not None

        async def dies(_peer: NodeId, stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
            framed = await greet(stream, plan)
            request = await next_request(framed)
            piece = plan.pieces[request.piece]
            data = BIG[piece.offset : piece.offset + min(BLOCK_BYTES, piece.length)]
            whole = Framed(stream, CODEC)
            from tightwad_agent.wire.frames import encode

            await stream.send_all(encode(CODEC.encode(Block(request.piece, 0)), data)[: len(data) // 2])
            assert whole is not None

        node = await network.node("leech")
        node.leech(model.model, seed, network.peer("dies", dies))
        assert (await node.until_complete(model.model)).read_bytes() == BIG
        assert set(node.status(model.model).from_each_peer) == {seed.id}


async def greet(stream: trio.abc.Stream, plan: Manifest) -> Framed:
    """Answers for the manifest or claims to have all of it."""
    framed = Framed(stream, CODEC, max_header=MAX_SWARM_HEADER, max_payload=BLOCK_BYTES)
    message, _ = await framed.receive()
    if isinstance(message, GetManifest):
        await framed.send(ManifestIs(), plan.encode())
        await trio.sleep_forever()
    n = len(plan.pieces)
    await framed.send(Hello(VERSION, plan.root, bits_of(range(n), n)))
    return framed


async def next_request(framed: Framed) -> Request:
    while True:
        message, _ = await framed.receive()
        if isinstance(message, Request):
            return message


async def fight(
    tmp_path: Path, bad: Callable[[Framed, Manifest], Awaitable[None]], limits: Limits | None = None
) -> tuple[Node, TransferStatus, NodeId]:
    """A leecher between a good seed and a bad one, with the bad one first."""
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        plan = seed.service.store.manifest(model.model)
        assert plan is not None

        async def handler(_peer: NodeId, stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
            framed = await greet(stream, plan)
            await bad(framed, plan)

        evil = network.peer("evil", handler)
        node = await network.node("leech", limits=limits or Limits(stall_s=0.3))
        node.leech(model.model, evil)
        await until(lambda: node.service._transfers[model.model].exchange is not None)
        await trio.sleep(0.05)
        node.leech(model.model, evil, seed)
        assert (await node.until_complete(model.model)).read_bytes() == BIG
        status = node.status(model.model)
        assert status.from_each_peer == {seed.id: len(BIG)}
        return node, status, evil.node


async def test_a_peer_that_sends_bad_bytes_is_banned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rounds = 0

    async def lies(framed: Framed, plan: Manifest) -> None:
        nonlocal rounds
        while True:
            request = await next_request(framed)
            rounds += 1
            length = plan.pieces[request.piece].length
            for at in range(0, length, BLOCK_BYTES):
                await framed.send(Block(request.piece, at), bytes(min(BLOCK_BYTES, length - at)))

    await fight(tmp_path, lies)
    assert 3 <= rounds <= 3 + Limits().per_peer, "three strikes, and what was on its way"
    assert "sent bad data again" in caplog.text


async def test_a_peer_that_sends_another_piece(tmp_path: Path) -> None:
    async def mixes_up(framed: Framed, plan: Manifest) -> None:
        request = await next_request(framed)
        other = (request.piece + 7) % len(plan.pieces)
        await framed.send(Block(other, 0), bytes(min(BLOCK_BYTES, plan.pieces[other].length)))
        await trio.sleep_forever()

    await fight(tmp_path, mixes_up)


async def test_a_peer_that_sends_nothing(tmp_path: Path) -> None:
    async def stalls(framed: Framed, plan: Manifest) -> None:
        while True:
            await framed.receive()
            await framed.send(KeepAlive())

    await fight(tmp_path, stalls)


async def test_a_staller_is_left_even_without_an_endgame(tmp_path: Path) -> None:
    async def stalls(framed: Framed, plan: Manifest) -> None:
        while True:
            await framed.receive()

    await fight(tmp_path, stalls, Limits(stall_s=0.3, max_askers=1))


async def test_the_endgame_does_not_wait_for_a_staller_to_be_left(tmp_path: Path) -> None:
    async def stalls(framed: Framed, plan: Manifest) -> None:
        while True:
            await framed.receive()

    await fight(tmp_path, stalls, Limits(stall_s=300, late_s=1.0))


async def test_a_peer_that_sends_garbage(tmp_path: Path) -> None:
    async def babbles(framed: Framed, plan: Manifest) -> None:
        await framed.stream.send_all(b"\0\0\0\x05\0\0\0\0\xc1\xff\xff\xff\xff" + bytes(1000))
        await trio.sleep_forever()

    await fight(tmp_path, babbles)


async def test_a_peer_with_an_oversized_frame(tmp_path: Path) -> None:
    async def huge(framed: Framed, plan: Manifest) -> None:
        await framed.stream.send_all(b"\0\0\0\x05\xff\xff\xff\xff" + bytes(1000))
        await trio.sleep_forever()

    await fight(tmp_path, huge)


async def test_what_comes_is_synced_while_the_transfer_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = PartFile.sync

    def sync(self: PartFile) -> None:
        synced.append(len(self.have))
        real(self)

    monkeypatch.setattr(PartFile, "sync", sync)
    monkeypatch.setattr(arrivals, "SYNC_S", 0.0)
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        node = await network.node("leech")
        node.leech(model.model, seed)
        await node.until_complete(model.model)
    assert synced


async def test_a_peer_that_is_silent_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "SILENCE_S", 0.2)
    monkeypatch.setattr(intake, "LOOK_S", 0.05)
    monkeypatch.setattr(link, "KEEP_ALIVE_S", 0.05)
    monkeypatch.setattr(transfer, "MANIFEST_S", 0.2)
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        opened = 0

        async def silent(_peer: NodeId, stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
            nonlocal opened
            opened += 1
            await trio.sleep_forever()

        node = await network.node("leech")
        mute = network.peer("mute", silent)
        node.leech(model.model, seed, mute)
        await node.until_complete(model.model)
        other = await network.node("other")
        await network.mesh.cut(other.id, seed.id)
        other.leech(model.model, mute, seed)
        await until(lambda: "has not given the manifest" in other.status(model.model).problem)
        assert opened > 0


async def test_a_manifest_that_lies_is_not_believed(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        other = Manifest(SafeName("x.gguf"), 5, bytes(32), (Piece(0, 5, bytes(32)),))

        async def lies(_peer: NodeId, stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
            await greet(stream, other)

        node = await network.node("leech")
        liar = network.peer("liar", lies)
        node.leech(model.model, liar)
        await until(lambda: "it is of model" in node.status(model.model).problem)
        node.leech(model.model, liar, seed)
        assert (await node.until_complete(model.model)).read_bytes() == BIG


async def test_what_came_is_read_back_and_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, wrong = part.pwrite_all, [2]

    def stores(fd: int, data: bytes, at: int) -> None:
        real(fd, data, at)
        if wrong and at:
            wrong.pop()
            os.pwrite(fd, b"!!", at)

    monkeypatch.setattr(part, "pwrite_all", stores)
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        node = await network.node("leech")
        node.leech(model.model, seed)
        path = await node.until_complete(model.model)
        await until(lambda: path.exists() and path.read_bytes() == BIG and not node.service.store.not_compared)
        assert not wrong
        assert 0 < sum(node.status(model.model).from_each_peer.values()) - len(BIG) <= 2 << 17, "a piece came again"


# Both sides at once, and bad beginnings


async def test_two_leechers_that_dial_each_other_keep_one_stream(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        a, b = [await network.node(n, limits=Limits(per_peer=1, total=1)) for n in "ab"]
        a.leech(model.model, seed, b)
        b.leech(model.model, seed, a)
        most = 0
        while not all(n.service.path_of(model.model) for n in (a, b)):
            live = [n.service._transfers[model.model].exchange for n in (a, b)]
            most = max([most, *(len(e.links) for e in live if e)])
            await trio.sleep(0.001)
        assert most == 2, "the seed, and the other"


async def test_of_two_streams_that_cross_the_one_of_the_lower_id_stays(tmp_path: Path) -> None:
    ids = sorted([node_id("a"), node_id("b")])
    plan = Manifest(SafeName("x.gguf"), 5, bytes(32), (Piece(0, 5, bytes(32)),))
    sides: dict[NodeId, Exchange] = {}
    both_dial = trio.Event()
    n_dials = 0

    async with trio.open_nursery() as nursery:

        def opener(me: NodeId) -> Callable[..., Awaitable[trio.abc.Stream]]:
            async def open_stream(peer: NodeId, _service: str, _args: dict[str, Any]) -> trio.abc.Stream:
                nonlocal n_dials
                n_dials += 1
                if n_dials == 2:
                    both_dial.set()
                await both_dial.wait()
                near, far = trio.testing.memory_stream_pair()
                nursery.start_soon(incoming, sides[peer], me, far)
                return near

            return open_stream

        async def incoming(exchange: Exchange, peer: NodeId, stream: trio.abc.Stream) -> None:
            framed = Framed(stream, CODEC, max_header=MAX_SWARM_HEADER, max_payload=BLOCK_BYTES)
            try:
                hello, _ = await framed.receive()
                await exchange.accept(peer, framed, hello)
            except PeerError:
                pass
            finally:
                await trio.aclose_forcefully(stream)

        for me in ids:
            part = PartFile.open(tmp_path / me, tmp_path / f"{me}.journal", plan, lambda _p: 1 << 40)
            sides[me] = Exchange(plan, me, opener(me), random.Random(1), part=part)
            await nursery.start(sides[me].run)
        for me, other in (ids, ids[::-1]):
            sides[me].set_holders(frozenset({other}))
        await until(lambda: [[li.dialled for li in sides[me].links.values()] for me in ids] == [[True], [False]])
        for _ in range(50):
            await trio.sleep(0.005)
            assert [[li.dialled for li in sides[me].links.values()] for me in ids] == [[True], [False]]
        assert n_dials == 2
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("args", [{}, {"model": 5}, {"model": "x"}, {"model": "../" * 20}])
async def test_streams_that_name_no_model(tmp_path: Path, args: dict[str, Any]) -> None:
    async with net(tmp_path) as network:
        node = await network.node("a")
        one, _two = trio.testing.memory_stream_pair()
        with pytest.raises(ProtocolError, match="without a model"):
            await node.service.handle(node.id, one, args)


async def test_streams_that_begin_wrongly(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        other = ModelId("0" * 64)
        for message in (KeepAlive(), Bye("x"), Hello(VERSION, other, b""), GetManifest(other)):
            near, far = trio.testing.memory_stream_pair()
            await Framed(near, CODEC).send(message)
            with pytest.raises(ProtocolError, match="does not begin"):
                await seed.service.handle(seed.id, far, {"model": str(model.model)})
        for message in (Hello(VERSION, other, b""), GetManifest(other)):
            near, far = trio.testing.memory_stream_pair()
            await Framed(near, CODEC).send(message)
            await seed.service.handle(seed.id, far, {"model": str(other)})
            got, _ = await Framed(near, CODEC).receive()
            assert got == Bye("this model is not here")


# Disk, removal, files that change


async def test_no_room_then_room(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        room = 1000
        node = await network.node("leech", free=lambda _p: room)
        node.leech(model.model, seed)
        await until(lambda: node.status(model.model).phase is Phase.NO_ROOM)
        problem = node.status(model.model).problem
        assert f"needs {len(BIG):,} more bytes" in problem
        assert f"1,000 are free: {len(BIG) - 1000:,} are missing" in problem
        assert not list((node.folder / ".swarm").glob("*.part"))
        room = 10 * len(BIG)
        assert (await node.until_complete(model.model)).read_bytes() == BIG


async def test_a_disk_that_fills_up_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from tightwad_agent.swarm import part

    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        node = await network.node("leech")
        full = True
        real = part.os.pwrite

        def pwrite(fd: int, data: memoryview, at: int) -> int:
            if full and at > len(BIG) // 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(fd, data, at)

        monkeypatch.setattr(part.os, "pwrite", pwrite)
        node.leech(model.model, seed)
        await until(lambda: node.status(model.model).phase is Phase.NO_ROOM)
        assert "is full" in node.status(model.model).problem
        full = False
        assert (await node.until_complete(model.model)).read_bytes() == BIG


async def test_remove_and_unwant(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        node = await network.node("leech", limits=Limits(per_peer=1, total=1))
        node.leech(model.model, seed)
        await until(lambda: node.status(model.model).done > 0)
        node.service.unwant(model.model)
        await until(lambda: node.status(model.model).phase is Phase.IDLE)
        assert node.service.held() == ()
        assert list((node.folder / ".swarm").glob("*.part")), "kept for next time"
        node.service.want(model.model)
        path = await node.until_complete(model.model)
        await node.service.remove(model.model)
        assert not path.exists()
        assert not list((node.folder / ".swarm").glob(f"{model.model}*"))
        assert node.service.held() == ()
        with pytest.raises(UnknownModel):
            await node.service.remove(model.model)
        shared = seed.service.path_of(model.model)
        assert shared is not None
        await seed.service.remove(model.model)
        assert shared.read_bytes() == BIG, "what was shared in place is not ours to delete"
        assert seed.service.held() == ()


async def test_removed_while_it_comes(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        node = await network.node("leech", limits=Limits(per_peer=1, total=1))
        node.leech(model.model, seed)
        await until(lambda: node.status(model.model).done > 0)
        await node.service.remove(model.model)
        assert node.service.held() == ()
        assert not list((node.folder / ".swarm").glob(f"{model.model}*"))


async def test_a_shared_file_that_changes_is_no_longer_offered(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        path = seed.service.path_of(model.model)
        assert path is not None
        before = seed.service.revision
        with path.open("r+b") as file:
            file.seek(len(BIG) - 10)
            file.write(b"x")
        assert seed.service.path_of(model.model) is None
        assert seed.service.held() == ()
        with trio.fail_after(PATIENCE_S):
            await seed.service.wait_changed(before)
        assert "changed since it was added" in seed.service.snapshot().problems[0]
        node = await network.node("leech")
        node.leech(model.model, seed)
        await until(lambda: node.service._transfers[model.model].exchange is not None)
        await trio.sleep(0.1)
        assert node.status(model.model).from_each_peer == {}
        path.write_bytes(BIG)
        assert (await seed.service.add(str(path))).model == model.model
        assert seed.service.snapshot().problems == ()
        assert (await node.until_complete(model.model)).read_bytes() == BIG


async def test_those_who_are_connected_hear_that_the_file_changed(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        near, far = trio.testing.memory_stream_pair()
        network.nursery.start_soon(seed.service.handle, node_id("x"), far, {"model": str(model.model)})
        framed = Framed(near, CODEC)
        await framed.send(Hello(VERSION, model.model, bits_of((), 25)))
        await framed.expect(Hello)
        path = seed.service.path_of(model.model)
        assert path is not None
        path.unlink()
        with trio.fail_after(PATIENCE_S):
            assert await framed.expect(Bye) == Bye("the file changed")


async def test_a_disk_that_rots_is_not_served(tmp_path: Path) -> None:
    import os

    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        path = seed.service.path_of(model.model)
        assert path is not None
        stat = path.stat()
        with path.open("r+b") as file:
            file.seek(len(BIG) - 10)
            file.write(b"rot")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert seed.service.path_of(model.model) == path, "nothing to see from outside"
        node = await network.node("leech")
        node.leech(model.model, seed)
        await until(lambda: "is damaged" in " ".join(seed.service.snapshot().problems))
        assert seed.service.path_of(model.model) is None
        got = node.status(model.model)
        assert got.done < len(BIG)
        exchange_there = node.service._transfers[model.model].exchange
        assert exchange_there is not None
        assert not exchange_there._dialler.is_banned(seed.id), "nobody was lied to"


async def test_same_name_other_content(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        one, first = await seed_of(network, "one", kit.llama(3))
        two, second = await seed_of(network, "two", kit.llama(3, seed=2), file="TOY.gguf")
        node = await network.node("leech")
        kit.write(node.folder / "toy (2).gguf", b"something of the user's")
        node.leech(first.model, one)
        assert (await node.until_complete(first.model)).name == "toy.gguf"
        node.leech(second.model, two)
        path = await node.until_complete(second.model)
        assert path.name == "TOY (3).gguf"
        assert sha(path) == hashlib.sha256(kit.llama(3, seed=2)).hexdigest()
        assert (node.folder / "toy (2).gguf").read_bytes() == b"something of the user's"


async def test_added_here_while_it_comes_from_there(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        node = await network.node("leech", limits=Limits(per_peer=1, total=1))
        node.leech(model.model, seed)
        await until(lambda: node.status(model.model).done > 0)
        path = kit.write(tmp_path / "mine" / "toy.gguf", BIG)
        held = await node.service.add(str(path))
        assert held.model == model.model
        assert node.service.path_of(model.model) == path
        assert not list((node.folder / ".swarm").glob("*.part"))


async def test_a_lost_manifest_is_made_anew(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        plan = seed.service.store.manifest(model.model)
        assert plan is not None
        await seed.stop()
        (tmp_path / "seed" / ".swarm" / f"{model.model}.manifest").write_bytes(b"rubbish")
        seed = await network.node("seed")
        node = await network.node("leech")
        node.leech(model.model, seed)
        assert (await node.until_complete(model.model)).read_bytes() == BIG
        assert seed.service.store.manifest(model.model) == plan


async def test_two_agents_in_one_models_directory(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        await network.node("a")
        other = SwarmService(
            Store(tmp_path / "a"), network.nodes[0].mesh.open_stream, network.nodes[0].id, random.Random()
        )
        with pytest.raises(AgentRunning):
            await other.run()
