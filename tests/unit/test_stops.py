"""Stop strings and transcripts: the outcome depends on the text alone, not on where tokens and rounds end."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent.proxy.fakes import EOS, fake_token
from tightwad_agent.proxy.ports import Chunk, Token
from tightwad_agent.proxy.stops import StopScanner
from tightwad_agent.proxy.transcript import Part, Transcript
from tightwad_agent.wire.verify import Ended, Probability, TokenProbabilities

# few letters, so that stop strings overlap one another and themselves
_TEXT = st.text("ab\n", max_size=30)
_STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def scan(parts: list[str], stops: list[str]) -> tuple[str, str | None]:
    scanner = StopScanner(stops)
    text = "".join([scanner.feed(part) for part in parts]) + scanner.rest()
    return text, scanner.stopped


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: the shortest beginning of the text that ends with a stop string; of several, the longest."""
    for end in range(len(text) + 1):
        met = [s for s in stops if text[:end].endswith(s)]
        if met:
            stop = max(met, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(deadline=None)
@given(_TEXT, _STOPS, st.data())
def test_any_split_gives_the_same(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)))))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert scan(parts, stops) == expected(text, stops)


@settings(deadline=None)
@given(_TEXT, _STOPS)
def test_nothing_is_held_back_that_cannot_become_a_stop(text, stops):
    scanner, out = StopScanner(stops), ""
    for n, letter in enumerate(text, 1):
        out += scanner.feed(letter)
        if scanner.stopped is not None:
            return
        held = text[len(out) : n]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_nothing_comes_after_a_stop():
    scanner = StopScanner(["END"])
    assert scanner.feed("one ENDtwo") == "one "
    assert scanner.feed("three") == ""
    assert scanner.rest() == ""


# Transcripts


def follow(tokens: list[Token], sizes: list[int], ended: Ended, stops: list[str]) -> tuple[list[Part], Transcript]:
    """The tokens in rounds of these sizes (the last size again and again)."""
    transcript, parts, at = Transcript(stops, with_tokens=True), [], 0
    while at < len(tokens):
        n = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        rest = tokens[at : at + n]
        at += n
        parts.append(transcript.feed(Chunk(tuple(rest), ended if at >= len(tokens) else Ended.NOT)))
        if parts[-1].finish:
            break
    return parts, transcript


def summary(parts: list[Part], transcript: Transcript):
    ids = [t.id for part in parts for t in part.tokens]
    return "".join(p.text for p in parts), ids, parts[-1].finish, transcript.n_tokens


_PIECES = st.lists(st.sampled_from([b"a", b"b", b"ab", b"", b"\n", "é".encode(), b"\xf0\x9f", b"\x98\x80"]), min_size=1)


@settings(deadline=None)
@given(_PIECES, _STOPS, st.lists(st.integers(1, 9), min_size=1), st.booleans())
def test_rounds_of_any_size_give_the_same(pieces, stops, sizes, eog):
    tokens = [Token(i, piece) for i, piece in enumerate(pieces)] + [Token(99, b"</s>")] * eog
    ended = Ended.EOG if eog else Ended.LENGTH
    alone = summary(*follow(tokens, [1], ended, stops))
    assert summary(*follow(tokens, sizes, ended, stops)) == alone
    whole = b"".join(pieces).decode("utf-8", "replace")
    text, stop = expected(whole, stops)
    assert alone[0] == text
    assert alone[2] == ("stop" if eog or stop else "length")


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_stop_ends_the_count_where_it_is_complete(size):
    """Tokens that a round brought beyond the stop string are nobody's."""
    tokens = [fake_token(byte) for byte in b"one two three"]
    parts, transcript = follow(tokens, [size], Ended.LENGTH, ["two"])
    text, ids, finish, n = summary(parts, transcript)
    assert (text, finish, n) == ("one ", "stop", 7)
    assert bytes(ids) == b"one "


def test_the_last_token_of_a_generation_is_counted_and_not_shown():
    transcript = Transcript(with_tokens=True)
    part = transcript.feed(Chunk((fake_token(65), fake_token(EOS)), Ended.EOG))
    assert (part.text, part.finish, transcript.n_tokens) == ("A", "stop", 2)
    assert [t.id for t in part.tokens] == [65]


def test_a_held_back_beginning_of_a_stop_comes_out_at_the_end():
    transcript = Transcript(["END"])
    assert transcript.feed(Chunk((fake_token(69),))).text == ""
    assert transcript.feed(Chunk((fake_token(78),), Ended.LENGTH)) == Part("EN", (), "length")


def test_tokens_come_with_their_text():
    token = Token(1, b"\xf0\x9f", TokenProbabilities(Probability(1, -1.0)))
    rest = Token(2, b"\x98\x80", TokenProbabilities(Probability(2, -1.0)))
    transcript = Transcript(with_tokens=True)
    assert transcript.feed(Chunk((token,))) == Part("")
    assert transcript.feed(Chunk((rest,))) == Part("😀", (token, rest))
