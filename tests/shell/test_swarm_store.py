"""The store: what is shared, what is kept, and what a crash at any point leaves behind."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import swarm_kit as kit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tightwad_agent.errors import BadGguf, DiskFull, ModelError
from tightwad_agent.ids import ModelId, SafeName
from tightwad_agent.swarm import files, manifest, part
from tightwad_agent.swarm.facts import facts_of
from tightwad_agent.swarm.files import Identity, hash_pieces
from tightwad_agent.swarm.manifest import Manifest, Piece, cut
from tightwad_agent.swarm.source import CompleteFile
from tightwad_agent.swarm.store import Entry, Store

TOY = kit.llama(6, tensor_kb=32)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PIECE_BYTES", 1 << 15)
    monkeypatch.setattr(manifest, "SMALL_TENSOR_BYTES", 1 << 13)
    monkeypatch.setattr(os, "fsync", lambda _fd: None)  # these tests are about the order of steps
    monkeypatch.setattr(os, "fdatasync", lambda _fd: None)


@contextmanager
def opened(folder: Path, **more: Any) -> Iterator[Store]:
    store = Store(folder, **more)
    store.open()
    try:
        yield store
    finally:
        store.close()


def plan_of(data: bytes, name: str = "toy.gguf") -> Manifest:
    gguf = kit.read(data)
    pieces = tuple(Piece(o, n, hashlib.sha256(data[o : o + n]).digest()) for o, n in cut(len(data), gguf))
    return Manifest(SafeName(name), len(data), hashlib.sha256(data).digest(), pieces, facts_of(gguf))


def fetch_rest(store: Store, plan: Manifest, data: bytes) -> tuple[Entry, int]:
    """Everything a transfer does with the store; also the number of bytes that were missing."""
    store.keep_manifest(plan)
    part_file = store.open_part(plan)
    try:
        fetched = 0
        for i, piece in enumerate(plan.pieces):
            if i not in part_file.have:
                part_file.write(i, data[piece.offset : piece.offset + piece.length])
                part_file.have.add(i)
                fetched += piece.length
        return store.finish(part_file), fetched
    finally:
        part_file.close()


# Sharing


def test_share_in_place_and_again_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kit.write(tmp_path / "files" / "toy.gguf", TOY)
    with opened(tmp_path / "m") as store:
        entry = store.share(path)
        assert (entry.where, entry.in_place, entry.name, entry.size) == (path, True, "toy.gguf", len(TOY))
        assert entry.root == plan_of(TOY).root
        assert entry.facts.n_layers == 6
        assert not list((tmp_path / "m").glob("*.gguf")), "not copied"
    with opened(tmp_path / "m") as store:
        assert store.entries() == (entry,)
        assert store.entry(entry.root) == entry
        kept = store.manifest(entry.root)
        assert kept == plan_of(TOY)
        monkeypatch.setattr(files, "hash_pieces", lambda *_: pytest.fail("read again"))
        assert store.share(path) == entry


def test_one_content_two_paths_and_one_name_two_contents(tmp_path: Path) -> None:
    one = kit.write(tmp_path / "1" / "toy.gguf", TOY)
    same = kit.write(tmp_path / "2" / "other.gguf", TOY)
    other = kit.write(tmp_path / "3" / "TOY.gguf", kit.llama(6, seed=9))
    with opened(tmp_path / "m") as store:
        assert store.share(one) == store.share(same)
        assert store.share(other).name == "TOY (2).gguf"
        one.unlink()
        assert store.share(same).where == same, "the first is gone, the second takes its place"


def test_a_symlink_is_shared_as_what_it_points_to(tmp_path: Path) -> None:
    real = kit.write(tmp_path / "real" / "weights.bin", TOY)
    link = tmp_path / "toy.gguf"
    link.symlink_to(real)
    with opened(tmp_path / "m") as store:
        entry = store.share(link)
        assert (entry.name, entry.where) == ("toy.gguf", real)
        link.unlink()
        assert store.entry(entry.root) == entry
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
        for broken in ("loop", "broken"):
            with pytest.raises(ModelError, match="cannot be added"):
                store.share(tmp_path / broken)


def test_what_cannot_be_shared(tmp_path: Path) -> None:
    kit.write(tmp_path / "folder" / "inside.gguf", TOY)
    os.mkfifo(tmp_path / "pipe")
    with opened(tmp_path / "m") as store:
        with pytest.raises(ModelError, match="No such file"):
            store.share(tmp_path / "nothing.gguf")
        with pytest.raises(ModelError) as caught:
            store.share(tmp_path / "folder")
        assert "is a folder" in str(caught.value)
        assert "inside.gguf" in str(caught.value)
        with pytest.raises(ModelError, match="no regular file"):
            store.share(tmp_path / "pipe")
        with pytest.raises(BadGguf, match="not a GGUF"):
            store.share(kit.write(tmp_path / "a.txt", b"hello, this is text"))
        with pytest.raises(BadGguf, match="not a GGUF"):
            store.share(kit.write(tmp_path / "empty.gguf", b""))
        with pytest.raises(BadGguf, match="cut short"):
            store.share(kit.write(tmp_path / "cut.gguf", TOY[:-40_000]))
        assert store.entries() == ()


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kit.write(tmp_path / "toy.gguf", TOY)
    real = os.open

    def refuse(name: Any, flags: int, mode: int = 0o777) -> int:
        if name == path:
            raise PermissionError(13, "Permission denied")
        return real(name, flags, mode)

    with opened(tmp_path / "m") as store:
        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(ModelError, match="cannot be read: Permission denied"):
            store.share(path)


@pytest.mark.parametrize("how", ["shrinks", "changes", "is replaced", "grows"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, how: str) -> None:
    path = kit.write(tmp_path / "toy.gguf", TOY)

    def tick(done: int) -> None:
        if done != len(TOY) // 2 and done < len(TOY):
            if how == "shrinks":
                os.truncate(path, done)
            elif how == "changes":
                path.write_bytes(TOY[:-1] + b"!")
                os.utime(path, ns=(1, 1))
            elif how == "is replaced":
                path.unlink(missing_ok=True)
                path.write_bytes(TOY)
            else:
                with path.open("ab") as file:
                    file.write(b"more")

    with opened(tmp_path / "m") as store:
        with pytest.raises(ModelError, match=r"became shorter|changed while it was read"):
            store.share(path, tick)
        assert store.entries() == ()


def test_changed_and_vanished_files_are_not_offered(tmp_path: Path) -> None:
    path = kit.write(tmp_path / "toy.gguf", TOY)
    with opened(tmp_path / "m") as store:
        entry = store.share(path)
        source = CompleteFile(entry, plan_of(TOY))
        assert source.read(0, 0, 4) == b"GGUF"
        path.rename(tmp_path / "away")
        assert store.entry(entry.root) is None
        assert "is gone" in store.problem(entry)
        assert source.read(0, 0, 4) is None
        kit.write(path, TOY)
        assert "changed since" in store.problem(entry)
        assert source.read(0, 0, 4) is None
        again = store.share(path)
        assert (again.root, store.problem(again)) == (entry.root, "")
        with pytest.raises(ModelError, match="not complete"):
            store.read_gguf(ModelId("0" * 64))
        assert store.read_gguf(entry.root) == kit.read(TOY)


def test_rot_is_seen_before_it_is_served(tmp_path: Path) -> None:
    path = kit.write(tmp_path / "toy.gguf", TOY)
    with opened(tmp_path / "m") as store:
        entry = store.share(path)
        stat = path.stat()
        with path.open("r+b") as file:
            file.seek(len(TOY) - 1)
            file.write(bytes([TOY[-1] ^ 1]))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        source = CompleteFile(entry, plan_of(TOY))
        assert source.read(0, 0, 4) == b"GGUF"
        assert source.read(len(plan_of(TOY).pieces) - 1, 0, 4) is None
        store.mark_damaged(entry.root)
        assert store.entry(entry.root) is None
        assert store.share(path).root != entry.root
        kit.write(path, TOY)
        assert store.problem(store.share(path)) == ""


def test_adopt_moves_the_file_and_refuses_what_is_no_gguf(tmp_path: Path) -> None:
    with opened(tmp_path / "m") as store:
        temporary = kit.write(store.downloads / "x" / "file", TOY)
        entry = store.adopt(temporary, "../../My model?.gguf")
        assert (entry.where, entry.in_place) == (tmp_path / "m" / "My model-.gguf", False)
        assert entry.where.read_bytes() == TOY
        assert not temporary.exists()
        again = kit.write(store.downloads / "y" / "file", TOY)
        assert store.adopt(again, "second.gguf") == entry
        assert not again.exists()
        with pytest.raises(BadGguf):
            store.adopt(kit.write(store.downloads / "z" / "file", b"<html>not found</html>"), "a.gguf")
        assert [p.name for p in (tmp_path / "m").glob("*.gguf")] == ["My model-.gguf"]


def test_remove_deletes_only_what_is_ours_and_still_what_it_was(tmp_path: Path) -> None:
    with opened(tmp_path / "m") as store:
        entry, _ = fetch_rest(store, plan_of(TOY), TOY)
        entry.where.write_bytes(b"the user put something else here")
        store.remove(entry.root)
        assert entry.where.exists()
        assert store.entries() == ()
        entry.where.unlink()
        entry, _ = fetch_rest(store, plan_of(TOY), TOY)
        store.remove(entry.root)
        assert not entry.where.exists()
        assert {p.name for p in store.state_dir.iterdir()} == {"lock", "catalogue", "downloads"}


def test_a_damaged_catalogue_is_put_aside(tmp_path: Path) -> None:
    path = kit.write(tmp_path / "toy.gguf", TOY)
    with opened(tmp_path / "m") as store:
        entry = store.share(path)
    catalogue = tmp_path / "m" / ".swarm" / "catalogue"
    good = catalogue.read_bytes()
    for bad in (good[:-1], b"", b"\x00", good.replace(b"toy.gguf", b"../y.guf"), bytes(100)):
        catalogue.write_bytes(bad)
        with opened(tmp_path / "m") as store:
            assert store.entries() == ()
            assert (store.state_dir / "catalogue.damaged").read_bytes() == bad
            assert store.share(path) == entry
    (tmp_path / "m" / ".swarm" / f"{entry.root}.manifest").write_bytes(b"rubbish")
    with opened(tmp_path / "m") as store:
        assert store.manifest(entry.root) is None
        assert store.share(path).root == entry.root
        assert store.manifest(entry.root) == plan_of(TOY)


# Room


def test_room_is_checked_with_the_arithmetic_before_anything_is_written(tmp_path: Path) -> None:
    with opened(tmp_path / "m", free=lambda _p: 1234) as store:
        plan = plan_of(TOY)
        with pytest.raises(DiskFull) as caught:
            store.open_part(plan)
        assert f"needs {len(TOY):,} more bytes" in str(caught.value)
        assert f"1,234 are free: {len(TOY) - 1234:,} are missing" in str(caught.value)
        assert store.missing_room(plan)
        assert not list(store.state_dir.glob("*.part"))


def test_what_is_allocated_already_needs_no_room(tmp_path: Path) -> None:
    plan = plan_of(TOY)
    with opened(tmp_path / "m") as store:
        first = store.open_part(plan)
        first.write(0, TOY[: plan.pieces[0].length])
        first.close()
    with opened(tmp_path / "m", free=lambda _p: 0) as store:
        second = store.open_part(plan)
        assert second.have == {0}
        second.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_real_disk_that_is_too_small(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", small]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no mount here")
    try:
        with opened(small / "m") as store, pytest.raises(DiskFull, match="are missing"):
            store.open_part(plan_of(TOY * 1 + bytes(1 << 20)))
        with opened(small / "m", free=lambda _p: 1 << 40) as store:
            with pytest.raises(DiskFull, match="no room for"):
                store.open_part(plan_of(TOY + bytes(1 << 20)))
            assert not list(store.state_dir.glob("*.part"))
    finally:
        subprocess.run(["umount", small], check=True)


# Crashes


class Crash(BaseException):
    """The power went."""


CALLS = ["link", "replace", "rename", "fsync", "fdatasync", "pwrite", "write", "ftruncate", "posix_fallocate", "unlink"]


@contextmanager
def power_fails_at(n: int, *, after: bool, tear: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """From the n-th system call that changes something on, nothing happens any more."""
    count = 0

    def wrap(real: Any, name: str) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count > n or (count == n and not after):
                if count == n and tear and name in ("write", "pwrite"):
                    real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                raise Crash
            result = real(*args, **more)
            if count == n:
                raise Crash
            return result

        return call

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, wrap(getattr(os, name), name))
        yield lambda: count


def all_right(folder: Path, data: bytes) -> None:
    """Never a wrong byte under a final name."""
    for path in folder.glob("*.gguf"):
        assert path.read_bytes() == data


@pytest.mark.parametrize("after", [True, False])
def test_a_crash_at_every_single_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool) -> None:
    data = kit.llama(3, tensor_kb=16)
    plan = plan_of(data)
    n = 0
    while True:
        n += 1
        folder = tmp_path / str(n)
        store = Store(folder)
        store.open()
        crashed = False
        with power_fails_at(n, after=after, tear=n % 2 == 0, monkeypatch=monkeypatch):
            try:
                fetch_rest(store, plan, data)
            except Crash:
                crashed = True
        os.close(store._lock_fd)
        all_right(folder, data)
        with opened(folder) as again:
            all_right(folder, data)
            entry = again.entry(plan.root)
            if entry is None:
                entry, _ = fetch_rest(again, plan, data)
            assert entry.where == folder / "toy.gguf"
            assert entry.where.read_bytes() == data
            assert [p.name for p in folder.iterdir() if p.name != ".swarm"] == ["toy.gguf"]
            assert not list(again.state_dir.glob("*.part"))
        shutil.rmtree(folder)
        if not crashed:
            break
    assert n > 25


def test_a_crash_at_every_step_of_adopt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n, crashed = 0, True
    while crashed:
        n, crashed = n + 1, False
        folder = tmp_path / str(n)
        store = Store(folder)
        store.open()
        temporary = kit.write(store.downloads / "x", TOY)
        with power_fails_at(n, after=n % 2 == 0, tear=False, monkeypatch=monkeypatch):
            try:
                store.adopt(temporary, "toy.gguf")
            except Crash:
                crashed = True
        os.close(store._lock_fd)
        with opened(folder) as again:
            all_right(folder, TOY)
            if again.entry(plan_of(TOY).root) is None:
                again.adopt(kit.write(again.downloads / "x", TOY), "toy.gguf")
            assert (folder / "toy.gguf").read_bytes() == TOY
            assert len(list(folder.glob("*.gguf"))) == 1
        shutil.rmtree(folder)
    assert n > 8


def test_a_name_taken_between_crash_and_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(TOY)
    folder = tmp_path / "m"
    store = Store(folder)
    store.open()
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            fetch_rest(store, plan, TOY)
    os.close(store._lock_fd)
    kit.write(folder / "toy.gguf", b"of the user")
    with opened(folder) as again:
        entry = again.entry(plan.root)
        assert entry is not None
        assert entry.where == folder / "toy (2).gguf"
        assert entry.where.read_bytes() == TOY
    assert (folder / "toy.gguf").read_bytes() == b"of the user"


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with opened(tmp_path / "m") as store:
        entry, _ = fetch_rest(store, plan_of(TOY), TOY)
        assert entry.where.read_bytes() == TOY
        other = kit.llama(6, seed=3)
        entry, _ = fetch_rest(store, plan_of(other), other)
        assert entry.name == "toy (2).gguf"


# The journal


def part_with_all(folder: Path, data: bytes) -> tuple[Manifest, Path, Path]:
    plan = plan_of(data)
    with opened(folder) as store:
        store.keep_manifest(plan)
        part_file = store.open_part(plan)
        for i, piece in enumerate(plan.pieces):
            part_file.write(i, data[piece.offset : piece.offset + piece.length])
        part_file.close()
    return plan, part_file.path, part_file.journal


def test_every_prefix_of_the_journal(tmp_path: Path) -> None:
    plan, path, journal = part_with_all(tmp_path / "m", TOY)
    whole = journal.read_bytes()
    seen = set()
    for n in range(len(whole) + 1):
        backup = kit.write(tmp_path / "backup", path.read_bytes()) if path.exists() else tmp_path / "backup"
        if not path.exists():
            path.write_bytes(backup.read_bytes())
            whole = part._HEADER.pack(b"TWJ1", bytes.fromhex(plan.root), path.stat().st_ino)
            whole += part._CRC.pack(part.zlib.crc32(whole)) + b"".join(
                part._record(i, plan) for i in range(len(plan.pieces))
            )
        journal.write_bytes(whole[:n])
        got = part._read_journal(journal, plan, path.stat().st_ino)
        assert got == set(range(len(got)))
        assert len(got) == max(0, (n - 48) // 16)
        seen.add(len(got))
    assert len(seen) == len(plan.pieces) + 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_journals_and_parts_never_give_wrong_bytes(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "m"
    shutil.rmtree(folder, ignore_errors=True)  # of an example that was given up
    plan, path, journal = part_with_all(folder, TOY)
    for victim in data.draw(st.sampled_from([(path,), (journal,), (path, journal)])):
        raw = bytearray(victim.read_bytes())
        for _ in range(data.draw(st.integers(1, 5))):
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
        raw = raw[: data.draw(st.sampled_from([len(raw), len(raw), len(raw) // 2]))]
        with victim.open("r+b") as file:
            file.truncate(len(raw))
            file.write(raw)
    with opened(folder) as store:
        entry, _ = fetch_rest(store, plan, TOY)
        assert entry.where.read_bytes() == TOY
    shutil.rmtree(folder)


def test_a_journal_of_another_model_or_another_file_is_not_believed(tmp_path: Path) -> None:
    plan, path, journal = part_with_all(tmp_path / "m", TOY)
    other = plan_of(kit.llama(6, seed=5))
    assert part._read_journal(journal, other, path.stat().st_ino) == set()
    assert part._read_journal(journal, plan, path.stat().st_ino + 1) == set()
    assert part._read_journal(journal, plan, None) == set()
    assert len(part._read_journal(journal, plan, path.stat().st_ino)) == len(plan.pieces)
    twin = replace(plan, pieces=plan.pieces[:1] * 1 + plan.pieces[1:])
    assert twin.root == plan.root


def test_pieces_that_match_are_what_the_root_stands_for(tmp_path: Path) -> None:
    plan = replace(plan_of(TOY), sha256=bytes(32))  # whoever made it said something wrong of the whole
    with opened(tmp_path / "m") as store:
        entry, _ = fetch_rest(store, plan, TOY)
        assert store.not_compared == (entry.root,)
        assert entry.where.read_bytes() == TOY
        store.compared(entry.root)
        assert store.not_compared == ()


def test_nothing_gets_its_name_before_all_of_it_is_here(tmp_path: Path) -> None:
    with opened(tmp_path / "m") as store:
        part_file = store.open_part(plan_of(TOY))
        try:
            with pytest.raises(ValueError, match="0 of"):
                store.finish(part_file)
        finally:
            part_file.close()


def test_what_comes_from_a_peer_and_is_no_gguf_has_no_facts(tmp_path: Path) -> None:
    data = b"an engine, perhaps" * 5000
    pieces = tuple(Piece(o, n, hashlib.sha256(data[o : o + n]).digest()) for o, n in cut(len(data), None))
    lie = replace(plan_of(TOY).facts, architecture="llama")
    plan = Manifest(SafeName("engine.bin"), len(data), hashlib.sha256(data).digest(), pieces, lie)
    with opened(tmp_path / "m") as store:
        entry, _ = fetch_rest(store, plan, data)
        assert entry.facts.architecture == ""


def test_identity_and_hashing(tmp_path: Path) -> None:
    path = kit.write(tmp_path / "x", b"abc" * 1000)
    assert Identity.at(path) == Identity.of(path.stat())
    assert Identity.at(tmp_path) is None
    assert Identity.at(tmp_path / "nothing") is None
    fd = os.open(path, os.O_RDONLY)
    done: list[int] = []
    whole, pieces = hash_pieces(fd, [(0, 1000), (1000, 2000)], done.append)
    assert whole == hashlib.sha256(b"abc" * 1000).digest()
    assert pieces[1].sha256 == hashlib.sha256((b"abc" * 1000)[1000:]).digest()
    assert done == [1000, 3000]
    with pytest.raises(ModelError, match="shorter"):
        hash_pieces(fd, [(0, 4000)])
    os.close(fd)


@pytest.mark.parametrize("read_bytes", [1 << 12, 5_000, 1 << 16])
def test_hashes_of_pieces_and_of_the_whole_do_not_depend_on_how_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    """Buffers are used again many times: none may be overwritten before both threads are through with it."""
    monkeypatch.setattr(files, "READ_BYTES", read_bytes)
    data = random.Random(1).randbytes(3_000_000)
    spans = [(o, min(70_001, len(data) - o)) for o in range(0, len(data), 70_001)]
    fd = os.open(kit.write(tmp_path / "x", data), os.O_RDONLY)
    whole, pieces = hash_pieces(fd, spans)
    os.close(fd)
    assert whole == hashlib.sha256(data).digest()
    assert pieces == tuple(Piece(o, n, hashlib.sha256(data[o : o + n]).digest()) for o, n in spans)
