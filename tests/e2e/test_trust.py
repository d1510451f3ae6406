"""Membership with real agent processes: joining, removal, a lost founder, a new key, and that no secret shows."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from lab import Agent, Lab, LabError

from tightwad_agent import control
from tightwad_agent.errors import AgentNotRunning
from tightwad_agent.mesh import certs, identity, tokens

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WITHIN_S = 5.0
PATIENCE_S = 90.0
"""Each look is a command, a process of its own: on a loaded machine that takes seconds."""


@pytest.fixture
def flags(tmp_path: Path) -> tuple[str, ...]:
    (tmp_path / "no-engine").mkdir()
    return ("--engine-dir", str(tmp_path / "no-engine"), "--log-level", "debug")


@pytest.fixture
def lab(flags: tuple[str, ...]) -> Iterator[Lab]:
    with Lab(4, namespaces=False, flags=flags) as made:
        yield made


def ask(agent: Agent, command: str, **params: Any) -> Any:
    """As a command asks the agent, without a process for each question."""
    try:
        return control.AgentClient(agent.state_dir).call(command, params)
    except AgentNotRunning as exc:
        raise LabError(str(exc)) from None


def names(agent: Agent) -> set[str]:
    return {p["name"] for p in ask(agent, "peers")["peers"] if p["state"] == "alive"}


def join(agent: Agent, via: Agent, *flags: str) -> None:
    agent.start(via.cli("token", "create", *flags)["token"])
    agent.wait(lambda: ask(agent, "status"), "to answer", PATIENCE_S)


def problem(agent: Agent, *args: str) -> dict[str, Any]:
    argv = [*agent.command, *args, "--state-dir", str(agent.state_dir), "--json"]
    done = subprocess.run(argv, capture_output=True, timeout=60, check=False)
    assert done.returncode, done.stdout
    found: dict[str, Any] = json.loads(done.stdout)["error"]
    return found


def test_a_whole_life_of_a_cluster(lab: Lab) -> None:
    a, b, c, d = lab.agents
    a.start()
    a.wait(lambda: ask(a, "status"), "to answer", PATIENCE_S)
    join(b, a)
    join(c, a)
    for agent in (a, b, c):
        agent.wait(lambda x=agent: names(x) == {"box-1", "box-2", "box-3"}, "to see all", PATIENCE_S)

    # removed by a member that is no authority: cut off everywhere, and told
    c.cli("remove-node", "box-2", "--yes")
    for agent in (a, c):
        agent.wait(lambda x=agent: names(x) == {"box-1", "box-3"}, "to have cut box-2 off", PATIENCE_S)
    b.wait(lambda: any("removed from the cluster" in p for p in ask(b, "status")["problems"]), "to be told", PATIENCE_S)
    told = [
        e for x in (a, b, c) for e in ask(x, "status")["events"] if "was removed from the cluster (asked" in e["text"]
    ]
    assert len(told) == 3, "each hears it once"
    assert all("asked for on box-3" in e["text"] for e in told)
    times = [datetime.fromisoformat(e["at"]).timestamp() for e in told]
    assert max(times) - min(times) < WITHIN_S

    # back under a new identity only
    old = identity.load(b.state_dir)
    assert old is not None
    b.cli("leave", "--yes")
    b.stop()
    join(b, a)
    fresh = identity.load(b.state_dir)
    assert fresh is not None
    assert fresh.node != old.node
    a.wait(lambda: names(a) == {"box-1", "box-2", "box-3"}, "to see box-2 again", PATIENCE_S)

    # the founder is lost for good
    assert "no authority" in problem(c, "promote", "box-2")["message"]
    a.cli("promote", "box-2")
    a.kill()
    b.wait(lambda: names(b) == {"box-2", "box-3"}, "to miss the founder", PATIENCE_S)
    join(d, b)
    b.wait(lambda: names(b) == {"box-2", "box-3", "box-4"}, "to see box-4", PATIENCE_S)

    # a new key; the lost founder would be an authority that could do the same
    refused = problem(b, "ca", "rotate")
    assert "box-1" in refused["message"]
    b.cli("remove-node", "box-1", "--yes")
    changed = b.cli("ca", "rotate", "--overlap", "1h")
    assert {"box-2", "box-3", "box-4"} <= set(changed["renewed"])
    assert changed["waiting"] == []
    status = c.cli("ca", "status")
    assert (status["authorities"], status["changes"], status["removed"]) == (["box-2"], 1, 2)
    a.start()
    a.wait(lambda: any("removed from the cluster" in p for p in ask(a, "status")["problems"]), "to be told", PATIENCE_S)


def test_a_client_uses_the_cluster_and_changes_nothing(lab: Lab) -> None:
    a, b = lab.agents[:2]
    a.start()
    a.wait(lambda: ask(a, "status"), "to answer", PATIENCE_S)
    join(b, a, "--role", "client")
    b.wait(lambda: names(b) == {"box-1", "box-2"}, "to see the cluster", PATIENCE_S)
    assert ask(b, "status")["coordinator"]["name"] == "box-1"
    for command in (["stop"], ["token", "create"], ["remove-node", "box-1", "--yes"], ["ca", "rotate"], ["add", "x"]):
        assert "client" in problem(b, *command)["message"], command
    with pytest.raises(LabError, match="nothing is served"):  # a's answer, through b
        b.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
    a.kill()
    b.wait(lambda: not ask(b, "status")["coordinator"], "to have nobody that coordinates", PATIENCE_S)


def test_a_revoked_token_and_no_secret_anywhere(lab: Lab) -> None:
    a, b, c = lab.agents[:3]
    a.start()
    a.wait(lambda: ask(a, "status"), "to answer", PATIENCE_S)
    made = a.cli("token", "create", "--uses", "3")
    b.start(made["token"])
    b.wait(lambda: ask(b, "status"), "to answer", PATIENCE_S)
    a.wait(lambda: names(a) == {"box-1", "box-2"}, "to see box-2", PATIENCE_S)
    assert a.cli("token", "revoke", made["id"][:6])["id"] == made["id"]
    assert [t["state"] for t in a.cli("token", "list") if t["id"] == made["id"]] == ["revoked"]
    argv = [*c.command, "join", made["token"], "--state-dir", str(c.state_dir), "--no-mdns", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as joining:
        while made["token"] in (_arguments(joining.pid) or []):
            time.sleep(0.01)  # until it has hidden its arguments
        said, _ = joining.communicate(timeout=60)
    assert b"revoked" in said
    join(c, a)
    a.cli("promote", "box-3")
    a.cli("ca", "rotate", "--overlap", "1h")
    looks = [*lab.dir.glob("*.log"), *lab.dir.glob("*/events*.jsonl"), *lab.dir.glob("*/*.json")]
    texts = {str(path): path.read_text(errors="replace") for path in looks}
    assert len(texts) >= 3
    for agent in (a, b, c):
        shown = [ask(agent, command) for command in ("status", "peers", "ca.status", "events")]
        texts[f"what {agent.name} shows"] = json.dumps(shown)
        texts[f"arguments of {agent.name}"] = str([_arguments(pid) for pid in agent.pids()])
    texts["said"] = said.decode()
    for secret in _secrets(lab, made["token"]):
        found = [where for where, text in texts.items() if secret in text and not _is_banner(where, secret)]
        assert not found, f"{secret[:6]}... in {found}"


def _is_banner(where: str, secret: str) -> bool:
    """What `up` prints for the person who starts it; the lab writes it into the same file as the log."""
    text = Path(where).read_text(errors="replace") if where.endswith(".log") else ""
    lines = [line for line in text.splitlines() if secret in line]
    return bool(lines) and not any(re.match(r"\d\d:\d\d:\d\d", line) for line in lines)


def _arguments(pid: int) -> list[str] | None:
    try:
        return psutil.Process(pid).cmdline() or None
    except psutil.Error:
        return None


def _secrets(lab: Lab, token: str) -> list[str]:
    """In every form in which one might be written."""
    raw = [tokens.parse(token).seed]
    texts = [token, token[40:90]]
    for agent in lab.agents[:3]:
        me = identity.load(agent.state_dir)
        assert me is not None
        raw += [certs.raw_private(key) for key in (me.key, me.ca_key) if key is not None]
        texts.append(me.state.api_key)
    for data in raw:
        texts += [data.hex(), base64.urlsafe_b64encode(data).decode()[:40], base64.b64encode(data).decode()[:40]]
    return texts
