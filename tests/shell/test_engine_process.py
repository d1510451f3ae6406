"""Children: environment, output, endings, and what an agent that was killed leaves behind. Real processes."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import trio

from tightwad_agent.engine.children import Children, identify, program
from tightwad_agent.engine.process import LogFile, Spawner, clean_environment, describe_exit, free_port

SLEEPER = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
)


def python(code: str, *args: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code, *args]


@pytest.fixture
def spawner(nursery: trio.Nursery, tmp_path: Path) -> Spawner:
    return Spawner(nursery, tmp_path, environ=os.environ)


class Lines:
    """Wakes whoever waits for a line of output."""

    def __init__(self) -> None:
        self.send, self.receive = trio.open_memory_channel[str](1000)

    def __call__(self, line: str) -> None:
        self.send.send_nowait(line)

    async def until(self, text: str) -> None:
        with trio.fail_after(20):
            while text not in await self.receive.receive():
                pass


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def until_gone(pid: int) -> None:
    with trio.fail_after(20):
        while not gone(pid):
            await trio.sleep(0.01)


# Output


async def test_output_is_kept_in_the_tail_and_in_the_log(spawner: Spawner, tmp_path: Path) -> None:
    code = "import sys; print('out'); sys.stdout.flush(); print('err', file=sys.stderr); sys.stderr.write('no newline')"
    async with spawner.running("thing", python(code)) as child:
        assert await child.wait() == 0
    assert list(child.tail) == ["out", "err", "no newline"]
    path = tmp_path / "logs" / "thing.log"
    assert path.read_text() == "out\nerr\nno newline"
    assert path.stat().st_mode & 0o777 == 0o600


async def test_a_flood_of_output_is_bounded_and_never_blocks_the_child(spawner: Spawner, tmp_path: Path) -> None:
    code = "for i in range(100000): print('x' * 60, i)\nprint('y' * 100000)"
    async with spawner.running("thing", python(code)) as child:
        with trio.fail_after(60):
            assert await child.wait() == 0
    assert len(child.tail) == 200
    assert child.tail[-1] == "y" * 2048
    logs = list((tmp_path / "logs").iterdir())
    assert {path.name for path in logs} == {"thing.log", "thing.log.1"}
    assert sum(path.stat().st_size for path in logs) <= 4 << 20


async def test_a_line_without_end_is_not_kept(spawner: Spawner) -> None:
    code = "import sys\nfor i in range(64): sys.stdout.write('z' * (1 << 20))"
    async with spawner.running("thing", python(code)) as child:
        with trio.fail_after(60):  # kept whole it would be copied again with each read: minutes
            await child.wait()
    assert list(child.tail) == ["z" * 2048]


async def test_a_log_that_cannot_be_written_does_not_stop_the_child(nursery: trio.Nursery, tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    async with Spawner(nursery, tmp_path).running("thing", python("print('hello')")) as child:
        assert await child.wait() == 0
    assert list(child.tail) == ["hello"]


def test_the_log_keeps_one_predecessor(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "x.log", max_bytes=10)
    for part in (b"aaaaaaaa", b"bbbbbbbb", b"cccccccc"):
        log.write(part)
    log.close()
    assert (tmp_path / "x.log").read_bytes() == b"cccccccc"
    assert (tmp_path / "x.log.1").read_bytes() == b"bbbbbbbb"
    log.write(b"after the end")


# Environment


def test_nothing_secret_and_nothing_that_steers_llama_cpp_is_inherited() -> None:
    environ = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "CUDA_VISIBLE_DEVICES": "0",
        "HF_TOKEN": "secret",
        "LLAMA_ARG_HOST": "0.0.0.0",
        "LLAMA_API_KEY": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "PYTHONPATH": "/x",
        "LD_PRELOAD": "/x.so",
        "LD_LIBRARY_PATH": "/cuda",
    }
    kept = {"PATH": "/bin", "LC_ALL": "C", "CUDA_VISIBLE_DEVICES": "0"}
    assert clean_environment(environ, frozen=False) == kept | {"LD_LIBRARY_PATH": "/cuda"}


def test_the_library_path_of_a_bundle_is_not_inherited() -> None:
    environ = {"LD_LIBRARY_PATH": "/bundle"}
    assert clean_environment(environ, frozen=True) == {}
    assert clean_environment(environ | {"LD_LIBRARY_PATH_ORIG": "/cuda"}, frozen=True) == {"LD_LIBRARY_PATH": "/cuda"}


async def test_a_child_gets_the_clean_environment_and_normal_signals(nursery: trio.Nursery, tmp_path: Path) -> None:
    environ = dict(os.environ) | {"HF_TOKEN": "secret", "LC_TEST": "kept"}
    spawner = Spawner(nursery, tmp_path, environ=environ)
    async with spawner.running("env", ["/usr/bin/env"]) as child:
        await child.wait()
    assert "LC_TEST=kept" in child.tail
    assert not any("HF_TOKEN" in line for line in child.tail)
    async with spawner.running("status", ["/bin/cat", "/proc/self/status"]) as child:
        await child.wait()
    (ignored,) = [int(line.split()[1], 16) for line in child.tail if line.startswith("SigIgn:")]
    assert not [s for s in (signal.SIGPIPE, signal.SIGXFSZ) if ignored & 1 << (s - 1)], "ignored as Python does"


async def test_a_file_descriptor_goes_to_one_child_only(spawner: Spawner) -> None:
    """A copy in another child would keep a connection open behind the back of a dead one."""
    code = "import os, sys; print(*sorted(os.listdir('/proc/self/fd'), key=int)); sys.stdin.close()"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fd = theirs.fileno()
        talk = f"import socket; s = socket.socket(fileno={fd}); s.sendall(s.recv(9).upper())"
        async with spawner.running("one", python(talk), pass_fds=(fd,)) as one:
            theirs.close()
            async with spawner.running("other", python(code)) as other:
                await other.wait()
            ours.sendall(b"hello")
            await one.wait()
        assert list(other.tail) == ["0 1 2 3"]  # 3 is the listing itself
        assert ours.recv(9) == b"HELLO"
        assert ours.recv(9) == b""
        async with spawner.running("none", python(code), pass_fds=(ours.fileno(),)) as third:
            await third.wait()
        assert str(ours.fileno()) in third.tail[0].split()
        assert not os.get_inheritable(ours.fileno())


# Endings


async def test_a_child_ends_with_its_block_and_is_reaped(spawner: Spawner, tmp_path: Path) -> None:
    lines = Lines()
    async with spawner.running("thing", python(SLEEPER), on_line=lines) as child:
        await lines.until("up")
        assert os.getpgid(child.pid) == child.pid
        [row] = json.loads((tmp_path / "children.json").read_text())
        assert row["pid"] == child.pid
    assert child.code == -signal.SIGTERM
    assert not psutil.pid_exists(child.pid)
    assert json.loads((tmp_path / "children.json").read_text()) == []


async def test_one_that_ignores_sigterm_is_killed_after_its_grace(spawner: Spawner) -> None:
    lines = Lines()
    async with spawner.running("thing", python(STUBBORN), grace_s=0.2, on_line=lines) as child:
        await lines.until("up")
    assert child.code == -signal.SIGKILL


async def test_no_grace_kills_at_once(spawner: Spawner) -> None:
    async with spawner.running("thing", python(SLEEPER), grace_s=0) as child:
        pass
    assert child.code == -signal.SIGKILL


async def test_a_stopped_child_ends_too(spawner: Spawner) -> None:
    async with spawner.running("thing", python(SLEEPER), grace_s=0.1) as child:
        os.kill(child.pid, signal.SIGSTOP)
        with trio.fail_after(20):
            while psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:
                await trio.sleep(0.01)
    assert child.code == -signal.SIGKILL


async def test_cancellation_leaves_nothing(spawner: Spawner) -> None:
    lines = Lines()
    with trio.CancelScope() as scope:
        async with spawner.running("thing", python(STUBBORN), grace_s=0.1, on_line=lines) as child:
            await lines.until("up")
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert not psutil.pid_exists(child.pid)


async def test_an_error_in_the_block_passes_and_leaves_nothing(spawner: Spawner) -> None:
    with pytest.raises(KeyError):
        async with spawner.running("thing", python(SLEEPER)) as child:
            raise KeyError
    assert not psutil.pid_exists(child.pid)


async def test_a_program_that_is_not_there(spawner: Spawner) -> None:
    async with spawner.running("thing", ["/nonexistent/llama-server"]) as child:
        assert await child.wait() == 127
    assert child.told() == (
        "thing exited with code 127 (cannot run /nonexistent/llama-server: No such file or directory)"
    )


async def test_how_it_ended_in_words(spawner: Spawner) -> None:
    async with spawner.running("thing", python("import os; print('oh no', flush=True); os.abort()")) as child:
        assert child.told() in ("thing is running", "thing was ended by SIGABRT", "thing was ended by SIGABRT (oh no)")
        await child.wait()
    assert child.told() == "thing was ended by SIGABRT (oh no)"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "ended by itself"),
        (3, "exited with code 3"),
        (-9, "was ended by SIGKILL"),
        (-222, "was ended by signal 222"),
    ],
)
def test_exit_codes_in_words(code: int, words: str) -> None:
    assert describe_exit(code) == words


async def test_a_free_port_is_free() -> None:
    port = await free_port()
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    await listeners[0].aclose()


# The agent dies

AGENT = """
import sys, trio
from pathlib import Path
from tightwad_agent.engine.process import Spawner

