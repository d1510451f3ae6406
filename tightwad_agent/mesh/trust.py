"""Who belongs to the cluster, as this node sees it: the deny list in force, the cluster's key, and who may change both.

An authority signs; every node carries on what it hears, to all it is linked with. Of a removed node, connections are
cut as soon as it was told why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import trio

from tightwad_agent.errors import NotTrusted, PeerError, PeerUnreachable, ProtocolError, RemoteError, UsageError
from tightwad_agent.ids import NodeId
from tightwad_agent.mesh import certs, deny, identity, lineage
from tightwad_agent.mesh.deny_book import DenyBook
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.leaf import LeafKeeper, leaf_of
from tightwad_agent.mesh.ledger import Ledger
from tightwad_agent.mesh.tokens import Entry
from tightwad_agent.streams import MethodHandler, peer_errors
from tightwad_agent.wire import control
from tightwad_agent.wire.rows import Role
from tightwad_agent.wire.trust import Denial, Denied, Succession

log = logging.getLogger(__name__)

CALL_S = 10.0
MIN_PREFIX = 4
"""Characters of a token's id that a person must give at least."""
DENY, REVOKE, LEAF, PROMOTED = "trust.deny", "trust.revoke", "trust.leaf", "trust.promoted"


class TrustOwner(Protocol):
    """What it needs of its node."""

    @property
    def me(self) -> NodeId: ...

    @property
    def ledger(self) -> Ledger | None:
        """The tokens of an authority."""

    async def call(self, node: NodeId, method: str, params: dict[str, Any]) -> dict[str, Any]: ...

    def name_of(self, node: NodeId) -> str: ...

    def authorities(self) -> Sequence[NodeId]:
        """Those that are there now, this node among them if it is one."""

    def spread(self, message: object) -> None:
        """To all linked nodes that understand it."""

    def cut_off(self, denial: Denial) -> None:
        """Another node was removed: it is told so, and its connections end."""

    def own_removal(self, denial: Denial) -> None:
        """This node itself was removed."""

    def became(self, role: Role) -> None:
        """This node has another role."""


