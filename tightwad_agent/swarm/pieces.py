"""Which piece to ask of whom. Pure: time and dice are parameters.

A piece is in exactly one state: *have*, *in flight* (asked of at least one peer), or *wanted*. Nothing is planned
ahead: each call of `choose` looks at what is known at that moment, takes the rarest piece that the peer has (copies
that are on their way somewhere count as copies), and rolls a die between equals. When nothing is wanted any more,
pieces that are late are asked of a second peer, and the slower one is cancelled.

The rarest piece of a peer is on top of its heap of (copies, die, piece). An entry may say fewer copies than there are
by now, never more: one that reaches the top is compared, and put back where it belongs. So a choice costs the logarithm
of the pieces.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum
from heapq import heapify, heappop, heappush, heapreplace
from typing import Final, NamedTuple, Protocol


class Rng(Protocol):
    """The part of `random.Random` that is used here."""

    def randrange(self, stop: int, /) -> int: ...


RATE_S: Final = 0.1
"""So long bytes are counted to know the rate of a peer."""
_DIE: Final = 1 << 30
_NOTHING: Final[Set[int]] = frozenset()
_Entry = tuple[int, int, int]
"""(copies, die, piece)"""


class State(Enum):
    HAVE = "have"
    IN_FLIGHT = "in flight"
    WANTED = "wanted"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is asked at once (which bounds what is held in memory), and how long an answer may take."""

    per_peer: int = 12
    near_bytes: int = 512 << 10
    ahead_s: float = 0.02
    """Another piece is asked of a peer when so little is left of those before, or what comes in so long at the rate
    that it sends: earlier it would only wait there, later the peer would."""
    total: int = 64
    outside: int = 2
    stall_s: float = 20.0
    """A peer that sends nothing of what it was asked for this long is left."""
    slack_s: float = 60.0
    slowest_bytes_s: int = 32 << 10
    """All that is asked of a peer must come within `slack_s` plus its size at this rate."""
    late_s: float = 0.5
    """In the endgame a piece is asked of a second peer when the first has had it for this long."""
    max_askers: int = 2
    late_bytes: int = 64 << 20
    """Of pieces that are asked of two peers: what the second one sends is in memory until it is whole."""
    max_strikes: int = 3


class Ask(NamedTuple):
    """One outstanding request."""

    peer: str
    piece: int


@dataclass(slots=True)
class _Asked:
    asked_at: float
    deadline: float
    hard_deadline: float
    left: int
    """Bytes that have not come."""


@dataclass(slots=True)
class _Peer:
    """`rarest`: a heap that has every piece that is wanted and that the peer has, but for its bad ones."""

    has: set[int] = field(default_factory=set)
    fetching: frozenset[int] = frozenset()
    asked: dict[int, _Asked] = field(default_factory=dict)
    rate: float = 0.0
    """Bytes a second that came of late."""
    rate_from: float = -math.inf
    """Since when `rate_bytes` came."""
    rate_bytes: int = 0
    is_full: bool = False
    """As much was asked as is to be asked ahead, and more than half of that is left."""
    rarest: list[_Entry] = field(default_factory=list)
    stale: bool = True
    """`rarest` has to be made anew."""


