"""How peers have behaved, and when each may be dialled again. Pure: seconds on one clock."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

FIRST_RETRY_S: Final = 0.5
LAST_RETRY_S: Final = 30.0
BAN_S: Final = 600.0
GRAVE: Final = 3
"""Breaking the protocol counts as so many failures."""


@dataclass(slots=True)
class _Record:
    failures: int = 0
    not_before: float = -math.inf
    banned_until: float = -math.inf


class Standings:
    """A peer that was never heard of has a good one."""

    def __init__(self) -> None:
        self._of: dict[str, _Record] = {}

    def welcome(self, peer: str) -> None:
        """It may be dialled now, unless it is banned: it is said to have the model, or more of it."""
        self._record(peer).not_before = -math.inf

    def useful(self, peer: str) -> None:
        """It gave something good."""
        self._record(peer).failures = 0

    def ended(self, peer: str, now: float, *, grave: bool = False) -> None:
        """A link or an attempt is over: the more often without anything good, the later the next."""
        record = self._record(peer)
        record.failures += GRAVE if grave else 1
        record.not_before = now + min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(record.failures - 1, 10))

    def has_failed(self, peer: str) -> bool:
        """Whether a link or an attempt ended since it gave something good."""
        return peer in self._of and self._of[peer].failures > 0

    def ban(self, peer: str, now: float) -> None:
        self._record(peer).banned_until = now + BAN_S

    def is_banned(self, peer: str, now: float) -> bool:
        return peer in self._of and self._of[peer].banned_until > now

    def forgiven(self, peer: str, now: float) -> bool:
        """Whether a ban has ended since this was asked last."""
        record = self._of.get(peer)
        if record is None or not -math.inf < record.banned_until <= now:
            return False
        record.banned_until = -math.inf
        return True

    def may_be_dialled(self, peer: str, now: float) -> bool:
        return self._when(peer) <= now

    def next_change(self, peers: Iterable[str], now: float) -> float:
        """When the first of those that may not be dialled now may; infinite if there are none."""
        return min((when for when in map(self._when, peers) if when > now), default=math.inf)

    def _when(self, peer: str) -> float:
        record = self._of.get(peer)
        return max(record.not_before, record.banned_until) if record else -math.inf

    def _record(self, peer: str) -> _Record:
        return self._of.setdefault(peer, _Record())
