"""What a drafter's link does with tokens that nobody is in a hurry for: real sockets, the drafter's side by hand."""

from __future__ import annotations

import math
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
import trio.testing
from draft_fakes import Inbox, until

from tightwad_agent.direct import direct
from tightwad_agent.engine import draft_link
from tightwad_agent.engine.draft_link import DraftLink, LinkSession, joined
from tightwad_agent.proxy.draft_clock import MOST_S, DraftClock
from tightwad_agent.testing import node_id
from tightwad_agent.wire.draft import FROM_DRAFTER, Drafted, DrafterInfo, Hello, NoDraft
from tightwad_agent.wire.frames import encode
from tightwad_agent.wire.verify import pack_tokens

INFO = DrafterInfo(node_id("far"), "far", "d" * 64, 4, 0.0)
TOKEN_US = 10_000_000
"""So slow that a rest outlasts every test."""


def drafted(offset: int, *tokens: int, branch: int = 0, session: int = 1, ended: bool = False) -> Drafted:
    return Drafted(session, branch, offset, pack_tokens(tokens), TOKEN_US * (offset + len(tokens)), ended)


@dataclass
class Far:
    """The drafter's end, the link, and a session that waits for 100 tokens of branch 0 and has two of them."""

    end: socket.socket
    link: DraftLink
    session: LinkSession
    inbox: Inbox

    def say(self, *messages: object) -> None:
        self.end.sendall(b"".join(encode(FROM_DRAFTER.encode(message)) for message in messages))

    async def settle(self) -> None:
        for _ in range(20):
            await trio.testing.wait_all_tasks_blocked()


@asynccontextmanager
async def resting(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Far]:
    """The session is patient, and the link leaves what comes next unread."""
    monkeypatch.setattr(draft_link, "MAX_REST_S", math.inf)
    ours, theirs = socket.socketpair()
    stream = direct(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
    with theirs:
        async with trio.open_nursery() as nursery:
            link = DraftLink(stream, Hello("d" * 64, 1000, 200, 4), 1000, lambda _slots: INFO)
            nursery.start_soon(link.run)
            inbox = Inbox()
            far = Far(theirs, link, link.open(inbox), inbox)
            far.session.ask(0, 0, [1], 100)
            far.say(drafted(0, 10))
            await inbox.drafted(1)
            far.session.patient(True)
            far.say(drafted(1, 11))
            await inbox.drafted(2)
            yield far
            nursery.cancel_scope.cancel()


async def test_tokens_that_nobody_waits_for_are_left_and_then_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async with resting(monkeypatch) as far:
        far.say(drafted(2, 12), drafted(3, 13))
        far.say(drafted(4, 14))
        await far.settle()
        assert far.inbox.tokens == [10, 11], "they are not looked at"
        far.session.collect()
        assert far.inbox.events[2:] == [drafted(2, 12, 13, 14)]
        far.session.collect()
        assert len(far.inbox.events) == 3


async def test_who_is_not_patient_any_more_gets_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async with resting(monkeypatch) as far:
        far.say(drafted(2, 12))
        await far.settle()
        far.session.patient(False)
        assert await far.inbox.drafted(3) == [10, 11, 12]
        far.say(drafted(3, 13))
        assert await far.inbox.drafted(4) == [10, 11, 12, 13]


async def test_a_new_branch_and_another_session_are_not_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    async with resting(monkeypatch) as far:
        far.session.ask(1, 1, [2], 100)
        far.say(drafted(0, 20, branch=1))
        await until(lambda: 20 in far.inbox.tokens)
        other = Inbox()
        far.link.open(other).ask(0, 0, [1], 100)
        far.say(drafted(0, 30, session=2))
        assert await other.drafted(1) == [30]


async def test_without_anything_to_come_the_end_of_the_stream_is_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with resting(monkeypatch) as far:
        far.session.patient(False)
        far.session.patient(True)
        far.say(NoDraft(1, 0, "full"))
        assert await far.inbox.refusal() == "full"
        far.end.close()
        await until(lambda: not far.link.alive)


async def test_a_session_about_to_have_all_it_asked_for_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with resting(monkeypatch) as far:
        far.say(drafted(2, *range(100, 195)))
        far.session.collect()
        far.session.patient(False)
        far.session.patient(True)
        far.say(drafted(97, 195))
        await far.inbox.drafted(98)
        far.say(drafted(98, 196))
        assert (await far.inbox.drafted(99))[-1] == 196


@pytest.mark.parametrize("says", [drafted(7, 12), Hello("d" * 64, 1, 1, 1), None], ids=["gap", "hello", "end"])
async def test_a_fault_that_is_collected_ends_the_link_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, says: object
) -> None:
    async with resting(monkeypatch) as far:
        if says is None:
            far.end.close()
        else:
            far.say(says)
        far.session.collect()
        assert await far.inbox.refusal()
        assert not far.link.alive
        far.session.collect()


def test_only_what_continues_a_branch_is_joined() -> None:
    one, two, three = drafted(0, 1), drafted(1, 2), drafted(2, 3)
    assert joined([one, two, three]) == [drafted(0, 1, 2, 3)]
    assert joined([one, three]) == [one, three], "a gap"
    assert joined([one, drafted(1, 2, branch=1)]) == [one, drafted(1, 2, branch=1)]
    last = drafted(1, 2, ended=True)
    assert joined([one, last, three]) == [drafted(0, 1, 2, ended=True), three], "nothing comes behind the end"
    no = NoDraft(1, 0, "full")
    assert joined([one, no, two]) == [one, no, two]
    others = [drafted(0, 8, session=2), drafted(1, 9, session=2)]
    assert joined([one, others[0], two, others[1]]) == [drafted(0, 1, 2), drafted(0, 8, 9, session=2)]
    odd = Drafted(1, 0, 0, b"12345")
    assert joined([odd, drafted(1, 2)]) == [odd, drafted(1, 2)]
    long = drafted(0, *range(255))
    assert joined([long, drafted(255, 1), drafted(256, 2)]) == [drafted(0, *range(255), 1), drafted(256, 2)]


def test_the_clock_says_when_tokens_came_that_were_looked_at_late() -> None:
    clock = DraftClock()

    def came(us: int, now: float, branch: int = 1) -> float:
        return clock.came_at(Drafted(1, branch, 0, b"", us), now)

    assert came(20_000, 100.02) == 100.02
    assert came(40_000, 100.07) == pytest.approx(100.04), "30 ms late"
    assert came(60_000, 100.06) == pytest.approx(100.06)
    assert came(60_000, 100.07) == 100.07, "a clock that stands still says nothing"
    assert came(80_000, 100.075) == pytest.approx(100.075)
    assert came(100_000, 100.2) == pytest.approx(max(100.095, 100.2 - MOST_S)), "the least delay counts"
    assert came(10**15, 100.3) == 100.3, "never later than now"
    assert came(5, 100.4, branch=2) == 100.4, "a branch begins anew"
    assert came(6, 200.0, branch=2) == pytest.approx(200.0 - MOST_S), "nor ever long ago"
