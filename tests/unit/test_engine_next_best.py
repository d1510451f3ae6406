"""What is given up where a model does not fit, and in which order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_engine_plan import GB, GPU, model, node

from tightwad_agent.engine.next_best import FLOOR_CONTEXT, place_best
from tightwad_agent.engine.plan import OVERHEAD_BYTES, place
from tightwad_agent.errors import DoesNotFit

KV = 100_000
"""Bytes a token: 8,192 tokens take 0.82 GB."""
WEIGHTS = 4 * 1.1 + OVERHEAD_BYTES / GB


def test_what_fits_is_placed_as_it_always_was() -> None:
    here, others, wanted = node("a", 8), [node("b", 64)], model(4, kv=KV)
    assert place_best(coordinator=here, others=others, model=wanted) == place(
        coordinator=here, others=others, model=wanted
    )


@pytest.mark.parametrize(("free", "context", "step"), [(0.83, 8192, 0), (0.5, 4096, 1), (0.3, 2048, 2)])
def test_less_context_is_given_by_halves_and_said(free: float, context: int, step: int) -> None:
    plan = place_best(coordinator=node("a", WEIGHTS + free), others=[], model=model(4, kv=KV))
    assert (plan.context, plan.step) == (context, step)
    assert any(f"context {context} instead of 8192" in reason for reason in plan.reasons) == bool(step)


def test_there_is_a_floor_and_below_it_the_arithmetic_of_what_was_asked_for() -> None:
    with pytest.raises(DoesNotFit) as caught:
        place_best(coordinator=node("a", WEIGHTS + 0.1), others=[], model=model(4, kv=KV), context=5000)
    assert "(5000 tokens)" in caught.value.message
    assert f"A context of {FLOOR_CONTEXT} tokens does not fit either" in caught.value.message
    assert caught.value.hint


def test_less_than_the_floor_is_given_only_if_it_was_asked_for() -> None:
    assert place_best(coordinator=node("a", 8), others=[], model=model(4, kv=KV), context=512).context == 512
    with pytest.raises(DoesNotFit, match="A context of 512 tokens does not fit either"):
        place_best(coordinator=node("a", 4), others=[], model=model(4, kv=KV), context=512)


def test_memory_beside_devices_is_the_last_thing_and_is_said() -> None:
    """A GPU of 20 GB and 30 GB of RAM here, 5 GB elsewhere: 33 GB are needed."""
    here, others = node("a", 30, gpus=(GPU,)), [node("b", 5)]
    with pytest.raises(DoesNotFit):
        place(coordinator=here, others=others, model=model(30, kv=KV))
    plan = place_best(coordinator=here, others=others, model=model(30, kv=KV))
    assert [use.node for use in plan.workers] == [others[0].row.node]
    assert plan.offload_layers is not None
    assert 0 < plan.offload_layers < 40
    assert plan.context == 8192
    assert plan.step == 3
    assert any("the CPU of a computes a part" in reason for reason in plan.reasons)


def test_devices_and_memory_may_be_the_same_and_are_not_counted_twice() -> None:
    with pytest.raises(DoesNotFit):
        place_best(coordinator=node("a", 30, gpus=(GPU,)), others=[node("b", 5)], model=model(33))


@given(
    st.floats(0.5, 40), st.lists(st.floats(0.3, 40), max_size=4), st.floats(0.1, 60), st.sampled_from([0, 3000, 20000])
)
def test_what_is_given_up_is_never_more_than_it_takes(
    here: float, there: list[float], size: float, context: int
) -> None:
    machines = {"coordinator": node("a", here), "others": [node(f"n{i}", free) for i, free in enumerate(there)]}
    wanted = model(size, kv=KV)
    try:
        plan = place_best(**machines, model=wanted, context=context)  # type: ignore[arg-type]
    except DoesNotFit:
        with pytest.raises(DoesNotFit):
            place(**machines, model=wanted, context=FLOOR_CONTEXT)  # type: ignore[arg-type]
        return
    asked = context or 8192
    assert FLOOR_CONTEXT <= plan.context <= asked
    if plan.context < asked:
        with pytest.raises(DoesNotFit):
            place(**machines, model=wanted, context=min(asked, 2 * plan.context))  # type: ignore[arg-type]
