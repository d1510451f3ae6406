"""Fakes for tests of what lies above them. They ship, so that a plug-in's author can use them too.

`MemoryMesh` stands in for `mesh` where the test is about the swarm, the engine or the endpoint: same calls and errors,
memory streams in place of TLS. It must never appear in a test that is about the mesh.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio
import trio.testing

from tightwad_agent.direct import SocketEnd
from tightwad_agent.errors import PeerRefused, PeerUnreachable, RemoteError, TightwadError
from tightwad_agent.ids import NodeId
from tightwad_agent.streams import MethodHandler, StreamHandler, close_quietly
from tightwad_agent.wire.codec import pack, unpack


def node_id(name: str) -> NodeId:
    """A valid id that depends on `name` alone."""
    return NodeId.of_spki(hashlib.sha256(name.encode()).digest())


@dataclass
class MemoryNode:
    """One node's face towards the mesh."""

    mesh: MemoryMesh
    node: NodeId
    streams: dict[str, StreamHandler] = field(default_factory=dict)
    methods: dict[str, MethodHandler] = field(default_factory=dict)

    async def open_stream(self, node: NodeId, service: str, args: dict[str, Any]) -> trio.abc.Stream:
        """As `mesh`: raises `PeerUnreachable` or `PeerRefused`."""
        return await self.mesh.connect(self.node, node, service, args)

    async def call(self, node: NodeId, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """As `mesh`: a `TightwadError` of the handler arrives as `RemoteError` with its code."""
        await trio.lowlevel.checkpoint()
        target = self.mesh.reach(self.node, node)
        if method not in target.methods:
            raise PeerRefused(f"no method {method}")
        try:
            answer = await target.methods[method](self.node, unpack(pack(params)))
        except TightwadError as exc:
            raise RemoteError(exc.message, code=exc.code, hint=exc.hint) from None
        plain: dict[str, Any] = unpack(pack(answer))
        return plain


Wire = Callable[[NodeId, NodeId], tuple[trio.abc.Stream, trio.abc.Stream]]


def unlimited(_source: NodeId, _target: NodeId) -> tuple[trio.abc.Stream, trio.abc.Stream]:
    """A wire in memory, without delay."""
    return trio.testing.memory_stream_pair()


def sockets(_source: NodeId, _target: NodeId) -> tuple[trio.abc.Stream, trio.abc.Stream]:
    """A pair of connected sockets, as the streams of the mesh are underneath."""
    near, far = map(trio.socket.from_stdlib_socket, socket.socketpair())
    return SocketEnd(trio.SocketStream(near)), SocketEnd(trio.SocketStream(far))


class MemoryMesh:
    """Nodes wired to one another in one process; links can be cut. Handlers run in the given nursery.

    `wire` makes the two ends of a stream that the first node opens to the second.
    """

    def __init__(self, nursery: trio.Nursery, wire: Wire = unlimited) -> None:
        self._nursery = nursery
        self._wire = wire
        self._nodes: dict[NodeId, MemoryNode] = {}
        self._cut: set[frozenset[NodeId]] = set()
        self._open: list[tuple[frozenset[NodeId], trio.abc.Stream]] = []

    def add(self, name: str) -> MemoryNode:
        """A new node called `name`."""
        node = MemoryNode(self, node_id(name))
        self._nodes[node.node] = node
        return node

    async def cut(self, left: NodeId, right: NodeId) -> None:
        """Breaks all streams between two nodes and refuses new ones until `heal`."""
        pair = frozenset((left, right))
        self._cut.add(pair)
        for link, stream in list(self._open):
            if link == pair:
                await close_quietly(stream)

    def heal(self, left: NodeId, right: NodeId) -> None:
        self._cut.discard(frozenset((left, right)))

    def reach(self, source: NodeId, target: NodeId) -> MemoryNode:
        """The target, if the link is there; `PeerUnreachable` otherwise."""
        if target not in self._nodes or frozenset((source, target)) in self._cut:
            raise PeerUnreachable(f"no address of {target.short} accepted a connection")
        return self._nodes[target]

    async def connect(self, source: NodeId, target: NodeId, service: str, args: dict[str, Any]) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        handler = self.reach(source, target).streams.get(service)
        if handler is None:
            raise PeerRefused(f"no service {service}")
        near, far = self._wire(source, target)
        pair = frozenset((source, target))
        self._open += [(pair, near), (pair, far)]
        self._nursery.start_soon(self._serve, handler, source, far, unpack(pack(args)))
        return near

    async def _serve(self, handler: StreamHandler, peer: NodeId, stream: trio.abc.Stream, args: dict[str, Any]) -> None:
        try:
            await handler(peer, stream, args)
        except* TightwadError:
            pass  # the mesh logs it and drops the stream
        finally:
            await close_quietly(stream)
