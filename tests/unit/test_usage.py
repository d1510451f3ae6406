"""What was asked with each API key."""

from __future__ import annotations

import pytest

from tightwad_agent.proxy.families import page
from tightwad_agent.proxy.metrics import MetricsView
from tightwad_agent.proxy.usage import MAX_NAMES, OTHERS, Usage, Used, tokens_of


@pytest.mark.parametrize(
    ("tail", "n"),
    [
        (b'"usage":{"prompt_tokens":9,"completion_tokens":5,"total_tokens":14}}', 5),
        (b'data: {"timings":{"prompt_n":9,"predicted_n":7}}\n\ndata: [DONE]\n\n', 7),
        (b'"predicted_n":1}\n\ndata: {"predicted_n":2}\n\n', 2),
        (b'"completion_tokens" : 12 ,"predicted_n":12', 12),
        (b'{"text":"\\"completion_tokens\\":999"}', 0),  # what the model wrote itself
        (b'{"text":"\\"predicted_n\\": 999","completion_tokens":3}', 3),
        (b'"completion_tokens":-1', 0),
        (b'"completion_tokens":1234567890123', 0),
        (b"", 0),
        (b"\xff\x00", 0),
    ],
)
def test_tokens_from_the_end_of_an_answer(tail: bytes, n: int) -> None:
    assert tokens_of(tail) == n


def test_sums_by_name() -> None:
    usage = Usage()
    usage.count("phone", b'"completion_tokens":5')
    usage.count("phone", b"")
    usage.count("laptop", b'"completion_tokens":1')
    assert usage.of("phone") == Used(2, 5)
    assert usage.of("nobody") == Used()
    assert usage.all() == {"phone": Used(2, 5), "laptop": Used(1, 1)}


def test_names_are_bounded() -> None:
    usage = Usage()
    for n in range(2 * MAX_NAMES):
        usage.count(f"k{n}", b"")
    usage.count("k0", b"")
    assert len(usage.all()) == MAX_NAMES + 1
    assert usage.of(OTHERS).requests == MAX_NAMES
    assert usage.of("k0").requests == 2


def test_on_the_page_of_metrics() -> None:
    view = MetricsView(version="1", llama_cpp="b1", keys={"phone": Used(2, 5)})
    lines = page(view).decode().splitlines()
    assert 'tightwad_key_requests_total{key="phone"} 2.0' in lines
    assert 'tightwad_key_tokens_total{key="phone"} 5.0' in lines
