"""A small cluster of real agents on this machine, for the demo, the benchmarks and the end-to-end tests.

As root each agent lives in a network namespace of its own on a bridge, so that mDNS, addresses and links are real.
Otherwise the agents share loopback, on ports of their own, and find one another by the addresses in the token.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import netlab

START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 20.0
SPREAD_DEADLINE_S = 300.0
POLL_S = 0.1
MESH_PORT, ENDPOINT_PORT = 8089, 8088


class LabError(Exception):
    """The lab did not do what it should; the text has what the agents said last."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def can_namespace() -> bool:
    """Whether agents can get network namespaces of their own here."""
    try:
        netlab.check()
    except netlab.NetLabError:
        return False
    return True


@dataclass
class Agent:
    """One agent process and how to talk to it."""

    name: str
    state_dir: Path
    prefix: list[str]
    flags: list[str]
    host: str
    mesh_port: int
    endpoint_port: int
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    log: Path = field(default_factory=Path)

    def start(self, token: str | None = None, *extra: str) -> None:
        """Starts the agent; a token goes in over stdin, never on the command line."""
        argv = [*self.prefix, *self.command, "up", "--state-dir", str(self.state_dir), *self.flags, *extra]
        if token:
            argv += ["--join", "-"]
        self.log = self.state_dir.with_suffix(".log")
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{token or ''}\n".encode())
            self.process.stdin.close()

    def cli(self, *args: str, timeout_s: float = 120.0) -> Any:
        """A command's JSON result. Raises `LabError` with its error."""
        argv = [*self.prefix, *self.command, *args, "--state-dir", str(self.state_dir), "--json"]
        done = subprocess.run(argv, capture_output=True, timeout=timeout_s, check=False)
        if done.returncode:
            raise LabError(f"{self.name}: {' '.join(args)}: {done.stdout.decode()}{done.stderr.decode()}")
        return json.loads(done.stdout)

    def status(self) -> Any:
        return self.cli("status")

    def wait_up(self) -> None:
        self.wait(lambda: self.status() is not None, "to answer commands", START_DEADLINE_S)

    def wait(self, ready: Callable[[], Any], what: str, deadline_s: float) -> Any:
        """Polls until `ready` is true; a `LabError` inside counts as not yet."""
        end = time.monotonic() + deadline_s
        last = ""
        while time.monotonic() < end:
            if self.process is not None and self.process.poll() is not None:
                raise LabError(f"{self.name} exited with {self.process.returncode}\n{self.tail()}")
            try:
                if result := ready():
                    return result
            except (LabError, OSError) as exc:
                last = str(exc)
            time.sleep(POLL_S)
        raise LabError(f"{self.name}: waited {deadline_s:g} s {what}; {last}\n{self.tail()}")

    def tail(self, n_lines: int = 30) -> str:
        """The last lines of the agent's log."""
        if not self.log.is_file():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-n_lines:])

    def url(self, path: str) -> str:
        return f"http://{self.host}:{self.endpoint_port}{path}"

    def post(self, path: str, body: dict[str, Any], key: str | None = None, timeout_s: float = 120.0) -> Any:
        """A JSON request to the agent's endpoint; in a namespace it is made from inside."""
        return json.loads(self.raw_post(path, body, key, timeout_s))

    def raw_post(self, path: str, body: dict[str, Any], key: str | None = None, timeout_s: float = 120.0) -> bytes:
        if self.prefix:
            argv = [*self.prefix, sys.executable, __file__, self.url(path), json.dumps(body), str(timeout_s)]
            done = subprocess.run(argv, capture_output=True, timeout=timeout_s + 10, check=False)
            if done.returncode:
                raise LabError(f"{self.name}: {path}: {done.stderr.decode()}")
            return done.stdout
        return http_post(self.url(path), body, key, timeout_s)

    def pids(self) -> list[int]:
        """The agent and all its descendants."""
        import psutil

        if self.process is None or self.process.poll() is not None:
            return []
        me = psutil.Process(self.process.pid)
        return [me.pid, *(c.pid for c in me.children(recursive=True))]

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_DEADLINE_S)

    def stop(self) -> int | None:
        """SIGTERM and wait; SIGKILL only if that does not work. The exit code."""
        if self.process is None:
            return None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise LabError(f"{self.name} did not stop within {STOP_DEADLINE_S:g} s\n{self.tail()}") from None


