"""Promises of membership and election, one by one, held against simulated clusters; `test_sim_plane` has the seeds."""

from __future__ import annotations

import random

import pytest
from simcluster import STABLE_S, Cluster, Net

from tightwad_agent.mesh.members import State

CALM = Net(base=0.001, jitter=0.002, loss=0.0, duplicate=0.0, drops=False)
SLOW = Net(base=0.05, jitter=0.15, loss=0.0, duplicate=0.0, drops=False)
WORST = Net(base=0.01, jitter=0.19, loss=0.05, duplicate=0.02, drops=False)


def settled(net: Net, n: int = 4, seed: int = 1) -> Cluster:
    """A cluster after its first 8 seconds, all eligible, node 0 coordinating."""
    cluster = Cluster(seed, n=n, net=net)
    for node in cluster.nodes:
        node.eligible = True
        node.klass = n - node.i
        cluster.at(0.1 * node.i, cluster.start, node.i)
    cluster.run_until(8.0)
    cluster.check_agreement()
    assert cluster.nodes[0].election.coordinating
    return cluster


def coordinators(cluster: Cluster) -> list[int | None]:
    """Whom each node obeys, by index."""
    obeyed = (node.election.coordinator for node in cluster.nodes if node.life)
    return [None if c is None else cluster.index[c] for c in obeyed]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("net", [CALM, SLOW], ids=["calm", "slow"])
def test_a_killed_process_is_known_to_all_within_a_second(net: Net, seed: int) -> None:
    cluster = settled(net, seed=seed)
    victim = seed % 4
    cluster.crash(victim, power=False)
    cluster.run_until(9.0)
    assert [cluster.state(i, victim) for i in range(4) if i != victim] == [State.DEAD] * 3


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("net", [CALM, SLOW, WORST], ids=["calm", "slow", "worst"])
def test_a_silent_death_is_known_to_all_within_five_seconds(net: Net, seed: int) -> None:
    cluster = settled(net, seed=seed)
    victim = seed % 4
    cluster.crash(victim, power=True)
    cluster.run_until(13.0)
    assert [cluster.state(i, victim) for i in range(4) if i != victim] == [State.DEAD] * 3


@pytest.mark.parametrize("seed", range(10))
def test_another_coordinates_within_two_seconds_of_a_kill(seed: int) -> None:
    cluster = settled(SLOW, seed=seed)
    cluster.crash(0, power=False)
    cluster.run_until(10.0)
    assert coordinators(cluster)[1:] == [1, 1, 1]


@pytest.mark.parametrize("seed", range(30))
def test_stalls_of_two_seconds_under_loss_and_jitter_kill_nobody(seed: int) -> None:
    cluster = settled(WORST, n=3 + seed % 3, seed=seed)
    rnd = random.Random(seed)
    for k in range(8):
        cluster.at(9.0 + 6 * k, cluster.pause, rnd.randrange(len(cluster.nodes)), 2.0)
    n_changes = len(cluster.changes)
    cluster.run_until(60.0)
    assert cluster.deaths == []
    assert len(cluster.changes) == n_changes


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("victim", [0, 2])
def test_a_node_that_slept_ten_seconds_comes_back_as_itself(victim: int, seed: int) -> None:
    cluster = settled(SLOW, seed=seed)
    changes = len(cluster.changes)
    cluster.pause(victim, 10.0)
    cluster.run_until(18.0)
    asleep = cluster.changes[changes:]
    assert {i for _, i, epoch in asleep if epoch is not None} == ({1, 2, 3} if victim == 0 else set())
    cluster.run_until(23.0)
    cluster.check_agreement()
    back = cluster.changes[changes + len(asleep) :]
    assert {i for _, i, _ in back} <= {victim}, "the others noticed a change of coordinator when it came back"
    assert len(back) <= 1
    assert cluster.nodes[victim].life == 1
    assert cluster.nodes[victim].members.incarnation > 1  # it contradicted its own death
    seen = len(cluster.changes)
    cluster.run_until(33.0)
    assert len(cluster.changes) == seen


