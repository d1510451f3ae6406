"""Two sockets joined by a thread: bursts become one write, nothing is kept for long, and answers go back."""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import threading
from collections.abc import AsyncIterator
from functools import partial

import pytest
import trio
from graph_kit import GRAPH_COMPUTE, GREETING, SET_TENSOR, graph, message
from mesh_lab import read_exactly, read_to_end

from tightwad_agent.direct import TAKE_SIZE, SocketEnd
from tightwad_agent.engine.graph_codec import DELTA, GraphEncoder
from tightwad_agent.engine.rpc_answers import Answers
from tightwad_agent.errors import ProtocolError
from tightwad_agent.filters import Changing, Filter
from tightwad_agent.tunnel import MAX_HELD, _Way, join, uncounted

PATIENCE_S = 20.0
GET_TENSOR = 8
SET = message(SET_TENSOR, bytes(400))
GET = message(GET_TENSOR, bytes(312))


def sockets() -> tuple[trio.SocketStream, trio.SocketStream]:
    """Over TCP, as in life: a socket of another kind is readable whatever is expected of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        left = socket.create_connection(listener.getsockname())
        right = listener.accept()[0]
    return tuple(trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in (left, right))  # type: ignore[return-value]


class Counted(SocketEnd):
    """Knows how often something was sent."""

    n_gives = 0

    def give(self, data: bytes | bytearray | memoryview) -> bool:
        self.n_gives += 1
        return super().give(data)


class Joined:
    """`engine` and `worker` are the far ends of two connections; their near ends are joined."""

    def __init__(self, engine: trio.SocketStream, worker: trio.SocketStream, near: Counted, far: Counted) -> None:
        self.engine, self.worker, self.near, self.far = engine, worker, near, far

    async def send_parts(self, *messages: bytes) -> None:
        """As the engine does: command, size and payload each by themselves."""
        for one in messages:
            for part in (one[:1], one[1:9], one[9:]):
                if part:
                    await self.engine.send_all(part)


@contextlib.asynccontextmanager
async def joined(to_right: Filter | None = None, to_left: Filter | None = None) -> AsyncIterator[Joined]:
    engine, near = sockets()
    far, worker = sockets()
    made = Joined(engine, worker, Counted(near), Counted(far))
    async with trio.open_nursery() as nursery, engine, worker:
        run = partial(join, made.near, made.far, uncounted, uncounted, to_right=to_right, to_left=to_left)
        nursery.start_soon(run)
        with trio.fail_after(PATIENCE_S):
            yield made
        nursery.cancel_scope.cancel()


async def test_a_burst_is_a_few_writes_and_not_one_for_each_part() -> None:
    async with joined(GraphEncoder()) as tunnel:
        await tunnel.engine.send_all(GREETING)
        assert await read_exactly(tunnel.worker, len(GREETING)) == GREETING
        tunnel.far.n_gives = 0
        burst = [SET, SET, SET, message(16), GET]
        await tunnel.send_parts(*burst)
        sent = b"".join(burst)
        assert await read_exactly(tunnel.worker, len(sent)) == sent
        assert tunnel.far.n_gives <= 3, "of 13 parts"


async def test_without_a_filter_nothing_is_kept_back() -> None:
    async with joined() as tunnel:
        for part in (b"a", b"bc"):
            await tunnel.engine.send_all(part)
            assert await read_exactly(tunnel.worker, len(part)) == part
        assert tunnel.far.n_gives == 2


@pytest.mark.parametrize("n", [len(SET), 9, 100, 1], ids=["a whole one", "a header", "half", "a byte"])
async def test_what_nothing_follows_arrives_all_the_same(n: int) -> None:
    async with joined(GraphEncoder()) as tunnel:
        await tunnel.engine.send_all(GREETING)
        assert await read_exactly(tunnel.worker, len(GREETING)) == GREETING
        await tunnel.engine.send_all(SET[:n])
        if n >= 9:  # of less than a header nobody can make anything
            assert await read_exactly(tunnel.worker, n) == SET[:n]
            n_read = n
        else:
            n_read = 0
        await tunnel.engine.send_all(SET[n:] + GET)
        rest = (SET + GET)[n_read:]
        assert await read_exactly(tunnel.worker, len(rest)) == rest


async def test_what_was_kept_arrives_before_the_end() -> None:
    async with joined(GraphEncoder()) as tunnel:
        await tunnel.engine.send_all(GREETING + SET)
        await tunnel.engine.aclose()
        assert await read_to_end(tunnel.worker) == GREETING + SET


async def test_an_answer_is_one_write() -> None:
    async with joined(to_left=Answers()) as tunnel:
        for number in range(3):
            tunnel.near.n_gives = 0
            answer = struct.pack("<Q", 2304), bytes([number]) * 2304
            for part in answer:
                await tunnel.worker.send_all(part)
            assert await read_exactly(tunnel.engine, 2312) == b"".join(answer)
            assert tunnel.near.n_gives == 1


async def test_an_answer_that_stays_short_of_its_size_is_not_kept() -> None:
    """Whatever the worker is, what it said arrives."""
    async with joined(to_left=Answers()) as tunnel:
        await tunnel.worker.send_all(struct.pack("<Q", 100_000) + b"a")
        assert await read_exactly(tunnel.engine, 9) == struct.pack("<Q", 100_000) + b"a"
        await tunnel.worker.send_all(b"b" * 5_000)
        assert await read_exactly(tunnel.engine, 5_000) == b"b" * 5_000


class Bottomless(Filter):
    """More follows, always."""

    more_follows = True  # type: ignore[assignment]


async def test_much_is_not_kept() -> None:
    engine, near = sockets()
    far, worker = sockets()
    way = _Way(SocketEnd(near), SocketEnd(far), uncounted, Bottomless())
    async with engine, worker, way.source, way.sink:
        with trio.fail_after(PATIENCE_S):
            await engine.send_all(bytes(MAX_HELD // 2))
            await trio.sleep(0.05)
            way.step()
            assert way.held_until < math.inf
            await engine.send_all(bytes(MAX_HELD))
            await trio.sleep(0.05)
            way.step()
            assert way.held_until == math.inf
            assert len(await read_exactly(worker, 3 * MAX_HELD // 2)) == 3 * MAX_HELD // 2


async def test_what_waits_behind_something_large_is_not_overwritten() -> None:
    """Both ways take into one buffer."""
    large = bytes(8 << 20)
    async with joined(Changing(lambda data: [lambda: large, data])) as tunnel:
        await tunnel.engine.send_all(b"A" * 1000)
        await trio.sleep(0.1)
        await tunnel.worker.send_all(b"B" * 1000)
        assert await read_exactly(tunnel.engine, 1000) == b"B" * 1000
        assert await read_exactly(tunnel.worker, len(large) + 1000) == large + b"A" * 1000


async def test_graphs_and_what_comes_behind_them_arrive_through_slow_ends() -> None:
    """More than fits: the tunnel waits for the worker with all the parts of what it was given."""
    n = 60
    parts = [bytes([number]) * (TAKE_SIZE + number) for number in range(n)]
    change = Changing(lambda _data: list(parts))
    async with joined(change) as tunnel:
        await tunnel.engine.send_all(b"go")
        await trio.sleep(0.2)
        wanted = b"".join(parts)
        assert await read_exactly(tunnel.worker, len(wanted)) == wanted


async def test_later_is_fetched_in_order_and_outside_of_trio() -> None:
    where: list[threading.Thread] = []

    def fetched() -> bytes:
        where.append(threading.current_thread())
        return b"later"

    async with joined(Changing(lambda data: [b"<", fetched, bytes(data)])) as tunnel:
        await tunnel.engine.send_all(b">")
        assert await read_exactly(tunnel.worker, 7) == b"<later>"
    assert where
    assert where[0] is not threading.main_thread()


async def test_an_error_while_fetching_is_raised() -> None:
    def fetched() -> bytes:
        raise ProtocolError("not those bytes")

    engine, near = sockets()
    far, worker = sockets()
    async with engine, worker:
        await engine.send_all(b"x")
        with pytest.raises(ProtocolError, match="not those bytes"), trio.fail_after(PATIENCE_S):
            await join(near, far, uncounted, uncounted, to_right=Changing(lambda _data: [fetched]))


async def test_a_graph_goes_on_when_it_is_whole() -> None:
    async with joined(GraphEncoder()) as tunnel:
        await tunnel.engine.send_all(GREETING)
        assert await read_exactly(tunnel.worker, len(GREETING)) == GREETING
        tunnel.far.n_gives = 0
        await tunnel.send_parts(message(GRAPH_COMPUTE, graph(1)))
        header = await read_exactly(tunnel.worker, 9)
        await read_exactly(tunnel.worker, int.from_bytes(header[1:], "little"))
        assert header[0] == DELTA
        assert tunnel.far.n_gives == 1


@pytest.mark.parametrize("full", ["up", "down"])
async def test_a_tunnel_that_is_cancelled_while_its_ends_are_full_is_over_at_once(full: str) -> None:
    engine, near = sockets()
    far, worker = sockets()
    async with engine, worker:
        with trio.move_on_after(0.5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(join, near, far, uncounted, uncounted)
                nursery.start_soon((engine if full == "up" else worker).send_all, bytes(64 << 20))
        with trio.fail_after(5):
            with contextlib.suppress(trio.BrokenResourceError):
                while await (worker if full == "up" else engine).receive_some():
                    pass


async def test_a_byte_of_an_answer_arrives() -> None:
    async with joined(to_left=Answers()) as tunnel:
        for _ in range(3):
            await tunnel.worker.send_all(b"k")
            assert await read_exactly(tunnel.engine, 1) == b"k"
