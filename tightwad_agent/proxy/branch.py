"""What one drafter drafts for one request: its newest branch, how far it is right, and when its next token is due."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Final

from tightwad_agent.proxy.averages import Odds
from tightwad_agent.proxy.record import SHORT_PREFIX, DrafterRecord
from tightwad_agent.proxy.speculate_events import Ask, Extend

OTHERS_COUNT: Final = 20.0
"""What other requests showed of a drafter counts like so many tokens of this one."""
LEAST_S: Final = 1e-5
"""No token takes less, whatever a drafter's clock says."""
SURE: Final = 100.0
"""More tokens of other requests make nobody surer about this one."""


class Branch:
    """`tokens[i]` is the guess for position `base + i` of the sequence; the first `checked` of them were right.

    `valid`: none was wrong so far. `asked`: tokens it may make in all. `closed`: it will make no more.
    """

    __slots__ = (
        "_asked_at",
        "_edges",
        "_last_at",
        "_last_us",
        "_n_prefix",
        "asked",
        "base",
        "checked",
        "closed",
        "key",
        "number",
        "odds",
        "record",
        "spent",
        "tokens",
        "valid",
    )

    def __init__(self, key: Hashable, record: DrafterRecord) -> None:
        self.key, self.record = key, record
        self.odds = Odds(0.98)
        self.number = self.base = self.asked = self.checked = 0
        self.tokens: list[int] = []
        self.spent: list[float] = []
        """Seconds the drafter took for each token."""
        self.valid = False
        self.closed = True
        self._asked_at = self._last_at = 0.0
        self._last_us = self._n_prefix = 0
        self._edges: list[int] = []
        """Tokens before which the drafter may have had to wait for permission."""

    @property
    def accepted(self) -> float:
        """Share of its tokens that will be right, as far as this request and the others before it show."""
        return self.odds.rate(self.record.accepted, OTHERS_COUNT)

    @property
    def hoped(self) -> float:
        """As `accepted`, with a standard deviation of luck: few tokens are no reason to give a drafter up."""
        share, n = self.accepted, self.odds.tries + min(self.record.odds.tries, SURE) + 2
        return share + math.sqrt(share * (1 - share) / n)

    @property
    def end(self) -> int:
        return self.base + len(self.tokens)

    @property
    def waiting(self) -> bool:
        """Tokens that were asked for have not come."""
        return not self.closed and len(self.tokens) < self.asked

    def ask(self, sequence: list[int], n: int, now: float) -> Ask:
        """Starts anew behind `sequence`. What the drafter has of it already is not sent again."""
        keep = min(self.base + self.checked, len(sequence))
        self.number += 1
        self.base, self.checked, self.asked = len(sequence), 0, n
        self.tokens, self.spent = [], []
        self.valid, self.closed, self._edges = True, False, []
        self._asked_at = self._last_at = now
        self._last_us, self._n_prefix = 0, len(sequence) - keep
        return Ask(self.key, self.number, keep, sequence[keep:], n)

    def extend(self, n: int, now: float) -> Extend:
        if not self.waiting:
            self._last_at = now + self.record.rtt_s
        self._edges.append(self.asked)
        self.asked += n
        return Extend(self.key, self.number, n)

    def fail(self) -> None:
        """Nothing more will come, and what the drafter remembers of the request is not certain."""
        self.valid, self.closed = False, True
        self.base = self.checked = 0
        self.tokens, self.spent = [], []

    def take(self, offset: int, tokens: list[int], us: int, now: float) -> bool:
        """Tokens came. False if they do not follow those that are here, or were not asked for."""
        skip = len(self.tokens) - offset
        tokens = tokens[skip:] if skip > 0 else tokens
        if self.closed or skip < 0 or not tokens or len(tokens) > self.asked - len(self.tokens):
            return False
        self._measure(len(tokens), us, now)
        self.tokens += tokens
        self._last_at, self._last_us = now, us
        return True

    def _measure(self, n: int, us: int, now: float) -> None:
        record, first = self.record, not self.tokens
        took = (us - self._last_us) / 1e6 if us > self._last_us else now - self._last_at
        if first:
            record.first_came(max(0.0, now - self._asked_at - (n - 1) * record.token_s.value), self._n_prefix)
            took = min(took, record.first_s.value) if self._n_prefix > SHORT_PREFIX else took
        elif not self._edges or self._edges[0] >= len(self.tokens) + n:
            record.token_s.add(max(took / n, LEAST_S))
        else:
            took = n * record.token_s.value
            self._edges = [edge for edge in self._edges if edge >= len(self.tokens) + n]
        self.spent += [took / n] * n

    def check(self, sequence: Sequence[int]) -> bool:
        """Compares what is confirmed by now, and learns from it. False if a token is wrong: the branch is over."""
        tokens, base = self.tokens, self.base
        while self.valid and self.checked < min(len(tokens), len(sequence) - base):
            self.valid = tokens[self.checked] == sequence[base + self.checked]
            self.odds.add(hit=self.valid)
            self.record.odds.add(hit=self.valid)
            self.checked += self.valid
        return self.valid

    def have(self, length: int) -> int:
        """Tokens at hand behind a sequence of `length`."""
        return max(0, self.end - length) if self.valid else 0

    def tail(self, n: int) -> list[int]:
        """The last `n` tokens."""
        return self.tokens[len(self.tokens) - n :]

    def expected_at(self) -> float:
        """When the next token should come."""
        if self.tokens:
            return self._last_at + self.record.token_s.value
        return self._asked_at + self.record.first_due(self._n_prefix)

    def silent_s(self, now: float) -> float:
        """How long nothing has come."""
        return now - self._last_at

    def due_s(self, now: float) -> float:
        """Seconds until the next token; infinite if none will come. Who is late will be late as long again."""
        if not self.waiting:
            return float("inf")
        due = self.expected_at() - now
        return due if due > 0 else max(0.25 * self.record.token_s.value, -due)
