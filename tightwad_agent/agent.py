"""The composition root: builds the parts of one node, wires them, and keeps them running until told to stop."""

from __future__ import annotations

import logging
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import trio

from tightwad_agent import __version__, child_news, control, life, serving_feed, transfer_news
from tightwad_agent.commands import Commands
from tightwad_agent.conductor import Conductor
from tightwad_agent.config import Config
from tightwad_agent.engine import hello
from tightwad_agent.engine.attempt import Loss
from tightwad_agent.engine.commands import epoch_of
from tightwad_agent.engine.drafter import DrafterService
from tightwad_agent.engine.drafting import DraftingService
from tightwad_agent.engine.pool import Back, PoolService
from tightwad_agent.engine.process import Spawner
from tightwad_agent.engine.weights_codec import Places
from tightwad_agent.engine.weights_file import WeightsOf
from tightwad_agent.engine.worker import WorkerService
from tightwad_agent.errors import StaleEpoch
from tightwad_agent.event_commands import EventCommands
from tightwad_agent.event_log import EventLog
from tightwad_agent.events import Journal, Kind, of_kind
from tightwad_agent.ids import Epoch, ModelId, NodeId
from tightwad_agent.key_commands import KeyCommands
from tightwad_agent.keyring import Keyring
from tightwad_agent.log import redact
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.service import MeshService, Settings
from tightwad_agent.own_row import OwnRow, first_row
from tightwad_agent.proxy.access import Access, machine_names
from tightwad_agent.proxy.app import App
from tightwad_agent.proxy.limits import Limits as EndpointLimits
from tightwad_agent.proxy.listen import listen
from tightwad_agent.proxy.usage import Usage
from tightwad_agent.streams import MethodHandler
from tightwad_agent.swarm.service import SwarmService
from tightwad_agent.swarm.store import Store
from tightwad_agent.trust_commands import TrustCommands, gated
from tightwad_agent.view import InFlight, Parts, View

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ready:
    """What is known once the agent is up."""

    mesh_port: int
    endpoint_port: int


