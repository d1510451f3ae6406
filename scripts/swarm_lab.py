"""Nodes for `scripts/bench swarm`: processes, in network namespaces or on loopback, and one transfer among them.

The parent plays the mesh: what one node says it holds, it tells the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netlab import NetLab

SCRIPTS = Path(__file__).parent
sys.path.insert(0, str(SCRIPTS.parent / "tests" / "shell"))
from mesh_lab import founder, member  # noqa: E402

from tightwad_agent.mesh.identity import Identity  # noqa: E402

PORT = 8089
WIRE_PORT = 9000
START_S = 60.0
STOP_S = 10.0
Event = dict[str, Any]
Hear = Callable[[int, Event], None]


class SwarmLabError(RuntimeError):
    """A transfer or its set-up went wrong; the text says what."""


@dataclass
class Child:
    """A process that says what happens as JSON lines; they end up in `events` with the child's index."""

    index: int
    process: subprocess.Popen[str]
    events: queue.Queue[tuple[int, Event]]
    errors: Path

    def __post_init__(self) -> None:
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            for line in lines:
                self.events.put((self.index, json.loads(line)))
        self.events.put((self.index, {"event": "ended"}))

    def tell(self, **command: Any) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise SwarmLabError(f"node {self.index} has ended: {self.said()}") from None

    def said(self) -> str:
        """The end of what it wrote to stderr."""
        return self.errors.read_text(errors="replace")[-500:].strip() or "no word of why"

    def stop(self) -> None:
        """Ends its input, and with that the process."""
        with contextlib.suppress(OSError):
            if self.process.stdin:
                self.process.stdin.close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._listener.join(STOP_S)


class Children:
    """Processes of one measurement; ended together."""

    def __init__(self, lab: NetLab | None, folder: Path) -> None:
        self.lab = lab
        self.folder = folder
        self.all: list[Child] = []
        self.events: queue.Queue[tuple[int, Event]] = queue.Queue()

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_exc: object) -> None:
        for child in self.all:
            with contextlib.suppress(OSError):
                if child.process.stdin:
                    child.process.stdin.close()
        for child in self.all:
            child.stop()

    def start(self, node: int, argv: Sequence[str | Path]) -> Child:
        """A process on a node of the lab, or on this machine's loopback without one."""
        errors = self.folder / f"errors-{len(self.all)}"
        whole = [str(part) for part in argv] if self.lab is None else self.lab.argv(node, argv)
        pipe = subprocess.PIPE
        with errors.open("w") as stderr:
            process = subprocess.Popen(whole, stdin=pipe, stdout=pipe, stderr=stderr, text=True, env=environ())
        child = Child(len(self.all), process, self.events, errors)
        self.all.append(child)
        return child

    def each(self, deadline: float) -> Iterator[tuple[int, Event]]:
        """What happens until then. Raises `SwarmLabError` for a process that ends or complains, or too late."""
        while True:
            try:
                index, event = self.events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise SwarmLabError("it took too long") from None
            if event["event"] == "ended":
                raise SwarmLabError(f"process {index} ended: {self.all[index].said()}")
            if event["event"] == "problem":
                raise SwarmLabError(f"process {index}: {event['text']}")
            yield index, event

    def wait(
        self, kind: str, children: Sequence[Child], timeout_s: float = START_S, hear: Hear = lambda *_: None
    ) -> list[Event]:
        """One event of this kind from each; `hear` is given the others."""
        found: dict[int, Event] = {}
        wanted = {child.index for child in children}
        for index, event in self.each(time.monotonic() + timeout_s):
            if event["event"] == kind and index in wanted:
                found[index] = event
                if len(found) == len(wanted):
                    break
            else:
                hear(index, event)
        return [found[child.index] for child in children]


def environ() -> dict[str, str]:
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass
class Transfer:
    """One model from the first node to all others. Seconds since the start, by leecher; bytes; CPU seconds by node."""

    complete_s: dict[int, float] = field(default_factory=dict)
    fetched_s: dict[int, float] = field(default_factory=dict)
    """The last piece was here; the check of the whole file comes after it."""
    sources: dict[int, dict[str, int]] = field(default_factory=dict)
    cpu_s: dict[int, float] = field(default_factory=dict)
    uploaded: dict[int, int] = field(default_factory=dict)
    progress: list[dict[str, Any]] = field(default_factory=list)

    def makespan_s(self, leechers: Collection[int] = ()) -> float:
        """Until the last of these (of all) had it."""
        return max(s for i, s in self.complete_s.items() if not leechers or i in leechers)

    def plain(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class Machine:
    """Whose time this machine's cores spent, in core seconds since this was made."""

    def __init__(self) -> None:
        self._before = self._ticks()

    def plain(self, ours: float) -> dict[str, float]:
        """`ours`: CPU seconds of the nodes. What others took is what a slow run may have come from."""
        gone = [now - then for now, then in zip(self._ticks(), self._before, strict=True)]
        programs, interrupts, stolen = (round(n / os.sysconf("SC_CLK_TCK"), 2) for n in gone)
        others = round(max(0.0, programs - ours), 2)
        return {"ours_cpu_s": round(ours, 2), "others_cpu_s": others, "irq_cpu_s": interrupts, "stolen_s": stolen}

    @staticmethod
    def _ticks() -> tuple[int, int, int]:
        """(programs, interrupts, stolen), by proc(5); others' systems do not say."""
        with contextlib.suppress(OSError, ValueError), open("/proc/stat", encoding="ascii") as lines:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, lines.readline().split()[1:9])
            return user + nice + system, irq + softirq, steal
        return 0, 0, 0