def http_post(url: str, body: dict[str, Any], key: str | None, timeout_s: float) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return bytes(response.read())
    except urllib.error.HTTPError as exc:
        raise LabError(f"{url}: {exc.code} {exc.read().decode(errors='replace')}") from None
    except urllib.error.URLError as exc:
        raise LabError(f"{url}: {exc.reason}") from None


class Lab:
    """N agents, not yet started; leaves nothing behind."""

    def __init__(
        self,
        n: int = 3,
        *,
        namespaces: bool | None = None,
        flags: tuple[str, ...] = (),
        command: tuple[str, ...] = (sys.executable, "-m", "tightwad_agent"),
        mdns: bool | None = None,
    ) -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="tightwad-lab-"))
        self.net: netlab.NetLab | None = None
        self.namespaces = can_namespace() if namespaces is None else namespaces
        try:
            if self.namespaces:
                self.net = netlab.NetLab(n)
                self.net.open()
            self.agents = [self._agent(i, [*flags], list(command), mdns) for i in range(n)]
        except BaseException:
            self.close()
            raise

    def _agent(self, i: int, flags: list[str], command: list[str], mdns: bool | None) -> Agent:
        name = f"box-{i + 1}"
        flags = ["--name", name, *flags]
        if self.net is not None:
            prefix = ["ip", "netns", "exec", self.net.nodes[i].netns]
            if mdns is False:
                flags.append("--no-mdns")
            return Agent(name, self.dir / name, prefix, flags, "127.0.0.1", MESH_PORT, ENDPOINT_PORT, command)
        mesh, endpoint = free_port(), free_port()
        flags += ["--no-mdns", "--interface", "lo"]
        flags += ["--mesh-port", str(mesh), "--endpoint-port", str(endpoint), "--endpoint-host", "127.0.0.1"]
        return Agent(name, self.dir / name, [], flags, "127.0.0.1", mesh, endpoint, command)

    def start(self, *token_flags: str) -> None:
        """Founds the cluster on the first agent and joins the others by one token."""
        first = self.agents[0]
        first.start()
        first.wait_up()
        if len(self.agents) == 1:
            return
        token = first.cli("token", "create", "--uses", str(len(self.agents) - 1), *token_flags)["token"]
        for agent in self.agents[1:]:
            agent.start(token)
        for agent in self.agents[1:]:
            agent.wait_up()
        for agent in self.agents:
            agent.wait(lambda a=agent: self.all_alive(a), "to see all others", START_DEADLINE_S)

    def share(self, model: Path, on: Agent | None = None) -> Any:
        """Adds a model on one agent and waits until the swarm has brought it to all; what `add` said."""
        agent = on or self.agents[0]
        added = agent.cli("add", str(model), timeout_s=SPREAD_DEADLINE_S)

        def spread() -> bool:
            (entry,) = [m for m in agent.cli("models") if m["id"] == added["id"]]
            return sum(n["have"] >= entry["size"] for n in entry["nodes"]) == len(self.agents)

        agent.wait(spread, "for the swarm to bring the model everywhere", SPREAD_DEADLINE_S)
        return added

    def all_alive(self, agent: Agent) -> bool:
        peers = agent.cli("peers")
        return sum(p["state"] == "alive" for p in peers) == len(self.agents)

    def coordinator(self, via: Agent | None = None) -> Agent:
        """The agent that the others take for the coordinator."""
        peers = (via or self.agents[0]).cli("peers")
        names = [p["name"] for p in peers if p["coordinator"]]
        for agent in self.agents:
            if agent.name in names:
                return agent
        raise LabError("no coordinator")

    def close(self) -> None:
        for agent in getattr(self, "agents", []):
            with contextlib.suppress(LabError, OSError):
                agent.stop()
        if self.net is not None:
            self.net.close()
        shutil.rmtree(self.dir, ignore_errors=True)

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def running_lab(n: int = 3, *token_flags: str, **options: Any) -> Iterator[Lab]:
    """A started lab."""
    with Lab(n, **options) as lab:
        lab.start(*token_flags)
        yield lab


if __name__ == "__main__":
    # Used by `Agent.raw_post` inside a namespace: URL BODY TIMEOUT
    try:
        sys.stdout.buffer.write(http_post(sys.argv[1], json.loads(sys.argv[2]), None, float(sys.argv[3])))
    except LabError as problem:
        sys.exit(str(problem))
