"""What a node writes down of itself while it runs: `state.yaml`, at once where it must be, a little later elsewhere."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from tightwad_agent.errors import EnvironmentFault
from tightwad_agent.mesh.state import NodeState
from tightwad_agent.wire.handshake import RememberedPeer

log = logging.getLogger(__name__)

LATER_S = 2.0
"""What may be written later is written at most this often."""


class Memory:
    """The state of this node. A disk that refuses is told to `tell`, and lived with."""

    def __init__(self, state: NodeState, state_dir: Path, tell: Callable[[str], None]) -> None:
        self.state = state
        self._kept = state
        self._state_dir = state_dir
        self._tell = tell
        self._dirty = trio.Event()
        self._saving = trio.Lock()

    async def save(self, **changes: Any) -> None:
        """Changes fields and returns once they are on the disk, or the disk has refused."""
        self.state = dataclasses.replace(self.state, **changes)
        try:
            async with self._saving:
                state = self.state
                await trio.to_thread.run_sync(state.save, self._state_dir)
                self._kept = state
        except EnvironmentFault as exc:
            log.error("state not saved: %s", exc.message)  # noqa: TRY400 - the message says it all
            self._tell(f"state not saved: {exc.message}")

    def note(self, **changes: Any) -> None:
        """Changes fields; `run` writes them soon."""
        self.state = dataclasses.replace(self.state, **changes)
        self._dirty.set()

    def met(self, peer: RememberedPeer) -> None:
        """Remembers where a node is; `run` writes it soon."""
        if peer not in self.state.peers:
            self.state = self.state.remembering(peer)
            self._dirty.set()

    async def run(self) -> None:
        """Until cancelled; what is not on the disk by then is written before it ends."""
        try:
            while True:
                await self._dirty.wait()
                await trio.sleep(LATER_S)
                self._dirty = trio.Event()
                await self.save()
        finally:
            if self.state is not self._kept:
                with trio.CancelScope(shield=True):
                    await self.save()
