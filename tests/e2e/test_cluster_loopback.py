"""Agents on loopback ports with the addresses in the token: what needs no root. Real llama.cpp, real models."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from lab import Agent, Lab, LabError

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

ASK: Any = {"messages": [{"role": "user", "content": "Count to five."}], "max_tokens": 32, "temperature": 0}
WAIT_S = 90.0


@pytest.fixture(scope="module")
def flags(engine_dir: Path) -> tuple[str, ...]:
    return ("--engine-dir", str(engine_dir), "--threads", "1")


@pytest.fixture(scope="module")
def lab(flags: tuple[str, ...]) -> Iterator[Lab]:
    with Lab(2, namespaces=False, flags=flags) as made:
        made.start()
        yield made


def content(reply: Any) -> str:
    return str(reply["choices"][0]["message"]["content"])


def error(agent: Agent, *args: str) -> dict[str, Any]:
    """The error that a command ends with."""
    argv = [*agent.command, *args, "--state-dir", str(agent.state_dir), "--json"]
    done = subprocess.run(argv, capture_output=True, timeout=60, check=False)
    assert done.returncode, done.stdout
    found: dict[str, Any] = json.loads(done.stdout)["error"]
    return {**found, "exit": done.returncode}


# serving, with and without a draft


def test_nothing_is_served_before_there_is_a_model(lab: Lab) -> None:
    with pytest.raises(LabError, match="503") as caught:
        lab.agents[0].post("/v1/chat/completions", ASK)
    assert "nothing is served" in str(caught.value)
    problem = error(lab.agents[0], "serve", "llama")
    assert problem["code"] == "model_not_found"
    assert "catalogue is empty" in problem["hint"]


def test_add_is_enough_to_get_an_answer(lab: Lab, demo_model: Path) -> None:
    b = lab.agents[1]
    lab.share(demo_model)
    assert content(b.wait(lambda: b.post("/v1/chat/completions", ASK), "for an answer", WAIT_S))
    target = lab.coordinator().status()["target"]
    assert target["workers"] == []
    assert any("not pooled" in reason for reason in target["reasons"])
    assert any("nobody chose" in e["text"] for e in lab.coordinator().status()["events"])


def test_an_unknown_model_says_which_are_there(lab: Lab, demo_model: Path) -> None:
    problem = error(lab.agents[1], "serve", "no-such-model")
    assert problem["code"] == "model_not_found"
    assert demo_model.stem in problem["hint"]


def test_a_smaller_model_of_the_same_vocabulary_drafts_and_changes_nothing(
    lab: Lab, demo_model: Path, f32_model: Path
) -> None:
    a, b = lab.agents
    target = a.cli("add", str(f32_model), timeout_s=WAIT_S)
    alone = a.cli("serve", target["name"], "--draft", "off", "--ctx", "1024", timeout_s=WAIT_S)
    assert alone["draft"]["model"] is None
    expected = content(b.post("/v1/chat/completions", ASK))
    served = a.cli("serve", target["name"], "--ctx", "1024", timeout_s=WAIT_S)
    assert served["draft"]["model"] == demo_model.stem
    assert content(b.post("/v1/chat/completions", ASK)) == expected

    def counted() -> Any:
        return lab.coordinator().status()["speculation"]["accepted"]

    b.wait(counted, "for the counters of speculation", 10)
    counters = b.wait(lambda: b.status()["speculation"]["rounds"] and b.status()["speculation"], "", 10)
    assert 0 < counters["accepted"] <= counters["drafted"]


def test_a_draft_with_another_vocabulary_is_named_and_left_out(lab: Lab, foreign_model: Path) -> None:
    a, b = lab.agents
    foreign = a.cli("add", str(foreign_model))
    served = a.cli("serve", "F32", "--draft", foreign["name"], "--ctx", "1024", timeout_s=WAIT_S)
    assert served["target"]["state"] == "ready"
    assert served["draft"]["model"] is None
    (warning,) = served["warnings"]
    assert "cannot draft" in warning
    assert "kind" in warning, "the first difference is named"
    assert content(b.post("/v1/chat/completions", ASK))


@pytest.fixture(scope="module")
def foreign_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GGUF with a vocabulary of its own."""
    from tightwad_agent.engine.tinymodel import tiny_model

    path = tmp_path_factory.mktemp("foreign") / "foreign.gguf"
    path.write_bytes(tiny_model())
    return path


def test_a_served_model_is_not_removed_and_a_stopped_one_is_everywhere(lab: Lab, demo_model: Path) -> None:
    a, b = lab.agents
    assert "being served" in error(b, "remove", "F32")["message"]
    b.cli("stop")
    lab.coordinator().wait(lambda: a.status()["target"]["state"] == "none", "for the server to stop", 20)
    removed = b.cli("remove", "F32")
    assert a.name in removed["nodes"]
    assert not removed["kept"]
    assert all("F32" not in m["name"] for m in a.cli("models"))
    assert demo_model.is_file()
    with pytest.raises(LabError, match="503"):
        a.post("/v1/chat/completions", ASK)


def test_one_that_leaves_is_gone_for_good(lab: Lab) -> None:
    a, b = lab.agents
    left = b.cli("leave", "--yes")
    assert left["cluster"] == a.status()["cluster"]["id"]
    assert b.process is not None
    assert b.process.wait(20) == 0
    a.wait(lambda: {p["name"]: p["state"] for p in a.cli("peers")}.get(b.name) == "left", "for the goodbye", 10)
    assert not (b.state_dir / "node.key").exists()
    assert list((b.state_dir / "models").glob("*.gguf"))
    assert error(b, "key")["code"] == "usage"


