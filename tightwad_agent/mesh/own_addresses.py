"""Where others may dial this node, while its interfaces come and go: a cable, WiFi, a VPN."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import trio

from tightwad_agent.errors import TightwadError
from tightwad_agent.ids import Address
from tightwad_agent.mesh import netif, netwatch

log = logging.getLogger(__name__)

PERIOD_S = 5.0
"""The interfaces are looked at this often, where the system does not tell of a change."""

Moved = Callable[[Sequence[Address]], None]
"""Told of the addresses that were ours before, once there are others."""


class OwnAddresses:
    """`interfaces` as in `Config`; `port` is set once it is known."""

    def __init__(self, interfaces: Sequence[str], port: int) -> None:
        self.port = port
        self.choice = netif.Choice((), ())
        self._wanted = interfaces

    @property
    def all(self) -> tuple[Address, ...]:
        return self.choice.to_dial(self.port)

    async def look(self) -> None:
        """Raises `ConfigError` if what is wanted is not there, `EnvironmentFault` if nothing can be seen."""
        facts = await trio.to_thread.run_sync(netif.interfaces)
        self.choice = netif.choose(facts, self._wanted)

    async def watch(self, moved: Moved) -> None:
        """Until cancelled."""
        with netwatch.NetWatch() as watch:
            while True:
                await watch.change(PERIOD_S)
                before = self.all
                try:
                    await self.look()
                except TightwadError as exc:
                    log.warning("%s", exc)
                    continue
                if self.all != before:
                    moved(before)
