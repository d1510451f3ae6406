"""`bench`: prompts by kind on the running cluster, each with and without drafts, through this machine's own endpoint.

The two answers to a prompt follow one another, now the one first and now the other, so that drift and a prompt that is
already in the cache touch both alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tightwad_agent import bench_table, control
from tightwad_agent.bench_table import Answer, Pair, read_answer
from tightwad_agent.errors import (
    CTRL_C,
    AgentNotRunning,
    EngineError,
    NotReady,
    PeerError,
    PeerUnreachable,
    ProtocolError,
    TightwadError,
    UsageError,
)
from tightwad_agent.prompts import PROMPTS
from tightwad_agent.proxy.admin_client import error_of
from tightwad_agent.proxy.client import ask, connect_loopback
from tightwad_agent.proxy.openai import dump
from tightwad_agent.streams import close_quietly

Plain = dict[str, Any]
Show = Callable[[str, int, int, str], None]

PATH = "/v1/chat/completions"
MAX_ANSWER_BYTES = 16 << 20
MAX_MESSAGE = 1000
WARM_UP_TOKENS = 16
LLAMA_SERVER = "llama-server"
ONE_COLUMN = (
    "llama-server answers, which cannot leave its drafts out for one request: nothing to compare with."
    " To compare: tightwad-agent serve MODEL --engine verifier"
)


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure: `per_kind` prompts of each of `kinds`, `concurrency` of them at once."""

    kinds: tuple[str, ...] = tuple(PROMPTS)
    per_kind: int = 4
    max_tokens: int = 96
    concurrency: int = 1

    @property
    def prompts(self) -> list[tuple[str, str]]:
        """(kind, text) of all."""
        return [(kind, text) for kind in self.kinds for text in PROMPTS[kind][: self.per_kind]]

    @property
    def deadline_s(self) -> float:
        """For one answer. A cluster that needs ten seconds for each token is given up."""
        return 60.0 + 10.0 * self.max_tokens * self.concurrency


@dataclass(frozen=True, slots=True)
class Served:
    """What the cluster serves, as its status says."""

    model: str
    engine: str
    draft: str | None

    @property
    def comparable(self) -> bool:
        return self.engine != LLAMA_SERVER


@dataclass(frozen=True, slots=True)
class Outcome:
    """`plain`: what was measured, all of it or until `problem` or Ctrl-C ended it."""

    plain: Plain
    problem: TightwadError | None = None
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        if self.problem is not None:
            return self.problem.exit_code
        return CTRL_C if self.interrupted else 0


def parse_kinds(text: str | None) -> tuple[str, ...]:
    """`code,list` -> names, in the order and number given; all for `None`. `UsageError` for a name that is none."""
    if text is None:
        return tuple(PROMPTS)
    kinds = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in kinds if name not in PROMPTS]
    if unknown or not kinds:
        raise UsageError(f"--kinds: {', '.join(unknown) or text!r} is no kind", hint=f"there are {', '.join(PROMPTS)}")
    return kinds


def bench(state_dir: Path, options: Options, show: Show) -> Outcome:
    """Measures. Raises what keeps it from beginning: `AgentNotRunning`, `NotReady` where nothing is served, ...

    Ctrl-C and errors on the way are in the outcome, beside what had been measured by then.
    """
    served = what_is_served(control.AgentClient(state_dir).call("status"))
    info = control.running(state_dir)
    if info is None:
        raise AgentNotRunning("the agent stopped")
    measure = Measure(info.endpoint_port, served, options, show)
    interrupted = False
    try:
        trio.run(measure.run)
    except* KeyboardInterrupt:
        interrupted = True
    return Outcome(measure.plain(), measure.problem, interrupted)


def what_is_served(status: Plain) -> Served:
    """From `status`. Raises `NotReady` or `EngineError` where there is nothing to measure."""
    target, draft = status.get("target") or {}, status.get("draft") or {}
    model, state, detail = target.get("model"), target.get("state"), target.get("detail") or ""
    if state == "ready" and model:
        return Served(str(model), str(target.get("engine") or ""), draft.get("model"))
    if state == "failed":
        raise EngineError(f"{model or 'the model'} cannot be served: {detail}")
    if model:
        raise NotReady(f"{model} is not ready yet: {state}{', ' if detail else ''}{detail}", hint="try again later")
    raise NotReady("nothing is served, so there is nothing to measure", hint="tightwad-agent serve MODEL")


