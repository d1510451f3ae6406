"""The worker side: one `ggml-rpc-server` on loopback for the coordinator of the newest epoch, and for nobody else."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tightwad_agent.engine import weights_codec
from tightwad_agent.engine.argv import LOOPBACK, worker_argv
from tightwad_agent.engine.commands import (
    RPC,
    START,
    STOP,
    Probe,
    Started,
    StartWorker,
    epoch_of,
    graphs_of,
    model_of,
    weights_of,
)
from tightwad_agent.engine.frozen import FROZEN_S, frozen, is_stopped
from tightwad_agent.engine.graph_codec import VERSION, GraphDecoder
from tightwad_agent.engine.leased import Attend, Lease, Phase, until_exit
from tightwad_agent.engine.process import Child, Engine, Spawner, free_port, listens
from tightwad_agent.engine.restart import RestartPolicy
from tightwad_agent.engine.rpc_answers import Answers
from tightwad_agent.engine.weights_file import Checked, Identity, WeightsFile, identity_of
from tightwad_agent.errors import (
    EngineMismatch,
    EngineMissing,
    PeerRefused,
    ProtocolError,
    TightwadError,
    WeightsDiffer,
)
from tightwad_agent.filters import Filter
from tightwad_agent.ids import NO_EPOCH, Epoch, ModelId, NodeId
from tightwad_agent.streams import MethodHandler, StreamHandler
from tightwad_agent.tunnel import join, uncounted

log = logging.getLogger(__name__)

PROBE_S = 2.0
_RETRY_S = 0.05

WorkerPhase = Phase


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What the worker on this node does, for status. `problem` says in words why it last ended or failed."""

    phase: WorkerPhase = WorkerPhase.IDLE
    devices: tuple[str, ...] = ()
    epoch: Epoch = NO_EPOCH
    pid: int | None = None
    restarts: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """Seconds. `start_s`: a start is answered after that at the latest; `hello_s`: a process that listens answers HELLO
    within it; `lease_s`: a worker that no current coordinator has used for so long is stopped; `frozen_s`: one that was
    stopped by a signal (SIGSTOP) for so long is ended, so that the coordinator hears of it."""

    start_s: float = 20.0
    hello_s: float = 15.0
    connect_s: float = 5.0
    lease_s: float = 60.0
    frozen_s: float = FROZEN_S
    max_streams: int = 8


