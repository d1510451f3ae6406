"""Does this engine run on this machine? Its programs start, HELLO has the right version, and a model generates.

Binaries built for another CPU die with SIGILL, some only inside a kernel of one quantisation: so a small model with
several of them is made, loaded and run (see `tinymodel`). Everything runs on loopback and ends with the test.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import trio

from tightwad_agent.engine.argv import ServerOptions, server_argv, worker_argv
from tightwad_agent.engine.capability import CPU, parse_devices
from tightwad_agent.engine.hello import RpcVersion, probe
from tightwad_agent.engine.pins import RPC_SERVER, SERVER
from tightwad_agent.engine.process import Child, Spawner, describe_exit, free_port
from tightwad_agent.engine.tinymodel import tiny_model
from tightwad_agent.errors import EngineBroken, PeerGone, TightwadError
from tightwad_agent.wire.rows import Device

T = TypeVar("T")

MAX_LINES = 400
MAX_ANSWER_BYTES = 1 << 20
_TRIES = 3
_POLL_S = 0.05
_PORT_TAKEN = re.compile(r"bind|server socket|address already in use", re.IGNORECASE)
_ILLEGAL_INSTRUCTION = (-signal.SIGILL, 128 + signal.SIGILL, -1073741795, 3221225501)
"""As Popen, a shell and Windows (0xC000001D) report it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds. The first start of a GPU build compiles kernels, which takes a while on a slow machine."""

    program_s: float = 60.0
    worker_s: float = 60.0
    hello_s: float = 10.0
    generate_s: float = 240.0


@dataclass(frozen=True, slots=True)
class SmokeResult:
    """What a working engine said: RPC version, devices (without CPUs), and the number in `--version` (0: unknown)."""

    protocol: RpcVersion
    devices: tuple[Device, ...]
    build_number: int


async def smoke(
    engine_dir: Path,
    model: Path | None = None,
    *,
    limits: Limits | None = None,
    environ: Mapping[str, str] | None = None,
) -> SmokeResult:
    """Runs the whole test. Raises `EngineBroken`, which says what died and how. `model`: a made-up one by default."""

    async def run(test: _Test, scratch: Path) -> SmokeResult:
        gguf = scratch / "tiny.gguf" if model is None else model
        if model is None:
            await trio.to_thread.run_sync(_write_model, gguf)
        version = await test.output(SERVER, "--version")
        devices = parse_devices("\n".join(await test.output(SERVER, "--list-devices")))
        protocol = await test.hello()
        await test.generate(gguf, devices)
        return SmokeResult(protocol, devices, build_number("\n".join(version)))

    return await _testing(engine_dir, limits or Limits(), environ, run)


async def _testing(
    engine_dir: Path,
    limits: Limits,
    environ: Mapping[str, str] | None,
    run: Callable[[_Test, Path], Awaitable[T]],
) -> T:
    """`run` with a folder and children that are gone afterwards; its error comes out as it is, in no group."""
    answers: list[T] = []
    failures: list[TightwadError] = []
    scratch = Path(await trio.to_thread.run_sync(lambda: tempfile.mkdtemp(prefix="tightwad-smoke-")))
    try:
        async with trio.open_nursery() as nursery:
            try:
                answers.append(
                    await run(_Test(Spawner(nursery, scratch, environ=environ), engine_dir, limits), scratch)
                )
            except TightwadError as exc:
                failures.append(exc)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lambda: shutil.rmtree(scratch, ignore_errors=True))
    return _unwrap(answers, failures)


def build_number(version: str) -> int:
    """The build number in the output of `--version`, as release builds have it; 0 for builds without one."""
    for line in version.splitlines():
        if line.startswith("version:"):
            words = line.replace("(", " ").replace(",", " ").split()[1:]
            after_build = words[words.index("build") + 1 :] if "build" in words else words
            if after_build and after_build[0].isdecimal() and len(after_build[0]) < 10:
                return int(after_build[0])
    return 0


class _Test:
    def __init__(self, spawner: Spawner, engine_dir: Path, limits: Limits) -> None:
        self._spawner = spawner
        self._dir = engine_dir
        self._limits = limits

    async def output(self, program: str, *args: str) -> list[str]:
        """The lines of a program that ends by itself."""
        lines: deque[str] = deque(maxlen=MAX_LINES)
        argv = [str(self._dir / program), *args]
        async with self._spawner.running(program, argv, on_line=lines.append) as child:
            with trio.move_on_after(self._limits.program_s):
                if await child.wait() != 0:
                    raise died(program, child, lines, self._dir)
                return list(lines)
        raise EngineBroken(f"{argv[0]} {' '.join(args)} did not end within {self._limits.program_s:g} s")

    async def hello(self) -> RpcVersion:
        """Starts a worker on the CPU and asks its version."""

        def argv(port: int) -> list[str]:
            return worker_argv(str(self._dir / RPC_SERVER), port=port, devices=(CPU,), threads=1)

        async def ask(port: int) -> RpcVersion:
            while True:
                with suppress(PeerGone):  # it does not listen yet
                    return await probe(port, deadline_s=self._limits.hello_s)
                await trio.sleep(_POLL_S)

        return await self._serving(RPC_SERVER, argv, ask, self._limits.worker_s)

    async def generate(self, model: Path, devices: tuple[Device, ...]) -> None:
        """Loads the model, on GPUs where there are some, and generates one token."""
        names = tuple(device.name for device in devices if device.memory_total > 0)

        def argv(port: int) -> list[str]:
            options = ServerOptions(model=str(model), port=port, context=64, slots=1, threads=2, local_devices=names)
            return server_argv(str(self._dir / SERVER), options)

        async def ask(port: int) -> None:
            while (await _request(port, "GET", "/health"))[0] != 200:  # noqa: ASYNC110 - another process gets ready
                await trio.sleep(_POLL_S)
            status, answer = await _request(port, "POST", "/completion", {"prompt": "a b", "n_predict": 1})
            if status != 200 or answer.get("tokens_predicted") != 1:
                raise EngineBroken(f"{self._dir / SERVER} did not generate: HTTP {status} {json.dumps(answer)[:300]}")

        await self._serving(SERVER, argv, ask, self._limits.generate_s)

    async def _serving(
        self, program: str, argv: Callable[[int], list[str]], ask: Callable[[int], Awaitable[T]], deadline_s: float
    ) -> T:
        """What `ask` got from a program that listens on a port."""
        for _ in range(_TRIES):
            port = await free_port()
            lines: deque[str] = deque(maxlen=MAX_LINES)
            async with self._spawner.running(program, argv(port), grace_s=0, on_line=lines.append) as child:
                with trio.move_on_after(deadline_s):
                    answers, failures = await _while_running(child, ask, port)
                    if answers or failures:
                        return _unwrap(answers, failures)
                if child.code is None:
                    raise EngineBroken(
                        f"{self._dir / program} gave no answer within {deadline_s:g} s", hint=_last(lines)
                    )
                if not any(_PORT_TAKEN.search(line) for line in lines):
                    raise died(program, child, lines, self._dir)
        raise EngineBroken(f"{self._dir / program} could not listen on any of {_TRIES} free ports")


def _unwrap(answers: list[T], failures: list[TightwadError]) -> T:
    if failures:
        raise failures[0]
    return answers[0]


async def _while_running(
    child: Child, ask: Callable[[int], Awaitable[T]], port: int
) -> tuple[list[T], list[TightwadError]]:
    answers: list[T] = []
    failures: list[TightwadError] = []
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await child.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            answers.append(await ask(port))
        except TightwadError as exc:
            failures.append(exc)
        nursery.cancel_scope.cancel()
    return answers, failures


def died(program: str, child: Child, lines: Iterable[str], engine_dir: Path) -> EngineBroken:
    """How a program of the engine ended, in words that help."""
    code = child.code or 0
    if code in _ILLEGAL_INSTRUCTION:
        return EngineBroken(
            f"{engine_dir / program} was built for another CPU: it died of an illegal instruction (SIGILL)",
            hint="remove that build; `tightwad-agent engine install` gets one for this machine",
        )
    return EngineBroken(f"{engine_dir / program} {describe_exit(code)} in its test", hint=_last(lines))


def _last(lines: Iterable[str]) -> str:
    return "\n".join([line for line in lines if line.strip()][-8:])[-1500:]


def _write_model(path: Path) -> None:
    path.write_bytes(tiny_model())


async def _request(port: int, method: str, path: str, body: object = None) -> tuple[int, dict[str, Any]]:
    """One HTTP/1.0 request to a server of ours on loopback; (0, {}) while it does not listen or breaks off."""
    payload = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    answer = bytearray()
    try:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(head.encode() + payload)
            async for chunk in stream:
                answer += chunk
                if len(answer) > MAX_ANSWER_BYTES:
                    break
    except (OSError, trio.BrokenResourceError):
        return 0, {}
    first, _, text = bytes(answer).partition(b"\r\n\r\n")
    words = first.split(maxsplit=2)
    if len(words) < 2 or not words[1].isdigit():
        return 0, {}
    try:
        plain = json.loads(text)
    except ValueError:
        plain = {}
    return int(words[1]), plain if isinstance(plain, dict) else {}