class Nodes:
    """The first seeds, the others leech; all members of one cluster that was made for them."""

    def __init__(self, children: Children, n_leechers: int, *, sparse: bool = False, trace: Path | None = None) -> None:
        self.children = children
        self.n = n_leechers + 1
        self._sparse = sparse
        self._trace = trace
        self.nodes: list[Child] = []
        self.ids: list[str] = []
        self._holders: dict[str, set[str]] = {}

    def start(self) -> None:
        folder = self.children.folder
        first = founder(folder, "node0")
        members = [first, *(member(first, folder, f"node{i}") for i in range(1, self.n))]
        where = self._addresses()
        self.ids = [str(m.node) for m in members]
        peers = folder / "peers.json"
        peers.write_text(json.dumps(dict(zip(self.ids, where, strict=True))), encoding="utf-8")
        self.nodes = [
            self.children.start(i, self._argv(i, m, *w, peers))
            for i, (m, w) in enumerate(zip(members, where, strict=True))
        ]
        self.children.wait("ready", self.nodes, hear=self.hear)

    def _addresses(self) -> list[tuple[str, int]]:
        if self.children.lab is not None:
            return [(self.children.lab.nodes[i].address, PORT) for i in range(self.n)]
        return [("127.0.0.1", port) for port in free_ports(self.n)]

    def _argv(self, i: int, me: Identity, host: str, port: int, peers: Path) -> list[str | Path]:
        folder = self.children.folder
        argv: list[str | Path] = [sys.executable, SCRIPTS / "swarm_node.py", "--state", me.state_dir]
        argv += ["--models", folder / f"models{i}", "--listen", f"{host}:{port}", "--peers", peers]
        argv += ["--sparse"] if self._sparse else []
        return argv + (["--trace", self._trace / f"trace-{i}.jsonl"] if self._trace else [])

    def share(self, path: Path, timeout_s: float = 300.0) -> Event:
        """The first node takes it into its catalogue: `model`, `size`, `pieces`, `seconds`."""
        self.nodes[0].tell(do="share", path=str(path))
        return self.children.wait("shared", self.nodes[:1], timeout_s, self.hear)[0]

    def hear(self, index: int, event: Event) -> None:
        """Passes on who holds what."""
        if event["event"] != "held":
            return
        for model in {*event["models"], *self._holders}:
            holders = self._holders.setdefault(model, set())
            before = set(holders)
            (holders.add if model in event["models"] else holders.discard)(self.ids[index])
            if holders != before:
                for node in self.nodes:
                    node.tell(do="holders", model=model, nodes=sorted(holders))

    def distribute(self, model: str, timeout_s: float, wait_for: Collection[int] = ()) -> Transfer:
        """All leechers want it at once; returns when all (or these) have it whole, under its final name."""
        cpu_before = [event["cpu_s"] for event in self.stats()]
        made, began = Transfer(), time.monotonic()
        for node in self.nodes[1:]:
            node.tell(do="want", model=model)
        for index, event in self.children.each(began + timeout_s):
            self.hear(index, event)
            self._note(made, index, event, model, began)
            if made.complete_s.keys() >= (set(wait_for) or set(range(1, self.n))):
                break
        self._last_words(made, model, cpu_before)
        return made

    def _note(self, made: Transfer, index: int, event: Event, model: str, began: float) -> None:
        if event["event"] == "progress":
            done = next((t["done"] for t in event["transfers"] if t["model"] == model), 0)
            what = {k: event[k] for k in ("cpu_s", "rss", "received", "sent")}
            made.progress.append({"node": index, "s": event["at"] - began, "done": done, **what})
        if event["event"] == "phase" and event["model"] == model and index:
            if event["phase"] in ("finishing", "complete"):
                made.fetched_s.setdefault(index, event["at"] - began)
            if event["phase"] == "complete":
                made.complete_s[index] = event["at"] - began

    def _last_words(self, made: Transfer, model: str, cpu_before: Sequence[float]) -> None:
        for node, event, before in zip(self.nodes, self.stats(), cpu_before, strict=True):
            made.cpu_s[node.index] = event["cpu_s"] - before
            mine = next((t for t in event["transfers"] if t["model"] == model), None)
            if mine:
                made.uploaded[node.index] = mine["uploaded"]
                made.sources[node.index] = {str(self.ids.index(p)): n for p, n in mine["from"].items()}

    def flood(self, n_bytes: int) -> Event:
        """So much over one TLS stream from the first to the second node, as fast as it goes: `seconds`, CPU seconds of
        both ends."""
        before = self.stats()
        self.nodes[1].tell(do="flood", node=self.ids[0], n_bytes=n_bytes)
        (event,) = self.children.wait("flooded", self.nodes[1:2], hear=self.hear)
        sender, receiver = (now["cpu_s"] - then["cpu_s"] for now, then in zip(self.stats(), before, strict=True))
        return {**event, "cpu_s": receiver, "sender_cpu_s": sender}

    def stats(self) -> list[Event]:
        for node in self.nodes:
            node.tell(do="stats")
        return self.children.wait("stats", self.nodes, hear=self.hear)


def free_ports(n: int) -> list[int]:
    """Ports of loopback that were free just now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [s.getsockname()[1] for s in sockets]
