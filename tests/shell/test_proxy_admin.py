"""Commands of the command line, from `admin_call` to the running agent and back."""

from __future__ import annotations

import json

import pytest
import trio

from tightwad_agent.errors import (
    AgentNotRunning,
    DiskFull,
    NotReady,
    RemoteError,
    TightwadError,
    Unauthorized,
    UnknownModel,
    UsageError,
)
from tightwad_agent.proxy.admin import as_plain
from tightwad_agent.proxy.admin_client import admin_call, error_of
from tightwad_agent.proxy.app import App
from tightwad_agent.proxy.client import ask, connect_loopback
from tightwad_agent.proxy.fakes import FakeCluster

KEY = "admin-key"


@pytest.fixture
async def agent():
    """A listening agent: (port, its commands)."""
    commands = {}
    app = App(FakeCluster(commands=commands), admin_key=lambda: KEY)
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await nursery.start(app.serve, listeners)
        yield listeners[0].socket.getsockname()[1], commands
        nursery.cancel_scope.cancel()


async def test_result_and_progress(agent):
    port, commands = agent
    seen = []

    async def add(params, progress):
        progress({"stage": "hash", "done": 1})
        await trio.sleep(0)
        progress({"stage": "hash", "done": 2})
        return {"params": params, "big": "x" * 200_000}

    commands["add"] = add
    result = await admin_call(port, KEY, "add", {"path": "/ü"}, seen.append)
    assert result == {"params": {"path": "/ü"}, "big": "x" * 200_000}
    assert seen == [{"stage": "hash", "done": 1}, {"stage": "hash", "done": 2}]


@pytest.mark.parametrize("value", [None, [], "text", 0, {"error": None}])
async def test_any_result(agent, value):
    port, commands = agent

    async def show(_params, _progress):
        return value

    commands["show"] = show
    assert await admin_call(port, KEY, "show") == value


@pytest.mark.parametrize("error", [UnknownModel("no `x`", hint="there is y"), DiskFull("full"), NotReady("later")])
async def test_errors_arrive_as_what_they_are(agent, error):
    port, commands = agent

    async def fail(_params, _progress):
        raise error

    commands["fail"] = fail
    with pytest.raises(type(error)) as info:
        await admin_call(port, KEY, "fail")
    assert (info.value.message, info.value.hint) == (error.message, error.hint)


async def test_a_fault_is_not_told(agent, caplog):
    port, commands = agent

    async def fail(_params, _progress):
        raise ZeroDivisionError("secret")

    commands["fail"] = fail
    with pytest.raises(TightwadError) as info:
        await admin_call(port, KEY, "fail")
    assert "secret" not in str(info.value)
    assert "ZeroDivisionError" in caplog.text


async def test_unknown_command(agent):
    with pytest.raises(UsageError, match="nope"):
        await admin_call(agent[0], KEY, "nope")


async def test_wrong_key(agent):
    with pytest.raises(Unauthorized, match="state-dir"):
        await admin_call(agent[0], "wrong", "add")


async def test_nobody_there():
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    await listeners[0].aclose()
    with pytest.raises(AgentNotRunning, match=str(port)):
        await admin_call(port, KEY, "add")


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n<html",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"",
    ],
)
async def test_another_program_on_the_port(nursery, reply):
    async def serve(stream):
        await stream.receive_some(10_000)
        await stream.send_all(reply)

    listeners = await nursery.start(trio.serve_tcp, serve, 0)
    with pytest.raises(AgentNotRunning):
        await admin_call(listeners[0].socket.getsockname()[1], KEY, "add")
    nursery.cancel_scope.cancel()


async def test_caller_who_leaves_cancels_the_command(agent):
    port, commands = agent
    running, cancelled = trio.Event(), trio.Event()

    async def long(_params, progress):
        progress({"at": 1})
        running.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            cancelled.set()
            raise

    commands["long"] = long
    async with trio.open_nursery() as caller:
        caller.start_soon(admin_call, port, KEY, "long")
        await running.wait()
        caller.cancel_scope.cancel()
    with trio.fail_after(10):
        await cancelled.wait()


async def test_progress_nobody_takes_is_bounded(agent):
    port, commands = agent
    seen = []

    async def chatter(_params, progress):
        for n in range(100_000):
            progress({"n": n})
        return "done"

    commands["chatter"] = chatter
    assert await admin_call(port, KEY, "chatter", {}, seen.append) == "done"
    assert seen[0] == {"n": 0}
    assert len(seen) < 2000


async def test_silence(agent):
    port, commands = agent

    async def silent(_params, _progress):
        await trio.sleep_forever()

    commands["silent"] = silent
    with pytest.raises(AgentNotRunning):
        await admin_call(port, KEY, "silent", deadline_s=0.05)


async def raw(port, method="POST", path="/v1/tightwad/admin/show", headers=(), body=b"{}"):
    stream = await connect_loopback(port)
    async with stream:
        answer = await ask(stream, method, path, headers, body)
        return answer.status, json.loads(await answer.read(10_000)), answer


RIGHT = (b"authorization", b"Bearer admin-key")


async def test_plain_json(agent):
    port, commands = agent

    async def show(params, progress):
        progress({"ignored": True})
        return params

    commands["show"] = show
    status, body, _ = await raw(port, headers=[RIGHT], body=b'{"a": 1}')
    assert (status, body) == (200, {"result": {"a": 1}})


@pytest.mark.parametrize(
    ("headers", "body", "method", "status"),
    [
        ([], b"{}", "POST", 401),
        ([(b"authorization", b"Bearer the-api-key")], b"{}", "POST", 401),
        ([(b"authorization", b"Bearer \xe9")], b"{}", "POST", 401),
        ([RIGHT, (b"origin", b"http://localhost")], b"{}", "POST", 403),
        ([RIGHT], b"[]", "POST", 400),
        ([RIGHT], b"nope", "POST", 400),
        ([RIGHT], b"\xff", "POST", 400),
        ([RIGHT], b"", "GET", 405),
        ([RIGHT], b"x" * (2 << 20), "POST", 413),
    ],
)
async def test_refused(agent, headers, body, method, status):
    port, commands = agent

    async def show(_params, _progress):
        pytest.fail("ran")

    commands["show"] = show
    got, plain, _ = await raw(port, method, headers=headers, body=body)
    assert got == status
    assert set(plain["error"]) == {"code", "message", "hint"}


def test_error_of_unknown_code():
    error = error_of({"code": "from_the_future", "message": "m"})
    assert isinstance(error, RemoteError)
    assert error.code == "from_the_future"


def test_every_error_survives_the_way():
    def all_of(kind):
        return [kind, *(k for child in kind.__subclasses__() for k in all_of(child))]

    for kind in all_of(TightwadError):
        if kind.__module__ != TightwadError.__module__ or kind is RemoteError:
            continue
        again = error_of(as_plain(kind("m", hint="h")))
        assert (again.code, again.exit_code, again.message, again.hint) == (kind.code, kind.exit_code, "m", "h"), kind
