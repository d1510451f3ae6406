"""Workers as agents reach them: behind the product's own pair of tunnel ends, with the network between the two.

The coordinator's ends, `Forwarder` and `Links`, run in the process that plays the agent, as they do in an agent; each
worker's end is the process of its machine (`worker_node.py`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio
from rig import Rig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "shell"))
from mesh_lab import founder, links_of, member

from tightwad_agent.engine.commands import StartWorker
from tightwad_agent.engine.forward import Forwarder
from tightwad_agent.engine.graph_codec import VERSION
from tightwad_agent.ids import Address, Epoch, NodeId
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.links import Links

ASKED = "CPU"
LEASE_S = 1e9
"""Workers are kept while others are measured."""


def order_of(coordinator: NodeId) -> StartWorker:
    """What the coordinator would ask a worker's machine for."""
    return StartWorker(Epoch(1, coordinator), (ASKED,))


@dataclass
class Tunnels:
    """A cluster of two identities: the coordinator, and one that all the workers' machines share."""

    there: Identity
    here: Identity
    links: Links
    state: Path
    forwarders: list[Forwarder] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @classmethod
    def founded(cls, state: Path) -> Tunnels:
        there = founder(state)
        here = member(there, state)
        return cls(there, here, links_of(here), state)

    async def workers(self, rig: Rig, n: int = 3) -> tuple[int, ...]:
        """Fresh workers on their machines, each behind a link of its own: ports of this process that lead to them.
        Raises `RigError`."""
        return tuple([await self._worker(rig, i) for i in range(n)])

    async def _worker(self, rig: Rig, number: int) -> int:
        facts = {
            "engine": rig.engine.folder,
            "state": self.state,
            "work": self.state / f"worker-{number}",
            "threads": rig.threads,
        }
        flags = [text for name, value in facts.items() for text in (f"--{name}", str(value))]
        _child, port = await rig.script("worker_node", *flags)
        open_stream = partial(self._open, Address("127.0.0.1", await rig.link(port)))
        epoch = order_of(self.here.node).epoch
        forwarder = Forwarder(self.there.node, epoch, open_stream, self._note, graphs=VERSION)
        await rig.nursery.start(forwarder.run)
        self.forwarders.append(forwarder)
        return forwarder.port

    async def _open(self, address: Address, node: NodeId, service: str, args: dict[str, Any]) -> trio.abc.Stream:
        stream, _peer = await self.links.dial([address], want=node, service=service, args=args)
        return stream

    def _note(self, _node: NodeId, reason: str) -> None:
        self.lost.append(reason)

    def crossed(self) -> dict[str, int]:
        """Bytes so far: what the engine sent towards the workers, what of that did not cross, what came back."""
        return {
            "engine_up": sum(f.bytes_up for f in self.forwarders),
            "saved": sum(f.bytes_saved for f in self.forwarders),
            "down": sum(f.bytes_down for f in self.forwarders),
        }
