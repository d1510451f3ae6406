"""One node's part in choosing the coordinator."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest

from tightwad_agent.ids import NO_EPOCH, Epoch
from tightwad_agent.mesh import election as el
from tightwad_agent.mesh.election import Candidate, Election
from tightwad_agent.testing import node_id
from tightwad_agent.wire.rows import Stamp

T = TypeVar("T")
ME, A, B, C = (node_id(name) for name in ("me", "a", "b", "c"))


def candidate(node: Any, klass: int = 1, joined_at: int = 50, **facts: Any) -> Candidate:
    return Candidate(node, **{"eligible": True, "klass": klass, "joined_at": joined_at, "linked": node != ME, **facts})


def claim(counter: int, node: Any) -> Stamp:
    return Stamp(Epoch(counter, node), node)


class Rig:
    """One machine and a clock. `others` are better or worse candidates by their class; this node has class 1."""

    def __init__(self, *others: Candidate, persisted: Epoch = NO_EPOCH, **mine: Any) -> None:
        self.now = 100.0
        self.election = Election(ME, self.now, persisted)
        self.mine = candidate(ME, **mine)
        self.see(*others)

    def do(self, event: el.Event) -> list[el.Effect]:
        return self.election.handle(event, self.now)

    def see(self, *others: Candidate, unresolved: int = 0) -> list[el.Effect]:
        return self.do(el.View((self.mine, *others), unresolved))

    def hear(self, node: Any, stamp: Stamp) -> list[el.Effect]:
        return self.do(el.StampHeard(node, stamp))

    def run(self, seconds: float) -> list[el.Effect]:
        """Lets time pass, on time."""
        effects, end = [], self.now + seconds
        while (due := self.election.next_deadline()) is not None and due <= end:
            assert due > self.now, "a deadline that does not pass"
            self.now = due
            effects += self.do(el.Tick())
        self.now = end
        return effects

    def rounds(self, effects: list[el.Effect]) -> int:
        return max((e.round for e in effects if isinstance(e, el.AskPreCheck)), default=0)


def of(kind: type[T], effects: list[el.Effect]) -> list[T]:
    return [e for e in effects if isinstance(e, kind)]


def test_alone_it_coordinates_after_the_settle_time() -> None:
    rig = Rig()
    assert rig.run(0.99) == []
    effects = rig.run(0.02)
    epoch = Epoch(1, ME)
    assert [type(e) for e in effects] == [el.Persist, el.CoordinatorChanged, el.Announce]
    assert effects[0] == el.Persist(epoch)
    assert effects[2] == el.Announce(Stamp(epoch, ME))
    assert rig.election.coordinating
    assert rig.election.next_deadline() is None


def test_while_remembered_peers_are_being_dialled_it_waits_longer() -> None:
    rig = Rig()
    rig.see(unresolved=1)
    assert rig.run(2.9) == []
    assert of(el.Announce, rig.run(0.2))


def test_peers_that_were_all_tried_end_the_waiting() -> None:
    rig = Rig()
    rig.see(unresolved=1)
    rig.run(1.5)
    assert of(el.Announce, rig.see(unresolved=0))


def test_an_ineligible_node_never_claims() -> None:
    rig = Rig(eligible=False)
    assert rig.run(60.0) == []
    assert rig.election.next_deadline() is None


def test_the_best_asks_everybody_first() -> None:
    rig = Rig(candidate(A, klass=0), candidate(B, klass=0))
    effects = rig.run(1.1)
    assert {e.node for e in of(el.AskPreCheck, effects)} == {A, B}
    assert of(el.Persist, effects) == []
    number = rig.rounds(effects)
    assert rig.do(el.PreCheckAnswered(A, number, Stamp(NO_EPOCH, None))) == []
    effects = rig.do(el.PreCheckAnswered(B, number, Stamp(Epoch(7, C), None)))
    assert el.Persist(Epoch(8, ME)) in effects


def test_where_nobody_can_be_asked_the_suspects_get_time_to_return() -> None:
    rig = Rig(candidate(A, klass=2), candidate(B, klass=0))
    rig.hear(A, claim(3, A))
    rig.run(5.0)
    alone = candidate(B, klass=0, linked=False, suspect=True)
    assert of(el.Announce, rig.see(alone)) == []  # A is dead, and B's link has just broken
    assert of(el.Announce, rig.run(0.3)) == []
    effects = rig.see(candidate(B, klass=0))
    assert of(el.AskPreCheck, effects) == [el.AskPreCheck(B, 1)]
    rig.do(el.PreCheckAnswered(B, 1, claim(4, B)))
    assert rig.election.coordinator == B


@pytest.mark.parametrize(("suspect", "waits_s"), [(True, el.LAN.precheck_s), (False, 0.0)])
def test_nobody_waits_for_suspects_for_long_nor_for_the_dead(suspect: bool, waits_s: float) -> None:
    rig = Rig(candidate(A, klass=2), candidate(B, klass=0))
    rig.hear(A, claim(3, A))
    rig.run(5.0)
    left = (candidate(B, klass=0, linked=False, suspect=True),) if suspect else ()
    effects, began = rig.see(*left), rig.now
    while not of(el.Announce, effects):
        effects = rig.run(0.05)
    assert rig.now - began == pytest.approx(waits_s, abs=0.06)


def test_who_does_not_answer_is_asked_again_and_cannot_hold_it_up() -> None:
    rig = Rig(candidate(A, klass=0))
    effects = rig.run(1.0 + el.LAN.precheck_s + 0.01)
    assert len(of(el.AskPreCheck, effects)) >= 3
    assert of(el.Announce, effects)


def test_a_suspect_is_not_asked() -> None:
    rig = Rig(candidate(A, klass=0, suspect=True), candidate(B, klass=0, linked=False))
    effects = rig.run(1.01 + el.LAN.precheck_s)
    assert of(el.AskPreCheck, effects) == []
    assert of(el.Announce, effects)


def test_somebody_who_sees_a_coordinator_stops_the_claim() -> None:
    rig = Rig(candidate(A, klass=0), persisted=Epoch(3, C))
    effects: list[el.Effect] = []
    for _ in range(20):
        number = rig.rounds(rig.run(0.4)) or rig.election._round
        effects += rig.do(el.PreCheckAnswered(A, number, claim(3, C)))
    assert of(el.Announce, effects) == []
    effects = rig.see(candidate(A, klass=0), candidate(C, klass=0))
    effects += rig.hear(A, claim(3, C))
    assert rig.election.coordinator == C


def test_a_node_that_comes_into_reach_during_a_round_is_asked_too() -> None:
    rig = Rig(candidate(A, klass=0))
    rig.run(1.1)
    effects = rig.see(candidate(A, klass=0), candidate(C, klass=0))
    assert C in {e.node for e in of(el.AskPreCheck, effects)}
    number = rig.rounds(effects)
    rig.do(el.PreCheckAnswered(A, number, Stamp(NO_EPOCH, None)))
    effects = rig.do(el.PreCheckAnswered(C, number, claim(1, C)))
    assert rig.election.coordinator == C
    assert of(el.Announce, effects) == []


def test_an_answer_to_an_earlier_round_does_not_count() -> None:
    rig = Rig(candidate(A, klass=0), candidate(B, klass=0))
    number = rig.rounds(rig.run(1.1))
    rig.do(el.PreCheckAnswered(A, number - 1, Stamp(NO_EPOCH, None)))
    rig.do(el.PreCheckAnswered(B, number, Stamp(NO_EPOCH, None)))
    assert not rig.election.coordinating


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"klass": 2, "joined_at": 99}, {"klass": 1, "joined_at": 1}),
        ({"klass": 1, "joined_at": 1}, {"klass": 1, "joined_at": 2}),
        ({"klass": 0, "joined_at": 9}, {"klass": 5, "joined_at": 1, "eligible": False}),
    ],
)
def test_the_better_one_goes_first(better: dict[str, Any], worse: dict[str, Any]) -> None:
    first = Rig(candidate(A, linked=False, **worse), **better)
    second = Rig(candidate(A, linked=False, **better), **worse)
    assert of(el.Announce, first.run(1.01))
    assert of(el.Announce, second.run(1.9)) == []


def test_equal_nodes_are_ordered_by_id() -> None:
    order = sorted([ME, A])
    rig = Rig(candidate(A, linked=False))
    assert bool(of(el.Announce, rig.run(1.5))) == (order[0] == ME)


def test_the_second_best_steps_in_when_the_best_does_not_act() -> None:
    rig = Rig(candidate(A, klass=5, linked=False))
    assert rig.run(1.9) == []
    assert of(el.Announce, rig.run(0.2))


def test_a_claim_is_persisted_before_it_is_obeyed_and_announced_by_nobody_else() -> None:
    rig = Rig(candidate(A, klass=5))
    effects = rig.hear(A, claim(1, A))
    assert effects[0] == el.Persist(Epoch(1, A))
    assert effects[1] == el.CoordinatorChanged(Epoch(1, A), A, f"{A.short} coordinates")
    assert len(effects) == 2
    assert rig.hear(A, claim(1, A)) == []


def test_a_stronger_newcomer_changes_nothing() -> None:
    rig = Rig(candidate(A))
    rig.hear(A, claim(1, A))
    assert rig.see(candidate(A), candidate(B, klass=9)) == []
    assert rig.run(10.0) == []
    assert rig.election.coordinator == A


def test_a_dead_coordinator_is_replaced_by_the_best_of_the_living() -> None:
    rig = Rig(candidate(A), candidate(B, klass=0))
    rig.hear(A, claim(4, A))
    effects = rig.see(candidate(B, klass=0))
    (changed,) = of(el.CoordinatorChanged, effects)
    assert (changed.epoch, changed.coordinator) == (None, None)
    assert A.short in changed.reason
    number = rig.rounds(effects + rig.run(1.0))
    effects = rig.do(el.PreCheckAnswered(B, number, Stamp(Epoch(4, A), None)))
    assert rig.election.epoch == Epoch(5, ME)


def test_an_older_claim_is_not_obeyed_and_its_claimant_is_told() -> None:
    rig = Rig(candidate(A), candidate(B))
    rig.hear(A, claim(4, A))
    assert rig.hear(B, claim(3, B)) == [el.Tell(B, claim(4, A))]
    assert rig.election.coordinator == A


def test_the_higher_epoch_wins_and_the_loser_steps_down() -> None:
    rig = Rig()
    rig.run(1.01)
    rig.see(candidate(A))
    effects = rig.hear(A, claim(2, A))
    assert [type(e) for e in effects] == [el.Persist, el.SteppedDown, el.CoordinatorChanged]
    assert effects[1] == el.SteppedDown(Epoch(1, ME), f"epoch {Epoch(2, A)} is newer than {Epoch(1, ME)}")
    assert rig.election.coordinator == A


def test_equal_counters_are_decided_by_the_node() -> None:
    rig = Rig()
    rig.run(1.01)
    rig.see(candidate(A))
    rig.hear(A, claim(1, A))
    assert rig.election.coordinator == max(ME, A)


def test_a_claim_of_a_node_out_of_sight_or_deaf_waits() -> None:
    rig = Rig(candidate(A), candidate(C, suspect=True))
    rig.hear(A, claim(1, A))
    assert rig.hear(B, claim(2, B)) == []
    assert rig.hear(C, claim(3, C)) == []
    assert rig.election.coordinator == A
    assert not rig.election.accepts(Epoch(3, C))
    rig.see(candidate(A), candidate(C))
    rig.hear(C, claim(3, C))
    assert rig.election.coordinator == C


def test_a_claim_out_of_sight_holds_the_own_one_back_for_a_moment() -> None:
    rig = Rig(candidate(A, klass=0))
    rig.run(0.9)
    rig.hear(A, claim(1, C))
    assert rig.run(0.25) == []
    assert of(el.AskPreCheck, rig.run(0.1))


def test_a_coordinator_hears_of_itself_without_answering() -> None:
    rig = Rig()
    rig.run(1.01)
    rig.see(candidate(A))
    assert rig.hear(A, claim(1, ME)) == []
    assert rig.election.coordinating


def test_a_coordinator_told_of_a_newer_epoch_nobody_holds_renews_its_own() -> None:
    rig = Rig()
    rig.run(1.01)
    rig.see(candidate(A))
    effects = rig.hear(A, Stamp(Epoch(6, B), None))
    assert of(el.SteppedDown, effects) == []
    assert effects[-1] == el.Announce(claim(7, ME))


def test_a_follower_told_of_a_newer_epoch_nobody_holds_waits_for_its_coordinator() -> None:
    rig = Rig(candidate(A, klass=5))
    rig.hear(A, claim(1, A))
    rig.hear(A, Stamp(Epoch(6, B), None))
    assert rig.election.coordinator is None
    assert not rig.election.accepts(Epoch(1, A))
    rig.hear(A, claim(7, A))
    assert rig.election.coordinator == A


def test_after_a_restart_the_old_term_is_not_resumed() -> None:
    rig = Rig(candidate(A, klass=0), persisted=Epoch(4, ME))
    assert rig.election.coordinator is None
    effects = rig.hear(A, claim(4, ME))  # A still obeys the earlier run
    assert effects == [el.Tell(A, Stamp(Epoch(4, ME), None))]
    number = rig.rounds(rig.run(1.1))
    effects = rig.do(el.PreCheckAnswered(A, number, claim(4, ME)))
    assert el.Announce(claim(5, ME)) in effects


def test_a_node_that_lost_its_disk_learns_its_epoch_from_the_others() -> None:
    rig = Rig(candidate(A, klass=0))
    effects = rig.hear(A, claim(4, ME))
    assert effects == [el.Persist(Epoch(4, ME)), el.Tell(A, Stamp(Epoch(4, ME), None))]
    assert not rig.election.coordinating


def test_the_word_of_a_restarted_coordinator_ends_its_term() -> None:
    rig = Rig(candidate(A, klass=5), candidate(B, klass=0))
    rig.hear(A, claim(4, A))
    effects = rig.hear(A, Stamp(Epoch(4, A), None))
    assert rig.election.coordinator is None
    assert "restarted" in of(el.CoordinatorChanged, effects)[0].reason
    rig.hear(B, claim(4, A))  # B does not know yet
    assert rig.election.coordinator is None


def test_a_coordinator_that_comes_back_into_sight_is_obeyed_again() -> None:
    rig = Rig(candidate(A, klass=5), candidate(B, klass=0))
    rig.hear(A, claim(4, A))
    rig.see(candidate(B, klass=0))
    rig.see(candidate(A, klass=5), candidate(B, klass=0))
    rig.hear(A, claim(4, A))
    assert rig.election.coordinator == A


def test_commands_of_older_epochs_are_refused_across_restarts() -> None:
    rig = Rig(persisted=Epoch(4, A))
    assert not rig.election.accepts(Epoch(3, B))
    assert not rig.election.accepts(Epoch(4, min(A, "0")))
    assert rig.election.accepts(Epoch(4, A))
    assert not rig.election.accepts(Epoch(5, B))  # its claim was not believed yet


def test_a_pre_check_is_answered_with_what_is_seen() -> None:
    rig = Rig(candidate(A))
    assert rig.do(el.PreCheckAsked(B, 9)) == [el.AnswerPreCheck(B, 9, Stamp(NO_EPOCH, None))]
    rig.hear(A, claim(2, A))
    assert rig.do(el.PreCheckAsked(B, 10)) == [el.AnswerPreCheck(B, 10, claim(2, A))]


def test_handing_over_names_the_best_of_the_others() -> None:
    rig = Rig()
    rig.run(1.01)
    rig.see(candidate(A, klass=0), candidate(B, klass=3), candidate(C, klass=9, eligible=False))
    assert rig.do(el.HandOver()) == [el.SendHandOver(B, Epoch(1, ME))]
    assert rig.do(el.HandOver(A)) == [el.SendHandOver(A, Epoch(1, ME))]
    assert rig.do(el.HandOver(C)) == []
    assert rig.election.coordinating  # until the other claims
    effects = rig.hear(B, claim(2, B))
    assert of(el.SteppedDown, effects)


def test_a_follower_has_nothing_to_hand_over() -> None:
    rig = Rig(candidate(A))
    rig.hear(A, claim(1, A))
    assert rig.do(el.HandOver()) == []


def test_the_named_heir_claims_at_once() -> None:
    rig = Rig(candidate(A, klass=5))
    rig.hear(A, claim(3, A))
    effects = rig.do(el.HandOverReceived(A, Epoch(3, A)))
    assert [type(e) for e in effects] == [el.Persist, el.CoordinatorChanged, el.Announce]
    assert rig.election.epoch == Epoch(4, ME)


def test_the_heir_claims_also_when_it_already_heard_that_the_other_left() -> None:
    rig = Rig(candidate(A, klass=5), candidate(B, klass=9))
    rig.hear(A, claim(3, A))
    rig.see(candidate(B, klass=9))
    assert of(el.Announce, rig.do(el.HandOverReceived(A, Epoch(3, A))))


@pytest.mark.parametrize(("node", "epoch"), [(B, Epoch(3, A)), (A, Epoch(2, A)), (B, Epoch(3, B)), (A, Epoch(4, A))])
def test_a_hand_over_by_anybody_else_is_ignored(node: Any, epoch: Epoch) -> None:
    rig = Rig(candidate(A, klass=5), candidate(B))
    rig.hear(A, claim(3, A))
    assert rig.do(el.HandOverReceived(node, epoch)) == []


def test_an_ineligible_heir_declines() -> None:
    rig = Rig(candidate(A, klass=5), eligible=False)
    rig.hear(A, claim(3, A))
    assert rig.do(el.HandOverReceived(A, Epoch(3, A))) == []


def test_a_leaving_coordinator_hands_over_and_claims_nothing_again() -> None:
    rig = Rig()
    rig.run(1.01)
    rig.see(candidate(A))
    assert rig.do(el.LeaveRequested()) == [el.SendHandOver(A, Epoch(1, ME))]
    effects = rig.hear(A, Stamp(Epoch(5, B), None))
    assert of(el.SteppedDown, effects)
    assert of(el.Announce, effects + rig.run(60.0)) == []
    assert rig.election.snapshot().leaving


def test_a_round_that_a_stall_cut_short_is_begun_again() -> None:
    rig = Rig(candidate(A, klass=0))
    rig.run(1.1)
    rig.now += 8.0
    assert of(el.Announce, rig.do(el.Tick())) == []
    assert rig.hear(A, claim(1, A))  # lay unread
    assert rig.election.coordinator == A


@pytest.mark.parametrize(
    "stamp",
    [
        Stamp(Epoch(5, A), B),
        Stamp(Epoch(0, A), A),
        Stamp(Epoch(-3, A), A),
        claim(el.MAX_EPOCH_JUMP + 2, A),
        Stamp(Epoch(el.MAX_EPOCH_JUMP + 2, "x"), None),
    ],
)
def test_absurd_stamps_are_ignored(stamp: Stamp) -> None:
    rig = Rig(candidate(A), candidate(B))
    assert rig.hear(A, stamp) == []
    assert rig.election.epoch == NO_EPOCH
