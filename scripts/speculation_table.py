"""What `scripts/bench speculation` makes of its samples: rates, ratios, and the goals beside them. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

POOL = "llama-server, pool alone"
LOCAL = "llama-server, local draft, n = {}"
VERIFIER = "verifier, no drafts"
SPECULATION = "verifier, drafter behind the network"
POOR = "verifier, poor drafts"
WRONG = "verifier, drafts always wrong"
HANGS = "verifier, drafter hangs after its hello"
HANGS_MIDWAY = "verifier, drafter hangs mid-way"
MESH = "verifier, through agents"
WITHOUT_MESH = "verifier, the same machines without agents"
BEST_LOCAL = "llama-server, best local draft"

AGAINST_POOL = {0.0: 2.0, 4.0: 2.3, 10.0: 2.8, 20.0: 3.6}
AGAINST_BEST_LOCAL = {0.0: 1.8, 4.0: 1.8, 10.0: 1.6, 20.0: 2.2}
AGAINST_NO_DRAFTS = {POOR: 1.2, WRONG: 0.97, HANGS: 0.97, HANGS_MIDWAY: 0.97}
VERIFIER_AGAINST_POOL = 0.97
MESH_AGAINST_NO_MESH = 0.95
FOUR_STREAMS = 1.5
UNEVEN_STREAMS = 1.3
CPU_PERCENT = 5.0
"""Of a core, for the agent at 50 tokens a second."""
CPU_AT = 50.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer. `generate_s`: from its first token to its last. `n_streams`: answers made at once."""

    way: str
    rtt_ms: float
    repeat: int
    prompt: int
    tokens: tuple[int, ...]
    prompt_s: float
    generate_s: float
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    n_streams: int = 1
    began_s: float = 0.0
    cpu_s: float = 0.0
    """Of this process, which plays the agent."""
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_steps(self) -> int:
        """Tokens after the first."""
        return len(self.tokens) - 1


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure with its goal. `ok` is None where nothing is promised."""

    rtt_ms: float
    what: str
    value: float
    goal: float | None = None
    at_most: bool = False

    @property
    def ok(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


def rates(samples: Iterable[Sample], way: str, rtt_ms: float) -> dict[int, float]:
    """Tokens per second of one answer at a time, all prompts of a repeat together: by repeat."""
    steps: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for s in samples:
        if s.way == way and s.rtt_ms == rtt_ms and s.n_streams == 1:
            steps[s.repeat] = steps.get(s.repeat, 0) + s.n_steps
            seconds[s.repeat] = seconds.get(s.repeat, 0.0) + s.generate_s
    return {repeat: n / seconds[repeat] for repeat, n in steps.items() if seconds[repeat] > 0}


def median_rate(samples: Iterable[Sample], way: str, rtt_ms: float) -> float:
    return statistics.median(rates(samples, way, rtt_ms).values())


def ratio(samples: Sequence[Sample], way: str, base: str, rtt_ms: float) -> float:
    """Median over the repeats of both rates of one repeat, which were measured in turn."""
    ours, theirs = rates(samples, way, rtt_ms), rates(samples, base, rtt_ms)
    return statistics.median(ours[repeat] / theirs[repeat] for repeat in ours if repeat in theirs)


def ways_of(samples: Iterable[Sample], rtt_ms: float) -> list[str]:
    """In the order they came."""
    return list(dict.fromkeys(s.way for s in samples if s.rtt_ms == rtt_ms))


def best_local(samples: Sequence[Sample], rtt_ms: float) -> str | None:
    """The fastest of llama-server's own settings, by its median."""
    local = [way for way in ways_of(samples, rtt_ms) if way.startswith(LOCAL.split("{", maxsplit=1)[0])]
    return max(local, key=lambda way: median_rate(samples, way, rtt_ms), default=None)


def ratios(samples: Sequence[Sample]) -> list[Ratio]:
    """All that is promised, as far as it was measured."""
    found = []
    for rtt_ms in sorted({s.rtt_ms for s in samples}):
        found += _at(samples, rtt_ms)
    return found


def _at(samples: Sequence[Sample], rtt_ms: float) -> list[Ratio]:
    ways = ways_of(samples, rtt_ms)
    best = best_local(samples, rtt_ms)
    wanted: list[tuple[str, str, float | None]] = []
    if best:
        wanted.append((best, POOL, None))
    wanted.append((VERIFIER, POOL, VERIFIER_AGAINST_POOL))
    wanted.append((SPECULATION, POOL, AGAINST_POOL.get(rtt_ms)))
    if best:
        wanted.append((SPECULATION, best, AGAINST_BEST_LOCAL.get(rtt_ms)))
    wanted += [(way, VERIFIER, goal) for way, goal in AGAINST_NO_DRAFTS.items()]
    wanted.append((MESH, WITHOUT_MESH, MESH_AGAINST_NO_MESH))
    made = [
        Ratio(rtt_ms, f"{way} / {base}", ratio(samples, way, base, rtt_ms), goal)
        for way, base, goal in wanted
        if way in ways and base in ways
    ]
    return made + _streams(samples, rtt_ms) + _cpu(samples, rtt_ms)


