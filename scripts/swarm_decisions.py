"""How fast it is decided which piece to ask of whom: the tracker of the product, without a network."""

from __future__ import annotations

import random
import time
from collections import deque

import swarm_table as table
from swarm_table import Row

from tightwad_agent.swarm.pieces import PieceTracker

FEW, MANY = 3_000, 30_000
N_PEERS = 8
IN_FLIGHT = 12
PIECE = 16 << 20
MAX_S = 3.0


def decisions(repeats: int) -> list[Row]:
    """Decisions a second among `MANY` pieces, and how much dearer one is than among `FEW`."""
    few, many = [], []
    for repeat in range(repeats):
        few.append(decisions_per_s(FEW, repeat))
        many.append(decisions_per_s(MANY, repeat))
    bound = table.growth(FEW, MANY)
    return [
        table.at_least(f"piece decisions, {MANY} pieces, {N_PEERS} peers", many, "per s", table.DECISIONS_PER_S),
        table.at_least(f"piece decisions, {FEW} pieces, {N_PEERS} peers", few, "per s"),
        table.at_most(f"a decision among {MANY} / among {FEW}", table.ratios(few, many), "", round(bound, 3)),
    ]


def decisions_per_s(n_pieces: int, seed: int, max_s: float = MAX_S) -> float:
    """A seed and peers with random halves; each piece that was asked comes later, others are asked meanwhile."""
    dice = random.Random(seed)
    tracker = PieceTracker([PIECE] * n_pieces, (), random.Random(seed))
    peers = [f"peer {i}" for i in range(N_PEERS)]
    for peer in peers:
        tracker.peer_joined(peer)
        tracker.peer_has(peer, range(n_pieces) if peer == peers[0] else dice.sample(range(n_pieces), n_pieces // 2))
    asked: deque[tuple[str, int]] = deque()
    n, began = 0, time.perf_counter()
    while not tracker.complete and time.perf_counter() - began < max_s:
        for peer in peers:
            piece = tracker.choose(peer, 0.0)
            if piece is not None:
                asked.append((peer, piece))
                n += 1
            if len(asked) >= IN_FLIGHT or (piece is None and asked):
                tracker.finished(asked.popleft()[1])
    return n / (time.perf_counter() - began)
