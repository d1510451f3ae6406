"""Whose request runs next: the engine's slots, shared out between clients. Pure.

A free slot goes to the waiting client that has the fewest running; among equals to the one whose last turn is longest
ago, where coming anew counts as a turn just before the latest. So slots are shared max-min fairly, and a client that
has nothing running is overtaken at most once by each client that was there before it.

What waits is bounded. When there is no room left, the client with the most waiting gives its latest one up: whoever
fills the queue pays for it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

MAX_WAITING = 256
"""Requests of all clients together."""
MAX_WAITING_EACH = 64


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """One request; equal to nothing but itself."""

    client: str


@dataclass(frozen=True, slots=True)
class Admitted:
    """This one runs now."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Refused:
    """This one does not wait any longer. `own_fault`: its client has the most waiting."""

    ticket: Ticket
    own_fault: bool


Effect = Admitted | Refused


@dataclass(slots=True)
class _Client:
    turn: int
    running: int = 0
    waiting: deque[Ticket] = field(default_factory=deque)


class FairQueue:
    """Tickets of all clients. Whoever asked must `leave`, whether it ran or still waits."""

    def __init__(
        self, n_slots: int, *, max_waiting: int = MAX_WAITING, max_waiting_each: int = MAX_WAITING_EACH
    ) -> None:
        self._n_slots = n_slots
        self._max_waiting = max_waiting
        self._max_each = max_waiting_each
        self._clients: dict[str, _Client] = {}
        self._running: set[Ticket] = set()
        self._n_waiting = 0
        self._n_admitted = 0

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return self._n_waiting

    def waiting_of(self, client: str) -> int:
        return len(self._clients[client].waiting) if client in self._clients else 0

    def ask(self, client: str) -> tuple[Ticket, list[Effect]]:
        """A ticket of this client: admitted or refused at once if the effects say so, else it waits."""
        ticket = Ticket(client)
        known = self._clients.setdefault(client, _Client(2 * self._n_admitted - 1))
        if len(self._running) < self._n_slots and not self._n_waiting:
            return ticket, [self._admit(known, ticket)]
        refused = self._make_room(known, ticket)
        if any(effect.ticket is ticket for effect in refused):
            self._forget(client)
        else:
            known.waiting.append(ticket)
            self._n_waiting += 1
        return ticket, [*refused, *self._fill()]

    def leave(self, ticket: Ticket) -> list[Effect]:
        """This one has ended, or waits no more. Does nothing the second time."""
        client = self._clients.get(ticket.client)
        if client is None:
            return []
        if ticket in self._running:
            self._running.discard(ticket)
            client.running -= 1
        elif ticket in client.waiting:
            client.waiting.remove(ticket)
            self._n_waiting -= 1
        self._forget(ticket.client)
        return self._fill()

    def resize(self, n_slots: int) -> list[Effect]:
        """Another engine, another number of slots. What runs goes on."""
        self._n_slots = n_slots
        return self._fill()

    def _fill(self) -> list[Effect]:
        effects: list[Effect] = []
        while self._n_waiting and len(self._running) < self._n_slots:
            client = min((c for c in self._clients.values() if c.waiting), key=lambda c: (c.running, c.turn))
            self._n_waiting -= 1
            effects.append(self._admit(client, client.waiting.popleft()))
        return effects

    def _admit(self, client: _Client, ticket: Ticket) -> Admitted:
        self._n_admitted += 1
        client.turn = 2 * self._n_admitted
        client.running += 1
        self._running.add(ticket)
        return Admitted(ticket)

    def _make_room(self, client: _Client, ticket: Ticket) -> list[Refused]:
        if len(client.waiting) >= self._max_each:
            return [Refused(ticket, own_fault=True)]
        if self._n_waiting < self._max_waiting:
            return []
        greediest = max(self._clients.values(), key=lambda c: len(c.waiting))
        if len(greediest.waiting) <= len(client.waiting) + 1:
            return [Refused(ticket, own_fault=False)]
        self._n_waiting -= 1
        return [Refused(greediest.waiting.pop(), own_fault=True)]

    def _forget(self, name: str) -> None:
        client = self._clients[name]
        if not client.running and not client.waiting:
            del self._clients[name]
