"""Models of several files in the store: one entry, all or nothing, whatever crashes."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import swarm_kit as kit
from test_swarm_store import Crash, opened, power_fails_at

from tightwad_agent.errors import DiskFull, ModelError
from tightwad_agent.ids import ModelId, SafeName
from tightwad_agent.swarm import care, catalogue, manifest
from tightwad_agent.swarm.catalogue import Entry
from tightwad_agent.swarm.manifest import FileHash, Manifest, Piece, cut_files
from tightwad_agent.swarm.part import PartFile
from tightwad_agent.swarm.source import CompleteFile
from tightwad_agent.swarm.store import Store

NAMES = tuple(f"toy-0000{i}-of-00003.gguf" for i in (1, 2, 3))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PIECE_BYTES", 1 << 15)
    monkeypatch.setattr(manifest, "SMALL_TENSOR_BYTES", 1 << 13)
    monkeypatch.setattr(os, "fsync", lambda _fd: None)  # these tests are about the order of steps
    monkeypatch.setattr(os, "fdatasync", lambda _fd: None)


TOY = kit.shards()


def write_all(folder: Path, data: list[bytes], name: str = "toy") -> list[Path]:
    n = len(data)
    return [kit.write(folder / f"{name}-{i + 1:05d}-of-{n:05d}.gguf", d) for i, d in enumerate(data)]


def plan_of(data: list[bytes], name: str = "toy.gguf") -> Manifest:
    spans = cut_files([(len(d), kit.read(d)) for d in data])
    pieces, base = [], 0
    for d, cuts in zip(data, spans, strict=True):
        pieces += [Piece(base + o, n, hashlib.sha256(d[o : o + n]).digest()) for o, n in cuts]
        base += len(d)
    files = tuple(FileHash(len(d), hashlib.sha256(d).digest()) for d in data)
    return Manifest.of_files(SafeName(name), files, tuple(pieces), manifest.ModelFacts())


def fetch_rest(store: Store, plan: Manifest, data: list[bytes]) -> tuple[Entry, int]:
    """Everything a transfer does with the store; also the number of pieces that were missing."""
    whole = b"".join(data)
    store.keep_manifest(plan)
    part = store.open_part(plan)
    try:
        missing = set(range(len(plan.pieces))) - part.have
        for i in sorted(missing):
            offset, length, _ = plan.pieces[i]
            part.write(i, whole[offset : offset + length])
            part.have.add(i)
        return store.finish(part), len(missing)
    finally:
        part.close()


def visible(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".swarm"}


GOOD = dict(zip(NAMES, TOY, strict=True))


# Sharing


@pytest.mark.parametrize("which", [0, 1, 2])
def test_any_file_brings_them_all(tmp_path: Path, which: int) -> None:
    paths = write_all(tmp_path / "files", TOY)
    done: list[int] = []
    with opened(tmp_path / "m") as store:
        entry = store.share(paths[which], done.append)
        assert done == sorted(done)
        assert done[-1] == sum(map(len, TOY))
        assert (entry.name, entry.paths, entry.in_place) == ("toy.gguf", tuple(paths), True)
        assert entry.where == paths[0], "the engine is given the first"
        assert entry.size == sum(map(len, TOY))
        assert entry.root == plan_of(TOY).root
        assert (entry.facts.n_layers, entry.facts.n_params) == (2, 2 * 4096 + 2 * 4096)
        assert store.read_gguf(entry.root) == kit.read(TOY[0])
        assert store.share(paths[2 - which], lambda _n: pytest.fail("read again")) == entry
    with opened(tmp_path / "m") as store:
        assert store.entries() == (entry,)
        kept = store.manifest(entry.root)
        assert kept is not None
        assert kept.files == plan_of(TOY).files
        source = CompleteFile(entry, kept)
        whole = b"".join(TOY)
        for i, (offset, length, _) in enumerate(kept.pieces):
            assert source.read(i, 0, length) == whole[offset : offset + length]


def test_files_that_are_missing_are_named(tmp_path: Path) -> None:
    paths = write_all(tmp_path, TOY)
    paths[1].unlink()
    with opened(tmp_path / "m") as store:
        with pytest.raises(ModelError) as caught:
            store.share(paths[2])
        assert "one of 3 files, and 1 of them are not in" in str(caught.value)
        assert NAMES[1] in str(caught.value)
        many = write_all(tmp_path / "many", kit.shards(9))
        for path in many[1:]:
            path.unlink()
        with pytest.raises(ModelError, match="and 3 more"):
            store.share(many[0])
        assert store.entries() == ()


def test_files_under_wrong_names_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "m") as store:
        with pytest.raises(ModelError, match="is file 2 of 3 of a model, expected file 1 of 1"):
            store.share(kit.write(tmp_path / "second.gguf", TOY[1]))
        with pytest.raises(ModelError, match="is file 3 of 3 of a model, expected file 2 of 3"):
            store.share(write_all(tmp_path / "swapped", [TOY[0], TOY[2], TOY[1]])[0])
        with pytest.raises(ModelError, match="is file 1 of 3 of a model, expected file 1 of 1"):
            store.adopt(kit.write(store.downloads / "x", TOY[0]), NAMES[0])
        first = kit.llama(1, **{"split.no": 0, "split.count": 2000})
        kit.write(tmp_path / "toy-00001-of-02000.gguf", first)
        with pytest.raises(ModelError, match="at most 1024"):
            store.share(tmp_path / "toy-00001-of-02000.gguf")


def test_a_name_like_that_of_one_of_several_is_just_a_name(tmp_path: Path) -> None:
    with opened(tmp_path / "m") as store:
        entry = store.share(kit.write(tmp_path / NAMES[1], kit.llama(2)))
        assert (entry.name, entry.shards) == (NAMES[1], ())
        other = store.share(kit.write(tmp_path / "one-00001-of-00001.gguf", kit.llama(2, seed=3)))
        assert other.shards == ()


@pytest.mark.parametrize("which", [0, 2])
def test_one_changed_or_vanished_file_takes_the_model_off(tmp_path: Path, which: int) -> None:
    paths = write_all(tmp_path / "files", TOY)
    with opened(tmp_path / "m") as store:
        entry = store.share(paths[0])
        kept = store.manifest(entry.root)
        assert kept is not None
        paths[which].rename(tmp_path / "away")
        assert store.entry(entry.root) is None
        assert f"{NAMES[which]} is gone" in store.problem(entry)
        kit.write(paths[which], TOY[which])
        assert f"{NAMES[which]} changed since" in store.problem(entry)
        sources = CompleteFile(entry, kept)
        readable = {kept.place(i)[0] for i in range(len(kept.pieces)) if sources.read(i, 0, 1) is not None}
        assert readable == {0, 1, 2} - {which}
        assert store.problem(store.share(paths[0])) == ""


def test_a_file_that_changes_while_they_are_read(tmp_path: Path) -> None:
    paths = write_all(tmp_path / "files", TOY)

    def tick(done: int) -> None:
        if done > len(TOY[0]) and paths[0].stat().st_size == len(TOY[0]):
            paths[0].write_bytes(TOY[0] + b"more")

    with opened(tmp_path / "m") as store:
        with pytest.raises(ModelError, match="changed while it was read"):
            store.share(paths[0], tick)
        assert store.entries() == ()


def test_links_side_by_side_are_taken_as_they_are_named(tmp_path: Path) -> None:
    """Caches of downloads keep files under their hashes, and links to them under their names."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for i, data in enumerate(TOY):
        (folder / NAMES[i]).symlink_to(kit.write(tmp_path / "blobs" / str(i), data))
    with opened(tmp_path / "m") as store:
        entry = store.share(folder / NAMES[1])
        assert entry.paths == tuple(folder / name for name in NAMES)


