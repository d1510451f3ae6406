"""Plain sockets as direct streams: what comes, what goes, and how it ends; TLS has the same tests of its own."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from tightwad_agent.direct import TAKE_SIZE, SocketEnd, direct

PATIENCE_S = 20.0
Pair = tuple[SocketEnd, socket.socket]


@pytest.fixture(params=["tcp", "local"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """Our end, and the other one, not blocking."""
    if request.param == "tcp":
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.create_connection(listener.getsockname())
            far, _ = listener.accept()
    else:
        near, far = socket.socketpair()
    far.setblocking(False)
    near.setblocking(False)
    ours = SocketEnd(trio.SocketStream(trio.socket.from_stdlib_socket(near)))
    with far, contextlib.closing(far):
        yield ours, far
    await trio.aclose_forcefully(ours)


async def all_of(wire: socket.socket, n: int) -> bytes:
    data = bytearray()
    with trio.fail_after(PATIENCE_S):
        while len(data) < n:
            await trio.lowlevel.wait_readable(wire)
            data += wire.recv(1 << 20)
    return bytes(data)


async def test_nothing_has_come_then_something_then_the_end(pair: Pair) -> None:
    ours, far = pair
    assert ours.take() is None
    far.sendall(b"hello")
    with trio.fail_after(PATIENCE_S):
        await ours.readable()
        assert ours.take(2) == b"he"
        await ours.readable()
        assert ours.take() == b"llo"
        assert ours.take() is None
        far.shutdown(socket.SHUT_WR)
        await ours.readable()
        assert ours.take() == b""
        assert await ours.receive_some() == b""


async def test_what_does_not_fit_is_kept_although_the_buffer_is_used_again(pair: Pair) -> None:
    ours, far = pair
    sent = bytearray()
    buffer = bytearray(TAKE_SIZE)
    dice = random.Random(1)
    for _ in range(300):
        buffer[:] = dice.randbytes(256) * (TAKE_SIZE // 256)
        sent += buffer
        if not ours.give(memoryview(buffer)):
            break
    else:
        pytest.fail("75 MiB fitted into a socket")
    buffer[:] = bytes(TAKE_SIZE)
    with pytest.raises(trio.BusyResourceError):
        ours.give(b"out of turn")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.drain)
        assert await all_of(far, len(sent)) == sent
    assert ours.give(b"next")
    assert await all_of(far, 4) == b"next"


async def test_more_than_fits_is_sent_whole(pair: Pair) -> None:
    ours, far = pair
    data = random.Random(2).randbytes(3 * TAKE_SIZE + 17) * 10
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.send_all, data)
        assert await all_of(far, len(data)) == data


async def test_a_reset_is_a_broken_stream() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = direct(await trio.open_tcp_stream(*listener.getsockname()))
        far, _ = listener.accept()
    assert isinstance(ours, SocketEnd)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()
    with trio.fail_after(PATIENCE_S):
        await ours.readable()
        await trio.lowlevel.wait_readable(ours.transport_stream.socket)
        with pytest.raises(trio.BrokenResourceError):
            ours.take()
        with pytest.raises(trio.BrokenResourceError):
            await ours.send_all(b"x")
    await ours.aclose()


async def test_a_closed_stream_says_so(pair: Pair) -> None:
    ours, _ = pair
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await ours.receive_some()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await ours.aclose()
    await ours.aclose()
    with pytest.raises(trio.ClosedResourceError):
        ours.take()
    with pytest.raises(trio.ClosedResourceError):
        ours.give(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await ours.send_all(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await ours.receive_some()


async def test_the_stream_it_was_made_of_is_empty(pair: Pair) -> None:
    ours, far = pair
    old = ours.transport_stream
    new = direct(old)
    assert isinstance(new, SocketEnd)
    await old.aclose()
    await new.send_all(b"still open")
    assert await all_of(far, 10) == b"still open"
    await new.aclose()


async def test_other_streams_stay_what_they_are() -> None:
    near, _ = trio.testing.memory_stream_pair()
    assert direct(near) is near


@pytest.mark.parametrize("bad", [0, -1])
async def test_no_bytes_cannot_be_asked_for(pair: Pair, bad: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        await pair[0].receive_some(bad)


async def test_what_the_system_does_not_take_at_once_is_sent_later(pair: Pair) -> None:
    ours, far = pair
    said = [random.Random(i).randbytes(TAKE_SIZE) for i in range(100)]
    n = 0
    while ours.send_now(said[n]):
        n += 1
    with pytest.raises(trio.BrokenResourceError, match="half way"):
        ours.send_now(b"in between")
    n += 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.send_rest)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            ours.send_now(b"from another task")
        assert await all_of(far, n * TAKE_SIZE) == b"".join(said[:n])
    assert ours.send_now(b"go on")
    assert await all_of(far, 5) == b"go on"


async def test_a_send_that_was_given_up_half_way_leaves_no_stream(pair: Pair) -> None:
    ours, _ = pair
    while ours.send_now(bytes(TAKE_SIZE)):
        pass
    with trio.move_on_after(0.05):
        await ours.send_rest()
    with pytest.raises(trio.BrokenResourceError, match="half way"):
        ours.send_now(b"x")


@pytest.mark.parametrize("pair", ["tcp"], indirect=True)
async def test_a_thread_is_woken_when_as_much_is_there_as_it_expects(pair: Pair) -> None:
    ours, far = pair
    woken: list[tuple[bool, int]] = []

    def read() -> None:
        ours.expect(100_000)
        assert ours.take() is None
        woken.append((ours.wait(0.3), 0))
        woken.append((ours.wait(20), len(ours.take() or b"")))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.read_in_thread, read, lambda: None)
        await trio.sleep(0.1)
        far.sendall(bytes(10_000))
        await trio.sleep(0.4)
        far.sendall(bytes(90_000))
    (early, _), (late, n_bytes) = woken
    assert not early, "not for the first packets"
    assert late
    assert n_bytes > 80_000
