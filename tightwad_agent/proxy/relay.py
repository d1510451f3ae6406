"""One request's way to a llama-server or a verifier, wherever it runs.

A request whose engine went away goes on over whatever route there is then: generating has no side effects. What the
client has been given is kept as token ids, and the next verifier goes on behind them; where there are none, because
llama-server makes the answer, it is told again and what the client has is left out. So a client of a pool that is being
restarted, or of a coordinator that has just died, sees a pause and no error.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import trio

from tightwad_agent.errors import EngineStopped, NotBegun, NotReady, PeerError, PeerRefused, TightwadError
from tightwad_agent.ids import NodeId
from tightwad_agent.proxy.blame import Blame
from tightwad_agent.proxy.book import Book
from tightwad_agent.proxy.callers import CLIENT, LOCAL
from tightwad_agent.proxy.client import Answer, ask, connect_loopback
from tightwad_agent.proxy.cluster import Cluster, Local, Own, Remote, Route, Unavailable
from tightwad_agent.proxy.gate import FairGenerator, Gate
from tightwad_agent.proxy.generate import Answerer, Served
from tightwad_agent.proxy.heads import Headers, Request
from tightwad_agent.proxy.http1 import Exchange
from tightwad_agent.proxy.limits import Budget
from tightwad_agent.proxy.openai import error_body, error_headers
from tightwad_agent.proxy.outlet import BEAT_S, STREAM, ClientOutlet, JournalOutlet
from tightwad_agent.proxy.passage import Passage, passed_on
from tightwad_agent.proxy.retelling import Retelling
from tightwad_agent.proxy.seeding import with_seed
from tightwad_agent.streams import close_quietly
from tightwad_agent.wire.journal import CONTENT_TYPE, Resume, split_resume, with_resume

logger = logging.getLogger(__name__)

T = TypeVar("T")

HOP = b"x-tightwad-hop"
"""How many nodes a request has crossed; set by nodes only."""
ELSEWHERE = b"x-tightwad-elsewhere"
"""On a 503: this node does not run the server, ask the one who does."""

JOURNAL = b"x-tightwad-journal"
"""The node that asks takes answers as `wire.journal`; set by nodes only."""
RESUME = b"x-tightwad-resume"
"""So many bytes before the body say how the answer began; set by nodes only."""
HTTP_SERVICE, RESUME_SERVICE = "http", "resume"
"""The mesh's services. A node that does not know the second cannot go on with an answer."""

HOLD_S = 120.0
MAX_LOST = 4
"""A request that took its server with it this often, without getting on, is not sent again: it may be the cause. It
is not where the server was ended from outside, a machine died meanwhile, or another coordinates now. One less than
what the pool calls a crash loop."""
DEATH_KNOWN_S = 1.0
"""So long after a loss it is known whether the machine is dead."""
MAX_RESUMED = 64
"""However much it gets on."""
MAX_KEPT = 64 << 20
"""Bytes of all answers together that are kept so that they can go on."""
SILENT_S = 6 * BEAT_S
"""A node that answers, and says nothing for so long, counts as lost."""
QUEUED_S = 15.0
"""Whoever is refused after so long waited for a turn, not for a connection."""
MAX_REFUSAL = 1 << 20
FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 0.5
ALIVE_CHECK_S = 0.25

_NOT_FORWARDED = frozenset(
    {
        b"host",
        b"content-length",
        b"expect",
        b"accept-encoding",  # an error event could not follow a compressed stream
        b"authorization",  # checked here, and nobody else's business
        b"x-api-key",
        b"cookie",
        b"x-conversation-id",  # makes llama-server go on when the client has left
        b"origin",  # llama-server would answer that it is allowed
        HOP,
        CLIENT,
        JOURNAL,
        RESUME,
    }
)
_NOT_RETURNED = frozenset({ELSEWHERE})


class Unserved(NotReady):
    """Nothing can answer now; `state` says what is going on."""

    def __init__(self, message: str, state: Mapping[str, Any], retry_after_s: int = 2) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.state = state

    @classmethod
    def of(cls, route: Unavailable) -> Unserved:
        return cls(route.message, route.state, route.retry_after_s)


