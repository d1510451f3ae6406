"""A placement, or where the model does not fit the next best one. Pure.

In this order: as it was asked for; less context, by halves down to a floor; layers in the coordinator's memory beside
its devices, which its CPU computes; both. What is given up is said in the plan's reasons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from tightwad_agent.engine.plan import NodeFacts, Plan, context_of, place
from tightwad_agent.errors import DoesNotFit
from tightwad_agent.wire.rows import HeldModel

FLOOR_CONTEXT = 2048
"""Less context is not offered in place of what was asked for."""


def place_best(
    *,
    coordinator: NodeFacts,
    others: Sequence[NodeFacts],
    model: HeldModel,
    draft: HeldModel | None = None,
    context: int = 0,
    workers: int = -1,
) -> Plan:
    """As `place`, but `step` counts how far down the plan is. Raises `DoesNotFit` with the arithmetic of what was asked
    for, and says that less does not fit either."""
    first: DoesNotFit | None = None
    least = wished = context_of(model, context)
    for step, (n_context, spills) in enumerate(_steps(wished)):
        least = n_context
        try:
            plan = place(
                coordinator=coordinator,
                others=others,
                model=model,
                draft=draft,
                context=context if step == 0 else n_context,
                workers=workers,
                spills=spills,
            )
        except DoesNotFit as exc:
            first = first or exc
            continue
        return replace(plan, step=step, reasons=(*plan.reasons, *_given_up(wished, n_context, spills, coordinator)))
    assert first is not None
    raise DoesNotFit(f"{first.message} A context of {least} tokens does not fit either.", hint=first.hint)


def _steps(wished: int) -> Iterator[tuple[int, bool]]:
    for spills in (False, True):
        context = wished
        yield context, spills
        while context > FLOOR_CONTEXT:
            context = max(FLOOR_CONTEXT, context // 2)
            yield context, spills


def _given_up(wished: int, context: int, spills: bool, here: NodeFacts) -> Iterator[str]:
    if context < wished:
        yield f"context {context} instead of {wished}: more does not fit"
    if spills:
        yield f"the CPU of {here.row.name} computes a part: its devices and the other machines do not hold it"
