"""Two agents with two networks between them, one slow and one fast: which is used, and what happens to cables."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lab import Agent, Lab
from netlab import NetLab

pytestmark = [pytest.mark.netns, pytest.mark.slow, pytest.mark.timeout(300)]

PLUGGED_S = 15.0
"""From the cable to the link over it; a busy machine gets twice as long."""
PULLED_S = 20.0
SLOW_MBIT = 20.0


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, timeout=20)


class FastNetwork:
    """A second cable from each node to a second switch; 192.168.77.N."""

    def __init__(self, net: NetLab) -> None:
        self._net = net
        ip("-n", net._hub, "link", "add", "fast", "type", "bridge", "mcast_snooping", "0", "forward_delay", "0")
        ip("-n", net._hub, "link", "set", "fast", "up")

    def plug(self, i: int) -> str:
        netns, hub = self._net.nodes[i].netns, self._net._hub
        ip("-n", hub, "link", "add", f"f{i}", "type", "veth", "peer", "name", "eth1", "netns", netns)
        ip("-n", netns, "address", "add", f"192.168.77.{i + 1}/24", "dev", "eth1")
        ip("-n", netns, "link", "set", "eth1", "up")
        ip("-n", hub, "link", "set", f"f{i}", "master", "fast", "up")
        return f"192.168.77.{i + 1}"

    def pull(self, i: int) -> None:
        """The node sees it: no carrier."""
        ip("-n", self._net._hub, "link", "set", f"f{i}", "down")

    def push(self, i: int) -> None:
        ip("-n", self._net._hub, "link", "set", f"f{i}", "up")

    def cut(self) -> None:
        """Between the switches: nobody sees it."""
        ip("-n", self._net._hub, "link", "set", "f1", "nomaster")

    def mend(self) -> None:
        ip("-n", self._net._hub, "link", "set", "f1", "master", "fast")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(2, namespaces=True) as made:
        assert made.net is not None
        for i in range(2):
            made.net.set_rate(i, SLOW_MBIT)
        yield made


@pytest.fixture(scope="module")
def fast(lab: Lab) -> FastNetwork:
    assert lab.net is not None
    return FastNetwork(lab.net)


def peer(agent: Agent, other: Agent) -> Any:
    (found,) = [p for p in agent.cli("peers") if p["name"] == other.name]
    return found


def used(agent: Agent, other: Agent) -> str:
    return str(peer(agent, other)["address"]).rpartition(":")[0]


def both_use(lab: Lab, hosts: tuple[str, str]) -> Callable[[], bool]:
    a, b = lab.agents
    return lambda: (used(a, b), used(b, a)) == (hosts[1], hosts[0])


def events(agent: Agent) -> list[str]:
    return [str(e["text"]) for e in agent.status()["events"]]


SLOW: list[str] = []
FAST = ("192.168.77.1", "192.168.77.2")


def test_on_one_network_that_is_what_is_used(lab: Lab) -> None:
    assert lab.net is not None
    lab.start()
    SLOW[:] = [n.address for n in lab.net.nodes]
    a, b = lab.agents
    a.wait(both_use(lab, (SLOW[0], SLOW[1])), "for the link over the only network", PULLED_S)
    measured = a.wait(lambda: peer(a, b)["paths"][0]["mbit_s"], "for a rate", 60)
    assert SLOW_MBIT / 10 < measured < 1.5 * SLOW_MBIT, "a starved machine measures too little, none too much"


def test_a_cable_that_is_plugged_in_is_used_and_said(lab: Lab, fast: FastNetwork) -> None:
    a, b = lab.agents
    for i in range(2):
        fast.plug(i)
    a.wait(both_use(lab, FAST), "for the links over the fast network", 2 * PLUGGED_S)
    said = [e for e in events(a) if e.startswith(f"linked to {b.name} over {FAST[1]}")]
    assert re.search(rf"before {re.escape(SLOW[1])} \(.* ms, .* Mbit/s\): it is faster", said[0])
    assert len(said) == 1
    paths = peer(a, b)["paths"]
    assert [p["in_use"] for p in paths][:2] == [True, False]
    assert paths[0]["mbit_s"] > 1.5 * SLOW_MBIT
    assert not [e for e in events(a) + events(b) if "is dead" in e]


def test_a_cable_that_is_pulled_is_left_at_once(lab: Lab, fast: FastNetwork) -> None:
    a, b = lab.agents
    fast.pull(1)
    a.wait(both_use(lab, (SLOW[0], SLOW[1])), "for the links over what is left", PULLED_S)
    assert peer(a, b)["state"] == peer(b, a)["state"] == "alive"
    assert not [e for e in events(a) + events(b) if "is dead" in e]
    assert any(f"no longer has {FAST[1]}" in e for e in events(b))


def test_a_cable_that_is_plugged_in_again_is_used_again(lab: Lab, fast: FastNetwork) -> None:
    fast.push(1)
    lab.agents[0].wait(both_use(lab, FAST), "for the links over the fast network", 4 * PLUGGED_S)


def test_a_cut_that_nobody_sees_is_noticed_by_silence(lab: Lab, fast: FastNetwork) -> None:
    a, b = lab.agents
    before = {agent.name: len([e for e in events(agent) if "is dead" in e]) for agent in (a, b)}
    fast.cut()
    a.wait(both_use(lab, (SLOW[0], SLOW[1])), "for the links over what is left", PULLED_S)
    for agent in (a, b):
        assert len([e for e in events(agent) if "is dead" in e]) == before[agent.name]
    why = rf"{re.escape(FAST[0][:-1])}\S* (is silent|does not answer)"
    assert any(re.search(why, e) for e in events(a) + events(b))
    fast.mend()
    a.wait(both_use(lab, FAST), "for the links over the fast network", 8 * PLUGGED_S)
