"""The command line's side door: `POST /v1/tightwad/admin/COMMAND` with JSON parameters.

The answer is the command's result as JSON or, with `Accept: application/x-ndjson`, lines `{"progress": ...}` and at
last `{"result": ...}` or `{"error": {"code", "message", "hint"}}`. A command whose caller leaves is cancelled.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import trio

from tightwad_agent.errors import TightwadError, UsageError
from tightwad_agent.proxy.access import check_admin
from tightwad_agent.proxy.cluster import Cluster, Command
from tightwad_agent.proxy.heads import MethodNotAllowed
from tightwad_agent.proxy.http1 import Exchange
from tightwad_agent.proxy.openai import dump

logger = logging.getLogger(__name__)

PREFIX = "/v1/tightwad/admin/"
NDJSON = b"application/x-ndjson"
MAX_PARAMS_BYTES = 1 << 20
MAX_WAITING_LINES = 256
"""Progress that the caller does not take in time is left out."""


class AdminDesk:
    """Runs commands. `admin_key` gives the secret that lies in the state directory."""

    def __init__(self, cluster: Cluster, admin_key: Callable[[], str]) -> None:
        self._cluster = cluster
        self._admin_key = admin_key

    async def handle(self, exchange: Exchange) -> None:
        """Answers a request below `PREFIX`."""
        try:
            command, params = await self._read(exchange)
            if NDJSON in (exchange.request.header(b"accept") or b""):
                await _stream(exchange, command, params)
            else:
                result = await command(params, lambda _progress: None)
                await exchange.respond(200, dump({"result": result}))
        except TightwadError as exc:
            if exchange.started:
                raise
            allow = [(b"allow", exc.allowed)] if isinstance(exc, MethodNotAllowed) else []
            await exchange.respond(exc.http_status, dump({"error": as_plain(exc)}), headers=allow)

    async def _read(self, exchange: Exchange) -> tuple[Command, dict[str, Any]]:
        request = exchange.request
        check_admin(self._admin_key(), request.peer.address, request.headers)
        name = request.path.removeprefix(PREFIX)
        command = self._cluster.commands.get(name)
        if command is None:
            raise UsageError(f"the running agent knows no command `{name[:80]}`", hint="is it of another version?")
        if request.method != "POST":
            raise MethodNotAllowed(request.method, ("POST",))
        body = await exchange.body(MAX_PARAMS_BYTES)
        try:
            params = json.loads(body.decode() or "{}")
        except (ValueError, RecursionError):
            raise UsageError("the parameters are not JSON") from None
        if not isinstance(params, dict):
            raise UsageError("the parameters must be a JSON object")
        return command, params


def as_plain(exc: TightwadError) -> dict[str, str]:
    """What `admin_client` makes the error anew from."""
    return {"code": exc.code, "message": exc.message, "hint": exc.hint}


async def _stream(exchange: Exchange, command: Command, params: dict[str, Any]) -> None:
    await exchange.start(200, [(b"content-type", NDJSON), (b"cache-control", b"no-store")])
    lines, reader = trio.open_memory_channel[dict[str, Any]](MAX_WAITING_LINES)
    last: dict[str, Any] = {}

    def progress(value: dict[str, Any]) -> None:
        try:
            lines.send_nowait({"progress": value})
        except trio.WouldBlock:
            pass  # see MAX_WAITING_LINES
        except trio.ClosedResourceError:
            pass  # a helper of the command that outlives it

    async def run() -> None:
        with lines:
            last.update(await _outcome(command, params, progress))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        async for line in reader:
            await exchange.send(dump(line) + b"\n")
    await exchange.send(dump(last) + b"\n")
    await exchange.finish()


async def _outcome(
    command: Command, params: dict[str, Any], progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    try:
        return {"result": await command(params, progress)}
    except TightwadError as exc:
        return {"error": as_plain(exc)}
    except Exception:
        logger.exception("a command failed")
        return {"error": as_plain(TightwadError("the agent failed at this command; its log says why"))}
