"""What a coordinator serves reaches those who follow it when it changes, and nobody waits for one that is gone."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from tightwad_agent import serving_feed
from tightwad_agent.errors import PeerError, PeerGone, PeerSilent, ProtocolError
from tightwad_agent.ids import NodeId
from tightwad_agent.streams import Framed
from tightwad_agent.wire.codec import pack
from tightwad_agent.wire.control import CALL, CallReply

COORDINATOR = NodeId.of_spki(b"the coordinator")


class Lab:
    """A coordinator's end and a follower's of one stream. `now`: what is served."""

    def __init__(self) -> None:
        self.near, self.far = trio.testing.memory_stream_pair()
        self.now: dict[str, Any] | None = {"n": 0}
        self.heard: list[dict[str, Any]] = []
        self.wanted = True
        self.asked: list[tuple[NodeId, str]] = []

    async def open(self, node: NodeId, service: str, args: dict[str, Any]) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        self.asked.append((node, service))
        return self.near

    async def follow(self) -> None:
        await serving_feed.follow(self.open, COORDINATOR, self.heard.append, lambda: self.wanted)

    async def tell(self) -> None:
        await serving_feed.tell(self.far, lambda: self.now)
        await self.far.aclose()


async def test_a_change_is_told_once(autojump_clock: trio.testing.MockClock) -> None:
    lab = Lab()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.tell)
        nursery.start_soon(lab.follow)
        await trio.sleep(4.5)
        assert lab.heard == [{"n": 0}]
        lab.now = {"n": 1}
        await trio.sleep(serving_feed.PERIOD_S)
        assert lab.heard == [{"n": 0}, {"n": 1}]
        assert lab.asked == [(COORDINATOR, "serving")], "all of it on one stream"
        await trio.sleep(2 * serving_feed.STILL_S + 1)
        assert lab.heard[2:] == [{"n": 1}] * 2, "nothing changed, and that is told too"
        nursery.cancel_scope.cancel()


async def test_who_is_no_longer_coordinator_says_no_more(autojump_clock: trio.testing.MockClock) -> None:
    lab = Lab()

    async def retire() -> None:
        await trio.sleep(2.5)
        lab.now = None

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.tell)
        nursery.start_soon(retire)
        with pytest.raises(PeerGone):
            await lab.follow()
    assert lab.heard == [{"n": 0}]


async def test_another_coordinator_is_followed_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """However silent the old one is."""
    lab = Lab()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lab.follow)
        await trio.sleep(0.5)
        lab.wanted = False
    assert trio.current_time() - began <= serving_feed.PERIOD_S
    with pytest.raises(trio.ClosedResourceError):
        await lab.near.send_all(b"x")


async def test_silence_is_noticed(autojump_clock: trio.testing.MockClock) -> None:
    with pytest.raises(PeerSilent):
        await Lab().follow()


@pytest.mark.parametrize(
    "result", [pack([1]), pack("text"), b"\xc1", b""], ids=["list", "text", "not msgpack", "empty"]
)
async def test_what_is_no_map_ends_it(result: bytes, autojump_clock: trio.testing.MockClock) -> None:
    lab = Lab()
    await Framed(lab.far, CALL).send(CallReply(result))
    with pytest.raises(ProtocolError):
        await lab.follow()
    assert lab.heard == []


async def test_a_coordinator_that_cannot_be_reached(autojump_clock: trio.testing.MockClock) -> None:
    async def never(_node: NodeId, _service: str, _args: dict[str, Any]) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    with pytest.raises(PeerError):
        await serving_feed.follow(never, COORDINATOR, print, lambda: True)
