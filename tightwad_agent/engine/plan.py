"""Which machines a model is placed on, and why. Pure.

The rule: what fits on the coordinator is not pooled, because each worker costs a network round trip per token. Else the
fewest other machines, most free memory first. They take as many layers as they hold, the rest stays with the
coordinator, and so do the output head and the draft model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tightwad_agent.engine.argv import MAX_DEVICES, MAX_RPC_SERVERS
from tightwad_agent.errors import DoesNotFit, EngineMissing
from tightwad_agent.ids import ModelId, NodeId
from tightwad_agent.units import size
from tightwad_agent.wire.rows import EngineInfo, HeldModel, NodeRow

OVERHEAD_BYTES = 200_000_000
MARGIN = 0.10
DEFAULT_CONTEXT = 8192
CPU = "CPU"
_PINNED_BUILD = re.compile(r"b\d+\Z")
"""A build that is known by its number. Two machines that compiled the same source have other binaries, because each
compiled for its own CPU; they fit all the same."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One node as the planner sees it.

    `reclaimable`: bytes that the running pool holds there and that a new plan may use again (its share in the plan that
    is running); without it a loaded machine looks full.
    """

    row: NodeRow
    alive: bool = True
    reclaimable: int = 0


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """One device as llama.cpp names it, and the bytes it may hold: its relative share of the layers."""

    name: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """One other machine of the pool. `digest`: the engine it must run, as the plan was made for."""

    node: NodeId
    devices: tuple[DeviceUse, ...]
    digest: str = ""

    @property
    def n_bytes(self) -> int:
        return sum(device.n_bytes for device in self.devices)


@dataclass(frozen=True, slots=True)
class Plan:
    """A placement. Without `workers` nothing is pooled; `offload_layers` `None` puts every layer on a device.

    `n_bytes` is what the model needs in all, `reasons` and `excluded` say why it is as it is. `step` counts what was
    given up to make it fit.
    """

    model: ModelId
    workers: tuple[WorkerUse, ...]
    draft: ModelId | None
    context: int
    n_bytes: int = 0
    offload_layers: int | None = None
    local_devices: tuple[DeviceUse, ...] = ()
    reasons: tuple[str, ...] = ()
    excluded: tuple[tuple[NodeId, str], ...] = ()
    step: int = 0


def place(
    *,
    coordinator: NodeFacts,
    others: Sequence[NodeFacts],
    model: HeldModel,
    draft: HeldModel | None = None,
    context: int = 0,
    workers: int = -1,
    spills: bool = False,
) -> Plan:
    """The placement of `model`. `context` 0: the model's own, at most 8,192; `workers` -1: as few as it takes.
    `spills`: layers may also lie in the coordinator's memory where it has devices.

    Raises `DoesNotFit` with the arithmetic, and `EngineMissing` where the coordinator itself cannot run llama.cpp.
    """
    here = coordinator.row.capabilities
    if not here.engine.usable:
        raise EngineMissing(f"{coordinator.row.name} coordinates, but has no usable engine: {_problem(here.engine)}")
    reasons: list[str] = []
    n_context = _context(model, context, reasons)
    need = _need(model, n_context)
    local = _accelerators(coordinator)
    memory = here.memory_free + (0 if local else coordinator.reclaimable)
    draft_bytes = 0 if draft is None else draft_need(draft, n_context)
    if draft is not None and draft_bytes + OVERHEAD_BYTES > memory:
        reasons.append(
            f"no draft: {draft.name} needs {size(draft_bytes)}, {coordinator.row.name} has {size(memory)} free"
        )
        draft, draft_bytes = None, 0
    usable, excluded = _candidates(coordinator, others)
    free = max(0, memory - draft_bytes)
    room = _Room(need=need, local=local, memory=free, n_layers=model.facts.n_layers, spills=spills)
    chosen = _choose(room, usable, workers, coordinator, reasons)
    if chosen is None:
        raise _does_not_fit(
            model=model,
            context=n_context,
            room=room,
            here=coordinator,
            usable=usable,
            excluded=excluded,
            workers=workers,
        )
    return Plan(
        model=model.model,
        workers=tuple(chosen),
        draft=None if draft is None else draft.model,
        context=n_context,
        n_bytes=need + draft_bytes,
        offload_layers=room.offload_layers(chosen, reasons, coordinator) if chosen else None,
        local_devices=local,
        reasons=tuple(reasons),
        excluded=tuple(excluded),
    )


@dataclass(frozen=True, slots=True)
class _Room:
    """What the model needs and what the coordinator has; `memory` is what is left of its RAM beside the draft."""

    need: int
    local: tuple[DeviceUse, ...]
    memory: int
    n_layers: int
    spills: bool = False

    @property
    def on_local_devices(self) -> int:
        return sum(device.n_bytes for device in self.local)

    def fits_here(self) -> bool:
        return self.need <= max(self.on_local_devices, self.memory)

    @property
    def own_share(self) -> int:
        """What the coordinator adds to a pool. Its RAM counts only without devices, or if it may spill and then not
        beside them (both may be the same memory), and only if we know how many layers there are to leave in it."""
        memory = self.memory if self.n_layers else 0
        return max(self.on_local_devices, memory) if self.spills else self.on_local_devices or memory

    def fits(self, chosen: Sequence[WorkerUse]) -> bool:
        return bool(chosen) and self.need <= self.own_share + sum(worker.n_bytes for worker in chosen)

    def offload_layers(self, chosen: Sequence[WorkerUse], reasons: list[str], here: NodeFacts) -> int | None:
        on_devices = self.on_local_devices + sum(worker.n_bytes for worker in chosen)
        if on_devices >= self.need:
            return None
        n_offloaded = self.n_layers * on_devices // self.need
        reasons.append(
            f"the first {self.n_layers - n_offloaded} of {self.n_layers} layers stay in the memory of {here.row.name}"
        )
        return n_offloaded


def _choose(
    room: _Room, usable: Sequence[WorkerUse], workers: int, here: NodeFacts, reasons: list[str]
) -> list[WorkerUse] | None:
    """The other machines to use, `[]` for none; `None` if it does not fit."""
    if workers > 0:
        chosen = list(usable[:workers])
        wanted = "1 other machine was" if workers == 1 else f"{workers} other machines were"
        reasons.append(f"{wanted} asked for" + ("" if len(chosen) == workers else f", {len(chosen)} can be used"))
        if room.fits(chosen):
            return chosen
        return [] if not chosen and room.fits_here() else None
    if room.fits_here():
        reasons.append(
            f"not pooled: {size(room.need)} fit on {here.row.name}, and a worker costs a round trip per token"
        )
        return []
    if workers == 0:
        return None
    for n in range(1, len(usable) + 1):
        if room.fits(usable[:n]):
            reasons.append(f"pooled over {n} of {len(usable)} usable machines: {size(room.need)} do not fit on one")
            return list(usable[:n])
    return None


def _candidates(here: NodeFacts, others: Sequence[NodeFacts]) -> tuple[list[WorkerUse], list[tuple[NodeId, str]]]:
    """The machines that can take part, most free memory first, and why the others cannot."""
    usable: list[WorkerUse] = []
    excluded: list[tuple[NodeId, str]] = []
    for other in others:
        if reason := _unfit(here, other):
            excluded.append((other.row.node, reason))
            continue
        usable.append(WorkerUse(other.row.node, _offered(other), other.row.capabilities.engine.digest))
    usable.sort(key=lambda worker: (-worker.n_bytes, worker.node))
    kept: list[WorkerUse] = []
    n_free = MAX_DEVICES - len(_accelerators(here))
    for worker in usable:
        if len(kept) == MAX_RPC_SERVERS or len(worker.devices) > n_free:
            excluded.append(
                (worker.node, f"llama.cpp takes {MAX_DEVICES} devices and {MAX_RPC_SERVERS} workers at most")
            )
            continue
        n_free -= len(worker.devices)
        kept.append(worker)
    return kept, excluded


def _unfit(here: NodeFacts, other: NodeFacts) -> str:
    """Why a machine cannot be a worker, or empty text."""
    mine, theirs = here.row.capabilities, other.row.capabilities
    if not other.alive:
        return "not reachable"
    if not theirs.engine.usable:
        return f"no usable engine: {_problem(theirs.engine)}"
    if theirs.engine.protocol != mine.engine.protocol:
        return f"speaks RPC {theirs.engine.protocol}, {here.row.name} speaks {mine.engine.protocol}"
    if theirs.engine.build != mine.engine.build:
        return f"runs llama.cpp {theirs.engine.build}, {here.row.name} runs {mine.engine.build}"
    unpinned = not _PINNED_BUILD.match(theirs.engine.build)
    if unpinned and theirs.platform == mine.platform and theirs.engine.digest != mine.engine.digest:
        return f"its engine is of an unknown build ({theirs.engine.digest[:12] or 'unknown'}), and not this machine's"
    free = sum(device.n_bytes for device in _offered(other))
    if free <= OVERHEAD_BYTES:
        return f"only {size(free)} of device memory free"
    return ""


def _problem(engine: EngineInfo) -> str:
    return engine.problem or "none is installed"


def _accelerators(node: NodeFacts) -> tuple[DeviceUse, ...]:
    """Offered devices beside the CPU."""
    return tuple(device for device in _offered(node) if device.name != CPU)


def _offered(node: NodeFacts) -> tuple[DeviceUse, ...]:
    """Offered devices with memory; what the running pool holds there counts as free again."""
    found = [d for d in node.row.capabilities.devices if d.memory_total > 0]
    total = sum(d.memory_total for d in found)
    free = [min(d.memory_total, d.memory_free + node.reclaimable * d.memory_total // total) for d in found]
    return tuple(DeviceUse(d.name, n_bytes) for d, n_bytes in zip(found, free, strict=True) if n_bytes > 0)


def _context(model: HeldModel, asked: int, reasons: list[str]) -> int:
    trained = model.facts.context_train
    if asked <= 0:
        context = min(trained, DEFAULT_CONTEXT) if trained > 0 else DEFAULT_CONTEXT
        if trained > context:
            reasons.append(f"context {context}: the model was trained for {trained}, more must be asked for")
        return context
    if 0 < trained < asked:
        reasons.append(f"context {trained}: the model was not trained for the {asked} that were asked for")
        return trained
    return asked


def context_of(model: HeldModel, asked: int) -> int:
    """The tokens that `place` plans for."""
    return _context(model, asked, [])


def _need(model: HeldModel, context: int) -> int:
    kv = model.facts.kv_bytes_per_token * context
    return model.size + kv + int(MARGIN * model.size) + OVERHEAD_BYTES


def draft_need(draft: HeldModel, context: int) -> int:
    """Bytes that a draft model takes with a cache for `context` tokens."""
    return draft.size + draft.facts.kv_bytes_per_token * context + int(MARGIN * draft.size)


def _does_not_fit(
    *,
    model: HeldModel,
    context: int,
    room: _Room,
    here: NodeFacts,
    usable: Sequence[WorkerUse],
    excluded: Sequence[tuple[NodeId, str]],
    workers: int,
) -> DoesNotFit:
    kv = model.facts.kv_bytes_per_token * context
    sums = (
        f"{size(model.size)} of weights + {size(kv)} of KV cache ({context} tokens) + {MARGIN:.0%} + "
        f"{size(OVERHEAD_BYTES)} = {size(room.need)}"
    )
    counted = usable if workers < 0 else usable[:workers]
    mine = room.own_share if counted else max(room.on_local_devices, room.memory)
    there = [f"{worker.node.short} {size(worker.n_bytes)}" for worker in counted]
    free = ", ".join([f"{here.row.name} {size(mine)}", *there])
    missing = room.need - mine - sum(worker.n_bytes for worker in counted)
    short = f", {size(missing)} short" if missing > 0 else ""
    left_out = f" Not counted: {'; '.join(f'{node.short} {why}' for node, why in excluded)}." if excluded else ""
    return DoesNotFit(
        f"{model.name} does not fit: {sums}; free: {free}{short}.{left_out}",
        hint="Add a machine, free memory, ask for less context, or choose a smaller quantisation.",
    )
