"""`bench` against a real endpoint whose model server is a script: what is asked, and what becomes of the answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner

import tightwad_agent
from tightwad_agent import bench_run, control
from tightwad_agent.bench_run import ONE_COLUMN, Options, parse_kinds
from tightwad_agent.cli import cli
from tightwad_agent.errors import (
    AgentNotRunning,
    EngineError,
    NotReady,
    PeerError,
    PeerGone,
    PeerSilent,
    ProtocolError,
    RemoteError,
    TightwadError,
    Unsupported,
    UsageError,
)
from tightwad_agent.prompts import PROMPTS
from tightwad_agent.proxy.app import App
from tightwad_agent.proxy.cluster import Local
from tightwad_agent.proxy.fakes import FakeCluster

Plain = dict[str, Any]
Answerer = Callable[[Plain, int], "tuple[int, bytes] | None"]
"""(request, its number from 0) -> status and body; `None` never answers."""


def completion(text: str, per_s: float, **timings: Any) -> bytes:
    return json.dumps(
        {
            "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"completion_tokens": 20},
            "timings": {"predicted_n": 20, "predicted_per_second": per_s, **timings},
        }
    ).encode()


def prompt_of(request: Plain) -> str:
    return str(request["messages"][0]["content"])


def well(request: Plain, _n: int) -> tuple[int, bytes]:
    """Answers as a verifier does whose drafts make it three times as fast."""
    text = f"About: {prompt_of(request)}"
    if request["speculation"]:
        return 200, completion(text, 30.0, rounds=5, drafted=20, accepted=15, tried_at=[5, 5], accepted_at=[5, 4])
    return 200, completion(text, 10.0, rounds=20, drafted=0, accepted=0)


class Lab:
    """An agent's endpoint, its status, and the state directory by which commands find it; in a thread of its own."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self.answer: Answerer = well
        self.status: Plain = {
            "target": {"model": "big", "state": "ready", "detail": "", "engine": "verifier"},
            "draft": {"model": "tiny", "reason": ""},
        }
        self.requests: list[Plain] = []
        self.running = self.most_running = 0
        self.together = 1
        """Requests after the first are answered when so many of them have come."""
        self._started, self._token = threading.Event(), None
        self._thread = threading.Thread(target=lambda: trio.run(self._run), daemon=True)

    def __enter__(self) -> Lab:
        self._lock = control.StateLock(self.state_dir)
        self._thread.start()
        assert self._started.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join(10)
        self._lock.close()

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()

        async def status(_params: Plain, _progress: Any) -> Plain:
            return self.status

        cluster = FakeCluster(commands={"status": status})
        app = App(cluster, admin_key=lambda: control.admin_key(self.state_dir), hold_s=1)
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            (upstream,) = await nursery.start(
                lambda task_status: trio.serve_tcp(self._serve, 0, host="127.0.0.1", task_status=task_status)
            )
            cluster.where = Local(upstream.socket.getsockname()[1], slots=16)
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            await nursery.start(app.serve, listeners)
            port = listeners[0].socket.getsockname()[1]
            control.announce(self.state_dir, control.RunInfo(os.getpid(), port, 0))
            self._started.set()

    async def _serve(self, stream: trio.SocketStream) -> None:
        data = b""
        while b"\r\n\r\n" not in data or len(data) < _length(data):
            if not (part := await stream.receive_some(65536)):
                return
            data += part
        if not data.startswith(b"POST"):
            await stream.send_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            return
        request = json.loads(data.partition(b"\r\n\r\n")[2])
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            await self._respond(stream, request, len(self.requests) - 1)
        except trio.BrokenResourceError:
            pass
        finally:
            self.running -= 1

    async def _respond(self, stream: trio.SocketStream, request: Plain, n: int) -> None:
        with trio.move_on_after(30):
            while n and len(self.requests) <= (n - 1) // self.together * self.together + self.together:
                await trio.sleep(0.005)
        said = self.answer(request, n)
        if said is None:
            await stream.receive_some(1)
            return
        status, body = said
        if not status:
            return
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        await stream.send_all(head.encode() + b"connection: close\r\n\r\n" + body)


