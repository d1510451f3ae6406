"""The mesh of one node: links to all others, who lives and who coordinates, and the streams everybody else uses.

One loop waits for the next event or deadline. `machines` decides, `linker` keeps the links, `rows` the rows; here they
are put together, and here is what the other parts of the agent see.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tightwad_agent.errors import PeerError, PeerUnreachable, ProtocolError
from tightwad_agent.events import Kind, Tell, of_kind
from tightwad_agent.ids import Address, Epoch, NodeId
from tightwad_agent.mesh import calls, certs, election, gauge, leaf, linker, members, netif, roles
from tightwad_agent.mesh.advert import Advert, of_row
from tightwad_agent.mesh.contacts import Contacts
from tightwad_agent.mesh.deny_book import DenyBook
from tightwad_agent.mesh.enrol import Registrar, hello_of
from tightwad_agent.mesh.gatekeeper import Gatekeeper
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.ledger import Ledger
from tightwad_agent.mesh.links import Links, Services, Visitor, open_listeners
from tightwad_agent.mesh.local_stream import LocalStreams
from tightwad_agent.mesh.machines import Machines
from tightwad_agent.mesh.mdns import Sighting
from tightwad_agent.mesh.memory import Memory
from tightwad_agent.mesh.neighbours import Neighbours
from tightwad_agent.mesh.own_addresses import OwnAddresses
from tightwad_agent.mesh.path_keeper import PathKeeper
from tightwad_agent.mesh.paths import PathView
from tightwad_agent.mesh.row_exchange import RowExchange
from tightwad_agent.mesh.rows import RowBook
from tightwad_agent.mesh.session import Session
from tightwad_agent.mesh.telling import Note, Telling
from tightwad_agent.pulse import Pulse
from tightwad_agent.streams import MethodHandler, StreamHandler
from tightwad_agent.wire import control
from tightwad_agent.wire.handshake import Hello, RememberedPeer
from tightwad_agent.wire.rows import NodeRow, Role, ServeRecord, Stamp

log = logging.getLogger(__name__)

STREAM_DEADLINE_S = 5.0
MAX_VERSION_JUMP = 1_000_000
MAX_EDITS = 2**53
"""A record beyond these could never be replaced by an honest edit."""
MAX_TOLD_ADDRESSES = 8
IDLE_S = 60.0
MAX_RTT_S = 60.0
FLUSH_S = 0.3
"""How long a goodbye gets to reach the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The part of the configuration that the mesh needs."""

    state_dir: Path
    port: int
    mdns: bool = True
    interfaces: tuple[str, ...] = ()
    seeds: tuple[Address, ...] = ()


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One node as people see it; `row` None until it came. `paths`: its addresses, the one in use first."""

    node: NodeId
    state: members.State
    reach: members.Reach
    reason: str
    row: NodeRow | None
    address: Address | None
    rtt_s: float | None
    paths: tuple[PathView, ...] = ()