def test_one_cut_link_in_a_mesh_changes_nothing_but_is_shown() -> None:
    cluster = settled(CALM)
    changes = len(cluster.changes)
    cluster.cut([(0, 3), (3, 0)], "link")
    cluster.run_until(30.0)
    assert len(cluster.changes) == changes
    assert cluster.deaths == []
    views = {p.node: p for p in cluster.nodes[3].members.snapshot().peers}
    view = views[cluster.nodes[0].id]
    assert (view.state, view.reach) == (State.ALIVE, "indirect")
    assert "not reachable from here" in view.reason


def test_a_chain_of_nodes_is_one_component() -> None:
    cluster = settled(CALM)
    pairs = [(a, b) for a in range(4) for b in range(4) if abs(a - b) > 1]
    cluster.cut(pairs, "chain")
    cluster.run_until(30.0)
    cluster.check_agreement()
    assert cluster.deaths == []


def test_a_node_that_cannot_hear_does_not_depose_the_coordinator_of_the_others() -> None:
    cluster = settled(CALM)
    cluster.cut([(i, 3) for i in range(3)], "deaf")
    cluster.run_until(20.0)
    cluster.check_agreement()
    assert coordinators(cluster)[:3] == [0, 0, 0]
    assert cluster.nodes[0].election.epoch.counter == 1


def test_both_sides_of_a_partition_serve_and_one_gives_way() -> None:
    cluster = settled(CALM)
    pairs = [(a, b) for a in (0, 1) for b in (2, 3)]
    pairs += [(b, a) for a, b in pairs]
    cluster.cut(pairs, "partition")
    cluster.run_until(13.0)
    assert coordinators(cluster) == [0, 0, 2, 2]
    cluster.heal(pairs)
    cluster.run_until(18.0)
    cluster.check_agreement()
    assert coordinators(cluster) == [2, 2, 2, 2]  # the higher epoch


def test_the_first_node_ever_coordinates_soon_and_a_second_one_joins_it() -> None:
    cluster = Cluster(3, n=2, net=CALM)
    for node in cluster.nodes:
        node.eligible = True
    cluster.start(0)
    cluster.nodes[0].unresolved.clear()
    cluster.feed_view(cluster.nodes[0])
    cluster.run_until(1.1)
    assert coordinators(cluster) == [0]
    cluster.start(1)
    cluster.run_until(4.0)
    assert coordinators(cluster) == [0, 0]
    assert cluster.nodes[1].election.epoch.counter == 1


def test_a_quick_restart_of_the_coordinator_makes_a_new_term() -> None:
    cluster = settled(CALM)
    cluster.crash(0, power=False)
    cluster.at(8.1, cluster.start, 0)
    cluster.run_until(13.1)
    cluster.check_agreement()
    assert all(epoch.counter <= 3 for epoch in cluster.obeyed)
    assert len(cluster.claims) == 2


def test_the_leaving_coordinator_hands_over_and_is_not_called_dead() -> None:
    cluster = settled(SLOW)
    cluster.leave(0)
    cluster.run_until(9.5)
    assert coordinators(cluster)[1:] == [1, 1, 1]
    assert [cluster.state(i, 0) for i in (1, 2, 3)] == [State.LEFT] * 3
    cluster.run_until(8.0 + STABLE_S)
    assert [cluster.state(i, 0) for i in (1, 2, 3)] == [State.LEFT] * 3


def test_a_stronger_node_that_returns_does_not_take_over() -> None:
    cluster = settled(CALM)
    cluster.crash(0, power=True)
    cluster.at(16.0, cluster.start, 0)
    cluster.run_until(22.0)
    assert coordinators(cluster) == [1, 1, 1, 1]


def test_handing_over_moves_the_office_and_leaves_the_node_in() -> None:
    cluster = settled(CALM)
    cluster.hand_over(0)
    cluster.run_until(8.5)
    assert coordinators(cluster) == [1, 1, 1, 1]
    cluster.run_until(20.0)
    assert coordinators(cluster) == [1, 1, 1, 1]
