"""The engine's turns: nobody starves, nothing is lost, and all bounds hold, whatever clients do."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tightwad_agent.proxy.fair import Admitted, Effect, FairQueue, Ticket

CLIENTS = [f"c{i}" for i in range(5)]
MAX_WAITING, MAX_EACH = 8, 4


class Turns(RuleBasedStateMachine):
    """A model beside the queue: who waits in what order, who runs, and how often each waiting client was overtaken."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue(2, max_waiting=MAX_WAITING, max_waiting_each=MAX_EACH)
        self.n_slots = 2
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []
        self.ended: list[Ticket] = []
        self.overtaken: dict[str, dict[str, int]] = {}
        """Of clients that wait with nothing running: how often each other was admitted since."""

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            ticket = effect.ticket
            if isinstance(effect, Admitted):
                self._admitted(ticket)
            else:
                assert ticket in self.waiting, "only what waits is refused"
                self.waiting.remove(ticket)
                self.ended.append(ticket)
                if effect.own_fault:
                    most = max(sum(t.client == c for t in self.waiting) for c in CLIENTS)
                    mine = sum(t.client == ticket.client for t in self.waiting)
                    assert mine + 1 >= most or mine >= MAX_EACH, "whoever fills the queue pays"

    def _admitted(self, ticket: Ticket) -> None:
        assert ticket in self.waiting, "admitted once, and never after it was refused"
        assert len(self.running) < self.n_slots
        own = [t for t in self.waiting if t.client == ticket.client]
        assert own[0] is ticket, "first come, first served, within a client"
        n_running = {c: sum(t.client == c for t in self.running) for c in CLIENTS}
        fewest = min(n_running[t.client] for t in self.waiting)
        assert n_running[ticket.client] == fewest, "a client with fewer running goes first"
        self.waiting.remove(ticket)
        self.running.append(ticket)
        self.overtaken.pop(ticket.client, None)
        for client, by in self.overtaken.items():
            by[ticket.client] = by.get(ticket.client, 0) + 1
            assert by[ticket.client] <= 1, f"{client} was overtaken twice by {ticket.client}"

    def _watch(self) -> None:
        for client in CLIENTS:
            waits = any(t.client == client for t in self.waiting)
            if not waits or any(t.client == client for t in self.running):
                self.overtaken.pop(client, None)
            elif client not in self.overtaken:
                self.overtaken[client] = {}

    @rule(client=st.sampled_from(CLIENTS), n=st.integers(1, 6))
    def asks(self, client: str, n: int) -> None:
        for _ in range(n):
            ticket, effects = self.queue.ask(client)
            self.waiting.append(ticket)
            self._carry_out(effects)
            self._watch()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def one_ends(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.running))
        self.running.remove(ticket)
        self.ended.append(ticket)
        self._carry_out(self.queue.leave(ticket))
        self._watch()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def one_hangs_up(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(ticket)
        self.ended.append(ticket)
        self._carry_out(self.queue.leave(ticket))
        self._watch()

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def one_leaves_twice(self, data: st.DataObject) -> None:
        self._carry_out(self.queue.leave(data.draw(st.sampled_from(self.ended))))

    @rule(n=st.integers(0, 4))
    def another_engine(self, n: int) -> None:
        self.n_slots = n
        self._carry_out(self.queue.resize(n))
        self._watch()

    @invariant()
    def counts_agree(self) -> None:
        assert self.queue.n_running == len(self.running)
        assert self.queue.n_waiting == len(self.waiting) <= MAX_WAITING
        for client in CLIENTS:
            n = sum(t.client == client for t in self.waiting)
            assert self.queue.waiting_of(client) == n <= MAX_EACH

    @invariant()
    def no_slot_is_idle_while_somebody_waits(self) -> None:
        assert not self.waiting or len(self.running) >= self.n_slots

    @invariant()
    def nobody_is_remembered_for_ever(self) -> None:
        assert set(self.queue._clients) == {t.client for t in (*self.waiting, *self.running)}

    def teardown(self) -> None:
        """Whoever still waits gets a turn when the others end."""
        if self.n_slots == 0:
            self.another_engine(1)
        while self.running:
            ticket = self.running.pop(0)
            self._carry_out(self.queue.leave(ticket))
            self._watch()
        assert not self.waiting


Turns.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_turns = Turns.TestCase
