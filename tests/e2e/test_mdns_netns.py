"""Real mDNS between real network namespaces."""

from __future__ import annotations

import json
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from netlab import NetLab, Node

from tightwad_agent.testing import node_id

pytestmark = pytest.mark.netns

PROGRAM = Path(__file__).with_name("mdns_node.py")
START_S = 60.0
"""For the interpreter, on a busy machine."""
DEADLINE_S = 10.0
"""For everything that mDNS has to do."""


class Box:
    """One `mdns_node.py` on a node of the lab, and what it printed."""

    def __init__(self, lab: NetLab, node: Node, name: str, port: int = 8089, interfaces: tuple[str, ...] = ()) -> None:
        self.name, self.node = name, node
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._kept: list[dict[str, Any]] = []
        self.process = lab.popen(
            node,
            [sys.executable, PROGRAM, name, str(port), *interfaces],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()
        self._ready = False

    def _read(self) -> None:
        for line in self.process.stdout:
            self._events.put(json.loads(line))

    def tell(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def leave(self) -> None:
        self.process.stdin.close()

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """The first event that fits, past or future; others stay for later."""
        if not self._ready:
            assert self._events.get(timeout=START_S) == {"event": "ready"}
            self._ready = True
        deadline = time.monotonic() + DEADLINE_S
        while True:
            for event in self._kept:
                if wanted(event):
                    self._kept.remove(event)
                    return event
            try:
                self._kept.append(self._events.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                pytest.fail(f"{self.name}: no {what} within {DEADLINE_S:g} s, only {self._kept}")

    def until_problem(self, beginning: str) -> None:
        """Waits until the node says it has this problem, or none."""
        deadline = time.monotonic() + DEADLINE_S
        problem = None
        while time.monotonic() < deadline:
            self.tell("status")
            problem = self.wait_for(lambda e: e["event"] == "status", "status")["problem"]
            if problem.startswith(beginning) and bool(problem) == bool(beginning):
                return
            time.sleep(0.05)
        pytest.fail(f"{self.name}: problem is {problem!r}, not {beginning!r}")

    def sees(self, name: str, model: str | None = None) -> list[str]:
        """Waits for a sighting; gives the addresses in it."""
        event = self.wait_for(
            lambda e: e["event"] == "seen" and e["name"] == name and (model is None or model in e["models"]),
            f"sighting of {name}",
        )
        return event["addresses"]


@pytest.fixture
def lab() -> Iterator[NetLab]:
    with NetLab(3) as lab:
        yield lab


def boxes(lab: NetLab) -> list[Box]:
    return [Box(lab, node, f"box{node.index}") for node in lab.nodes]


def test_three_machines_see_one_another_and_hear_updates_and_goodbyes(lab: NetLab) -> None:
    alpha, beta, gamma = boxes(lab)
    for box in (alpha, beta, gamma):
        for other in {alpha, beta, gamma} - {box}:
            assert box.sees(other.name) == [f"{other.node.address}:8089"]
    alpha.tell("model tiny.gguf")
    assert beta.sees("box0", model="tiny.gguf") == [f"{alpha.node.address}:8089"]
    gamma.sees("box0", model="tiny.gguf")
    alpha.leave()
    alpha.wait_for(lambda e: e["event"] == "ended", "end")
    for box in (beta, gamma):
        box.wait_for(lambda e: e == {"event": "gone", "node": node_id("box0")}, "goodbye of box0")
    beta.until_problem("")
    gamma.tell("hush")
    beta.wait_for(lambda e: e == {"event": "gone", "node": node_id("box2")}, "goodbye of box2")
    gamma.tell("speak")
    beta.sees("box2")


def test_container_bridges_are_not_announced(lab: NetLab) -> None:
    for command in ("link add docker0 type bridge", "address add 172.17.0.1/16 dev docker0", "link set docker0 up"):
        lab.run(0, ["ip", *command.split()])
    alpha, beta, _ = (Box(lab, node, f"box{node.index}") for node in lab.nodes)
    assert beta.sees("box0") == [f"{alpha.node.address}:8089"]


def test_an_address_that_comes_later_is_announced(lab: NetLab) -> None:
    lab.run(0, ["ip", "address", "flush", "dev", "eth0"])
    alpha, beta = Box(lab, lab.nodes[0], "box0"), Box(lab, lab.nodes[1], "box1")
    alpha.until_problem("no network interface to announce on (eth0: has no address")
    lab.run(0, ["ip", "address", "add", f"{lab.nodes[0].address}/24", "dev", "eth0"])
    assert beta.sees("box0") == [f"{lab.nodes[0].address}:8089"]
    assert alpha.sees("box1") == [f"{lab.nodes[1].address}:8089"]


def test_several_agents_on_one_machine_see_one_another(lab: NetLab) -> None:
    first, second, third = (Box(lab, lab.nodes[0], f"agent{i}", 9000 + i) for i in range(3))
    far = Box(lab, lab.nodes[1], "far")
    address = lab.nodes[0].address
    assert first.sees("agent1") == [f"{address}:9001"]
    assert second.sees("agent2") == [f"{address}:9002"]
    assert third.sees("agent0") == [f"{address}:9000"]
    assert {far.sees(f"agent{i}")[0] for i in (0, 1, 2)} == {f"{address}:{9000 + i}" for i in range(3)}


def test_an_interface_chosen_by_name_is_the_only_one(lab: NetLab) -> None:
    first, second = (Box(lab, lab.nodes[0], f"agent{i}", 9000 + i, ("lo",)) for i in range(2))
    assert first.sees("agent1") == ["127.0.0.1:9001", "[::1]:9001"]
    assert second.sees("agent0") == ["127.0.0.1:9000", "[::1]:9000"]


HOSTILE = """
import sys, time, zeroconf
zc = zeroconf.Zeroconf(interfaces=[sys.argv[1]])
kind = "_tightwad._tcp.local."
for i in range(10):
    label = sys.argv[2] if i == 0 else "z%051d" % i if i % 2 else "fake%d" % i
    label = label.translate(str.maketrans("0189", "abcd")) if i % 2 else label
    texts = [{"v": "1", "id": "../../x", "p": "9" * 11, "m": "x" * 200}, b"", b"\\xff\\xffgarbage", b"\\0", b"\\4v=1"]
    info = zeroconf.ServiceInfo(kind, label + "." + kind, port=(i * 997) % 65536, properties=texts[i % 5],
                                server="h%d.local." % i, parsed_addresses=["127.0.0.1", "224.0.0.1", "0.0.0.0"])
    zc.register_service(info, cooperating_responders=True)
print("sent", flush=True)
time.sleep(100)
"""


def test_garbage_on_the_network_is_not_reported_and_does_no_harm(lab: NetLab) -> None:
    alpha = Box(lab, lab.nodes[0], "box0")
    hostile = lab.popen(
        2,
        [sys.executable, "-c", HOSTILE, lab.nodes[2].address, str(node_id("box0"))],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert hostile.stdout.readline() == "sent\n"
    beta = Box(lab, lab.nodes[1], "box1")
    assert alpha.sees("box1") == [f"{beta.node.address}:8089"]
    alpha.tell("status")
    alpha.wait_for(lambda e: e["event"] == "status" and e["n_refused"] > 0, "status")
    assert [e for e in alpha._kept if e["event"] == "seen"] == []


def test_another_program_that_holds_the_port_is_reported_and_outwaited(lab: NetLab) -> None:
    with lab.socket(0, socket.SOCK_DGRAM) as holder:
        holder.bind(("", 5353))
        alpha, beta = Box(lab, lab.nodes[0], "box0"), Box(lab, lab.nodes[1], "box1")
        alpha.until_problem("multicast on UDP port 5353 does not work: [Errno 98] Address already in use")
    assert alpha.sees("box1") == [f"{beta.node.address}:8089"]
    alpha.until_problem("")


@pytest.mark.slow
def test_halves_of_a_network_that_are_joined_later_find_one_another(lab: NetLab) -> None:
    lab.partition([[0], [1, 2]])
    alpha, beta = Box(lab, lab.nodes[0], "box0"), Box(lab, lab.nodes[1], "box1")
    for box in (alpha, beta):
        box.until_problem("")
    time.sleep(15)  # zeroconf's own questions are over by then (at 0, 1, 5 and 14 s)
    lab.heal()
    assert alpha.sees("box1") == [f"{beta.node.address}:8089"]
    assert beta.sees("box0") == [f"{alpha.node.address}:8089"]
