"""Three agents in network namespaces: real mDNS, real links, real llama.cpp, the real demo model.

The tests share one cluster and stand in the order in which a home lab would meet these things.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from lab import Agent, Lab, LabError

pytestmark = [pytest.mark.netns, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

MESSAGES: Any = [{"role": "user", "content": "Name three colours."}]
ASK = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0}
ANSWER_S = 60.0


@pytest.fixture(scope="module")
def lab(engine_dir: Path) -> Iterator[Lab]:
    with Lab(3, namespaces=True, flags=("--engine-dir", str(engine_dir), "--threads", "1")) as made:
        yield made


def followers(lab: Lab, via: Agent | None = None) -> list[Agent]:
    coordinator = lab.coordinator(via)
    return [a for a in lab.agents if a is not coordinator]


def host_url(lab: Lab, agent: Agent) -> str:
    """The agent's endpoint as this machine, which is not in its namespace, sees it."""
    assert lab.net is not None
    return f"http://{lab.net.nodes[lab.agents.index(agent)].address}:{agent.endpoint_port}"


def text(reply: Any) -> str:
    return str(reply["choices"][0]["message"]["content"])


def processes(agent: Agent, name: str) -> list[psutil.Process]:
    return [p for p in map(psutil.Process, agent.pids()) if p.name() == name]


def answers(agent: Agent) -> Any:
    """The agent's answer, waited for: nothing but time may be needed."""
    return agent.wait(lambda: agent.post("/v1/chat/completions", ASK), "for an answer", ANSWER_S)


def test_they_find_one_another_by_mdns_alone(lab: Lab) -> None:
    lab.start("--no-addresses")
    for agent in lab.agents:
        peers = agent.cli("peers")
        assert [p["state"] for p in peers] == ["alive"] * 3
        assert sum(p["coordinator"] for p in peers) == 1
        wanted = {
            "id", "name", "state", "coordinator", "address", "rtt_ms", "devices", "memory_total", "memory_free",
            "engine", "models",
        }  # fmt: skip
        assert all(wanted <= p.keys() for p in peers)
    assert {lab.coordinator(a).name for a in lab.agents} == {lab.coordinator().name}
    assert all(not a.status()["problems"] for a in lab.agents)


def test_the_swarm_brings_the_model_to_all(lab: Lab, demo_model: Path) -> None:
    added = lab.share(demo_model)
    for agent in lab.agents[1:]:
        (transfer,) = agent.status()["transfers"]
        assert transfer["id"] == added["id"]
        assert sum(transfer["from_each_peer"].values()) >= added["size"]
    (source,) = lab.agents[0].status()["transfers"]
    assert source["uploaded"] < 2 * added["size"], "the leechers gave nothing to one another"


def test_a_pool_over_two_workers_answers_through_a_follower(lab: Lab) -> None:
    served = lab.agents[0].cli("serve", "smollm2", "--workers", "2", "--ctx", "1024", timeout_s=ANSWER_S)
    assert served["target"]["state"] == "ready"
    assert len(served["target"]["workers"]) == 2
    follower = followers(lab)[0]
    reply = answers(follower)
    assert text(reply)
    assert reply["usage"]["completion_tokens"] > 0
    assert text(answers(lab.coordinator())) == text(reply)
    target = follower.wait(lambda: follower.status()["target"], "", 5)
    assert (target["state"], target["engine"]) == ("ready", "verifier")
    assert all(w["bytes"] > 1_000_000 for w in lab.coordinator().status()["target"]["workers"])


def test_nothing_but_the_two_ports_is_open(lab: Lab) -> None:
    for agent in lab.agents:
        listening = [
            c.laddr
            for pid in agent.pids()
            for c in psutil.Process(pid).net_connections("tcp")
            if c.status == psutil.CONN_LISTEN
        ]
        beyond = {a.port for a in listening if a.ip not in ("127.0.0.1", "::1")}
        assert beyond <= {agent.mesh_port, agent.endpoint_port}


def test_other_machines_need_the_key(lab: Lab) -> None:
    url = host_url(lab, followers(lab)[0])
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{url}/v1/models", timeout=10)
    assert caught.value.code == 401
    assert "tightwad-agent key" in json.load(caught.value)["error"]["message"]


