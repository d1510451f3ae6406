"""The server edge, over memory streams and real sockets."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import h11
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tightwad_agent.errors import NotReady, RequestTooLarge
from tightwad_agent.proxy.access import is_loopback
from tightwad_agent.proxy.heads import Peer
from tightwad_agent.proxy.http1 import Exchange, serve_connection
from tightwad_agent.proxy.limits import Budget, Limits
from tightwad_agent.proxy.server import Server

GET = b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n"


def post(body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST /x HTTP/1.1", b"Host: a", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


@dataclass
class Site:
    """A handler that echoes and remembers."""

    seen: list[tuple[str, str, bytes]] = field(default_factory=list)
    running: trio.Event = field(default_factory=trio.Event)
    cancelled: trio.Event = field(default_factory=trio.Event)
    act: Callable[[Exchange], Awaitable[None]] | None = None

    async def __call__(self, exchange: Exchange) -> None:
        self.running.set()
        try:
            if self.act is not None:
                await self.act(exchange)
                return
            body = await exchange.body()
            self.seen.append((exchange.request.method, exchange.request.target, body))
            await exchange.respond(200, b"echo:" + body, content_type=b"text/plain")
        except trio.Cancelled:
            self.cancelled.set()
            raise


def connect(nursery, site, limits: Limits | None = None, budget: Budget | None = None):
    near, far = trio.testing.memory_stream_pair()

    async def serve():
        await serve_connection(far, site, limits or Limits(), peer=Peer("127.0.0.1"), budget=budget)

    nursery.start_soon(serve)
    return near


async def everything(stream) -> bytes:
    data = b""
    try:
        while part := await stream.receive_some(65536):
            data += part
    except trio.BrokenResourceError:
        pass
    return data


def responses(data: bytes, *methods: str) -> list[tuple[int, dict[bytes, bytes], bytes]]:
    """All answers in `data`, as a client reads them that sent `methods`."""
    found = []
    for method in methods or ("GET",):
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method=method, target="/", headers=[("host", "a")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        body, head = b"", None
        while True:
            event = client.next_event()
            if isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                break
            elif event is h11.NEED_DATA:
                client.receive_data(b"")
        found.append((head.status_code, dict(head.headers), body))
        data = client.trailing_data[0]
    return found


async def exchange_bytes(nursery, data: bytes, site=None, limits=None) -> bytes:
    """Sends, waits until the server has nothing more to do, and gives what it sent."""
    stream = connect(nursery, site or Site(), limits)
    await stream.send_all(data)
    return await everything(stream)


CLOSE = b"Connection: close"


async def test_one_request(nursery):
    site = Site()
    [(status, headers, body)] = responses(await exchange_bytes(nursery, post(b"hello", CLOSE), site), "POST")
    assert (status, body) == (200, b"echo:hello")
    assert headers[b"content-length"] == b"10"
    assert headers[b"date"].endswith(b"GMT")
    assert site.seen == [("POST", "/x", b"hello")]


async def test_keep_alive_and_pipelining(nursery):
    site = Site()
    data = GET + post(b"1") + post(b"22") + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    answers = responses(await exchange_bytes(nursery, data, site), "GET", "POST", "POST", "GET")
    assert [a[2] for a in answers] == [b"echo:", b"echo:1", b"echo:22", b"echo:"]


async def test_one_byte_at_a_time(nursery):
    site = Site()
    stream = connect(nursery, site)
    head = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked = head + b"3\r\nabc\r\n2;ext=1\r\nde\r\n0\r\nTrailer: x\r\n\r\n"
    for byte in chunked + b"\r\n" + post(b"xyz", CLOSE):
        await stream.send_all(bytes([byte]))
        await trio.testing.wait_all_tasks_blocked()
    answers = responses(await everything(stream), "POST", "POST")
    assert [a[2] for a in answers] == [b"echo:abcde", b"echo:xyz"]


async def test_head_is_get_without_body(nursery):
    head = b"HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n"
    data = await exchange_bytes(nursery, head + post(b"1", CLOSE))
    first, second = responses(data, "HEAD", "POST")
    assert first[1][b"content-length"] == b"5"
    assert first[2] == b""
    assert second[2] == b"echo:1"


async def test_http10(nursery):
    [(status, headers, body)] = responses(await exchange_bytes(nursery, b"GET /x HTTP/1.0\r\n\r\n"))
    assert (status, headers[b"connection"], body) == (200, b"close", b"echo:")


async def test_upgrade_is_ignored(nursery):
    """Java's client and `curl --http2` offer h2c with every request."""
    offer = b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\nConnection: Upgrade, HTTP2-Settings"
    data = await exchange_bytes(nursery, post(b"1", offer) + GET + post(b"2", CLOSE))
    assert [a[2] for a in responses(data, "POST", "GET", "POST")] == [b"echo:1", b"echo:", b"echo:2"]


