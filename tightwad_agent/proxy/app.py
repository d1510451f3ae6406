"""The endpoint: who may ask, which path means what, and where it goes from there."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import unquote

import trio

from tightwad_agent.errors import TightwadError, UnknownModel, UsageError
from tightwad_agent.ids import NodeId
from tightwad_agent.proxy import access, callers, metrics
from tightwad_agent.proxy.access import Access
from tightwad_agent.proxy.admin import PREFIX as ADMIN
from tightwad_agent.proxy.admin import AdminDesk
from tightwad_agent.proxy.cluster import Cluster, Unavailable
from tightwad_agent.proxy.heads import MethodNotAllowed, Peer
from tightwad_agent.proxy.http1 import Exchange, serve_connection
from tightwad_agent.proxy.limits import Limits, Running
from tightwad_agent.proxy.openai import (
    MAX_PARSED,
    choose_model,
    dump,
    error_body,
    error_headers,
    model_object,
    models_page,
    wanted_model,
)
from tightwad_agent.proxy.relay import HOLD_S, HOP, Outgoing, Relay, Unserved
from tightwad_agent.proxy.server import Server
from tightwad_agent.proxy.usage import Usage

logger = logging.getLogger(__name__)

MAX_HOPS = 2

PAGE = """\
tightwad-agent: the machines of this network, answering as one OpenAI-compatible endpoint.

Point a client here:

    base URL   http://{host}/v1
    API key    anything on this machine; from elsewhere what `tightwad-agent key` prints
    model      "default", or a name from http://{host}/v1/models

    curl http://{host}/v1/chat/completions -H 'Content-Type: application/json' \\
         -d '{{"messages": [{{"role": "user", "content": "Hello"}}]}}'

What is going on: http://{host}/v1/tightwad/status, or `tightwad-agent status`.
"""

_MUST_BE_JSON = frozenset({"/v1/chat/completions", "/v1/completions"})
_HELPERS = frozenset({"/tokenize", "/detokenize", "/apply-template", "/infill"})
"""llama-server's own, outside `/v1/`: they only read."""
_OBJECT = re.compile(rb"\s*\{")
_PASSED = ("GET", "POST", "DELETE")

Route = Callable[[Exchange], Awaitable[None]]


class NotFound(TightwadError):
    """No such path."""

    code = "not_found"
    http_status = 404


class TooManyHops(TightwadError):
    """A request went from node to node without finding the server."""

    code = "loop"
    http_status = 508


