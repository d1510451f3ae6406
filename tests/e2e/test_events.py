"""`tightwad-agent events` with whole agents: what is told once for all, what a kill leaves, and following."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import Agent, Lab, LabError

from tightwad_agent.event_log import FILE

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

WAIT_S = 90.0


@pytest.fixture(scope="module")
def lab(engine_dir: Path) -> Iterator[Lab]:
    with Lab(3, namespaces=False, flags=("--engine-dir", str(engine_dir), "--threads", "1")) as made:
        made.start()
        yield made


def events(agent: Agent, *args: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = agent.cli("events", *args)["events"]
    return found


def run(agent: Agent, *args: str) -> subprocess.CompletedProcess[str]:
    argv = [*agent.command, "events", "--state-dir", str(agent.state_dir), *args]
    return subprocess.run(argv, capture_output=True, text=True, timeout=WAIT_S, check=False)


def about(agent: Agent, text: str, *args: str) -> list[dict[str, Any]]:
    return [e for e in events(agent, *args) if text in e["text"]]


def test_the_story_of_a_cluster_begins(lab: Lab) -> None:
    a, b, c = lab.agents
    found = b.wait(lambda: (e := events(b), len(about(b, "started")) == 3)[1] and e, "for three starts", WAIT_S)
    assert {e["node"] for e in found if "started" in e["text"]} == {a.name, b.name, c.name}
    assert [e["at_s"] for e in found] == sorted(e["at_s"] for e in found)
    joined = about(b, "joined the cluster", "--kind", "membership")
    assert sorted(e["text"].split()[0] for e in joined) == [b.name, c.name]
    assert {e["kind"] for e in events(b, "--kind", "trust", "--kind", "election")} == {"trust", "election"}
    made = about(c, "a join token was made", "--kind", "trust")
    assert made[0]["facts"]["token"] in made[0]["text"]


def test_a_killed_coordinator_is_told_once_with_the_reason_and_the_time_it_took(lab: Lab) -> None:
    a, b, c = lab.agents
    assert lab.coordinator() is a
    a.kill()
    try:

        def told_by_both() -> Any:
            found = about(b, "elected within", "--kind", "election")  # two, where both claimed the office at once
            return [e for e in found if len(e["seen_by"]) == 2]

        elected = b.wait(told_by_both, "for both to tell", WAIT_S)[-1]
        assert set(elected["seen_by"]) == {b.name, c.name}
        assert elected["facts"]["first_hand"] is True, "in the words of the elected"
        assert f"{a.name} is dead: its process is gone" in elected["text"]
        assert 0 <= elected["facts"]["after_s"] < WAIT_S
        (dead,) = about(c, f"{a.name} is dead", "--kind", "membership")
        assert set(dead["seen_by"]) == {b.name, c.name}
        assert run(b).stderr.startswith(f"Not heard: {a.name} (dead: ")
    finally:
        a.start()
        a.wait_up()


def test_a_restart_forgets_nothing_and_says_that_the_end_was_none_in_order(lab: Lab) -> None:
    a, b, _ = lab.agents
    b.wait(lambda: lab.all_alive(b), "for all to be there", WAIT_S)
    token = a.cli("token", "create")["id"]
    a.kill()
    a.start()
    a.wait_up()
    b.wait(lambda: lab.all_alive(b), "for all to be there", WAIT_S)
    starts = about(b, "started", "--node", a.name)
    assert "not stopped in order" not in starts[0]["text"]
    assert "not stopped in order" in starts[-1]["text"]
    assert any(token in e["text"] for e in about(a, "a join token was made")), "of the run that was killed"
    a.stop()
    (last,) = json.loads(run(a, "--json", "-n", "1").stdout)["events"]
    assert last["text"].startswith("the agent was stopped (SIGTERM) after ")
    a.start()
    a.wait_up()
    started = about(a, "started")[-1]["text"]
    assert "after it was stopped" in started
    assert "not stopped in order" not in started


def test_a_stopped_agent_has_its_files(lab: Lab) -> None:
    _, b, c = lab.agents
    c.stop()
    try:
        b.wait(lambda: about(b, f"{c.name} is gone: it said goodbye"), "for the goodbye", WAIT_S)
        done = run(c)
        assert done.returncode == 0
        assert "No agent runs with" in done.stderr
        assert "coordinator is " in done.stdout
        assert "tightwad-agent" in done.stdout
        assert b.name in done.stdout, "by name, not by id"
        assert run(c, "--follow").returncode == 4
        assert (c.state_dir / FILE).stat().st_mode & 0o777 == 0o600
    finally:
        c.start()
        c.wait_up()


def test_what_happens_is_followed_until_ctrl_c(lab: Lab) -> None:
    a, b, _ = lab.agents
    b.wait(lambda: lab.all_alive(b), "for all to be there", WAIT_S)
    argv = [*b.command, "events", "--state-dir", str(b.state_dir), "--follow", "--json", "-n", "1"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        token = a.cli("token", "create")
        heard = [first]
        while token["id"] not in heard[-1]["text"]:
            heard.append(json.loads(process.stdout.readline()))
        assert heard[-1]["node"] == a.name
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == 0
        assert token["token"] not in "".join(e["text"] for e in heard), "the token is a secret"
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_machine_that_is_none_is_named(lab: Lab) -> None:
    with pytest.raises(LabError, match="no machine of the cluster is called"):
        events(lab.agents[0], "--node", "nobody")


def test_a_line_has_time_machine_kind_and_words(lab: Lab) -> None:
    done = run(lab.agents[0], "-n", "3", "--kind", "agent")
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        at, machine, kind, words = line.split("  ", 3)
        assert at.endswith("Z")
        assert machine in {agent.name for agent in lab.agents}
        assert kind == "agent"
        assert words
