import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.engine.plan import DEFAULT_CONTEXT, OVERHEAD_BYTES, DeviceUse, NodeFacts, Plan, place
from tightwad_agent.errors import DoesNotFit, EngineMissing
from tightwad_agent.ids import ModelId, NodeName, SafeName
from tightwad_agent.testing import node_id
from tightwad_agent.wire.rows import Capabilities, Device, EngineInfo, HeldModel, ModelFacts, NodeRow, Role

GB = 1_000_000_000
ENGINE = EngineInfo(build="b11434", digest="d" * 64, protocol="7.0.0")
GPU = Device("CUDA0", "a GPU", 24 * GB, 20 * GB)


def node(
    name: str, free: float, *, engine: EngineInfo = ENGINE, gpus: tuple[Device, ...] = (), **facts: object
) -> NodeFacts:
    """A machine with `free` GB of memory; without `gpus` it offers its CPU, as `capability.offered` says it."""
    n_free = int(free * GB)
    devices = gpus or (Device("CPU", "a CPU", 64 * GB, n_free),)
    capabilities = Capabilities(
        platform=str(facts.pop("platform", "linux-x86_64")),
        memory_total=64 * GB,
        memory_free=n_free,
        devices=devices,
        engine=engine,
    )
    row = NodeRow(node_id(name), NodeName(name), Role.NODE, 1, 1, 0, True, 1, 8088, capabilities=capabilities)
    return NodeFacts(row, **facts)  # type: ignore[arg-type]


def model(size: float, *, n_layers: int = 40, kv: int = 0, trained: int = 32768, name: str = "big") -> HeldModel:
    facts = ModelFacts("llama", "Q4_K_M", 0, n_layers, trained, kv, "v")
    return HeldModel(ModelId("a" * 64), SafeName(name), int(size * GB), int(size * GB), facts)


def names(plan: Plan, *known: str) -> list[str]:
    by_id = {node_id(name): name for name in known}
    return [by_id[use.node] for use in plan.workers]


def test_what_fits_here_is_not_pooled_and_says_why() -> None:
    plan = place(coordinator=node("a", 8), others=[node("b", 64)], model=model(4))
    assert plan.workers == ()
    assert plan.offload_layers is None
    assert any("not pooled" in reason and "round trip" in reason for reason in plan.reasons)


def test_fits_counts_margin_and_overhead() -> None:
    need = 4 * 1.1 + OVERHEAD_BYTES / GB
    assert place(coordinator=node("a", need), others=[], model=model(4)).n_bytes == int(need * GB)
    with pytest.raises(DoesNotFit):
        place(coordinator=node("a", need - 0.001), others=[], model=model(4))


def test_the_kv_cache_counts() -> None:
    fits = place(coordinator=node("a", 10), others=[], model=model(4, kv=100_000), context=32768)
    assert fits.n_bytes == int(4.4 * GB) + 32768 * 100_000 + OVERHEAD_BYTES
    with pytest.raises(DoesNotFit, match=r"3\.3 GB of KV cache"):
        place(coordinator=node("a", 7), others=[], model=model(4, kv=100_000), context=32768)


def test_the_fewest_others_most_memory_first() -> None:
    others = [node("small", 3), node("large", 9), node("middle", 6)]
    plan = place(coordinator=node("a", 2), others=others, model=model(9))
    assert names(plan, "small", "large", "middle") == ["large"]
    plan = place(coordinator=node("a", 2), others=others, model=model(12))
    assert names(plan, "small", "large", "middle") == ["large", "middle"]


def test_equal_machines_are_taken_in_a_fixed_order() -> None:
    others = [node("x", 8), node("y", 8), node("z", 8)]
    first = place(coordinator=node("a", 1), others=others, model=model(6), workers=1)
    assert first.workers == place(coordinator=node("a", 1), others=others[::-1], model=model(6), workers=1).workers


def test_layers_that_the_workers_cannot_hold_stay_here() -> None:
    plan = place(coordinator=node("a", 6), others=[node("b", 5)], model=model(9, n_layers=40))
    assert plan.offload_layers == 40 * 5 * GB // plan.n_bytes
    assert any("layers stay in the memory of a" in reason for reason in plan.reasons)


