"""The rows of all nodes, as far as they are known here. Pure.

Only a node edits its own row; `(incarnation, version)` orders its editions. A row is kept while its node is away, so
that people see what is missing, and forgotten after a day.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from tightwad_agent.ids import NodeId
from tightwad_agent.wire.rows import NodeRow

MAX_ROWS = 256
KEEP_AWAY_S = 86400.0
_NEVER = (-math.inf, -math.inf)


class RowBook:
    """All rows, with this node's own among them."""

    def __init__(self, own: NodeRow) -> None:
        self._me = own.node
        self._rows: dict[NodeId, NodeRow] = {own.node: own}
        self._heard: dict[NodeId, float] = {}
        self._expired: dict[NodeId, tuple[int, int]] = {}
        """Stamps of rows that were forgotten for age, so that a peer that still has one does not bring it back."""
        self._digest = b""

    @property
    def own(self) -> NodeRow:
        return self._rows[self._me]

    def edit(self, change: Callable[[NodeRow], NodeRow]) -> bool:
        """Applies a change to the own row; a new version is made only if something differs."""
        old = self.own
        new = change(old)
        if new == old:
            return False
        self._put(replace(new, version=old.version + 1))
        return True

    def reborn(self, incarnation: int) -> None:
        """The own incarnation was raised: the row starts again from version 0 of it."""
        self._put(replace(self.own, incarnation=incarnation, version=0))

    def merge(self, rows: Iterable[NodeRow], now: float) -> list[NodeRow]:
        """Takes what is newer and returns it; rows about oneself are ignored."""
        taken = []
        for row in rows:
            if row.node == self._me:
                continue
            if row.stamp <= self._expired.get(row.node, _NEVER):
                continue
            known = self._rows.get(row.node)
            if known is None and len(self._rows) >= MAX_ROWS:
                continue
            if known is None or row.stamp > known.stamp:
                self._expired.pop(row.node, None)
                self._put(row)
                self._heard[row.node] = now
                taken.append(row)
        return taken

    def get(self, node: NodeId) -> NodeRow | None:
        return self._rows.get(node)

    def all(self) -> tuple[NodeRow, ...]:
        return tuple(self._rows.values())

    def stamps(self) -> dict[str, tuple[int, int]]:
        """What is known, in short, for comparing with a peer."""
        return {str(node): row.stamp for node, row in self._rows.items()}

    def digest(self) -> bytes:
        """8 bytes, the same for nodes that know the same rows."""
        if not self._digest:
            text = repr(sorted(self.stamps().items()))
            self._digest = hashlib.sha256(text.encode()).digest()[:8]
        return self._digest

    def _put(self, row: NodeRow) -> None:
        self._rows[row.node] = row
        self._digest = b""

    def newer_than(self, stamps: dict[str, tuple[int, int]]) -> tuple[NodeRow, ...]:
        """Rows that a peer with these stamps lacks or has older."""
        return tuple(row for node, row in self._rows.items() if row.stamp > stamps.get(node, _NEVER))

    def forget(self, node: NodeId) -> None:
        if node != self._me:
            self._rows.pop(node, None)
            self._heard.pop(node, None)
            self._digest = b""

    def expire(self, alive: frozenset[NodeId], now: float) -> None:
        """Forgets nodes that have been away for a day."""
        for node in alive & self._expired.keys():
            del self._expired[node]
        for node in list(self._heard):
            if node in alive:
                self._heard[node] = now
            elif now - self._heard[node] > KEEP_AWAY_S:
                self._expired[node] = self._rows[node].stamp
                self.forget(node)
        while len(self._expired) > MAX_ROWS:
            del self._expired[next(iter(self._expired))]
