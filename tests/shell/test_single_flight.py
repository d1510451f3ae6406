"""Nodes that want one source, in virtual time: when each begins, yields, waits and says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from tightwad_agent.errors import OriginError
from tightwad_agent.ids import ModelId
from tightwad_agent.swarm.flight import SETTLE_S, STALL_S, Claim, Elsewhere, Holding
from tightwad_agent.swarm.single_flight import Progress, SingleFlight, Work
from tightwad_agent.swarm.store import Entry
from tightwad_agent.testing import node_id

DIGEST = "d" * 64
MODEL = ModelId("a" * 64)
SOURCE = DIGEST + "e" * 64
ENTRY = cast("Entry", object())
SIZE = 100


@dataclass
class Node:
    """`begun` has the times at which a download began; one takes `SIZE` seconds and goes on where it was."""

    name: str
    moves: bool = True
    flights: SingleFlight = field(init=False)
    begun: list[float] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    n_here: int = 0
    has_it: bool = False
    failure: Exception | None = None

    def __post_init__(self) -> None:
        self.flights = SingleFlight(node_id(self.name), lambda: 1000.0, lambda _at_once: None)

    async def fetch(self, progress: Progress) -> str:
        self.begun.append(trio.current_time())
        while self.n_here < SIZE:
            await trio.sleep(1)
            if self.failure is not None:
                raise self.failure
            if self.moves:
                self.n_here += 1
                progress("fetching", self.n_here, SIZE)
        return "file"

    async def keep(self, value: str, progress: Progress) -> Entry:
        assert value == "file"
        for n in range(10):
            progress("reading", n, 10)
            await trio.sleep(1)
        self.has_it = True
        return ENTRY

    async def add(self) -> None:
        async def current() -> str:
            await trio.sleep(0)
            return SOURCE

        async def take(holding: Holding, _progress: Progress) -> Entry:
            assert holding.model == MODEL
            await trio.sleep(1)
            self.has_it = True
            return ENTRY

        def said(stage: str, _done: int, _total: int | None) -> None:
            if stage not in self.stages:
                self.stages.append(stage)

        work = Work(DIGEST, self.fetch, self.keep, current, take)
        assert await self.flights.bring(work, (), said) is ENTRY


async def rows(nodes: list[Node], delay_s: float) -> None:
    """What the mesh does: each node hears of the others `delay_s` later."""
    while True:
        seen = {n.name: (n.flights.fetching(), n.has_it) for n in nodes}
        await trio.sleep(delay_s)
        for node in nodes:
            others = [n for n in nodes if n is not node]
            claims = tuple(
                Claim(node_id(n.name), n.name, f.since, f.done, f.total) for n in others for f in seen[n.name][0]
            )
            held = (Holding(MODEL, "m.gguf", SOURCE),) if any(seen[n.name][1] for n in others) else ()
            node.flights.set_elsewhere(Elsewhere(len(others), {DIGEST: claims}, {DIGEST: held} if held else {}))


async def run(nodes: list[Node], delay_s: float, during: Callable[[], Any] | None = None) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rows, nodes, delay_s)
        await trio.sleep(3 * delay_s)
        async with trio.open_nursery() as adds:
            for node in nodes:
                adds.start_soon(node.add)
            if during is not None:
                adds.start_soon(during)
        nursery.cancel_scope.cancel()


async def test_rows_may_take_nearly_as_long_as_claims_settle(autojump_clock: MockClock) -> None:
    nodes = [Node(name) for name in "abcd"]
    await run(nodes, SETTLE_S * 0.4)
    assert sum(len(n.begun) for n in nodes) == 1, "one began, and nobody else"
    assert all(n.has_it for n in nodes)
    owner = next(n for n in nodes if n.begun)
    for node in nodes:
        waits = [f"waiting for {owner.name}, which {does}" for does in ("downloads it", "reads what it downloaded")]
        settle = ["asking whether another node downloads it"]
        assert node.stages == settle + (["fetching", "reading"] if node is owner else waits)


async def test_slower_rows_cost_no_more_than_they_take(autojump_clock: MockClock) -> None:
    nodes = [Node(name) for name in "abcd"]
    await run(nodes, 5)
    owner = next(n for n in nodes if n.n_here == SIZE)
    assert all(n.n_here <= 11 for n in nodes if n is not owner), "they yield when they hear of one another"


async def test_an_owner_that_stands_still_is_followed_and_yields(autojump_clock: MockClock) -> None:
    nodes = [Node(name) for name in "abc"]
    first = min(nodes, key=lambda n: node_id(n.name))
    first.moves = False
    await run(nodes, 0.1)
    assert first.n_here == 0
    (second,) = [n for n in nodes if n is not first and n.begun]
    assert second.begun[0] - first.begun[0] == pytest.approx(STALL_S, abs=2)
    assert second.n_here == SIZE
    assert first.has_it


async def test_a_fault_is_for_the_node_that_has_it(autojump_clock: MockClock) -> None:
    bad, good = sorted((Node("a"), Node("b")), key=lambda n: node_id(n.name))
    bad.failure = OriginError("no token")

    async def fails() -> None:
        with pytest.raises(OriginError, match="no token"):
            await bad_add()

    bad_add = bad.add
    bad.add = fails  # type: ignore[method-assign]
    await run([bad, good], 0.1)
    assert good.n_here == SIZE
    assert bad.flights.fetching() == ()


async def test_alone_nobody_is_waited_for(autojump_clock: MockClock) -> None:
    node = Node("a")
    begun = trio.current_time()
    await node.add()
    assert node.begun == [begun]
    assert node.stages == ["fetching", "reading"]


async def test_the_claim_counts_beyond_the_file_while_it_is_read(autojump_clock: MockClock) -> None:
    node = Node("a")
    seen: list[tuple[int, int]] = []
    node.flights._changed = lambda _at_once: seen.extend((f.done, f.total) for f in node.flights.fetching())
    await node.add()
    assert seen[0] == (0, 0)
    assert (SIZE, SIZE) in seen
    assert seen[-1] == (SIZE + 9, SIZE)
    assert seen == sorted(seen)