class TestBody:
    async def test_expect_100(self, nursery):
        stream = connect(nursery, Site())
        head, _, body = post(b"hello", b"Expect: 100-continue", CLOSE).partition(b"\r\n\r\n")
        await stream.send_all(head + b"\r\n\r\n")
        assert (await stream.receive_some(1000)).startswith(b"HTTP/1.1 100 ")
        await stream.send_all(body)
        [(status, _, echoed)] = responses(await everything(stream), "POST")
        assert (status, echoed) == (200, b"echo:hello")

    async def test_expect_100_is_refused_before_the_body(self, nursery, autojump_clock):
        big = b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 99999\r\nExpect: 100-continue\r\n\r\n"
        data = await exchange_bytes(nursery, big, limits=Limits(max_body_bytes=1000))
        assert responses(data, "POST")[0][0] == 413

    async def test_declared_too_large(self, nursery, autojump_clock):
        [(status, _, body)] = responses(
            await exchange_bytes(nursery, post(b"x" * 2000), limits=Limits(max_body_bytes=1000)), "POST"
        )
        assert status == 413
        assert json.loads(body)["error"]["code"] == RequestTooLarge.code

    async def test_chunked_too_large(self, nursery, autojump_clock):
        data = (
            b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"64\r\n%s\r\n" % (b"x" * 100) * 11
        )
        [(status, _, _)] = responses(await exchange_bytes(nursery, data, limits=Limits(max_body_bytes=1000)), "POST")
        assert status == 413

    async def test_exactly_the_limit(self, nursery):
        data = await exchange_bytes(nursery, post(b"x" * 1000, CLOSE), limits=Limits(max_body_bytes=1000))
        assert responses(data, "POST")[0][0] == 200

    async def test_all_bodies_together(self, nursery, autojump_clock):
        gate = trio.Event()

        async def hold(exchange):
            await exchange.body()
            await gate.wait()
            await exchange.respond(200, b"")

        budget = Budget(1500)
        first = connect(nursery, Site(act=hold), budget=budget)
        await first.send_all(post(b"x" * 1000, CLOSE))
        await trio.testing.wait_all_tasks_blocked()
        second = connect(nursery, Site(), budget=budget)
        await second.send_all(post(b"x" * 1000))
        [(status, headers, _)] = responses(await everything(second), "POST")
        assert (status, headers[b"retry-after"]) == (503, str(NotReady("", retry_after_s=5).retry_after_s).encode())
        gate.set()
        assert responses(await everything(first), "POST")[0][0] == 200
        assert budget.left == 1500

    async def test_too_slow(self, nursery, autojump_clock):
        """A byte every 10 s: within any deadline between two bytes, but no progress."""
        stream = connect(nursery, Site())
        await stream.send_all(post(b"")[:-4].replace(b"Length: 0", b"Length: 100000") + b"\r\n\r\n")
        with trio.fail_after(60):
            while not (data := b""):
                with trio.move_on_after(10):
                    data = await stream.receive_some(10_000)
                    break
                await stream.send_all(b"x")
        assert data.startswith(b"HTTP/1.1 408")

    async def test_steady_is_not_too_slow(self, nursery, autojump_clock):
        limits = Limits(body_grace_s=1, body_bytes_per_s=1000)
        stream = connect(nursery, Site(), limits)
        whole = post(b"x" * 20_000, CLOSE)
        for at in range(0, len(whole), 1000):
            await stream.send_all(whole[at : at + 1000])
            await trio.sleep(0.9)
        assert responses(await everything(stream), "POST")[0][0] == 200

    async def test_tiny_chunks_do_not_hold_others_up(self, nursery):
        stream = connect(nursery, Site())
        head = b"POST /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        await stream.send_all(head + b"1\r\nx\r\n" * 20_000 + b"0\r\n\r\n")
        [(status, _, body)] = responses(await everything(stream), "POST")
        assert (status, len(body)) == (200, 20_005)


POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
SMUGGLING = {
    "two lengths": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "length and chunks": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": POST + CHUNKED + b"Content-Length: 3\r\n\r\n0\r\n\r\n",
    "other coding": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "two codings": POST + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n",
    "chunks in 1.0": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "space before colon": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "negative length": POST + b"Content-Length: -1\r\n\r\n",
    "length with sign": POST + b"Content-Length: +1\r\n\r\nx",
    "endless length": POST + b"Content-Length: " + b"9" * 40 + b"\r\n\r\nx",
    "folded": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "LF only": b"GET / HTTP/1.1\nHost: a\n\n",
    "bare CR": b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rTransfer-Encoding: chunked\r\n\r\n",
    "NUL": b"GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
    "bad chunk": POST + CHUNKED + b"\r\nxyz\r\nabc\r\n0\r\n\r\n",
    "chunk longer than said": POST + CHUNKED + b"\r\n1\r\nabc\r\n0\r\n\r\n",
    "negative chunk": POST + CHUNKED + b"\r\n-1\r\nabc\r\n0\r\n\r\n",
    "chunk with LF": POST + CHUNKED + b"\r\n3\nabc\r\n0\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "absolute": b"GET http://evil/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "connect": b"CONNECT evil:443 HTTP/1.1\r\nHost: a\r\n\r\n",
    "star": b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "odd expectation": POST + b"Expect: tea\r\nContent-Length: 1\r\n\r\nx",
    "huge header": b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 40_000 + b"\r\n\r\n",
    "endless line": b"G" * 40_000,
}
STATUS = {"HTTP/2": 505, "huge header": 431, "endless line": 414, "odd expectation": 417}


@pytest.mark.parametrize("name", SMUGGLING)
@pytest.mark.parametrize("cut", ["whole", "one at a time"])
async def test_refused(name, cut, autojump_clock, nursery):
    site = Site()
    stream = connect(nursery, site)
    data = SMUGGLING[name]
    pieces = [data] if cut == "whole" or len(data) > 10_000 else [data[i : i + 1] for i in range(len(data))]
    for piece in pieces:
        try:
            await stream.send_all(piece)
        except trio.BrokenResourceError:
            break
        await trio.testing.wait_all_tasks_blocked()
    sent = await everything(stream)
    [(status, headers, body)] = responses(sent, "POST")
    assert status in ({STATUS[name]} if name in STATUS else {400, 501})
    assert headers[b"connection"] == b"close"
    assert json.loads(body)["error"]["message"]
    assert site.seen == []
    assert sent.count(b"content-length:") == 1


class TestDeadlines:
    async def test_silence_at_the_start(self, nursery, autojump_clock):
        stream = connect(nursery, Site())
        with trio.fail_after(11):
            assert await everything(stream) == b""

    async def test_half_a_head(self, nursery, autojump_clock):
        stream = connect(nursery, Site())
        await stream.send_all(GET[:20])
        with trio.fail_after(13):
            assert responses(await everything(stream))[0][0] == 408

    async def test_idle_between_requests(self, nursery, autojump_clock):
        stream = connect(nursery, Site())
        for _ in range(3):
            await stream.send_all(GET)
            assert b"echo:" in await stream.receive_some(10_000)
            await trio.sleep(59)
        with trio.fail_after(2):
            assert await everything(stream) == b""

    async def test_client_that_takes_nothing(self, nursery, autojump_clock):
        """A slow reader holds its slot for `send_s` and no longer."""

        async def flood(exchange):
            await exchange.start(200, [])
            while True:
                await exchange.send(b"x" * 65536)

        near, far = trio.testing.lockstep_stream_pair()
        site = Site(act=flood)
        ended = trio.Event()

        async def serve():
            await serve_connection(far, site, Limits(send_s=5), peer=Peer("127.0.0.1"))
            ended.set()

        nursery.start_soon(serve)
        await near.send_all(GET)
        with trio.fail_after(7):
            await ended.wait()
        assert site.cancelled.is_set()


