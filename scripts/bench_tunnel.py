"""What a tunnel between two agents costs a connection: added round trip, throughput, and processor time of each end.

Ways, in turn within one run: the echo server itself; a plain pair of `trio.SSLStream` pumps, made here; ours, which is
`Forwarder` and `Links` as the agents run them; and that with graphs recognised. The traffic has the shape of
llama.cpp's RPC. The two ends of a tunnel and the echo server are processes of their own. Certificates are a cluster's
own.
"""

from __future__ import annotations

import contextlib
import json
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import trio

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "shell"), str(ROOT / "tests")]
from graph_kit import GRAPH_COMPUTE, GREETING, SET_TENSOR, graph, message  # noqa: E402
from mesh_lab import founder, links_of, member  # noqa: E402

from tightwad_agent.engine.commands import GRAPHS, RPC  # noqa: E402
from tightwad_agent.engine.forward import Forwarder  # noqa: E402
from tightwad_agent.engine.graph_codec import VERSION, GraphDecoder, GraphEncoder  # noqa: E402
from tightwad_agent.engine.rpc_answers import Answers  # noqa: E402
from tightwad_agent.ids import Address, Epoch  # noqa: E402
from tightwad_agent.mesh import identity, tls  # noqa: E402
from tightwad_agent.mesh.identity import Identity  # noqa: E402
from tightwad_agent.mesh.links import Services, open_listeners  # noqa: E402
from tightwad_agent.tunnel import join, uncounted  # noqa: E402

LOOPBACK = "127.0.0.1"
N_UP, N_DOWN = 16 << 10, 2 << 10
"""A token's activations to a worker of a small model, and its answer."""
N_THROUGH = 1 << 30
CHUNK = 1 << 20
N_WARM = 100
HEADER = struct.Struct("<BQ")
MAX_ADDED_MS = 0.25
MIN_MB_S = 400.0
START_S = 30.0
ANSWER_S = 120.0
DIRECT, PLAIN, OURS, OURS_GRAPHS = "direct", "pair of SSLStream pumps", "ours", "ours, graphs recognised"
GET_TENSOR, FREE_BUFFER = 8, 9
"""What the echo server answers: with 2 KiB in all, and with nothing but its size."""
ASK = message(GET_TENSOR, bytes(312))
SIZE = struct.Struct("<Q")
ANSWER = SIZE.pack(N_DOWN - SIZE.size).ljust(N_DOWN, b"\0")
TOKEN = message(SET_TENSOR, bytes(N_UP - len(ASK) - 9)) + ASK
N_PER_GRAPH = 10
"""A round with a graph takes about as long as so many without."""


class Figure(NamedTuple):
    """One row of the result."""

    case: str
    value: float
    unit: str
    bound: float | None = None
    ok: bool | None = None


@dataclass
class Way:
    """Where to connect to, the processes in between, and what was measured: ms, MB/s, processor time a round trip."""

    port: int
    hops: list[psutil.Process]
    rtt_ms: list[float]
    mb_s: list[float]
    cpu_us: list[float]
    graph_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Extent:
    """How much of it: repeats of all ways in turn, round trips and bytes in each."""

    repeats: int = 5
    n_rounds: int = 3000
    n_through: int = N_THROUGH


QUICK = Extent(2, 500, N_THROUGH >> 3)


