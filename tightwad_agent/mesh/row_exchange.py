"""Keeps the rows of all nodes the same everywhere: digests in heartbeats, stamps where they differ, then the rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

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
        self._digest: bytes | None = None
        self._synced: dict[NodeId, float] = {}

    def digest(self) -> bytes:
        """8 bytes, the same for nodes that know the same rows."""
        if self._digest is None:
            text = repr(sorted(self._book.stamps().items()))
            self._digest = hashlib.sha256(text.encode()).digest()[:8]
        return self._digest

    def changed(self) -> None:
        """The book is no longer what it was."""
        self._digest = None

    def tell_own(self) -> None:
        """The own row has changed."""
        self.changed()
        self._broadcast(control.Rows((self._book.own,)))

    def post_stamps(self, session: Session) -> None:
        session.post(control.RowStamps(self._book.stamps()))

    def on_beat(self, session: Session, theirs: bytes, now: float) -> None:
        node = session.peer.node
        if theirs != self.digest() and now - self._synced.get(node, -SYNC_PAUSE_S) >= SYNC_PAUSE_S:
            self._synced[node] = now
            self.post_stamps(session)

    def on_stamps(self, session: Session, stamps: dict[str, tuple[int, int]]) -> None:
        newer = self._book.newer_than(stamps)
        for i in range(0, len(newer), control.MAX_ROWS_PER_MESSAGE):
            session.post(control.Rows(newer[i : i + control.MAX_ROWS_PER_MESSAGE]))

    def on_rows(self, rows: Sequence[NodeRow], now: float) -> None:
        taken = self._book.merge((r for r in rows if not self._refuses(r.node)), now)
        if taken:
            self.changed()
            self._taken(taken, now)
