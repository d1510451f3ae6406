"""Seeds of the simulated control plane from start to verdict, and long calm runs: `scripts/sim`."""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from collections.abc import Iterable, Iterator

from simcluster import ONE_WAY_S, QUIET_S, WATCH_S, Cluster, Net, Violation, plan_faults
from simplane import CONTROLS, LEASE_S, STEP_S, Plane, PlaneControls

from tightwad_agent.testing import node_id

SERVING_S = 40.0
"""Promise: so long after the last disturbance the pool runs. Most of it is back-off after many losses."""
WORST = Net(base=0.005, jitter=0.195, loss=0.05, duplicate=0.02, drops=False)
SETTLE_S = 10.0
EPISODE_S = 1800.0
STALL_S = 2.0
STALL_PAUSE_S = 30.0
"""On the mean, of one node."""


def plan_plane(cluster: Plane, until: float) -> float:
    """Draws what people and disks do; gives the time of the last of it."""
    dice = cluster.dice
    last = until
    for plan_one in (_plan_joins, _plan_removals, _plan_edits, _plan_disks, _plan_clocks):
        last = max(last, plan_one(cluster, dice, until))
    return last


def _plan_joins(cluster: Plane, dice: random.Random, until: float) -> float:
    for k in range(dice.randrange(4)):
        maker = dice.randrange(cluster.n_authorities)
        cluster.at(dice.uniform(3, until), cluster.make_token, maker)
        for j in range(dice.randrange(1, 5)):
            cluster.at(dice.uniform(3, until + 3), _ask_in, cluster, f"j{k}.{j}", k, dice.random(), dice.randrange(4))
        if dice.random() < 0.3:
            cluster.at(dice.uniform(3, until), _revoke, cluster, k, dice.randrange(cluster.n_authorities))
    return until


def _ask_in(cluster: Plane, name: str, k: int, where: float, tries: int) -> None:
    if k < len(cluster.tickets):
        ticket = cluster.tickets[k]
        at = ticket.maker if where < 0.9 else int(where * 1000) % cluster.n_authorities
        cluster.ask_in(node_id(name), ticket, at, tries)


def _revoke(cluster: Plane, k: int, by: int) -> None:
    if k < len(cluster.tickets):
        cluster.revoke(by, cluster.tickets[k])


def _plan_removals(cluster: Plane, dice: random.Random, until: float) -> float:
    n = len(cluster.nodes)
    if n <= cluster.n_authorities or dice.random() < 0.5:
        return until
    at = dice.uniform(7, until)
    cluster.at(at, cluster.throw_out, dice.randrange(cluster.n_authorities), dice.randrange(cluster.n_authorities, n))
    return at


def _plan_edits(cluster: Plane, dice: random.Random, until: float) -> float:
    for _ in range(dice.randrange(5)):
        cluster.at(dice.uniform(2, until), cluster.edit, dice.randrange(len(cluster.nodes)))
    return until


def _plan_disks(cluster: Plane, dice: random.Random, until: float) -> float:
    for _ in range(dice.choice([0, 0, 1, 2])):
        i, at = dice.randrange(len(cluster.nodes)), dice.uniform(2, until)
        what = dice.choice(["full", "torn", "dies"])
        cluster.at(at, _set_disk, cluster, i, what)
        cluster.at(min(until, at + dice.uniform(0.5, 8)), _set_disk, cluster, i, "good")
    return until


def _set_disk(cluster: Plane, i: int, what: str) -> None:
    cluster.extras[i].disk = what


def _plan_clocks(cluster: Plane, dice: random.Random, until: float) -> float:
    for _ in range(dice.choice([0, 0, 1, 2])):
        i, by = dice.randrange(len(cluster.nodes)), dice.choice([-86_400, -60, -5, 5, 60, 86_400])
        cluster.at(dice.uniform(2, until), _jump, cluster, i, by)
    return until


def _jump(cluster: Plane, i: int, by: float) -> None:
    cluster.note(f"n{i}: its clock jumps by {by} s")
    cluster.extras[i].wall += by


def _all_good(cluster: Plane) -> None:
    for x in cluster.extras:
        x.disk = "good"


def run(seed: int, controls: PlaneControls = CONTROLS["none"]) -> Plane:
    """One seed from start to verdict. Raises `Violation`."""
    cluster = Plane(seed, controls)
    try:
        _run(cluster)
    finally:
        cluster.wipe()
    return cluster


def _run(cluster: Plane) -> None:
    for node in cluster.nodes:
        cluster.at(cluster.rnd.uniform(0, 0.5), cluster.start, node.i)
    last = plan_plane(cluster, plan_faults(cluster))
    cluster.at(last, cluster.quiet)
    cluster.at(last, _all_good, cluster)
    cluster.run_until(last)
    settled = _settle(cluster, last)
    cluster.check_agreement()
    n_changes = _n_changes(cluster)
    cluster.run_until(settled + WATCH_S)
    if _n_changes(cluster) != n_changes:
        cluster.fail("the coordinator changed although nothing had happened for 5 s")
    cluster.check_agreement()
    _check_serving(cluster, settled)


