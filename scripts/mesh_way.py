"""`scripts/bench speculation --mesh`: the same answers through three real agents and without them, in turn.

Three network namespaces on slow cables (`slow_cable.py`). In each an agent of one cluster; the target is pooled over
the two that do not coordinate, the draft model runs on one of those. Beside them, on the same machines, the same
programs without agents: workers and a drafter that listen on the network, a verifier on the coordinator's machine
(`mesh_host.py`). All that is on the way between machines, TLS or not, waits for the same cables.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import netlab
import psutil
import slow_cable
import speculation_table as table
from lab import Agent, Lab, LabError
from mesh_host import Facts, HostProcess
from netlab import NetLab, NetLabError
from rig import RigError
from slow_cable import Cables
from speculation_table import MESH, WITHOUT_MESH, Sample

from tightwad_agent.conductor import DRAFT_SLOTS
from tightwad_agent.engine.argv import LOOPBACK, worker_argv

SCRIPTS = Path(__file__).parent
CONTEXT = 2048
N_AGENTS = 3
WORKER_PORT, DRAFTER_PORT = 6001, 6002
LOAD_S = 300.0
STOP_S = 3.0
POLL_S = 0.05
SAME_SPLIT = 0.02
"""By how much the memory of two workers with the same layers may differ; one layer of thirty is more."""
_LISTENS = "0A"
PROBLEMS = (NetLabError, LabError, RigError, OSError, subprocess.SubprocessError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What to measure. `rtts` in ms, `mbit` each way; `texts`: the prompts; `threads` of each program."""

    engine: Path
    target: Path
    draft: Path
    rtts: Sequence[float]
    mbit: float
    repeats: int
    texts: Sequence[str]
    n_tokens: int
    threads: int


@dataclass
class Measured:
    """Samples of both ways, what the cables did for each round trip, who did what, and what went wrong."""

    samples: list[Sample] = field(default_factory=list)
    cables: list[dict[str, Any]] = field(default_factory=list)
    realtime: bool = False
    roles: dict[str, Any] = field(default_factory=dict)
    problem: str = ""

    def plain(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "problem": self.problem,
            **table.plain(self.samples),
            "roles": self.roles,
            "cables": self.cables,
            "cables_realtime": self.realtime,
            "samples": [asdict(s) for s in self.samples],
        }


def check() -> None:
    """Raises `NetLabError` with what is missing here: Linux, root, `ip`, or TAP devices."""
    netlab.check()
    slow_cable.check()


def measure(asked: Asked, say: Callable[[str], None]) -> Measured:
    """All of it. Raises one of `PROBLEMS`; leaves nothing behind, also on Ctrl-C and SIGTERM."""
    check()
    made = Measured()
    with ExitStack() as stack:
        stack.enter_context(_signals_unwind())
        say("three agents in network namespaces")
        flags = ("--engine-dir", str(asked.engine), "--threads", str(asked.threads))
        lab = stack.enter_context(Lab(N_AGENTS, namespaces=True, flags=flags))
        assert lab.net is not None
        cables = stack.enter_context(slow_cable.slowed(lab.net))
        made.realtime = cables.realtime
        lab.start()
        say("the agents load")
        cluster = _serve(lab, asked)
        made.roles = cluster.roles
        say("the same without agents loads")
        beside = stack.enter_context(_without_agents(lab, cluster, asked))
        _check_split(cluster, beside)
        for rtt_ms in asked.rtts:
            _measure_at(rtt_ms, asked, beside.host, cables, made, say)
    return made


def _measure_at(
    rtt_ms: float, asked: Asked, host: HostProcess, cables: Cables, made: Measured, say: Callable[[str], None]
) -> None:
    cables.set(rtt_ms, asked.mbit)
    say(f"{rtt_ms:g} ms: warming up")
    host.ask(do="fresh", rtt_ms=rtt_ms)
    cables.stats()
    names = (WITHOUT_MESH, MESH)
    for repeat in range(asked.repeats):
        for i in range(len(asked.texts)):
            turn = (repeat + i) % 2
            for way in names[turn:] + names[:turn]:
                plain = host.ask(do="ask", way=way, prompt=i)
                tokens = tuple(plain.pop("tokens"))
                place = {"way": way, "rtt_ms": rtt_ms, "repeat": repeat, "prompt": i, "tokens": tokens}
                made.samples.append(Sample(**{**plain, **place}))
        rates = (f"{table.rates(made.samples, way, rtt_ms)[repeat]:.1f} {way}" for way in names)
        say(f"{rtt_ms:g} ms, repeat {repeat + 1}: " + ", ".join(rates))
    made.cables.append({"rtt_ms": rtt_ms, **cables.stats()})


# The agents


@dataclass(frozen=True, slots=True)
class Cluster:
    """Who does what; `workers` in the order in which the pool uses them. The drafter is one of them."""

    coordinator: Agent
    workers: tuple[Agent, ...]
    drafter: Agent

    @property
    def roles(self) -> dict[str, Any]:
        workers = [agent.name for agent in self.workers]
        return {"coordinator": self.coordinator.name, "workers": workers, "drafter": self.drafter.name}


