"""Weights that need not cross: the worker gets what the engine sent, and no input does harm."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from graph_kit import GRAPH_COMPUTE, GREETING, SET_TENSOR, message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tightwad_agent.engine.graph_codec import PLAIN
from tightwad_agent.engine.weights_codec import (
    BLOCK,
    BLOCK_BYTES,
    MIN_WEIGHTS,
    OPAQUE,
    WEIGHTS,
    Extent,
    Weights,
    WeightsDecoder,
    WeightsEncoder,
)
from tightwad_agent.errors import ProtocolError

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

FILE = random.Random(4).randbytes(3 * BLOCK_BYTES)
PLACES = {b"small": (64, 100), b"blk.0.ffn": (1000, 2 * BLOCK_BYTES + 77), b"blk.1.attn": (2_200_000, 50_000)}


def tensor(name: bytes, data: bytes, offset: int = 0) -> bytes:
    """SET_TENSOR as the engine sends it."""
    return message(SET_TENSOR, bytes(228) + name.ljust(64, b"\0") + bytes(5) + struct.pack("<Q", offset) + data)


def held(name: bytes, start: int = 0, n: int | None = None) -> bytes:
    """SET_TENSOR with what the file holds of a tensor."""
    place, size = PLACES[name]
    return tensor(name, FILE[place + start : place + (size if n is None else start + n)], start)


ROUND = message(GRAPH_COMPUTE, bytes(5000)) + message(8, bytes(312))
SENT = [
    GREETING,
    message(4, bytes(8)),
    held(b"blk.0.ffn"),
    held(b"small"),
    held(b"blk.1.attn"),
    held(b"blk.0.ffn", 5, BLOCK_BYTES),
    tensor(b"unknown", bytes(MIN_WEIGHTS)),
    message(SET_TENSOR, bytes(20)),
    ROUND,
    held(b"blk.1.attn", 0, MIN_WEIGHTS),
    ROUND,
]


def encoded(chunks: Iterable[bytes], weights: Weights | None = None) -> bytes:
    encoder = WeightsEncoder(weights or Weights(PLACES))
    return b"".join(bytes(part) for chunk in chunks for part in encoder.feed(chunk))


def decoded(chunks: Iterable[bytes]) -> bytes:
    decoder = WeightsDecoder(len(FILE))
    return b"".join(filled(part) for chunk in chunks for part in decoder.feed(chunk))


def filled(part: object) -> bytes:
    if isinstance(part, Extent):
        return FILE[part.place : part.place + part.n_bytes]
    assert isinstance(part, bytes | bytearray | memoryview)
    return bytes(part)


def cut(data: bytes, at: Sequence[int]) -> list[bytes]:
    marks = [0, *sorted(n % (len(data) + 1) for n in at), len(data)]
    return [data[start:end] for start, end in pairwise(marks) if start < end]


@unhurried
@given(st.lists(st.sampled_from(SENT), max_size=8), st.lists(st.integers(0)), st.lists(st.integers(0)))
def test_the_worker_gets_what_the_engine_sent(messages: list[bytes], at: list[int], then: list[int]) -> None:
    sent = b"".join([GREETING, *messages])
    crossed = encoded(cut(sent, at))
    assert decoded(cut(crossed, then)) == sent
    assert len(crossed) <= len(sent)


def test_byte_by_byte() -> None:
    sent = GREETING + held(b"blk.1.attn") + held(b"small") + ROUND
    crossed = encoded(sent[at : at + 1] for at in range(len(sent)))
    assert crossed == encoded([sent])
    assert decoded(crossed[at : at + 1] for at in range(len(crossed))) == sent


def test_few_bytes_cross_for_what_the_file_holds() -> None:
    crossed = encoded(SENT)
    plain = sum(map(len, (GREETING, SENT[1], SENT[3], SENT[6], SENT[7], ROUND, ROUND)))
    n_tensors, n_blocks = 4, 3 + 1 + 1 + 1
    assert len(crossed) == plain + n_tensors * (9 + 305 + 16) + n_blocks * (9 + 32)


def test_each_block_says_where_it_lies_and_what_it_is() -> None:
    from hashlib import sha256

    decoder = WeightsDecoder(len(FILE))
    items = decoder.feed(encoded([GREETING, held(b"blk.0.ffn")]))
    blocks = [item for item in items if isinstance(item, Extent)]
    assert [(b.place, b.n_bytes) for b in blocks] == [
        (1000, BLOCK_BYTES),
        (1000 + BLOCK_BYTES, BLOCK_BYTES),
        (1000 + 2 * BLOCK_BYTES, 77),
    ]
    assert all(sha256(FILE[b.place : b.place + b.n_bytes]).digest() == b.sha256 for b in blocks)


def test_what_was_summed_up_once_is_known_the_next_time() -> None:
    weights = Weights(PLACES)
    first = encoded([GREETING, held(b"blk.0.ffn")], weights)
    assert encoded([GREETING, held(b"blk.0.ffn")], weights) == first
    assert len(weights.digests) == 3
    for block in weights.digests:
        weights.digests[block] = bytes(32)
    assert encoded([GREETING, held(b"blk.0.ffn")], weights).count(bytes(32)) >= 3


def test_other_bytes_than_the_files_have_another_sum() -> None:
    place, size = PLACES[b"blk.1.attn"]
    other = bytes([FILE[place] ^ 1]) + FILE[place + 1 : place + size]
    assert encoded([GREETING, tensor(b"blk.1.attn", other)]) != encoded([GREETING, held(b"blk.1.attn")])


@pytest.mark.parametrize(
    "sent",
    [
        tensor(b"blk.1.attn", bytes(50_000), offset=1),
        tensor(b"blk.1.attn", bytes(50_001)),
        tensor(b"blk.1.attn", bytes(20_000), offset=2**64 - 1),
        tensor(b"", bytes(20_000)),
        tensor(b"blk.1.att", bytes(20_000)),
        tensor(b"blk.1.attn", bytes(MIN_WEIGHTS - 1)),
    ],
)
def test_what_is_not_in_the_file_crosses_as_it_is(sent: bytes) -> None:
    assert encoded([GREETING, sent]) == GREETING + sent


@pytest.mark.parametrize("begin", [b"GET / HTTP/1.1\r\n", bytes([WEIGHTS]) * 40, bytes([BLOCK]), b"\0"])
def test_what_is_no_rpc_passes(begin: bytes) -> None:
    sent = [begin, *SENT, b"\xff" * 100]
    assert decoded([encoded(sent)]) == b"".join(sent)


@pytest.mark.parametrize("command", [OPAQUE, WEIGHTS, BLOCK, 0xFF])
def test_a_command_that_is_ours_ends_the_coding(command: int) -> None:
    sent = [GREETING, held(b"small"), message(command, bytes(9)), held(b"blk.0.ffn")]
    crossed = encoded(sent)
    assert len(crossed) == len(b"".join(sent)) + 9
    assert decoded([crossed]) == b"".join(sent)


def test_behind_the_graph_codecs_end_nothing_is_looked_at() -> None:
    sent = [GREETING, message(PLAIN), bytes([WEIGHTS]) * 9, held(b"blk.0.ffn")]
    assert encoded(sent) == b"".join(sent)
    assert decoded([b"".join(sent)]) == b"".join(sent)
    assert decoded(sent) == b"".join(sent)


def weights(n_data: int, place: int) -> bytes:
    return message(WEIGHTS, bytes(305) + struct.pack("<QQ", n_data, place))


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (message(OPAQUE, b"x"), "0xf8 of 1 bytes"),
        (message(WEIGHTS, bytes(320)), "0xf9 of 320 bytes"),
        (message(WEIGHTS)[:1] + b"\xff" * 8, "0xf9 of 18446744073709551615 bytes"),
        (message(BLOCK, bytes(31)), "0xfa of 31 bytes"),
        (message(0xFB), "0xfb of 0 bytes"),
        (message(BLOCK, bytes(32)), "without a tensor"),
        (weights(0, 0), "0 bytes at 0"),
        (weights(1, len(FILE)), f"1 bytes at {len(FILE)}"),
        (weights(2**64 - 1, 2**64 - 1), "of a file of"),
        (weights(9, 0) + message(8), "9 bytes of a tensor are missing"),
        (weights(9, 0) + weights(9, 0), "9 bytes of a tensor are missing"),
        (weights(9, 0) + message(OPAQUE), "9 bytes of a tensor are missing"),
        (weights(9, 0) + message(BLOCK, bytes(32)) * 2, "without a tensor"),
    ],
)
def test_what_no_encoder_sends_is_refused(sent: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        decoded([GREETING + sent])


@unhurried
@given(st.binary(max_size=2000), st.lists(st.integers(0)))
def test_no_input_makes_more_than_the_file_holds(noise: bytes, at: list[int]) -> None:
    decoder = WeightsDecoder(len(FILE))
    try:
        for chunk in cut(bytes([WEIGHTS]) + noise, at):
            for part in decoder.feed(chunk):
                if isinstance(part, Extent):
                    assert 0 < part.n_bytes <= BLOCK_BYTES
                    assert part.place + part.n_bytes <= len(FILE)
    except ProtocolError:
        pass
