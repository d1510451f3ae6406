from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.ids import NodeName
from tightwad_agent.mesh.rows import KEEP_AWAY_S, MAX_ROWS, RowBook
from tightwad_agent.testing import node_id
from tightwad_agent.wire.rows import NodeRow, Role


def row(name: str, incarnation: int = 1, version: int = 0) -> NodeRow:
    """A row whose content follows from its name and stamp, as with honest nodes."""
    return NodeRow(
        node_id(name),
        NodeName(name),
        Role.NODE,
        incarnation=incarnation,
        version=version,
        joined_at=1766000000,
        eligible=True,
        klass=1,
        endpoint_port=8088,
        note=f"{incarnation}.{version}",
    )


def book(name: str = "me", incarnation: int = 1) -> RowBook:
    return RowBook(row(name, incarnation))


ME = node_id("me")
rows = st.builds(row, st.sampled_from(["me", "attic", "cellar", "desk"]), st.integers(-2, 3), st.integers(-2, 3))
batches = st.lists(st.lists(rows, max_size=4), max_size=6)


def contents(b: RowBook) -> dict[str, NodeRow]:
    return {r.node: r for r in b.all()}


@given(batches)
def test_merge_is_idempotent_and_never_goes_back(given_rows: list[list[NodeRow]]) -> None:
    b = book()
    for batch in given_rows:
        before = contents(b)
        taken = b.merge(batch, now=0.0)
        assert b.own == row("me"), "nobody else writes this node's row"
        assert all(r.stamp >= before[n].stamp for n, r in contents(b).items() if n in before)
        assert all(t.node != ME and (t.node not in before or t.stamp > before[t.node].stamp) for t in taken)
        after = contents(b)
        assert b.merge(batch, now=0.0) == []
        assert contents(b) == after


@given(batches, st.randoms())
def test_the_order_of_what_comes_does_not_matter(given_rows: list[list[NodeRow]], random: object) -> None:
    one, other = book(), book()
    for batch in given_rows:
        one.merge(batch, now=0.0)
    flat = list(itertools.chain.from_iterable(given_rows))
    random.shuffle(flat)  # type: ignore[attr-defined]
    other.merge(flat, now=0.0)
    assert contents(one) == contents(other)


@given(batches, batches)
def test_two_books_agree_after_one_exchange_of_stamps(left: list[list[NodeRow]], right: list[list[NodeRow]]) -> None:
    a, b = book("attic"), book("cellar")
    for batch in left:
        a.merge(batch, now=0.0)
    for batch in right:
        b.merge(batch, now=0.0)
    own = node_id("attic"), node_id("cellar")
    for_b, for_a = a.newer_than(b.stamps()), b.newer_than(a.stamps())
    b.merge(for_b, now=0.0)
    a.merge(for_a, now=0.0)
    in_a, in_b = contents(a), contents(b)
    assert {n: r for n, r in in_a.items() if n not in own} == {n: r for n, r in in_b.items() if n not in own}
    assert a.own == row("attic")
    assert b.own == row("cellar")


def test_an_edit_makes_a_version_only_if_something_differs() -> None:
    b = book()
    assert b.edit(lambda r: replace(r, note="loading")) is True
    assert b.own.stamp == (1, 1)
    assert b.edit(lambda r: replace(r, note="loading")) is False
    assert b.own.stamp == (1, 1)
    assert b.edit(lambda r: replace(r, note="idle", version=-7)) is True
    assert b.own.stamp == (1, 2)


def test_after_a_raise_of_the_incarnation_the_row_is_newer_than_before() -> None:
    b = book()
    for i in range(5):
        b.edit(lambda r, i=i: replace(r, klass=i + 10))
    before = b.own.stamp
    b.reborn(2)
    assert b.own.stamp == (2, 0) > before
    assert b.own.klass == 14


def test_newer_than_sends_what_the_peer_lacks_and_no_more() -> None:
    b = book()
    b.merge([row("attic", 1, 5), row("cellar", 2, 0), row("desk", -3, 0)], now=0.0)
    stamps = {str(node_id("attic")): (1, 5), str(node_id("cellar")): (1, 9), str(ME): (9, 9), "nonsense": (0, 0)}
    assert set(b.newer_than(stamps)) == {row("cellar", 2, 0), row("desk", -3, 0)}
    assert len(b.newer_than({})) == 4


