"""What the coordinator and a drafter say on the `draft` stream: `frames` around msgpack headers.

One stream per drafter carries all requests, as sessions. The drafter keeps each session's tokens, so that only what
is new crosses the network: a long conversation is sent once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tightwad_agent.ids import NodeId
from tightwad_agent.wire.codec import NATURAL, Codec, Max
from tightwad_agent.wire.verify import MAX_TOKENS

Natural = Annotated[int, NATURAL]

MAX_HEADER = 4 * MAX_TOKENS + (1 << 16)
MAX_SESSIONS = 64
"""Sessions of one stream."""
MAX_DRAFT = 256
"""Tokens that one branch may be asked for ahead."""

Packed = Annotated[bytes, Max(4 * MAX_TOKENS)]


@dataclass(frozen=True, slots=True)
class Hello:
    """The drafter's first message. `slots`: sessions that it drafts for at once without slowing down much."""

    model: Annotated[str, Max(128)]
    n_vocab: Natural
    context: Natural
    slots: Natural


@dataclass(frozen=True, slots=True)
class Ask:
    """Continue session `session`: keep its first `keep` tokens, append `tokens`, and make `n` more, as branch
    `branch`.

    `keep` counts the session's tokens with all that the drafter made in its newest branch. What the older branch
    still had to make is given up. A session begins with its first `Ask` (`keep` 0). Branches of a session only
    grow.
    """

    session: Natural
    branch: Natural
    keep: Natural
    tokens: Packed
    n: Natural


@dataclass(frozen=True, slots=True)
class Extend:
    """Make `n` more in this branch, after those asked for; ignored if the branch is no longer the newest."""

    session: Natural
    branch: Natural
    n: Natural


@dataclass(frozen=True, slots=True)
class Forget:
    """The session is over."""

    session: Natural


@dataclass(frozen=True, slots=True)
class Drafted:
    """Tokens of a branch, from the `offset`th on. `us`: microseconds from when the drafter took up the branch to
    the last of them. `ended`: the draft model would end here (the last token is what says so); no more will come in
    this branch."""

    session: Natural
    branch: Natural
    offset: Natural
    tokens: Annotated[bytes, Max(4 * MAX_DRAFT)]
    us: Natural = 0
    ended: bool = False


@dataclass(frozen=True, slots=True)
class NoDraft:
    """The branch gets no more tokens: the context is full, the draft server died, a token is out of range, ... What is
    kept of the session then is not certain; an `Ask` that keeps nothing is always right."""

    session: Natural
    branch: Natural
    reason: Annotated[str, Max(500)]


# Not on the wire


@dataclass(frozen=True, slots=True)
class DrafterInfo:
    """A drafter that is ready. `rtt_s`: round trip to its machine as measured by the mesh, 0 on this one. `model`: id
    of its model."""

    node: NodeId
    name: str
    model: str
    slots: int
    rtt_s: float


TO_DRAFTER = Codec("draft requests", {1: Ask, 2: Extend, 3: Forget})
FROM_DRAFTER = Codec("drafts", {1: Hello, 2: Drafted, 3: NoDraft})

__all__ = [
    "FROM_DRAFTER",
    "MAX_DRAFT",
    "MAX_HEADER",
    "MAX_SESSIONS",
    "TO_DRAFTER",
    "Ask",
    "Drafted",
    "DrafterInfo",
    "Extend",
    "Forget",
    "Hello",
    "NoDraft",
]
