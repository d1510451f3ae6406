"""The last source to be asked: one that is no peer, such as the web address that a model came from."""

from __future__ import annotations

import logging
from typing import Final, Protocol

import trio

from tightwad_agent.errors import OriginError, TightwadError
from tightwad_agent.swarm.arrivals import Found
from tightwad_agent.swarm.manifest import Manifest
from tightwad_agent.swarm.pieces import PieceTracker
from tightwad_agent.swarm.standing import FIRST_RETRY_S, LAST_RETRY_S

log = logging.getLogger(__name__)

OUTSIDE: Final = "origin"
"""Its name beside the ids of the peers."""
AFTER_S: Final = 3.0
"""Peers have so long to be reached before it is asked."""
POLL_S: Final = 1.0


class Outside(Protocol):
    """It has the whole model."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly so many bytes of the model. Raises `OriginError`."""
        ...


class Owner(Protocol):
    """What it needs of the exchange."""

    manifest: Manifest
    tracker: PieceTracker | None
    failure: TightwadError | None
    poke: trio.Event

    @property
    def dialling(self) -> bool: ...

    def came(self, n_bytes: int) -> None: ...

    async def store(self, source: str, piece: int, data: bytes) -> Found: ...

    def tell_fetching(self, tracker: PieceTracker) -> None: ...

    def fill_all(self) -> None: ...


class LastResort:
    """Brings the pieces that no connected peer has or is fetching, so that each crosses the line to it once."""

    def __init__(self, outside: Outside, owner: Owner) -> None:
        self.problem = ""
        """Why it gives nothing, in words."""
        self._outside = outside
        self._owner = owner

    async def run(self) -> None:
        """Until all is here; one piece at a time, and after an error later and later. Several may run."""
        await trio.sleep(AFTER_S)
        delay = FIRST_RETRY_S
        while (tracker := self._owner.tracker) and not tracker.complete and not self._owner.failure:
            piece = self._choose(tracker)
            if piece is None:
                with trio.move_on_after(POLL_S):
                    await self._owner.poke.wait()
                continue
            try:
                await self._bring(tracker, piece)
                delay, self.problem = FIRST_RETRY_S, ""
            except OriginError as exc:
                self._failed(tracker, piece, exc)
                await trio.sleep(delay)
                delay = min(LAST_RETRY_S, 2 * delay)

    def _choose(self, tracker: PieceTracker) -> int | None:
        if self._owner.dialling:
            return None
        if OUTSIDE not in tracker.peers:
            tracker.peer_joined(OUTSIDE)
        piece = tracker.choose_nowhere(OUTSIDE, trio.current_time())
        if piece is not None:
            self._owner.tell_fetching(tracker)
        return piece

    async def _bring(self, tracker: PieceTracker, piece: int) -> None:
        place = self._owner.manifest.pieces[piece]
        tracker.arrived(OUTSIDE, piece)  # the source keeps its own deadlines
        data = await self._outside.read(place.offset, place.length)
        self._owner.came(len(data))
        if await self._owner.store(OUTSIDE, piece, data) is Found.BAD:
            tracker.bad(OUTSIDE, piece)
            raise OriginError("it is no longer what was added: bytes differ")

    def _failed(self, tracker: PieceTracker, piece: int, exc: OriginError) -> None:
        self.problem = f"{self._outside.name}: {exc.message}"
        log.info("%s: %s", self._owner.manifest.name, self.problem)
        tracker.returned(OUTSIDE, piece)
        self._owner.fill_all()
