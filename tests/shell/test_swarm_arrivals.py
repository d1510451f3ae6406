"""Pieces that come from several sources at once, some of which lie, on their way to a real `.part`."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import trio
import trio.testing

from tightwad_agent.errors import DiskFull
from tightwad_agent.ids import SafeName
from tightwad_agent.swarm.arrivals import SYNC_S, Arrivals, Found, Source
from tightwad_agent.swarm.files import free_bytes
from tightwad_agent.swarm.manifest import Manifest, Piece
from tightwad_agent.swarm.part import PartFile

N, LENGTH, CHUNK = 4, 10_000, 4_000
GOOD = random.Random(1).randbytes(N * LENGTH)
WRONG = bytes(N * LENGTH)
SPANS = range(0, N * LENGTH, LENGTH)
PIECES = tuple(Piece(at, LENGTH, hashlib.sha256(GOOD[at : at + LENGTH]).digest()) for at in SPANS)
PLAN = Manifest(SafeName("toy.gguf"), len(GOOD), hashlib.sha256(GOOD).digest(), PIECES)


class Desk:
    def __init__(self, folder: Path) -> None:
        self.part = PartFile.open(folder / "x.part", folder / "x.journal", PLAN, free_bytes)
        self.arrivals = Arrivals(PLAN, self.part)
        self.sources: dict[str, Source] = {}

    def source(self, name: str) -> Source:
        return self.sources.setdefault(name, self.arrivals.source())

    def give(self, name: str, piece: int, data: bytes, part: int) -> Found:
        """One of the three parts of a piece, cut from the bytes of a whole model."""
        start, end = part * CHUNK, min(LENGTH, (part + 1) * CHUNK)
        source = self.source(name)
        source.put(piece, start, data[piece * LENGTH + start : piece * LENGTH + end])
        return source.finish(piece) if end == LENGTH else Found.MORE

    def on_disk(self, piece: int) -> bytes:
        return os.pread(self.part.fd, LENGTH, piece * LENGTH)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.part.close()


def of(piece: int) -> bytes:
    return GOOD[piece * LENGTH : (piece + 1) * LENGTH]


def test_a_piece_in_parts_is_compared_stored_and_kept_over_a_kill(desk: Desk, tmp_path: Path) -> None:
    assert [desk.give("a", 2, GOOD, i) for i in range(3)] == [Found.MORE, Found.MORE, Found.GOOD]
    assert desk.on_disk(2) == of(2)
    again = Desk(tmp_path)
    assert again.part.have == {2}, "nothing had to be closed or synced first"
    again.part.close()


def test_a_wrong_piece_is_not_kept_and_can_come_again(desk: Desk, tmp_path: Path) -> None:
    assert [desk.give("liar", 0, WRONG, i) for i in range(3)][-1] is Found.BAD
    assert [desk.give("a", 0, GOOD, i) for i in range(3)][-1] is Found.GOOD
    assert desk.on_disk(0) == of(0)


@pytest.mark.parametrize("first", ["liar", "honest"])
def test_of_two_at_once_each_is_judged_by_its_own_bytes(desk: Desk, first: str) -> None:
    said = {"liar": WRONG, "honest": GOOD}
    order = [first, "honest" if first == "liar" else "liar"]
    found: dict[str, list[Found]] = {name: [] for name in order}
    for part in range(3):
        for name in order:
            found[name].append(desk.give(name, 1, said[name], part))
    assert found["honest"][-1] is Found.GOOD
    assert found["liar"][-1] is Found.BAD
    assert desk.on_disk(1) == of(1)


def test_what_comes_late_changes_nothing(desk: Desk) -> None:
    desk.give("liar", 3, WRONG, 0)
    for part in range(3):
        desk.give("honest", 3, GOOD, part)
    desk.give("liar", 3, WRONG, 1)
    assert desk.give("liar", 3, WRONG, 2) is Found.BAD
    assert desk.on_disk(3) == of(3)


def test_of_two_right_ones_the_second_is_no_news(desk: Desk, tmp_path: Path) -> None:
    for part in range(3):
        found = [desk.give(name, 1, GOOD, part) for name in "ab"]
    assert found == [Found.GOOD, Found.GOOD]
    assert len((tmp_path / "x.journal").read_bytes()) == 48 + 16, "noted once"


def test_a_source_that_left_is_forgotten_and_another_writes(desk: Desk) -> None:
    desk.give("gone", 0, WRONG, 0)
    desk.give("gone", 1, WRONG, 0)
    desk.source("gone").close()
    assert desk.give("gone", 0, WRONG, 1) is Found.MORE
    desk.give("gone", 2, WRONG, 0)
    desk.give("a", 0, GOOD, 0)
    assert os.pread(desk.part.fd, CHUNK, 0) == GOOD[:CHUNK]
    for piece in range(3):
        assert [desk.give("a", piece, GOOD, i) for i in range(3)][-1] is Found.GOOD
        assert desk.on_disk(piece) == of(piece)


def test_one_that_was_closed_while_it_wrote_writes_no_more(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread may be inside `put` when the link is given up."""
    real, inside, go_on = Arrivals.write, threading.Event(), threading.Event()

    def write(arrivals: Arrivals, source: Source, piece: int, offset: int, data: bytes) -> None:
        if source is gone:
            inside.set()
            assert go_on.wait(20)
        real(arrivals, source, piece, offset, data)

    monkeypatch.setattr(Arrivals, "write", write)
    gone = desk.source("gone")
    thread = threading.Thread(target=desk.give, args=("gone", 1, WRONG, 0))
    thread.start()
    assert inside.wait(20)
    gone.close()
    desk.give("a", 1, GOOD, 0)
    go_on.set()
    thread.join(20)
    assert [desk.give("a", 1, GOOD, i) for i in (1, 2)][-1] is Found.GOOD
    assert desk.on_disk(1) == of(1)


