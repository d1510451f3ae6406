"""A forwarder and a worker's stream over real TLS links, with a program behind that sends back what it gets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mesh_lab
import pytest
import trio
from engine_fakes import Rig, Worker, phase, until
from graph_kit import GRAPH_COMPUTE, GRAPH_RECOMPUTE, GREETING, SET_TENSOR, graph, message
from mesh_lab import PATIENCE_S, founder, links_of, member, read_exactly, read_to_end

from tightwad_agent.engine.commands import GRAPHS, RPC, START, plain_epoch
from tightwad_agent.engine.forward import Forwarder
from tightwad_agent.engine.graph_codec import FIRST_OWN, SAME, VERSION
from tightwad_agent.engine.pool import PoolPhase
from tightwad_agent.ids import Epoch, NodeId
from tightwad_agent.mesh.links import Services

ANSWER_BYTES = 36
"""HELLO's."""
GRAPHS_SENT = [message(GRAPH_COMPUTE, graph(batch)) for batch in (1, 4, 5)]
WEIGHTS = message(SET_TENSOR, bytes(range(256)) * (3 << 12))


@dataclass
class Tunnel:
    """A worker that is started, and a coordinator that reaches its stream over TLS."""

    nursery: trio.Nursery
    epoch: Epoch
    box: mesh_lab.Box
    links: Any
    opened: list[dict[str, Any]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    async def open_stream(self, node: NodeId, service: str, args: dict[str, Any]) -> trio.abc.Stream:
        self.opened.append(args)
        stream, _ = await self.links.dial([self.box.address], want=node, service=service, args=args)
        assert isinstance(stream, trio.abc.Stream)
        return stream

    async def stream(self, **args: object) -> trio.abc.Stream:
        """To the worker, without a forwarder."""
        return await self.open_stream(self.box.node, RPC, {"epoch": plain_epoch(self.epoch)} | args)

    async def forwarder(self, graphs: int) -> Forwarder:
        def lost(_node: NodeId, reason: str) -> None:
            self.lost.append(reason)

        made = Forwarder(self.box.node, self.epoch, self.open_stream, lost, graphs=graphs)
        await self.nursery.start(made.run)
        return made


@pytest.fixture
async def tunnel(nursery: trio.Nursery, tmp_path: Path) -> Tunnel:
    there = founder(tmp_path)
    here = member(there, tmp_path)
    worker = await Rig(nursery, tmp_path).worker("w", accepts=lambda _epoch, peer: peer == here.node)
    epoch = Epoch(1, here.node)
    with trio.fail_after(PATIENCE_S):
        answer = await worker.service.methods[START](here.node, {"epoch": plain_epoch(epoch), "devices": ["CPU"]})
    assert answer[GRAPHS] == VERSION
    box = await mesh_lab.start(nursery, there, Services(dict(worker.service.streams)))
    return Tunnel(nursery, epoch, box, links_of(here))


@asynccontextmanager
async def greeted(port: int) -> AsyncIterator[trio.SocketStream]:
    """A connection of the engine to the forwarder, past HELLO."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as engine:
        await engine.send_all(GREETING)
        await read_exactly(engine, ANSWER_BYTES)
        yield engine


async def sent_back(engine: trio.SocketStream, parts: list[bytes]) -> bytes:
    async def send() -> None:
        for part in parts:
            await engine.send_all(part)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        return await read_exactly(engine, sum(map(len, parts)))


def a_round(batch: int) -> list[bytes]:
    return [message(SET_TENSOR, bytes([batch]) * 3000), GRAPHS_SENT[batch], message(8, bytes(312))]


PARTS = [WEIGHTS, *a_round(0), *a_round(1), *a_round(0), message(GRAPH_RECOMPUTE, bytes(4)), WEIGHTS, *a_round(2)]
SENT = b"".join(PARTS)


@pytest.mark.parametrize("cut", [0, 1000, 200_000])
async def test_the_worker_gets_what_the_engine_sent_and_graphs_hardly_cross(tunnel: Tunnel, cut: int) -> None:
    forwarder = await tunnel.forwarder(VERSION)
    parts = [SENT[at : at + cut] for at in range(0, len(SENT), cut)] if cut else PARTS
    async with greeted(forwarder.port) as engine:
        assert await sent_back(engine, parts) == SENT
        await until(lambda: forwarder.bytes_up == len(GREETING) + len(SENT))
    n_graphs = 3 * len(GRAPHS_SENT[0]) + len(GRAPHS_SENT[2])
    assert 0.98 * n_graphs < forwarder.bytes_saved < n_graphs
    assert tunnel.opened[0][GRAPHS] == VERSION


async def test_each_connection_remembers_for_itself(tunnel: Tunnel) -> None:
    forwarder = await tunnel.forwarder(VERSION)
    saved = []
    for _ in range(2):
        async with greeted(forwarder.port) as engine:
            assert await sent_back(engine, a_round(0)) == b"".join(a_round(0))
        saved.append(forwarder.bytes_saved)
    assert saved[1] == 2 * saved[0] < 2 * (len(GRAPHS_SENT[0]) - 10)


@pytest.mark.parametrize("graphs", [0, VERSION + 1])
async def test_to_a_worker_that_does_not_know_our_codec_all_goes_plain(tunnel: Tunnel, graphs: int) -> None:
    forwarder = await tunnel.forwarder(graphs)
    async with greeted(forwarder.port) as engine:
        assert await sent_back(engine, PARTS) == SENT
    assert forwarder.bytes_saved == 0
    assert GRAPHS not in tunnel.opened[0]


async def test_a_coordinator_that_does_not_know_it_is_served_plainly(tunnel: Tunnel) -> None:
    odd = message(SAME, b"\0") + message(FIRST_OWN) + b"odd"
    async with await tunnel.stream() as stream:
        await stream.send_all(GREETING)
        await read_exactly(stream, ANSWER_BYTES)
        await stream.send_all(odd)
        assert await read_exactly(stream, len(odd)) == odd


@pytest.mark.parametrize("graphs", [VERSION + 1, -1, "1", None, [1]])
async def test_a_codec_that_was_not_offered_is_refused(tunnel: Tunnel, graphs: object) -> None:
    async with await tunnel.stream(graphs=graphs) as stream:
        assert await read_to_end(stream) == b""


async def test_what_no_encoder_sends_ends_the_stream_and_no_other(tunnel: Tunnel) -> None:
    async with await tunnel.stream(graphs=VERSION) as stream:
        await stream.send_all(GREETING)
        await read_exactly(stream, ANSWER_BYTES)
        await stream.send_all(message(SAME, b"\0"))
        assert await read_to_end(stream) == b""
    forwarder = await tunnel.forwarder(VERSION)
    async with greeted(forwarder.port) as engine:
        assert await sent_back(engine, PARTS) == SENT


async def test_a_pool_with_workers_of_both_kinds(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = Rig(nursery, tmp_path)
    old, new = await rig.worker("v"), await rig.worker("w")
    opened = {old.id: list[object](), new.id: list[object]()}
    for worker in (old, new):
        watch(worker, opened[worker.id])
    start = old.node.methods[START]

    async def older(peer: NodeId, params: dict[str, Any]) -> dict[str, Any]:
        answer = await start(peer, params)
        return {key: answer[key] for key in ("protocol", "digest")}

    old.node.methods[START] = older
    pool = await rig.pool()
    pool.set_target(rig.spec(old, new))
    await phase(pool, PoolPhase.READY)
    assert set(opened[old.id]) == {None}
    assert set(opened[new.id]) == {VERSION}


def watch(worker: Worker, opened: list[object]) -> None:
    """Notes with which codec each stream to this worker is opened."""
    serve = worker.node.streams[RPC]

    async def watched(peer: NodeId, stream: trio.abc.Stream, args: dict[str, Any]) -> None:
        opened.append(args.get(GRAPHS))
        await serve(peer, stream, args)

    worker.node.streams[RPC] = watched
