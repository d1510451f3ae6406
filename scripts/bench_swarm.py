"""How fast a model reaches all machines: makespans against their bound, in network namespaces of 200 Mbit/s each.

Each node is a process with the product's store, swarm and TLS streams (`swarm_node.py`). A repeat measures, one after
the other: the goodput of one TCP stream, our transfer, and what it is compared with; ratios are made within a repeat,
figures are medians. Times count from the first `want` to the last node that has the file under its final name.

    makespan    1 seed, 3 and 7 leechers: against (F/B)(1 + floor(log2 N)/M); what the seed sends; libtorrent; in turn
    slow        7 leechers, one of them ten times slower: the others against their bound
    loopback    one leecher without a rate limit, TLS, hash and write included, beside what TLS alone does
    memory      the most that a node's process held while it moved a 50 GB model, and with a manifest of 500 GB
    virtual     makespan and slow again in virtual time: without what the processors and the kernel cost
    decisions   which piece to ask of whom: decisions a second
    delta       what crosses when only part of a model changed (bench_swarm_delta.py)
    origin      what an https origin sends to a cluster (bench_swarm_origin.py)

Exit code 1 if something broke; a missed bound is in the table, not in the exit code. The last line of `--json` is one
object: environment, options, rows with bounds, all samples.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import netlab
import swarm_memory
import swarm_peers as peers
import swarm_table as table
import swarm_virtual
from netlab import NetLab, NetLabError
from rig import RigError
from surroundings import Stolen, environment
from swarm_bench import Bench, Options
from swarm_decisions import decisions
from swarm_lab import Machine, SwarmLabError, Transfer

from tightwad_agent.errors import TightwadError

N_SLOW = 7
SLOWER = 10
GOODPUT_S = 4.0
"""How long the one TCP stream runs that the bound is made of."""
SLACK = 8.0
"""A transfer may take so many times its bound, and `START_S` more, before it counts as broken."""
START_S = 60.0
FLOOD_BYTES = 1 << 30
MB = 1e6


# The cases


def makespan(bench: Bench) -> None:
    for n in bench.options.leechers:
        _makespan(bench, n)


def _makespan(bench: Bench, n: int) -> None:
    ours: list[float] = []
    bounds: list[float] = []
    fetched: list[float] = []
    upload: list[float] = []
    torrent = peers.Torrent(bench.folder, bench.model) if bench.options.peer else None
    with rated(n + 1, bench.options.mbit) as lab:
        for repeat in range(bench.options.repeats):
            made, facts, bound = _one_transfer(bench, lab, n)
            ours.append(made.makespan_s())
            bounds.append(bound)
            fetched.append(max(made.fetched_s.values()))
            upload.append(made.uploaded[0] / facts["size"])
            bench.keep("makespan", n=n, repeat=repeat, bound_s=bound, **facts, **made.plain())
            say(f"{n} leechers: {ours[-1]:.2f} s, bound {bound:.2f} s, seed sent {upload[-1]:.2f} files")
            if torrent and torrent.works:
                torrent.distribute(lab, n, START_S + SLACK * bound)
        turn = _in_turn(bench, lab, n)
    title = f"{n} leechers, {bench.options.mbit:g} Mbit/s"
    note = f"{facts['pieces']} pieces, until the last file has its name"
    add = bench.rows.append
    add(table.at_most(f"{title}: makespan / bound", table.ratios(ours, bounds), "", table.MAKESPAN.get(n), note))
    add(table.at_most(f"{title}: makespan", ours, "s"))
    add(table.at_most(f"{title}: until the last piece / bound", table.ratios(fetched, bounds), ""))
    add(table.at_most(f"{title}: sent by the first seed", upload, "files", table.UPLOAD if n == 7 else None))
    if torrent:
        _compare(bench, title, f"libtorrent {peers.VERSION}", ours, torrent.makespans.get(n, []), torrent.problem)
        if torrent.makespans.get(n):
            add(table.at_most(f"{title}: libtorrent / bound", table.ratios(torrent.makespans[n], bounds), ""))
    _compare(bench, title, "sent to each in turn, plain TCP", ours, turn, "left out by --turns 0")


def _compare(bench: Bench, title: str, what: str, ours: list[float], theirs: list[float], problem: str) -> None:
    case = f"{title}: {what} / ours"
    if not theirs:
        bench.rows.append(table.missing(case, problem))
        return
    bench.keep("peer", what=what, title=title, makespans_s=theirs)
    some = ours[: len(theirs)]
    bench.rows.append(table.at_least(case, table.ratios(theirs, some), "", 1.0, "above 1: ours is first"))


def _in_turn(bench: Bench, lab: NetLab, n: int) -> list[float]:
    return [peers.in_turn(lab, bench.folder, bench.model, n) for _ in range(bench.options.turns)]


def _one_transfer(
    bench: Bench, lab: NetLab, n: int, wait_for: Collection[int] = ()
) -> tuple[Transfer, dict[str, Any], float]:
    """The goodput right before, then the transfer: what came of it, the model's facts, the bound in seconds."""
    goodput = peers.goodput(lab, bench.folder, bench.model, int(GOODPUT_S * bench.options.mbit * 1e6 / 8))
    with bench.nodes(lab, n) as nodes:
        facts = {k: v for k, v in nodes.share(bench.model).items() if k in ("model", "size", "pieces")}
        bound = table.bound_s(facts["size"], goodput, n, facts["pieces"])
        machine = Machine()
        made = nodes.distribute(facts["model"], START_S + SLACK * bound, wait_for)
        facts |= {"goodput_mb_s": goodput / MB, **machine.plain(sum(made.cpu_s.values()))}
    return made, facts, bound


