"""Drafts from the text itself."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.proxy.ngram import CLASSES, LONG, LONGEST, SHORT, CopyOdds, NGram

tokens = st.lists(st.integers(0, 3), max_size=60)


def common_suffix(text: list[int], at: int) -> int:
    """Tokens before `at` that are equal to those at the end."""
    n = 0
    while n < at and n < LONGEST and text[at - 1 - n] == text[len(text) - 1 - n]:
        n += 1
    return n


def test_what_followed_before_is_proposed_again() -> None:
    copies = NGram(CopyOdds(), [1, 2, 3, 4, 5, 9, 2, 3])
    assert copies.propose(3) == [4, 5, 9]
    copies.add([4])
    assert copies.propose(2) == [5, 9]
    assert copies.common == 3
    copies.add([7])
    assert copies.propose(2) == []


def test_the_latest_place_counts_and_a_longer_match_before_a_shorter() -> None:
    copies = NGram(CopyOdds(), [1, 2, 5, 0, 1, 2, 6, 0, 1, 2])
    assert copies.propose(1) == [6]
    copies = NGram(CopyOdds(), [1, 2, 3, 4, 5, 0, 3, 4, 6, 0, 1, 2, 3, 4])
    assert copies.propose(1) == [5]


def test_behind_a_draft_that_goes_with_the_copy_comes_the_rest_of_it() -> None:
    copies = NGram(CopyOdds(), [1, 2, 3, 4, 5, 9, 2, 3])
    assert copies.behind([4, 5], 3) == ([9, 2, 3], 4)
    assert copies.behind([4, 5], 1) == ([9], 4)
    assert copies.behind([], 2) == ([4, 5], 2)
    assert copies.propose(3) == [4, 5, 9], "nothing was learned from it"


def test_behind_another_draft_comes_what_followed_its_end() -> None:
    text = [1, 2, 3, 4, 5, 9, 2, 3]
    assert NGram(CopyOdds(), text).behind([7, 1, 2], 2) == ([3, 4], 2)
    assert NGram(CopyOdds(), text).behind([7, 2, 3, 4, 5], 9) == ([9, 2, 3, 7, 2, 3, 4, 5, 9], 4)
    assert NGram(CopyOdds(), text).behind([4, 7], 2) == ([], 0)
    assert NGram(CopyOdds(), [1, 2, 3, 4, 5, 6]).behind([3], 2) == ([], 0)


def test_what_goes_round_is_expected_to_go_on_so() -> None:
    copies = NGram(CopyOdds(), [5, 6, 5, 6, 5, 6])
    assert copies.propose(5) == [5, 6, 5, 6, 5]
    assert copies.behind([5], 4) == ([6, 5, 6, 5], 5)
    assert copies.behind([5], 0) == ([], 5)


@given(tokens, tokens, st.integers(0, 8))
def test_what_is_put_behind_a_draft_is_what_would_be_proposed_after_it(
    text: list[int], draft: list[int], n: int
) -> None:
    """Or of another place where the same was."""
    copies = NGram(CopyOdds(), text)
    found, common = copies.behind(draft, n)
    whole = text + draft
    if not common:
        assert found == []
        assert len(draft) < SHORT or tuple(whole[-SHORT:]) not in {tuple(text[i : i + SHORT]) for i in range(len(text))}
        return
    assert common >= SHORT
    suffix = whole[len(whole) - common :]
    at = [i for i in range(len(whole)) if whole[i : i + common] == suffix]
    assert any((whole[i + common :] * n)[:n] == found for i in at if i + common < len(whole))


def test_short_and_empty_texts_propose_nothing() -> None:
    for text in ([], [1], [1, 1], [1, 2, 3]):
        assert NGram(CopyOdds(), text).propose(4) == []


@given(tokens, tokens, st.booleans())
def test_a_proposal_follows_an_earlier_copy_of_the_end(prompt: list[int], more: list[int], one_by_one: bool) -> None:
    copies = NGram(CopyOdds(), prompt)
    for part in [[token] for token in more] if one_by_one else [more]:
        copies.add(part)
    text = prompt + more
    assert copies.text == text
    pairs = {tuple(text[i : i + SHORT]) for i in range(len(text) - SHORT)}
    if copies.common:
        at = copies._at
        assert 0 < at < len(text)
        assert copies.common <= common_suffix(text, at)
        assert copies.propose(5) == (text[at:] * 5)[:5], "where the copy ends it goes round"
        assert copies.common >= SHORT
    elif len(text) > SHORT:
        assert tuple(text[-SHORT:]) not in pairs


def test_the_tables_are_bounded() -> None:
    dice = random.Random(1)
    copies = NGram(CopyOdds(), [dice.randrange(1000) for _ in range(500)], max_indexed=200)
    copies.add([dice.randrange(1000) for _ in range(2000)])
    assert all(len(table) <= 200 for table in copies._tables)
    copies.add([5, 6, 7, 8, 9] * 3)
    assert copies.propose(3)


def test_a_place_that_was_forgotten_is_not_found() -> None:
    copies = NGram(CopyOdds(), [1, 2, 3, *range(10, 100), 1, 2], max_indexed=50)
    assert copies.propose(1) == []


def test_odds_by_length_in_common_are_learned() -> None:
    odds = CopyOdds()
    assert [odds.rate(edge) for edge in (1, *CLASSES)] == sorted(odds.rate(edge) for edge in (1, *CLASSES))
    before = odds.rate(20)
    for _ in range(100):
        odds.add(2, hit=False)
        odds.add(100, hit=True)
    assert odds.rate(2) < 0.02
    assert odds.rate(LONGEST) > 0.99
    assert odds.rate(20) == before


def test_a_request_learns_beside_the_others_and_for_them() -> None:
    general = CopyOdds()
    mine, other = general.of_request(), general.of_request()
    for _ in range(30):
        mine.add(LONG, hit=False)
    assert mine.rate(LONG) < general.rate(LONG) < 0.2
    assert mine.rate(LONG) < other.rate(LONG)


def test_the_chance_of_a_draft_falls_with_its_length_and_hits_are_judged() -> None:
    odds = CopyOdds()
    reached = odds.reached(3, 8)
    assert reached == sorted(reached, reverse=True)
    copies = NGram(odds, [1, 2, 3, 4] * 3)
    copies.add([1, 2, 3, 4] * 20)
    assert odds.rate(LONGEST) > 0.95
    copies.add([9])
    assert odds.rate(LONGEST) < 0.99
