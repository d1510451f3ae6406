"""Why a node that is there is not linked to: what a person should hear, once for each reason."""

from __future__ import annotations

from collections.abc import Callable

from tightwad_agent.errors import PeerError
from tightwad_agent.mesh import clocks
from tightwad_agent.wire.handshake import Hello

MAX_TOLD = 64
"""Different reasons that are told; they come from peers, and a peer could make them up for ever."""


class Distrust:
    """`last` is what keeps this node from others now; a link that comes up ends it."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.last = ""
        self._tell = tell
        self._told: set[str] = set()

    def heard(self, name: str, exc: PeerError) -> None:
        """A dial found somebody, and no trust."""
        self.last = f"not linked to {name}: {exc.message}{f' ({exc.hint})' if exc.hint else ''}"
        self._once(self.last)

    def linked(self, hello: Hello, now: float) -> None:
        """A link is up; a clock that is far off is told all the same. `now`: Unix seconds."""
        self.last = ""
        if said := clocks.difference(now, hello.clock_s, hello.name):
            self._once(said)

    def _once(self, text: str) -> None:
        if text not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(text)
            self._tell(text)
