"""What is on the disk already does not cross the network again, and nothing of it is believed."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import swarm_kit as kit
import trio

from tightwad_agent.errors import DiskFull
from tightwad_agent.ids import ModelId, SafeName
from tightwad_agent.swarm import files, manifest, reuse
from tightwad_agent.swarm.files import Identity, copy_range, hash_pieces
from tightwad_agent.swarm.manifest import Manifest, cut
from tightwad_agent.swarm.part import PartFile
from tightwad_agent.swarm.reuse import Held, Missing, take_local
from tightwad_agent.swarm.service import Phase, SwarmService
from tightwad_agent.swarm.store import Store
from tightwad_agent.testing import MemoryMesh, MemoryNode, sockets
from tightwad_agent.wire.rows import HeldModel

PATIENCE_S = 60
OLD = kit.llama(12, tensor_kb=64)
NEW = kit.llama(12, tensor_kb=64, **{"tokenizer.chat_template": "{{ messages }}" * 70})


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PIECE_BYTES", 1 << 15)
    monkeypatch.setattr(manifest, "SMALL_TENSOR_BYTES", 1 << 13)


def plan_of(path: Path) -> Manifest:
    data = path.read_bytes()
    fd = os.open(path, os.O_RDONLY)
    try:
        sha256, pieces = hash_pieces(fd, cut(len(data), kit.read(data)))
    finally:
        os.close(fd)
    return Manifest(SafeName(path.name), len(data), sha256, pieces)


def held(path: Path) -> Held:
    plan = plan_of(path)
    return Held(plan, (path,), (Identity.of(path.stat()),), range(len(plan.pieces)))


@contextmanager
def part_of(folder: Path, plan: Manifest) -> Iterator[PartFile]:
    part = PartFile.open(folder / "x.part", folder / "x.journal", plan, files.free_bytes)
    try:
        yield part
    finally:
        part.close()


def header_bytes(plan: Manifest) -> int:
    return plan.pieces[0].length


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return kit.write(tmp_path / "old.gguf", OLD)


@pytest.fixture
def plan(tmp_path: Path) -> Manifest:
    return plan_of(kit.write(tmp_path / "new" / "new.gguf", NEW))


# Copying


def test_all_but_the_header_is_copied_and_is_there_after_a_restart(tmp_path: Path, old: Path, plan: Manifest) -> None:
    done: list[int] = []
    with part_of(tmp_path, plan) as part:
        came = take_local(part, [held(old)], done.append)
        assert came == part.n_bytes == plan.size - header_bytes(plan)
        assert done[-1] == came
        assert done == sorted(done)
    with part_of(tmp_path, plan) as part:
        assert part.have == set(range(1, len(plan.pieces)))
        assert part.path.read_bytes()[header_bytes(plan) :] == NEW[header_bytes(plan) :]


def test_where_the_system_cannot_copy_it_is_done_by_hand(
    tmp_path: Path, old: Path, plan: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any) -> int:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    with part_of(tmp_path, plan) as part:
        assert take_local(part, [held(old)]) == plan.size - header_bytes(plan)
        assert part.path.read_bytes()[header_bytes(plan) :] == NEW[header_bytes(plan) :]
        monkeypatch.delattr(os, "copy_file_range")
        assert not copy_range(part.fd, plan.size - 5, part.fd, 0, 6), "the source ends before"


def test_files_that_are_gone_changed_or_cut_are_left_out(
    tmp_path: Path, old: Path, plan: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    gone, changed, rotten = (kit.write(tmp_path / n / "old.gguf", OLD) for n in ("gone", "changed", "rotten"))
    sources = [held(gone), held(changed), held(rotten)]
    gone.unlink()
    changed.write_bytes(OLD[:-1])
    stat = rotten.stat()
    rotten.write_bytes(bytes(len(OLD)))
    os.utime(rotten, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    damaged: list[ModelId] = []
    with part_of(tmp_path, plan) as part:
        assert take_local(part, sources, on_rot=damaged.append) == 0
        assert set(damaged) == {plan_of(old).root}
        assert part.have == set()
        for word in ("cannot be read", "it changed", "is not what it was"):
            assert word in caplog.text
        assert take_local(part, [*sources, held(old)]) == plan.size - header_bytes(plan)


def test_a_file_that_is_cut_between_two_pieces(tmp_path: Path, old: Path, plan: Manifest) -> None:
    """It still looks like itself when it is opened; the next piece finds out."""
    source = held(old)
    with part_of(tmp_path, plan) as part:
        came = take_local(part, [source], lambda done: os.truncate(old, header_bytes(source.manifest) + done))
        assert 0 < came < plan.size // 2
        for i in part.have:
            at = plan.pieces[i].offset
            assert part.read(i, 0, 100) == NEW[at : at + 100]


def test_pieces_that_occur_twice_are_copied_within_the_file(tmp_path: Path) -> None:
    twin = bytearray(OLD)
    pieces = plan_of(kit.write(tmp_path / "old.gguf", OLD)).pieces
    a, b = pieces[3], pieces[8]
    assert a.length == b.length
    twin[b.offset : b.offset + b.length] = twin[a.offset : a.offset + a.length]
    plan = plan_of(kit.write(tmp_path / "twin.gguf", bytes(twin)))
    with part_of(tmp_path, plan) as part:
        part.write(3, twin[a.offset : a.offset + a.length])
        part.have.add(3)
        assert take_local(part, []) == b.length
        assert part.have == {3, 8}
        assert part.read(8, 0, b.length) == bytes(twin[b.offset : b.offset + b.length])


def test_what_was_copied_before_it_was_stopped_is_kept(
    tmp_path: Path, old: Path, plan: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reuse, "NOTE_BYTES", 1 << 16)
    noted: list[int] = []
    real = PartFile.note

    def note(part: PartFile, done: list[int]) -> None:
        noted.append(len(done))
        real(part, done)

    monkeypatch.setattr(PartFile, "note", note)

    def stop(done: int) -> None:
        if done > plan.size // 2:
            raise KeyboardInterrupt

    with part_of(tmp_path, plan) as part, pytest.raises(KeyboardInterrupt):
        take_local(part, [held(old)], stop)
    assert max(noted) <= 2, "in batches"
    with part_of(tmp_path, plan) as part:
        assert len(part.have) == sum(noted)
        assert plan.size // 2 - (1 << 16) < part.n_bytes < plan.size


def test_a_disk_that_is_full_is_said(
    tmp_path: Path, old: Path, plan: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with part_of(tmp_path, plan) as part:
        monkeypatch.setattr(os, "copy_file_range", full)
        with pytest.raises(DiskFull):
            take_local(part, [held(old)])


def test_what_is_missing(old: Path, plan: Manifest) -> None:
    other = plan_of(old)
    missing = Missing(plan, {1, 2})
    everything = range(len(other.pieces))
    assert list(missing.in_(other, everything)) == [(i, (i,)) for i in everything if i > 2]
    assert list(missing.in_(other, [5, 5])) == [(5, (5,))]
    missing.found(other.pieces[5].sha256)
    assert list(missing.in_(other, [5])) == []
    assert not Missing(plan, range(len(plan.pieces)))


# In the store and in a transfer


def test_the_store_knows_complete_models_and_those_on_their_way(tmp_path: Path, old: Path, plan: Manifest) -> None:
    store = Store(tmp_path / "m")
    store.open()
    try:
        entry = store.share(old)
        other = plan_of(kit.write(tmp_path / "third.gguf", kit.llama(12, tensor_kb=64, seed=4)))
        store.keep_manifest(other)
        store.keep_manifest(plan)
        part = store.open_part(other)
        data = (tmp_path / "third.gguf").read_bytes()
        place = other.pieces[2]
        part.write(2, data[place.offset : place.offset + place.length])
        kit.write(store.state_dir / "no-model.journal", b"x")
        found = {h.manifest.root: h for h in store.elsewhere(plan.root)}
        assert set(found) == {entry.root, other.root}
        assert list(found[other.root].pieces) == [2]
        assert {h.manifest.root for h in store.elsewhere(entry.root)} == {other.root}
        part.close()
        store.mark_damaged(entry.root)
        assert {h.manifest.root for h in store.elsewhere(plan.root)} == {other.root}
    finally:
        store.close()


class Net:
    def __init__(self, nursery: trio.Nursery, folder: Path) -> None:
        self.mesh = MemoryMesh(nursery, sockets)
        self.nursery = nursery
        self.folder = folder

    async def node(self, name: str) -> tuple[SwarmService, MemoryNode]:
        mesh = self.mesh.add(name)
        made = SwarmService(Store(self.folder / name), mesh.open_stream, mesh.node, random.Random(name))
        mesh.streams["swarm"] = made.handle
        await self.nursery.start(made.run)
        return made, mesh

    async def seed(self, data: bytes) -> tuple[MemoryNode, HeldModel]:
        made, mesh = await self.node("seed")
        return mesh, await made.add(str(kit.write(self.folder / "seed-files" / "new.gguf", data)))


@asynccontextmanager
async def net(folder: Path) -> AsyncIterator[Net]:
    async with trio.open_nursery() as nursery:
        yield Net(nursery, folder)
        nursery.cancel_scope.cancel()


async def fetched(node: SwarmService, seed: MemoryNode, model: ModelId) -> tuple[int, int]:
    """Bytes from peers and from this disk, once the model is here."""
    node.set_holders(model, frozenset({seed.node}))
    node.want(model)
    with trio.fail_after(PATIENCE_S):
        seen = -1
        while node.path_of(model) is None or node.snapshot().transfers[-1].phase is not Phase.COMPLETE:
            seen = await node.wait_changed(seen)
    status = next(t for t in node.snapshot().transfers if t.model == model)
    return sum(status.from_each_peer.values()), status.reused


async def test_a_new_header_costs_the_header(tmp_path: Path, old: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await network.seed(NEW)
        node, _ = await network.node("node")
        await node.add(str(old))
        came, reused = await fetched(node, seed, model.model)
        path = node.path_of(model.model)
        assert path is not None
        assert path.read_bytes() == NEW
        assert old.read_bytes() == OLD
        assert came <= 0.03 * len(NEW)
        assert came + reused == len(NEW)


async def test_a_rotten_file_costs_time_and_nothing_else(tmp_path: Path, old: Path) -> None:
    async with net(tmp_path) as network:
        seed, model = await network.seed(NEW)
        node, _ = await network.node("node")
        mine = await node.add(str(old))
        stat = old.stat()
        with old.open("r+b") as file:
            file.seek(len(OLD) // 2)
            file.write(b"rot")
        os.utime(old, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        came, reused = await fetched(node, seed, model.model)
        path = node.path_of(model.model)
        assert path is not None
        assert path.read_bytes() == NEW
        assert came + reused == len(NEW)
        assert came > header_bytes(plan_of(path))
        assert node.path_of(mine.model) is None, "it is not offered any more"


def split_llama() -> list[bytes]:
    first = kit.llama(4, tensor_kb=64, **{"split.no": 0, "split.count": 2})
    second = [(f"blk.{i}.w", (256, 64), "F32") for i in range(4, 8)]
    return [first, kit.make_gguf(second, {"split.no": 1, "split.count": 2}, seed=2)]


async def test_a_model_of_several_files_comes_from_peers_and_from_this_disk(tmp_path: Path) -> None:
    """The node holds, as one file, a model with half of its tensors."""
    one, two = split_llama()
    async with net(tmp_path) as network:
        made, seed = await network.node("seed")
        folder = network.folder / "seed-files"
        kit.write(folder / "big-00001-of-00002.gguf", one)
        model = await made.add(str(kit.write(folder / "big-00002-of-00002.gguf", two)))
        assert (model.name, model.size) == ("big.gguf", len(one) + len(two))
        node, _ = await network.node("node")
        half = [(f"x{i}", (256, 64), "F32") for i in range(4)]
        await node.add(str(kit.write(tmp_path / "half.gguf", kit.make_gguf(half, {"more": "x" * 500}, seed=2))))
        came, reused = await fetched(node, seed, model.model)
        assert reused == 4 * (64 << 10)
        assert came == model.size - reused
        path = node.path_of(model.model)
        assert path == tmp_path / "node" / "big-00001-of-00002.gguf"
        assert path.read_bytes() == one
        assert (tmp_path / "node" / "big-00002-of-00002.gguf").read_bytes() == two
        assert node.held()[-1] == model
        await node.remove(model.model)
        assert not list((tmp_path / "node").glob("*.gguf"))
