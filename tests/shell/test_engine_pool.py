"""Workers, forwarders and the pool, over memory streams and with programs that only look like llama.cpp's."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from engine_fakes import BUSY, POLICY, Rig, Worker, phase, until

from tightwad_agent.engine.attempt import PoolLimits
from tightwad_agent.engine.frozen import frozen, is_stopped
from tightwad_agent.engine.pool import PoolPhase, PoolService
from tightwad_agent.engine.restart import RestartPolicy
from tightwad_agent.engine.watchdog import Progress, StallClock, parse_slots
from tightwad_agent.engine.worker import WorkerLimits, WorkerPhase
from tightwad_agent.errors import RemoteError
from tightwad_agent.ids import Epoch, ModelId


@pytest.fixture
def rig(nursery: trio.Nursery, tmp_path: Path) -> Rig:
    return Rig(nursery, tmp_path)


def order(epoch: Epoch, *devices: str, run: int = 0) -> dict[str, Any]:
    return {"epoch": list(epoch), "devices": list(devices or ("CPU",)), "run": run}


async def start(rig: Rig, worker: Worker, epoch: Epoch | None = None, run: int = 0) -> dict[str, Any]:
    with trio.fail_after(20):
        return await rig.home.call(worker.id, "worker.start", order(epoch or rig.epoch, run=run))


async def refused(rig: Rig, worker: Worker, code: str, params: dict[str, Any], method: str = "worker.start") -> str:
    with pytest.raises(RemoteError) as caught, trio.fail_after(20):
        await rig.home.call(worker.id, method, params)
    assert caught.value.code == code
    return str(caught.value)


async def hello(stream: trio.abc.Stream) -> bytes:
    """The three numbers of a worker's answer."""
    await stream.send_all(bytes([14]) + (24).to_bytes(8, "little") + bytes(24))
    got = b""
    with trio.fail_after(10):
        while len(got) < 36 and (more := await stream.receive_some(36 - len(got))):
            got += more
    return got[8:11]


# The worker


async def test_a_start_answers_with_protocol_and_digest_once_the_worker_says_hello(rig: Rig) -> None:
    worker = await rig.worker("w")
    assert worker.service.state.phase is WorkerPhase.IDLE
    assert await start(rig, worker) == {"protocol": "7.0.0", "digest": "d" * 64, "graphs": 1, "weights": 0}
    assert worker.service.state.phase is WorkerPhase.READY
    assert worker.service.state.devices == ("CPU",)
    assert worker.states == ["starting", "ready"]
    args = rig.args("w", "ggml-rpc-server")
    assert args[:3] == ["-H", "127.0.0.1", "-p"]
    assert args[4:] == ["-d", "CPU"]


async def test_the_same_start_twice_is_one_process_and_another_run_a_fresh_one(rig: Rig) -> None:
    worker = await rig.worker("w")
    await start(rig, worker, run=1)
    first = worker.pid
    await start(rig, worker, run=1)
    assert worker.pid == first
    await start(rig, worker, run=2)
    assert worker.pid != first
    assert not psutil.pid_exists(first)


async def test_a_newer_epoch_starts_fresh_and_an_older_one_is_not_obeyed_any_more(rig: Rig) -> None:
    worker = await rig.worker("w")
    await start(rig, worker)
    first = worker.pid
    newer = Epoch(4, rig.home.node)
    await start(rig, worker, newer)
    assert worker.pid != first
    assert "is over" in await refused(rig, worker, "stale_epoch", order(rig.epoch))
    await refused(rig, worker, "stale_epoch", {"epoch": list(rig.epoch)}, "worker.stop")
    assert worker.service.state.epoch == newer
    assert worker.service.state.phase is WorkerPhase.READY


