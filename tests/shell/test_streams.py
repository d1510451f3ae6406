from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from functools import partial

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent.direct import TAKE_SIZE, SocketEnd
from tightwad_agent.errors import PeerGone, PeerSilent, ProtocolError
from tightwad_agent.filters import Changing
from tightwad_agent.streams import READ_SIZE, Framed, Prefixed, close_quietly, peer_errors
from tightwad_agent.testing import node_id, sockets
from tightwad_agent.tunnel import join, pump, splice
from tightwad_agent.wire.codec import Codec
from tightwad_agent.wire.frames import PREFIX, encode


@dataclass(frozen=True)
class Ping:
    n: int


@dataclass(frozen=True)
class Pong:
    text: str = ""


TALK = Codec("talk", {1: Ping, 2: Pong})


class Scripted(trio.abc.Stream):
    """Gives the chunks in turn, then raises `then`, ends (`b""`), or hangs (`None`). Records what is done to it."""

    def __init__(self, *chunks: bytes, then: Exception | bytes | None = b"") -> None:
        self.chunks = list(chunks)
        self.then = then
        self.sent = bytearray()
        self.n_closed = 0
        self.hang_send = False
        self.hang_close = False
        self.fail_send: Exception | None = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if self.chunks:
            return self.chunks.pop(0)
        if isinstance(self.then, Exception):
            raise self.then
        if self.then is None:
            await trio.sleep_forever()
        return self.then

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.fail_send:
            raise self.fail_send
        if self.hang_send:
            await trio.sleep_forever()
        self.sent += data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.n_closed += 1
        if self.hang_close:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()


async def all_messages(framed: Framed) -> tuple[list[tuple[object, bytes]], PeerGone | ProtocolError]:
    """What came, and how it ended."""
    found = []
    while True:
        try:
            found.append(await framed.receive())
        except (PeerGone, ProtocolError) as exc:
            return found, exc


WIRE = encode(TALK.encode(Ping(1))) + encode(TALK.encode(Pong("x")), b"payload") + encode(TALK.encode(Ping(2)))
MESSAGES = [(Ping(1), b""), (Pong("x"), b"payload"), (Ping(2), b"")]


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 1000])
async def test_messages_arrive_in_any_cut(size: int) -> None:
    chunks = [WIRE[i : i + size] for i in range(0, len(WIRE), size)]
    found, end = await all_messages(Framed(Scripted(*chunks), TALK, max_payload=100))
    assert found == MESSAGES
    assert str(end) == "the connection was closed"


async def test_a_conversation_over_a_pair_of_streams(nursery: trio.Nursery) -> None:
    near, far = trio.testing.lockstep_stream_pair()
    left, right = Framed(near, TALK, max_payload=1 << 20), Framed(far, TALK, max_payload=1 << 20)
    big = bytes(range(256)) * 2000
    nursery.start_soon(lambda: left.send(Ping(7), big, deadline_s=5))
    assert await right.receive(deadline_s=5) == (Ping(7), big)
    nursery.start_soon(right.send, Pong("ok"))
    assert await left.expect(Pong) == Pong("ok")


@pytest.mark.parametrize("cut", [1, 7, 8, 9, len(WIRE) - 1])
async def test_an_end_inside_a_frame_is_peer_gone_and_says_so(cut: int) -> None:
    _, end = await all_messages(Framed(Scripted(WIRE[:cut]), TALK, max_payload=100))
    assert isinstance(end, PeerGone)
    assert "inside a frame" in str(end)


@pytest.mark.parametrize("then", [trio.BrokenResourceError("reset"), trio.ClosedResourceError("shut")])
async def test_a_broken_stream_is_peer_gone(then: Exception) -> None:
    with pytest.raises(PeerGone, match="the connection broke"):
        await Framed(Scripted(then=then), TALK).receive()
    stream = Scripted()
    stream.fail_send = then
    with pytest.raises(PeerGone, match="the connection broke"):
        await Framed(stream, TALK).send(Ping(1))


async def test_a_silent_peer_is_peer_silent_and_may_still_answer(autojump_clock: trio.testing.MockClock) -> None:
    near, far = trio.testing.memory_stream_pair()
    framed = Framed(near, TALK)
    await far.send_all(WIRE[:5])
    with pytest.raises(PeerSilent, match=r"no answer within 2\.5 s"):
        await framed.receive(deadline_s=2.5)
    assert trio.current_time() == pytest.approx(2.5)
    await far.send_all(encode(TALK.encode(Ping(1)))[5:])
    assert (await framed.receive(deadline_s=1))[0] == Ping(1)


