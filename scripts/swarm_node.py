"""One node of the swarm as a process: the product's store, swarm and TLS streams, and nothing else of an agent.

    swarm_node.py --state DIR --models DIR --listen HOST:PORT --peers FILE [--sparse] [--trace FILE]

`--state` holds an identity of the cluster, the file of `--peers` maps node ids to [host, port]. Commands come as JSON
lines on stdin, one line of JSON goes to stdout for each thing that happens; at the end of stdin it ends. Times are of
the machine's monotonic clock, which all processes share.

Who holds what reaches agents with the rows of their mesh. Here `held` tells it to the parent, which tells the others
with `holders`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import trio

from tightwad_agent.direct import Direct
from tightwad_agent.errors import TightwadError
from tightwad_agent.ids import Address, ModelId, NodeId
from tightwad_agent.mesh import certs, identity
from tightwad_agent.mesh.enrol import hello_of
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.links import Links, Services, open_listeners
from tightwad_agent.swarm.part import PartFile
from tightwad_agent.swarm.service import SERVICE, SwarmService
from tightwad_agent.swarm.source import CompleteFile
from tightwad_agent.swarm.store import Store
from tightwad_agent.wire.swarm import BLOCK_BYTES

FLOOD = "flood"
MAX_FLOOD_BYTES = 1 << 36
MAX_LINE = 1 << 20
PROGRESS_S = 1.0
PHASE_S = 0.1
"""How often it is looked whether a transfer is in another phase; each look costs all nodes' processors."""
ROOM = 1 << 50


def say(event: str, **facts: Any) -> None:
    print(json.dumps({"event": event, "at": time.monotonic(), **facts}), flush=True)


class Node:
    """The swarm of one node, and what it is told to do."""

    def __init__(self, me: Identity, models: Path, peers: dict[str, Any], *, sparse: bool) -> None:
        self.me = me
        self.links = Links(me, lambda: hello_of(me.cluster, certs.spki(me.key.public_key()), me.state.name, me.role))
        self._addresses = {NodeId(node): Address(*where) for node, where in peers.items()}
        store = Store(models, free=lambda _folder: ROOM) if sparse else Store(models)
        self.swarm = SwarmService(store, self._open, me.node, random.Random())

    async def _open(self, peer: NodeId, service: str, args: dict[str, Any]) -> trio.abc.Stream:
        stream, _ = await self.links.dial([self._addresses[peer]], want=peer, service=service, args=args)
        return stream

    async def run(self, where: Address) -> None:
        """Until stdin ends."""
        listeners = await open_listeners(where.port, where.host)
        services = Services({SERVICE: self.swarm.handle, FLOOD: flood})
        async with trio.open_nursery() as nursery:
            await nursery.start(self.swarm.run)
            await nursery.start(self.links.serve, listeners, services)
            for task in (self._tell_held, self._tell_progress, self._tell_phases):
                nursery.start_soon(task)
            say("ready", node=str(self.me.node))
            async for command in commands():
                nursery.start_soon(self._obey, command)
            nursery.cancel_scope.cancel()

    # What it does

    async def _obey(self, command: dict[str, Any]) -> None:
        try:
            await self._do(command.pop("do"), command)
        except TightwadError as exc:
            say("problem", text=str(exc))

    async def _do(self, what: str, command: dict[str, Any]) -> None:
        match what:
            case "share":
                await self._share(**command)
            case "want":
                self.swarm.want(ModelId(command["model"]))
            case "holders":
                nodes = frozenset(NodeId(node) for node in command["nodes"])
                self.swarm.set_holders(ModelId(command["model"]), nodes - {self.me.node})
            case "flood":
                await self._flood(**command)
            case "stats":
                say("stats", **usage(), transfers=self._transfers())
            case unknown:
                say("problem", text=f"no command {unknown!r}")

    async def _share(self, path: str) -> None:
        began = time.monotonic()
        held = await self.swarm.add(path)
        manifest = self.swarm.store.manifest(held.model)
        assert manifest is not None
        facts = {"model": str(held.model), "size": held.size, "pieces": len(manifest.pieces)}
        say("shared", **facts, seconds=time.monotonic() - began)

    async def _flood(self, node: str, n_bytes: int) -> None:
        """Takes that much of a peer as fast as a TLS stream gives it, and forgets it."""
        stream = await self._open(NodeId(node), FLOOD, {"n": n_bytes})
        began, got = time.monotonic(), 0
        async with stream:
            while data := await _some(stream):
                got += data
        say("flooded", n_bytes=got, seconds=time.monotonic() - began)

    # What it tells

    def _transfers(self) -> list[dict[str, Any]]:
        return [
            {
                "model": str(t.model),
                "phase": str(t.phase),
                "done": t.done,
                "uploaded": t.uploaded,
                "from": {str(node): n for node, n in t.from_each_peer.items()},
                "problem": t.problem,
            }
            for t in self.swarm.snapshot().transfers
        ]

    async def _tell_held(self) -> None:
        revision, told = -1, None
        while True:
            revision = await self.swarm.wait_changed(revision) if revision >= 0 else self.swarm.revision
            models = sorted(str(held.model) for held in self.swarm.held())
            if models != told:
                say("held", node=str(self.me.node), models=models)
                told = models

    async def _tell_progress(self) -> None:
        while True:
            await trio.sleep(PROGRESS_S)
            say("progress", **usage(), transfers=self._transfers())

    async def _tell_phases(self) -> None:
        phases: dict[str, str] = {}
        while True:
            for t in self.swarm.snapshot().transfers:
                if phases.get(t.model) != str(t.phase):
                    phases[t.model] = str(t.phase)
                    facts = next(f for f in self._transfers() if f["model"] == str(t.model))
                    say("phase", **usage(), **facts)
            with trio.move_on_after(PHASE_S):
                await self.swarm.wait_changed(self.swarm.revision)


