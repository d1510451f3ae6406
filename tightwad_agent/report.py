"""What the agent says of itself as plain data, for `--json`, tables and the HTTP status. No secrets in here, ever."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from tightwad_agent.conductor import Serving
from tightwad_agent.decide import Catalogue, DraftChoice, stem
from tightwad_agent.engine.draft_plan import VERIFIER
from tightwad_agent.engine.pool import Back
from tightwad_agent.events import Event
from tightwad_agent.ids import ModelId, NodeId
from tightwad_agent.mesh.mdns import Sighting
from tightwad_agent.mesh.paths import PathView
from tightwad_agent.mesh.service import PeerStatus
from tightwad_agent.proxy.tally import Tally, share
from tightwad_agent.swarm.service import TransferStatus
from tightwad_agent.units import size
from tightwad_agent.wire.rows import Capabilities, EngineInfo

Plain = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Speculation:
    """Counters of the running llama-server since it was started."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterView:
    """One that drafts, or might. `state` in a word or two (`drafting`, `standing by`, `starting`, `left`), `reason`
    where it does not draft; `id` is empty for the drafter without a model. What was not measured is `None`."""

    name: str
    state: str
    id: str = ""
    reason: str = ""
    tokens_per_s: float | None = None
    first_token_ms: float | None = None
    acceptance: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationView:
    """How drafting goes, for a person. `decision`: what the coordinator does about drafts now, in words.

    `acceptance_at`: the accepted share by position in the draft. `verify_ms` of a round, `draft_ms` of a draft token:
    means. `hidden`: the share of the drafting during which a round ran. `rollback`: what the model's memory does not
    allow, empty if nothing.
    """

    engine: str = ""
    engine_reason: str = ""
    decision: str = ""
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    acceptance_at: tuple[float | None, ...] = ()
    tokens_per_round: float | None = None
    verify_ms: float | None = None
    draft_ms: float | None = None
    hidden: float | None = None
    drafters: tuple[DrafterView, ...] = ()
    rollback: str = ""

    @classmethod
    def of(
        cls,
        tally: Tally,
        *,
        engine: str,
        engine_reason: str = "",
        decision: str = "",
        drafters: Iterable[DrafterView] = (),
        rollback: str = "",
    ) -> SpeculationView:
        """With the figures of a tally."""
        return cls(
            engine=engine,
            engine_reason=engine_reason,
            decision=decision,
            rounds=tally.rounds,
            drafted=tally.drafted,
            accepted=tally.accepted,
            acceptance_at=tally.acceptance_at,
            tokens_per_round=tally.tokens_per_round,
            verify_ms=share(tally.verify_ms, tally.rounds),
            draft_ms=share(tally.draft_ms, tally.drafted),
            hidden=tally.hidden,
            drafters=tuple(drafters),
            rollback=rollback,
        )


def engine(info: EngineInfo) -> Plain:
    return dataclasses.asdict(info)


def peer(status: PeerStatus, me: NodeId, coordinator: NodeId | None) -> Plain:
    """One row of `peers --json`."""
    row = status.row
    caps = row.capabilities if row else Capabilities()
    return {
        "id": str(status.node),
        "name": str(row.name) if row else status.node.short,
        "state": str(status.state),
        "reach": str(status.reach),
        "reason": status.reason,
        "self": status.node == me,
        "coordinator": status.node == coordinator,
        "role": str(row.role) if row else "",
        "address": str(status.address) if status.address else "",
        "endpoint_port": row.endpoint_port if row else 0,
        "rtt_ms": None if status.rtt_s is None else round(status.rtt_s * 1000, 2),
        "paths": [path(p) for p in status.paths],
        "platform": caps.platform,
        "cpu": caps.cpu,
        "cores": caps.n_cores,
        "devices": [dataclasses.asdict(d) for d in caps.devices],
        "memory_total": caps.memory_total,
        "memory_free": caps.memory_free,
        "disk_free": caps.disk_free,
        "engine": engine(caps.engine),
        "models": [
            {"id": str(m.model), "name": str(m.name), "size": m.size, "have": m.have}
            for m in (row.models if row else ())
        ],
        "note": row.note if row else "",
    }


def links(peers: Iterable[PeerStatus]) -> list[Plain]:
    """How each other living node is reached: `links` of `status --json`."""
    return [_link(status) for status in peers if status.state.living]


def _link(status: PeerStatus) -> Plain:
    used = next((path(p) for p in status.paths if p.in_use), None)
    return {
        "name": str(status.row.name) if status.row else status.node.short,
        "reach": str(status.reach),
        "address": used["address"] if used else "",
        "rtt_ms": None if status.rtt_s is None else round(status.rtt_s * 1000, 2),
        "mbit_s": used["mbit_s"] if used else None,
    }


def answers(tally: Tally) -> Plain:
    """`answers` of `status --json`: those that went on after their engine was lost, of requests to this node."""
    return {
        "resumed": tally.n_resumed,
        "longest_pause_s": round(tally.longest_pause_s, 3),
        "paused_s": round(tally.paused_s, 3),
    }


