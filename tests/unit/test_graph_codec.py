"""Compute graphs on their way to a worker: the same bytes come out, few cross, and no input does harm."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise

import pytest
from graph_kit import GRAPH_COMPUTE, GRAPH_RECOMPUTE, GREETING, SET_TENSOR, graph, message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tightwad_agent.engine import graph_codec, hello
from tightwad_agent.engine.graph_codec import (
    DELTA,
    MAX_GRAPH,
    MAX_GRAPHS,
    MAX_REMEMBERED,
    MIN_GRAPH,
    NOTHING,
    PLAIN,
    SAME,
    Graph,
    GraphDecoder,
    GraphEncoder,
    Remembered,
)
from tightwad_agent.engine.graph_delta import STRIDE, applied, columns, difference
from tightwad_agent.errors import ProtocolError

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

GRAPHS = [graph(batch, n_layers=2) for batch in range(1, 7)] + [graph(1, n_layers=3)]
NOISE = random.Random(1).randbytes(20_000)
"""Worth nothing to anybody who compresses."""


def fed(end: GraphEncoder | GraphDecoder, chunks: Iterable[bytes]) -> bytes:
    """What comes out, each time before the next goes in."""
    return b"".join(b"".join(end.feed(chunk)) for chunk in chunks)


def coded(*messages: bytes) -> bytes:
    """As the worker's end gets it, HELLO first."""
    return fed(GraphEncoder(), [GREETING, *messages])