def _length(data: bytes) -> int:
    head = data.partition(b"\r\n\r\n")[0]
    length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return len(head) + 4 + (int(length[0][15:]) if length else 0)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path / "state") as running:
        yield running


def quiet(*_: Any) -> None:
    """No progress is shown."""


def bench(lab: Lab, show: Any = quiet, **options: Any) -> bench_run.Outcome:
    return bench_run.bench(lab.state_dir, Options(**{"kinds": ("facts", "code"), "per_kind": 2} | options), show)


# A whole run


def test_each_prompt_is_asked_with_and_without_drafts_in_turn(lab: Lab) -> None:
    outcome = bench(lab, max_tokens=33)
    warm, *asked = lab.requests
    assert (prompt_of(warm), warm["speculation"], warm["max_tokens"]) == (PROMPTS["facts"][0], True, 16)
    texts = [*PROMPTS["facts"][:2], *PROMPTS["code"][:2]]
    assert [prompt_of(r) for r in asked] == [text for text in texts for _ in range(2)]
    assert [r["speculation"] for r in asked] == [True, False, False, True, True, False, False, True]
    assert {(r["temperature"], r["max_tokens"], r["stream"]) for r in asked} == {(0, 33, False)}
    assert (outcome.problem, outcome.interrupted, outcome.exit_code) == (None, False, 0)


def test_what_was_measured(lab: Lab) -> None:
    plain = json.loads(json.dumps(bench(lab).plain))
    assert (plain["target"], plain["engine"], plain["draft"]) == ("big", "verifier", "tiny")
    assert (plain["wanted"], plain["measured"], plain["error"], plain["notes"]) == (4, 4, None, [])
    assert [row["kind"] for row in plain["kinds"]] == ["facts", "code"]
    assert all(row["speedup"] == 3.0 and row["acceptance"] == 0.75 for row in plain["kinds"])
    total = plain["total"]
    assert (total["compared"], total["equal"], total["speedup"], total["tokens_per_round"]) == (4, 4, 3.0, 4.0)
    assert total["acceptance_at"] == [1.0, 0.8]


def test_answers_that_differ_are_counted_and_named(lab: Lab) -> None:
    lab.answer = lambda r, n: (200, completion(f"It is {'X' if n == 3 else 'so'}.", 10.0))
    plain = bench(lab).plain
    assert (plain["total"]["compared"], plain["total"]["equal"]) == (4, 3)
    assert plain["differences"] == [{"kind": "facts", "prompt": PROMPTS["facts"][1], "at": 6}]


@pytest.mark.parametrize("at_once", [2, 3, 8])
def test_several_requests_at_once_run_under_the_same_load_with_and_without(lab: Lab, at_once: int) -> None:
    lab.together = at_once
    outcome = bench(lab, concurrency=at_once, per_kind=at_once)
    assert outcome.plain["measured"] == 2 * at_once
    assert lab.most_running == at_once
    modes = [r["speculation"] for r in lab.requests[1:]]
    assert modes == [True] * at_once + [False] * at_once * 2 + [True] * at_once
    asked = [prompt_of(r) for r in lab.requests[1:]]
    assert sorted(asked[:at_once]) == sorted(asked[at_once : 2 * at_once]) == sorted(PROMPTS["facts"][:at_once])
    assert outcome.plain["total"]["equal"] == 2 * at_once, "each answer belongs to its prompt"


def test_what_is_left_over_is_measured_too(lab: Lab) -> None:
    assert bench(lab, concurrency=3, per_kind=4).plain["measured"] == 8


def test_progress_counts_answers(lab: Lab) -> None:
    seen: list[tuple[str, int, int, str]] = []
    bench(lab, lambda *step: seen.append(step), per_kind=1)
    assert [s for s in seen if s[0] == "measuring" and s[1] == 4] == [("measuring", 4, 4, "")]
    assert seen[0] == ("warming up", 0, 0, "")


