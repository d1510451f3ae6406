"""Measuring addresses over real sockets, and the link that moves from one to another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from mesh_lab import PATIENCE_S, Box, Wires, founder, hello, links_of, member, read_to_end, start, until

from tightwad_agent.errors import PeerError
from tightwad_agent.events import Kind
from tightwad_agent.ids import Address, NodeId
from tightwad_agent.mesh import gauge, linker, netwatch, path_keeper
from tightwad_agent.mesh.contacts import Contacts
from tightwad_agent.mesh.gauge import MAX_AT_ONCE, GaugeService, measure
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.linker import Linker
from tightwad_agent.mesh.links import Links, Services
from tightwad_agent.mesh.netwatch import NetWatch
from tightwad_agent.mesh.path_keeper import PathKeeper, shown
from tightwad_agent.mesh.paths import PathView
from tightwad_agent.mesh.session import Session
from tightwad_agent.streams import Framed
from tightwad_agent.wire.control import Probe
from tightwad_agent.wire.gauge import GAUGE, MAX_GAUGE, MAX_GAUGES, Gauge, Gauged
from tightwad_agent.wire.handshake import Hello


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return founder(tmp_path_factory.mktemp("gauge"), "one")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, one: Identity) -> Identity:
    return member(one, tmp_path_factory.mktemp("gauge"), "two")


@pytest.fixture
async def wires() -> AsyncIterator[Wires]:
    async with Wires() as made:
        yield made


@pytest.fixture
async def box(nursery: trio.Nursery, one: Identity) -> Box:
    return await start(nursery, one, Services({gauge.SERVICE: GaugeService().serve}))


async def test_round_trip_and_rate_are_measured(box: Box, two: Identity) -> None:
    found = await measure(links_of(two), box.node, box.address, rate=True)
    assert found is not None
    assert 0 < found.rtt_s < PATIENCE_S
    assert found.rate is not None
    assert found.rate > 1000
    without = await measure(links_of(two), box.node, box.address, rate=False)
    assert without is not None
    assert without.rate is None


async def test_an_address_that_leads_nowhere_has_no_figures(box: Box, two: Identity) -> None:
    assert await measure(links_of(two), box.node, Address("127.0.0.1", 1), rate=True) is None
    assert await measure(links_of(two), two.node, box.address, rate=True) is None  # another node is there


async def test_a_node_that_cannot_be_measured_is_one_that_answers(
    nursery: trio.Nursery, one: Identity, two: Identity
) -> None:
    old = await start(nursery, one, Services({}))
    found = await measure(links_of(two), old.node, old.address, rate=True)
    assert found is not None
    assert (found.rtt_s, found.rate) == (math.inf, None)


async def test_a_node_that_breaks_off_has_no_figures(nursery: trio.Nursery, one: Identity, two: Identity) -> None:
    async def rude(_peer: NodeId, stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
        await stream.receive_some(1)

    bad = await start(nursery, one, Services({gauge.SERVICE: rude}))
    assert await measure(links_of(two), bad.node, bad.address, rate=True) is None


async def test_nobody_makes_a_node_send_more_than_a_little(box: Box, two: Identity, wires: Wires) -> None:
    links = links_of(two)
    greedy = Framed(await wires.dial(links, box, gauge.SERVICE), GAUGE, max_payload=1 << 30)
    await greedy.send(Gauge(MAX_GAUGE + 1))
    with pytest.raises(PeerError):
        await greedy.expect(Gauged, deadline_s=PATIENCE_S)
    patient = Framed(await wires.dial(links, box, gauge.SERVICE), GAUGE, max_payload=MAX_GAUGE)
    for _ in range(MAX_GAUGES):
        await patient.send(Gauge(10))
        _, payload = await patient.receive(deadline_s=PATIENCE_S)
        assert len(payload) == 10
    assert await read_to_end(patient.stream) == b""


async def test_few_may_measure_at_once(box: Box, two: Identity, wires: Wires) -> None:
    links = links_of(two)
    for _ in range(MAX_AT_ONCE):
        framed = Framed(await wires.dial(links, box, gauge.SERVICE), GAUGE)
        await framed.send(Gauge())
        await framed.expect(Gauged, deadline_s=PATIENCE_S)
    assert await measure(links, box.node, box.address, rate=False) is None


async def test_a_network_with_traffic_is_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter(range(0, 10**12, 10**9))
    monkeypatch.setattr(gauge, "_traffic", lambda: next(counts))
    assert not await gauge.is_idle()
    monkeypatch.setattr(gauge, "_traffic", lambda: 5)
    assert await gauge.is_idle()


async def test_changes_of_interfaces_are_waited_for_and_looked_for_now_and_then() -> None:
    with NetWatch() as watch, trio.fail_after(PATIENCE_S):
        await watch.change(0.01)


async def test_without_notices_time_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netwatch, "_subscription", lambda: None)
    with NetWatch() as watch, trio.fail_after(PATIENCE_S):
        await watch.change(0.01)


# The link moves


class Side:
    """One node's links with what keeps them, as the mesh puts them together."""

    def __init__(self, nursery: trio.Nursery, who: Identity, links: Links) -> None:
        self.links = links
        self.downs = 0
        self.ups: list[Session] = []
        self.said: list[str] = []
        self.contacts = Contacts(who.node)
        self.linker = Linker(
            who.node,
            links,
            self.contacts,
            self,
            start=nursery.start_soon,
            order=lambda node: self.keeper.order(node, self.contacts.addresses(node)),
        )
        self.keeper = PathKeeper(
            links, self.linker, start=nursery.start_soon, name_of=lambda n: n.short, tell=self.hear
        )
        self.quiet = False
        nursery.start_soon(self.keeper.run)
        nursery.start_soon(self.beat)

    def hear(self, text: str, /, *, kind: Kind | None = None, **facts: Any) -> None:
        assert kind is Kind.LINK
        assert facts["address"] != facts["before"]
        self.said.append(text)

    async def beat(self) -> None:
        while True:
            if not self.quiet:
                self.linker.broadcast(Probe())
            await trio.sleep(0.2)

    def link_up(self, session: Session) -> None:
        self.ups.append(session)
        self.keeper.link_up(session)

    def link_down(self, node: NodeId, clean: bool) -> None:
        self.downs += 1
        self.keeper.link_down(node)

    def dial_ended(self, node: NodeId | None) -> None:
        pass

    def dial_failed(self, node: NodeId, refused: bool) -> None:
        pass

    def take(self, session: Session, message: Any) -> None:
        pass

    def session(self, node: NodeId) -> Session | None:
        return self.linker.session(node)