def slow(bench: Bench) -> None:
    """One node has a tenth of the rate; the bound of the others is that of a swarm without it. Nobody waits for it."""
    samples = []
    others = range(1, N_SLOW)
    with rated(N_SLOW + 1, bench.options.mbit) as lab:
        lab.set_rate(N_SLOW, bench.options.mbit / SLOWER)
        for repeat in range(bench.options.repeats):
            made, facts, _ = _one_transfer(bench, lab, N_SLOW, others)
            bound = table.bound_s(facts["size"], facts["goodput_mb_s"] * MB, len(others), facts["pieces"])
            samples.append(made.makespan_s(others) / bound)
            bench.keep("slow", repeat=repeat, others_bound_s=bound, **facts, **made.plain())
            say(f"one slow node: the others took {samples[-1]:.2f} of their bound")
    case = f"{N_SLOW} leechers, one {SLOWER} times slower: the other {len(others)} / their bound"
    bench.rows.append(table.at_most(case, samples, "", table.OTHERS_OF_A_SLOW_NODE))


def loopback(bench: Bench) -> None:
    """The transfer and TLS alone, in turn between the same two processes."""
    pairs, whole, cores = [], [], []
    for repeat in range(bench.options.repeats):
        with bench.nodes(None, 1) as nodes:
            facts = nodes.share(bench.model)
            flood = nodes.flood(FLOOD_BYTES)
            made = nodes.distribute(facts["model"], START_S)
        mb = facts["size"] / MB
        ceiling = flood["n_bytes"] / MB / flood["seconds"]
        cores.append(flood["n_bytes"] / MB / max(flood["cpu_s"], flood["sender_cpu_s"]))
        pairs.append((mb / made.fetched_s[1], ceiling))
        whole.append(mb / made.complete_s[1])
        bench.keep("loopback", repeat=repeat, tls_mb_s=ceiling, tls_mb_s_of_a_core=cores[-1], **made.plain())
        say(f"loopback: {pairs[-1][0]:.0f} MB/s, TLS alone {ceiling:.0f} MB/s")
    bench.rows += [
        table.either("one leecher over loopback, to the last piece written", pairs, "MB/s"),
        table.at_least("one leecher over loopback, until the file has its name", whole, "MB/s"),
        table.at_least("TLS alone over loopback, two processes", [tls for _, tls in pairs], "MB/s"),
        table.at_least("TLS alone, of one core's time at the busier end", cores, "MB/s"),
    ]


def virtual(bench: Bench) -> None:
    """The same algorithms where only the lines take time."""
    mbit = bench.options.mbit
    cases = [*((n, 0.0) for n in bench.options.leechers), (N_SLOW, mbit / SLOWER)]
    for n, slow_mbit in cases:
        made = []
        for seed in range(bench.options.repeats):
            made.append(swarm_virtual.ratios(swarm_virtual.Case(n, mbit, bench.model, seed, slow_mbit)))
            bench.keep("virtual", n=n, slow_mbit=slow_mbit, seed=seed, ratio=made[-1][0], sent=made[-1][1])
            say(f"virtual time, {n} leechers: {made[-1][0]:.3f} of the bound")
        title = f"virtual time, {n} leechers"
        if slow_mbit:
            title += f", one {SLOWER} times slower: the other {n - 1} / their bound"
            bench.rows.append(table.at_most(title, [r for r, _ in made], "", table.OTHERS_OF_A_SLOW_NODE))
        else:
            bound = table.MAKESPAN.get(n)
            bench.rows.append(table.at_most(f"{title}: makespan / bound", [r for r, _ in made], "", bound))
            bench.rows.append(table.at_most(f"{title}: sent by the first seed", [s for _, s in made], "files"))


def memory(bench: Bench) -> None:
    bench.rows += swarm_memory.moving(bench, bench.options.big_gb, bench.options.big_s)
    bench.rows += swarm_memory.manifest(bench)


def pieces(bench: Bench) -> None:
    bench.rows += decisions(bench.options.repeats)


def from_module(module: str, function: str) -> Callable[[Bench], None]:
    """The rows that another script measures."""

    def run(bench: Bench) -> None:
        try:
            measure = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as exc:
            bench.rows.append(table.missing(module, f"not measured: {exc}"))
            return
        try:
            bench.rows += [table.row_of(row) for row in measure()]
        except (KeyError, RigError, ExceptionGroup) as exc:
            raise SwarmLabError(f"{module}: {exc!r}") from None

    return run


