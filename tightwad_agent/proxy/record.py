"""What is known of one drafter: how fast, how far, how good, and when it may be tried again. Times are seconds."""

from __future__ import annotations

from typing import Final

from tightwad_agent.proxy.averages import Odds, Smooth

PROBE_FIRST, PROBE_LAST = 16, 8192
"""Tokens generated between two tries of a drafter that is not worth its while: doubled by each failure."""
SILENT_LAST: Final = 128
"""The same for one that fell silent: a try costs a message, and what held it up may be over."""
SHORT_PREFIX: Final = 32
"""With more tokens to evaluate first, the time to a drafter's first token says nothing about its distance."""


class DrafterRecord:
    """One drafter as it was measured. `name` is for people; `rtt_s` as the mesh measures it; `slots`: sessions that it
    serves at once, `sessions` that it has.

    `gap` tokens of the target lie between two tries while it is not used; `tried_at` the last, by `Costs.tokens`.
    `benched`: it did not deliver when it should have; only a try can show that it does again.
    """

    def __init__(self, name: str, rtt_s: float = 0.0, slots: int = 1) -> None:
        self.name, self.rtt_s, self.slots = name, rtt_s, max(1, slots)
        self.sessions = 0
        self.token_s = Smooth(0.01)
        self.first_s = Smooth(rtt_s + 0.03)
        self.prefix_s = Smooth(0.0)
        self.odds = Odds(0.995)
        self.gap, self.tried_at = PROBE_FIRST, -PROBE_LAST
        self.benched = False
        self.late = self.lost = 0

    @property
    def accepted(self) -> float:
        """Share of its tokens that were right; one never seen is believed to be fairly good."""
        return self.odds.rate(0.75, 2.0)

    @property
    def measured(self) -> bool:
        """It has delivered something."""
        return self.first_s.n + self.prefix_s.n > 0

    def first_came(self, took_s: float, n_prefix: int) -> None:
        """The first token came `took_s` after asking, with `n_prefix` tokens to evaluate before it."""
        if n_prefix <= SHORT_PREFIX:
            self.first_s.add(took_s)
            if not self.token_s.n:
                self.token_s.value = max(1e-4, took_s - self.rtt_s)
        else:
            self.prefix_s.add(max(0.0, took_s - self.first_s.value) / n_prefix)

    def first_due(self, n_prefix: int) -> float:
        """Expected seconds from asking to the first token."""
        return self.first_s.value + self.prefix_s.value * (n_prefix if n_prefix > SHORT_PREFIX else 0)

    def crowding(self) -> float:
        """How much slower it gets with one session more."""
        return max(1.0, (self.sessions + 1) / self.slots)

    def due(self, clock: int) -> bool:
        """Whether it may be tried again."""
        return clock - self.tried_at >= self.gap

    def tried(self, clock: int) -> None:
        self.tried_at = clock

    def failed(self, clock: int, *, silent: bool = False) -> None:
        """It was used or tried, and did not help: the next try is further away."""
        most = max(self.gap, SILENT_LAST) if silent else PROBE_LAST
        self.gap, self.tried_at = min(self.gap * 2, most), clock
        self.benched = self.benched or silent
        self.late += silent

    def helped(self) -> None:
        self.gap, self.benched = PROBE_FIRST, False

    @property
    def excuse(self) -> str:
        """Why it is not used, for people."""
        if self.benched:
            return f"{self.name} does not deliver in time"
        if not self.measured:
            return f"{self.name} has not been tried yet"
        return f"{self.name} would cost more than it brings (accepted {self.accepted:.2f})"
