"""What the speculation machine hears and does."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

from tightwad_agent.proxy.record import DrafterRecord
from tightwad_agent.wire.draft import Drafted, NoDraft
from tightwad_agent.wire.verify import Accepted

# Events


@dataclass(slots=True)
class Confirmed:
    """A round's answer, its token ids unpacked."""

    answer: Accepted
    tokens: list[int]


@dataclass(slots=True)
class Draft:
    """Tokens from `drafter`, ids unpacked. `came`: when, if that was before they were looked at."""

    drafter: Hashable
    drafted: Drafted
    tokens: list[int]
    came: float = math.inf


@dataclass(slots=True)
class Silenced:
    """`drafter` says that a branch gets no more tokens."""

    drafter: Hashable
    answer: NoDraft


@dataclass(slots=True)
class Joined:
    """A drafter may be used from now on."""

    drafter: Hashable
    record: DrafterRecord


@dataclass(slots=True)
class Lost:
    """A drafter is gone, or sent what it must not."""

    drafter: Hashable


@dataclass(slots=True)
class Tick:
    """The time that `next_deadline` named has come (any other time is harmless)."""


Event = Confirmed | Draft | Silenced | Joined | Lost | Tick


# Effects


@dataclass(slots=True)
class Ask:
    """As `wire.draft.Ask`, in the session with `drafter`; the first opens it."""

    drafter: Hashable
    branch: int
    keep: int
    tokens: list[int]
    n: int


@dataclass(slots=True)
class Extend:
    """As `wire.draft.Extend`."""

    drafter: Hashable
    branch: int
    n: int


@dataclass(slots=True)
class Forget:
    """The session with `drafter` is over."""

    drafter: Hashable


@dataclass(slots=True)
class SubmitRound:
    """As `wire.verify.Round`."""

    at: int
    draft: list[int]
    free: int


Effect = Ask | Extend | Forget | SubmitRound


@dataclass(frozen=True, slots=True)
class Bounds:
    """`max_tokens` of the answer, `context` of the model, ids below `n_vocab`. `drafts` off: the model's memory cannot
    be rolled back, or nobody wants drafts."""

    max_tokens: int
    context: int
    n_vocab: int
    drafts: bool = True
    ngram: bool = True
