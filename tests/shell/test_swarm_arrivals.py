"""Pieces that come from several sources at once, some of which lie, on their way to a real `.part`."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import trio

from tightwad_agent.errors import DiskFull
from tightwad_agent.ids import SafeName
from tightwad_agent.swarm.arrivals import Arrivals, Found
from tightwad_agent.swarm.files import free_bytes
from tightwad_agent.swarm.manifest import Manifest, Piece
from tightwad_agent.swarm.part import PartFile
from tightwad_agent.swarm.peer import Received

N, LENGTH, CHUNK = 4, 10_000, 4_000
GOOD = random.Random(1).randbytes(N * LENGTH)
WRONG = bytes(N * LENGTH)
SPANS = range(0, N * LENGTH, LENGTH)
PIECES = tuple(Piece(at, LENGTH, hashlib.sha256(GOOD[at : at + LENGTH]).digest()) for at in SPANS)
PLAN = Manifest(SafeName("toy.gguf"), len(GOOD), hashlib.sha256(GOOD).digest(), PIECES)


class Desk:
    def __init__(self, folder: Path) -> None:
        self.part = PartFile.open(folder / "x.part", folder / "x.journal", PLAN, free_bytes)
        self.durable: list[tuple[str, int]] = []
        self.arrivals = Arrivals(PLAN, self.part, self._durable)

    def _durable(self, source: str, piece: int) -> None:
        self.durable.append((source, piece))
        self.part.have.add(piece)

    async def give(self, source: str, piece: int, data: bytes, part: int) -> Found:
        """One of the three parts of a piece, cut from the bytes of a whole model."""
        start, end = part * CHUNK, min(LENGTH, (part + 1) * CHUNK)
        whole = data[piece * LENGTH : (piece + 1) * LENGTH]
        return await self.arrivals.take(source, Received(piece, whole[start:end], start, end == LENGTH))

    async def settled(self, n: int) -> None:
        with trio.fail_after(20):
            while len(self.durable) < n:
                await trio.sleep(0.001)


@asynccontextmanager
async def desk(folder: Path) -> AsyncIterator[Desk]:
    made = Desk(folder)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(made.arrivals.run)
            yield made
            nursery.cancel_scope.cancel()
    finally:
        made.part.close()


async def test_a_piece_in_parts_is_compared_stored_and_kept_over_a_restart(tmp_path: Path) -> None:
    async with desk(tmp_path) as it:
        assert [await it.give("a", 2, GOOD, i) for i in range(3)] == [Found.MORE, Found.MORE, Found.GOOD]
        await it.settled(1)
        assert it.durable == [("a", 2)]
        assert it.part.read(2, 0, LENGTH) == GOOD[2 * LENGTH : 3 * LENGTH]
    assert Desk(tmp_path).part.have == {2}


async def test_a_wrong_piece_is_not_kept_and_can_come_again(tmp_path: Path) -> None:
    async with desk(tmp_path) as it:
        assert [await it.give("liar", 0, WRONG, i) for i in range(3)][-1] is Found.BAD
        assert [await it.give("a", 0, GOOD, i) for i in range(3)][-1] is Found.GOOD
        await it.settled(1)
        assert it.durable == [("a", 0)]


@pytest.mark.parametrize("first", ["liar", "honest"])
async def test_of_two_at_once_each_is_judged_by_its_own_bytes(tmp_path: Path, first: str) -> None:
    said = {"liar": WRONG, "honest": GOOD}
    order = [first, "honest" if first == "liar" else "liar"]
    found: dict[str, list[Found]] = {name: [] for name in order}
    async with desk(tmp_path) as it:
        for part in range(3):
            for name in order:
                found[name].append(await it.give(name, 1, said[name], part))
        await it.settled(1)
        assert found["honest"][-1] is Found.GOOD
        assert it.durable == [("honest", 1)]
        if first == "liar":
            assert found["liar"][-1] is Found.BAD
        assert it.part.read(1, 0, LENGTH) == GOOD[LENGTH : 2 * LENGTH]


async def test_what_comes_late_changes_nothing(tmp_path: Path) -> None:
    async with desk(tmp_path) as it:
        assert await it.give("liar", 3, WRONG, 0) is Found.MORE
        for part in range(3):
            await it.give("honest", 3, GOOD, part)
        await it.settled(1)
        assert await it.give("liar", 3, WRONG, 1) is Found.GOOD
        assert await it.give("liar", 3, WRONG, 2) is Found.MORE
        assert it.part.read(3, 0, LENGTH) == GOOD[3 * LENGTH :]


async def test_a_source_that_left_is_forgotten_and_another_writes(tmp_path: Path) -> None:
    async with desk(tmp_path) as it:
        await it.give("gone", 0, WRONG, 0)
        await it.give("gone", 1, WRONG, 0)
        it.arrivals.drop_all("gone")
        assert await it.give("gone", 0, WRONG, 1) is Found.MORE
        await it.give("a", 0, GOOD, 0)
        assert os.pread(it.part.fd, CHUNK, 0) == GOOD[:CHUNK]
        for piece in (0, 1):
            assert [await it.give("a", piece, GOOD, i) for i in range(3)][-1] is Found.GOOD
        await it.settled(2)


async def test_pieces_that_wait_are_made_durable_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[list[int]] = []
    real = PartFile.note

    def note(part: PartFile, pieces: list[int]) -> None:
        noted.append(list(pieces))
        real(part, pieces)

    monkeypatch.setattr(PartFile, "note", note)
    it = Desk(tmp_path)
    for piece in range(N):
        for part in range(3):
            await it.give("a", piece, GOOD, part)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(it.arrivals.run)
        await it.settled(N)
        nursery.cancel_scope.cancel()
    it.part.close()
    assert noted == [[0, 1, 2, 3]]


async def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "no space left")

    async with desk(tmp_path) as it:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFull, match="full"):
            await it.give("a", 0, GOOD, 0)
