"""Bytes of tokens to text: however they are split, the same text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent.proxy.text import TextDecoder, token_text

# bytes that begin, continue and break characters, more often than chance would bring them
_BYTES = st.lists(st.sampled_from([0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0xFF, 0xED, 0xA0])).map(
    bytes
)


def splits(data, *, of):
    """`of` cut at the drawn places."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(of)))))
    return [of[a:b] for a, b in zip([0, *cuts], [*cuts, len(of)], strict=True)]


def read(parts: list[bytes]) -> str:
    decoder = TextDecoder()
    return "".join([decoder.feed(part) for part in parts]) + decoder.rest()


@settings(deadline=None)
@given(st.one_of(_BYTES, st.text().map(str.encode)), st.data())
def test_any_split_gives_the_same_text(whole, data):
    assert read(splits(data, of=whole)) == whole.decode("utf-8", "replace")


@settings(deadline=None)
@given(st.text(), st.data())
def test_what_is_out_is_never_taken_back(text, data):
    """Only whole characters come out, each as soon as its last byte is there."""
    decoder, given_bytes, out = TextDecoder(), b"", ""
    for part in splits(data, of=text.encode()):
        given_bytes += part
        out += decoder.feed(part)
        assert out == given_bytes.decode("utf-8", "ignore")


def test_a_character_cut_off_at_the_end():
    decoder = TextDecoder()
    assert decoder.feed("a€".encode()[:-1]) == "a"
    assert decoder.rest() == "\ufffd"


def test_a_token_by_itself():
    assert token_text("é".encode()) == "é"
    assert token_text(b"\xf0\x9f") == "bytes:\\xf0\\x9f"
    assert token_text(b"") == ""
