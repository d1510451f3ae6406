"""Routes, authorisation, and requests on their way to servers that misbehave."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from engine_fakes import until

from tightwad_agent.errors import PeerGone, PeerUnreachable
from tightwad_agent.proxy import passage
from tightwad_agent.proxy.access import Access
from tightwad_agent.proxy.app import App
from tightwad_agent.proxy.client import Answer, ask
from tightwad_agent.proxy.cluster import Local, Remote, Unavailable
from tightwad_agent.proxy.fakes import FakeCluster
from tightwad_agent.proxy.heads import Peer
from tightwad_agent.proxy.http1 import serve_connection
from tightwad_agent.proxy.limits import Limits
from tightwad_agent.proxy.openai import ModelEntry
from tightwad_agent.testing import MemoryMesh

CHAT = "/v1/chat/completions"
JSON = [(b"content-type", b"application/json")]
HOLD = Unavailable("the pool is being restarted", {"state": "restarting"}, 3, hold=True)
LOADING = Unavailable("loading demo", {"state": "loading", "model": "demo", "progress": 0.5}, 7)


def app_of(cluster: FakeCluster, **more) -> App:
    return App(cluster, admin_key=lambda: "admin", **more)


def dial(nursery, app: App, peer: str = "127.0.0.1") -> trio.abc.Stream:
    near, far = trio.testing.memory_stream_pair()

    async def serve():
        await serve_connection(far, app.handle, Limits(), peer=Peer(peer))

    nursery.start_soon(serve)
    return near


async def call(nursery, app, method="GET", target="/health", headers=(), body=b"", peer="127.0.0.1") -> Answer:
    """The answer, with its whole body as `answer.text`."""
    stream = dial(nursery, app, peer)
    answer = await ask(stream, method, target, headers, body)
    answer.text = await answer.read(100 << 20)
    await stream.aclose()
    return answer


def plain(answer: Answer):
    return json.loads(answer.text)


Act = Callable[["Upstream", trio.SocketStream, bytes], Awaitable[None]]


@dataclass
class Upstream:
    """A llama-server by script: one act for each connection; the last one is repeated."""

    acts: list[Act]
    requests: list[bytes] = field(default_factory=list)
    closed: trio.Event = field(default_factory=trio.Event)
    """A connection was closed from the other side."""
    asked: trio.Event = field(default_factory=trio.Event)
    port: int = 0
    paused: trio.Event = field(default_factory=trio.Event)

    async def start(self, nursery) -> Upstream:
        listeners = await nursery.start(trio.serve_tcp, self._serve, 0)
        self.port = listeners[0].socket.getsockname()[1]
        return self

    async def _serve(self, stream):
        data = b""
        while b"\r\n\r\n" not in data or len(data) < self._wanted(data):
            part = await stream.receive_some(65536)
            if not part:
                return
            data += part
        self.requests.append(data)
        self.asked.set()
        act = self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]
        try:
            await act(self, stream, data)
        except trio.BrokenResourceError:
            self.closed.set()

    @staticmethod
    def _wanted(data: bytes) -> int:
        head, _, _ = data.partition(b"\r\n\r\n")
        length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        return len(head) + 4 + (int(length[0][15:]) if length else 0)


def says(data: bytes, *, at_a_time: int = 1 << 30) -> Act:
    """Sends these bytes and closes."""

    async def act(_up, stream, _request):
        for at in range(0, len(data), at_a_time):
            await stream.send_all(data[at : at + at_a_time])

    return act


async def hangs(up, stream, _request):
    """Says nothing until the other side leaves."""
    if not await stream.receive_some(1):
        up.closed.set()


def starts_then_hangs(data: bytes) -> Act:
    async def act(up, stream, request):
        await stream.send_all(data)
        await hangs(up, stream, request)

    return act


def answer_of(body: bytes, kind: bytes = b"application/json", status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (status, kind, len(body), body)


SSE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


EVENTS = [b'data: {"n":1}\n\n', b'data: {"n":2}\n\n', b"data: [DONE]\n\n"]
SSE = SSE_HEAD + b"".join(map(chunk, EVENTS)) + b"0\r\n\r\n"
GOOD = answer_of(b'{"ok":true}')


async def local(nursery, *acts: Act) -> tuple[Upstream, FakeCluster]:
    up = await Upstream(list(acts)).start(nursery)
    return up, FakeCluster(where=Local(up.port))


@pytest.fixture
async def inner():
    """A nursery that is cancelled at the end: servers run in it."""
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


class TestPages:
    async def test_root(self, inner):
        answer = await call(inner, app_of(FakeCluster()), target="/")
        assert answer.status == 200
        assert b"http://localhost/v1" in answer.text

    async def test_health(self, inner):
        assert plain(await call(inner, app_of(FakeCluster(where=Local(1))))) == {"status": "ok"}
        for path in ("/health", "/v1/health"):
            answer = await call(inner, app_of(FakeCluster(where=LOADING)), target=path)
            assert answer.status == 503
            assert answer.header(b"retry-after") == b"7"
            body = plain(answer)
            assert body["error"]["message"] == "loading demo"
            assert body["tightwad"] == {"message": "loading demo", "state": "loading", "model": "demo", "progress": 0.5}

    async def test_metrics_are_a_page_for_prometheus(self, inner):
        answer = await call(inner, app_of(FakeCluster(in_flight=3)), target="/metrics")
        assert answer.status == 200
        assert b"text/plain" in answer.header(b"content-type")
        [line] = [x for x in answer.text.decode().splitlines() if x.startswith("tightwad_") and x.endswith(" 3.0")]
        assert "in_flight" in line

    async def test_status_and_peers(self, inner):
        app = app_of(FakeCluster())
        assert plain(await call(inner, app, target="/v1/tightwad/status"))["node"] == "fake"
        assert plain(await call(inner, app, target="/v1/tightwad/peers"))[0]["id"] == "fake"

    async def test_models(self, inner):
        app = app_of(FakeCluster(entries=[ModelEntry("ab" * 32, "a b.gguf", served=True)]))
        assert plain(await call(inner, app, target="/v1/models"))["data"][0]["id"] == "a b"
        assert plain(await call(inner, app, target="/v1/models/a%20b.gguf"))["id"] == "a b"
        answer = await call(inner, app, target="/v1/models/nope")
        assert (answer.status, plain(answer)["error"]["code"]) == (404, "model_not_found")

    async def test_head(self, inner):
        stream = dial(inner, app_of(FakeCluster()))
        answer = await ask(stream, "HEAD", "/v1/models")
        assert answer.status == 200
        assert await answer.read(10) == b""

    @pytest.mark.parametrize(
        "path",
        [
            "/nope",
            "/slots",
            "/props",
            "/v1",
            "/v1/",
            "/v1/tightwad",
            "/v1/tightwad/other",
            "/v1/../slots",
            "/v1/%2e%2e/slots",
            "/v1/a%2f..%2f..%2fslots",
            "/v1//chat",
            "/v1/a%00b",
            "/v1/a%5cb",
        ],
    )
    async def test_not_found(self, inner, path):
        up, cluster = await local(inner, says(GOOD))
        answer = await call(inner, app_of(cluster), target=path)
        assert (answer.status, plain(answer)["error"]["code"]) == (404, "not_found")
        assert up.requests == []

    @pytest.mark.parametrize(
        ("method", "path", "allow"),
        [
            ("GET", CHAT, b"POST"),
            ("DELETE", "/v1/models", b"GET, HEAD"),
            ("POST", "/health", b"GET, HEAD"),
            ("OPTIONS", CHAT, b"POST"),
            ("PUT", "/v1/embeddings", b"GET, POST, DELETE"),
            ("GET", "/tokenize", b"POST"),
        ],
    )
    async def test_wrong_method(self, inner, method, path, allow):
        answer = await call(inner, app_of(FakeCluster(where=Local(1))), method, path)
        assert (answer.status, answer.header(b"allow")) == (405, allow)


class TestAuthorisation:
    async def test_elsewhere_needs_the_key(self, inner):
        app = app_of(FakeCluster(where=Local(1)))
        answer = await call(inner, app, peer="192.168.1.7")
        assert (answer.status, answer.header(b"www-authenticate")) == (401, b"Bearer")
        assert "tightwad-agent key" in plain(answer)["error"]["message"]
        right = [(b"authorization", b"Bearer the-api-key")]
        assert (await call(inner, app, headers=right, peer="192.168.1.7")).status == 200

    @pytest.mark.parametrize("value", [b"Bearer \xe9", b"\xff\xfe", b"Bearer", b"Basic eHg6eHg="])
    async def test_any_bytes_are_401(self, inner, value):
        answer = await call(inner, app_of(FakeCluster()), headers=[(b"authorization", value)], peer="10.0.0.1")
        assert answer.status == 401

    async def test_mapped_loopback(self, inner):
        assert (await call(inner, app_of(FakeCluster(where=Local(1))), peer="::ffff:127.0.0.1")).status == 200

    async def test_open_endpoint(self, inner):
        app = app_of(FakeCluster(where=Local(1)), guard=Access(open_endpoint=True))
        assert (await call(inner, app, peer="10.0.0.1")).status == 200

    async def test_rebinding(self, inner):
        stream = dial(inner, app_of(FakeCluster(where=Local(1))))
        answer = await ask(stream, "GET", "/health", host="evil.example:8088")
        assert (answer.status, json.loads(await answer.read(1000))["error"]["code"]) == (403, "forbidden")

    async def test_other_site(self, inner):
        up, cluster = await local(inner, says(GOOD))
        answer = await call(inner, app_of(cluster), "POST", CHAT, [(b"origin", b"https://evil.example")], b"{}")
        assert answer.status == 403
        assert up.requests == []

    async def test_no_cors(self, inner):
        """llama-server allows the origin it is asked from; that must not come through."""
        allowing = GOOD.replace(b"OK\r\n", b"OK\r\nAccess-Control-Allow-Origin: *\r\n")
        up, cluster = await local(inner, says(allowing))
        answer = await call(inner, app_of(cluster), "POST", CHAT, [(b"origin", b"http://localhost:3000")], b"{}")
        assert answer.status == 200
        assert answer.header(b"access-control-allow-origin") is None
        assert b"origin" not in up.requests[0].lower()


class TestRequests:
    async def test_passed_whole(self, inner):
        up, cluster = await local(inner, says(GOOD))
        body = b'{"messages": [], "odd": {"model": 1}, "model": "demo.gguf"}'
        headers = [
            *JSON,
            (b"authorization", b"Bearer the-api-key"),
            (b"x-tightwad-hop", b"9"),
            (b"connection", b"x-mine"),
            (b"x-mine", b"1"),
            (b"x-kept", b"2"),
            (b"accept-encoding", b"gzip"),
            (b"x-conversation-id", b"goes-on-without-a-client"),
        ]
        answer = await call(inner, app_of(cluster), "POST", CHAT + "?a=b%20c", headers, body)
        assert (answer.status, plain(answer)) == (200, {"ok": True})
        head, _, sent = up.requests[0].partition(b"\r\n\r\n")
        assert sent == body
        assert head.startswith(b"POST /v1/chat/completions?a=b%20c HTTP/1.1\r\n")
        assert b"x-kept: 2" in head
        for name in (b"the-api-key", b"x-tightwad-hop", b"x-mine", b"accept-encoding", b"x-conversation-id"):
            assert name not in head
        assert cluster.in_flight == 0

    @pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/messages", "/tokenize", "/v1/some/new/thing"])
    async def test_everything_else_is_passed(self, inner, path):
        up, cluster = await local(inner, says(answer_of(b"\x00\xff", b"application/x-odd", b"418 No")))
        answer = await call(inner, app_of(cluster), "POST", path, [(b"content-type", b"multipart/x")], b"\x00\x01")
        assert (answer.status, answer.text) == (418, b"\x00\xff")
        assert answer.header(b"content-type") == b"application/x-odd"
        assert up.requests[0].endswith(b"\r\n\r\n\x00\x01")

    @pytest.mark.parametrize("body", [b"", b"[]", b"nope", b'{"model": 5}', b"\xff"])
    async def test_bad_json(self, inner, body):
        up, cluster = await local(inner, says(GOOD))
        answer = await call(inner, app_of(cluster), "POST", CHAT, JSON, body)
        assert (answer.status, plain(answer)["error"]["type"]) == (400, "invalid_request_error")
        assert up.requests == []

    @pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", "/v1/messages"])
    async def test_unknown_model(self, inner, path):
        up, cluster = await local(inner, says(GOOD))
        answer = await call(inner, app_of(cluster), "POST", path, JSON, b'{"model": "gpt-4o"}')
        error = plain(answer)["error"]
        assert (answer.status, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "`demo`" in error["message"]
        assert up.requests == []

    async def test_large_body(self, inner):
        up, cluster = await local(inner, says(GOOD))
        body = b'{"model": "demo", "image": "' + b"A" * (3 << 20) + b'"}'
        assert (await call(inner, app_of(cluster), "POST", CHAT, JSON, body)).status == 200
        assert len(up.requests[0]) > len(body)
        wrong = body.replace(b"demo", b"gpt4")
        assert (await call(inner, app_of(cluster), "POST", CHAT, JSON, wrong)).status == 404

    async def test_refused_while_loading(self, inner):
        answer = await call(inner, app_of(FakeCluster(where=LOADING)), "POST", CHAT, JSON, b"{}")
        assert (answer.status, answer.header(b"retry-after")) == (503, b"7")
        assert plain(answer)["tightwad"]["progress"] == 0.5

    @pytest.mark.parametrize(
        ("limits", "status", "setting"),
        [
            (Limits(max_requests=1), 503, "`max_requests`"),
            (Limits(max_requests_per_client=1), 429, "`max_requests_per_client`"),
        ],
    )
    async def test_too_many_at_once(self, inner, limits, status, setting):
        up, cluster = await local(inner, hangs)
        app = app_of(cluster, limits=limits)
        first = dial(inner, app)
        inner.start_soon(ask, first, "POST", CHAT, JSON, b"{}")
        await up.asked.wait()
        answer = await call(inner, app, "POST", CHAT, JSON, b"{}")
        assert (answer.status, answer.header(b"retry-after")) == (status, b"5")
        assert setting in plain(answer)["error"]["message"]
        assert (await call(inner, app)).status == 200  # what needs no server is answered


class TestAnswers:
    async def test_stream_is_not_held_back(self, inner):
        """Each event arrives while the next has not been sent."""
        go = trio.Event()

        async def act(_up, stream, _request):
            await stream.send_all(SSE_HEAD + chunk(EVENTS[0]))
            await go.wait()
            await stream.send_all(chunk(EVENTS[1]) + chunk(EVENTS[2]) + b"0\r\n\r\n")

        _, cluster = await local(inner, act)
        answer = await ask(dial(inner, app_of(cluster)), "POST", CHAT, JSON, b'{"stream": true}')
        assert answer.header(b"content-type") == b"text/event-stream"
        assert await answer.receive() == EVENTS[0]
        go.set()
        assert await answer.read(1000) == EVENTS[1] + EVENTS[2]

    @pytest.mark.parametrize("data", [GOOD, SSE])
    async def test_one_byte_at_a_time(self, inner, data):
        _, cluster = await local(inner, says(data, at_a_time=1))
        answer = await call(inner, app_of(cluster), "POST", CHAT, JSON, b"{}")
        assert answer.text == (b'{"ok":true}' if data is GOOD else b"".join(EVENTS))

    async def test_large_answer(self, inner):
        body = b"x" * (passage.MAX_WHOLE_BYTES + 100_000)
        _, cluster = await local(inner, says(answer_of(body)))
        answer = await call(inner, app_of(cluster), "POST", "/v1/embeddings", JSON, b"{}")
        assert answer.text == body

    async def test_large_answer_that_breaks_off(self, inner):
        body = b"x" * (passage.MAX_WHOLE_BYTES + 100_000)
        _, cluster = await local(inner, says(answer_of(body)[:-5]))
        with pytest.raises(PeerGone):
            await call(inner, app_of(cluster), "POST", "/v1/embeddings", JSON, b"{}")

    async def test_stream_that_breaks_off_says_so(self, inner):
        broken = SSE_HEAD + chunk(EVENTS[0]) + chunk(b'data: {"ha')
        up, cluster = await local(inner, says(broken))
        answer = await call(inner, app_of(cluster), "POST", CHAT, JSON, b"{}")
        events = answer.text.split(b"\n\n")
        assert events[0] + b"\n\n" == EVENTS[0]
        assert json.loads(events[1].removeprefix(b"data: "))["error"]["code"] == "answer_lost"
        assert events[2:] == [b""]
        assert len(up.requests) == 4

    async def test_stream_without_end_of_event(self, inner):
        _, cluster = await local(inner, says(SSE_HEAD + chunk(b"data: 1\n\ndata: 2") + b"0\r\n\r\n"))
        answer = await call(inner, app_of(cluster), "POST", CHAT, JSON, b"{}")
        assert answer.text == b"data: 1\n\ndata: 2"


BREAKS = {
    "before the head": b"",
    "inside the head": GOOD[:20],
    "inside the body": GOOD[:-3],
    "before the first event": SSE_HEAD,
    "inside the first event": SSE_HEAD + chunk(b'data: {"n'),
    "no HTTP": b"garbage\r\n\r\n",
    "shorter than said": b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}",
    "huge head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
}


class TestSentAgain:
    @pytest.mark.parametrize("name", BREAKS)
    async def test_lost_before_anything_was_sent(self, inner, name):
        up, cluster = await local(inner, says(BREAKS[name]), says(GOOD))
        answer = await call(inner, app_of(cluster), "POST", CHAT, JSON, b'{"a": 1}')
        assert (answer.status, plain(answer)) == (200, {"ok": True})
        assert len(up.requests) == 2
        assert up.requests[0].endswith(b'{"a": 1}')
        assert up.requests[1] == up.requests[0]

    async def test_not_for_ever(self, inner):
        """A request that kills its server each time is not tried on and on."""
        up, cluster = await local(inner, says(b""))
        answer = await call(inner, app_of(cluster), "POST", CHAT, JSON, b"{}")
        assert (answer.status, len(up.requests)) == (503, 4)
        assert answer.header(b"retry-after")

    async def test_waits_for_the_pool(self, inner):
        up, cluster = await local(inner, says(b""), says(GOOD))
        cluster.routes = [cluster.where, HOLD, HOLD, LOADING]
        answer = await call(inner, app_of(cluster), "POST", CHAT, JSON, b"{}")
        assert (answer.status, len(up.requests), cluster.routes) == (200, 2, [])

    async def test_llama_server_that_loads(self, inner):
        up, cluster = await local(inner, says(answer_of(b"{}", status=b"503 Loading")), says(GOOD))
        assert (await call(inner, app_of(cluster), "POST", CHAT, JSON, b"{}")).status == 200
        assert len(up.requests) == 2

    async def test_waiting_is_bounded(self, nursery, autojump_clock):
        cluster = FakeCluster(where=HOLD)
        began = trio.current_time()
        answer = await call(nursery, app_of(cluster), "POST", CHAT, JSON, b"{}")
        assert (answer.status, answer.header(b"retry-after")) == (503, b"3")
        assert plain(answer)["tightwad"]["state"] == "restarting"
        assert 120 <= trio.current_time() - began <= 122

    async def test_nobody_on_the_port(self, nursery, autojump_clock):
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        await listeners[0].aclose()
        app = app_of(FakeCluster(where=Local(port)), hold_s=5)
        answer = await call(nursery, app, "POST", CHAT, JSON, b"{}")
        assert answer.status == 503
        assert str(port) in plain(answer)["error"]["message"]


async def leaves(inner, app, up, wait_for_bytes: bool) -> None:
    stream = dial(inner, app)
    answer: list[Answer] = []

    async def go():
        try:
            answer.append(await ask(stream, "POST", CHAT, JSON, b"{}"))
            await answer[0].receive()
            await answer[0].receive()
        except PeerGone:
            pass

    async with trio.open_nursery() as client:
        client.start_soon(go)
        await up.asked.wait()
        while wait_for_bytes and not answer:
            await trio.sleep(0.001)
        assert not up.closed.is_set()
        await stream.aclose()
        with trio.fail_after(10):
            await up.closed.wait()


PHASES = {
    "before the head": (hangs, False),
    "inside the head": (starts_then_hangs(GOOD[:20]), False),
    "inside the body": (starts_then_hangs(GOOD[:-3]), False),
    "between events": (starts_then_hangs(SSE_HEAD + chunk(EVENTS[0])), True),
}


class TestLeaving:
    @pytest.mark.parametrize("phase", PHASES)
    async def test_closes_the_server_s_connection(self, inner, phase):
        act, streaming = PHASES[phase]
        up, cluster = await local(inner, act)
        await leaves(inner, app_of(cluster), up, streaming)
        await until(lambda: cluster.in_flight == 0)

    @pytest.mark.parametrize("phase", PHASES)
    async def test_through_the_mesh(self, inner, phase):
        act, streaming = PHASES[phase]
        up, cluster = await local(inner, act)
        edge = wire(inner, cluster)
        await leaves(inner, app_of(edge), up, streaming)
        await until(lambda: cluster.in_flight == 0)

    async def test_while_it_waits_for_a_route(self, inner):
        cluster = FakeCluster(where=HOLD)
        asked = trio.Event()
        cluster.on_route = asked.set
        stream = dial(inner, app_of(cluster))
        await stream.send_all(b"POST /v1/completions HTTP/1.1\r\nHost: a.localhost\r\nContent-Length: 2\r\n\r\n{}")
        await asked.wait()
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked(0.01)
        cluster.on_route = lambda: pytest.fail("still being tried")
        await trio.sleep(0.3)


def wire(nursery, coordinator: FakeCluster) -> FakeCluster:
    """A node whose requests go to `coordinator` over a mesh in memory."""
    mesh = MemoryMesh(nursery)
    edge, other = mesh.add("edge"), mesh.add("coordinator")
    other.streams["http"] = app_of(coordinator).handle_mesh
    return FakeCluster(where=Remote(other.node), opener=edge.open_stream)


class TestForwarding:
    async def test_there_and_back(self, inner):
        up, cluster = await local(inner, says(GOOD))
        edge = wire(inner, cluster)
        answer = await call(inner, app_of(edge), "POST", CHAT + "?x=1", JSON, b'{"a": 1}')
        assert (answer.status, plain(answer)) == (200, {"ok": True})
        assert up.requests[0].startswith(b"POST /v1/chat/completions?x=1 ")
        assert up.requests[0].endswith(b'{"a": 1}')
        assert b"x-tightwad" not in up.requests[0].lower()

    async def test_stream(self, inner):
        _, cluster = await local(inner, says(SSE, at_a_time=7))
        answer = await call(inner, app_of(wire(inner, cluster)), "POST", CHAT, JSON, b"{}")
        assert answer.text == b"".join(EVENTS)

    async def test_refusals_come_through(self, inner):
        answer = await call(inner, app_of(wire(inner, FakeCluster(where=LOADING))), "POST", CHAT, JSON, b"{}")
        assert (answer.status, answer.header(b"retry-after")) == (503, b"7")
        assert plain(answer)["tightwad"]["progress"] == 0.5

    async def test_the_wrong_node_is_left_for_the_right_one(self, inner):
        up, right = await local(inner, says(GOOD))
        mesh = MemoryMesh(inner)
        edge, old, new = mesh.add("edge"), mesh.add("old"), mesh.add("new")
        old.streams["http"] = app_of(FakeCluster(where=Remote(new.node))).handle_mesh
        new.streams["http"] = app_of(right).handle_mesh
        cluster = FakeCluster(where=Remote(new.node), routes=[Remote(old.node)], opener=edge.open_stream)
        answer = await call(inner, app_of(cluster), "POST", CHAT, JSON, b"{}")
        assert (answer.status, len(up.requests)) == (200, 1)
        assert answer.header(b"x-tightwad-elsewhere") is None

    async def test_two_nodes_that_believe_in_each_other(self, nursery, autojump_clock):
        mesh = MemoryMesh(nursery)
        one, two = mesh.add("one"), mesh.add("two")
        first = FakeCluster(where=Remote(two.node), opener=one.open_stream)
        second = FakeCluster(where=Remote(one.node), opener=two.open_stream)
        one.streams["http"], two.streams["http"] = app_of(first).handle_mesh, app_of(second).handle_mesh
        assert (await call(nursery, app_of(first), "POST", CHAT, JSON, b"{}")).status == 503

    async def test_loops_end(self, inner):
        app = app_of(FakeCluster(where=Local(1)))
        for hop, status in [(b"3", 508), (b"x", 400), (b"", 400), (b"9" * 50, 400)]:
            assert (await forwarded(inner, app, CHAT, hop)).status == status

    @pytest.mark.parametrize("path", ["/v1/tightwad/admin/stop", "/", "/v1/../slots", "/slots"])
    async def test_nodes_may_forward_only_what_clients_may_ask(self, inner, path):
        assert (await forwarded(inner, app_of(FakeCluster(where=Local(1))), path, b"1")).status == 400

    async def test_a_link_that_breaks(self, inner):
        """The stream to the coordinator is cut before an answer: the request goes to the next one."""
        up, cluster = await local(inner, hangs, says(GOOD))
        mesh = MemoryMesh(inner)
        edge, old, new = mesh.add("edge"), mesh.add("old"), mesh.add("new")
        old.streams["http"] = new.streams["http"] = app_of(cluster).handle_mesh
        front = FakeCluster(where=Remote(old.node), opener=edge.open_stream)
        answers = []

        async def go():
            answers.append(await call(inner, app_of(front), "POST", CHAT, JSON, b"{}"))

        async with trio.open_nursery() as client:
            client.start_soon(go)
            await up.asked.wait()
            front.where = Remote(new.node)
            await mesh.cut(edge.node, old.node)
        assert answers[0].status == 200

    async def test_a_node_that_dies_silently(self, inner):
        """No connection is closed; membership says that it is dead."""
        up, cluster = await local(inner, hangs, says(GOOD))
        mesh = MemoryMesh(inner)
        edge, old, new = mesh.add("edge"), mesh.add("old"), mesh.add("new")
        old.streams["http"] = new.streams["http"] = app_of(cluster).handle_mesh
        front = FakeCluster(where=Remote(old.node), opener=edge.open_stream)
        app = app_of(front)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await inner.start(app.serve, listeners)
        answers = []

        async def go():
            async with await trio.open_tcp_stream(*listeners[0].socket.getsockname()) as stream:
                answers.append(await ask(stream, "POST", CHAT, JSON, b"{}"))

        with trio.fail_after(5):
            async with trio.open_nursery() as client:
                client.start_soon(go)
                await up.asked.wait()
                front.where = Remote(new.node)
                front.dead.add(old.node)
        assert answers[0].status == 200

    async def test_a_node_that_dies_silently_in_mid_stream(self, inner):
        _, cluster = await local(inner, starts_then_hangs(SSE_HEAD + chunk(EVENTS[0])))
        front = wire(inner, cluster)
        app = app_of(front, hold_s=0.5)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await inner.start(app.serve, listeners)
        async with await trio.open_tcp_stream(*listeners[0].socket.getsockname()) as stream:
            answer = await ask(stream, "POST", CHAT, JSON, b"{}")
            assert await answer.receive() == EVENTS[0]
            front.dead.add(front.where.node)
            with trio.fail_after(5):
                rest = await answer.read(1000)
        assert json.loads(rest.removeprefix(b"data: "))["error"]["code"] == "answer_lost"

    async def test_unreachable(self, nursery, autojump_clock):
        mesh = MemoryMesh(nursery)
        edge, other = mesh.add("edge"), mesh.add("other")
        await mesh.cut(edge.node, other.node)
        app = app_of(FakeCluster(where=Remote(other.node), opener=edge.open_stream))
        answer = await call(nursery, app, "POST", CHAT, JSON, b"{}")
        assert (answer.status, plain(answer)["tightwad"]["state"]) == (503, "unreachable")
        with pytest.raises(PeerUnreachable):
            await edge.open_stream(other.node, "http", {})


async def forwarded(nursery, app: App, path: str, hop: bytes) -> Answer:
    near, far = trio.testing.memory_stream_pair()
    mesh = MemoryMesh(nursery)
    node = mesh.add("someone").node
    nursery.start_soon(app.handle_mesh, node, far, {})
    return await ask(near, "POST", path, [(b"x-tightwad-hop", hop)], b"{}")


async def test_keep_alive_over_sockets(inner):
    _, cluster = await local(inner, says(GOOD))
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    app = app_of(cluster)
    await inner.start(app.serve, listeners)
    request = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
    async with await trio.open_tcp_stream(*listeners[0].socket.getsockname()) as stream:
        for _ in range(5):
            await stream.send_all(request)
            data = b""
            while not data.endswith(b'{"ok":true}'):
                part = await stream.receive_some(1000)
                assert part
                data += part
