"""Drafts over real machines, as far as one machine can have some: three agents in network namespaces with slow cables
between them; one coordinates and holds the verifier, one is its worker, one drafts. What dies, dies in mid-answer.

The tests share the cluster and stand in order: the last one cuts a machine off.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from failover_ask import path_of
from failover_bench import clear_prompts
from lab import Agent, Lab
from rig import quantised
from slow_cable import Cables, slowed

pytestmark = [pytest.mark.netns, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

RTT_MS = 200.0
"""To the worker. A round of the pool then takes much longer than a draft token, whatever else this machine does."""
EARLY = 16
"""Tokens after which something dies: drafts are in the rounds by then, and most of the answer is still to come."""
AT_LEAST, N_TOKENS = 48, 64
"""Tokens of an answer, none of which the model doubts: pools of other machines add in another order."""
WAIT_S = 60.0


@dataclass
class Answer:
    """A streamed answer; `timings` and `error` as the newest event has them."""

    text: str = ""
    timings: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    finish: str | None = None


@dataclass
class Cluster:
    """Who does what. `body`: what is asked; `plain`: the answer without drafts."""

    lab: Lab
    cables: Cables
    coordinator: Agent
    worker: Agent
    drafter: Agent
    body: dict[str, Any] = field(default_factory=dict)
    plain: str = ""

    def ask(self, agent: Agent, then: Callable[[], Any] | None = None, **more: Any) -> Answer:
        """A streamed answer through an agent's port on its own machine; `then` is called once in the middle of it, when
        the drafter has drafted for it."""
        assert self.lab.net is not None
        connection = http.client.HTTPConnection("127.0.0.1", agent.endpoint_port, timeout=WAIT_S)
        connection.sock = self.lab.net.socket(self.lab.agents.index(agent))
        connection.sock.settimeout(WAIT_S)
        connection.sock.connect(("127.0.0.1", agent.endpoint_port))
        body = {**self.body, "stream": True, "timings_per_token": True, **more}
        connection.request("POST", path_of(body), json.dumps(body), {"Content-Type": "application/json"})
        answer = Answer()
        with connection.getresponse() as response:
            assert response.status == 200, response.read()
            for line in response:
                if line.startswith(b"data: {"):
                    take(answer, json.loads(line[6:]))
                if then is not None and self.is_under_way(answer):
                    then()
                    then = None
        connection.close()
        assert then is None, f"over without drafts: {answer}, {self.coordinator.status()['speculation']}"
        return answer

    def is_under_way(self, answer: Answer) -> bool:
        seen = answer.timings
        return bool(seen.get("predicted_n", 0) >= EARLY and seen["drafters"].get(self.drafter.name, 0) > 0)

    def ask_plainly(self, **more: Any) -> str:
        """The answer without drafts, which comes sooner over fast cables."""
        self.cables.set(0, 0)
        answer = self.ask(self.drafter, speculation=False, **more)
        self.slow_down()
        assert (answer.timings["drafted"], answer.timings["drafters"], answer.error) == (0, {}, None)
        return answer.text

    def slow_down(self) -> None:
        self.cables.set(RTT_MS, 0, self.lab.agents.index(self.worker))

    def drafting(self) -> dict[str, Any]:
        """What the coordinator says of the drafter."""
        (found,) = self.coordinator.status()["speculation"]["drafters"]
        assert found["name"] == self.drafter.name
        return dict(found)

    def events(self) -> list[str]:
        return [event["text"] for event in self.coordinator.status()["events"]]


def take(answer: Answer, event: dict[str, Any]) -> None:
    answer.error = event.get("error", answer.error)
    answer.timings = event.get("timings", answer.timings)
    for choice in event.get("choices", ()):
        answer.text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        answer.finish = choice["finish_reason"] or answer.finish


def process(agent: Agent, name: str) -> psutil.Process:
    """The one process of an agent whose command line has `name` in it."""
    (found,) = [p for p in map(psutil.Process, agent.pids()[1:]) if any(name in part for part in p.cmdline())]
    return found


@pytest.fixture(scope="module")
def cluster(engine_dir: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The same model with eight bits drafts, and is nearly always right."""
    model = quantised(engine_dir, demo_model, tmp_path_factory.mktemp("draft") / "draft-Q8_0.gguf", "Q8_0")
    flags = ("--engine-dir", str(engine_dir), "--threads", "1")
    with Lab(3, namespaces=True, flags=flags) as lab:
        assert lab.net is not None
        with slowed(lab.net) as cables:
            lab.start("--no-addresses")
            target, draft = (lab.agents[0].cli("add", str(path))["name"] for path in (demo_model, model))
            made = roles(lab, cables, target, draft)
            cables.set(0, 0)
            (clear,) = clear_prompts(made.drafter, at_least=AT_LEAST, most=1, n_tokens=N_TOKENS)
            made.body = clear.request(stream=True)
            made.plain = made.ask_plainly()
            assert made.plain == clear.text
            yield made
            cables.set(0, 0)


