"""The drafting side, on every node: one llama-server with a small model on loopback, for the coordinator of the newest
epoch, which is answered token by token on its `draft` stream."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tightwad_agent.engine.argv import draft_argv
from tightwad_agent.engine.commands import (
    DRAFT,
    START_DRAFTER,
    STOP_DRAFTER,
    DrafterStarted,
    StartDrafter,
    epoch_of,
)
from tightwad_agent.engine.draft_desk import DraftDesk
from tightwad_agent.engine.draft_server import Broken, DraftServer
from tightwad_agent.engine.leased import Attend, Lease, Phase, until_exit
from tightwad_agent.engine.process import Child, Engine, Spawner, free_port, listens
from tightwad_agent.engine.restart import RestartPolicy
from tightwad_agent.errors import EngineError, EngineMissing, NotReady, PeerRefused, UnknownModel
from tightwad_agent.ids import NO_EPOCH, Epoch, ModelId, NodeId
from tightwad_agent.streams import MethodHandler, StreamHandler
from tightwad_agent.wire.draft import Hello

log = logging.getLogger(__name__)

_RETRY_S = 0.05
_ASK_S = 5.0
_DYING_S = 0.2


@dataclass(frozen=True, slots=True)
class DrafterState:
    """What the drafter on this node does, for status. `problem` says in words why it last ended or failed."""

    phase: Phase = Phase.IDLE
    model: str = ""
    epoch: Epoch = NO_EPOCH
    pid: int | None = None
    restarts: int = 0
    problem: str = ""
    sessions: int = 0
    tokens_per_s: float = 0.0
    """Of one session, as measured; 0 until known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterLimits:
    """Seconds. `start_s`: a start is answered after that at the latest, ready or not; `load_s`: a server that is not
    ready then is replaced; `lease_s`: one that no current coordinator has used for so long is stopped."""

    start_s: float = 20.0
    load_s: float = 600.0
    lease_s: float = 60.0
    max_streams: int = 4


class DrafterService:
    """Register `methods` and `streams` with the mesh, and keep `run` running.

    `engine` gives the build to use or `None`, `path_of` the file of a model that is here, `devices` what the draft
    model may use (none: the CPU), `accepts` whether a node is the coordinator of an epoch. `on_change` is called after
    each change of phase.
    """

    def __init__(
        self,
        *,
        engine: Callable[[], Engine | None],
        spawner: Spawner,
        path_of: Callable[[ModelId], Path | None],
        accepts: Callable[[Epoch, NodeId], bool],
        devices: Callable[[], Sequence[str]] = tuple,
        threads: int = 0,
        on_change: Callable[[], None] = lambda: None,
        limits: DrafterLimits | None = None,
        policy: RestartPolicy | None = None,
    ) -> None:
        self.methods: dict[str, MethodHandler] = {START_DRAFTER: self._start, STOP_DRAFTER: self._stop}
        self.streams: dict[str, StreamHandler] = {DRAFT: self._draft}
        self._engine = engine
        self._spawner = spawner
        self._path_of = path_of
        self._devices = devices
        self._threads = threads
        self._limits = limits or DrafterLimits()
        self._desk: DraftDesk | None = None
        self._lease: Lease[StartDrafter, DrafterStarted] = Lease(
            "the drafter",
            self._once,
            accepts=accepts,
            on_change=on_change,
            lease_s=self._limits.lease_s,
            policy=policy or RestartPolicy(),
        )

    @property
    def state(self) -> DrafterState:
        now, desk = self._lease.state, self._desk
        model, epoch = (str(now.order.model), now.order.epoch) if now.order else ("", NO_EPOCH)
        sessions, speed = (desk.book.n_sessions, desk.book.pace.tokens_per_s) if desk else (0, 0.0)
        return DrafterState(now.phase, model, epoch, now.pid, now.restarts, now.problem, sessions, speed)

    # Commands

    async def _start(self, peer: NodeId, params: dict[str, Any]) -> dict[str, Any]:
        order = StartDrafter.of_params(params)
        self._lease.obey(order.epoch, peer)
        self._file(order.model)
        try:
            return (await self._lease.start(order, self._limits.start_s)).to_plain()
        except EngineError as exc:
            if self._lease.state.phase is Phase.FAILED:
                raise
            raise NotReady(exc.message) from None  # large models take their time

    async def _stop(self, peer: NodeId, params: dict[str, Any]) -> dict[str, Any]:
        self._lease.obey(epoch_of(params), peer)
        self._lease.stop(params.get("run"))
        await trio.lowlevel.checkpoint()
        return {}

    def _file(self, model: ModelId) -> Path:
        path = self._path_of(model)
        if path is None:
            raise UnknownModel(f"the draft model {model.short} is not on this machine (yet)")
        return path

    # The stream service

    async def _draft(self, peer: NodeId, stream: trio.abc.Stream, args: dict[str, Any]) -> None:
        self._lease.check(epoch_of(args), peer)
        desk = self._desk
        if desk is None or not self._lease.is_ready:
            raise PeerRefused(f"the drafter is {self.state.phase}")
        with self._lease.used(self._limits.max_streams):
            why = await desk.serve(stream)
        log.info("the draft stream of %s ended: %s", peer.short, why)

    # The process

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; then the process is gone."""
        await self._lease.run(task_status=task_status)

    async def _once(self, order: StartDrafter, attend: Attend[DrafterStarted]) -> str:
        """One process from its start to its end; how it ended."""
        engine = self._engine()
        if engine is None:
            raise EngineMissing("no usable engine on this machine")
        port = await free_port()
        argv = draft_argv(
            engine.server,
            model=str(self._file(order.model)),
            port=port,
            context=order.context,
            slots=order.slots,
            devices=self._devices(),
            threads=self._threads,
        )
        why = f"the draft server was not ready within {self._limits.load_s:g} s"
        async with self._spawner.running("draft-server", argv, grace_s=0) as child:  # it has nothing to save
            with closing(DraftServer(port)) as server:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(until_exit, child, nursery.cancel_scope)
                    hello = await self._hello(server, child, port, order)
                    if hello is not None:
                        nursery.start_soon(attend, DrafterStarted(hello.n_vocab, hello.context, hello.slots), child)
                        why = await self._serve(server, hello)
                        await trio.sleep(_DYING_S)  # a server that just died is known by that, not by its connection
                    nursery.cancel_scope.cancel()
            ended = child.code is not None
        return child.told() if ended else why

    async def _serve(self, server: DraftServer, hello: Hello) -> str:
        self._desk = DraftDesk(server, hello)
        try:
            return await self._desk.run()
        finally:
            self._desk = None

    async def _hello(self, server: DraftServer, child: Child, port: int, order: StartDrafter) -> Hello | None:
        """What streams begin with. Nobody is asked who is not our child: it may not have got the port."""
        with trio.move_on_after(self._limits.load_s):
            while True:
                if await listens(child.pid, port) and await server.healthy(_ASK_S):
                    try:
                        facts = await server.facts(_ASK_S)
                    except Broken as exc:
                        log.warning("%s", exc.message)
                    else:
                        context = min(order.context, facts.context)
                        return Hello(order.model, facts.n_vocab, context, order.slots)
                await trio.sleep(_RETRY_S)
        return None