class App:
    """The endpoint of one node. `admin_key` gives the secret that commands must show; `hold_s` is how long a request
    waits for a pool that is being restarted; `answered` is told the status of each answer to what a model is asked,
    `paused` how long one stood still whose engine was lost, when it goes on."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        admin_key: Callable[[], str],
        guard: Access | None = None,
        limits: Limits | None = None,
        hold_s: float = HOLD_S,
        answered: Callable[[int], None] = lambda _status: None,
        usage: Usage | None = None,
        paused: Callable[[float], None] = lambda _s: None,
    ) -> None:
        self._cluster = cluster
        self._count = answered
        self._guard = guard or Access()
        self._limits = limits or Limits()
        self._relay = Relay(cluster, hold_s=hold_s, paused=paused)
        self._desk = AdminDesk(cluster, admin_key)
        self._running = Running(self._limits)
        self._usage = usage or Usage()
        self._server = Server(self.handle, self._limits, access.is_loopback)
        self._pages: dict[str, Route] = {
            "/": self._page,
            "/health": self._health,
            "/v1/health": self._health,
            "/v1/models": self._models,
            "/v1/tightwad/status": self._status,
            "/v1/tightwad/peers": self._peers,
            "/metrics": self._metrics,
        }

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Answers clients until cancelled; closes the listeners then."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._relay.watch)
            await nursery.start(self._server.serve, listeners)
            task_status.started()

    async def handle_mesh(self, peer: NodeId, stream: trio.abc.Stream, args: dict[str, Any]) -> None:  # noqa: ARG002
        """The mesh's `http` service: a request that another node took in, checked and forwarded."""
        await serve_connection(
            stream,
            self._handle_forwarded,
            self._limits,
            peer=Peer("", peer),
            budget=self._server.budget,
        )

    async def handle(self, exchange: Exchange) -> None:
        """Answers one request of a client; what `serve` does with each."""
        try:
            await _answered(self._from_client, exchange)
        finally:
            path = exchange.request.path
            if exchange.status and path not in self._pages and _is_passed(path):
                self._count(exchange.status)
                if exchange.key_name:
                    self._usage.count(exchange.key_name, exchange.tail)

    async def _from_client(self, exchange: Exchange) -> None:
        request = exchange.request
        if request.path.startswith(ADMIN):
            await self._desk.handle(exchange)
            return
        address, holder = request.peer.address, self._cluster.key_holder
        exchange.key_name = access.check(self._guard, holder, address, request.method, request.headers)
        exchange.client = callers.caller(exchange.key_name, address, is_local=access.is_loopback(address))
        await self._routed(exchange)

    async def _handle_forwarded(self, exchange: Exchange) -> None:
        await _answered(self._from_node, exchange)

    async def _from_node(self, exchange: Exchange) -> None:
        request = exchange.request
        hop = request.header(HOP) or b""
        if not hop.isdigit() or len(hop) > 3 or not _is_passed(request.path):
            raise UsageError("not a forwarded request")
        if int(hop) > MAX_HOPS:
            raise TooManyHops("the nodes send this request round in a circle")
        _check_method(request.method, _PASSED)
        exchange.client = callers.passed_caller(request.header(callers.CLIENT), request.peer.node)
        await self._run(exchange, await exchange.body(), hop=int(hop))

    async def _routed(self, exchange: Exchange) -> None:
        path, method = exchange.request.path, exchange.request.method
        if path in self._pages:
            _check_method(method, ("GET", "HEAD"))
            await self._pages[path](exchange)
        elif path.startswith("/v1/models/"):
            _check_method(method, ("GET", "HEAD"))
            await self._model(exchange, unquote(path.removeprefix("/v1/models/")))
        elif path in _MUST_BE_JSON or path in _HELPERS:
            _check_method(method, ("POST",))
            await self._generate(exchange)
        elif _is_passed(path):
            _check_method(method, _PASSED)
            await self._generate(exchange)
        else:
            raise NotFound(f"there is no `{path[:100]}` here", hint="The endpoint's paths begin with /v1/.")

    # Answered here

    async def _page(self, exchange: Exchange) -> None:
        host = (exchange.request.header(b"host") or b"localhost").decode("ascii", "replace")
        await exchange.respond(200, PAGE.format(host=host).encode(), content_type=b"text/plain; charset=utf-8")

    async def _health(self, exchange: Exchange) -> None:
        route = self._cluster.route()
        if isinstance(route, Unavailable):
            raise Unserved.of(route)
        await exchange.respond(200, dump({"status": "ok"}))

    async def _models(self, exchange: Exchange) -> None:
        await exchange.respond(200, dump(models_page(self._cluster.models())))

    async def _model(self, exchange: Exchange, name: str) -> None:
        entry = next((e for e in self._cluster.models() if e.answers_to(name)), None)
        if entry is None:
            raise UnknownModel(f"the model `{name[:100]}` does not exist here")
        await exchange.respond(200, dump(model_object(entry)))

    async def _status(self, exchange: Exchange) -> None:
        await exchange.respond(200, dump(self._cluster.status()))

    async def _peers(self, exchange: Exchange) -> None:
        await exchange.respond(200, dump(self._cluster.peers()))

    async def _metrics(self, exchange: Exchange) -> None:
        page = await trio.to_thread.run_sync(metrics_page, self._cluster.metrics())
        await exchange.respond(200, page, content_type=metrics.CONTENT_TYPE)

    # Answered by the verifier or a llama-server

    async def _generate(self, exchange: Exchange) -> None:
        body = await exchange.body()
        await self._check_model(exchange, body)
        await self._run(exchange, body, hop=0)

    async def _check_model(self, exchange: Exchange, body: bytes) -> None:
        """Refuses what cannot be answered whatever llama-server thinks of it."""
        request = exchange.request
        if request.path not in _MUST_BE_JSON:
            kind = request.header(b"content-type") or b""
            if request.method != "POST" or b"json" not in kind.lower() or _OBJECT.match(body) is None:
                return
        if len(body) > MAX_PARSED:
            wanted = await trio.to_thread.run_sync(wanted_model, body)
        else:
            wanted = wanted_model(body)
        choose_model(wanted, self._cluster.models())

    async def _run(self, exchange: Exchange, body: bytes, *, hop: int) -> None:
        with self._running.one(exchange.client):
            await self._relay.run(exchange, Outgoing.of(exchange.request, body, hop=hop, client=exchange.client))


async def _answered(route: Route, exchange: Exchange) -> None:
    """Turns errors into answers that say what is going on."""
    try:
        await route(exchange)
    except TightwadError as exc:
        if exchange.started:
            raise
        extra = [(b"allow", exc.allowed)] if isinstance(exc, MethodNotAllowed) else []
        body = error_body(exc, state=_state_of(exc))
        await exchange.respond(exc.http_status, body, headers=[*error_headers(exc), *extra])


def metrics_page(view: metrics.MetricsView) -> bytes:
    """The first call loads prometheus-client, 70 ms: do it in a thread."""
    from tightwad_agent.proxy.families import page  # noqa: PLC0415 - the agent starts without it

    return page(view)


def _check_method(method: str, allowed: Sequence[str]) -> None:
    if method not in allowed:
        raise MethodNotAllowed(method, allowed)


def _is_passed(path: str) -> bool:
    """llama-server may see this path: below `/v1/` (not ours), with nothing in it that leads elsewhere."""
    if path in _HELPERS:
        return True
    parts = unquote(path).split("/")
    if parts[:2] != ["", "v1"] or len(parts) < 3 or parts[2] == "tightwad":
        return False
    return all(p not in ("", ".", "..") and "\\" not in p and p.isprintable() for p in parts[2:])


def _state_of(exc: TightwadError) -> dict[str, Any] | None:
    if isinstance(exc, Unserved):
        return {"message": exc.message, **exc.state}
    return {"message": exc.message} if exc.http_status == 503 else None
