"""Locks and files of a state directory, between real processes."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tightwad_agent import control
from tightwad_agent.control import ADMIN_KEY_FILE, LOCK_FILE, RUN_FILE, AgentClient, RunInfo, StateLock
from tightwad_agent.errors import AgentNotRunning, AgentRunning, EnvironmentFault

HOLD = """
import sys
from pathlib import Path
from tightwad_agent.control import StateLock
lock = StateLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""
HOLD_WITH_A_CHILD = """
import subprocess, sys
from pathlib import Path
from tightwad_agent.control import StateLock
lock = StateLock(Path(sys.argv[1]))
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=0, close_fds=False)
print(child.pid, flush=True)
child.wait()
"""
INFO = RunInfo(pid=4711, endpoint_port=8088, mesh_port=8089)


@contextmanager
def another_process(state_dir: Path, code: str = HOLD) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that has the lock, and its first line of output."""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(state_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_one_agent_for_each_directory(tmp_path: Path) -> None:
    with another_process(tmp_path) as (process, line):
        assert line == "held"
        with pytest.raises(AgentRunning) as caught:
            StateLock(tmp_path, patience_s=0)
        assert str(tmp_path) in caught.value.message
        assert "--state-dir" in caught.value.hint
        with StateLock(tmp_path / "another"):
            pass
        process.communicate("")
        with StateLock(tmp_path):
            pass


def test_a_killed_agent_leaves_the_directory_free(tmp_path: Path) -> None:
    with another_process(tmp_path) as (process, _line):
        process.send_signal(signal.SIGKILL)
        process.wait()
        with StateLock(tmp_path, patience_s=0):
            pass
    assert (tmp_path / LOCK_FILE).exists()


def test_a_child_that_outlives_the_agent_does_not_hold_its_lock(tmp_path: Path) -> None:
    with another_process(tmp_path, HOLD_WITH_A_CHILD) as (process, child):
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(int(child), 0)  # it lives
        with StateLock(tmp_path, patience_s=0):
            pass


def test_a_look_at_the_lock_does_not_stop_an_agent_that_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [False, False, True]
    monkeypatch.setattr(control, "_lock", lambda _file: answers.pop(0))
    with StateLock(tmp_path):
        assert answers == []


def test_the_lock_is_free_after_an_error_inside(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), StateLock(tmp_path):
        raise ZeroDivisionError
    with StateLock(tmp_path, patience_s=0):
        pass


def test_a_new_state_directory_is_private(tmp_path: Path) -> None:
    with StateLock(tmp_path / "state"):
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_directory_that_cannot_be_used_is_an_error_with_a_way_out(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault) as caught:
        StateLock(tmp_path / where)
    assert str(tmp_path / where) in caught.value.message
    assert "--state-dir" in caught.value.hint


WRITE_NOTHING = """
import os, sys
from pathlib import Path
from tightwad_agent import control
from tightwad_agent.errors import EnvironmentFault
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
state = Path(sys.argv[1])
for act in (control.StateLock, control.admin_key, lambda d: control.announce(d, control.RunInfo(1, 2, 3))):
    try:
        act(state)
    except EnvironmentFault as exc:
        print(type(exc).__name__, exc.message)
    else:
        print("no error")
"""


@pytest.fixture
def read_only() -> Iterator[Path]:
    """An empty directory where an ordinary user can read and not write; pytest's own is closed to other users."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        state = Path(folder) / "state"
        state.mkdir()
        state.chmod(0o555)
        yield state
        state.chmod(0o755)


def test_a_directory_of_somebody_else_is_an_error_and_no_traceback(read_only: Path) -> None:
    state = read_only
    done = subprocess.run(
        [sys.executable, "-c", WRITE_NOTHING, str(state)], capture_output=True, text=True, timeout=60, check=False
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert all(line.startswith("EnvironmentFault") and str(state) in line for line in lines), lines
    assert list(state.iterdir()) == []


# The admin key


def test_the_admin_key_is_made_once_and_for_the_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        key = control.admin_key(tmp_path)
    finally:
        os.umask(before)
    assert len(key) >= 43
    assert control.admin_key(tmp_path) == key
    assert stat.S_IMODE((tmp_path / ADMIN_KEY_FILE).stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == [ADMIN_KEY_FILE]


@pytest.mark.parametrize("damaged", [b"", b"short", b"\xff" * 40, b"x" * 31, b"two lines of it\n" * 4, b"\x00" * 64])
def test_a_damaged_admin_key_is_made_anew(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / ADMIN_KEY_FILE).write_bytes(damaged)
    key = control.admin_key(tmp_path)
    assert len(key) >= 43
    assert control.admin_key(tmp_path) == key


def test_an_admin_key_that_others_could_read_is_made_private(tmp_path: Path) -> None:
    key = control.admin_key(tmp_path)
    (tmp_path / ADMIN_KEY_FILE).chmod(0o644)
    assert control.admin_key(tmp_path) == key
    assert stat.S_IMODE((tmp_path / ADMIN_KEY_FILE).stat().st_mode) == 0o600


def test_a_link_left_in_the_directory_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / RUN_FILE).symlink_to(victim)
    control.announce(tmp_path, INFO)
    assert victim.read_text() == "precious"


# Finding the agent


def test_a_running_agent_is_found_and_a_stale_file_is_not_believed(tmp_path: Path) -> None:
    assert control.running(tmp_path) is None
    control.announce(tmp_path, INFO)
    assert stat.S_IMODE((tmp_path / RUN_FILE).stat().st_mode) == 0o600
    assert control.running(tmp_path) is None, "nobody holds the lock: the file is of an agent that was killed"
    with another_process(tmp_path):
        assert control.running(tmp_path) == INFO
        control.retract(tmp_path)
        assert control.running(tmp_path) is None
        control.retract(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"x"',
        "{}",
        '{"pid": 1}',
        '{"pid": "x", "endpoint_port": 1, "mesh_port": 2}',
        '{"pid": 1e999, "endpoint_port": 1, "mesh_port": 2}',
        '{"pid": null, "endpoint_port": 1, "mesh_port": 2}',
    ],
)
def test_a_damaged_run_file_is_no_agent(tmp_path: Path, text: str) -> None:
    with StateLock(tmp_path):
        (tmp_path / RUN_FILE).write_text(text)
        assert control.running(tmp_path) is None
        (tmp_path / RUN_FILE).write_bytes(b"\xff\xfe")
        assert control.running(tmp_path) is None


def test_a_command_without_an_agent_says_so_and_makes_no_directory(tmp_path: Path) -> None:
    with pytest.raises(AgentNotRunning) as caught:
        AgentClient(tmp_path / "none").call("peers")
    assert str(tmp_path / "none") in caught.value.message
    assert "--state-dir" in caught.value.hint
    assert not (tmp_path / "none").exists()


def test_a_command_to_an_agent_that_does_not_answer_says_so(tmp_path: Path) -> None:
    with StateLock(tmp_path):
        (tmp_path / RUN_FILE).write_text(json.dumps({"pid": 1, "endpoint_port": 1, "mesh_port": 1}))
        with pytest.raises(AgentNotRunning, match="port 1"):
            AgentClient(tmp_path).call("peers")
