"""What is seen of the agent from outside: the endpoint's view of the cluster, and `status`."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import trio

from tightwad_agent import __version__, report, serving_feed
from tightwad_agent.conductor import Conductor, Serving
from tightwad_agent.config import Config
from tightwad_agent.decide import stem
from tightwad_agent.engine.draft_plan import VERIFIER
from tightwad_agent.engine.drafter import DrafterService
from tightwad_agent.engine.drafting import DraftingService, DraftingState
from tightwad_agent.engine.pins import BUILD
from tightwad_agent.engine.pool import PoolPhase, PoolService
from tightwad_agent.engine.verifying import VerifierClient
from tightwad_agent.engine.worker import WorkerService
from tightwad_agent.errors import PeerError
from tightwad_agent.event_log import EventLog
from tightwad_agent.events import Journal
from tightwad_agent.ids import NodeId
from tightwad_agent.keyring import Keyring
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.service import MeshService
from tightwad_agent.own_row import OwnRow
from tightwad_agent.proxy.client import ask, connect_loopback
from tightwad_agent.proxy.cluster import Command, Local, Own, Remote, Route, Unavailable
from tightwad_agent.proxy.costs import Costs
from tightwad_agent.proxy.generation import VerifierGenerator
from tightwad_agent.proxy.metrics import MetricsView, WorkerTraffic
from tightwad_agent.proxy.openai import ModelEntry
from tightwad_agent.proxy.tally import Tally
from tightwad_agent.proxy.usage import Usage
from tightwad_agent.streams import close_quietly
from tightwad_agent.swarm.service import SwarmService
from tightwad_agent.wire.rows import Want
from tightwad_agent.wire.verify import Rollback

log = logging.getLogger(__name__)

METRICS_PERIOD_S = 5.0
"""llama-server notices that a client has left only in a second without any answer, and this is one."""
SERVING_RETRY_S = 0.5
ASK_S = 2.0
MAX_METRICS = 1 << 20
N_EVENTS = 50
"""Of this node, in `status`; the command `events` has more, of all."""

_COUNTERS = {
    "rounds": "spec_decode_num_drafts_total",
    "drafted": "spec_decode_num_draft_tokens_total",
    "accepted": "spec_decode_num_accepted_tokens_total",
}


@dataclass(slots=True)
class InFlight:
    """How many requests run on this node's engine."""

    n: int = 0


@dataclass(frozen=True, slots=True)
class Parts:
    """The services of one node, as the agent has built them."""

    config: Config
    identity: Identity
    mesh: MeshService
    own: OwnRow
    swarm: SwarmService
    worker: WorkerService
    drafter: DrafterService
    drafting: DraftingService
    pool: PoolService
    conductor: Conductor
    journal: Journal
    event_log: EventLog
    in_flight: InFlight
    endpoint_port: int
    keyring: Keyring
    usage: Usage


