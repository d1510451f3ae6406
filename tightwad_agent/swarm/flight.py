"""Who downloads a source for the whole cluster: one node at a time, chosen alike by all that see the same rows. Pure.

Each node that wants a source claims it in its row. The claim made first has the office, by its `since`, then by node
id. Clocks need not agree: who claims later says a greater `since` than all that it sees, so a wrong clock decides only
between claims that were made before either had heard of the other. An owner that comes no further for `STALL_S` is
passed over; when it comes further after all, it has the office again, and the others yield.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tightwad_agent.ids import ModelId, NodeId
from tightwad_agent.wire.rows import NodeRow

STALL_S = 60.0
SETTLE_S = 1.0
"""So long a claim is spread before its node begins to download: others that claim in the same moment are heard of."""
MAX_SINCE = 2**62
N_DIGEST = 64


class Claim(NamedTuple):
    """One node's announcement about one source. `done` in bytes, `total` 0: not known."""

    node: NodeId
    name: str
    since: int
    done: int
    total: int


class Holding(NamedTuple):
    """A complete model that came from a source. `source` is the whole of `HeldModel.source`."""

    model: ModelId
    name: str
    source: str


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What the rows of other living nodes say of sources, by digest."""

    n_nodes: int = 0
    claims: Mapping[str, tuple[Claim, ...]] = field(default_factory=dict)
    holdings: Mapping[str, tuple[Holding, ...]] = field(default_factory=dict)


def read_rows(rows: Iterable[NodeRow]) -> Elsewhere:
    """`rows` are those of the other living nodes."""
    claims: dict[str, list[Claim]] = {}
    holdings: dict[str, list[Holding]] = {}
    n_nodes = 0
    for row in rows:
        n_nodes += 1
        for f in row.fetching:
            claims.setdefault(f.digest, []).append(Claim(row.node, str(row.name), f.since, f.done, f.total))
        for m in row.models:
            if m.source and m.size > 0 and m.complete:
                holdings.setdefault(m.source[:N_DIGEST], []).append(Holding(m.model, str(m.name), m.source))
    return Elsewhere(
        n_nodes, {d: tuple(c) for d, c in claims.items()}, {d: tuple(sorted(set(h))) for d, h in holdings.items()}
    )


def since_for(now: float, others: Iterable[Claim]) -> int:
    """The `since` of a new claim: `now` in Unix seconds, but later than every claim that is there."""
    return min(MAX_SINCE, max([int(now), *(claim.since + 1 for claim in others)]))


@dataclass(slots=True)
class Flight:
    """One source as one node sees it. `now` is any clock of this node that runs evenly, in seconds."""

    owner: NodeId | None = None
    _done: int = -1
    """The owner's, when it was last seen to move."""
    _moved_at: float = 0.0
    _passed: dict[NodeId, int] = field(default_factory=dict)
    """Owners that stood still, and the bytes at which they did."""

    def look(self, claims: Iterable[Claim], now: float) -> NodeId | None:
        """Who downloads, given all claims (the own one too); None if there are none."""
        known = {claim.node: claim for claim in claims}
        self._passed = {n: done for n, done in self._passed.items() if n in known and known[n].done == done}
        owner = self._first(known)
        if owner is not None and self._stands_still(known[owner], now):
            self._passed[owner] = known[owner].done
            self.owner = None
            owner = self._first(known)
        if owner != self.owner or (owner is not None and known[owner].done != self._done):
            self.owner, self._moved_at = owner, now
            self._done = known[owner].done if owner is not None else -1
        return owner

    @property
    def deadline(self) -> float:
        """When to look again though nothing changed."""
        return self._moved_at + STALL_S

    def _first(self, known: Mapping[NodeId, Claim]) -> NodeId | None:
        if known.keys() <= self._passed.keys():
            self._passed.clear()
        able = (c for c in known.values() if c.node not in self._passed)
        first = min(able, key=lambda c: (c.since, c.node), default=None)
        return first.node if first is not None else None

    def _stands_still(self, claim: Claim, now: float) -> bool:
        return claim.node == self.owner and claim.done == self._done and now >= self.deadline
