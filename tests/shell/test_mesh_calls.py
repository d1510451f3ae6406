from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from tightwad_agent.errors import (
    DoesNotFit,
    PeerGone,
    PeerSilent,
    PeerUnreachable,
    ProtocolError,
    RemoteError,
    StaleEpoch,
)
from tightwad_agent.ids import NodeId
from tightwad_agent.mesh import calls
from tightwad_agent.streams import Framed, OpenStream, close_quietly
from tightwad_agent.testing import node_id
from tightwad_agent.wire.codec import pack
from tightwad_agent.wire.control import CALL, MAX_CALL, MAX_CONTROL, CallFailed, CallReply, CallRequest
from tightwad_agent.wire.frames import PREFIX, encode

ME, PEER = node_id("me"), node_id("peer")
Handler = Callable[[NodeId, dict[str, Any]], Awaitable[dict[str, Any]]]


async def echo(peer: NodeId, params: dict[str, Any]) -> dict[str, Any]:
    await trio.lowlevel.checkpoint()
    return {"peer": str(peer), **params}


def served_by(nursery: trio.Nursery, serve: Callable[[trio.abc.Stream, dict[str, Any]], Awaitable[None]]) -> OpenStream:
    """Opens streams whose other end is in the hands of `serve`, and closed after it."""

    async def run(stream: trio.abc.Stream, args: dict[str, Any]) -> None:
        try:
            await serve(stream, args)
        finally:
            await close_quietly(stream)

    async def open_stream(node: NodeId, service: str, args: dict[str, Any]) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        assert (node, service) == (PEER, calls.SERVICE)
        near, far = trio.testing.memory_stream_pair()
        nursery.start_soon(run, far, args)
        return near

    return open_stream


def node_with(nursery: trio.Nursery, **methods: Handler) -> OpenStream:
    return served_by(nursery, lambda stream, args: calls.answer(methods, ME, stream, args))


