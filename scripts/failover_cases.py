"""Cases of `scripts/bench failover` that are about who is there: what the cluster knows, and how soon."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from failover_bench import N_WORKERS, Bench, Case, Figures
from failover_flood import Plan
from failover_lab import LIVING, Cluster
from failover_table import Goal, deaths, latest_heartbeat_s, old_commands
from lab import Agent, LabError

LIMIT_S = 30.0
STOPPED_S = 10.0
WATCHED_S = 10.0
"""How long nothing may happen any more after a machine came back."""
JOIN_S = 60.0
SPINNERS_PER_CORE = 2
MB = 1e6
MOST_GROWTH_MB = 64.0
HEARTBEAT_LATE_S = 2.5
"""Without news for so long beyond the period, a living machine would be suspected."""
NONE = 0.0


def killed(bench: Bench) -> Figures:
    """SIGKILL: everybody else calls it dead."""
    cluster = bench.members()
    victim = bench.pick(bench.others(cluster.coordinator()))
    at = cluster.kill(victim)
    took_s = _all_know(cluster, bench.others(victim), victim, at)
    cluster.revive(victim)
    return {"killed": took_s}


def cut(bench: Bench) -> Figures:
    """Its cable leads nowhere, and nothing says so."""
    cluster = bench.members()
    victim = bench.pick(cluster.agents)
    at = cluster.cut(victim)
    try:
        took_s = _all_know(cluster, bench.others(victim), victim, at)
    finally:
        cluster.heal()
    return {"cut": took_s}


def _all_know(cluster: Cluster, others: Sequence[Agent], victim: Agent, since: float) -> float:
    return cluster.known_s(others, lambda a: cluster.states(a).get(victim.name) == "dead", since, LIMIT_S)


def elected(bench: Bench) -> Figures:
    """The coordinator dies: all others obey one and the same that lives."""
    cluster = bench.members()
    old = cluster.coordinator()
    others = bench.others(old)
    at = cluster.kill(old)
    took_s = _one_coordinator(cluster, others, at, "", old.name)
    cluster.revive(old)
    return {"elected": took_s}


def _one_coordinator(cluster: Cluster, agents: Sequence[Agent], since: float, *never: str) -> float:
    """Seconds from `since` until they agree. Raises `LabError`."""

    def one() -> bool:
        found = {cluster.coordinator_of(agent) for agent in agents}
        return len(found) == 1 and not found & set(never)

    cluster.until(one, "for one coordinator", LIMIT_S)
    return time.monotonic() - since


def stopped(bench: Bench) -> Figures:
    """SIGSTOP to all of a machine for ten seconds: it comes back as itself, and then nothing changes any more."""
    cluster = bench.members()
    victim = bench.pick(cluster.agents)
    me = _id(cluster, victim)
    bench.facts["coordinator"] = cluster.coordinator() is victim
    cluster.stop(victim)
    try:
        time.sleep(STOPPED_S)
    finally:
        at = cluster.go_on(victim)
    cluster.until(cluster.agree, "for all to see all again", LIMIT_S)
    back_s = time.monotonic() - at
    settled = time.monotonic()
    time.sleep(WATCHED_S)
    if _id(cluster, victim) != me:
        raise LabError(f"{victim.name} came back as another")
    notes = cluster.trace(settled)
    flaps = [n for n in notes if n["what"] == "obeys" or n.get("new") in ("dead", "left")]
    bench.facts |= {"flaps": flaps[:8], "suspicions": sum(n.get("new") == "suspect" for n in notes)}
    return {"stopped": back_s, "stopped-flaps": len(flaps)}


def _id(cluster: Cluster, agent: Agent) -> str:
    (mine,) = [p for p in cluster.door(agent).call("peers")["peers"] if p["self"]]
    return str(mine["id"])


def partitioned(bench: Bench) -> Figures:
    """Two and two: each side answers requests; after healing there is one coordinator. Old commands are not obeyed."""
    cluster = bench.serving()
    prompt = bench.prompt(1)
    began = time.monotonic()
    order = bench.rng.sample(cluster.agents, len(cluster.agents))
    sides = order[: len(order) // 2], order[len(order) // 2 :]
    at = cluster.split(*sides)
    try:
        served_s = max(_first_answers(cluster, [side[0] for side in sides], prompt.request(stream=False), at))
        time.sleep(max(0.0, at + bench.options.partition_s - time.monotonic()))
    finally:
        healed_at = cluster.heal()
    cluster.until(lambda: _same(cluster), "for one coordinator of all", LIMIT_S)
    healed_s = time.monotonic() - healed_at
    cluster.settle()
    broken = old_commands(cluster.trace())
    bench.facts |= {"took_s": round(time.monotonic() - began, 1), "old_commands": broken}
    return {"partition-served": served_s, "partition-healed": healed_s, "partition-old": len(broken)}


def _same(cluster: Cluster) -> bool:
    found = {cluster.coordinator_of(agent) for agent in cluster.agents}
    return len(found) == 1 and "" not in found


def _first_answers(cluster: Cluster, asked: Sequence[Agent], body: dict[str, object], since: float) -> list[float]:
    """Seconds until each has answered a request of a few tokens that was made right after the cut."""
    took: list[float] = []
    problems: list[str] = []

    def one(agent: Agent) -> None:
        answer = cluster.ask(agent, {**body, "max_tokens": 4})
        problems.extend([f"{agent.name}: {answer.problem}"] if answer.problem else [])
        took.append(answer.ended - since)

    threads = [threading.Thread(target=one, args=(agent,), daemon=True) for agent in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise LabError("; ".join(problems))
    return took


def joined(bench: Bench) -> Figures:
    """A new machine with a token and nothing else: from the first sight of its cluster until all see it alive."""
    cluster = bench.members()
    with_addresses = bench.rng.random() < 0.5
    at = time.monotonic()
    try:
        known_s = _join(cluster, with_addresses)
        seen_at = _discovered(cluster, at, "joining" if with_addresses else "sighted")
        bench.facts |= {"from_start_s": known_s, "by": "address" if with_addresses else "mdns"}
    finally:
        _forget(cluster, cluster.spare)
    return {"joined": at + known_s - seen_at}


def _join(cluster: Cluster, with_addresses: bool) -> float:
    """Seconds from before the spare machine's start until all others see it alive. Raises `LabError`."""
    spare = cluster.spare
    shutil.rmtree(spare.state_dir, ignore_errors=True)
    token = cluster.token(with_addresses=with_addresses)
    at = time.monotonic()
    spare.start(token)
    return cluster.known_s(cluster.agents, lambda a: cluster.states(a).get(spare.name) == "alive", at, JOIN_S)