class WorkerService:
    """Register `methods` and `streams` with the mesh, and keep `run` running.

    `engine` gives the build to use or `None`, `offered` the devices that may be used, `accepts` whether a node is the
    coordinator of an epoch. `on_change` is called after each change of `state`. `path_of` gives the file of a model
    that is here whole: weights that it holds need not be sent. `on_differs` hears of a file that holds something else.
    """

    def __init__(
        self,
        *,
        engine: Callable[[], Engine | None],
        spawner: Spawner,
        probe: Probe,
        accepts: Callable[[Epoch, NodeId], bool],
        offered: Callable[[], Sequence[str]],
        threads: int = 0,
        on_change: Callable[[], None] = lambda: None,
        path_of: Callable[[ModelId], Path | None] = lambda _model: None,
        on_differs: Callable[[ModelId, str], None] = lambda _model, _why: None,
        limits: WorkerLimits | None = None,
        policy: RestartPolicy | None = None,
    ) -> None:
        self.methods: dict[str, MethodHandler] = {START: self._start, STOP: self._stop}
        self.streams: dict[str, StreamHandler] = {RPC: self._rpc}
        self._engine = engine
        self._spawner = spawner
        self._probe = probe
        self._offered = offered
        self._threads = threads
        self._limits = limits or WorkerLimits()
        self._path_of = path_of
        self._on_differs = on_differs
        self._checked = Checked()
        self._differing: set[Identity] = set()
        self._port: int | None = None
        self._lease: Lease[StartWorker, Started] = Lease(
            "the worker",
            self._once,
            accepts=accepts,
            on_change=on_change,
            lease_s=self._limits.lease_s,
            policy=policy or RestartPolicy(),
        )

    @property
    def state(self) -> WorkerState:
        now = self._lease.state
        devices, epoch = (now.order.devices, now.order.epoch) if now.order else ((), NO_EPOCH)
        return WorkerState(now.phase, devices, epoch, now.pid, now.restarts, now.problem)

    def release(self) -> None:
        """Nobody uses it any more: a coordinator has no use for a worker of its own."""
        self._lease.stop()

    # Commands

    async def _start(self, peer: NodeId, params: dict[str, Any]) -> dict[str, Any]:
        order = StartWorker.of_params(params)
        self._lease.obey(order.epoch, peer)
        offered = self._offered()
        if foreign := [name for name in order.devices if name not in offered]:
            raise PeerRefused(f"device {foreign[0]!r} is not offered here; offered: {', '.join(offered) or 'none'}")
        return (await self._lease.start(order, self._limits.start_s)).to_plain()

    async def _stop(self, peer: NodeId, params: dict[str, Any]) -> dict[str, Any]:
        self._lease.obey(epoch_of(params), peer)
        self._lease.stop(params.get("run"))
        await trio.lowlevel.checkpoint()
        return {}

    # The stream service

    async def _rpc(self, peer: NodeId, stream: trio.abc.Stream, args: dict[str, Any]) -> None:
        self._lease.check(epoch_of(args), peer)
        with self._filtered(args, _decoder(graphs_of(args))) as to_worker:
            await self._join(stream, to_worker)

    @contextmanager
    def _filtered(self, args: dict[str, Any], graphs: Filter) -> Iterator[Filter]:
        """What a stream with these arguments is changed with."""
        weights, model = weights_of(args), model_of(args)
        if not weights:
            yield graphs
            return
        path = self._file(model)
        if weights != weights_codec.VERSION or path is None:
            raise ProtocolError(f"weights codec {weights} for model {model[:12] or 'none'}, which was not offered")
        try:
            with WeightsFile(path, self._checked, graphs) as file:
                yield file
        except WeightsDiffer as exc:
            self._differing.add(identity_of(path))
            self._on_differs(ModelId(model), exc.message)
            raise
        except OSError as exc:
            raise PeerRefused(f"{path} cannot be read: {exc.strerror}") from None

    def _file(self, model: str) -> Path | None:
        """The file whose weights need not be sent."""
        path = self._path_of(ModelId(model)) if model and hasattr(os, "pread") else None
        try:
            return path if path and identity_of(path) not in self._differing else None
        except OSError:
            return None

    async def _join(self, stream: trio.abc.Stream, to_worker: Filter) -> None:
        if self._port is None or not self._lease.is_ready:
            raise PeerRefused(f"the worker is {self.state.phase}")
        with self._lease.used(self._limits.max_streams):
            try:
                with trio.fail_after(self._limits.connect_s):
                    local = await trio.open_tcp_stream(LOOPBACK, self._port)
                await join(stream, local, uncounted, uncounted, to_right=to_worker, to_left=Answers())
            except (OSError, trio.TooSlowError):
                raise PeerRefused("the worker does not accept connections") from None

    # The process

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; then the process is gone."""
        await self._lease.run(task_status=task_status)

    async def _once(self, order: StartWorker, attend: Attend[Started]) -> str:
        """One process from its start to its end; how it ended."""
        engine = self._engine()
        if engine is None:
            raise EngineMissing("no usable engine on this machine")
        port = await free_port()
        argv = worker_argv(engine.worker, port=port, devices=order.devices, threads=self._threads)
        async with self._spawner.running("ggml-rpc-server", argv, grace_s=0) as child:  # it has nothing to save
            async with trio.open_nursery() as nursery:
                nursery.start_soon(until_exit, child, nursery.cancel_scope)
                nursery.start_soon(self._until_frozen, child, nursery.cancel_scope)
                protocol = await self._hello(child, port)
                if protocol is not None:
                    weights = weights_codec.VERSION if self._file(order.model) else 0
                    await self._open(port, attend, Started(protocol, engine.digest, VERSION, weights), child)
                nursery.cancel_scope.cancel()
            ended, stopped = child.code is not None, is_stopped(child.pid)
        if stopped:
            return "ggml-rpc-server was stopped (SIGSTOP) and did not go on"
        return child.told() if ended else f"the worker did not answer HELLO within {self._limits.hello_s:g} s"

    async def _until_frozen(self, child: Child, scope: trio.CancelScope) -> None:
        await frozen(child.pid, self._limits.frozen_s)
        scope.cancel()

    async def _open(self, port: int, attend: Attend[Started], started: Started, child: Child) -> None:
        self._port = port
        try:
            await attend(started, child)
        finally:
            self._port = None

    async def _hello(self, child: Child, port: int) -> str | None:
        """The protocol in its answer. Nobody is asked who is not our child: it may not have got the port."""
        with trio.move_on_after(self._limits.hello_s):
            while True:
                if not await listens(child.pid, port):
                    await trio.sleep(_RETRY_S)
                    continue
                try:
                    version = await self._probe(port, deadline_s=PROBE_S)
                except EngineMismatch:
                    return "unknown"  # the coordinator draws its conclusion
                except TightwadError:
                    await trio.sleep(_RETRY_S)
                else:
                    return ".".join(map(str, version))
        return None


def _decoder(graphs: int) -> Filter:
    """For a stream opened with this graph codec. Raises `ProtocolError` for one that was not offered."""
    if graphs not in (0, VERSION):
        raise ProtocolError(f"graph codec {graphs}; version {VERSION} was offered")
    return GraphDecoder() if graphs else Filter()