async def test_a_peer_that_does_not_read_is_peer_silent(autojump_clock: trio.testing.MockClock) -> None:
    stream = Scripted()
    stream.hang_send = True
    with pytest.raises(PeerSilent):
        await Framed(stream, TALK).send(Ping(1), deadline_s=3)


async def test_a_cancelled_receive_loses_nothing(autojump_clock: trio.testing.MockClock) -> None:
    near, far = trio.testing.memory_stream_pair()
    framed = Framed(near, TALK, max_payload=100)
    found = []
    for i in range(len(WIRE)):
        await far.send_all(WIRE[i : i + 1])
        with trio.move_on_after(0.1):
            found.append(await framed.receive())
    assert found == MESSAGES


@pytest.mark.parametrize(
    "wire",
    [
        PREFIX.pack(2**32 - 1, 0),
        PREFIX.pack(0, 2**32 - 1),
        PREFIX.pack(3, 1) + b"xxxx",
        PREFIX.pack(101, 0),
        encode(b""),
        encode(b"\xc1"),
        encode(b"\x91\x07"),
        encode(b"\x91\x01"),
        encode(b"\x92\x01\xa1x"),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),
    ],
)
async def test_garbage_is_a_protocol_error(wire: bytes) -> None:
    with pytest.raises(ProtocolError):
        await Framed(Scripted(wire, then=None), TALK, max_header=100).receive()


async def test_another_message_than_expected_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="expected Pong, got Ping"):
        await Framed(Scripted(WIRE), TALK).expect(Pong)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=6))
async def test_any_bytes_end_in_messages_or_a_peer_error(chunks: list[bytes]) -> None:
    found, _ = await all_messages(Framed(Scripted(*filter(None, chunks)), TALK, max_header=50))
    assert all(isinstance(message, Ping | Pong) for message, _ in found)


async def test_after_the_last_frame_the_raw_stream_goes_on_where_it_stopped() -> None:
    stream = Scripted(encode(TALK.encode(Ping(1))) + b"raw and ", b"more")
    framed = Framed(stream, TALK)
    await framed.expect(Ping)
    raw = framed.detach()
    assert await raw.receive_some(3) == b"raw"
    assert await raw.receive_some() == b" and "
    assert await raw.receive_some(100) == b"more"
    assert await raw.receive_some(100) == b""
    await raw.send_all(b"back")
    await raw.wait_send_all_might_not_block()
    await raw.aclose()
    assert (bytes(stream.sent), stream.n_closed) == (b"back", 1)


async def test_without_anything_read_ahead_the_raw_stream_is_the_stream() -> None:
    stream = Scripted(encode(TALK.encode(Ping(1))))
    framed = Framed(stream, TALK)
    await framed.expect(Ping)
    assert framed.detach() is stream


async def test_a_prefixed_stream_is_a_checkpoint_even_for_what_it_has() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await Prefixed(Scripted(), b"x").receive_some()
    assert scope.cancelled_caught


def test_peer_errors_lets_all_else_pass() -> None:
    async def main() -> None:
        with pytest.raises(ZeroDivisionError), peer_errors(1):
            raise ZeroDivisionError
        with trio.CancelScope() as scope, peer_errors():
            scope.cancel()
            await trio.sleep_forever()
        assert scope.cancelled_caught

    trio.run(main)


# Joining streams


async def test_pump_copies_to_the_end_and_counts() -> None:
    sizes: list[int] = []
    source, sink = Scripted(b"one", b"three"), Scripted()
    await pump(source, sink, sizes.append)
    assert (bytes(sink.sent), sizes) == (b"onethree", [3, 5])
    assert (source.n_closed, sink.n_closed) == (0, 0)


@pytest.mark.parametrize("error", [trio.BrokenResourceError(), trio.ClosedResourceError()])
async def test_pump_takes_a_broken_side_as_an_end(error: Exception) -> None:
    sizes: list[int] = []
    await pump(Scripted(b"x", then=error), Scripted(), sizes.append)
    assert sizes == [1]
    sink = Scripted()
    sink.fail_send = error
    await pump(Scripted(b"x", then=None), sink, sizes.append)
    assert sizes == [1]


async def test_splice_carries_both_ways_until_one_side_ends() -> None:
    client, left = trio.testing.memory_stream_pair()
    right, server = trio.testing.memory_stream_pair()
    counted: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(splice, left, right, counted.append)
        await client.send_all(b"question")
        assert await server.receive_some(100) == b"question"
        await server.send_all(b"answer")
        assert await client.receive_some(100) == b"answer"
        await client.send_all(b"last words")
        await client.aclose()
        assert await server.receive_some(100) == b"last words"
        assert await server.receive_some(100) == b""
    assert sum(counted) == len(b"questionanswerlast words")
    with pytest.raises(trio.BrokenResourceError):
        await server.send_all(b"x")