def test_without_a_layer_count_nothing_can_stay_here() -> None:
    with pytest.raises(DoesNotFit):
        place(coordinator=node("a", 6), others=[node("b", 5)], model=model(9, n_layers=0))


def test_an_accelerator_here_takes_part_and_is_not_the_ram_twice() -> None:
    here = node("a", 30, gpus=(GPU,))
    plan = place(coordinator=here, others=[node("b", 30)], model=model(40))
    assert plan.local_devices == (DeviceUse("CUDA0", 20 * GB),)
    assert plan.offload_layers is None
    with pytest.raises(DoesNotFit):
        place(coordinator=here, others=[node("b", 30)], model=model(50))


def test_workers_can_be_forced() -> None:
    others = [node("b", 8), node("c", 9), node("d", 7)]
    plan = place(coordinator=node("a", 64), others=others, model=model(1), workers=2)
    assert names(plan, "b", "c", "d") == ["c", "b"]
    assert plan.offload_layers is None
    assert "2 other machines were asked for" in plan.reasons


def test_fewer_than_forced_is_said() -> None:
    plan = place(coordinator=node("a", 64), others=[node("b", 8)], model=model(1), workers=3)
    assert names(plan, "b") == ["b"]
    assert "3 other machines were asked for, 1 can be used" in plan.reasons


def test_forced_without_any_usable_machine_serves_here() -> None:
    plan = place(coordinator=node("a", 64), others=[node("b", 8, alive=False)], model=model(1), workers=1)
    assert plan.workers == ()
    assert "1 other machine was asked for, 0 can be used" in plan.reasons


def test_zero_workers_never_pools() -> None:
    with pytest.raises(DoesNotFit):
        place(coordinator=node("a", 2), others=[node("b", 64)], model=model(9), workers=0)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (node("b", 64, alive=False), "not reachable"),
        (node("b", 64, engine=EngineInfo(problem="SIGILL in the smoke test")), "SIGILL in the smoke test"),
        (node("b", 64, engine=EngineInfo()), "none is installed"),
        (node("b", 64, engine=replace(ENGINE, protocol="5.0.0")), "speaks RPC 5.0.0, a speaks 7.0.0"),
        (node("b", 64, engine=replace(ENGINE, build="b1")), "runs llama.cpp b1, a runs b11434"),
        (node("b", 0.1), "only 100 MB of device memory free"),
    ],
)
def test_who_is_excluded_and_why(other: NodeFacts, reason: str) -> None:
    plan = place(coordinator=node("a", 64), others=[other], model=model(1))
    [(excluded, why)] = plan.excluded
    assert excluded == other.row.node
    assert reason in why
    with pytest.raises(DoesNotFit, match=re.escape(reason)):
        place(coordinator=node("a", 1), others=[other], model=model(4))


@pytest.mark.parametrize("platform", ["linux-x86_64", "darwin-arm64"])
def test_the_same_build_compiled_elsewhere_is_another_binary_and_fits(platform: str) -> None:
    other = node("b", 64, engine=replace(ENGINE, digest="e" * 64), platform=platform)
    plan = place(coordinator=node("a", 1), others=[other], model=model(4))
    assert plan.workers[0].digest == "e" * 64


def test_a_build_that_nobody_knows_must_be_the_same_binary() -> None:
    custom = replace(ENGINE, build="custom")
    here = node("a", 1, engine=custom)
    assert place(coordinator=here, others=[node("b", 64, engine=custom)], model=model(4)).workers
    other = node("b", 64, engine=replace(custom, digest="e" * 64))
    with pytest.raises(DoesNotFit, match=re.escape("unknown build (eeeeeeeeeeee)")):
        place(coordinator=here, others=[other], model=model(4))


def test_llama_cpp_takes_fifteen_devices() -> None:
    many = tuple(Device(f"CUDA{i}", "", 2 * GB, 2 * GB) for i in range(8))
    others = [node("b", 1, gpus=many), node("c", 1, gpus=many), node("d", 30)]
    plan = place(coordinator=node("a", 1), others=others, model=model(40))
    assert names(plan, "b", "c", "d") in (["d", "b"], ["d", "c"])
    assert ["15 devices" in why for _, why in plan.excluded] == [True]


