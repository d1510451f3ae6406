"""What linked nodes say to one another all the time: heartbeats, who is there, who coordinates, rows, the record.

Tags are append-only; new fields go to the end with defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tightwad_agent.ids import Epoch, NodeId
from tightwad_agent.wire.codec import Codec, Max
from tightwad_agent.wire.rows import NodeRow, ServeRecord, Stamp
from tightwad_agent.wire.trust import Denial, Lineage

MAX_CONTROL = 1 << 20
"""Bytes of one control message; the largest is a row."""
MAX_CALL = MAX_CONTROL - 64
"""Bytes of the parameters or the result of one call."""
MAX_NODES = 256
MAX_ROWS_PER_MESSAGE = 1
"""The largest row a node may have takes more than half of MAX_CONTROL."""
MAX_DIGEST = 32
MAX_DENIALS_PER_MESSAGE = 256


@dataclass(frozen=True, slots=True)
class Beat:
    """Once a second. `digest`: of the sender's view of who lives; `rows`: of the rows it holds; `heard_ago_s`: when it
    last heard the receiver; `sent_us` comes back in `Echo`."""

    incarnation: int
    digest: Annotated[bytes, Max(MAX_DIGEST)]
    heard_ago_s: float
    stamp: Stamp
    rows: Annotated[bytes, Max(MAX_DIGEST)]
    sent_us: int


@dataclass(frozen=True, slots=True)
class Echo:
    """At once after a `Beat`."""

    sent_us: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Asks for a beat at once."""


@dataclass(frozen=True, slots=True)
class Question:
    """Do you reach `about`? `asked_at` is of the asker's clock."""

    about: NodeId
    asked_at: float


@dataclass(frozen=True, slots=True)
class Answer:
    """I reach it, or not; I know of a sign of life `ago_s` old."""

    about: NodeId
    asked_at: float
    reachable: bool
    ago_s: float


@dataclass(frozen=True, slots=True)
class Said:
    """One rumour: `state` is alive, suspect, dead or left."""

    node: NodeId
    state: Annotated[str, Max(8)]
    incarnation: int


@dataclass(frozen=True, slots=True)
class Rumours:
    """What the sender holds of others."""

    said: Annotated[tuple[Said, ...], Max(MAX_NODES)]


@dataclass(frozen=True, slots=True)
class Coordinates:
    """The epoch the sender knows, and whom it obeys at it."""

    stamp: Stamp


@dataclass(frozen=True, slots=True)
class PreCheck:
    """I see no coordinator; do you?"""

    round: int


@dataclass(frozen=True, slots=True)
class PreCheckReply:
    """The answer to `PreCheck`."""

    round: int
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class HandOver:
    """You coordinate from now on."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class RowStamps:
    """The rows I hold, as node -> (incarnation, version): send what is newer."""

    stamps: Annotated[dict[str, tuple[int, int]], Max(MAX_NODES)]


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows."""

    rows: Annotated[tuple[NodeRow, ...], Max(MAX_ROWS_PER_MESSAGE)]


@dataclass(frozen=True, slots=True)
class Record:
    """What the cluster should serve, as far as I know."""

    record: ServeRecord


@dataclass(frozen=True, slots=True)
class Goodbye:
    """I close this link on purpose."""

    reason: Annotated[str, Max(200)]


@dataclass(frozen=True, slots=True)
class Denials:
    """Who was removed, and which tokens no longer count: what the receiver may not know. From link version 2 on."""

    entries: Annotated[tuple[Denial, ...], Max(MAX_DENIALS_PER_MESSAGE)]


@dataclass(frozen=True, slots=True)
class KeyHistory:
    """How the CA's key changed. From link version 2 on; sent before anything else."""

    lineage: Lineage


CONTROL = Codec(
    "control",
    {
        1: Beat,
        2: Echo,
        3: Probe,
        4: Question,
        5: Answer,
        6: Rumours,
        7: Coordinates,
        8: PreCheck,
        9: PreCheckReply,
        10: HandOver,
        11: RowStamps,
        12: Rows,
        13: Record,
        14: Goodbye,
        15: Denials,
        16: KeyHistory,
    },
)


@dataclass(frozen=True, slots=True)
class CallRequest:
    """The parameters of a call, a msgpack map."""

    params: Annotated[bytes, Max(MAX_CALL)]


@dataclass(frozen=True, slots=True)
class CallReply:
    """Its result, a msgpack map."""

    result: Annotated[bytes, Max(MAX_CALL)]


@dataclass(frozen=True, slots=True)
class CallFailed:
    """The error it ended with."""

    code: Annotated[str, Max(64)]
    message: Annotated[str, Max(4000)]
    hint: Annotated[str, Max(2000)] = ""


CALL = Codec("call", {1: CallRequest, 2: CallReply, 3: CallFailed})