async def main():
    async with trio.open_nursery() as nursery:
        spawner = Spawner(nursery, Path(sys.argv[1]))
        async with spawner.running("thing", sys.argv[2:]) as child:
            await trio.sleep(float(0.2))
            print(child.pid, flush=True)
            await trio.sleep_forever()

trio.run(main)
"""


async def start_agent(state_dir: Path, *argv: str) -> tuple[subprocess.Popen[str], int]:
    agent = subprocess.Popen([sys.executable, "-c", AGENT, str(state_dir), *argv], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    line = await trio.to_thread.run_sync(agent.stdout.readline)
    return agent, int(line)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
async def test_a_killed_agent_takes_its_children_along(tmp_path: Path) -> None:
    agent, pid = await start_agent(tmp_path, *python(STUBBORN))
    assert not gone(pid)
    agent.kill()
    agent.communicate()
    await until_gone(pid)


async def test_the_child_outlives_the_threads_that_trio_throws_away(tmp_path: Path) -> None:
    """The death signal goes by thread: with a fork in a worker thread of trio the child dies with that thread."""
    agent, pid = await start_agent(tmp_path, *python(SLEEPER))
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        assert int(stat.rpartition(")")[2].split()[1]) == agent.pid
        main_thread = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        assert str(pid) in main_thread  # /proc lists children by the thread that forked them
    finally:
        agent.kill()
        agent.communicate()
    await until_gone(pid)


# The sweep


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["/bin/sleep", "600"])


def write_children(state_dir: Path, *rows: object) -> None:
    (state_dir / "children.json").write_text(json.dumps(rows))


def row_of(process: subprocess.Popen[bytes]) -> dict[str, object]:
    return {"pid": process.pid, "identity": identify(process.pid), "exe": program(process.pid)}


async def test_what_was_left_behind_is_ended(spawner: Spawner, tmp_path: Path) -> None:
    left = sleeper()
    write_children(tmp_path, row_of(left))
    [what] = await spawner.sweep()
    assert str(left.pid) in what
    assert left.wait(10) == -signal.SIGKILL
    assert await spawner.sweep() == []


@pytest.mark.parametrize(
    "lie", [{"identity": "another-boot 1"}, {"identity": "17.25"}, {"exe": "/usr/bin/llama-server"}]
)
async def test_a_stale_pid_never_ends_an_innocent_process(
    spawner: Spawner, tmp_path: Path, lie: dict[str, str]
) -> None:
    innocent = sleeper()
    try:
        write_children(tmp_path, row_of(innocent) | lie)
        assert await spawner.sweep() == []
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


@pytest.mark.parametrize(
    "text",
    [
        *["", "{", "null", "17", '{"pid": 1}', '["x", 3, null]', '[{"pid": "1"}]', "[" * 5000],
        *[f'[{{"pid": {pid}, "identity": "x", "exe": "y"}}]' for pid in ("-1", "1", "true", "99999999", "1e9")],
    ],
)
async def test_a_damaged_list_is_no_reason_to_fail(
    spawner: Spawner, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "children.json").write_text(text)
    with caplog.at_level(logging.ERROR):
        assert await spawner.sweep() == []
    assert json.loads((tmp_path / "children.json").read_text()) == []


async def test_the_sweep_never_ends_this_process(spawner: Spawner, tmp_path: Path) -> None:
    write_children(tmp_path, {"pid": os.getpid(), "identity": identify(os.getpid()), "exe": program(os.getpid())})
    assert await spawner.sweep() == []


def test_an_identity_does_not_outlive_its_process() -> None:
    process = sleeper()
    first = identify(process.pid)
    assert first == identify(process.pid)
    process.kill()
    process.wait()
    assert identify(process.pid) is None


def test_a_list_on_a_disk_that_refuses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    children = Children(tmp_path / "file" / "children.json")
    children.remember(5, "x", "/bin/true")
    assert "may outlive" in caplog.text
