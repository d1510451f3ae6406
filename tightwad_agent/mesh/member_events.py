"""What `members` is told, what it answers, and what it shows: states, events, effects and the snapshot. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from tightwad_agent.ids import NodeId


class State(StrEnum):
    """What this node thinks of another. Suspects still count as living."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"

    @property
    def living(self) -> bool:
        return self in (State.ALIVE, State.SUSPECT)


class Reach(StrEnum):
    """How a node is known to be alive. Indirect: not from here, but another node reaches it."""

    DIRECT = "direct"
    INDIRECT = "indirect"
    NONE = "none"


class Fate(IntEnum):
    """The shared part of a state; at one incarnation the greater is believed."""

    ALIVE = 0
    DEAD = 1
    LEFT = 2


@dataclass(frozen=True, slots=True)
class Rumour:
    """What somebody says of a node. SUSPECT is an opinion of the teller; the others are records."""

    node: NodeId
    state: State
    incarnation: int


# Events


@dataclass(frozen=True, slots=True)
class LinkUp:
    """A link to `node` is up, hellos went both ways. Also when it replaces another link to the same node."""

    node: NodeId
    incarnation: int


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The last link to `node` ended; `clean`: the peer said goodbye first."""

    node: NodeId
    clean: bool = False


@dataclass(frozen=True, slots=True)
class Heard:
    """Any message came from `node` over its link (heartbeats and the messages below need not be reported twice)."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class HeartbeatReceived:
    """A heartbeat; its sender last heard us `heard_ago_s` before it sent."""

    node: NodeId
    incarnation: int
    digest: bytes
    heard_ago_s: float


@dataclass(frozen=True, slots=True)
class Probed:
    """`node` wants a heartbeat at once."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class RumoursReceived:
    """`node` told these."""

    node: NodeId
    rumours: tuple[Rumour, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """`node` asks whether we reach `about`. `asked_at` is of its clock and goes back as it came."""

    node: NodeId
    about: NodeId
    asked_at: float


@dataclass(frozen=True, slots=True)
class Answered:
    """`node` answers: it reaches `about` itself, or not; the newest proof of life it knows of is `ago_s` old."""

    node: NodeId
    about: NodeId
    asked_at: float
    reachable: bool
    ago_s: float


@dataclass(frozen=True, slots=True)
class RedialFailed:
    """No link to `node`; `refused`: its machine answered that nothing listens there."""

    node: NodeId
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Remembered:
    """A peer of an earlier run, not seen since: shown as dead and redialled."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class LocalLate:
    """Our own loop ran `late_s` late."""

    late_s: float


@dataclass(frozen=True, slots=True)
class LeaveRequested:
    """This node leaves on purpose."""


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop `node` from the table. It is back as soon as it links again or lives at a higher incarnation."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that `next_deadline` named has come (any other time is harmless)."""


Event = (
    LinkUp
    | LinkDown
    | Heard
    | HeartbeatReceived
    | Probed
    | RumoursReceived
    | Asked
    | Answered
    | RedialFailed
    | Remembered
    | LocalLate
    | LeaveRequested
    | Forget
    | Tick
)


# Effects


@dataclass(frozen=True, slots=True)
class SendHeartbeat:
    """Over the link to `node`; arrives there as `HeartbeatReceived`."""

    node: NodeId
    incarnation: int
    digest: bytes
    heard_ago_s: float


@dataclass(frozen=True, slots=True)
class SendProbe:
    """Arrives as `Probed`."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Ask:
    """To `node`; arrives as `Asked`."""

    node: NodeId
    about: NodeId
    asked_at: float


@dataclass(frozen=True, slots=True)
class Answer:
    """To `node`; arrives as `Answered`."""

    node: NodeId
    about: NodeId
    asked_at: float
    reachable: bool
    ago_s: float


@dataclass(frozen=True, slots=True)
class Tell:
    """To `node`; arrives as `RumoursReceived`."""

    node: NodeId
    rumours: tuple[Rumour, ...]


@dataclass(frozen=True, slots=True)
class TellAll:
    """To every node with a link; arrives as `RumoursReceived`."""

    rumours: tuple[Rumour, ...]


@dataclass(frozen=True, slots=True)
class StateChanged:
    """What we think of `node` changed; `old` is None for a node that was not in the table. `reason` is for people."""

    node: NodeId
    old: State | None
    new: State
    reach: Reach
    reason: str


@dataclass(frozen=True, slots=True)
class Refuted:
    """Our incarnation rose: persist it before the effects that follow."""

    incarnation: int


@dataclass(frozen=True, slots=True)
class Redial:
    """Try now to make a new link, also beside a silent one, which it then replaces; report `LinkUp` or `RedialFailed`.
    Nothing to do while a dial to `node` is under way."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the link to `node` (no `LinkDown` is expected)."""

    node: NodeId


Effect = SendHeartbeat | SendProbe | Ask | Answer | Tell | TellAll | StateChanged | Refuted | Redial | Disconnect


# Snapshot


@dataclass(frozen=True, slots=True)
class PeerView:
    """One node as this one sees it. `since`: when it came into this state; `heard_at`: last message from it."""

    node: NodeId
    state: State
    reach: Reach
    incarnation: int
    linked: bool
    heard_at: float
    since: float
    reason: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything worth showing; `stretch` above 1: our own machine is late and accuses more slowly."""

    me: NodeId
    incarnation: int
    left: bool
    stretch: float
    peers: tuple[PeerView, ...]
