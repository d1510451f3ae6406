"""The piece tracker's choices, one by one."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.swarm.pieces import Ask, Limits, PieceTracker, State, bits_of, pieces_of

MIB = 1 << 20
MANY = 1 << 40


def tracker(n: int = 10, have: tuple[int, ...] = (), length: int = MIB, **limits: float) -> PieceTracker:
    """Pieces may be asked of a peer one right after the other, unless `near_bytes` says otherwise."""
    return PieceTracker([length] * n, have, random.Random(1), Limits(**{"near_bytes": MANY, "per_peer": 2, **limits}))  # type: ignore[arg-type]


def join(t: PieceTracker, **peers: object) -> None:
    for name, has in peers.items():
        t.peer_joined(name)
        t.peer_has(name, has)  # type: ignore[arg-type]


def fill(t: PieceTracker, peer: str, now: float = 0.0) -> list[int]:
    got = []
    while (piece := t.choose(peer, now)) is not None:
        got.append(piece)
    return got


def test_three_equal_seeds_are_all_used() -> None:
    t = tracker(64, total=100)
    join(t, a=range(64), b=range(64), c=range(64))
    sent = {"a": 0, "b": 0, "c": 0}
    while not t.complete:
        for peer in sent:
            for piece in fill(t, peer):
                sent[peer] += 1
                assert t.finished(piece) == [Ask(peer, piece)]
    assert sorted(sent.values()) == [20, 22, 22] or min(sent.values()) >= 16


def test_rarest_first_is_planned_anew_at_each_choice() -> None:
    t = tracker(3, per_peer=9)
    join(t, a=(0, 1, 2), b=(0, 1), c=(0,))
    assert t.choose("a", 0) == 2
    t.peer_left("b")
    assert t.choose("a", 0) == 1
    assert t.choose("a", 0) == 0


def test_what_others_fetch_counts_as_a_copy() -> None:
    t = tracker(2)
    join(t, a=(0, 1), b=())
    t.peer_fetching("b", (0,))
    assert (t.copies(0), t.copies(1)) == (2, 1)
    t.peer_has("b", (0,))
    assert t.copies(0) == 2
    t.peer_fetching("b", ())
    assert t.copies(0) == 2
    assert t.choose("a", 0) == 1
    t.peer_left("b")
    assert t.copies(0) == 1


def test_ties_are_broken_by_the_die() -> None:
    firsts = set()
    for seed in range(40):
        t = PieceTracker([1] * 4, (), random.Random(seed))
        join(t, a=range(4))
        firsts.add(t.choose("a", 0))
    assert firsts == {0, 1, 2, 3}


def test_bounds_on_what_is_in_flight() -> None:
    t = tracker(20, per_peer=3, total=5)
    join(t, a=range(20), b=range(20), c=range(20))
    assert [len(fill(t, p)) for p in "abc"] == [3, 2, 0]


def test_only_what_a_peer_has_and_is_missing() -> None:
    t = tracker(4, have=(0,), per_peer=9)
    join(t, a=(0, 1), b=())
    assert fill(t, "a") == [1]
    assert fill(t, "b") == []
    assert [t.state(i) for i in range(3)] == [State.HAVE, State.IN_FLIGHT, State.WANTED]
    assert t.missing_everywhere() == 2
    assert t.is_useful("a")
    assert not t.is_useful("b")


def test_a_stalled_peer_is_left_and_its_pieces_asked_elsewhere() -> None:
    t = tracker(2, stall_s=10)
    join(t, a=range(2), b=range(2))
    assert len(fill(t, "a", now=0)) == 2
    assert t.next_deadline(1) == 10
    t.progress("a", 6)
    assert t.expire(15.9) == []
    assert t.expire(16) == ["a"]
    t.peer_left("a")
    assert sorted(fill(t, "b", now=16)) == [0, 1]


def test_dripping_does_not_count_as_alive_for_ever() -> None:
    t = tracker(1, length=10 * 1024, stall_s=10, slack_s=60, slowest_bytes_s=1024)
    join(t, a=(0,))
    t.choose("a", 0)
    for now in range(1, 70):
        t.progress("a", now)
        assert t.expire(now) == []
    assert t.expire(70) == ["a"]


def test_no_deadline_runs_while_a_piece_is_checked() -> None:
    t = tracker(1, stall_s=10)
    join(t, a=(0,), b=(0,))
    t.choose("a", 0)
    t.arrived("a", 0)
    t.progress("a", 5)
    assert t.next_deadline(5) == math.inf
    assert t.expire(1e9) == []
    assert t.choose("b", 1e9) is None, "what is being checked is not asked for again"


def test_bad_data_is_not_asked_of_the_same_peer_again() -> None:
    t = tracker(3, per_peer=1, max_strikes=2)
    join(t, a=range(3), b=range(3))
    first = t.choose("a", 0)
    assert first is not None
    assert not t.bad("a", first)
    second = t.choose("a", 0)
    assert second is not None
    assert second != first
    assert t.choose("b", 0) is not None
    assert t.bad("a", second)
    t.peer_left("a")
    t.peer_joined("a")
    t.peer_has("a", range(3))
    assert t.strikes("a") == 2, "leaving and coming back forgets nothing"
    assert t.choose("a", 0) not in (first, second)
    t.forgive("a")
    assert t.strikes("a") == 0


def test_a_rejected_piece_is_not_asked_there_until_it_is_had_again() -> None:
    t = tracker(1)
    join(t, a=(0,))
    t.choose("a", 0)
    t.rejected("a", 0)
    assert (t.choose("a", 0), t.copies(0)) == (None, 0)
    t.peer_has("a", (0,))
    assert t.choose("a", 0) == 0


def test_endgame_asks_late_pieces_twice_and_cancels_the_slower() -> None:
    t = tracker(2, late_s=0.5, per_peer=1, max_askers=2)
    join(t, a=range(2), b=range(2), c=range(2))
    one, two = t.choose("a", 0), t.choose("b", 0.2)
    assert one is not None
    assert t.choose("c", 0.4) is None, "not late yet"
    assert t.next_deadline(0.4) == 0.5
    assert t.choose("c", 0.5) == one
    assert {one, two} == {0, 1}
    assert t.finished(one) == [Ask("a", one), Ask("c", one)]
    assert t.choose("c", 0.8) == two
    assert t.choose("a", 0.8) is None, "enough have been asked"


def test_no_endgame_while_anything_is_wanted() -> None:
    t = tracker(3, per_peer=1)
    join(t, a=(0, 1), b=(0, 1), c=(1,))
    t.choose("a", 0)
    t.choose("b", 0)
    assert t.choose("c", 9) is None
    assert t.state(2) is State.WANTED


def test_the_endgame_prefers_what_fewest_were_asked_for() -> None:
    t = tracker(2, late_s=0.5, per_peer=2, max_askers=3)
    join(t, a=range(2), b=(0,), c=range(2))
    assert sorted(fill(t, "a", 0)) == [0, 1]
    assert t.choose("b", 1) == 0
    assert t.choose("c", 2) == 1
    assert t.choose("c", 2) == 0
    assert set(t.peers) == {"a", "b", "c"}
    t.peer_left("b")
    assert t.state(0) is State.IN_FLIGHT


def test_the_endgame_rolls_a_die_between_equals() -> None:
    got = set()
    for seed in range(20):
        t = PieceTracker([1, 1], (), random.Random(seed))
        join(t, a=range(2), b=range(2))
        fill(t, "a", 0)
        got.add(t.choose("b", 1))
    assert got == {0, 1}


def test_answers_nobody_waits_for() -> None:
    t = tracker(2)
    join(t, a=(0,))
    t.arrived("a", 0)
    t.rejected("a", 1)
    assert t.choose("a", 0) == 0


def test_a_piece_that_came_after_all() -> None:
    t = tracker(1)
    join(t, a=(0,))
    t.choose("a", 0)
    t.peer_left("a")
    assert t.finished(0) == []
    assert t.complete
    t.returned("gone", 0)
    assert not t.bad("gone", 0)


@given(st.integers(1, 70), st.data())
def test_have_maps(n: int, data: st.DataObject) -> None:
    pieces = data.draw(st.sets(st.integers(0, n - 1)))
    bits = bits_of(pieces, n)
    assert set(pieces_of(bits, n)) == pieces
    for wrong in (bits + b"\0", bits[:-1]):
        with pytest.raises(ValueError, match="have-map"):
            pieces_of(wrong, n)
    if n % 8:
        with pytest.raises(ValueError, match="beyond"):
            pieces_of(bits[:-1] + bytes([bits[-1] | 1]), n)


def test_the_next_piece_is_asked_for_when_little_is_left_of_the_one_before() -> None:
    t = tracker(3, near_bytes=1000, per_peer=2)
    join(t, a=range(3))
    assert len(fill(t, "a")) == 1
    t.progress("a", 1.0, MIB - 1001)
    assert fill(t, "a") == []
    t.progress("a", 1.0, 1)
    assert len(fill(t, "a")) == 1
    for piece in t.fetching:
        t.arrived("a", piece)
    assert fill(t, "a") == [], "two are being checked"
    t.finished(t.fetching[0])
    assert len(fill(t, "a")) == 1


def test_the_faster_a_peer_the_more_is_asked_of_it_at_once() -> None:
    assert max_asked(300) == 6 + 1
    assert max_asked(40) == 1
    assert max_asked(1e6) == 9, "per_peer"


def max_asked(mib_s: float) -> int:
    """Of a peer that sends at this rate."""
    t = tracker(40, near_bytes=MIB - 1, per_peer=9, ahead_s=0.02)
    join(t, a=range(40))
    for now in (0.0, 0.05, 0.1):
        t.progress("a", now, int(mib_s * MIB * 0.05))
    return len(fill(t, "a"))


def test_a_last_resort_is_asked_only_for_what_nobody_has() -> None:
    t = tracker(4, outside=2)
    join(t, a=(0,), b=(), web=())
    t.peer_fetching("b", (1,))
    got = {t.choose_nowhere("web", 0), t.choose_nowhere("web", 0)}
    assert got == {2, 3}
    assert t.choose_nowhere("web", 0) is None, "as many as it may be asked for at once"
    t.bad("web", 2)
    t.finished(3)
    assert t.choose_nowhere("web", 0) is None, "it gave that one wrongly"
    t.peer_left("a")
    assert t.choose_nowhere("web", 0) == 0
    t.peer_fetching("b", ())
    assert t.choose_nowhere("web", 0) == 1


def test_a_request_that_waits_is_taken_back_when_others_can_give_it() -> None:
    t = tracker(3, per_peer=1)
    join(t, seed=(0, 1, 2), other=())
    piece = t.choose("seed", 0)
    assert piece is not None
    t.peer_has("other", (piece,))
    assert t.better_elsewhere("other", (piece,)) == [Ask("seed", piece)]
    assert t.better_elsewhere("seed", (piece,)) == [], "it is asked there"
    t.progress("seed", 0, 1)
    assert t.better_elsewhere("other", (piece,)) == [], "it has begun to come"


def test_a_request_stays_where_nothing_rarer_is() -> None:
    t = tracker(2, per_peer=1)
    join(t, seed=(0, 1), other=(0, 1))
    piece = t.choose("seed", 0)
    assert piece is not None
    assert t.better_elsewhere("other", (piece,)) == []