def test_join_enrols_once_and_the_agent_then_finds_its_cluster_by_itself(lab: Lab, tmp_path: Path) -> None:
    a, b = lab.agents
    token = a.cli("token", "create")["token"]
    joined = _join(b, b.state_dir, token)
    assert joined["cluster"] == a.status()["cluster"]["id"]
    (entry,) = [t for t in a.cli("token", "list") if t["state"] == "used up" and b.name in t["nodes"]][-1:]
    assert entry["uses_left"] == 0
    refused = _join(b, tmp_path / "third", token)["error"]
    assert (refused["code"], "used" in refused["message"]) == ("token", True), refused
    broken = _join(b, tmp_path / "third", token[:-1] + ("A" if token[-1] != "A" else "B"))["error"]
    assert broken["code"] == "token"
    b.start()
    b.wait_up()
    b.wait(lambda: lab.all_alive(b), "to find its cluster", 20)
    again = _join(b, b.state_dir, token)["error"]
    assert again["code"] == "agent_running"


def _join(agent: Agent, state_dir: Path, token: str) -> dict[str, Any]:
    argv = [*agent.command, "join", "-", "--name", agent.name, "--no-mdns", "--json", "--state-dir", str(state_dir)]
    done = subprocess.run(argv, input=f"{token}\n".encode(), capture_output=True, timeout=60, check=False)
    found: dict[str, Any] = json.loads(done.stdout)
    assert ("error" in found) == (done.returncode != 0)
    return found


# start and stop


def test_ports_and_directories_that_are_taken_are_named(lab: Lab, flags: tuple[str, ...], tmp_path: Path) -> None:
    running = lab.agents[0]
    argv = [*running.command, "up", *flags, "--no-mdns", "--interface", "lo", "--json"]

    def up(*more: str) -> tuple[int, str]:
        done = subprocess.run(
            [a for a in argv if a != "--json"] + list(more), capture_output=True, timeout=30, check=False
        )
        return done.returncode, done.stderr.decode()

    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, said = up("--state-dir", str(tmp_path / "x"), "--mesh-port", port, "--endpoint-port", "0")
        assert (code, port in said, "--mesh-port" in said) == (3, True, True), said
        code, said = up("--state-dir", str(tmp_path / "y"), "--mesh-port", "0", "--endpoint-port", port)
        assert (code, port in said, "--endpoint-port" in said) == (3, True, True), said
    code, said = up("--state-dir", str(running.state_dir))
    assert (code, "already runs" in said) == (3, True), said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", ["at once", "up", "loading", "generating"])
def test_a_signal_in_any_phase_leaves_no_process(
    phase: str, number: signal.Signals, flags: tuple[str, ...], f32_model: Path
) -> None:
    with Lab(1, namespaces=False, flags=flags) as one:
        (agent,) = one.agents
        agent.start()
        assert agent.process is not None
        if phase != "at once":
            agent.wait_up()
        else:
            agent.wait(lambda: len(agent.pids()) > 1 or agent.log.stat().st_size, "for a sign of life", 30)
        if phase in ("loading", "generating"):
            name = agent.cli("add", str(f32_model))["name"]
            agent.cli("serve", name, "--ctx", "512", *(["--no-wait"] if phase == "loading" else []), timeout_s=WAIT_S)
            agent.wait(lambda: len(agent.pids()) > 1, "for llama-server", 30)
        asking = None
        if phase == "generating":
            asking = _ask_long(agent)
            agent.wait(lambda: _is_busy(agent), "for the request to run", 30)
        pids = agent.pids()
        agent.process.send_signal(number)
        assert agent.process.wait(20) in (0, -number, 128 + number)
        _gone(pids)
        if asking is not None:
            asking.kill()
            asking.wait()


def test_a_killed_agent_takes_its_children_along(flags: tuple[str, ...], demo_model: Path) -> None:
    with Lab(1, namespaces=False, flags=flags) as one:
        (agent,) = one.agents
        agent.start()
        agent.wait_up()
        agent.cli("serve", agent.cli("add", str(demo_model))["name"], "--ctx", "512", timeout_s=WAIT_S)
        pids = agent.pids()
        assert len(pids) > 1
        agent.kill()
        _gone(pids)


def _ask_long(agent: Agent) -> subprocess.Popen[bytes]:
    body = json.dumps({**ASK, "max_tokens": 400, "ignore_eos": True})
    code = "import sys, lab, json; lab.http_post(sys.argv[1], json.loads(sys.argv[2]), None, 60)"
    return subprocess.Popen(
        [sys.executable, "-c", code, agent.url("/v1/chat/completions"), body],
        cwd=Path(__file__).parents[2] / "scripts",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": "."},
    )


def _is_busy(agent: Agent) -> bool:
    servers = [p for p in map(psutil.Process, agent.pids()) if p.name() == "llama-server"]
    return bool(servers) and servers[0].cpu_percent(0.2) > 5


def _gone(pids: list[int]) -> None:
    _until(lambda: not [p for p in pids if psutil.pid_exists(p) and _lives(p)], f"{pids} are still there")


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _until(true: Callable[[], bool], otherwise: str, deadline_s: float = 5.0) -> None:
    end = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)