class Elsewhere(TightwadError):
    """The node or server that was asked cannot answer now, and said so."""


class Lost(PeerError):
    """The server, or the way to it, went away before all of an answer came. `from_outside`: not by the request."""

    code = "upstream_lost"

    def __init__(self, message: str, *, from_outside: bool = False) -> None:
        super().__init__(message)
        self.from_outside = from_outside

    @classmethod
    def of(cls, what: str, exc: PeerError) -> Lost:
        return cls(f"{what} went away: {exc.message}", from_outside=isinstance(exc, EngineStopped))


class Unfinished(TightwadError):
    """An answer that has begun, and that nobody could complete."""

    code = "answer_lost"
    http_status = 502


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request as it goes on, the same for every attempt. `hop`: how many nodes it had crossed when it came here.
    `client`: whose turn on the engine it takes (`callers`). `journal`: the node that asked takes `wire.journal`, and
    has had `resume` of the answer already."""

    method: str
    target: str
    headers: Headers
    body: bytes
    hop: int = 0
    client: str = LOCAL
    journal: bool = False
    resume: Resume | None = None

    @classmethod
    def of(cls, request: Request, body: bytes, *, hop: int = 0, client: str = LOCAL) -> Outgoing:
        """Raises `ProtocolError` for a beginning of an answer that is none."""
        headers = passed_on(request.headers, _NOT_FORWARDED)
        if not hop:
            return cls(request.method, request.target, headers, body, hop, client)
        resume, n_bytes = None, request.header(RESUME) or b""
        if n_bytes:
            resume, body = split_resume(int(n_bytes) if n_bytes.isdigit() and len(n_bytes) < 10 else 0, body)
        journal = request.header(JOURNAL) == b"1"
        return cls(request.method, request.target, headers, body, hop, client, journal, resume)

    @property
    def generates(self) -> bool:
        """It takes a turn on the engine; all else is answered at once."""
        return self.method == "POST" and self.target.startswith("/v1/")


class _Patience:
    """How long one request still waits for an engine."""

    def __init__(self, hold_s: float) -> None:
        self._hold_s, self._n_lost = hold_s, 0
        self._pause_s, self._asked_at = FIRST_PAUSE_S, trio.current_time()
        self._give_up_at = self._asked_at + hold_s

    def asked(self) -> None:
        self._asked_at = trio.current_time()

    def lost(self) -> None:
        """It may have run for long: what counts is the wait from now on."""
        self._give_up_at, self._pause_s = trio.current_time() + self._hold_s, FIRST_PAUSE_S
        self._n_lost += 1

    def refused(self) -> None:
        """The same where it waited for its turn."""
        if trio.current_time() >= self._asked_at + QUEUED_S:
            self.lost()

    @property
    def is_over(self) -> bool:
        return self._n_lost >= MAX_RESUMED or trio.current_time() >= self._give_up_at

    async def pause(self) -> None:
        await trio.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)


class Relay:
    """Runs requests. `hold_s`: how long one waits for a route before it is refused, or given up. `paused` is told of
    each pause of an answer whose engine was lost, in seconds, when it goes on."""

    def __init__(
        self, cluster: Cluster, *, hold_s: float = HOLD_S, paused: Callable[[float], None] = lambda _s: None
    ) -> None:
        self._cluster = cluster
        self._gate = Gate()
        self._answerer = Answerer()
        self._hold_s = hold_s
        self._paused = paused
        self._kept = Budget(MAX_KEPT)
        self._remote: dict[trio.CancelScope, NodeId] = {}

    async def watch(self) -> None:
        """Gives up what waits for a node that is known to be dead; runs for as long as the endpoint does.

        A dead machine closes no connections: without this, its requests would wait for TCP to notice.
        """
        while True:
            await trio.sleep(ALIVE_CHECK_S)
            for scope, node in list(self._remote.items()):
                if not self._cluster.alive(node):
                    scope.cancel()

    async def run(self, exchange: Exchange, out: Outgoing) -> None:
        """Answers `exchange`, or raises a `TightwadError` where nothing was sent to the client. Where something was, an
        error ends the stream, or for another node cuts it off."""
        if not out.hop:
            out = replace(out, body=with_seed(out.target.partition("?")[0], out.body, secrets.randbits(31)))
        with self._kept.share() as take:
            outlet = ClientOutlet(
                exchange, Book(take), paused=self._paused, retelling=partial(Retelling, take), goes_on=not out.journal
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(outlet.keep_alive)
                problem = await self._until_answered(exchange, out, outlet)
                nursery.cancel_scope.cancel()
        if problem is None:
            return
        if not outlet.streams or (out.journal and isinstance(problem, PeerError)):
            raise problem  # has a status, or cuts the answer off: a node that asked goes on elsewhere
        logger.info("an answer broke off: %s", problem.message)
        await outlet.broke(problem)

    async def _until_answered(self, exchange: Exchange, out: Outgoing, outlet: ClientOutlet) -> TightwadError | None:
        """Tries until there is an answer; the error that remains where there is none."""
        blame, patience = Blame(), _Patience(self._hold_s)
        while True:
            route = self._cluster.route()
            patience.asked()
            if not isinstance(route, Unavailable):
                blame.tried(self._cluster.membership())
            try:
                await self._attempt(exchange, out, outlet, route)
            except Unserved as exc:
                waits = outlet.troubled or (isinstance(route, Unavailable) and route.hold)
                if not waits or exc.state.get("stopped"):
                    return _final(exc, outlet)
                problem: TightwadError = exc
            except Lost as exc:
                patience.lost()
                blame.lost(got_on=outlet.lost(), from_outside=exc.from_outside)
                outlet.troubled, problem = True, exc
                if outlet.complete:
                    await outlet.finish(STREAM)
                    return None
                if out.journal and exchange.started:
                    return exc
                logger.info("a request got lost and goes on elsewhere: %s", exc.message)
            except (Elsewhere, PeerError) as exc:
                outlet.troubled, problem = True, exc
                patience.refused()
            except TightwadError as exc:
                return exc
            else:
                return None
            if await self._is_to_blame(blame) or patience.is_over or not outlet.can_go_on:
                return _final(problem, outlet)
            await patience.pause()

    async def _is_to_blame(self, blame: Blame) -> bool:
        """Whether the request may be what its servers died of."""
        if blame.n >= MAX_LOST:
            await trio.sleep(DEATH_KNOWN_S)
            blame.tried(self._cluster.membership())
        return blame.n >= MAX_LOST

    async def _attempt(self, exchange: Exchange, out: Outgoing, outlet: ClientOutlet, route: Route) -> None:
        """One try. Raises `Lost` where the request was on its way, another error where it never was."""
        if isinstance(route, Unavailable):
            raise Unserved.of(route)
        if isinstance(route, Remote) and out.hop:
            if exchange.started:
                raise Elsewhere("this node does not run the server any more")
            await _send_elsewhere(exchange)
            return
        if isinstance(route, Own):
            await self._on_verifier(exchange, out, outlet, route)
            return
        if isinstance(route, Remote) and not self._cluster.alive(route.node):
            raise Elsewhere("the coordinator is dead, and no other is elected yet")
        async with self._turn(out, route):
            resume = outlet.resume if isinstance(route, Remote) else None
            stream = await self._while_alive(route, partial(self._connect, outlet, route, resume))
            try:
                with self._cluster.request_started() if isinstance(route, Local) else nullcontext():
                    await self._converse(exchange, out, outlet, stream, route, resume)
            finally:
                await close_quietly(stream)

    async def _on_verifier(self, exchange: Exchange, out: Outgoing, outlet: ClientOutlet, route: Own) -> None:
        path = out.target.partition("?")[0]
        model = next((e.label for e in self._cluster.models() if e.served), "default")
        journal = JournalOutlet(exchange, out.resume) if out.journal and not exchange.started else None
        with self._cluster.request_started():
            try:
                generator = FairGenerator(route.generator, self._gate, out.client)
                await self._answerer.run(exchange, path, out.body, Served(generator, model), journal or outlet)
            except PeerError as exc:
                if journal is None or not journal.started:
                    raise Lost.of("the verifier", exc) from None
                await journal.broke(exc, lost=True)
            except NotReady as exc:
                if journal is not None and journal.started:
                    await journal.broke(exc, lost=True)
                    return
                raise Elsewhere(exc.message) from None

    def _turn(self, out: Outgoing, route: Local | Remote) -> AbstractAsyncContextManager[None]:
        """On the engine, where it runs here; the coordinator sees to it elsewhere."""
        if isinstance(route, Local) and out.generates:
            return self._gate.turn(out.client, route.slots)
        return nullcontext()

    async def _while_alive(self, route: Local | Remote, work: Callable[[], Awaitable[T]]) -> T:
        """Raises `Lost` when the node is known to be dead. Nothing that writes to a client may be waited for in here:
        half of it might be written."""
        if isinstance(route, Local):
            return await work()
        with trio.CancelScope() as scope:
            self._remote[scope] = route.node
            try:
                return await work()
            finally:
                del self._remote[scope]
        raise Lost("the node that was asked is dead")

    async def _connect(self, outlet: ClientOutlet, route: Local | Remote, resume: Resume | None) -> trio.abc.Stream:
        if isinstance(route, Local):
            return await connect_loopback(route.port)
        if resume is None:
            return await self._cluster.open_stream(route.node, HTTP_SERVICE, {})
        try:
            return await self._cluster.open_stream(route.node, RESUME_SERVICE, {})
        except PeerRefused:
            outlet.telling()  # a node of the version before: it can tell the answer again
            raise

    async def _converse(  # noqa: PLR0917 - one attempt
        self,
        exchange: Exchange,
        out: Outgoing,
        outlet: ClientOutlet,
        stream: trio.abc.Stream,
        route: Local | Remote,
        resume: Resume | None,
    ) -> None:
        headers, body = list(out.headers), out.body
        if isinstance(route, Remote):
            headers += [(HOP, str(out.hop + 1).encode()), (CLIENT, out.client.encode()), (JOURNAL, b"1")]
        if resume is not None:
            n_bytes, body = with_resume(resume, body)
            headers.append((RESUME, str(n_bytes).encode()))
        try:
            answer = await self._while_alive(route, partial(ask, stream, out.method, out.target, headers, body))
            if answer.status == 503:
                await self._refused(answer, route, troubled=outlet.troubled)
            silent_s = SILENT_S if answer.header(b"content-type") == CONTENT_TYPE else math.inf
            receive = partial(self._while_alive, route, partial(answer.receive, deadline_s=silent_s))
            await Passage(exchange, outlet).run(answer, receive, _NOT_RETURNED)
        except NotBegun as exc:
            raise Elsewhere(exc.message) from None
        except PeerError as exc:
            raise Lost.of("the server", exc) from None

    async def _refused(self, answer: Answer, route: Local | Remote, *, troubled: bool) -> None:
        """Raises where the answer is not for the client: the engine may be there in a moment."""
        if isinstance(route, Local):
            raise Elsewhere("llama-server is still loading")
        if answer.header(ELSEWHERE) is not None:
            raise Elsewhere("the node that was asked does not run the server")
        if troubled:
            body = await self._while_alive(route, partial(answer.read, MAX_REFUSAL))
            raise _unserved(body)


def _unserved(body: bytes) -> Unserved:
    """What another node's 503 says."""
    try:
        plain = json.loads(body)
        return Unserved(str(plain["error"]["message"])[:1000], dict(plain.get("tightwad") or {}))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return Unserved("the node that was asked is not ready", {})


async def _send_elsewhere(exchange: Exchange) -> None:
    exc = NotReady("this node does not run the server")
    await exchange.respond(503, error_body(exc), headers=[*error_headers(exc), (ELSEWHERE, b"1")])


def _final(problem: TightwadError, outlet: ClientOutlet) -> TightwadError:
    """What the client is told when the waiting is over."""
    if outlet.started:
        return Unfinished(f"the rest of this answer could not be had: {problem.message}")
    if isinstance(problem, NotReady):
        return problem
    return Unserved(f"no answer could be had: {problem.message}", {"state": "unreachable"}, 5)