def _discovered(cluster: Cluster, since: float, what: str) -> float:
    return float(next(note["t"] for note in cluster.trace(since) if note["what"] == what))


def revoked(bench: Bench) -> Figures:
    """A member is removed by another: nobody has a connection with it any more, and nobody counts it among the
    living."""
    cluster = bench.members()
    spare = cluster.spare
    try:
        _join(cluster, with_addresses=True)
        cluster.until(lambda: cluster.agree_on(spare), "for the new machine to see all", JOIN_S)
        remover = bench.pick(cluster.agents)
        address, me = cluster.address(spare), _id(cluster, spare)
        at = time.monotonic()
        cluster.door(remover).call("node.remove", {"node": me})

        def cut_off(agent: Agent) -> bool:
            living = cluster.states(agent).get(spare.name) in LIVING
            return not living and not connected(agent, address)

        took_s = cluster.known_s(cluster.agents, cut_off, at, LIMIT_S)
        bench.facts["by"] = remover.name
    finally:
        cluster.kill(spare)
    return {"revoked": took_s}


def connected(agent: Agent, address: str) -> bool:
    """Whether the agent has a connection with a machine."""
    assert agent.process is not None
    found = psutil.Process(agent.process.pid).net_connections("tcp")
    return any(c.raddr and c.raddr.ip.removeprefix("::ffff:") == address and c.status == "ESTABLISHED" for c in found)


def _forget(cluster: Cluster, spare: Agent) -> None:
    """The spare machine leaves, and is as new."""
    if spare.process is not None and spare.process.poll() is None:
        spare.cli("leave", "--yes")
        spare.process.wait(LIMIT_S)
    cluster.until(lambda: cluster.states(cluster.agents[0]).get(spare.name) in (None, "left", "dead"), "to go", LIMIT_S)


def loaded(bench: Bench) -> Figures:
    """All cores busy with something else: nobody is declared dead."""
    cluster = bench.serving()
    spin = [sys.executable, "-c", "while True: pass"]
    n = SPINNERS_PER_CORE * (psutil.cpu_count() or 1)
    began = time.monotonic()
    busy = [subprocess.Popen(spin) for _ in range(n)]
    try:
        time.sleep(bench.options.load_s)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    notes = cluster.trace(began)
    bench.facts |= {"seconds": round(time.monotonic() - began), "spinners": n}
    return {"loaded": deaths(notes), "loaded-late": latest_heartbeat_s(notes)}


def flooded(bench: Bench) -> Figures:
    """Garbage at every open port, slow connections, oversized frames and heads, all at once, from one machine that
    runs a process for each of those it sends to."""
    return _flood(bench, "flooded", [bench.serving().agents])