CASES: dict[str, Callable[[Bench], None]] = {
    "makespan": makespan,
    "slow": slow,
    "loopback": loopback,
    "virtual": virtual,
    "memory": memory,
    "decisions": pieces,
    "delta": from_module("bench_swarm_delta", "run_delta"),
    "origin": from_module("bench_swarm_origin", "run_origin"),
}
IN_NAMESPACES = {"makespan", "slow"}


# Around them


@contextmanager
def rated(n: int, mbit: float) -> Iterator[NetLab]:
    with NetLab(n, host_leg=False) as lab:
        for node in lab.nodes:
            lab.set_rate(node, mbit)
        yield lab


def say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def names(text: str) -> tuple[str, ...]:
    found = tuple(part for part in text.split(",") if part)
    if unknown := set(found) - CASES.keys():
        raise argparse.ArgumentTypeError(f"no case {sorted(unknown)}; there are {', '.join(CASES)}")
    return found


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench swarm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", type=names, default=tuple(CASES), help=f"some of {','.join(CASES)} (all)")
    add("--leechers", type=numbers, default=(3, 7), help="of the makespans (3,7)")
    add("--repeats", type=int, default=5, help="of each measurement (5)")
    add("--rate", type=float, default=200.0, help="Mbit/s of each node, each way (200)")
    add("--size", type=int, default=0, help="MB of a synthetic model in place of the 540 MB one")
    add("--peer", choices=("libtorrent",), help="libtorrent with its defaults, too, in an environment of its own")
    add("--turns", type=int, default=1, help="how often the file is sent to each in turn for comparison (1)")
    add("--big", type=int, default=50, help="GB of the sparse model of the memory case (50)")
    add("--big-seconds", type=float, default=60.0, help="how long it is moved (60)")
    add("--dir", type=Path, help="where stores and models lie (/dev/shm where there is room, else the usual place)")
    add(
        "--trace",
        type=Path,
        help="a folder; in N/ of sample N: when each node read which block for others, and had which piece",
    )
    add("--json", action="store_true", help="one JSON object on the last line of stdout")
    add("--out", type=Path, help="write that object to a file, too")
    return parser.parse_args(argv)


def options_of(asked: argparse.Namespace) -> Options:
    return Options(
        cases=asked.cases,
        leechers=asked.leechers,
        repeats=asked.repeats,
        mbit=asked.rate,
        size=asked.size * 1_000_000,
        peer=asked.peer is not None,
        turns=asked.turns,
        big_gb=asked.big,
        big_s=asked.big_seconds,
    )


def workplace(asked: Path | None) -> Path:
    """Memory stands for the disks of so many machines better than the one disk of this one."""
    shm = Path("/dev/shm")
    if asked or not shm.is_dir():
        return asked or Path(tempfile.gettempdir())
    room = os.statvfs(shm)
    return shm if room.f_bavail * room.f_frsize > 8 << 30 else Path(tempfile.gettempdir())


def attempt(bench: Bench, case: str) -> bool:
    """Whether it went through; what was measured before it broke stays."""
    say(f"{case}")
    try:
        CASES[case](bench)
    except (SwarmLabError, NetLabError, TightwadError, OSError) as exc:
        say(f"{case}: {exc}")
        bench.rows.append(table.missing(case, str(exc)))
        return False
    return True


def end(number: int, _frame: FrameType | None) -> None:
    """Cleans up before it dies; a second signal (`timeout` sends two) does not disturb that."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def main(argv: Sequence[str]) -> int:
    """Exit code 0 unless something broke."""
    asked = parse(argv)
    signal.signal(signal.SIGTERM, end)
    options, stolen, began = options_of(asked), Stolen(), time.monotonic()
    facts = environment()
    try:
        if IN_NAMESPACES & set(options.cases):
            netlab.check()
    except NetLabError as exc:
        say(f"{exc}; --cases without {' and '.join(sorted(IN_NAMESPACES))} needs none")
        return 1
    result: dict[str, Any] = {"name": "swarm", "environment": facts, "options": asdict(options)}
    with tempfile.TemporaryDirectory(prefix="tightwad-swarm-", dir=workplace(asked.dir)) as folder:
        bench = Bench(options, Path(folder), asked.trace)
        try:
            good = [attempt(bench, case) for case in options.cases]
        finally:  # also when it is broken off: what was measured may have taken long
            facts |= {"stolen_percent": stolen.percent(), "files_in": str(workplace(asked.dir))}
            result |= {"rows": table.plain(bench.rows), "samples": bench.samples}
            result["took_s"] = round(time.monotonic() - began, 1)
            if asked.out:
                asked.out.write_text(json.dumps(result), encoding="utf-8")
    print(table.text(bench.rows), file=sys.stderr if asked.json else sys.stdout)
    if asked.json:
        print(json.dumps(result))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
