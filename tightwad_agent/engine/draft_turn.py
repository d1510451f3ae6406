"""One request to a drafter's llama-server, what comes back, and how long that takes. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

Key = tuple[int, int]
"""(stream, session)"""

OVERHEAD_SHARE = 0.1
"""What asking should cost of the time of a turn at most, ..."""
TURN_S = 0.008
"""... as long as a branch that replaces another one need not wait for longer than that."""
MAX_TURN = 8
"""Tokens of one turn."""
_SMOOTH = 0.2


@dataclass(frozen=True, slots=True)
class Made:
    """What one prompt was continued with. `ended`: the last token ends the text. `computed_s`: time in the model."""

    tokens: list[int]
    ended: bool
    computed_s: float


class Member(NamedTuple):
    """One branch in a turn. `serial` tells its session from another one that got the same number later."""

    key: Key
    serial: int
    branch: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: the continuation of `prompts` by `n` tokens. `slot`: the server's slot, `None` if several share the
    turn (it then finds for each the one that holds most of it). `n_new`: tokens that the server has not seen."""

    members: tuple[Member, ...]
    prompts: tuple[bytes, ...]
    n: int
    n_new: int
    slot: int | None
    alone: bool


@dataclass(slots=True)
class Pace:
    """What a token takes in the model, and what asking takes beside it; seconds, smoothed, 0 until known."""

    token_s: float = 0.0
    asking_s: float = 0.0

    def took(self, elapsed_s: float, computed_s: float, n: int) -> None:
        """A turn of `n` tokens without a prompt."""
        self.token_s = _smooth(self.token_s, computed_s / n)
        self.asking_s = _smooth(self.asking_s, max(0.0, elapsed_s - computed_s))

    @property
    def turn(self) -> int:
        """Tokens of one turn: 1 for all but fast models."""
        if self.token_s <= 0:
            return 1
        worth_asking = math.ceil(self.asking_s / (OVERHEAD_SHARE * self.token_s))
        return max(1, min(worth_asking, int(TURN_S / self.token_s), MAX_TURN))

    @property
    def tokens_per_s(self) -> float:
        return 1 / (self.token_s + self.asking_s / self.turn) if self.token_s > 0 else 0.0


def _smooth(old: float, new: float) -> float:
    return new if old == 0 else old + _SMOOTH * (new - old)