class PieceTracker:
    """The leecher's book. Calls that name an unknown peer or a piece out of range are bugs of the caller."""

    def __init__(self, lengths: Sequence[int], have: Iterable[int], rng: Rng, limits: Limits | None = None) -> None:
        self._lengths = tuple(lengths)
        self._rng = rng
        self._limits = limits or Limits()
        self._have = set(have)
        self._wanted = set(range(len(self._lengths))) - self._have
        self._askers: dict[int, set[str]] = {}
        self._n_asks = 0
        self._copies = [0] * len(self._lengths)
        self._nowhere = set(self._wanted)
        """Those of `_wanted` that no peer has or is fetching."""
        self._peers: dict[str, _Peer] = {}
        self._bad: dict[str, set[int]] = {}

    # What is known

    @property
    def complete(self) -> bool:
        return len(self._have) == len(self._lengths)

    @property
    def have(self) -> Collection[int]:
        return self._have

    @property
    def fetching(self) -> tuple[int, ...]:
        """Pieces in flight, in order."""
        return tuple(sorted(self._askers))

    @property
    def peers(self) -> Collection[str]:
        return self._peers.keys()

    def state(self, piece: int) -> State:
        if piece in self._have:
            return State.HAVE
        return State.IN_FLIGHT if piece in self._askers else State.WANTED

    def copies(self, piece: int) -> int:
        """Connected peers that have the piece or are fetching it."""
        return self._copies[piece]

    def asked_of(self, peer: str) -> Collection[int]:
        return self._peers[peer].asked.keys()

    def missing_everywhere(self) -> int:
        """Pieces that are not here and that no connected peer has."""
        held: set[int] = set().union(*(p.has for p in self._peers.values())) if self._peers else set()
        return len(self._wanted - held)

    def is_useful(self, peer: str) -> bool:
        """Whether the peer has anything that is not here."""
        return not self._peers[peer].has <= self._have

    def strikes(self, peer: str) -> int:
        """Pieces of bad data that came from this peer, also before it left and came back."""
        return len(self._bad.get(peer, ()))

    def next_deadline(self, now: float) -> float:
        """When `expire` or `choose` may have something new to say; `inf` if only news can change anything."""
        times = [a.deadline for p in self._peers.values() for a in p.asked.values()]
        if not self._wanted:
            late = (a.asked_at + self._limits.late_s for p in self._peers.values() for a in p.asked.values())
            times += [t for t in late if t > now]
        return min(times, default=math.inf)

    # What happens

    def peer_joined(self, peer: str) -> None:
        self._peers[peer] = _Peer()

    def peer_left(self, peer: str) -> None:
        """Forgets a peer, but not its bad pieces; what was asked of it alone is wanted again."""
        gone = self._peers.pop(peer, None)
        if gone is None:
            return
        for other in self._peers.values():
            other.stale = True
        for piece in gone.has | gone.fetching:
            self._count(piece, -1)
        for piece in gone.asked:
            self._drop_asker(peer, piece)

    def peer_has(self, peer: str, pieces: Iterable[int]) -> None:
        known = self._peers[peer]
        for piece in pieces:
            if piece not in known.has:
                known.has.add(piece)
                if piece not in known.fetching:
                    self._count(piece, 1)
                self._push(known, piece)

    def peer_fetching(self, peer: str, pieces: Iterable[int]) -> None:
        """All pieces that are on their way to the peer now; replaces what it said before."""
        known = self._peers[peer]
        before, known.fetching = known.fetching, frozenset(pieces)
        for piece in known.fetching - before - known.has:
            self._count(piece, 1)
        for piece in before - known.fetching - known.has:
            self._count(piece, -1)

    def better_elsewhere(self, peer: str, pieces: Iterable[int]) -> list[Ask]:
        """Requests to take back, now that `peer` has these: nothing has come of them yet, and whoever was asked has
        pieces that fewer can give."""
        return [
            Ask(other, piece)
            for piece in pieces
            for other in self._askers.get(piece, ())
            if other != peer and self._has_rarer(other, piece)
        ]

    def _has_rarer(self, peer: str, piece: int) -> bool:
        known = self._peers[peer]
        if known.asked[piece].left < self._lengths[piece]:
            return False
        rarest = self._rarest(known, self._bad.get(peer, _NOTHING))
        return rarest is not None and self._copies[rarest] < self._copies[piece]

    def choose(self, peer: str, now: float) -> int | None:
        """The piece to ask of `peer` now, noted as asked; None if there is none, or enough is asked already."""
        known = self._peers[peer]
        if len(known.asked) >= self._limits.per_peer or self._n_asks >= self._limits.total:
            return None
        if self._is_full(known):
            return None
        bad = self._bad.get(peer, _NOTHING)
        piece = self._rarest(known, bad) if self._wanted else self._late(peer, known.has, bad, now)
        if piece is not None:
            self._ask(peer, known, piece, now)
        return piece

    def _is_full(self, known: _Peer) -> bool:
        """Of a fast peer several pieces are asked for at a time: each message costs both."""
        left = sum(asked.left for asked in known.asked.values())
        near, ahead = self._limits.near_bytes, known.rate * self._limits.ahead_s
        known.is_full = left > max(near, ahead) or (known.is_full and left > max(near, ahead / 2))
        return known.is_full

    def choose_nowhere(self, source: str, now: float) -> int | None:
        """As `choose`, for a source that is no peer and has everything, but is the last to be asked: a piece that no
        peer has or is fetching. `peer_joined` makes it known; it has nothing that counts as a copy."""
        known = self._peers[source]
        if not self._nowhere or len(known.asked) >= self._limits.outside:
            return None
        piece = self._any(self._nowhere - self._bad.get(source, _NOTHING))
        if piece is not None:
            self._ask(source, known, piece, now)
        return piece

    def progress(self, peer: str, now: float, n_bytes: int = 0) -> None:
        """Some bytes of something asked came from `peer`, in the order it was asked."""
        known = self._peers[peer]
        known.rate_bytes += n_bytes
        took_s = now - known.rate_from
        if took_s >= RATE_S:
            known.rate = known.rate_bytes / took_s
            known.rate_from, known.rate_bytes = now, 0
        for ask in known.asked.values():
            n_here = min(n_bytes, ask.left)
            ask.left, n_bytes = ask.left - n_here, n_bytes - n_here
            if ask.hard_deadline < math.inf:
                ask.deadline = min(now + self._limits.stall_s, ask.hard_deadline)

    def arrived(self, peer: str, piece: int) -> None:
        """The last byte came; while it is checked no deadline runs."""
        ask = self._peers[peer].asked.get(piece)
        if ask is not None:
            ask.deadline = ask.hard_deadline = math.inf
            ask.left = 0

    def finished(self, piece: int) -> list[Ask]:
        """The piece is here, checked and stored. Returns the requests to cancel."""
        self._have.add(piece)
        self._wanted.discard(piece)
        self._nowhere.discard(piece)
        asks = [Ask(peer, piece) for peer in sorted(self._askers.pop(piece, ()))]
        self._n_asks -= len(asks)
        for peer, _ in asks:
            del self._peers[peer].asked[piece]
        return asks

    def bad(self, peer: str, piece: int) -> bool:
        """The peer's bytes did not match; it is not asked for this piece again. True: it has had its last chance."""
        self._bad.setdefault(peer, set()).add(piece)
        self.returned(peer, piece)
        return self.strikes(peer) >= self._limits.max_strikes

    def forgive(self, peer: str) -> None:
        """A ban has ended."""
        self._bad.pop(peer, None)
        if peer in self._peers:
            self._peers[peer].stale = True

    def rejected(self, peer: str, piece: int) -> None:
        """The peer will not send the piece: it does not have it, until it says so again."""
        known = self._peers[peer]
        if piece in known.has:
            known.has.discard(piece)
            if piece not in known.fetching:
                self._count(piece, -1)
        self.returned(peer, piece)

    def returned(self, peer: str, piece: int) -> None:
        """The request is over without a result that counts."""
        known = self._peers.get(peer)
        if known is not None and known.asked.pop(piece, None) is not None:
            self._drop_asker(peer, piece)

    def expire(self, now: float) -> list[str]:
        """Peers that are stalled or too slow. The caller leaves them (`peer_left`), and asks elsewhere."""
        return [name for name, peer in self._peers.items() if any(a.deadline <= now for a in peer.asked.values())]

    # How

    def _count(self, piece: int, by: int) -> None:
        """There is one copy more, or one less."""
        self._copies[piece] += by
        if piece not in self._wanted:
            return
        if self._copies[piece]:
            self._nowhere.discard(piece)
        else:
            self._nowhere.add(piece)
        if by < 0:
            self._push_all(piece)

    def _push_all(self, piece: int) -> None:
        """To the heaps of all that have it: it is wanted again, or rarer than they know."""
        for known in self._peers.values():
            if piece in known.has:
                self._push(known, piece)

    def _push(self, known: _Peer, piece: int) -> None:
        if known.stale or piece not in self._wanted:
            return
        if len(known.rarest) > 2 * len(self._lengths) + 64:
            known.stale = True
        else:
            heappush(known.rarest, self._entry(piece))

    def _entry(self, piece: int) -> _Entry:
        return (self._copies[piece], self._rng.randrange(_DIE), piece)

    def _rarest(self, known: _Peer, bad: Set[int]) -> int | None:
        if known.stale:
            known.rarest = [self._entry(piece) for piece in known.has & self._wanted]
            heapify(known.rarest)
            known.stale = False
        heap, wanted, has = known.rarest, self._wanted, known.has
        while heap:
            copies, _, piece = heap[0]
            if piece not in wanted or piece not in has or piece in bad:
                heappop(heap)
            elif copies < self._copies[piece]:
                heapreplace(heap, self._entry(piece))
            else:
                return piece
        return None

    def _ask(self, peer: str, known: _Peer, piece: int, now: float) -> None:
        n_bytes = sum(self._lengths[p] for p in (*known.asked, piece))
        hard = now + self._limits.slack_s + n_bytes / self._limits.slowest_bytes_s
        known.asked[piece] = _Asked(now, min(now + self._limits.stall_s, hard), hard, self._lengths[piece])
        self._wanted.discard(piece)
        self._nowhere.discard(piece)
        self._askers.setdefault(piece, set()).add(peer)
        self._n_asks += 1

    def _drop_asker(self, peer: str, piece: int) -> None:
        askers = self._askers[piece]
        if peer in askers:
            askers.discard(peer)
            self._n_asks -= 1
        if not askers:
            del self._askers[piece]
            self._wanted.add(piece)
            if not self._copies[piece]:
                self._nowhere.add(piece)
            self._push_all(piece)

    def _late(self, peer: str, has: Set[int], bad: Set[int], now: float) -> int | None:
        fewest = self._limits.max_askers
        candidates: list[int] = []
        room = self._limits.late_bytes - sum(
            self._lengths[piece] * (len(askers) - 1) for piece, askers in self._askers.items()
        )
        for piece, askers in self._askers.items():
            if peer in askers or piece not in has or piece in bad or len(askers) > fewest:
                continue
            if self._lengths[piece] > room:
                continue
            if len(askers) >= self._limits.max_askers or not any(self._is_late(a, piece, now) for a in askers):
                continue
            if len(askers) < fewest:
                fewest, candidates = len(askers), []
            candidates.append(piece)
        return self._any(candidates)

    def _is_late(self, peer: str, piece: int, now: float) -> bool:
        ask = self._peers[peer].asked[piece]
        return ask.hard_deadline < math.inf and ask.asked_at + self._limits.late_s <= now

    def _any(self, candidates: Collection[int]) -> int | None:
        ordered = sorted(candidates)
        return ordered[self._rng.randrange(len(ordered))] if ordered else None


def bits_of(pieces: Collection[int], n_pieces: int) -> bytes:
    """A have-map: one bit a piece, most significant bit first, the rest of the last byte zero."""
    bits = bytearray(-(-n_pieces // 8))
    for piece in pieces:
        bits[piece >> 3] |= 0x80 >> (piece & 7)
    return bytes(bits)


def pieces_of(bits: bytes, n_pieces: int) -> Iterator[int]:
    """The pieces of a have-map of `n_pieces`. `ValueError` if it is longer, shorter, or has a bit beyond the last."""
    if len(bits) != -(-n_pieces // 8):
        raise ValueError(f"a have-map of {len(bits)} bytes for {n_pieces} pieces")
    spare = len(bits) * 8 - n_pieces
    if spare and bits[-1] & ((1 << spare) - 1):
        raise ValueError("a have-map with bits beyond the last piece")
    return (i for i in range(n_pieces) if bits[i >> 3] & (0x80 >> (i & 7)))
