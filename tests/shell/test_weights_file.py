"""A worker takes weights from its own copy of the model: over real TLS links, with a program behind that sends back."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mesh_lab
import pytest
import trio
from engine_fakes import Rig, until
from graph_kit import GRAPH_COMPUTE, GREETING, SET_TENSOR, graph, message
from mesh_lab import PATIENCE_S, founder, links_of, member, read_exactly, read_to_end

from tightwad_agent.engine.commands import GRAPHS, MODEL, RPC, START, WEIGHTS, plain_epoch
from tightwad_agent.engine.forward import Forwarder
from tightwad_agent.engine.graph_codec import VERSION
from tightwad_agent.engine.weights_codec import BLOCK_BYTES, Extent, Weights
from tightwad_agent.engine.weights_file import CHECKED_S, MAX_CHECKED, Checked, WeightsOf, read
from tightwad_agent.errors import BadGguf, WeightsDiffer
from tightwad_agent.ids import Epoch, ModelId, NodeId
from tightwad_agent.mesh.links import Services

MODEL_ID = ModelId("a" * 64)
CONTENT = random.Random(5).randbytes(3 * BLOCK_BYTES + 5)
PLACES = {b"one": (100, 2 * BLOCK_BYTES + 9), b"two": (2_300_000, 100_000)}
ANSWER_BYTES = 36


def tensor(name: bytes) -> bytes:
    place, size = PLACES[name]
    data = CONTENT[place : place + size]
    return message(SET_TENSOR, bytes(228) + name.ljust(64, b"\0") + bytes(13) + data)


LOAD = tensor(b"one") + tensor(b"two")
ROUNDS = message(GRAPH_COMPUTE, graph(1)) + message(8, bytes(312)) + message(GRAPH_COMPUTE, graph(1))


class Tunnel:
    """A worker that holds a model, and a coordinator that reaches it over TLS."""

    def __init__(self, nursery: trio.Nursery, tmp_path: Path) -> None:
        self.nursery = nursery
        self.file = tmp_path / "own.gguf"
        self.file.write_bytes(CONTENT)
        self.weights = Weights(PLACES)
        self.opened: list[dict[str, Any]] = []
        self.lost: list[str] = []
        self.differs: list[str] = []
        self._tmp_path = tmp_path

    async def open(self, path_of: Callable[[ModelId], Path | None] | None = None) -> Tunnel:
        there = founder(self._tmp_path)
        here = member(there, self._tmp_path)
        self.worker = await Rig(self.nursery, self._tmp_path).worker(
            "w",
            accepts=lambda _epoch, peer: peer == here.node,
            path_of=path_of or (lambda model: self.file if model == MODEL_ID else None),
            on_differs=lambda _model, why: self.differs.append(why),
        )
        self.epoch = Epoch(1, here.node)
        self._coordinator = here.node
        self.box = await mesh_lab.start(self.nursery, there, Services(dict(self.worker.service.streams)))
        self._links = links_of(here)
        return self

    async def start(self, run: int = 0, model: str = MODEL_ID) -> dict[str, Any]:
        order = {"epoch": plain_epoch(self.epoch), "devices": ["CPU"], "run": run, MODEL: model}
        with trio.fail_after(PATIENCE_S):
            return await self.worker.service.methods[START](self._coordinator, order)

    async def open_stream(self, node: NodeId, service: str, args: dict[str, Any]) -> trio.abc.Stream:
        self.opened.append(args)
        stream, _ = await self._links.dial([self.box.address], want=node, service=service, args=args)
        assert isinstance(stream, trio.abc.Stream)
        return stream

    async def forwarder(self, started: dict[str, Any], graphs: int = VERSION) -> Forwarder:
        def lost(_node: NodeId, reason: str) -> None:
            self.lost.append(reason)

        made = Forwarder(
            self.box.node,
            self.epoch,
            self.open_stream,
            lost,
            graphs=graphs,
            weights=started[WEIGHTS],
            model=MODEL_ID,
            file=self.weights,
        )
        await self.nursery.start(made.run)
        return made


@pytest.fixture
async def tunnel(nursery: trio.Nursery, tmp_path: Path) -> Tunnel:
    return await Tunnel(nursery, tmp_path).open()


async def sent_back(port: int, data: bytes, step: int = 100_000) -> bytes:
    """What the worker got, which it sends back, behind HELLO; less if the connection ends."""
    with trio.fail_after(PATIENCE_S):
        async with await trio.open_tcp_stream("127.0.0.1", port) as engine, trio.open_nursery() as nursery:
            await engine.send_all(GREETING)
            await read_exactly(engine, ANSWER_BYTES)

            async def send() -> None:
                with suppress(trio.BrokenResourceError):
                    for at in range(0, len(data), step):
                        await engine.send_all(data[at : at + step])

            nursery.start_soon(send)
            got = b""
            while len(got) < len(data) and (more := await _some(engine)):
                got += more
            return got


async def _some(stream: trio.SocketStream) -> bytes:
    try:
        return await stream.receive_some()
    except trio.BrokenResourceError:
        return b""


@pytest.mark.parametrize("graphs", [0, VERSION])
@pytest.mark.parametrize("step", [1000, 300_000])
async def test_the_worker_gets_the_weights_and_they_do_not_cross(tunnel: Tunnel, graphs: int, step: int) -> None:
    forwarder = await tunnel.forwarder(await tunnel.start(), graphs)
    sent = ROUNDS + LOAD + ROUNDS + tensor(b"two") + ROUNDS
    assert await sent_back(forwarder.port, sent, step) == sent
    weights = 2 * BLOCK_BYTES + 9 + 2 * 100_000
    assert 0.99 * weights < forwarder.bytes_saved < len(sent)
    assert tunnel.opened[0][WEIGHTS] == 1
    assert tunnel.lost == []


async def test_many_connections_and_a_second_run_find_the_sums_known(tunnel: Tunnel) -> None:
    for run in range(2):
        forwarder = await tunnel.forwarder(await tunnel.start(run))
        for _ in range(3):
            assert await sent_back(forwarder.port, LOAD) == LOAD
    assert len(tunnel.weights.digests) == 4


async def test_a_worker_without_the_model_gets_it_over_the_network(tunnel: Tunnel) -> None:
    tunnel.file.unlink()
    started = await tunnel.start(model="b" * 64)
    assert started[WEIGHTS] == 0
    forwarder = await tunnel.forwarder(started)
    assert await sent_back(forwarder.port, LOAD + ROUNDS) == LOAD + ROUNDS
    assert WEIGHTS not in tunnel.opened[0]


async def test_a_coordinator_of_before_says_no_model(tunnel: Tunnel) -> None:
    order = {"epoch": plain_epoch(tunnel.epoch), "devices": ["CPU"], "run": 0}
    answer = await tunnel.worker.service.methods[START](NodeId(tunnel.epoch.node), order)
    assert (answer[GRAPHS], answer[WEIGHTS]) == (VERSION, 0)


def damaged(file: Path) -> None:
    data = bytearray(CONTENT)
    data[150_000] ^= 1
    file.write_bytes(data)


def truncated(file: Path) -> None:
    os.truncate(file, 150_000)


def foreign(file: Path) -> None:
    file.write_bytes(bytes(len(CONTENT)))


@pytest.mark.parametrize("harm", [damaged, truncated, foreign])
@pytest.mark.parametrize("when", ["before", "after a load"])
async def test_a_file_that_holds_something_else_is_found_out_and_not_used_again(
    tunnel: Tunnel, harm: Callable[[Path], None], when: str
) -> None:
    forwarder = await tunnel.forwarder(await tunnel.start())
    if when == "after a load":
        assert await sent_back(forwarder.port, LOAD) == LOAD
    harm(tunnel.file)
    got = await sent_back(forwarder.port, LOAD)
    assert len(got) < len(LOAD)
    assert LOAD.startswith(got), "not a byte of it reached the worker"
    await until(lambda: bool(tunnel.lost))
    started = await tunnel.start(run=1)
    assert started[WEIGHTS] == 0
    forwarder = await tunnel.forwarder(started)
    assert await sent_back(forwarder.port, LOAD) == LOAD
    assert len(tunnel.differs) == 1
    tunnel.file.write_bytes(CONTENT)
    assert (await tunnel.start(run=2))[WEIGHTS] == 1, "it was repaired"


async def test_a_file_that_goes_away_between_start_and_load_is_a_refusal(tunnel: Tunnel) -> None:
    forwarder = await tunnel.forwarder(await tunnel.start())
    tunnel.file.unlink()
    with pytest.raises(EOFError):
        await trio_read_greeting(forwarder.port)
    await until(lambda: bool(tunnel.lost))


async def trio_read_greeting(port: int) -> None:
    with trio.fail_after(PATIENCE_S):
        async with await trio.open_tcp_stream("127.0.0.1", port) as engine:
            await engine.send_all(GREETING)
            if not await _some(engine):
                raise EOFError


@pytest.mark.parametrize("args", [{WEIGHTS: 2}, {WEIGHTS: 1}, {WEIGHTS: -1}, {WEIGHTS: "1"}, {MODEL: "x", WEIGHTS: 1}])
async def test_a_stream_with_what_was_not_offered_is_refused(tunnel: Tunnel, args: dict[str, Any]) -> None:
    await tunnel.start()
    model = {} if args == {WEIGHTS: 1} else {MODEL: MODEL_ID}
    stream = await tunnel.open_stream(tunnel.box.node, RPC, {"epoch": plain_epoch(tunnel.epoch)} | model | args)
    async with stream:
        assert await read_to_end(stream) == b""


async def test_what_no_encoder_sends_ends_the_stream(tunnel: Tunnel) -> None:
    await tunnel.start()
    args = {"epoch": plain_epoch(tunnel.epoch), WEIGHTS: 1, MODEL: MODEL_ID}
    async with await tunnel.open_stream(tunnel.box.node, RPC, args) as stream:
        await stream.send_all(GREETING)
        await read_exactly(stream, ANSWER_BYTES)
        await stream.send_all(message(0xFA, bytes(32)))
        assert await read_to_end(stream) == b""
    assert tunnel.differs == []


# Blocks, and what is remembered of them


def extent(place: int, n_bytes: int) -> Extent:
    from hashlib import sha256

    return Extent(place, n_bytes, sha256(CONTENT[place : place + n_bytes]).digest())


def test_a_block_is_summed_up_again_after_a_while_or_when_the_file_changed(tmp_path: Path) -> None:
    file, now = tmp_path / "f", [0.0]
    file.write_bytes(CONTENT)
    checked, block = Checked(lambda: now[0]), extent(7, 1000)
    fd = os.open(file, os.O_RDWR)
    try:
        assert read(fd, block, checked) == CONTENT[7:1007]
        stamp = file.stat()
        os.pwrite(fd, b"\0\0\0\0", 500)
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as if the disk had done it
        now[0] = CHECKED_S - 1
        assert read(fd, block, checked) != CONTENT[7:1007]
        now[0] = CHECKED_S
        with pytest.raises(WeightsDiffer):
            read(fd, block, checked)
        os.pwrite(fd, CONTENT[500:504], 500)
        assert read(fd, block, checked) == CONTENT[7:1007]
        os.pwrite(fd, b"\0\0\0\0", 500)
        os.utime(file, ns=(1, 1))
        with pytest.raises(WeightsDiffer, match="are not what"):
            read(fd, block, checked)
    finally:
        os.close(fd)


def test_what_is_remembered_is_bounded() -> None:
    checked, identity = Checked(), (1, 2, 3, 4)
    for place in range(MAX_CHECKED + 1):
        checked.add((identity, Extent(place, 1, b"")))
    assert len(checked._blocks) == 1
    assert (identity, Extent(MAX_CHECKED, 1, b"")) in checked
    assert (identity, Extent(0, 1, b"")) not in checked


def test_sums_are_remembered_while_the_file_is_the_same(tmp_path: Path) -> None:
    file, asked = tmp_path / "f", list[ModelId]()
    file.write_bytes(b"x")

    def places(model: ModelId) -> dict[bytes, tuple[int, int]]:
        asked.append(model)
        return PLACES

    of = WeightsOf(lambda model: file if model == MODEL_ID else None, places)
    first = of(MODEL_ID)
    assert first is not None
    assert of(MODEL_ID) is first
    assert of(ModelId("b" * 64)) is None
    os.utime(file, ns=(5, 5))
    assert of(MODEL_ID) is not first
    file.unlink()
    with pytest.raises(FileNotFoundError):
        of(MODEL_ID)
    assert asked == [MODEL_ID] * 2


@pytest.mark.parametrize("problem", [OSError("gone"), BadGguf("no header")])
async def test_a_file_that_cannot_be_read_costs_nothing_but_the_way(
    nursery: trio.Nursery, tmp_path: Path, problem: Exception
) -> None:
    from engine_fakes import phase

    from tightwad_agent.engine.pool import PoolPhase

    def fail(_model: ModelId) -> Weights | None:
        raise problem

    rig = Rig(nursery, tmp_path)
    pool, worker = await rig.pool(weights=fail), await rig.worker("w")
    pool.set_target(rig.spec(worker))
    await phase(pool, PoolPhase.READY)
