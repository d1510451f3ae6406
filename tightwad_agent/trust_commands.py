"""The commands about who belongs to the cluster: revoking tokens, removing and promoting nodes, the cluster's key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import trio

from tightwad_agent.errors import UsageError
from tightwad_agent.ids import NodeId
from tightwad_agent.mesh import roles
from tightwad_agent.mesh.service import MeshService, PeerStatus
from tightwad_agent.model_commands import text_of
from tightwad_agent.proxy.cluster import Command, Progress
from tightwad_agent.wire.rows import Role

MIN_OVERLAP_S = 60
MAX_OVERLAP_S = 90 * 86_400
DEFAULT_OVERLAP_S = 30 * 86_400
FOLLOW_S = 10.0
"""How long `ca rotate` waits for the machines that are there."""
POLL_S = 0.1

Plain = dict[str, Any]


class TrustCommands:
    """Each method is one command: parameters in, plain data out, or a `TightwadError`."""

    def __init__(self, mesh: MeshService) -> None:
        self._mesh = mesh

    def table(self) -> Mapping[str, Command]:
        return {
            "token.revoke": self.token_revoke,
            "node.remove": self.remove_node,
            "node.promote": self.promote,
            "ca.rotate": self.rotate,
            "ca.status": self.ca_status,
        }

    async def token_revoke(self, params: Plain, _progress: Progress) -> Plain:
        """{id, nodes: bool} -> {id, removed: [names]}"""
        names = {str(p.node): self._mesh.name_of(p.node) for p in self._mesh.peers()}
        done = await self._mesh.trust.revoke(text_of(params, "id").strip(), nodes=params.get("nodes") is True)
        return {"id": str(done.get("token", "")), "removed": [names.get(n, n[:8]) for n in done.get("nodes", [])]}

    async def remove_node(self, params: Plain, _progress: Progress) -> Plain:
        """{node} -> {name, id, was_authority}"""
        peer = self._find(text_of(params, "node"))
        if peer.node == self._mesh.me:
            raise UsageError("this is the machine itself", hint="to take it out of the cluster: tightwad-agent leave")
        name = self._mesh.name_of(peer.node)
        await self._mesh.trust.remove_node(peer.node)
        was_authority = peer.row is not None and peer.row.role is Role.AUTHORITY
        return {"name": name, "id": str(peer.node), "was_authority": was_authority}

    async def promote(self, params: Plain, _progress: Progress) -> Plain:
        """{node} -> {name, id}"""
        peer = self._find(text_of(params, "node"))
        name = self._mesh.name_of(peer.node)
        if peer.row is not None and peer.row.role is Role.AUTHORITY:
            raise UsageError(f"{name} is an authority already")
        await self._mesh.trust.promote(peer.node)
        return {"name": name, "id": str(peer.node)}

    async def rotate(self, params: Plain, _progress: Progress) -> Plain:
        """{overlap_s, force: bool} -> {until, renewed: [names], waiting: [names]}"""
        overlap_s = params.get("overlap_s", DEFAULT_OVERLAP_S)
        if type(overlap_s) is not int or not MIN_OVERLAP_S <= overlap_s <= MAX_OVERLAP_S:
            raise UsageError(f"the overlap is a minute to 90 days, not {overlap_s!r} s")
        if params.get("force") is not True:
            self._check_authorities()
        _, until = await self._mesh.trust.rotate(float(overlap_s))
        for _ in range(int(FOLLOW_S / POLL_S)):
            if not self._mesh.alive().intersection(self._waiting()):
                break
            await trio.sleep(POLL_S)
        waiting = self._waiting()
        others = [p for p in self._mesh.peers() if p.node not in waiting]
        return {
            "until": until,
            "renewed": [self._mesh.name_of(p.node) for p in others],
            "waiting": [self._mesh.name_of(n) for n in waiting],
        }

    def _check_authorities(self) -> None:
        """Two authorities that change the key without each other would part the cluster."""
        alive = self._mesh.alive()
        away = [p for p in self._mesh.peers() if p.row and p.row.role is Role.AUTHORITY and p.node not in alive]
        if away:
            names = " and ".join(self._mesh.name_of(p.node) for p in away)
            raise UsageError(
                f"{names} is an authority and is not there; it could change the key at the same time",
                hint="start it, or remove it if it is lost; --force changes the key all the same",
            )

    async def ca_status(self, _params: Plain, _progress: Progress) -> Plain:
        """{} -> {authorities, changes, overlap_until, removed, revoked}"""
        await trio.lowlevel.checkpoint()
        return {
            "authorities": [self._mesh.name_of(p.node) for p in self._mesh.peers() if _role(p) is Role.AUTHORITY],
            "changes": len(self._mesh.identity.lineage),
            **self._mesh.trust.summary(),
        }

    def _waiting(self) -> list[NodeId]:
        """Nodes that are not known to have a certificate of the newest key."""
        return self._mesh.trust.not_renewed([p.node for p in self._mesh.peers()])

    def _find(self, text: str) -> PeerStatus:
        """By name, id, or the beginning of an id that a table shows; raises `UsageError`."""
        found = [
            p for p in self._mesh.peers() if text in (str(p.node), p.node.short, str(p.row.name) if p.row else None)
        ]
        if len(found) == 1:
            return found[0]
        there = ", ".join(sorted(self._mesh.name_of(p.node) for p in self._mesh.peers()))
        why = "no machine of the cluster is" if not found else f"{len(found)} machines are"
        hint = f"there are: {there}" if not found else "give its id; `tightwad-agent peers --json` shows it"
        raise UsageError(f"{why} called {text[:64]!r}", hint=hint)


def _role(peer: PeerStatus) -> Role | None:
    return peer.row.role if peer.row else None


def gated(role: Callable[[], Role], table: Mapping[str, Command]) -> dict[str, Command]:
    """The commands as a machine of this role takes them: a client only looks on."""
    return {name: command if name in roles.CLIENT_COMMANDS else _gate(role, command) for name, command in table.items()}


def _gate(role: Callable[[], Role], command: Command) -> Command:
    async def checked(params: Plain, progress: Progress) -> Any:
        if role() is Role.CLIENT:
            raise UsageError(
                "this machine is a client of the cluster: it uses what is served, and changes nothing",
                hint="run the command on another machine of the cluster",
            )
        return await command(params, progress)

    return checked
