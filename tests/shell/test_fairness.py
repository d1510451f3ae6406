"""One client cannot starve another: turns on the engine, with the endpoint in front and over the mesh."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing

from tightwad_agent.proxy import callers
from tightwad_agent.proxy.access import Access
from tightwad_agent.proxy.app import App
from tightwad_agent.proxy.client import Answer, ask
from tightwad_agent.proxy.cluster import Local, Own, Remote
from tightwad_agent.proxy.fakes import Asked, FakeCluster, FakeGenerator, Step, fake_chunks, fake_info
from tightwad_agent.proxy.gate import Gate
from tightwad_agent.proxy.heads import Peer
from tightwad_agent.proxy.http1 import serve_connection
from tightwad_agent.proxy.limits import Crowded, Limits
from tightwad_agent.proxy.usage import Usage, Used
from tightwad_agent.testing import MemoryMesh, node_id

DEADLINE_S = 30.0
JSON = [(b"content-type", b"application/json")]
ANYBODY = Access(open_endpoint=True)


class Engine(FakeGenerator):
    """Answers when it is told to. `begun`: the first letters of the prompts, in the order in which they got a turn."""

    def __init__(self, n_slots: int = 1) -> None:
        super().__init__(self._answer, fake_info(slots=n_slots))
        self.gates: list[trio.Event] = []
        self.changed = trio.Event()

    def _answer(self, asked: Asked) -> Iterator[Step]:
        gate = trio.Event()
        self.gates.append(gate)
        self.changed.set()
        self.changed = trio.Event()
        yield gate
        yield from fake_chunks(b"ok", 2)

    @property
    def begun(self) -> str:
        return "".join(chr(a.prompt[1]) for a in self.asked)

    async def begins(self, n: int) -> str:
        """Waits until so many had a turn."""
        with trio.fail_after(DEADLINE_S):
            while len(self.gates) < n:
                await self.changed.wait()
        return self.begun


@pytest.fixture
async def inner() -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


class Asker:
    """Sends completions from one address and keeps the answers."""

    def __init__(self, nursery: trio.Nursery, app: App, address: str) -> None:
        self._nursery = nursery
        self._app = app
        self._address = address
        self.answers: list[Answer] = []

    def send(self, letter: str, times: int = 1, **body: object) -> None:
        for _ in range(times):
            self._nursery.start_soon(self._one, {"prompt": letter, "max_tokens": 4, **body})

    async def _one(self, body: dict[str, object]) -> None:
        near, far = trio.testing.memory_stream_pair()
        peer = Peer(self._address)
        self._nursery.start_soon(lambda: serve_connection(far, self._app.handle, Limits(), peer=peer))
        answer = await ask(near, "POST", "/v1/completions", JSON, json.dumps(body).encode())
        answer.text = await answer.read(1 << 20)  # type: ignore[attr-defined]
        self.answers.append(answer)
        await near.aclose()


def app_of(cluster: FakeCluster) -> App:
    return App(cluster, admin_key=lambda: "admin", guard=ANYBODY)


async def settled() -> None:
    """Until all tasks wait, and none of them for a thread: on a busy machine one may take longer than any pause."""
    threads = trio.to_thread.current_default_thread_limiter()
    with trio.fail_after(DEADLINE_S):
        await trio.testing.wait_all_tasks_blocked(0.05)
        while threads.borrowed_tokens:
            await trio.testing.wait_all_tasks_blocked(0.05)


async def test_one_request_beside_fifty_gets_the_next_turn(inner: trio.Nursery) -> None:
    engine = Engine()
    app = app_of(FakeCluster(where=Own(engine)))
    many, one = Asker(inner, app, "10.0.0.1"), Asker(inner, app, "10.0.0.2")
    many.send("a", 50)
    assert await engine.begins(1) == "a"
    await settled()
    one.send("b")
    await settled()
    for i in range(3):
        engine.gates[i].set()
        await engine.begins(i + 2)
    assert engine.begun == "abaa"


async def test_slots_are_shared_half_and_half(inner: trio.Nursery) -> None:
    engine = Engine(4)
    app = app_of(FakeCluster(where=Own(engine)))
    many, few = Asker(inner, app, "10.0.0.1"), Asker(inner, app, "10.0.0.2")
    many.send("a", 30)
    assert await engine.begins(4) == "aaaa"
    few.send("b", 30)
    await settled()
    for i in range(4):
        engine.gates[i].set()
    assert sorted((await engine.begins(8))[4:]) == list("aabb")


async def test_many_choices_are_many_turns(inner: trio.Nursery) -> None:
    engine = Engine(2)
    app = app_of(FakeCluster(where=Own(engine)))
    greedy, one = Asker(inner, app, "10.0.0.1"), Asker(inner, app, "10.0.0.2")
    greedy.send("a", n=8)
    await engine.begins(2)
    one.send("b")
    await settled()
    engine.gates[0].set()
    assert await engine.begins(3) == "aab"


async def test_clients_of_all_nodes_are_told_apart_where_the_slots_are(inner: trio.Nursery) -> None:
    """Each node's own programs are a client, an address that comes in at two nodes is one."""
    engine = Engine()
    mesh = MemoryMesh(inner)
    coordinator, left, right = (mesh.add(name) for name in ("coordinator", "left", "right"))
    home = app_of(FakeCluster(where=Own(engine)))
    coordinator.streams["http"] = home.handle_mesh
    edges = [app_of(FakeCluster(where=Remote(coordinator.node), opener=node.open_stream)) for node in (left, right)]
    Asker(inner, edges[0], "127.0.0.1").send("l", 20)
    assert await engine.begins(1) == "l"
    await settled()
    Asker(inner, edges[0], "10.0.0.7").send("x", 10)
    await settled()
    Asker(inner, edges[1], "10.0.0.7").send("y", 10)
    await settled()
    Asker(inner, edges[1], "127.0.0.1").send("r")
    await settled()
    Asker(inner, home, "127.0.0.1").send("h")
    await settled()
    for i in range(5):
        engine.gates[i].set()
        await engine.begins(i + 2)
    assert engine.begun[:4] == "lxrh"
    assert set(engine.begun[4:]) <= {"l", "x", "y"}


