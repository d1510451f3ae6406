"""Two agents for measuring the endpoint: one serves with the verifier, the other drafts for it over the mesh."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from lab import Agent, Lab

READY_S = 300.0
ANSWER_S = 120.0
WATCHED = Path(__file__).with_name("watched_agent.py")
CHAT = "/v1/chat/completions"

Window = dict[str, Any]
"""What `watched_agent.py` writes."""


@dataclass
class Pair:
    """`serving` is the coordinator and answers requests; `drafting` has the drafter. `watch`: folder of windows."""

    lab: Lab
    serving: Agent
    drafting: Agent
    watch: Path

    def process(self, agent: Agent) -> psutil.Process:
        assert agent.process is not None
        return psutil.Process(agent.process.pid)

    def verifier(self) -> psutil.Process:
        """The serving agent's child that holds the model."""
        (found,) = (child for child in self.process(self.serving).children() if "llama" not in child.name())
        return found

    def window(self, agent: Agent) -> Window:
        """What the agent holds, and what its processor time went into since the last call."""
        process = self.process(agent)
        path = self.watch / f"{process.pid}.json"
        known = _read(path).get("serial", 0)
        process.send_signal(signal.SIGUSR2)
        return agent.wait(  # type: ignore[no-any-return]
            lambda: (window := _read(path)).get("serial", 0) > known and window, "to write what it holds", 30
        )


def _read(path: Path) -> Window:
    try:
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    except FileNotFoundError:
        return {}


@contextlib.contextmanager
def running_pair(
    target: Path, draft: Path, *, engine: Path, context: int, hz: float = 0, workers: int = 0
) -> Iterator[Pair]:
    """Both up, the target loaded, the drafter ready. `hz`: samples of processor time a second. Raises `LabError`."""
    flags = ("--engine-dir", str(engine), "--threads", "1")
    command = (sys.executable, str(WATCHED))
    with Lab(2, namespaces=False, flags=flags, command=command) as lab:
        watch = lab.dir / "watch"
        watch.mkdir()
        os.environ["TIGHTWAD_WATCH"], os.environ["TIGHTWAD_WATCH_HZ"] = str(watch), str(hz)
        lab.start()
        names = [lab.agents[0].cli("add", str(path), timeout_s=READY_S)["name"] for path in (target, draft)]
        serving = lab.coordinator()
        (drafting,) = (agent for agent in lab.agents if agent is not serving)
        options = ("--workers", str(workers), "--engine", "verifier", "--draft", names[1], "--drafters", drafting.name)
        serving.cli("serve", names[0], *options, "--ctx", str(context), timeout_s=READY_S)
        serving.wait(lambda: _drafts(serving), "for the drafter", READY_S)
        yield Pair(lab, serving, drafting, watch)


def _drafts(serving: Agent) -> bool:
    return any(drafter["state"] == "ready" for drafter in serving.status()["speculation"]["drafters"])


def stream(agent: Agent, body: dict[str, Any], until: Callable[[dict[str, Any]], bool] = lambda _: False) -> list[Any]:
    """The events of a streamed answer; the connection is closed after the first that `until` takes. Raises `OSError`
    or `http.client.HTTPException` where there is no answer, `ValueError` for one that is no stream."""
    connection = http.client.HTTPConnection(agent.host, agent.endpoint_port, timeout=ANSWER_S)
    with contextlib.closing(connection):
        connection.request("POST", CHAT, json.dumps(body | {"stream": True}), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {response.read(500)!r}")
        events = []
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            events.append(json.loads(line[6:]))
            if until(events[-1]):
                break
        return events
