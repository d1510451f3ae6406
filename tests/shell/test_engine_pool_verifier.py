"""The pool with the verifier: a program that only speaks its frames, over memory streams and real processes."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from engine_fakes import POLICY, Rig, phase, until

from tightwad_agent.engine.plan import DeviceUse
from tightwad_agent.engine.pool import PoolPhase, PoolService
from tightwad_agent.engine.restart import RestartPolicy
from tightwad_agent.engine.target import PoolLimits
from tightwad_agent.engine.verifying import VerifierClient
from tightwad_agent.errors import EngineStopped, NotReady, PeerGone
from tightwad_agent.wire.verify import GREEDY, Accepted, Ended, unpack_tokens


@pytest.fixture
def rig(nursery: trio.Nursery, tmp_path: Path) -> Rig:
    return Rig(nursery, tmp_path)


class Inbox:
    """What a request was told."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def __call__(self, event: Any) -> None:
        self.events.append(event)

    async def tokens(self, n: int) -> list[int]:
        """All tokens, once there are so many."""
        await until(lambda: sum(len(e.pieces) for e in self.events if isinstance(e, Accepted)) >= n)
        return [token for e in self.events for token in unpack_tokens(e.tokens)]


async def ready(pool: PoolService, other_than: VerifierClient | None = None) -> VerifierClient:
    await until(lambda: pool.state.phase is PoolPhase.READY and pool.state.verifier is not other_than)
    assert pool.state.verifier is not None
    return pool.state.verifier


def verifiers() -> list[psutil.Process]:
    return [p for p in children() if "tightwad_agent.wire.verify" in " ".join(p.cmdline())]


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


async def test_it_loads_and_answers(rig: Rig) -> None:
    pool, worker = await rig.pool(), await rig.worker("w")
    pool.set_target(rig.spec(worker, verified=True))
    verifier = await ready(pool)
    assert (pool.state.port, pool.state.engine, pool.state.engine_reason) == (None, "verifier", "")
    assert (verifier.info.context, verifier.info.slots) == (512, 4)
    assert await verifier.tokenize(b"ab") == [97, 98]
    assert await verifier.detokenize([98, 97]) == b"ba"
    inbox = Inbox()
    request = verifier.open([5, 5, 5], GREEDY, max_tokens=7, deliver=inbox)
    assert await inbox.tokens(1) == [3]
    request.round(4, [4, 5, 0, 7], 1)
    assert await inbox.tokens(5) == [3, 4, 5, 6, 7]
    assert [(e.n_draft, e.n_accepted) for e in inbox.events] == [(0, 0), (4, 2), (0, 0)]
    request.round(8, [], 100)
    assert await inbox.tokens(7) == [3, 4, 5, 6, 7, 8, 9]
    assert inbox.events[-1].ended is Ended.LENGTH
    request.close()
    log = (rig.tmp_path / "c" / "logs" / "verifier.log").read_text()
    assert f"rpc_ports=({pool._attempt.forwarders[0].port},), rpc_shares=(1024,)" in log  # type: ignore[union-attr]
    assert f"library='{rig.fake.folder}'" in log
    assert not (rig.tmp_path / "c" / "logs" / "llama-server.log").exists()


async def test_an_engine_that_it_does_not_know_is_served_by_llama_server_and_the_state_says_why(rig: Rig) -> None:
    pool = await rig.pool()
    rig.fake.control(verifier="refuse", refused={"kind": "build", "reason": "it is b9999"})
    pool.set_target(rig.spec(verified=True))
    await phase(pool, PoolPhase.READY)
    assert pool.state.port is not None
    assert pool.state.verifier is None
    assert pool.state.engine == "llama-server"
    assert pool.state.engine_reason == "llama-server: the verifier does not know this libllama: it is b9999"
    assert pool.events[0].text == pool.state.engine_reason
    assert rig.losses == []
    assert verifiers() == []


async def test_no_memory_names_bytes_and_device_and_is_not_tried_again_at_once(rig: Rig) -> None:
    pool = await rig.pool()
    refused = {"kind": "memory", "reason": "the allocation failed", "needed": 98_400_000, "device": "CUDA0"}
    rig.fake.control(verifier="refuse", refused=refused)
    pool.set_target(rig.spec(verified=True))
    await phase(pool, PoolPhase.FAILED)
    [loss] = rig.losses
    assert (loss.node, loss.excluded, loss.crash) == (None, True, False)
    assert pool.state.text == "out of memory while loading: 98.4 MB needed on CUDA0: the allocation failed"
    await trio.sleep(0.3)
    assert pool.state.restarts == 0


