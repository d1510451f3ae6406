"""Which of a node's addresses to use: measured in rounds, changed with hysteresis. Pure.

An address is compared with others of the same round only, so that a busy machine slows all of them alike. A better one
is used after it was better twice; one that broke is left at once, and trusted again later each time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tightwad_agent.ids import Address, NodeId

MAX_NODES: Final = 256
MAX_PATHS: Final = 8
"""Addresses of one node that are measured; it may announce more."""
FIRST_S: Final = 1.0
QUICK_S: Final = 2.0
"""Between rounds while something is new or undecided."""
N_QUICK: Final = 3
SETTLED_S: Final = 15.0
LONGEST_S: Final = 60.0
GOOD_S: Final = 2 * LONGEST_S
"""How long a measured address counts as one that works."""
WEIGHT_BYTES: Final = 256 << 10
"""What an address costs is the time for an answer and so many bytes."""
MARGIN: Final = 0.7
"""A better address costs at most so much of the other one."""
MARGIN_RTT: Final = 0.5
"""The same where a rate is not known."""
MARGIN_S: Final = 0.0003
RATE_AGE_S: Final = 600.0
HOLD_S: Final = 10.0
MAX_HOLD_S: Final = 600.0
"""After a change for speed no other for so long; twice as long each time."""
DISTRUST_S: Final = 5.0
MAX_DISTRUST_S: Final = 300.0
URGENT_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: seconds of a round trip, bytes a second where that was measured."""

    rtt_s: float
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class Offered:
    """What the node announces now, best guess first."""

    node: NodeId
    addresses: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class Linked:
    """A control link is up. `address`: where this side dialled, or the announced one that the peer came from."""

    node: NodeId
    address: Address | None
    outgoing: bool


@dataclass(frozen=True, slots=True)
class Unlinked:
    node: NodeId


