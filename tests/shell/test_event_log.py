"""Events on the disk: restarts, torn lines, full disks, files that are not ours."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tightwad_agent import event_log
from tightwad_agent.agent import Agent
from tightwad_agent.config import Config
from tightwad_agent.event_log import FILE, MAX_FILE, OLD_FILE, EventLog, forget, read
from tightwad_agent.events import MAX_EVENTS, Journal, Kind
from tightwad_agent.ids import NodeName
from tightwad_agent.mesh import identity

PATIENCE_S = 30.0


def opened(folder: Path) -> tuple[Journal, EventLog]:
    journal = Journal("n1")
    kept = EventLog(folder, journal)
    kept.restore()
    return journal, kept


def texts(folder: Path) -> list[str]:
    return [event.text for event in read(folder)]


def tell(journal: Journal, kept: EventLog, text: str) -> None:
    journal.add(1000.0, text, Kind.POOL, {"took_s": 1.5})
    kept.note()


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """A disk that is full from there on, for this process."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


async def test_what_is_told_is_on_the_disk_soon_and_there_after_a_kill(tmp_path: Path) -> None:
    journal, kept = opened(tmp_path)
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kept.run)
            tell(journal, kept, "a")
            tell(journal, kept, "b")
            while texts(tmp_path) != ["a", "b"]:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()  # and no flush: as after a kill
    later, kept = opened(tmp_path)
    assert later.last() == journal.last()
    tell(later, kept, "c")
    kept.flush()
    assert [(e.seq, e.text) for e in read(tmp_path)] == [(1, "a"), (2, "b"), (3, "c")]
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


def test_what_came_last_is_flushed(tmp_path: Path) -> None:
    journal, kept = opened(tmp_path)
    tell(journal, kept, "stopped")
    kept.flush()
    kept.flush()
    assert texts(tmp_path) == ["stopped"]


def test_without_files_there_are_no_events(tmp_path: Path) -> None:
    journal, _ = opened(tmp_path)
    assert journal.last() == ()
    assert read(tmp_path / "nowhere") == []


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_line_costs_itself_only(tmp_path: Path, cut: int) -> None:
    journal, kept = opened(tmp_path)
    for text in ("a", "b"):
        tell(journal, kept, text)
    kept.flush()
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-cut])
    journal, kept = opened(tmp_path)
    assert [e.text for e in journal.last()] == (["a", "b"] if cut == 1 else ["a"])
    tell(journal, kept, "c")
    kept.flush()
    assert texts(tmp_path)[-1] == "c"
    assert "a" in texts(tmp_path)


def test_two_files_are_all_and_the_newest_are_kept(tmp_path: Path) -> None:
    journal, kept = opened(tmp_path)
    for i in range(9000):
        tell(journal, kept, f"{i} " + "x" * 400)
        if i % 500 == 0:
            kept.flush()
    kept.flush()
    sizes = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert set(sizes) == {FILE, OLD_FILE}
    assert max(sizes.values()) <= MAX_FILE
    found = read(tmp_path)
    assert found[-1].text.startswith("8999 ")
    assert [e.seq for e in found] == list(range(found[0].seq, 9001))
    assert len(opened(tmp_path)[0].last()) == MAX_EVENTS


def test_a_full_disk_is_said_and_what_was_missed_is_written_when_there_is_room(tmp_path: Path) -> None:
    journal, kept = opened(tmp_path)
    tell(journal, kept, "a")
    kept.flush()
    with files_of_at_most((tmp_path / FILE).stat().st_size + 20):
        tell(journal, kept, "b")
        kept.flush()
        tell(journal, kept, "c")
        kept.flush()
        assert kept.problem.startswith("events are not kept on the disk: ")
        assert texts(tmp_path) == ["a"]
    kept.flush()
    assert kept.problem == ""
    assert texts(tmp_path) == ["a", "b", "c"]


def test_of_two_events_the_one_that_fits_is_written_and_not_twice(tmp_path: Path) -> None:
    journal, kept = opened(tmp_path)
    tell(journal, kept, "a")
    kept.flush()
    size = (tmp_path / FILE).stat().st_size
    with files_of_at_most(2 * size + 20):
        tell(journal, kept, "b")
        tell(journal, kept, "c")
        kept.flush()
        assert texts(tmp_path) == ["a", "b"]
    kept.flush()
    assert texts(tmp_path) == ["a", "b", "c"]
    assert (tmp_path / FILE).read_text().count('"b"') == 1


async def test_the_task_goes_on_when_the_disk_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "RETRY_S", 0.01)
    folder = tmp_path / "gone"
    folder.mkdir()
    journal, kept = opened(folder)
    folder.rmdir()
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kept.run)
            tell(journal, kept, "a")
            while not kept.problem:
                await trio.sleep(0.01)
            folder.mkdir()
            while texts(folder) != ["a"]:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert kept.problem == ""


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(max_size=200) | st.just(b'{"at":1,"seq":1,"text":"x"}'), max_size=5))
def test_whatever_is_in_the_file_is_read_past(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("state")
    (folder / FILE).write_bytes(b"\n".join(parts))
    journal, kept = opened(folder)
    tell(journal, kept, "after it")
    kept.flush()
    assert texts(folder)[-1] == "after it"


def test_a_file_that_nests_too_deeply_or_is_huge_is_read_past(tmp_path: Path) -> None:
    line = json.dumps({"at": 1, "seq": 5, "text": "x"}).encode()
    (tmp_path / OLD_FILE).write_bytes(b"[" * 300_000 + b"\n" + line)
    with (tmp_path / FILE).open("wb") as file:
        file.truncate(1 << 33)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + json.dumps({"at": 1, "seq": 6, "text": "y"}).encode() + b"\n")
    journal, kept = opened(tmp_path)
    assert [e.text for e in journal.last()] == ["x", "y"]
    tell(journal, kept, "z")
    kept.flush()
    assert (tmp_path / FILE).stat().st_size < 1000, "begun anew"
    assert texts(tmp_path) == ["y", "z"]


def test_a_directory_of_that_name_is_said(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    journal, kept = opened(tmp_path)
    tell(journal, kept, "a")
    kept.flush()
    assert "Is a directory" in kept.problem


def test_a_link_that_somebody_left_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / FILE).symlink_to(tmp_path / "victim")
    journal, kept = opened(tmp_path)
    tell(journal, kept, "a")
    kept.flush()
    assert (tmp_path / "victim").read_text() == "mine"
    assert kept.problem


def test_a_node_that_leaves_forgets(tmp_path: Path) -> None:
    for name in (FILE, OLD_FILE, "state.yaml"):
        (tmp_path / name).write_text("x")
    forget(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["state.yaml"]
    forget(tmp_path)


async def test_an_agent_keeps_no_secret_among_its_events(tmp_path: Path) -> None:
    me = identity.create_cluster(tmp_path, NodeName("attic"), 1_766_000_000.0)
    agent = Agent(Config(state_dir=tmp_path), me)
    key = me.state.api_key
    agent.tell(f"a request with {key} failed", header=f"x-api-key: {key}")
    agent.event_log.flush()
    assert "a request with twk_[hidden] failed" in texts(tmp_path)
    assert key not in (tmp_path / FILE).read_text()
