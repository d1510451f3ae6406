"""The tracker against a model of it, in any order of events."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tightwad_agent.swarm.pieces import Limits, PieceTracker, State

N = 12
PEERS = ["a", "b", "c", "d"]
LIMITS = Limits(per_peer=2, near_bytes=1 << 20, total=5, stall_s=10, late_s=1, max_askers=2, max_strikes=3)
some_peer = st.sampled_from(PEERS)
some_pieces = st.sets(st.integers(0, N - 1))


class Tracking(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.t = PieceTracker([1 << 20] * N, {0}, random.Random(7), LIMITS)
        self.have = {0}
        self.asked: dict[str, set[int]] = {}
        self.has: dict[str, set[int]] = {}
        self.fetching: dict[str, set[int]] = {}
        self.bad: dict[str, set[int]] = {p: set() for p in PEERS}

    def gone(self, peer: str) -> None:
        for book in (self.asked, self.has, self.fetching):
            book.pop(peer, None)

    @rule(peer=some_peer, pieces=some_pieces)
    def join(self, peer: str, pieces: set[int]) -> None:
        if peer in self.has:
            return
        self.t.peer_joined(peer)
        self.t.peer_has(peer, pieces)
        self.has[peer], self.asked[peer], self.fetching[peer] = set(pieces), set(), set()

    @rule(peer=some_peer)
    def leave(self, peer: str) -> None:
        self.t.peer_left(peer)
        self.gone(peer)

    @rule(peer=some_peer, has=some_pieces, fetching=some_pieces)
    def update(self, peer: str, has: set[int], fetching: set[int]) -> None:
        if peer in self.has:
            self.t.peer_has(peer, has)
            self.t.peer_fetching(peer, fetching)
            self.has[peer] |= has
            self.fetching[peer] = set(fetching)

    @rule(peer=some_peer)
    def choose(self, peer: str) -> None:
        if peer not in self.has:
            return
        wanted = set(range(N)) - self.have - set().union(*self.asked.values())
        piece = self.t.choose(peer, self.now)
        full = len(self.asked[peer]) >= LIMITS.per_peer or sum(map(len, self.asked.values())) >= LIMITS.total
        usable = (wanted & self.has[peer]) - self.bad[peer]
        if piece is None:
            assert full or not usable
            return
        assert not full
        assert piece in self.has[peer]
        assert piece not in self.have | self.asked[peer] | self.bad[peer]
        if piece in wanted:
            fewest = min(self.copies(p) for p in usable)
            assert self.copies(piece) == fewest
        else:
            assert not wanted
        self.asked[peer].add(piece)

    def copies(self, piece: int) -> int:
        return sum(piece in self.has[p] | self.fetching[p] for p in self.has)

    @rule(peer=some_peer)
    def finish(self, peer: str) -> None:
        for piece in sorted(self.asked.get(peer, ())):
            asks = self.t.finished(piece)
            assert {a.peer for a in asks} == {p for p, asked in self.asked.items() if piece in asked}
            self.have.add(piece)
            for asked in self.asked.values():
                asked.discard(piece)

    @rule(peer=some_peer)
    def bad_piece(self, peer: str) -> None:
        for piece in sorted(self.asked.get(peer, ()))[:1]:
            self.bad[peer].add(piece)
            assert self.t.bad(peer, piece) == (len(self.bad[peer]) >= LIMITS.max_strikes)
            self.asked[peer].discard(piece)

    @rule(peer=some_peer)
    def reject(self, peer: str) -> None:
        for piece in sorted(self.asked.get(peer, ()))[:1]:
            self.t.rejected(peer, piece)
            self.asked[peer].discard(piece)
            self.has[peer].discard(piece)

    @rule(peer=some_peer)
    def arrive(self, peer: str) -> None:
        for piece in sorted(self.asked.get(peer, ()))[:1]:
            self.t.arrived(peer, piece)

    @rule(peer=some_peer)
    def progress(self, peer: str) -> None:
        if peer in self.has:
            self.t.progress(peer, self.now)

    @rule(seconds=st.sampled_from([0.3, 2.0, 11.0, 500.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for peer in self.t.expire(self.now):
            assert self.asked[peer]
            self.t.peer_left(peer)
            self.gone(peer)
        assert self.t.next_deadline(self.now) > self.now

    @precondition(lambda self: len(self.have) == N)
    @rule()
    def all_here(self) -> None:
        assert self.t.complete
        assert all(self.t.choose(p, self.now) is None for p in self.has)

    @invariant()
    def each_piece_is_in_one_state(self) -> None:
        in_flight = set().union(*self.asked.values()) if self.asked else set()
        for piece in range(N):
            state = self.t.state(piece)
            expected = State.HAVE if piece in self.have else State.IN_FLIGHT if piece in in_flight else State.WANTED
            assert state is expected
            assert self.t.copies(piece) == self.copies(piece)
        assert set(self.t.have) == self.have
        assert set(self.t.fetching) == in_flight - self.have
        for peer, asked in self.asked.items():
            assert set(self.t.asked_of(peer)) == asked
            assert len(asked) <= LIMITS.per_peer
        assert sum(map(len, self.asked.values())) <= LIMITS.total


Tracking.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
test_tracking = Tracking.TestCase