def test_llama_server_cannot_leave_its_drafts_out(lab: Lab) -> None:
    lab.status["target"]["engine"] = "llama-server"
    lab.answer = lambda _r, _n: (200, completion("x", 20.0, draft_n=8, draft_n_accepted=6))
    plain = bench(lab).plain
    assert not any("speculation" in r for r in lab.requests)
    assert len(lab.requests) == 1 + 4
    assert plain["notes"] == [ONE_COLUMN]
    assert plain["total"]["acceptance"] == 0.75
    assert (plain["total"]["speedup"], plain["total"]["compared"]) == (None, 0)


# What ends a run early


def after(n_good: int, then: Any) -> Answerer:
    return lambda request, n: well(request, n) if n < n_good else then


@pytest.mark.parametrize(
    ("then", "error", "says"),
    [
        ((400, b'{"error":{"message":"no field `speculation`","code":"unsupported_parameter"}}'), Unsupported, "field"),
        ((500, b'{"error":{"message":"broken"}}'), RemoteError, "broken"),
        ((500, b"[]"), RemoteError, "status 500"),
        ((200, b"<html>"), ProtocolError, "JSON"),
        ((200, b"{}"), ProtocolError, "choices"),
    ],
)
def test_an_error_ends_it_and_keeps_what_was_measured(
    lab: Lab, then: Any, error: type[TightwadError], says: str
) -> None:
    lab.answer = after(1 + 2 * 2, then)
    outcome = bench(lab)
    assert type(outcome.problem) is error
    assert says in str(outcome.problem)
    assert outcome.exit_code == error.exit_code > 0
    assert (outcome.plain["measured"], outcome.plain["wanted"]) == (2, 4)
    assert outcome.plain["error"]["message"] == outcome.problem.message
    assert len(lab.requests) == 6, "nothing more is asked"


def test_an_error_ends_the_other_requests_that_run(lab: Lab) -> None:
    lab.answer = lambda request, n: (
        well(request, n) if n == 0 else None if n < 4 else (500, b'{"error":{"message":"broken"}}')
    )
    outcome = bench(lab, concurrency=4)
    wait_for(lambda: lab.running == 0)
    assert "broken" in str(outcome.problem)
    assert outcome.plain["measured"] == 0


def test_an_error_of_the_warm_up_is_an_error_too(lab: Lab) -> None:
    lab.answer = after(0, (500, b"{}"))
    outcome = bench(lab)
    assert isinstance(outcome.problem, RemoteError)
    assert len(lab.requests) == 1


def test_a_server_that_dies_is_an_error(lab: Lab) -> None:
    lab.answer = after(3, (0, b""))
    outcome = bench(lab)
    assert isinstance(outcome.problem, PeerError | NotReady)
    assert outcome.plain["measured"] == 1


def test_a_silent_server_is_given_up(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Options, "deadline_s", 0.5)
    lab.answer = after(3, None)
    since = time.monotonic()
    outcome = bench(lab)
    assert time.monotonic() - since < 10
    assert isinstance(outcome.problem, PeerSilent)
    assert outcome.plain["measured"] == 1


def test_patience_grows_with_what_is_asked() -> None:
    assert Options(max_tokens=1000, concurrency=4).deadline_s > Options(max_tokens=1000).deadline_s > 1000


def test_drafts_where_none_were_wanted_make_no_figures(lab: Lab) -> None:
    lab.answer = lambda r, _n: (200, completion("x", 10.0, rounds=5, drafted=20, accepted=15))
    outcome = bench(lab)
    assert "asked not to" in str(outcome.problem)
    assert outcome.plain["measured"] == 0


def test_ctrl_c_keeps_what_was_measured(lab: Lab) -> None:
    def show(stage: str, done: int, _total: int, _unit: str) -> None:
        if (stage, done) == ("measuring", 5):
            raise KeyboardInterrupt

    outcome = bench(lab, show)
    assert (outcome.interrupted, outcome.problem, outcome.exit_code) == (True, None, 130)
    assert outcome.plain["measured"] == 2


