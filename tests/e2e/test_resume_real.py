"""Answers whose engine is killed while they are given, with real agents and real engines: the client sees a pause, and
what it has in the end is the undisturbed answer."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from lab import Agent, Lab, running_lab

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WAIT_S = 120.0
N = 160
STORY: Any = {"prompt": "Once upon a time in a small village,", "max_tokens": N, "ignore_eos": True}
GREEDY: Any = {**STORY, "temperature": 0}
CASES: dict[str, Any] = {
    "greedy": GREEDY,
    "seeded": {**STORY, "seed": 11, "temperature": 1.0},
    "penalties": {**STORY, "seed": 3, "repeat_penalty": 1.3, "presence_penalty": 0.4},
    "logprobs": {**GREEDY, "logprobs": 2},
    "two answers": {**STORY, "n": 2, "seed": 5, "max_tokens": 80},
    "half characters": {
        **GREEDY,
        "prompt": "Smile: 😀 Party: 🎉 Smile: 😀 Party: 🎉 Smile: 😀 Party: 🎉 Smile:",
    },
    "a stop string": {**GREEDY, "stop": ["there was no such", " the the"], "presence_penalty": 0.2},
}


@pytest.fixture(scope="module")
def lab(engine_dir: Path, demo_model: Path) -> Iterator[Lab]:
    """Two agents that could coordinate; the demo model on the verifier of one of them."""
    flags = ("--engine-dir", str(engine_dir), "--threads", "1")
    with running_lab(2, namespaces=False, flags=flags) as made:
        made.share(demo_model)
        yield made


class Stream:
    """A client that reads a stream line by line, in a thread. `lines` has what came, comments included."""

    def __init__(self, agent: Agent, path: str, body: Any) -> None:
        self.lines: list[bytes] = []
        self.error: Exception | None = None
        self._changed = threading.Condition()
        self._connection = http.client.HTTPConnection(agent.host, agent.endpoint_port, timeout=WAIT_S)
        self._asked = (path, json.dumps({**body, "stream": True}))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            path, body = self._asked
            self._connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = self._connection.getresponse()
            while line := answer.readline():
                with self._changed:
                    self.lines.append(line)
                    self._changed.notify_all()
        except OSError as exc:
            self.error = exc
        finally:
            self._connection.close()

    def until(self, n: int) -> None:
        """So many events have come."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.events) >= n, WAIT_S), self.lines[-3:]

    @property
    def events(self) -> list[bytes]:
        return [line for line in self.lines if line.startswith(b"data: ")]

    def finish(self) -> list[Any]:
        """All events, once it has ended as it should."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        assert self.error is None, self.error
        assert self.events[-1] == b"data: [DONE]\n", self.lines[-3:]
        return [json.loads(line[6:]) for line in self.events[:-1]]


def told(events: list[Any]) -> dict[int, Any]:
    """Text, tokens with their probabilities, and the reasons of the ends, by choice."""
    found: dict[int, Any] = {}
    for choice in (choice for event in events for choice in event["choices"]):
        one = found.setdefault(choice["index"], {"text": "", "tokens": [], "offsets": [], "ends": []})
        one["text"] += choice["text"]
        if choice["logprobs"]:
            one["tokens"] += choice["logprobs"]["tokens"]
            one["offsets"] += choice["logprobs"]["text_offset"]
        if choice["finish_reason"]:
            one["ends"].append(choice["finish_reason"])
    return found


def engine(agent: Agent, word: str = "tightwad_agent.engine.verifier") -> psutil.Process | None:
    """The child of an agent that serves the target."""
    assert agent.process is not None
    for child in psutil.Process(agent.process.pid).children(recursive=True):
        try:
            if any(word in part for part in child.cmdline()):
                return child
        except psutil.NoSuchProcess:
            continue
    return None


def kill_engine(agent: Agent, word: str = "tightwad_agent.engine.verifier") -> None:
    """At once: the answer is not long."""
    until(lambda: engine(agent, word))
    child = engine(agent, word)
    assert child is not None
    child.kill()


def until(done: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def serving(lab: Lab, demo_model: Path, request: pytest.FixtureRequest) -> Agent:
    """The coordinator, whose verifier has not been killed before: one that ends again and again is given up."""
    context = 512 + 8 * sum(map(ord, request.node.name)) % 1024
    flags = ("--engine", "verifier", "--draft", "off", "--ctx", str(context))
    lab.agents[1].cli("serve", demo_model.stem, *flags, timeout_s=WAIT_S)
    return lab.coordinator(lab.agents[1])


def counter(agent: Agent, name: str) -> float:
    connection = http.client.HTTPConnection(agent.host, agent.endpoint_port, timeout=30)
    try:
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
    finally:
        connection.close()
    found = [line.split()[-1] for line in page.splitlines() if line.startswith(name + " ")]
    assert found, page[:3000]
    return float(found[0])


AT = [(case, "at another node") for case in CASES]
AT += [(case, "at the coordinator") for case in ("seeded", "logprobs")]


@pytest.mark.parametrize(("case", "where"), AT)
def test_a_stream_whose_verifier_is_killed(lab: Lab, serving: Agent, case: str, where: str) -> None:
    asked = serving if where == "at the coordinator" else next(a for a in lab.agents if a is not serving)
    body = {**CASES[case], "stream_options": {"include_usage": True}}
    whole = Stream(asked, TEXT, body).finish()
    before = counter(asked, "tightwad_resumed_answers_total")
    stream = Stream(asked, TEXT, body)
    stream.until(5)
    kill_engine(serving)
    events = stream.finish()
    assert told(events) == told(whole)
    assert len({(event["id"], event["created"]) for event in events}) == 1
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert events[-1]["usage"][name] == whole[-1]["usage"][name]
    assert counter(asked, "tightwad_resumed_answers_total") == before + 1


def test_killed_again_and_again(lab: Lab, serving: Agent) -> None:
    asked = lab.agents[0]
    whole = Stream(asked, TEXT, CASES["seeded"]).finish()
    stream = Stream(asked, TEXT, CASES["seeded"])
    for n in (5, 20, 35):
        stream.until(n)
        kill_engine(serving)
    assert told(stream.finish()) == told(whole)


def test_those_that_wait_for_their_turn_outlive_the_verifier(lab: Lab, serving: Agent) -> None:
    asked = next(agent for agent in lab.agents if agent is not serving)
    body = {**GREEDY, "stream_options": {"include_usage": True}}
    streams = [Stream(asked, TEXT, body) for _ in range(7)]
    until(lambda: sum(len(stream.events) > 3 for stream in streams) >= 4)
    assert not all(stream.events for stream in streams), "nobody waits"
    kill_engine(serving)
    for stream in streams:
        events = stream.finish()
        assert len({(event["id"], event["created"]) for event in events}) == 1
        assert events[-1]["usage"]["completion_tokens"] == N
        assert told(events)[0]["ends"] == ["length"]


@pytest.mark.parametrize("case", ["greedy", "seeded", "logprobs", "two answers"])
def test_a_whole_answer_whose_verifier_is_killed(lab: Lab, serving: Agent, case: str) -> None:
    asked = lab.agents[1]
    whole = asked.post(TEXT, CASES[case])
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(asked.post(TEXT, CASES[case])), daemon=True)
    child = engine(serving)
    assert child is not None
    busy_s = child.cpu_times().user
    thread.start()
    end = time.monotonic() + WAIT_S
    while child.cpu_times().user < busy_s + 0.3:
        assert time.monotonic() < end
        time.sleep(0.01)
    child.kill()
    thread.join(WAIT_S)
    (answer,) = answers
    for again, once in zip(answer["choices"], whole["choices"], strict=True):
        assert (again["text"], again["finish_reason"]) == (once["text"], once["finish_reason"])
        assert (again["logprobs"] or {}).get("tokens") == (once["logprobs"] or {}).get("tokens")
    assert answer["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_the_coordinator_is_killed(lab: Lab, serving: Agent) -> None:
    """Another is elected, loads the model, and goes on."""
    old = serving
    asked = next(agent for agent in lab.agents if agent is not old)
    whole = Stream(asked, TEXT, CASES["seeded"]).finish()
    stream = Stream(asked, TEXT, CASES["seeded"])
    stream.until(9)
    began = time.monotonic()
    old.kill()
    assert told(stream.finish()) == told(whole)
    print(f"the answer was there {time.monotonic() - began:.1f} s after the kill")
    old.start()
    old.wait_up()
    until(lambda: lab.all_alive(old) and lab.all_alive(asked))


def test_llama_server_is_killed(lab: Lab, demo_model: Path) -> None:
    """It knows no token ids: the answer is told again, and what the client has is left out."""
    asked = lab.agents[0]
    asked.cli("serve", demo_model.stem, "--engine", "llama-server", "--ctx", "512", timeout_s=WAIT_S)
    serving = lab.coordinator(asked)
    body = {**STORY, "temperature": 0.8}  # its seed is drawn by the agent
    for where in lab.agents:
        stream = Stream(where, TEXT, body)
        stream.until(7)
        kill_engine(serving, "llama-server")
        events = stream.finish()
        text = "".join(c["text"] for event in events for c in event["choices"])
        assert len({event["id"] for event in events}) == 1
        assert sum(bool(c["finish_reason"]) for event in events for c in event["choices"]) == 1
        assert events[-1]["timings"]["predicted_n"] == N
        assert len(text) > N
