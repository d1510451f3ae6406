"""One attempt to bring a target up: workers, forwarders, the program that serves; and what ended it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from tightwad_agent.engine import by_llama_server, by_verifier
from tightwad_agent.engine.commands import START, Started, StartWorker
from tightwad_agent.engine.forward import Forwarder
from tightwad_agent.engine.plan import WorkerUse
from tightwad_agent.engine.process import Engine
from tightwad_agent.engine.serving import Job
from tightwad_agent.engine.target import Loss, PoolLimits, Report, ServedBy, TargetSpec, Tools
from tightwad_agent.engine.weights_codec import Weights
from tightwad_agent.errors import EngineMismatch, RemoteError, TightwadError
from tightwad_agent.ids import NodeId
from tightwad_agent.streams import peer_errors

log = logging.getLogger(__name__)


class Attempt:
    """Brings `spec` up and keeps it up until something is lost; `report` is told how far it is."""

    def __init__(self, spec: TargetSpec, engine: Engine, tools: Tools, run_id: int, report: Report) -> None:
        self.spec = spec
        self.scope = trio.CancelScope()
        self.forwarders: list[Forwarder] = []
        self._engine = engine
        self._tools = tools
        self._run_id = run_id
        self._report = report
        self._loss: Loss | None = None
        self._started: dict[NodeId, Started] = {}
        self._file: Weights | None = None
        self._job = Job(
            spec=spec, engine=engine, tools=tools, forwarders=self.forwarders, report=report, lose=self.lose
        )

    @property
    def pid(self) -> int | None:
        """The program that serves, once it was started."""
        return self._job.child.pid if self._job.child else None

    def lose(self, loss: Loss) -> None:
        """Ends the attempt; the first loss is the one that counts."""
        if self._loss is None:
            self._loss = loss
            self._report.going(loss)
            if self._job.child is not None:
                self._job.child.grace_s = 0  # what it computes is lost anyway
            self._job.ending(loss)
            self.scope.cancel()

    async def run(self) -> Loss:
        """The loss that ended it. Never raises what was foreseen; leaves no process, socket or task."""
        with self.scope:
            async with trio.open_nursery() as nursery:
                with self._blaming(None):
                    await self._start_workers()
                    await self._open_forwarders(nursery)
                    await self._serve()
        return self._loss or Loss(None, "what served it ended", crash=True)

    # Workers

    async def _start_workers(self) -> None:
        async with trio.open_nursery() as nursery:
            for use in self.spec.plan.workers:
                nursery.start_soon(self._start_worker, use)
            if self.spec.plan.workers:
                nursery.start_soon(self._read_file)
        await trio.lowlevel.checkpoint()

    async def _read_file(self) -> None:
        """Without what it says, all weights are sent."""
        try:
            self._file = await trio.to_thread.run_sync(self._tools.weights, self.spec.plan.model)
        except (TightwadError, OSError) as exc:
            log.warning("weights are sent to all workers: %s", exc)

    async def _start_worker(self, use: WorkerUse) -> None:
        self._report.starting(f"starting worker {use.node.short}")
        devices = tuple(device.name for device in use.devices)
        order = StartWorker(self.spec.epoch, devices, self._run_id, self.spec.plan.model)
        with self._blaming(use.node):
            with peer_errors(self._tools.limits.start_worker_s):
                answer = await self._tools.call(use.node, START, order.to_params())
            started = Started.of_plain(answer)
            if started.protocol != self._engine.protocol:
                raise EngineMismatch(f"its worker speaks RPC {started.protocol}, here is {self._engine.protocol}")
            if use.digest and started.digest != use.digest:
                raise EngineMismatch("it runs another engine than the plan was made for")
            self._started[use.node] = started

    async def _open_forwarders(self, nursery: trio.Nursery) -> None:
        """Opens them all and says HELLO through each: a path that does not work would abort llama-server."""
        for use in self.spec.plan.workers:
            started = self._started.get(use.node, Started("", ""))
            forwarder = Forwarder(
                use.node,
                self.spec.epoch,
                self._tools.open_stream,
                self._link_lost,
                graphs=started.graphs,
                weights=started.weights,
                model=self.spec.plan.model,
                file=self._file,
            )
            await nursery.start(forwarder.run)
            self.forwarders.append(forwarder)
        async with trio.open_nursery() as probes:
            for forwarder in self.forwarders:
                probes.start_soon(self._hello, forwarder)
        await trio.lowlevel.checkpoint()

    async def _hello(self, forwarder: Forwarder) -> None:
        with self._blaming(forwarder.node):
            version = await self._tools.probe(forwarder.port, deadline_s=self._tools.limits.hello_s)
            protocol = ".".join(map(str, version))
            if protocol != self._engine.protocol:
                raise EngineMismatch(f"its worker speaks RPC {protocol}, here is {self._engine.protocol}")

    def _link_lost(self, node: NodeId, reason: str) -> None:
        self.lose(Loss(node, reason))

    # The program

    async def _serve(self) -> None:
        if self.spec.served_by is ServedBy.VERIFIER:
            why = await by_verifier.serve(self._job)
            self._report.fell_back(f"llama-server: the verifier does not know this libllama: {why}")
        await by_llama_server.serve(self._job)

    @contextmanager
    def _blaming(self, node: NodeId | None) -> Iterator[None]:
        """Turns an error into the loss of `node`."""
        try:
            yield
        except (TightwadError, OSError) as exc:
            remote_engine = isinstance(exc, RemoteError) and exc.code.startswith("engine")
            excluded = node is not None and (remote_engine or isinstance(exc, EngineMismatch))
            reason = exc.message if isinstance(exc, TightwadError) else str(exc)
            self.lose(Loss(node, reason, excluded=excluded, crash=node is None))


__all__ = ["Attempt", "Loss", "PoolLimits", "ServedBy", "TargetSpec", "Tools"]
