"""The one place for measured figures. Ways that are compared run in turn in one call; values are medians.

The last line of `--json` is one object: name, environment, rows of case, value, unit, bound, ok.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bench_endpoint
import bench_failover
import bench_speculation
import bench_swarm
import bench_tunnel
import netlab
from lab import Agent, Lab, LabError, can_namespace

PROMPT = "Write a short story about a lighthouse keeper."
N_TOKENS = 64
SERVE_S = 300.0


@dataclass
class Row:
    """One figure. `bound`: what it must reach, None where nothing is promised; `ok` None then, too."""

    case: str
    value: float
    unit: str
    bound: float | None = None
    ok: bool | None = None


def environment() -> dict[str, Any]:
    from tightwad_agent.engine.pins import BUILD

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cores": os.cpu_count(),
        "cpu": platform.processor() or platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "engine": BUILD,
        "commit": commit.stdout.strip() or None,
    }


# demo: load time, first token, tokens per second, pooled and not


@dataclass
class Sample:
    load_s: float
    first_token_s: float
    tokens_per_s: float


def sample(lab: Lab, model: str, workers: int) -> Sample:
    """Loads anew, asks once through a follower."""
    first = lab.agents[0]
    first.cli("stop")
    lab.coordinator().wait(lambda: first.status()["target"]["state"] == "none", "for the server to stop", 30)
    began = time.monotonic()
    first.cli("serve", model, "--workers", str(workers), "--draft", "off", "--ctx", "1024", timeout_s=SERVE_S)
    load_s = time.monotonic() - began
    asked = next(a for a in reversed(lab.agents) if a is not lab.coordinator())
    timings = _ask(asked)
    return Sample(load_s, timings["prompt_ms"] / 1000, timings["predicted_per_second"])


def _ask(agent: Agent) -> Any:
    body = {
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": N_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    return agent.post("/v1/chat/completions", body)["timings"]


def bench_demo(quick: bool) -> list[Row]:
    model = os.environ["TIGHTWAD_TEST_MODEL"]
    repeats = 2 if quick else 5
    ways = (0, 1, 2)
    samples: dict[int, list[Sample]] = {n: [] for n in ways}
    with Lab(3, namespaces=can_namespace(), flags=("--threads", "1")) as lab:
        lab.start()
        name = lab.share(Path(model))["name"]
        for n in ways:
            sample(lab, name, n)  # warm-up: page cache, first start
        for _ in range(repeats):
            for n in ways:
                samples[n].append(sample(lab, name, n))
    rows = []
    for n in ways:
        case = "one machine" if n == 0 else f"pooled over {n} worker{'s' if n > 1 else ''}"
        for field, what, unit in (
            ("load_s", "load", "s"),
            ("first_token_s", "first token", "s"),
            ("tokens_per_s", "generation", "tokens/s"),
        ):
            value = statistics.median(getattr(s, field) for s in samples[n])
            rows.append(Row(f"{case}: {what}", round(value, 3), unit))
    alone = statistics.median(s.tokens_per_s for s in samples[0])
    for n in ways[1:]:
        pairs = [p.tokens_per_s / a.tokens_per_s for p, a in zip(samples[n], samples[0], strict=True)]
        rows.append(Row(f"pooled over {n} / one machine", round(statistics.median(pairs), 3), "ratio"))
    if alone <= 0:
        raise LabError("nothing was generated")
    return rows


# help: how long the command line takes to say hello


def bench_help(quick: bool) -> list[Row]:
    def once(*args: str) -> float:
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "tightwad_agent", *args], capture_output=True, check=True)
        return time.monotonic() - began

    rows = []
    for args, bound in ((("--help",), 0.1), (("--version",), None)):
        once(*args)
        value = round(statistics.median(once(*args) for _ in range(5 if quick else 15)), 3)
        rows.append(Row(" ".join(args), value, "s", bound, None if bound is None else value <= bound))
    return rows


# tunnel: what the agents' own connections add to a worker's


def bench_tunnels(quick: bool) -> list[Row]:
    return [Row(*figure) for figure in bench_tunnel.measure(bench_tunnel.QUICK if quick else bench_tunnel.Extent())]


BENCHMARKS: dict[str, Callable[[bool], list[Row]]] = {
    "demo": bench_demo,
    "help": bench_help,
    "tunnel": bench_tunnels,
}


WITH_OPTIONS: dict[str, Callable[[list[str]], int]] = {
    "endpoint": bench_endpoint.main,
    "failover": bench_failover.main,
    "speculation": bench_speculation.main,
    "swarm": bench_swarm.main,
}
"""Benchmarks that take options of their own; `--help` after the name says which."""


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in WITH_OPTIONS:
        return WITH_OPTIONS[sys.argv[1]](sys.argv[2:])
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("name", nargs="?", choices=sorted([*BENCHMARKS, *WITH_OPTIONS]))
    parser.add_argument("--list", action="store_true", help="names of the benchmarks")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    options = parser.parse_args()
    if options.list or options.name is None:
        print("\n".join(sorted([*BENCHMARKS, *WITH_OPTIONS])))
        return 0
    try:
        rows = BENCHMARKS[options.name](options.quick)
    except (LabError, netlab.NetLabError) as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 1
    if options.json:
        result = {"name": options.name, "environment": environment(), "rows": [asdict(row) for row in rows]}
        print(json.dumps(result))
    else:
        for row in rows:
            bound = "" if row.bound is None else f"   bound {row.bound:g}: {'ok' if row.ok else 'MISSED'}"
            print(f"{row.case:55s} {row.value:10.3f} {row.unit}{bound}")
    return 0 if all(row.ok is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
