"""Cases of `scripts/bench failover` that are about answers: what a client sees when something below it dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from failover_ask import Asked
from failover_bench import LONG_TOKENS, SHORT_TOKENS, BadAnswer, Bench, Case, Figures, Prompt
from failover_lab import DRAFTER, VERIFIER, WORKER, Cluster
from failover_table import Goal
from lab import Agent, LabError

SHARE = (0.05, 0.7)
"""Something dies after such a share of a stream's text, or of the time that a whole answer takes."""
TRIES = 5
BEGIN_S = 120.0
NONE = 0.0


@dataclass
class Conversation:
    """One request in a thread of its own. `n_chars` have come when `underway` is set, or it is over."""

    cluster: Cluster
    entry: Agent
    prompt: Prompt
    stream: bool
    n_chars: float
    underway: threading.Event = field(default_factory=threading.Event)
    answer: Asked | None = None

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.answer = self.cluster.ask(self.entry, self.prompt.request(stream=self.stream), on_text=self._came)
        self.underway.set()

    def _came(self, n: int) -> None:
        if n >= self.n_chars:
            self.underway.set()

    def end(self) -> Asked:
        self._thread.join()
        assert self.answer is not None
        return self.answer


Strike = Callable[[Cluster, Agent], tuple[Agent | None, float]]
"""Kills something of a machine: the agent to start again, if it was one, and when."""


def agent_dies(cluster: Cluster, victim: Agent) -> tuple[Agent | None, float]:
    return victim, cluster.kill(victim)


def child_dies(kind: str) -> Strike:
    def strike(cluster: Cluster, victim: Agent) -> tuple[Agent | None, float]:
        found = cluster.children(victim, kind)
        if not found:
            raise LabError(f"{victim.name} runs no {kind}")
        at = time.monotonic()
        for process in found:
            process.kill()
        return None, at

    return strike


def coordinator_dies(bench: Bench) -> Figures:
    return _pause(bench, "coordinator-pause", bench.serving().coordinator(), agent_dies)


def worker_dies(bench: Bench) -> Figures:
    return _pause(bench, "worker-pause", bench.pick(bench.serving().workers()), agent_dies)


def worker_process_dies(bench: Bench) -> Figures:
    return _pause(bench, "worker-process-pause", bench.pick(bench.serving().workers()), child_dies(WORKER))


def verifier_dies(bench: Bench) -> Figures:
    return _pause(bench, "verifier-pause", bench.serving().coordinator(), child_dies(VERIFIER))


def drafter_dies(bench: Bench) -> Figures:
    cluster = bench.serving(draft=True)
    return _pause(bench, "drafter-pause", bench.pick(cluster.drafters()), child_dies(DRAFTER))


def _pause(bench: Bench, key: str, victim: Agent, strike: Strike) -> Figures:
    """A stream through a machine that lives; the longest wait of its client, and whether the answer is the
    undisturbed one."""
    cluster = bench.cluster
    prompt = bench.prompt(LONG_TOKENS)
    entry = bench.pick(bench.others(victim))
    talk = Conversation(cluster, entry, prompt, True, bench.rng.uniform(*SHARE) * len(prompt.text))
    if not talk.underway.wait(BEGIN_S) or talk.answer is not None:
        raise LabError(f"the answer did not begin, or ended too soon: {talk.answer and talk.answer.problem}")
    gone, at = strike(cluster, victim)
    try:
        answer = talk.end()
    finally:
        if gone is not None:
            cluster.revive(gone)
    bench.facts |= {"victim": victim.name, "entry": entry.name, "chars": round(talk.n_chars)}
    bench.facts |= {"comments": answer.comments, "first_piece_s": round(answer.first_s, 3)}
    if differs := prompt.differs(answer):
        raise BadAnswer(differs)
    return {key: answer.pause_s(at)}


KINDS: dict[str, Callable[[Bench, Cluster], tuple[Agent, Strike]]] = {
    "coordinator": lambda _bench, cluster: (cluster.coordinator(), agent_dies),
    "worker": lambda bench, cluster: (bench.pick(cluster.workers()), agent_dies),
    "worker process": lambda bench, cluster: (bench.pick(cluster.workers()), child_dies(WORKER)),
    "verifier": lambda _bench, cluster: (cluster.coordinator(), child_dies(VERIFIER)),
    "drafter": lambda bench, cluster: (bench.pick(cluster.drafters()), child_dies(DRAFTER)),
}


def any_kill(bench: Bench) -> Figures:
    """One answer, streamed or whole, while something dies at a random moment of it; 1 where it is not the undisturbed
    one."""
    cluster = bench.serving(draft=True)
    kind, stream = bench.rng.choice(list(KINDS)), bench.rng.random() < 0.5
    victim, strike = KINDS[kind](bench, cluster)
    prompt, entry = bench.prompt(SHORT_TOKENS), bench.pick(bench.others(victim))
    bench.facts |= {"kind": kind, "stream": stream, "victim": victim.name, "entry": entry.name}
    talk = _under_way(bench, entry, prompt, stream)
    gone, at = strike(cluster, victim)
    try:
        answer = talk.end()
    finally:
        if gone is not None:
            cluster.revive(gone)
    if differs := prompt.differs(answer):
        raise BadAnswer(differs)
    bench.facts["pause_s"] = round(answer.pause_s(at), 3)
    return {"kills": NONE}


def _under_way(bench: Bench, entry: Agent, prompt: Prompt, stream: bool) -> Conversation:
    """A request that has run for a random share of its text or time, and still does. Raises `LabError`."""
    undisturbed = bench.cluster.ask(entry, prompt.request(stream=stream))
    if differs := prompt.differs(undisturbed):
        raise LabError(f"before anything died: {differs}")
    takes_s = undisturbed.ended - undisturbed.began
    for _ in range(TRIES):
        share = bench.rng.uniform(*SHARE)
        talk = Conversation(bench.cluster, entry, prompt, stream, share * len(prompt.text))
        talk.underway.wait(BEGIN_S if stream else takes_s * share)
        if talk.answer is None:
            return talk
        takes_s = min(takes_s, talk.answer.ended - talk.answer.began)
    raise LabError("answers end too soon to be disturbed")


CASES: dict[str, Case] = {
    "coordinator": Case(
        coordinator_dies,
        {"coordinator-pause": Goal("coordinator killed while streaming: the client's pause", median=10.0, p99=15.0)},
    ),
    "worker": Case(
        worker_dies, {"worker-pause": Goal("worker's machine killed while streaming: the client's pause", median=8.0)}
    ),
    "worker-process": Case(
        worker_process_dies,
        {"worker-process-pause": Goal("worker's process killed while streaming: the client's pause", median=8.0)},
    ),
    "verifier": Case(verifier_dies, {"verifier-pause": Goal("verifier killed while streaming: the client's pause")}),
    "drafter": Case(drafter_dies, {"drafter-pause": Goal("drafter killed while streaming: the client's pause")}),
    "kills": Case(
        any_kill,
        {"kills": Goal("answers that are not the undisturbed one, by kills", p99=NONE, unit="")},
        runs=lambda options: options.kills,
    ),
}
