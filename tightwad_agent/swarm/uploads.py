"""How many pieces a node sends at once: as few as fill its line.

A piece is of use to others only when it is whole. A line that is shared by many of them delivers none for a long time,
and then all. But one at a time does not fill the line when it goes to a slow machine, or to one that others send to as
well. So it begins with four, and one more, or one less, is tried for a while, and kept if it pays.

Next is who wants what fewest others can give: everybody soon has something of his own to pass on, and what was asked
for late in the day does not wait behind what can be had elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

FIRST: Final = 4
LEAST: Final = 2
MOST: Final = 12
PERIOD_S: Final = 0.4
PERIOD_BYTES: Final = 8 << 20
LONGEST_S: Final = 1.5
"""What is sent in so long, and at least so much, is compared: blocks are counted, and a few of them say little."""
FIRST_TRY_S: Final = 1.0
LAST_TRY_S: Final = 30.0
MORE_PAYS: Final = 0.6
"""Of what one slot more should bring, if each brought the same."""
LESS_DOES: Final = 0.96
PATIENCE: Final = 8
"""Who has let so many pieces pass is as good as one that wants a piece with one copy less."""
FELL: Final = 0.7
"""To this share of what it was: slow ones have their turns, and there is one slot more at once, and again."""
FORGETS: Final = 0.97


class Slots:
    """The number, and the trial that is going on. Pure."""

    def __init__(self) -> None:
        self.n = FIRST
        self._before = 0
        """The number that a trial began with; 0: none is going on."""
        self._rate = 0.0
        """Bytes a second that `n` slots sent, or `_before` while a trial is going on."""
        self._settling = False
        self._began, self._sent = math.inf, 0
        self._try_at, self._patience_s = math.inf, FIRST_TRY_S
        self._next = 1

    def sent(self, n_bytes: int, now: float, waiting: bool) -> None:
        """Bytes went out. `waiting`: somebody has no slot; only then the number matters, and is measured."""
        if not waiting:
            self._began = math.inf
            return
        if self._began == math.inf:
            self._began, self._sent = now, 0
            self._try_at = min(self._try_at, now + self._patience_s)
            return
        self._sent += n_bytes
        took_s = now - self._began
        if took_s >= LONGEST_S or (took_s >= PERIOD_S and self._sent >= PERIOD_BYTES):
            rate = self._sent / (now - self._began)
            self._began, self._sent = now, 0
            self._measured(rate, now)

    def _measured(self, rate: float, now: float) -> None:
        if self._settling:
            self._settling = False  # pieces that were under way when the number changed
        elif self._before:
            self._judge(rate, now)
        elif rate < FELL * self._rate and self.n < MOST:
            self.n += 1
            self._rate *= FORGETS
        else:
            self._rate = rate if not self._rate else self._rate + (rate - self._rate) / 2
            if now >= self._try_at:
                self._try(self.n + self._next)

    def _try(self, n: int) -> None:
        self._next = -self._next
        if not LEAST <= n <= MOST:
            n = self.n + self._next
        self._before, self.n, self._settling = self.n, n, True

    def _judge(self, rate: float, now: float) -> None:
        least = 1 + MORE_PAYS / self._before if self.n > self._before else LESS_DOES
        keeps = rate >= self._rate * least
        if keeps:
            self._rate, self._patience_s = rate, FIRST_TRY_S
            self._next = 1 if self.n > self._before else -1
        else:
            self.n, self._settling = self._before, True
            self._patience_s = min(2 * self._patience_s, LAST_TRY_S)
        self._before = 0
        self._try_at = now + (0 if keeps else self._patience_s)


class Turn:
    """A place in the queue for a slot, then the slot; `wake` is called when it is there. `rank` says how many others
    can give what is wanted, as of now."""

    def __init__(self, wake: Callable[[], None], rank: Callable[[], float], since: int) -> None:
        self.granted = False
        self.wake, self.rank, self.since = wake, rank, since


class Uploads:
    """The queue for all models of a node, a piece at a time."""

    def __init__(self) -> None:
        self._slots = Slots()
        self._waiting: list[Turn] = []
        self._n_granted = 0
        self._n_ever = 0

    @property
    def n_slots(self) -> int:
        return self._slots.n

    def ask(self, wake: Callable[[], None], rank: Callable[[], float] = lambda: 0.0) -> Turn:
        """A turn that is granted now or later; it must be `over` one day, granted or not."""
        turn = Turn(wake, rank, self._n_ever)
        self._waiting.append(turn)
        self._grant()
        return turn

    def over(self, turn: Turn) -> None:
        if turn.granted:
            turn.granted = False
            self._n_granted -= 1
        elif turn in self._waiting:
            self._waiting.remove(turn)
        self._grant()

    def sent(self, n_bytes: int, now: float) -> None:
        """Of the piece of a turn."""
        self._slots.sent(n_bytes, now, bool(self._waiting))
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self._n_granted < self._slots.n:
            turn = min(self._waiting, key=self._order)
            self._waiting.remove(turn)
            turn.granted = True
            self._n_granted += 1
            self._n_ever += 1
            turn.wake()

    def _order(self, turn: Turn) -> float:
        """Of equals the first that asked is found."""
        return turn.rank() - (self._n_ever - turn.since) / PATIENCE
