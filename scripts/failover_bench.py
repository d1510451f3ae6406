"""What the cases of `scripts/bench failover` share: a cluster that is as it should be, and a place for samples."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from failover_ask import ANSWER_S, Asked, asking_for_margins, candidates, clear_tokens, path_of
from failover_lab import SETTLE_S, Cluster
from failover_table import Goal
from lab import Agent, LabError

N_AGENTS = 4
N_WORKERS = 2
LONG_TOKENS = 100
SHORT_TOKENS = 20
MOST_TOKENS = 110
MOST_PROMPTS = 6


class BadAnswer(LabError):
    """A client did not get what it should have got; the cluster itself may be as it should be."""


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for on the command line."""

    runs: int = 50
    kills: int = 100
    load_s: float = 600.0
    flood_s: float = 60.0
    flood_rate: float = 1000.0
    partition_s: float = 30.0
    seed: int = 1


Figures = Mapping[str, float]
"""Of one run: seconds, or counts, by the key of their goal."""


@dataclass(frozen=True, slots=True)
class Case:
    """`goals`: what one run of it measures, by key. `runs`: how many of it make a measurement."""

    run: Callable[[Bench], Figures]
    goals: Mapping[str, Goal]
    runs: Callable[[Options], int] = lambda options: options.runs


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request whose answer is beyond doubt, and the answer."""

    body: Mapping[str, Any]
    n_tokens: int
    text: str

    def request(self, *, stream: bool) -> dict[str, Any]:
        body = {**self.body, "max_tokens": self.n_tokens, "temperature": 0}
        return {**body, "stream": True, "stream_options": {"include_usage": True}} if stream else body

    def differs(self, asked: Asked) -> str:
        """Why it is not the undisturbed answer; empty if it is."""
        if asked.problem:
            return asked.problem
        if asked.text != self.text:
            return f"another answer: {first_difference(self.text, asked.text)}"
        if asked.usage not in (-1, self.n_tokens):
            return f"{asked.usage} tokens are counted, not {self.n_tokens}"
        return ""


def first_difference(wanted: str, got: str) -> str:
    """Where two texts part, with a little of both."""
    at = next((i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), min(len(wanted), len(got)))
    around = slice(max(0, at - 20), at + 40)
    return f"at character {at} of {len(wanted)}: {wanted[around]!r} became {got[around]!r}"


@dataclass
class Bench:
    """A cluster is made when a case first needs it, and anew after a run that went wrong."""

    options: Options
    rng: random.Random
    samples: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Of the run that goes on; they are kept with its sample."""
    _stack: ExitStack = field(default_factory=ExitStack)
    _cluster: Cluster | None = None
    _draft: bool | None = None
    _prompts: list[Prompt] = field(default_factory=list)
    _names: list[str] = field(default_factory=list)

    @property
    def cluster(self) -> Cluster:
        if self._cluster is None:
            say(f"starting {N_AGENTS} agents")
            engine = Path(os.environ["TIGHTWAD_TEST_ENGINE"])
            self._cluster = self._stack.enter_context(Cluster(N_AGENTS, engine, traced=True))
        return self._cluster

    def reset(self) -> None:
        """The next case begins with new agents."""
        self._cluster = self._draft = None
        self._names = []
        self._stack.close()

    def members(self) -> Cluster:
        """All agents there, whatever is served."""
        self.cluster.until(self.cluster.agree, "for all to see all", SETTLE_S)
        return self.cluster

    def serving(self, *, draft: bool = False) -> Cluster:
        """The demo model pooled over two workers, all agents there; with `draft`, a drafter is ready."""
        cluster = self.cluster
        if not self._names:
            self._share(cluster)
        if self._draft is not draft:
            self.members()
            cluster.serve(self._names[0], workers=N_WORKERS, draft=self._names[1] if draft else "off")
            for name in self._names[: 2 if draft else 1]:
                cluster.spread(name)
            self._draft = draft
        cluster.settle(workers=N_WORKERS, draft=draft)
        return cluster

    def _share(self, cluster: Cluster) -> None:
        model = Path(os.environ["TIGHTWAD_TEST_MODEL"])
        for path in (model, twin(model, cluster.lab.dir / "twin.gguf")):
            self._names.append(cluster.share(path))

    def prompt(self, at_least: int) -> Prompt:
        """One of those whose answer is beyond doubt for so many tokens. The pool must be whole."""
        if not self._prompts:
            self._prompts = clear_prompts(self.cluster.agents[0])
            say("prompts beyond doubt: " + ", ".join(f"{p.n_tokens} tokens" for p in self._prompts))
        fit = [p for p in self._prompts if p.n_tokens >= at_least]
        if not fit:
            raise LabError(f"no prompt has an answer beyond doubt of {at_least} tokens")
        return self.rng.choice(fit)

    def pick(self, agents: list[Agent]) -> Agent:
        if not agents:
            raise LabError("there is no machine of this kind")
        return self.rng.choice(agents)

    def others(self, *gone: Agent) -> list[Agent]:
        return [agent for agent in self.cluster.agents if agent not in gone]


def clear_prompts(
    agent: Agent, *, at_least: int = SHORT_TOKENS, most: int = MOST_PROMPTS, n_tokens: int = MOST_TOKENS
) -> list[Prompt]:
    """At `most` so many requests, each cut before the first doubt and at `n_tokens`, with their undisturbed answers.
    Raises `LabError`."""
    found: list[Prompt] = []
    for body in candidates():
        if len(found) == most:
            break
        answer = agent.post(path_of(body), asking_for_margins(body, n_tokens), timeout_s=ANSWER_S)
        tokens = clear_tokens(answer)
        if len(tokens) >= at_least:
            found.append(Prompt(body, len(tokens), "".join(tokens)))
    if not found:
        raise LabError("no prompt has an answer beyond doubt")
    return found


def twin(model: Path, path: Path) -> Path:
    """The model under another name: another file to the swarm, the same words. It drafts for the first."""
    data = model.read_bytes()
    at = data.find(b"general.name") + len(b"general.name") + 4 + 8
    head = bytearray(data[: at + 1])
    head[at] ^= 0x20  # the case of the first letter
    with path.open("wb") as file:
        file.write(head)
        file.write(memoryview(data)[at + 1 :])
    return path


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