def wait_for(condition: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends_at
        time.sleep(0.02)


def test_ctrl_c_of_a_real_process(lab: Lab) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, and its children too
    lab.answer = after(4, None)
    command = [sys.executable, "-m", "tightwad_agent", "bench", "--json", "--state-dir", str(lab.state_dir)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(tightwad_agent.__file__).parents[1]
    )
    try:
        wait_for(lambda: len(lab.requests) == 5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == b""
    assert json.loads(out)["measured"] == 1
    wait_for(lambda: lab.running == 0)


# What keeps it from beginning


@pytest.mark.parametrize(
    ("target", "error", "says"),
    [
        ({"model": None, "state": "none", "detail": "nothing to serve"}, NotReady, "nothing is served"),
        ({"model": "big", "state": "loading", "detail": "40 %"}, NotReady, "big is not ready yet: loading, 40 %"),
        ({"model": "big", "state": "failed", "detail": "no memory"}, EngineError, "no memory"),
        ({}, NotReady, "nothing is served"),
    ],
)
def test_nothing_to_measure(lab: Lab, target: Plain, error: type[Exception], says: str) -> None:
    lab.status["target"] = target
    with pytest.raises(error) as info:
        bench(lab)
    assert says in str(info.value)
    assert lab.requests == []


def test_no_agent(tmp_path: Path) -> None:
    with pytest.raises(AgentNotRunning):
        bench_run.bench(tmp_path, Options(), quiet)


async def test_an_agent_that_went_away() -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    await listeners[0].aclose()
    with pytest.raises(AgentNotRunning):
        await bench_run.complete(port, {}, 5)


async def test_a_program_that_hangs_up(nursery: trio.Nursery) -> None:
    async def hang_up(stream: trio.SocketStream) -> None:
        await stream.aclose()

    (listener,) = await nursery.start(
        lambda task_status: trio.serve_tcp(hang_up, 0, host="127.0.0.1", task_status=task_status)
    )
    with pytest.raises(PeerGone):
        await bench_run.complete(listener.socket.getsockname()[1], {}, 5)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [(None, tuple(PROMPTS)), ("code", ("code",)), (" list, code ,list,", ("list", "code"))],
)
def test_kinds(text: str | None, kinds: tuple[str, ...]) -> None:
    assert parse_kinds(text) == kinds


@pytest.mark.parametrize("text", ["", ",", "poems", "code,poems", "Code"])
def test_kinds_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--kinds") as info:
        parse_kinds(text)
    assert "reasoning" in info.value.hint


# The command


def command(lab: Lab, *args: str) -> Any:
    return CliRunner().invoke(cli, ["bench", "--state-dir", str(lab.state_dir), "--per-kind", "1", *args])


def test_the_command_prints_a_table(lab: Lab) -> None:
    result = command(lab, "--kinds", "code,facts")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "code 1 30.0 10.0 3.00 x 75 % 4.0" in lines
    assert "equal answers: 2 of 2" in lines
    assert "bench: measuring 4/4" in result.stderr
    assert command(lab, "--max-tokens", "7").exit_code == 0
    assert lab.requests[-1]["max_tokens"] == 7


def test_the_command_shows_what_was_measured_and_then_the_error(lab: Lab) -> None:
    lab.answer = after(3, (500, b'{"error":{"message":"broken"}}'))
    result = command(lab)
    assert result.exit_code == 7
    assert "stopped after 1 of 5 prompts" in result.stdout
    assert result.stderr.endswith("error: broken\n")
    lab.requests.clear()
    result = command(lab, "--json")
    assert result.exit_code == 7
    assert json.loads(result.stdout)["error"] == {"code": "remote", "message": "broken", "hint": ""}
    assert json.loads(result.stdout)["measured"] == 1


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--kinds", "poems"], "--kinds"),
        (["--per-kind", "0"], "--per-kind"),
        (["--per-kind", "21"], "--per-kind"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--concurrency", "17"], "--concurrency"),
    ],
)
def test_a_bad_value_is_refused_by_name(lab: Lab, args: list[str], says: str) -> None:
    result = command(lab, *args)
    assert result.exit_code == 2
    assert says in result.stderr
    assert lab.requests == []


def test_help_names_every_kind() -> None:
    text = CliRunner().invoke(cli, ["bench", "--help"]).output
    assert all(kind in text for kind in PROMPTS)
