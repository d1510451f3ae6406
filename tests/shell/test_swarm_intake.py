"""What comes over a link, in any cut, from honest peers and others; and the thread that reads it."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent.direct import TAKE_SIZE, Direct, SocketEnd
from tightwad_agent.errors import PeerError, PeerGone, PeerSilent, ProtocolError
from tightwad_agent.ids import SafeName
from tightwad_agent.swarm import intake
from tightwad_agent.swarm.arrivals import Arrivals, Found
from tightwad_agent.swarm.files import free_bytes
from tightwad_agent.swarm.intake import MAX_ITEMS, Intake, Item, Landed, ThreadedReader
from tightwad_agent.swarm.manifest import Manifest, Piece
from tightwad_agent.swarm.part import PartFile
from tightwad_agent.testing import node_id, sockets
from tightwad_agent.wire.frames import encode
from tightwad_agent.wire.swarm import BLOCK_BYTES, CODEC, Block, KeepAlive, Request, Update

LENGTHS = [3000, 1000, BLOCK_BYTES + 50]
DATA = [random.Random(i).randbytes(n) for i, n in enumerate(LENGTHS)]
STARTS = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
PIECES = tuple(Piece(at, len(d), hashlib.sha256(d).digest()) for at, d in zip(STARTS, DATA, strict=True))
PLAN = Manifest(SafeName("toy.gguf"), sum(LENGTHS), hashlib.sha256(b"".join(DATA)).digest(), PIECES)
ME, PEER = node_id("me"), node_id("peer")


def frame(message: object, payload: bytes = b"") -> bytes:
    return encode(CODEC.encode(message), payload)


def piece(i: int, data: bytes | None = None) -> bytes:
    """Its blocks."""
    data = DATA[i] if data is None else data
    return b"".join(frame(Block(i, at), data[at : at + BLOCK_BYTES]) for at in range(0, max(1, len(data)), BLOCK_BYTES))


class Desk:
    """An intake in front of a real `.part`. `wanted`: pieces that were asked for."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.part = PartFile.open(folder / "x.part", folder / "x.journal", PLAN, free_bytes)
        self.wanted = {0, 1, 2}
        self.arrivals = Arrivals(PLAN, self.part)
        self.intake = Intake(self.arrivals.source(), LENGTHS, self.wanted.__contains__)
        self.items: list[Item] = []

    def feed(self, *parts: bytes) -> list[Item]:
        for part in parts:
            self.intake.feed(part, self.items)
        return self.items

    def on_disk(self) -> bytes:
        return os.pread(self.part.fd, PLAN.size, 0)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.part.close()


def test_blocks_land_and_messages_come_through_in_order(desk: Desk) -> None:
    said = frame(KeepAlive()) + piece(2) + frame(Request(7)) + piece(0, bytes(3000))
    assert desk.feed(said) == [
        (KeepAlive(), Landed(0)),
        (Block(2, 0), Landed(BLOCK_BYTES)),
        (Block(2, BLOCK_BYTES), Landed(50, Found.GOOD)),
        (Request(7), Landed(0)),
        (Block(0, 0), Landed(3000, Found.BAD)),
    ]
    assert desk.on_disk()[4000:] == DATA[2]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 3))
def test_the_cut_does_not_matter(tmp_path_factory: pytest.TempPathFactory, size: int, more: int) -> None:
    said = piece(1) + frame(Update((1,), (2,))) * more + piece(0)
    whole, cut = Desk(tmp_path_factory.mktemp("a")), Desk(tmp_path_factory.mktemp("b"))
    try:
        parts = (said[at : at + size] for at in range(0, len(said), size))
        assert whole.feed(said) == cut.feed(*parts)
        assert whole.on_disk() == cut.on_disk()
        assert cut.on_disk()[:4000] == DATA[0] + DATA[1]
    finally:
        whole.part.close()
        cut.part.close()


@pytest.mark.parametrize(
    "block", [Block(1, 500), Block(1, -1), Block(1, 1 << 40), Block(0, 2500), Block(-1, 0), Block(99, 0)]
)
def test_a_block_that_does_not_fit_touches_nothing(desk: Desk, block: Block) -> None:
    """The conversation says what is wrong with it; here it must not reach beyond its piece."""
    desk.wanted.discard(99)
    assert desk.feed(frame(block, b"\xff" * 1000)) == [(block, Landed(1000))]
    assert desk.on_disk() == bytes(PLAN.size)


def test_a_block_longer_than_its_piece_touches_nothing(desk: Desk) -> None:
    assert desk.feed(frame(Block(1, 0), DATA[1] + b"\xff" * 500)) == [(Block(1, 0), Landed(1500))]
    assert desk.on_disk() == bytes(PLAN.size)


def test_what_was_not_asked_for_or_taken_back_touches_nothing(desk: Desk) -> None:
    desk.wanted.clear()
    assert desk.feed(piece(1)) == [(Block(1, 0), Landed(1000))]
    assert desk.on_disk() == bytes(PLAN.size)


def test_without_a_disk_everything_is_only_counted() -> None:
    items: list[Item] = []
    Intake(None, LENGTHS, lambda _piece: True).feed(piece(1) + frame(Request(2)), items)
    assert items == [(Block(1, 0), Landed(1000)), (Request(2), Landed(0))]