def _streams(samples: Sequence[Sample], rtt_ms: float) -> list[Ratio]:
    found = []
    for way in (VERIFIER, SPECULATION):
        at_once = [s for s in samples if s.way == way and s.rtt_ms == rtt_ms and s.n_streams > 1]
        alone = rates(samples, way, rtt_ms)
        if not at_once or not alone:
            continue
        n = at_once[0].n_streams
        total, uneven = [], []
        for group in _groups(at_once):
            if group[0].repeat not in alone:
                continue
            total.append(total_rate(group) / alone[group[0].repeat])
            speeds = [s.n_steps / s.generate_s for s in group]
            uneven.append(max(speeds) / min(speeds))
        found.append(Ratio(rtt_ms, f"{way}: {n} streams / 1", statistics.median(total), FOUR_STREAMS))
        found.append(
            Ratio(rtt_ms, f"{way}: fastest / slowest of {n}", statistics.median(uneven), UNEVEN_STREAMS, at_most=True)
        )
    return found


def _groups(at_once: Sequence[Sample]) -> list[list[Sample]]:
    return [[s for s in at_once if s.repeat == repeat] for repeat in sorted({s.repeat for s in at_once})]


def total_rate(group: Sequence[Sample]) -> float:
    """Tokens per second of answers made at once: all after the first tokens, over the time from the earliest first
    token to the last one of all."""
    first = min(s.began_s + s.prompt_s for s in group)
    last = max(s.began_s + s.prompt_s + s.generate_s for s in group)
    return sum(s.n_steps for s in group) / (last - first)


def _cpu(samples: Sequence[Sample], rtt_ms: float) -> list[Ratio]:
    """The agent's own CPU while it speculates, scaled to `CPU_AT` tokens per second: of who plays the agent, and of a
    real one that coordinates, with its forwarders and its endpoint."""
    found = []
    for way, whose in ((SPECULATION, "the agent's process"), (MESH, "the coordinator's agent")):
        mine = [s for s in samples if s.way == way and s.rtt_ms == rtt_ms and s.n_streams == 1 and s.tokens]
        percent = [s.cpu_s / len(s.tokens) * CPU_AT * 100 for s in mine]
        if percent:
            what = f"CPU of {whose} at {CPU_AT:g} tokens/s, % of a core"
            found.append(Ratio(rtt_ms, what, statistics.median(percent), CPU_PERCENT, at_most=True))
    return found


def different(samples: Sequence[Sample], reference: str = POOL) -> list[dict[str, Any]]:
    """Answers that are not, token for token, the first of the reference to that prompt (of the first way, without
    one)."""
    truth: dict[int, Sample] = {}
    for s in sorted(samples, key=lambda s: s.way != reference):
        truth.setdefault(s.prompt, s)
    return [_difference(s, truth[s.prompt]) for s in samples if s.tokens != truth[s.prompt].tokens]


def _difference(sample: Sample, truth: Sample) -> dict[str, Any]:
    pairs = enumerate(zip(sample.tokens, truth.tokens, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(sample.tokens), len(truth.tokens)))
    return {
        "way": sample.way,
        "reference": truth.way,
        "rtt_ms": sample.rtt_ms,
        "repeat": sample.repeat,
        "prompt": sample.prompt,
        "at": at,
        "tokens": sample.tokens[at : at + 4],
        "expected": truth.tokens[at : at + 4],
    }


def acceptance(samples: Iterable[Sample], way: str, rtt_ms: float) -> float | None:
    """Share of draft tokens that were right; None where nothing was drafted."""
    mine = [s for s in samples if s.way == way and s.rtt_ms == rtt_ms]
    drafted = sum(s.drafted for s in mine)
    return sum(s.accepted for s in mine) / drafted if drafted else None


def plain(samples: Sequence[Sample]) -> dict[str, Any]:
    """The tables for a program."""
    return {
        "ratios": [{**asdict(r), "value": round(r.value, 4), "ok": r.ok} for r in ratios(samples)],
        "rates": [
            {
                "way": way,
                "rtt_ms": rtt_ms,
                "tokens_per_s": round(median_rate(samples, way, rtt_ms), 3),
                "accepted": acceptance(samples, way, rtt_ms),
            }
            for rtt_ms in sorted({s.rtt_ms for s in samples})
            for way in ways_of(samples, rtt_ms)
            if rates(samples, way, rtt_ms)
        ],
        "different": different(samples),
    }


def text(samples: Sequence[Sample]) -> str:
    """Tables for a person."""
    rtts = sorted({s.rtt_ms for s in samples})
    every = list(dict.fromkeys(s.way for s in samples))
    width = max((len(way) for way in every), default=20) + 2
    lines = ["tokens/s (accepted %)".ljust(width) + "".join(f"{f'{rtt:g} ms':>14s}" for rtt in rtts)]
    lines += [way.ljust(width) + "".join(f"{_cell(samples, way, rtt):>14s}" for rtt in rtts) for way in every]
    lines += ["", "ratios"]
    for r in ratios(samples):
        goal = "" if r.goal is None else f"  {'<=' if r.at_most else '>='} {r.goal:g}: {'ok' if r.ok else 'MISSED'}"
        lines.append(f"  {r.rtt_ms:4g} ms  {r.what:95s} {r.value:7.3f}{goal}")
    return "\n".join(lines)


def _cell(samples: Sequence[Sample], way: str, rtt_ms: float) -> str:
    if not rates(samples, way, rtt_ms):
        return "-"
    accepted = acceptance(samples, way, rtt_ms)
    rate = f"{median_rate(samples, way, rtt_ms):.1f}"
    return rate if accepted is None else f"{rate} ({accepted * 100:.0f})"
