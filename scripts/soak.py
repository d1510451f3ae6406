"""Requests through all nodes while machines are killed, stalled and cut off at random: none may fail but at a killed
node's own port, and every answer must be the undisturbed one.

Real agents in network namespaces, the demo model pooled over two workers; greedy, with prompts whose answers are beyond
doubt; streamed and whole, two at a time at each node.

    scripts/soak --minutes 5                 prints the seed, the log of faults, and what failed
    scripts/soak --minutes 5 --seed 7        the same faults at the same times

Exit code 1 if a request failed that had no reason to, or an answer differed. Ctrl-C leaves nothing behind.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import netlab
import psutil
from failover_ask import Asked
from failover_bench import MOST_PROMPTS, Prompt, clear_prompts, say
from failover_lab import Cluster
from failover_table import deaths, old_commands, percentile
from lab import Agent, LabError
from soak_faults import Disturbance, Fault, Strikes, end_all, plan
from surroundings import Stolen, environment

N_AGENTS = 4
N_WORKERS = 2
N_TOKENS = 40
ANSWER_S = 240.0
PAUSE_S = (0.0, 2.0)
"""Between two requests of one client."""
SETTLE_S = 120.0
MAX_FAILURES = 50
LOG_LINES = 40


@dataclass(frozen=True, slots=True)
class Request:
    """One that was made, seconds from the beginning. `problem` empty: the undisturbed answer came. `excused`: its own
    node was killed while it ran, or was not running."""

    at_s: float
    took_s: float
    node: str
    stream: bool
    pause_s: float
    problem: str
    excused: bool


@dataclass
class Soak:
    """`done` is set when no new requests are wanted."""

    cluster: Cluster
    prompts: Sequence[Prompt]
    seed: int
    clients: int
    began: float = field(default_factory=time.monotonic)
    requests: list[Request] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)
    _down: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """When each agent's process was killed, and when its port answered again; infinity while it does not."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, faults: Sequence[Disturbance], seconds: float) -> None:
        """Requests all the time, and the faults in theirs."""
        threads = [
            threading.Thread(target=self._client, args=(agent, i), daemon=True)
            for agent in self.cluster.agents
            for i in range(self.clients)
        ]
        for thread in threads:
            thread.start()
        try:
            self._strike(faults)
            self._sleep_until(seconds)
        finally:
            self.done.set()
        for thread in threads:
            thread.join(ANSWER_S + SETTLE_S)

    # Faults

    def _strike(self, faults: Sequence[Disturbance]) -> None:
        strikes = Strikes(self.cluster, random.Random(self.seed + 1))
        moments = sorted([(d.at_s, 0, d) for d in faults] + [(d.until_s, 1, d) for d in faults], key=lambda m: m[:2])
        for at, ends, what in moments:
            self._sleep_until(at)
            agent = self.cluster.agents[what.machine]
            if not ends and what.fault is Fault.KILL:
                self._gone(agent)
            said = strikes.end(what) if ends else strikes.begin(what)
            if ends and what.fault is Fault.KILL:
                threading.Thread(target=self._await_port, args=(agent,), daemon=True).start()
            if said:
                self._note(said)

    def _sleep_until(self, at_s: float) -> None:
        time.sleep(max(0.0, self.began + at_s - time.monotonic()))

    def _note(self, text: str) -> None:
        self.log.append(f"{time.monotonic() - self.began:7.1f} s  {text}")
        say(text)

    def _gone(self, agent: Agent) -> None:
        with self._lock:
            self._down.setdefault(agent.name, []).append((time.monotonic(), math.inf))

    def _await_port(self, agent: Agent) -> None:
        try:
            self.cluster.until(lambda: self.cluster.door(agent).call("peers"), "for its port", SETTLE_S)
        except LabError as exc:
            self._note(f"{agent.name} did not come back: {exc}")
            return
        with self._lock:
            spans = self._down[agent.name]
            spans[-1] = (spans[-1][0], time.monotonic())

    def _was_down(self, name: str, since: float, until: float) -> bool:
        """Whether the agent's own process was killed, or not there, at any time of these."""
        with self._lock:
            return any(since <= back and until >= gone for gone, back in self._down.get(name, ()))

    # Requests

    def _client(self, agent: Agent, index: int) -> None:
        rng = random.Random(f"{self.seed} {agent.name} {index}")
        while not self.done.is_set():
            prompt, stream = rng.choice(self.prompts), rng.random() < 0.5
            self._one(agent, prompt, stream)
            self.done.wait(rng.uniform(*PAUSE_S))

    def _one(self, agent: Agent, prompt: Prompt, stream: bool) -> None:
        answer = self.cluster.ask(agent, prompt.request(stream=stream), timeout_s=ANSWER_S)
        problem = prompt.differs(answer)
        excused = bool(problem) and bool(answer.problem) and self._was_down(agent.name, answer.began, answer.ended)
        self._keep(agent, answer, stream, problem, excused)
        if excused:
            self.done.wait(1.0)  # nobody listens there

    def _keep(self, agent: Agent, answer: Asked, stream: bool, problem: str, excused: bool) -> None:
        pause_s = round(answer.pause_s(answer.began), 3) if not answer.problem else -1.0
        at_s, took_s = answer.began - self.began, answer.ended - answer.began
        made = Request(round(at_s, 2), round(took_s, 2), agent.name, stream, pause_s, problem, excused)
        self.requests.append(made)
        if problem and not excused:
            self._note(f"FAILED at {agent.name}, {'streamed' if stream else 'whole'}, after {took_s:.1f} s: {problem}")

    # What came of it

    def result(self) -> dict[str, Any]:
        good = [r for r in self.requests if not r.problem]
        failed = [r for r in self.requests if r.problem and not r.excused]
        pauses = [r.pause_s for r in good]
        return {
            "requests": len(self.requests),
            "good": len(good),
            "excused": sum(r.excused for r in self.requests),
            "failed": len(failed),
            "failures": [asdict(r) for r in failed[:MAX_FAILURES]],
            "asked": dict(Counter(r.node for r in self.requests if not r.excused)),
            "streamed": sum(r.stream for r in good),
            "pause_s": {
                "median": statistics.median(pauses) if pauses else None,
                "p99": percentile(pauses, 0.99) if pauses else None,
                "worst": max(pauses, default=None),
            },
            "log": self.log,
        }


