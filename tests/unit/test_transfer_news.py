"""Transfers as events."""

from __future__ import annotations

from tightwad_agent.ids import ModelId
from tightwad_agent.swarm.service import Phase, TransferStatus
from tightwad_agent.transfer_news import QUIET_S, TransferNews

BIG = ModelId("b" * 64)
GB = 10**9


def status(phase: Phase, done: int = 0, problem: str = "", *, reused: int = 0, peers: int = 0) -> TransferStatus:
    sources = {f"n{i}": 1 for i in range(peers)}
    return TransferStatus(BIG, "big", phase, done, 4 * GB, 0.0, peers, sources, 0, problem, reused)


class Watch:
    def __init__(self) -> None:
        self.news = TransferNews()
        self.now = 0.0

    def see(self, *found: TransferStatus, problems: tuple[str, ...] = (), after_s: float = 1.0) -> list[str]:
        self.now += after_s
        return [text for text, _ in self.news.look(found, problems, self.now)]


def test_a_transfer_begins_and_ends() -> None:
    watch = Watch()
    assert watch.see() == []
    assert watch.see(status(Phase.LOOKING)) == []
    assert watch.see(status(Phase.FETCHING)) == ["big (4.0 GB) is being fetched"]
    assert watch.see(status(Phase.FETCHING, GB)) == []
    assert watch.see(status(Phase.FINISHING, 4 * GB)) == []
    done = status(Phase.COMPLETE, 4 * GB, peers=2)
    assert watch.see(done, after_s=17.0) == ["big is complete: 4.0 GB in 20 s, 200 MB/s, from 2 sources"]
    assert watch.see(done) == []


def test_what_was_here_is_said() -> None:
    watch = Watch()
    assert watch.see(status(Phase.FETCHING, GB)) == ["big (4.0 GB) is being fetched, 1.0 GB of it are here already"]
    text = watch.see(status(Phase.COMPLETE, 4 * GB, reused=2 * GB, peers=1), after_s=3.0)
    assert text == ["big is complete: 3.0 GB in 3 s, 1.0 GB/s, from 1 source; 2.0 GB were on this disk in other files"]


def test_one_that_was_complete_at_the_start_is_no_news() -> None:
    watch = Watch()
    assert watch.see(status(Phase.COMPLETE, 4 * GB)) == []


def test_one_of_which_all_was_here() -> None:
    watch = Watch()
    watch.see(status(Phase.CHECKING, 4 * GB))
    assert watch.see(status(Phase.COMPLETE, 4 * GB), after_s=0.0) == ["big is complete: 0 B in 0 s"]


def test_one_that_is_wanted_no_more() -> None:
    watch = Watch()
    watch.see(status(Phase.FETCHING))
    assert watch.see(status(Phase.IDLE, GB)) == ["big is not fetched any more, 1.0 GB of it are here"]


def test_problems_are_told_once_and_not_all_the_time() -> None:
    watch = Watch()
    assert watch.see(status(Phase.NO_ROOM, 0, "4 GB are missing")) == ["big does not come: 4 GB are missing"]
    assert watch.see(status(Phase.NO_ROOM, 0, "4 GB are missing")) == []
    assert watch.see(status(Phase.NO_ROOM, 0, "3 GB are missing")) == []
    assert watch.see(status(Phase.NO_ROOM, 0, "3 GB are missing"), after_s=QUIET_S) == [
        "big does not come: 3 GB are missing"
    ]
    watch.see(status(Phase.NO_ROOM))
    again = watch.see(status(Phase.NO_ROOM, 0, "3 GB are missing"), after_s=QUIET_S)
    assert again == ["big does not come: 3 GB are missing"]


def test_what_may_pass_is_waiting() -> None:
    watch = Watch()
    watch.see(status(Phase.FETCHING))
    assert watch.see(status(Phase.FETCHING, 0, "nobody is there")) == ["big has to wait: nobody is there"]


def test_problems_of_the_store_are_told_when_they_are_new() -> None:
    watch = Watch()
    assert watch.see(problems=("x is damaged",)) == ["x is damaged"]
    assert watch.see(problems=("x is damaged", "y is damaged")) == ["y is damaged"]
    assert watch.see() == []
    assert watch.see(problems=("x is damaged",)) == ["x is damaged"]


def test_what_is_gone_is_forgotten() -> None:
    watch = Watch()
    watch.see(status(Phase.FETCHING))
    assert watch.see() == []
    assert watch.see(status(Phase.COMPLETE, 4 * GB)) == []
