"""What the failure detector and the election decide, as events for people: why, and how long it took. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tightwad_agent.events import FIRST_HAND, SAME, Fact, Kind
from tightwad_agent.ids import Epoch, NodeId
from tightwad_agent.mesh.election import CoordinatorChanged, SteppedDown
from tightwad_agent.mesh.members import Reach, State, StateChanged

GOODBYE = "it said goodbye: its agent was stopped, or left the cluster"


@dataclass(frozen=True, slots=True)
class Note:
    """What is to be told; nodes are in `text` by their short ids."""

    text: str
    kind: Kind
    facts: dict[str, Fact]


@dataclass(slots=True)
class _Known:
    """`since`: when it came into this state; `away_since`: when it was last seen well, if it is not; 0 if unknown."""

    state: State
    reach: Reach
    reason: str
    away_since: float = 0.0


@dataclass(frozen=True, slots=True)
class _Vacancy:
    """`why` the coordinator is gone, in words that follow its name."""

    since: float
    coordinator: NodeId
    why: str


class Telling:
    """`now` is of any clock that never goes back."""

    def __init__(self, me: NodeId) -> None:
        self._me = me
        self._known: dict[NodeId, _Known] = {}
        self._coordinator: NodeId | None = None
        self._vacancy: _Vacancy | None = None

    # Who lives

    def state_changed(self, effect: StateChanged, now: float) -> Note | None:
        """None where there is nothing to tell: a peer of an earlier run that is not there yet."""
        before = self._known.get(effect.node)
        after = _Known(effect.new, effect.reach, effect.reason, _away_since(before, effect, now))
        self._known[effect.node] = after
        if effect.old is effect.new:
            return self._reach_changed(effect, before, now)
        if effect.old is None and effect.new is State.DEAD:
            return None
        away_s = now - before.away_since if effect.new is State.ALIVE and before and before.away_since else None
        facts = _facts(effect) | {SAME: f"{effect.node} {effect.new}"}
        if away_s is not None:
            facts["away_s"] = away_s
        return Note(_state_text(effect, away_s), Kind.MEMBERSHIP, facts)

    def _reach_changed(self, effect: StateChanged, before: _Known | None, now: float) -> Note | None:
        if before is None or before.reach is effect.reach or effect.new is not State.ALIVE:
            return None
        if effect.reach is Reach.DIRECT:
            text = f"{effect.node.short} is reached directly again, after {now - before.away_since:.1f} s"
        else:
            text = f"{effect.node.short} is reached through others only: {effect.reason}"
        return Note(text, Kind.LINK, _facts(effect))

    # Who coordinates

    def coordinator_changed(self, effect: CoordinatorChanged | SteppedDown, epoch: Epoch, now: float) -> Note:
        """`epoch`: the highest this node knows."""
        if isinstance(effect, SteppedDown):
            text = f"this machine no longer coordinates: {effect.reason}"
            return Note(text, Kind.ELECTION, {"epoch": effect.epoch.counter, "reason": effect.reason})
        old, self._coordinator = self._coordinator, effect.coordinator
        if effect.coordinator is None:
            return self._vacated(effect, old, epoch, now)
        return self._elected(effect, effect.coordinator, old, now)

    def _vacated(self, effect: CoordinatorChanged, old: NodeId | None, epoch: Epoch, now: float) -> Note:
        why = self._fate(old) if old else ""
        if old is not None:
            self._vacancy = _Vacancy(now, old, why or f"no longer coordinates: {effect.reason}")
        text = f"there is no coordinator: {old.short} {why}" if old and why else effect.reason
        facts: dict[str, Fact] = {"epoch": epoch.counter, "reason": effect.reason, "peer": str(old) if old else None}
        return Note(text, Kind.ELECTION, facts | {SAME: f"no coordinator at {epoch.counter} {epoch.node}"})

    def _elected(self, effect: CoordinatorChanged, new: NodeId, old: NodeId | None, now: float) -> Note:
        vacancy, self._vacancy = self._vacancy, None
        counter = effect.epoch.counter if effect.epoch else 0
        facts: dict[str, Fact] = {"epoch": counter, "peer": str(new), "reason": effect.reason}
        facts |= {SAME: f"{new} at epoch {counter}", FIRST_HAND: new == self._me}
        text = f"coordinator is {new.short} (epoch {counter})"
        if vacancy is None:
            before = f"; before it was {old.short}" if old not in (None, new) else ""
            return Note(f"{text}: {effect.reason}{before}", Kind.ELECTION, facts)
        after_s = now - vacancy.since
        facts |= {"after_s": after_s, "instead_of": str(vacancy.coordinator)}
        return Note(
            f"{text}, elected within {after_s:.1f} s: {vacancy.coordinator.short} {vacancy.why}", Kind.ELECTION, facts
        )

    def _fate(self, node: NodeId) -> str:
        """`is dead: no sign of life for 4.0 s`; empty if it lives."""
        known = self._known.get(node)
        if known is None or known.state.living:
            return ""
        return f"is dead: {known.reason}" if known.state is State.DEAD else f"is gone: {GOODBYE}"


def _facts(effect: StateChanged) -> dict[str, Fact]:
    return {"peer": str(effect.node), "state": str(effect.new), "reach": str(effect.reach), "reason": effect.reason}


def _away_since(before: _Known | None, effect: StateChanged, now: float) -> float:
    """Whoever is well is not away; for others the time when they were last well, if that was in this run."""
    if effect.new is State.ALIVE and effect.reach is Reach.DIRECT:
        return 0.0
    if before is None:
        return 0.0 if effect.old is None else now
    return before.away_since or (now if before.state is State.ALIVE else 0.0)


def _state_text(effect: StateChanged, away_s: float | None) -> str:
    who = effect.node.short
    if effect.new is State.LEFT:
        return f"{who} is gone: {GOODBYE}"
    if away_s is None:
        return f"{who} is {effect.new}: {effect.reason}"
    how = "in doubt" if effect.old is State.SUSPECT else "of absence"
    return f"{who} is alive again after {away_s:.1f} s {how}: {effect.reason}"