def each(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def cut(data: bytes, at: Sequence[int]) -> list[bytes]:
    marks = [0, *sorted(n % (len(data) + 1) for n in at), len(data)]
    return [data[start:end] for start, end in pairwise(marks) if start < end]


def compute(batch: int) -> bytes:
    return message(GRAPH_COMPUTE, GRAPHS[batch])


def test_hello_is_what_the_engine_says() -> None:
    assert graph_codec.HELLO == hello.COMMAND


class TestWhatCrosses:
    def test_a_graph_that_was_sent_before_is_ten_bytes(self) -> None:
        encoder = GraphEncoder()
        fed(encoder, [GREETING, compute(0), compute(1), compute(2)])
        for batch in (0, 1, 2, 2, 0):
            assert len(fed(encoder, [compute(batch)])) == 10

    def test_one_that_differs_in_its_batch_is_a_few_hundred(self) -> None:
        encoder = GraphEncoder()
        first = fed(encoder, [GREETING, message(GRAPH_COMPUTE, graph(1))])
        second = fed(encoder, [message(GRAPH_COMPUTE, graph(5))])
        assert len(first) < len(graph(1)) / 8
        assert len(second) < len(graph(5)) / 200

    def test_one_of_another_length_goes_by_itself(self) -> None:
        encoder = GraphEncoder()
        fed(encoder, [GREETING, compute(0)])
        assert len(fed(encoder, [message(GRAPH_COMPUTE, GRAPHS[-1])])) < len(GRAPHS[-1]) / 5

    def test_what_does_not_become_smaller_stays_as_it_is(self) -> None:
        encoder = GraphEncoder()
        fed(encoder, [GREETING])
        for _ in range(2):  # nor is it remembered
            assert fed(encoder, [message(GRAPH_COMPUTE, NOISE)]) == message(GRAPH_COMPUTE, NOISE)

    @pytest.mark.parametrize("size", [0, 4, MIN_GRAPH - 1, MAX_GRAPH + 1])
    def test_graphs_that_are_too_small_or_too_large_pass(self, size: int) -> None:
        plain = message(GRAPH_COMPUTE, bytes(size)) * 2
        assert coded(plain) == GREETING + plain

    @pytest.mark.parametrize("size", [MIN_GRAPH, MAX_GRAPH])
    def test_the_smallest_and_the_largest_do_not(self, size: int) -> None:
        plain = message(GRAPH_COMPUTE, bytes(size))
        small = coded(plain, plain)
        assert len(small) < len(GREETING) + size / 8
        assert fed(GraphDecoder(), [small]) == GREETING + plain * 2

    def test_everything_else_passes_as_it_is(self) -> None:
        plain = [message(SET_TENSOR, NOISE), message(GRAPH_RECOMPUTE, bytes(4)), message(2), message(0, bytes(12))]
        assert coded(*plain) == GREETING + b"".join(plain)


class TestOnTheWay:
    def test_parts_of_a_large_message_are_not_copied_and_not_held(self) -> None:
        for end in (GraphEncoder(), GraphDecoder()):
            start = GREETING + struct.pack("<BQ", SET_TENSOR, 50 << 30)
            assert fed(end, [start]) == start
            for _ in range(3):
                part = bytearray(NOISE)
                assert end.feed(part)[0] is part

    def test_a_header_in_parts_is_not_held_either(self) -> None:
        for end in (GraphEncoder(), GraphDecoder()):
            for byte in each(GREETING + message(SET_TENSOR, NOISE[:300]) + message(2), 1):
                assert fed(end, [byte]) == byte

    def test_a_graph_is_held_until_it_is_whole_and_nothing_before_it(self) -> None:
        encoder = GraphEncoder()
        before, plain = message(SET_TENSOR, NOISE[:300]), compute(0)
        assert fed(encoder, [GREETING + before + plain[:5]]) == GREETING + before
        assert fed(encoder, [plain[5:9], plain[9:-1]]) == b""
        assert fed(encoder, [plain[-1:] + before]).endswith(before)

    def test_a_header_that_turns_out_to_be_of_no_interest_goes_on_at_once(self) -> None:
        encoder, plain = GraphEncoder(), message(GRAPH_COMPUTE, bytes(MIN_GRAPH - 1))
        assert fed(encoder, [GREETING, plain[:8]]) == GREETING
        assert fed(encoder, [plain[8:9]]) == plain[:9]
        assert fed(encoder, [plain[9:10]]) == plain[9:10]

    def test_one_byte_at_a_time(self) -> None:
        plain = GREETING + b"".join((compute(0), message(SET_TENSOR, NOISE), compute(1), compute(0), message(2)))
        small = fed(GraphEncoder(), each(plain, 1))
        assert len(small) < len(plain) - 1.8 * len(GRAPHS[0])
        assert fed(GraphDecoder(), each(small, 1)) == plain

    messages = st.one_of(
        st.sampled_from([compute(i) for i in range(len(GRAPHS))]),
        st.sampled_from([message(GRAPH_COMPUTE, NOISE), message(GRAPH_COMPUTE, bytes(100)), message(GRAPH_COMPUTE)]),
        st.builds(message, st.integers(0, graph_codec.FIRST_OWN - 1), st.binary(max_size=40)),
        st.integers(0, 60_000).map(lambda n: message(SET_TENSOR, NOISE * (n // len(NOISE)) + NOISE[: n % len(NOISE)])),
    )

    @unhurried
    @given(st.lists(messages, max_size=20), st.lists(st.integers(0, 1 << 20)), st.lists(st.integers(0, 1 << 20)))
    def test_cut_anywhere_the_same_comes_out(self, sent: list[bytes], here: list[int], there: list[int]) -> None:
        plain = GREETING + b"".join(sent)
        small = fed(GraphEncoder(), cut(plain, here))
        assert small == fed(GraphEncoder(), [plain])
        assert fed(GraphDecoder(), cut(small, there)) == plain

    @unhurried
    @given(st.lists(messages, max_size=8))
    def test_each_message_is_through_before_the_next_begins(self, sent: list[bytes]) -> None:
        encoder, decoder = GraphEncoder(), GraphDecoder()
        for one in [GREETING, *sent]:
            assert fed(decoder, [fed(encoder, [one])]) == one


class TestWhatIsNoRpc:
    @unhurried
    @given(st.binary(min_size=1, max_size=200).filter(lambda data: data[0] != graph_codec.HELLO))
    def test_it_is_not_looked_at(self, data: bytes) -> None:
        encoder, decoder = GraphEncoder(), GraphDecoder()
        small = fed(encoder, each(data, 7))
        assert small == message(PLAIN) + data
        assert fed(decoder, each(small, 5)) == data
        for more in (compute(0), b"\xf1\xf2\xf3", compute(0)):
            assert fed(encoder, [more]) == more
            assert fed(decoder, [more]) == more

    @unhurried
    @given(st.integers(graph_codec.FIRST_OWN, 255), st.binary(max_size=50))
    def test_commands_of_the_engine_that_are_ours_end_it(self, command: int, more: bytes) -> None:
        plain = GREETING + compute(0) + message(command, more) + compute(0)
        small = fed(GraphEncoder(), [plain])
        assert small.endswith(message(PLAIN) + message(command, more) + compute(0))
        assert fed(GraphDecoder(), [small]) == plain

    @unhurried
    @given(st.binary(max_size=300), st.lists(st.integers(0, 300)))
    def test_any_bytes_come_through(self, data: bytes, at: list[int]) -> None:
        encoder, decoder = GraphEncoder(), GraphDecoder()
        plain = GREETING + data
        out = fed(decoder, cut(fed(encoder, cut(plain, at)), at))
        held = plain.removeprefix(out)
        assert plain.startswith(out)
        assert not held or held[0] == GRAPH_COMPUTE


class TestBounds:
    def test_so_many_graphs_are_remembered(self) -> None:
        encoder = GraphEncoder()
        variants = [message(GRAPH_COMPUTE, graph(1, n_layers=1, at=i)) for i in range(MAX_GRAPHS + 1)]
        fed(encoder, [GREETING, *variants])
        assert len(fed(encoder, [variants[1]])) == 10
        assert len(fed(encoder, [variants[0]])) > 10
        assert len(fed(encoder, [variants[1]])) == 10, "what was used lately stays longest"
        assert len(fed(encoder, [variants[2]])) > 10

    def test_and_so_many_bytes(self) -> None:
        half = MAX_REMEMBERED // 2
        plain = [message(GRAPH_COMPUTE, bytes([i]) * half) for i in range(3)]
        encoder, decoder = GraphEncoder(), GraphDecoder()
        for one, is_known in ((0, False), (1, False), (0, True), (2, False), (1, False)):
            small = fed(encoder, [plain[one]] if one or is_known else [GREETING, plain[one]])
            assert (len(small) == 10) is is_known
            assert fed(decoder, [small]).endswith(plain[one])

    @unhurried
    @given(st.lists(st.integers(0, 40), max_size=60))
    def test_both_ends_remember_the_same(self, order: list[int]) -> None:
        here, there = Remembered(), Remembered()
        for i in order:
            payload = bytes([i]) * 10
            which = here.same(payload)
            for one in (here, there):
                if which is None:
                    one.add(Graph(payload))
                else:
                    assert one.reused(which).payload == payload
            assert here[0].payload == there[0].payload == payload

    def test_a_difference_is_made_against_the_newest_of_that_length(self) -> None:
        remembered = Remembered()
        assert remembered.like(b"12") == NOTHING
        for payload in (b"12", b"34", b"567"):
            remembered.add(Graph(payload))
        assert (remembered.like(b"ab"), remembered.like(b"abc"), remembered.like(b"")) == (1, 0, NOTHING)


def delta(which: int, length: int, packed: bytes) -> bytes:
    return message(DELTA, struct.pack("<BI", which, length) + packed)


ONE_COLUMN = (1).to_bytes(37, "little")
N_FIRST = -(-len(GRAPHS[0]) // STRIDE)
"""Bytes of the first column."""


class TestAHostileCoordinator:
    @pytest.mark.parametrize(
        ("sent", "words"),
        [
            (message(SAME, b"\1"), "graph 1 of 1"),
            (message(SAME, b"\xff"), "graph 255 of 1"),
            (message(SAME), "of 0 bytes"),
            (message(SAME, b"\0\0"), "of 2 bytes"),
            (message(PLAIN, b"x"), "of 1 bytes"),
            (message(0xF3), "command 243"),
            (message(0xFF), "command 255"),
            (message(DELTA, bytes(4)), "of 4 bytes"),
            (struct.pack("<BQ", DELTA, MAX_GRAPH + 1), f"of {MAX_GRAPH + 1} bytes"),
            (struct.pack("<BQ", DELTA, (1 << 64) - 1), "of 18446744073709551615 bytes"),
            (delta(NOTHING, MAX_GRAPH + 1, bytes(60)), f"graph of {MAX_GRAPH + 1}"),
            (delta(NOTHING, MIN_GRAPH - 1, bytes(60)), f"graph of {MIN_GRAPH - 1}"),
            (delta(0, len(GRAPHS[0]) + 1, bytes(60)), f"made of one of {len(GRAPHS[0])}"),
            (delta(1, len(GRAPHS[0]), bytes(60)), "graph 1 of 1"),
            (delta(0, len(GRAPHS[0]), bytes(36)), "its map alone"),
            (delta(0, len(GRAPHS[0]), ONE_COLUMN + b"not zlib"), "zlib cannot read"),
            (delta(0, len(GRAPHS[0]), ONE_COLUMN + zlib.compress(bytes(N_FIRST - 1))), f"of the {N_FIRST} bytes"),
            (delta(0, len(GRAPHS[0]), ONE_COLUMN + zlib.compress(bytes(N_FIRST + 1))), f"of the {N_FIRST} bytes"),
            (delta(0, len(GRAPHS[0]), ONE_COLUMN + zlib.compress(bytes(64 << 20))), f"of the {N_FIRST} bytes"),
            (delta(0, len(GRAPHS[0]), ONE_COLUMN + zlib.compress(bytes(N_FIRST)) + b"x"), f"of the {N_FIRST} bytes"),
            (delta(0, len(GRAPHS[0]), ONE_COLUMN + zlib.compress(bytes(N_FIRST))[:-1]), f"of the {N_FIRST} bytes"),
            (delta(0, len(GRAPHS[0]), bytes(37)), "of the 0 bytes"),
        ],
    )
    def test_what_no_encoder_sends_is_refused(self, sent: bytes, words: str) -> None:
        decoder = GraphDecoder()
        fed(decoder, [coded(compute(0))])
        with pytest.raises(ProtocolError, match=words):
            fed(decoder, [sent])

    def test_the_example_that_the_others_are_made_from_is_taken(self) -> None:
        decoder = GraphDecoder()
        fed(decoder, [coded(compute(0))])
        assert fed(decoder, [delta(0, len(GRAPHS[0]), ONE_COLUMN + zlib.compress(bytes(N_FIRST)))]) == compute(0)

    def test_a_bomb_is_not_unpacked(self) -> None:
        decoder = GraphDecoder()
        fed(decoder, [coded(compute(0))])
        bomb = delta(0, len(GRAPHS[0]), ONE_COLUMN + zlib.compress(bytes(64 << 20)))
        tracemalloc.start()
        try:
            with pytest.raises(ProtocolError):
                fed(decoder, [bomb])
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()

    STREAM = coded(compute(0), message(SET_TENSOR, NOISE[:50]), compute(1), compute(0), compute(2), message(2))

    @unhurried
    @given(st.lists(st.tuples(st.integers(0, len(STREAM) - 1), st.integers(0, 255)), min_size=1, max_size=6))
    def test_changed_bytes_raise_nothing_else(self, changes: list[tuple[int, int]]) -> None:
        data = bytearray(self.STREAM)
        for at, byte in changes:
            data[at] = byte
        with suppress(ProtocolError):
            assert len(fed(GraphDecoder(), [bytes(data)])) < 10 * len(GRAPHS[0])

    @unhurried
    @given(st.integers(0, len(STREAM)))
    def test_of_a_stream_that_breaks_off_the_beginning_comes_out(self, end: int) -> None:
        whole = fed(GraphDecoder(), [self.STREAM])
        assert whole.startswith(fed(GraphDecoder(), [self.STREAM[:end]]))

    @unhurried
    @given(st.binary(max_size=400))
    def test_garbage_behind_a_good_beginning(self, garbage: bytes) -> None:
        decoder = GraphDecoder()
        fed(decoder, [self.STREAM])
        with suppress(ProtocolError):
            fed(decoder, [garbage])


class TestDifference:
    @unhurried
    @given(st.binary(max_size=3 * STRIDE), st.randoms(use_true_random=False), st.integers(0, 20))
    def test_it_makes_one_of_the_other(self, old: bytes, rng: random.Random, n_changes: int) -> None:
        new = bytearray(old)
        for _ in range(n_changes if old else 0):
            new[rng.randrange(len(new))] = rng.randrange(256)
        assert applied(old, difference(columns(bytes(new)), columns(old))) == new
        assert applied(bytes(len(old)), difference(columns(old), None)) == old

    def test_only_what_differs_is_in_it(self) -> None:
        same = difference(columns(NOISE), columns(NOISE))
        assert same == bytes(37) + zlib.compress(b"", 1)
        other = bytearray(NOISE)
        other[5] ^= 1
        changed = difference(columns(bytes(other)), columns(NOISE))
        assert int.from_bytes(changed[:37], "little") == 1 << 5
