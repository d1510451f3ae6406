"""What is fetched and served, from rows and a record: the real conductor and planner, fakes around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from tightwad_agent.conductor import GO_BACK_S, RETRY_S, Conductor
from tightwad_agent.engine.attempt import Loss, ServedBy, TargetSpec
from tightwad_agent.engine.drafting import DrafterSpec
from tightwad_agent.engine.pool import Back, PoolPhase, PoolState
from tightwad_agent.ids import Epoch, ModelId, NodeId, NodeName, SafeName
from tightwad_agent.proxy.fakes import fake_info
from tightwad_agent.pulse import Pulse
from tightwad_agent.swarm.service import SwarmSnapshot
from tightwad_agent.testing import node_id
from tightwad_agent.wire.rows import (
    Capabilities,
    Device,
    EngineInfo,
    Fetching,
    HeldModel,
    ModelFacts,
    NodeRow,
    Role,
    ServeRecord,
    Want,
)

GB = 10**9
ENGINE = EngineInfo("b11434", "d" * 64, "7.0.0")
FACTS = ModelFacts("llama", "Q4_0", 10**9, 32, 4096, 0, "vocab")


def model(name: str, size: int, *, vocab: str = "vocab") -> HeldModel:
    root = ModelId(node_id(name).encode().hex()[:64])
    return HeldModel(root, SafeName(f"{name}.gguf"), size, size, replace(FACTS, vocab=vocab))


def row(name: str, *models: HeldModel, memory: int = 16 * GB) -> NodeRow:
    cpu = Device("CPU", "cpu", memory, memory)
    capabilities = Capabilities("linux-x86_64", "cpu", 4, memory, memory, 10 * GB, (cpu,), ENGINE)
    return NodeRow(node_id(name), NodeName(name), Role.NODE, 1, 0, 0, True, 1, 8088, (), capabilities, models)


class FakeMesh:
    def __init__(self, *rows: NodeRow) -> None:
        self.me = rows[0].node
        self.rows = list(rows)
        self.record = ServeRecord()
        self.coordinating = True
        self.epoch = Epoch(1, str(rows[0].node))
        self.changed = Pulse()
        self.unreached: set[NodeId] = set()

    @property
    def row(self) -> NodeRow:
        return self.rows[0]

    def living_rows(self) -> tuple[NodeRow, ...]:
        return tuple(self.rows)

    def alive(self) -> frozenset[NodeId]:
        return frozenset(r.node for r in self.rows)

    def reaches(self, node: NodeId) -> bool:
        return node not in self.unreached

    def name_of(self, node: NodeId) -> str:
        return next((str(r.name) for r in self.rows if r.node == node), node.short)

    def set_record(self, record: ServeRecord) -> bool:
        self.record = record
        return True


class FakeSwarm:
    def __init__(self) -> None:
        self.wanted: set[ModelId] = set()
        self.here: set[ModelId] = set()
        self.holders: dict[ModelId, frozenset[NodeId]] = {}
        self.elsewhere: tuple[NodeRow, ...] = ()

    def want(self, wanted: ModelId) -> None:
        self.wanted.add(wanted)

    def unwant(self, wanted: ModelId) -> None:
        self.wanted.discard(wanted)

    def set_holders(self, wanted: ModelId, nodes: frozenset[NodeId]) -> None:
        self.holders[wanted] = nodes

    def set_elsewhere(self, rows: Sequence[NodeRow]) -> None:
        self.elsewhere = tuple(rows)

    def path_of(self, wanted: ModelId) -> Path | None:
        return Path("/models") / wanted[:6] if wanted in self.here else None

    def snapshot(self) -> SwarmSnapshot:
        return SwarmSnapshot((), ())


class FakePool:
    def __init__(self) -> None:
        self.state = PoolState()
        self.specs: list[TargetSpec | None] = []
        self.lost: list[NodeId] = []

    def set_target(self, spec: TargetSpec | None) -> None:
        if not self.specs or self.specs[-1] != spec or self.state.phase is PoolPhase.FAILED:
            self.specs.append(spec)
        phase, engine = (PoolPhase.READY, str(spec.served_by)) if spec else (PoolPhase.IDLE, "")
        self.state = PoolState(phase, port=1 if spec else None, engine=engine)

    def worker_lost(self, node: NodeId, _reason: str) -> None:
        self.lost.append(node)

    @property
    def now(self) -> TargetSpec:
        assert self.specs[-1] is not None
        return self.specs[-1]


class Stage:
    """A conductor with fakes around it."""

    def __init__(self, *rows: NodeRow, workers: int = -1, **options: Any) -> None:
        self.mesh = FakeMesh(*rows)
        self.swarm = FakeSwarm()
        self.swarm.here = {m.model for m in rows[0].models if m.complete}
        self.pool = FakePool()
        self.n_in_flight = 0
        self.said: list[str] = []
        self.drafters: list[DrafterSpec] = []
        parts: Any = (self.mesh, self.swarm, self.pool)
        self.conductor = Conductor(
            *parts,
            in_flight=lambda: self.n_in_flight,
            workers=workers,
            tell=self.tell,
            set_drafters=self.appoint,
            **options,
        )

    def tell(self, text: str, /, **_facts: Any) -> None:
        self.said.append(text)

    def appoint(self, specs: Sequence[DrafterSpec]) -> None:
        self.drafters = list(specs)

    def step(self) -> str:
        self.conductor.step()
        return self.conductor.serving.state

    def pin(self, wanted: HeldModel, **more: Any) -> None:
        version = (1, self.mesh.record.version[1] + 1, "")
        self.mesh.record = ServeRecord(want=Want.PINNED, model=wanted.model, version=version, **more)

    def workers(self) -> list[str]:
        return [self.mesh.name_of(use.node) for use in self.pool.now.plan.workers]


BIG, SMALL, HUGE = model("big", 4 * GB), model("small", GB // 2), model("huge", 40 * GB)


async def test_with_no_record_the_largest_that_fits_is_served_and_that_is_said() -> None:
    stage = Stage(row("a", HUGE, BIG, SMALL))
    assert stage.step() == "ready"
    assert stage.mesh.record.model == BIG.model
    assert stage.mesh.record.want is Want.AUTO
    assert stage.pool.now.plan.draft == SMALL.model
    assert any("nobody chose" in text for text in stage.said)
    stage.step()
    stage.step()
    assert [text.partition(",")[0] for text in stage.said if "is served" in text] == ["big is served"]


async def test_the_swarm_hears_what_other_nodes_download() -> None:
    other = replace(row("b"), fetching=(Fetching("d" * 64, 7),))
    stage = Stage(row("a"), other)
    stage.step()
    assert stage.swarm.elsewhere == (other,)


async def test_a_choice_once_made_is_kept_when_a_larger_model_comes() -> None:
    stage = Stage(row("a", SMALL))
    stage.step()
    stage.mesh.rows[0] = row("a", SMALL, model("other", 2 * GB, vocab="x"))
    stage.step()
    assert stage.mesh.record.model == SMALL.model


async def test_nothing_is_served_when_stopped_or_when_there_is_nothing() -> None:
    stage = Stage(row("a"))
    assert stage.step() == "none"
    stage = Stage(row("a", BIG))
    stage.mesh.record = ServeRecord(want=Want.NONE, version=(1, 1, ""))
    assert stage.step() == "none"
    assert stage.pool.specs == [None]


async def test_every_node_fetches_the_target_and_its_draft_the_coordinator_waits_for_them() -> None:
    stage = Stage(row("a"), row("b", BIG, SMALL))
    stage.pin(BIG)
    assert stage.step() == "fetching"
    assert stage.swarm.wanted == {BIG.model, SMALL.model}
    assert stage.swarm.holders[BIG.model] == {node_id("b")}
    stage.swarm.here = {BIG.model}
    assert stage.step() == "fetching"
    stage.swarm.here |= {SMALL.model}
    assert stage.step() == "ready"
    stage.mesh.coordinating = False
    stage.step()
    assert stage.swarm.wanted == {BIG.model, SMALL.model}
    assert stage.pool.specs[-1] is None


async def test_what_is_no_longer_served_is_no_longer_fetched() -> None:
    stage = Stage(row("a"), row("b", BIG, SMALL))
    stage.pin(BIG)
    stage.step()
    stage.pin(SMALL, draft="off")
    stage.step()
    assert stage.swarm.wanted == {SMALL.model}


async def test_a_draft_that_comes_later_is_taken_in_a_quiet_moment() -> None:
    stage = Stage(row("a", BIG))
    stage.pin(BIG)
    stage.step()
    assert stage.pool.now.plan.draft is None
    stage.mesh.rows[0] = row("a", BIG, SMALL)
    stage.swarm.here |= {SMALL.model}
    stage.n_in_flight = 1
    stage.step()
    assert stage.pool.now.plan.draft is None
    stage.n_in_flight = 0
    stage.step()
    assert stage.pool.now.plan.draft == SMALL.model


async def test_a_lost_worker_is_planned_around_at_once_and_used_again_when_it_is_quiet() -> None:
    stage = Stage(row("a", BIG), row("b"), row("c"))
    stage.pin(BIG, workers=2)
    stage.step()
    assert sorted(stage.workers()) == ["b", "c"]
    gone = stage.mesh.rows.pop(1)
    stage.n_in_flight = 1
    stage.step()
    assert stage.workers() == ["c"]
    assert stage.pool.lost == [gone.node]
    stage.mesh.rows.append(gone)
    stage.step()
    assert stage.workers() == ["c"], "a reload cuts requests that run"
    stage.n_in_flight = 0
    stage.step()
    assert sorted(stage.workers()) == ["b", "c"]


async def test_a_node_that_does_not_fit_is_left_out_with_its_reason() -> None:
    stage = Stage(row("a", BIG), row("b"), row("c"))
    stage.pin(BIG, workers=1)
    stage.step()
    (first,) = stage.pool.now.plan.workers
    stage.conductor.lost(Loss(first.node, "it speaks RPC 5.0.0", excluded=True))
    stage.step()
    (second,) = stage.pool.now.plan.workers
    assert second.node != first.node
    assert (first.node, "it speaks RPC 5.0.0") in stage.pool.now.plan.excluded


async def test_a_machine_that_only_others_reach_is_left_out() -> None:
    stage = Stage(row("a", BIG), row("b"), row("c"))
    stage.mesh.unreached.add(node_id("b"))
    stage.pin(BIG, workers=1)
    stage.step()
    assert stage.workers() == ["c"]
    assert (node_id("b"), "not reachable") in stage.pool.now.plan.excluded


async def test_what_does_not_fit_says_why_and_is_tried_when_room_comes() -> None:
    stage = Stage(row("a", HUGE))
    stage.pin(HUGE)
    assert stage.step() == "failed"
    assert "does not fit" in stage.conductor.serving.detail
    stage.mesh.rows[0] = row("a", HUGE, memory=80 * GB)
    assert stage.step() == "ready"


LONG = replace(BIG, facts=replace(FACTS, context_train=8192, kv_bytes_per_token=500_000))
"""4.6 GB of weights and overhead, 4.1 GB of cache."""


async def test_less_context_is_served_where_no_more_fits_and_all_of_it_again_in_a_quiet_moment(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stage = Stage(row("a", LONG, memory=7 * GB), row("b", memory=4 * GB), row("c", memory=4 * GB))
    stage.pin(LONG)
    stage.step()
    assert stage.pool.now.plan.context == 8192
    assert len(stage.workers()) == 1
    gone = [stage.mesh.rows.pop(), stage.mesh.rows.pop()]
    stage.n_in_flight = 1
    assert stage.step() == "ready"
    plan = stage.pool.now.plan
    assert plan.workers == ()
    assert plan.context < 8192
    assert any(f"context {plan.context} instead of 8192" in text for text in stage.said)
    assert stage.conductor.serving.context == plan.context
    stage.mesh.rows += gone
    await trio.sleep(GO_BACK_S + 1)
    stage.step()
    assert stage.pool.now.plan == plan, "a reload cuts requests that run"
    stage.n_in_flight = 0
    stage.step()
    assert stage.pool.now.plan.context == 8192
    n = len(stage.pool.specs)
    await trio.sleep(GO_BACK_S + 1)
    stage.step()
    assert len(stage.pool.specs) == n


async def test_what_was_given_up_is_not_tried_again_at_once() -> None:
    stage = Stage(row("a", LONG, memory=7 * GB))
    stage.pin(LONG)
    stage.step()
    n = len(stage.pool.specs)
    stage.mesh.rows[0] = row("a", LONG, memory=16 * GB)
    stage.step()
    assert len(stage.pool.specs) == n


def quantised(name: str, size: int) -> HeldModel:
    return replace(model(name, size), facts=replace(FACTS, vocab=""))


FULL, LESS = quantised("m-Q8_0", 10 * GB), quantised("m-Q4_0", 5 * GB)


@pytest.mark.parametrize("allowed", [True, False])
async def test_a_smaller_quantisation_stands_in_where_that_is_allowed(
    autojump_clock: trio.testing.MockClock, allowed: bool
) -> None:
    stage = Stage(row("a", FULL, LESS, memory=8 * GB), row("b", memory=8 * GB))
    stage.pin(FULL, allow_smaller=allowed)
    stage.step()
    assert stage.pool.now.plan.model == FULL.model
    gone = stage.mesh.rows.pop()
    if not allowed:
        assert stage.step() == "failed"
        assert "does not fit" in stage.conductor.serving.detail
        assert "a 8.0 GB" in stage.conductor.serving.detail
        return
    assert stage.step() == "ready"
    assert stage.pool.now.plan.model == LESS.model
    assert stage.conductor.serving.model is not None
    assert stage.conductor.serving.model.name == "m-Q4_0.gguf"
    assert any("m-Q4_0 in the place of m-Q8_0" in text for text in stage.said)
    n = len(stage.pool.specs)
    stage.step()
    assert len(stage.pool.specs) == n
    stage.mesh.rows.append(gone)
    await trio.sleep(GO_BACK_S + 1)
    stage.step()
    assert stage.pool.now.plan.model == FULL.model


async def test_a_smaller_one_that_is_not_here_yet_does_not_serve() -> None:
    stage = Stage(row("a", FULL, memory=8 * GB), row("b", LESS, memory=GB))
    stage.pin(FULL, allow_smaller=True)
    assert stage.step() == "failed"
    assert LESS.model in stage.swarm.wanted


async def test_what_the_last_coordinators_pool_holds_is_free_for_the_next() -> None:
    def taken(name: str, *models: HeldModel, held: int) -> NodeRow:
        full = row(name, *models)
        memory = replace(full.capabilities, memory_free=GB, held=held)
        devices = (replace(memory.devices[0], memory_free=GB),)
        return replace(full, capabilities=replace(memory, devices=devices))

    stage = Stage(taken("a", BIG, held=0), taken("b", held=9 * GB))
    stage.pin(BIG)
    assert stage.step() == "ready"
    assert stage.workers() == ["b"]
    stage = Stage(taken("a", BIG, held=0), taken("b", held=0))
    stage.pin(BIG)
    assert stage.step() == "failed"


async def test_a_coordinator_ends_its_own_worker_and_others_do_not() -> None:
    freed: list[None] = []
    stage = Stage(row("a", BIG), free_own=lambda: freed.append(None))
    stage.mesh.coordinating = False
    stage.step()
    assert freed == []
    stage.mesh.coordinating = True
    stage.step()
    assert freed


async def test_a_restart_is_told_with_its_reason_and_how_long_it_took() -> None:
    stage = Stage(row("a", BIG), row("b"))
    stage.conductor.back(Back(0.0, 4.23, Loss(stage.mesh.rows[1].node, "its machine stopped answering")))
    assert "restarted in 4.2 s" in stage.said[-1]
    assert "b: its machine stopped answering" in stage.said[-1]


async def test_a_pool_that_gave_up_is_tried_again_after_a_while(autojump_clock: trio.testing.MockClock) -> None:
    stage = Stage(row("a", BIG))
    stage.pin(BIG)
    stage.step()
    stage.pool.state = PoolState(PoolPhase.FAILED, "crashed 5 times")
    stage.conductor.lost(Loss(None, "llama-server crashed", crash=True))
    assert stage.step() == "failed"
    n = len(stage.pool.specs)
    await trio.sleep(RETRY_S + 1)
    assert stage.step() == "ready"
    assert len(stage.pool.specs) == n + 1


async def test_a_new_epoch_starts_anew_and_configured_workers_count() -> None:
    stage = Stage(row("a", BIG), row("b"), workers=1)
    stage.pin(BIG)
    stage.step()
    assert stage.workers() == ["b"]
    stage.mesh.epoch = Epoch(2, stage.mesh.epoch.node)
    stage.step()
    assert stage.pool.now.epoch.counter == 2


@pytest.mark.parametrize("draft", ["off", "auto"])
async def test_a_model_that_no_living_node_has_is_waited_for(draft: str) -> None:
    stage = Stage(row("a", SMALL))
    stage.pin(BIG, draft=draft)
    assert stage.step() == "waiting"
    assert BIG.model.short in stage.conductor.serving.detail


# The verifier and its drafters


class LoadedVerifier:
    info = fake_info(n_vocab=1000)


def verifying(*rows: NodeRow) -> Stage:
    """A pool over all other machines, up on the verifier."""
    stage = Stage(*rows)
    stage.pin(BIG, workers=len(rows) - 1)
    stage.step()
    stage.pool.state = replace(stage.pool.state, port=None, verifier=LoadedVerifier(), engine="verifier")  # type: ignore[arg-type]
    return stage


async def test_what_is_pooled_is_served_by_the_verifier_without_a_draft_of_its_own() -> None:
    stage = Stage(row("a", BIG, SMALL), row("b", BIG, SMALL))
    stage.pin(BIG, workers=1)
    stage.step()
    assert stage.pool.now.served_by is ServedBy.VERIFIER
    assert stage.pool.now.draft is None
    stage.pin(BIG, workers=1, engine="llama-server")
    stage.step()
    assert stage.pool.now.served_by is ServedBy.LLAMA_SERVER
    assert stage.pool.now.draft is not None
    assert stage.drafters == []


async def test_drafters_are_appointed_once_the_verifier_is_up_and_stay_while_it_restarts() -> None:
    stage = verifying(row("a", BIG, SMALL), row("b", BIG, SMALL), row("c", BIG))
    assert stage.drafters == []
    stage.step()
    assert [(d.name, d.model, d.n_vocab) for d in stage.drafters] == [
        ("a", SMALL.model, 1000),
        ("b", SMALL.model, 1000),
    ]
    assert any("c does not draft" in reason for reason in stage.conductor.serving.drafters.reasons)
    n = len(stage.pool.specs)
    stage.pool.state = replace(stage.pool.state, phase=PoolPhase.RESTARTING, verifier=None)
    stage.step()
    assert [d.name for d in stage.drafters] == ["a", "b"]
    assert len(stage.pool.specs) == n


async def test_a_draft_that_comes_later_drafts_without_a_restart() -> None:
    stage = verifying(row("a", BIG), row("b", BIG))
    stage.step()
    assert stage.drafters == []
    n = len(stage.pool.specs)
    stage.mesh.rows[0] = row("a", BIG, SMALL)
    stage.swarm.here |= {SMALL.model}
    stage.step()
    assert [d.name for d in stage.drafters] == ["a"]
    assert len(stage.pool.specs) == n


async def test_only_the_named_machines_draft_and_none_after_a_fall_back_or_a_stop() -> None:
    stage = verifying(row("a", BIG, SMALL), row("b", BIG, SMALL))
    stage.pin(BIG, workers=1, drafters=(node_id("b"),))
    stage.step()
    stage.pool.state = replace(stage.pool.state, port=None, verifier=LoadedVerifier(), engine="verifier")  # type: ignore[arg-type]
    stage.step()
    assert [d.name for d in stage.drafters] == ["b"]
    stage.pool.state = replace(stage.pool.state, port=1, verifier=None, engine="llama-server")
    stage.step()
    assert stage.drafters == []
    stage.pool.state = replace(stage.pool.state, port=None, verifier=LoadedVerifier(), engine="verifier")  # type: ignore[arg-type]
    stage.step()
    assert stage.drafters
    stage.mesh.record = ServeRecord(want=Want.NONE, version=(9, 9, ""))
    stage.step()
    assert stage.drafters == []
