"""One child process that a coordinator orders: fenced by epochs, started again when it ends, stopped when unused.

What the child is, and what it must show before it counts as ready, its owner says in one function; the rest is here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

import trio

from tightwad_agent.engine.process import Child
from tightwad_agent.engine.restart import GiveUp, Restarter, RestartPolicy
from tightwad_agent.errors import EngineError, PeerRefused, StaleEpoch, TightwadError
from tightwad_agent.ids import NO_EPOCH, Epoch, NodeId

log = logging.getLogger(__name__)

_LEASE_CHECKS = 6


class Phase(StrEnum):
    IDLE = "idle"
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"


class Order(Protocol):
    """What a coordinator asked for. Equal orders are one process; `run` names one attempt of the coordinator."""

    @property
    def epoch(self) -> Epoch: ...

    @property
    def run(self) -> int: ...


O = TypeVar("O", bound=Order)  # noqa: E741 - the usual letter
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class LeaseState(Generic[O]):
    """`problem` says in words why the process last ended or failed."""

    phase: Phase = Phase.IDLE
    order: O | None = None
    pid: int | None = None
    restarts: int = 0
    problem: str = ""


@dataclass(eq=False)
class _Job(Generic[O, R]):
    """One process that was asked for. `settled`: it is ready, or will not be."""

    order: O
    settled: trio.Event = field(default_factory=trio.Event)
    ready: R | None = None


Attend = Callable[[R, Child], Awaitable[None]]
"""Called once the child is ready, with what the coordinator is to be answered. Returns when the lease is over."""

Once = Callable[[O, Attend[R]], Awaitable[str]]
"""One process from its start to its end: calls `Attend` while it is ready, and says how it ended. Raises a
`TightwadError` if it could not be started."""


class Lease(Generic[O, R]):
    """Keep `run` running. `what` names the child in messages; `accepts` says whether a node is the coordinator of an
    epoch; `on_change` is called after each change of `state`. `lease_s`: a child that no current coordinator has used
    for so long is stopped."""

    def __init__(
        self,
        what: str,
        once: Once[O, R],
        *,
        accepts: Callable[[Epoch, NodeId], bool],
        on_change: Callable[[], None],
        lease_s: float,
        policy: RestartPolicy,
    ) -> None:
        self.state: LeaseState[O] = LeaseState()
        self.users = 0
        self._what = what
        self._once = once
        self._accepts = accepts
        self._on_change = on_change
        self._lease_s = lease_s
        self._policy = policy
        self._obeyed = NO_EPOCH
        self._job: _Job[O, R] | None = None
        self._last_used = 0.0
        self._wake = trio.Event()
        self._scope = trio.CancelScope()

    # Commands

    def obey(self, epoch: Epoch, peer: NodeId) -> None:
        """Raises unless `peer` may command in `epoch`; from then on nothing older is obeyed."""
        if epoch < self._obeyed:
            raise StaleEpoch(f"epoch {epoch} is over, {self._obeyed} is obeyed here")
        if epoch.node != peer or not self._accepts(epoch, peer):
            raise PeerRefused(f"{peer.short} is not the coordinator of epoch {epoch}")
        self._obeyed = epoch

    async def start(self, order: O, within_s: float) -> R:
        """The running process of an order that may be obeyed. Another order than the current one replaces the process;
        one that failed is tried anew. Raises a `TightwadError` if it is not ready in time."""
        job = self._job
        if job is None or job.order != order or self.state.phase is Phase.FAILED:
            job = _Job(order)
            self._replace(job)
        with trio.move_on_after(within_s):
            await job.settled.wait()
        if job is not self._job:
            raise StaleEpoch("another start or a stop came in between")
        if job.ready is None:
            raise EngineError(f"{self._what} did not start: {self.state.problem or 'it is not ready yet'}")
        return job.ready

    @property
    def is_ready(self) -> bool:
        """Whether the process of the current order runs and may be used."""
        return self._job is not None and self._job.ready is not None

    def stop(self, run: object = None) -> None:
        """Ends the process, unless it is about another run."""
        if self._job is not None and (run is None or run == self._job.order.run):
            self._replace(None)

    def check(self, epoch: Epoch, peer: NodeId) -> O:
        """The order that is carried out for this coordinator. Raises `StaleEpoch` if there is none."""
        if self._job is None or self._job.order.epoch != epoch or epoch.node != peer:
            raise StaleEpoch(f"{self._what} does not run here for epoch {epoch} of {peer.short}")
        return self._job.order

    @contextmanager
    def used(self, max_users: int) -> Iterator[None]:
        """For the length of the block the child is in use. Raises `PeerRefused` if it has enough users."""
        if self.users >= max_users:
            raise PeerRefused(f"{self.users} connections to {self._what} are open")
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            self._last_used = trio.current_time()

    def _replace(self, job: _Job[O, R] | None) -> None:
        if self._job is not None:
            self._job.settled.set()
        self._job = job
        self._wake.set()
        self._scope.cancel()

    # The process

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; then the process is gone."""
        task_status.started()
        while True:
            self._wake = trio.Event()
            job = self._job
            if job is None:
                self._show(LeaseState(restarts=self.state.restarts, problem=self.state.problem))
                await self._wake.wait()
                continue
            with trio.CancelScope() as self._scope:
                await self._keep(job)
            if job is self._job:  # given up: a new start is needed
                await self._wake.wait()

    async def _keep(self, job: _Job[O, R]) -> None:
        """Runs the job's process, and runs it again, until that makes no sense any more."""
        restarter = Restarter(self._policy)
        while True:
            self._show(self._state_of(job, Phase.STARTING))
            restarter.started(trio.current_time())
            why = await self._how_it_ended(job)
            job.ready = None
            if job is not self._job:
                return
            if job.settled.is_set():
                job.settled = trio.Event()
            decision = restarter.exited(trio.current_time(), why)
            log.warning("%s: %s", self._what, why)
            if isinstance(decision, GiveUp):
                self._show(self._state_of(job, Phase.FAILED, problem=decision.reason))
                job.settled.set()
                return
            self._show(self._state_of(job, Phase.RESTARTING, problem=why))
            await trio.sleep_until(decision.at)

    async def _how_it_ended(self, job: _Job[O, R]) -> str:
        async def attend(ready: R, child: Child) -> None:
            await self._attend(job, ready, child)

        try:
            return await self._once(job.order, attend)
        except TightwadError as exc:
            return exc.message

    async def _attend(self, job: _Job[O, R], ready: R, child: Child) -> None:
        """Ready, for as long as the lease is used."""
        self._last_used = trio.current_time()
        job.ready = ready
        self._show(self._state_of(job, Phase.READY, pid=child.pid))
        job.settled.set()
        await self._unused(job)
        if job is self._job:
            self._replace(None)
            await trio.lowlevel.checkpoint()

    async def _unused(self, job: _Job[O, R]) -> None:
        """Returns when no coordinator that is one has used the child for the length of the lease."""
        epoch = job.order.epoch
        while trio.current_time() < self._last_used + self._lease_s:
            await trio.sleep(self._lease_s / _LEASE_CHECKS)
            if self.users and self._accepts(epoch, NodeId(epoch.node)):
                self._last_used = trio.current_time()
        log.info("%s was not used for %g s and is stopped", self._what, self._lease_s)

    # State

    def _state_of(
        self, job: _Job[O, R], phase: Phase, *, pid: int | None = None, problem: str | None = None
    ) -> LeaseState[O]:
        return LeaseState(
            phase=phase,
            order=job.order,
            pid=pid,
            restarts=self.state.restarts + (phase is Phase.RESTARTING),
            problem=self.state.problem if problem is None else problem,
        )

    def _show(self, state: LeaseState[O]) -> None:
        if state != self.state:
            self.state = state
            self._on_change()


async def until_exit(child: Child, scope: trio.CancelScope) -> None:
    """Cancels `scope` when the child ends."""
    await child.wait()
    scope.cancel()
