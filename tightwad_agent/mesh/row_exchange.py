"""Keeps the rows of all nodes the same everywhere: digests in heartbeats, stamps where they differ, then the rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from tightwad_agent.ids import NodeId
from tightwad_agent.mesh.rows import RowBook
from tightwad_agent.mesh.session import Session
from tightwad_agent.wire import control
from tightwad_agent.wire.rows import NodeRow

SYNC_PAUSE_S = 2.0
"""Between two times that a peer with another digest is sent our stamps."""


class RowExchange:
    """`broadcast` posts to all links; `refuses` says whose rows are not taken; `taken` hears of what came."""

    def __init__(
        self,
        book: RowBook,
        broadcast: Callable[[object], None],
        *,
        refuses: Callable[[NodeId], bool],
        taken: Callable[[Sequence[NodeRow], float], None],
    ) -> None:
        self._book = book
        self._broadcast = broadcast
        self._refuses = refuses
        self._taken = taken
        self._synced: dict[NodeId, float] = {}

    def tell_own(self) -> None:
        """The own row has changed."""
        self._broadcast(control.Rows((self._book.own,)))

    def post_stamps(self, session: Session) -> None:
        session.post(control.RowStamps(self._book.stamps()))

    def on_beat(self, session: Session, theirs: bytes, now: float) -> None:
        node = session.peer.node
        if theirs != self._book.digest() and node not in self._lately(now):
            self._synced[node] = now
            self.post_stamps(session)

    def _lately(self, now: float) -> Collection[NodeId]:
        """To whom our stamps went a moment ago."""
        self._synced = {node: at for node, at in self._synced.items() if now - at < SYNC_PAUSE_S}
        return self._synced

    def on_stamps(self, session: Session, stamps: dict[str, tuple[int, int]]) -> None:
        newer = self._book.newer_than(stamps)
        for i in range(0, len(newer), control.MAX_ROWS_PER_MESSAGE):
            session.post(control.Rows(newer[i : i + control.MAX_ROWS_PER_MESSAGE]))

    def on_rows(self, rows: Sequence[NodeRow], now: float) -> None:
        taken = self._book.merge((r for r in rows if not self._refuses(r.node)), now)
        if taken:
            self._taken(taken, now)