async def test_no_memory_on_a_worker_is_about_that_worker(rig: Rig) -> None:
    pool, workers = await rig.pool(), [await rig.worker("v"), await rig.worker("w")]
    refused = {"kind": "memory", "reason": "no", "needed": 0, "device": "RPC2[127.0.0.1:7]"}
    rig.fake.control(verifier="refuse", refused=refused)
    spec = rig.spec(*workers, verified=True)
    first, second = spec.plan.workers
    first = replace(first, devices=(DeviceUse("CPU", 1 << 30), DeviceUse("CPU", 1 << 30)))
    for worker in workers:
        worker.service._offered = lambda: ("CPU", "CPU")
    pool.set_target(replace(spec, plan=replace(spec.plan, workers=(first, second))))
    await phase(pool, PoolPhase.FAILED)
    assert rig.losses[0].node == workers[1].id
    assert f"too little on CPU of {workers[1].id.short}: no" in pool.state.text


async def test_a_model_that_cannot_be_loaded_is_not_tried_again(rig: Rig) -> None:
    pool = await rig.pool()
    rig.fake.control(verifier="refuse", refused={"kind": "model", "reason": "unknown architecture"})
    pool.set_target(rig.spec(verified=True))
    await phase(pool, PoolPhase.FAILED)
    assert pool.state.text == "the verifier cannot load this model: unknown architecture"
    assert pool.state.restarts == 0
    rig.fake.control()
    pool.set_target(rig.spec(verified=True))
    await ready(pool)