def test_a_disk_that_is_full_is_said_and_the_rest_still_comes(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> int:
        raise OSError(28, "no space left")

    monkeypatch.setattr(os, "pwrite", full)
    (_, landed), rest = desk.feed(piece(1) + frame(KeepAlive()))
    assert landed.failure is not None
    assert "full" in str(landed.failure)
    assert rest[0] == KeepAlive()


@pytest.mark.parametrize(
    "bad", [b"\0\0\0\x05\0\0\0\0\xc1\xff\xff\xff\xff", b"\xff" * 8, frame(KeepAlive())[:-1] + b"\xc1"]
)
def test_garbage_is_a_protocol_error_after_what_came_before_it(desk: Desk, bad: bytes) -> None:
    with pytest.raises(ProtocolError):
        desk.feed(frame(Request(3)) + bad)
    assert desk.items == [(Request(3), Landed(0))]


# The thread


@asynccontextmanager
async def reading(desk: Desk, rest: bytes = b"") -> AsyncIterator[tuple[ThreadedReader, Direct]]:
    """A reader that runs, and the peer's end."""
    near, far = sockets(ME, PEER)
    assert isinstance(near, SocketEnd)
    assert isinstance(far, SocketEnd)
    reader = ThreadedReader(near, rest, desk.intake)
    async with near, far, trio.open_nursery() as nursery:
        nursery.start_soon(reader.run)
        with trio.fail_after(30):
            yield reader, far
            nursery.cancel_scope.cancel()
    assert not [t for t in threading.enumerate() if "_read from" in t.name], "no thread is left"


async def collect(reader: ThreadedReader, n: int) -> list[Item]:
    found: list[Item] = []
    while len(found) < n:
        found += await reader.get()
    return found


async def test_a_thread_reads_what_was_read_before_and_what_comes(desk: Desk) -> None:
    said = piece(1) + piece(2) + frame(KeepAlive())
    async with reading(desk, said[:300]) as (reader, far):
        await far.send_all(said[300:])
        assert [type(m) for m, _ in await collect(reader, 4)] == [Block, Block, Block, KeepAlive]
    assert desk.on_disk()[3000:] == DATA[1] + DATA[2]


@pytest.mark.parametrize(("said", "words"), [(b"", "was closed"), (frame(KeepAlive())[:-1], "inside a frame")])
async def test_an_end_is_said_after_what_came(desk: Desk, said: bytes, words: str) -> None:
    async with reading(desk) as (reader, far):
        await far.send_all(frame(Request(1)) + said)
        await far.aclose()
        assert await collect(reader, 1) == [(Request(1), Landed(0))]
        with pytest.raises(PeerGone, match=words):
            await reader.get()
        with pytest.raises(PeerGone, match=words):
            await reader.get()


async def test_garbage_is_said_after_what_came(desk: Desk) -> None:
    async with reading(desk) as (reader, far):
        await far.send_all(frame(Request(1)) + b"\xff" * 100)
        assert await collect(reader, 1) == [(Request(1), Landed(0))]
        with pytest.raises(ProtocolError, match="at most"):
            await reader.get()


async def test_silence_is_said(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "SILENCE_S", 0.3)
    monkeypatch.setattr(intake, "LOOK_S", 0.05)
    async with reading(desk) as (reader, far):
        await far.send_all(frame(Request(1)))
        assert await collect(reader, 1) == [(Request(1), Landed(0))]
        with pytest.raises(PeerSilent, match=r"0\.3 s"):
            await reader.get()


async def test_a_reader_that_waits_ends_at_once(desk: Desk) -> None:
    async with reading(desk):
        await trio.sleep(0.1)
        began = time.monotonic()
    assert time.monotonic() - began < 0.5 * intake.LOOK_S, "it did not wait for its next look"


async def test_a_stream_that_is_closed_under_the_thread_waits_for_it(desk: Desk) -> None:
    near, far = sockets(ME, PEER)
    assert isinstance(near, SocketEnd)
    reader = ThreadedReader(near, b"", desk.intake)
    async with far, trio.open_nursery() as nursery:
        nursery.start_soon(reader.run)
        await far.send_all(piece(2))
        await collect(reader, 2)
        await trio.aclose_forcefully(near)
        with trio.fail_after(10), pytest.raises(PeerError):
            await reader.get()


async def test_who_floods_is_read_no_faster_than_it_is_handled(desk: Desk) -> None:
    """What is not asked for stays with the sender."""
    n_sent = 0

    async def flood(far: Direct) -> None:
        nonlocal n_sent
        while True:
            await far.send_all(frame(KeepAlive()) * 100)
            n_sent += 100

    async with reading(desk) as (reader, far):
        async with trio.open_nursery() as flooding:
            flooding.start_soon(flood, far)
            before = -1
            while n_sent != before:
                before = n_sent
                await trio.sleep(0.5)
            flooding.cancel_scope.cancel()
        waiting = len(reader._items)
        assert MAX_ITEMS <= waiting < n_sent
        assert waiting <= MAX_ITEMS + TAKE_SIZE // len(frame(KeepAlive())), "one read at most beyond the limit"
        assert len(await collect(reader, n_sent)) >= n_sent