@pytest.mark.parametrize("broken", ["left", "right"])
async def test_splice_closes_both_when_one_breaks(broken: str) -> None:
    streams = {"left": Scripted(then=None), "right": Scripted(then=None)}
    streams[broken].then = trio.BrokenResourceError()
    await splice(streams["left"], streams["right"])
    assert [s.n_closed for s in streams.values()] == [1, 1]


async def test_splice_closes_both_when_it_is_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    left, right = Scripted(then=None), Scripted(then=None)
    left.hang_close = right.hang_close = True
    with trio.move_on_after(1) as scope:
        await splice(left, right)
    assert scope.cancelled_caught
    assert (left.n_closed, right.n_closed) == (1, 1)
    assert trio.current_time() == pytest.approx(1)


async def test_splice_closes_both_when_the_counting_fails() -> None:
    def fail(_n: int) -> None:
        raise ZeroDivisionError

    left, right = Scripted(b"x"), Scripted(then=None)
    with pytest.raises(ExceptionGroup) as caught:
        await splice(left, right, fail)
    assert caught.group_contains(ZeroDivisionError)
    assert (left.n_closed, right.n_closed) == (1, 1)


async def test_closing_quietly_does_not_wait_even_when_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    stream = Scripted()
    stream.hang_close = True
    await close_quietly(stream)
    assert stream.n_closed == 1
    with trio.CancelScope() as scope:
        scope.cancel()
        await close_quietly(stream)
    assert stream.n_closed == 2
    assert trio.current_time() == 0


async def test_a_real_tcp_connection_that_is_reset_is_peer_gone() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    near = await trio.open_tcp_stream("127.0.0.1", listeners[0].socket.getsockname()[1])
    far = await listeners[0].accept()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await far.aclose()
    with pytest.raises(PeerGone):
        await Framed(near, TALK).receive(deadline_s=5)
    await near.aclose()
    await listeners[0].aclose()


def test_the_read_size_is_what_a_mesh_stream_takes_at_most() -> None:
    assert READ_SIZE == 65536


@pytest.mark.parametrize(("ends", "told"), [("left", False), ("right", True)])
@pytest.mark.parametrize("how", ["end", "breaks while read", "breaks while written"])
async def test_join_says_which_side_ended_first(ends: str, told: bool, how: str) -> None:
    streams = {"left": Scripted(then=None), "right": Scripted(then=None)}
    other = streams["right" if ends == "left" else "left"]
    if how == "breaks while written":
        other.chunks = [b"x"]
        streams[ends].fail_send = trio.BrokenResourceError()
    else:
        streams[ends].then = b"" if how == "end" else trio.ClosedResourceError()
    assert await join(streams["left"], streams["right"], [].append, [].append) is told
    assert [s.n_closed for s in streams.values()] == [1, 1]


async def test_join_counts_each_way() -> None:
    to_right: list[int] = []
    to_left: list[int] = []
    left, right = Scripted(b"abc", then=None), Scripted(b"12345", b"", then=None)
    await join(left, right, to_right.append, to_left.append)
    assert (sum(to_right), sum(to_left)) == (3, 5)
    assert (left.sent, right.sent) == (b"12345", b"abc")


def socket_streams() -> tuple[trio.SocketStream, trio.SocketStream]:
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)
    near, far = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in ends)
    return near, far


async def test_join_takes_a_socket_on_one_side_and_something_else_on_the_other() -> None:
    user, left = socket_streams()
    right = Scripted(b"to the user", then=None)
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            assert not await join(left, right, [].append, [].append)

        nursery.start_soon(run)
        assert await user.receive_some(100) == b"to the user"
        await user.send_all(b"from the user")
        await user.aclose()
    assert (right.sent, right.n_closed) == (b"from the user", 1)


