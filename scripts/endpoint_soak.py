"""Many short requests of all kinds, some at the same time, and what they leave behind in agents and verifier."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import statistics
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from endpoint_lab import CHAT, Pair, running_pair
from lab import Agent, LabError

from tightwad_agent.engine.tinymodel import tiny_model

CONTEXT = 2048
AT_ONCE = 8
SETTLE_S = 30.0
WARM_SHARE = 0.2
"""Of the requests; the slope of memory is told for the rest."""
N_SAMPLES = 200

OPEN = (
    "tightwad_agent.proxy.verified.VerifierGeneration",
    "tightwad_agent.proxy.speculate.Speculation",
    "tightwad_agent.proxy.branch.Branch",
    "tightwad_agent.proxy.running.Run",
    "tightwad_agent.proxy.http1.Exchange",
    "tightwad_agent.engine.open_request.OpenRequest",
    "tightwad_agent.engine.questions._Question",
    "tightwad_agent.engine.draft_link.LinkSession",
    "tightwad_agent.engine.draft_sessions._Session",
    "tightwad_agent.engine.draft_turn.Turn",
)
"""What must not be there when no request is: on either agent."""


def tiny_pair(folder: Path) -> tuple[Path, Path]:
    """A target and a draft, each a file of its own with the same noise in it, so that drafts are right."""
    length = b"llama.context_length" + struct.pack("<I", 4)
    data = tiny_model()
    assert length + struct.pack("<I", 256) in data
    data = data.replace(length + struct.pack("<I", 256), length + struct.pack("<I", CONTEXT))
    paths = folder / "target.gguf", folder / "draft.gguf"
    for path, name in zip(paths, (b"soak target", b"soak draft "), strict=True):
        path.write_bytes(data.replace(b"smoke test ", name).replace(_text(b"smoke test"), _text(name[:10])))
    return paths


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


# Requests


Kind = Callable[[Agent, random.Random], int]
"""Makes one request; the status, or 0 where it was left before its end."""


def body(rng: random.Random, **more: Any) -> dict[str, Any]:
    words = " ".join(rng.choice(("one", "two", "three", "four")) for _ in range(rng.randint(1, 12)))
    made: dict[str, Any] = {
        "messages": [{"role": "user", "content": words}],
        "max_tokens": rng.randint(1, 4),
        "temperature": rng.choice((0, 0, 0.8)),
        "ignore_eos": True,
    }
    return made | more


def post(agent: Agent, asked: dict[str, Any], path: str = CHAT) -> int:
    connection = http.client.HTTPConnection(agent.host, agent.endpoint_port, timeout=120)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(asked), {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status


def whole(agent: Agent, rng: random.Random) -> int:
    return post(agent, body(rng))


def streamed(agent: Agent, rng: random.Random) -> int:
    return post(agent, body(rng, stream=True, stream_options={"include_usage": True}))


def several(agent: Agent, rng: random.Random) -> int:
    return post(agent, body(rng, n=2, logprobs=True, top_logprobs=2, stop=["zz", "qq"]))


def completion(agent: Agent, rng: random.Random) -> int:
    return post(agent, {"prompt": ["a b c", "d e f"], "max_tokens": 2, "echo": rng.random() < 0.5}, "/v1/completions")


def too_long(agent: Agent, rng: random.Random) -> int:
    return post(agent, body(rng, messages=[{"role": "user", "content": "x " * CONTEXT}]))


def bad_field(agent: Agent, rng: random.Random) -> int:
    return post(agent, body(rng, **rng.choice(({"temperature": "hot"}, {"tools": [{}]}, {"n": -1}, {"messages": 3}))))


def left_midway(agent: Agent, rng: random.Random) -> int:
    """The client reads a little of a long answer, or nothing, and is gone; half of them with a reset."""
    data = json.dumps(body(rng, max_tokens=512, stream=rng.random() < 0.7)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((agent.host, agent.endpoint_port), timeout=60) as sock:
        sock.sendall(head.encode() + data)
        sock.settimeout(rng.choice((0.001, 0.01, 0.05)))
        with contextlib.suppress(TimeoutError):
            sock.recv(1024)
        if rng.random() < 0.5:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return 0


KINDS: dict[str, tuple[int, Kind, int]] = {
    "whole": (30, whole, 200),
    "streamed": (30, streamed, 200),
    "several": (5, several, 200),
    "completion": (5, completion, 200),
    "left midway": (15, left_midway, 0),
    "too long": (7, too_long, 400),
    "bad field": (8, bad_field, 400),
}
"""By name: how many of a hundred, how it is made, and the status it must get."""


# The soak


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes after so many requests."""

    requests: int
    serving: int
    drafting: int
    verifier: int