def test_no_engine_here() -> None:
    with pytest.raises(EngineMissing, match="no compiler"):
        place(coordinator=node("a", 64, engine=EngineInfo(problem="no compiler")), others=[], model=model(1))


def test_the_context_of_the_model_is_capped_and_says_so() -> None:
    plan = place(coordinator=node("a", 64), others=[], model=model(1, trained=32768))
    assert plan.context == DEFAULT_CONTEXT
    assert any("trained for 32768" in reason for reason in plan.reasons)
    assert place(coordinator=node("a", 64), others=[], model=model(1, trained=2048)).context == 2048
    assert place(coordinator=node("a", 64), others=[], model=model(1, trained=0)).context == DEFAULT_CONTEXT


def test_no_more_context_than_was_trained() -> None:
    plan = place(coordinator=node("a", 64), others=[], model=model(1, trained=2048), context=4096)
    assert plan.context == 2048
    assert any("4096" in reason for reason in plan.reasons)
    assert place(coordinator=node("a", 64), others=[], model=model(1, trained=2048), context=512).context == 512


def test_the_draft_is_the_coordinators_burden() -> None:
    draft = replace(model(0.5, name="small"), model=ModelId("b" * 64))
    plan = place(coordinator=node("a", 64), others=[], model=model(4), draft=draft)
    assert plan.draft == draft.model
    assert plan.n_bytes == int(4.4 * GB) + OVERHEAD_BYTES + int(0.55 * GB)
    assert place(coordinator=node("a", 4.9), others=[node("b", 64)], model=model(4), draft=draft).workers != ()


def test_a_draft_that_does_not_fit_is_left_out_and_says_so() -> None:
    draft = replace(model(3, name="small"), model=ModelId("b" * 64))
    plan = place(coordinator=node("a", 2), others=[node("b", 64)], model=model(9), draft=draft)
    assert plan.draft is None
    assert any("no draft: small needs 3.3 GB" in reason for reason in plan.reasons)


def test_what_the_running_pool_holds_is_free_for_the_next_plan() -> None:
    full = node("a", 0.5)
    with pytest.raises(DoesNotFit):
        place(coordinator=full, others=[], model=model(4))
    assert place(coordinator=replace(full, reclaimable=5 * GB), others=[], model=model(4)).workers == ()
    loaded = node("g", 1, gpus=(replace(GPU, memory_free=0),), reclaimable=24 * GB)
    assert place(coordinator=loaded, others=[], model=model(15)).local_devices == (DeviceUse("CUDA0", 24 * GB),)


def test_the_arithmetic_of_what_does_not_fit() -> None:
    with pytest.raises(DoesNotFit) as caught:
        place(coordinator=node("a", 2), others=[node("b", 3)], model=model(10, kv=100_000), context=10_000)
    text = str(caught.value)
    assert "10.0 GB of weights + 1.0 GB of KV cache (10000 tokens) + 10% + 200 MB = 12.2 GB" in text
    assert f"free: a 2.0 GB, {node_id('b').short} 3.0 GB, 7.2 GB short" in text
    assert "Add a machine" in text


@given(
    here=st.floats(0, 40),
    free=st.lists(st.floats(0, 40), max_size=6),
    size=st.floats(0.1, 60),
    workers=st.integers(-1, 6),
    n_layers=st.integers(0, 80),
)
def test_a_plan_always_holds_the_model(
    here: float, free: list[float], size: float, workers: int, n_layers: int
) -> None:
    coordinator = node("a", here)
    others = [node(f"n{i}", f) for i, f in enumerate(free)]
    try:
        plan = place(coordinator=coordinator, others=others, model=model(size, n_layers=n_layers), workers=workers)
    except DoesNotFit:
        return
    own = coordinator.row.capabilities.memory_free
    there = sum(use.n_bytes for use in plan.workers)
    assert own + there >= plan.n_bytes
    assert len({use.node for use in plan.workers}) == len(plan.workers)
    if workers >= 0:
        assert len(plan.workers) <= workers
    if plan.offload_layers is None:
        assert plan.n_bytes <= (there if plan.workers else own)
    else:
        assert 0 <= plan.offload_layers < n_layers
        assert plan.n_bytes * plan.offload_layers <= there * n_layers
