#!/usr/bin/env python3
"""Machines on a cable, on one machine: N network namespaces on a bridge. Linux, root.

Each node is a namespace with a loopback and one interface `eth0` with an address of its own in a /24 that nothing else
here uses. The bridges live in a namespace too (the hub), so that firewall rules of this machine do not apply to them
and deleting the namespaces deletes everything. The machine itself gets one leg on the network,
`NetLab.host_address`, so that a browser or curl can reach the nodes.

    with NetLab(3) as lab:
        lab.popen(lab.nodes[0], ["tightwad-agent"])
        lab.partition([[0], [1, 2]])            # silent, as a cut cable between two switches
        lab.heal()
        lab.link_down(1)                        # not silent: eth0 of node 1 loses its carrier
        lab.set_rate(2, 100)                    # Mbit/s, both ways

    netlab.py up [N]      makes one, prints it, and stays until Ctrl-C
    netlab.py sweep       removes what killed labs left behind
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import ipaddress
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

PREFIX = "twlab"
COMMAND_TIMEOUT_S = 20
CLONE_NEWNET = 0x40000000
_NAME = re.compile(rf"{PREFIX}-(\d+)-(\d+)-[0-9a-f]+-(?:hub|n\d+)\Z")


class NetLabError(RuntimeError):
    """The lab cannot be made here; the text says why and what to do."""


@dataclass(frozen=True)
class Node:
    """One machine of the lab: namespace `netns`, IPv4 `address` on its `eth0`."""

    index: int
    netns: str
    address: str


class NetLab:
    """N nodes on one switch. `close` (also at exit and on SIGTERM) removes all of it, running processes included."""

    def __init__(self, n: int, *, host_leg: bool = True) -> None:
        if not 1 <= n <= 200:
            raise ValueError(f"a lab has 1 to 200 nodes, not {n}")
        self.n = n
        self.nodes: list[Node] = []
        self.network = ipaddress.IPv4Network("0.0.0.0/32")
        self.host_address = ""
        """This machine's own address on the network; empty without a leg."""
        self._host_leg = host_leg
        self._id = f"{os.getpid()}-{_started(os.getpid())}-{secrets.token_hex(2)}"
        self._hub = f"{PREFIX}-{self._id}-hub"
        self._children: list[subprocess.Popen[Any]] = []
        self._leg = ""
        self._n_bridges = 0
        self._open = False

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Makes everything. Raises `NetLabError` where that is not possible; nothing is left behind then."""
        check()
        sweep()
        self._open = True
        atexit.register(self.close)
        _close_on_signal(self.close)
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        self.network = _free_network()
        addresses = [str(a) for a in self.network.hosts()]
        self._namespace(self._hub)
        self._bridges(1)
        if self._host_leg:
            self._add_host_leg(addresses[0])
        for index in range(self.n):
            node = Node(index, f"{PREFIX}-{self._id}-n{index}", addresses[index + 1])
            self._namespace(node.netns)
            _ip(
                "-n",
                self._hub,
                "link",
                "add",
                _port(index),
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                node.netns,
            )
            _ip("-n", node.netns, "address", "add", f"{node.address}/{self.network.prefixlen}", "dev", "eth0")
            _ip("-n", node.netns, "link", "set", "eth0", "up")
            _ip("-n", self._hub, "link", "set", _port(index), "master", "br0", "up")
            self.nodes.append(node)

    def _namespace(self, name: str) -> None:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "set", "lo", "up")

    def _bridges(self, n: int) -> None:
        """At least `n` bridges; multicast goes to every port, without a querier."""
        for i in range(self._n_bridges, n):
            _ip("-n", self._hub, "link", "add", f"br{i}", "type", "bridge", "mcast_snooping", "0", "forward_delay", "0")
            _ip("-n", self._hub, "link", "set", f"br{i}", "up")
        self._n_bridges = max(n, self._n_bridges)

    def _add_host_leg(self, address: str) -> None:
        self._leg = near = f"twl{secrets.token_hex(4)}"
        _ip("link", "add", near, "type", "veth", "peer", "name", "host", "netns", self._hub)
        _ip("-n", self._hub, "link", "set", "host", "master", "br0", "up")
        _ip("address", "add", f"{address}/{self.network.prefixlen}", "dev", near)
        _ip("link", "set", near, "up")
        self.host_address = address

    # What happens to cables

    def partition(self, groups: Sequence[Sequence[int | Node]]) -> None:
        """Each group on a switch of its own: groups no longer hear one another, and nobody is told.

        Nodes not named stay with the first group, and so does this machine's leg.
        """
        self._bridges(len(groups))
        where = {self.node(member).index: i for i, group in enumerate(groups) for member in group}
        for node in self.nodes:
            _ip("-n", self._hub, "link", "set", _port(node.index), "master", f"br{where.get(node.index, 0)}")

    def heal(self) -> None:
        """All on one switch again."""
        self.partition([self.nodes])

    def link_down(self, node: int | Node) -> None:
        """Pulls the cable at the switch: `eth0` of the node loses its carrier."""
        _ip("-n", self._hub, "link", "set", _port(self.node(node).index), "down")

    def link_up(self, node: int | Node) -> None:
        _ip("-n", self._hub, "link", "set", _port(self.node(node).index), "up")

    def set_rate(self, node: int | Node, mbit: float | None) -> None:
        """Limits what the node may send and receive, in Mbit/s each; `None` lifts the limit."""
        found = self.node(node)
        for netns, device in ((found.netns, "eth0"), (self._hub, _port(found.index))):
            if mbit is None:
                _run(
                    ["tc", "-n", netns, "qdisc", "delete", "dev", device, "root"],
                    allow="No such file|Invalid handle|zero",
                )
                continue
            burst = max(16 << 10, int(mbit * 1e6 / 8 / 100))  # 10 ms: timers of the kernel tick at 100 to 1,000 Hz
            shape = ["rate", f"{int(mbit * 1000)}kbit", "burst", str(burst), "latency", "50ms"]
            _run(["tc", "-n", netns, "qdisc", "replace", "dev", device, "root", "tbf", *shape])

    # What runs on nodes

    def node(self, which: int | Node) -> Node:
        return which if isinstance(which, Node) else self.nodes[which]

    def argv(self, node: int | Node, argv: Sequence[str | Path]) -> list[str]:
        """`argv` so that it runs on the node, for `trio.run_process` and its like; no process is left in between."""
        return [_program("ip"), "netns", "exec", self.node(node).netns, *map(str, argv)]

    def popen(self, node: int | Node, argv: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
        """Starts a command on a node; `close` kills it if it still runs."""
        child = subprocess.Popen(self.argv(node, argv), **options)
        self._children.append(child)
        return child

    def run(self, node: int | Node, argv: Sequence[str | Path], *, timeout_s: float = 60) -> str:
        """Runs a command on a node and gives its output; `CalledProcessError` if it fails."""
        done = subprocess.run(self.argv(node, argv), check=True, capture_output=True, text=True, timeout=timeout_s)
        return done.stdout

    def socket(self, node: int | Node, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """An IPv4 socket that belongs to the node's network, for use in this process (its loopback is the node's)."""
        path = f"/run/netns/{self.node(node).netns}"
        made: list[socket.socket | OSError] = []

        def make() -> None:  # in a thread of its own: a namespace belongs to a thread
            try:
                _enter(path)
                made.append(socket.socket(socket.AF_INET, kind))
            except OSError as exc:
                made.append(exc)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if isinstance(made[0], OSError):
            raise made[0]
        return made[0]

    def close(self) -> None:
        """Removes namespaces, bridges and processes. May be called twice."""
        if not self._open:
            return
        self._open = False
        atexit.unregister(self.close)
        for child in self._children:
            if child.poll() is None:
                child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout, child.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        if self._leg:  # the kernel would remove it with the hub, a little later
            _run(["ip", "link", "delete", self._leg], allow="Cannot find")
        for name in _namespaces():
            if name.startswith(f"{PREFIX}-{self._id}-"):
                _remove(name)


def check() -> None:
    """Raises `NetLabError` if labs cannot be made here."""
    if sys.platform != "linux":
        raise NetLabError("network namespaces exist on Linux only")
    if os.geteuid() != 0:
        raise NetLabError("network namespaces need root: run this with sudo")
    for program in ("ip", "tc"):
        if not Path(_program(program)).is_file():
            raise NetLabError(f"the program `{program}` is missing; on Debian and Ubuntu: apt-get install iproute2")


def sweep() -> list[str]:
    """Removes the namespaces of labs whose process has died, with what runs in them; gives their names."""
    removed = []
    for name in _namespaces():
        found = _NAME.match(name)
        if found and _started(int(found[1])) != int(found[2]):
            _remove(name)
            removed.append(name)
    return removed


def _enter(path: str) -> None:
    """Moves the calling thread, and only it, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(path).open("rb") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)


