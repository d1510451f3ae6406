"""Control links: dials whom `contacts` names, takes what comes in, and keeps one link per node."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import trio

from tightwad_agent.errors import DialledSelf, PeerError, PortClosed, ProtocolError
from tightwad_agent.ids import Address, NodeId
from tightwad_agent.mesh.contacts import Contacts, Dial
from tightwad_agent.mesh.links import Links, Peer
from tightwad_agent.mesh.session import Session
from tightwad_agent.wire.control import Goodbye

log = logging.getLogger(__name__)

SERVICE = "control"
DIAL_DEADLINE_S = 5.0
RETIRE_S = 1.0
SILENT_S = 2.0
RESTARTED_S = 1.2
"""A link without a heartbeat for so long, to a node that has a greater incarnation since, is one of its life before. A
node that refutes its own death has a greater incarnation, too, and its links are good."""
OTHERS_S = 0.3
"""A refused redial is reported only so much later: another address may lead to the node."""
MAX_REDIALLED = 4
MAX_NUMBER = 2**53
"""Of a link; a later one between the same two nodes has a greater one."""

Start = Callable[..., None]
"""Starts a task in the owner's nursery: `start(function, *arguments)`."""


class LinkOwner(Protocol):
    """Who hears of links. All of it is called in trio's thread and does not block."""

    def link_up(self, session: Session) -> None:
        """A link is up; also when it takes another one's place."""

    def link_down(self, node: NodeId, clean: bool) -> None:
        """The last link to a node ended."""

    def dial_ended(self, node: NodeId | None) -> None:
        """A dial ended, one way or the other."""

    def dial_failed(self, node: NodeId, refused: bool) -> None:
        """A node without a link was not reached; `refused`: nothing listens there."""

    def take(self, session: Session, message: Any) -> None:
        """A message came. A `ProtocolError` ends the link."""


