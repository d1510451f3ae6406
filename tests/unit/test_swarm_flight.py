"""Who downloads a source: the rule by example."""

from __future__ import annotations

from dataclasses import replace

from tightwad_agent.ids import ModelId, NodeId, NodeName, SafeName
from tightwad_agent.swarm.flight import (
    MAX_SINCE,
    STALL_S,
    Claim,
    Elsewhere,
    Flight,
    Holding,
    read_rows,
    since_for,
)
from tightwad_agent.testing import node_id
from tightwad_agent.wire.rows import Fetching, HeldModel, NodeRow, Role

A, B, C = sorted(node_id(name) for name in "abc")


def claim(node: NodeId, since: int, done: int = 0) -> Claim:
    return Claim(node, "n", since, done, 100)


# The rule


def test_the_earliest_has_the_office_then_the_lowest_id() -> None:
    assert Flight().look([claim(A, 2), claim(B, 1), claim(C, 2)], 0) == B
    assert Flight().look([claim(C, 1), claim(B, 1)], 0) == B
    assert Flight().look([], 0) is None


def test_an_owner_that_goes_is_followed_by_the_next_and_one_that_comes_back_is_last() -> None:
    office = Flight()
    assert office.look([claim(A, 1), claim(B, 2), claim(C, 3)], 0) == A
    assert office.look([claim(B, 2), claim(C, 3)], 1) == B
    assert office.look([claim(A, since_for(1, [claim(B, 2), claim(C, 3)])), claim(B, 2), claim(C, 3)], 2) == B


def test_an_owner_that_comes_no_further_is_passed_over_until_it_does() -> None:
    office = Flight()
    claims = [claim(A, 1, 10), claim(B, 2)]
    assert office.look(claims, 0) == A
    assert office.look(claims, STALL_S - 1) == A
    assert office.look([claim(A, 1, 11), claim(B, 2)], STALL_S - 1) == A, "each byte counts"
    assert office.deadline == 2 * STALL_S - 1
    claims = [claim(A, 1, 11), claim(B, 2)]
    assert office.look(claims, 2 * STALL_S - 1) == B
    assert office.look(claims, 2 * STALL_S) == B
    assert office.deadline == 3 * STALL_S - 1
    assert office.look([claim(A, 1, 12), claim(B, 2)], 2 * STALL_S) == A, "it moves again"


def test_when_nobody_moves_it_goes_round() -> None:
    office, claims = Flight(), [claim(A, 1), claim(B, 2)]
    owners = [office.look(claims, n * STALL_S) for n in range(5)]
    assert owners == [A, B, A, B, A]


def test_alone_it_stays_and_has_time_again() -> None:
    office = Flight()
    for n in range(3):
        assert office.look([claim(A, 1)], n * STALL_S) == A
        assert office.deadline == (n + 1) * STALL_S


def test_a_claim_is_later_than_those_it_sees_whatever_the_clock() -> None:
    assert since_for(1000.7, []) == 1000
    assert since_for(1000, [claim(A, 5000)]) == 5001
    assert since_for(9000, [claim(A, 5000)]) == 9000
    assert since_for(0, [claim(A, 2**63 - 1)]) == MAX_SINCE


def test_what_rows_say() -> None:
    def held(model: str, source: str, have: int = 10, size: int = 10) -> HeldModel:
        return HeldModel(ModelId(model * 64), SafeName("m.gguf"), size, have, source=source)

    row = NodeRow(A, NodeName("attic"), Role.NODE, 1, 0, 1, True, 0, 8088)
    one = replace(
        row,
        fetching=(Fetching("d" * 64, 7, 1, 2),),
        models=(held("1", "e" * 128), held("2", "e" * 128, 9), held("3", ""), held("4", "f" * 64, 0, 0)),
    )
    other = replace(row, node=B, models=(held("1", "e" * 128), held("5", "e" * 64)))
    assert read_rows([]) == Elsewhere()
    assert read_rows([one, other]) == Elsewhere(
        2,
        {"d" * 64: (Claim(A, "attic", 7, 1, 2),)},
        {
            "e" * 64: (
                Holding(ModelId("1" * 64), "m.gguf", "e" * 128),
                Holding(ModelId("5" * 64), "m.gguf", "e" * 64),
            )
        },
    )