def restart(back: Back, names: Mapping[NodeId, str]) -> Plain:
    """When what is served was lost for the last time and came back, how long that took and why."""
    node, reason = back.loss.node, back.loss.reason
    why = f"{names.get(node, node.short)}: {reason}" if node else reason
    return {"at": iso(back.at), "took_s": round(back.seconds, 1), "reason": why}


def path(view: PathView) -> Plain:
    """One address of a node; nulls for what was not measured."""
    measured = view.rtt_s is not None and view.rtt_s < math.inf
    return {
        "address": str(view.address),
        "in_use": view.in_use,
        "works": view.works,
        "rtt_ms": round((view.rtt_s or 0.0) * 1000, 2) if measured else None,
        "mbit_s": None if view.rate is None else round(view.rate * 8 / 1e6, 1),
    }


def nearby(sighting: Sighting) -> Plain:
    """An agent of another cluster, as it announces itself."""
    advert = sighting.advert
    devices = ", ".join(d.name for d in advert.devices)
    detail = ", ".join(t for t in (devices, f"{size(advert.memory_total)} of memory") if t)
    address = str(sighting.addresses[0]) if sighting.addresses else "?"
    return {"id": str(sighting.node), "name": str(advert.name), "address": address, "detail": detail}


def transfer(status: TransferStatus) -> Plain:
    return {
        "id": str(status.model),
        "name": status.name,
        "state": str(status.phase),
        "have": status.done,
        "size": status.total,
        "rate": round(status.rate),
        "sources": status.sources,
        "reused": status.reused,
        "from_each_peer": {str(node): n for node, n in status.from_each_peer.items()},
        "uploaded": status.uploaded,
        "problem": status.problem,
    }


def serving(
    now: Serving,
    names: Mapping[NodeId, str],
    entries: Catalogue,
    spec: Speculation | SpeculationView,
    traffic: Mapping[NodeId, int],
    *,
    saved: Mapping[NodeId, int] = MappingProxyType({}),
    back: Back | None = None,
) -> Plain:
    """`target`, `draft` and `speculation` of `status --json`; the coordinator's view. `traffic` with each worker in the
    engine's bytes; `saved` of those did not have to cross. `back`: the last time that it was lost and came back."""
    plan = now.plan
    workers = [
        {
            "id": str(use.node),
            "name": names.get(use.node, use.node.short),
            "devices": [d.name for d in use.devices],
            "bytes": traffic.get(use.node, 0),
            "bytes_saved": saved.get(use.node, 0),
        }
        for use in (plan.workers if plan else ())
    ]
    left_out = [f"{names.get(n, n.short)} left out: {why}" for n, why in (plan.excluded if plan else ())]
    return {
        "target": {
            "model": stem(now.model.name) if now.model else None,
            "id": str(now.model.model) if now.model else None,
            "state": now.state,
            "detail": now.detail,
            "workers": workers,
            "engine": (spec.engine if isinstance(spec, SpeculationView) else "") or (now.engine and now.engine.engine),
            "context": now.context,
            "version": list(now.version),
            "restart": restart(back, names) if back else None,
            "reasons": [
                *([now.engine.reason] if plan and now.engine else []),
                *(plan.reasons if plan else ()),
                *left_out,
            ],
        },
        "draft": draft(now.draft, entries, _used_draft(now)),
        "speculation": speculation(spec),
    }


def _used_draft(now: Serving) -> ModelId | None:
    """llama-server loads it beside the target; for the verifier others hold it."""
    if now.plan is None or now.engine is None:
        return None
    return now.draft.model if now.engine.engine == VERIFIER and now.drafters.nodes else now.plan.draft


def speculation(spec: Speculation | SpeculationView) -> Plain:
    """`speculation` of `status --json`, with the same keys whatever engine serves."""
    if isinstance(spec, Speculation):
        spec = SpeculationView(rounds=spec.rounds, drafted=spec.drafted, accepted=spec.accepted)
    plain = dataclasses.asdict(spec)
    plain["acceptance"] = share(spec.accepted, spec.drafted)
    plain["drafters"] = [_rounded(d) for d in plain["drafters"]]
    plain["acceptance_at"] = [_round(value) for value in plain["acceptance_at"]]
    return _rounded(plain)


def _rounded(plain: Plain) -> Plain:
    return {key: _round(value) for key, value in plain.items()}


def _round(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def draft(choice: DraftChoice, entries: Catalogue, used: ModelId | None) -> Plain:
    entry = entries.get(choice.model) if choice.model else None
    return {
        "model": stem(entry.name) if entry and used else None,
        "id": str(used) if used else None,
        "reason": choice.reason,
    }


NOT_SERVING: Plain = serving(Serving(), {}, {}, Speculation(), {})


def events(found: Sequence[Event], with_names: Callable[[str], str] = str) -> list[Plain]:
    """With the time in ISO 8601, UTC. `with_names` puts names in place of ids that had none when it was told."""
    return [
        {"at": iso(e.at), "kind": str(e.kind), "text": with_names(e.text), "facts": dict(e.facts), "seq": e.seq}
        for e in found
    ]


def iso(at: float) -> str:
    """Unix seconds as `2026-01-31T23:59:59Z`."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
