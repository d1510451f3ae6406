"""Which machine is disturbed how, when, and for how long: `scripts/soak`'s plan and its log. Pure but for `Strikes`.

The plan follows from a seed alone. At any time at least `MIN_CALM` machines are not disturbed, so that there always is
somebody to carry on; a machine that was disturbed is left alone for a while, so that it can come back.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import psutil
from failover_lab import VERIFIER, WORKER, Cluster
from lab import Agent, LabError

MIN_CALM = 2
REST_S = 20.0
GAP_S = (4.0, 16.0)
LAST_S = {"kill": (1.0, 8.0), "stall": (1.0, 12.0), "cut": (1.0, 12.0), "child": (0.0, 0.0)}
"""How long each lasts: until the agent is started again, until it goes on, until the cable is back."""


class Fault(StrEnum):
    """KILL the agent, STALL its whole machine, CUT its cable silently, or kill a CHILD of it: worker or verifier."""

    KILL = "kill"
    STALL = "stall"
    CUT = "cut"
    CHILD = "child"


@dataclass(frozen=True, slots=True)
class Disturbance:
    """`at_s` and `until_s` from the beginning; `machine` by its index."""

    at_s: float
    until_s: float
    machine: int
    fault: Fault


def plan(seed: int, n_machines: int, seconds: float, faults: Sequence[Fault] = tuple(Fault)) -> list[Disturbance]:
    """All that happens, in its order; all of it is over at `seconds`. `ValueError` with fewer machines than must stay
    calm, and one more."""
    if n_machines <= MIN_CALM:
        raise ValueError(f"with {n_machines} machines none may be disturbed: {MIN_CALM} must stay calm")
    rng = random.Random(seed)
    made: list[Disturbance] = []
    rests_until = [0.0] * n_machines
    at = rng.uniform(*GAP_S)
    while at < seconds:
        fault = rng.choice(list(faults))
        until = at + rng.uniform(*LAST_S[fault])
        free = [i for i, rest in enumerate(rests_until) if rest <= at]
        disturbed = sum(d.at_s <= at < d.until_s + REST_S / 2 for d in made)
        if free and disturbed < n_machines - MIN_CALM and until <= seconds:
            machine = rng.choice(free)
            made.append(Disturbance(round(at, 2), round(until, 2), machine, fault))
            rests_until[machine] = until + REST_S
        at += rng.uniform(*GAP_S)
    return made


class Strikes:
    """Carries the plan out on a cluster."""

    def __init__(self, cluster: Cluster, rng: random.Random) -> None:
        self._cluster = cluster
        self._rng = rng

    def begin(self, what: Disturbance) -> str:
        """Does it; in words, what was done."""
        agent = self._cluster.agents[what.machine]
        match what.fault:
            case Fault.KILL:
                self._cluster.kill(agent)
                return f"{agent.name} killed"
            case Fault.STALL:
                self._cluster.stop(agent)
                return f"{agent.name} stopped"
            case Fault.CUT:
                self._cluster.cut(agent)
                return f"{agent.name} cut off"
            case Fault.CHILD:
                return self._kill_a_child(agent)

    def end(self, what: Disturbance) -> str:
        """Takes it back; in words."""
        agent = self._cluster.agents[what.machine]
        match what.fault:
            case Fault.KILL:
                self._cluster.revive(agent)
                return f"{agent.name} started again"
            case Fault.STALL:
                self._cluster.go_on(agent)
                return f"{agent.name} goes on"
            case Fault.CUT:
                self._cluster.mend(agent)
                return f"{agent.name} is back on the network"
            case Fault.CHILD:
                return ""

    def _kill_a_child(self, agent: Agent) -> str:
        found = [*self._cluster.children(agent, WORKER), *self._cluster.children(agent, VERIFIER)]
        if not found:
            return f"{agent.name} has no child to kill"
        child = self._rng.choice(found)
        with contextlib.suppress(psutil.Error):
            name = child.name()
            child.kill()
            return f"{agent.name}'s {name} killed"
        return f"{agent.name}'s child was gone already"


def end_all(cluster: Cluster) -> None:
    """As if nothing had happened: cables, stopped machines, killed agents. Raises `LabError`."""
    cluster.heal()
    for agent in cluster.agents:
        cluster.go_on(agent)
        if agent.process is None:
            raise LabError(f"{agent.name} was never started")
        if agent.process.poll() is not None:
            cluster.revive(agent)
