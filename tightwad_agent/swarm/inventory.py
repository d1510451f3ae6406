"""Every model of this node as it stands: complete, on its way, or with a problem.

Nodes tell one another on request. Answers of peers are read strictly: at most `MAX_MODELS`, every field checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

from tightwad_agent.errors import ProtocolError
from tightwad_agent.ids import ModelId
from tightwad_agent.swarm.store import Store
from tightwad_agent.swarm.transfer import Phase, TransferStatus
from tightwad_agent.wire.codec import NATURAL, Max, Mismatch, from_plain, to_plain
from tightwad_agent.wire.rows import MAX_MODELS, ModelFacts

MAX_TEXT = 300
"""`MAX_MODELS` of them fit into one answer, whatever characters they have."""
PROBLEM = "problem"
MOVING = frozenset({*Phase} - {Phase.IDLE, Phase.COMPLETE, Phase.FAILED} | {"waiting"})
"""Phases that end in a complete model, unless something goes wrong."""

Natural = Annotated[int, NATURAL]


@dataclass(frozen=True, slots=True)
class ModelState:
    """One model on one node. Bytes; `rate` in bytes per second; `reused` came from other files of this disk.

    `phase` is a `Phase`, `problem` for a file that is not offered, or `waiting`; `detail` says more in words.
    """

    model: ModelId
    name: Annotated[str, Max(255)]
    size: Natural
    have: Natural
    in_place: bool
    phase: Annotated[str, Max(32)]
    rate: Natural = 0
    sources: Natural = 0
    reused: Natural = 0
    detail: Annotated[str, Max(MAX_TEXT)] = ""
    facts: ModelFacts = field(default_factory=ModelFacts)


def states(store: Store, transfers: Iterable[TransferStatus]) -> tuple[ModelState, ...]:
    """What is here. Looks at memory and file status only."""
    moving = {t.model: t for t in transfers}
    found = {}
    for e in store.entries():
        text = store.problem(e)
        phase = PROBLEM if text else Phase.COMPLETE
        have = 0 if text else e.size
        found[e.root] = ModelState(
            e.root, str(e.name), e.size, have, e.in_place, phase, detail=text[:MAX_TEXT], facts=e.facts
        )
    for model, t in moving.items():
        if (model not in found or found[model].phase == PROBLEM) and (t.phase in MOVING or t.phase is Phase.FAILED):
            found[model] = _on_its_way(store, t)
    return tuple(found.values())[:MAX_MODELS]


def _on_its_way(store: Store, t: TransferStatus) -> ModelState:
    manifest = store.manifest(t.model)
    return ModelState(
        t.model,
        t.name,
        t.total,
        t.done,
        False,
        str(t.phase),
        round(t.rate),
        t.sources,
        t.reused,
        t.problem[:MAX_TEXT],
        manifest.facts if manifest else ModelFacts(),
    )


def told(found: Iterable[ModelState]) -> dict[str, Any]:
    """For another node."""
    return {"models": [to_plain(state) for state in found]}


def heard(answer: dict[str, Any]) -> tuple[ModelState, ...]:
    """From another node; raises `ProtocolError`."""
    items = answer.get("models")
    if not isinstance(items, list):
        raise ProtocolError("the state of models: a list is expected")
    try:
        return tuple(from_plain(ModelState, item) for item in items[:MAX_MODELS])
    except Mismatch as exc:
        raise ProtocolError(f"the state of models{exc}") from None