async def test_a_client_cannot_pass_for_another(inner: trio.Nursery) -> None:
    engine = Engine()
    mesh = MemoryMesh(inner)
    coordinator, edge = mesh.add("coordinator"), mesh.add("edge")
    coordinator.streams["http"] = app_of(FakeCluster(where=Own(engine))).handle_mesh
    app = app_of(FakeCluster(where=Remote(coordinator.node), opener=edge.open_stream))
    seen: list[bytes | None] = []
    real = callers.passed_caller

    def watch(header: bytes | None, node: object) -> str:
        seen.append(header)
        return real(header, node)  # type: ignore[arg-type]

    near, far = trio.testing.memory_stream_pair()
    inner.start_soon(lambda: serve_connection(far, app.handle, Limits(), peer=Peer("10.0.0.9")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callers, "passed_caller", watch)
        forged = [*JSON, (b"x-tightwad-client", b"key:boss")]
        inner.start_soon(ask, near, "POST", "/v1/completions", forged, b'{"prompt": "a"}')
        await engine.begins(1)
    assert seen == [callers.caller("", "10.0.0.9", is_local=False).encode()]


async def test_too_many_wait_and_the_others_do_not_notice(inner: trio.Nursery) -> None:
    engine = Engine()
    app = app_of(FakeCluster(where=Own(engine)))
    greedy, other = Asker(inner, app, "10.0.0.1"), Asker(inner, app, "10.0.0.2")
    greedy.send("a", 80)
    await engine.begins(1)
    await settled()
    refused = [a for a in greedy.answers if a.status == 429]
    assert len(refused) == len(greedy.answers) == 80 - Limits().max_requests_per_client
    assert all(a.header(b"retry-after") == b"5" for a in refused)
    assert b"max_requests_per_client" in refused[0].text  # type: ignore[attr-defined]
    other.send("b")
    await settled()
    engine.gates[0].set()
    assert await engine.begins(2) == "ab"


async def test_llama_server_takes_turns_too(inner: trio.Nursery) -> None:
    begun: list[bytes] = []
    turns, go = trio.Semaphore(0), trio.Semaphore(0)

    async def llama(stream: trio.SocketStream) -> None:
        data = b""
        while b'"prompt": "' not in data:
            data += await stream.receive_some(65536)
        begun.append(data.partition(b'"prompt": "')[2][:1])
        turns.release()
        await go.acquire()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    listeners = await inner.start(trio.serve_tcp, llama, 0)
    port = listeners[0].socket.getsockname()[1]
    app = app_of(FakeCluster(where=Local(port, slots=1)))
    Asker(inner, app, "10.0.0.1").send("a", 20)
    await turns.acquire()
    await settled()
    Asker(inner, app, "10.0.0.2").send("b")
    await settled()
    with trio.fail_after(DEADLINE_S):
        for _ in range(2):
            go.release()
            await turns.acquire()
    assert begun == [b"a", b"b", b"a"]


class TestGate:
    async def test_who_hangs_up_gives_its_place_and_its_slot(self, nursery: trio.Nursery) -> None:
        gate, order = Gate(), []
        scopes = [trio.CancelScope() for _ in range(3)]

        async def one(n: int) -> None:
            with scopes[n]:
                async with gate.turn(f"c{n}", 1):
                    order.append(n)
                    await trio.sleep_forever()

        for n in range(3):
            nursery.start_soon(one, n)
            await trio.testing.wait_all_tasks_blocked()
        assert (order, gate.n_waiting) == ([0], 2)
        scopes[1].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert gate.n_waiting == 1
        scopes[0].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert order == [0, 2]
        scopes[2].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert gate._places == {}

    async def test_nobody_waits_for_ever(self, nursery: trio.Nursery, autojump_clock: object) -> None:
        gate = Gate()

        async def stay() -> None:
            async with gate.turn("a", 1):
                await trio.sleep_forever()

        nursery.start_soon(stay)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Crowded, match="no turn") as caught:
            async with gate.turn("b", 1):
                pass
        assert caught.value.http_status == 503
        nursery.cancel_scope.cancel()

    async def test_the_one_with_the_most_waiting_pays(self, nursery: trio.Nursery) -> None:
        gate, refused, begun = Gate(max_waiting=4, max_waiting_each=4), [], []

        async def one(client: str, hold: bool = True) -> None:
            try:
                async with gate.turn(client, 1):
                    begun.append(client)
                    if hold:
                        await trio.sleep_forever()
            except Crowded as exc:
                refused.append((client, exc.http_status))

        for client in "aaaaabcd":
            nursery.start_soon(one, client)
            await trio.testing.wait_all_tasks_blocked()
        assert refused == [("a", 429)] * 3
        assert gate.n_waiting == 4
        nursery.start_soon(one, "e")
        await trio.testing.wait_all_tasks_blocked()
        assert refused[3:] == [("e", 503)], "all have one waiting"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("address", "plain"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:DB8::0:1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("", ""),
        ("what", "what"),
    ],
)
def test_one_address_has_one_form(address: str, plain: str) -> None:
    assert callers.plain_address(address) == plain


