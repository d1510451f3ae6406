"""What a client may ask of the other nodes, and what is believed of it. Pure.

The role is that of the peer's certificate, and it is the receiving node that enforces it. A client forwards requests,
reads rows and what is served, and keeps its own certificate fresh. It gives no resources, cannot become coordinator,
and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tightwad_agent.ids import NodeId
from tightwad_agent.wire import control
from tightwad_agent.wire.rows import Capabilities, NodeRow, Role, Stamp

CLIENT_SERVICES = frozenset({"control", "http", "resume", "serving", "call", "gauge"})
CLIENT_METHODS = frozenset({"leaf.renew", "model.states", "events.list"})
CLIENT_COMMANDS = frozenset({"status", "peers", "models", "leave", "events", "key.list"})
"""Of the command line, on the client itself."""
_IGNORED = (
    control.Coordinates,
    control.PreCheck,
    control.PreCheckReply,
    control.HandOver,
    control.Record,
    control.Answer,
)
"""Messages of a client that mean nothing: it coordinates nothing, decides nothing and vouches for nobody."""


def refusal(role: Role, service: str, args: Mapping[str, Any]) -> str:
    """Why a node of this role may not have this stream; empty if it may."""
    if role is not Role.CLIENT:
        return ""
    if service not in CLIENT_SERVICES:
        return f"a client of the cluster may not use {service[:32]!r}"
    method = args.get("method")
    if service == "call" and method not in CLIENT_METHODS:
        return f"a client of the cluster may not call {str(method)[:40]!r}"
    return ""


def of_client(node: NodeId, message: Any, stamp: Stamp) -> Any:
    """What is left of a client's message; None if nothing is. `stamp`: what the receiver obeys itself."""
    if isinstance(message, _IGNORED):
        return None
    if isinstance(message, control.Beat):
        return replace(message, stamp=stamp)
    if isinstance(message, control.Rumours):
        return control.Rumours(tuple(said for said in message.said if said.node == node))
    if isinstance(message, control.Rows):
        return control.Rows(tuple(harmless(row) for row in message.rows if row.node == node))
    return message


def harmless(row: NodeRow) -> NodeRow:
    """The row of a client: it cannot be elected, and offers neither devices nor files."""
    known = row.capabilities
    offers_nothing = Capabilities(platform=known.platform, cpu=known.cpu, n_cores=known.n_cores)
    return replace(row, role=Role.CLIENT, eligible=False, klass=0, capabilities=offers_nothing, models=(), fetching=())
