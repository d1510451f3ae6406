"""What the command line asks of the running agent, and the calls between agents that it takes."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import trio

from tightwad_agent import report
from tightwad_agent.config import draft_limit
from tightwad_agent.decide import Entry, find, next_version, stem
from tightwad_agent.engine.draft_plan import AUTO, ENGINES
from tightwad_agent.errors import EngineError, ModelError, NotReady, PeerError, UsageError
from tightwad_agent.events import Kind
from tightwad_agent.ids import NodeId
from tightwad_agent.mesh import identity, tokens
from tightwad_agent.mesh.tokens import MAX_TTL_S
from tightwad_agent.model_commands import CALL_S, ModelCommands, Node, model_of, text_of
from tightwad_agent.proxy.cluster import Command, Progress
from tightwad_agent.streams import MethodHandler, peer_errors
from tightwad_agent.units import duration
from tightwad_agent.wire.rows import MAX_DRAFTERS, Role, ServeRecord, Want

log = logging.getLogger(__name__)

MAX_USES = 1000
POLL_S = 0.1
NO_VIEW_S = 30.0
"""How long `serve` waits for a coordinator before it gives up."""
VOCAB = "model.vocab_difference"

Plain = dict[str, Any]


class Commands:
    """Each method is one command: parameters in, plain data out, or a `TightwadError`."""

    def __init__(self, agent: Node) -> None:
        self._agent = agent
        self._mesh = agent.mesh
        self._models = ModelCommands(agent)

    def table(self) -> Mapping[str, Command]:
        return {
            "token.create": self.token_create,
            "token.list": self.token_list,
            **self._models.table(),
            "serve": self.serve,
            "stop": self.stop,
            "peers": self.peers,
            "status": self.status,
            "leave": self.leave,
        }

    def methods(self) -> Mapping[str, MethodHandler]:
        """Calls from other nodes of the cluster."""
        return {**self._models.methods(), VOCAB: self._vocab_here}

    # Tokens

    async def token_create(self, params: Plain, _progress: Progress) -> Plain:
        """{ttl_s, uses, role, addresses: bool} -> {token, id, expires, ...}"""
        ttl_s, uses = _int(params, "ttl_s", 3600, MAX_TTL_S), _int(params, "uses", 1, MAX_USES)
        role = Role(params.get("role", "node"))
        with_addresses = params.get("addresses", True) is True
        book = self._mesh.ledger
        if book is None:
            names = [row.name for row in self._mesh.living_rows() if row.role is Role.AUTHORITY]
            raise UsageError(
                "this machine is no authority of the cluster and cannot make tokens",
                hint=f"make it on {' or '.join(names)}" if names else "the machine that founded the cluster can",
            )
        addresses = self._mesh.addresses[:8] if with_addresses else ()

        def issue() -> Any:
            return identity.issue_token(
                self._mesh.identity, book, time.time(), ttl_s=ttl_s, uses=uses, role=role, addresses=addresses
            )

        token = await trio.to_thread.run_sync(issue)
        claims = token.claims
        token_id, lasts = claims.token_id.hex(), duration(ttl_s)
        self._agent.tell(
            f"a join token was made ({token_id}, role {role}, {uses} use(s), good for {lasts})",
            kind=Kind.TRUST,
            token=token_id,
            uses=uses,
            expires=claims.expires,
        )
        return {
            "token": token.text,
            "id": claims.token_id.hex(),
            "expires": claims.expires,
            "ttl_s": ttl_s,
            "uses": uses,
            "role": str(role),
        }

    async def token_list(self, _params: Plain, _progress: Progress) -> Plain:
        book = self._mesh.ledger
        if book is None:
            raise UsageError("this machine is no authority of the cluster", hint="ask the machine that founded it")
        entries = await trio.to_thread.run_sync(book.entries)
        now = time.time()
        return {
            "tokens": [
                {
                    "id": e.token_id.hex(),
                    "role": str(e.role),
                    "uses": e.uses,
                    "uses_left": e.uses_left,
                    "expires": e.expires,
                    "state": self._token_state(e, now),
                    "nodes": [self._mesh.name_of(node) for node in e.nodes],
                }
                for e in entries
            ]
        }

    def _token_state(self, entry: tokens.Entry, now: float) -> str:
        if self._mesh.trust.denies_token(entry.token_id):
            return "revoked"
        return "expired" if now > entry.expires else "used up" if not entry.uses_left else "valid"

    # Serving

    async def serve(self, params: Plain, progress: Progress) -> Plain:
        """{model, draft, ctx, workers, engine, drafters, max_draft_tokens, allow_smaller, wait} -> {target, draft,
        endpoint, warnings}"""
        entry = self._find(text_of(params, "model"))
        if not entry.facts.architecture:
            raise ModelError(f"{entry.name} cannot be served: its header names no architecture")
        draft, warnings = await self._wish(entry, params.get("draft", "auto"))
        record = ServeRecord(
            want=Want.PINNED,
            model=entry.model,
            draft=draft,
            context=_int(params, "ctx", 0, 1 << 24, low=0),
            workers=_int(params, "workers", -1, 16, low=-1),
            engine=_engine(params),
            drafters=self._drafters(params),
            max_draft=_max_draft(params),
            allow_smaller=params.get("allow_smaller") is True,
            version=next_version(self._mesh.record, self._mesh.epoch.counter, self._mesh.me),
        )
        self._mesh.set_record(record)
        self._agent.tell(f"serve {stem(entry.name)} was asked for on {self._mesh.row.name}", kind=Kind.POOL)
        if params.get("wait", True) is True:
            await self._ready(record, progress)
        status = self._agent.status()
        return {
            "target": status["target"],
            "draft": status["draft"],
            "endpoint": status["endpoint"],
            "warnings": warnings,
        }

    def _drafters(self, params: Plain) -> tuple[NodeId, ...]:
        """The nodes of these names or ids; all of the cluster are known by name, living or not."""
        names = params.get("drafters") or []
        if not isinstance(names, list) or len(names) > MAX_DRAFTERS:
            raise UsageError(f"drafters: a list of at most {MAX_DRAFTERS} names is expected")
        return tuple(dict.fromkeys(self._node(name) for name in names))

    def _node(self, name: object) -> NodeId:
        peers = self._mesh.peers()
        found = [p.node for p in peers if name in (str(p.node), p.node.short, str(p.row.name) if p.row else None)]
        if len(found) == 1:
            return found[0]
        there = ", ".join(sorted(str(p.row.name) for p in peers if p.row))
        why = "no machine of the cluster is" if not found else f"{len(found)} machines are"
        raise UsageError(f"drafters: {why} called {str(name)[:64]!r}", hint=f"there are: {there}")

    async def _wish(self, target: Entry, wish: object) -> tuple[str, list[str]]:
        """What the record should say of the draft, and what the person should know."""
        if not isinstance(wish, str) or wish in ("auto", "off"):
            return ("off" if wish == "off" else "auto"), []
        draft = self._find(wish)
        if draft.facts.vocab == target.facts.vocab and draft.model != target.model:
            return str(draft.model), []
        if draft.model == target.model:
            return "off", ["a model cannot draft for itself; serving without a draft"]
        difference = await self._difference(target, draft)
        why = f"{stem(draft.name)} cannot draft for {stem(target.name)}: {difference}; serving without a draft"
        self._agent.tell(why, kind=Kind.DRAFTING)
        return "off", [why]

    async def _difference(self, target: Entry, draft: Entry) -> str:
        """The first difference of two vocabularies, as a node that holds both files sees it."""
        both = set(target.complete_on) & set(draft.complete_on)
        for node in sorted(both, key=lambda n: n != self._mesh.me):
            try:
                with peer_errors(CALL_S):
                    params = {"target": str(target.model), "draft": str(draft.model)}
                    answer = await self._mesh.call(node, VOCAB, params)
            except PeerError as exc:
                log.info("%s could not compare the vocabularies: %s", self._mesh.name_of(node), exc)
                continue
            if isinstance(said := answer.get("difference"), str) and said:
                return said[:500]
        return "its vocabulary is another one (no machine holds both files, so the first difference is not known)"

    async def _vocab_here(self, _peer: NodeId, params: Plain) -> Plain:
        target, draft = model_of(params, "target"), model_of(params, "draft")
        return {"difference": await self._agent.swarm.vocab_difference(target, draft) or ""}

    async def _ready(self, record: ServeRecord, progress: Progress) -> None:
        """Returns when the cluster serves this record. Raises when it cannot, or another record took its place."""
        since = trio.current_time()
        while True:
            target = self._agent.serving()["target"]
            if self._mesh.record.version != record.version:
                raise UsageError("something else was asked for in the meantime", hint="see: tightwad-agent status")
            if tuple(target["version"]) == record.version:
                since = trio.current_time()
                if target["state"] == "ready":
                    return
                if target["state"] == "failed":
                    raise EngineError(target["detail"])
                self._show(target, progress)
            elif trio.current_time() > since + NO_VIEW_S:
                raise NotReady("no coordinator took the command up", hint="see: tightwad-agent status")
            await trio.sleep(POLL_S)

    def _show(self, target: Plain, progress: Progress) -> None:
        if target["state"] != "fetching":
            progress({"stage": f"{target['state']}: {target['detail']}"[:200], "done": 0, "total": 0, "unit": ""})
            return
        for t in self._agent.swarm.snapshot().transfers:
            if t.done < t.total:
                progress({"stage": f"fetching {t.name}", "done": t.done, "total": t.total, "unit": "bytes"})

    async def stop(self, _params: Plain, _progress: Progress) -> Plain:
        await trio.lowlevel.checkpoint()
        version = next_version(self._mesh.record, self._mesh.epoch.counter, self._mesh.me)
        self._mesh.set_record(ServeRecord(want=Want.NONE, version=version))
        self._agent.tell(f"stop was asked for on {self._mesh.row.name}", kind=Kind.POOL)
        return {"stopped": True}

    # Looking

    async def peers(self, _params: Plain, _progress: Progress) -> Plain:
        await trio.lowlevel.checkpoint()
        return {"peers": self._agent.peers(), "nearby": [report.nearby(s) for s in self._mesh.nearby()]}

    async def status(self, _params: Plain, _progress: Progress) -> Plain:
        await trio.lowlevel.checkpoint()
        return self._agent.status()

    async def leave(self, _params: Plain, _progress: Progress) -> Plain:
        """Says goodbye and ends the agent; the caller forgets the identity afterwards."""
        await trio.lowlevel.checkpoint()
        self._agent.stopping.set()
        return {"cluster": str(self._agent.identity.cluster)}

    def _find(self, text: str) -> Entry:
        return find(text, self._agent.conductor.catalogue())


def _int(params: Plain, key: str, default: int, high: int, *, low: int = 1) -> int:
    value = params.get(key, default)
    if type(value) is not int or not low <= value <= high:
        raise UsageError(f"{key}: {value!r} is out of range, {low} to {high} is allowed")
    return value


def _engine(params: Plain) -> str:
    wish = params.get("engine", AUTO)
    if wish not in ENGINES:
        raise UsageError(f"engine: {str(wish)[:32]!r} is none of {', '.join(ENGINES)}")
    return str(wish)


def _max_draft(params: Plain) -> int:
    """As `ServeRecord.max_draft`."""
    limit = params.get("max_draft_tokens")
    return -1 if limit is None else draft_limit(str(limit))