async def _some(stream: trio.abc.Stream) -> int:
    """How many bytes came; 0 at the end."""
    if not isinstance(stream, Direct):
        return len(await stream.receive_some(BLOCK_BYTES))
    await stream.readable()
    while (data := stream.take()) is None:
        await stream.readable()
    return len(data)


async def flood(_peer: NodeId, stream: trio.abc.Stream, args: dict[str, Any]) -> None:
    """The other end of `Node._flood`."""
    left, block = min(int(args["n"]), MAX_FLOOD_BYTES), os.urandom(BLOCK_BYTES)
    while left > 0:
        await stream.send_all(memoryview(block)[:left])
        left -= len(block)


def usage() -> dict[str, Any]:
    """CPU seconds so far, memory in bytes (`rss_peak`: the most since the start), bytes on the wire."""
    facts: dict[str, Any] = {"cpu_s": time.process_time(), **wire_bytes()}
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "VmRSS"):
            facts["rss_peak" if name == "VmHWM" else "rss"] = int(value.split()[0]) * 1024
    return facts


def wire_bytes() -> dict[str, int]:
    """What this network's interfaces have received and sent; loopback only where there is nothing else."""
    found: dict[str, tuple[int, int]] = {}
    for line in Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()[2:]:
        name, _, numbers = line.partition(":")
        fields = numbers.split()
        found[name.strip()] = int(fields[0]), int(fields[8])
    received, sent = found.get("eth0") or found.get("lo") or (0, 0)
    return {"received": received, "sent": sent}


async def commands() -> AsyncIterator[dict[str, Any]]:
    """JSON lines from stdin until it ends."""
    stdin = trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))
    buffered = b""
    async for data in stdin:
        *lines, buffered = (buffered + data).split(b"\n")
        if len(buffered) > MAX_LINE:
            raise ValueError("a command that is too long")
        for line in lines:
            yield json.loads(line)


class Traced:
    """Which blocks were read for others, and which pieces are here: `[seconds, "read" | "here", piece, offset]`."""

    def __init__(self) -> None:
        self.events: list[tuple[float, str, int, int]] = []

    def install(self) -> None:
        for kind in (CompleteFile, PartFile):
            kind.read = self._noting(kind.read, "read")  # type: ignore[method-assign]
        PartFile.note = self._noting(PartFile.note, "here")  # type: ignore[method-assign]

    def _noting(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def noted(of: Any, first: Any, *rest: Any) -> Any:
            pieces, offset = ((first,), rest[0]) if rest else (first, 0)
            self.events += [(time.monotonic(), what, piece, offset) for piece in pieces]
            return function(of, first, *rest)

        return noted

    def write(self, path: Path) -> None:
        path.write_text("".join(json.dumps(event) + "\n" for event in self.events), encoding="ascii")


def no_room_reserved(_fd: int, _offset: int, _length: int) -> None:
    """`--sparse`: a `.part` takes the room of what is in it, so that one larger than the disk can be begun."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--state", "--models", "--peers"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--sparse", action="store_true", help="reserve no room on the disk, and look for none")
    parser.add_argument(
        "--trace", type=Path, help="write at the end which blocks were read, and which pieces came, when"
    )
    asked = parser.parse_args()
    me = identity.load(asked.state)
    if me is None:
        parser.error(f"{asked.state} holds no identity")
    host, _, port = asked.listen.rpartition(":")
    if asked.sparse:
        os.posix_fallocate = no_room_reserved
    traced = Traced()
    if asked.trace:
        traced.install()
    try:
        node = Node(me, asked.models, json.loads(asked.peers.read_text(encoding="utf-8")), sparse=asked.sparse)
        trio.run(node.run, Address(host, int(port)))
    finally:
        if asked.trace:
            traced.write(asked.trace)
    return 0


if __name__ == "__main__":
    sys.exit(main())