def test_one_that_was_closed_while_it_began_is_no_writer(desk: Desk) -> None:
    gone, other = desk.source("gone"), desk.source("a")
    gone.close()
    assert desk.arrivals.begin(gone, 0)
    assert desk.arrivals.begin(other, 0)
    assert not desk.arrivals.begin(desk.source("b"), 0)


def test_bytes_out_of_order_or_too_many_or_too_few_are_no_piece(desk: Desk) -> None:
    source = desk.source("a")
    source.put(0, CHUNK, of(0)[CHUNK:])
    assert source.finish(0) is Found.MORE, "it never began"
    source.put(0, 0, of(0)[:CHUNK])
    source.put(0, 2 * CHUNK, of(0)[2 * CHUNK :])
    assert source.finish(0) is Found.MORE
    source.put(0, 0, of(0)[:CHUNK])
    source.put(0, CHUNK + 1, of(0)[CHUNK:])
    assert source.finish(0) is Found.MORE, "all of it, but not where it belongs"
    assert desk.on_disk(1) == bytes(LENGTH)
    source.put(0, 0, of(0)[:CHUNK])
    source.drop(0)
    source.put(0, CHUNK, of(0)[CHUNK:])
    assert source.finish(0) is Found.MORE
    assert source.take(0, of(0)) is Found.GOOD


def test_many_threads_that_send_the_same_pieces(desk: Desk) -> None:
    """Liars among them: what is on the disk in the end is right, and each piece was noted once."""
    found: list[tuple[str, Found]] = []

    def send(name: str, data: bytes, seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(12):
            piece = dice.randrange(N)
            found.append((name, [desk.give(name, piece, data, i) for i in range(3)][-1]))
            if dice.random() < 0.2:
                desk.source(name).drop(piece)

    names = {f"honest {i}": GOOD for i in range(4)} | {f"liar {i}": WRONG for i in range(3)}
    threads = [threading.Thread(target=send, args=(name, data, i)) for i, (name, data) in enumerate(names.items())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 12 * len(names)
    assert {what for name, what in found if name.startswith("liar")} == {Found.BAD}
    assert {what for name, what in found if name.startswith("honest")} == {Found.GOOD}
    for piece in range(N):
        assert [desk.give("last", piece, GOOD, i) for i in range(3)][-1] is Found.GOOD
        assert desk.on_disk(piece) == of(piece)


async def test_what_was_noted_is_synced_soon_and_together(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    synced: list[float] = []

    async def at_once(work: object) -> None:
        assert work == desk.part.sync
        synced.append(trio.current_time())

    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.arrivals.run)
        await trio.sleep(5)
        began = trio.current_time()
        for at in (0.1, 0.5, 3.0):
            await trio.sleep(began + at - trio.current_time())
            desk.arrivals.noted()
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert [round(at - began, 2) for at in synced] == [0.1 + SYNC_S, 3.0 + SYNC_S]


def test_syncing_what_is_closed_by_now_is_nothing(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last pieces may be synced while the file gets its name."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    fds = [desk.part.fd, desk.part._journal_fd]
    desk.part.sync()
    desk.part.close()
    desk.part.sync()
    assert synced == fds


def test_a_full_disk_is_said(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskFull, match="full"):
        desk.give("a", 0, GOOD, 0)
