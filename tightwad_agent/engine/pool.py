"""The coordinator side: keeps the verifier or llama-server up for the current target, over the workers of its plan."""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import trio

from tightwad_agent.engine import by_verifier
from tightwad_agent.engine.attempt import Attempt
from tightwad_agent.engine.commands import STOP, Probe, plain_epoch
from tightwad_agent.engine.process import Engine, Spawner
from tightwad_agent.engine.restart import GiveUp, Restarter, RestartPolicy
from tightwad_agent.engine.target import Loss, PoolLimits, ServedBy, TargetSpec, Tools
from tightwad_agent.engine.verifying import VerifierClient
from tightwad_agent.engine.weights_codec import Weights
from tightwad_agent.errors import TightwadError
from tightwad_agent.ids import Epoch, ModelId, NodeId
from tightwad_agent.streams import Call, OpenStream, peer_errors

log = logging.getLogger(__name__)

MAX_EVENTS = 50
POLICY = RestartPolicy(settled_s=5.0, crash_window_s=20.0)
"""What ran for five seconds is started again at once. What ends within twenty of its start five times in a row is given
up for a while; a request that takes a server down again and again is given up before that, where it came in."""


class PoolPhase(StrEnum):
    IDLE = "idle"
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"  # until `set_target`


@dataclass(frozen=True, slots=True)
class PoolEvent:
    """Something a person may ask about later; `at` in Unix seconds."""

    at: float
    text: str


@dataclass(frozen=True, slots=True)
class Back:
    """What was served was lost and is served again: at `at` (Unix seconds), `seconds` after the loss was known."""

    at: float
    seconds: float
    loss: Loss


@dataclass(frozen=True, slots=True)
class WorkerTraffic:
    """Bytes over one forwarder since the target was started: `up` is towards the worker, as the engine sent them;
    `saved` of those did not have to cross."""

    node: NodeId
    bytes_up: int
    bytes_down: int
    connections: int
    bytes_saved: int = 0


@dataclass(frozen=True, slots=True)
class PoolState:
    """A snapshot. `port`: llama-server's, `verifier`: the other way to serve; one of them, only when ready. `percent`:
    of loading, `None` where unknown. `retry_in_s`: when restarting, counted from the snapshot of the change. `engine`:
    `verifier`, `llama-server`, or empty without a target. `engine_reason`: why it is not the one that was wanted."""

    phase: PoolPhase = PoolPhase.IDLE
    text: str = "nothing to serve"
    port: int | None = None
    percent: int | None = None
    retry_in_s: float | None = None
    restarts: int = 0
    spec: TargetSpec | None = None
    verifier: VerifierClient | None = None
    engine: str = ""
    engine_reason: str = ""


