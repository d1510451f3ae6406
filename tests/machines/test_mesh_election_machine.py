"""Whatever views, stamps and answers come: epochs only rise, and nothing is sent before it is persisted."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tightwad_agent.ids import NO_EPOCH, Epoch
from tightwad_agent.mesh import election as el
from tightwad_agent.mesh.election import Candidate, Election
from tightwad_agent.testing import node_id
from tightwad_agent.wire.rows import Stamp

ME = node_id("me")
NODES = [node_id(f"n{k}") for k in range(3)]
anyone = st.sampled_from([*NODES, ME])
epochs = st.builds(Epoch, st.integers(-1, 6) | st.integers(0, 2**62), anyone)
claims = epochs.map(lambda e: Stamp(e, e.node))  # type: ignore[arg-type]
stamps = claims | st.builds(Stamp, epochs, st.none() | anyone)
candidates = st.builds(
    Candidate, st.sampled_from(NODES), st.booleans(), st.integers(0, 2), st.integers(0, 2), st.booleans(), st.booleans()
)
mine = st.builds(Candidate, st.just(ME), st.booleans(), st.integers(0, 2), st.integers(0, 2), st.booleans())


class ElectionMachine(RuleBasedStateMachine):
    """Any events in any order, with restarts that keep only what was persisted."""

    @initialize()
    def start(self) -> None:
        self.now = 10.0
        self.disk = NO_EPOCH
        self.obeyed = NO_EPOCH
        self.claimed: set[Epoch] = set()
        self.living: set[str] = set()
        self.boot()

    def boot(self) -> None:
        self.election = Election(ME, self.now, self.disk)
        self.coordinator: str | None = None
        self.coordinating = False
        self.leaving = False

    @rule()
    def restart(self) -> None:
        self.boot()

    def do(self, event: el.Event) -> None:
        for effect in self.election.handle(event, self.now):
            match effect:
                case el.Persist(epoch):
                    assert epoch > self.disk
                    self.disk = epoch
                case el.Announce(stamp) | el.Tell(_, stamp) | el.AnswerPreCheck(_, _, stamp):
                    assert stamp.epoch <= self.disk, "sent before it was persisted"
                    assert stamp.coordinator is None or stamp.coordinator == stamp.epoch.node
                case el.SendHandOver(node, epoch):
                    assert self.coordinating
                    assert node != ME
                    assert epoch == self.disk
                case el.AskPreCheck(node):
                    assert node != ME
                    assert not self.coordinating
                case el.SteppedDown(epoch):
                    assert self.coordinating
                    assert epoch < self.disk
                    self.coordinating = False
                case el.CoordinatorChanged(epoch, coordinator):
                    self.changed(epoch, coordinator)
        snapshot = self.election.snapshot()
        assert snapshot.stamp.epoch == self.disk == self.election.epoch
        assert snapshot.stamp.coordinator == self.coordinator

    def changed(self, epoch: Epoch | None, coordinator: str | None) -> None:
        self.coordinator = coordinator
        if epoch is None:
            assert coordinator is None
            return
        assert epoch >= self.obeyed
        assert epoch.node == coordinator
        assert epoch == self.disk
        self.obeyed = epoch
        if coordinator == ME:
            assert epoch not in self.claimed, "a term was claimed twice"
            assert not self.leaving
            self.claimed.add(epoch)
        self.coordinating = coordinator == ME

    @rule(me=mine, others=st.lists(candidates, max_size=4), unresolved=st.integers(0, 2))
    def see(self, me: Candidate, others: list[Candidate], unresolved: int) -> None:
        self.do(el.View((me, *others), unresolved))

    @rule(node=st.sampled_from(NODES), stamp=stamps)
    def hear(self, node: str, stamp: Stamp) -> None:
        self.do(el.StampHeard(node, stamp))

    @rule(node=st.sampled_from(NODES))
    def a_newer_claim(self, node: str) -> None:
        epoch = Epoch(self.disk.counter + 1, node)
        self.do(el.StampHeard(node, Stamp(epoch, node)))

    @rule(node=st.sampled_from(NODES), number=st.integers(0, 5))
    def pre_check(self, node: str, number: int) -> None:
        self.do(el.PreCheckAsked(node, number))

    @rule(node=st.sampled_from(NODES), back=st.integers(0, 1), stamp=stamps)
    def answer(self, node: str, back: int, stamp: Stamp) -> None:
        self.do(el.PreCheckAnswered(node, self.election._round - back, stamp))

    @rule(to=st.none() | anyone)
    def hand_over(self, to: str | None) -> None:
        self.do(el.HandOver(to))

    @rule(node=st.sampled_from(NODES), epoch=epochs)
    def named(self, node: str, epoch: Epoch) -> None:
        self.do(el.HandOverReceived(node, epoch))

    @rule(node=st.sampled_from(NODES))
    def named_in_truth(self, node: str) -> None:
        self.do(el.HandOverReceived(node, self.disk))

    @rule()
    def leave(self) -> None:
        self.do(el.LeaveRequested())
        self.leaving = True

    @rule(span=st.floats(0, 10))
    def pass_time(self, span: float) -> None:
        self.now += span
        self.do(el.Tick())

    @rule(n=st.integers(1, 10))
    def run_on_time(self, n: int) -> None:
        for _ in range(n):
            due = self.election.next_deadline()
            if due is None:
                return
            self.now = max(self.now, due)
            self.do(el.Tick())

    @invariant()
    def a_deadline_passes(self) -> None:
        if hasattr(self, "election"):
            due = self.election.next_deadline()
            assert due is None or due > self.now

    @invariant()
    def older_epochs_are_refused(self) -> None:
        if hasattr(self, "election") and self.obeyed.counter:
            assert not self.election.accepts(Epoch(self.obeyed.counter - 1, self.obeyed.node))


TestElectionMachine = ElectionMachine.TestCase
TestElectionMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