async def _forever(_exchange):
    await trio.sleep_forever()


async def _start_then_forever(exchange):
    await exchange.start(200, [])
    await exchange.send(b"some")
    await trio.sleep_forever()


async def _body_then_forever(exchange):
    await exchange.body()
    await trio.sleep_forever()


class TestLeaving:
    @pytest.mark.parametrize("act", [_forever, _start_then_forever, _body_then_forever])
    async def test_silent_handler_is_cancelled(self, nursery, act):
        site = Site(act=act)
        stream = connect(nursery, site)
        await stream.send_all(post(b"x"))
        await site.running.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert not site.cancelled.is_set()
        await stream.aclose()
        with trio.fail_after(10):
            await site.cancelled.wait()

    async def test_while_the_body_comes(self, nursery):
        site = Site()
        stream = connect(nursery, site)
        await stream.send_all(post(b"x" * 100)[:-50])
        await trio.testing.wait_all_tasks_blocked()
        await stream.aclose()
        with trio.fail_after(10):
            await site.cancelled.wait()

    async def test_pipelined_bytes_are_no_leaving(self, nursery):
        go = trio.Event()

        async def slow(exchange):
            await exchange.body()
            await go.wait()
            await exchange.respond(200, b"ok")

        site = Site(act=slow)
        stream = connect(nursery, site)
        await stream.send_all(GET)
        await trio.testing.wait_all_tasks_blocked()
        await stream.send_all(post(b"next", CLOSE))
        await trio.testing.wait_all_tasks_blocked()
        assert not site.cancelled.is_set()
        go.set()
        assert [a[2] for a in responses(await everything(stream), "GET", "POST")] == [b"ok", b"ok"]

    async def test_flood_of_pipelined_bytes_is_bounded(self, nursery):
        site = Site(act=_forever)
        near, far = trio.testing.memory_stream_pair()
        taken = 0
        whole = far.receive_stream.receive_some

        async def counting(max_bytes=None):
            nonlocal taken
            data = await whole(max_bytes)
            taken += len(data)
            return data

        far.receive_stream.receive_some = counting
        nursery.start_soon(lambda: serve_connection(far, site, Limits(), peer=Peer("")))
        await near.send_all(GET * 40_000)
        await trio.testing.wait_all_tasks_blocked()
        assert taken < 200_000
        nursery.cancel_scope.cancel()

    async def test_cancel_leaves_nothing(self):
        """The server is stopped in each phase: no task hangs, nothing raises."""
        for act in (None, _forever, _start_then_forever, _body_then_forever):
            for sent in (b"", GET[:9], post(b"xyz")[:-1], GET):
                async with trio.open_nursery() as nursery:
                    stream = connect(nursery, Site(act=act))
                    await stream.send_all(sent)
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.cancel_scope.cancel()


class TestFaultWall:
    async def test_a_handler_s_fault_is_a_500(self, nursery, caplog):
        async def fault(_exchange):
            raise ZeroDivisionError

        [(status, _, body)] = responses(await exchange_bytes(nursery, GET[:-2] + CLOSE + b"\r\n\r\n", Site(act=fault)))
        assert status == 500
        assert b"ZeroDivision" not in body
        assert "ZeroDivisionError" in caplog.text

    async def test_a_fault_in_mid_answer_is_seen(self, nursery, caplog):
        async def fault(exchange):
            await exchange.start(200, [])
            await exchange.send(b"half")
            raise ZeroDivisionError

        data = await exchange_bytes(nursery, GET, Site(act=fault))
        with pytest.raises(h11.RemoteProtocolError):
            responses(data)

    async def test_no_answer_is_an_error(self, nursery):
        async def nothing(_exchange):
            pass

        data = await exchange_bytes(nursery, GET[:-2] + CLOSE + b"\r\n\r\n", Site(act=nothing))
        assert responses(data)[0][0] == 500

    async def test_exception_group(self, nursery, caplog):
        async def fault(_exchange):
            async with trio.open_nursery() as inner:
                inner.start_soon(trio.sleep_forever)
                raise ValueError

        assert responses(await exchange_bytes(nursery, GET[:-2] + CLOSE + b"\r\n\r\n", Site(act=fault)))[0][0] == 500


