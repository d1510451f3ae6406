"""Real agents on cables of their own, what is done to them, and how they are watched: for `bench failover` and `soak`.

Machines are network namespaces on a bridge; agents find one another over mDNS. What an agent thinks is asked at its own
door for commands, over a connection that is kept, so that looking costs milliseconds and no process.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from failover_ask import Asked, ask
from lab import Agent, Lab, LabError

TRACED = Path(__file__).with_name("traced_agent.py")
DOOR_S = 10.0
START_S = 180.0
SETTLE_S = 240.0
LOAD_S = 300.0
LOOK_S = 0.02
"""Between two looks at all agents; what is measured by looking is so much coarser."""
WORKER, DRAFTER, VERIFIER = "ggml-rpc-server", "llama-server", "engine.verifier"
LIVING = ("alive", "suspect")
MAX_ERROR = 300


class Door:
    """One agent's door for commands. Used by one thread at a time."""

    def __init__(self, agent: Agent, dial: Callable[[], socket.socket]) -> None:
        self._agent = agent
        self._dial = dial
        self._http: http.client.HTTPConnection | None = None

    def call(self, command: str, params: Mapping[str, Any] | None = None, timeout_s: float = DOOR_S) -> Any:
        """The command's result. Raises `LabError` where the agent refuses it, or does not answer."""
        try:
            status, answer = self._on_kept(command, params or {}, timeout_s)
        except (OSError, http.client.HTTPException, ValueError) as exc:
            self.close()
            raise LabError(f"{self._agent.name}: {command}: {exc!r}") from None
        if status != 200:
            raise LabError(f"{self._agent.name}: {command}: {answer}")
        return answer["result"]

    def _on_kept(self, command: str, params: Mapping[str, Any], timeout_s: float) -> tuple[int, Any]:
        """Over the connection that is there; over another one if the agent has closed that meanwhile."""
        if self._http is not None:
            try:
                return self._exchange(command, params, timeout_s)
            except (ConnectionError, http.client.RemoteDisconnected):
                self.close()
        return self._exchange(command, params, timeout_s)

    def _exchange(self, command: str, params: Mapping[str, Any], timeout_s: float) -> tuple[int, Any]:
        if self._http is None:
            self._http = http.client.HTTPConnection("127.0.0.1", self._agent.endpoint_port)
            self._http.sock = self._dial()
        self._http.sock.settimeout(timeout_s)
        key = (self._agent.state_dir / "admin.key").read_text(encoding="ascii").strip()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self._http.request("POST", f"/v1/tightwad/admin/{command}", json.dumps(params), headers)
        response = self._http.getresponse()
        body = json.loads(response.read())
        if response.will_close:
            self.close()
        return response.status, body

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None


