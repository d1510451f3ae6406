"""What a person does with models, on two real agents: looks, watches, compares, repairs, cleans up, takes out."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import Agent, Lab, LabError

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

WAIT_S = 120.0


@pytest.fixture(scope="module")
def lab(engine_dir: Path) -> Iterator[Lab]:
    flags = ("--engine-dir", str(engine_dir), "--threads", "1", "--max-models-size", "300MB")
    with Lab(2, namespaces=False, flags=flags) as made:
        made.start()
        yield made


@pytest.fixture(scope="module")
def model(lab: Lab, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On both agents: shared in place on the first, an own copy on the second."""
    path = tmp_path_factory.mktemp("theirs") / "demo.gguf"
    path.write_bytes(demo_model.read_bytes())
    lab.share(path)
    return path


def copy_of(agent: Agent) -> Path:
    (path,) = (agent.state_dir / "models").glob("*.gguf")
    return path


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def settle(agent: Agent) -> None:
    """Until what came was read back: what is damaged from now on is not found by that."""

    def settled() -> bool:
        text = agent.log.read_text(errors="replace")
        return text.count(" was read back") >= len(re.findall(r"swarm\.transfer: .* is complete: ", text))

    agent.wait(settled, "for what came to be read back", WAIT_S)


def flip(path: Path, at: int) -> None:
    """A bit turns over; the file's times stay, as when a disk does it."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def command(agent: Agent, *args: str, as_json: bool = True) -> subprocess.CompletedProcess[str]:
    argv = [*agent.command, *args, "--state-dir", str(agent.state_dir), *(["--json"] if as_json else [])]
    return subprocess.run(argv, capture_output=True, text=True, timeout=WAIT_S, check=False)


def nodes(agent: Agent, name: str = "demo.gguf") -> dict[str, Any]:
    """How each node stands with a model."""
    found = [m for m in agent.cli("models") if m["name"] == name]
    return {n["name"]: n for m in found for n in m["nodes"]}


def test_models_say_where_they_are_and_whose_file_it_is(lab: Lab, model: Path) -> None:
    a, b = lab.agents
    for agent in (a, b):
        (m,) = agent.cli("models")
        assert (m["architecture"], m["quantisation"], m["size"]) == ("llama", "Q4_1", model.stat().st_size)
        assert m["parameters"] > 100_000_000
        assert {n["name"]: (n["copy"], n["phase"]) for n in m["nodes"]} == {
            a.name: ("in place", "complete"),
            b.name: ("own", "complete"),
        }
    told = command(a, "models", as_json=False).stdout
    assert f"{a.name} (in place), {b.name} (own copy)" in told or f"{b.name} (own copy), {a.name} (in place)" in told


def test_what_is_good_everywhere_is_said_and_ends_with_0(lab: Lab, model: Path) -> None:
    done = command(lab.agents[0], "verify", "demo", "--everywhere")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout)["results"]
    assert [(r["node"], r["state"]) for r in results] == [(a.name, "good") for a in lab.agents]


def test_a_damaged_byte_is_found_from_elsewhere_and_repaired(lab: Lab, model: Path) -> None:
    a, b = lab.agents
    right, at = sha(model), model.stat().st_size // 2
    settle(b)
    flip(copy_of(b), at)
    done = command(a, "verify", "demo", "--everywhere")
    assert done.returncode == 6, done.stdout + done.stderr
    good, bad = json.loads(done.stdout)["results"]
    assert (good["node"], good["state"], bad["node"], bad["state"]) == (a.name, "good", b.name, "damaged")
    (place,) = bad["ranges"]
    assert place["offset"] <= at < place["offset"] + place["length"]
    assert "repaired from 1 node" in bad["action"]
    b.wait(lambda: nodes(a)[b.name]["phase"] == "complete", "for the repair", WAIT_S)
    assert sha(copy_of(b)) == right
    assert command(b, "verify", "--all").returncode == 0


def test_watching_ends_by_itself_when_all_is_there(lab: Lab, model: Path) -> None:
    a, b = lab.agents
    settle(b)
    flip(copy_of(b), 5_000_000)
    assert command(b, "verify", "demo", as_json=False).returncode == 6
    done = command(a, "models", "--watch", "--until-complete")
    assert done.returncode == 0, done.stderr
    looks = [json.loads(line) for line in done.stdout.splitlines()]
    assert looks[-1]["moving"] is False
    (m,) = looks[-1]["models"]
    assert {n["name"]: n["phase"] for n in m["nodes"]} == {a.name: "complete", b.name: "complete"}
    lines = command(a, "models", "--until-complete", as_json=False).stdout.splitlines()
    assert sorted(line.split(":")[0] for line in lines) == [f"demo.gguf on {a.name}", f"demo.gguf on {b.name}"]


def test_watching_ends_with_ctrl_c_in_good_order(lab: Lab, model: Path) -> None:
    a = lab.agents[0]
    argv = [*a.command, "models", "--watch", "--json", "--state-dir", str(a.state_dir)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["models"]
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said == ""


def test_a_file_of_a_person_is_not_touched_and_what_to_do_is_said(lab: Lab, model: Path) -> None:
    a, b = lab.agents
    at = model.stat().st_size // 3
    flip(model, at)
    wrong, when = sha(model), model.stat().st_mtime_ns
    done = command(a, "verify", "demo", as_json=False)
    assert done.returncode == 6
    assert "DAMAGED" in done.stdout
    assert "add it again" in done.stdout
    assert (sha(model), model.stat().st_mtime_ns) == (wrong, when)
    assert any("is damaged" in e["text"] and "not touched" in e["text"] for e in a.cli("events")["events"])
    # wanted here: it comes from the other machine, perhaps within a second; until then the status says "damaged"
    a.wait(lambda: nodes(b)[a.name]["copy"] == "own", "for a copy from the other machine", WAIT_S)
    assert sha(copy_of(a)) == sha(copy_of(b)) != wrong
    assert (sha(model), model.stat().st_mtime_ns) == (wrong, when)
    flip(model, at)


def test_what_nobody_needs_goes(lab: Lab, model: Path) -> None:
    b = lab.agents[1]
    left = b.state_dir / "models" / ".swarm" / f"{'ab' * 32}.part"
    left.write_bytes(b"x" * 100_000)
    for dry_run in (True, False):
        found = b.cli("gc", *(["--dry-run"] if dry_run else []))
        assert (found["bytes"], found["dry_run"]) == (100_000, dry_run)
        assert left.exists() == dry_run
    assert b.cli("gc")["items"] == []
    assert copy_of(b).is_file()


def test_a_model_beyond_the_limit_does_not_come_and_says_why(lab: Lab, model: Path, f32_model: Path) -> None:
    a, b = lab.agents
    added = a.cli("add", str(f32_model), timeout_s=WAIT_S)
    a.cli("serve", added["name"], "--ctx", "512", "--no-wait")
    state = b.wait(
        lambda: (n := nodes(a, added["name"]).get(b.name)) and n["phase"] == "no room" and n, "for no room", WAIT_S
    )
    assert "max_models_bytes" in state["problem"]
    assert f"{added['size']:,}" in state["problem"]
    a.cli("stop")


def test_taking_out_says_what_it_frees(lab: Lab, model: Path) -> None:
    a, b = lab.agents
    a.cli("stop")
    a.wait(lambda: a.status()["target"]["state"] == "none", "for serving to stop", WAIT_S)
    own, size = copy_of(b), model.stat().st_size
    said = a.cli("remove", "demo", "--dry-run")
    freed = {f["node"]: f["bytes"] for f in said["frees"] if not f["in_place"]}
    assert freed[b.name] == size
    assert own.is_file()
    a.cli("remove", "demo")
    assert not own.exists()
    assert model.is_file()
    with pytest.raises(LabError, match="model_not_found"):
        a.cli("remove", "demo")
