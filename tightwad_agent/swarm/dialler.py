"""Who has a model: whom to connect to and when, who is being connected, and how each has behaved."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection

import trio

from tightwad_agent.errors import PeerError, PeerSilent, ProtocolError
from tightwad_agent.ids import NodeId
from tightwad_agent.swarm.standing import Standings

log = logging.getLogger(__name__)

DIAL_S = 20.0


class Dialler:
    """`name` is the model's, for the log. `open_stream` raises a `PeerError`; `changed` is called after each attempt,
    `forgive` when a ban is over."""

    def __init__(
        self,
        name: str,
        open_stream: Callable[[NodeId], Awaitable[trio.abc.Stream]],
        *,
        changed: Callable[[], None],
        forgive: Callable[[NodeId], None],
    ) -> None:
        self.holders: frozenset[NodeId] = frozenset()
        """Nodes that have at least part of the model."""
        self.under_way: dict[NodeId, trio.CancelScope] = {}
        """Who is being connected; cancelled where it has connected to us."""
        self._name = name
        self._open_stream = open_stream
        self._changed = changed
        self._forgive = forgive
        self._standings = Standings()

    def set_holders(self, holders: frozenset[NodeId]) -> None:
        """One that is new may be connected to at once."""
        for peer in holders - self.holders:
            self._standings.welcome(peer)
        self.holders = holders
        self._changed()

    # Whom

    def begin(self, linked: Collection[NodeId], room: int, now: float) -> list[NodeId]:
        """Whom to `open` a stream to now, at most `room` beside those under way."""
        due = [peer for peer in self._idle(linked) if self._may_be_dialled(peer, now)]
        begun = due[: max(0, room - len(self.under_way))]
        for peer in begun:
            self.under_way[peer] = trio.CancelScope()
        return begun

    def next_due(self, linked: Collection[NodeId], now: float) -> float:
        """When `begin` has something to do that it has not now."""
        return self._standings.next_change(self._idle(linked), now)

    def _idle(self, linked: Collection[NodeId]) -> list[NodeId]:
        return [peer for peer in sorted(self.holders) if peer not in linked and peer not in self.under_way]

    def _may_be_dialled(self, peer: NodeId, now: float) -> bool:
        if self._standings.forgiven(peer, now):
            self._forgive(peer)
        return self._standings.may_be_dialled(peer, now)

    async def open(self, peer: NodeId) -> trio.abc.Stream | None:
        """A stream to one of those that `begin` gave; None where it came to none."""
        stream: trio.abc.Stream | None = None
        try:
            with self.under_way[peer]:
                try:
                    with trio.fail_after(DIAL_S):
                        stream = await self._open_stream(peer)
                except trio.TooSlowError:
                    self.ended(peer, PeerSilent(f"no connection within {DIAL_S:g} s"))
                except PeerError as exc:
                    self.ended(peer, exc)
        finally:
            del self.under_way[peer]
            self._changed()
        return stream

    # How they behave

    def ended(self, peer: NodeId, error: PeerError | None) -> None:
        """A link or an attempt is over."""
        self._standings.ended(peer, trio.current_time(), grave=isinstance(error, ProtocolError))
        if isinstance(error, ProtocolError):
            log.warning("%s: %s broke the protocol: %s", self._name, peer.short, error)
        elif error is not None:
            log.debug("%s: link to %s ended: %s", self._name, peer.short, error)

    def useful(self, source: str) -> None:
        """A peer, or another source, gave something good."""
        self._standings.useful(source)

    def ban(self, peer: NodeId) -> None:
        log.warning("%s: %s sent bad data again and is not asked for a while", self._name, peer.short)
        self._standings.ban(peer, trio.current_time())

    def is_banned(self, peer: NodeId) -> bool:
        return self._standings.is_banned(peer, trio.current_time())

    @property
    def all_failed(self) -> bool:
        """Nobody who has it is new, or was of use when connected last."""
        return all(map(self._standings.has_failed, self.holders))
