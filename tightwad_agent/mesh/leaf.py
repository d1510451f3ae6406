"""Keeps this node's certificate fresh: renewed at two thirds of its life, or at once when the cluster's key changes.

It holds who this node is; whoever changes that says so to `take`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import trio

from tightwad_agent.errors import NotTrusted, PeerError, PeerUnreachable, ProtocolError, TightwadError
from tightwad_agent.ids import NodeId
from tightwad_agent.mesh import certs, identity
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.pulse import Pulse
from tightwad_agent.streams import Call, peer_errors
from tightwad_agent.wire.rows import Role

METHOD = "leaf.renew"
CHECK_S = 600.0
FIRST_RETRY_S = 1.0
"""At a start, and after a change of the key, the authority may be there in a moment."""
RETRY_S = 60.0
CALL_S = 10.0
MAX_NOTED = 1024


class LeafKeeper:
    """`use` is given each new identity; `wall` is Unix seconds; `authorities` are those that are there now."""

    def __init__(
        self,
        me: Identity,
        *,
        call: Call,
        authorities: Callable[[], Sequence[NodeId]],
        use: Callable[[Identity], None],
        wall: Callable[[], float],
        tell: Callable[[str], None],
        denies: Callable[[NodeId], bool] = lambda _node: False,
    ) -> None:
        self.identity = me
        self._call = call
        self._authorities = authorities
        self._use = use
        self._wall = wall
        self._tell = tell
        self._denies = denies
        self.renewed: set[NodeId] = set()
        """To whom this authority gave a certificate of its newest key."""
        self._changed = Pulse()
        self._trusted = me.trusted_keys(wall())

    async def run(self) -> None:
        """Until cancelled."""
        retry_s, told = FIRST_RETRY_S, ""
        while True:
            seen, wait_s = self._changed.count, CHECK_S
            self._drop_old_keys()
            if self.identity.renewal_due(self._wall()):
                try:
                    await self.renew()
                    seen, retry_s, told = self._changed.count, FIRST_RETRY_S, ""
                    wait_s = RETRY_S if self.identity.renewal_due(self._wall()) else CHECK_S  # clocks may disagree
                except TightwadError as exc:
                    if exc.message != told:
                        told = exc.message
                        self._tell(f"the certificate was not renewed: {exc.message}")
                    wait_s, retry_s = retry_s, min(RETRY_S, 2 * retry_s)
            with trio.move_on_after(min(wait_s, self._overlap_left_s())):
                await self._changed.wait(seen)

    def take(self, me: Identity) -> None:
        """This node is this from now on."""
        if me.ca != self.identity.ca:
            self.renewed.clear()
        self.identity = me
        self._trusted = me.trusted_keys(self._wall())
        self._use(me)
        self._changed.beat()

    async def renew(self) -> None:
        """Renews now. Raises a `TightwadError` if nobody can."""
        now = self._wall()
        if self.identity.can_issue:
            self.take(await trio.to_thread.run_sync(identity.renew_own, self.identity, now))
        else:
            answer = await self._ask()
            self.take(await trio.to_thread.run_sync(self._installed, answer, now))
        self._tell("the certificate was renewed for 30 days")

    async def answer(self, peer: NodeId, params: dict[str, Any]) -> dict[str, Any]:
        """An authority's side: a member shows its leaf and gets a fresh one; another authority the newest key too."""
        if self._denies(peer):
            raise NotTrusted("this node was removed from the cluster")
        me, leaf = self.identity, leaf_of(params)
        fresh = await trio.to_thread.run_sync(identity.renew, me, peer, leaf, self._wall())
        self._note(peer)
        is_authority = certs.role_of(certs.parse_der(fresh)) is Role.AUTHORITY
        return {"leaf": fresh, **({"ca_key": certs.raw_private(me.ca_key)} if is_authority and me.ca_key else {})}

    def _note(self, peer: NodeId) -> None:
        if len(self.renewed) < MAX_NOTED:
            self.renewed.add(peer)

    async def _ask(self) -> dict[str, Any]:
        """The first answer of an authority."""
        problem: PeerError = PeerUnreachable("no authority of the cluster is there")
        for authority in self._authorities():
            if authority == self.identity.node:
                continue
            try:
                with peer_errors(CALL_S):
                    return await self._call(authority, METHOD, {"leaf": self.identity.leaf_der})
            except PeerError as exc:
                problem = exc
        raise problem

    def _installed(self, answer: dict[str, Any], now: float) -> Identity:
        key = answer.get("ca_key")
        if self.identity.role is Role.AUTHORITY and isinstance(key, bytes):
            return identity.promote(self.identity, leaf_of(answer), key, now)
        return identity.install_leaf(self.identity, leaf_of(answer), now)

    def _drop_old_keys(self) -> None:
        """Once an overlap is over, leafs of the key before are not believed any more."""
        trusted = self.identity.trusted_keys(self._wall())
        if trusted != self._trusted:
            self._trusted = trusted
            self._use(self.identity)
            self._tell("the cluster's old key does not count any more")

    def _overlap_left_s(self) -> float:
        now = self._wall()
        return min((step.until - now for step in self.identity.lineage if step.until > now), default=CHECK_S) + 0.1


def leaf_of(plain: dict[str, Any]) -> bytes:
    """The certificate in a call's parameters or result. Raises `ProtocolError`."""
    leaf = plain.get("leaf")
    if not isinstance(leaf, bytes):
        raise ProtocolError("a renewal without a certificate")
    return leaf
