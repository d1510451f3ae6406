"""Who coordinates: one node per connected component, as a pure machine.

Availability first. The coordinator is the best of the living and is kept until it dies, leaves or hands over. Its term
is an `Epoch`, which only rises and which every node persists; a command carries the epoch, and a node that knows of a
newer one refuses. Before a node raises the epoch it asks everybody it reaches whether they see a coordinator.

Effects are carried out strictly in order: `Persist` is on the disk before anything that follows it is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tightwad_agent.ids import NO_EPOCH, Epoch, NodeId
from tightwad_agent.wire.rows import Stamp

MAX_EPOCH_JUMP: Final = 1_000_000
"""An epoch this far ahead of the newest known one is nonsense; believing it could use the counter up."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. `settle_s`: a fresh start listens this long (to `settle_max_s` while remembered peers are still being
    dialled). `stagger_s`: how much longer each next best candidate waits for the one before it to act."""

    settle_s: float = 1.0
    settle_max_s: float = 3.0
    precheck_s: float = 0.8
    ask_again_s: float = 0.2
    retry_s: float = 0.3
    stagger_s: float = 1.0
    late_s: float = 0.25


LAN: Final = Timings()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A living node. Higher `klass` and earlier `joined_at` (Unix seconds) are better; without its row: not eligible.
    `linked`: it can be asked directly. `suspect`: it is not sure to hear us; a claim of its is not believed."""

    node: NodeId
    eligible: bool
    klass: int
    joined_at: int
    linked: bool
    suspect: bool = False

    @property
    def order(self) -> tuple[int, int, NodeId]:
        """Smaller is better."""
        return (-self.klass, self.joined_at, self.node)


# Events


@dataclass(frozen=True, slots=True)
class View:
    """All living nodes (alive and suspect), this one among them. `unresolved`: remembered peers whose first dial since
    the start has neither succeeded nor failed yet."""

    candidates: tuple[Candidate, ...]
    unresolved: int = 0


@dataclass(frozen=True, slots=True)
class StampHeard:
    """What `node` obeys, from its heartbeat or said for itself. A command counts: `Stamp(its epoch, its sender)`."""

    node: NodeId
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class PreCheckAsked:
    """`node` sees no coordinator and asks whether we do."""

    node: NodeId
    round: int


@dataclass(frozen=True, slots=True)
class PreCheckAnswered:
    """The answer: the highest epoch `node` knows and the live coordinator it sees, if any."""

    node: NodeId
    round: int
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class HandOver:
    """A person wants another coordinator: `to`, or the best of the others. Ignored unless this node coordinates."""

    to: NodeId | None = None


@dataclass(frozen=True, slots=True)
class HandOverReceived:
    """The coordinator `node` names this node as its successor; `epoch` is the one it gives up."""

    node: NodeId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class LeaveRequested:
    """This node leaves: it claims nothing any more, and hands over first if it coordinates."""


@dataclass(frozen=True, slots=True)
class Tick:
    """The time that `next_deadline` named has come (any other time is harmless)."""


Event = View | StampHeard | PreCheckAsked | PreCheckAnswered | HandOver | HandOverReceived | LeaveRequested | Tick


# Effects


@dataclass(frozen=True, slots=True)
class Persist:
    """Write `epoch` and fsync before carrying out the effects that follow."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Announce:
    """To every node with a link; arrives as `StampHeard`."""

    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Tell:
    """To `node`; arrives as `StampHeard`."""

    node: NodeId
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class AskPreCheck:
    """To `node`; arrives as `PreCheckAsked`."""

    node: NodeId
    round: int


@dataclass(frozen=True, slots=True)
class AnswerPreCheck:
    """To `node`; arrives as `PreCheckAnswered`."""

    node: NodeId
    round: int
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class SendHandOver:
    """To `node`; arrives as `HandOverReceived`."""

    node: NodeId
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class CoordinatorChanged:
    """From now on this node obeys `coordinator` at `epoch`, or nobody (both None). `reason` is for people."""

    epoch: Epoch | None
    coordinator: NodeId | None
    reason: str


@dataclass(frozen=True, slots=True)
class SteppedDown:
    """This node coordinated at `epoch` and no longer does: drain, start nothing."""

    epoch: Epoch
    reason: str


Effect = Persist | Announce | Tell | AskPreCheck | AnswerPreCheck | SendHandOver | CoordinatorChanged | SteppedDown


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`stamp` goes into every heartbeat: the highest epoch known, and whom this node obeys at it."""

    me: NodeId
    stamp: Stamp
    coordinating: bool
    campaigning: bool
    leaving: bool


