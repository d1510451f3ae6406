"""How fast something grows, from looks at it that come more often than it changes. Pure: the clock is the caller's."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

WINDOW_S = 30.0
"""Changes that are older do not count."""
LATE_S = 6.0
"""Something that changed every two seconds and has not for so long is slowing down."""
MAX_CHANGES = 64
MAX_KEYS = 4096


def rate(changes: Sequence[tuple[float, int]], now: float) -> float | None:
    """Units per second between the first and the last of the (time, amount) changes; None where they do not tell yet.

    When the last change is overdue, the time since then counts too, so that a rate falls when nothing comes.
    """
    if len(changes) < 2:
        return 0.0 if changes and now - changes[0][0] > LATE_S else None
    (first_at, first), (last_at, last) = changes[0], changes[-1]
    until = now if now - last_at > LATE_S else last_at
    return (last - first) / (until - first_at) if until > first_at else None


def eta_s(left: int, speed: float | None) -> float | None:
    """Seconds until `left` is done; None where nobody can say."""
    return left / speed if speed and left > 0 else None


class Rates:
    """Rates of many things, each under its key. A thing that shrinks begins anew."""

    def __init__(self) -> None:
        self._changes: dict[Hashable, deque[tuple[float, int]]] = {}

    def seen(self, key: Hashable, amount: int, now: float) -> None:
        """A look at one thing. Times must not go back."""
        changes = self._changes.get(key)
        if changes is None:
            if len(self._changes) >= MAX_KEYS:
                return
            changes = self._changes[key] = deque(maxlen=MAX_CHANGES)
        if changes and amount < changes[-1][1]:
            changes.clear()
        if not changes or amount > changes[-1][1]:
            changes.append((now, amount))
        while len(changes) > 2 and changes[1][0] < now - WINDOW_S:
            changes.popleft()

    def rate(self, key: Hashable, now: float) -> float | None:
        """As the function of this name; None for what was never seen."""
        return rate(self._changes.get(key, ()), now)

    def keep(self, keys: Sequence[Hashable]) -> None:
        """Forgets all others."""
        wanted = set(keys)
        self._changes = {key: changes for key, changes in self._changes.items() if key in wanted}
