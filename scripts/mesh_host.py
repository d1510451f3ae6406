"""The coordinator's machine in `scripts/mesh_way.py`: asks its agent, and asks the same machines without agents.

    mesh_host.py FACTS              FACTS: JSON, see `Facts`; it runs in the coordinator's network namespace

Once its verifier is loaded it says `{"prompts": [token ids, …]}`; then each JSON line on its input is answered with one
line; the end of the input ends it.

    {"do": "fresh", "rtt_ms": 10}               another round trip: forgets what was measured, warms both ways up
    {"do": "ask", "way": NAME, "prompt": 0}     one answer: a `Sample` without its place in the table

Without agents means: plain connections to workers and drafter, and the speculation loop in this process. The verifier
knows workers by loopback ports only; behind them is a pair of plain pumps here, as cheap as a hop can be in Python.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import trio
from drafter_node import ASKING, MODEL
from rig import Rig, RigError
from speculation_table import MESH, WITHOUT_MESH, Sample
from speculation_ways import answer, blank

from tightwad_agent.engine.verifying import VerifierClient
from tightwad_agent.errors import TightwadError
from tightwad_agent.proxy.costs import Costs
from tightwad_agent.proxy.generation import VerifierGenerator
from tightwad_agent.tunnel import splice
from tightwad_agent.wire.draft import DrafterInfo

LOAD_S = 300.0
ANSWER_S = 600.0
WARM_UP_TOKENS = 32
N_WARM_UP = 2

Place = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """`workers`, in the order in which the agents' pool uses them, and `drafter`: address and port of those that run
    without agents; `drafter_name`: as the agents call it. `agent`: process id, `url`: endpoint, of the coordinator's.
    """

    engine: str
    target: str
    work: str
    threads: int
    context: int
    n_tokens: int
    prompts: Sequence[str]
    workers: Sequence[Place]
    drafter: Place
    drafter_name: str
    agent: int
    url: str


class HostProcess:
    """This program, as `mesh_way.py` talks to it; made when it has loaded."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.answer(LOAD_S)

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        return self.answer(ANSWER_S)

    def answer(self, deadline_s: float) -> dict[str, Any]:
        """Its next line. Raises `RigError`."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], deadline_s)
        line = self._process.stdout.readline() if readable else ""
        if not line:
            raise RigError("the way without agents " + ("ended" if readable else f"is silent for {deadline_s:g} s"))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RigError(f"the coordinator's machine: {answer['error']}")
        return answer


class Host:
    """Both ways of answering, over one set of prompts."""

    def __init__(self, facts: Facts, rig: Rig, client: VerifierClient, http: httpx.AsyncClient) -> None:
        self.facts = facts
        self.prompts: list[list[int]] = []
        self._rig = rig
        self._client = client
        self._http = http
        self._generator: VerifierGenerator | None = None
        self._stream: trio.CancelScope | None = None
        self._tokens_of: dict[str, tuple[int, ...]] = {}

    async def read_prompts(self) -> None:
        self.prompts = [await self._client.tokenize(text.encode()) for text in self.facts.prompts]

    async def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "fresh":
            await self.fresh(command["rtt_ms"])
            return {}
        return asdict(await self.ask(command["way"], self.prompts[command["prompt"]], self.facts.n_tokens))

    async def fresh(self, rtt_ms: float) -> None:
        """A new stream to the drafter, nothing known of its costs; then both ways are warm."""
        if self._stream is not None:
            self._stream.cancel()
        host, port = self.facts.drafter
        describe = partial(_described, DrafterInfo(ASKING, self.facts.drafter_name, str(MODEL), 0, rtt_ms / 1000))
        link, self._stream = await self._rig.link_to(port, describe, self._client.info.n_vocab, host)
        self._generator = VerifierGenerator(self._client, lambda: [link], Costs())
        for prompt in self.prompts[:N_WARM_UP]:
            for way in (WITHOUT_MESH, MESH):
                await self.ask(way, prompt, WARM_UP_TOKENS)

    async def ask(self, way: str, prompt: Sequence[int], n_tokens: int) -> Sample:
        """Greedy. Raises `RigError` where a text differs so that its tokens are not known."""
        if way == MESH:
            return await self._through_agent(prompt, n_tokens)
        assert self._generator is not None
        made = await answer(self._generator, prompt, n_tokens)
        ended = len(made.tokens) < n_tokens  # by the token that says so, which is not part of the text
        text = await self._client.detokenize(made.tokens[:-1] if ended else made.tokens)
        self._tokens_of[text.decode("utf-8", "replace")] = made.tokens
        return made

    async def _through_agent(self, prompt: Sequence[int], n_tokens: int) -> Sample:
        """As a client on the coordinator's machine sees it, by this process's clock."""
        body = {"prompt": list(prompt), "max_tokens": n_tokens, "temperature": 0, "stream": True}
        agent = psutil.Process(self.facts.agent)
        cpu_began, began = _cpu_s(agent), time.perf_counter()
        first = last = 0.0
        text = ""
        timings: dict[str, Any] = {}
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                raise RigError(f"the agent answers {response.status_code}: {(await response.aread())[:500]!r}")
            async for event in _events(response):
                last = time.perf_counter()
                first = first or last
                text += event["choices"][0]["text"]
                timings = event.get("timings", timings)
        return blank(
            await self._ids_of(text, timings["predicted_n"]),
            prompt_s=first - began,
            generate_s=last - first,
            drafted=timings["drafted"],
            accepted=timings["accepted"],
            rounds=timings["rounds"],
            began_s=began,
            cpu_s=_cpu_s(agent) - cpu_began,
            more={key: timings[key] for key in ("verify_ms", "draft_ms", "drafters", "predicted_ms")},
        )

    async def _ids_of(self, text: str, n: int) -> tuple[int, ...]:
        read = await self._client.tokenize(text.encode(), special=False, begin=False)
        return ids_of(text, n, self._tokens_of, read)


def ids_of(text: str, n: int, known: Mapping[str, tuple[int, ...]], read: Sequence[int]) -> tuple[int, ...]:
    """An agent says text, of `n` tokens. They are those that were `known` without agents to make this very text; else
    those it is `read` as, or, where these are not as many, none that a model can have said."""
    ids = known.get(text, tuple(read))
    return ids if len(ids) == n else (-1,) * n


def _described(info: DrafterInfo, slots: int) -> DrafterInfo:
    return replace(info, slots=slots)


async def _events(response: httpx.Response) -> Any:
    """The JSON objects of an event stream. Raises `RigError` for one that is an error."""
    async for line in response.aiter_lines():
        data = line.removeprefix("data: ")
        if data == line or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise RigError(f"the agent: {event['error']}")
        yield event


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def plain_ports(nursery: trio.Nursery, places: Sequence[Place]) -> tuple[int, ...]:
    """Loopback ports that lead there."""
    ports = []
    for host, port in places:

        async def join(near: trio.SocketStream, host: str = host, port: int = port) -> None:
            await splice(near, await trio.open_tcp_stream(host, port))

        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        ports.append(listeners[0].socket.getsockname()[1])
        nursery.start_soon(trio.serve_listeners, join, listeners)
    return tuple(ports)


async def serve(facts: Facts) -> None:
    async with (
        Rig.running(Path(facts.engine), Path(facts.work), threads=facts.threads, direct=True) as rig,
        httpx.AsyncClient(base_url=facts.url, timeout=ANSWER_S, trust_env=False) as http,
    ):
        ports = await plain_ports(rig.nursery, facts.workers)
        client, _child = await rig.verifier(Path(facts.target), ports, context=facts.context)
        host = Host(facts, rig, client, http)
        await host.read_prompts()
        _say({"prompts": host.prompts})
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            _say(await host.obey(json.loads(line)))


def _say(words: dict[str, Any]) -> None:
    print(json.dumps(words), flush=True)


def main() -> int:
    problems: list[str] = []

    def note(group: BaseExceptionGroup[Exception]) -> None:
        for exc in group.exceptions:
            note(exc) if isinstance(exc, BaseExceptionGroup) else problems.append(str(exc) or repr(exc))

    try:
        trio.run(serve, Facts(**json.loads(sys.argv[1])))
    except* (RigError, TightwadError, httpx.HTTPError, OSError) as broken:
        note(broken)
    if problems:
        _say({"error": "; ".join(problems)})
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