class View:
    """Implements what the endpoint asks of the cluster (`proxy.cluster.Cluster`)."""

    def __init__(self, parts: Parts) -> None:
        self.tally = Tally()
        self.usage = parts.usage
        self.commands: Mapping[str, Command] = {}
        self._p = parts
        self._spec = report.Speculation()
        self._serving: dict[str, Any] = report.NOT_SERVING
        self._generator: VerifierGenerator | None = None
        self._generates_on: VerifierClient | None = None
        self._was_ready = ""
        """The model that was last seen to answer, here or at another coordinator: requests wait for it to come back."""

    # What is served, as seen from here

    def serving(self) -> dict[str, Any]:
        """`target`, `draft` and `speculation`: own view on the coordinator, else the coordinator's last word."""
        if not self._p.mesh.coordinating:
            return self._serving
        names = {row.node: str(row.name) for row in self._p.mesh.living_rows()}
        traffic = {t.node: t.bytes_up + t.bytes_down for t in self._p.pool.traffic()}
        saved = {t.node: t.bytes_saved for t in self._p.pool.traffic()}
        return report.serving(
            self._now(),
            names,
            self._p.conductor.catalogue(),
            self._speculation(),
            traffic,
            saved=saved,
            back=self._p.pool.back,
        )

    def _now(self) -> Serving:
        now = self._p.conductor.serving
        return replace(now, detail=self._p.mesh.with_names(now.detail))

    def _speculation(self) -> report.Speculation | report.SpeculationView:
        verifier, pool = self._p.pool.state.verifier, self._p.pool.state
        if pool.engine != VERIFIER:
            counted = self._spec
            return report.SpeculationView(
                engine=pool.engine,
                engine_reason=pool.engine_reason,
                rounds=counted.rounds,
                drafted=counted.drafted,
                accepted=counted.accepted,
            )
        generator = self._generator_of(verifier) if verifier else None
        return report.SpeculationView.of(
            self.tally,
            engine=pool.engine,
            engine_reason=pool.engine_reason,
            decision=generator.decision() if generator else "",
            drafters=[self._drafter_view(state, generator) for state in self._p.drafting.states()],
            rollback=_rollback_words(verifier.info.rollback, verifier.info.window) if verifier else "",
        )

    def _drafter_view(self, state: DraftingState, generator: VerifierGenerator | None) -> report.DrafterView:
        record = generator.record_of(state.node, state.model) if generator else None
        return report.DrafterView(
            name=state.name,
            state=state.phase,
            id=str(state.node),
            reason=state.reason,
            tokens_per_s=state.tokens_per_s or None,
            first_token_ms=state.first_token_ms or None,
            acceptance=record.accepted if record and record.measured else None,
        )

    def _generator_of(self, verifier: VerifierClient) -> VerifierGenerator:
        """One per verifier: what it learned about times holds for that pool."""
        if self._generator is None or self._generates_on is not verifier:
            limit = self._p.mesh.record.max_draft
            costs = Costs(self._p.config.max_draft if limit < 0 else limit)
            self._generator = VerifierGenerator(verifier, self._p.drafting.ready, costs, ended=self.tally.generated)
            self._generates_on = verifier
        return self._generator

    def metrics(self) -> MetricsView:
        pool, now, names = self._p.pool.state, self._p.conductor.serving, self._p.mesh.name_of
        peers = Counter(str(p.state) for p in self._p.mesh.peers())
        return MetricsView(
            version=__version__,
            llama_cpp=BUILD,
            tally=self.tally.snapshot(),
            engine=pool.engine,
            model=stem(now.model.name) if now.model else "",
            is_ready=pool.phase is PoolPhase.READY,
            coordinating=self._p.mesh.coordinating,
            in_flight=self._p.in_flight.n,
            pool_restarts=pool.restarts,
            workers=[
                WorkerTraffic(names(t.node), t.bytes_up - t.bytes_saved, t.bytes_down) for t in self._p.pool.traffic()
            ],
            peers=peers,
            keys=self.usage.all(),
            transfers=Counter(str(t.phase) for t in self._p.swarm.snapshot().transfers),
        )

    async def tell_serving(self, _peer: NodeId, stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
        """The mesh's `serving` service."""
        await serving_feed.tell(stream, lambda: self.serving() if self._p.mesh.coordinating else None)

    async def follow_serving(self) -> None:
        """On a follower: keeps the coordinator's view, for status."""
        mesh = self._p.mesh
        while True:
            coordinator = mesh.coordinator
            if coordinator is None or coordinator == mesh.me:
                self._serving = report.NOT_SERVING
            else:
                try:
                    await serving_feed.follow(
                        mesh.open_stream,
                        coordinator,
                        self._heard_serving,
                        lambda follows=coordinator: mesh.coordinator == follows,  # type: ignore[misc]
                    )
                except PeerError as exc:
                    log.debug("the coordinator does not say what it serves: %s", exc)
            await trio.sleep(SERVING_RETRY_S)

    def _heard_serving(self, view: dict[str, Any]) -> None:
        if view.keys() == report.NOT_SERVING.keys():
            self._serving = view
            target = view["target"]
            if isinstance(target, dict) and target.get("state") == "ready":
                self._was_ready = str(target.get("id"))

    async def count_speculation(self) -> None:
        """Keeps llama-server's counters, until cancelled."""
        while True:
            await trio.sleep(METRICS_PERIOD_S)
            port = self._p.pool.state.port
            if port is None:
                self._spec = report.Speculation()
            elif (counted := await _read_counters(port)) is not None:
                self._spec = counted

    # proxy.cluster.Cluster

    def status(self) -> dict[str, Any]:
        mesh = self._p.mesh
        coordinator = mesh.coordinator
        peers = mesh.peers()
        snapshot = self._p.swarm.snapshot()
        return {
            "cluster": {
                "id": str(self._p.identity.cluster),
                "name": str(self._p.identity.state.cluster_name),
                "nodes": len(peers),
                "alive": sum(p.state.living for p in peers),
            },
            "node": {
                "id": str(mesh.me),
                "name": str(mesh.row.name),
                "role": str(mesh.row.role),
                "addresses": [str(a) for a in mesh.addresses],
            },
            "epoch": {"counter": mesh.epoch.counter, "node": mesh.epoch.node},
            "coordinator": {"id": str(coordinator), "name": mesh.name_of(coordinator)} if coordinator else None,
            "endpoint": f"http://127.0.0.1:{self._p.endpoint_port}/v1",
            "engine": report.engine(self._p.own.info()),
            **self.serving(),
            "worker": {
                "state": str(self._p.worker.state.phase),
                "devices": list(self._p.worker.state.devices),
                "restarts": self._p.worker.state.restarts,
                "problem": self._p.worker.state.problem,
            },
            "drafter": {
                "state": str(self._p.drafter.state.phase),
                "model": self._p.drafter.state.model,
                "restarts": self._p.drafter.state.restarts,
                "problem": self._p.drafter.state.problem,
            },
            "keys": {name: {"requests": u.requests, "tokens": u.tokens} for name, u in self.usage.all().items()},
            "transfers": [report.transfer(t) for t in snapshot.transfers],
            "links": report.links(peers[1:]),
            "answers": report.answers(self.tally),
            "problems": self._problems(snapshot.problems),
            "events": report.events(self._p.journal.last(N_EVENTS), mesh.with_names),
        }

    def _problems(self, of_swarm: tuple[str, ...]) -> list[str]:
        found = list(of_swarm)
        if self._p.own.engine is None:
            found.append(self._p.own.problem)
        if self._p.mesh.problem:
            found.append(self._p.mesh.problem)
        if self._p.mesh.mdns_problem:
            found.append(f"mDNS does not work: {self._p.mesh.mdns_problem}")
        if not self._p.config.mdns:
            found.append("mDNS is switched off (--no-mdns)")
        if not self._p.mesh.addresses:
            found += ["no address of this machine is announced", *self._p.mesh.skipped]
        if self._p.event_log.problem:
            found.append(self._p.event_log.problem)
        if self._p.config.open_endpoint:
            found.append("the endpoint is open to every machine that reaches it (--open-endpoint)")
        return found

    def peers(self) -> list[dict[str, Any]]:
        return [report.peer(p, self._p.mesh.me, self._p.mesh.coordinator) for p in self._p.mesh.peers()]

    def models(self) -> Sequence[ModelEntry]:
        served = self.serving()["target"]["id"] or self._p.mesh.record.model
        entries = self._p.conductor.catalogue().values()
        return [ModelEntry(str(e.model), str(e.name), e.size, served=e.model == served) for e in entries]

    def route(self) -> Route:
        coordinator = self._p.mesh.coordinator
        if coordinator is None:
            return Unavailable("no coordinator is elected yet", {"state": "electing"}, hold=True)
        if coordinator != self._p.mesh.me:
            return Remote(coordinator)
        pool, record = self._p.pool.state, self._p.mesh.record
        if pool.phase is PoolPhase.READY:
            self._was_ready = str(record.model)
        if pool.phase is PoolPhase.READY and pool.port is not None:
            return Local(pool.port)
        if pool.phase is PoolPhase.READY and pool.verifier is not None and pool.verifier.alive:
            return Own(self._generator_of(pool.verifier))
        now = self._now()
        name = stem(now.model.name) if now.model else None
        state = {"state": now.state, "detail": now.detail, "model": name, "progress": pool.percent}
        message = f"{name} is not ready: {now.state}, {now.detail}" if name else f"nothing is served: {now.detail}"
        if record.want is Want.NONE:
            return Unavailable(message, {**state, "stopped": True}, retry_after_s=2)
        comes_back = pool.restarts > 0 or self._was_ready == str(record.model)
        return Unavailable(message, state, retry_after_s=2, hold=comes_back and now.state != "failed")

    def alive(self, node: NodeId) -> bool:
        return node in self._p.mesh.alive()

    def membership(self) -> Hashable:
        return self._p.mesh.epoch, self._p.mesh.alive()

    async def open_stream(self, node: NodeId, service: str, args: dict[str, Any]) -> trio.abc.Stream:
        return await self._p.mesh.open_stream(node, service, args)

    def key_holder(self, key: bytes) -> str:
        return self._p.keyring.holder(key)

    @contextmanager
    def request_started(self) -> Iterator[None]:
        self._p.in_flight.n += 1
        try:
            yield
        finally:
            self._p.in_flight.n -= 1
            if not self._p.in_flight.n:
                self._p.mesh.changed.beat()


def _rollback_words(rollback: Rollback, window: int) -> str:
    if rollback is Rollback.NONE:
        return "no drafts: this model's memory is recurrent, and tokens cannot be taken out of it again"
    if rollback is Rollback.WINDOW:
        return f"attention slides over {window} tokens: drafts work, a changed conversation is evaluated anew"
    return ""


async def _read_counters(port: int) -> report.Speculation | None:
    """llama-server's counters of speculation; None if it does not answer now."""
    try:
        stream = await connect_loopback(port)
    except PeerError:
        return None
    try:
        answer = await ask(stream, "GET", "/metrics", [], b"", host=f"127.0.0.1:{port}", deadline_s=ASK_S)
        text = b""
        while len(text) < MAX_METRICS and (data := await answer.receive(deadline_s=ASK_S)):
            text += data
    except PeerError:
        return None
    finally:
        await close_quietly(stream)
    return report.Speculation(
        **{name: _counter(text.decode("utf-8", "replace"), key) for name, key in _COUNTERS.items()}
    )


def _counter(text: str, name: str) -> int:
    found = re.search(rf"^llamacpp:{name} ([0-9.e+]+)$", text, re.MULTILINE)
    return int(float(found[1])) if found else 0