@pytest.mark.parametrize(
    ("header", "client"),
    [
        (b"key:phone", "key:phone"),
        (b"ip:0123456789abcdef", "ip:0123456789abcdef"),
        (b"local", f"local:{node_id('n').short}"),
        (None, f"local:{node_id('n').short}"),
        (b"", f"local:{node_id('n').short}"),
        (b"key:" + b"x" * 65, f"local:{node_id('n').short}"),
        (b"key:a b", f"local:{node_id('n').short}"),
        (b"ip:0123456789abcdeF", f"local:{node_id('n').short}"),
        (b"\xff", f"local:{node_id('n').short}"),
    ],
)
def test_what_a_node_says_of_its_clients(header: bytes | None, client: str) -> None:
    assert callers.passed_caller(header, node_id("n")) == client
    assert callers.passed_caller(None, None) == "local:"


async def test_what_a_key_asked_is_counted_where_it_was_asked(inner: trio.Nursery) -> None:
    cluster = FakeCluster(where=Own(FakeGenerator()))
    usage = Usage()
    app = App(cluster, admin_key=lambda: "admin", usage=usage)
    key = [(b"authorization", b"Bearer the-api-key")]
    for stream in (b"false", b"true"):
        near, far = trio.testing.memory_stream_pair()
        inner.start_soon(lambda end=far: serve_connection(end, app.handle, Limits(), peer=Peer("10.0.0.1")))
        body = b'{"prompt": "a", "stream": %s}' % stream
        answer = await ask(near, "POST", "/v1/completions", [*JSON, *key], body)
        assert answer.status == 200
        await answer.read(1 << 20)
        await near.aclose()
    await settled()
    assert usage.all() == {"default": Used(2, 14)}, "seven tokens each: six letters and the end"
