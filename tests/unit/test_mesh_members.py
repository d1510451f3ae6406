"""What one node makes of links, silence, answers and rumours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import pytest

from tightwad_agent.mesh import members as mb
from tightwad_agent.mesh.members import Members, Reach, Rumour, State
from tightwad_agent.testing import node_id

T = TypeVar("T")
ME, A, B, C, D, E = (node_id(name) for name in ("me", "a", "b", "c", "d", "e"))


class Rig:
    """One machine, a clock, and peers that heartbeat unless they are silent."""

    def __init__(self, *peers: Any, timings: mb.Timings = mb.LAN) -> None:
        self.now = 100.0
        self.members = Members(ME, 5, self.now, timings)
        self.effects: list[mb.Effect] = []
        self.beating = list(peers)
        for peer in peers:
            self.do(mb.LinkUp(peer, 1))

    def do(self, event: mb.Event) -> list[mb.Effect]:
        """Hands in one event; gives its effects and keeps them in `effects`."""
        effects = self.members.handle(event, self.now)
        self.effects += effects
        return effects

    def beat(self, peer: Any, *, incarnation: int = 1, heard_ago_s: float = 0.0, digest: bytes | None = None) -> None:
        same = digest if digest is not None else self.members._own_digest()
        self.do(mb.HeartbeatReceived(peer, incarnation, same, heard_ago_s))

    def run(self, seconds: float) -> list[mb.Effect]:
        """Lets time pass, on time; gives all effects of it."""
        self.effects = []
        end = self.now + seconds
        next_beat = self.now
        while self.now < end:
            due = self.members.next_deadline()
            assert due is not None
            assert due > self.now, "a deadline that does not pass"
            self.now = min(due, next_beat, end)
            if self.now == next_beat:
                next_beat += 0.5
                for peer in self.beating:
                    self.beat(peer)
            if self.now >= due:
                self.do(mb.Tick())
        return self.effects

    def view(self, peer: Any) -> mb.PeerView:
        return next(p for p in self.members.snapshot().peers if p.node == peer)

    def state(self, peer: Any) -> State:
        return self.view(peer).state


def of(kind: type[T], effects: list[mb.Effect]) -> list[T]:
    return [e for e in effects if isinstance(e, kind)]


def test_a_heartbeat_goes_to_every_link_each_second() -> None:
    rig = Rig(A, B)
    beats = of(mb.SendHeartbeat, rig.run(10.0))
    for peer in (A, B):
        assert sum(b.node == peer for b in beats) == pytest.approx(10, abs=1)
    assert {b.incarnation for b in beats} == {5}
    assert all(b.heard_ago_s <= 0.51 for b in beats)


def test_a_node_nobody_told_of_is_in_no_table() -> None:
    rig = Rig(A)
    assert rig.do(mb.Heard(B)) == []
    rig.beat(B)
    assert [p.node for p in rig.members.snapshot().peers] == [A]


def test_silence_is_suspected_after_two_and_a_half_seconds_and_fatal_after_four() -> None:
    rig = Rig(A, B)
    rig.run(5.0)
    rig.beating.remove(A)
    last = rig.view(A).heard_at
    rig.run(last + 2.49 - rig.now)
    assert rig.state(A) is State.ALIVE
    effects = rig.run(0.03)
    assert rig.state(A) is State.SUSPECT
    assert mb.TellAll((Rumour(A, State.SUSPECT, 1),)) in effects
    assert of(mb.SendProbe, effects) == [mb.SendProbe(A)]
    assert mb.Redial(A) in effects
    rig.run(last + 3.98 - rig.now)
    assert rig.state(A) is State.SUSPECT
    effects = rig.run(0.05)
    assert rig.state(A) is State.DEAD
    assert mb.Disconnect(A) in effects
    assert mb.TellAll((Rumour(A, State.DEAD, 1),)) in effects
    assert "no sign of life" in rig.view(A).reason


def test_a_heartbeat_that_heard_us_a_second_ago_shows_life_when_it_came() -> None:
    rig = Rig(B)
    rig.do(mb.LinkUp(A, 1))
    for _ in range(3):
        rig.run(1.0)
        last = rig.now
        rig.beat(A, heard_ago_s=0.95)
    rig.run(last + 3.98 - rig.now)
    assert rig.state(A) is State.SUSPECT
    rig.run(0.05)
    assert rig.state(A) is State.DEAD


def test_any_message_is_a_sign_of_life() -> None:
    rig = Rig(A, B)
    rig.beating.remove(A)
    for _ in range(10):
        rig.run(1.0)
        rig.do(mb.Heard(A))
        rig.members._peers[A].echo = rig.now
    assert rig.state(A) is State.ALIVE


def test_a_broken_link_is_suspected_at_once_and_asked_about() -> None:
    rig = Rig(A, B, C, D, E)
    effects = rig.do(mb.LinkDown(A))
    assert rig.state(A) is State.SUSPECT
    assert mb.Redial(A) in effects
    assert len(of(mb.Ask, effects)) == 3
    assert {a.about for a in of(mb.Ask, effects)} == {A}
    assert rig.view(A).reason == "the connection broke"


def test_a_link_closed_on_purpose_says_so() -> None:
    rig = Rig(A, B)
    rig.do(mb.LinkDown(A, clean=True))
    assert rig.view(A).reason == "closed the connection"


def test_a_refused_redial_after_a_break_is_death_when_the_others_agree() -> None:
    rig = Rig(A, B)
    ask = of(mb.Ask, rig.do(mb.LinkDown(A)))[0]
    rig.do(mb.Answered(B, A, ask.asked_at, reachable=False, ago_s=0.4))
    assert rig.state(A) is State.SUSPECT
    effects = rig.do(mb.RedialFailed(A, refused=True))
    assert rig.state(A) is State.DEAD
    assert "process is gone" in rig.view(A).reason
    assert mb.TellAll((Rumour(A, State.DEAD, 1),)) in effects


def test_a_refused_redial_waits_a_quarter_second_for_answers_at_most() -> None:
    rig = Rig(A, B)
    rig.do(mb.LinkDown(A))
    rig.do(mb.RedialFailed(A, refused=True))
    rig.run(0.24)
    assert rig.state(A) is State.SUSPECT
    rig.run(0.03)
    assert rig.state(A) is State.DEAD


def test_a_refused_redial_is_no_death_while_somebody_reaches_it() -> None:
    rig = Rig(A, B)
    ask = of(mb.Ask, rig.do(mb.LinkDown(A)))[0]
    rig.now += 0.1
    rig.do(mb.Answered(B, A, ask.asked_at, reachable=True, ago_s=0.3))
    rig.do(mb.RedialFailed(A, refused=True))
    rig.run(0.5)
    assert rig.state(A) is State.SUSPECT
    rig.do(mb.RumoursReceived(B, (Rumour(A, State.SUSPECT, 1),)))  # now B lost it, too
    rig.run(0.3)
    assert rig.state(A) is State.DEAD


def test_a_yes_that_is_not_repeated_protects_for_a_second_only() -> None:
    rig = Rig(A, B)
    ask = of(mb.Ask, rig.do(mb.LinkDown(A)))[0]
    rig.do(mb.Answered(B, A, ask.asked_at, reachable=True, ago_s=0.3))
    rig.do(mb.RedialFailed(A, refused=True))
    rig.run(1.1)
    assert rig.state(A) is State.SUSPECT
    rig.run(0.2)
    assert rig.state(A) is State.DEAD


def test_a_redial_that_only_times_out_proves_nothing() -> None:
    rig = Rig(A)
    rig.do(mb.LinkDown(A))
    rig.do(mb.RedialFailed(A, refused=False))
    rig.run(2.0)
    assert rig.state(A) is State.SUSPECT


def test_a_port_that_closes_after_the_link_is_tried_again_at_once() -> None:
    rig = Rig(A)
    rig.do(mb.LinkDown(A))
    rig.now += 0.01
    assert of(mb.Redial, rig.do(mb.RedialFailed(A, refused=False))) == []
    assert len(of(mb.Redial, rig.run(0.11))) == 1
    rig.do(mb.RedialFailed(A, refused=True))
    rig.run(0.3)
    assert rig.state(A) is State.DEAD


def test_a_redial_that_fails_later_is_not_repeated_sooner() -> None:
    rig = Rig(A)
    rig.do(mb.LinkDown(A))
    rig.run(1.2)
    rig.do(mb.RedialFailed(A, refused=False))
    assert of(mb.Redial, rig.run(0.5)) == []


def test_one_yes_means_alive_but_not_from_here() -> None:
    rig = Rig(A, B)
    rig.do(mb.LinkDown(A))
    rig.run(0.6)
    for _ in range(20):
        ask = [a for a in of(mb.Ask, rig.effects) if a.about == A][-1]
        rig.do(mb.Answered(B, A, ask.asked_at, reachable=True, ago_s=0.2))
        assert (rig.state(A), rig.view(A).reach) == (State.ALIVE, Reach.INDIRECT)
        assert B.short in rig.view(A).reason
        rig.run(0.6)
    rig.beating.remove(B)
    rig.run(5.0)  # no more answers
    assert rig.state(A) is State.DEAD


def test_old_proof_of_life_does_not_keep_anyone_alive() -> None:
    rig = Rig(A, B)
    rig.do(mb.LinkDown(A))
    for _ in range(10):
        rig.run(0.5)
        rig.do(mb.Answered(B, A, rig.now, reachable=False, ago_s=10.0))
    assert rig.state(A) is State.DEAD


def test_an_answer_from_the_future_is_not_believed() -> None:
    rig = Rig(A, B)
    rig.do(mb.LinkDown(A))
    rig.do(mb.Answered(B, A, rig.now + 1000.0, reachable=True, ago_s=0.0))
    rig.do(mb.Answered(B, A, rig.now, reachable=False, ago_s=-1000.0))
    rig.run(4.2)
    assert rig.state(A) is State.DEAD


def test_a_node_that_does_not_hear_us_is_suspected_although_it_speaks() -> None:
    rig = Rig(B)
    rig.do(mb.LinkUp(A, 1))
    start = rig.now
    while rig.now < start + 5.0:
        rig.run(0.1)
        rig.beat(A, heard_ago_s=rig.now - start)
        if not 2.75 < rig.now - start < 2.85:
            assert rig.state(A) is (State.ALIVE if rig.now < start + 2.8 else State.SUSPECT)
    rig.run(0.5)
    assert rig.state(A) is State.DEAD


def test_a_question_is_answered_with_what_we_know_ourselves() -> None:
    rig = Rig(A, B)
    rig.run(2.0)
    (answer,) = of(mb.Answer, rig.do(mb.Asked(B, A, 7.5)))
    assert (answer.node, answer.about, answer.asked_at, answer.reachable) == (B, A, 7.5, True)
    assert answer.ago_s <= 0.5
    (about_me,) = of(mb.Answer, rig.do(mb.Asked(B, ME, 1.0)))
    assert (about_me.reachable, about_me.ago_s) == (True, 0.0)
    (unknown,) = of(mb.Answer, rig.do(mb.Asked(B, C, 1.0)))
    assert (unknown.reachable, unknown.ago_s) == (False, mb.NEVER_S)
    rig.do(mb.LinkDown(A))
    rig.run(1.0)
    (lost,) = of(mb.Answer, rig.do(mb.Asked(B, A, 1.0)))
    assert not lost.reachable
    assert lost.ago_s == pytest.approx(1.0, abs=0.6)


def test_a_probe_is_answered_with_a_heartbeat() -> None:
    rig = Rig(A)
    assert [b.node for b in of(mb.SendHeartbeat, rig.do(mb.Probed(A)))] == [A]


@pytest.mark.parametrize("state", [State.DEAD, State.LEFT])
def test_a_rumour_about_oneself_is_refuted_with_a_higher_incarnation(state: State) -> None:
    rig = Rig(A)
    effects = rig.do(mb.RumoursReceived(A, (Rumour(ME, state, 5),)))
    assert effects[:2] == [mb.Refuted(6), mb.TellAll((Rumour(ME, State.ALIVE, 6),))]
    assert rig.members.incarnation == 6
    assert of(mb.Refuted, rig.do(mb.RumoursReceived(A, (Rumour(ME, state, 5),)))) == []


def test_a_higher_incarnation_of_oneself_was_forgotten_and_is_passed() -> None:
    rig = Rig(A)
    rig.do(mb.RumoursReceived(A, (Rumour(ME, State.ALIVE, 9),)))
    assert rig.members.incarnation == 10


def test_a_suspicion_of_oneself_is_answered_with_a_heartbeat() -> None:
    rig = Rig(A)
    effects = rig.do(mb.RumoursReceived(A, (Rumour(ME, State.SUSPECT, 5),)))
    assert [b.node for b in of(mb.SendHeartbeat, effects)] == [A]
    assert rig.members.incarnation == 5


def test_hearsay_does_not_outrank_an_own_fresh_link_and_the_accused_is_told() -> None:
    rig = Rig(A, B)
    effects = rig.do(mb.RumoursReceived(B, (Rumour(A, State.DEAD, 1),)))
    assert rig.state(A) is State.ALIVE
    assert mb.Tell(A, (Rumour(A, State.DEAD, 1),)) in effects
    rig.do(mb.RumoursReceived(A, (Rumour(A, State.ALIVE, 2),)))
    assert (rig.state(A), rig.view(A).incarnation) == (State.ALIVE, 2)


def test_hearsay_is_believed_of_a_node_we_cannot_reach() -> None:
    rig = Rig(A, B)
    rig.do(mb.LinkDown(A))
    rig.run(2.6)
    rig.do(mb.RumoursReceived(B, (Rumour(A, State.DEAD, 1),)))
    assert rig.state(A) is State.DEAD
    assert B.short in rig.view(A).reason


@pytest.mark.parametrize("told", [True, False])
def test_hearsay_shortens_the_patience_of_a_node_that_is_late_itself(told: bool) -> None:
    rig = Rig(A, B)
    rig.beating.remove(A)
    rig.run(1.0)
    if told:
        rig.do(mb.RumoursReceived(B, (Rumour(A, State.DEAD, 1),)))
        assert rig.state(A) is State.ALIVE
    for _ in range(10):
        rig.do(mb.LocalLate(7.0))
        rig.run(0.5)
    assert rig.state(A) is (State.DEAD if told else State.ALIVE)


def test_who_vouched_for_a_node_may_report_its_death() -> None:
    rig = Rig(A, B, C)
    rig.do(mb.LinkDown(A))
    for _ in range(6):
        rig.run(0.5)
        rig.do(mb.Answered(B, A, rig.now, reachable=True, ago_s=0.1))
    rig.do(mb.RumoursReceived(C, (Rumour(A, State.DEAD, 1),)))
    assert rig.state(A) is State.ALIVE
    rig.do(mb.RumoursReceived(B, (Rumour(A, State.DEAD, 1),)))
    assert rig.state(A) is State.DEAD


def test_a_dead_node_that_links_again_has_to_contradict_its_death() -> None:
    rig = Rig(A, B)
    rig.do(mb.LinkDown(A))
    rig.run(5.0)
    assert rig.state(A) is State.DEAD
    rig.do(mb.LinkUp(A, 1))
    assert rig.state(A) is State.DEAD
    effects = rig.do(mb.HeartbeatReceived(A, 1, b"", 0.0))
    assert mb.Tell(A, (Rumour(A, State.DEAD, 1),)) in effects
    rig.do(mb.RumoursReceived(A, (Rumour(A, State.ALIVE, 2),)))
    assert (rig.state(A), rig.view(A).reach) == (State.ALIVE, Reach.DIRECT)


def test_a_restarted_node_is_alive_at_its_new_incarnation() -> None:
    rig = Rig(A)
    rig.do(mb.LinkDown(A))
    rig.do(mb.RedialFailed(A, refused=True))
    rig.run(0.3)
    assert rig.state(A) is State.DEAD
    rig.do(mb.LinkUp(A, 2))
    assert rig.state(A) is State.ALIVE


def test_a_broken_link_of_a_dead_node_does_not_end_the_redials() -> None:
    rig = Rig(A)
    rig.do(mb.LinkDown(A))
    rig.run(5.0)
    rig.do(mb.LinkUp(A, 1))
    rig.do(mb.LinkDown(A))
    assert rig.state(A) is State.DEAD
    assert mb.Redial(A) in rig.run(3.0)


def test_the_dead_are_redialled_and_all_at_once_when_one_returns() -> None:
    rig = Rig(A, B)
    for peer in (A, B):
        rig.beating.remove(peer)
        rig.do(mb.LinkDown(peer))
    rig.run(5.0)
    assert len([r for r in of(mb.Redial, rig.run(10.0)) if r.node == A]) == 5
    assert mb.Redial(B) in rig.do(mb.LinkUp(A, 2))


def test_leaving_is_told_and_is_not_dying() -> None:
    rig = Rig(A, B)
    effects = rig.do(mb.LeaveRequested())
    assert effects == [mb.TellAll((Rumour(ME, State.LEFT, 5),))]
    assert rig.do(mb.LeaveRequested()) == []
    assert rig.do(mb.RumoursReceived(A, (Rumour(ME, State.LEFT, 5),))) == []
    assert rig.members.snapshot().left
    assert of(mb.SendHeartbeat, rig.run(1.0)) == []


def test_a_node_that_left_by_its_own_word_is_not_redialled() -> None:
    rig = Rig(A, B)
    effects = rig.do(mb.RumoursReceived(A, (Rumour(A, State.LEFT, 1),)))
    assert rig.state(A) is State.LEFT
    assert mb.Disconnect(A) in effects
    rig.do(mb.RumoursReceived(B, (Rumour(A, State.DEAD, 1),)))
    assert rig.state(A) is State.LEFT
    assert mb.Redial(A) not in rig.run(10.0)
    rig.do(mb.LinkUp(A, 2))
    assert rig.state(A) is State.ALIVE


def test_after_an_own_stall_nobody_is_accused() -> None:
    rig = Rig(A, B, C)
    rig.run(3.0)
    rig.now += 60.0
    effects = rig.do(mb.Tick())
    assert of(mb.TellAll, effects) == []
    assert {rig.state(p) for p in (A, B, C)} == {State.ALIVE}  # it was not they who were silent
    assert rig.members.snapshot().stretch == mb.LAN.max_stretch
    rig.run(3.0)
    assert {rig.state(p) for p in (A, B, C)} == {State.ALIVE}
    assert rig.members.snapshot().stretch < 1.2


def test_after_an_own_stall_nobody_is_told_that_he_was_not_heard() -> None:
    """What they sent meanwhile lies unread; a second stall before it is read must not be the end of this node."""
    rig = Rig(A, B)
    rig.run(3.0)
    rig.now += 2.0
    beats = of(mb.SendHeartbeat, rig.do(mb.Tick()))
    assert {beat.node for beat in beats} == {A, B}
    assert all(beat.heard_ago_s <= 0.5 for beat in beats)
    rig.beating.remove(A)
    later = [beat.heard_ago_s for beat in of(mb.SendHeartbeat, rig.run(2.3)) if beat.node == A]
    assert later[-1] > 1.0, "silence since then is told"


def test_after_an_own_stall_the_next_heartbeat_follows_what_lay_unread() -> None:
    """The first one may be sent before it is read, and nobody knows when the next stall comes."""
    rig = Rig(A, B)
    rig.run(3.0)
    rig.now += 2.0
    assert of(mb.SendHeartbeat, rig.do(mb.Tick()))
    for peer in (A, B):
        rig.beat(peer)
    again = of(mb.SendHeartbeat, rig.run(0.15))
    assert {beat.node for beat in again} == {A, B}
    assert all(beat.heard_ago_s <= 0.15 for beat in again)
    assert of(mb.SendHeartbeat, rig.run(0.3)) == []


def test_without_minding_its_own_stall_it_would_accuse_everybody() -> None:
    rig = Rig(A, B, C, timings=replace(mb.LAN, late_s=1e9, ask_s=0.0))
    rig.run(3.0)
    rig.now += 12.0
    rig.do(mb.Tick())
    assert {rig.state(p) for p in (A, B, C)} == {State.DEAD}


def test_a_late_loop_told_by_the_shell_stretches_the_patience() -> None:
    rig = Rig(A, B)
    rig.beating.remove(A)
    rig.run(2.0)
    for _ in range(10):
        rig.do(mb.LocalLate(1.0))
        rig.run(0.5)
    assert rig.state(A).living  # after 7 s of silence
    rig.do(mb.LocalLate(0.1))  # below notice
    rig.run(5.0)
    assert rig.state(A) is State.DEAD


def test_when_most_are_silent_at_once_nobody_is_accused_aloud() -> None:
    rig = Rig(A, B, C, D)
    rig.beating = [D]
    effects = rig.run(5.0)
    assert {rig.state(p) for p in (A, B, C)} == {State.DEAD}
    told = [t for t in of(mb.TellAll, effects) if t.rumours[0].node != ME]
    assert len(told) <= 2  # the first was silent before most were


def test_nobody_dies_before_the_others_had_time_to_answer() -> None:
    rig = Rig(A, B)
    rig.beating.remove(A)
    for _ in range(26):  # so strained that suspicion comes late, and the deadline is close behind
        rig.do(mb.LocalLate(9.0))
        rig.run(0.5)
    assert rig.state(A) is State.ALIVE
    while rig.state(A) is State.ALIVE:
        rig.run(0.02)
    suspected_at = rig.view(A).since
    while rig.state(A) is State.SUSPECT:
        rig.run(0.02)
    assert rig.state(A) is State.DEAD
    assert rig.view(A).since - suspected_at > mb.LAN.ask_s - 1e-6


def test_views_that_differ_are_told_whole_and_ever_less_often() -> None:
    rig = Rig(A, B)
    n_tables = 0
    for _ in range(60):
        rig.run(1.0)
        effects = rig.do(mb.HeartbeatReceived(A, 1, b"other", 0.0))
        n_tables += len([t for t in of(mb.Tell, effects) if t.node == A and len(t.rumours) == 3])
    assert 4 <= n_tables <= 8
    table = next(t for t in of(mb.Tell, rig.do(mb.HeartbeatReceived(A, 1, b"new", 0.0))))
    assert set(table.rumours) == {
        Rumour(ME, State.ALIVE, 5),
        Rumour(A, State.ALIVE, 1),
        Rumour(B, State.ALIVE, 1),
    }


def test_equal_views_have_equal_digests_whatever_the_order() -> None:
    one, two = Members(A, 1, 0.0), Members(B, 1, 0.0)
    one.handle(mb.LinkUp(B, 1), 0.0)
    one.handle(mb.LinkUp(C, 3), 0.0)
    two.handle(mb.LinkUp(C, 3), 0.0)
    assert one._own_digest() != two._own_digest()
    two.handle(mb.LinkUp(A, 1), 0.0)
    assert one._own_digest() == two._own_digest()


def test_a_node_heard_of_is_suspect_until_somebody_reaches_it() -> None:
    rig = Rig(A)
    effects = rig.do(mb.RumoursReceived(A, (Rumour(C, State.ALIVE, 4),)))
    assert rig.state(C) is State.SUSPECT
    assert mb.Redial(C) in effects
    assert [a.node for a in of(mb.Ask, effects)] == [A]
    rig.run(2.0)
    assert rig.state(C) is State.DEAD


def test_a_remembered_peer_is_shown_and_redialled_and_harms_nobody() -> None:
    rig = Rig(A)
    effects = rig.do(mb.Remembered(C))
    assert (rig.state(C), rig.view(C).incarnation) == (State.DEAD, 0)
    assert mb.Redial(C) in effects
    assert rig.do(mb.Remembered(C)) == []
    rig.do(mb.RumoursReceived(A, (Rumour(C, State.ALIVE, 1),)))
    assert rig.state(C) is State.SUSPECT


def test_forgotten_is_forgotten_until_it_lives_again() -> None:
    rig = Rig(A, B)
    assert mb.Disconnect(B) in rig.do(mb.Forget(B))
    rig.beating.remove(B)
    rig.do(mb.Remembered(C))
    assert rig.do(mb.Forget(C)) == []
    assert rig.do(mb.Forget(B)) == []
    rig.do(mb.RumoursReceived(A, (Rumour(B, State.DEAD, 1), Rumour(B, State.ALIVE, 1))))
    assert [p.node for p in rig.members.snapshot().peers] == [A]
    rig.do(mb.RumoursReceived(A, (Rumour(B, State.ALIVE, 2),)))
    assert rig.state(B) is State.SUSPECT


def test_absurd_rumours_are_not_believed() -> None:
    rig = Rig(A, B)
    far = mb.MAX_INCARNATION_JUMP + 10
    effects = rig.do(
        mb.RumoursReceived(B, (Rumour(A, State.DEAD, far), Rumour(ME, State.DEAD, far), Rumour(C, State.ALIVE, far)))
    )
    assert effects == []
    assert rig.members.incarnation == 5
    assert rig.view(A).incarnation == 1


def test_the_table_is_bounded() -> None:
    rig = Rig(A)
    for k in range(2 * mb.MAX_NODES):
        rig.do(mb.RumoursReceived(A, (Rumour(node_id(f"x{k}"), State.ALIVE, 1),)))
    assert len(rig.members.snapshot().peers) == mb.MAX_NODES
    rig.do(mb.LinkUp(node_id("one more"), 1))
    rig.do(mb.Remembered(node_id("yet one more")))
    assert len(rig.members.snapshot().peers) == mb.MAX_NODES
    for peer in list(rig.members.snapshot().peers):
        rig.do(mb.Forget(peer.node))
    assert len(rig.members._forgotten) <= mb.MAX_NODES


def test_at_most_three_are_asked_at_a_time_and_in_turn_all() -> None:
    others = [node_id(f"o{k}") for k in range(9)]
    rig = Rig(A, *others)
    rig.beating.remove(A)
    effects = rig.do(mb.LinkDown(A))
    asked = {a.node for a in of(mb.Ask, effects)}
    assert len(asked) == 3
    asked |= {a.node for a in of(mb.Ask, rig.run(1.2))}
    assert asked == set(others)


def test_a_refusal_before_an_own_stall_counts_from_after_it() -> None:
    rig = Rig(A, B)
    rig.do(mb.LinkDown(A))
    rig.do(mb.RedialFailed(A, refused=True))
    rig.now += 8.0
    rig.do(mb.Tick())
    assert rig.state(A) is State.SUSPECT
    rig.run(4.2)
    assert rig.state(A) is State.DEAD


def test_what_lies_unread_after_a_stall_may_contradict_hearsay() -> None:
    rig = Rig(A, B)
    rig.now += 12.0
    rig.do(mb.RumoursReceived(B, (Rumour(A, State.DEAD, 1),)))
    assert rig.state(A).living
    rig.run(0.5)
    rig.beat(A)
    rig.run(1.0)
    assert rig.state(A) is State.ALIVE


def test_the_age_of_a_proof_of_life_counts_from_the_question() -> None:
    rig = Rig(A, B)
    ask = of(mb.Ask, rig.do(mb.LinkDown(A)))[0]
    rig.now += 2.0  # a slow answer: meanwhile it may have died
    rig.do(mb.Answered(B, A, ask.asked_at, reachable=True, ago_s=0.0))
    assert rig.state(A) is State.SUSPECT


def test_a_link_down_of_nobody_is_nothing() -> None:
    rig = Rig(A)
    assert rig.do(mb.LinkDown(C)) == []
    assert rig.do(mb.RedialFailed(C, refused=True)) == []
    assert rig.do(mb.RedialFailed(A, refused=True)) == []
    assert rig.do(mb.LinkUp(ME, 1)) == []


def test_alone_and_gone_there_is_no_deadline() -> None:
    rig = Rig()
    assert rig.members.next_deadline() is not None
    rig.do(mb.LeaveRequested())
    assert rig.members.next_deadline() is None