# Fetching


def test_fetched_under_their_own_names_and_removed(tmp_path: Path) -> None:
    with opened(tmp_path / "m") as store:
        entry, _ = fetch_rest(store, plan_of(TOY), TOY)
        assert visible(tmp_path / "m") == GOOD
        assert (entry.name, entry.facts.n_params) == ("toy.gguf", 4 * 4096)
        assert {p.name for p in store.state_dir.iterdir()} == {
            "lock",
            "catalogue",
            "downloads",
            f"{entry.root}.manifest",
        }
        second = tmp_path / "m" / NAMES[1]
        second.write_bytes(b"the user put something else here")
        store.remove(entry.root)
        assert set(visible(tmp_path / "m")) == {NAMES[1]}
        assert {p.name for p in store.state_dir.iterdir()} == {"lock", "catalogue", "downloads"}


def test_a_taken_name_moves_all_of_them(tmp_path: Path) -> None:
    kit.write(tmp_path / "m" / NAMES[1].upper().replace("OF", "of").replace("GGUF", "gguf"), b"of the user")
    with opened(tmp_path / "m") as store:
        entry, _ = fetch_rest(store, plan_of(TOY), TOY)
        assert entry.name == "toy (2).gguf"
        assert [p.name for p in entry.paths] == [f"toy (2)-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
        assert [p.read_bytes() for p in entry.paths] == TOY
        single = kit.write(store.downloads / "x", kit.llama(2, seed=8))
        assert store.adopt(single, "toy.gguf").name == "toy.gguf"


def test_what_came_is_taken_up_again(tmp_path: Path) -> None:
    plan = plan_of(TOY)
    whole = b"".join(TOY)
    with opened(tmp_path / "m") as store:
        part = store.open_part(plan)
        for i in (0, len(plan.pieces) - 1):
            offset, length, _ = plan.pieces[i]
            part.write(i, whole[offset : offset + length])
        paths = part.paths
        part.close()
        assert [p.name for p in paths] == [f"{plan.root}{end}" for end in (".part", ".00002.part", ".00003.part")]
        assert [p.stat().st_size for p in paths] == [len(d) for d in TOY]
        again = store.open_part(plan)
        assert again.have == {0, len(plan.pieces) - 1}
        again.close()
        paths[1].rename(tmp_path / "away")
        kit.write(paths[1], TOY[1])
        third = store.open_part(plan)
        assert third.have == set(), "one of the files is another"
        third.close()
        store.discard(plan.root)
        assert not list(store.state_dir.glob("*.part"))


def test_room_is_needed_for_all_of_them(tmp_path: Path) -> None:
    plan = plan_of(TOY)
    with opened(tmp_path / "m", free=lambda _p: plan.size - 1) as store:
        with pytest.raises(DiskFull, match="1 are missing"):
            store.open_part(plan)
        assert store.missing_room(plan)
        assert not list(store.state_dir.glob("*.part"))
    with opened(tmp_path / "m", free=lambda _p: plan.size) as store:
        store.open_part(plan).close()
        store.free = lambda _p: 0
        assert not store.missing_room(plan), "it is reserved already"


def test_a_damaged_copy_becomes_parts_again(tmp_path: Path) -> None:
    plan = plan_of(TOY)
    with opened(tmp_path / "m") as store:
        entry, n = fetch_rest(store, plan, TOY)
        bad = next(i for i in range(n) if plan.place(i)[0] == 1)
        entry.paths[1].write_bytes(bytes(len(TOY[1])))
        good = {i for i in range(n) if plan.place(i)[0] != 1}
        store.unmake(entry.root, good)
        assert visible(tmp_path / "m") == {}
        again, missing = fetch_rest(store, plan, TOY)
        assert missing == n - len(good) >= 1
        assert bad not in good
        assert visible(tmp_path / "m") == GOOD
        assert again.name == "toy.gguf"


# Crashes


def all_right(folder: Path) -> None:
    """Never a wrong byte under a final name."""
    for name, data in visible(folder).items():
        assert data == GOOD[name]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_a_crash_at_every_single_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool, links: bool
) -> None:
    def refuse(*_args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    plan = plan_of(TOY)
    n, crashed, offered = 0, True, set()
    while crashed:
        n, crashed = n + 1, False
        folder = tmp_path / str(n)
        store = Store(folder)
        store.open()
        with power_fails_at(n, after=after, tear=n % 2 == 0, monkeypatch=monkeypatch):
            try:
                fetch_rest(store, plan, TOY)
            except Crash:
                crashed = True
        os.close(store._lock_fd)
        all_right(folder)
        offered.add(store.entry(plan.root) is not None)
        assert store.entry(plan.root) is None or visible(folder) == GOOD, "all or nothing"
        with opened(folder) as again:
            all_right(folder)
            if again.entry(plan.root) is None:
                fetch_rest(again, plan, TOY)
            entry = again.entry(plan.root)
            assert entry is not None
            assert visible(folder) == GOOD
            assert not list(again.state_dir.glob("*.part"))
        shutil.rmtree(folder)
    assert n > 30
    assert offered == {True, False}


def test_a_crash_at_every_step_of_adopt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n, crashed = 0, True
    while crashed:
        n, crashed = n + 1, False
        folder = tmp_path / str(n)
        store = Store(folder)
        store.open()
        temporaries = write_all(store.downloads, TOY)
        with power_fails_at(n, after=n % 2 == 0, tear=False, monkeypatch=monkeypatch):
            try:
                store.adopt_all(temporaries, "toy.gguf")
            except Crash:
                crashed = True
        os.close(store._lock_fd)
        with opened(folder) as again:
            all_right(folder)
            if again.entry(plan_of(TOY).root) is None:
                again.adopt_all(write_all(again.downloads, TOY), "toy.gguf")
            assert visible(folder) == GOOD
        shutil.rmtree(folder)
    assert n > 12


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_name_taken_between_crash_and_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int, links: bool
) -> None:
    """After `moved` files arrived, the user takes the name of the last: all move on to other names."""
    folder = tmp_path / "m"
    real, count = os.link if links else os.rename, 0

    def move(a: Path, b: Path) -> None:
        nonlocal count
        count += 1
        if count > moved:
            raise Crash
        real(a, b)

    def refuse(*_args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    store = Store(folder)
    store.open()
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", move if links else refuse)
        if not links:
            patch.setattr(os, "rename", move)
        with pytest.raises(Crash):
            fetch_rest(store, plan_of(TOY), TOY)
    os.close(store._lock_fd)
    assert len(visible(folder)) == moved
    kit.write(folder / NAMES[2], b"of the user")
    with monkeypatch.context() as patch:
        if not links:
            patch.setattr(os, "link", refuse)
        with opened(folder) as again:
            entry = again.entry(plan_of(TOY).root)
            assert entry is not None
            assert entry.name == "toy (2).gguf"
            assert [p.read_bytes() for p in entry.paths] == TOY
            assert visible(folder).keys() == {NAMES[2], *(p.name for p in entry.paths)}
            assert not list(again.state_dir.glob("*.part"))
    assert (folder / NAMES[2]).read_bytes() == b"of the user"


def test_a_lost_file_after_a_crash_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "m"
    store = Store(folder)
    store.open()
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            fetch_rest(store, plan_of(TOY), TOY)
    os.close(store._lock_fd)
    (store.state_dir / f"{plan_of(TOY).root}.00002.part").unlink()
    with opened(folder) as again:
        assert again.entry(plan_of(TOY).root) is None
        fetch_rest(again, plan_of(TOY), TOY)
        assert visible(folder) == GOOD


def test_a_manifest_lost_after_a_crash_between_placing_and_tidying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    store = Store(folder)
    store.open()

    def crash(*_args: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_tidy", crash)
        with pytest.raises(Crash):
            fetch_rest(store, plan_of(TOY), TOY)
    os.close(store._lock_fd)
    next(store.state_dir.glob("*.manifest")).unlink()
    with opened(folder) as again:
        assert visible(folder) == GOOD
        assert again.entry(plan_of(TOY).root) is not None
        assert not list(again.state_dir.glob("*.part"))


def test_a_journal_speaks_of_all_files(tmp_path: Path) -> None:
    plan = plan_of(TOY)
    paths = [
        kit.write(tmp_path / f"x{end}", data)
        for end, data in zip((".part", ".00002.part", ".00003.part"), TOY, strict=True)
    ]
    PartFile.restart(paths[0], tmp_path / "x.journal", plan, {1})
    part = PartFile.open(paths[0], tmp_path / "x.journal", plan, lambda _p: 1 << 30)
    assert part.have == {1}
    part.close()


def test_comparing_and_repairing(tmp_path: Path) -> None:
    plan = plan_of(TOY)
    with opened(tmp_path / "m") as store:
        entry, n = fetch_rest(store, plan, TOY)
        assert care.compare(store, entry.root).good
        stat = entry.paths[2].stat()
        entry.paths[2].write_bytes(TOY[2][:-1] + bytes([TOY[2][-1] ^ 1]))
        os.utime(entry.paths[2], ns=(stat.st_atime_ns, stat.st_mtime_ns))
        verdict = care.compare(store, entry.root)
        assert verdict.bad == (n - 1,)
        care.note_damage(store, verdict)
        assert store.entry(entry.root) is None
    with opened(tmp_path / "m") as store:
        care.recall(store)
        assert store.entry(entry.root) is None, "remembered"
        care.begin_repair(store, care.compare(store, entry.root))
        _, missing = fetch_rest(store, plan, TOY)
        assert missing == 1
        assert visible(tmp_path / "m") == GOOD
        entry.paths[1].unlink()
        with pytest.raises(ModelError, match=f"{NAMES[1]} is gone"):
            care.compare(store, entry.root)


def test_a_catalogue_that_lost_a_file_of_a_model_stops_nothing(tmp_path: Path) -> None:
    plan = plan_of(TOY)
    with opened(tmp_path / "m") as store:
        entry, _ = fetch_rest(store, plan, TOY)
    for shards_left in ((), entry.shards[:1], entry.shards[:2]):
        less = replace(entry, shards=shards_left, size=len(TOY[0]))
        (store.state_dir / "catalogue").write_bytes(catalogue.encode([less]))
        kit.write(store.state_dir / f"{entry.root}.part", b"x")
        with opened(tmp_path / "m") as again:
            assert [len(h.paths) for h in again.elsewhere(ModelId("0" * 64))] == []
            found = again.entries()[0]
            source = CompleteFile(found, plan)
            assert source.read(0, 0, 4) == b"GGUF"
            assert source.read(len(plan.pieces) - 1, 0, 4) is None
    assert visible(tmp_path / "m") == GOOD
