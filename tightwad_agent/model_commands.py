"""The commands about models and the disk, and the calls between agents that they take."""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import trio

from tightwad_agent import report, report_models
from tightwad_agent.conductor import Conductor
from tightwad_agent.decide import Entry, find, stem, wanted_files
from tightwad_agent.errors import ModelError, PeerError, PeerSilent, RemoteError, UnknownModel, UsageError
from tightwad_agent.events import Kind
from tightwad_agent.ids import ModelId, NodeId
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.service import MeshService
from tightwad_agent.proxy.cluster import Command, Progress
from tightwad_agent.streams import MethodHandler, peer_errors
from tightwad_agent.swarm import caretaker, inventory
from tightwad_agent.swarm.caretaker import Finding
from tightwad_agent.swarm.inventory import ModelState
from tightwad_agent.swarm.service import Phase, SwarmService
from tightwad_agent.wire.rows import Want

log = logging.getLogger(__name__)

CALL_S = 10.0
STATES_S = 3.0
POLL_S = 0.5
LISTED_S = 5.0
STALLED_S = 600.0
"""A comparison on another node that moves for so long not at all is given up; it may wait for another one there."""
MAX_RUN = 64
CHECKABLE = (Phase.COMPLETE, inventory.PROBLEM)
REMOVE = "model.remove"
STATES = "model.states"
VERIFY = "model.verify"

Plain = dict[str, Any]
Told = dict[NodeId, tuple[ModelState, ...]]


class Node(Protocol):
    """The running agent, as far as commands need it."""

    mesh: MeshService
    swarm: SwarmService
    conductor: Conductor
    identity: Identity
    stopping: trio.Event

    def tell(self, text: str, /, *, kind: Kind | None = None, **facts: Any) -> None: ...

    def serving(self) -> dict[str, Any]: ...

    def status(self) -> dict[str, Any]: ...

    def peers(self) -> list[dict[str, Any]]: ...