class Linker:
    """The links of one node. `order` sorts a node's addresses, the best guess first."""

    def __init__(
        self,
        me: NodeId,
        links: Links,
        contacts: Contacts,
        owner: LinkOwner,
        *,
        start: Start,
        order: Callable[[NodeId], Sequence[Address]],
    ) -> None:
        self._me = me
        self._links = links
        self._contacts = contacts
        self._owner = owner
        self._start = start
        self._order = order
        self._sessions: dict[NodeId, Session] = {}
        self._redialling: set[NodeId] = set()
        self._closing = False

    def __contains__(self, node: NodeId) -> bool:
        return node in self._sessions

    def __len__(self) -> int:
        return len(self._sessions)

    def session(self, node: NodeId) -> Session | None:
        return self._sessions.get(node)

    def sessions(self) -> tuple[Session, ...]:
        """All links."""
        return tuple(self._sessions.values())

    def post(self, node: NodeId, message: object) -> None:
        """To one node, if there is a link to it."""
        if session := self._sessions.get(node):
            session.post(message)

    def broadcast(self, message: object) -> None:
        for session in list(self._sessions.values()):
            session.post(message)

    def close(self, reason: str) -> None:
        """Says goodbye on all links and dials nobody any more."""
        self._closing = True
        self.broadcast(Goodbye(reason))

    @property
    def closing(self) -> bool:
        return self._closing

    def dial_due(self, now: float) -> None:
        """Starts the dials that are due."""
        for dial in () if self._closing else self._contacts.due(now):
            self._start(self._dial, dial)

    def redial(self, node: NodeId) -> None:
        """A quick attempt on the failure detector's behalf, also beside a link that is silent."""
        if not (self._closing or node in self._redialling or self._contacts.is_dialling(node)):
            self._redialling.add(node)
            self._start(self._redial, node)

    def disconnect(self, node: NodeId) -> None:
        """Closes the link to a node; its owner knows."""
        if session := self._sessions.pop(node, None):
            session.close("the node is dead or has left")
            self._contacts.lost(node, trio.current_time())

    async def incoming(self, peer: Peer, stream: trio.abc.Stream, args: dict[str, Any]) -> None:
        """The `control` service."""
        number, instead = args.get("link"), args.get("instead")
        if type(number) is not int:
            raise ProtocolError("control: a link without its number")
        if instead is not None and type(instead) is not int:
            raise ProtocolError("control: a link is named by its number")
        await self._run(Session(peer, stream, number, outgoing=False, instead=instead))

    # Dialling

    async def _dial(self, dial: Dial) -> None:
        session: Session | None = None
        addresses = self._order(dial.node) if dial.node else dial.addresses
        ok = False
        try:
            session = await self._connect(dial.node, addresses)
            ok = True
        except DialledSelf:
            ok = dial.node is None  # a seed that is this node: nothing to do
        except PeerError as exc:
            self._failed(dial.node, exc)
        finally:
            who = session.peer.node if session else None
            self._contacts.done(dial, trio.current_time(), ok=ok, node=who)
            self._owner.dial_ended(dial.node)
        if session is not None:
            await self._run(session)

    async def relink(self, node: NodeId, address: Address) -> None:
        """A link over this address in place of the one there is. Returns when it is up; raises a `PeerError`."""
        session = await self._connect(node, [address], instead=self._sessions.get(node))
        self._start(self._run, session)

    async def _redial(self, node: NodeId) -> None:
        """The likeliest address says whether the node's process is gone; the others may still lead to it."""
        first, others = (found := list(self._order(node)))[:1], found[1:MAX_REDIALLED]
        linked, over = trio.Event(), trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._redial_others, node, others, linked, over)
                if (exc := await self._redial_over(node, first, linked)) is not None:
                    with trio.move_on_after(OTHERS_S):
                        await over.wait()
                    if not linked.is_set():
                        self._failed(node, exc)
        finally:
            self._redialling.discard(node)

    async def _redial_others(
        self, node: NodeId, addresses: Sequence[Address], linked: trio.Event, over: trio.Event
    ) -> None:
        if addresses:
            await self._redial_over(node, addresses, linked)
        over.set()

    async def _redial_over(self, node: NodeId, addresses: Sequence[Address], linked: trio.Event) -> PeerError | None:
        try:
            session = await self._connect(node, addresses)
        except PeerError as exc:
            return exc
        linked.set()
        self._start(self._run, session)
        return None

    async def _connect(
        self, node: NodeId | None, addresses: Sequence[Address], *, instead: Session | None = None
    ) -> Session:
        number = secrets.randbits(48)
        args = {"link": number}
        if instead is not None:
            number = min(MAX_NUMBER, instead.number + 1 + secrets.randbits(16))
            args = {"link": number, "instead": instead.number}
        stream, peer = await self._links.dial(
            addresses, want=node, service=SERVICE, args=args, deadline_s=DIAL_DEADLINE_S
        )
        self._contacts.sighted(peer.node, [peer.remote], trio.current_time())
        self._contacts.worked(peer.node, peer.remote)
        return Session(peer, stream, number, outgoing=True, instead=instead.number if instead else None)

    def _failed(self, node: NodeId | None, exc: PeerError) -> None:
        log.debug("no link: %s", exc)
        if node is not None and node not in self._sessions:
            self._owner.dial_failed(node, isinstance(exc, PortClosed))

    # One link per node

    async def _run(self, session: Session) -> None:
        node = session.peer.node
        old = self._sessions.get(node)
        if old is not None and not self._replaces(session, old):
            self._start(self._retire, session)
            await session.run(self._owner.take)
            return
        self._sessions[node] = session
        if old is not None:
            self._start(self._retire, old)
        self._contacts.linked(node)
        try:
            self._owner.link_up(session)
            await session.run(self._owner.take)
        finally:
            if self._sessions.get(node) is session:
                del self._sessions[node]
                self._contacts.lost(node, trio.current_time())
                self._owner.link_down(node, session.clean)

    async def _retire(self, session: Session) -> None:
        """Closes a link that has a better one beside it, once the other side has had time to know the better one."""
        await trio.sleep(RETIRE_S)
        session.close("another link to the node is better")

    def _replaces(self, new: Session, old: Session) -> bool:
        """Both sides must choose the same of several links between them, in whatever order they see them come up: the
        greatest rank stays. A link that has gone silent, or whose peer has restarted since, gives way to any; and one
        gives way to the link that was made in its place."""
        silent_s = trio.current_time() - old.heard_at
        restarted = new.peer.hello.incarnation > old.peer.hello.incarnation and silent_s > RESTARTED_S
        if restarted or silent_s > SILENT_S or new.instead == old.number:
            return True
        return self._rank(new) > self._rank(old)

    def _rank(self, session: Session) -> tuple[bool, int]:
        dialler = self._me if session.outgoing else session.peer.node
        return (dialler < max(self._me, session.peer.node), session.number)
