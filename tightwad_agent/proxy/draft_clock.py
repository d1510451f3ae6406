"""When a drafter's tokens arrived, although nobody looked at once. Pure."""

from __future__ import annotations

import math

from tightwad_agent.wire.draft import Drafted

MOST_S = 0.1
"""Nothing stays unread for longer, whatever a drafter's clock says."""


class DraftClock:
    """Of one session: how far the drafter's clock is behind ours, for the newest branch."""

    def __init__(self) -> None:
        self._branch = -1
        self._behind_s = math.inf
        self._us = 0

    def came_at(self, drafted: Drafted, now: float) -> float:
        """By our clock, in seconds; `now` at the latest. The first tokens of a branch are looked at when they come."""
        if drafted.branch != self._branch:
            self._branch, self._behind_s, self._us = drafted.branch, math.inf, 0
        if drafted.us <= self._us:
            return now  # its clock stands still
        self._us, made_s = drafted.us, drafted.us / 1e6
        at = min(now, self._behind_s + made_s)
        self._behind_s = min(self._behind_s, now - made_s)
        return max(at, now - MOST_S)
