"""Streams between nodes: one TCP port, one TLS connection a stream, both sides known.

A connection goes through TLS, `Hello` both ways, the identity check and `Open` before a service sees a byte of it.
Until then whoever is there holds one of few places in the lobby, with a deadline; without a certificate it may only
join. Whatever goes wrong on a connection closes that connection.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from tightwad_agent.errors import (
    DialledSelf,
    EnvironmentFault,
    NodeRemoved,
    NotTrusted,
    OutOfDate,
    PeerError,
    PeerRefused,
    PortTaken,
    TightwadError,
)
from tightwad_agent.ids import Address, NodeId
from tightwad_agent.mesh import certs, clocks, roles, tls
from tightwad_agent.mesh.connections import Connections
from tightwad_agent.mesh.doorman import MEMBERS, STRANGERS, Doorman, Pace, take_in
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.race import Race, defeat
from tightwad_agent.mesh.tls_stream import TlsStream
from tightwad_agent.streams import Framed, StreamHandler, close_quietly
from tightwad_agent.wire.handshake import (
    LINK,
    MAX_OPENING,
    MAX_STRANGER_OPENING,
    Accepted,
    Hello,
    Line,
    Open,
    Refused,
    Removed,
    agree,
    pack_args,
    unpack_args,
)
from tightwad_agent.wire.rows import Role
from tightwad_agent.wire.trust import Denial

log = logging.getLogger(__name__)

JOIN_SERVICE = "join"
GOODBYE_S = 2.0
_WINDOWS_ADDRESS_IN_USE = 10048


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What strangers and slow peers may cost."""

    handshake_s: float = 10.0
    """From the TCP connection to `Accepted`."""
    join_s: float = 30.0
    """A whole join conversation; it waits for the authority's disk."""
    max_unauthenticated: int = 64
    """Connections that have not shown who they are; beyond it the oldest of the busiest host is dropped."""
    max_streams: int = 1024
    """Incoming streams at work; beyond it members are told `busy`."""
    strangers: Pace = STRANGERS
    members: Pace = MEMBERS
    """How often one host may come: one that has not shown a certificate lately, and one that has."""
    stagger_s: float = 0.25
    """Head start of one address before the next is tried."""


@dataclass(frozen=True, slots=True)
class Peer:
    """The node at the other end: `node` and `role` are from its certificate, `hello` was compared with them.

    `remote` is the far end of the TCP connection (of an incoming one: its IP, a port of no meaning), `local` this end.
    """

    node: NodeId
    role: Role
    hello: Hello
    remote: Address
    local: Address


@dataclass(frozen=True, slots=True)
class Visitor:
    """Somebody without a certificate who wants to join. Nothing of `hello` is proved.

    `leaf_der` is the certificate this node showed on this very connection.
    """

    hello: Hello
    remote: Address
    leaf_der: bytes = field(repr=False)


PeerHandler = Callable[[Peer, trio.abc.Stream, dict[str, Any]], Awaitable[None]]
"""As `StreamHandler`, with all that is known of the peer."""

JoinHandler = Callable[[Visitor, trio.abc.Stream], Awaitable[None]]
"""Serves one joiner. The caller closes the stream, and cancels it after `Limits.join_s`."""


@dataclass(frozen=True, slots=True)
class Services:
    """What is offered by name; the maps are looked at when a stream is opened, so they may still grow."""

    streams: Mapping[str, StreamHandler]
    peers: Mapping[str, PeerHandler] = field(default_factory=dict)
    join: JoinHandler | None = None


