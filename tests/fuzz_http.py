"""Requests as bytes: the endpoint answers or closes, and reads them the same however they are cut."""

from __future__ import annotations

import re
from collections.abc import Iterable

import trio
import trio.testing
from fuzz_engine import Target

from tightwad_agent.proxy import access
from tightwad_agent.proxy.access import Access, machine_names
from tightwad_agent.proxy.heads import BadRequest, HeadScanner, Peer
from tightwad_agent.proxy.http1 import Exchange, serve_connection
from tightwad_agent.proxy.limits import Limits

LIMITS = Limits(max_body_bytes=4096, max_head_bytes=4096)
STATUSES = {100, 200, 400, 401, 403, 408, 413, 414, 417, 431, 501, 503, 505}
MAX_FED_BYTE_BY_BYTE = 3000
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_GUARD = Access(machine_names("box.home"))


def head_of(pieces: Iterable[bytes]) -> str:
    """Where the head ends, as a scanner says that gets it in these pieces."""
    scanner, buffer = HeadScanner(LIMITS.max_head_bytes), bytearray()
    try:
        for piece in pieces:
            buffer += piece
            if (end := scanner.feed(buffer)) is not None:
                return str(end)
    except BadRequest as exc:
        # with two faults it depends on the cut which is named
        return "refused" if exc.http_status in (400, 414, 431) else f"refused with {exc.http_status}"
    return "waits"


async def converse(pieces: Iterable[bytes]) -> tuple[list[tuple[str, str, bytes]], bytes]:
    """What a handler got to see, and all that was answered."""
    seen: list[tuple[str, str, bytes]] = []

    async def handle(exchange: Exchange) -> None:
        request = exchange.request
        access.check(_GUARD, lambda key: "k" if key == b"good" else "", "10.0.0.9", request.method, request.headers)
        seen.append((request.method, request.target, await exchange.body()))
        await exchange.respond(200, b"ok")

    near, far = trio.testing.memory_stream_pair()
    answers = bytearray()

    async def read() -> None:
        try:
            while data := await near.receive_some(65536):
                answers.extend(data)
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_connection(far, handle, LIMITS, peer=Peer("10.0.0.9")))
        nursery.start_soon(read)
        for piece in pieces:
            try:
                await near.send_all(piece)
            except trio.BrokenResourceError:
                break
            await trio.testing.wait_all_tasks_blocked()
    return seen, bytes(answers)


def run_http(data: bytes) -> object:
    assert head_of([data]) == head_of(data[i : i + 1] for i in range(len(data))), "the cut does not matter"
    seen, answers = _run([data])
    cut = len(data) // 3
    assert _run([data[:cut], data[cut:]])[0] == seen, "the cut does not matter"
    if len(data) <= MAX_FED_BYTE_BY_BYTE and data.count(b"\r\n\r\n") < 3:
        assert _run([data[i : i + 1] for i in range(len(data))])[0] == seen, "nor does it byte by byte"
    statuses = [int(s) for s in _STATUS.findall(answers)]
    assert set(statuses) <= STATUSES, statuses
    assert len(statuses) >= len(seen)
    assert all(target.startswith("/") and len(body) <= LIMITS.max_body_bytes for _, target, body in seen)
    return " ".join(map(str, statuses))


def _run(pieces: list[bytes]) -> tuple[list[tuple[str, str, bytes]], bytes]:
    return trio.run(converse, pieces, clock=trio.testing.MockClock(autojump_threshold=0))


_KEY = b"Host: box.home\r\nAuthorization: Bearer good\r\n"
_SEEDS = [
    b"GET / HTTP/1.1\r\n" + _KEY + b"\r\n",
    b"POST /v1/x?y=z HTTP/1.1\r\n" + _KEY + b"Content-Length: 5\r\n\r\nhelloGET /2 HTTP/1.1\r\n" + _KEY + b"\r\n",
    b"POST / HTTP/1.1\r\n" + _KEY + b"Transfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nT: 1\r\n\r\n",
    b"POST / HTTP/1.1\r\n" + _KEY + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\nok",
    b"HEAD / HTTP/1.0\r\n" + _KEY + b"Connection: keep-alive\r\n\r\n",
]
_WORDS = [
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\r",
    b": ",
    b"Content-Length: 5\r\n",
    b"Content-Length: +5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n",
    b"Host: evil\r\n",
    b"Connection: close\r\n",
    b"Upgrade: websocket\r\n",
    b"Expect: tea\r\n",
    b"0\r\n\r\n",
    b"ffffffff\r\n",
    b"http://a/",
    b" HTTP/1.1",
    b" HTTP/2.0",
    b"x" * 5000,
    b"X: y\r\n" * 60,
]


def target() -> Target:
    return Target("http", _SEEDS, run_http, (), None, _WORDS)
