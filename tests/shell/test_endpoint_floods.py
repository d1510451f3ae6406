"""The endpoint under clients that mean no good: slow, huge, many, silent. Others are answered meanwhile."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import trio

DEADLINE_S = 120.0
ASK = b'{"prompt": "a", "max_tokens": 8}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GOOD = HEAD + b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(ASK), ASK)
MAX_GROWTH = 96 << 20
N_GARBAGE = 1000


@dataclass
class Flooded:
    """A server in a process of its own."""

    port: int
    process: psutil.Process

    async def say(self, *parts: bytes) -> tuple[int, bytes]:
        """The status and all bytes of what is answered; 0 where the connection is closed without a word."""
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        async with stream:
            try:
                for part in parts:
                    await stream.send_all(part)
            except trio.BrokenResourceError:
                pass
            return await answer_of(stream)

    async def serves(self) -> None:
        """A normal client is answered in time."""
        with trio.fail_after(DEADLINE_S):
            status, text = await self.say(GOOD)
        assert (status, b"Hello!" in text) == (200, True), text

    async def hung_up_on(self, streams: list[trio.SocketStream]) -> None:
        """The server has closed its ends of these."""
        ours = {stream.socket.getsockname()[1] for stream in streams}
        with trio.fail_after(DEADLINE_S):
            while ours & {c.raddr.port for c in self.process.net_connections("tcp") if c.raddr}:
                await trio.sleep(0.05)

    @property
    def memory(self) -> int:
        return int(self.process.memory_info().rss)


async def answer_of(stream: trio.SocketStream) -> tuple[int, bytes]:
    text = b""
    with trio.fail_after(DEADLINE_S):
        try:
            while data := await stream.receive_some(65536):
                text += data
        except trio.BrokenResourceError:
            pass
    return (int(text[9:12]) if text.startswith(b"HTTP/1.1 ") else 0), text


@contextmanager
def server(**limits: float) -> Iterator[Flooded]:
    script = Path(__file__).with_name("flooded_server.py")
    argv = [sys.executable, str(script), json.dumps(limits)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        try:
            yield Flooded(int(child.stdout.readline()), psutil.Process(child.pid))
            _, errors = child.communicate(timeout=DEADLINE_S)
            assert child.returncode == 0, errors
            assert b"Traceback" not in errors, errors
        finally:
            child.kill()


@pytest.fixture(scope="module")
def usual() -> Iterator[Flooded]:
    with server() as made:
        yield made


def with_header(line: bytes) -> bytes:
    return b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n%s\r\nConnection: close\r\n\r\n" % line


END_AFTER = b"GET /v1/models HTTP/1.1\r\nConnection: close\r\nHost: %s\r\n\r\n"

OVERSIZED: dict[str, tuple[int, bytes, list[bytes]]] = {
    "a target": (414, b"first line is longer than 8 KiB", [b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n"]),
    "a target without end": (414, b"8 KiB", [b"GET /", b"x" * 100_000]),
    "a method": (414, b"8 KiB", [b"G" * 10_000]),
    "a header": (431, b"max_head_bytes", [with_header(b"X: " + b"x" * 40_000)]),
    "a header's name": (431, b"max_head_bytes", [with_header(b"x" * 40_000 + b": 1")]),
    "headers": (431, b"more than 100 headers", [with_header(b"\r\n".join(b"X-%d: 1" % i for i in range(200)))]),
    "headers without end": (431, b"more than 100 headers", [b"GET / HTTP/1.1\r\n", *[b"X: 1\r\n"] * 5000]),
    "a host": (403, b"no name of this machine", [END_AFTER % (b"a" * 5000)]),
    "a declared body": (413, b"max_body_bytes", [HEAD + b"Content-Length: 99999999999\r\n\r\n"]),
    "a length": (400, b"", [HEAD + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n"]),
    "a chunk": (413, b"max_body_bytes", [HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffff\r\n", b"x" * (65 << 20)]),
    "a chunk's size": (400, b"", [HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 400 + b"\r\n"]),
    "a trailer": (400, b"", [HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: " + b"x" * 70_000]),
    "json": (400, b"", [HEAD + b"Connection: close\r\nContent-Length: 200000\r\n\r\n" + b"[" * 200_000]),
    "a key": (403, b"", [END_AFTER % (b"x.example\r\nX-Api-Key: " + b"k" * 20_000)]),
}


@pytest.mark.parametrize("what", OVERSIZED)
async def test_oversized(usual: Flooded, what: str) -> None:
    status, says, parts = OVERSIZED[what]
    got, text = await usual.say(*parts)
    assert (got, says in text) == (status, True), text
    await usual.serves()


async def test_slow_loris(nursery: trio.Nursery) -> None:
    """A hundred connections, each a byte now and then: all are ended in time, and nobody waits for them."""
    with server(head_s=2, body_grace_s=2) as flooded:
        ends: list[int] = []
        all_begun = trio.Event()
        n_begun = 0

        async def drip(data: bytes) -> None:
            nonlocal n_begun
            async with await trio.open_tcp_stream("127.0.0.1", flooded.port) as stream:
                answered = trio.Event()

                async def read() -> None:
                    ends.append((await answer_of(stream))[0])
                    answered.set()

                nursery.start_soon(read)
                await stream.send_all(data[:1])
                n_begun += 1
                if n_begun == 100:
                    all_begun.set()
                for byte in data[1:]:
                    with trio.move_on_after(0.5):
                        await answered.wait()
                    if answered.is_set():
                        return
                    try:
                        await stream.send_all(bytes([byte]))
                    except trio.BrokenResourceError:
                        break
                await answered.wait()

        async with trio.open_nursery() as drips:
            for i in range(100):
                drips.start_soon(drip, GOOD if i % 2 else b"GET / HTTP/1.1\r\nX: " + b"x" * 1000)
            with trio.fail_after(DEADLINE_S):
                await all_begun.wait()
            for _ in range(5):
                await flooded.serves()
        assert ends == [408] * 100


async def test_a_body_that_hardly_comes(nursery: trio.Nursery) -> None:
    with server(body_grace_s=1) as flooded:
        async with await trio.open_tcp_stream("127.0.0.1", flooded.port) as stream:
            await stream.send_all(HEAD + b"Content-Length: 1000\r\n\r\n{")
            status, text = await answer_of(stream)
        assert (status, b"body came too slowly" in text) == (408, True)
        await flooded.serves()
    nursery.cancel_scope.cancel()


async def test_clients_that_read_nothing() -> None:
    """What is generated for them stays bounded, and they are given up."""
    with server(send_s=1) as flooded:
        await flooded.serves()
        before = flooded.memory
        body = b'{"prompt": "long", "stream": true}'
        request = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        held = [await trio.open_tcp_stream("127.0.0.1", flooded.port) for _ in range(4)]
        for stream in held:
            await stream.send_all(request)
        await flooded.serves()  # all four slots were theirs
        await flooded.hung_up_on(held)
        assert flooded.memory - before < MAX_GROWTH
        for stream in held:
            _, text = await answer_of(stream)
            assert not text.endswith(b"0\r\n\r\n"), "the answer breaks off visibly"
            await stream.aclose()


GARBAGE: list[bytes] = [
    b"",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\0" * 500,
    b"GET / HTTP/1.1\r\n",
    b"GET / HTTP/1.1\n\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    b"A" * 20_000,
    b"SSH-2.0-x\r\n",
    HEAD + b"Content-Length: 1000\r\n\r\n{",
    with_header(b"Cookie: " + b"x" * 1000),
]


def _stays(_rng: random.Random) -> bool:
    return False


def _either(rng: random.Random) -> bool:
    return rng.random() < 0.5


@pytest.mark.parametrize("leaves", [_stays, _either])
async def test_garbage_connections_by_the_thousand(leaves: Callable[[random.Random], bool]) -> None:
    """As fast as this machine can make them, of which those that stay never leave by themselves."""
    rng = random.Random(5)
    with server() as flooded:
        await flooded.serves()
        before, kept = flooded.memory, []

        async def bother(at_once: trio.CapacityLimiter) -> None:
            async with at_once:
                try:
                    stream = await trio.open_tcp_stream("127.0.0.1", flooded.port)
                except OSError:
                    return
                try:
                    await stream.send_all(rng.choice(GARBAGE))
                except trio.BrokenResourceError:
                    pass
                if leaves(rng):
                    await trio.aclose_forcefully(stream)
                else:
                    kept.append(stream)
                    if len(kept) > 700:
                        await trio.aclose_forcefully(kept.pop(0))

        began = trio.current_time()
        async with trio.open_nursery() as bothers:
            at_once = trio.CapacityLimiter(50)
            for _ in range(N_GARBAGE):
                bothers.start_soon(bother, at_once)
            for _ in range(5):
                await flooded.serves()
        print(f"{N_GARBAGE / (trio.current_time() - began):.0f} connections a second")
        await flooded.serves()
        assert flooded.memory - before < MAX_GROWTH
        for stream in kept:
            await trio.aclose_forcefully(stream)
        await flooded.serves()
