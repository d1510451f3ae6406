"""The endpoint over a real verifier child in this process's hands: clients that hang up, drafters that lie."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from tightwad_agent.engine import by_verifier
from tightwad_agent.engine.process import Spawner
from tightwad_agent.engine.verifying import VerifierClient
from tightwad_agent.proxy.app import App
from tightwad_agent.proxy.cluster import Own, Remote
from tightwad_agent.proxy.costs import Costs
from tightwad_agent.proxy.fakes import FakeCluster
from tightwad_agent.proxy.generation import VerifierGenerator
from tightwad_agent.proxy.ports import DrafterInfo, DraftEvent, Timings, VerifierEvent, VerifierRequest
from tightwad_agent.testing import MemoryMesh, node_id
from tightwad_agent.wire.draft import Drafted
from tightwad_agent.wire.verify import GREEDY, Accepted, Load, pack_tokens

pytestmark = [pytest.mark.engine, pytest.mark.slow]

N_VOCAB = 49152
PROMPT = "Once upon a time in a small village,"
DEADLINE_S = 60


class Watched:
    """The verifier, and all that it says to requests: `heard` has one list for each."""

    def __init__(self, client: VerifierClient, pid: int) -> None:
        self._client = client
        self._pid = pid
        self.heard: list[list[VerifierEvent]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def open(self, *args: Any, deliver: Callable[[VerifierEvent], None], **more: Any) -> VerifierRequest:
        events: list[VerifierEvent] = []
        self.heard.append(events)

        def noted(event: VerifierEvent) -> None:
            events.append(event)
            deliver(event)

        return self._client.open(*args, deliver=noted, **more)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[list[int]]:
        """The process stands still, and what it said before has been heard: so many events of each request."""
        os.kill(self._pid, signal.SIGSTOP)
        try:
            seen: list[int] | None = None
            while seen != (seen := [len(events) for events in self.heard]):
                await trio.sleep(0.1)
            yield seen
        finally:
            os.kill(self._pid, signal.SIGCONT)


@asynccontextmanager
async def loaded(engine_dir: Path, model: Path, tmp_path: Path) -> AsyncIterator[Watched]:
    ours, theirs = socket.socketpair()
    client = VerifierClient(ours)
    async with trio.open_nursery() as nursery:
        fd = theirs.fileno()
        spawner = Spawner(nursery, tmp_path)
        async with spawner.running("verifier", by_verifier.command(fd), pass_fds=(fd,)) as child:
            theirs.close()
            nursery.start_soon(client.run)
            client.load(Load(str(engine_dir), str(model), 2048, threads=1))
            await until(lambda: client.loaded)
            yield Watched(client, child.pid)
        nursery.cancel_scope.cancel()


@pytest.fixture
async def verifier(engine_dir: Path, demo_model: Path, tmp_path: Path):
    async with loaded(engine_dir, demo_model, tmp_path) as verifier:
        yield verifier


async def until(met: Callable[[], object]) -> None:
    with trio.fail_after(DEADLINE_S):
        while not met():
            await trio.sleep(0.002)


@dataclass
class Endpoint:
    """A port that answers on the verifier; `timings` of the answers that are over."""

    generator: VerifierGenerator
    port: int
    timings: list[Timings]

    async def ask(self, **body: Any) -> trio.SocketStream:
        """The connection on which the answer will come."""
        data = json.dumps({"prompt": PROMPT, "temperature": 0, **body}).encode()
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        await stream.send_all(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + data)
        return stream

    async def whole(self, **body: Any) -> Any:
        stream, data = await self.ask(**body), b""
        with trio.fail_after(DEADLINE_S):
            while more := await stream.receive_some():
                data += more
        await stream.aclose()
        return json.loads(data.partition(b"\r\n\r\n")[2])


async def endpoint(
    nursery: trio.Nursery, verifier: Watched, *drafters: Any, through_the_mesh: bool = False
) -> Endpoint:
    timings: list[Timings] = []
    generator = VerifierGenerator(verifier, lambda: drafters, Costs(16), ended=timings.append)
    cluster = FakeCluster(where=Own(generator))
    if through_the_mesh:
        mesh = MemoryMesh(nursery)
        edge, other = mesh.add("edge"), mesh.add("coordinator")
        other.streams["http"] = App(cluster, admin_key=lambda: "admin").handle_mesh
        cluster = FakeCluster(where=Remote(other.node), opener=edge.open_stream)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    await nursery.start(App(cluster, admin_key=lambda: "admin").serve, listeners)
    return Endpoint(generator, port, timings)


@pytest.mark.parametrize("through_the_mesh", [False, True])
async def test_a_client_that_hangs_up_costs_one_round_more_at_most(verifier: Watched, through_the_mesh: bool) -> None:
    async with trio.open_nursery() as nursery:
        there = await endpoint(nursery, verifier, through_the_mesh=through_the_mesh)
        for body in ({"stream": True}, {"stream": False}, {"stream": True, "n": 2}):
            await hang_up(there, verifier, body)
        nursery.cancel_scope.cancel()


async def hang_up(there: Endpoint, verifier: Watched, body: dict[str, Any]) -> None:
    """Noticed while the verifier says nothing; then it must be over there too, not only here."""
    verifier.heard.clear()
    there.timings.clear()
    connection = await there.ask(max_tokens=1500, ignore_eos=True, **body)
    await until(lambda: sum(map(len, verifier.heard)) > 8)
    async with verifier.held() as heard:
        await connection.aclose()
        await until(lambda: not there.generator.live)
    assert len(heard) == body.get("n", 1)
    following: list[VerifierEvent] = []
    prompt = await verifier.tokenize(b"Another one")
    request = verifier.open(prompt, GREEDY, max_tokens=5, deliver=following.append)
    request.round(len(prompt) + 1, [], 10)
    await until(lambda: following and isinstance(following[-1], Accepted) and following[-1].ended)
    assert [event.requests for event in following if isinstance(event, Accepted)] == [1] * 5, "passes of its own"
    assert [len(events) for events in verifier.heard[:-1]] == heard, "nothing came for those who left"
    assert sorted(t.n_generated for t in there.timings) == sorted(heard)


@dataclass
class Liar:
    """A drafter whose answers come at once and are what `says` makes of the sequence and the number asked for."""

    says: Callable[[Sequence[int], int], Sequence[int]]
    info: DrafterInfo = field(default_factory=lambda: DrafterInfo(node_id("liar"), "liar", "small", 4, 0.0))
    alive: bool = True
    asked: int = 0

    def open(self, deliver: Callable[[DraftEvent], None]) -> Session:
        return Session(self, deliver)


@dataclass
class Session:
    liar: Liar
    deliver: Callable[[DraftEvent], None]
    tokens: list[int] = field(default_factory=list)
    made: int = 0
    branch: int = 0

    def ask(self, branch: int, keep: int, tokens: Sequence[int], n: int) -> None:
        self.tokens[keep:] = tokens
        self.branch, self.made = branch, 0
        self.extend(branch, n)

    def extend(self, branch: int, n: int) -> None:
        self.liar.asked += 1
        said = list(self.liar.says(self.tokens, n))
        trio.lowlevel.current_trio_token().run_sync_soon(
            self.deliver, Drafted(0, branch, self.made, pack_tokens(said), 1000)
        )
        self.tokens += said
        self.made += len(said)

    def patient(self, is_patient: bool) -> None:
        """It never lets anybody wait."""

    def collect(self) -> None:
        """It keeps nothing back."""

    def forget(self) -> None:
        self.deliver = lambda _event: None


def at_random(tokens: Sequence[int], n: int) -> Sequence[int]:
    return [random.Random(len(tokens)).randrange(N_VOCAB) for _ in range(n)]


LIES: dict[str, Callable[[Sequence[int], int], Sequence[int]]] = {
    "ids that are none": lambda _tokens, n: [N_VOCAB] * n,
    "negative ids": lambda _tokens, n: [-1] * n,
    "the largest id": lambda _tokens, n: [2**31 - 1] * n,
    "more than was asked for": lambda tokens, n: at_random(tokens, n + 300)[:256],
    "nothing": lambda _tokens, _n: [],
    "always wrong": at_random,
}


async def test_a_drafter_that_lies_changes_nothing(verifier: Watched) -> None:
    async with trio.open_nursery() as nursery:
        plain = await endpoint(nursery, verifier)
        bodies = ({"max_tokens": 10}, {"max_tokens": 10, "temperature": 0.8, "seed": 5})
        wanted = [await plain.whole(**body, speculation=False) for body in bodies]
        for name, says in LIES.items():
            liar = Liar(says)
            lied = await endpoint(nursery, verifier, liar)
            for body, right in zip(bodies, wanted, strict=True):
                got = await lied.whole(**body)
                assert got["choices"] == right["choices"], name
                assert got["usage"]["completion_tokens"] == right["usage"]["completion_tokens"] == 10
            assert liar.asked > 0, name
            if "id" in name:
                assert not any("liar" in timings.drafters for timings in lied.timings), name
        said = [event for events in verifier.heard for event in events]
        assert all(isinstance(event, Accepted) for event in said), "nothing has failed"
        nursery.cancel_scope.cancel()