def flooded_in_turn(bench: Bench) -> Figures:
    """The same at all ports of one machine after the other, where all at once are more than the cores can send."""
    return _flood(bench, "flooded-turn", [[agent] for agent in bench.serving().agents])


def _flood(bench: Bench, name: str, turns: Sequence[Sequence[Agent]]) -> Figures:
    cluster = bench.cluster
    before, most, began = cluster.rss(), cluster.rss(), time.monotonic()
    told = []
    for agents in turns:
        floods = [_flood_at(bench, agent) for agent in agents]
        ends = time.monotonic() + bench.options.flood_s + LIMIT_S
        while any(flood.poll() is None for flood in floods) and time.monotonic() < ends:
            for at, rss in cluster.rss().items():
                most[at] = max(most[at], rss)
            time.sleep(0.2)
        told += [json.loads(_output(flood)) for flood in floods]
    notes = cluster.trace(began)
    bench.facts |= {"floods": told, "rss_mb": {n: round(r / MB, 1) for n, r in most.items()}}
    cluster.settle(workers=N_WORKERS)
    return {
        name: deaths(notes),
        f"{name}-late": latest_heartbeat_s(notes),
        f"{name}-memory": max(most[at] - before[at] for at in before) / MB,
        f"{name}-rate": statistics.mean(one["rate"] for one in told),
    }


def _flood_at(bench: Bench, agent: Agent) -> subprocess.Popen[bytes]:
    net, host, options = bench.cluster.lab.net, bench.cluster.address(agent), bench.options
    assert net is not None
    ports = [(host, agent.mesh_port, True), (host, agent.endpoint_port, False)]
    plan = Plan(ports=ports, rate=options.flood_rate, seconds=options.flood_s, seed=bench.rng.getrandbits(32))
    argv = [sys.executable, str(Path(__file__).with_name("failover_flood.py")), plan.text()]
    return net.popen(len(bench.cluster.agents), argv, stdout=subprocess.PIPE)


def _output(flood: subprocess.Popen[bytes]) -> bytes:
    """What it said at its end. Raises `LabError` where it did not come to one."""
    if flood.poll() is None:
        flood.kill()
        flood.communicate()
        raise LabError("the flood did not end in time")
    return bytes(flood.communicate()[0])


def _flood_goals(name: str, what: str) -> dict[str, Goal]:
    return {
        name: Goal(f"{what}: nodes declared dead", p99=NONE, unit=""),
        f"{name}-late": Goal("the same: longest silence of a neighbour beyond 1 s", p99=HEARTBEAT_LATE_S),
        f"{name}-memory": Goal("the same: growth of an agent's memory", p99=MOST_GROWTH_MB, unit="MB"),
        f"{name}-rate": Goal("the same: connections a second that reached each port", unit=""),
    }


CASES: dict[str, Case] = {
    "killed": Case(killed, {"killed": Goal("agent killed: known to all", p99=1.0)}),
    "cut": Case(cut, {"cut": Goal("link of a machine cut: known to all", p99=5.0)}),
    "elected": Case(elected, {"elected": Goal("coordinator killed: another elected", p99=5.0)}),
    "stopped": Case(
        stopped,
        {
            "stopped": Goal("machine stopped for 10 s and continued: back as itself, one coordinator"),
            "stopped-flaps": Goal("the same: deaths and elections in the 10 s afterwards", p99=NONE, unit=""),
        },
    ),
    "partition": Case(
        partitioned,
        {
            "partition-served": Goal("partition of 4 into 2 + 2: each side answers", p99=10.0),
            "partition-healed": Goal("the same, healed: one coordinator", p99=5.0),
            "partition-old": Goal("the same: commands of an old epoch obeyed", p99=NONE, unit=""),
        },
    ),
    "joined": Case(joined, {"joined": Goal("join by token alone, cold, from discovery", p99=2.0)}),
    "revoked": Case(revoked, {"revoked": Goal("node removed by another: cut off everywhere", p99=5.0)}),
    "loaded": Case(
        loaded,
        {
            "loaded": Goal("full CPU load: false deaths", p99=NONE, unit=""),
            "loaded-late": Goal("the same: longest silence of a neighbour beyond 1 s"),
        },
        runs=lambda _: 1,
    ),
    "flooded": Case(flooded, _flood_goals("flooded", "flood at all ports at once"), runs=lambda _: 1),
    "flooded-turn": Case(
        flooded_in_turn, _flood_goals("flooded-turn", "flood at the ports of one machine after the other"), lambda _: 1
    ),
}
