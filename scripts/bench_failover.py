"""What the cluster notices, how soon, and what clients see of it: machines that die, stall, come back, or are cut off.

Four agents in network namespaces on a bridge, real mDNS, real llama.cpp, the demo model pooled over two workers.

    killed        SIGKILL of an agent: known to all                   coordinator     killed while it streams
    cut           the cable of a machine leads nowhere                worker          its machine killed likewise
    elected       the coordinator killed: another elected             worker-process  ggml-rpc-server killed
    stopped       SIGSTOP for ten seconds, and SIGCONT                verifier        likewise
    partition     two and two, healed                                 drafter         likewise
    joined        a new machine with nothing but a token              kills           any of them at any moment; equal?
    revoked       a machine removed by another                        loaded, flooded, flooded-turn (minutes, one run)

`--json OUT` is written after each case, so that an interrupted run keeps what it has. Ctrl-C leaves nothing behind.
Exit code 1 where a bound was missed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import failover_cases
import failover_streams
import failover_table as table
import netlab
import psutil
from failover_bench import N_AGENTS, BadAnswer, Bench, Case, Options, say
from failover_table import Row
from lab import LabError
from surroundings import Stolen, environment

CASES: dict[str, Case] = {**failover_cases.CASES, **failover_streams.CASES}
LONG = ("loaded", "flooded", "flooded-turn")
"""Cases whose one run takes minutes; `--quick` leaves them out."""
BROKEN = (LabError, OSError, ValueError, KeyError, StopIteration, subprocess.SubprocessError, psutil.Error)
"""What a run may end with that counts as a run that failed."""


def run_case(bench: Bench, name: str) -> None:
    """All runs of it; one that goes wrong is a sample with its problem. Where the cluster is not as it should be, the
    next has a new one."""
    case = CASES[name]
    for run in range(case.runs(bench.options)):
        bench.facts = {}
        began = time.monotonic()
        problem, figures = "", dict[str, float]()
        try:
            figures = dict(case.run(bench))
        except BROKEN as exc:
            problem = f"{type(exc).__name__}: {exc}" if not isinstance(exc, LabError) else str(exc)
            say(f"{name} {run}: FAILED: {problem[:800]}")
            if not isinstance(exc, BadAnswer):
                bench.reset()
        else:
            say(f"{name} {run}: " + ", ".join(f"{key} {value:.2f}" for key, value in figures.items()))
        beside = {"run": run, "took_s": round(time.monotonic() - began, 1), "facts": bench.facts}
        for key in case.goals:
            value = figures.get(key)
            bench.samples.append({"case": key, "s": value, "problem": problem, **beside})


def rows_of(samples: Sequence[table.Sample]) -> list[Row]:
    """Of what was run, in the order of the cases."""
    ran = {sample["case"] for sample in samples}
    goals = {key: goal for case in CASES.values() for key, goal in case.goals.items()}
    return [table.row(key, goal, samples) for key, goal in goals.items() if key in ran]


def write(path: Path, found: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1))
    part.replace(path)


def parsed(argv: list[str]) -> argparse.Namespace:
    """The command line; `cases` are names, `options` how they run."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench failover", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(CASES), metavar="NAME,…", help="which (all)")
    parser.add_argument("--runs", type=int, default=50, help="of each case (50)")
    parser.add_argument("--kills", type=int, default=100, help="runs of the case `kills` (100)")
    parser.add_argument("--load-minutes", type=float, default=10.0, help="of the case `loaded` (10)")
    parser.add_argument("--flood-seconds", type=float, default=60.0, help="of the case `flooded` (60)")
    parser.add_argument("--flood-rate", type=float, default=1000.0, help="connections a second to each port (1000)")
    parser.add_argument("--partition-seconds", type=float, default=30.0, help="of the case `partition` (30)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), help="of all choices")
    parser.add_argument("--json", type=Path, metavar="OUT", help="figures and all samples, as one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument("--of", type=Path, nargs="+", metavar="FILE", help="only print the table of what --json wrote")
    parser.add_argument("--quick", action="store_true", help="three runs of each, five kills, not those of minutes")
    asked = parser.parse_args(argv)
    everything = asked.cases == ",".join(CASES)
    asked.cases = asked.cases.split(",")
    if unknown := sorted(set(asked.cases) - set(CASES)):
        parser.error(f"--cases: {', '.join(unknown)} are none of {', '.join(CASES)}")
    if asked.quick:
        asked.cases = [name for name in asked.cases if name not in LONG or not everything]
        asked.runs, asked.kills = min(asked.runs, 3), min(asked.kills, 5)
    asked.options = Options(
        runs=asked.runs,
        kills=asked.kills,
        load_s=asked.load_minutes * 60,
        flood_s=asked.flood_seconds,
        flood_rate=asked.flood_rate,
        partition_s=asked.partition_seconds,
        seed=asked.seed,
    )
    return asked


def main(argv: list[str]) -> int:
    """The command line."""
    asked = parsed(argv)
    if asked.of:
        return show(rows_of([sample for path in asked.of for sample in json.loads(path.read_text())["samples"]]), asked)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    say(f"seed {asked.seed}")
    bench = Bench(asked.options, random.Random(asked.seed))
    machine, stolen = environment(), Stolen()
    code = 0

    def keep() -> None:
        if asked.json:
            write(asked.json, _found(bench, machine, stolen))

    try:
        netlab.check()
        for name in asked.cases:
            run_case(bench, name)
            keep()
    except KeyboardInterrupt:
        keep()
        code = 130
    except netlab.NetLabError as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 1
    finally:
        bench.reset()
    shown = show(rows_of(bench.samples), asked)
    return code or shown


def show(made: Sequence[Row], asked: argparse.Namespace) -> int:
    """Prints the table; the exit code."""
    print(table.markdown(made) if asked.markdown else table.text(made))
    return 1 if any(row.ok is False for row in made) else 0


def _found(bench: Bench, machine: dict[str, Any], stolen: Stolen) -> dict[str, Any]:
    return {
        "name": "failover",
        "environment": {**machine, "load_after": psutil.getloadavg(), "stolen_percent": stolen.percent()},
        "agents": N_AGENTS,
        "seed": bench.options.seed,
        "rows": table.plain(rows_of(bench.samples)),
        "samples": bench.samples,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