def says(nursery: trio.Nursery, data: bytes, *, then_close: bool = True) -> OpenStream:
    """A peer that answers every request with these bytes."""

    async def serve(stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
        await Framed(stream, CALL, max_header=MAX_CONTROL).receive()
        await stream.send_all(data)
        if not then_close:
            await trio.sleep_forever()

    return served_by(nursery, serve)


async def test_a_call_carries_parameters_there_and_the_result_back(nursery: trio.Nursery) -> None:
    result = await calls.call(node_with(nursery, echo=echo), PEER, "echo", {"text": "hé", "n": [1, None, b"\x00"]})
    assert result == {"peer": str(ME), "text": "hé", "n": [1, None, b"\x00"]}


async def test_an_error_of_the_handler_arrives_by_its_code(nursery: trio.Nursery) -> None:
    async def refuse(_peer: NodeId, _params: dict[str, Any]) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        raise DoesNotFit("needs 80 GB" + "!" * 9000, hint="add a machine" + "!" * 9000)

    with pytest.raises(RemoteError) as caught:
        await calls.call(node_with(nursery, place=refuse), PEER, "place", {})
    assert caught.value.code == "does_not_fit"
    assert caught.value.message.startswith("needs 80 GB!")
    assert caught.value.hint.startswith("add a machine!")


async def test_a_stale_epoch_stays_one(nursery: trio.Nursery) -> None:
    async def refuse(_peer: NodeId, _params: dict[str, Any]) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        raise StaleEpoch("epoch 4 is over", hint="now 5")

    with pytest.raises(StaleEpoch, match="epoch 4 is over"):
        await calls.call(node_with(nursery, start=refuse), PEER, "start", {})


async def test_a_bug_in_the_handler_is_a_fault_there_logged_and_without_its_text(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    async def buggy(_peer: NodeId, _params: dict[str, Any]) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        raise KeyError("secret path")

    with caplog.at_level(logging.ERROR), pytest.raises(RemoteError) as caught:
        await calls.call(node_with(nursery, m=buggy), PEER, "m", {})
    assert caught.value.code == "fault"
    assert "secret" not in str(caught.value)
    assert "'m'" in caplog.text
    assert "secret path" in caplog.text


@pytest.mark.parametrize(
    "result",
    [{"x": {1, 2}}, {"x": object()}, {"x": 2**70}, {"x": b"\x00" * MAX_CALL}],
    ids=["set", "object", "int", "huge"],
)
async def test_a_result_that_cannot_be_sent_is_a_fault_there_too(
    nursery: trio.Nursery, result: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def odd(_peer: NodeId, _params: dict[str, Any]) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return result

    with pytest.raises(RemoteError) as caught:
        await calls.call(node_with(nursery, m=odd), PEER, "m", {})
    assert caught.value.code == "fault"
    assert "failed the call" in caplog.text


async def test_the_largest_result_passes(nursery: trio.Nursery) -> None:
    blob = b"\x00" * (MAX_CALL - 16)

    async def large(_peer: NodeId, _params: dict[str, Any]) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return {"x": blob}

    assert await calls.call(node_with(nursery, m=large), PEER, "m", {"x": blob}) == {"x": blob}


async def test_an_unknown_method_is_refused_by_name(nursery: trio.Nursery) -> None:
    with pytest.raises(RemoteError, match="'no such method'") as caught:
        await calls.call(node_with(nursery, echo=echo), PEER, "no such method", {})
    assert caught.value.code == "peer_refused"


@pytest.mark.parametrize("args", [{}, {"method": 7}, {"method": None}, {"method": ["echo"]}, {"method": "x" * 10**6}])
async def test_arguments_of_a_hostile_caller_are_refused(nursery: trio.Nursery, args: dict[str, Any]) -> None:
    near, far = trio.testing.memory_stream_pair()
    nursery.start_soon(calls.answer, {"echo": echo}, ME, far, args)
    framed = Framed(near, CALL, max_header=MAX_CONTROL)
    await framed.send(CallRequest(pack({})))
    failed: CallFailed = await framed.expect(CallFailed)
    assert failed.code == "peer_refused"
    assert len(failed.message) < 200


@pytest.mark.parametrize("params", [b"", b"\xc1", pack([1]), pack("x"), b"\x81\x01\x02", pack({"a": 1}) + b"x"])
async def test_parameters_that_are_no_map_never_reach_the_handler(nursery: trio.Nursery, params: bytes) -> None:
    async def never(_peer: NodeId, _params: dict[str, Any]) -> dict[str, Any]:
        pytest.fail("called")

    near, far = trio.testing.memory_stream_pair()
    nursery.start_soon(calls.answer, {"m": never}, ME, far, {"method": "m"})
    framed = Framed(near, CALL, max_header=MAX_CONTROL)
    await framed.send(CallRequest(params))
    failed: CallFailed = await framed.expect(CallFailed)
    assert failed.code == "protocol"


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        PREFIX.pack(MAX_CONTROL + 1, 0),
        PREFIX.pack(2, 1) + b"\x91\x01x",
        encode(pack([9, {}])),
        encode(pack([1])),
        encode(pack([2, pack({})])),  # a reply where a request is due
        encode(b"\xc1"),
    ],
    ids=["http", "oversized", "payload", "tag", "fields", "reply", "no-msgpack"],
)
async def test_garbage_ends_the_stream_of_the_one_who_sent_it(data: bytes) -> None:
    near, far = trio.testing.memory_stream_pair()
    await near.send_all(data)
    with pytest.raises(ProtocolError):
        await calls.answer({"echo": echo}, ME, far, {"method": "echo"})


@pytest.mark.parametrize("sent", [b"", PREFIX.pack(100, 0) + b"\x91"], ids=["nothing", "a-part"])
async def test_a_caller_that_goes_on_saying_nothing_is_given_up(
    autojump_clock: trio.testing.MockClock, sent: bytes
) -> None:
    near, far = trio.testing.memory_stream_pair()
    await near.send_all(sent)
    with pytest.raises(PeerSilent):
        await calls.answer({"echo": echo}, ME, far, {"method": "echo"})
    assert trio.current_time() <= calls.REQUEST_DEADLINE_S + 1


async def test_a_caller_that_goes_away_is_no_fault() -> None:
    near, far = trio.testing.memory_stream_pair()
    await near.aclose()
    with pytest.raises(PeerGone):
        await calls.answer({"echo": echo}, ME, far, {"method": "echo"})


class Full(trio.abc.Stream):
    """A stream that gives its bytes and takes none."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        data, self._data = self._data, b""
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.sleep_forever()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.sleep_forever()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("method", ["echo", "unknown", "buggy"])
async def test_a_caller_that_takes_no_answer_does_not_hold_the_handler(
    autojump_clock: trio.testing.MockClock, method: str
) -> None:
    async def buggy(_peer: NodeId, _params: dict[str, Any]) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    stream = Full(encode(CALL.encode(CallRequest(pack({})))))
    with trio.fail_after(3600), pytest.raises(PeerSilent):
        await calls.answer({"echo": echo, "buggy": buggy}, ME, stream, {"method": method})
    assert trio.current_time() <= calls.REQUEST_DEADLINE_S + 1


# The caller's side


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError),
        (PREFIX.pack(MAX_CONTROL + 1, 0), ProtocolError),
        (encode(CALL.encode(CallRequest(pack({})))), ProtocolError),
        (encode(CALL.encode(CallReply(pack([])))), ProtocolError),
        (encode(CALL.encode(CallReply(b"\xc1"))), ProtocolError),
        (encode(pack([3, "c" * 65, "m", ""])), ProtocolError),
        (encode(CALL.encode(CallReply(pack({}))))[:-1], PeerGone),
        (b"", PeerGone),
    ],
)
async def test_an_answer_that_is_none_is_an_error_of_the_peer(
    nursery: trio.Nursery, data: bytes, error: type[Exception]
) -> None:
    with pytest.raises(error):
        await calls.call(says(nursery, data), PEER, "m", {})


async def test_a_peer_that_never_answers_is_silent(
    nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    with pytest.raises(PeerSilent):
        await calls.call(says(nursery, b"", then_close=False), PEER, "m", {})
    assert trio.current_time() == pytest.approx(calls.ANSWER_DEADLINE_S, abs=1)
    nursery.cancel_scope.cancel()


async def test_an_answer_one_byte_at_a_time_is_the_same(nursery: trio.Nursery) -> None:
    async def serve(stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
        await Framed(stream, CALL).receive()
        for byte in encode(CALL.encode(CallReply(pack({"a": 1})))):
            await stream.send_all(bytes([byte]))

    assert await calls.call(served_by(nursery, serve), PEER, "m", {}) == {"a": 1}


async def test_the_stream_is_closed_after_every_call(nursery: trio.Nursery) -> None:
    opened: list[trio.abc.Stream] = []

    def watched(inner: OpenStream) -> OpenStream:
        async def open_stream(node: NodeId, service: str, args: dict[str, Any]) -> trio.abc.Stream:
            opened.append(await inner(node, service, args))
            return opened[-1]

        return open_stream

    await calls.call(watched(node_with(nursery, echo=echo)), PEER, "echo", {})
    with pytest.raises(ProtocolError):
        await calls.call(watched(says(nursery, b"x" * 100)), PEER, "m", {})
    with pytest.raises(RemoteError):
        await calls.call(watched(node_with(nursery)), PEER, "m", {})
    with trio.move_on_after(0.01):
        await calls.call(watched(says(nursery, b"", then_close=False)), PEER, "m", {})
    for stream in opened:
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"x")
    assert len(opened) == 4
    nursery.cancel_scope.cancel()


async def test_a_node_that_cannot_be_reached_is_not_called() -> None:
    async def open_stream(_node: NodeId, _service: str, _args: dict[str, Any]) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        raise PeerUnreachable("no address")

    with pytest.raises(PeerUnreachable):
        await calls.call(open_stream, PEER, "m", {})