def _n_changes(cluster: Plane) -> int:
    """Of the coordinator, as those see it who were not thrown out."""
    return sum(i not in cluster.expelled for _, i, _ in cluster.changes)


def _settle(cluster: Plane, last: float) -> float:
    """To when everything is promised to be quiet; later where something unplanned happened on the way."""
    while True:
        one_way = any((b, a) not in cluster.blocked for a, b in cluster.blocked)
        settled = max(last, cluster.late) + QUIET_S + (ONE_WAY_S if one_way else 0.0)
        if cluster.now >= settled:
            return settled
        cluster.run_until(settled)


def _check_serving(cluster: Plane, settled: float) -> None:
    while not cluster.serving():
        if cluster.now > settled + SERVING_S:
            cluster.fail(f"a pool does not run, {SERVING_S:g} s after everything was quiet")
        cluster.run_until(cluster.now + STEP_S)
    cluster.n_served = sum(x.pool is not None for x in cluster.extras)
    cluster.run_until(cluster.now + LEASE_S + 2 * STEP_S)
    cluster.check_jobs()
    if not cluster.serving():
        cluster.fail("a pool stopped although nothing had happened")
    cluster.check_agreement()


# Calm weeks


def steady(seed: int, seconds: float = EPISODE_S, controls: PlaneControls = CONTROLS["none"]) -> Cluster:
    """A cluster on the worst network that is promised to be borne, whose machines stall for two seconds now and then:
    nobody may be called dead, and the coordinator stays. Raises `Violation`."""
    cluster = Cluster(seed, controls.base, n=3 + seed % 2, net=WORST)
    for node in cluster.nodes:
        node.eligible = True
        cluster.at(0.1 * node.i, cluster.start, node.i)
    cluster.run_until(SETTLE_S)
    cluster.check_agreement()
    n_changes = len(cluster.changes)
    for node in cluster.nodes:
        _stall_later(cluster, node.i)
    cluster.run_until(seconds)
    if cluster.deaths:
        at, observer, victim = cluster.deaths[0]
        cluster.fail(f"n{observer} called n{victim} dead at {at:.3f} s")
    if len(cluster.changes) != n_changes:
        cluster.fail("the coordinator changed")
    return cluster


def _stall_later(cluster: Cluster, i: int) -> None:
    cluster.at(cluster.now + STALL_S + cluster.rnd.expovariate(1 / STALL_PAUSE_S), _stall, cluster, i)


def _stall(cluster: Cluster, i: int) -> None:
    cluster.pause(i, STALL_S)
    _stall_later(cluster, i)


# The command


def _one(task: tuple[int, str, bool]) -> tuple[int, float, str]:
    """(seed, simulated seconds, violation or nothing)."""
    seed, without, is_steady = task
    controls = CONTROLS[without]
    try:
        cluster = steady(seed, controls=controls) if is_steady else run(seed, controls)
    except Violation as violation:
        text = str(violation)
        return seed, 0.0, text.replace("scripts/sim --seeds 1", "scripts/sim --steady --seeds 1") if is_steady else text
    return seed, cluster.now, ""


def _results(tasks: Iterable[tuple[int, str, bool]], jobs: int) -> Iterator[tuple[int, float, str]]:
    if jobs < 2:
        yield from map(_one, tasks)
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(_one, tasks, chunksize=1 if jobs else 8)


def main(argv: list[str]) -> int:
    """Many seeds, or one again. Exit status 1 at a violation, which is printed with its last events."""
    parser = argparse.ArgumentParser(prog="scripts/sim", description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many (default %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="the first seed (default %(default)s)")
    parser.add_argument("--without", choices=list(CONTROLS), default="none", help="switch one mechanism off")
    parser.add_argument("--keep-going", action="store_true", help="run all seeds, print every violation's first line")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default %(default)s)")
    parser.add_argument(
        "--steady", action="store_true", help="half an hour each without faults but loss, jitter and stalls of 2 s"
    )
    options = parser.parse_args(argv)
    began, hours, n_bad, n_run = time.monotonic(), 0.0, 0, 0
    tasks = ((seed, options.without, options.steady) for seed in range(options.start, options.start + options.seeds))
    for _, seconds, violation in _results(tasks, options.jobs):
        hours += seconds / 3600
        n_run += 1
        if violation:
            n_bad += 1
            print(violation.split("\n", 1)[0] if options.keep_going else violation, flush=True)
            if not options.keep_going:
                break
    took = time.monotonic() - began
    print(f"{n_run} seeds, {hours:.2f} cluster-hours in {took:.1f} s: {n_bad} with a violation")
    return 1 if n_bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