async def test_only_the_coordinator_of_the_epoch_commands(rig: Rig) -> None:
    worker, other = await rig.worker("w"), rig.mesh.add("other")
    for epoch in (rig.epoch, Epoch(99, other.node)):
        with pytest.raises(RemoteError, match="is not the coordinator"):
            await other.call(worker.id, "worker.start", order(epoch))
    await start(rig, worker)  # the refused epoch 99 was not remembered


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"epoch": [1]},
        {"epoch": ["1", "x"], "devices": ["CPU"]},
        {"epoch": 7, "devices": ["CPU"]},
        {"epoch": [None, "x"], "devices": ["CPU"]},
        {"epoch": [9, "x"], "devices": []},
        {"epoch": [9, "x"], "devices": ["CPU"] * 17},
        {"epoch": [9, "x"], "devices": ["C" * 65]},
        {"epoch": [9, "x"], "devices": "CPU"},
        {"epoch": [9, "x"], "devices": ["CPU"], "run": "1"},
    ],
)
async def test_a_command_that_is_none(rig: Rig, params: dict[str, Any]) -> None:
    await refused(rig, await rig.worker("w"), "protocol", params)


async def test_only_offered_devices_are_used(rig: Rig) -> None:
    worker = await rig.worker("w")
    assert "offered: CPU" in await refused(rig, worker, "peer_refused", order(rig.epoch, "CPU", "-c"))


async def test_a_node_without_an_engine_says_so(rig: Rig) -> None:
    worker = await rig.worker("w", engine=lambda: None, policy=RestartPolicy(max_crashes=1))
    assert "no usable engine" in await refused(rig, worker, "engine", order(rig.epoch))


async def test_a_crash_loop_is_given_up_with_the_reason_until_the_next_start(rig: Rig) -> None:
    worker = await rig.worker("w")
    worker.fake.control(worker="exit")
    text = await refused(rig, worker, "engine", order(rig.epoch))
    assert "4 times in a row" in text
    assert "no such device" in text
    assert worker.service.state.phase is WorkerPhase.FAILED
    worker.fake.control()
    await start(rig, worker)


async def test_a_worker_that_does_not_say_hello_is_not_ready(rig: Rig) -> None:
    limits = WorkerLimits(start_s=5, hello_s=0.3)
    worker = await rig.worker("w", limits=limits, policy=RestartPolicy(first_delay_s=0.01, max_crashes=2))
    worker.fake.control(worker="mute")
    assert "did not answer HELLO within 0.3 s" in await refused(rig, worker, "engine", order(rig.epoch))


