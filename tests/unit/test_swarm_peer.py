"""One conversation: what is sent, and what is not put up with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent.errors import PeerRefused, ProtocolError
from tightwad_agent.ids import ModelId
from tightwad_agent.swarm.peer import Conversation, Joined, Outgoing, Progress, Received, Refused, Updated
from tightwad_agent.swarm.pieces import bits_of
from tightwad_agent.wire.frames import FrameDecoder, encode
from tightwad_agent.wire.swarm import (
    BLOCK_BYTES,
    CODEC,
    MAX_QUEUED,
    MAX_SWARM_HEADER,
    VERSION,
    Block,
    Bye,
    Cancel,
    GetManifest,
    Hello,
    KeepAlive,
    ManifestIs,
    Reject,
    Request,
    Update,
    Why,
)

MODEL = ModelId("ab" * 32)
LENGTHS = [2 * BLOCK_BYTES + 5, 10, BLOCK_BYTES, *[7] * 30]
N = len(LENGTHS)
DATA = [bytes([i]) * n for i, n in enumerate(LENGTHS)]


def hello(pieces: Iterable[int] = (), **changed: Any) -> Hello:
    return Hello(**{"version": VERSION, "model": MODEL, "have": bits_of(set(pieces), N), "fetching": (), **changed})


def talking(have: Iterable[int] = (), peer_has: Iterable[int] = range(N)) -> Conversation:
    c = Conversation(MODEL, LENGTHS)
    c.hello(set(have), ())
    out = c.outgoing()
    assert out is not None
    assert isinstance(out.message, Hello)
    assert c.handle(hello(peer_has), b"") == [Joined(tuple(peer_has), ())]
    return c


def sent(c: Conversation) -> list[Outgoing]:
    out = []
    while (o := c.outgoing()) is not None:
        out.append(o)
    return out


def give(c: Conversation, piece: int) -> list[Any]:
    effects = []
    for at in range(0, LENGTHS[piece], BLOCK_BYTES):
        effects += c.handle(Block(piece, at), DATA[piece][at : at + BLOCK_BYTES])
    return effects


def test_a_piece_comes_in_blocks() -> None:
    c = talking()
    c.request(0)
    assert [o.message for o in sent(c)] == [Request(0)]
    first, second, third = (DATA[0][at : at + BLOCK_BYTES] for at in (0, BLOCK_BYTES, 2 * BLOCK_BYTES))
    assert give(c, 0) == [
        Progress(BLOCK_BYTES),
        Received(0, first, 0, last=False),
        Progress(BLOCK_BYTES),
        Received(0, second, BLOCK_BYTES, last=False),
        Progress(5),
        Received(0, third, 2 * BLOCK_BYTES, last=True),
    ]


def test_a_request_is_served_in_blocks_after_messages() -> None:
    c = talking(have=(0, 1))
    c.handle(Request(0), b"")
    c.handle(Request(1), b"")
    first = c.outgoing()
    assert first == Outgoing(Block(0, 0), (0, 0, BLOCK_BYTES))
    c.we_have([2])
    c.we_fetch([5, 6])
    assert c.outgoing() == Outgoing(Update((2,), (5, 6)))
    assert [o.span for o in sent(c)] == [(0, BLOCK_BYTES, BLOCK_BYTES), (0, 2 * BLOCK_BYTES, 5), (1, 0, 10)]
    assert c.n_queued == 0


def test_news_is_told_once_and_in_portions() -> None:
    c = talking()
    c.we_fetch([1])
    assert [o.message for o in sent(c)] == [Update((), (1,))]
    c.we_fetch([1])
    assert sent(c) == []
    c.keep_alive()
    c.keep_alive()
    assert [o.message for o in sent(c)] == [KeepAlive()]


def test_more_news_than_one_message_may_hold() -> None:
    c = Conversation(MODEL, [1] * 2000)
    c.hello(set(), ())
    c.outgoing()
    c.we_have(range(2000))
    c.we_fetch(range(2000))
    told = [o.message for o in sent(c)]
    assert [len(m.have) for m in told if isinstance(m, Update)] == [512, 512, 512, 464]
    for message in told:
        CODEC.decode(CODEC.encode(message))


def test_cancel_is_answered_with_the_rest_or_a_reject() -> None:
    c = talking(have=(0, 1))
    c.handle(Request(0), b"")
    c.outgoing()
    c.handle(Cancel(0), b"")
    assert [o.message for o in sent(c)] == [Reject(0, Why.CANCELLED)]
    c.handle(Request(1), b"")
    c.outgoing()
    c.handle(Cancel(1), b"")
    assert sent(c) == [], "all of it was on its way"


def test_what_was_cancelled_is_of_no_interest_but_still_counted() -> None:
    c = talking()
    assert not c.wants(0)
    c.request(0)
    assert c.wants(0)
    c.handle(Block(0, 0), DATA[0][:BLOCK_BYTES])
    c.cancel(0)
    c.cancel(0)
    assert [o.message for o in sent(c)] == [Request(0), Cancel(0)]
    assert c.is_asked(0)
    assert not c.wants(0)
    rest = c.handle(Block(0, BLOCK_BYTES), DATA[0][:BLOCK_BYTES]) + c.handle(Block(0, 2 * BLOCK_BYTES), b"xxxxx")
    assert rest == [Progress(BLOCK_BYTES), Progress(5)]
    assert not c.is_asked(0)
    c.request(1)
    c.cancel(1)
    assert c.handle(Reject(1, Why.CANCELLED), b"") == []
    assert not c.is_asked(1)


def test_a_piece_that_cannot_be_read_is_rejected_once() -> None:
    c = talking(have=(0, 1))
    c.handle(Request(0), b"")
    out = c.outgoing()
    assert out is not None
    assert out.span is not None
    c.upload_failed(out.span)
    assert [o.message for o in sent(c)] == [Reject(0, Why.NOT_HERE)]
    c.handle(Request(1), b"")
    last = c.outgoing()
    assert last is not None
    assert last.span is not None
    c.upload_failed(last.span)
    assert [o.message for o in sent(c)] == [Reject(1, Why.NOT_HERE)]
    c.handle(Request(0), b"")
    out = c.outgoing()
    assert out is not None
    assert out.span is not None
    c.handle(Cancel(0), b"")
    c.upload_failed(out.span)
    assert [o.message for o in sent(c)] == [Reject(0, Why.CANCELLED)]


def test_what_is_not_here_is_rejected_and_the_asker_believes_it() -> None:
    c = talking(have=(0,))
    c.handle(Request(1), b"")
    assert [o.message for o in sent(c)] == [Reject(1, Why.NOT_HERE)]
    d = talking()
    assert d.peer_complete
    d.request(1)
    assert d.handle(Reject(1, Why.NOT_HERE), b"") == [Refused(1)]
    assert not d.peer_complete
    d.handle(Update((1,)), b"")
    assert d.peer_complete


def test_what_is_had_while_talking_can_be_asked_for() -> None:
    have: set[int] = set()
    c = Conversation(MODEL, LENGTHS)
    c.hello(have, (3,))
    c.handle(hello(), b"")
    have.add(1)
    c.handle(Request(1), b"")
    assert [type(o.message) for o in sent(c)] == [Hello, Block]


def test_update_says_what_is_new_and_what_is_on_its_way() -> None:
    assert talking(peer_has=()).handle(Update((3, 4), (5,)), b"") == [Updated((3, 4), (5,))]


def test_bye() -> None:
    c = talking(have=(0,))
    c.handle(Request(0), b"")
    c.bye("x" * 900)
    assert [o.message for o in sent(c)] == [Bye("x" * 500)]
    with pytest.raises(PeerRefused, match="going home"):
        c.handle(Bye("going home"), b"")


def test_asking_is_bounded() -> None:
    c = talking()
    for piece in range(MAX_QUEUED):
        assert c.may_ask
        c.request(piece)
    assert not c.may_ask
    with pytest.raises(ValueError, match="cannot be asked"):
        c.request(20)
    c.cancel(3)
    assert not c.may_ask, "a cancelled request counts until it is answered"
    c.handle(Reject(3, Why.CANCELLED), b"")
    assert c.may_ask
    with pytest.raises(ValueError, match="cannot be asked"):
        c.request(0)


@pytest.mark.parametrize(
    ("message", "payload", "words"),
    [
        (hello(), b"", "second hello"),
        (Request(N), b"", f"piece {N} of {N}"),
        (Request(-1), b"", "piece -1"),
        (Cancel(99), b"", "piece 99"),
        (Update((N,)), b"", "piece"),
        (Update((), (-3,)), b"", "piece -3"),
        (Block(0, 0), DATA[0][:BLOCK_BYTES], "without having been asked"),
        (Block(99, 0), b"x", "without having been asked"),
        (Reject(0, Why.NOT_HERE), b"", "without having been asked"),
        (Request(0), b"payload", "with a payload"),
        (KeepAlive(), b"payload", "with a payload"),
        (GetManifest(MODEL), b"", "in the middle"),
        (ManifestIs(), b"", "in the middle"),
        (object(), b"", "in the middle"),
    ],
)
def test_out_of_place(message: Any, payload: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        talking(have=range(N)).handle(message, payload)


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (KeepAlive(), "before the hello"),
        (Request(0), "before the hello"),
        (hello(version=2), "version 2"),
        (hello(model=ModelId("cd" * 32)), "cdcdcdcd"),
        (hello(have=b""), "have-map"),
        (hello(have=b"\xff" * 5), "beyond the last"),
        (hello(have=bytes(6)), "have-map"),
        (hello(fetching=(N,)), "piece"),
    ],
)
def test_a_bad_beginning(first: Any, words: str) -> None:
    c = Conversation(MODEL, LENGTHS)
    c.hello(set(), ())
    with pytest.raises(ProtocolError, match=words):
        c.handle(first, b"")
    assert not c.joined or words == "piece"


@pytest.mark.parametrize(
    ("offset", "n"),
    [(0, 1), (0, 0), (0, BLOCK_BYTES - 1), (1, BLOCK_BYTES), (BLOCK_BYTES, BLOCK_BYTES), (-1, BLOCK_BYTES)],
)
def test_blocks_come_whole_and_in_order(offset: int, n: int) -> None:
    c = talking()
    c.request(0)
    with pytest.raises(ProtocolError, match="expected"):
        c.handle(Block(0, offset), bytes(n))


def test_no_block_after_the_last() -> None:
    c = talking()
    c.request(1)
    give(c, 1)
    with pytest.raises(ProtocolError):
        c.handle(Block(1, 10), b"x")


def test_a_reject_as_cancelled_of_what_was_not() -> None:
    c = talking()
    c.request(1)
    with pytest.raises(ProtocolError, match="which it was not"):
        c.handle(Reject(1, Why.CANCELLED), b"")


def test_the_queue_is_bounded_also_for_one_who_never_reads() -> None:
    c = talking(have=range(N))
    for piece in range(MAX_QUEUED):
        c.handle(Request(piece), b"")
    with pytest.raises(ProtocolError, match="requests at once"):
        c.handle(Request(20), b"")
    d = talking(have=())
    for _ in range(MAX_QUEUED):
        d.handle(Request(0), b"")
    with pytest.raises(ProtocolError, match="requests at once"):
        d.handle(Request(0), b"")
    e = talking(have=range(N))
    for _ in range(MAX_QUEUED):
        e.handle(Request(0), b"")
        e.handle(Cancel(0), b"")
    with pytest.raises(ProtocolError, match="requests at once"):
        e.handle(Request(0), b"")
    f = talking(have=range(N))
    f.handle(Request(0), b"")
    with pytest.raises(ProtocolError, match="twice"):
        f.handle(Request(0), b"")


MESSAGES = [
    hello(range(N), fetching=(1, 2)),
    GetManifest(MODEL),
    ManifestIs(),
    Bye("so long"),
    Update((1,), (2, 3)),
    Request(4),
    Cancel(5),
    Block(6, 7),
    Reject(8, Why.NOT_HERE),
    KeepAlive(),
]


def test_messages_whole_and_one_byte_at_a_time() -> None:
    wire = b"".join(encode(CODEC.encode(m), b"pp" if isinstance(m, Block) else b"") for m in MESSAGES)
    slow = FrameDecoder(MAX_SWARM_HEADER, BLOCK_BYTES)
    frames = [f for b in wire for f in slow.feed(bytes([b]))]
    assert frames == FrameDecoder(MAX_SWARM_HEADER, BLOCK_BYTES).feed(wire)
    assert [CODEC.decode(f.header) for f in frames] == MESSAGES


def test_the_largest_hello_fits_its_frame() -> None:
    big = Hello(VERSION, MODEL, bytes(8192), tuple(range(65_000, 65_512)))
    assert len(CODEC.encode(big)) <= MAX_SWARM_HEADER


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(range(8)), st.integers(-2, N + 1), st.integers(0, 3)), max_size=60))
def test_any_order_of_messages_is_served_or_refused(steps: list[tuple[int, int, int]]) -> None:
    """Whatever comes: nothing but our own errors, and what is held stays bounded."""
    c = talking(have=range(0, N, 2))
    for kind, piece, more in steps:
        try:
            if kind == 0:
                c.handle(Request(piece), b"")
            elif kind == 1:
                c.handle(Cancel(piece), b"")
            elif kind == 2:
                c.handle(Block(piece, more * BLOCK_BYTES), bytes(7 if more else min(BLOCK_BYTES, LENGTHS[piece % N])))
            elif kind == 3:
                c.handle(Reject(piece, Why.NOT_HERE), b"")
            elif kind == 4 and c.may_ask and 0 <= piece < N and not c.is_asked(piece):
                c.request(piece)
            elif kind == 5:
                c.cancel(piece)
            elif kind == 6:
                c.handle(Update((piece,), ()), b"")
            else:
                c.outgoing()
        except ProtocolError:
            return
        assert c.n_queued <= MAX_QUEUED


def test_a_peer_that_makes_us_wait_shows_that_it_lives() -> None:
    assert talking().handle(KeepAlive(), b"") == [Progress(0)]
