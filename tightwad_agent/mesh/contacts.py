"""Whom to dial, where, and when. Pure.

Addresses of a node come from mDNS, the token, seeds, memory, other nodes and the node itself; all are hints, and TLS
decides.
A node that is wanted and not linked is dialled at once and then with growing pauses; a fresh sighting ends the pause.
Everything is bounded, because everything here may come from a stranger.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from tightwad_agent.ids import Address, NodeId

MAX_NODES = 256
MAX_ADDRESSES = 16
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0
SETTLED_S = 5.0
"""Links to a node that are lost more often than this are dialled again with growing pauses, like failed dials."""
COURTESY_S = 1.0


@dataclass(slots=True)
class _Contact:
    addresses: list[Address] = field(default_factory=list)
    linked: bool = False
    dialling: bool = False
    due: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    lost_at: float = -math.inf
    behind: NodeId | None = None
    """Of a seed: the node that answered there."""


@dataclass(frozen=True, slots=True)
class Dial:
    """Dial these addresses now. `node` None: a seed whose node id is not known yet."""

    node: NodeId | None
    addresses: tuple[Address, ...]


class Contacts:
    """The candidate list of one node. `me` is never dialled."""

    def __init__(self, me: NodeId, seeds: Iterable[Address] = ()) -> None:
        self._me = me
        self._contacts: dict[NodeId, _Contact] = {}
        self._seeds: dict[Address, _Contact] = {seed: _Contact([seed]) for seed in list(seeds)[:MAX_NODES]}

    def sighted(self, node: NodeId, addresses: Iterable[Address], now: float, *, fresh: bool = True) -> None:
        """A hint. `fresh`: first-hand and recent, so that a waiting redial happens at once."""
        if node == self._me:
            return
        contact = self._contacts.get(node)
        if contact is None:
            if len(self._contacts) >= MAX_NODES and not self._drop_one():
                return
            contact = self._contacts[node] = _Contact(due=now + self._courtesy_s(node))
        known = contact.addresses
        new = [a for a in dict.fromkeys(addresses) if a not in known]
        contact.addresses = [*new, *known][:MAX_ADDRESSES] if fresh else [*known, *new][:MAX_ADDRESSES]
        if fresh and not contact.linked and new:
            contact.due = min(contact.due, now + self._courtesy_s(node))
            contact.pause_s = FIRST_PAUSE_S

    def worked(self, node: NodeId, address: Address) -> None:
        """This address led to the node: try it first next time."""
        if contact := self._contacts.get(node):
            rest = [a for a in contact.addresses if a != address]
            contact.addresses = [address, *rest][:MAX_ADDRESSES]

    def linked(self, node: NodeId) -> None:
        """A link to the node is up: nothing to dial until it is lost."""
        contact = self._contacts.get(node)
        if contact is None:
            if node == self._me or (len(self._contacts) >= MAX_NODES and not self._drop_one()):
                return
            contact = self._contacts[node] = _Contact()
        contact.linked = True

    def lost(self, node: NodeId, now: float) -> None:
        """The link is gone: dial again at once; after a pause if the one before was lost just now."""
        if (contact := self._contacts.get(node)) is None:
            return
        if now - contact.lost_at >= SETTLED_S:
            contact.pause_s = FIRST_PAUSE_S
            contact.due = now + self._courtesy_s(node)
        else:
            self._put_off(contact, now)
        contact.linked = False
        contact.lost_at = now

    def done(self, dial: Dial, now: float, *, ok: bool, node: NodeId | None = None) -> None:
        """A dial ended; after a failure the next one waits, each time longer. `node`: who answered at a seed."""
        for contact in self._of(dial):
            contact.dialling = False
            if not ok:
                self._put_off(contact, now)
            elif dial.node is None:
                contact.due = now + LONGEST_PAUSE_S
                contact.behind = node
            else:
                contact.due = now + contact.pause_s

    def is_dialling(self, node: NodeId) -> bool:
        contact = self._contacts.get(node)
        return contact is not None and contact.dialling

    def forget(self, node: NodeId) -> None:
        self._contacts.pop(node, None)

    def due(self, now: float) -> list[Dial]:
        """The dials to make now; each is under way until `done`."""
        dials = []
        for node, contact in self._contacts.items():
            if contact.addresses and not contact.linked and not contact.dialling and contact.due <= now:
                contact.dialling = True
                dials.append(Dial(node, tuple(contact.addresses)))
        for address, contact in self._seeds.items():
            if self._unseen(address) and not contact.dialling and contact.due <= now:
                contact.dialling = True
                dials.append(Dial(None, (address,)))
        return dials

    def next_deadline(self) -> float | None:
        """When `due` may have something."""
        waiting = [c.due for c in self._contacts.values() if c.addresses and not c.linked and not c.dialling]
        waiting += [c.due for a, c in self._seeds.items() if not c.dialling and self._unseen(a)]
        return min(waiting, default=None)

    def addresses(self, node: NodeId) -> tuple[Address, ...]:
        """Where the node may be, the best guess first."""
        contact = self._contacts.get(node)
        return tuple(contact.addresses) if contact else ()

    def known(self) -> dict[NodeId, tuple[Address, ...]]:
        return {node: tuple(c.addresses) for node, c in self._contacts.items()}

    def _courtesy_s(self, node: NodeId) -> float:
        """The lower id dials; the higher one waits a moment first, so that two links at once are rare."""
        return 0.0 if self._me < node else COURTESY_S

    def _of(self, dial: Dial) -> list[_Contact]:
        found = self._contacts.get(dial.node) if dial.node else self._seeds.get(dial.addresses[0])
        return [found] if found else []

    def _unseen(self, seed: Address) -> bool:
        behind = self._seeds[seed].behind
        return not any(c.linked and (n == behind or seed in c.addresses) for n, c in self._contacts.items())

    @staticmethod
    def _put_off(contact: _Contact, now: float) -> None:
        contact.due = now + contact.pause_s
        contact.pause_s = min(LONGEST_PAUSE_S, contact.pause_s * 2)

    def _drop_one(self) -> bool:
        idle = [n for n, c in self._contacts.items() if not c.linked and not c.dialling]
        if not idle:
            return False
        del self._contacts[max(idle, key=lambda n: self._contacts[n].pause_s)]
        return True