def roles(lab: Lab, cables: Cables, target: str, draft: str) -> Cluster:
    """Serves over one worker, and lets the machine that is left draft."""
    coordinator = lab.coordinator()
    serve = ("serve", target, "--draft", draft, "--workers", "1", "--ctx", "1024")
    (chosen,) = coordinator.cli(*serve, timeout_s=WAIT_S)["target"]["workers"]
    worker = next(a for a in lab.agents if a.name == chosen["name"])
    (drafter,) = [a for a in lab.agents if a not in (coordinator, worker)]
    served = coordinator.cli(*serve, "--drafters", drafter.name, timeout_s=WAIT_S)["target"]
    assert [w["name"] for w in served["workers"]] == [worker.name]
    made = Cluster(lab, cables, coordinator, worker, drafter)
    coordinator.wait(lambda: made.drafting()["state"] == "ready", "for the drafter", WAIT_S)
    return made


def test_drafts_from_another_machine_change_nothing_but_the_number_of_rounds(cluster: Cluster) -> None:
    answer = cluster.ask(cluster.worker)
    assert (answer.text, answer.error) == (cluster.plain, None)
    timings = answer.timings
    assert timings["drafters"][cluster.drafter.name] > 0
    assert 0 < timings["accepted"] <= timings["drafted"] == sum(timings["drafters"].values())
    assert timings["rounds"] < timings["predicted_n"]
    seen = cluster.drafting()
    assert (seen["state"], seen["reason"]) == ("ready", "")
    assert seen["tokens_per_s"] > 0


def test_a_draft_server_that_is_killed_is_not_missed(cluster: Cluster) -> None:
    answer = cluster.ask(cluster.worker, then=lambda: process(cluster.drafter, "llama-server").kill())
    assert (answer.text, answer.error, answer.finish) == (cluster.plain, None, "length")
    said = cluster.coordinator.wait(lambda: [t for t in cluster.events() if "drafter" in t], "for the news", WAIT_S)
    assert cluster.drafter.name in said[-1]
    mine = cluster.drafter.status()["drafter"]
    assert (mine["restarts"], "SIGKILL" in mine["problem"]) == (1, True), mine
    cluster.coordinator.wait(lambda: cluster.drafting()["state"] == "ready", "for it to be back", WAIT_S)
    assert cluster.ask(cluster.worker).timings["drafters"][cluster.drafter.name] > 0


@pytest.mark.parametrize("victim", ["verifier", "worker"])
def test_an_answer_survives_its_verifier_and_its_worker(cluster: Cluster, victim: str) -> None:
    agents = {agent.name: agent.pids()[0] for agent in cluster.lab.agents}
    if victim == "verifier":
        doomed = process(cluster.coordinator, "engine.verifier")
    else:
        doomed = process(cluster.worker, "ggml-rpc-server")

    def then() -> None:
        doomed.kill()
        cluster.cables.set(0, 0)  # loading over slow cables is not what this is about

    answer = cluster.ask(cluster.drafter, then=then)
    assert (answer.text, answer.error, answer.finish) == (cluster.plain, None, "length")
    assert cluster.ask_plainly() == cluster.plain
    assert any("the pool went down" in text for text in cluster.events())
    assert {agent.name: agent.pids()[0] for agent in cluster.lab.agents} == agents
    assert process(cluster.coordinator, "engine.verifier").pid != doomed.pid
    cluster.coordinator.wait(lambda: cluster.drafting()["state"] == "ready", "for the drafter", WAIT_S)


def test_a_drafting_machine_that_is_cut_off_is_not_missed(cluster: Cluster) -> None:
    assert cluster.lab.net is not None
    net, there = cluster.lab.net, cluster.lab.agents.index(cluster.drafter)
    before = process(cluster.coordinator, "engine.verifier").pid
    answer = cluster.ask(cluster.worker, lambda: net.run(there, ["ip", "link", "set", "eth0", "down"]))
    assert (answer.text, answer.error) == (cluster.plain, None)
    one = cluster.coordinator
    one.wait(lambda: not one.status()["speculation"]["drafters"], "for the drafter to be given up", WAIT_S)
    assert any(f"{cluster.drafter.name} is dead" in text for text in cluster.events())
    again = cluster.ask(cluster.worker, max_tokens=EARLY)
    assert again.text
    assert cluster.plain.startswith(again.text)
    assert cluster.drafter.name not in again.timings["drafters"]
    assert process(one, "engine.verifier").pid == before
