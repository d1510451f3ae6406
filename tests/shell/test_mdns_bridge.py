"""The trio side of mDNS, with zeroconf's place taken by a fake that is told what the network says."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import trio

from tightwad_agent.ids import Address, NodeName
from tightwad_agent.mesh import mdns
from tightwad_agent.mesh.advert import SERVICE_TYPE, Advert, to_txt
from tightwad_agent.mesh.mdns import Gone, Mdns, News, Record, Sighting
from tightwad_agent.mesh.netif import Interface
from tightwad_agent.testing import node_id

ETH = Interface("eth0", True, ("192.168.1.10/24",))
ME = Advert(cluster="c" * 16, node=node_id("me"), port=8089, name=NodeName("me"))


class Network:
    """What the fake responders announce, and what they hear from a foreign thread, as zeroconf would have it."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.announced: list[tuple[dict[str, str], tuple[str, ...]]] = []
        self.opened: list[tuple[str, ...]] = []
        self.n_closed = 0
        self.n_queries = 0
        self.missed: list[str] = []
        self.n_withdrawn = 0
        self.asked: list[str] = []
        self.answers_when_asked = False
        self.failure: Exception | None = None
        self.close_waits_for = threading.Event()
        self.close_waits_for.set()
        self.heard: Callable[[str, bool], None] = lambda _name, _gone: None
        self.heard_while_opening: tuple[str, ...] = ()
        network = self

        class Responder:
            def __init__(self, sources: tuple[str, ...], heard: Callable[[str, bool], None]) -> None:
                if network.failure:
                    raise network.failure
                self.sources = sources
                network.opened.append(sources)
                network.heard = heard
                for name in network.heard_while_opening:
                    heard(service(name), False)
                if network.heard_while_opening:
                    time.sleep(0.1)  # zeroconf's own constructor goes on after its browser's first callback

            def announce(self, node: str, port: int, txt: dict[str, str], hosts: tuple[str, ...]) -> None:
                network.announced.append((txt, hosts))

            def cached(self, node: str) -> Record | None:
                return network.records.get(node)

            def withdraw(self) -> None:
                network.n_withdrawn += 1

            def query(self) -> None:
                network.n_queries += 1

            def names(self) -> list[str]:
                return [service(node) for node in network.missed]

            def ask(self, node: str) -> bool:
                network.asked.append(node)
                if network.answers_when_asked:
                    network.records[node] = record(node)
                return network.answers_when_asked

            def close(self) -> None:
                network.n_closed += 1
                network.close_waits_for.wait()

        self.responder = Responder

    async def hear(self, *names: str, gone: bool = False) -> None:
        def in_thread() -> None:
            for name in names:
                self.heard(service(name), gone)

        thread = threading.Thread(target=in_thread)
        thread.start()
        await trio.to_thread.run_sync(thread.join)


def service(name: str) -> str:
    return name if "." in name else f"{node_id(name)}.{SERVICE_TYPE}"


def record(node: str, *hosts: str, **changes: object) -> Record:
    advert = replace(ME, node=node, name=NodeName("other"), **changes)
    txt = {k.encode(): v.encode() for k, v in to_txt(advert).items()}
    return Record(txt, advert.port, hosts or ("192.168.1.20",))


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    network = Network()
    monkeypatch.setattr(mdns, "_Responder", network.responder)
    return network


class Here:
    """A running `Mdns`, its facts in the test's hands."""

    def __init__(self, nursery: trio.Nursery, room: int = 1000, interfaces: tuple[str, ...] = ()) -> None:
        self.facts = [ETH]
        self.advert: Advert | None = ME
        send, self.news = trio.open_memory_channel[News](room)
        self.mdns = Mdns(
            ME.node,
            lambda: self.advert,
            send,
            interfaces=interfaces,
            scan=lambda: self.facts,
            period_s=0.001,
            retry_s=0.01,
        )
        nursery.start_soon(self.mdns.run)

    async def until(self, true: Callable[[], object]) -> None:
        with trio.fail_after(30):
            while not true():
                await trio.sleep(0.001)

    async def next(self) -> News:
        with trio.fail_after(30):
            return await self.news.receive()


async def started(nursery: trio.Nursery, network: Network, **options: int) -> Here:
    here = Here(nursery, **options)
    await here.until(lambda: network.announced)
    return here