def test_the_openai_sdk_against_a_follower(lab: Lab) -> None:
    follower = followers(lab)[0]
    key = follower.cli("key")["key"]
    with openai.OpenAI(base_url=f"{host_url(lab, follower)}/v1", api_key=key, max_retries=0) as client:
        (model,) = client.models.list().data
        whole = client.chat.completions.create(model=model.id, messages=MESSAGES, max_tokens=24, temperature=0)
        stream = client.chat.completions.create(
            model=model.id, messages=MESSAGES, max_tokens=24, temperature=0, stream=True
        )
        parts = [c.choices[0].delta.content or "" for c in stream if c.choices]
        assert "".join(parts) == whole.choices[0].message.content
        assert len(parts) > 3
        assert whole.usage is not None
        assert whole.usage.completion_tokens <= 24
        short = client.chat.completions.create(model=model.id, messages=MESSAGES, max_tokens=3, temperature=0)
        assert short.choices[0].finish_reason == "length"
        word = (whole.choices[0].message.content or "").split()[2]
        cut = client.chat.completions.create(
            model=model.id, messages=MESSAGES, max_tokens=24, temperature=0, stop=[word]
        )
        assert cut.choices[0].finish_reason == "stop"
        assert word not in (cut.choices[0].message.content or "")
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="no-such-model", messages=MESSAGES)
    wrong = openai.OpenAI(base_url=f"{host_url(lab, follower)}/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()


def test_a_worker_killed_while_idle_comes_back(lab: Lab) -> None:
    (worker,) = processes(followers(lab)[0], "ggml-rpc-server")
    worker.kill()
    assert text(answers(followers(lab)[1]))
    assert processes(followers(lab)[0], "ggml-rpc-server")


def test_a_worker_killed_while_generating_comes_back(lab: Lab) -> None:
    follower = followers(lab)[0]
    long = {**ASK, "max_tokens": 600, "ignore_eos": True}

    def ask() -> None:
        with contextlib.suppress(LabError):  # cut, or answered whole after the pool came back: both are fine here
            follower.post("/v1/chat/completions", long)

    asking = threading.Thread(target=ask)
    asking.start()
    coordinator = lab.coordinator()
    coordinator.wait(lambda: _busy(coordinator), "for the request to run", 20)
    (worker,) = processes(follower, "ggml-rpc-server")
    worker.kill()
    assert text(answers(followers(lab)[1]))
    asking.join(ANSWER_S)
    assert any("pool went down" in e["text"] for e in coordinator.status()["events"])


def _busy(coordinator: Agent) -> bool:
    verifier = [p for p in map(psutil.Process, coordinator.pids()) if "engine.verifier" in " ".join(p.cmdline())]
    return bool(verifier) and verifier[0].cpu_percent(0.2) > 5


def test_the_coordinator_killed_another_serves_within_seconds(lab: Lab) -> None:
    old = lab.coordinator()
    asked, other = followers(lab)
    before = asked.status()["epoch"]["counter"]
    pids = old.pids()
    killed_at = time.monotonic()
    old.kill()

    def elected() -> bool:
        return lab.coordinator(asked) is not old and lab.coordinator(other) is lab.coordinator(asked)

    asked.wait(elected, "for another coordinator", 5)
    took = time.monotonic() - killed_at
    assert took <= 5
    assert text(answers(asked))
    status = asked.status()
    assert status["epoch"]["counter"] > before
    assert any(f"{old.name} is dead" in e["text"] for e in status["events"])
    assert status["target"]["state"] == "ready"
    assert not [p for p in pids if psutil.pid_exists(p)], "the killed agent's children are still there"


def test_the_killed_one_comes_back_and_is_used_again(lab: Lab) -> None:
    (gone,) = [a for a in lab.agents if a.process is not None and a.process.poll() is not None]
    gone.start()
    gone.wait_up()
    one = lab.coordinator(next(a for a in lab.agents if a is not gone))
    one.wait(lambda: lab.all_alive(one), "for it to be back", 20)
    assert lab.coordinator(gone) is one, "a coordinator that came back must not take the office"
    one.wait(lambda: len(one.status()["target"]["workers"]) == 2, "for both workers", 30)
    assert text(answers(gone))


def test_they_stop_in_good_order_and_leave_nothing(lab: Lab) -> None:
    pids = [pid for agent in lab.agents for pid in agent.pids()]
    assert len(pids) > 3
    assert [agent.stop() for agent in lab.agents] == [0, 0, 0]
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
