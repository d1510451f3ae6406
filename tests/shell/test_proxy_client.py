"""The client against scripted servers."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tightwad_agent.errors import PeerGone, PeerSilent, PeerUnreachable, ProtocolError
from tightwad_agent.proxy.client import MAX_HEAD_BYTES, ask, connect_loopback

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-A: b\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\n\r\nhello"
EARLY = b"HTTP/1.1 103 Early Hints\r\n\r\n" + WHOLE


async def answered(nursery, data: bytes, *, at_a_time: int = 1 << 20, body=b"", method="POST", until=b""):
    """What `ask` makes of a server that sends `data` and closes; and what the server got."""
    near, far = trio.testing.memory_stream_pair()
    got = bytearray()

    async def serve():
        while not got or until not in got:
            got.extend(await far.receive_some(1 << 20))
        for at in range(0, len(data), at_a_time):
            await far.send_all(data[at : at + at_a_time])
            await trio.testing.wait_all_tasks_blocked()
        await far.send_eof()

    nursery.start_soon(serve)
    try:
        answer = await ask(near, method, "/p?q=1", [(b"x-b", b"c")], body)
        return answer, await answer.read(1000), got
    finally:
        await near.aclose()


@pytest.mark.parametrize("data", [WHOLE, CHUNKED, UNTIL_CLOSED, EARLY])
@pytest.mark.parametrize("at_a_time", [1, 3, 1 << 20])
async def test_answers(nursery, data, at_a_time):
    answer, body, got = await answered(nursery, data, at_a_time=at_a_time, body=b"abc")
    assert (answer.status, body) == (200, b"hello")
    assert got.startswith(b"POST /p?q=1 HTTP/1.1\r\n")
    assert b"content-length: 3\r\n" in got.lower()
    assert got.endswith(b"\r\n\r\nabc")


async def test_streamed_body(nursery):
    async def parts():
        for part in (b"ab", b"", b"c"):
            yield part

    _, _, got = await answered(nursery, WHOLE, body=parts(), until=b"\r\n0\r\n\r\n")
    assert bytes(got).endswith(b"2\r\nab\r\n1\r\nc\r\n0\r\n\r\n")


async def test_head_has_no_body(nursery):
    _, body, _ = await answered(nursery, WHOLE[:-5], method="HEAD")
    assert body == b""


@pytest.mark.parametrize("cut", [0, 10, len(WHOLE) - 5, len(WHOLE) - 1])
async def test_broken_off(nursery, cut):
    with pytest.raises(PeerGone):
        await answered(nursery, WHOLE[:cut])


async def test_broken_off_in_chunks(nursery):
    with pytest.raises(PeerGone):
        await answered(nursery, CHUNKED[:-5])


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * MAX_HEAD_BYTES * 2,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 100 Go on\r\n\r\n" * 50,
        b"HTTP/1.1 101 Switching\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001,
    ],
)
async def test_nonsense(nursery, data):
    with pytest.raises(ProtocolError):
        await answered(nursery, data)


async def test_refusal_while_the_request_is_being_sent(nursery):
    """A server that answers early and closes: its answer counts, not the broken pipe."""
    near, far = trio.testing.memory_stream_pair()
    await far.send_all(b"HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\nno")
    await far.send_eof()
    far.receive_stream.close()
    answer = await ask(near, "POST", "/", [], b"x" * 100)
    assert (answer.status, await answer.read(10)) == (413, b"no")


async def test_silence(nursery, autojump_clock):
    near, _far = trio.testing.memory_stream_pair()
    with pytest.raises(PeerSilent):
        await ask(near, "GET", "/", deadline_s=5)


async def test_silence_in_the_body(nursery, autojump_clock):
    near, far = trio.testing.memory_stream_pair()
    await far.send_all(WHOLE[:-1])
    answer = await ask(near, "GET", "/")
    assert await answer.receive() == b"hell"
    with pytest.raises(PeerSilent):
        await answer.receive(deadline_s=5)


async def test_nobody_there():
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    await listeners[0].aclose()
    with pytest.raises(PeerUnreachable, match=str(port)):
        await connect_loopback(port)