def halved(data: bytes | bytearray | memoryview) -> list[bytes | bytearray | memoryview]:
    """In two parts, but for x, which stands for nothing."""
    if data == b"x":
        return []
    return [data[: len(data) // 2], data[len(data) // 2 :]]


async def test_what_goes_to_the_right_can_be_changed_on_the_way() -> None:
    counted: list[int] = []
    left, right = Scripted(b"abc", b"x", b"de", b"", then=None), Scripted(b"x", then=None)
    await join(left, right, counted.append, [].append, to_right=Changing(lambda data: [*halved(data), b"|"]))
    assert (right.sent, counted) == (b"abc||de|", [3, 1, 2])
    assert left.sent == b"x"


@pytest.mark.parametrize("n_chunks", [1, 3])
async def test_changed_between_sockets_to_more_than_fits_into_one_write(n_chunks: int) -> None:
    """The reader is slower than the writer, which must wait half way and loses nothing of the taken buffer."""
    user, left = socket_streams()
    right, worker = socket_streams()
    made = [bytes([i]) * (2 * TAKE_SIZE + i) for i in range(n_chunks)]
    counted: list[int] = []
    async with trio.open_nursery() as nursery, user, worker:
        change = Changing(lambda data: [data, *made] if n_chunks > 1 else made)
        nursery.start_soon(partial(join, left, right, counted.append, [].append, to_right=change))
        for _ in range(3):
            await user.send_all(b"abcdef")
            wanted = b"".join([b"abcdef", *made] if n_chunks > 1 else made)
            got = b""
            with trio.fail_after(20):
                while len(got) < len(wanted):
                    got += await worker.receive_some(len(wanted) - len(got))
            assert got == wanted
        nursery.cancel_scope.cancel()
    assert sum(counted) in (12, 18)  # the last is counted once it is through


async def test_nothing_is_passed_on_between_sockets_for_what_is_held() -> None:
    user, left = socket_streams()
    right, worker = socket_streams()
    async with trio.open_nursery() as nursery, user, worker:
        nursery.start_soon(partial(join, left, right, [].append, [].append, to_right=Changing(halved)))
        for data in (b"x", b"abc"):
            await user.send_all(data)
            await trio.testing.wait_all_tasks_blocked(0.05)
        with trio.fail_after(20):
            assert await worker.receive_some(100) == b"abc"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("is_direct", [True, False])
async def test_an_error_of_the_change_is_raised_and_both_are_closed(is_direct: bool) -> None:
    def refuse(_data: object) -> list[bytes]:
        raise ProtocolError("no")

    user, left = socket_streams()
    right, worker = socket_streams()
    scripted = Scripted(then=None)
    async with user, worker:
        await user.send_all(b"x")
        with pytest.raises(ProtocolError, match="no"), trio.fail_after(20):
            await join(left, right if is_direct else scripted, [].append, [].append, to_right=Changing(refuse))
        assert await user.receive_some(100) == b""
        if is_direct:
            assert await worker.receive_some(100) == b""
    assert is_direct or scripted.n_closed == 1
    await right.aclose()


async def test_two_sockets_are_joined_without_the_detour() -> None:
    user, left = socket_streams()
    right, worker = socket_streams()
    async with trio.open_nursery() as nursery, worker:
        nursery.start_soon(splice, left, right)
        await user.send_all(b"x")
        assert await worker.receive_some(100) == b"x"
        assert left.socket.fileno() == right.socket.fileno() == -1, "taken over by direct streams"
        await user.aclose()
        assert await worker.receive_some(100) == b""


class Endless(SocketEnd):
    """There is always more, and it always fits."""

    n_left = 10_000

    def take(self, max_bytes: int = TAKE_SIZE) -> memoryview | None:
        self.n_left -= 1
        assert self.n_left, "nobody else ever gets a turn"
        self._more = True
        return memoryview(b"x")

    def give(self, data: bytes | bytearray | memoryview) -> bool:
        return True


async def test_a_pump_that_never_waits_can_be_cancelled() -> None:
    near, far = (Endless(stream) for stream in socket_streams())
    async with near, far:
        with trio.move_on_after(0.01) as scope:
            await pump(near, far, [].append)
    assert scope.cancelled_caught


@pytest.mark.parametrize("by_socket", [True, False])
async def test_messages_that_are_sent_together_come_one_by_one(by_socket: bool) -> None:
    near, far = sockets(node_id("a"), node_id("b")) if by_socket else trio.testing.memory_stream_pair()
    messages = [Ping(1), Pong("x"), Ping(2)]
    async with near, far:
        await Framed(near, TALK).send_together(messages, deadline_s=5)
        there = Framed(far, TALK)
        assert [await there.receive(deadline_s=5) for _ in messages] == [(message, b"") for message in messages]


async def send_on_and_on(framed: Framed, deadline_s: float) -> None:
    for _ in range(1000):
        await framed.send_together([Pong("x" * 60_000)], deadline_s=deadline_s)


async def test_a_peer_that_does_not_read_what_is_sent_together_is_noticed() -> None:
    near, far = sockets(node_id("a"), node_id("b"))
    framed = Framed(near, TALK)
    async with near, far:
        with pytest.raises(PeerSilent):
            await send_on_and_on(framed, 0.05)
        with pytest.raises(PeerGone, match="broke"):
            await framed.send_together([Ping(1)], deadline_s=0.05)


async def test_a_peer_that_is_gone_is_noticed_where_messages_are_sent_together() -> None:
    near, far = sockets(node_id("a"), node_id("b"))
    async with near:
        await far.aclose()
        with pytest.raises(PeerGone, match="broke"):
            await send_on_and_on(Framed(near, TALK), 5)