class Election:
    """One node's part. `persisted` is the highest epoch this node ever persisted."""

    def __init__(self, me: NodeId, now: float, persisted: Epoch = NO_EPOCH, timings: Timings = LAN) -> None:
        self.me = me
        self._t = timings
        self._started = now
        self._seen = persisted
        self._coordinator: NodeId | None = None
        self._renounced = NO_EPOCH  # its claimant said itself that it does not coordinate at it
        self._living: dict[NodeId, Candidate] = {}
        self._unresolved = 0
        self._vacant_since = now
        self._leaving = False
        self._round = 0
        self._waiting: set[NodeId] | None = None  # of a pre-check under way: who has not answered
        self._asked: set[NodeId] = set()
        self._round_ends = math.inf
        self._ask_again_at = math.inf
        self._retry_at = now
        self._effects: list[Effect] = []

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Takes one event; the effects are to be carried out in order."""
        self._effects = []
        due = self.next_deadline()
        if due is not None and now >= due + self._t.late_s:  # we stalled: the news lies unread, or waits for a redial
            self._waiting = None
            self._retry_at = now + self._t.settle_s
        _HANDLERS[type(event)](self, event, now)
        if self._coordinator is None:
            self._campaign(now)
        return self._effects

    def next_deadline(self) -> float | None:
        """When `Tick` is due; None: only when something happens."""
        if self._coordinator is not None:
            return None
        if self._waiting is not None:
            return min(self._round_ends, self._ask_again_at)
        return self._campaign_at()

    def snapshot(self) -> Snapshot:
        return Snapshot(self.me, self._stamp(), self.coordinating, self._waiting is not None, self._leaving)

    @property
    def coordinator(self) -> NodeId | None:
        """Whom this node obeys."""
        return self._coordinator

    @property
    def epoch(self) -> Epoch:
        """The highest epoch this node knows; with a coordinator, the one it obeys."""
        return self._seen

    @property
    def coordinating(self) -> bool:
        return self._coordinator == self.me

    def accepts(self, epoch: Epoch) -> bool:
        """Whether a command of this epoch may be carried out. Report its stamp as `StampHeard` first: if the claim is
        believed, it is persisted and obeyed from then on, and older ones are refused."""
        return epoch == self._seen

    def _stamp(self) -> Stamp:
        return Stamp(self._seen, self._coordinator)

    # Events

    def _on_view(self, event: View, now: float) -> None:
        self._living = {c.node: c for c in event.candidates}
        self._unresolved = event.unresolved
        gone = self._coordinator
        if gone is not None and gone != self.me and gone not in self._living:
            self._vacate(f"the coordinator {gone.short} is gone", now)
        if self._waiting is not None:
            askable = self._askable()
            self._waiting &= askable
            if askable - self._asked:  # came into reach meanwhile
                self._waiting |= askable - self._asked
                self._asked |= askable
                self._round_ends = now + self._t.precheck_s
                self._ask(now)

    def _on_stamp(self, event: StampHeard, now: float) -> None:
        node, stamp = event.node, event.stamp
        if not self._plausible(stamp):
            return
        if stamp.epoch < self._seen:
            self._effects.append(Tell(node, self._stamp()))
        elif stamp.epoch > self._seen and stamp.coordinator not in (None, self.me) and not self._in_sight(stamp):
            self._retry_at = max(self._retry_at, now + self._t.retry_s)  # it may come into sight: no duel of claims
        else:
            if stamp.epoch > self._seen:
                self._newer(stamp, now)
            self._same(node, stamp, now)

    def _in_sight(self, stamp: Stamp) -> bool:
        """Whether the claimant lives and hears us: nobody could tell a deaf one of a newer claim."""
        claimant = self._living.get(stamp.coordinator) if stamp.coordinator is not None else None
        return claimant is not None and not claimant.suspect

    def _plausible(self, stamp: Stamp) -> bool:
        counter, claimant = stamp.epoch
        if not 0 <= counter <= self._seen.counter + MAX_EPOCH_JUMP:
            return False
        return stamp.coordinator is None or (counter > 0 and stamp.coordinator == claimant)

    def _newer(self, stamp: Stamp, now: float) -> None:
        old, was_mine, had = self._seen, self.coordinating, self._coordinator
        self._seen = stamp.epoch
        if was_mine and stamp.coordinator in (None, self.me) and not self._leaving:
            self._claim(f"renewed: epoch {stamp.epoch} is newer than {old}, and nobody holds it")
            return
        self._effects.append(Persist(stamp.epoch))
        self._coordinator = None
        if was_mine:
            self._effects.append(SteppedDown(old, f"epoch {stamp.epoch} is newer than {old}"))
        if had is not None and (stamp.coordinator is None or stamp.coordinator == self.me):
            self._vacate(f"epoch {stamp.epoch} is newer than {old}, and nobody holds it", now)

    def _same(self, node: NodeId, stamp: Stamp, now: float) -> None:
        claimed = stamp.coordinator
        if claimed == self.me:
            if not self.coordinating:  # of an earlier run of ours: a term never resumes
                self._renounced = self._seen
                self._effects.append(Tell(node, self._stamp()))
        elif claimed is None:
            if node == self._seen.node and node != self.me:
                self._renounced = self._seen
                if self._coordinator is not None:
                    self._vacate(f"{node.short} restarted and no longer coordinates", now)
        elif self._coordinator is None and self._renounced != self._seen and self._in_sight(stamp):
            self._waiting = None
            self._coordinator = claimed
            self._effects.append(CoordinatorChanged(self._seen, claimed, f"{claimed.short} coordinates"))

    def _on_asked(self, event: PreCheckAsked, _now: float) -> None:
        self._effects.append(AnswerPreCheck(event.node, event.round, self._stamp()))

    def _on_answered(self, event: PreCheckAnswered, now: float) -> None:
        self._on_stamp(StampHeard(event.node, event.stamp), now)
        if event.round != self._round or self._waiting is None:
            return
        self._waiting.discard(event.node)
        if event.stamp.coordinator not in (None, self.me):
            self._waiting = None
            self._retry_at = now + self._t.retry_s

    def _on_hand_over(self, event: HandOver, _now: float) -> None:
        if not self.coordinating:
            return
        others = [c for c in self._living.values() if c.eligible and c.node in self._askable()]
        named = [c for c in others if c.node == event.to]
        if event.to is None or named:
            heir = min(named or others, key=lambda c: c.order, default=None)
            if heir is not None:
                self._effects.append(SendHandOver(heir.node, self._seen))

    def _on_hand_over_received(self, event: HandOverReceived, _now: float) -> None:
        mine = self._living.get(self.me)
        if event.epoch != self._seen or event.node != self._seen.node or self._coordinator not in (None, event.node):
            return
        if mine is not None and mine.eligible and not self._leaving:
            self._claim(f"{event.node.short} handed over")

    def _on_leave(self, _event: LeaveRequested, now: float) -> None:
        self._leaving = True
        self._waiting = None
        self._on_hand_over(HandOver(), now)

    def _on_tick(self, _event: Tick, _now: float) -> None:
        """All that is due is done after every event."""

    # Campaign

    def _campaign_at(self) -> float | None:
        """When this node may ask for the office: the best at once, the others later, each after the one before."""
        mine = self._living.get(self.me)
        if mine is None or not mine.eligible or self._leaving:
            return None
        n_better = sum(c.eligible and c.order < mine.order for c in self._living.values())
        settled = self._started + (self._t.settle_max_s if self._unresolved else self._t.settle_s)
        return max(max(self._vacant_since, settled) + n_better * self._t.stagger_s, self._retry_at)

    def _campaign(self, now: float) -> None:
        starts = self._campaign_at()
        if starts is None:
            self._waiting = None
            return
        if self._waiting is None:
            if now < starts:
                return
            self._pre_check(now)
        if now >= self._round_ends or not (self._waiting or self._may_return()):
            self._claim("no coordinator was in sight")
        elif now >= self._ask_again_at:
            self._ask(now)

    def _pre_check(self, now: float) -> None:
        self._round += 1
        self._round_ends = now + self._t.precheck_s
        self._waiting = self._askable()
        self._asked = set(self._waiting)
        self._ask(now)

    def _askable(self) -> set[NodeId]:
        return {c.node for c in self._living.values() if c.linked and not c.suspect and c.node != self.me}

    def _may_return(self) -> bool:
        """Nobody could be asked, and somebody is suspect: its link may just be broken, after a stall of ours maybe."""
        return not self._asked and any(c.suspect for c in self._living.values() if c.node != self.me)

    def _ask(self, now: float) -> None:
        self._ask_again_at = now + self._t.ask_again_s
        self._effects.extend(AskPreCheck(node, self._round) for node in sorted(self._waiting or ()))

    def _claim(self, reason: str) -> None:
        self._waiting = None
        self._seen = Epoch(self._seen.counter + 1, self.me)
        self._coordinator = self.me
        self._effects.append(Persist(self._seen))
        self._effects.append(CoordinatorChanged(self._seen, self.me, reason))
        self._effects.append(Announce(self._stamp()))

    def _vacate(self, reason: str, now: float) -> None:
        self._coordinator = None
        self._vacant_since = now
        self._effects.append(CoordinatorChanged(None, None, reason))


_HANDLERS: Final[dict[type, Callable[[Election, Any, float], None]]] = {
    View: Election._on_view,
    StampHeard: Election._on_stamp,
    PreCheckAsked: Election._on_asked,
    PreCheckAnswered: Election._on_answered,
    HandOver: Election._on_hand_over,
    HandOverReceived: Election._on_hand_over_received,
    LeaveRequested: Election._on_leave,
    Tick: Election._on_tick,
}