@dataclass
class Soak:
    """`seed` decides which requests come in which order."""

    pair: Pair
    n: int
    seed: int
    made: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)

    def run(self) -> None:
        """All requests, `AT_ONCE` at a time, and a look at memory now and then."""
        todo = iter(self._plan())
        lock = threading.Lock()
        every = max(1, self.n // N_SAMPLES)

        def work() -> None:
            while True:
                with lock:
                    asked = next(todo, None)
                if asked is None:
                    return
                fault = self._one(*asked)
                with lock:
                    self.wrong += [fault] if fault else []
                    self.made[asked[0]] += 1
                    if self.made.total() % every == 0:
                        self.memory.append(self._memory())

        threads = [threading.Thread(target=work) for _ in range(AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _plan(self) -> list[tuple[str, int]]:
        rng = random.Random(self.seed)
        weights = [share for share, _, _ in KINDS.values()]
        return [(rng.choices(list(KINDS), weights)[0], rng.getrandbits(32)) for _ in range(self.n)]

    def _one(self, name: str, seed: int) -> str:
        _, make, due = KINDS[name]
        try:
            status = make(self.pair.serving, random.Random(seed))
        except (OSError, http.client.HTTPException) as exc:
            return f"{name}, seed {seed}: {exc!r}"
        return "" if status == due else f"{name}, seed {seed}: status {status}, not {due}"

    def _memory(self) -> Memory:
        pair = self.pair
        processes = pair.process(pair.serving), pair.process(pair.drafting), pair.verifier()
        return Memory(self.made.total(), *(process.memory_info().rss for process in processes))

    def left(self) -> dict[str, int]:
        """What is open on either agent although nothing is asked any more; it has a moment to go away."""
        end = time.monotonic() + SETTLE_S
        while True:
            open_now: dict[str, int] = {}
            for agent in (self.pair.serving, self.pair.drafting):
                live = self.pair.window(agent)["live"]
                open_now |= {f"{agent.name}: {kind}": live[kind] for kind in OPEN if live.get(kind)}
            if not open_now or time.monotonic() > end:
                return open_now
            time.sleep(0.5)

    def slots_taken(self, slots: int) -> int:
        """How many of the verifier's slots are not to be had: so many streams at once must all get a first token
        while none has ended."""
        begun, lock, all_begun = [0], threading.Lock(), threading.Event()

        def one(seed: int) -> None:
            asked = body(random.Random(seed), max_tokens=CONTEXT // slots - 200, temperature=0, stream=True)
            connection = http.client.HTTPConnection(self.pair.serving.host, self.pair.serving.endpoint_port, timeout=60)
            with contextlib.closing(connection):
                connection.request("POST", CHAT, json.dumps(asked), {"Content-Type": "application/json"})
                connection.getresponse().read(1)
                with lock:
                    begun[0] += 1
                    if begun[0] == slots:
                        all_begun.set()
                all_begun.wait(10)

        threads = [threading.Thread(target=one, args=(seed,)) for seed in range(slots)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return slots - begun[0]


def slope(memory: Sequence[Memory], name: str) -> float:
    """Bytes a request, after the warm-up: the line of least squares."""
    last = memory[-1].requests
    settled = [m for m in memory if m.requests > WARM_SHARE * last]
    if len(settled) < 2:
        return 0.0
    return statistics.linear_regression([m.requests for m in settled], [getattr(m, name) for m in settled]).slope


def soak(engine: Path, target: Path, draft: Path, n: int, seed: int) -> dict[str, Any]:
    """Figures. Raises `LabError`."""
    with running_pair(target, draft, engine=engine, context=CONTEXT) as pair:
        run = Soak(pair, n, seed)
        before = objects(pair)
        began = time.monotonic()
        run.run()
        took_s = time.monotonic() - began
        if not run.memory:
            raise LabError("there were too few requests to look at memory")
        left = run.left()
        drafted = pair.serving.status()["speculation"]["drafted"]
        after = objects(pair)
    return {
        "requests": dict(run.made),
        "seed": seed,
        "took_s": round(took_s, 1),
        "wrong": run.wrong[:20],
        "n_wrong": len(run.wrong),
        "drafted": drafted,
        "open": left,
        "objects": {"before": before, "after": after},
        "bytes_per_request": {name: round(slope(run.memory, name), 1) for name in ("serving", "drafting", "verifier")},
        "memory": [[m.requests, m.serving, m.drafting, m.verifier] for m in run.memory],
    }


def objects(pair: Pair) -> dict[str, int]:
    """Objects that the collector knows, by agent."""
    return {"serving": pair.window(pair.serving)["objects"], "drafting": pair.window(pair.drafting)["objects"]}
