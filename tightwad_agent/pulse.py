"""Something changed: a wake-up that cannot overflow and cannot be missed."""

from __future__ import annotations

import trio


class Pulse:
    """Many may wait for the next change; changes between two waits count as one."""

    def __init__(self) -> None:
        self._count = 0
        self._event = trio.Event()

    @property
    def count(self) -> int:
        """How often it has beaten; pass it to `wait` to learn of everything since."""
        return self._count

    def beat(self) -> None:
        """Wakes all who wait."""
        self._count += 1
        self._event.set()
        self._event = trio.Event()

    async def wait(self, seen: int) -> int:
        """Returns the count as soon as it differs from `seen`."""
        while self._count == seen:
            await self._event.wait()
        await trio.lowlevel.checkpoint()
        return self._count
