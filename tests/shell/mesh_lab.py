"""Nodes with real keys, certificates and sockets on loopback, for the tests of links and enrolment."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tightwad_agent.ids import Address, ClusterId, NodeId, NodeName
from tightwad_agent.mesh import certs, identity, tls
from tightwad_agent.mesh.doorman import MEMBERS
from tightwad_agent.mesh.enrol import hello_of
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.links import Limits, Links, Services, open_listeners
from tightwad_agent.mesh.state import NodeState
from tightwad_agent.streams import READ_SIZE, Framed
from tightwad_agent.wire.handshake import LINK, Hello
from tightwad_agent.wire.rows import Role

PATIENCE_S = 20.0
"""Tests that wait longer have failed; nothing here is timed."""
PATIENT = Limits(handshake_s=60, join_s=60, strangers=MEMBERS)
"""So that no deadline does what another rule should have done."""


def founder(folder: Path, name: str = "founder") -> Identity:
    return identity.create_cluster(folder / name, NodeName(name), time.time())


def member(
    authority: Identity, folder: Path, name: str = "member", *, role: Role = Role.NODE, issued_days_ago: float = 0
) -> Identity:
    """A member of `authority`'s cluster without a join conversation."""
    assert authority.ca_key is not None
    state_dir = folder / name
    key = identity.begin(state_dir)
    issued = time.time() - issued_days_ago * certs.DAY_S
    made = identity.assemble(
        state_dir=state_dir,
        key=key,
        leaf=certs.issue_leaf(authority.ca, authority.ca_key, key.public_key(), role, issued),
        ca=authority.ca,
        ca_key=authority.ca_key if role is Role.AUTHORITY else None,
        state=NodeState(
            cluster=authority.cluster,
            cluster_name=authority.state.cluster_name,
            node=NodeId.of_spki(certs.spki(key.public_key())),
            name=NodeName(name),
            joined_at=int(issued),
            api_key=authority.state.api_key,
        ),
    )
    return identity.commit(made)


def hello(who: Identity) -> Hello:
    return hello_of(who.cluster, certs.spki(who.key.public_key()), who.state.name, who.role)


def links_of(who: Identity, say: Callable[[], Hello] | None = None, **options: Any) -> Links:
    return Links(who, say or (lambda: hello(who)), **options)


@dataclass
class Box:
    """A node that listens."""

    who: Identity
    links: Links
    address: Address
    scope: trio.CancelScope

    @property
    def node(self) -> NodeId:
        return self.who.node


async def echo(_peer: Any, stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
    while data := await stream.receive_some(READ_SIZE):
        await stream.send_all(data)


async def start(
    nursery: trio.Nursery,
    who: Identity,
    services: Services | None = None,
    *,
    links: Links | None = None,
    limits: Limits | None = None,
    host: str = "127.0.0.1",
) -> Box:
    """Serves `services` (an echo by default) on a free port until the nursery ends."""
    links = links or links_of(who, limits=limits or PATIENT)
    listeners = await open_listeners(0, host)
    port = listeners[0].socket.getsockname()[1]
    scope = trio.CancelScope()

    async def run(task_status: trio.TaskStatus[Any]) -> None:
        with scope:
            await links.serve(listeners, services or Services({"echo": echo}), task_status=task_status)

    await nursery.start(run)
    return Box(who, links, Address(host, port), scope)


async def check_echo(links: Links, box: Box, text: bytes = b"hello") -> None:
    """A whole good conversation."""
    stream, peer = await links.dial([box.address], want=box.node, service="echo", deadline_s=PATIENCE_S)
    assert peer.node == box.node
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, text)
        assert await read_exactly(stream, len(text)) == text
    await stream.aclose()


async def read_exactly(stream: trio.abc.ReceiveStream, n: int) -> bytes:
    data = b""
    with trio.fail_after(PATIENCE_S):
        while len(data) < n:
            data += (got := await stream.receive_some(n - len(data)))
            assert got, "the stream ended early"
    return data


async def read_to_end(stream: trio.abc.ReceiveStream) -> bytes:
    """What comes until the other side closes, in whatever way."""
    data = b""
    with trio.fail_after(PATIENCE_S):
        try:
            while got := await stream.receive_some(READ_SIZE):
                data += got
        except (trio.BrokenResourceError, OSError):
            pass
    return data


def context_of(leaf_of: Identity, trusts: Identity) -> ssl.SSLContext:
    """A client that shows one cluster's leaf and trusts another's CA."""
    context = tls.stranger_context()
    context.load_cert_chain(leaf_of.state_dir / "node.crt", leaf_of.state_dir / "node.key")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=certs.der(trusts.ca))
    return context


class Wires:
    """Connections of a peer that misbehaves, closed when the test ends."""

    def __init__(self) -> None:
        self._open: list[trio.abc.Stream] = []

    def keep(self, stream: trio.abc.Stream) -> None:
        self._open.append(stream)

    async def tcp(self, address: Address, local: str | None = None) -> trio.SocketStream:
        stream = await trio.open_tcp_stream(address.host, address.port, local_address=local)
        self.keep(stream)
        return stream

    async def link(self, address: Address, context: ssl.SSLContext) -> Framed:
        """TLS and nothing else."""
        stream = await tls.connect(address, context)
        self.keep(stream)
        return Framed(stream, LINK)

    async def dial(self, links: Links, box: Box, service: str = "echo") -> trio.abc.Stream:
        """A stream opened in the honest way."""
        stream, _ = await links.dial([box.address], want=box.node, service=service, deadline_s=PATIENCE_S)
        self.keep(stream)
        return stream

    async def close(self) -> None:
        for stream in self._open:
            await trio.aclose_forcefully(stream)

    async def __aenter__(self) -> Wires:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        with trio.CancelScope(shield=True):
            await self.close()


def stranger_hello(cluster: ClusterId, name: str = "stranger") -> Hello:
    spki = certs.spki(certs.new_key().public_key())
    return hello_of(cluster, spki, NodeName(name), Role.NODE)


async def until(condition: Callable[[], bool]) -> None:
    """Lets the loop turn until something is so."""
    with trio.fail_after(PATIENCE_S):
        while not condition():
            await trio.sleep(0.001)