class Measure:
    """One run. `pairs` grows as answers come, and holds whole pairs only."""

    def __init__(self, port: int, served: Served, options: Options, show: Show) -> None:
        self.pairs: list[Pair] = []
        self.problem: TightwadError | None = None
        self._port = port
        self._served = served
        self._options = options
        self._show = show
        self._n_done = 0

    async def run(self) -> None:
        """Until all is measured or `problem` says why it ended."""
        prompts, at_once = self._options.prompts, self._options.concurrency
        self._show("warming up", 0, 0, "")
        await self._answers([prompts[0][1]], drafts=True, max_tokens=WARM_UP_TOKENS)
        self._n_done = 0
        for n, start in enumerate(range(0, len(prompts), at_once)):
            batch = prompts[start : start + at_once]
            if self.problem is not None or not await self._measure(batch, drafts_first=n % 2 == 0):
                return

    async def _measure(self, batch: Sequence[tuple[str, str]], *, drafts_first: bool) -> bool:
        """Asks for all of the batch at once, with drafts and then without, or the other way round."""
        found: dict[bool, list[Answer]] = {False: []}
        modes = (True, False) if drafts_first else (False, True)
        for drafts in modes if self._served.comparable else (True,):
            found[drafts] = await self._answers([text for _, text in batch], drafts, self._options.max_tokens)
            if self.problem is not None:
                return False
        without: Sequence[Answer | None] = found[False] or [None] * len(batch)
        for (kind, text), with_drafts, plain in zip(batch, found[True], without, strict=True):
            self.pairs.append(Pair(kind, text, with_drafts, plain))
        return True

    async def _answers(self, texts: Sequence[str], drafts: bool, max_tokens: int) -> list[Answer]:
        """The answers in the order of the texts; fewer where `problem` is set."""
        found: dict[int, Answer] = {}

        async def one(n: int, text: str) -> None:
            try:
                found[n] = await self._answer(text, drafts, max_tokens)
            except TightwadError as exc:
                self.problem = exc
                nursery.cancel_scope.cancel()
            else:
                self._count()

        async with trio.open_nursery() as nursery:
            for n, text in enumerate(texts):
                nursery.start_soon(one, n, text)
        return [found[n] for n in sorted(found)]

    def _count(self) -> None:
        self._n_done += 1
        total = len(self._options.prompts) * (2 if self._served.comparable else 1)
        self._show("measuring", self._n_done, total, "")

    async def _answer(self, text: str, drafts: bool, max_tokens: int) -> Answer:
        body: Plain = {
            "model": "default",
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": False,
        }
        if self._served.comparable:
            body["speculation"] = drafts
        answer = await complete(self._port, body, self._options.deadline_s)
        if not drafts and answer.drafted:
            raise PeerError(
                "the machine that coordinates used drafts where it was asked not to",
                hint="is its tightwad-agent of another version?",
            )
        return answer

    def plain(self) -> Plain:
        """What was measured so far, as `bench --json` prints it."""
        options, wanted = self._options, len(self._options.prompts)
        problem = self.problem
        measured = bench_table.plain(self.pairs)
        if not self._served.comparable:
            measured["notes"] = [ONE_COLUMN, *measured["notes"]]
        return {
            "target": self._served.model,
            "engine": self._served.engine,
            "draft": self._served.draft,
            "max_tokens": options.max_tokens,
            "concurrency": options.concurrency,
            "wanted": wanted,
            "measured": len(self.pairs),
            "error": {"code": problem.code, "message": problem.message, "hint": problem.hint} if problem else None,
            **measured,
        }


async def complete(port: int, body: Plain, deadline_s: float) -> Answer:
    """One chat completion on the endpoint of this machine. Raises what the endpoint answered with, or a `PeerError`."""
    try:
        stream = await connect_loopback(port)
    except PeerUnreachable:
        raise AgentNotRunning(f"no agent answers on port {port} of this machine any more") from None
    try:
        since = trio.current_time()
        headers = [(b"content-type", b"application/json")]
        answer = await ask(stream, "POST", PATH, headers, dump(body), host=f"127.0.0.1:{port}", deadline_s=deadline_s)
        data = await answer.read(MAX_ANSWER_BYTES, deadline_s=deadline_s)
        wall_s = trio.current_time() - since
    finally:
        await close_quietly(stream)
    plain = _json(data)
    if answer.status != 200:
        raise _refusal(answer.status, plain)
    return read_answer(plain, wall_s)


def _json(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ProtocolError("the endpoint's answer is not JSON") from None


def _refusal(status: int, plain: object) -> TightwadError:
    """The error that the endpoint described, as its own class."""
    error = plain.get("error") if isinstance(plain, dict) else None
    said = error if isinstance(error, dict) else {}
    message = str(said.get("message") or f"the endpoint answered with status {status}")[:MAX_MESSAGE]
    return error_of({"code": str(said.get("code") or "remote")[:64], "message": message, "hint": ""})