async def test_a_sighting_is_reported_once_its_change_again_and_its_end_once(
    nursery: trio.Nursery, network: Network
) -> None:
    here = await started(nursery, network)
    beta = node_id("beta")
    network.records[beta] = record(beta, "10.0.0.7", "192.168.1.20", "fe80::1", "127.0.0.1")
    await network.hear("beta", "beta")
    seen = await here.next()
    assert isinstance(seen, Sighting)
    assert (seen.node, seen.cluster_hash) == (beta, "c" * 16)
    assert seen.addresses == (Address("192.168.1.20", 8089), Address("10.0.0.7", 8089))
    network.records[beta] = record(beta, engine="b2")
    await network.hear("beta")
    assert (await here.next()).advert.engine == "b2"
    await network.hear("beta", gone=True)
    assert await here.next() == Gone(beta)
    await network.hear("beta", gone=True)
    network.records[node_id("end")] = record(node_id("end"))
    await network.hear("end")
    assert (await here.next()).node == node_id("end")
    nursery.cancel_scope.cancel()


async def test_records_that_are_none_of_ours_are_refused_with_the_reason(
    nursery: trio.Nursery, network: Network
) -> None:
    here = await started(nursery, network)
    b = node_id("beta")
    for bad, reason in (
        (Record({}, 8089, ("192.168.1.20",)), "announces version ''"),
        (replace(record(b), port=22), "contradicts itself"),
        (record(node_id("gamma")), "contradicts itself"),
    ):
        network.records[b] = bad
        await network.hear("beta")
        await here.until(lambda reason=reason: reason in here.mdns.last_refusal)
    await network.hear(f"printer.{SERVICE_TYPE}", "_tightwad._tcp.local.", f"{b}._http._tcp.local.", "x" * 3000 + ".")
    await here.until(lambda: here.mdns.n_refused == 7)
    assert len(here.mdns.last_refusal) < 200
    assert here.mdns.seen == {}
    nursery.cancel_scope.cancel()


async def test_records_that_did_not_come_along_are_asked_for(nursery: trio.Nursery, network: Network) -> None:
    here = await started(nursery, network)
    await network.hear("mute")
    await here.until(lambda: network.asked == [node_id("mute")])
    network.answers_when_asked = True
    await network.hear("beta")
    assert (await here.next()).node == node_id("beta")
    nursery.cancel_scope.cancel()


async def test_a_flood_is_bounded_and_counted_and_what_comes_after_it_is_heard(
    nursery: trio.Nursery, network: Network
) -> None:
    here = await started(nursery, network, room=0)
    flood = [f"fake{i}" for i in range(1000)]
    for name in flood:
        network.records[node_id(name)] = record(node_id(name))
    await network.hear(*flood)  # nobody reads the news meanwhile
    assert here.mdns.n_dropped >= 1000 - mdns.MAX_BACKLOG - 1
    assert len(here.mdns._backlog) <= mdns.MAX_BACKLOG
    network.records[node_id("beta")] = record(node_id("beta"))
    await network.hear("beta")
    while (await here.next()).node != node_id("beta"):
        pass
    for name in flood[:400]:
        await network.hear(name)
        await here.next()
    assert len(here.mdns.seen) == mdns.MAX_SIGHTINGS
    nursery.cancel_scope.cancel()


async def test_own_changes_are_announced(nursery: trio.Nursery, network: Network) -> None:
    here = await started(nursery, network)
    here.advert = replace(ME, engine="b1")
    await here.until(lambda: len(network.announced) == 2)
    here.facts = [replace(ETH, addresses=("192.168.1.10/24", "fd00::1/64"))]
    await here.until(lambda: len(network.announced) == 3)
    assert network.announced[-1] == (to_txt(here.advert), ("192.168.1.10", "fd00::1"))
    assert network.opened == [("192.168.1.10",)]
    here.facts = [replace(ETH, addresses=("192.168.9.9/24",))]
    await here.until(lambda: len(network.opened) == 2)
    assert network.opened[1] == ("192.168.9.9",)
    assert network.n_closed == 1
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("facts", "interfaces", "problem"),
    [
        ([], (), "no network interface to announce on (this machine has none)"),
        ([replace(ETH, is_up=False)], (), "no network interface to announce on (eth0: is down)"),
        ([ETH], ("eth7",), "no network interface is called 'eth7'; interfaces of this machine: eth0"),
    ],
)
async def test_no_usable_interface_is_a_problem_that_passes(
    nursery: trio.Nursery, network: Network, facts: list[Interface], interfaces: tuple[str, ...], problem: str
) -> None:
    here = Here(nursery, interfaces=interfaces)
    here.facts = facts
    await here.until(lambda: here.mdns.problem)
    assert here.mdns.problem == problem
    here.facts = [replace(ETH, name=interfaces[0]) if interfaces else ETH]
    await here.until(lambda: network.announced)
    await network.hear("me")
    await here.until(lambda: not here.mdns.problem)
    nursery.cancel_scope.cancel()


