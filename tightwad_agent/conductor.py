"""Decides, again whenever something changed, what this node fetches and, on the coordinator, what is served and where.

`decide.py` and `engine/plan.py` hold the rules; this is the loop that applies them to the mesh, the swarm and the pool.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

import trio

from tightwad_agent.decide import (
    Catalogue,
    DraftChoice,
    Entry,
    candidates,
    catalogue,
    choose_draft,
    next_version,
    stand_ins,
    stem,
    wanted_files,
)
from tightwad_agent.engine.attempt import Loss, ServedBy, TargetSpec
from tightwad_agent.engine.draft_plan import (
    LLAMA_SERVER,
    VERIFIER,
    DrafterPlan,
    EngineChoice,
    choose_engine,
    place_drafters,
)
from tightwad_agent.engine.drafting import DrafterSpec
from tightwad_agent.engine.next_best import place_best
from tightwad_agent.engine.plan import NodeFacts, Plan, draft_need, place
from tightwad_agent.engine.pool import Back, PoolPhase, PoolService
from tightwad_agent.errors import DoesNotFit, TightwadError
from tightwad_agent.events import Tell
from tightwad_agent.ids import Epoch, ModelId, NodeId
from tightwad_agent.mesh.service import MeshService
from tightwad_agent.swarm.service import SwarmService
from tightwad_agent.wire.rows import HeldModel, NodeRow, ServeRecord, Want

log = logging.getLogger(__name__)

STEP_S = 1.0
RETRY_S = 30.0
"""A target that failed is tried anew so often: a machine may have come back, or memory become free."""
EXCLUDED_S = 60.0
GO_BACK_S = 20.0
"""What had to be given up is tried again after that at the earliest: free memory goes up and down."""
_MODEL_STEP = 1000
"""Of a plan: more than any other plan of the same model."""
DRAFT_SLOTS = 4

_Key = tuple[tuple[int, int, str], Epoch, ModelId, ModelId | None]


@dataclass(frozen=True, slots=True)
class Serving:
    """What is served, for status; on the coordinator it is first-hand.

    `state`: none, waiting, fetching, starting, loading, ready, restarting or failed.
    """

    state: str = "none"
    detail: str = "nothing to serve"
    model: Entry | None = None
    draft: DraftChoice = field(default_factory=lambda: DraftChoice(None, "nothing is served"))
    plan: Plan | None = None
    context: int = 0
    version: tuple[int, int, str] = (0, 0, "")
    """Of the record that this answers to."""
    engine: EngineChoice | None = None
    drafters: DrafterPlan = field(default_factory=DrafterPlan)
    """On the verifier: who drafts."""


class Conductor:
    """See the module. `in_flight` counts requests of clients; `tell` hears of decisions in words; `set_drafters` is
    told, again and again, which machines are to draft. `free_own` ends a worker here, which a coordinator has no use
    for."""

    def __init__(
        self,
        mesh: MeshService,
        swarm: SwarmService,
        pool: PoolService,
        *,
        in_flight: Callable[[], int],
        workers: int,
        tell: Tell,
        set_drafters: Callable[[Sequence[DrafterSpec]], None] = lambda _specs: None,
        free_own: Callable[[], None] = lambda: None,
    ) -> None:
        self.serving = Serving()
        self._mesh = mesh
        self._swarm = swarm
        self._pool = pool
        self._in_flight = in_flight
        self._workers = workers
        self._tell = tell
        self._set_drafters = set_drafters
        self._free_own = free_own
        self._entry: Entry | None = None
        self._go_back_at = 0.0
        self._engine: EngineChoice | None = None
        self._drafters = DrafterPlan()
        self._key: _Key | None = None
        self._plan: Plan | None = None
        self._retry_at = 0.0
        self._started_at: float | None = None
        self._excluded: dict[NodeId, tuple[float, str]] = {}
        self._fetching: frozenset[ModelId] = frozenset()

    def catalogue(self) -> Catalogue:
        """All models of the living."""
        return catalogue(self._mesh.living_rows())

    def lost(self, loss: Loss) -> None:
        """The pool lost its target; see `PoolService`."""
        name = f"{self._mesh.name_of(loss.node)}: " if loss.node else ""
        self._tell(f"the pool went down: {name}{loss.reason}", peer=loss.node, reason=loss.reason)
        if loss.excluded and loss.node is not None:
            self._excluded[loss.node] = (trio.current_time() + EXCLUDED_S, loss.reason)
            self._key = None
        else:
            self._retry_at = trio.current_time() + RETRY_S  # for the case that the pool gives up
        self._mesh.changed.beat()

    def back(self, back: Back) -> None:
        """The pool serves again."""
        loss = back.loss
        why = f"{self._mesh.name_of(loss.node)}: {loss.reason}" if loss.node else loss.reason
        self._tell(
            f"the pool was restarted in {back.seconds:.1f} s because of this: {why}",
            took_s=back.seconds,
            peer=loss.node,
            reason=loss.reason,
        )
        self._started_at = None

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            seen = self._mesh.changed.count
            self.step()
            with trio.move_on_after(STEP_S):
                await self._mesh.changed.wait(seen)

    def step(self) -> None:
        """One look at everything."""
        models = self.catalogue()
        for model, entry in models.items():
            self._swarm.set_holders(model, entry.holders - {self._mesh.me})
        self._swarm.set_elsewhere(self._mesh.living_rows()[1:])
        self._want_files(wanted_files(self._mesh.record, models))
        if self._mesh.coordinating:
            self._free_own()
            record = self._choose(models)
            self.serving = replace(self._serve(record, models), version=record.version)
        else:
            self._put_down()
            self.serving = Serving(detail="another node coordinates")

    # Files

    def _want_files(self, wanted: frozenset[ModelId]) -> None:
        mine = wanted if self._mesh.row.eligible else frozenset()
        for model in self._fetching - mine:
            self._swarm.unwant(model)
        for model in mine - self._fetching:
            self._swarm.want(model)
        self._fetching = mine

    # The target

    def _choose(self, models: Catalogue) -> ServeRecord:
        """The record; where nobody decided, the largest model that fits becomes it."""
        record = self._mesh.record
        if record.want is not Want.AUTO or (record.model is not None and record.model in models):
            return record
        for entry in candidates(models):
            try:
                self._place(entry, None, record)
            except TightwadError:
                continue
            version = next_version(record, self._mesh.epoch.counter, self._mesh.me)
            self._tell(f"serving {stem(entry.name)}: nobody chose, and it is the largest that fits")
            self._mesh.set_record(replace(record, model=entry.model, version=version))
            return self._mesh.record
        return record

    def _serve(self, record: ServeRecord, models: Catalogue) -> Serving:
        if record.want is Want.NONE or record.model is None:
            self._put_down()
            detail = "stopped" if record.want is Want.NONE else "no model is in the catalogue, or none fits"
            return Serving(detail=detail)
        entry = models.get(record.model)
        if entry is None:
            self._put_down()
            return Serving("waiting", f"no living node has {record.model.short}, which is to be served")
        draft = choose_draft(entry, models, record.draft)
        paths = [self._swarm.path_of(m) for m in (entry.model, draft.model) if m is not None]
        if paths[0] is None or (draft.model and paths[1] is None and not self._stuck(draft.model)):
            self._put_down()
            return Serving("fetching", "the coordinator fetches the files", entry, draft)
        if draft.model and paths[1] is None:
            draft = DraftChoice(None, "its file does not come: " + self._problem_of(draft.model))
        try:
            self._pursue(record, entry, draft, models)
            self._appoint(record, draft, models)
        except TightwadError as exc:
            self._put_down()
            return Serving("failed", str(exc), entry, draft)
        return self._as_it_is(entry, draft)

    def _pursue(self, record: ServeRecord, entry: Entry, draft: DraftChoice, models: Catalogue) -> None:
        """Keeps the pool on this target; plans anew when it must or, in a quiet moment, when that is better."""
        key = self._key_of(record, entry, draft)
        occasion = self._occasion(key, record)
        if occasion is None:
            return
        placed, engine, plan = self._plan_best(record, entry, draft, models)
        if occasion == "short" and self._plan and _worth(plan) <= _worth(self._plan):
            return
        self._engine, self._entry = engine, placed
        self._go_back_at = trio.current_time() + GO_BACK_S
        self._start(self._key_of(record, entry, draft), placed, plan)
        if plan.step:
            self._tell(f"{stem(entry.name)} does not fit as it was asked for: {'; '.join(plan.reasons)}")

    def _plan_best(
        self, record: ServeRecord, entry: Entry, draft: DraftChoice, models: Catalogue
    ) -> tuple[Entry, EngineChoice, Plan]:
        """Of the model itself, or of the first that may stand in for it, fits and is here."""
        drafting = models.get(draft.model) if draft.model else None
        try:
            return entry, *self._plan_anew(record, entry, drafting)
        except DoesNotFit as exc:
            for n, other in enumerate(stand_ins(record, entry, models), 1):
                if self._swarm.path_of(other.model) is None:
                    continue
                with suppress(DoesNotFit):
                    engine, plan = self._plan_anew(record, other, drafting)
                    why = f"{stem(other.name)} in the place of {stem(entry.name)}, which does not fit"
                    plan = replace(plan, step=plan.step + n * _MODEL_STEP, reasons=(*plan.reasons, why))
                    return other, engine, plan
            raise exc from None

    def _key_of(self, record: ServeRecord, entry: Entry, draft: DraftChoice) -> _Key:
        """What the running target was planned for. Drafters of the verifier come and go without a restart."""
        on_verifier = self._engine is not None and self._engine.engine == VERIFIER
        return (record.version, self._mesh.epoch, entry.model, None if on_verifier else draft.model)

    def _plan_anew(self, record: ServeRecord, entry: Entry, draft: Entry | None) -> tuple[EngineChoice, Plan]:
        """llama-server takes the draft into its own process, so only then does the draft need room there."""
        plan = self._place(entry, None, record, place_best)
        engine = choose_engine(record.engine, pooled=bool(plan.workers), drafters_named=bool(record.drafters))
        if engine.engine == LLAMA_SERVER and draft is not None:
            plan = self._place(entry, draft, record, place_best)
        return engine, plan

    # Drafters

    def _appoint(self, record: ServeRecord, draft: DraftChoice, models: Catalogue) -> None:
        """Who drafts for the verifier now; nobody for llama-server."""
        entry = models.get(draft.model) if draft.model else None
        plan, pool = self._plan, self._pool.state
        if entry is None or plan is None or pool.engine == LLAMA_SERVER:
            self._dismiss()
            return
        if pool.verifier is None:  # being loaded, perhaps again: who drafts goes on
            return
        drafting = set(self._drafters.nodes)
        need = draft_need(_held(entry), plan.context)
        rows = self._mesh.living_rows()
        self._drafters = place_drafters(
            draft=_held(entry),
            complete_on=entry.complete_on,
            nodes=[self._facts_of(row, need if row.node in drafting else 0) for row in rows],
            plan=plan,
            coordinator=self._mesh.me,
            wanted=record.drafters,
        )
        n_vocab = pool.verifier.info.n_vocab
        self._set_drafters([self._drafter(node, entry, plan, n_vocab) for node in self._drafters.nodes])

    def _drafter(self, node: NodeId, entry: Entry, plan: Plan, n_vocab: int) -> DrafterSpec:
        return DrafterSpec(
            node=node,
            name=self._mesh.name_of(node),
            model=entry.model,
            epoch=self._mesh.epoch,
            n_vocab=n_vocab,
            context=plan.context,
            slots=DRAFT_SLOTS,
            rtt_s=partial(self._rtt_s, node),
        )

    def _rtt_s(self, node: NodeId) -> float:
        return self._mesh.rtt_s(node) or 0.0

    def _dismiss(self) -> None:
        self._drafters = DrafterPlan()
        self._set_drafters(())

    def _occasion(self, key: _Key, record: ServeRecord) -> str | None:
        """Why the target must be planned now, or None."""
        if self._plan is None or self._key is None:
            return "new"
        if gone := [use.node for use in self._plan.workers if use.node not in self._mesh.alive()]:
            for node in gone:
                self._pool.worker_lost(node, "the machine is gone")
            return "lost"
        if self._key[:3] != key[:3]:
            return "target"
        if self._pool.state.phase is PoolPhase.FAILED:
            now = trio.current_time()
            if now < self._retry_at:
                return None
            self._retry_at = now + RETRY_S
            return "retry"
        if self._in_flight():
            return None
        if self._key != key:
            return "draft"
        return "short" if self._is_short(record) else None

    def _is_short(self, record: ServeRecord) -> bool:
        """Fewer workers run than were asked for, or something was given up a while ago."""
        wanted = record.workers if record.workers >= 0 else self._workers
        if self._plan is None:
            return False
        return len(self._plan.workers) < wanted or bool(self._plan.step and trio.current_time() >= self._go_back_at)

    def _start(self, key: _Key, entry: Entry, plan: Plan) -> None:
        path = self._swarm.path_of(entry.model)
        assert path is not None
        self._key, self._plan, self._started_at = key, plan, trio.current_time()
        self._dismiss()
        draft_path = self._swarm.path_of(plan.draft) if plan.draft else None
        where = ", ".join(self._mesh.name_of(use.node) for use in plan.workers)
        self._tell(f"starting {stem(entry.name)} " + (f"pooled over {where}" if where else "on this machine alone"))
        assert self._engine is not None
        served_by = ServedBy(self._engine.engine)
        self._pool.set_target(TargetSpec(path, draft_path, plan, key[1], stem(entry.name), served_by))

    def _place(
        self, entry: Entry, draft: Entry | None, record: ServeRecord, placer: Callable[..., Plan] = place
    ) -> Plan:
        now = trio.current_time()
        self._excluded = {n: v for n, v in self._excluded.items() if v[0] > now}
        rows = self._mesh.living_rows()
        others = [self._facts(row) for row in rows[1:] if row.node not in self._excluded]
        plan = placer(
            coordinator=self._facts(rows[0]),
            others=others,
            model=_held(entry),
            draft=_held(draft) if draft else None,
            context=record.context,
            workers=record.workers if record.workers >= 0 else self._workers,
        )
        left_out = tuple((node, reason) for node, (_, reason) in self._excluded.items())
        return replace(plan, excluded=(*plan.excluded, *left_out))

    def _facts(self, row: NodeRow) -> NodeFacts:
        """A node for the planner; what the running target or the last coordinator's holds there counts as free."""
        plan, held = self._plan, row.capabilities.held
        room = row.capabilities.memory_total - row.capabilities.memory_free
        if plan is None or self._pool.state.phase not in (PoolPhase.LOADING, PoolPhase.READY):
            return self._facts_of(row, max(0, min(held, room)))
        taken = plan.n_bytes if not plan.workers and row.node == self._mesh.me else 0
        total = sum(use.n_bytes for use in plan.workers) or 1
        for use in plan.workers:
            if use.node == row.node:
                taken = plan.n_bytes * use.n_bytes // total
        return self._facts_of(row, max(0, min(max(taken, held), room)))

    def _facts_of(self, row: NodeRow, reclaimable: int) -> NodeFacts:
        """A machine that lives, but that only others reach, can do nothing for this one."""
        return NodeFacts(row, alive=self._mesh.reaches(row.node), reclaimable=reclaimable)

    def _put_down(self) -> None:
        self._key = self._plan = self._engine = self._entry = self._started_at = None
        self._dismiss()
        self._pool.set_target(None)

    def _as_it_is(self, entry: Entry, draft: DraftChoice) -> Serving:
        pool, plan = self._pool.state, self._plan
        on_verifier = self._engine is not None and self._engine.engine == VERIFIER
        if plan is not None and draft.model and plan.draft is None and not on_verifier:
            draft = DraftChoice(None, next((r for r in plan.reasons if r.startswith("no draft")), "it does not fit"))
        if pool.phase is PoolPhase.READY and self._started_at is not None:
            took_s, self._started_at = trio.current_time() - self._started_at, None
            self._tell(
                f"{stem((self._entry or entry).name)} is served, {took_s:.1f} s after it was started", took_s=took_s
            )
        state = "starting" if pool.phase is PoolPhase.IDLE else str(pool.phase)
        return Serving(
            state,
            pool.text,
            self._entry or entry,
            draft,
            plan,
            plan.context if plan else 0,
            engine=self._engine,
            drafters=self._drafters,
        )

    def _stuck(self, model: ModelId) -> bool:
        return bool(self._problem_of(model))

    def _problem_of(self, model: ModelId) -> str:
        return next((t.problem for t in self._swarm.snapshot().transfers if t.model == model), "")


def _held(entry: Entry) -> HeldModel:
    return HeldModel(entry.model, entry.name, entry.size, entry.size, entry.facts)


def _worth(plan: Plan) -> tuple[int, int]:
    """Of two plans for one record the greater one is better."""
    return -plan.step, len(plan.workers)