class Odd(trio.abc.Stream):
    """A stream that fails in a way no stream should."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.closed = False

    async def receive_some(self, max_bytes=None):
        await trio.lowlevel.checkpoint()
        raise self.error

    async def send_all(self, data):
        raise self.error

    async def wait_send_all_might_not_block(self):
        raise self.error

    async def aclose(self):
        self.closed = True


@pytest.mark.parametrize("error", [OSError("odd"), RuntimeError("odd"), trio.BrokenResourceError("reset")])
async def test_nothing_raises_out_of_a_connection(error, caplog):
    stream = Odd(error)
    with trio.fail_after(5):
        await serve_connection(stream, Site(), Limits(), peer=Peer(""))
    assert stream.closed
    assert ("odd" in caplog.text) == (not isinstance(error, trio.BrokenResourceError))


def hard_reset(stream: trio.SocketStream) -> None:
    """Closes with RST."""
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


async def start_server(nursery, handler, limits=None) -> tuple[Server, int]:
    server = Server(handler, limits or Limits(), is_loopback)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    await nursery.start(server.serve, listeners)
    return server, listeners[0].socket.getsockname()[1]


async def good_request(port: int) -> bytes:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(post(b"good", CLOSE))
        return responses(await everything(stream), "POST")[0][2]


async def posts_only(exchange: Exchange) -> None:
    """Echoes what is posted; all else runs for ever."""
    await (Site() if exchange.request.method == "POST" else _start_then_forever)(exchange)


async def busy(port: int) -> trio.SocketStream:
    """A connection with a request that runs."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    await stream.send_all(GET)
    assert await stream.receive_some(10)
    return stream


async def close_all(streams: list[trio.SocketStream]) -> None:
    for stream in streams:
        await stream.aclose()


