"""Which engine serves a target, and which machines draft for it. Pure.

The verifier serves what is pooled, because there each forward pass pays the network's round trips and a draft from any
machine saves most of them. What fits on one machine is llama-server's, with its own draft beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tightwad_agent.engine.plan import NodeFacts, Plan, draft_need
from tightwad_agent.ids import NodeId
from tightwad_agent.units import size
from tightwad_agent.wire.rows import HeldModel

VERIFIER = "verifier"
LLAMA_SERVER = "llama-server"
AUTO = "auto"
ENGINES = (AUTO, VERIFIER, LLAMA_SERVER)

MAX_AUTO_DRAFTERS = 2
"""Drafters that are started unasked: the better one drafts, the other takes over."""


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """`verifier` or `llama-server`, and why."""

    engine: str
    reason: str


def choose_engine(wish: str, *, pooled: bool, drafters_named: bool) -> EngineChoice:
    """What serves a target that is `pooled` or not. `wish`: what was asked for; with `auto` it is decided here.
    `drafters_named`: someone said which machines are to draft."""
    if wish in (VERIFIER, LLAMA_SERVER):
        return EngineChoice(wish, f"{wish} was asked for (--engine {wish})")
    if pooled:
        return EngineChoice(VERIFIER, "the model is pooled, and drafts from any machine save round trips")
    if drafters_named:
        return EngineChoice(VERIFIER, "drafts come from other machines (--drafters)")
    return EngineChoice(LLAMA_SERVER, "the model fits on one machine")


@dataclass(frozen=True, slots=True)
class DrafterPlan:
    """The machines that draft, best first, and why others do not."""

    nodes: tuple[NodeId, ...] = ()
    reasons: tuple[str, ...] = ()


def place_drafters(
    *,
    draft: HeldModel,
    complete_on: Collection[NodeId],
    nodes: Sequence[NodeFacts],
    plan: Plan,
    coordinator: NodeId,
    wanted: Sequence[NodeId] = (),
) -> DrafterPlan:
    """Who drafts. Machines with nothing else to do first, then the coordinator, then the workers of the plan; at most
    `MAX_AUTO_DRAFTERS`, or exactly those of `wanted` that can. `nodes`: the living, with what a running draft server of
    theirs holds as `reclaimable`."""
    need = draft_need(draft, plan.context)
    working = {use.node for use in plan.workers}
    able: list[tuple[tuple[int, int, str], NodeId]] = []
    reasons: list[str] = []
    for facts in nodes:
        row = facts.row
        if wanted and row.node not in wanted:
            continue
        if problem := _unfit(facts, complete_on, need):
            reasons.append(f"{row.name} does not draft: {problem}")
            continue
        burden = 1 if row.node == coordinator else 2 if row.node in working else 0
        able.append(((burden, -row.klass, row.node), row.node))
    present = {facts.row.node for facts in nodes}
    reasons += [f"{node.short} does not draft: it is not reachable" for node in wanted if node not in present]
    chosen = [node for _, node in sorted(able)]
    return DrafterPlan(tuple(chosen if wanted else chosen[:MAX_AUTO_DRAFTERS]), tuple(reasons))


def _unfit(facts: NodeFacts, complete_on: Collection[NodeId], need: int) -> str:
    row = facts.row
    if not row.capabilities.engine.usable:
        return f"no usable engine: {row.capabilities.engine.problem or 'none is installed'}"
    if row.node not in complete_on:
        return "it does not hold the draft model yet"
    free = row.capabilities.memory_free + facts.reclaimable
    if free < need:
        return f"the draft needs {size(need)}, {size(free)} are free"
    return ""