class Links:
    """The two ends of all streams of one node."""

    def __init__(
        self,
        identity: Identity,
        hello: Callable[[], Hello],
        *,
        is_denied: Callable[[NodeId], bool] = lambda _node: False,
        denial_of: Callable[[NodeId], Denial | None] = lambda _node: None,
        on_distrust: Callable[[NodeId | None, PeerError], None] = lambda _node, _exc: None,
        limits: Limits | None = None,
    ) -> None:
        """`denial_of`: the cluster's word for a removal, shown to the one it is about. `on_distrust` hears why a
        node (None: one behind a seed) was not linked to although it was there."""
        self._hello = hello
        self._is_denied = is_denied
        self._denial_of = denial_of
        self._on_distrust = on_distrust
        self._limits = limits or Limits()
        self._lobby = Lobby(self._limits.max_unauthenticated)
        self._n_streams = 0
        self._connections = Connections()
        self._doorman = Doorman(self._limits.strangers, self._limits.members)
        self.use(identity)

    def use(self, identity: Identity) -> None:
        """Shows this identity's leaf from now on (after a renewal); open streams stay as they are."""
        self._server = tls.server_context(identity)
        self._client = tls.client_context(identity)
        self._identity = identity

    @property
    def n_streams(self) -> int:
        """Incoming streams that a service is working on."""
        return self._n_streams

    @property
    def n_waiting(self) -> int:
        """Incoming connections that have not been accepted yet."""
        return len(self._lobby)

    def cut(self, node: NodeId | None = None, *, host: str | None = None) -> int:
        """Ends all connections with `node` (None: any), both ways, with `host` (None: any) at one end; how many."""
        return self._connections.cut(node, host=host)

    # Incoming

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        services: Services,
        task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serves connections until cancelled; closes the listeners then. Nothing a peer does ends it."""

        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(
                    take_in,
                    listener,
                    self._doorman,
                    lambda transport: nursery.start_soon(self._connection, transport, services),
                )
            task_status.started(list(listeners))

    async def _connection(self, transport: trio.SocketStream, services: Services) -> None:
        """The fault wall: no end of a connection is an end of anything else."""
        try:
            await self._attend(transport, services)
        except* TightwadError as group:
            for exc in _leaves(group):
                log.debug("incoming stream closed: %s", exc)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as group:
            log.debug("incoming stream broke: %s", tls.fault(_leaves(group)[0]).message)
        except* Exception:
            log.exception("a fault of this program closed an incoming stream")

    async def _attend(self, transport: trio.SocketStream, services: Services) -> None:
        local, remote = tls.ends(transport)
        tls.tune(transport)
        stream = TlsStream(transport, self._server, server_side=True)
        try:
            await self._receive(stream, (local, remote), services)
        finally:
            await close_quietly(stream)

    async def _receive(self, stream: TlsStream, where: tuple[Address, Address], services: Services) -> None:
        leaf, remote = self._identity.leaf, where[1]
        task: Callable[[], Awaitable[None]] | None = None
        with self._lobby.place(remote.host, self._limits.handshake_s) as scope:
            try:
                await stream.do_handshake()
            except trio.BrokenResourceError:
                scope.deadline = min(scope.deadline, trio.current_time() + GOODBYE_S)
                await tls.refuse(stream)  # the alert says why, and should arrive
                raise
            shown = stream.peer_der()
            if shown is None:
                await self._stranger(stream, remote, certs.der(leaf), services, scope)
            else:
                task = await self._member(stream, shown, where, services)
        if scope.cancelled_caught:
            log.debug("incoming connection from %s dropped before it said what it wants", remote)
            return
        if task is not None:
            self._n_streams += 1
            try:
                await task()
            finally:
                self._n_streams -= 1
        with trio.move_on_after(GOODBYE_S):
            await stream.aclose()

    async def _stranger(
        self,
        stream: TlsStream,
        remote: Address,
        leaf_der: bytes,
        services: Services,
        scope: trio.CancelScope,
    ) -> None:
        framed = Framed(stream, LINK, max_header=MAX_STRANGER_OPENING)
        hello = await exchange(framed, self._hello())
        opening = await framed.expect(Open)
        if opening.service != JOIN_SERVICE:
            await framed.send(_refusal("certificate_required", "only members of the cluster may do that"))
        elif hello.cluster != self._identity.cluster:
            await framed.send(_refusal("wrong_cluster", "this is another cluster"))
        elif services.join is None:
            await framed.send(_refusal("no_service", "this node enrols nobody"))
        else:
            await framed.send(Accepted())
            scope.deadline = trio.current_time() + self._limits.join_s
            await services.join(Visitor(hello, remote, leaf_der), framed.detach())

    async def _member(
        self,
        stream: TlsStream,
        shown: bytes,
        where: tuple[Address, Address],
        services: Services,
    ) -> Callable[[], Awaitable[None]] | None:
        """What to run for an accepted stream; None after a refusal."""
        framed = Framed(stream, LINK, max_header=MAX_OPENING)
        hello = await exchange(framed, self._hello())
        peer = self._identified(shown, hello, where)
        self._connections.add(stream.transport_stream, peer.node, *where)
        self._doorman.knows(where[1].host, trio.current_time())
        opening = await framed.expect(Open)
        args = unpack_args(opening.args)
        refusal = self._objection(peer)
        if refusal is None and (reason := roles.refusal(peer.role, opening.service, args)):
            refusal = _refusal("role", reason)
        on_peer = services.peers.get(opening.service)
        on_stream = services.streams.get(opening.service)
        if refusal is None and on_peer is None and on_stream is None:
            refusal = _refusal("no_service", f"no service {opening.service[:32]!r} here")
        if refusal is not None:
            log.info("%s (%s) was refused %r: %s", peer.hello.name, peer.node.short, opening.service, _why(refusal))
            await framed.send(refusal)
            return None
        await framed.send(Accepted())
        raw = framed.detach()

        async def run() -> None:
            if on_peer is not None:
                await on_peer(peer, raw, args)
            elif on_stream is not None:
                await on_stream(peer.node, raw, args)

        return run

    def _objection(self, peer: Peer) -> Refused | Removed | None:
        if peer.hello.knows_trust and (denial := self._denial_of(peer.node)):
            return Removed(denial, self._identity.lineage)
        if self._is_denied(peer.node):
            return _refusal("denied", "this node was removed from the cluster")
        if peer.node == self._identity.node:
            return _refusal("self", "this is the same node")
        if self._n_streams >= self._limits.max_streams:
            return _refusal("busy", f"{self._n_streams} streams are open already")
        return None

    def _identified(self, leaf_der: bytes, hello: Hello, where: tuple[Address, Address]) -> Peer:
        """Compares what the peer said with what its certificate proves. Raises `NotTrusted`."""
        leaf = certs.parse_der(leaf_der)
        node, role = certs.node_of(leaf), certs.role_of(leaf)
        if (hello.node, hello.role, hello.cluster) != (node, role, self._identity.cluster):
            raise NotTrusted(f"node {node.short} says that it is {hello.node.short}, {hello.role}")
        local, remote = where
        return Peer(node, role, hello, remote, local)

    # Outgoing

    async def dial(
        self,
        addresses: Sequence[Address],
        *,
        want: NodeId | None,
        service: str,
        args: dict[str, Any] | None = None,
        deadline_s: float = 10.0,
        stagger_s: float | None = None,
    ) -> tuple[trio.abc.Stream, Peer]:
        """A stream to `service` of the node `want` (None: whoever of the cluster answers), and who it is.

        Addresses are tried side by side in the given order, each with a head start of `stagger_s`. The caller closes
        the stream. Raises `PeerUnreachable` (each address and why; `NotTrusted`, `DialledSelf` or `PeerRefused` if all
        agree on that), `PeerRefused` with the peer's reason, or another `PeerError` if the peer breaks off.
        """
        opening = Open(service, pack_args(args or {}))
        ends_at = trio.current_time() + deadline_s
        head_start_s = self._limits.stagger_s if stagger_s is None else stagger_s
        race = Race(lambda address: self._reach(address, want), stagger_s=head_start_s)
        won = await race.run(addresses, deadline_s=deadline_s)
        if won is None:
            failure = defeat(f"node {want.short} not reached" if want else "no node reached", race.failures)
            if isinstance(failure, NotTrusted):
                self._on_distrust(want, failure)
            raise failure
        link = won[1]
        try:
            await ask(link.framed, opening, link.peer.hello.name, deadline_s=max(0.0, ends_at - trio.current_time()))
        except NodeRemoved as exc:
            self._on_distrust(link.peer.node, exc)
            await close_quietly(link)
            raise
        except BaseException:
            await close_quietly(link)
            raise
        return link.framed.detach(), link.peer

    async def _reach(self, address: Address, want: NodeId | None) -> _Link:
        try:
            return await self._greet(address, want)
        except OutOfDate as exc:
            raise await clocks.explained(exc, address, self._hello) from None

    async def _greet(self, address: Address, want: NodeId | None) -> _Link:
        stream = await tls.connect(address, self._client)
        try:
            shown = stream.peer_der()
            node = certs.node_of(certs.parse_der(shown or b""))
            if node == self._identity.node:
                raise DialledSelf("this node itself answers there")  # noqa: TRY301 - closed in one place
            if want is not None and node != want:
                raise NotTrusted(f"another node ({node.short}) answers there")  # noqa: TRY301
            if self._is_denied(node):
                raise NotTrusted(f"node {node.short} was removed from the cluster")  # noqa: TRY301
            framed = Framed(stream, LINK, max_header=MAX_OPENING)
            hello = await exchange(framed, self._hello())
            where = tls.ends(stream.transport_stream)
            peer = self._identified(shown or b"", hello, where)
            self._connections.add(stream.transport_stream, node, *where)
            return _Link(framed, peer)
        except BaseException:
            await close_quietly(stream)
            raise


class _Link(trio.abc.AsyncResource):
    """A connection up to `Hello`, before it is known whether it is the one to use."""

    def __init__(self, framed: Framed, peer: Peer) -> None:
        self.framed = framed
        self.peer = peer

    async def aclose(self) -> None:
        await self.framed.stream.aclose()


class Lobby:
    """The places of those who have not shown who they are; a newcomer always gets one."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._hosts: dict[trio.CancelScope, str] = {}

    def __len__(self) -> int:
        return len(self._hosts)

    @contextmanager
    def place(self, host: str, deadline_s: float) -> Iterator[trio.CancelScope]:
        """Held until the block ends; cancelled at the deadline, or to make room for somebody else."""
        if len(self._hosts) >= self._size:
            self._make_room()
        with trio.move_on_after(deadline_s) as scope:
            self._hosts[scope] = host
            try:
                yield scope
            finally:
                self._hosts.pop(scope, None)

    def _make_room(self) -> None:
        """Drops the oldest of the host with most places: a flood from one machine costs that machine's connections."""
        hosts = list(self._hosts.values())
        busiest = max(dict.fromkeys(hosts), key=hosts.count)
        oldest = next(scope for scope, host in self._hosts.items() if host == busiest)
        del self._hosts[oldest]
        oldest.cancel()