def _serve(lab: Lab, asked: Asked) -> Cluster:
    """The target pooled over the others, one of them drafting, all of it ready."""
    draft, target = (_added(lab, path) for path in (asked.draft, asked.target))  # what comes first is served until told
    coordinator = lab.coordinator()
    drafter = next(agent for agent in lab.agents if agent is not coordinator)
    wish = ["--workers", str(N_AGENTS - 1), "--draft", draft, "--drafters", drafter.name, "--ctx", str(CONTEXT)]
    served = coordinator.cli("serve", target, *wish, timeout_s=LOAD_S)["target"]
    by_name = {agent.name: agent for agent in lab.agents}
    workers = tuple(by_name[worker["name"]] for worker in served["workers"])
    if len(workers) != N_AGENTS - 1 or coordinator in workers or served["engine"] != "verifier":
        raise LabError(f"the target is not pooled over the other machines by the verifier: {served}")
    coordinator.wait(lambda: _drafts(coordinator, drafter), "for the drafter", LOAD_S)
    return Cluster(coordinator, workers, drafter)


def _added(lab: Lab, path: Path) -> str:
    """The model's name. Each agent gets it from the disk, which is sooner than from one another on one machine."""
    names = [agent.cli("add", str(path), timeout_s=LOAD_S)["name"] for agent in lab.agents]
    return str(names[0])


def _drafts(coordinator: Agent, drafter: Agent) -> bool:
    drafters = coordinator.status()["speculation"]["drafters"]
    return any(d["name"] == drafter.name and d["state"] == "ready" for d in drafters)


# The same without agents


@dataclass(frozen=True, slots=True)
class Beside:
    """What runs without agents: the process on the coordinator's machine, and the workers in their order."""

    host: HostProcess
    workers: tuple[subprocess.Popen[bytes], ...]


@contextlib.contextmanager
def _without_agents(lab: Lab, cluster: Cluster, asked: Asked) -> Iterator[Beside]:
    net = _net(lab)
    workers = []
    for agent in cluster.workers:
        exe = str(asked.engine / "ggml-rpc-server")
        argv = worker_argv(exe, port=WORKER_PORT, devices=["CPU"], threads=asked.threads)
        argv[argv.index(LOOPBACK)] = _address(lab, agent)
        workers.append(net.popen(lab.agents.index(agent), argv, **_QUIET))
        _await_listener(workers[-1], WORKER_PORT)
    drafter = net.popen(lab.agents.index(cluster.drafter), _drafter_argv(lab, cluster, asked), **_QUIET)
    _await_listener(drafter, DRAFTER_PORT)
    argv = [sys.executable, str(SCRIPTS / "mesh_host.py"), json.dumps(asdict(_facts(lab, cluster, asked)))]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = net.popen(lab.agents.index(cluster.coordinator), argv, start_new_session=True, **pipes)
    try:
        yield Beside(HostProcess(process), tuple(workers))
    finally:
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()  # its end
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)


_QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}


def _drafter_argv(lab: Lab, cluster: Cluster, asked: Asked) -> list[str]:
    facts = {
        "host": _address(lab, cluster.drafter),
        "engine": asked.engine,
        "model": asked.draft,
        "work": _work(lab, "drafter"),
        "threads": asked.threads,
        "slots": DRAFT_SLOTS,
        "context": CONTEXT,
    }
    flags = [text for name, value in facts.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-I", str(SCRIPTS / "drafter_node.py"), str(DRAFTER_PORT), *flags]


def _facts(lab: Lab, cluster: Cluster, asked: Asked) -> Facts:
    assert cluster.coordinator.process is not None
    return Facts(
        engine=str(asked.engine),
        target=str(asked.target),
        work=str(_work(lab, "host")),
        threads=asked.threads,
        context=CONTEXT,
        n_tokens=asked.n_tokens,
        prompts=asked.texts,
        workers=[(_address(lab, agent), WORKER_PORT) for agent in cluster.workers],
        drafter=(_address(lab, cluster.drafter), DRAFTER_PORT),
        drafter_name=cluster.drafter.name,
        agent=cluster.coordinator.process.pid,
        url=cluster.coordinator.url(""),
    )


def _net(lab: Lab) -> NetLab:
    assert lab.net is not None
    return lab.net


def _address(lab: Lab, agent: Agent) -> str:
    return _net(lab).nodes[lab.agents.index(agent)].address


def _work(lab: Lab, name: str) -> Path:
    folder = lab.dir / f"work-{name}"
    folder.mkdir(exist_ok=True)
    return folder


def _await_listener(process: subprocess.Popen[bytes], port: int) -> None:
    """Until something listens on that port of the process's namespace. (Connecting would not tell: a worker serves one
    at a time.)"""
    end = time.monotonic() + LOAD_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RigError(f"{process.args!r} exited with {process.returncode}")
        rows = [line.split() for line in Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]]
        if any(row[1].endswith(f":{port:04X}") and row[3] == _LISTENS for row in rows):
            return
        time.sleep(POLL_S)
    raise RigError(f"{process.args!r} does not listen within {LOAD_S:g} s")


def _check_split(cluster: Cluster, beside: Beside) -> None:
    """Both ways must have put as much of the model on each worker. Raises `RigError`."""
    for agent, plain in zip(cluster.workers, beside.workers, strict=True):
        found = [p for p in map(psutil.Process, agent.pids()) if p.name() == "ggml-rpc-server"]
        with_agents, without = (p.memory_info().rss for p in (found[0], psutil.Process(plain.pid)))
        if abs(with_agents - without) > SAME_SPLIT * without:
            held = f"{with_agents >> 20} MiB of the pool, and {without >> 20} MiB without agents"
            raise RigError(f"the model is not split the same way: {agent.name} holds {held}")


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program as Ctrl-C does: through every `finally`."""

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
