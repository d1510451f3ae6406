"""Which way a request takes on the coordinator while its pool comes and goes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tightwad_agent.conductor import Serving
from tightwad_agent.config import Config
from tightwad_agent.engine.pool import PoolPhase, PoolState
from tightwad_agent.ids import NodeId
from tightwad_agent.proxy.cluster import Own, Remote, Unavailable
from tightwad_agent.view import View
from tightwad_agent.wire.rows import ServeRecord

ME, OTHER = NodeId("a" * 52), NodeId("b" * 52)


def view(state: PoolState, coordinator: NodeId | None = ME) -> View:
    mesh = SimpleNamespace(me=ME, coordinator=coordinator, record=ServeRecord(), with_names=str)
    parts: Any = SimpleNamespace(
        mesh=mesh,
        pool=SimpleNamespace(state=state),
        conductor=SimpleNamespace(serving=Serving("ready", "ready")),
        config=Config(),
        drafting=SimpleNamespace(ready=list),
        usage=None,
    )
    return View(parts)


def ready(*, alive: bool) -> PoolState:
    verifier: Any = SimpleNamespace(alive=alive)
    return PoolState(PoolPhase.READY, "ready", verifier=verifier)


def test_a_verifier_that_lives_answers() -> None:
    assert isinstance(view(ready(alive=True)).route(), Own)


def test_one_that_is_lost_is_waited_for_although_the_pool_has_not_noticed() -> None:
    """Asked, it would be lost to the request again and again, until the request is given up as the cause."""
    seen = view(ready(alive=True))
    assert isinstance(seen.route(), Own)
    seen._p.pool.state = ready(alive=False)  # type: ignore[misc]
    found = seen.route()
    assert isinstance(found, Unavailable)
    assert found.hold


@pytest.mark.parametrize(("coordinator", "kind"), [(OTHER, Remote), (None, Unavailable)])
def test_others_are_asked_whatever_runs_here(coordinator: NodeId | None, kind: type) -> None:
    assert isinstance(view(ready(alive=True), coordinator).route(), kind)
