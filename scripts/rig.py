"""Real programs for measurements: workers, servers, drafters and the relay between them, each a process of its own.

Everything a `Rig` starts ends with it, or with this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import trio

from tightwad_agent.engine import by_verifier
from tightwad_agent.engine.argv import ServerOptions, server_argv, verifier_load, worker_argv
from tightwad_agent.engine.draft_link import DraftLink
from tightwad_agent.engine.process import Child, Engine, Spawner, free_port, listens
from tightwad_agent.engine.verifying import VerifierClient
from tightwad_agent.errors import PeerError
from tightwad_agent.streams import Framed
from tightwad_agent.wire.draft import FROM_DRAFTER, DrafterInfo, Hello

SCRIPTS = Path(__file__).parent
START_S = 60.0
LOAD_S = 300.0
ANSWER_S = 600.0
POLL_S = 0.02
GRACE_S = 2.0


class RigError(Exception):
    """A program of the rig did not do what it should; the text has what it said last."""


def quantised(engine_dir: Path, source: Path, out: Path, kind: str) -> Path:
    """`source` requantised by llama-quantize, made once. Raises `RigError`."""
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    argv = [str(engine_dir / "llama-quantize"), "--allow-requantize", str(source), str(part), kind]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise RigError(f"llama-quantize could not make {out.name}: {(done.stderr or done.stdout)[-500:]}")
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return out


class RelayProcess:
    """The relay, and what it is told; see `delay_relay.py`."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._rest = b""
        self.realtime = False

    @classmethod
    @asynccontextmanager
    async def running(cls) -> AsyncIterator[RelayProcess]:
        """It ends with the block, and when its standard input does."""
        argv = [sys.executable, "-I", str(SCRIPTS / "delay_relay.py"), "--realtime"]
        process = await trio.lowlevel.open_process(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            relay = cls(process)
            relay.realtime = (await relay._answer())["realtime"]
            yield relay
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

    async def link(self, port: int) -> int:
        """A port that leads to loopback port `port` over a link of its own."""
        return int((await self._ask(do="link", port=port))["port"])

    async def set(self, rtt_ms: float, mbit: float) -> None:
        await self._ask(do="set", rtt_ms=rtt_ms, mbit=mbit)

    async def stats(self) -> dict[str, Any]:
        """Since the last call."""
        return await self._ask(do="stats")

    async def _ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(json.dumps(command).encode() + b"\n")
        return await self._answer()

    async def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with trio.CancelScope(deadline=trio.current_time() + START_S) as scope:
            while b"\n" not in self._rest:
                data = await self._process.stdout.receive_some()
                if not data:
                    raise RigError("the relay ended")
                self._rest += data
        if scope.cancelled_caught:
            raise RigError(f"the relay said nothing within {START_S:g} s")
        line, self._rest = self._rest.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RigError(f"the relay: {answer['error']}")
        return answer


@dataclass(frozen=True, slots=True)
class Completion:
    """What llama-server made of a prompt. `generate_ms`: from its first token to its last, by its own clock."""

    tokens: tuple[int, ...]
    prompt_ms: float
    generate_ms: float
    drafted: int
    accepted: int


class LlamaServer:
    """One llama-server that is ready."""

    def __init__(self, child: Child, client: httpx.AsyncClient) -> None:
        self.child = child
        self.client = client
        self.url = str(client.base_url).rstrip("/")

    async def complete(self, prompt: Sequence[int], n_tokens: int) -> Completion:
        """Greedy. Raises `RigError`."""
        body = {
            "prompt": list(prompt),
            "n_predict": n_tokens,
            "temperature": 0,
            "top_k": 1,
            "samplers": ["top_k", "temperature"],
            "return_tokens": True,
            "cache_prompt": True,
        }
        try:
            response = await self.client.post("/completion", json=body)
            response.raise_for_status()
        except httpx.HTTPError as exc:
            raise RigError(f"{self.child.told()}: {exc!r}") from None
        answer = response.json()
        timings = answer["timings"]
        return Completion(
            tokens=tuple(answer["tokens"]),
            prompt_ms=timings["prompt_ms"],
            generate_ms=timings["predicted_ms"],
            drafted=timings.get("draft_n", 0),
            accepted=timings.get("draft_n_accepted", 0),
        )

    async def tokenize(self, text: str) -> list[int]:
        response = await self.client.post("/tokenize", json={"content": text, "add_special": True})
        response.raise_for_status()
        return [int(token) for token in response.json()["tokens"]]


@dataclass
class Rig:
    """Starts programs. `threads`: of each of them. Use it inside `running`."""

    engine: Engine
    spawner: Spawner
    relay: RelayProcess
    threads: int
    direct: bool
    nursery: trio.Nursery
    _stack: AsyncExitStack
    _n: dict[str, int] = field(default_factory=dict)

    @classmethod
    @asynccontextmanager
    async def running(
        cls, engine_dir: Path, work_dir: Path, *, threads: int = 1, direct: bool = False
    ) -> AsyncIterator[Rig]:
        """`direct`: no relay in between. Raises `RigError`, `EngineError` or `TightwadError`."""
        engine = Engine(engine_dir, digest="", protocol="")
        async with trio.open_nursery() as nursery, RelayProcess.running() as relay, AsyncExitStack() as stack:
            spawner = Spawner(nursery, work_dir)
            yield cls(engine, spawner, relay, threads, direct, nursery, stack)
            await stack.aclose()
            nursery.cancel_scope.cancel()

    async def start(self, name: str, argv: Sequence[str], pass_fds: Sequence[int] = (), *, grace_s: float = 0) -> Child:
        """A program that runs for as long as the rig, and has so long to end what it started itself."""
        self._n[name] = self._n.get(name, 0) + 1
        running = self.spawner.running(f"{name}-{self._n[name]}", argv, grace_s=grace_s, pass_fds=pass_fds)
        return await self._stack.enter_async_context(running)

    async def enter(self, manager: contextlib.AbstractAsyncContextManager[Any]) -> Any:
        """Something else that ends with the rig."""
        return await self._stack.enter_async_context(manager)

    async def port_of(self, child: Child, port: int, deadline_s: float = START_S) -> int:
        """Waits until the child listens on its port."""
        with trio.move_on_after(deadline_s):
            while child.code is None:
                if await listens(child.pid, port):
                    return port
                await trio.sleep(POLL_S)
        raise RigError(f"{child.told()}; waited for it to listen")

    async def workers(self, n: int = 3) -> tuple[int, ...]:
        """Fresh workers on their CPUs, each behind a link of its own: the ports of the links."""
        ports = []
        for _ in range(n):
            port = await free_port()
            argv = worker_argv(self.engine.worker, port=port, devices=["CPU"], threads=self.threads)
            await self.port_of(await self.start("worker", argv), port)
            ports.append(await self.link(port))
        return tuple(ports)

    async def link(self, port: int) -> int:
        """A port that leads to loopback port `port` through the network."""
        return port if self.direct else await self.relay.link(port)

    async def server(
        self, model: Path, rpc_ports: tuple[int, ...], *, draft: Path | None = None, n_max: int = 0, context: int = 2048
    ) -> LlamaServer:
        """llama-server over these workers with the product's own flags; `n_max` tokens a draft, made in its process."""
        port = await free_port()
        options = self._options(model, rpc_ports, context, port=port, draft=str(draft) if draft else None)
        argv = server_argv(self.engine.server, options)
        if draft:
            argv[argv.index("--spec-draft-n-max") + 1] = str(n_max)
        child = await self.start("llama-server", argv)
        base = f"http://127.0.0.1:{port}"
        client = await self.enter(httpx.AsyncClient(base_url=base, timeout=ANSWER_S, trust_env=False))
        await self._healthy(child, client)
        return LlamaServer(child, client)

    async def verifier(
        self, model: Path, rpc_ports: tuple[int, ...], *, context: int = 2048
    ) -> tuple[VerifierClient, Child]:
        """The verifier over these workers, started as the product starts it, and its process."""
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            child = await self.start("verifier", by_verifier.command(fd), pass_fds=(fd,))
        client = VerifierClient(ours)
        self.nursery.start_soon(client.run)
        client.load(verifier_load(str(self.engine.folder), self._options(model, rpc_ports, context)))
        await client.settled(LOAD_S)
        if client.loaded is None:
            why = client.refused.reason if client.refused else "it did not load"
            raise RigError(f"{child.told()}: {why}\n" + "\n".join(list(child.tail)[-10:]))
        return client, child

    def _options(
        self, model: Path, rpc_ports: tuple[int, ...], context: int, *, port: int = 0, draft: str | None = None
    ) -> ServerOptions:
        return ServerOptions(
            model=str(model),
            port=port,
            context=context,
            draft=draft,
            threads=self.threads,
            rpc_ports=rpc_ports,
            rpc_shares=(1,) * len(rpc_ports),
        )

    async def _healthy(self, child: Child, client: httpx.AsyncClient) -> None:
        with trio.move_on_after(LOAD_S):
            while child.code is None:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("/health")).status_code == httpx.codes.OK:
                        return
                await trio.sleep(0.1)
        raise RigError(f"{child.told()}; waited for it to load\n" + "\n".join(list(child.tail)[-10:]))

    async def drafter(self, model: Path, work_dir: Path) -> int:
        """A node that drafts with this model; the port of its service, not behind a link yet."""
        facts = {"engine": self.engine.folder, "model": model, "work": work_dir, "threads": self.threads}
        flags = [text for name, value in facts.items() for text in (f"--{name}", str(value))]
        return (await self.script("drafter_node", *flags))[1]

    async def link_to(
        self, port: int, describe: Callable[[int], DrafterInfo], n_vocab: int, host: str = "127.0.0.1"
    ) -> tuple[DraftLink, trio.CancelScope]:
        """A fresh stream to a drafter, as the coordinator holds it, and what ends it. Raises `RigError`."""
        stream = await trio.open_tcp_stream(host, port)
        framed = Framed(stream, FROM_DRAFTER)
        try:
            hello = await framed.expect(Hello, deadline_s=START_S)
        except PeerError as exc:
            relay = await self.relay.stats()
            raise RigError(f"the drafter behind port {port} said no hello: {exc.message}; the relay: {relay}") from None
        link, scope = DraftLink(framed.detach(), hello, n_vocab, describe), trio.CancelScope()

        async def run() -> None:
            with scope:
                await link.run()

        self.nursery.start_soon(run)
        return link, scope

    async def script(self, name: str, *args: str) -> tuple[Child, int]:
        """A Python script of this folder that says on which port it listens, and that port."""
        port = await free_port()
        argv = [sys.executable, "-I", str(SCRIPTS / f"{name}.py"), str(port), *args]
        child = await self.start(name, argv, grace_s=GRACE_S)
        return child, await self.port_of(child, port, LOAD_S)