class MeshService:
    """See the module. Others use `open_stream`, `call`, `streams`, `methods`, `rows`, `record` and `changed`."""

    def __init__(
        self,
        me: Identity,
        settings: Settings,
        row: NodeRow,
        *,
        wall: Callable[[], float],
        tell: Tell,
    ) -> None:
        """`row.incarnation` must be persisted already and greater than any used before. `tell` hears of events."""
        self.streams: dict[str, StreamHandler] = {}
        self.methods: dict[str, MethodHandler] = {}
        self.changed = Pulse()
        """Beats whenever a row, a node's state, the coordinator or the record changed."""
        self.ledger = Ledger(settings.state_dir) if me.role is Role.AUTHORITY else None
        self.record = me.state.serve or ServeRecord()
        self.me = me.node
        self._settings = settings
        self._wall = wall
        self._tell = tell
        self._telling = Telling(self.me)
        self._wake = Pulse()
        self._local = LocalStreams(self.me, self.streams, self._start)
        self._memory = Memory(me.state, settings.state_dir, tell)
        self._book = RowBook(row)
        self._unresolved = {p.node for p in me.state.peers if p.node != self.me}
        self._own = OwnAddresses(settings.interfaces, settings.port)
        self._neighbours: Neighbours | None = None
        self._nursery: trio.Nursery | None = None
        self._machines = Machines(self.me, row.incarnation, me.state.epoch, self, self._wake)
        denials = DenyBook(me, wall())
        self._links = Links(
            me, self._hello, is_denied=denials.denies, denial_of=denials.list.node, on_distrust=self._distrusted
        )
        self._leaf = leaf.LeafKeeper(
            me,
            call=self.call,
            authorities=self.authorities,
            use=self._links.use,
            wall=wall,
            tell=of_kind(tell, Kind.TRUST),
            denies=denials.denies,
        )
        self._contacts = Contacts(self.me, settings.seeds)
        self._linker = linker.Linker(
            self.me, self._links, self._contacts, self, start=self._start, order=self._dial_order
        )
        self._machines.use(self._linker)
        self._rows = RowExchange(self._book, self._linker.broadcast, refuses=self._is_denied, taken=self._rows_taken)
        self._gate = Gatekeeper(
            self, denials, self._leaf, self._linker, start=self._start, wall=wall, tell=of_kind(tell, Kind.TRUST)
        )
        self.trust = self._gate.trust
        self._paths = PathKeeper(
            self._links, self._linker, start=self._start, name_of=self.name_of, tell=of_kind(tell, Kind.LINK)
        )

    # What others see

    @property
    def identity(self) -> Identity:
        """Who this node is; its leaf changes when it is renewed."""
        return self._leaf.identity

    @property
    def port(self) -> int:
        """Where it listens for other nodes; the one that was asked for until it does."""
        return self._own.port

    @property
    def epoch(self) -> Epoch:
        """The highest epoch this node knows."""
        return self._machines.epoch

    @property
    def coordinator(self) -> NodeId | None:
        """Whom this node obeys."""
        return self._machines.coordinator

    @property
    def coordinating(self) -> bool:
        return self._machines.coordinating

    @property
    def n_links(self) -> int:
        """Nodes that this one has a link to."""
        return len(self._linker)

    @property
    def row(self) -> NodeRow:
        """This node's own row."""
        return self._book.own

    @property
    def mdns_problem(self) -> str:
        """Why mDNS does not work; empty if it does or is switched off."""
        return self._neighbours.problem if self._neighbours else ""

    @property
    def skipped(self) -> tuple[str, ...]:
        """Interfaces and addresses that are not announced, and why."""
        return tuple(str(s) for s in self._own.choice.skipped)

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where others may dial this node."""
        return self._own.all

    @property
    def problem(self) -> str:
        """Why this node is not with the others, if that is for a person to mend; else empty."""
        return self._gate.problem

    def alive(self) -> frozenset[NodeId]:
        """The living, this node among them."""
        return self._machines.living() | {self.me}

    def living_rows(self) -> tuple[NodeRow, ...]:
        """Rows of the living, the own one first."""
        alive = self.alive()
        others = [r for r in self._book.all() if r.node in alive and r.node != self.me]
        return (self._book.own, *others)

    def reaches(self, node: NodeId) -> bool:
        """Whether this node has contact with that one itself; the living also count those that only others reach."""
        direct = (p.node for p in self._machines.peers() if p.state.living and p.reach is members.Reach.DIRECT)
        return node == self.me or node in direct

    def row_of(self, node: NodeId) -> NodeRow | None:
        return self._book.get(node)

    def name_of(self, node: NodeId) -> str:
        """What people call a node; before its row came, what it calls itself."""
        if row := self._book.get(node):
            return row.name
        session = self._linker.session(node)
        return session.peer.hello.name if session else node.short

    def peers(self) -> list[PeerStatus]:
        """All nodes of the cluster that are known, this one first."""
        mine = self.addresses[0] if self.addresses else Address("127.0.0.1", self.port)
        found = [
            PeerStatus(self.me, members.State.ALIVE, members.Reach.DIRECT, "", self._book.own, mine, 0.0),
        ]
        for view in self._machines.peers():
            session = self._linker.session(view.node)
            known = self._contacts.addresses(view.node)
            found.append(
                PeerStatus(
                    view.node,
                    view.state,
                    view.reach,
                    view.reason,
                    self._book.get(view.node),
                    self._paths.in_use(view.node) or (known[0] if known else None),
                    session.rtt_s if session else None,
                    self._paths.views(view.node),
                )
            )
        return found

    def rtt_s(self, node: NodeId) -> float | None:
        """The round trip to that node; None while there is no link."""
        session = self._linker.session(node)
        return session.rtt_s if session else None

    def nearby(self) -> list[Sighting]:
        """Agents of other clusters, as they announce themselves; nothing of it is proved."""
        return self._neighbours.strangers() if self._neighbours else []

    def edit_row(self, change: Callable[[NodeRow], NodeRow]) -> None:
        """Changes the own row and tells everybody, if it differs."""
        if self._book.edit(change):
            self._rows.tell_own()
            self._refresh_view()
            self.changed.beat()

    def set_record(self, record: ServeRecord) -> bool:
        """Takes a record that is newer than the known one, keeps it and passes it on."""
        if record.version <= self.record.version:
            return False
        self.record = record
        self._memory.note(serve=record)
        self._linker.broadcast(control.Record(record))
        self.changed.beat()
        return True

    async def accept_command(self, peer: NodeId, epoch: Epoch) -> bool:
        """Whether a command of `peer` at `epoch` may be carried out; the epoch is on the disk before it says yes."""
        self._machines.elect(election.StampHeard(peer, Stamp(epoch, peer)))
        await self._machines.settled()
        return self._machines.accepts(epoch) and self.coordinator == peer

    async def open_stream(self, node: NodeId, service: str, args: dict[str, Any]) -> trio.abc.Stream:
        """See `streams.OpenStream`. A stream to this very node does not leave the process."""
        if node == self.me:
            return self._local.open(service, args)
        addresses = self._dial_order(node)
        if not addresses:
            raise PeerUnreachable(f"no address of {self.name_of(node)} is known")
        stream, _ = await self._links.dial(
            addresses,
            want=node,
            service=service,
            args=args,
            deadline_s=STREAM_DEADLINE_S,
            stagger_s=self._paths.stagger_s(node),
        )
        return stream

    async def call(self, node: NodeId, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """See `streams.Call`."""
        return await calls.call(self.open_stream, node, method, params)

    # Life

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. Started once it listens. Raises `PortTaken`, `ConfigError`, `EnvironmentFault`."""
        await self._own.look()
        listeners = await open_listeners(self._settings.port)
        self._own.port = listeners[0].socket.getsockname()[1]
        self.streams[calls.SERVICE] = self._answer_call
        self.streams[gauge.SERVICE] = gauge.GaugeService().serve
        self.methods |= {leaf.METHOD: self._leaf.answer, **self.trust.methods()}
        services = Services(self.streams, {linker.SERVICE: self._linker.incoming}, self._enrol)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self._links.serve, listeners, services)
            self.edit_row(lambda row: dataclasses.replace(row, addresses=self.addresses))
            self._seed_contacts()
            for task in (self._machines.run, self._memory.run, self._leaf.run, self._paths.run):
                nursery.start_soon(task)
            nursery.start_soon(self._own.watch, self._moved)
            if self._settings.mdns:
                self._neighbours = self._find_neighbours()
                nursery.start_soon(self._neighbours.run)
            self._refresh_view()
            task_status.started()
            await self._loop()

    async def leave(self) -> None:
        """Says goodbye to all, handing over first; then the links are closed. `run` goes on, for nobody."""
        self._machines.elect(election.LeaveRequested())
        await self._machines.settled()  # the office is handed over before the others hear that its holder is gone
        self._machines.member(members.LeaveRequested())
        await self._machines.settled()
        self._linker.close("leaving")
        await trio.sleep(FLUSH_S)

    async def _loop(self) -> None:
        while True:
            seen = self._wake.count
            now = trio.current_time()
            self._linker.dial_due(now)
            self._machines.tick(now)
            self._book.expire(self.alive(), now)
            deadlines = self._machines.deadlines()
            if not self._linker.closing and (dial_at := self._contacts.next_deadline()) is not None:
                deadlines.append(dial_at)
            with trio.move_on_at(min(deadlines, default=now + IDLE_S)):
                await self._wake.wait(seen)

    def _start(self, task: Callable[..., Any], *args: Any) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(task, *args)

    def _hello(self) -> Hello:
        me, now = self.identity, int(max(0.0, self._wall()))
        spki = certs.spki(me.key.public_key())
        return hello_of(me.cluster, spki, self._book.own.name, me.role, self._machines.incarnation, clock_s=now)

    async def _enrol(self, visitor: Visitor, stream: trio.abc.Stream) -> None:
        await self._registrar().serve(visitor, stream)

    def _registrar(self) -> Registrar:
        return Registrar(
            who=lambda: self.identity,
            ledger=self.ledger,
            clock=self._wall,
            members=self._members_to_remember,
            authorities=self._authority_addresses,
            is_denied=self._is_denied,
            is_revoked=self.trust.denies_token,
            on_joined=lambda node, name, role: self._tell(
                f"{name} joined the cluster, its role is {role}", kind=Kind.MEMBERSHIP, peer=node, role=role
            ),
        )

    def _members_to_remember(self) -> Sequence[RememberedPeer]:
        return [RememberedPeer(r.node, r.name, r.addresses[:MAX_TOLD_ADDRESSES]) for r in self.living_rows()]

    def authorities(self) -> Sequence[NodeId]:
        """The authorities that are there now, this node among them if it is one."""
        return [r.node for r in self.living_rows() if r.role is Role.AUTHORITY]

    def _authority_addresses(self) -> Sequence[Address]:
        rows = [r for r in self.living_rows() if r.role is Role.AUTHORITY]
        return [address for row in rows for address in row.addresses]

    # Contacts and dialling

    def _seed_contacts(self) -> None:
        now = trio.current_time()
        for peer in self.identity.state.peers:
            self._contacts.sighted(peer.node, peer.addresses, now, fresh=False)
            if peer.node != self.me:
                self._machines.member(members.Remembered(peer.node))
        self._gate.begin()

    def _find_neighbours(self) -> Neighbours:
        return Neighbours(
            self.me,
            lambda: self.identity.cluster,
            self._advert,
            interfaces=self._settings.interfaces,
            ignores=self._is_denied,
            met=self._sighted,
            tell=of_kind(self._tell, Kind.MEMBERSHIP),
        )

    def _advert(self) -> Advert:
        return of_row(self._book.own, self.identity.cluster, self.port)

    def _sighted(self, seen: Sighting) -> None:
        self._contacts.sighted(seen.node, seen.addresses, trio.current_time())
        self._wake.beat()

    def _moved(self, before: Sequence[Address]) -> None:
        self._tell("own addresses are now " + (", ".join(map(str, self.addresses)) or "none"), kind=Kind.LINK)
        self.edit_row(lambda row: dataclasses.replace(row, addresses=self.addresses))
        self._paths.own_gone({a.host for a in before} - {a.host for a in self.addresses})

    def _dial_order(self, node: NodeId) -> list[Address]:
        near_first = netif.same_subnet_first(self._contacts.addresses(node), self._own.choice.networks)
        return self._paths.order(node, near_first)

    # linker.LinkOwner

    def link_up(self, session: Session) -> None:
        self._gate.link_up(session)
        self._unresolved.discard(session.peer.node)
        self._machines.member(members.LinkUp(session.peer.node, session.peer.hello.incarnation))
        self._paths.link_up(session)
        session.post(control.Coordinates(self._machines.stamp))
        self._rows.post_stamps(session)
        session.post(control.Record(self.record))
        self._refresh_view()

    def link_down(self, node: NodeId, clean: bool) -> None:
        self._machines.member(members.LinkDown(node, clean))
        self._paths.link_down(node)
        self._refresh_view()

    def dial_ended(self, node: NodeId | None) -> None:
        if node in self._unresolved:
            self._unresolved.discard(node)
            self._refresh_view()
        self._wake.beat()

    def dial_failed(self, node: NodeId, refused: bool) -> None:
        self._machines.member(members.RedialFailed(node, refused=refused))

    def take(self, session: Session, message: Any) -> None:
        """One message of a link. Whatever is wrong with it ends the link (`ProtocolError`)."""
        node = session.peer.node
        if session.peer.role is Role.CLIENT:
            message = roles.of_client(node, message, self._machines.stamp)
            if message is None:
                return
        known = self._machines.take(node, message)
        if handler := _HANDLERS.get(type(message)):
            handler(self, session, message)
        elif not known:
            raise ProtocolError(f"control: {type(message).__name__} was not expected")

    def _on_beat(self, session: Session, beat: control.Beat) -> None:
        session.post(control.Echo(beat.sent_us))
        self._rows.on_beat(session, beat.rows, trio.current_time())

    def _on_echo(self, session: Session, echo: control.Echo) -> None:
        sample_s = trio.current_time() - echo.sent_us / 1e6
        if 0 <= sample_s < MAX_RTT_S:
            session.heard_rtt(sample_s)

    def _on_row_stamps(self, session: Session, m: control.RowStamps) -> None:
        self._rows.on_stamps(session, m.stamps)

    def _on_rows(self, _session: Session, m: control.Rows) -> None:
        self._rows.on_rows(m.rows, trio.current_time())

    def _rows_taken(self, rows: Sequence[NodeRow], now: float) -> None:
        for row in rows:
            self._contacts.sighted(row.node, row.addresses, now, fresh=row.node not in self._linker)
            self._paths.offered(row.node, row.addresses)
            known = self._contacts.addresses(row.node)[:MAX_TOLD_ADDRESSES]
            self._memory.met(RememberedPeer(row.node, row.name, known))
        self._refresh_view()
        self._wake.beat()
        self.changed.beat()

    def _on_record(self, _session: Session, m: control.Record) -> None:
        if m.record.version[0] <= self.epoch.counter + MAX_VERSION_JUMP and m.record.version[1] <= MAX_EDITS:
            self.set_record(m.record)

    # Who belongs to the cluster: gatekeeper.Host

    def _is_denied(self, node: NodeId) -> bool:
        return self.trust.denial_of(node) is not None

    def _distrusted(self, node: NodeId | None, exc: PeerError) -> None:
        self._gate.distrusted(node, exc)

    def _on_trust(self, session: Session, m: control.Denials | control.KeyHistory) -> None:
        self._gate.take(session, m)

    def forget(self, node: NodeId) -> None:
        """Ends all connections with a node, and remembers nothing of it."""
        self._links.cut(node)
        self._machines.member(members.Forget(node))
        self._contacts.forget(node)
        self._unresolved.discard(node)
        self._book.forget(node)
        self._memory.note(peers=tuple(p for p in self._memory.state.peers if p.node != node))
        self._refresh_view()
        self.changed.beat()

    def promoted(self) -> None:
        """This node is an authority from now on."""
        self.ledger = Ledger(self._settings.state_dir)
        self.edit_row(lambda row: dataclasses.replace(row, role=Role.AUTHORITY))

    # machines.Keeper

    async def keep_epoch(self, epoch: Epoch) -> None:
        await self._memory.save(epoch=max(epoch, self._memory.state.epoch))

    async def keep_incarnation(self, incarnation: int) -> None:
        await self._memory.save(incarnation=incarnation)
        self._book.reborn(incarnation)
        self._rows.tell_own()

    def beat(self, effect: members.SendHeartbeat) -> control.Beat:
        sent_us = int(trio.current_time() * 1e6)
        stamp, rows = self._machines.stamp, self._book.digest()
        return control.Beat(effect.incarnation, effect.digest, effect.heard_ago_s, stamp, rows, sent_us)

    def state_changed(self, effect: members.StateChanged) -> None:
        note = self._telling.state_changed(effect, trio.current_time())
        if note is not None and not self._linker.closing:
            self._say(note)
        self._refresh_view()
        self.changed.beat()

    def coordinator_changed(self, effect: election.CoordinatorChanged | election.SteppedDown) -> None:
        self._say(self._telling.coordinator_changed(effect, self.epoch, trio.current_time()))
        self.changed.beat()

    def _refresh_view(self) -> None:
        suspects = self._machines.suspects()
        candidates = tuple(self._candidate(node, node in suspects) for node in self.alive())
        self._machines.elect(election.View(candidates, len(self._unresolved)))

    def _candidate(self, node: NodeId, suspect: bool) -> election.Candidate:
        row = self._book.get(node)
        linked = node == self.me or node in self._linker
        if row is None:
            return election.Candidate(node, False, 0, 0, linked, suspect)
        return election.Candidate(node, row.eligible, row.klass, row.joined_at, linked, suspect)

    def _say(self, note: Note) -> None:
        facts = note.facts | {"reason": self.with_names(str(note.facts.get("reason", "")))}
        self._tell(self.with_names(note.text), kind=note.kind, **facts)

    def with_names(self, text: str) -> str:
        """`text` with names in place of the short ids of nodes, also of those that are gone."""
        for node in {row.node for row in self._book.all()} | {s.peer.node for s in self._linker.sessions()}:
            text = text.replace(node.short, self.name_of(node))
        return text

    # Services of the mesh itself

    async def _answer_call(self, peer: NodeId, stream: trio.abc.Stream, args: dict[str, Any]) -> None:
        await calls.answer(self.methods, peer, stream, args)


_HANDLERS: dict[type, Callable[[MeshService, Session, Any], None]] = {
    control.Beat: MeshService._on_beat,
    control.Echo: MeshService._on_echo,
    control.RowStamps: MeshService._on_row_stamps,
    control.Rows: MeshService._on_rows,
    control.Record: MeshService._on_record,
    control.Denials: MeshService._on_trust,
    control.KeyHistory: MeshService._on_trust,
}
"""Messages that are more than an event for a machine."""