async def test_a_network_that_refuses_is_logged_once_and_tried_again(
    nursery: trio.Nursery, network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    network.failure = OSError(98, "Address already in use")
    here = Here(nursery)
    await here.until(lambda: here.mdns.problem)
    await trio.sleep(0.05)
    assert "UDP port 5353 does not work: [Errno 98] Address already in use" in here.mdns.problem
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    network.failure = None
    await here.until(lambda: network.announced)
    await network.hear("me")
    await here.until(lambda: not here.mdns.problem)
    assert [r.message for r in caplog.records][1:] == ["mDNS works again"]
    nursery.cancel_scope.cancel()


async def test_an_announcement_that_never_comes_back_is_a_problem(
    nursery: trio.Nursery, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mdns, "HEAR_SELF_S", 0.01)
    here = await started(nursery, network)
    await here.until(lambda: "announcement from 192.168.1.10 does not come back" in here.mdns.problem)
    assert here.mdns.seen == {}
    nursery.cancel_scope.cancel()


async def test_a_node_without_a_cluster_listens_and_announces_nothing(
    nursery: trio.Nursery, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mdns, "HEAR_SELF_S", 0.0)
    here = Here(nursery)
    here.advert = None
    await here.until(lambda: network.opened)
    network.records[node_id("beta")] = record(node_id("beta"))
    await network.hear("beta")
    assert (await here.next()).node == node_id("beta")
    assert (network.announced, here.mdns.problem) == ([], "")
    here.advert = ME
    await here.until(lambda: here.mdns.problem)
    n_withdrawn = network.n_withdrawn
    here.advert = None
    await here.until(lambda: network.n_withdrawn > n_withdrawn and not here.mdns.problem)
    here.advert = ME
    await here.until(lambda: len(network.announced) == 2)
    nursery.cancel_scope.cancel()


async def test_what_is_heard_while_the_responder_opens_is_reported(nursery: trio.Nursery, network: Network) -> None:
    network.records[node_id("beta")] = record(node_id("beta"))
    network.heard_while_opening = ("beta",)
    here = Here(nursery)
    assert (await here.next()).node == node_id("beta")
    assert network.asked == []
    nursery.cancel_scope.cancel()


async def test_a_node_that_is_alone_goes_on_asking(
    nursery: trio.Nursery, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mdns, "QUERY_ALONE_S", 0.001)
    here = await started(nursery, network)
    await here.until(lambda: network.n_queries > 3)
    network.records[node_id("beta")] = record(node_id("beta"))
    await network.hear("beta")
    await here.next()
    n_queries = network.n_queries
    await trio.sleep(0.05)
    assert network.n_queries <= n_queries + 1
    nursery.cancel_scope.cancel()


async def test_what_was_missed_is_taken_up_from_the_cache(
    nursery: trio.Nursery, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mdns, "QUERY_ALONE_S", 0.001)
    monkeypatch.setattr(mdns, "QUERY_S", 0.001)
    here = await started(nursery, network)
    network.records = {node_id(name): record(node_id(name)) for name in ("beta", "gamma")}
    network.missed = ["beta", "gamma", "me"]
    assert [(await here.next()).node for _ in (1, 2)] == [node_id("beta"), node_id("gamma")]
    n_queries = network.n_queries
    await here.until(lambda: network.n_queries > n_queries + 3)
    assert here.news.statistics().current_buffer_used == 0
    nursery.cancel_scope.cancel()


async def test_the_end_waits_for_the_goodbye_but_not_for_ever(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trio.open_nursery() as nursery:
        await started(nursery, network)
        nursery.cancel_scope.cancel()
    assert network.n_closed == 1
    monkeypatch.setattr(mdns, "CLOSE_DEADLINE_S", 0.01)
    network.close_waits_for.clear()
    try:
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                network.announced.clear()
                await started(nursery, network)
                nursery.cancel_scope.cancel()
        assert network.n_closed == 2
    finally:
        network.close_waits_for.set()


def test_a_callback_after_the_end_of_trio_does_nothing(network: Network) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await started(nursery, network)
            nursery.cancel_scope.cancel()

    trio.run(main)
    network.heard(service("late"), False)