class Agent:
    """One node."""

    def __init__(self, config: Config, identity: Identity) -> None:
        """`identity.state.incarnation` must be this start's: greater than any before, and on the disk."""
        self.config = config
        self.identity = identity
        self.journal = Journal(str(identity.node), clean=redact)
        self.event_log = EventLog(config.state_dir, self.journal)
        self.endpoint_port = 0
        self.stopping = trio.Event()
        self.keyring = Keyring(
            config.state_dir, identity.state.api_key, wall=time.time, tell=of_kind(self.tell, Kind.TRUST)
        )
        self._why = ""
        self._pauses = child_news.Pauses(of_kind(self.tell, Kind.ENDPOINT), time.monotonic)

    # Life

    async def run(self, on_ready: Callable[[Ready], None]) -> None:
        """Until a signal or `leave`. Raises `PortTaken` and other `TightwadError`s before it is ready."""
        listeners = await listen(self.config.endpoint_host, self.config.endpoint_port)
        self.endpoint_port = listeners[0].socket.getsockname()[1]
        with self._events_kept():
            await self._run(listeners, on_ready)

    async def _run(self, listeners: Sequence[trio.SocketListener], on_ready: Callable[[Ready], None]) -> None:
        settings = Settings(
            state_dir=self.config.state_dir,
            port=self.config.mesh_port,
            mdns=self.config.mdns,
            interfaces=self.config.interfaces,
            seeds=self.config.seeds,
        )
        self.mesh = MeshService(
            self.identity, settings, first_row(self.identity, self.endpoint_port), wall=time.time, tell=self.tell
        )
        async with trio.open_nursery() as readers, self._signals():
            spawner = Spawner(readers, self.config.state_dir)
            await spawner.sweep()
            readers.start_soon(self.event_log.run)
            async with trio.open_nursery() as nursery:
                self._build(spawner)
                await self._start(nursery, listeners)
                on_ready(Ready(self.mesh.port, self.endpoint_port))
                await self.stopping.wait()
                with trio.move_on_after(3):
                    await self.mesh.leave()
                nursery.cancel_scope.cancel()
            readers.cancel_scope.cancel()

    def _build(self, spawner: Spawner) -> None:
        mesh, config, in_flight = self.mesh, self.config, InFlight()
        self.own = OwnRow(mesh, config, of_kind(self.tell, Kind.ENGINE))
        store = Store(config.models, max_bytes=config.max_models_bytes)
        self.swarm = SwarmService(store, mesh.open_stream, mesh.me, random.Random())  # noqa: S311 - which piece first
        self.worker = WorkerService(
            engine=self.own.current_engine,
            spawner=spawner,
            probe=hello.probe,
            accepts=self._accepts,
            offered=lambda: [d.name for d in mesh.row.capabilities.devices],
            threads=config.threads,
            on_change=mesh.changed.beat,
            path_of=self.swarm.path_of,
            on_differs=self._differs,
        )
        self.drafter = DrafterService(
            engine=self.own.current_engine,
            spawner=spawner,
            path_of=self.swarm.path_of,
            accepts=self._accepts,
            devices=lambda: [d.name for d in mesh.row.capabilities.devices if d.name != "CPU"],
            threads=config.threads,
            on_change=mesh.changed.beat,
        )
        self.drafting = DraftingService(
            call=mesh.call,
            open_stream=mesh.open_stream,
            on_change=mesh.changed.beat,
            tell=of_kind(self.tell, Kind.DRAFTING),
        )
        self.pool = PoolService(
            engine=self.own.current_engine,
            spawner=spawner,
            probe=hello.probe,
            call=mesh.call,
            open_stream=mesh.open_stream,
            on_lost=self._lost,
            on_back=self._back,
            on_change=mesh.changed.beat,
            in_flight=lambda: in_flight.n,
            weights=WeightsOf(self.swarm.path_of, self._places),
            threads=config.threads,
            stall_s=config.stall_s,
        )
        self.conductor = Conductor(
            mesh,
            self.swarm,
            self.pool,
            in_flight=lambda: in_flight.n,
            workers=config.workers,
            tell=of_kind(self.tell, Kind.POOL),
            set_drafters=self.drafting.set_drafters,
            free_own=self.worker.release,
        )
        self.own.pids = lambda: [pid for pid in (self.worker.state.pid, self.pool.pid) if pid]
        self.view = View(
            Parts(
                config=config,
                identity=self.identity,
                mesh=mesh,
                own=self.own,
                swarm=self.swarm,
                worker=self.worker,
                drafter=self.drafter,
                drafting=self.drafting,
                pool=self.pool,
                conductor=self.conductor,
                journal=self.journal,
                event_log=self.event_log,
                in_flight=in_flight,
                endpoint_port=self.endpoint_port,
                keyring=self.keyring,
                usage=Usage(),
            )
        )
        names = machine_names(socket.gethostname())
        self.app = App(
            self.view,
            admin_key=lambda: control.admin_key(config.state_dir),
            guard=Access(names, config.open_endpoint),
            limits=EndpointLimits.of(config),
            answered=self.view.tally.answered,
            usage=self.view.usage,
            paused=self._paused,
        )
        commands, events = Commands(self), EventCommands(mesh, self.journal)
        keys = KeyCommands(self.keyring, self.view.usage, of_kind(self.tell, Kind.TRUST))
        trust = TrustCommands(mesh)
        table = {**commands.table(), **events.table(), **keys.table(), **trust.table()}
        self.view.commands = gated(lambda: mesh.identity.role, table)
        mesh.streams |= {
            "swarm": self.swarm.handle,
            "http": self.app.handle_mesh,
            "resume": self.app.handle_mesh,
            serving_feed.SERVICE: self.view.tell_serving,
            **self.worker.streams,
            **self.drafter.streams,
        }
        fenced = {**self.worker.methods, **self.drafter.methods}
        mesh.methods |= {name: self._fenced(handler) for name, handler in fenced.items()}
        mesh.methods |= {**commands.methods(), **events.methods(), **self.keyring.methods()}

    async def _start(self, nursery: trio.Nursery, listeners: Sequence[trio.SocketListener]) -> None:
        await nursery.start(self.swarm.run)
        await self.own.read()
        await nursery.start(self.mesh.run)
        await nursery.start(self.worker.run)
        await nursery.start(self.drafter.run)
        await nursery.start(self.drafting.run)
        await nursery.start(self.pool.run)
        await nursery.start(self._serve_endpoint, listeners)
        for task in (
            self.conductor.run,
            self.own.keep,
            self.own.find_engine,
            self.view.count_speculation,
            self.view.follow_serving,
        ):
            nursery.start_soon(task)
        nursery.start_soon(self.own.publish_models, self.swarm)
        nursery.start_soon(transfer_news.follow, self.swarm, of_kind(self.tell, Kind.SWARM))
        troubles = {
            "the worker here": lambda: (self.worker.state.restarts, self.worker.state.problem),
            "the drafter here": lambda: (self.drafter.state.restarts, self.drafter.state.problem),
        }
        nursery.start_soon(child_news.follow, self.mesh.changed, troubles, of_kind(self.tell, Kind.ENGINE))
        nursery.start_soon(self.keyring.run, self.mesh.call, lambda: self.mesh.living_rows()[1:], self.mesh.changed)

    async def _serve_endpoint(
        self,
        listeners: Sequence[trio.SocketListener],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        await self.app.serve(listeners, task_status=task_status)

    @asynccontextmanager
    async def _signals(self) -> AsyncIterator[None]:
        """SIGTERM and Ctrl-C end the agent in good order, the second of them at once."""
        wanted = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
        with trio.open_signal_receiver(*wanted) as received:

            async def listen_for(scope: trio.CancelScope) -> None:
                async for number in received:
                    if self.stopping.is_set():
                        scope.cancel()
                    self._why = signal.Signals(number).name
                    self.stopping.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen_for, nursery.cancel_scope)
                yield
                nursery.cancel_scope.cancel()

    def tell(self, text: str, /, *, kind: Kind | None = None, **facts: Any) -> None:
        """Something happened that a person may ask about. See `events.Tell`."""
        if self.journal.add(time.time(), text, kind or Kind.AGENT, facts):
            log.info("%s", text)
            self.event_log.note()

    def _paused(self, seconds: float) -> None:
        self.view.tally.paused(seconds)
        self._pauses.paused(seconds)

    @contextmanager
    def _events_kept(self) -> Iterator[None]:
        """Events of earlier runs are there, how this one begins and ends is among them, and the last is on the disk."""
        self.event_log.restore()
        began, end = trio.current_time(), life.STOPPED
        text = life.started(self.journal.last(), time.time(), __version__)
        self.tell(text, version=__version__, life=life.STARTED)
        try:
            yield
        except Exception as exc:
            end = life.FAILED
            self.tell(life.failed(exc), life=end)
            raise
        finally:
            if end is life.STOPPED:
                up_s = trio.current_time() - began
                self.tell(life.ended(self._why or "asked to", up_s), life=end, up_s=up_s)
            self.event_log.flush()

    # Commands from the coordinator

    def _lost(self, loss: Loss) -> None:
        self.conductor.lost(loss)

    def _back(self, back: Back) -> None:
        self.conductor.back(back)

    def _places(self, model: ModelId) -> Places:
        """Of the tensors of a model in its file here; in a thread."""
        tensors = self.swarm.store.read_gguf(model).tensors
        return {tensor.name.encode(): (tensor.offset, tensor.n_bytes) for tensor in tensors}

    def _differs(self, model: ModelId, why: str) -> None:
        self.tell(
            f"the file of {model.short} here is not what the coordinator holds: {why}; weights are sent over the "
            "network instead, and `tightwad-agent verify` repairs it",
            kind=Kind.ENGINE,
        )

    def _accepts(self, epoch: Epoch, peer: NodeId) -> bool:
        return self.mesh.coordinator == peer and self.mesh.epoch == epoch

    def _fenced(self, handler: MethodHandler) -> MethodHandler:
        """The handler behind the epoch check: nothing older than what this node has obeyed, and only from whom it
        takes for the coordinator; a newer epoch is on the disk before it is obeyed."""

        async def fenced(peer: NodeId, params: dict[str, Any]) -> dict[str, Any]:
            epoch = epoch_of(params)
            if not await self.mesh.accept_command(peer, epoch):
                raise StaleEpoch(f"{peer.short} does not coordinate at epoch {epoch}, {self.mesh.epoch} is obeyed here")
            return await handler(peer, params)

        return fenced

    # What commands ask for

    def serving(self) -> dict[str, Any]:
        """See `View`."""
        return self.view.serving()

    def status(self) -> dict[str, Any]:
        """See `View`."""
        return self.view.status()

    def peers(self) -> list[dict[str, Any]]:
        """See `View`."""
        return self.view.peers()