def test_the_book_is_bounded_and_still_takes_news_of_those_in_it() -> None:
    b = book()
    taken = b.merge([row(f"n{i}") for i in range(MAX_ROWS + 20)], now=0.0)
    assert len(taken) == MAX_ROWS - 1
    assert len(b.all()) == MAX_ROWS
    assert b.merge([row("n3", 2)], now=0.0) == [row("n3", 2)]
    assert len(b.stamps()) == MAX_ROWS


def test_rows_of_nodes_away_for_a_day_are_forgotten_the_own_one_never() -> None:
    b = book()
    b.merge([row("attic"), row("cellar")], now=0.0)
    b.expire(frozenset({node_id("attic")}), now=KEEP_AWAY_S)
    b.expire(frozenset({node_id("attic")}), now=KEEP_AWAY_S + 1)
    assert set(contents(b)) == {ME, node_id("attic")}
    b.expire(frozenset(), now=2 * KEEP_AWAY_S)
    assert set(contents(b)) == {ME, node_id("attic")}
    b.expire(frozenset(), now=2 * KEEP_AWAY_S + 2)
    assert set(contents(b)) == {ME}
    b.forget(ME)
    assert b.own == row("me")


def test_two_nodes_do_not_keep_a_dead_third_alive_by_telling_each_other() -> None:
    a, b = book("attic"), book("cellar")
    alive = frozenset({node_id("attic"), node_id("cellar")})
    a.merge([row("desk"), b.own], now=0.0)
    b.merge([row("desk"), a.own], now=3600.0)
    for hour in range(80):
        now = hour * 3600.0
        for x, y in ((a, b), (b, a)):
            x.expire(alive, now)
            y.expire(alive, now)
            y.merge(x.newer_than(y.stamps()), now)
    assert a.get(node_id("desk")) is None
    assert b.get(node_id("desk")) is None


def test_a_node_that_comes_back_after_a_day_is_taken_in_again() -> None:
    b = book()
    b.merge([row("attic"), row("cellar")], now=0.0)
    b.expire(frozenset(), now=KEEP_AWAY_S + 1)
    assert b.merge([row("attic")], now=KEEP_AWAY_S + 2) == []
    assert b.merge([row("attic", 2)], now=KEEP_AWAY_S + 2) == [row("attic", 2)], "restarted"
    b.expire(frozenset({node_id("cellar")}), now=KEEP_AWAY_S + 3)
    assert b.merge([row("cellar")], now=KEEP_AWAY_S + 3) == [row("cellar")], (
        "was only out of reach, and is linked again"
    )


def test_the_digest_is_of_what_is_known_now() -> None:
    a, b = book("attic"), book("cellar")
    changes: list[Callable[[RowBook], object]] = [
        lambda x: x.merge([row("desk")], now=0.0),
        lambda x: x.merge([row("desk", 2)], now=0.0),
        lambda x: x.expire(frozenset({a.own.node, b.own.node}), now=2 * KEEP_AWAY_S),
        lambda x: x.merge([row("shelf")], now=3 * KEEP_AWAY_S),
        lambda x: x.forget(node_id("shelf")),
    ]
    a.merge([b.own], now=0.0)
    b.merge([a.own], now=0.0)
    for change in changes:
        before = a.digest()
        assert before == b.digest()
        change(a)
        assert a.digest() != before
        change(b)
    before = a.digest()
    a.edit(lambda own: replace(own, note="edited"))
    edited = a.digest()
    a.reborn(5)
    assert len({before, edited, a.digest()}) == 3
    b.merge([a.own], now=0.0)
    assert b.digest() == a.digest()


def test_what_was_forgotten_for_age_is_bounded_too() -> None:
    b = book()
    for generation in range(3):
        b.merge([row(f"g{generation}-{i}") for i in range(MAX_ROWS - 1)], now=0.0)
        b.expire(frozenset(), now=KEEP_AWAY_S + 1)
    assert b.merge([row("g2-7")], now=0.0) == []
    assert b.merge([row("g0-7")], now=0.0) == [row("g0-7")], "the oldest memory went first"


def test_a_row_forgotten_by_hand_may_come_back() -> None:
    b = book()
    b.merge([row("attic")], now=0.0)
    b.forget(node_id("attic"))
    assert b.get(node_id("attic")) is None
    assert b.merge([row("attic")], now=1.0) == [row("attic")]