@dataclass(frozen=True, slots=True)
class Silent:
    """The link is up and has been silent for longer than it should be; said again while it is so."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Broken:
    """An address certainly leads nowhere now; `why` completes "because"."""

    node: NodeId
    address: Address
    why: str


@dataclass(frozen=True, slots=True)
class Measured:
    """A round is over; None for no answer. `silent`: the link is, still."""

    node: NodeId
    results: dict[Address, Sample | None]
    urgent: bool
    silent: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    pass


Event = Offered | Linked | Unlinked | Silent | Broken | Measured | Tick


@dataclass(frozen=True, slots=True)
class Measure:
    """Measure these, one after another, and say so with `Measured`; `rates` of them only if the machine is idle.

    `urgent`: side by side, quickly; the link is silent.
    """

    node: NodeId
    addresses: tuple[Address, ...]
    rates: frozenset[Address] = frozenset()
    urgent: bool = False


@dataclass(frozen=True, slots=True)
class Use:
    """Use this address from now on. `broken`: the one before does not work."""

    node: NodeId
    address: Address
    before: Address | None
    why: str
    broken: bool


Effect = Measure | Use


@dataclass(frozen=True, slots=True)
class PathView:
    """One address as people see it. `works`: None if it was not tried."""

    address: Address
    in_use: bool
    rtt_s: float | None
    rate: float | None
    works: bool | None


@dataclass(slots=True)
class _Path:
    address: Address
    rtts: deque[float] = field(default_factory=lambda: deque(maxlen=3))
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=2))
    rated_at: deque[float] = field(default_factory=lambda: deque(maxlen=2))
    works: bool | None = None
    n_failed: int = 0
    retry_at: float = -math.inf
    measured_at: float = -math.inf
    n_breaks: int = 0
    broke_at: float = -math.inf
    trusted_at: float = -math.inf
    why: str = ""
    """It broke."""

    @property
    def rtt_s(self) -> float | None:
        return min(self.rtts, default=None)

    @property
    def rate(self) -> float | None:
        return max(self.rates, default=None)

    def take(self, sample: Sample | None, now: float) -> None:
        if sample is None:
            self.n_failed += 1
            self.works = self.works if self.n_failed < 2 else False
            self.retry_at = now + min(RATE_AGE_S, QUICK_S * 2.0 ** min(self.n_failed, 16))
            return
        self.works, self.n_failed, self.measured_at, self.retry_at = True, 0, now, -math.inf
        self.rtts.append(sample.rtt_s)
        if sample.rate is not None:
            self.rates.append(sample.rate)
            self.rated_at.append(now)

    def broke(self, now: float, why: str) -> None:
        self.n_breaks = self.n_breaks + 1 if now - self.broke_at < RATE_AGE_S else 1
        self.works, self.broke_at, self.why = False, now, why
        self.trusted_at = now + min(MAX_DISTRUST_S, DISTRUST_S * 2.0 ** (self.n_breaks - 1))

    def wants_rate(self, now: float, n: int) -> bool:
        return sum(now - at < RATE_AGE_S for at in self.rated_at) < n


@dataclass(slots=True)
class _Node:
    paths: dict[Address, _Path] = field(default_factory=dict)
    offered: tuple[Address, ...] = ()
    linked: bool = False
    use: Address | None = None
    rival: Address | None = None
    measuring: bool = False
    urgent: bool = False
    urgent_at: float = -math.inf
    due: float = math.inf
    n_rounds: int = 0
    hold_until: float = -math.inf
    hold_s: float = HOLD_S
    changed_at: float = -math.inf

    @property
    def current(self) -> _Path | None:
        return self.paths.get(self.use) if self.use else None


class Paths:
    """The addresses of all nodes, and which one is in use."""

    def __init__(self) -> None:
        self._nodes: dict[NodeId, _Node] = {}
        self._effects: list[Effect] = []

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Takes one event; the effects are to be carried out in order."""
        self._effects = []
        _HANDLERS[type(event)](self, event, now)
        return self._effects

    def next_deadline(self) -> float | None:
        """When `Tick` is due."""
        return min((n.due for n in self._nodes.values() if n.due < math.inf), default=None)

    def in_use(self, node: NodeId) -> Address | None:
        state = self._nodes.get(node)
        return state.use if state else None

    def works(self, node: NodeId, now: float) -> bool:
        """Whether the address in use was found to work lately."""
        state = self._nodes.get(node)
        path = state.current if state else None
        return path is not None and bool(path.works) and now - path.measured_at < GOOD_S

    def order(self, node: NodeId, candidates: Sequence[Address]) -> list[Address]:
        """The address in use, those that work by cost, those not tried, those that failed; else as it was."""
        state = self._nodes.get(node)
        if state is None:
            return list(candidates)

        def rank(address: Address) -> tuple[int, float]:
            path = state.paths.get(address)
            if path is None or path.works is None:
                return (0 if address == state.use else 2, 0.0)
            if not path.works:
                return (3, 0.0)
            return (0 if address == state.use else 1, _cost(path))

        return sorted(candidates, key=rank)

    def views(self, node: NodeId) -> tuple[PathView, ...]:
        """All addresses that are known to this machine, the one in use first."""
        state = self._nodes.get(node)
        if state is None:
            return ()
        known = sorted(state.paths.values(), key=lambda p: p.address != state.use)
        return tuple(PathView(p.address, p.address == state.use, p.rtt_s, p.rate, p.works) for p in known)

    # Events

    def _on_offered(self, event: Offered, now: float) -> None:
        state = self._state(event.node)
        if state is None:
            return
        gone = [a for a in state.offered if a not in event.addresses]
        state.offered = event.addresses[:MAX_PATHS]
        new = [a for a in state.offered if a not in state.paths]
        if state.use in gone:
            self._on_broken(Broken(event.node, state.use, "it is not there any more"), now)
        keep = {*state.offered, state.use}
        state.paths = {a: p for a, p in state.paths.items() if a in keep}
        for address in new:
            state.paths[address] = _Path(address)
        returned = [p for a in state.offered if (p := state.paths[a]).works is False]
        if new or returned:
            self._soon(state, now + FIRST_S)

    def _on_linked(self, event: Linked, now: float) -> None:
        state = self._state(event.node)
        if state is None:
            return
        state.linked = True
        self._soon(state, now + FIRST_S)
        if event.address is None:
            return
        path = state.paths.setdefault(event.address, _Path(event.address))
        if event.outgoing and state.use != event.address:
            self._use(event.node, state, path, "the link was made over it", now, broken=True)
        elif state.use is None:
            state.use = event.address

    def _on_unlinked(self, event: Unlinked, _now: float) -> None:
        if state := self._nodes.get(event.node):
            state.linked = False
            state.due = math.inf

    def _on_silent(self, event: Silent, now: float) -> None:
        state = self._nodes.get(event.node)
        if state is None or not state.linked or state.urgent or now - state.urgent_at < URGENT_S:
            return
        self._ask_others(event.node, state, now)

    def _on_broken(self, event: Broken, now: float) -> None:
        state = self._nodes.get(event.node)
        path = state.paths.get(event.address) if state else None
        if state is None or path is None:
            return
        path.broke(now, f"{event.address} broke: {event.why}")
        if state.use != event.address:
            return
        best = self._best(state, now)
        if best is not None:
            self._use(event.node, state, best, path.why, now, broken=True)
        else:
            self._ask_others(event.node, state, now)

    def _ask_others(self, node: NodeId, state: _Node, now: float) -> None:
        others = tuple(a for a in state.paths if a != state.use)
        if others:
            state.urgent, state.urgent_at = True, now
            self._effects.append(Measure(node, others, urgent=True))

    def _on_measured(self, event: Measured, now: float) -> None:
        state = self._nodes.get(event.node)
        if state is None:
            return
        for address, sample in event.results.items():
            if (path := state.paths.get(address)) and not (event.urgent and sample is None):
                path.take(sample, now)
        if event.urgent:
            state.urgent = False
            self._rescue(event, state, now)
            return
        state.measuring = False
        state.n_rounds += 1
        self._decide(event.node, state, now)
        state.due = now + self._pause(state, now) if state.linked else math.inf

    def _rescue(self, event: Measured, state: _Node, now: float) -> None:
        current = state.current
        if not event.silent and (current is None or current.works is not False):
            return
        answered = [state.paths[a] for a, sample in event.results.items() if sample and a in state.paths]
        if not answered:
            return
        why = "the link is silent"
        if current is not None:
            if current.works is not False:
                current.broke(now, f"{current.address} is silent")
            why = current.why or f"{current.address} does not answer"
        self._use(event.node, state, min(answered, key=_cost), why, now, broken=True)

    def _on_tick(self, _event: Tick, now: float) -> None:
        for node, state in self._nodes.items():
            if state.due <= now:
                state.due = math.inf
                self._measure(node, state, now)

    # Rounds

    def _soon(self, state: _Node, at: float) -> None:
        state.n_rounds = 0
        if state.linked and not state.measuring:
            state.due = min(state.due, at)

    def _measure(self, node: NodeId, state: _Node, now: float) -> None:
        due = (p for p in state.paths.values() if p.retry_at <= now or p.address == state.use)
        todo = tuple(p.address for p in due)
        if not todo:
            state.due = now + SETTLED_S if state.paths else math.inf
            return
        asked = {state.use, state.rival} if state.rival else set()
        rates = frozenset(a for a in todo if state.paths[a].wants_rate(now, 2 if a in asked else 1))
        state.measuring = True
        self._effects.append(Measure(node, todo, rates))

    def _pause(self, state: _Node, now: float) -> float:
        if len(state.paths) < 2 and all(p.rates for p in state.paths.values()):
            return math.inf
        if len(state.paths) > 1 and (state.rival or state.n_rounds < N_QUICK):
            return QUICK_S
        waiting = [p.trusted_at - now for p in state.paths.values() if p.trusted_at > now]
        settled = min(LONGEST_S, SETTLED_S * 2.0 ** min(8, max(0, state.n_rounds - N_QUICK)))
        return max(QUICK_S, min([settled, *waiting]))

    def _decide(self, node: NodeId, state: _Node, now: float) -> None:
        best, current = self._best(state, now), state.current
        rival, state.rival = state.rival, None
        if best is None or best is current:
            return
        if current is None or current.works is False:
            why = f"{state.use} does not answer" if state.use else "it answers"
            self._use(node, state, best, why, now, broken=True)
        elif current.works and clearly_better(best, current):
            state.rival = best.address
            if rival == best.address and now >= state.hold_until:
                self._use(node, state, best, "it is faster", now, broken=False)

    def _best(self, state: _Node, now: float) -> _Path | None:
        usable = [p for p in state.paths.values() if p.works and p.trusted_at <= now]
        rated = all(p.rate for p in usable)
        return min(usable, key=_cost if rated else _rtt, default=None)

    def _use(self, node: NodeId, state: _Node, path: _Path, why: str, now: float, *, broken: bool) -> None:
        before, state.use, state.rival = state.use, path.address, None
        self._soon(state, now + FIRST_S)
        if before is None:
            return
        if not broken:
            state.hold_s = min(MAX_HOLD_S, 2 * state.hold_s) if now - state.changed_at < MAX_HOLD_S else HOLD_S
            state.hold_until, state.changed_at = now + state.hold_s, now
        self._effects.append(Use(node, path.address, before, why, broken))

    def _state(self, node: NodeId) -> _Node | None:
        state = self._nodes.get(node)
        if state is None and (len(self._nodes) < MAX_NODES or self._drop_one()):
            state = self._nodes[node] = _Node()
        return state

    def _drop_one(self) -> bool:
        idle = next((n for n, s in self._nodes.items() if not s.linked), None)
        if idle is not None:
            del self._nodes[idle]
        return idle is not None


def clearly_better(a: _Path, b: _Path) -> bool:
    """Whether `a`, measured as `b` was, is worth a change."""
    if a.rate and b.rate:
        return _cost(a) < MARGIN * _cost(b) and _cost(b) - _cost(a) > MARGIN_S
    return _rtt(a) < MARGIN_RTT * _rtt(b) and _rtt(b) - _rtt(a) > MARGIN_S


def _rtt(path: _Path) -> float:
    return min(path.rtts, default=math.inf)


def _cost(path: _Path) -> float:
    return _rtt(path) + (WEIGHT_BYTES / path.rate if path.rate else 0.0)


_HANDLERS: Final[dict[type, Callable[[Paths, Any, float], None]]] = {
    Offered: Paths._on_offered,
    Linked: Paths._on_linked,
    Unlinked: Paths._on_unlinked,
    Silent: Paths._on_silent,
    Broken: Paths._on_broken,
    Measured: Paths._on_measured,
    Tick: Paths._on_tick,
}
