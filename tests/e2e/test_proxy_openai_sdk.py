"""The openai SDK at a follower's port: follower -> mesh -> coordinator -> the real llama-server."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import trio

from tightwad_agent.proxy.app import App
from tightwad_agent.proxy.cluster import Local, Remote, Unavailable
from tightwad_agent.proxy.fakes import FakeCluster
from tightwad_agent.proxy.listen import listen
from tightwad_agent.proxy.openai import ModelEntry
from tightwad_agent.testing import MemoryMesh

pytestmark = pytest.mark.engine

START_S = 120


class LlamaServer:
    """A real llama-server; `kill` and `start` bring it down and up on the same port."""

    def __init__(self, engine_dir: Path, model: Path, log: Path) -> None:
        self._engine_dir, self._model, self._log = engine_dir, model, log
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=60)

    def start(self) -> None:
        argv = [self._engine_dir / "llama-server", "-m", self._model, "--host", "127.0.0.1", "--port", str(self.port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                # one thread: several wait for one another by spinning, which starves on a busy machine
                [*argv, "-t", "1", "-c", "2048", "-np", "1", "--slots"],
                stdout=log,
                stderr=log,
                env=os.environ | {"LD_LIBRARY_PATH": str(self._engine_dir)},
            )
        give_up = time.monotonic() + START_S
        while not self._ready():
            assert self._process.poll() is None, self._log.read_text(errors="replace")[-2000:]
            assert time.monotonic() < give_up
            time.sleep(0.05)

    def _ready(self) -> bool:
        try:
            return self._http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        self.kill()
        self._http.close()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def busy(self) -> bool:
        slots = self._http.get("/slots").json()
        return any(slot["is_processing"] for slot in slots)


@pytest.fixture(scope="module")
def llama(engine_dir: Path, demo_model: Path, tmp_path_factory) -> Iterator[LlamaServer]:
    server = LlamaServer(engine_dir, demo_model, tmp_path_factory.mktemp("llama") / "log")
    try:
        server.start()
        yield server
    finally:
        server.close()


@dataclass
class Follower:
    """The port of a node that is not the coordinator."""

    port: int
    cluster: FakeCluster
    coordinator: FakeCluster

    def sdk(self, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1",
            api_key="any",
            max_retries=0,
            http_client=httpx.Client(trust_env=False, timeout=60),
            **more,
        )

    async def ask(self, question: Callable[[openai.OpenAI], Any]) -> Any:
        """Runs `question` in a thread, as the SDK's users do."""

        def run() -> Any:
            with self.sdk() as client:
                return question(client)

        return await trio.to_thread.run_sync(run)


@pytest.fixture
async def follower(llama: LlamaServer, demo_model: Path):
    entries = [ModelEntry("ab" * 32, demo_model.name, size=demo_model.stat().st_size, served=True)]
    async with trio.open_nursery() as nursery:
        mesh = MemoryMesh(nursery)
        edge, other = mesh.add("follower"), mesh.add("coordinator")
        coordinator = FakeCluster(where=Local(llama.port), entries=entries)
        cluster = FakeCluster(where=Remote(other.node), entries=entries, opener=edge.open_stream)
        other.streams["http"] = App(coordinator, admin_key=lambda: "").handle_mesh
        listeners = await listen("127.0.0.1", 0)
        await nursery.start(App(cluster, admin_key=lambda: "").serve, listeners)
        yield Follower(listeners[0].socket.getsockname()[1], cluster, coordinator)
        nursery.cancel_scope.cancel()


MESSAGES: Any = [{"role": "user", "content": "Name the capital of France."}]
COUNT: Any = [{"role": "user", "content": "Count from one to a thousand in words, one number per line."}]


async def test_models(follower, demo_model):
    models = await follower.ask(lambda client: client.models.list().data)
    assert [m.id for m in models] == [demo_model.name.removesuffix(".gguf")]
    one = await follower.ask(lambda client: client.models.retrieve(models[0].id))
    assert one.id == models[0].id


@pytest.mark.parametrize("model", ["default", "served name", "short id"])
async def test_chat(follower, demo_model, model):
    name = {"served name": demo_model.name, "short id": "ab" * 6}.get(model, model)
    answer = await follower.ask(
        lambda client: client.chat.completions.create(model=name, messages=MESSAGES, temperature=0, max_tokens=24)
    )
    assert "Paris" in answer.choices[0].message.content
    assert answer.usage.completion_tokens <= 24


async def test_stream_is_the_same_text_in_parts(follower):
    def run(client: openai.OpenAI) -> tuple[str, list[str]]:
        asked: Any = {"model": "default", "messages": MESSAGES, "temperature": 0, "max_tokens": 24, "seed": 1}
        whole = client.chat.completions.create(**asked).choices[0].message.content or ""
        parts = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, stream=True)]
        return whole, parts

    whole, parts = await follower.ask(run)
    assert "".join(parts) == whole
    assert len([p for p in parts if p]) > 3


async def test_stop(follower):
    answer = await follower.ask(
        lambda client: client.completions.create(
            model="default", prompt="1, 2, 3, 4, 5, 6, 7,", temperature=0, max_tokens=40, stop=["10"]
        )
    )
    assert answer.choices[0].finish_reason == "stop"
    assert "9" in answer.choices[0].text
    assert "10" not in answer.choices[0].text


async def test_max_tokens(follower):
    answer = await follower.ask(
        lambda client: client.chat.completions.create(
            model="default", messages=COUNT, max_tokens=7, extra_body={"ignore_eos": True}
        )
    )
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 7)


async def test_fields_that_nobody_here_knows(follower):
    answer = await follower.ask(
        lambda client: client.chat.completions.create(
            model="default", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, extra_body={"min_p": 0.1}
        )
    )
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2


