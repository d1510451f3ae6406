"""What the coordinator serves, told to the nodes that follow it: one stream each, a message when something changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from tightwad_agent.errors import PeerError, PeerGone, ProtocolError
from tightwad_agent.ids import NodeId
from tightwad_agent.streams import Framed, OpenStream, close_quietly, peer_errors
from tightwad_agent.wire.codec import pack, unpack
from tightwad_agent.wire.control import CALL, MAX_CONTROL, CallReply

SERVICE = "serving"
PERIOD_S = 1.0
"""A change is told after so long at most."""
STILL_S = 10.0
"""So often all is told although nothing changed, so that silence means something."""
SEND_S = 10.0
OPEN_S = 5.0


async def tell(stream: trio.abc.Stream, view: Callable[[], dict[str, Any] | None]) -> None:
    """Tells whoever opened the stream, until `view` has nothing more to tell. Raises a `PeerError` when he is gone."""
    framed = Framed(stream, CALL, max_header=MAX_CONTROL)
    told, told_at = None, trio.current_time()
    while (now := view()) is not None:
        if now != told or trio.current_time() - told_at >= STILL_S:
            await framed.send(CallReply(pack(now)), deadline_s=SEND_S)
            told, told_at = now, trio.current_time()
        await trio.sleep(PERIOD_S)


async def follow(
    open_stream: OpenStream, coordinator: NodeId, heard: Callable[[dict[str, Any]], None], wanted: Callable[[], bool]
) -> None:
    """Hears what `coordinator` serves for as long as it is `wanted`, asked every `PERIOD_S`. Raises a `PeerError`."""
    with peer_errors(OPEN_S):
        stream = await open_stream(coordinator, SERVICE, {})
    framed = Framed(stream, CALL, max_header=MAX_CONTROL)

    async def give_up() -> None:
        while True:
            await trio.sleep(PERIOD_S)
            if not wanted():
                nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(give_up)
            while True:
                reply: CallReply = await framed.expect(CallReply, deadline_s=STILL_S + SEND_S)
                heard(_map(reply.result))
    except* PeerError as group:
        error = group.exceptions[0]
        raise error if isinstance(error, PeerError) else PeerGone(str(error)) from None
    finally:
        await close_quietly(stream)


def _map(packed: bytes) -> dict[str, Any]:
    view = unpack(packed)
    if not isinstance(view, dict):
        raise ProtocolError(f"{SERVICE}: a map was due, not {type(view).__name__}")
    return view
