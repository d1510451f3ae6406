"""What goes into one forward pass, and when it starts: everybody's share of it. Pure; seconds are parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SMALLEST = 16
"""Prompt tokens that a turn takes at least."""
FIRST = 64
BESIDE = 2.0
"""A turn with prompt tokens may take this many times as long as the rounds in it alone."""
ALONE_S = 2.0
"""A turn of prompts alone takes about this long at most: a request that is given up waits for it."""
_BLEND = 0.3

LONGEST_WAIT_S = 0.003
WAIT_SHARE = 0.08
"""Part of the last turn that the next may wait for those who were in it."""


class Shares(NamedTuple):
    """Draft tokens of each round, and prompt tokens of each prompt."""

    drafts: list[int]
    prompts: list[int]


def fill(wants: Sequence[int], budget: int) -> list[int]:
    """Divides a budget: nobody gets more than he wants, and nobody less than another who wants as much."""
    given = [0] * len(wants)
    budget = max(0, budget)
    for rank, i in enumerate(sorted(range(len(wants)), key=lambda i: wants[i])):
        given[i] = min(wants[i], budget // (len(wants) - rank))  # what the modest leave goes to the others
        budget -= given[i]
    return given


def divide(drafts: Sequence[int], prompts: Sequence[int], *, batch: int, n_outputs: int, chunk: int) -> Shares:
    """Shares of a turn. `drafts`: lengths of the drafts of all due rounds (each costs a token more), `prompts`: tokens
    left of each prompt, `chunk`: prompt tokens this turn may take. Needs `batch` and `n_outputs` >= requests."""
    fixed = len(drafts) + len(prompts)
    given = fill(drafts, min(batch, n_outputs) - fixed)
    left = batch - len(drafts) - sum(given)
    return Shares(given, fill(prompts, min(left, max(chunk, len(prompts)))))


class Pace:
    """How many prompt tokens a turn may take, learned from how long turns took."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._alone = float(batch)
        self._beside = float(min(FIRST, batch))
        self._round_s = 0.0

    def chunk(self, *, beside: bool) -> int:
        """`beside`: the turn has rounds too."""
        return int(self._beside if beside else self._alone)

    def took(self, seconds: float, *, n_rounds: int, n_prompt: int) -> None:
        """One turn."""
        if n_prompt == 0:
            self._round_s += (seconds - self._round_s) * (_BLEND if self._round_s else 1.0)
        elif n_rounds == 0:
            self._alone = self._next(self._alone, n_prompt, seconds, ALONE_S)
        elif self._round_s:
            self._beside = self._next(self._beside, n_prompt, seconds, BESIDE * self._round_s)

    def _next(self, chunk: float, n_prompt: int, seconds: float, target_s: float) -> float:
        if seconds > target_s:
            chunk *= max(0.5, target_s / seconds)
        elif n_prompt >= int(chunk) and seconds < 0.8 * target_s:
            chunk *= 1.25
        return min(float(self._batch), max(float(min(SMALLEST, self._batch)), chunk))


def patience(last_turn_s: float) -> float:
    """How long a turn that could start waits for requests of the last one, so that they share turns in future too."""
    return min(LONGEST_WAIT_S, WAIT_SHARE * last_turn_s)


def worth_waiting(delays_s: Sequence[float], waited_s: float, patience_s: float) -> float:
    """How much longer to wait for absent requests, given how long each usually takes and how long ago the last answers
    went out. 0: start now. Who usually takes longer than the patience is not waited for."""
    hopeful = any(delay <= patience_s for delay in delays_s)
    return max(0.0, patience_s - waited_s) if hopeful else 0.0