async def test_passed_through(follower):
    def run(client: openai.OpenAI) -> Any:
        url = f"http://127.0.0.1:{follower.port}/tokenize"
        return httpx.post(url, json={"content": "hello world"}, trust_env=False).json()

    assert len((await follower.ask(run))["tokens"]) >= 2


async def test_llama_server_s_own_refusals(follower):
    with pytest.raises(openai.BadRequestError):
        await follower.ask(
            lambda client: client.chat.completions.create(model="default", messages="nonsense")  # type: ignore[arg-type]
        )


async def test_unknown_model(follower, demo_model):
    with pytest.raises(openai.NotFoundError, match=demo_model.name.removesuffix(".gguf")) as info:
        await follower.ask(lambda client: client.chat.completions.create(model="gpt-4o", messages=MESSAGES))
    assert info.value.code == "model_not_found"


async def test_loading(follower):
    follower.coordinator.where = Unavailable("loading the model, 40 %", {"state": "loading", "progress": 0.4}, 9)
    with pytest.raises(openai.InternalServerError) as info:
        await follower.ask(lambda client: client.chat.completions.create(model="default", messages=MESSAGES))
    assert info.value.status_code == 503
    assert info.value.response.headers["retry-after"] == "9"
    assert info.value.response.json()["tightwad"]["progress"] == 0.4
    assert "40 %" in info.value.message


async def wait_until_idle(llama: LlamaServer, every_s: float) -> None:
    with trio.fail_after(60):
        while await trio.to_thread.run_sync(llama.busy):
            await trio.sleep(every_s)


STREAMED_S = 0.02
WHOLE_S = 2.5
"""llama-server looks whether the client of an unstreamed request is still there only after a second without results
of any kind, and an answer to `/slots` is one: asking more often would keep it from ever looking."""


@pytest.mark.parametrize(("streaming", "every_s"), [(True, STREAMED_S), (False, WHOLE_S)])
async def test_client_that_leaves_frees_the_slot(follower, llama, streaming, every_s, record_property):
    await wait_until_idle(llama, every_s)
    began = trio.Event()

    async def hang_up() -> None:
        """Asks for a long answer and never reads it to its end."""
        async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
            url = f"http://127.0.0.1:{follower.port}/v1/chat/completions"
            body = {"messages": COUNT, "max_tokens": 1900, "stream": streaming, "ignore_eos": True}
            async with client.stream("POST", url, json=body) as response:
                async for _ in response.aiter_lines():
                    began.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hang_up)
        if streaming:
            await began.wait()
        while not await trio.to_thread.run_sync(llama.busy):
            await trio.sleep(0.02)
        assert follower.coordinator.in_flight == 1
        nursery.cancel_scope.cancel()
    left = time.monotonic()
    with trio.fail_after(5):
        while follower.coordinator.in_flight:
            await trio.sleep(0.001)
    given_up_s = time.monotonic() - left
    if not streaming:
        await trio.sleep(every_s)
    await wait_until_idle(llama, every_s)
    idle_s = time.monotonic() - left
    record_property("cancel_s", given_up_s)
    record_property("idle_s", idle_s)
    print(
        f"\nstreaming={streaming}: upstream closed after {given_up_s * 1000:.1f} ms, slot idle {idle_s * 1000:.0f} ms"
    )


async def test_server_killed_in_mid_stream_of_a_model_that_was_stopped(follower, llama):
    """An error that says why there is no more of it, never an end that looks whole."""
    try:

        def run(client: openai.OpenAI) -> None:
            stream = client.chat.completions.create(
                model="default", messages=COUNT, max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
            )
            for n, _ in enumerate(stream):
                if n == 5:
                    follower.coordinator.where = Unavailable("the model was stopped", {"stopped": True})
                    llama.kill()

        with pytest.raises(openai.APIError, match="the model was stopped"):
            await follower.ask(run)
    finally:
        await trio.to_thread.run_sync(llama.start)


async def test_server_killed_in_mid_stream_of_a_model_that_comes_back(follower, llama):
    """The client reads a pause, and the answer that it would have read."""

    def run(client: openai.OpenAI, kill_at: int = -1) -> str:
        text = ""
        asked: Any = {"temperature": 0, "max_tokens": 64, "extra_body": {"ignore_eos": True}}
        stream = client.chat.completions.create(model="default", messages=COUNT, stream=True, **asked)
        for n, part in enumerate(stream):
            text += part.choices[0].delta.content or "" if part.choices else ""
            if n == kill_at:
                follower.coordinator.where = Unavailable("the pool is being restarted", hold=True)
                llama.kill()
                llama.start()
                follower.coordinator.where = Local(llama.port)
        return text

    undisturbed = await follower.ask(run)
    assert await follower.ask(lambda client: run(client, kill_at=5)) == undisturbed


async def test_server_killed_before_an_answer_is_asked_again(follower, llama):
    """A request that is not streamed survives the death of its server: the client sees a pause."""
    answers: list[Any] = []

    async def ask() -> None:
        answers.append(
            await follower.ask(
                lambda client: client.chat.completions.create(
                    model="default", messages=COUNT, max_tokens=64, extra_body={"ignore_eos": True}
                )
            )
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        while not await trio.to_thread.run_sync(llama.busy):
            await trio.sleep(0.02)
        await trio.to_thread.run_sync(llama.kill)
        follower.coordinator.where = Unavailable("the pool is being restarted", hold=True)
        await trio.to_thread.run_sync(llama.start)
        follower.coordinator.where = Local(llama.port)
    assert answers[0].usage.completion_tokens == 64
