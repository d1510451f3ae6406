"""Which engine serves, and which machines draft."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tightwad_agent.engine.draft_plan import (
    LLAMA_SERVER,
    MAX_AUTO_DRAFTERS,
    VERIFIER,
    choose_engine,
    place_drafters,
)
from tightwad_agent.engine.plan import DeviceUse, NodeFacts, Plan, WorkerUse, draft_need
from tightwad_agent.ids import ModelId, NodeName, SafeName
from tightwad_agent.testing import node_id
from tightwad_agent.wire.rows import Capabilities, EngineInfo, HeldModel, ModelFacts, NodeRow, Role

GB = 10**9
DRAFT = HeldModel(ModelId("d" * 64), SafeName("draft.gguf"), GB, GB, ModelFacts(kv_bytes_per_token=10**5))
ENGINE = EngineInfo("b11434", "d" * 64, "7.0.0")


def facts(name: str, *, free: int = 8 * GB, klass: int = 1, reclaimable: int = 0, engine: bool = True) -> NodeFacts:
    info = ENGINE if engine else EngineInfo(problem="no compiler")
    capabilities = Capabilities("linux-x86_64", "cpu", 4, free, free, 10 * GB, (), info)
    row = NodeRow(node_id(name), NodeName(name), Role.NODE, 1, 0, 0, True, klass, 8088, (), capabilities)
    return NodeFacts(row, reclaimable=reclaimable)


def plan(*workers: str) -> Plan:
    uses = tuple(WorkerUse(node_id(w), (DeviceUse("CPU", GB),)) for w in workers)
    return Plan(ModelId("a" * 64), uses, None, 4096)


def drafters(
    nodes: list[NodeFacts], *workers: str, wanted: tuple[str, ...] = (), held_by: str = "abcdef"
) -> tuple[list[str], tuple[str, ...]]:
    found = place_drafters(
        draft=DRAFT,
        complete_on={node_id(n) for n in held_by},
        nodes=nodes,
        plan=plan(*workers),
        coordinator=node_id("a"),
        wanted=[node_id(w) for w in wanted],
    )
    names = {n.row.node: str(n.row.name) for n in nodes}
    return [names[node] for node in found.nodes], found.reasons


@pytest.mark.parametrize(
    ("wish", "pooled", "named", "engine"),
    [
        ("auto", True, False, VERIFIER),
        ("auto", False, False, LLAMA_SERVER),
        ("auto", False, True, VERIFIER),
        ("verifier", False, False, VERIFIER),
        ("llama-server", True, True, LLAMA_SERVER),
        ("from a later version", True, False, VERIFIER),
    ],
)
def test_which_engine_serves(wish: str, pooled: bool, named: bool, engine: str) -> None:
    choice = choose_engine(wish, pooled=pooled, drafters_named=named)
    assert choice.engine == engine
    assert (f"--engine {wish}" in choice.reason) is (wish in (VERIFIER, LLAMA_SERVER))


def test_idle_machines_draft_before_the_coordinator_and_the_coordinator_before_workers() -> None:
    nodes = [facts("a"), facts("b"), facts("c"), facts("d")]
    assert drafters(nodes, "b", "c")[0] == ["d", "a"]
    assert drafters(nodes[:3], "b", "c")[0][0] == "a"
    assert len(drafters(nodes)[0]) == MAX_AUTO_DRAFTERS


def test_of_two_idle_machines_the_stronger_drafts() -> None:
    assert drafters([facts("a"), facts("b"), facts("c", klass=3)])[0] == ["c", "b"]


def test_named_drafters_are_the_only_ones_and_all_of_them() -> None:
    nodes = [facts(n) for n in "abcd"]
    assert sorted(drafters(nodes, wanted=("b", "c", "d"))[0]) == ["b", "c", "d"]
    chosen, reasons = drafters(nodes, wanted=("b", "z"))
    assert chosen == ["b"]
    assert reasons == (f"{node_id('z').short} does not draft: it is not reachable",)


@pytest.mark.parametrize(
    ("node", "held_by", "why"),
    [
        (facts("b", engine=False), "ab", "no usable engine: no compiler"),
        (facts("b"), "a", "does not hold the draft model yet"),
        (facts("b", free=GB), "ab", "are free"),
    ],
)
def test_who_cannot_draft_is_said_with_the_reason(node: NodeFacts, held_by: str, why: str) -> None:
    chosen, reasons = drafters([node], wanted=("b",), held_by=held_by)
    assert chosen == []
    assert len(reasons) == 1
    assert reasons[0].startswith("b does not draft: ")
    assert why in reasons[0]


def test_what_a_running_draft_server_holds_counts_as_free() -> None:
    need = draft_need(DRAFT, 4096)
    tight = facts("b", free=need - 1)
    assert drafters([tight])[0] == []
    assert drafters([replace(tight, reclaimable=need)])[0] == ["b"]
