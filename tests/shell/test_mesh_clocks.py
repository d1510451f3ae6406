"""Clocks that are wrong: within a day everything works, beyond it the message says whose is off and by how much."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from mesh_lab import founder, hello, links_of, member, start
from test_mesh_service import Net, Node, all_see, until

from tightwad_agent.errors import NotTrusted, OutOfDate
from tightwad_agent.ids import Address, NodeId, NodeName
from tightwad_agent.mesh import certs, clocks, identity, leaf, tokens
from tightwad_agent.mesh.enrol import join
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.leaf import LeafKeeper
from tightwad_agent.mesh.links import Services
from tightwad_agent.wire.handshake import Hello

DAY_S = 86_400


@pytest.fixture
async def net(tmp_path: Path) -> AsyncIterator[Net]:
    async with trio.open_nursery() as nursery:
        yield Net(nursery, tmp_path)
        nursery.cancel_scope.cancel()


async def found_with_clock(net: Net, shift_s: float) -> Node:
    """A founder whose clock is off from the first moment on; TLS itself goes by the machine's."""
    me = identity.create_cluster(net._root / "a", NodeName("a"), time.time() + shift_s)
    node = await net.start(me)
    node.mesh._wall = lambda: time.time() + shift_s
    return node


async def enter(net: Net, via: Node, shift_s: float, joiner_shift_s: float = 0.0) -> Identity:
    book = via.mesh.ledger
    assert book is not None
    made = identity.issue_token(via.me, book, time.time() + shift_s)
    where = [Address("127.0.0.1", via.mesh.port)]
    return await join(
        tokens.parse(made.text),
        where,
        name=NodeName("b"),
        state_dir=net._root / "b",
        clock=lambda: time.time() + joiner_shift_s,
    )


@pytest.mark.parametrize("shift_s", [-DAY_S, DAY_S])
async def test_an_authority_whose_clock_is_a_day_off_lets_others_in_and_is_named(net: Net, shift_s: float) -> None:
    a = await found_with_clock(net, shift_s)
    b = await net.start(await enter(net, a, shift_s))
    await until(lambda: all_see([a, b]))
    which = "behind" if shift_s > 0 else "ahead of"
    await until(lambda: any(f"clock of this machine is 24 hours {which} a's" in e for e in b.events))


@pytest.mark.parametrize("joiner_shift_s", [-DAY_S, DAY_S])
async def test_a_joiner_whose_clock_is_a_day_off_gets_in(net: Net, joiner_shift_s: float) -> None:
    a = await found_with_clock(net, 0.0)
    b = await net.start(await enter(net, a, 0.0, joiner_shift_s))
    await until(lambda: all_see([a, b]))


@pytest.mark.parametrize(("days", "says"), [(-3, r"3 days behind a's"), (40, r"40 days ahead of a's")])
async def test_a_joiner_whose_clock_is_further_off_is_told_so(net: Net, days: int, says: str) -> None:
    a = await found_with_clock(net, 0.0)
    with pytest.raises(OutOfDate, match=says):
        await enter(net, a, 0.0, days * DAY_S)


async def test_a_dialler_out_of_date_is_told_whose_clock_is_off(nursery: trio.Nursery, tmp_path: Path) -> None:
    """The listener's certificate is over by the dialler's clock; the listener says what time it has."""
    one = founder(tmp_path, "one")
    old = member(one, tmp_path, "old", issued_days_ago=40)
    box = await start(nursery, old, Services({}))
    box.links._hello = lambda: clock_at(old, time.time() - 40 * DAY_S)
    two = links_of(member(one, tmp_path, "two"), lambda: clock_at(one, time.time()))
    with pytest.raises(OutOfDate, match="40 days ahead of old's"):
        await two.dial([box.address], want=old.node, service="x")


async def test_a_listener_that_does_not_say_its_time_changes_no_message(nursery: trio.Nursery, tmp_path: Path) -> None:
    one = founder(tmp_path, "one")
    box = await start(nursery, member(one, tmp_path, "old", issued_days_ago=40), Services({}))
    with pytest.raises(NotTrusted, match="expired") as caught:
        await links_of(member(one, tmp_path, "two")).dial([box.address], want=None, service="x")
    assert "compare the clocks" in caught.value.hint
    gone = OutOfDate("its certificate has expired")
    assert await clocks.explained(gone, Address("127.0.0.1", 1), lambda: hello(one)) is gone


def clock_at(who: Identity, now: float) -> Hello:
    return dataclasses.replace(hello(who), clock_s=int(now))


@pytest.mark.parametrize(
    ("off_s", "says"),
    [
        (0, ""),
        (599, ""),
        (-660, "11 minutes behind"),
        (26 * 3600, "26 hours ahead of"),
        (-26 * 3600, "26 hours behind"),
        (-72 * 3600, "3 days behind"),
    ],
)
def test_the_difference_in_words(off_s: int, says: str) -> None:
    said = clocks.difference(1_800_000_000 + off_s, 1_800_000_000, "b")
    assert said == (f"the clock of this machine is {says} b's" if says else "")
    assert clocks.difference(1_800_000_000, 0, "b") == "", "a node that does not say"


class Renewing:
    """A keeper's loop with a wall clock that is set by hand."""

    def __init__(self, me: Identity, now: float, *authorities: Identity) -> None:
        self.now = now
        self.used: list[Identity] = []
        self.n_looks = 0
        self._offices = {office.node: office for office in authorities}
        self.keeper = LeafKeeper(
            me,
            call=self._call,
            authorities=lambda: list(self._offices),
            use=self.used.append,
            wall=self._wall,
            tell=str,
        )

    def _wall(self) -> float:
        self.n_looks += 1
        return self.now

    async def _call(self, node: NodeId, _method: str, params: dict[str, Any]) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        office, me = self._offices[node], self.keeper.identity.node
        return {"leaf": identity.renew(office, me, params["leaf"], office.leaf_expires - certs.LEAF_S)}

    async def looked(self) -> None:
        """It has looked at the clock several times since."""
        before = self.n_looks
        await until(lambda: self.n_looks > before + 20)


async def test_renewal_comes_at_two_thirds_by_the_moved_clock(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaf, "CHECK_S", 0.005)
    began = time.time()
    run = Renewing(identity.create_cluster(tmp_path / "a", NodeName("a"), began), began)
    nursery.start_soon(run.keeper.run)
    for n in range(3):
        run.now = began + (n + 1) * 20 * DAY_S - 60
        await run.looked()
        assert len(run.used) == n
        run.now = began + (n + 1) * 20 * DAY_S
        await until(lambda n=n: len(run.used) == n + 1)
        assert run.used[-1].leaf_expires == pytest.approx(run.now + certs.LEAF_S, abs=2)


async def test_a_leaf_that_stays_due_is_not_renewed_in_a_loop(tmp_path: Path) -> None:
    """The authority's clock is 25 days behind: what it gives is due at once."""
    office = identity.create_cluster(tmp_path / "a", NodeName("a"), time.time() - 25 * DAY_S)
    run = Renewing(member(office, tmp_path, "b", issued_days_ago=25), time.time(), office)
    with trio.move_on_after(2):
        await run.keeper.run()
    assert len(run.used) == 1