class TestSockets:
    async def test_reset_while_streaming_disturbs_nobody(self, nursery):
        async def drip(exchange):
            await exchange.start(200, [])
            while True:
                await exchange.send(b"x" * 1000)
                await trio.sleep(0.001)

        resets = Site(act=drip)

        async def handler(exchange):
            await (Site() if exchange.request.method == "POST" else resets)(exchange)

        server, port = await start_server(nursery, handler)
        for _ in range(5):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(GET)
            await stream.receive_some(10)
            hard_reset(stream)
        with trio.fail_after(5):
            await resets.cancelled.wait()
            assert await good_request(port) == b"echo:good"
            while server.n_connections:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()

    @pytest.mark.parametrize("leave", ["FIN", "RST"])
    async def test_leaving_cancels_a_silent_handler(self, nursery, leave):
        site = Site(act=_forever)
        _, port = await start_server(nursery, site)
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        await stream.send_all(GET)
        await site.running.wait()
        if leave == "RST":
            hard_reset(stream)
        else:
            await stream.aclose()
        with trio.fail_after(10):
            await site.cancelled.wait()
        nursery.cancel_scope.cancel()

    async def test_refusal_of_a_body_arrives(self, nursery):
        """The client is still sending when it is refused; it must read 413, not a reset."""
        _, port = await start_server(nursery, Site(), Limits(max_body_bytes=1000))
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(post(b"x" * 3_000_000))
            assert responses(await everything(stream), "POST")[0][0] == 413
        nursery.cancel_scope.cancel()

    async def test_no_delay(self, nursery):
        accepted = []
        server = Server(Site(), Limits(), is_loopback)
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        real = server._accepted

        async def look(stream):
            accepted.append(stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            await real(stream)

        server._accepted = look
        await nursery.start(server.serve, listeners)
        assert await good_request(listeners[0].socket.getsockname()[1]) == b"echo:good"
        assert accepted == [1]
        nursery.cancel_scope.cancel()

    async def test_too_many_connections(self, nursery):
        server, port = await start_server(nursery, posts_only, Limits(max_connections=3))
        held = [await busy(port) for _ in range(3)]
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        [(status, headers, body)] = responses(await everything(stream))
        assert (status, headers[b"retry-after"]) == (503, b"1")
        assert "max_connections" in json.loads(body)["error"]["message"]
        await held[0].aclose()
        await stream.aclose()
        while server.n_connections > 2:
            await trio.sleep(0.001)
        assert await good_request(port) == b"echo:good"
        await close_all(held)
        nursery.cancel_scope.cancel()

    async def test_who_says_nothing_gives_way(self, nursery):
        """The longest waiting first, and nobody who is being answered."""
        server, port = await start_server(nursery, posts_only, Limits(max_connections=3))
        held = [await busy(port), *[await trio.open_tcp_stream("127.0.0.1", port) for _ in range(2)]]
        await held[2].send_all(GET[:9])
        while server.n_connections < 3:
            await trio.sleep(0.001)
        assert await good_request(port) == b"echo:good"
        assert await everything(held[1]) == b"", "it had sent nothing"
        more = [await busy(port), await busy(port)]
        [(status, _, body)] = responses(await everything(held[2]))
        assert (status, b"too many connections" in body) == (503, True)
        await close_all([*held, *more])
        nursery.cancel_scope.cancel()

    async def test_this_machine_has_places_of_its_own(self, nursery):
        server, port = await start_server(nursery, posts_only, Limits(max_connections=3, reserved_local=1))
        server._is_local = lambda _address: False
        held = [await busy(port) for _ in range(2)]
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            assert responses(await everything(stream))[0][0] == 503
        server._is_local = lambda _address: True
        assert await good_request(port) == b"echo:good"
        await close_all(held)
        nursery.cancel_scope.cancel()

    async def test_one_other_machine_gets_its_part(self, nursery):
        server, port = await start_server(nursery, posts_only, Limits(max_connections_per_client=2))
        server._is_local = lambda _address: False
        held = [await busy(port) for _ in range(2)]
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            [(status, headers, body)] = responses(await everything(stream))
        assert (status, headers[b"retry-after"]) == (429, b"1")
        assert "max_connections_per_client" in json.loads(body)["error"]["message"]
        await close_all(held)
        nursery.cancel_scope.cancel()

    async def test_a_thousand_garbage_connections(self, nursery):
        server, port = await start_server(nursery, Site())
        garbage = [b"", b"\x16\x03\x01", b"\0" * 500, b"GET\r\n\r\n", b"A" * 50_000, SMUGGLING["bad chunk"], GET[:10]]

        async def bother(n: int) -> None:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            try:
                await stream.send_all(garbage[n % len(garbage)])
            except trio.BrokenResourceError:
                pass
            if n % 2:
                hard_reset(stream)
            else:
                await stream.aclose()

        for batch in range(20):
            async with trio.open_nursery() as bothers:
                for n in range(50):
                    bothers.start_soon(bother, batch * 50 + n)
        with trio.fail_after(10):
            assert await good_request(port) == b"echo:good"
            while server.n_connections:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


ATOMS = st.sampled_from(
    [
        GET,
        post(b"ab"),
        POST,
        CHUNKED,
        b"\r\n",
        b"\n",
        b"Host: a\r\n",
        b"Content-Length: 5\r\n",
        b"0\r\n\r\n",
        b"Expect: 100-continue\r\n",
        b"Connection: close\r\n",
        b"5\r\nhello\r\n",
        b" ",
        b"\0",
        b":",
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ATOMS | st.binary(max_size=20), max_size=12).map(b"".join))
def test_any_bytes_whole_and_one_at_a_time(data):
    """Nothing crashes the edge, and how the bytes are cut makes no difference."""

    async def feed(pieces: list[bytes]) -> tuple[list, int]:
        site = Site()
        near, far = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: serve_connection(far, site, Limits(), peer=Peer("")))
            answers = bytearray()

            async def read():
                answers.extend(await everything(near))

            nursery.start_soon(read)
            for piece in pieces:
                try:
                    await near.send_all(piece)
                except trio.BrokenResourceError:
                    break
                await trio.testing.wait_all_tasks_blocked()
        return site.seen, answers.count(b"HTTP/1.1 200 ")

    def run(pieces):
        return trio.run(feed, pieces, clock=trio.testing.MockClock(autojump_threshold=0))

    assert run([data]) == run([data[i : i + 1] for i in range(len(data))])