class Trust:
    """`wall` is Unix seconds. `tell` hears what a person may ask about."""

    def __init__(
        self,
        owner: TrustOwner,
        book: DenyBook,
        leaf: LeafKeeper,
        wall: Callable[[], float],
        tell: Callable[[str], None],
    ) -> None:
        self._owner = owner
        self._book = book
        self._leaf = leaf
        self._wall = wall
        self._tell = tell
        self._writing = trio.Lock()
        self._unheard: list[Denial] = []

    @property
    def removal(self) -> Denial | None:
        """The cluster's word that this node is no member any more, if so."""
        return self._book.list.node(self._owner.me)

    def denial_of(self, node: NodeId) -> Denial | None:
        return self._book.list.node(node)

    def denies_token(self, token_id: bytes) -> bool:
        return self._book.list.token(token_id) is not None

    def summary(self) -> dict[str, Any]:
        """For people: {"overlap_until", "removed", "revoked"}; Unix seconds, 0 where no old key counts."""
        ends = [step.until for step in self._leaf.identity.lineage if step.until > self._wall()]
        kinds = [d.kind for d in self._book.list.entries]
        return {
            "overlap_until": max(ends, default=0),
            "removed": kinds.count(Denied.NODE),
            "revoked": kinds.count(Denied.TOKEN),
        }

    def not_renewed(self, nodes: Sequence[NodeId]) -> list[NodeId]:
        """Those of them that this authority has not given a certificate of the newest key."""
        me = self._leaf.identity
        return [n for n in nodes if n not in self._leaf.renewed and n != me.node] if me.lineage else []

    def messages(self) -> list[object]:
        """What a node should hear before anything else."""
        found: list[object] = []
        if steps := self._leaf.identity.lineage:
            found.append(control.KeyHistory(steps))
        pieces = deny.parts(self._book.list.entries, control.MAX_DENIALS_PER_MESSAGE)
        return found + [control.Denials(piece) for piece in pieces]

    def methods(self) -> dict[str, MethodHandler]:
        """Calls from other nodes."""
        return {DENY: self._deny_asked, REVOKE: self._revoke_asked, LEAF: self._own_leaf, PROMOTED: self._promoted}

    # What comes in

    def take(self, entries: Sequence[Denial]) -> tuple[Denial, ...]:
        """Puts what is new in force at once, and passes it on; `save` is for the caller to call soon.

        Raises `ProtocolError` for what no authority signed.
        """
        now = self._wall()
        trusted = self._leaf.identity.trusted_keys(now)
        self._unheard = [*self._unheard, *(d for d in entries if d.ca not in trusted)][-deny.MAX_KEPT :]
        fresh = self._book.merge(entries, trusted, now)
        for piece in deny.parts(fresh, control.MAX_DENIALS_PER_MESSAGE):
            self._owner.spread(control.Denials(piece))
        for denial in fresh:
            if denial.kind is Denied.NODE:
                self._enforce(denial)
        return fresh

    def _enforce(self, denial: Denial) -> None:
        if denial.subject == self._owner.me:
            self._owner.own_removal(denial)
        else:
            self._owner.cut_off(denial)

    async def save(self) -> None:
        """Returns when the deny list is on the disk. Raises `EnvironmentFault`."""
        async with self._writing:
            await trio.to_thread.run_sync(self._book.save)

    async def learn(self, steps: tuple[Succession, ...]) -> None:
        """The cluster's key changed. Raises `ProtocolError` for a history that is not this cluster's."""
        async with self._writing:
            me = self._leaf.identity
            if not lineage.is_longer(me.lineage, steps):
                return
            try:
                adopted = await trio.to_thread.run_sync(identity.adopt, me, steps)
            except NotTrusted as exc:
                raise ProtocolError(f"control: {exc.message}") from None
            self._leaf.take(adopted)
        self._tell("the cluster has a new key; this machine's certificate is being renewed")
        self._owner.spread(control.KeyHistory(steps))
        waiting, self._unheard = self._unheard, []
        if self.take(waiting):  # signed by a key that was not known when they came
            await self.save()

    # What authorities do

    async def deny_node(self, node: NodeId, note: str) -> None:
        """Removes a node for good. Raises `UsageError`, `EnvironmentFault`."""
        me = self._authority()
        if node == self._owner.me:
            raise UsageError("an authority does not remove itself", hint="on that machine: tightwad-agent leave")
        await self._deny(me, [(Denied.NODE, str(node), me.ca.not_valid_after_utc.timestamp())], note)

    async def _deny(self, me: Identity, what: Sequence[tuple[Denied, str, float]], note: str) -> None:
        """In force here and on the disk when it returns, and on its way to all others."""
        assert me.ca_key is not None
        now = self._wall()
        made = []
        for kind, subject, until in what:
            self._book.list.check_room()
            made.append(deny.signed(me.ca_key, kind, subject, since=now, until=until, note=note))
        self.take(made)
        await self.save()

    async def rotate(self, overlap_s: float) -> tuple[int, int]:
        """Gives the CA a new key; both count for `overlap_s`. Unix seconds of begin and end. Raises `UsageError`."""
        async with self._writing:
            me = self._authority()
            changed = await trio.to_thread.run_sync(identity.rotate, me, self._wall(), overlap_s)
            self._leaf.take(changed)
        step = changed.lineage[-1]
        self._owner.spread(control.KeyHistory(changed.lineage))
        await self._sign_anew(changed)
        self._tell("the cluster's key was changed; certificates of the old one are renewed")
        return step.since, step.until

    async def _sign_anew(self, me: Identity) -> None:
        """Who was removed stays removed when the key that said so does not count any more."""
        assert me.ca_key is not None
        until = me.ca.not_valid_after_utc.timestamp()
        self.take(
            [
                deny.signed(
                    me.ca_key,
                    d.kind,
                    d.subject,
                    since=d.since,
                    until=max(d.until + 1, until) if d.kind is Denied.NODE else d.until + 1,
                    note=d.note,
                )
                for d in self._book.list.entries
            ]
        )
        await self.save()

    async def promote(self, node: NodeId) -> None:
        """Makes another node an authority: it gets the CA's key over its authenticated link. Raises a `UsageError`
        or a `PeerError`."""
        me = self._authority()
        assert me.ca_key is not None
        with peer_errors(CALL_S):
            shown = await self._owner.call(node, LEAF, {})
            try:
                fresh = await trio.to_thread.run_sync(identity.elevate, me, node, leaf_of(shown), self._wall())
            except NotTrusted as exc:
                raise UsageError(f"{self._owner.name_of(node)} cannot be promoted: {exc.message}") from None
            await self._owner.call(node, PROMOTED, {"leaf": fresh, "ca_key": certs.raw_private(me.ca_key)})
        self._tell(f"{self._owner.name_of(node)} was made an authority")

    def _authority(self) -> Identity:
        me = self._leaf.identity
        if me.can_issue:
            return me
        if me.role is Role.AUTHORITY:
            raise UsageError(
                "this authority has not been given the cluster's newest key yet",
                hint="start the authority that changed it, and wait a minute",
            )
        names = [self._owner.name_of(node) for node in self._owner.authorities()]
        raise UsageError(
            "this machine is no authority of the cluster", hint=f"do it on {' or '.join(names)}" if names else NOBODY
        )

    # What any member may ask an authority for

    async def remove_node(self, node: NodeId) -> None:
        """Has a node removed. Raises `PeerUnreachable` if no authority is there, else the authority's own error."""
        if self._leaf.identity.can_issue:
            await self.deny_node(node, f"asked for on {self._owner.name_of(self._owner.me)}")
        else:
            await self._ask_authorities(DENY, {"node": str(node)})

    async def revoke(self, text: str, *, nodes: bool) -> dict[str, Any]:
        """Ends a join token, by its id or the beginning of it: {"token", "nodes"}, the latter those it admitted and
        that were removed as well."""
        params = {"token": text, "nodes": nodes}
        if self._owner.ledger is not None and self._leaf.identity.can_issue:
            try:
                return await self._revoke_asked(self._owner.me, params)
            except UsageError:
                if not [a for a in self._owner.authorities() if a != self._owner.me]:
                    raise
        return await self._ask_authorities(REVOKE, params)

    async def _ask_authorities(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """The first yes of an authority; else what the last one said."""
        problem: Exception | None = None
        for authority in self._owner.authorities():
            if authority == self._owner.me:
                continue
            try:
                with peer_errors(CALL_S):
                    return await self._owner.call(authority, method, params)
            except PeerError as exc:
                problem = exc
        if isinstance(problem, RemoteError):
            raise UsageError(problem.message, hint=problem.hint)
        raise PeerUnreachable(f"it takes an authority of the cluster, and none was reached{_why(problem)}", hint=NOBODY)

    async def _deny_asked(self, peer: NodeId, params: dict[str, Any]) -> dict[str, Any]:
        await self.deny_node(_node(params), f"asked for on {self._owner.name_of(peer)}")
        return {}

    async def _revoke_asked(self, peer: NodeId, params: dict[str, Any]) -> dict[str, Any]:
        me, text = self._authority(), params.get("token")
        entry = await self._entry(text if isinstance(text, str) else "")
        note = f"asked for on {self._owner.name_of(peer)}"
        what = [(Denied.TOKEN, entry.token_id.hex(), float(entry.expires + deny.TOKEN_SLACK_S))]
        gone = [n for n in entry.nodes if n != self._owner.me] if params.get("nodes") is True else []
        until = me.ca.not_valid_after_utc.timestamp()
        await self._deny(me, [*what, *((Denied.NODE, str(n), until) for n in gone)], note)
        self._tell(f"join token {entry.token_id.hex()} was revoked ({note})")
        return {"token": entry.token_id.hex(), "nodes": [str(n) for n in gone]}

    async def _entry(self, text: str) -> Entry:
        """The one token whose id begins so."""
        book = self._owner.ledger
        assert book is not None
        found = [e for e in await trio.to_thread.run_sync(book.entries) if e.token_id.hex().startswith(text.lower())]
        if len(text) < MIN_PREFIX or len(found) != 1:
            why = "no join token was made here" if not found else "several join tokens were made here"
            raise UsageError(f"{why} whose id begins with {text[:32]!r}", hint="see: tightwad-agent token list")
        return found[0]

    # The one that is promoted

    async def _own_leaf(self, _peer: NodeId, _params: dict[str, Any]) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return {"leaf": self._leaf.identity.leaf_der}

    async def _promoted(self, peer: NodeId, params: dict[str, Any]) -> dict[str, Any]:
        key = params.get("ca_key")
        if not isinstance(key, bytes):
            raise ProtocolError("a promotion without the cluster's key")
        async with self._writing:
            me, leaf = self._leaf.identity, leaf_of(params)
            self._leaf.take(await trio.to_thread.run_sync(identity.promote, me, leaf, key, self._wall()))
        self._owner.became(Role.AUTHORITY)
        self._tell(f"{self._owner.name_of(peer)} made this machine an authority: it may let others join")
        return {}


NOBODY = "start a machine that is one: the founder, or one that was promoted"


def _node(params: dict[str, Any]) -> NodeId:
    try:
        return NodeId(params.get("node"))  # type: ignore[arg-type]
    except ValueError as exc:
        raise ProtocolError(f"trust: {exc}") from None


def _why(problem: Exception | None) -> str:
    return f": {problem}" if problem else ""