def measure(extent: Extent) -> list[Figure]:
    """All ways in turn, so many times over; medians."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        member(founder(Path(folder)), Path(folder))
        echo = stack.enter_context(_child("echo"))
        ways = {DIRECT: Way(echo.port, [], [], [], [])}
        for name, kind in ((PLAIN, "plain"), (OURS, "ours"), (OURS_GRAPHS, "graphs")):
            far = stack.enter_context(_child("far", kind, folder, str(echo.port)))
            near = stack.enter_context(_child("near", kind, folder, str(far.port)))
            ways[name] = Way(near.port, [near.process, far.process], [], [], [])
        for _ in range(extent.repeats):
            for way in ways.values():
                before = _cpu_s(way)
                way.rtt_ms.append(_round_trip_ms(way.port, [TOKEN] * extent.n_rounds))
                way.cpu_us.append((_cpu_s(way) - before) / (extent.n_rounds + N_WARM) * 1e6)
            for name in (DIRECT, OURS, OURS_GRAPHS):
                ways[name].graph_ms.append(
                    _round_trip_ms(ways[name].port, graph_rounds(extent.n_rounds // N_PER_GRAPH))
                )
            for way in ways.values():
                way.mb_s.append(_throughput_mb_s(way.port, extent.n_through))
    return [*_figures(ways), *_graph_figures(ways)]


def graph_rounds(n: int) -> list[bytes]:
    """Rounds of different batch sizes, each of which has llama.cpp send its graph."""
    payloads = [graph(batch) for batch in (1, 4, 5, 2, 7)]
    return [message(GRAPH_COMPUTE, payloads[i % len(payloads)]) + TOKEN for i in range(n)]


def _graph_figures(ways: dict[str, Way]) -> list[Figure]:
    direct_ms = statistics.median(ways[DIRECT].graph_ms)
    rounds = graph_rounds(5 * N_PER_GRAPH)
    encoder = GraphEncoder()
    encoder.feed(GREETING)
    n_crossed = [sum(map(len, encoder.feed(one))) for one in rounds]
    found = [Figure(f"{DIRECT}: round trip with a graph", round(direct_ms, 4), "ms")]
    for name, n_bytes in ((OURS, len(rounds[0])), (OURS_GRAPHS, statistics.mean(n_crossed))):
        added = statistics.median(ways[name].graph_ms) - direct_ms
        found.append(Figure(f"{name}: added to a round trip with a graph", round(added, 4), "ms"))
        found.append(Figure(f"{name}: towards the worker in a round with a graph", round(n_bytes), "bytes"))
    return found


def _figures(ways: dict[str, Way]) -> list[Figure]:
    direct_ms = statistics.median(ways[DIRECT].rtt_ms)
    found = [Figure(f"{DIRECT}: round trip of 16 KiB up, 2 KiB down", round(direct_ms, 4), "ms")]
    for name in (PLAIN, OURS, OURS_GRAPHS):
        way, promised = ways[name], name != PLAIN
        added, speed = statistics.median(way.rtt_ms) - direct_ms, statistics.median(way.mb_s)
        cpu = statistics.median(way.cpu_us) / len(way.hops)
        bounds = (MAX_ADDED_MS, MIN_MB_S) if promised else (None, None)
        kept = (added <= MAX_ADDED_MS, speed >= MIN_MB_S) if promised else (None, None)
        found.append(Figure(f"{name}: added to a round trip", round(added, 4), "ms", bounds[0], kept[0]))
        found.append(Figure(f"{name}: processor time a round trip and process", round(cpu, 1), "us"))
        found.append(Figure(f"{name}: throughput one way", round(speed, 1), "MB/s", bounds[1], kept[1]))
    found.append(Figure(f"{DIRECT}: throughput one way", round(statistics.median(ways[DIRECT].mb_s), 1), "MB/s"))
    return found


# The client


def _round_trip_ms(port: int, rounds: list[bytes]) -> float:
    taken = []
    with _connection(port) as wire:
        answer = bytearray(N_DOWN)
        for request in [TOKEN] * N_WARM + rounds:
            began = time.perf_counter()
            wire.sendall(request)
            n = 0
            while n < N_DOWN:
                n += _some(wire.recv_into(answer))
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[N_WARM:]) * 1e3


def _throughput_mb_s(port: int, n_bytes: int) -> float:
    chunk = bytes(CHUNK)
    with _connection(port) as wire:
        began = time.perf_counter()
        wire.sendall(HEADER.pack(SET_TENSOR, n_bytes))
        for _ in range(n_bytes // CHUNK):
            wire.sendall(chunk)
        wire.sendall(message(FREE_BUFFER))
        _some(len(wire.recv(1)))
        return n_bytes / (time.perf_counter() - began) / 1e6


@contextlib.contextmanager
def _connection(port: int) -> Iterator[socket.socket]:
    with socket.create_connection((LOOPBACK, port), ANSWER_S) as wire:
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire.sendall(GREETING)
        yield wire


def _some(n: int) -> int:
    if not n:
        raise RuntimeError("a connection of the benchmark ended early")
    return n


def _cpu_s(way: Way) -> float:
    return sum(times.user + times.system for times in (hop.cpu_times() for hop in way.hops))


# Processes


@dataclass
class _Child:
    process: psutil.Process
    port: int


@contextlib.contextmanager
def _child(*args: str) -> Iterator[_Child]:
    """One of the programs below; it ends when its input does."""
    argv = [sys.executable, __file__, *args]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{args[0]} of the benchmark did not start")
        yield _Child(psutil.Process(process.pid), json.loads(line)["port"])
    finally:
        process.kill()
        process.communicate()


def _ready(port: int) -> None:
    print(json.dumps({"port": port}), flush=True)


def echo() -> None:
    """Takes the engine's messages, and answers those that ask something."""
    listener = socket.create_server((LOOPBACK, 0))
    _ready(listener.getsockname()[1])
    while True:
        wire, _ = listener.accept()
        threading.Thread(target=_answer, args=(wire,), daemon=True).start()


