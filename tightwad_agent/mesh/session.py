"""One control link: a task that reads, a task that writes from a bounded queue, and an end that both share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import trio

from tightwad_agent.errors import PeerError
from tightwad_agent.mesh.links import Peer
from tightwad_agent.streams import Framed, close_quietly
from tightwad_agent.wire.control import CONTROL, MAX_CONTROL, Goodbye

log = logging.getLogger(__name__)

MAX_QUEUED = 512
"""Control messages a slow peer may be behind; beyond it the link is given up, not the memory."""
SEND_DEADLINE_S = 10.0
SILENCE_S = 120.0
"""A link without a byte for this long is closed; the failure detector is much quicker, this is the last resort."""


class Session:
    """A link to `peer`. `outgoing`: this side dialled; `number`: drawn by the dialler, known to both; `instead`: the
    number of the link whose place it takes."""

    def __init__(
        self, peer: Peer, stream: trio.abc.Stream, number: int, *, outgoing: bool, instead: int | None = None
    ) -> None:
        self.peer = peer
        self.number = number
        self.outgoing = outgoing
        self.instead = instead
        self.rtt_s: float | None = None
        self.clean = False
        self.heard_at = trio.current_time()
        self._framed = Framed(stream, CONTROL, max_header=MAX_CONTROL)
        self._send, self._queue = trio.open_memory_channel[Any](MAX_QUEUED)
        self._scope = trio.CancelScope()

    def post(self, message: object) -> None:
        """Queues a message; never blocks. A full queue ends the link."""
        try:
            self._send.send_nowait(message)
        except trio.WouldBlock:
            self.close("it does not take messages any more")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the session is ending, and says so by itself

    def close(self, reason: str) -> None:
        """Ends the link now; `run` returns."""
        if not self._scope.cancel_called:
            log.debug("closing the link to %s: %s", self.peer.hello.name, reason)
        self._scope.cancel()

    def heard_rtt(self, sample_s: float) -> None:
        """Smooths the round trip time; the first sample counts whole."""
        self.rtt_s = sample_s if self.rtt_s is None else 0.8 * self.rtt_s + 0.2 * sample_s

    async def run(self, on_message: Callable[[Session, Any], None]) -> None:
        """Until the link ends, for whatever reason. The stream is closed then."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    await self._read(on_message)
                    nursery.cancel_scope.cancel()
        except* PeerError as group:
            log.debug("link to %s ended: %s", self.peer.hello.name, group.exceptions[0])
        finally:
            self._queue.close()
            await close_quietly(self._framed.stream)

    async def _read(self, on_message: Callable[[Session, Any], None]) -> None:
        while not self._scope.cancel_called:  # messages that came in one piece are read without a checkpoint
            message, _ = await self._framed.receive(deadline_s=SILENCE_S)
            self.heard_at = trio.current_time()
            if isinstance(message, Goodbye):
                self.clean = True
                return
            on_message(self, message)

    async def _write(self) -> None:
        async for message in self._queue:
            await self._framed.send(message, deadline_s=SEND_DEADLINE_S)
            if isinstance(message, Goodbye):
                return
