"""Which sequence serves which request, and what of its cache can be used again. Pure.

A slot is a sequence of the KV cache, numbered from 0. `cached` is exactly what the model's memory holds of it, as
evaluated tokens in order. A slot is busy while a request owns it; then it keeps them until it is taken or evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tightwad_agent.wire.verify import Rollback

WORTH = 0.1
"""A common beginning of less than this part of the prompt does not choose the slot: another's cache is worth more."""
LEAST = 16
"""Fewer tokens than this are evaluated again: it costs nothing, and attention sums up in the order of memory, so that
logits of a sequence whose parts lie apart differ a little from those of one that was evaluated at once."""
_BLOCK = 256


class Grant(NamedTuple):
    """Serve from `seq`, whose first `n_cached` tokens are those of `source` (itself, unless another slot has more)."""

    seq: int
    source: int
    n_cached: int


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    end, n = min(len(left), len(right)), 0
    while n < end and left[n : n + _BLOCK] == right[n : n + _BLOCK]:
        n += _BLOCK
    n = min(n, end)
    while n < end and left[n] == right[n]:
        n += 1
    return n


def usable(n_common: int, cached: int, oldest: int, rollback: Rollback, window: int) -> int:
    """How many of `n_common` tokens can stay when a slot of `cached` tokens is cut behind them; all or nothing."""
    if rollback is Rollback.NONE and n_common < cached:
        return 0
    if rollback is Rollback.WINDOW and oldest > max(0, n_common - window):
        return 0
    return n_common


class Slots:
    """All sequences. `oldest` asks the model for the first position that a sequence still has whole."""

    def __init__(self, n: int, rollback: Rollback, window: int, oldest: Callable[[int], int]) -> None:
        self.cached: list[list[int]] = [[] for _ in range(n)]
        self._busy = [False] * n
        self._used = [0] * n
        self._clock = 0
        self._rollback = rollback
        self._window = window
        self._oldest = oldest

    def take(self, prompt: Sequence[int]) -> Grant | None:
        """A slot for a prompt, now busy; `None` while all are. The caller makes the model's memory so, then `cached`.

        The last token of a prompt is never taken from the cache: its logits are needed.
        """
        idle = [seq for seq, busy in enumerate(self._busy) if not busy]
        if not idle:
            return None
        shared = [self._shared(seq, prompt) for seq in range(len(self.cached))]
        best = max(idle, key=lambda seq: (shared[seq], -self._used[seq]))
        if shared[best] <= WORTH * len(prompt):
            best = min(idle, key=lambda seq: (bool(self.cached[seq]), self._used[seq]))
        source = best
        if self._rollback is Rollback.FULL:  # only then tokens can belong to two sequences at no cost
            source = max(range(len(shared)), key=lambda seq: (shared[seq], seq == best))
        self._busy[best] = True
        return Grant(best, source, shared[source])

    def release(self, seq: int) -> None:
        """Its request is over; its tokens stay."""
        self._clock += 1
        self._busy[seq] = False
        self._used[seq] = self._clock

    def evict(self) -> int | None:
        """The idle slot with tokens that was used longest ago, now empty; `None` if there is none."""
        full = [seq for seq, busy in enumerate(self._busy) if not busy and self.cached[seq]]
        if not full:
            return None
        seq = min(full, key=lambda seq: self._used[seq])
        self.cached[seq] = []
        return seq

    def _shared(self, seq: int, prompt: Sequence[int]) -> int:
        cached = self.cached[seq]
        n = min(common(cached, prompt), len(prompt) - 1)
        if n < LEAST:
            return 0
        oldest = self._oldest(seq) if self._rollback is Rollback.WINDOW else 0
        return usable(n, len(cached), oldest, self._rollback, self._window)
