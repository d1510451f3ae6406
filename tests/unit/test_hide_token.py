"""The token must not stay in the arguments that everybody on the machine can read: with real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tightwad_agent import hide_token

TOKEN = "tw1" + "Ab-_9" * 40
PROGRAM = """
import json, os, sys
from tightwad_agent import hide_token
argv = hide_token.from_argv(sys.argv[1:])
shown = open(f"/proc/{os.getpid()}/cmdline").read().split("\\0")[:-1]
fds = [int(fd) for fd in os.listdir("/proc/self/fd")]
opened = []
for fd in fds:
    try:
        opened.append(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        pass
print(json.dumps({"argv": argv, "shown": shown, "pipes": [o for o in opened[3:] if o.startswith("pipe:")]}))
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks into /proc")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hide") / "program.py"
    path.write_text(PROGRAM)
    return path


def start(program: Path, *args: str, flags: tuple[str, ...] = (), **options: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *flags, str(program), *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(hide_token.__file__).parents[1])},
        **options,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize(
    "args",
    [
        ["--join", TOKEN],
        [f"--join={TOKEN}"],
        ["up", "--join", TOKEN, "--no-mdns"],
        ["--state-dir", "/tmp/a b", "--join", TOKEN],
        ["join", TOKEN],
        ["join", TOKEN, "--json"],
        ["join", "--name", "attic", TOKEN],
        ["--state-dir", "x", "join", "--seed", "host:1", "--", TOKEN],
        ["--join", "tw1" + "x" * 3000],
    ],
)
def test_the_token_reaches_the_program_and_not_the_process_list(program: Path, args: list[str]) -> None:
    seen = start(program, *args)
    assert seen["argv"] == args
    assert not any("tw1" in arg for arg in seen["shown"]), seen["shown"]
    assert len(seen["shown"]) == len(args) + 2
    assert seen["pipes"] == [], "the pipe is closed once it was read"


def test_flags_of_the_interpreter_survive(program: Path) -> None:
    seen = start(program, "--join", TOKEN, flags=("-X", "utf8", "-W", "error"))
    assert seen["argv"] == ["--join", TOKEN]
    assert seen["shown"][1:5] == ["-X", "utf8", "-W", "error"]


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--join"],
        ["join"],
        ["--join", "-"],
        ["--join", ""],
        ["--join="],
        ["--join", "tw1short"],
        ["--join", "TW1" + "x" * 200],
        ["add", TOKEN],
        ["serve", TOKEN, "--draft", TOKEN],
        ["--name", TOKEN],
        [f"--name={TOKEN}"],
        [f"--joined={TOKEN}"],
        ["x" + TOKEN],
    ],
)
def test_everything_else_stays_as_it_was(program: Path, args: list[str]) -> None:
    seen = start(program, *args)
    assert seen["argv"] == args
    assert seen["shown"][2:] == args


@pytest.mark.parametrize(
    "value",
    [
        "fd:",
        "fd:x",
        "fd:-1",
        "fd:77",
        "fd:0",
        "fd:1",
        "fd:2",
        "fd:3.5",
        "fd: 3",
        "fd:\u0663",
        "fd:\u00b2",
        "fd:99999999999999999999",
        "fd:" + "9" * 5000,
    ],
)
def test_what_looks_like_a_descriptor_and_is_none_is_left_alone(program: Path, value: str) -> None:
    for args in (["--join", value], [f"--join={value}"], ["join", value]):
        assert start(program, *args)["argv"] == args


def test_a_descriptor_elsewhere_is_not_read(program: Path) -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, b"secret")
        args = ["add", f"fd:{reader}"]
        assert start(program, *args, pass_fds=(reader,))["argv"] == args
        assert os.read(reader, 10) == b"secret"
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", ""), (b" tw1abc\n", "tw1abc"), (b"x" * 9000, "x" * 4096), (b"\xff\x00", "\ufffd\x00")],
)
def test_a_descriptor_that_a_caller_gives_is_read(program: Path, content: bytes, expected: str) -> None:
    reader, writer = os.pipe()
    try:
        os.write(writer, content)
        os.close(writer)
        assert start(program, "--join", f"fd:{reader}", pass_fds=(reader,))["argv"] == ["--join", expected]
    finally:
        os.close(reader)


def test_arguments_that_are_no_text_are_no_traceback(program: Path) -> None:
    done = subprocess.run(
        [sys.executable.encode(), str(program).encode(), b"--join", TOKEN.encode() + b"\xff\xfe"],
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(hide_token.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["argv"][1].startswith(TOKEN)


def test_arguments_that_are_not_those_of_the_process_are_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("replaced this process"))
    assert hide_token.from_argv(["--join", TOKEN]) == ["--join", TOKEN]
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "--join", TOKEN])
    monkeypatch.setattr(sys, "executable", "")
    assert hide_token.from_argv(["--join", TOKEN]) == ["--join", TOKEN]