def _port(index: int) -> str:
    return f"p{index}"


def _namespaces() -> list[str]:
    folder = Path("/run/netns")
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def _remove(name: str) -> None:
    deadline = time.monotonic() + 5
    while pids := _run(["ip", "netns", "pids", name], allow=".").split():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    _run(["ip", "netns", "delete", name], allow="No such file|Cannot remove")


def _started(pid: int) -> int:
    """Start time of a process in clock ticks after boot, 0 if there is none: tells it from a later one with its id."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])


def _free_network() -> ipaddress.IPv4Network:
    """A 10.x.y.0/24 that no address or route of this machine overlaps."""
    routes = json.loads(_ip("-4", "-json", "route", "show", "table", "all") or "[]")
    used = []
    for route in routes:
        with contextlib.suppress(ValueError):  # "default"
            used.append(ipaddress.IPv4Network(route["dst"], strict=False))
    for _ in range(1000):
        network = ipaddress.IPv4Network(f"10.{random.randint(64, 254)}.{random.randint(0, 254)}.0/24")
        if not any(network.overlaps(other) for other in used):
            return network
    raise NetLabError("no free /24 in 10.64.0.0-10.254.255.255")


def _ip(*args: str) -> str:
    return _run(["ip", *args])


def _program(name: str) -> str:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") or name


def _run(argv: list[str], *, allow: str = "") -> str:
    """Output of a command; its failure is a `NetLabError` unless its message matches `allow`."""
    argv = [_program(argv[0]), *argv[1:]]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if done.returncode and not (allow and re.search(allow, done.stderr)):
        raise NetLabError(f"{' '.join(argv)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout


def _close_on_signal(close: Callable[[], None]) -> None:
    """Closes before dying of SIGTERM or SIGHUP, where nobody else handles them."""
    if threading.current_thread() is not threading.main_thread():
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        close()
        os.kill(os.getpid(), number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, handle)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="network namespaces on a bridge")
    parser.add_argument("command", choices=["up", "sweep"])
    parser.add_argument("n", nargs="?", type=int, default=3, help="number of nodes (3)")
    asked = parser.parse_args()
    try:
        check()
        if asked.command == "sweep":
            print("\n".join(sweep()) or "nothing was left")
            return 0
        with NetLab(asked.n) as lab:
            for node in lab.nodes:
                print(f"{node.address}  ip netns exec {node.netns} bash")
            print(f"{lab.host_address}  this machine; Ctrl-C removes the lab", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
    except NetLabError as exc:
        print(exc, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
