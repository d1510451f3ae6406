"""Two workers and a pool with the real llama.cpp and the demo model, over memory streams in place of the mesh."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trio

from tightwad_agent.engine.commands import StartWorker
from tightwad_agent.engine.frozen import FROZEN_S
from tightwad_agent.engine.hello import probe
from tightwad_agent.engine.plan import DeviceUse, Plan, WorkerUse
from tightwad_agent.engine.pool import PoolPhase, PoolService
from tightwad_agent.engine.process import Engine, Spawner
from tightwad_agent.engine.restart import RestartPolicy
from tightwad_agent.engine.target import Loss, PoolLimits, ServedBy, TargetSpec
from tightwad_agent.engine.verifying import VerifierClient
from tightwad_agent.engine.weights_file import WeightsOf
from tightwad_agent.engine.worker import WorkerLimits, WorkerPhase, WorkerService
from tightwad_agent.errors import PeerGone, StaleEpoch
from tightwad_agent.ids import Epoch, ModelId, NodeId
from tightwad_agent.swarm.measure import Opened, header
from tightwad_agent.testing import MemoryMesh, MemoryNode
from tightwad_agent.wire.verify import GREEDY, Accepted, Ended, unpack_tokens

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPT = "Once upon a time"
POLICY = RestartPolicy(first_delay_s=0.05, max_delay_s=0.5)
N_EMBD_BYTES = 576 * 4
VOCAB_BYTES = 49152 * 4


async def until(met: Callable[[], object], deadline_s: float = 60) -> None:
    with trio.fail_after(deadline_s):
        while not met():
            await trio.sleep(0.02)


@dataclass
class Lab:
    """A coordinator and two workers on this machine, one thread each."""

    nursery: trio.Nursery
    tmp_path: Path
    engine: Engine
    model: Path
    mesh: MemoryMesh = field(init=False)
    home: MemoryNode = field(init=False)
    epoch: Epoch = field(init=False)
    pool: PoolService = field(init=False)
    workers: list[WorkerService] = field(default_factory=list)
    uses: list[WorkerUse] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    copies: dict[tuple[NodeId, ModelId], Path] = field(default_factory=dict)
    """The model's file on a worker, by the id that `serve` gives it."""
    differs: list[str] = field(default_factory=list)

    async def open(self, *, stall_s: float = 20.0, frozen_s: float = 600.0) -> Lab:
        """`frozen_s`: a worker that was stopped is ended only then, and is a stall before."""
        self.mesh = MemoryMesh(self.nursery)
        self.home = self.mesh.add("c")
        self.epoch = Epoch(1, self.home.node)
        for name in ("v", "w"):
            node = self.mesh.add(name)
            service = WorkerService(
                engine=lambda: self.engine,
                spawner=Spawner(self.nursery, self.tmp_path / name),
                probe=probe,
                accepts=lambda epoch, peer: peer == self.home.node,
                offered=lambda: ("CPU",),
                threads=1,
                limits=WorkerLimits(frozen_s=frozen_s),
                policy=POLICY,
                path_of=partial(self._copy, node.node),
                on_differs=lambda _model, why: self.differs.append(why),
            )
            node.methods |= service.methods
            node.streams |= service.streams
            await self.nursery.start(service.run)
            self.workers.append(service)
            self.uses.append(WorkerUse(node.node, (DeviceUse("CPU", 1 << 30),), self.engine.digest))
        self.pool = PoolService(
            engine=lambda: self.engine,
            spawner=Spawner(self.nursery, self.tmp_path / "c"),
            probe=probe,
            call=self.home.call,
            open_stream=self.home.open_stream,
            on_lost=self.losses.append,
            weights=WeightsOf(lambda _model: self.model, lambda _model: places(self.model)),
            threads=1,
            stall_s=stall_s,
            limits=PoolLimits(),
            policy=POLICY,
        )
        await self.nursery.start(self.pool.run)
        return self

    def _copy(self, node: NodeId, model: ModelId) -> Path | None:
        return self.copies.get((node, model))

    def serve(
        self, *, n_workers: int = 2, model: Path | None = None, draft: Path | None = None, verified: bool = False
    ) -> None:
        plan = Plan(ModelId("a" * 64), tuple(self.uses[:n_workers]), None, 512)
        by = ServedBy.VERIFIER if verified else ServedBy.LLAMA_SERVER
        self.pool.set_target(TargetSpec(model or self.model, draft, plan, self.epoch, "demo", by))

    async def ready(self, after: int | None = None) -> int:
        """The server's port, once it is ready (and another one than `after`)."""
        await until(lambda: self.pool.state.phase is PoolPhase.READY and self.pool.state.port != after)
        assert self.pool.state.port is not None
        return self.pool.state.port

    async def verifier(self, other_than: VerifierClient | None = None) -> VerifierClient:
        await until(lambda: self.pool.state.verifier not in (None, other_than))
        assert self.pool.state.verifier is not None
        return self.pool.state.verifier

    def worker_pid(self, i: int) -> int:
        pid = self.workers[i].state.pid
        assert pid is not None
        return pid


