"""Several whole meshes in one process, over real sockets and real TLS on loopback."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tightwad_agent.errors import PeerRefused, PeerUnreachable, RemoteError, StaleEpoch, UnknownModel
from tightwad_agent.ids import Address, Epoch, ModelId, NodeName
from tightwad_agent.mesh import identity, tokens
from tightwad_agent.mesh.enrol import join
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.ledger import Ledger
from tightwad_agent.mesh.service import MeshService, Settings
from tightwad_agent.wire.rows import NodeRow, ServeRecord, Want

DEADLINE_S = 20.0


class Node:
    """One mesh and the scope that ends it; `over` is set when it has ended."""

    def __init__(self, me: Identity, mesh: MeshService, events: list[str]) -> None:
        self.me = me
        self.mesh = mesh
        self.scope = trio.CancelScope()
        self.over = trio.Event()
        self.events = events

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        try:
            with self.scope:
                await self.mesh.run(task_status)
        finally:
            self.over.set()

    async def stop(self) -> None:
        """Ends it, its last write included: the next one on the same directory must not be overtaken."""
        self.scope.cancel()
        with trio.fail_after(DEADLINE_S):
            await self.over.wait()


class Net:
    """Nodes of one cluster, each with a state directory of its own."""

    def __init__(self, nursery: trio.Nursery, root: Path) -> None:
        self._nursery = nursery
        self._root = root

    async def found(self, name: str = "a") -> Node:
        me = identity.create_cluster(self._root / name, NodeName(name), time.time())
        return await self.start(me)

    async def join(self, via: Node, name: str) -> Node:
        made = identity.issue_token(via.me, via.mesh.ledger or Ledger(via.me.state_dir), time.time())
        where = [Address("127.0.0.1", via.mesh.port)]
        me = await join(
            tokens.parse(made.text), where, name=NodeName(name), state_dir=self._root / name, clock=time.time
        )
        return await self.start(me)

    async def start(
        self, me: Identity, port: int = 0, seeds: tuple[Address, ...] = (), *, forgetful: bool = False
    ) -> Node:
        state = dataclasses.replace(me.state, incarnation=me.state.incarnation + 1)
        if forgetful:
            state = dataclasses.replace(state, peers=())
        state.save(me.state_dir)
        me = dataclasses.replace(me, state=state)
        row = NodeRow(
            node=me.node,
            name=state.name,
            role=me.role,
            incarnation=state.incarnation,
            version=0,
            joined_at=state.joined_at,
            eligible=True,
            klass=0,
            endpoint_port=1,
        )
        events: list[str] = []
        settings = Settings(state_dir=me.state_dir, port=port, mdns=False, interfaces=("lo",), seeds=seeds)

        def tell(text: str, /, **_facts: Any) -> None:
            events.append(text)

        node = Node(me, MeshService(me, settings, row, wall=time.time, tell=tell), events)
        await self._nursery.start(node.run)
        return node

    async def restart(self, node: Node) -> Node:
        """The same node again, on another port: only what it remembers itself can lead it back to the others."""
        await node.stop()
        me = identity.load(node.me.state_dir)
        assert me is not None
        return await self.start(me)


@pytest.fixture
async def net(tmp_path: Path) -> AsyncIterator[Net]:
    async with trio.open_nursery() as nursery:
        yield Net(nursery, tmp_path)
        nursery.cancel_scope.cancel()


async def until(true: Callable[[], Any], deadline_s: float = DEADLINE_S) -> None:
    with trio.fail_after(deadline_s):
        while not true():
            await trio.sleep(0.01)


def all_see(nodes: list[Node]) -> bool:
    ids = {n.me.node for n in nodes}
    return all(n.mesh.alive() == ids and len(n.mesh.living_rows()) == len(ids) for n in nodes)


def agree(nodes: list[Node]) -> bool:
    """All obey the same living coordinator at the same epoch."""
    first = nodes[0].mesh
    same = {(n.mesh.coordinator, n.mesh.epoch) for n in nodes}
    return len(same) == 1 and first.coordinator in {n.me.node for n in nodes}


async def three(net: Net) -> list[Node]:
    a = await net.found()
    nodes = [a, await net.join(a, "b"), await net.join(a, "c")]
    await until(lambda: all_see(nodes) and agree(nodes))
    return nodes


async def test_three_nodes_link_up_and_elect_one(net: Net) -> None:
    nodes = await three(net)
    assert sum(n.mesh.coordinating for n in nodes) == 1
    assert all(p.address for n in nodes for p in n.mesh.peers())
    await until(lambda: all(p.rtt_s is not None for n in nodes for p in n.mesh.peers()))
    assert {p.state for n in nodes for p in n.mesh.peers()} == {"alive"}


async def test_events_have_names_from_the_first_moment_of_a_link(net: Net) -> None:
    a = await net.found()
    b = await net.join(a, "b")
    await until(lambda: "b joined the cluster" in " ".join(a.events) and "b is alive: connected" in a.events)
    await until(lambda: "a is alive: connected" in b.events and agree([a, b]))
    assert [text for n in (a, b) for text in n.events if a.me.node.short in text or b.me.node.short in text] == []


async def test_links_do_not_flap_when_both_sides_dial(net: Net) -> None:
    nodes = await three(net)
    await trio.sleep(2.5)
    for node in nodes:
        assert not [e for e in node.events if "suspect: the connection" in e], node.events
        assert node.mesh.n_links == 2


async def test_a_row_reaches_all_and_is_edited_by_its_node_alone(net: Net) -> None:
    nodes = await three(net)
    nodes[1].mesh.edit_row(lambda row: dataclasses.replace(row, note="busy"))

    def note(node: Node) -> str:
        row = node.mesh.row_of(nodes[1].me.node)
        return row.note if row else ""

    await until(lambda: all(note(n) == "busy" for n in nodes))
    before = nodes[1].mesh.row.version
    nodes[1].mesh.edit_row(lambda row: dataclasses.replace(row, note="busy"))
    assert nodes[1].mesh.row.version == before


async def test_the_record_spreads_and_the_greatest_version_wins(net: Net) -> None:
    nodes = await three(net)
    old = ServeRecord(want=Want.NONE, version=(1, 1, "x"))
    new = ServeRecord(want=Want.PINNED, model=ModelId("0" * 64), version=(1, 2, "x"))
    assert nodes[0].mesh.set_record(new)
    assert not nodes[0].mesh.set_record(old)
    await until(lambda: all(n.mesh.record == new for n in nodes))
    nodes[2].mesh.set_record(old)
    assert nodes[2].mesh.record == new


async def test_calls_carry_results_and_errors_and_reach_oneself(net: Net) -> None:
    a, b, _ = await three(net)

    async def double(peer: Any, params: dict[str, Any]) -> dict[str, Any]:
        return {"n": params["n"] * 2, "from": str(peer)}

    async def fail(_peer: Any, _params: dict[str, Any]) -> dict[str, Any]:
        raise UnknownModel("no such model", hint="look again")

    for node in (a, b):
        node.mesh.methods |= {"double": double, "fail": fail}
    assert await a.mesh.call(b.me.node, "double", {"n": 21}) == {"n": 42, "from": str(a.me.node)}
    assert await a.mesh.call(a.me.node, "double", {"n": 4}) == {"n": 8, "from": str(a.me.node)}
    with pytest.raises(RemoteError) as caught:
        await a.mesh.call(b.me.node, "fail", {})
    assert (caught.value.code, caught.value.hint) == ("model_not_found", "look again")
    with pytest.raises(RemoteError) as caught:
        await a.mesh.call(b.me.node, "nothing", {})
    assert caught.value.code == PeerRefused.code


async def test_a_fault_in_a_method_is_told_and_breaks_nothing(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    a, b, _ = await three(net)

    async def bug(_peer: Any, _params: dict[str, Any]) -> dict[str, Any]:
        raise ZeroDivisionError

    b.mesh.methods["bug"] = bug
    with caplog.at_level(logging.CRITICAL), pytest.raises(RemoteError) as caught:
        await a.mesh.call(b.me.node, "bug", {})
    assert caught.value.code == "fault"
    assert b.me.node in a.mesh.alive()


async def test_streams_are_raw_bytes_between_named_services(net: Net) -> None:
    a, b, _ = await three(net)
    seen: list[Any] = []

    async def echo(peer: Any, stream: trio.abc.Stream, args: dict[str, Any]) -> None:
        seen.append((peer, args))
        while data := await stream.receive_some(65536):
            await stream.send_all(data)

    for node in (a, b):
        node.mesh.streams["echo"] = echo
    for target in (b, a):
        stream = await a.mesh.open_stream(target.me.node, "echo", {"x": 1})
        async with stream:
            await stream.send_all(b"hello")
            assert await stream.receive_some(65536) == b"hello"
    assert seen == [(a.me.node, {"x": 1})] * 2
    with pytest.raises(PeerRefused):
        await a.mesh.open_stream(b.me.node, "nothing", {})
    with pytest.raises(PeerRefused):
        await a.mesh.open_stream(a.me.node, "nothing", {})


async def test_a_killed_node_is_dead_soon_and_another_coordinates(net: Net) -> None:
    nodes = await three(net)
    dead = next(n for n in nodes if n.mesh.coordinating)
    left = [n for n in nodes if n is not dead]
    old = left[0].mesh.epoch
    dead.scope.cancel()
    await until(lambda: all_see(left) and agree(left), 5)
    assert left[0].mesh.epoch > old
    assert any("is dead" in e and dead.mesh.row.name in e for e in left[0].events)
    with pytest.raises(PeerUnreachable):
        await left[0].mesh.open_stream(dead.me.node, "call", {})


async def test_a_node_comes_back_as_itself(net: Net) -> None:
    nodes = await three(net)
    gone = next(n for n in nodes if not n.mesh.coordinating)
    gone.scope.cancel()
    left = [n for n in nodes if n is not gone]
    await until(lambda: all_see(left))
    epoch = left[0].mesh.epoch
    back = await net.restart(gone)
    await until(lambda: all_see([*left, back]) and agree([*left, back]))
    assert back.me.node == gone.me.node
    assert back.mesh.row.incarnation > gone.mesh.row.incarnation
    assert left[0].mesh.epoch == epoch


async def test_leaving_is_not_dying_and_hands_over_at_once(net: Net) -> None:
    nodes = await three(net)
    leaver = next(n for n in nodes if n.mesh.coordinating)
    left = [n for n in nodes if n is not leaver]
    await leaver.mesh.leave()
    await until(lambda: all_see(left) and agree(left), 5)
    states = {p.node: p.state for p in left[0].mesh.peers()}
    assert states[leaver.me.node] == "left"


async def test_epochs_and_the_record_survive_a_restart_of_all(net: Net) -> None:
    nodes = await three(net)
    record = ServeRecord(want=Want.NONE, version=(nodes[0].mesh.epoch.counter, 7, "x"))
    nodes[0].mesh.set_record(record)
    old = nodes[0].mesh.epoch
    await until(lambda: all(_saved(n).serve == record for n in nodes))
    for node in nodes:
        node.scope.cancel()
    with contextlib.suppress(trio.TooSlowError):
        await until(lambda: not all_see(nodes), 0.2)
    again = [await net.restart(n) for n in nodes]
    # ports are new: only what is remembered of addresses is wrong, so give each the others'
    for node in again:
        for other in again:
            node.mesh._contacts.sighted(other.me.node, [Address("127.0.0.1", other.mesh.port)], trio.current_time())
    await until(lambda: all_see(again) and agree(again))
    assert again[0].mesh.epoch > old
    assert all(n.mesh.record == record for n in again)


def _saved(node: Node) -> Any:
    me = identity.load(node.me.state_dir)
    assert me is not None
    return me.state


async def test_a_command_of_an_old_epoch_or_of_a_stranger_to_the_office_is_refused(net: Net) -> None:
    nodes = await three(net)
    boss = next(n for n in nodes if n.mesh.coordinating)
    worker, other = [n for n in nodes if n is not boss]
    epoch = boss.mesh.epoch
    assert await worker.mesh.accept_command(boss.me.node, epoch)
    assert not await worker.mesh.accept_command(boss.me.node, Epoch(epoch.counter - 1, epoch.node))
    assert not await worker.mesh.accept_command(other.me.node, epoch)


async def test_an_epoch_is_on_the_disk_before_a_command_of_it_is_obeyed(net: Net) -> None:
    nodes = await three(net)
    boss = next(n for n in nodes if n.mesh.coordinating)
    worker = next(n for n in nodes if n is not boss)
    newer = Epoch(boss.mesh.epoch.counter + 1, str(boss.me.node))
    await worker.mesh.accept_command(boss.me.node, newer)
    assert _saved(worker).epoch >= newer


async def test_stale_epoch_keeps_its_class_over_a_call(net: Net) -> None:
    a, b, _ = await three(net)

    async def refuse(_peer: Any, _params: dict[str, Any]) -> dict[str, Any]:
        raise StaleEpoch("epoch 1 is over")

    b.mesh.methods["refuse"] = refuse
    with pytest.raises(StaleEpoch):
        await a.mesh.call(b.me.node, "refuse", {})


async def test_a_leaf_is_renewed_at_two_thirds_and_kept(net: Net) -> None:
    a = await net.found()
    b = await net.join(a, "b")
    await until(lambda: all_see([a, b]))
    later = time.time() + 21 * 86400
    for node in (a, b):
        node.mesh._leaf._wall = lambda: later
    before = {n.me.node: n.mesh.identity.leaf_expires for n in (a, b)}
    with pytest.raises(RemoteError):
        await b.mesh.call(a.me.node, "leaf.renew", {"leaf": a.mesh.identity.leaf_der})
    await b.mesh._leaf.renew()
    await a.mesh._leaf.renew()  # last: by the real clock the new leafs are not valid yet
    for node in (a, b):
        assert node.mesh.identity.leaf_expires > before[node.me.node] + 20 * 86400
        assert not node.mesh.identity.renewal_due(later)
        saved = identity.load(node.me.state_dir)
        assert saved is not None
        assert saved.leaf_expires == node.mesh.identity.leaf_expires


async def test_a_seed_is_enough_and_leads_to_the_others(net: Net) -> None:
    nodes = await three(net)
    await nodes[2].stop()
    await until(lambda: all_see(nodes[:2]))
    me = identity.load(nodes[2].me.state_dir)
    assert me is not None
    lost = await net.start(me, forgetful=True)
    await trio.sleep(0.5)
    assert lost.mesh.n_links == 0, "nobody told it where to look, and nobody knows its new port"
    await lost.stop()
    me = identity.load(nodes[2].me.state_dir)
    assert me is not None
    seed = (Address("127.0.0.1", nodes[1].mesh.port),)
    found = await net.start(me, seeds=seed, forgetful=True)
    await until(lambda: all_see([*nodes[:2], found]) and agree([*nodes[:2], found]))