class Pair:
    """Node one listens on two addresses; node two has dialled the first of them."""

    def __init__(self, nursery: trio.Nursery, one: Identity, two: Identity) -> None:
        self.one, self.two = one, two
        self.incarnation = 1
        self.links = links_of(one, self.hello)
        self.far = Side(nursery, one, self.links)
        self.near = Side(nursery, two, links_of(two))
        self.boxes: list[Box] = []

    async def open(self, nursery: trio.Nursery) -> None:
        service = GaugeService()
        for host in ("127.0.0.1", "127.0.0.2"):
            services = Services({gauge.SERVICE: service.serve}, {linker.SERVICE: self.far.linker.incoming})
            self.boxes.append(await start(nursery, self.one, services, links=self.links, host=host))
        first, second = (box.address for box in self.boxes)
        self.near.keeper.offered(self.one.node, (first, second))
        self.near.contacts.sighted(self.one.node, [first, second], trio.current_time())
        await self.near.linker.relink(self.one.node, first)
        await until(lambda: self.used() == first.host and len(self.far.linker) == 1)

    def hello(self) -> Hello:
        return dataclasses.replace(hello(self.one), incarnation=self.incarnation)

    def used(self) -> str | None:
        session = self.near.session(self.one.node)
        return session.peer.remote.host if session else None


@pytest.fixture
async def pair(nursery: trio.Nursery, one: Identity, two: Identity) -> Pair:
    made = Pair(nursery, one, two)
    await made.open(nursery)
    return made