class PoolService:
    """Give it a target, keep `run` running, read `state`.

    `on_change` is called after each change of `state`. `on_lost(loss)` after each loss: with `excluded` the pool waits
    for another plan, otherwise it tries the same one again after a pause. Both are called in trio's thread and may call
    `set_target` with another target. `on_back` after each time that it serves again. `in_flight` counts the requests
    that the endpoint has open; without it llama-server is watched always. `verifier` is the verifier's command line,
    given the number of its file descriptor. `weights` tells what a model's file holds.
    """

    def __init__(
        self,
        *,
        engine: Callable[[], Engine | None],
        spawner: Spawner,
        probe: Probe,
        call: Call,
        open_stream: OpenStream,
        on_lost: Callable[[Loss], None] = lambda _loss: None,
        on_change: Callable[[], None] = lambda: None,
        on_back: Callable[[Back], None] = lambda _back: None,
        in_flight: Callable[[], int] | None = None,
        weights: Callable[[ModelId], Weights | None] = lambda _model: None,
        threads: int = 0,
        stall_s: float = 60.0,
        limits: PoolLimits | None = None,
        policy: RestartPolicy | None = None,
        verifier: Callable[[int], Sequence[str]] = by_verifier.command,
    ) -> None:
        self.state = PoolState()
        self.events: deque[PoolEvent] = deque(maxlen=MAX_EVENTS)
        self._tools = Tools(
            spawner=spawner,
            probe=probe,
            call=call,
            open_stream=open_stream,
            verifier=verifier,
            weights=weights,
            threads=threads,
            stall_s=stall_s,
            in_flight=in_flight,
            limits=limits or PoolLimits(),
        )
        self._engine = engine
        self._on_lost = on_lost
        self._on_change = on_change
        self._on_back = on_back
        self.back: Back | None = None
        """The last time that it served again."""
        self._down: tuple[float, Loss] | None = None
        self._policy = policy or POLICY
        self._wanted: TargetSpec | None = None
        self._attempt: Attempt | None = None
        self._used: dict[NodeId, tuple[Epoch, int]] = {}
        self._wake = trio.Event()
        self._scope = trio.CancelScope()

    # What the agent says

    def set_target(self, spec: TargetSpec | None) -> None:
        """Serves this from now on. The same target again changes nothing, unless it failed: then it is tried anew, at
        once and without any pause, so not as an answer to `on_lost`."""
        if spec == self._wanted and self.state.phase is not PoolPhase.FAILED:
            return
        if spec is None or self._wanted is None or spec.plan.model != self._wanted.plan.model:
            self._down = None
        self._wanted = spec
        if self._attempt is not None:  # ending it takes a while, and it must not count as this target meanwhile
            self._show(self._unready(PoolPhase.STARTING, "what was served before is stopped"))
        self._wake.set()
        self._scope.cancel()

    def worker_lost(self, node: NodeId, reason: str) -> None:
        """The mesh has lost a machine. Nothing happens if it has no part in what runs."""
        attempt = self._attempt
        if attempt is not None and any(use.node == node for use in attempt.spec.plan.workers):
            attempt.lose(Loss(node, reason, from_outside=True))

    @property
    def pid(self) -> int | None:
        """The process that serves or loads."""
        return self._attempt.pid if self._attempt else None

    def traffic(self) -> tuple[WorkerTraffic, ...]:
        """Bytes over each forwarder of what runs."""
        forwarders = self._attempt.forwarders if self._attempt else []
        return tuple(WorkerTraffic(f.node, f.bytes_up, f.bytes_down, f.connections, f.bytes_saved) for f in forwarders)

    # The loop

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; then what served is gone."""
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                self._wake = trio.Event()
                spec = self._wanted
                self._release_workers(nursery, spec)
                if spec is None:
                    self._show(PoolState(restarts=self.state.restarts))
                    await self._wake.wait()
                    continue
                with trio.CancelScope() as self._scope:
                    await self._pursue(spec)
                if self._wanted is spec:  # failed: until the agent says something else
                    await self._wake.wait()

    async def _pursue(self, spec: TargetSpec) -> None:
        """Attempt after attempt; returns when it makes no sense to try this again."""
        restarter = Restarter(self._policy)
        while True:
            restarter.started(trio.current_time())
            loss = await self._try(spec)
            self._note(loss.words)
            decision = restarter.exited(trio.current_time(), loss.reason, crash=loss.crash)
            if loss.excluded or isinstance(decision, GiveUp):
                text = f"{self.state.engine} {decision.reason}" if isinstance(decision, GiveUp) else loss.words
                self._show(self._unready(PoolPhase.FAILED, text))
                self._on_lost(loss)
                return
            pause_s = max(0.0, decision.at - trio.current_time())
            state = self._unready(PoolPhase.RESTARTING, loss.words)
            self._show(replace(state, retry_in_s=pause_s, restarts=self.state.restarts + 1))
            self._on_lost(loss)
            await trio.sleep(pause_s)

    async def _try(self, spec: TargetSpec) -> Loss:
        engine = self._engine()
        restarts, served_by = self.state.restarts, str(spec.served_by)
        self._show(PoolState(PoolPhase.STARTING, "starting", restarts=restarts, spec=spec, engine=served_by))
        if engine is None:
            return Loss(None, "there is no usable engine on this machine", excluded=True)
        run_id = secrets.randbits(48)
        self._used |= {use.node: (spec.epoch, run_id) for use in spec.plan.workers}
        self._attempt = attempt = Attempt(spec, engine, self._tools, run_id, self)
        try:
            return await attempt.run()
        finally:
            self._attempt = None

    def _release_workers(self, nursery: trio.Nursery, spec: TargetSpec | None) -> None:
        """Workers that the new target does not use are told to stop; those that do not hear it stop by their lease."""
        kept = {use.node for use in spec.plan.workers} if spec else set()
        for node in [node for node in self._used if node not in kept]:
            epoch, run_id = self._used.pop(node)
            nursery.start_soon(self._release, node, epoch, run_id)

    async def _release(self, node: NodeId, epoch: Epoch, run_id: int) -> None:
        try:
            with peer_errors(self._tools.limits.stop_worker_s):
                await self._tools.call(node, STOP, {"epoch": plain_epoch(epoch), "run": run_id})
        except TightwadError as exc:
            log.info("worker %s was not told to stop: %s", node.short, exc.message)

    # What the attempt reports

    def going(self, loss: Loss) -> None:
        """From now on nobody is sent there; ending it takes a while."""
        if self.state.phase is PoolPhase.READY:
            self._down = self._down or (trio.current_time(), loss)
            self._show(self._unready(PoolPhase.RESTARTING, loss.words))

    def starting(self, text: str) -> None:
        self._show(replace(self.state, text=text))

    def fell_back(self, reason: str) -> None:
        self._note(reason)
        self._show(replace(self.state, engine=str(ServedBy.LLAMA_SERVER), engine_reason=reason))

    def loading(self, percent: int | None) -> None:
        text = "loading" if percent is None else f"loading {percent} %"
        self._show(replace(self.state, phase=PoolPhase.LOADING, text=text, percent=percent))

    def ready(self, port: int | None, verifier: VerifierClient | None) -> None:
        self._note("ready")
        state = replace(self.state, phase=PoolPhase.READY, text="ready", percent=None)
        self._show(replace(state, port=port, verifier=verifier))
        if self._down is not None:
            since, loss = self._down
            self._down, self.back = None, Back(time.time(), trio.current_time() - since, loss)
            self._on_back(self.back)

    # State

    def _unready(self, phase: PoolPhase, text: str) -> PoolState:
        return replace(self.state, phase=phase, text=text, port=None, verifier=None, percent=None)

    def _note(self, text: str) -> None:
        log.info("the pool: %s", text)
        self.events.append(PoolEvent(time.time(), text))

    def _show(self, state: PoolState) -> None:
        if state != self.state:
            self.state = state
            self._on_change()
