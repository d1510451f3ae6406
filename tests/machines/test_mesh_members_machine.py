"""Whatever order links, messages and time come in, and however hostile: the table keeps its rules."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tightwad_agent.mesh import members as mb
from tightwad_agent.mesh.members import Fate, Members, Rumour, State
from tightwad_agent.testing import node_id

ME = node_id("me")
NODES = [node_id(f"n{k}") for k in range(4)]
nodes = st.sampled_from(NODES)
anyone = st.sampled_from([*NODES, ME])
incarnations = st.integers(0, 4) | st.integers(0, 2**62)
spans = st.floats(0.0, 20.0) | st.sampled_from([0.0, 1e-9, 0.25, 0.5, 1.0, 2.5, 4.0, 3600.0])
rumours = st.builds(Rumour, anyone, st.sampled_from(State), incarnations)


class MembersMachine(RuleBasedStateMachine):
    """Any events in any order; the model is what may never go back."""

    @initialize(incarnation=st.integers(1, 3))
    def start(self, incarnation: int) -> None:
        self.now = 50.0
        self.members = Members(ME, incarnation, self.now)
        self.records: dict[str, tuple[int, Fate]] = {}
        self.shown: dict[str, State | None] = {}
        self.incarnation = incarnation
        self.left = False
        self.do(mb.Tick())

    def do(self, event: mb.Event) -> None:
        linked = {p.node for p in self.members.snapshot().peers if p.linked}
        effects = self.members.handle(event, self.now)
        linked |= {p.node for p in self.members.snapshot().peers if p.linked}
        refuted = False
        for effect in effects:
            match effect:
                case mb.StateChanged(node, old, new):
                    assert self.shown.get(node) == old
                    self.shown[node] = new
                case mb.Refuted(incarnation):
                    assert incarnation > self.incarnation
                    assert not self.left
                    self.incarnation = incarnation
                    refuted = True
                case mb.TellAll(told):
                    for rumour in told:
                        if rumour.node == ME and not self.left and rumour.state is State.ALIVE:
                            assert refuted, "announced before it was persisted"
                            assert rumour.incarnation == self.incarnation
                case mb.SendHeartbeat(node, _, _, ago) | mb.Answer(node, _, _, _, ago):
                    assert node != ME
                    assert 0.0 <= ago <= mb.NEVER_S
                case mb.Ask(node, about):
                    assert node in linked
                    assert node != about
                case mb.Redial(node) | mb.Disconnect(node) | mb.SendProbe(node):
                    assert node != ME
        assert self.incarnation == self.members.incarnation

    @rule(node=nodes, incarnation=incarnations)
    def link_up(self, node: str, incarnation: int) -> None:
        self.do(mb.LinkUp(node, incarnation))

    @rule(node=nodes, clean=st.booleans())
    def link_down(self, node: str, clean: bool) -> None:
        self.do(mb.LinkDown(node, clean))

    @rule(node=nodes, refused=st.booleans())
    def redial_failed(self, node: str, refused: bool) -> None:
        self.do(mb.RedialFailed(node, refused))

    @rule(node=nodes)
    def heard(self, node: str) -> None:
        self.do(mb.Heard(node))

    @rule(node=nodes, incarnation=incarnations, digest=st.binary(max_size=2), ago=st.floats(-5, 1e9))
    def heartbeat(self, node: str, incarnation: int, digest: bytes, ago: float) -> None:
        self.do(mb.HeartbeatReceived(node, incarnation, digest, ago))

    @rule(node=nodes)
    def probed(self, node: str) -> None:
        self.do(mb.Probed(node))

    @rule(node=nodes, told=st.lists(rumours, max_size=4))
    def told(self, node: str, told: list[Rumour]) -> None:
        self.do(mb.RumoursReceived(node, tuple(told)))

    @rule(node=nodes, about=anyone, at=st.floats(-1e9, 1e9))
    def asked(self, node: str, about: str, at: float) -> None:
        self.do(mb.Asked(node, about, at))

    @rule(node=nodes, about=anyone, ago=st.floats(-5, 1e9), reachable=st.booleans(), back=st.floats(-5, 20))
    def answered(self, node: str, about: str, ago: float, reachable: bool, back: float) -> None:
        self.do(mb.Answered(node, about, self.now - back, reachable, ago))

    @rule(node=nodes)
    def remembered(self, node: str) -> None:
        self.do(mb.Remembered(node))

    @rule(node=nodes)
    def forget(self, node: str) -> None:
        self.do(mb.Forget(node))
        self.records.pop(node, None)
        self.shown.pop(node, None)

    @rule(late=st.floats(0, 100))
    def late(self, late: float) -> None:
        self.do(mb.LocalLate(late))

    @rule()
    def leave(self) -> None:
        self.left = True
        self.do(mb.LeaveRequested())

    @rule(span=spans)
    def pass_time(self, span: float) -> None:
        self.now += span
        self.do(mb.Tick())

    @rule(n=st.integers(1, 12))
    def run_on_time(self, n: int) -> None:
        for _ in range(n):
            due = self.members.next_deadline()
            if due is None:
                return
            self.now = max(self.now, due)
            self.do(mb.Tick())

    @invariant()
    def a_deadline_passes(self) -> None:
        if not hasattr(self, "members"):
            return
        due = self.members.next_deadline()
        assert due is None or (due > self.now and due < math.inf)

    @invariant()
    def records_only_grow(self) -> None:
        if not hasattr(self, "members"):
            return
        for node, peer in self.members._peers.items():
            assert peer.record >= self.records.get(node, (0, Fate.ALIVE))
            self.records[node] = peer.record

    @invariant()
    def opinions_fit_the_records(self) -> None:
        if not hasattr(self, "members"):
            return
        for view in self.members.snapshot().peers:
            fate = self.members._peers[view.node].fate
            assert view.state.living == (fate is Fate.ALIVE)
            assert self.shown.get(view.node) == view.state
            assert (view.reach == "none") == (view.state is not State.ALIVE)
            assert view.node != ME


TestMembersMachine = MembersMachine.TestCase
TestMembersMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