async def test_a_port_that_somebody_took_in_between_is_not_used(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first port is taken by a program that answers HELLO, as another agent's worker would."""
    from tightwad_agent.engine import worker as module

    squatter = await rig.worker("squatter")
    await start(rig, squatter)
    taken = int(rig.args("squatter", "ggml-rpc-server")[3])
    free, asked = module.free_port, []

    async def first_taken() -> int:
        asked.append(1)
        return taken if len(asked) == 1 else await free()

    monkeypatch.setattr(module, "free_port", first_taken)
    worker = await rig.worker("w")
    await start(rig, worker)
    assert worker.states == ["starting", "restarting", "starting", "ready"]
    assert int(rig.args("w", "ggml-rpc-server")[3]) != taken


async def test_a_killed_worker_comes_back_by_itself(rig: Rig) -> None:
    worker = await rig.worker("w")
    await start(rig, worker)
    first = worker.pid
    os.kill(first, signal.SIGKILL)
    await until(lambda: worker.service.state.restarts == 1)
    await worker.until(WorkerPhase.READY)
    assert worker.pid != first
    assert "SIGKILL" in worker.service.state.problem


async def test_a_stop_ends_it_unless_it_is_about_another_run(rig: Rig) -> None:
    worker = await rig.worker("w")
    await start(rig, worker, run=5)
    pid = worker.pid
    await rig.home.call(worker.id, "worker.stop", {"epoch": list(rig.epoch), "run": 4})
    assert worker.service.state.phase is WorkerPhase.READY
    await rig.home.call(worker.id, "worker.stop", {"epoch": list(rig.epoch), "run": 5})
    await worker.until(WorkerPhase.IDLE)
    assert not psutil.pid_exists(pid)


async def test_a_node_that_coordinates_itself_ends_its_worker_at_once(rig: Rig) -> None:
    worker = await rig.worker("w")
    await start(rig, worker)
    worker.service.release()
    await worker.until(WorkerPhase.IDLE)
    assert children() == []
    worker.service.release()
    await start(rig, worker, run=1)


async def test_a_worker_that_nobody_uses_is_stopped(rig: Rig) -> None:
    worker = await rig.worker("w", limits=WorkerLimits(lease_s=0.3))
    await start(rig, worker)
    await worker.until(WorkerPhase.IDLE)


async def test_a_worker_in_use_is_kept_until_its_coordinator_is_none(rig: Rig) -> None:
    accepted = [True]
    worker = await rig.worker("w", limits=WorkerLimits(lease_s=0.3), accepts=lambda epoch, peer: accepted[0])
    await start(rig, worker)
    stream = await rig.home.open_stream(worker.id, "rpc", {"epoch": list(rig.epoch)})
    assert await hello(stream) == b"\x07\x00\x00"
    await trio.sleep(1)
    assert worker.service.state.phase is WorkerPhase.READY
    accepted[0] = False
    await worker.until(WorkerPhase.IDLE)
    with trio.fail_after(5):
        assert await stream.receive_some(1) == b""


async def test_the_stream_ends_at_the_worker_for_the_current_epoch_only(rig: Rig) -> None:
    worker, other = await rig.worker("w"), rig.mesh.add("other")
    no_use = {"epoch": list(Epoch(2, rig.home.node))}

    async def ends(node: Any, args: dict[str, Any]) -> bool:
        stream = await node.open_stream(worker.id, "rpc", args)
        with trio.fail_after(5):
            return await hello(stream) == b""

    args = {"epoch": list(rig.epoch)}
    assert await ends(rig.home, args)  # not started
    await start(rig, worker)
    assert not await ends(rig.home, args)
    assert await ends(rig.home, no_use)
    assert await ends(other, args)
    assert await ends(rig.home, {"epoch": "x"})


async def test_streams_to_a_worker_are_bounded(rig: Rig) -> None:
    worker = await rig.worker("w", limits=WorkerLimits(max_streams=2))
    await start(rig, worker)
    args = {"epoch": list(rig.epoch)}
    first = await rig.home.open_stream(worker.id, "rpc", args)
    assert await hello(first) == b"\x07\x00\x00"
    await rig.home.open_stream(worker.id, "rpc", args)
    third = await rig.home.open_stream(worker.id, "rpc", args)
    with trio.fail_after(5):
        assert await third.receive_some(1) == b""


# The pool


async def test_without_workers_it_is_one_server(rig: Rig) -> None:
    pool = await rig.pool()
    assert pool.state.phase is PoolPhase.IDLE
    pool.set_target(rig.spec())
    await phase(pool, PoolPhase.READY)
    args = rig.args("c", "llama-server")
    assert "--rpc" not in args
    assert args[args.index("--port") + 1] == str(pool.state.port)
    assert args[args.index("-m") + 1] == str(rig.model)
    assert [str(state.phase) for state in rig.states] == ["starting", "loading", "ready"]


async def test_two_workers_are_started_checked_and_connected(rig: Rig) -> None:
    pool, workers = await rig.pool(), [await rig.worker("v"), await rig.worker("w")]
    pool.set_target(rig.spec(*workers))
    await phase(pool, PoolPhase.READY)
    first, second = pool.traffic()
    assert (first.node, second.node) == (workers[0].id, workers[1].id)
    assert first.connections == second.connections == 18  # HELLO of ours, 17 of the server
    await until(lambda: all(t.bytes_down == 18 * 36 + 1000 for t in pool.traffic()))  # the fake worker echoes
    assert all(t.bytes_up == 18 * 33 + 1000 for t in pool.traffic())
    args = rig.args("c", "llama-server")
    assert args[args.index("-ts") + 1] == "1024,1024"
    assert args[args.index("-dev") + 1] == "RPC0,RPC1"


async def test_no_target_stops_server_and_workers(rig: Rig) -> None:
    pool, worker = await rig.pool(), await rig.worker("w")
    pool.set_target(rig.spec(worker))
    await phase(pool, PoolPhase.READY)
    pid = worker.pid
    pool.set_target(None)
    await phase(pool, PoolPhase.IDLE)
    await worker.until(WorkerPhase.IDLE)
    assert not psutil.pid_exists(pid)
    assert pool.state.port is None
    assert not children()
    assert rig.losses == []


async def test_another_target_replaces_the_first_and_frees_workers_it_does_not_use(rig: Rig) -> None:
    pool, workers = await rig.pool(), [await rig.worker("v"), await rig.worker("w")]
    pool.set_target(rig.spec(*workers))
    await phase(pool, PoolPhase.READY)
    port = pool.state.port
    pool.set_target(rig.spec(workers[1]))
    await until(lambda: pool.state.phase is PoolPhase.READY and pool.state.port != port)
    await workers[0].until(WorkerPhase.IDLE)
    assert workers[1].service.state.phase is WorkerPhase.READY


@pytest.mark.parametrize("nothing", [False, True])
async def test_what_served_before_does_not_count_as_the_new_target_while_it_ends(rig: Rig, nothing: bool) -> None:
    pool, worker = await rig.pool(), await rig.worker("w")
    pool.set_target(rig.spec())
    await phase(pool, PoolPhase.READY)
    pool.set_target(None if nothing else rig.spec(worker))
    assert pool.state.phase is PoolPhase.STARTING
    assert pool.state.port is None
    await phase(pool, PoolPhase.IDLE if nothing else PoolPhase.READY)


async def test_the_same_target_again_changes_nothing(rig: Rig) -> None:
    pool = await rig.pool()
    pool.set_target(rig.spec())
    await phase(pool, PoolPhase.READY)
    port, n_states = pool.state.port, len(rig.states)
    pool.set_target(rig.spec())
    await trio.sleep(0.1)
    assert (pool.state.port, len(rig.states)) == (port, n_states)


async def test_a_worker_killed_while_idle_brings_the_pool_back(rig: Rig) -> None:
    pool, worker = await rig.pool(), await rig.worker("w")
    pool.set_target(rig.spec(worker))
    await phase(pool, PoolPhase.READY)
    port = pool.state.port
    os.kill(worker.pid, signal.SIGKILL)
    await until(lambda: pool.state.phase is PoolPhase.READY and pool.state.port != port)
    assert pool.state.restarts == 1
    assert [(loss.node, loss.excluded, loss.crash) for loss in rig.losses] == [(worker.id, False, False)]
    assert [event.text for event in pool.events] == [
        "ready",
        f"{worker.id.short}: the connection to its worker ended",
        "ready",
    ]
    assert [back.loss for back in rig.backs] == rig.losses
    assert pool.back == rig.backs[0]
    assert 0 < pool.back.seconds < 60


async def test_a_cut_link_is_a_loss_and_is_tried_again_until_it_heals(rig: Rig) -> None:
    pool, worker = await rig.pool(), await rig.worker("w")
    pool.set_target(rig.spec(worker))
    await phase(pool, PoolPhase.READY)
    await rig.mesh.cut(rig.home.node, worker.id)
    await until(lambda: pool.state.restarts > POLICY.max_crashes)  # never given up for that
    assert "no address" in pool.state.text
    rig.mesh.heal(rig.home.node, worker.id)
    await phase(pool, PoolPhase.READY)


async def test_the_mesh_says_that_a_machine_is_lost(rig: Rig) -> None:
    pool, worker = await rig.pool(), await rig.worker("w")
    pool.set_target(rig.spec(worker))
    await phase(pool, PoolPhase.READY)
    pool.worker_lost(rig.home.node, "not part of it")
    await trio.sleep(0.05)
    assert pool.state.phase is PoolPhase.READY
    pool.worker_lost(worker.id, "no heartbeat for 5 s")
    await until(lambda: bool(rig.losses))
    assert rig.losses[0].reason == "no heartbeat for 5 s"
    await phase(pool, PoolPhase.READY)


async def test_the_agent_may_answer_a_loss_with_another_target(nursery: trio.Nursery, tmp_path: Path) -> None:
    rig = Rig(nursery, tmp_path)
    workers = [await rig.worker("v"), await rig.worker("w")]
    pool: PoolService = await rig.pool(on_lost=lambda loss: pool.set_target(rig.spec(workers[1])))
    pool.set_target(rig.spec(workers[0]))
    await phase(pool, PoolPhase.READY)
    await rig.mesh.cut(rig.home.node, workers[0].id)
    await until(lambda: pool.state.phase is PoolPhase.READY and pool.state.spec == rig.spec(workers[1]))
    assert [back.loss.node for back in rig.backs] == [workers[0].id]


async def test_another_model_is_no_restart(rig: Rig) -> None:
    pool, worker = await rig.pool(), await rig.worker("w")
    pool.set_target(rig.spec(worker))
    await phase(pool, PoolPhase.READY)
    pool.worker_lost(worker.id, "gone")
    spec = rig.spec()
    pool.set_target(replace(spec, plan=replace(spec.plan, model=ModelId("b" * 64))))
    await until(lambda: pool.state.phase is PoolPhase.READY and not pool.traffic())
    assert rig.backs == []


async def test_what_ran_for_a_while_is_started_again_without_a_pause(rig: Rig) -> None:
    policy = RestartPolicy(first_delay_s=1e6, max_delay_s=1e6, settled_s=0)
    pool, worker = await rig.pool(policy=policy), await rig.worker("w")
    pool.set_target(rig.spec(worker))
    await phase(pool, PoolPhase.READY)
    os.kill(worker.pid, signal.SIGKILL)
    await until(lambda: bool(rig.backs))


async def excluded(rig: Rig, pool: PoolService, worker: Worker, text: str) -> None:
    await phase(pool, PoolPhase.FAILED)
    [loss] = rig.losses
    assert (loss.node, loss.excluded) == (worker.id, True)
    assert text in loss.reason
    assert text in pool.state.text
    assert not (rig.tmp_path / "c" / "logs").exists()  # llama-server was never started


async def test_a_worker_of_another_protocol_is_excluded_before_anything_starts(rig: Rig) -> None:
    async def opened(peer: Any, stream: Any, args: Any) -> None:
        raise AssertionError

    pool, worker = await rig.pool(), await rig.worker("w")
    worker.fake.control(version=[5, 0, 0])
    worker.node.streams["rpc"] = opened
    pool.set_target(rig.spec(worker))
    await excluded(rig, pool, worker, "speaks RPC 5.0.0, here is 7.0.0")


async def test_a_worker_of_another_build_is_excluded(rig: Rig) -> None:
    pool, worker = await rig.pool(), await rig.worker("w")
    spec = rig.spec(worker)
    worker.fake.engine = type(worker.fake.engine)(worker.fake.folder, "e" * 64, "7.0.0")
    pool.set_target(spec)
    await excluded(rig, pool, worker, "another engine")


async def test_a_worker_that_lies_about_its_protocol_is_found_out_by_hello(rig: Rig) -> None:
    async def lie(peer: Any, params: dict[str, Any]) -> dict[str, Any]:
        await worker.service.methods["worker.start"](peer, params)
        return {"protocol": "7.0.0", "digest": "d" * 64}

    pool, worker = await rig.pool(), await rig.worker("w")
    worker.fake.control(version=[7, 1, 0])
    worker.node.methods["worker.start"] = lie
    pool.set_target(rig.spec(worker))
    await excluded(rig, pool, worker, "speaks RPC 7.1.0")


async def test_a_worker_whose_engine_is_broken_is_excluded(rig: Rig) -> None:
    pool, worker = await rig.pool(), await rig.worker("w")
    worker.fake.control(worker="exit")
    pool.set_target(rig.spec(worker))
    await excluded(rig, pool, worker, "no such device")


@pytest.mark.parametrize("answer", [{}, {"protocol": 7, "digest": ""}, {"protocol": "x" * 9999, "digest": ""}])
async def test_a_worker_that_answers_nonsense_is_a_loss(rig: Rig, answer: dict[str, Any]) -> None:
    async def nonsense(peer: Any, params: dict[str, Any]) -> dict[str, Any]:
        return answer

    pool, worker = await rig.pool(), await rig.worker("w")
    worker.node.methods["worker.start"] = nonsense
    pool.set_target(rig.spec(worker))
    await until(lambda: bool(rig.losses))
    assert rig.losses[0].node == worker.id


async def test_a_worker_that_does_not_answer_is_a_loss_in_time(rig: Rig) -> None:
    async def silent(peer: Any, params: dict[str, Any]) -> dict[str, Any]:
        await trio.sleep_forever()
        return {}

    pool, worker = await rig.pool(limits=PoolLimits(start_worker_s=0.1)), await rig.worker("w")
    worker.node.methods["worker.start"] = silent
    pool.set_target(rig.spec(worker))
    await until(lambda: bool(rig.losses))
    assert rig.losses[0].reason == "no answer within 0.1 s"


async def test_an_older_epoch_gets_nothing_from_the_worker(rig: Rig) -> None:
    pool, worker = await rig.pool(), await rig.worker("w")
    await start(rig, worker, Epoch(9, rig.home.node))
    pool.set_target(rig.spec(worker))
    await until(lambda: bool(rig.losses))
    assert "is over" in rig.losses[0].reason


async def test_a_server_that_cannot_load_is_given_up_with_its_last_words(rig: Rig) -> None:
    pool = await rig.pool()
    rig.fake.control(server="exit")
    pool.set_target(rig.spec())
    await phase(pool, PoolPhase.FAILED)
    assert "4 times in a row" in pool.state.text
    assert "exited with code 1: error: failed to load model" in pool.state.text
    assert len(rig.losses) == POLICY.max_crashes
    rig.fake.control()
    pool.set_target(rig.spec())  # the same one: a person says try again
    await phase(pool, PoolPhase.READY)


async def test_an_aborted_server_is_started_again_and_the_signal_has_a_name(rig: Rig) -> None:
    pool, worker = await rig.pool(policy=RestartPolicy(first_delay_s=0.3, factor=1)), await rig.worker("w")
    rig.fake.control(server="abort")
    pool.set_target(rig.spec(worker))
    await until(lambda: bool(rig.losses))
    assert rig.losses[0].reason == "llama-server was ended by SIGABRT: a worker's connection broke"
    assert rig.losses[0].crash
    rig.fake.control()
    await phase(pool, PoolPhase.READY)


async def test_no_engine_here(rig: Rig) -> None:
    pool = await rig.pool(engine=lambda: None)
    pool.set_target(rig.spec())
    await phase(pool, PoolPhase.FAILED)
    assert "no usable engine" in pool.state.text


async def test_a_port_that_somebody_took_before_the_server(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other program even answers as a healthy llama-server."""
    from tightwad_agent.engine import by_llama_server as module

    other = await rig.pool(spawner=rig.spawner("other"))
    other.set_target(rig.spec())
    await phase(other, PoolPhase.READY)
    taken, free, asked = other.state.port, module.free_port, []

    async def first_taken() -> int:
        asked.append(1)
        assert taken is not None
        return taken if len(asked) == 1 else await free()

    monkeypatch.setattr(module, "free_port", first_taken)
    pool = await rig.pool()
    pool.set_target(rig.spec())
    await phase(pool, PoolPhase.READY)
    assert pool.state.port != taken
    assert pool.state.restarts == 1


async def test_loading_has_a_deadline(rig: Rig) -> None:
    pool = await rig.pool(limits=PoolLimits(load_s=0.5, load_bytes_per_s=1e9))
    rig.fake.control(server="loading")
    pool.set_target(rig.spec())
    await until(lambda: bool(rig.losses))
    assert "was not loaded within" in rig.losses[0].reason


async def test_loading_into_a_pool_must_move_bytes(rig: Rig) -> None:
    pool, worker = await rig.pool(stall_s=3), await rig.worker("w")
    rig.fake.control(server="loading")
    pool.set_target(rig.spec(worker))
    await until(lambda: bool(rig.losses))
    assert "loading stood still" in rig.losses[0].reason
    assert any(state.phase is PoolPhase.LOADING and state.percent == 99 for state in rig.states)


async def test_a_server_without_progress_is_restarted(rig: Rig) -> None:
    pool = await rig.pool(stall_s=1.2)
    pool.set_target(rig.spec())
    await phase(pool, PoolPhase.READY)
    rig.fake.control(slots=[BUSY])
    await until(lambda: bool(rig.losses))
    assert rig.losses[0].reason.startswith("no progress for 1.2 s while 1 request waits")
    rig.fake.control()
    await phase(pool, PoolPhase.READY)


async def test_a_server_that_does_not_answer_is_restarted(rig: Rig) -> None:
    pool = await rig.pool(stall_s=1.2, limits=PoolLimits(frozen_s=60))
    pool.set_target(rig.spec())
    await phase(pool, PoolPhase.READY)
    [server] = children()
    server.suspend()
    await until(lambda: bool(rig.losses))
    assert "has not answered for 1.2 s" in rig.losses[0].reason
    await phase(pool, PoolPhase.READY)


async def test_a_server_that_was_stopped_is_restarted_without_any_request(rig: Rig) -> None:
    pool = await rig.pool(stall_s=60, in_flight=lambda: 0, limits=PoolLimits(frozen_s=0.4))
    pool.set_target(rig.spec())
    await phase(pool, PoolPhase.READY)
    [server] = children()
    server.suspend()
    await until(lambda: bool(rig.losses))
    assert rig.losses[0].reason == "llama-server was stopped (SIGSTOP) and did not go on"
    await phase(pool, PoolPhase.READY)


async def test_a_worker_that_was_stopped_is_a_loss_though_nobody_asks_anything(rig: Rig) -> None:
    pool, worker = await rig.pool(stall_s=60), await rig.worker("w", limits=WorkerLimits(frozen_s=0.4))
    pool.set_target(rig.spec(worker))
    await phase(pool, PoolPhase.READY)
    psutil.Process(worker.pid).suspend()
    await until(lambda: bool(rig.losses))
    assert rig.losses[0].node == worker.id
    assert "was stopped (SIGSTOP)" in worker.service.state.problem
    await phase(pool, PoolPhase.READY)
    assert pool.back is not None
    assert pool.back.loss == rig.losses[0]


async def test_a_short_stop_is_forgiven(autojump_clock: trio.testing.MockClock) -> None:
    seen = [True, True, True, False, True, True, True, True, False]
    await frozen(1, 2.0, lambda _pid: seen.pop(0))
    assert seen == [False]
    assert trio.current_time() == pytest.approx(8 * 0.5)


async def test_what_a_signal_stopped_is_told_from_what_sleeps_or_is_gone() -> None:
    process = await trio.lowlevel.open_process(["sleep", "60"])
    try:
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        await until(lambda: is_stopped(process.pid))
        process.send_signal(signal.SIGCONT)
        await until(lambda: not is_stopped(process.pid))
    finally:
        process.kill()
        await process.wait()
    assert not is_stopped(process.pid)


async def test_without_requests_the_server_is_left_alone(rig: Rig) -> None:
    n_open = [0]
    pool = await rig.pool(stall_s=0.2, in_flight=lambda: n_open[0])
    pool.set_target(rig.spec())
    await phase(pool, PoolPhase.READY)
    rig.fake.control(slots=[BUSY])
    await trio.sleep(1)
    assert pool.state.phase is PoolPhase.READY
    n_open[0] = 1
    await until(lambda: bool(rig.losses))


@pytest.mark.parametrize("when", ["starting", "loading", "ready"])
async def test_cancelled_in_each_phase_nothing_is_left(tmp_path: Path, when: str) -> None:
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            rig = Rig(nursery, tmp_path)
            pool, worker = await rig.pool(), await rig.worker("w")
            worker.fake.control(worker="mute" if when == "starting" else "ok")
            rig.fake.control(server="loading" if when == "loading" else "ok")
            pool.set_target(rig.spec(worker))
            await phase(pool, PoolPhase(when))
            await until(lambda: bool(children()))
            nursery.cancel_scope.cancel()
    assert not children()


async def test_a_forwarder_accepts_only_loopback(rig: Rig) -> None:
    pool, worker = await rig.pool(), await rig.worker("w")
    pool.set_target(rig.spec(worker))
    await phase(pool, PoolPhase.READY)
    listening = [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert listening
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
    assert socket.AF_INET6 not in {c.family for c in listening}


def children() -> list[psutil.Process]:
    """Our children that are no zombies: each test starts with none."""
    return [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


# The watchdog's decision, without a server


def slots(*tasks: tuple[int, int, int]) -> Progress:
    return parse_slots(
        [
            {"id": 0, "is_processing": False},
            *[
                {"id": i, "is_processing": True, "id_task": task, "n_prompt_tokens_processed": prompt}
                | ({"next_token": [{"n_decoded": decoded}]} if decoded else {})
                for i, (task, prompt, decoded) in enumerate(tasks, 1)
            ],
        ]
    )


def looks(clock: StallClock, *progress: Progress | None, step: float = 1.0) -> list[str]:
    return [clock.look(i * step, p) for i, p in enumerate(progress)]


def test_progress_of_any_slot_is_progress() -> None:
    steady = [slots((1, 4, n), (2, 9, 7)) for n in range(1, 20)]
    assert not any(looks(StallClock(3), *steady))


def test_no_progress_is_a_stall_after_its_time() -> None:
    assert looks(StallClock(3), *[slots((1, 4, 5), (2, 9, 7))] * 4)[2:] == [
        "",
        "no progress for 3 s while 2 requests wait: a worker or a device stands still",
    ]


def test_a_prompt_has_more_patience() -> None:
    verdicts = looks(StallClock(3), *[slots((1, 512, 0))] * 13)
    assert not any(verdicts[:12])
    assert "no progress for 12 s" in verdicts[12]


def test_bytes_to_a_worker_are_progress() -> None:
    clock = StallClock(3)
    assert not any(clock.look(t, slots((1, 4, 5)), moved=t) for t in range(10))
    assert clock.look(12, slots((1, 4, 5)), moved=9) != ""


def test_idle_is_no_stall() -> None:
    assert not any(looks(StallClock(3), *[slots()] * 20))


def test_no_answer_is_a_stall() -> None:
    assert looks(StallClock(3), slots((1, 4, 5)), *[None] * 4)[-1] == "llama-server has not answered for 3 s"


def test_who_looks_late_has_nothing_to_say() -> None:
    clock = StallClock(3, max_gap_s=2)
    same = slots((1, 4, 5))
    assert [clock.look(t, same) for t in (0, 1, 100, 101, 102)] == [""] * 5
    assert clock.look(103, same) != ""


def learned(stall_s: float, *silences: float, decoded: int = 1) -> tuple[StallClock, float]:
    """A clock that has seen these silences, each ended by a token, and the time of the last."""
    clock, now = StallClock(stall_s, max_gap_s=1000), 0.0
    clock.look(now, slots((1, 4, 0 if decoded == 0 else 1)))
    for n, silence in enumerate(silences, 2):
        now += silence
        clock.look(now, slots((1, 4 + (0 if decoded else n), n * decoded)))
    return clock, now


def test_the_pace_makes_patience_shorter() -> None:
    clock, now = learned(60, 1, 1, 2, 1, 1)
    same = slots((1, 4, 6))
    assert clock.look(now + 6 + 4 * 2 - 0.1, same) == ""
    assert "no progress for 14 s" in clock.look(now + 6 + 4 * 2, same)


def test_until_the_pace_is_known_and_where_it_is_slow_patience_is_what_was_set() -> None:
    for clock, now in (learned(60, 1, 1, 1, 1), learned(60, 20, 20, 20, 20, 20)):
        same = slots((1, 4, 5 if now == 4 else 6))
        assert clock.look(now + 59, same) == ""
        assert clock.look(now + 60, same) != ""


def test_the_pace_of_prompts_is_another_one() -> None:
    clock, _ = learned(60, 1, 1, 1, 1, 1)
    assert clock.patience_s(in_prompt=False) == 10
    assert clock.patience_s(in_prompt=True) == 240
    clock, _ = learned(60, 5, 8, 5, 5, 5, decoded=0)
    assert clock.patience_s(in_prompt=False) == 60
    assert clock.patience_s(in_prompt=True) == 6 + 4 * 8


def test_a_silence_in_which_nobody_waited_or_we_were_late_is_no_pace() -> None:
    clock = StallClock(60, max_gap_s=50)
    for n in range(20):
        clock.look(40.0 * n, slots((1, 4, n + 1)) if n % 2 else slots())
    assert clock.patience_s(in_prompt=False) == 60
    clock, now = learned(60, 1, 1, 1, 1, 1)
    clock.look(now + 2000, slots((1, 4, 99)))
    assert clock.patience_s(in_prompt=False) == 10


def test_a_slow_hour_is_forgotten() -> None:
    clock, _ = learned(600, 100, *[1] * 64)
    assert clock.patience_s(in_prompt=False) == 10


@pytest.mark.parametrize("body", [{}, None, "x", [1], [[]]])
def test_a_body_that_is_no_list_of_slots(body: object) -> None:
    with pytest.raises(ValueError, match="slots"):
        parse_slots(body)


def test_slots_of_another_shape_are_read_as_far_as_they_go() -> None:
    assert parse_slots([{"is_processing": True, "next_token": "x"}]).in_prompt
    assert parse_slots([{"is_processing": True, "next_token": [{"n_decoded": 3}]}]) == Progress(
        1, False, ((None, None, None, 3),)
    )