def _answer(wire: socket.socket) -> None:
    with wire:
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer, answers = memoryview(bytearray(CHUNK)), {GET_TENSOR: ANSWER, FREE_BUFFER: SIZE.pack(0)}
        while len(header := wire.recv(HEADER.size, socket.MSG_WAITALL)) == HEADER.size:
            command, size = HEADER.unpack(header)
            if not _swallowed(wire, buffer, size):
                break
            wire.sendall(answers.get(command, b""))


def _swallowed(wire: socket.socket, buffer: memoryview, n_left: int) -> bool:
    while n_left > 0:
        n = wire.recv_into(buffer[: min(n_left, CHUNK)])
        if not n:
            return False
        n_left -= n
    return True


async def near_ours(folder: Path, port: int, graphs: int = 0) -> None:
    """The coordinator's end."""
    me, there = _known(folder, "member"), _known(folder, "founder").node
    links = links_of(me)

    async def open_stream(node: Any, service: str, args: dict[str, Any]) -> trio.abc.Stream:
        stream, _ = await links.dial([Address(LOOPBACK, port)], want=node, service=service, args=args)
        return stream

    forwarder = Forwarder(there, Epoch(1, str(me.node)), open_stream, lambda *_: None, graphs=graphs)
    async with trio.open_nursery() as nursery:
        await nursery.start(forwarder.run)
        _ready(forwarder.port)


async def near_graphs(folder: Path, port: int) -> None:
    await near_ours(folder, port, VERSION)


async def far_ours(folder: Path, port: int) -> None:
    """The worker's end."""

    async def rpc(_peer: Any, stream: trio.abc.Stream, args: dict[str, Any]) -> None:
        graphs = GraphDecoder() if GRAPHS in args else None
        local = await trio.open_tcp_stream(LOOPBACK, port)
        await join(stream, local, uncounted, uncounted, to_right=graphs, to_left=Answers())

    listeners = await open_listeners(0, LOOPBACK)
    _ready(listeners[0].socket.getsockname()[1])
    await links_of(_known(folder, "founder")).serve(listeners, Services({RPC: rpc}))


async def near_plain(folder: Path, port: int) -> None:
    context = tls.client_context(_known(folder, "member"))

    async def serve(local: trio.SocketStream) -> None:
        remote = trio.SSLStream(await trio.open_tcp_stream(LOOPBACK, port), context)
        await _pumped(local, remote)

    await _serve(serve)


async def far_plain(folder: Path, port: int) -> None:
    context = tls.server_context(_known(folder, "founder"))

    async def serve(remote: trio.SocketStream) -> None:
        local = await trio.open_tcp_stream(LOOPBACK, port)
        await _pumped(local, trio.SSLStream(remote, context, server_side=True))

    await _serve(serve)


async def _pumped(local: trio.SocketStream, remote: trio.SSLStream[trio.SocketStream]) -> None:
    async with trio.open_nursery() as nursery, local, remote.transport_stream:

        async def one_way(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while data := await source.receive_some(64 << 10):
                    await sink.send_all(data)
            nursery.cancel_scope.cancel()

        await remote.do_handshake()
        nursery.start_soon(one_way, local, remote)
        await one_way(remote, local)


async def _serve(serve: Callable[[trio.SocketStream], Awaitable[None]]) -> None:
    listeners = await trio.open_tcp_listeners(0, host=LOOPBACK)
    _ready(listeners[0].socket.getsockname()[1])
    await trio.serve_listeners(serve, listeners)


def _known(folder: Path, name: str) -> Identity:
    me = identity.load(folder / name)
    assert me is not None
    return me


def main() -> None:
    """A child of `measure`."""
    role, *rest = sys.argv[1:]
    if role == "echo":
        echo()
    kind, folder, port = rest
    end = {
        ("near", "ours"): near_ours,
        ("far", "ours"): far_ours,
        ("near", "graphs"): near_graphs,
        ("far", "graphs"): far_ours,
        ("near", "plain"): near_plain,
        ("far", "plain"): far_plain,
    }[role, kind]

    async def until_alone() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end, Path(folder), int(port))
            await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
            nursery.cancel_scope.cancel()

    trio.run(until_alone)


if __name__ == "__main__":
    main()
