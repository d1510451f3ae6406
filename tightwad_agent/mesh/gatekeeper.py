"""Puts in force who belongs to the cluster: cuts off who was removed, and passes on what authorities signed."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

import trio

from tightwad_agent.errors import EnvironmentFault, NodeRemoved, PeerError, ProtocolError
from tightwad_agent.ids import NodeId
from tightwad_agent.mesh.deny_book import DenyBook
from tightwad_agent.mesh.distrust import Distrust
from tightwad_agent.mesh.leaf import LeafKeeper
from tightwad_agent.mesh.ledger import Ledger
from tightwad_agent.mesh.linker import Linker
from tightwad_agent.mesh.session import Session
from tightwad_agent.mesh.trust import Trust
from tightwad_agent.wire import control
from tightwad_agent.wire.rows import Role
from tightwad_agent.wire.trust import Denial

log = logging.getLogger(__name__)

FLUSH_S = 0.3
"""How long the one who is cut off gets to be told why."""
REMOVED = "this machine was removed from the cluster"
COME_BACK = "to come back: tightwad-agent leave here, then join with a new token"
GOODBYE = "removed from the cluster"


class Host(Protocol):
    """What it needs of its node."""

    me: NodeId
    ledger: Ledger | None

    async def call(self, node: NodeId, method: str, params: dict[str, Any]) -> dict[str, Any]: ...

    def name_of(self, node: NodeId) -> str: ...

    def authorities(self) -> Sequence[NodeId]:
        """Those that are there now."""

    def forget(self, node: NodeId) -> None:
        """Ends all connections with a node, and remembers nothing of it."""

    def promoted(self) -> None:
        """This node is an authority from now on."""


class Gatekeeper:
    """`start` starts a task of the node. Implements `trust.TrustOwner`."""

    def __init__(
        self,
        host: Host,
        book: DenyBook,
        leaf: LeafKeeper,
        linker: Linker,
        *,
        start: Callable[..., None],
        wall: Callable[[], float],
        tell: Callable[[str], None],
    ) -> None:
        self.trust = Trust(self, book, leaf, wall, tell)
        self._host = host
        self._linker = linker
        self._start = start
        self._wall = wall
        self._tell = tell
        self._distrust = Distrust(tell)

    @property
    def problem(self) -> str:
        """Why this node is not with the others, if that is for a person to mend; else empty."""
        return f"{REMOVED}; {COME_BACK}" if self.trust.removal else self._distrust.last

    def begin(self) -> None:
        """At the start of the node: one that was removed before stays away."""
        if self.trust.removal:
            self._linker.close(GOODBYE)

    def link_up(self, session: Session) -> None:
        """Before anything else is said on a link."""
        for message in self.trust.messages() if session.peer.hello.knows_trust else ():
            session.post(message)
        self._distrust.linked(session.peer.hello, self._wall())

    def take(self, session: Session, message: control.Denials | control.KeyHistory) -> None:
        """What a link brought. A `ProtocolError` ends it."""
        if isinstance(message, control.KeyHistory):
            self._start(self._learn, session, message)
        elif self.trust.take(message.entries):
            self._start(self._saved, self.trust.save)

    def distrusted(self, node: NodeId | None, exc: PeerError) -> None:
        """A dial found somebody, and no link came of it. The cluster's word for a removal is checked like any other."""
        if isinstance(exc, NodeRemoved) and isinstance(exc.denial, Denial):
            self._start(self._heard_removal, node, exc)
        elif exc.hint and not self._linker.closing:  # else it is nothing that a person could mend
            self._distrust.heard(self._host.name_of(node) if node else "a node at a seed", exc)

    async def _heard_removal(self, node: NodeId | None, exc: NodeRemoved) -> None:
        """Believed only for the signature; the key that signed may be one that this node has not heard of."""
        assert isinstance(exc.denial, Denial)
        try:
            await self._saved(self.trust.learn, exc.lineage)
            if self.trust.take((exc.denial,)):
                await self._saved(self.trust.save)
        except ProtocolError as problem:
            log.debug("a removal that is not proved: %s", problem)
        if self.trust.removal is None:
            self._distrust.heard(self._host.name_of(node) if node else "a node at a seed", exc)

    async def _learn(self, session: Session, message: control.KeyHistory) -> None:
        try:
            await self._saved(self.trust.learn, message.lineage)
        except ProtocolError as exc:
            session.close(exc.message)

    async def _saved(self, write: Callable[..., Awaitable[None]], *args: Any) -> None:
        try:
            await write(*args)
        except EnvironmentFault as exc:
            self._tell(f"what the cluster decided was not saved: {exc.message}")

    # trust.TrustOwner

    @property
    def me(self) -> NodeId:
        return self._host.me

    @property
    def ledger(self) -> Ledger | None:
        return self._host.ledger

    async def call(self, node: NodeId, method: str, params: dict[str, Any]) -> dict[str, Any]:
        return await self._host.call(node, method, params)

    def name_of(self, node: NodeId) -> str:
        return self._host.name_of(node)

    def authorities(self) -> Sequence[NodeId]:
        return self._host.authorities()

    def spread(self, message: object) -> None:
        for session in self._linker.sessions():
            if session.peer.hello.knows_trust:
                session.post(message)

    def cut_off(self, denial: Denial) -> None:
        node = NodeId(denial.subject)
        self._tell(f"{self._host.name_of(node)} was removed from the cluster ({denial.note})")
        self._linker.post(node, control.Goodbye(GOODBYE))
        self._start(self._forget, node)

    async def _forget(self, node: NodeId) -> None:
        await trio.sleep(FLUSH_S)
        self._host.forget(node)

    def own_removal(self, denial: Denial) -> None:
        self._tell(f"{REMOVED} ({denial.note}); {COME_BACK}")
        self._linker.close(GOODBYE)

    def became(self, role: Role) -> None:
        if role is Role.AUTHORITY:
            self._host.promoted()
