"""What a measurement says: reading answers, statistics, and prompts to measure with."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent import bench_table
from tightwad_agent.bench_table import MIN_TOKENS, Answer, Pair, read_answer
from tightwad_agent.errors import ProtocolError
from tightwad_agent.prompts import PROMPTS
from tightwad_agent.proxy.tally import MAX_POSITIONS

MANY = Path(__file__).parents[1] / "data" / "prompts200.json"

VERIFIER = {
    "choices": [{"message": {"role": "assistant", "content": "Paris."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 30, "total_tokens": 35},
    "timings": {
        "prompt_n": 5,
        "predicted_n": 30,
        "predicted_per_second": 41.5,
        "rounds": 8,
        "drafted": 28,
        "accepted": 21,
        "tried_at": [8, 8, 7, 5],
        "accepted_at": [8, 6, 4, 3],
        "tokens_per_round": 3.6,
        "hidden": 0.8,
        "engine": "verifier",
        "drafters": {"cellar": 20, "n-gram": 8},
    },
}
LLAMA_SERVER = {
    "choices": [{"message": {"content": "Paris."}}],
    "usage": {"completion_tokens": 30},
    "timings": {"prompt_n": 5, "predicted_n": 30, "predicted_per_second": 20.0, "draft_n": 9, "draft_n_accepted": 6},
}


def answer(text: str = "x", n: int = 50, per_s: float | None = 10.0, **more: Any) -> Answer:
    return Answer(text, n, per_s, 1.0, **more)


def drafted(per_s: float, **more: Any) -> Answer:
    told: dict[str, Any] = {"rounds": 10, "drafted": 40, "accepted": 30, "tried_at": (10, 10), "accepted_at": (9, 6)}
    return answer(per_s=per_s, **told | more)


# Reading


def test_an_answer_of_the_verifier() -> None:
    found = read_answer(VERIFIER, 1.5)
    assert found == Answer(
        text="Paris.",
        n_tokens=30,
        per_s=41.5,
        wall_s=1.5,
        rounds=8,
        drafted=28,
        accepted=21,
        tried_at=(8, 8, 7, 5),
        accepted_at=(8, 6, 4, 3),
        hidden=0.8,
        engine="verifier",
        drafters=("cellar", "n-gram"),
    )


def test_an_answer_of_llama_server_tells_less() -> None:
    found = read_answer(LLAMA_SERVER, 1.5)
    assert (found.per_s, found.drafted, found.accepted, found.rounds, found.hidden) == (20.0, 9, 6, None, None)


def test_without_timings_the_askers_clock_is_the_measure() -> None:
    found = read_answer({k: v for k, v in VERIFIER.items() if k != "timings"}, 2.0)
    assert (found.n_tokens, found.per_s, found.drafted) == (30, 15.0, None)
    assert read_answer({"choices": [{}]}, 0.0).per_s is None


def test_what_could_be_without_end_is_cut() -> None:
    told = {"tried_at": [1] * 1000, "drafters": [f"node-{n}" * 100 for n in range(1000)], "engine": "e" * 1000}
    found = read_answer({"choices": [{}], "timings": told}, 1.0)
    assert (len(found.tried_at), len(found.drafters), len(found.engine)) == (MAX_POSITIONS, 32, 64)
    assert max(len(name) for name in found.drafters) == 128


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e300, True, "5", None])
def test_what_is_no_speed_is_left_out(value: object) -> None:
    told = {"predicted_n": 10, "predicted_per_second": value, "hidden": value, "rounds": value}
    found = read_answer({"choices": [{}], "timings": told}, 2.0)
    assert (found.per_s, found.hidden, found.rounds) == (5.0, None, None)


def test_what_a_model_thinks_is_part_of_its_answer() -> None:
    message = {"reasoning_content": "hm. ", "content": "Paris."}
    assert read_answer({"choices": [{"message": message}]}, 1).text == "hm. Paris."
    assert read_answer({"choices": [{"message": {"content": None}}]}, 1).text == ""


@pytest.mark.parametrize("body", [None, [], "text", {}, {"choices": []}, {"choices": "x"}])
def test_no_completion_is_an_error(body: object) -> None:
    with pytest.raises(ProtocolError):
        read_answer(body, 1.0)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=25,
)


@settings(max_examples=40, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(VERIFIER["timings"], ANYTHING)), ANYTHING)
def test_nothing_that_is_told_is_taken_for_granted(timings: dict[str, Any], message: Any) -> None:
    found = read_answer({"choices": [{"message": message}], "usage": message, "timings": timings}, 1.0)
    assert len(found.tried_at) <= MAX_POSITIONS
    plain = bench_table.plain([Pair("facts", "p", found, found)])
    json.dumps(plain, allow_nan=False)


# Statistics


def test_a_speed_up_is_the_median_of_each_prompts_own() -> None:
    pairs = [
        Pair("facts", "a", drafted(20.0), answer(per_s=10.0)),
        Pair("facts", "b", drafted(90.0), answer(per_s=30.0)),
        Pair("facts", "c", drafted(100.0), answer(per_s=10.0)),
    ]
    row = bench_table.row("facts", pairs)
    assert row.speedup == 3.0
    assert (row.drafts_per_s, row.without_per_s) == (90.0, 10.0)
    assert (row.prompts, row.drafted, row.accepted, row.acceptance) == (3, 120, 90, 0.75)
    assert row.acceptance_at == (0.9, 0.6)
    assert row.tokens_per_round == 4.0


def test_positions_are_added_up_over_answers_of_different_length() -> None:
    answers = [drafted(1.0, tried_at=(4, 2, 0), accepted_at=(2, 1)), drafted(1.0, tried_at=(4,), accepted_at=(4,))]
    row = bench_table.row("x", [Pair("x", "p", a) for a in answers])
    assert row.acceptance_at == (0.75, 0.5)


def test_rounds_that_were_not_told_are_not_made_up() -> None:
    row = bench_table.row("x", [Pair("x", "p", drafted(1.0, rounds=None)), Pair("x", "q", drafted(1.0))])
    assert row.tokens_per_round == 4.0
    assert bench_table.row("x", [Pair("x", "p", drafted(1.0, rounds=None))]).tokens_per_round is None


def test_short_answers_are_compared_and_have_no_speed() -> None:
    short = Pair("facts", "a", drafted(900.0, n=MIN_TOKENS - 1), answer(n=MIN_TOKENS - 1))
    row = bench_table.row("facts", [short])
    assert (row.speedup, row.drafts_per_s, row.without_per_s) == (None, None, None)
    assert (row.compared, row.equal) == (1, 1)
    long = Pair("facts", "b", drafted(20.0, n=MIN_TOKENS), answer(n=MIN_TOKENS))
    assert bench_table.row("facts", [short, long]).speedup == 2.0
    assert bench_table.notes([short, long]) == [
        f"1 of 2 answers have fewer than {MIN_TOKENS} tokens and do not count as speeds"
    ]


def test_answers_are_equal_in_text_and_in_number_of_tokens() -> None:
    same = Pair("x", "p", answer("abc"), answer("abc"))
    other = Pair("x", "q", answer("abcd"), answer("abXd"))
    longer = Pair("x", "r", answer("ab"), answer("abc"))
    count = Pair("x", "s", answer("abc", n=50), answer("abc", n=51))
    assert [p.equal for p in (same, other, longer, count, Pair("x", "t", answer()))] == [
        True,
        False,
        False,
        False,
        None,
    ]
    row = bench_table.row("x", [same, other, longer, count])
    assert (row.compared, row.equal) == (4, 1)
    assert [(d["prompt"], d["at"]) for d in bench_table.differences([same, other, longer, count])] == [
        ("q", 2),
        ("r", 2),
        ("s", 3),
    ]


def test_a_row_for_each_kind_in_their_order_and_one_for_all() -> None:
    pairs = [Pair(kind, "p", drafted(20.0), answer()) for kind in ("list", "code", "list")]
    assert [(r.kind, r.prompts) for r in bench_table.rows(pairs)] == [("list", 2), ("code", 1), ("all", 3)]
    assert [r.kind for r in bench_table.rows(pairs[:1])] == ["list"]
    assert bench_table.rows([]) == []


def test_all_of_it_as_json() -> None:
    pairs = [Pair(kind, "p", drafted(20.0), answer()) for kind in ("list", "code")]
    found = json.loads(json.dumps(bench_table.plain(pairs)))
    assert [row["kind"] for row in found["kinds"]] == ["list", "code"]
    assert found["total"]["kind"] == "all"
    assert found["total"]["compared"] == 2
    assert found["answers"][0]["ratio"] == 2.0
    assert "text" not in found["answers"][0]["drafts"]
    nothing = bench_table.plain([])
    assert (nothing["total"], nothing["kinds"], nothing["notes"]) == (None, [], [])


def test_a_table_without_drafts_says_so() -> None:
    assert bench_table.notes([Pair("x", "p", answer(drafted=0), answer())]) == [
        "nothing was drafted: `tightwad-agent status` says why"
    ]
    assert bench_table.notes([Pair("x", "p", drafted(1.0), answer())]) == []


# Prompts


def test_there_are_twenty_prompts_of_each_kind_and_none_twice() -> None:
    assert {kind: len(texts) for kind, texts in PROMPTS.items()} == dict.fromkeys(
        ("reasoning", "code", "facts", "list", "creative"), 20
    )
    assert not [text for text, n in Counter(t for texts in PROMPTS.values() for t in texts).items() if n > 1]
    assert all(3 <= len(text.split()) <= 60 for texts in PROMPTS.values() for text in texts)


def test_there_are_two_hundred_prompts_of_many_styles() -> None:
    records = json.loads(MANY.read_text(encoding="utf-8"))
    assert len(records) == 200
    assert [r["id"] for r in records] == list(range(1, 201))
    texts = [r["text"] for r in records]
    assert len(set(texts)) == 200
    assert not set(texts) & {t for found in PROMPTS.values() for t in found}
    words = [len(text.split()) for text in texts]
    assert min(words) <= 4
    assert 200 <= max(words) <= 320
    assert min(Counter(r["kind"] for r in records).values()) >= 8
    assert {r["kind"] for r in records[:50]} == {r["kind"] for r in records}, "a part of them is a mix too"
    letters = {unicodedata.name(c, "").split()[0] for c in "".join(texts) if not c.isascii() and c.isalpha()}
    assert letters >= {"LATIN", "CYRILLIC", "GREEK", "CJK", "HIRAGANA", "HANGUL", "ARABIC", "HEBREW", "DEVANAGARI"}
    assert any(ord(c) > 0x1F000 for c in "".join(texts)), "emoji"
