"""Where a request's head ends, and which heads are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.errors import NotReady
from tightwad_agent.proxy.heads import BadRequest, head_end
from tightwad_agent.proxy.limits import Budget

GOOD = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


def test_end():
    assert head_end(GOOD + b"more\n", 1000) == len(GOOD)


def test_every_beginning_waits():
    assert [head_end(GOOD[:n], 1000) for n in range(len(GOOD))] == [None] * len(GOOD)


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET / HTTP/1.1\r\nHost: a\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\tfolded\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b" GET",
    ],
)
def test_refused_whole_and_one_at_a_time(head):
    with pytest.raises(BadRequest):
        head_end(head, 1000)
    assert any(refused(head[:n]) for n in range(len(head) + 1))


def test_size():
    with pytest.raises(BadRequest) as info:
        head_end(b"A" * 1001, 1000)
    assert info.value.http_status == 431


def refused(data: bytes) -> bool:
    try:
        head_end(data, 1000)
    except BadRequest:
        return True
    return False


@given(st.binary(max_size=300) | st.lists(st.sampled_from([b"\r", b"\n", b"a", b" ", b":"])).map(b"".join))
def test_what_is_accepted_has_one_reading(data):
    try:
        end = head_end(data, 200)
    except BadRequest:
        return
    if end is not None:
        lines = data[:end].split(b"\r\n")
        assert lines[-2:] == [b"", b""]
        assert not any(b"\r" in line or b"\n" in line or line[:1] in (b" ", b"\t") for line in lines)


def test_budget_comes_back():
    budget = Budget(10)
    with budget.share() as take:
        take(6)
        with budget.share() as other, pytest.raises(NotReady):
            other(5)
        take(4)
    assert budget.left == 10
