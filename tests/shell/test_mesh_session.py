from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from mesh_lab import stranger_hello

from tightwad_agent.errors import PeerGone
from tightwad_agent.ids import NO_EPOCH, Address, ClusterId
from tightwad_agent.mesh import session as sessions
from tightwad_agent.mesh.links import Peer
from tightwad_agent.mesh.session import MAX_QUEUED, SEND_DEADLINE_S, SILENCE_S, Session
from tightwad_agent.streams import Framed
from tightwad_agent.testing import node_id
from tightwad_agent.wire.codec import pack
from tightwad_agent.wire.control import CONTROL, MAX_CONTROL, Coordinates, Echo, Goodbye, Probe
from tightwad_agent.wire.frames import PREFIX, encode
from tightwad_agent.wire.rows import Role, Stamp


def session_on(stream: trio.abc.Stream, *, outgoing: bool = True) -> Session:
    hello = stranger_hello(ClusterId(node_id("cluster")))
    somewhere = Address("127.0.0.1", 8089)
    return Session(Peer(hello.node, Role.NODE, hello, somewhere, somewhere), stream, 1, outgoing=outgoing)


class Heard:
    """Notes what a session heard."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def __call__(self, _session: Session, message: Any) -> None:
        self.messages.append(message)


def framed(stream: trio.abc.Stream) -> Framed:
    return Framed(stream, CONTROL, max_header=MAX_CONTROL)


async def is_closed(stream: trio.abc.Stream) -> bool:
    """Whether the other end is gone for both directions."""
    with trio.fail_after(5):
        try:
            while await stream.receive_some(1 << 16):
                pass
            await stream.send_all(b"x")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return True
    return False


async def test_messages_pass_in_order_both_ways(nursery: trio.Nursery) -> None:
    near, far = trio.testing.memory_stream_pair()
    a, b = session_on(near), session_on(far, outgoing=False)
    heard = Heard()
    nursery.start_soon(a.run, Heard())
    nursery.start_soon(b.run, heard)
    sent = [Echo(i) for i in range(50)] + [Probe(), Coordinates(Stamp(NO_EPOCH, None))]
    for message in sent:
        a.post(message)
    await trio.testing.wait_all_tasks_blocked()
    assert heard.messages == sent
    a.close("test over")
    b.close("test over")


async def test_goodbye_is_a_clean_end_for_who_hears_it() -> None:
    near, far = trio.testing.memory_stream_pair()
    a, b = session_on(near), session_on(far)
    heard = Heard()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.run, Heard())
            nursery.start_soon(b.run, heard)
            a.post(Echo(1))
            a.post(Goodbye("leaving"))
            a.post(Echo(2))
    assert b.clean is True
    assert a.clean is False
    assert heard.messages == [Echo(1)], "nothing is said after goodbye"
    assert await is_closed(near)


async def test_nothing_is_sent_after_a_goodbye(nursery: trio.Nursery) -> None:
    near, far = trio.testing.memory_stream_pair()
    session = session_on(near)
    for message in (Goodbye("leaving"), Echo(1), Echo(2)):
        session.post(message)
    nursery.start_soon(session.run, Heard())
    await trio.testing.wait_all_tasks_blocked()
    assert await far.receive_some() == encode(CONTROL.encode(Goodbye("leaving")))
    session.close("test over")
    with pytest.raises(PeerGone):
        await framed(far).receive()


async def test_what_follows_a_goodbye_is_not_heard() -> None:
    near, far = trio.testing.memory_stream_pair()
    await framed(near).send(Goodbye("x" * 200))
    await framed(near).send(Echo(1))
    session, heard = session_on(far), Heard()
    with trio.fail_after(5):
        await session.run(heard)
    assert session.clean
    assert heard.messages == []


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 8,
        PREFIX.pack(MAX_CONTROL + 1, 0),
        PREFIX.pack(3, 1) + b"\x92\x02\x01x",
        encode(b""),
        encode(b"\xc1"),
        encode(pack([99])),
        encode(pack([2])),
        encode(pack([2, "text"])),
        encode(pack([14, "x" * 201])),
        encode(pack([6, [["no node id", "dead", 1]]])),
    ],
    ids=["http", "ones", "oversized", "payload", "empty", "no-msgpack", "tag", "few", "type", "long", "id"],
)
async def test_garbage_ends_the_link_and_nothing_else(data: bytes) -> None:
    near, far = trio.testing.memory_stream_pair()
    await framed(near).send(Echo(1))
    await near.send_all(data)
    session, heard = session_on(far), Heard()
    with trio.fail_after(5):
        await session.run(heard)
    assert heard.messages == [Echo(1)]
    assert session.clean is False
    assert await is_closed(near)
    session.post(Echo(2))  # the session is over: no error, no queue that grows


async def test_a_peer_that_vanishes_ends_the_link_without_an_error() -> None:
    for cut in (0, 1, 5):
        near, far = trio.testing.memory_stream_pair()
        await near.send_all(encode(CONTROL.encode(Echo(1)))[:cut])
        await near.aclose()
        session = session_on(far)
        with trio.fail_after(5):
            await session.run(Heard())
        assert not session.clean


async def test_one_byte_at_a_time_is_the_same(nursery: trio.Nursery) -> None:
    near, far = trio.testing.memory_stream_pair()
    session, heard = session_on(far), Heard()
    nursery.start_soon(session.run, heard)
    for byte in encode(CONTROL.encode(Echo(2**62))) + encode(CONTROL.encode(Probe())):
        await near.send_all(bytes([byte]))
        await trio.testing.wait_all_tasks_blocked()
    assert heard.messages == [Echo(2**62), Probe()]
    session.close("test over")


async def test_a_silent_peer_is_given_up_at_last(autojump_clock: trio.testing.MockClock) -> None:
    near, far = trio.testing.memory_stream_pair()
    session = session_on(far)
    await session.run(Heard())
    assert trio.current_time() == pytest.approx(SILENCE_S, abs=1)
    assert await is_closed(near)


async def test_a_peer_that_speaks_now_and_then_is_kept(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    near, far = trio.testing.memory_stream_pair()
    session, heard = session_on(far), Heard()
    nursery.start_soon(session.run, heard)
    for i in range(5):
        await trio.sleep(SILENCE_S - 1)
        await framed(near).send(Echo(i))
        await trio.testing.wait_all_tasks_blocked()
        assert session.heard_at == trio.current_time()
    assert len(heard.messages) == 5
    session.close("test over")


class Clogged(trio.abc.Stream):
    """Takes `n` bytes, then no more; says nothing."""

    def __init__(self) -> None:
        self.closed = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.sleep_forever()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await self.closed.wait()
        raise trio.ClosedResourceError

    async def wait_send_all_might_not_block(self) -> None:
        await trio.sleep_forever()

    async def aclose(self) -> None:
        self.closed.set()
        await trio.lowlevel.checkpoint()


async def test_a_full_queue_ends_the_link_and_holds_no_more_than_it_may() -> None:
    stream = Clogged()
    session = session_on(stream)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run, Heard())
            await trio.testing.wait_all_tasks_blocked()
            for i in range(MAX_QUEUED + 100):
                session.post(Echo(i))
            assert session._queue.statistics().current_buffer_used <= MAX_QUEUED
    assert stream.closed.is_set()


async def test_a_peer_that_takes_nothing_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    stream = Clogged()
    session = session_on(stream)
    session.post(Probe())
    await session.run(Heard())
    assert trio.current_time() == pytest.approx(SEND_DEADLINE_S, abs=1)
    assert stream.closed.is_set()


async def test_a_session_closed_before_it_runs_ends_at_once() -> None:
    near, far = trio.testing.memory_stream_pair()
    session = session_on(far)
    session.close("another link is better")
    session.close("twice does no harm")
    with trio.fail_after(5):
        await session.run(Heard())
    assert await is_closed(near)


async def test_closed_from_within_a_handler() -> None:
    near, far = trio.testing.memory_stream_pair()
    for i in range(3):
        await framed(near).send(Echo(i))
    session, heard = session_on(far), []

    def close_at_once(of: Session, message: Any) -> None:
        heard.append(message)
        of.close("enough")

    with trio.fail_after(5):
        await session.run(close_at_once)
    assert heard == [Echo(0)]


async def test_a_cancelled_session_closes_its_stream() -> None:
    near, far = trio.testing.memory_stream_pair()
    session = session_on(far)
    with trio.move_on_after(0.01) as scope:
        await session.run(Heard())
    assert scope.cancelled_caught
    assert await is_closed(near)


async def test_a_bug_in_a_handler_is_not_hidden() -> None:
    near, far = trio.testing.memory_stream_pair()
    await framed(near).send(Probe())

    def buggy(_session: Session, _message: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        await session_on(far).run(buggy)
    assert caught.group_contains(ZeroDivisionError)
    assert await is_closed(near)


async def test_round_trips_are_smoothed_after_the_first() -> None:
    _near, far = trio.testing.memory_stream_pair()
    session = session_on(far)
    assert session.rtt_s is None
    session.heard_rtt(0.010)
    assert session.rtt_s == 0.010
    for _ in range(100):
        session.heard_rtt(0.001)
    assert session.rtt_s == pytest.approx(0.001, rel=0.01)
    session.heard_rtt(1.0)
    assert session.rtt_s < 0.25
    assert sessions.MAX_QUEUED > 256  # one message for each row of a full cluster