class ModelCommands:
    """Each method is one command: parameters in, plain data out, or a `TightwadError`."""

    def __init__(self, agent: Node) -> None:
        self._agent = agent
        self._mesh = agent.mesh

    def table(self) -> Mapping[str, Command]:
        return {
            "add": self.add,
            "models": self.models,
            "remove": self.remove,
            "verify": self.verify,
            "gc": self.gc,
        }

    def methods(self) -> Mapping[str, MethodHandler]:
        """Calls from other nodes of the cluster."""
        return {REMOVE: self._remove_here, STATES: self._states_here, VERIFY: self._verify_here}

    # Into the catalogue, and out of it

    async def add(self, params: Plain, progress: Progress) -> Plain:
        """{spec} -> the model."""

        def show(stage: str, done: int, total: int | None) -> None:
            progress({"stage": stage, "done": done, "total": total or 0, "unit": "bytes"})

        held = await self._agent.swarm.add(text_of(params, "spec"), show)
        await self._listed(held.model)
        self._agent.tell(f"{held.name} was added here", kind=Kind.SWARM, model=held.model, n_bytes=held.size)
        return {
            "id": str(held.model),
            "name": str(held.name),
            "size": held.size,
            "architecture": held.facts.architecture,
            "quantisation": held.facts.quantisation,
        }

    async def _listed(self, model: ModelId) -> None:
        """Until the own row has it: then it can be asked for by name."""
        with trio.move_on_after(LISTED_S):
            while all(held.model != model for held in self._mesh.row.models):
                await self._mesh.changed.wait(self._mesh.changed.count)

    async def remove(self, params: Plain, _progress: Progress) -> Plain:
        """{model, dry_run} -> {name, nodes, kept, frees}: takes it off every living node, or only says so."""
        told = await self._ask_all()
        entry = self._find(text_of(params, "model"), told)
        self._refuse_served(entry)
        done, kept = [], []
        for node in sorted(entry.holders):
            try:
                if params.get("dry_run") is not True:
                    await self._call(node, REMOVE, {"model": str(entry.model)})
                done.append(node)
            except PeerError as exc:
                kept.append({"node": self._mesh.name_of(node), "reason": exc.message})
        return {
            "id": str(entry.model),
            "name": str(entry.name),
            "dry_run": params.get("dry_run") is True,
            "nodes": [self._mesh.name_of(node) for node in done],
            "kept": kept,
            "frees": [self._frees(node, entry, told.get(node, ())) for node in done],
        }

    def _refuse_served(self, entry: Entry) -> None:
        serving = self._agent.serving()
        in_use = (self._mesh.record.model, serving["target"]["id"], serving["draft"]["id"])
        if self._mesh.record.want is not Want.NONE and entry.model in in_use:
            raise UsageError(f"{stem(entry.name)} is being served", hint="stop it first: tightwad-agent stop")

    def _frees(self, node: NodeId, entry: Entry, states: Sequence[ModelState]) -> Plain:
        """Bytes that a removal gives back on a node; a file shared in place stays."""
        state = next((s for s in states if s.model == entry.model), None)
        in_place = state is not None and state.in_place
        n_bytes = 0 if in_place else entry.size if state is None or state.have in (0, entry.size) else state.have
        return {"node": self._mesh.name_of(node), "bytes": n_bytes, "in_place": in_place}

    async def _remove_here(self, peer: NodeId, params: Plain) -> Plain:
        model = model_of(params, "model")
        try:
            await self._agent.swarm.remove(model)
        except UnknownModel:
            return {}
        asked_on = self._mesh.name_of(peer)
        self._agent.tell(f"model {model.short} was removed, asked for on {asked_on}", kind=Kind.SWARM, model=model)
        return {}

    # Where they are

    async def models(self, _params: Plain, _progress: Progress) -> Plain:
        """-> {models, transfers}: with how each node stands, as it says itself."""
        told = await self._ask_all()
        rows = self._mesh.living_rows()
        catalogue = self._agent.conductor.catalogue()
        eligible = frozenset(row.node for row in rows if row.eligible)
        found = report_models.models(
            catalogue,
            {row.node: str(row.name) for row in rows},
            self._agent.serving(),
            told,
            dict.fromkeys(wanted_files(self._mesh.record, catalogue), eligible),
        )
        moving = [report.transfer(t) for t in self._agent.swarm.snapshot().transfers if t.done < t.total]
        return {"models": found, "transfers": moving}

    async def _ask_all(self) -> Told:
        """What each living node says of its models; nothing of those that do not answer in time."""
        told: Told = {self._mesh.me: self._agent.swarm.states()}

        async def ask(node: NodeId) -> None:
            try:
                told[node] = inventory.heard(await self._call(node, STATES, {}, STATES_S))
            except PeerError as exc:
                log.debug("%s does not say how its models stand: %s", self._mesh.name_of(node), exc)

        async with trio.open_nursery() as nursery:
            for row in self._mesh.living_rows()[1:]:
                nursery.start_soon(ask, row.node)
        return told

    async def _states_here(self, _peer: NodeId, _params: Plain) -> Plain:
        await trio.lowlevel.checkpoint()
        return inventory.told(self._agent.swarm.states())

    # Whether they are still right

    async def verify(self, params: Plain, progress: Progress) -> Plain:
        """{model, everywhere} -> {results}: each with `state` good, damaged, failed or unchecked; no model: all."""
        told = await self._ask_all()
        here = params.get("everywhere") is not True
        wanted = params.get("model")
        model = self._find(text_of(params, "model"), told).model if wanted is not None else None
        jobs = {
            node: [s for s in states if s.phase in CHECKABLE and model in (None, s.model)]
            for node, states in told.items()
            if not here or node == self._mesh.me
        }
        if model is not None and not any(jobs.values()):
            raise ModelError(
                f"{wanted} is not complete on {'this machine' if here else 'any machine'}",
                hint="where it is: tightwad-agent models; elsewhere too: verify --everywhere",
            )
        results: list[Plain] = []

        async def on(node: NodeId, states: Sequence[ModelState]) -> None:
            for state in states:
                results.append(await self._verify_on(node, state, progress))

        async with trio.open_nursery() as nursery:
            for node, states in jobs.items():
                nursery.start_soon(on, node, states)
        results.sort(key=lambda r: (r["name"], r["node"]))
        silent = [] if here else [r for r in self._mesh.living_rows() if r.node not in told]
        results += [_result(str(r.name), r.node, None, "unchecked", problem=NO_ANSWER) for r in silent]
        return {"results": results}

    async def _verify_on(self, node: NodeId, state: ModelState, progress: Progress) -> Plain:
        name, run = self._mesh.name_of(node), secrets.token_hex(8)
        params = {"model": str(state.model), "run": run}
        try:
            found = await self._poll(node, params, f"{state.name} on {name}", progress)
        except RemoteError as exc:
            return _result(name, node, state, "failed", problem=exc.message, action=exc.hint)
        except PeerError as exc:
            return _result(name, node, state, "unchecked", problem=exc.message)
        if not found.good:
            what = [f"{found.damaged} of {found.pieces} pieces are not what they were", found.problem, found.action]
            text = "; ".join(t for t in what if t)
            self._agent.tell(f"{state.name} is damaged on {name}: {text}", kind=Kind.SWARM, model=state.model)
        else:
            self._agent.tell(f"{state.name} was compared on {name} and is whole", kind=Kind.SWARM, model=state.model)
        return _result(name, node, state, "good" if found.good else "damaged", **dataclasses.asdict(found))

    async def _poll(self, node: NodeId, params: Plain, stage: str, progress: Progress) -> Finding:
        """Asks how far a comparison is until its result is there."""
        seen, moved_at = -1, trio.current_time()
        while True:
            answer = await self._call(node, VERIFY, params)
            done, total = answer.get("done"), answer.get("total")
            if type(done) is int and type(total) is int and done != seen:
                seen, moved_at = done, trio.current_time()
                progress({"stage": stage, "done": done, "total": total, "unit": "bytes"})
            if (result := answer.get("result")) is not None:
                return caretaker.heard(result)
            if trio.current_time() > moved_at + STALLED_S:
                raise PeerSilent(f"nothing was compared for {STALLED_S:g} s")
            await trio.sleep(POLL_S)

    async def _verify_here(self, _peer: NodeId, params: Plain) -> Plain:
        model, run = model_of(params, "model"), text_of(params, "run")
        if len(run) > MAX_RUN:
            raise UsageError("the parameter run is too long")
        entry = self._agent.conductor.catalogue().get(model)
        sources = frozenset(entry.complete_on if entry else ()) - {self._mesh.me}
        return await self._agent.swarm.care.poll(run, model, sources)

    # What nobody needs

    async def gc(self, params: Plain, _progress: Progress) -> Plain:
        """{dry_run} -> {items, bytes, dry_run}: removes from this node what no node holds and nobody wants."""
        catalogue, me = self._agent.conductor.catalogue(), self._mesh.me
        held = {m for m, entry in catalogue.items() if entry.holders - {me}}
        dry_run = params.get("dry_run") is True
        swarm = self._agent.swarm
        found = await swarm.care.collect(
            held | wanted_files(self._mesh.record, catalogue), downloading=swarm.downloading, dry_run=dry_run
        )
        items = [
            {"what": i.what, "bytes": i.n_bytes, "age_s": round(i.age_s), "paths": [str(p) for p in i.paths]}
            for i in found
        ]
        return {"items": items, "bytes": sum(i.n_bytes for i in found), "dry_run": dry_run}

    # How

    def _find(self, text: str, told: Told) -> Entry:
        return find(text, report_models.complete_catalogue(self._agent.conductor.catalogue(), told))

    async def _call(self, node: NodeId, method: str, params: Plain, deadline_s: float = CALL_S) -> Plain:
        with peer_errors(deadline_s):
            return await self._mesh.call(node, method, params)


NO_ANSWER = "it does not answer, or is of an older version"


def _result(name: str, node: NodeId, state: ModelState | None, word: str, **found: Any) -> Plain:
    """What is told of one comparison; `found` holds the fields of a `Finding`."""
    return {
        "node": name,
        "node_id": str(node),
        "id": str(state.model) if state else "",
        "name": state.name if state else "",
        "size": state.size if state else 0,
        "state": word,
        "in_place": found.get("in_place", state is not None and state.in_place),
        "pieces": found.get("pieces", 0),
        "damaged": found.get("damaged", 0),
        "ranges": list(found.get("ranges", ())),
        "problem": found.get("problem", ""),
        "action": found.get("action", ""),
    }


def text_of(params: Plain, key: str) -> str:
    value = params.get(key)
    if not isinstance(value, str) or not value:
        raise UsageError(f"the parameter {key} is missing")
    return value


def model_of(params: Plain, key: str) -> ModelId:
    try:
        return ModelId(params.get(key))  # type: ignore[arg-type]
    except ValueError:
        raise UsageError(f"the parameter {key} is no model id") from None