@asynccontextmanager
async def laboratory(engine_dir: Path, model: Path, tmp_path: Path, **options: Any) -> AsyncIterator[Lab]:
    engine = Engine(engine_dir, "d" * 64, "7.0.0")
    async with trio.open_nursery() as nursery:
        yield await Lab(nursery, tmp_path, engine, model).open(**options)
        nursery.cancel_scope.cancel()
    assert our_engines() == []


@pytest.fixture
async def lab(nursery: trio.Nursery, engine_dir: Path, demo_model: Path, tmp_path: Path) -> Lab:
    return await Lab(nursery, tmp_path, Engine(engine_dir, "d" * 64, "7.0.0"), demo_model).open()


def our_engines() -> list[str]:
    return [p.name() for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


async def complete(port: int, n_predict: int = 24, **more: Any) -> dict[str, Any]:
    """A greedy completion, whole."""
    body = {
        "prompt": PROMPT,
        "n_predict": n_predict,
        "temperature": 0,
        "cache_prompt": False,
        "ignore_eos": True,
    } | more
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        answer = await client.post(f"http://127.0.0.1:{port}/completion", json=body)
        plain: dict[str, Any] = answer.raise_for_status().json()
        return plain


async def generate_for_ever(port: int, started: trio.Event, cut: trio.Event) -> None:
    """Streams tokens; `started` with the first, `cut` when the stream breaks."""
    body = {"prompt": PROMPT, "n_predict": 480, "temperature": 0, "stream": True, "ignore_eos": True}
    try:
        async with (
            httpx.AsyncClient(timeout=120, trust_env=False) as client,
            client.stream("POST", f"http://127.0.0.1:{port}/completion", json=body) as answer,
        ):
            async for _line in answer.aiter_lines():
                started.set()
    except httpx.HTTPError:
        pass
    cut.set()


async def test_the_pool_answers_as_one_machine_and_its_head_is_here(lab: Lab) -> None:
    lab.serve(n_workers=0)
    alone = await complete(port := await lab.ready())
    lab.serve()
    port = await lab.ready(after=port)
    before = lab.pool.traffic()
    assert all(traffic.connections >= 5 for traffic in before)
    pooled = await complete(port)
    assert pooled["content"] == alone["content"]
    after = lab.pool.traffic()
    n_steps = 24
    down = [(b.bytes_down - a.bytes_down) / n_steps for a, b in zip(before, after, strict=True)]
    up = [(b.bytes_up - a.bytes_up) / n_steps for a, b in zip(before, after, strict=True)]
    # the hidden state of one position comes back, never the logits (196,608 bytes)
    assert all(N_EMBD_BYTES * 0.9 < n < 4 * N_EMBD_BYTES for n in down), down
    assert all(n < VOCAB_BYTES / 2 for n in up), up
    assert lab.losses == []


async def test_a_single_request_may_use_the_whole_context(lab: Lab) -> None:
    lab.serve(n_workers=1)
    port = await lab.ready()
    async with httpx.AsyncClient(trust_env=False) as client:
        slots = (await client.get(f"http://127.0.0.1:{port}/slots")).json()
    assert [slot["n_ctx"] for slot in slots] == [512] * 4


async def test_a_worker_killed_while_idle(lab: Lab) -> None:
    lab.serve()
    port = await lab.ready()
    wanted = await complete(port)
    os.kill(lab.worker_pid(1), signal.SIGKILL)
    port = await lab.ready(after=port)
    assert (await complete(port))["content"] == wanted["content"]
    assert [loss.node for loss in lab.losses] == [lab.uses[1].node]
    assert lab.pool.state.restarts == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_worker_lost_while_generating(
    engine_dir: Path, demo_model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """SIGKILL: llama-server would abort. SIGSTOP: it would hang with a healthy face; only its counters stand still."""
    async with laboratory(engine_dir, demo_model, tmp_path, stall_s=3.0) as lab:
        lab.serve()
        port = await lab.ready()
        started, cut = trio.Event(), trio.Event()
        lab.nursery.start_soon(generate_for_ever, port, started, cut)
        with trio.fail_after(60):
            await started.wait()
        os.kill(lab.worker_pid(0), number)
        if number == signal.SIGSTOP:
            async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
                for path in ("/health", "/slots", "/metrics"):  # what a watchdog must not be content with
                    assert (await client.get(f"http://127.0.0.1:{port}{path}")).status_code == 200
        with trio.fail_after(60):
            await cut.wait()
        port = await lab.ready(after=port)
        assert (await complete(port, 8))["content"]
        [loss] = lab.losses
        if number == signal.SIGKILL:
            assert loss.node == lab.uses[0].node
        else:
            assert loss.node is None
            assert "no progress for 3 s while 1 request waits" in loss.reason


async def test_a_killed_server_comes_back_over_the_same_workers(lab: Lab) -> None:
    lab.serve(n_workers=1)
    port = await lab.ready()
    [server] = [p for p in psutil.Process().children() if p.name() == "llama-server"]
    server.kill()
    await lab.ready(after=port)
    assert "SIGKILL" in lab.losses[0].reason


async def test_a_worker_of_an_older_coordinator_is_not_had(lab: Lab) -> None:
    lab.serve(n_workers=1)
    await lab.ready()
    old = Epoch(0, lab.home.node)
    with pytest.raises(StaleEpoch):
        await lab.workers[0].methods["worker.start"](lab.home.node, StartWorker(old, ("CPU",)).to_params())
    assert lab.workers[0].state.phase is WorkerPhase.READY


async def test_a_draft_changes_the_speed_and_not_the_answer(lab: Lab, f32_model: Path, demo_model: Path) -> None:
    lab.serve(model=f32_model, n_workers=0)
    plain = await complete(port := await lab.ready(), 16)
    assert "draft_n" not in plain["timings"]
    lab.serve(model=f32_model, draft=demo_model, n_workers=1)
    port = await lab.ready(after=port)
    before = lab.pool.traffic()[0].bytes_down
    drafted = await complete(port, 16)
    assert drafted["content"] == plain["content"]
    timings = drafted["timings"]
    assert 0 < timings["draft_n_accepted"] <= timings["draft_n"]
    # the draft runs here: neither its logits nor the target's come over the network
    assert lab.pool.traffic()[0].bytes_down - before < VOCAB_BYTES


@pytest.mark.parametrize("when", ["starting", "loading", "ready", "generating"])
async def test_cancelled_in_each_phase_no_process_is_left(
    engine_dir: Path, demo_model: Path, f32_model: Path, tmp_path: Path, when: str
) -> None:
    with trio.fail_after(60):
        async with laboratory(engine_dir, demo_model, tmp_path) as lab:
            lab.serve(model=f32_model if when == "loading" else None)
            wanted = PoolPhase(when) if when != "generating" else PoolPhase.READY
            await until(lambda: lab.pool.state.phase is wanted and our_engines() != [])
            if when == "generating":
                started = trio.Event()
                lab.nursery.start_soon(generate_for_ever, await lab.ready(), started, trio.Event())
                await started.wait()
    assert our_engines() == []


# The verifier


class Answer:
    """A greedy answer on the verifier, round by round; `drafts` are what the model will say, or are not."""

    def __init__(self, verifier: VerifierClient, prompt: list[int], n: int, draft: list[int] | None = None) -> None:
        self.tokens: list[int] = []
        self.accepted = 0
        self.fault: object = None
        self._n, self._n_prompt, self._draft = n, len(prompt), draft or []
        self._request = verifier.open(prompt, GREEDY, max_tokens=n, deliver=self._take)

    def _take(self, event: object) -> None:
        if not isinstance(event, Accepted):
            self.fault = event
            return
        self.tokens += unpack_tokens(event.tokens)
        self.accepted += event.n_accepted
        if event.ended is Ended.NOT:
            self._request.round(self._n_prompt + len(self.tokens), self._draft[len(self.tokens) :][:5], 0)

    async def whole(self) -> list[int]:
        await until(lambda: len(self.tokens) >= self._n or self.fault)
        assert self.fault is None
        self._request.close()
        return self.tokens


def running(part: str) -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if part in " ".join(p.cmdline())]


async def test_the_verifier_says_what_llama_server_says(lab: Lab) -> None:
    lab.serve()
    wanted = await complete(await lab.ready(), return_tokens=True)
    lab.serve(verified=True)
    verifier = await lab.verifier()
    assert (lab.pool.state.engine, lab.pool.state.engine_reason) == ("verifier", "")
    assert (lab.pool.state.port, verifier.info.context) == (None, 512)
    before = lab.pool.traffic()
    prompt = await verifier.tokenize(PROMPT.encode())
    plain = Answer(verifier, prompt, 24)
    assert await plain.whole() == wanted["tokens"]
    down = [(b.bytes_down - a.bytes_down) / 24 for a, b in zip(before, lab.pool.traffic(), strict=True)]
    assert all(N_EMBD_BYTES * 0.9 < n < 4 * N_EMBD_BYTES for n in down), down  # never the logits
    good = Answer(verifier, prompt, 24, draft=wanted["tokens"])
    poor = Answer(verifier, prompt, 24, draft=[*wanted["tokens"][:7], *[5] * 17])
    assert await good.whole() == await poor.whole() == wanted["tokens"]
    assert good.accepted > poor.accepted > 0
    assert plain.accepted == 0
    assert (await verifier.detokenize(plain.tokens)).decode() == wanted["content"]
    assert all(t.bytes_saved > 100_000 for t in lab.pool.traffic()), "graphs are recognised"
    assert lab.losses == []


@pytest.mark.parametrize("victim", ["worker", "verifier"])
async def test_a_kill_in_the_middle_of_rounds(lab: Lab, victim: str) -> None:
    """A worker's end aborts libllama, but never the agent: the requests are told, and the pool comes back."""
    lab.serve(verified=True)
    verifier = await lab.verifier()
    prompt = await verifier.tokenize(PROMPT.encode())
    wanted = await Answer(verifier, prompt, 8).whole()
    cut = Answer(verifier, prompt, 480)
    await until(lambda: len(cut.tokens) > 3)
    [process] = running("engine.verifier")
    os.kill(lab.worker_pid(0) if victim == "worker" else process.pid, signal.SIGKILL)
    await until(lambda: cut.fault)
    assert isinstance(cut.fault, PeerGone)
    verifier = await lab.verifier(other_than=verifier)
    assert await Answer(verifier, prompt, 8).whole() == wanted
    assert lab.pool.state.restarts == 1
    assert not process.is_running()
    assert lab.losses[0].node == (lab.uses[0].node if victim == "worker" else None)


async def test_a_worker_that_stops_under_the_verifier_is_a_stall(
    engine_dir: Path, demo_model: Path, tmp_path: Path
) -> None:
    async with laboratory(engine_dir, demo_model, tmp_path, stall_s=3.0) as lab:
        lab.serve(verified=True)
        verifier = await lab.verifier()
        cut = Answer(verifier, await verifier.tokenize(PROMPT.encode()), 480)
        await until(lambda: len(cut.tokens) > 3)
        os.kill(lab.worker_pid(0), signal.SIGSTOP)
        await until(lambda: cut.fault and lab.losses)
        assert "no progress for 3 s while 1 request waits" in lab.losses[0].reason
        await lab.verifier(other_than=verifier)


async def test_a_worker_that_was_stopped_is_lost_before_the_stall(
    engine_dir: Path, demo_model: Path, tmp_path: Path
) -> None:
    async with laboratory(engine_dir, demo_model, tmp_path, stall_s=600.0, frozen_s=FROZEN_S) as lab:
        lab.serve(verified=True)
        verifier = await lab.verifier()
        cut = Answer(verifier, await verifier.tokenize(PROMPT.encode()), 480)
        await until(lambda: len(cut.tokens) > 3)
        os.kill(lab.worker_pid(0), signal.SIGSTOP)
        await until(lambda: cut.fault and lab.losses)
        assert lab.losses[0].node == lab.uses[0].node
        again = Answer(await lab.verifier(other_than=verifier), [1, 2, 3], 8)
        assert await again.whole()


async def test_weights_that_the_workers_hold_do_not_cross_and_the_answer_is_the_same(lab: Lab) -> None:
    lab.serve(verified=True)
    verifier = await lab.verifier()
    prompt = await verifier.tokenize(PROMPT.encode())
    wanted = await Answer(verifier, prompt, 24).whole()
    plain = lab.pool.traffic()
    for use in lab.uses:
        lab.copies[use.node, ModelId("a" * 64)] = lab.model
    lab.pool.set_target(None)
    await until(lambda: lab.pool.state.phase is PoolPhase.IDLE)
    lab.serve(verified=True)
    again = await lab.verifier(other_than=verifier)
    assert await Answer(again, prompt, 24).whole() == wanted
    for before, now in zip(plain, lab.pool.traffic(), strict=True):
        assert before.bytes_up - before.bytes_saved > 10e6
        assert now.bytes_up - now.bytes_saved < 2e6, "graphs and small tensors are left"
    assert lab.losses == []


async def test_a_copy_that_holds_something_else_is_not_served_from(lab: Lab, tmp_path: Path) -> None:
    lab.serve(verified=True)
    verifier = await lab.verifier()
    prompt = await verifier.tokenize(PROMPT.encode())
    wanted = await Answer(verifier, prompt, 24).whole()
    damaged = bytearray(lab.model.read_bytes())
    for at in range(len(damaged) // 2, len(damaged), 1 << 20):
        damaged[at] ^= 255
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(damaged)
    for use in lab.uses:
        lab.copies[use.node, ModelId("a" * 64)] = copy
    lab.pool.set_target(None)
    await until(lambda: lab.pool.state.phase is PoolPhase.IDLE)
    lab.serve(verified=True)
    again = await lab.verifier(other_than=verifier)
    assert await Answer(again, prompt, 24).whole() == wanted
    assert any("are not what the coordinator's file holds" in why for why in lab.differs)


def places(model: Path) -> dict[bytes, tuple[int, int]]:
    with Opened(model) as fd:
        tensors = header(fd, model.stat().st_size).tensors
    return {tensor.name.encode(): (tensor.offset, tensor.n_bytes) for tensor in tensors}


async def test_a_request_that_waits_for_its_client_is_no_stall(
    engine_dir: Path, demo_model: Path, tmp_path: Path
) -> None:
    async with laboratory(engine_dir, demo_model, tmp_path, stall_s=3.0) as lab:
        lab.serve(n_workers=1, verified=True)
        verifier = await lab.verifier()
        heard: list[object] = []
        verifier.open(await verifier.tokenize(PROMPT.encode()), GREEDY, max_tokens=9, deliver=heard.append)
        await until(lambda: heard)
        await trio.sleep(8)
        assert lab.losses == []
        assert verifier.alive


async def test_an_engine_that_the_verifier_does_not_know_is_served_by_llama_server(
    engine_dir: Path, demo_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for path in engine_dir.iterdir():
        if path.name != "tightwad-engine.json":
            (folder / path.name).symlink_to(path)
    (folder / "tightwad-engine.json").write_text('{"build": "b1"}')
    async with laboratory(folder, demo_model, tmp_path) as lab:
        lab.serve(n_workers=1, verified=True)
        assert (await complete(await lab.ready(), 4))["content"]
        assert lab.pool.state.engine == "llama-server"
        assert "the verifier does not know this libllama" in lab.pool.state.engine_reason
        assert lab.losses == []


async def test_a_file_that_is_no_model_is_said_to_be_none(lab: Lab, tmp_path: Path) -> None:
    path = tmp_path / "no.gguf"
    path.write_bytes(b"GGUF" + bytes(1000))
    lab.serve(n_workers=0, model=path, verified=True)
    await until(lambda: lab.pool.state.phase is PoolPhase.FAILED)
    assert "the verifier cannot load this model" in lab.pool.state.text
    assert lab.pool.state.restarts == 0


@pytest.mark.parametrize("when", ["loading", "serving"])
async def test_cancelled_with_the_verifier_no_process_is_left(
    engine_dir: Path, demo_model: Path, f32_model: Path, tmp_path: Path, when: str
) -> None:
    with trio.fail_after(60):
        async with laboratory(engine_dir, demo_model, tmp_path) as lab:
            lab.serve(model=f32_model, verified=True)
            if when == "loading":
                await until(lambda: running("engine.verifier") and lab.pool.state.percent)
            else:
                verifier = await lab.verifier()
                answer = Answer(verifier, await verifier.tokenize(PROMPT.encode()), 400)
                await until(lambda: answer.tokens)
    assert our_engines() == []


AGENT = """
import importlib.util, sys, trio
from pathlib import Path
from tightwad_agent.engine.process import Engine
spec = importlib.util.spec_from_file_location("lab", sys.argv[1])
lab_module = importlib.util.module_from_spec(spec)
sys.modules["lab"] = lab_module
spec.loader.exec_module(lab_module)

async def main():
    async with trio.open_nursery() as nursery:
        engine = Engine(Path(sys.argv[2]), "d" * 64, "7.0.0")
        lab = lab_module.Lab(nursery, Path(sys.argv[4]), engine, Path(sys.argv[3]))
        with trio.open_signal_receiver(lab_module.signal.SIGTERM) as signals:
            await lab.open()
            lab.serve(verified=sys.argv[5] == "verifier")
            await (lab.verifier() if sys.argv[5] == "verifier" else lab.ready())
            print("ready", flush=True)
            async for _ in signals:
                nursery.cancel_scope.cancel()
                break

trio.run(main)
"""


@pytest.mark.parametrize("by", ["llama-server", "verifier"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_dead_agent_leaves_no_engine(
    engine_dir: Path, demo_model: Path, tmp_path: Path, number: signal.Signals, by: str
) -> None:
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, __file__, str(engine_dir), str(demo_model), str(tmp_path), by],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert agent.stdout is not None
    assert await trio.to_thread.run_sync(agent.stdout.readline) == "ready\n"
    children = psutil.Process(agent.pid).children()
    assert len(children) == 3
    assert sum(p.name() == "ggml-rpc-server" for p in children) == 2
    assert sum(by in " ".join(p.cmdline()) for p in children) == 1
    agent.send_signal(number)
    code = await trio.to_thread.run_sync(agent.wait)
    agent.stdout.close()
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    await until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in children), 10)
