"""What the filters of a tunnel say is worth waiting for, after each byte of a conversation."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from graph_kit import GRAPH_COMPUTE, GREETING, SET_TENSOR, graph, message

from tightwad_agent.engine.graph_codec import GraphEncoder
from tightwad_agent.engine.rpc_answers import Answers


def follow(passes: Answers | GraphEncoder, data: bytes, size: int, check: Callable[[int], None]) -> None:
    for at in range(0, len(data), size):
        passes.feed(data[at : at + size])
        check(min(at + size, len(data)))


@pytest.mark.parametrize("size", [1, 5, 9, 1000])
def test_the_encoder_says_what_must_follow(size: int) -> None:
    messages = [
        GREETING,
        message(8, b"g" * 312),
        message(SET_TENSOR, b"s" * 400),
        message(GRAPH_COMPUTE, graph(1)),
        message(16),
    ]
    data, starts = b"".join(messages), [0]
    for one in messages:
        starts.append(starts[-1] + len(one))
    encoder = GraphEncoder()

    def check(at: int) -> None:
        whole = [n for n, start in enumerate(starts) if start <= at][-1]
        into, is_last_set = at - starts[whole], whole and messages[whole - 1][0] == SET_TENSOR
        size = len(messages[whole]) if whole < len(messages) else 9
        assert encoder.missing == (size if into >= 9 else 9) - into
        assert encoder.is_inside == (into > 0)
        assert encoder.more_follows == (into > 0 or is_last_set)

    follow(encoder, data, size, check)


def test_a_foreign_stream_is_not_waited_for() -> None:
    encoder = GraphEncoder()
    encoder.feed(b"GET / HTTP/1.1")
    assert (encoder.missing, encoder.is_inside, encoder.more_follows) == (1, False, False)


@pytest.mark.parametrize("size", [1, 3, 8, 1000])
def test_an_answer_is_waited_for_until_it_is_whole(size: int) -> None:
    answers = Answers()
    lengths = [24, 0, 8, 2304, 0, 0, 5]
    data = b"".join(struct.pack("<Q", n) + bytes(n) for n in lengths)
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + 8 + n)

    def check(at: int) -> None:
        whole = [n for n, start in enumerate(starts) if start <= at][-1]
        into = at - starts[whole]
        size = 8 + lengths[whole] if into >= 8 else 8
        assert answers.missing == (size - into if into else 1)
        assert answers.is_inside == answers.more_follows == (into > 0)

    follow(answers, data, size, check)
