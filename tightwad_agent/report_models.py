"""The models of the cluster as plain data: what rows say, and what nodes told of themselves when asked. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from tightwad_agent.decide import Catalogue, Entry
from tightwad_agent.ids import ModelId, NodeId, SafeName
from tightwad_agent.swarm.inventory import MOVING, ModelState

Plain = dict[str, Any]
Told = Mapping[NodeId, Iterable[ModelState]]
Expected = Mapping[ModelId, frozenset[NodeId]]

WAITING = "waiting"
NOTHING: Mapping[Any, Any] = MappingProxyType({})


def models(
    entries: Catalogue, names: Mapping[NodeId, str], serving: Plain, told: Told = NOTHING, expected: Expected = NOTHING
) -> list[Plain]:
    """The catalogue, by name. `told`: the state of models on each node that answered; `expected`: nodes that are to
    have a model, whether they have begun or not."""
    states = {node: {s.model: s for s in found} for node, found in told.items()}
    whole = complete_catalogue(entries, told)
    target, draft = serving["target"]["id"], serving["draft"]["id"]
    return [
        {
            "id": str(e.model),
            "name": str(e.name),
            "size": e.size,
            "architecture": e.facts.architecture,
            "quantisation": e.facts.quantisation,
            "parameters": e.facts.n_params,
            "context": e.facts.context_train,
            "served": e.model == target,
            "draft": e.model == draft,
            "nodes": [
                _node(e, node, names.get(node, node.short), states.get(node, {}).get(e.model))
                for node in _nodes(e, states, expected)
            ],
        }
        for e in sorted(whole.values(), key=lambda e: (e.name, e.model))
    ]


def complete_catalogue(entries: Catalogue, told: Told) -> dict[ModelId, Entry]:
    """The catalogue with what nodes cannot offer now, or have nothing of yet; their `have` is 0."""
    found = dict(entries)
    for node, states in told.items():
        for s in states:
            entry = found.get(s.model)
            if entry is not None and node not in entry.have:
                found[s.model] = Entry(entry.model, entry.name, entry.size, entry.facts, {**entry.have, node: 0})
            elif entry is None and s.size > 0 and SafeName.is_valid(s.name):
                found[s.model] = Entry(s.model, SafeName(s.name), s.size, s.facts, {node: 0})
    return found


def on_its_way(found: Iterable[Plain]) -> bool:
    """Whether any model of `models` is still coming to any node."""
    return any(node["moving"] for model in found for node in model["nodes"])


def _nodes(e: Entry, states: Mapping[NodeId, Mapping[ModelId, ModelState]], expected: Expected) -> list[NodeId]:
    nodes = dict.fromkeys(e.have)
    nodes |= dict.fromkeys(sorted(n for n, found in states.items() if e.model in found))
    nodes |= dict.fromkeys(sorted(expected.get(e.model, frozenset())))
    return list(nodes)


def _node(e: Entry, node: NodeId, name: str, state: ModelState | None) -> Plain:
    have = min(state.have if state else e.have.get(node, 0), e.size)
    phase = state.phase if state else "complete" if have >= e.size else "fetching" if node in e.have else WAITING
    return {
        "id": str(node),
        "name": name,
        "have": have,
        "copy": None if state is None else "in place" if state.in_place else "own",
        "phase": phase,
        "moving": phase in MOVING,
        "rate": state.rate if state else 0,
        "sources": state.sources if state else 0,
        "reused": state.reused if state else 0,
        "problem": state.detail if state else "",
    }