def prepare(cluster: Cluster, model: Path, n_prompts: int) -> list[Prompt]:
    """Serves the model, and finds out what its undisturbed answers are. Raises `LabError`."""
    n_workers = min(N_WORKERS, cluster.n - 1)
    name = cluster.share(model)
    cluster.serve(name, workers=n_workers)
    cluster.spread(name)
    cluster.settle(workers=n_workers)
    return clear_prompts(cluster.agents[0], most=n_prompts, n_tokens=N_TOKENS)


def soak(
    engine: Path,
    model: Path,
    *,
    minutes: float,
    seed: int,
    n_agents: int = N_AGENTS,
    clients: int = 2,
    n_prompts: int = MOST_PROMPTS,
) -> dict[str, Any]:
    """A whole soak; its figures. Raises `LabError` where the cluster does not come up, or does not come back."""
    with Cluster(n_agents, engine, traced=True) as cluster:
        prompts = prepare(cluster, model, n_prompts)
        say("prompts: " + ", ".join(f"{p.n_tokens} tokens" for p in prompts))
        run = Soak(cluster, prompts, seed, clients)
        run.run(plan(seed, n_agents, minutes * 60), minutes * 60)
        end_all(cluster)
        found = run.result()
        found["old_commands"] = old_commands(cluster.trace())
        found["deaths_told"] = deaths(cluster.trace())
        cluster.settle(deadline_s=SETTLE_S)
        if found["failed"]:
            found["tails"] = {agent.name: agent.tail(LOG_LINES) for agent in cluster.agents}
    return {"seed": seed, "minutes": minutes, "agents": n_agents, **found}


def report(found: dict[str, Any]) -> str:
    pause = found["pause_s"]
    return (
        f"seed {found['seed']}: {found['requests']} requests, {found['good']} good, {found['excused']} at a killed "
        f"node's own port, {found['failed']} FAILED; longest waits for a piece: median {pause['median']} s, "
        f"p99 {pause['p99']} s, worst {pause['worst']} s"
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (5)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), help="of all choices")
    parser.add_argument("--agents", type=int, default=N_AGENTS, help=f"machines ({N_AGENTS})")
    parser.add_argument("--clients", type=int, default=2, help="requests at once at each node (2)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="one JSON object with all of it")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    say(f"seed {asked.seed}")
    machine, stolen = environment(), Stolen()
    try:
        netlab.check()
        engine, model = (Path(os.environ[name]) for name in ("TIGHTWAD_TEST_ENGINE", "TIGHTWAD_TEST_MODEL"))
        found = soak(
            engine, model, minutes=asked.minutes, seed=asked.seed, n_agents=asked.agents, clients=asked.clients
        )
    except KeyboardInterrupt:
        return 130
    except (LabError, netlab.NetLabError, psutil.Error) as exc:
        print(f"soak: {exc}", file=sys.stderr)
        return 1
    found["environment"] = {**machine, "load_after": psutil.getloadavg(), "stolen_percent": stolen.percent()}
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))
    print(report(found))
    for text in found["old_commands"]:
        print(text)
    return 1 if found["failed"] or found["old_commands"] else 0


if __name__ == "__main__":
    sys.exit(main())