class Cluster:
    """`n` agents that run, and one machine more, `spare`, on which nothing does.

    A context manager. With `traced`, what each agent's mesh does is in `trace()`.
    """

    def __init__(self, n: int, engine: Path, *, traced: bool = False, flags: Sequence[str] = ()) -> None:
        self.n = n
        command = (sys.executable, str(TRACED)) if traced else (sys.executable, "-m", "tightwad_agent")
        every = ("--engine-dir", str(engine), "--threads", "1", *flags)
        self.lab = Lab(n + 1, namespaces=True, flags=every, command=command)
        self._traces = self.lab.dir / "trace"
        self._traces.mkdir()
        os.environ["TIGHTWAD_TRACE"] = str(self._traces)
        self._index = {agent.name: i for i, agent in enumerate(self.lab.agents)}
        self.spare = self.lab.agents.pop()
        self.agents = self.lab.agents
        self._local = threading.local()
        self._doors: list[Door] = []
        self._stopped: dict[str, list[int]] = {}
        self._cut: set[str] = set()

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def _start(self) -> None:
        """Founds a cluster; the others join by a token that names no address."""
        first, *others = self.agents
        first.start()
        self.until(lambda: self.door(first).call("peers"), "for the first agent", START_S)
        if others:
            token = self.token(with_addresses=False, uses=len(others))
        for agent in others:
            agent.start(token)
        self.until(self.agree, "for all to see all", START_S)

    def token(self, *, with_addresses: bool, uses: int = 1) -> str:
        """A join token of the founder. Raises `LabError`."""
        params = {"uses": uses, "addresses": with_addresses}
        return str(self.door(self.agents[0]).call("token.create", params)["token"])

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends everything, also what is stopped and what runs on the spare machine."""
        for agent in [*self.agents, self.spare]:
            with contextlib.suppress(LabError, OSError, psutil.Error):
                self.go_on(agent)
        for door in self._doors:
            door.close()
        with contextlib.suppress(LabError, OSError):
            self.spare.stop()
        self.lab.close()

    # Asking

    def dial(self, agent: Agent) -> socket.socket:
        """A connection to the agent's endpoint from its own machine. Raises `OSError`."""
        sock = self._socket(agent)
        sock.settimeout(DOOR_S)
        try:
            sock.connect(("127.0.0.1", agent.endpoint_port))
        except BaseException:
            sock.close()
            raise
        return sock

    def _socket(self, agent: Agent) -> socket.socket:
        assert self.lab.net is not None
        return self.lab.net.socket(self._index[agent.name])

    def address(self, agent: Agent) -> str:
        """Of the agent's machine on the network of all."""
        assert self.lab.net is not None
        return self.lab.net.nodes[self._index[agent.name]].address

    def attacker_socket(self) -> socket.socket:
        """A socket of the spare machine."""
        return self._socket(self.spare)

    def door(self, agent: Agent) -> Door:
        """Each thread has doors of its own."""
        doors = self._local.__dict__.setdefault("doors", {})
        if agent.name not in doors:
            doors[agent.name] = Door(agent, lambda: self.dial(agent))
            self._doors.append(doors[agent.name])
        found: Door = doors[agent.name]
        return found

    def states(self, agent: Agent) -> dict[str, str]:
        """What it thinks of all nodes, by name; of one that lives, where others of that name are gone. Raises
        `LabError`."""
        peers = self.door(agent).call("peers")["peers"]
        ordered = sorted(peers, key=lambda peer: peer["state"] in LIVING)
        return {peer["name"]: peer["state"] for peer in ordered}

    def coordinator_of(self, agent: Agent) -> str:
        """Whom it obeys, by name; empty for nobody. Raises `LabError`."""
        peers = self.door(agent).call("peers")["peers"]
        return next((peer["name"] for peer in peers if peer["coordinator"]), "")

    def status(self, agent: Agent) -> Any:
        return self.door(agent).call("status")

    def named(self, name: str) -> Agent:
        return next(agent for agent in self.agents if agent.name == name)

    def coordinator(self, via: Agent | None = None) -> Agent:
        """Raises `LabError` where there is none, or one that is not of the lab."""
        name = self.coordinator_of(via or self.agents[0])
        if name not in self._index:
            raise LabError(f"nobody coordinates, says {(via or self.agents[0]).name}")
        return self.named(name)

    def workers(self) -> list[Agent]:
        """Machines that the target is pooled over, as the coordinator says."""
        return [self.named(w["name"]) for w in self.status(self.coordinator())["target"]["workers"]]

    def drafters(self) -> list[Agent]:
        """Machines with a drafter that is ready, as the coordinator says."""
        ready = self.status(self.coordinator())["speculation"]["drafters"]
        return [self.named(d["name"]) for d in ready if d["state"] in ("ready", "drafting") and d["id"]]

    def children(self, agent: Agent, kind: str) -> list[psutil.Process]:
        """Of an agent: WORKER, DRAFTER or VERIFIER processes."""
        found = []
        for pid in agent.pids()[1:]:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if process.name() == kind or kind in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def until(self, true: Callable[[], Any], what: str, deadline_s: float) -> float:
        """Seconds until it is true; a `LabError` inside counts as not yet. Raises `LabError`."""
        began, last = time.monotonic(), ""
        while time.monotonic() - began < deadline_s:
            try:
                if true():
                    return time.monotonic() - began
            except LabError as exc:
                last = str(exc)
            time.sleep(LOOK_S)
        raise LabError(f"waited {deadline_s:g} s {what}; {last[:MAX_ERROR]}")

    def known_s(self, agents: Sequence[Agent], true: Callable[[Agent], bool], since: float, limit_s: float) -> float:
        """Seconds from `since` until it has been true of each; raises `LabError` with those of whom it was not."""
        left = list(agents)
        while left:
            if time.monotonic() - since > limit_s:
                raise LabError(f"not within {limit_s:g} s: " + ", ".join(a.name for a in left))
            left = [agent for agent in left if not self._holds(true, agent)]
            if left:
                time.sleep(LOOK_S)
        return time.monotonic() - since

    @staticmethod
    def _holds(true: Callable[[Agent], bool], agent: Agent) -> bool:
        try:
            return true(agent)
        except LabError:
            return False

    # Being served

    def serve(self, target: str, *, workers: int, draft: str = "off", context: int = 2048) -> None:
        """Returns once it answers. Raises `LabError`."""
        params = {"model": target, "workers": workers, "draft": draft, "ctx": context}
        self.door(self.agents[0]).call("serve", params, LOAD_S)

    def share(self, model: Path) -> str:
        """Adds a model at the first agent; its name, once it is in the catalogue. Others fetch it when it is to be
        served, or is to draft."""
        door = self.door(self.agents[0])
        name = str(door.call("add", {"spec": str(model)}, LOAD_S)["name"])
        self.until(lambda: any(m["name"] == name for m in door.call("models")["models"]), "for the catalogue", SETTLE_S)
        return name

    def spread(self, name: str) -> None:
        """Waits until the swarm has brought it to all. Raises `LabError`."""
        door = self.door(self.agents[0])

        def spread() -> bool:
            (entry,) = [m for m in door.call("models")["models"] if m["name"] == name]
            return sum(n["have"] >= entry["size"] for n in entry["nodes"]) == len(self.agents)

        self.until(spread, "for the swarm to bring the model everywhere", LOAD_S)

    def settle(self, *, workers: int = 0, draft: bool = False, deadline_s: float = SETTLE_S) -> None:
        """Until all live, obey one coordinator, and its pool is whole. Raises `LabError`."""
        self.until(self.agree, "for all to see all", deadline_s)
        self.until(lambda: self._is_whole(workers, draft), f"for {workers} workers", deadline_s)

    def agree(self) -> bool:
        """Everybody sees everybody alive, and all obey one coordinator."""
        found = set()
        for agent in self.agents:
            peers = self.door(agent).call("peers")["peers"]
            live = {p["name"] for p in peers if p["state"] == "alive"}
            if not live >= {a.name for a in self.agents}:
                return False
            found.add(next((p["name"] for p in peers if p["coordinator"]), ""))
        return len(found) == 1 and "" not in found

    def agree_on(self, agent: Agent) -> bool:
        """Whether it sees all agents alive."""
        seen = self.states(agent)
        return all(seen.get(a.name) == "alive" for a in self.agents)

    def _is_whole(self, workers: int, draft: bool) -> bool:
        status = self.status(self.coordinator())
        if status["target"]["state"] != "ready" or len(status["target"]["workers"]) < workers:
            return False
        return not draft or bool(self.drafters())

    def ask(self, agent: Agent, body: Mapping[str, Any], **how: Any) -> Asked:
        """One request at an agent's own machine; see `failover_ask.ask`."""
        return ask(lambda: self.dial(agent), body, **how)

    # What is done to machines

    def kill(self, agent: Agent) -> float:
        """SIGKILL to the agent; its children die with it. When, by the monotonic clock."""
        assert agent.process is not None
        at = time.monotonic()
        agent.process.kill()
        agent.process.wait(DOOR_S)
        return at

    def revive(self, agent: Agent) -> None:
        agent.start()

    def stop(self, agent: Agent) -> float:
        """SIGSTOP to the whole machine; when."""
        pids = self._stopped[agent.name] = agent.pids()
        at = time.monotonic()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        return at

    def go_on(self, agent: Agent) -> float:
        """SIGCONT to what `stop` stopped; when. Children first: their agent finds them running."""
        at = time.monotonic()
        for pid in reversed(self._stopped.pop(agent.name, [])):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        return at

    def cut(self, agent: Agent) -> float:
        """Its cable no longer leads to the others; silently. When."""
        self._cut.add(agent.name)
        return self._cable()

    def mend(self, agent: Agent) -> float:
        self._cut.discard(agent.name)
        return self._cable()

    def _cable(self) -> float:
        alone = [[self._index[name]] for name in sorted(self._cut)]
        rest = [i for name, i in self._index.items() if name not in self._cut]
        at = time.monotonic()
        assert self.lab.net is not None
        self.lab.net.partition([rest, *alone])
        return at

    def split(self, left: Sequence[Agent], right: Sequence[Agent]) -> float:
        """Two switches. When."""
        groups = [[self._index[a.name] for a in side] for side in (left, right)]
        at = time.monotonic()
        assert self.lab.net is not None
        self.lab.net.partition(groups)
        return at

    def heal(self) -> float:
        self._cut.clear()
        at = time.monotonic()
        assert self.lab.net is not None
        self.lab.net.heal()
        return at

    # What they wrote down

    def trace(self, since: float = 0.0) -> list[dict[str, Any]]:
        """All agents' notes since then, in their order; `pid` is whose."""
        notes = [note for path in self._traces.glob("*.jsonl") for note in _notes(path) if note["t"] >= since]
        return sorted(notes, key=lambda note: note["t"])

    def rss(self) -> dict[str, int]:
        """Resident bytes of each agent's process, without its children."""
        found = {}
        for agent in self.agents:
            if agent.process is not None:
                with contextlib.suppress(psutil.Error):
                    found[agent.name] = psutil.Process(agent.process.pid).memory_info().rss
        return found


def _notes(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):  # a killed process may leave half a line
                yield {"pid": int(path.stem), **json.loads(line)}
