"""What the cluster should serve and which files should be where, from what the nodes say of themselves. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tightwad_agent.errors import UnknownModel, UsageError
from tightwad_agent.ids import ModelId, NodeId, SafeName
from tightwad_agent.wire.rows import ModelFacts, NodeRow, ServeRecord, Want

MAX_SMALLER = 2
"""So many smaller quantisations of the target are kept ready at most."""
DRAFT_MAX_SHARE = 0.5
"""A draft must be at most this share of the target's bytes: a same-size draft costs as much as it saves."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of the catalogue: `have` says how many of its bytes each living node holds."""

    model: ModelId
    name: SafeName
    size: int
    facts: ModelFacts
    have: Mapping[NodeId, int]

    @property
    def holders(self) -> frozenset[NodeId]:
        return frozenset(self.have)

    @property
    def complete_on(self) -> tuple[NodeId, ...]:
        return tuple(sorted(n for n, have in self.have.items() if have >= self.size))


Catalogue = Mapping[ModelId, Entry]


def catalogue(rows: Iterable[NodeRow]) -> dict[ModelId, Entry]:
    """Every model that a living node holds a part of."""
    found: dict[ModelId, Entry] = {}
    for row in sorted(rows, key=lambda r: r.node):
        for held in row.models:
            if held.size < 1:
                continue  # no manifest allows it: a row is what its node says
            have = max(0, min(held.have, held.size))
            entry = found.get(held.model)
            if entry is None:
                found[held.model] = Entry(held.model, held.name, held.size, held.facts, {row.node: have})
            elif entry.size == held.size:
                facts = entry.facts if entry.facts.architecture else held.facts
                found[held.model] = Entry(entry.model, entry.name, entry.size, facts, {**entry.have, row.node: have})
    return found


def stem(name: str) -> str:
    """A model's name without `.gguf`."""
    return name[:-5] if name.lower().endswith(".gguf") else name


def matches(entry: Entry, text: str) -> bool:
    """Whether a person who wrote `text` meant this model exactly."""
    wanted = text.lower()
    return wanted in (entry.name.lower(), stem(entry.name).lower(), entry.model, entry.model.short)


def find(text: str, models: Catalogue) -> Entry:
    """The model a person meant: name, name without `.gguf`, id, or an unambiguous part of a name.

    Raises `UnknownModel` that says which are there, `UsageError` when several fit.
    """
    exact = [e for e in models.values() if matches(e, text)]
    loose = exact or [e for e in models.values() if text and text.lower() in e.name.lower()]
    if len(loose) == 1:
        return loose[0]
    if not loose:
        there = ", ".join(sorted(stem(e.name) for e in models.values()))
        hint = f"in the catalogue: {there}" if there else "the catalogue is empty; `tightwad-agent add` puts models in"
        raise UnknownModel(f"no model is called {text!r}", hint=hint)
    options = ", ".join(sorted(f"{stem(e.name)} ({e.model.short})" for e in loose))
    raise UsageError(f"{text!r} fits several models: {options}", hint="use the whole name or the id in brackets")


def candidates(models: Catalogue) -> list[Entry]:
    """What may be served when nobody said what: complete GGUFs, the largest first, then by name."""
    able = [e for e in models.values() if e.complete_on and e.facts.architecture]
    return sorted(able, key=lambda e: (-e.size, e.name, e.model))


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """A draft model or none, and why."""

    model: ModelId | None
    reason: str


def choose_draft(target: Entry, models: Catalogue, wish: str) -> DraftChoice:
    """The draft for a target. `wish`: `auto`, `off`, or a model id.

    `auto` takes the smallest model of the same vocabulary that is at most half the target's size. A wished-for draft
    with another vocabulary is not used: serving goes on without, and the reason says so.
    """
    if wish == "off":
        return DraftChoice(None, "speculation is switched off (--draft off)")
    if wish != "auto":
        draft = next((e for e in models.values() if e.model == wish), None)  # a peer's wish may be any text
        if draft is None:
            return DraftChoice(None, f"the draft {wish[:12]} is no longer in the catalogue")
        if draft.model == target.model:
            return DraftChoice(None, "a model cannot draft for itself")
        if not draft.facts.vocab or draft.facts.vocab != target.facts.vocab:
            return DraftChoice(None, f"{stem(draft.name)} has another vocabulary than {stem(target.name)}")
        return DraftChoice(draft.model, f"{stem(draft.name)} was chosen by hand")
    able = [
        e
        for e in models.values()
        if e.complete_on
        and e.model != target.model
        and e.facts.vocab
        and e.facts.vocab == target.facts.vocab
        and e.size <= target.size * DRAFT_MAX_SHARE
    ]
    best = min(able, key=lambda e: (e.size, e.model), default=None)
    if best is None:
        return DraftChoice(None, "no model of the same vocabulary and at most half the size is in the catalogue")
    return DraftChoice(
        best.model, f"{stem(best.name)} has the same vocabulary and {best.size / target.size:.0%} of the size"
    )


_QUANTISATION = re.compile(r"[-._]((i|ud-i|ud-)?q\d\w*|tq\d\w*|mxfp4\w*|bf16|f16|fp16|f32|fp32)$", re.IGNORECASE)


def base(name: str) -> str:
    """A model's name without its quantisation, for comparison."""
    return _QUANTISATION.sub("", stem(name)).lower()


def smaller(entry: Entry, models: Catalogue) -> list[Entry]:
    """The same model in smaller quantisations that a living node has whole, the largest first."""
    facts = entry.facts
    same = [
        e
        for e in models.values()
        if e.size < entry.size
        and e.complete_on
        and base(e.name) == base(entry.name)
        and (e.facts.architecture, e.facts.n_layers, e.facts.vocab) == (facts.architecture, facts.n_layers, facts.vocab)
    ]
    return sorted(same, key=lambda e: (-e.size, e.model))[:MAX_SMALLER]


def stand_ins(record: ServeRecord, entry: Entry, models: Catalogue) -> list[Entry]:
    """What may be served in the place of `entry` where it does not fit, the best first."""
    return smaller(entry, models) if record.allow_smaller and entry.facts.architecture else []


def wanted_files(record: ServeRecord, models: Catalogue) -> frozenset[ModelId]:
    """The files a node that may become coordinator should hold: the target, its draft, and what may stand in for it."""
    if record.want is Want.NONE or record.model is None or record.model not in models:
        return frozenset()
    entry = models[record.model]
    draft = choose_draft(entry, models, record.draft).model
    others = {e.model for e in stand_ins(record, entry, models)}
    return frozenset({record.model} | ({draft} if draft else set()) | others)


def next_version(record: ServeRecord, epoch_counter: int, node: NodeId) -> tuple[int, int, str]:
    """The version of an edit of `record` made now on `node`: greater than what it replaces."""
    counter = max(record.version[0], epoch_counter)
    return (counter, record.version[1] + 1, node)
