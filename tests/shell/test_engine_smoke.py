"""The smoke test and HELLO, against programs that fail in every way."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import trio
from fake_engine import make_engine, server_script, shell_script, worker_script

from tightwad_agent.engine import hello
from tightwad_agent.engine.smoke import Limits, smoke
from tightwad_agent.errors import EngineBroken, EngineMismatch, PeerGone, PeerSilent

HASTY = Limits(program_s=20, worker_s=20, hello_s=5, generate_s=20)


async def test_a_working_engine_passes(tmp_path: Path) -> None:
    result = await smoke(make_engine(tmp_path / "e", server_script(build=77)), limits=HASTY)
    assert (result.protocol, result.devices, result.build_number) == ((7, 0, 0), (), 77)


@pytest.mark.parametrize(
    ("server", "worker", "words"),
    [
        (shell_script("kill -ILL $$"), None, r"llama-server was built for another CPU.*SIGILL"),
        (None, shell_script("kill -ILL $$"), r"ggml-rpc-server was built for another CPU.*SIGILL"),
        (shell_script("exit 132"), None, r"built for another CPU"),
        (shell_script("kill -SEGV $$"), None, r"llama-server was ended by SIGSEGV"),
        (shell_script("echo no GLIBC_2.99 here >&2; exit 1"), None, r"(?s)exited with code 1.*no GLIBC_2\.99 here"),
        (None, shell_script("echo unknown argument; exit 0"), r"(?s)ended by itself.*unknown argument"),
        ("#!/no/such/interpreter\n", None, r"(?s)exited with code 127.*cannot run"),
        (server_script(tokens=0), None, r"did not generate"),
    ],
)
async def test_what_fails_in_the_test_is_named(
    tmp_path: Path, server: str | None, worker: str | None, words: str
) -> None:
    with pytest.raises(EngineBroken, match=words):
        await smoke(make_engine(tmp_path / "e", server, worker), limits=HASTY)


@pytest.mark.parametrize("program", ["server", "worker"])
async def test_a_program_that_hangs_meets_its_deadline_and_is_gone(tmp_path: Path, program: str) -> None:
    hang = shell_script(f"echo $$ >> {tmp_path}/pids; exec sleep 1000")
    engine = make_engine(tmp_path / "e", **{program: hang})
    with pytest.raises(EngineBroken, match=r"did not end within|gave no answer within"):
        await smoke(engine, limits=replace(HASTY, program_s=1, worker_s=1))
    assert not psutil.pid_exists(int((tmp_path / "pids").read_text().split()[0]))


async def test_a_server_that_never_gets_ready_meets_its_deadline(tmp_path: Path) -> None:
    script = (
        server_script()
        .replace('{"status": "ok"}', "None")
        .replace("self.send_response(200)", "self.send_response(503)")
    )
    with pytest.raises(EngineBroken, match="gave no answer within 1 s"):
        await smoke(make_engine(tmp_path / "e", script), limits=replace(HASTY, generate_s=1))


async def test_a_cancelled_test_leaves_no_process(tmp_path: Path) -> None:
    started = f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\nimport socket, sys"
    engine = make_engine(
        tmp_path / "e", worker=worker_script().replace("import socket, sys", started).replace("sendall", "recv")
    )
    async with trio.open_nursery() as inner:
        inner.start_soon(lambda: smoke(engine, limits=HASTY))
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
            await trio.sleep(0.01)
        inner.cancel_scope.cancel()
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


async def test_a_bundles_library_path_does_not_reach_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = server_script().replace(
        "import http",
        f"import os; open({str(tmp_path / 'env')!r}, 'a').write(repr(dict(os.environ)) + chr(10))\nimport http",
    )
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    environ = {"PATH": os.environ["PATH"], "LD_LIBRARY_PATH": "/bundle", "LLAMA_ARG_PORT": "1", "SECRET": "s"}
    await smoke(make_engine(tmp_path / "e", script), limits=HASTY, environ=environ)
    await smoke(make_engine(tmp_path / "f", script), limits=HASTY, environ=environ | {"LD_LIBRARY_PATH_ORIG": "/users"})
    seen = [eval(line) for line in (tmp_path / "env").read_text().splitlines()]
    assert [e.get("LD_LIBRARY_PATH") for e in seen] == [None] * 3 + ["/users"] * 3
    assert not any("LLAMA_ARG_PORT" in e or "SECRET" in e for e in seen)


# HELLO


async def answering(nursery: trio.Nursery, data: bytes | None) -> int:
    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            if data is None:
                await trio.sleep_forever()
            await stream.receive_some(33)
            with suppress(trio.BrokenResourceError):
                for byte in data:
                    await stream.send_all(bytes([byte]))

    listeners = await nursery.start(
        lambda task_status: trio.serve_tcp(serve, 0, host="127.0.0.1", task_status=task_status)
    )
    return int(listeners[0].socket.getsockname()[1])


async def test_the_version_is_asked_of_a_port(nursery: trio.Nursery) -> None:
    assert await hello.probe(await answering(nursery, hello.encode_response((6, 1, 2)))) == (6, 1, 2)


async def test_a_port_with_something_else_is_said(nursery: trio.Nursery) -> None:
    with pytest.raises(EngineMismatch, match="something else"):
        await hello.probe(await answering(nursery, b"HTTP/1.1 400 Bad Request\r\n"))
    with pytest.raises(PeerGone, match="hung up"):
        await hello.probe(await answering(nursery, hello.encode_response((7, 0, 0))[:20]))
    with pytest.raises(PeerSilent, match="did not answer HELLO within 0"):
        await hello.probe(await answering(nursery, None), deadline_s=0.05)
