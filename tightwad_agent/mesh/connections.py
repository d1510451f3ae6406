"""Which connections with known nodes are open, so that all of a node, or all that went over one address, can be cut.

The streams on them belong to others; to those it looks as if the peer had gone.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import trio

from tightwad_agent.ids import Address, NodeId


@dataclass(frozen=True, slots=True)
class _Ends:
    node: NodeId
    local: str
    remote: str


class Connections:
    """Both ways. A connection is forgotten when nobody holds it any more."""

    def __init__(self) -> None:
        self._open: WeakKeyDictionary[trio.SocketStream, _Ends] = WeakKeyDictionary()

    def add(self, transport: trio.SocketStream, node: NodeId, local: Address, remote: Address) -> None:
        self._open[transport] = _Ends(node, local.host, remote.host)

    def cut(self, node: NodeId | None = None, *, host: str | None = None) -> int:
        """Ends those with `node` (None: any) that have `host` (None: any) at one end; how many it were."""
        doomed = [
            transport
            for transport, ends in list(self._open.items())
            if node in (None, ends.node) and host in (None, ends.local, ends.remote)
        ]
        return sum(map(_cut, doomed))


def _cut(transport: trio.SocketStream) -> bool:
    """Nothing is sent that has not been sent, and nobody is waited for; whoever waits on it sees the end."""
    try:
        transport.socket.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False  # closed, or reset by the peer: over already
    return True