async def test_a_link_moves_to_another_address_without_a_gap(pair: Pair) -> None:
    first, second = (box.address for box in pair.boxes)
    for n, address in enumerate((second, first, second), 2):
        await pair.near.linker.relink(pair.one.node, address)
        await until(lambda: pair.used() == address.host)  # noqa: B023
        await until(lambda: len(pair.far.ups) == n)  # noqa: B023
        assert len(pair.near.linker) == len(pair.far.linker) == 1
    await trio.sleep(2 * linker.RETIRE_S)  # the old ones have been closed meanwhile
    assert pair.near.downs == pair.far.downs == 0


async def test_both_sides_keep_the_same_of_two_links_also_when_the_node_refuted_its_death_between_them(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a sleep: two dials wait, and while they are answered one after the other the incarnation is raised."""
    first, _ = (box.address for box in pair.boxes)
    old = pair.near.session(pair.one.node)
    assert old is not None
    pair.incarnation += 1
    monkeypatch.setattr(linker.secrets, "randbits", lambda _n: old.number - 1)
    await pair.near.linker._redial_over(pair.one.node, [first], trio.Event())
    await trio.sleep(2 * linker.RETIRE_S)
    assert pair.near.downs == pair.far.downs == 0
    assert len(pair.near.linker) == len(pair.far.linker) == 1


async def test_an_address_of_this_machine_that_is_gone_moves_the_link_and_cuts_what_is_left(
    pair: Pair, wires: Wires
) -> None:
    first, second = (box.address for box in pair.boxes)
    session = pair.near.session(pair.one.node)
    assert session is not None
    pair.near.keeper.own_gone([session.peer.local.host])
    await until(lambda: pair.used() == second.host)
    assert pair.near.keeper.in_use(pair.one.node) == second
    assert pair.near.keeper.order(pair.one.node, [first, second]) == [second, first]
    assert "no longer has 127.0.0.1" in pair.near.said[-1]
    assert f"over {second.host}" in pair.near.said[-1]


async def test_a_cable_that_is_out_for_a_moment_breaks_nothing_where_there_is_no_other(
    pair: Pair, wires: Wires, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(path_keeper, "CUT_S", 0.1)
    node, first = pair.one.node, pair.boxes[0].address
    pair.near.keeper.offered(node, (first,))
    session = pair.near.session(node)
    assert session is not None
    framed = Framed(await wires.dial(pair.near.links, pair.boxes[0], gauge.SERVICE), GAUGE)
    pair.near.keeper.own_gone([session.peer.local.host])
    await trio.sleep(0.5)
    await framed.send(Gauge())
    await framed.expect(Gauged, deadline_s=PATIENCE_S)
    assert pair.near.session(node) is session
    assert pair.near.said == []


async def test_an_address_that_is_not_announced_any_more_is_left(pair: Pair) -> None:
    second = pair.boxes[1].address
    pair.near.keeper.offered(pair.one.node, (second,))
    await until(lambda: pair.used() == second.host)
    assert pair.near.downs == pair.far.downs == 0


async def test_what_is_left_on_a_broken_address_ends(pair: Pair, wires: Wires) -> None:
    second = pair.boxes[1].address
    stream = await wires.dial(pair.near.links, pair.boxes[0], gauge.SERVICE)
    pair.near.keeper.offered(pair.one.node, (second,))
    assert await read_to_end(stream) == b""


async def test_a_link_over_a_dead_address_is_given_up_for_one_that_answers(pair: Pair) -> None:
    await until(lambda: pair.near.keeper.views(pair.one.node)[1].works is True)
    pair.far.quiet = True
    await until(lambda: pair.used() == pair.boxes[1].address.host)
    assert "is silent" in " ".join(pair.near.said)


async def test_the_first_address_has_a_long_head_start_while_it_works(pair: Pair) -> None:
    node = pair.one.node
    await until(lambda: pair.near.keeper.views(node)[0].works is True)
    await until(lambda: pair.near.keeper.stagger_s(node) is not None)
    pair.far.quiet = True
    await until(lambda: pair.near.keeper.stagger_s(node) is None)


def test_addresses_are_shown_with_what_is_known_of_them() -> None:
    where = Address("10.0.2.4", 8089)
    assert shown(where, PathView(where, True, 0.0002, 117.5e6, True)) == "10.0.2.4 (0.2 ms, 940 Mbit/s)"
    assert shown(where, PathView(where, True, math.inf, None, True)) == "10.0.2.4"
    assert shown(where, None) == "10.0.2.4"