async def test_a_refusal_counts_though_it_is_read_after_the_end_of_the_process(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = VerifierClient.run

    async def late(client: VerifierClient) -> str:
        await trio.sleep(0.4)
        return await run(client)

    monkeypatch.setattr(VerifierClient, "run", late)
    pool = await rig.pool()
    rig.fake.control(verifier="refuse", refused={"kind": "model", "reason": "no"})
    pool.set_target(rig.spec(verified=True))
    await until(lambda: bool(rig.losses))
    assert rig.losses[0].reason == "the verifier cannot load this model: no"


@pytest.mark.parametrize("kind", ["device", "internal", "something new"])
async def test_another_refusal_is_tried_again_and_then_given_up(rig: Rig, kind: str) -> None:
    pool = await rig.pool()
    rig.fake.control(verifier="refuse", refused={"kind": kind, "reason": "no"})
    pool.set_target(rig.spec(verified=True))
    await phase(pool, PoolPhase.FAILED)
    assert "verifier ended 4 times in a row" in pool.state.text
    assert f"the verifier gave up ({kind}): no" in pool.state.text
    assert len(rig.losses) == POLICY.max_crashes


ENDINGS = [
    ("exit", "the verifier exited with code 1: error: no such thing"),
    ("abort", "the verifier was ended by SIGABRT: a worker's connection broke"),
    ("garbage", "the verifier sent what is no message: frame of"),
]


@pytest.mark.parametrize(("how", "reason"), [*ENDINGS, ("close", "the verifier closed its connection")])
async def test_an_end_while_loading(rig: Rig, how: str, reason: str) -> None:
    pool, worker = await rig.pool(policy=RestartPolicy(first_delay_s=0.3, factor=1)), await rig.worker("w")
    rig.fake.control(verifier=how)
    pool.set_target(rig.spec(worker, verified=True))
    await until(lambda: bool(rig.losses))
    assert rig.losses[0].reason.startswith(reason)
    assert rig.losses[0].crash
    assert verifiers() == []
    rig.fake.control()
    await ready(pool)


@pytest.mark.parametrize(("how", "reason"), ENDINGS)
async def test_an_end_while_serving_is_told_to_each_request_once(rig: Rig, how: str, reason: str) -> None:
    pool, worker = await rig.pool(), await rig.worker("w")
    rig.fake.control(open=how)
    pool.set_target(rig.spec(worker, verified=True))
    verifier = await ready(pool)
    inboxes = [Inbox(), Inbox()]
    for inbox in inboxes:
        verifier.open([1], GREEDY, max_tokens=5, deliver=inbox)
    rig.fake.control()
    other = await ready(pool, other_than=verifier)
    assert [[type(event) for event in inbox.events] for inbox in inboxes] == [[PeerGone]] * 2
    assert rig.losses[0].reason.startswith(reason)
    assert pool.state.restarts == 1
    assert not verifier.alive
    assert await other.tokenize(b"a") == [97]


async def test_a_killed_verifier_comes_back(rig: Rig) -> None:
    pool, worker = await rig.pool(), await rig.worker("w")
    pool.set_target(rig.spec(worker, verified=True))
    verifier, inbox = await ready(pool), Inbox()
    request = verifier.open([1], GREEDY, max_tokens=5, deliver=inbox)
    await inbox.tokens(1)
    [process] = verifiers()
    process.kill()
    await until(lambda: len(inbox.events) == 2)
    assert isinstance(inbox.events[1], PeerGone)
    assert inbox.events[1].message == "the verifier closed its connection"  # seen before the process was reaped
    request.round(2, [], 0)
    request.close()
    with pytest.raises(PeerGone):
        await verifier.tokenize(b"a")
    with pytest.raises(NotReady):
        verifier.open([1], GREEDY, max_tokens=5, deliver=inbox)
    await ready(pool, other_than=verifier)
    assert "the verifier was ended by SIGKILL: most likely the system ran out of memory" in rig.losses[0].reason
    assert {s.phase for s in rig.states if s.verifier or s.port} == {PoolPhase.READY}
    assert len(inbox.events) == 2


async def test_what_is_lost_is_not_ready_from_that_moment_on(rig: Rig) -> None:
    pool, worker = await rig.pool(), await rig.worker("w")
    pool.set_target(rig.spec(worker, verified=True))
    verifier = await ready(pool)
    pool.worker_lost(worker.id, "no heartbeat")
    assert pool.state.phase is PoolPhase.RESTARTING
    assert pool.state.verifier is None
    assert not verifier.alive
    await ready(pool, other_than=verifier)
    assert pool.state.restarts == 1


async def test_a_lost_worker_is_told_to_the_requests_at_once(rig: Rig) -> None:
    pool, worker = await rig.pool(limits=PoolLimits(start_worker_s=8, grace_s=30)), await rig.worker("w")
    rig.fake.control(open="hang")
    pool.set_target(rig.spec(worker, verified=True))
    verifier, inbox = await ready(pool), Inbox()
    verifier.open([1], GREEDY, max_tokens=5, deliver=inbox)
    os.kill(worker.pid, signal.SIGKILL)
    await until(lambda: bool(inbox.events))
    assert inbox.events[0].message == f"{worker.id.short}: the connection to its worker ended"
    assert type(inbox.events[0]) is PeerGone  # a request may have done that
    again, inbox = await ready(pool, other_than=verifier), Inbox()
    again.open([1], GREEDY, max_tokens=5, deliver=inbox)
    pool.worker_lost(worker.id, "no heartbeat")
    await until(lambda: bool(inbox.events))
    assert type(inbox.events[0]) is EngineStopped


async def test_another_target_ends_its_requests(rig: Rig) -> None:
    pool = await rig.pool()
    pool.set_target(rig.spec(verified=True))
    verifier, inbox = await ready(pool), Inbox()
    verifier.open([1], GREEDY, max_tokens=5, deliver=inbox)
    await inbox.tokens(1)
    pool.set_target(rig.spec())
    await until(lambda: pool.state.port is not None)
    assert [type(event) for event in inbox.events] == [Accepted, EngineStopped]
    assert pool.state.engine == "llama-server"
    assert verifiers() == []


@pytest.mark.parametrize("how", ["round", "free"])
async def test_a_stopped_verifier_is_a_stall(rig: Rig, how: str) -> None:
    """Also where it stops between rounds that go on by themselves: then it owes nothing that was counted. What stands
    still is not asked politely to end."""
    pool = await rig.pool(stall_s=1.2, limits=PoolLimits(start_worker_s=8, grace_s=60, frozen_s=60))
    pool.set_target(rig.spec(verified=True))
    verifier, inbox = await ready(pool), Inbox()
    request = verifier.open([1], GREEDY, max_tokens=50, deliver=inbox)
    await inbox.tokens(1)
    [process] = verifiers()
    process.suspend()
    if how == "round":
        request.round(2, [2, 3], 0)
    await until(lambda: bool(rig.losses))
    assert rig.losses[0].reason.startswith("no progress for 1.2 s while 1 request waits")
    assert isinstance(inbox.events[-1], PeerGone)
    await ready(pool, other_than=verifier)


async def test_a_verifier_that_somebody_stopped_is_no_request_s_doing(rig: Rig) -> None:
    pool = await rig.pool(stall_s=60, limits=PoolLimits(start_worker_s=8, frozen_s=0.4))
    pool.set_target(rig.spec(verified=True))
    verifier, inbox = await ready(pool), Inbox()
    verifier.open([1], GREEDY, max_tokens=50, deliver=inbox)
    await inbox.tokens(1)
    [process] = verifiers()
    process.suspend()
    await until(lambda: isinstance(inbox.events[-1], PeerGone))
    assert type(inbox.events[-1]) is EngineStopped
    assert "was stopped (SIGSTOP)" in inbox.events[-1].message


async def test_a_prompt_gets_four_times_the_patience(rig: Rig) -> None:
    pool = await rig.pool(stall_s=0.4)
    rig.fake.control(open="hang")
    pool.set_target(rig.spec(verified=True))
    verifier, inbox = await ready(pool), Inbox()
    verifier.open([1], GREEDY, max_tokens=50, deliver=inbox)
    await until(lambda: bool(rig.losses))
    assert rig.losses[0].reason.startswith("no progress for 1.6 s while 1 request waits")


async def test_requests_that_ask_for_nothing_are_no_stall(rig: Rig) -> None:
    pool = await rig.pool(stall_s=0.3)
    pool.set_target(rig.spec(verified=True))
    verifier, inbox = await ready(pool), Inbox()
    verifier.open([1], GREEDY, max_tokens=50, deliver=inbox)
    await trio.sleep(1.5)
    assert rig.losses == []
    assert len(inbox.events) == 1


async def test_loading_has_a_deadline_and_shows_what_the_verifier_says(rig: Rig) -> None:
    pool = await rig.pool(limits=PoolLimits(load_s=1.5, load_bytes_per_s=1e9))
    rig.fake.control(verifier="loading")
    pool.set_target(rig.spec(verified=True))
    await until(lambda: pool.state.percent == 7)
    assert pool.state.text == "loading 7 %"
    await until(lambda: bool(rig.losses))
    assert "was not loaded within" in rig.losses[0].reason


async def test_loading_into_a_pool_must_move_bytes(rig: Rig) -> None:
    pool, worker = await rig.pool(stall_s=1.5), await rig.worker("w")
    rig.fake.control(verifier="mute")
    pool.set_target(rig.spec(worker, verified=True))
    await until(lambda: bool(rig.losses))
    assert "loading stood still" in rig.losses[0].reason
    assert not rig.losses[0].crash


async def test_a_verifier_that_cannot_be_started(rig: Rig) -> None:
    pool = await rig.pool(verifier=lambda fd: ["/nonexistent/python", str(fd)])
    pool.set_target(rig.spec(verified=True))
    await phase(pool, PoolPhase.FAILED)
    assert "exited with code 127: cannot run /nonexistent/python" in pool.state.text


@pytest.mark.parametrize("when", ["loading", "ready", "serving"])
async def test_cancelled_in_each_phase_nothing_is_left(tmp_path: Path, when: str) -> None:
    inbox = Inbox()
    n_fds = len(os.listdir("/proc/self/fd"))
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            rig = Rig(nursery, tmp_path)
            pool, worker = await rig.pool(), await rig.worker("w")
            rig.fake.control(verifier="loading" if when == "loading" else "ok", open="hang")
            pool.set_target(rig.spec(worker, verified=True))
            await until(lambda: pool.state.phase is (PoolPhase.LOADING if when == "loading" else PoolPhase.READY))
            await until(verifiers)
            if when == "serving":
                assert pool.state.verifier is not None
                pool.state.verifier.open([1], GREEDY, max_tokens=5, deliver=inbox)
            nursery.cancel_scope.cancel()
    assert children() == []
    assert [type(event) for event in inbox.events] == ([EngineStopped] if when == "serving" else [])
    assert len(os.listdir("/proc/self/fd")) <= n_fds + 3  # trio's own