async def open_listeners(port: int, host: str | None = None) -> list[trio.SocketListener]:
    """Listens on all addresses, or on one; port 0 takes a free one (IPv4). Raises `PortTaken`, `EnvironmentFault`."""
    if port == 0 and host is None:
        host = "0.0.0.0"  # noqa: S104 - with two families a free port would be two different ones
    try:
        return await trio.open_tcp_listeners(port, host=host)
    except OSError as exc:
        if exc.errno in (errno.EADDRINUSE, _WINDOWS_ADDRESS_IN_USE):
            raise PortTaken(f"port {port} belongs to another program", hint="choose another with --mesh-port") from None
        raise EnvironmentFault(f"cannot listen on port {port}: {exc}", hint="choose another with --mesh-port") from None


async def exchange(framed: Framed, mine: Hello) -> Hello:
    """`Hello` both ways; the peer's. Raises `PeerRefused` without a common version, else a `PeerError`."""
    try:
        await framed.send(mine)
        theirs: Hello = await framed.expect(Hello)
    except PeerError as exc:
        raise tls.fault(exc) from None  # a refused certificate shows only now, as an alert in place of Hello
    agree(mine, theirs)
    return theirs


async def ask(framed: Framed, opening: Open, name: str, *, deadline_s: float) -> None:
    """Asks for a service and waits for `Accepted`. Raises `PeerRefused` with the peer's reason, else a `PeerError`."""
    await framed.send(opening, deadline_s=deadline_s)
    answer, _ = await framed.receive(deadline_s=deadline_s)
    if isinstance(answer, Refused):
        raise PeerRefused(f"{name} refused {opening.service}: {answer.reason}")
    if isinstance(answer, Removed):
        removed = NodeRemoved(f"{name} says that this machine was removed from the cluster")
        removed.denial, removed.lineage = answer.denial, answer.lineage
        raise removed
    if not isinstance(answer, Accepted):
        raise PeerRefused(f"{name} answered {type(answer).__name__} when asked for {opening.service}")


def _refusal(code: str, reason: str) -> Refused:
    return Refused(code, Line.cleaned(reason))


def _why(refusal: Refused | Removed) -> str:
    return refusal.reason if isinstance(refusal, Refused) else "it was removed from the cluster"


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    found: list[BaseException] = []
    for exc in group.exceptions:
        found += _leaves(exc) if isinstance(exc, BaseExceptionGroup) else [exc]
    return found
