from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.errors import PeerGone, ProtocolError
from tightwad_agent.wire.frames import PREFIX, Begun, Frame, FrameDecoder, StreamingDecoder, encode

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "frames.json").read_text())

small_frames = st.lists(st.builds(Frame, st.binary(max_size=30), st.binary(max_size=30)), max_size=5)


def decoder() -> FrameDecoder:
    return FrameDecoder(max_header=100, max_payload=100)


@pytest.mark.parametrize("vector", VECTORS, ids=[v["name"] for v in VECTORS])
def test_golden_vectors(vector: dict[str, str]) -> None:
    header, payload, wire = (bytes.fromhex(vector[k]) for k in ("header", "payload", "wire"))
    assert encode(header, payload) == wire
    assert FrameDecoder(max_payload=1 << 20).feed(wire) == [Frame(header, payload)]


@given(small_frames)
def test_whole_one_byte_at_a_time_and_one_by_one_give_the_same(frames: list[Frame]) -> None:
    wire = b"".join(encode(*frame) for frame in frames)
    whole, bytewise, one_by_one = decoder(), decoder(), decoder()
    assert whole.feed(wire) == frames
    assert [f for byte in wire for f in bytewise.feed(bytes([byte]))] == frames
    first = one_by_one.feed_one(wire)
    found = [] if first is None else [first]
    while (frame := one_by_one.feed_one(b"")) is not None:
        found.append(frame)
    assert found == frames
    for done in (whole, bytewise, one_by_one):
        assert done.buffered == b""
        done.eof()


@given(small_frames.filter(bool), st.data())
def test_a_cut_anywhere_gives_the_whole_frames_before_it(frames: list[Frame], data: st.DataObject) -> None:
    wire = b"".join(encode(*frame) for frame in frames)
    cut = data.draw(st.integers(0, len(wire) - 1))
    d = decoder()
    found = d.feed(wire[:cut])
    assert found == frames[: len(found)]
    ends = [sum(len(encode(*f)) for f in frames[:n]) for n in range(len(frames) + 1)]
    if cut in ends:
        d.eof()
    else:
        with pytest.raises(PeerGone, match="inside a frame"):
            d.eof()
    assert found + d.feed(wire[cut:]) == frames


@given(st.binary(max_size=200), st.lists(st.integers(1, 40), max_size=10))
def test_any_bytes_in_any_cut_give_frames_or_a_protocol_error(data: bytes, cuts: list[int]) -> None:
    def outcome(chunks: list[bytes]) -> tuple[list[Frame], bool]:
        d, found = decoder(), []
        try:
            for chunk in chunks:
                frame = d.feed_one(chunk)
                while frame is not None:
                    found.append(frame)
                    frame = d.feed_one(b"")
        except ProtocolError:
            return found, True
        return found, False

    pieces, rest = [], data
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    assert outcome([*pieces, rest]) == outcome([data]) == outcome([bytes([b]) for b in data])


@pytest.mark.parametrize(
    ("n_header", "n_payload"), [(101, 0), (0, 101), (2**32 - 1, 0), (0, 2**32 - 1), (2**32 - 1, 2**32 - 1)]
)
def test_absurd_lengths_are_refused_before_any_body_comes(n_header: int, n_payload: int) -> None:
    d = decoder()
    with pytest.raises(ProtocolError, match="at most 100 \\+ 100"):
        d.feed(PREFIX.pack(n_header, n_payload))
    assert len(d.buffered) == PREFIX.size
    with pytest.raises(ProtocolError):
        d.feed(b"")


def test_lengths_at_the_limits_are_taken() -> None:
    frame = Frame(b"h" * 100, b"p" * 100)
    assert decoder().feed(encode(*frame)) == [frame]


def test_payload_is_refused_where_none_was_agreed() -> None:
    with pytest.raises(ProtocolError):
        FrameDecoder().feed(encode(b"header", b"x"))


def test_what_comes_after_a_frame_stays_for_the_next_protocol() -> None:
    d = decoder()
    assert d.feed_one(encode(b"hello") + b"raw bytes") == Frame(b"hello", b"")
    assert d.buffered == b"raw bytes"


def streamed(d: StreamingDecoder, *parts: bytes) -> list[Begun | bytes]:
    return [x if isinstance(x, Begun) else bytes(x) for part in parts for x in d.feed(memoryview(part))]


def test_payloads_are_handed_on_as_they_come() -> None:
    d = StreamingDecoder(100, 100)
    wire = encode(b"head", b"payload") + encode(b"", b"") + encode(b"x", b"y")
    assert streamed(d, wire[:10]) == []
    assert d.missing == 2 + 7
    assert streamed(d, wire[10:14]) == [Begun(b"head", 7), b"pa"]
    assert d.left == d.missing == 5
    with pytest.raises(PeerGone, match="inside a frame"):
        d.eof()
    assert streamed(d, wire[14:]) == [b"yload", Begun(b"", 0), Begun(b"x", 1), b"y"]
    assert d.missing == 0
    d.eof()


@given(small_frames, st.integers(1, 12))
def test_streamed_frames_are_the_same_in_any_cut(frames: list[Frame], size: int) -> None:
    wire = b"".join(encode(*frame) for frame in frames)
    d = StreamingDecoder(100, 100)
    found: list[Frame] = []
    for part in streamed(d, *(wire[at : at + size] for at in range(0, len(wire), size))):
        if isinstance(part, Begun):
            found.append(Frame(part.header, b""))
        else:
            found[-1] = Frame(found[-1].header, found[-1].payload + part)
    assert found == frames
    d.eof()


@pytest.mark.parametrize(("n_header", "n_payload"), [(101, 0), (0, 101), (2**32 - 1, 2**32 - 1)])
def test_streamed_frames_have_the_same_limits(n_header: int, n_payload: int) -> None:
    with pytest.raises(ProtocolError, match="at most 100 \\+ 100"):
        streamed(StreamingDecoder(100, 100), PREFIX.pack(n_header, n_payload))
