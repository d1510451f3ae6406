"""Nodes of a swarm in one process that add one web file together: real stores, real downloads, streams in memory."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from tightwad_agent.ids import NodeId, NodeName
from tightwad_agent.swarm.origin import Origins
from tightwad_agent.swarm.service import SwarmService
from tightwad_agent.swarm.store import Store
from tightwad_agent.testing import MemoryMesh, MemoryNode, sockets
from tightwad_agent.wire.rows import HeldModel, NodeRow, Role

CHUNK_BYTES = 1 << 16
ROWS_EVERY_S = 0.02


@dataclass
class FileHost:
    """A web server on loopback with one file at any path, and others at those of `more`. `sent` counts bytes of bodies;
    `asked` has (first, last) of each request.

    `before_chunk` is awaited before each 64 KiB with what was sent of this body: it can slow down, stop or fail.
    """

    data: bytes
    more: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    tag: str = '"one"'
    before_chunk: Callable[[int], Awaitable[None]] | None = None
    sent: int = 0
    asked: list[tuple[int, int]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    url: str = ""

    async def start(self, nursery: trio.Nursery) -> FileHost:
        listeners = await nursery.start(partial(trio.serve_tcp, self._serve, 0, host="127.0.0.1"))
        self.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        return self

    async def _serve(self, stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                data = b""
                while b"\r\n\r\n" not in data:
                    more = await stream.receive_some(CHUNK_BYTES)
                    if not more:
                        return
                    data += more
                first, *lines = data.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
                path = first.split()[1]
                self.paths.append(path)
                await self._answer(stream, self.more.get(path, self.data), headers)

    async def _answer(self, stream: trio.SocketStream, data: bytes, headers: dict[str, str]) -> None:
        wanted, size = headers.get("range", ""), len(data)
        start, end, status, more = 0, size, "200 OK", ""
        if self.ranges and wanted and headers.get("if-range", self.tag) == self.tag:
            low, _, high = wanted.removeprefix("bytes=").partition("-")
            start, end = int(low), min(int(high) + 1, size) if high else size
            status, more = "206 Partial Content", f"Content-Range: bytes {start}-{end - 1}/{size}\r\n"
        self.asked.append((start, end - 1))
        head = (
            f"HTTP/1.1 {status}\r\nConnection: close\r\nETag: {self.tag}\r\n{more}Content-Length: {end - start}\r\n\r\n"
        )
        await stream.send_all(head.encode())
        for at in range(start, end, CHUNK_BYTES):
            if self.before_chunk is not None:
                await self.before_chunk(at - start)
            chunk = data[at : min(at + CHUNK_BYTES, end)]
            self.sent += len(chunk)
            await stream.send_all(chunk)


@dataclass
class Node:
    name: str
    service: SwarmService
    mesh: MemoryNode
    scope: trio.CancelScope
    ended: trio.Event
    folder: Path
    said: list[str] = field(default_factory=list)
    """The stages of `add`, each once."""

    @property
    def id(self) -> NodeId:
        return self.mesh.node

    async def add(self, spec: str) -> HeldModel:
        def progress(stage: str, _done: int, _total: int | None) -> None:
            if stage not in self.said:
                self.said.append(stage)

        return await self.service.add(spec, progress)


class Together:
    """See the module. Rows reach every node within `ROWS_EVERY_S`, as the mesh and the conductor bring them."""

    def __init__(self, nursery: trio.Nursery, folder: Path, origins: Origins | None = None) -> None:
        self._nursery = nursery
        self._origins = origins or Origins()
        self.mesh = MemoryMesh(nursery, sockets)
        self.folder = folder
        self.nodes: list[Node] = []
        self._told = trio.Event()
        nursery.start_soon(self._spread_rows)

    async def node(self, name: str) -> Node:
        mesh = self.mesh.add(name)
        store = Store(self.folder / name)
        service = SwarmService(store, mesh.open_stream, mesh.node, random.Random(name), origins=self._origins)
        mesh.streams["swarm"] = service.handle
        scope, ended = trio.CancelScope(), trio.Event()

        async def run(task_status: trio.TaskStatus[None]) -> None:
            with scope:
                await service.run(task_status=task_status)
            ended.set()

        await self._nursery.start(run)
        made = Node(name, service, mesh, scope, ended, self.folder / name)
        self.nodes.append(made)
        return made

    async def kill(self, node: Node) -> None:
        """Without a goodbye; its `add` must have been cancelled."""
        self.nodes.remove(node)
        node.scope.cancel()
        node.mesh.streams.clear()
        for other in self.nodes:
            await self.mesh.cut(node.id, other.id)
        await node.ended.wait()

    def row(self, node: Node) -> NodeRow:
        return NodeRow(
            node.id,
            NodeName(node.name),
            Role.NODE,
            1,
            0,
            1,
            True,
            0,
            8088,
            models=node.service.held(),
            fetching=node.service.fetching(),
        )

    async def _spread_rows(self) -> None:
        while True:
            rows = [self.row(node) for node in self.nodes]
            for node in self.nodes:
                others = [row for row in rows if row.node != node.id]
                node.service.set_elsewhere(others)
                for model in {m.model for row in rows for m in row.models}:
                    holders = {row.node for row in others if any(m.model == model for m in row.models)}
                    node.service.set_holders(model, frozenset(holders))
            self._told.set()
            self._told = trio.Event()
            await trio.sleep(ROWS_EVERY_S)

    async def rows_told(self) -> None:
        """Returns when all have heard of all."""
        await self._told.wait()


@asynccontextmanager
async def together(folder: Path, names: Sequence[str], origins: Origins | None = None) -> AsyncIterator[Together]:
    """A swarm of these nodes, all running, that know of one another."""
    async with trio.open_nursery() as nursery:
        cluster = Together(nursery, folder, origins)
        for name in names:
            await cluster.node(name)
        await cluster.rows_told()
        yield cluster
        nursery.cancel_scope.cancel()
