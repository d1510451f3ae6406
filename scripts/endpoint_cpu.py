"""What a token costs the agents' processor: measured at whatever rate this machine reaches, told for a fixed one."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from endpoint_lab import Pair, Window, running_pair, stream
from lab import Agent

from tightwad_agent.prompts import PROMPTS

RATE = 50.0
"""Tokens a second that the shares are told for."""
BOUND = 0.05
IDLE_S = 6.0
N_WARM = 3
CONTEXT = 2048

PACKAGE = "tightwad_agent"
LOOP = ("speculate", "panel", "branch", "outstanding", "ngram", "averages", "record", "costs", "verified", "generation")
PARTS = (
    ("policy", [f"{PACKAGE}.proxy.policy"]),
    ("speculation", [f"{PACKAGE}.proxy.{name}" for name in LOOP]),
    ("codec", [f"{PACKAGE}.wire", "msgpack"]),
    ("verifier link", [f"{PACKAGE}.engine.{name}" for name in ("verifying", "framesocket", "open_request")]),
    ("drafting", [f"{PACKAGE}.engine"]),
    ("http", [f"{PACKAGE}.proxy", "h11", "json"]),
    ("mesh", [f"{PACKAGE}.mesh", f"{PACKAGE}.direct", f"{PACKAGE}.streams", "ssl"]),
    ("trio", ["trio", "outcome", "selectors"]),
)
"""By the innermost call whose module is of one; standard library below it counts with it."""


@dataclass(frozen=True, slots=True)
class Spent:
    """By one process: seconds of processor time while `tokens` came in `wall_s`, and its share of a core when idle."""

    cpu_s: float
    wall_s: float
    tokens: int
    idle_share: float

    @property
    def ms_per_token(self) -> float:
        return 1e3 * max(0.0, self.cpu_s - self.idle_share * self.wall_s) / self.tokens

    def share(self, rate: float) -> float:
        """Of a core, at so many tokens a second."""
        return self.idle_share + rate * self.ms_per_token / 1e3


@dataclass(frozen=True, slots=True)
class Options:
    """`temperature` sets how many drafts are right: drafts are greedy."""

    n_answers: int
    n_tokens: int
    temperature: float
    workers: int
    hz: float


def cpu_s(pair: Pair, agent: Agent) -> float:
    times = pair.process(agent).cpu_times()
    return times.user + times.system


def measure(engine: Path, target: Path, draft: Path, options: Options) -> dict[str, Any]:
    """Figures of both agents. Raises `LabError`."""
    how = {"context": CONTEXT, "hz": options.hz, "workers": options.workers}
    with running_pair(target, draft, engine=engine, **how) as pair:
        agents = {"serving": pair.serving, "drafting": pair.drafting}
        for i in range(N_WARM):
            answer(pair.serving, i, options)
        idle = _idle(pair, agents)
        before, began = {name: cpu_s(pair, agent) for name, agent in agents.items()}, time.monotonic()
        if options.hz:
            for agent in agents.values():
                pair.window(agent)
            before = {name: cpu_s(pair, agent) for name, agent in agents.items()}
        timings, yardsticks = [], []
        for i in range(options.n_answers):
            timings.append(answer(pair.serving, N_WARM + i, options))
            yardsticks.append(yardstick_ms())
        wall_s, n = time.monotonic() - began, sum(t["predicted_n"] for t in timings)
        spent = {
            name: Spent(cpu_s(pair, agent) - before[name], wall_s, n, idle[name]) for name, agent in agents.items()
        }
        windows = {name: pair.window(agent) for name, agent in agents.items()} if options.hz else {}
    total: Counter[str] = Counter()
    for t in timings:
        total.update({name: t[name] for name in ("rounds", "drafted", "accepted")})
    return {
        "tokens": n,
        "tokens_per_s": n / sum(t["predicted_ms"] for t in timings) * 1e3,
        "yardstick_ms": statistics.median(yardsticks),
        "tokens_per_round": n / max(1, total["rounds"]),
        "acceptance": total["accepted"] / max(1, total["drafted"]),
        "agents": {name: told(s) | {"parts": parts(windows.get(name), s)} for name, s in spent.items()},
        "functions": {name: functions(window) for name, window in windows.items()},
    }


def told(spent: Spent) -> dict[str, Any]:
    return asdict(spent) | {"ms_per_token": spent.ms_per_token, "share": spent.share(RATE)}


def yardstick_ms() -> float:
    """Processor time of the same little work every time: how fast this machine is just now."""
    began = time.process_time()
    sum(i * i % 7 for i in range(100_000))
    return 1e3 * (time.process_time() - began)


def answer(agent: Agent, i: int, options: Options) -> dict[str, Any]:
    """One streamed answer; its timings."""
    kinds = [prompt for row in zip(*PROMPTS.values(), strict=False) for prompt in row]
    body = {
        "messages": [{"role": "user", "content": kinds[i % len(kinds)]}],
        "max_tokens": options.n_tokens,
        "temperature": options.temperature,
        "seed": i,
        "ignore_eos": True,
    }
    timings: dict[str, Any] = stream(agent, body)[-1]["timings"]
    return timings


def _idle(pair: Pair, agents: dict[str, Agent]) -> dict[str, float]:
    before = {name: cpu_s(pair, agent) for name, agent in agents.items()}
    began = time.monotonic()
    time.sleep(IDLE_S)
    took = time.monotonic() - began
    return {name: (cpu_s(pair, agent) - before[name]) / took for name, agent in agents.items()}


# Where it went


def part_of(stack: str) -> str:
    for call in reversed(stack.split(";")):
        module = call.split(":", 1)[0]
        for part, prefixes in PARTS:
            if any(module == p or module.startswith(p + ".") for p in prefixes):
                return part
    return "other"


def parts(window: Window | None, spent: Spent) -> dict[str, float]:
    """Milliseconds a token by part, the idle agent's own doings among them."""
    if window is None:
        return {}
    counts: Counter[str] = Counter()
    for stack, n in window["stacks"].items():
        counts[part_of(stack)] += n
    scale = 1e3 * spent.cpu_s / spent.tokens / max(1, counts.total())
    return {part: round(n * scale, 4) for part, n in counts.most_common()}


def functions(window: Window, most: int = 40) -> list[list[Any]]:
    """Share of the time in each function itself, and with what it calls; the dearest first."""
    own: Counter[str] = Counter()
    within: Counter[str] = Counter()
    for stack, n in window["stacks"].items():
        calls = stack.split(";")
        own[calls[-1]] += n
        within.update(dict.fromkeys(calls, n))
    total = max(1, own.total())
    return [[call, round(n / total, 4), round(within[call] / total, 4)] for call, n in own.most_common(most)]
