"""What a node keeps of each other one, and the times that say when silence means something. See `members`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from tightwad_agent.ids import NodeId
from tightwad_agent.mesh.member_events import Fate, Reach, State


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. A silent death is known after `suspect_s + confirm_s` of silence, a killed process after one refused
    redial. `late_s`: the own loop may be late this much before it is noticed; after a stall, what came meanwhile is
    read within `unread_s`."""

    heartbeat_s: float = 1.0
    suspect_s: float = 2.5
    confirm_s: float = 1.5
    ask_s: float = 0.6
    echo_slack_s: float = 0.3
    probe_s: float = 0.5
    vouch_s: float = 1.2
    refused_s: float = 0.25
    redial_soon_s: float = 0.1
    redial_s: float = 1.0
    redial_dead_s: float = 2.0
    late_s: float = 0.25
    unread_s: float = 0.1
    max_stretch: float = 8.0
    stretch_half_life_s: float = 0.5
    sync_s: float = 1.0
    max_sync_s: float = 30.0
    n_helpers: int = 3


LAN: Final = Timings()


@dataclass(slots=True)
class Peer:
    """What is known of one other node; times are -inf where nothing happened yet."""

    node: NodeId
    incarnation: int
    fate: Fate
    shown: State | None = None
    reach: Reach = Reach.NONE
    since: float = -math.inf
    reason: str = ""
    linked: bool = False
    heard: float = -math.inf  # it reached us
    echo: float = -math.inf  # we reached it, as it says
    indirect: float = -math.inf  # it lived, as others say
    credit: float = 0.0  # of the silence since, this much was our own stall
    broken_at: float = -math.inf
    refused_at: float | None = None
    accused: tuple[int, Fate] | None = None  # a record that others hold and we know better than
    vouchers: dict[NodeId, float] = field(default_factory=dict)  # say they reach it themselves: until when that holds
    asked: set[NodeId] = field(default_factory=set)  # have not answered yet
    n_asks: int = 0
    next_probe: float = -math.inf
    next_ask: float = -math.inf
    next_redial: float = -math.inf
    wake: float = math.inf
    sync_pair: tuple[bytes, bytes] | None = None
    sync_at: float = -math.inf
    sync_wait: float = 0.0

    @property
    def record(self) -> tuple[int, Fate]:
        return (self.incarnation, self.fate)

    @property
    def is_accused(self) -> bool:
        return self.accused is not None and self.accused > self.record

    def forgive(self, stalled_s: float, now: float) -> None:
        """We did not run for so long, and heard nobody: that was not this peer's silence."""
        self.credit += stalled_s
        if self.refused_at is not None:
            self.refused_at = min(now, self.refused_at + stalled_s)
