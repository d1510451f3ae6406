"""Files compared again, repaired and cleaned up, and the limit on what models take: real stores on real files."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import swarm_kit as kit
import trio
from test_swarm_service import BIG, Net, Node, _fast, net, seed_of, until  # noqa: F401 - a fixture among them

from tightwad_agent.errors import DiskFull, EnvironmentFault, ModelError, ProtocolError, UnknownModel
from tightwad_agent.ids import ModelId, NodeId
from tightwad_agent.swarm import care, caretaker, inventory
from tightwad_agent.swarm.care import Notes
from tightwad_agent.swarm.part import PartFile
from tightwad_agent.swarm.quota import Quota, excess, words
from tightwad_agent.swarm.service import Phase
from tightwad_agent.swarm.store import Store
from tightwad_agent.wire.codec import pack, unpack
from tightwad_agent.wire.control import MAX_CALL
from tightwad_agent.wire.rows import MAX_MODELS, ModelFacts

OTHER = kit.llama(3, seed=9)


def quiet(*_: Any) -> None:
    """Nobody watches."""


def flip(path: Path, at: int, *, keep_times: bool = True) -> None:
    """A bit of a file turns over; as a disk does it, the file's times stay."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def state_of(node: Node, model: ModelId) -> inventory.ModelState | None:
    return next((s for s in node.service.states() if s.model == model), None)


def is_(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except OSError:
        return False


async def two(network: Net) -> tuple[Node, Node, ModelId, Path]:
    """A node that shares a model in place, one that has its own copy of it, and the copy."""
    seed, held = await seed_of(network, "seed", BIG)
    node = await network.node("copy")
    node.leech(held.model, seed)
    return seed, node, held.model, await node.until_read_back(held.model)


# Comparing


async def test_what_is_good_is_said_to_be_good_and_counted_whole(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, node, model, _ = await two(network)
        for n, in_place in ((seed, True), (node, False)):
            steps: list[int] = []
            found = await n.service.care.verify(model, (), lambda _w, done, _t, steps=steps: steps.append(done))
            assert (found.good, found.damaged, found.in_place) == (True, 0, in_place)
            assert steps[-1] == len(BIG)
            assert n.service.path_of(model) is not None


@pytest.mark.parametrize("keep_times", [True, False])
async def test_a_damaged_copy_is_repaired_and_only_what_is_bad_crosses(tmp_path: Path, keep_times: bool) -> None:
    async with net(tmp_path) as network:
        seed, node, model, path = await two(network)
        before = sum(node.status(model).from_each_peer.values())
        flip(path, len(BIG) // 2, keep_times=keep_times)
        found = await node.service.care.verify(model, (seed.id,), quiet)
        assert (found.good, found.damaged) == (False, 1)
        (place,) = found.ranges
        assert place.offset <= len(BIG) // 2 < place.offset + place.length
        assert "repaired from 1 node" in found.action
        assert (await node.until_complete(model)).read_bytes() == BIG
        assert sum(node.status(model).from_each_peer.values()) - before == place.length
        assert (await node.service.care.verify(model, (), quiet)).good
        assert not list((node.folder / ".swarm").glob("*.part"))


async def test_a_copy_that_became_shorter_is_repaired(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, node, model, path = await two(network)
        os.truncate(path, 200_000)
        found = await node.service.care.verify(model, (seed.id,), quiet)
        assert not found.good
        assert "200,000" in found.problem
        assert (await node.until_complete(model)).read_bytes() == BIG


async def test_a_copy_that_nobody_else_has_is_kept_as_it_is_and_no_longer_offered(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        _, node, model, path = await two(network)
        node.service.unwant(model)
        flip(path, 300_000)
        wrong = path.read_bytes()
        found = await node.service.care.verify(model, (), quiet)
        assert "no other node" in found.action
        assert path.read_bytes() == wrong
        assert node.service.path_of(model) is None
        assert all(m.model != model for m in node.service.held())
        state = state_of(node, model)
        assert state is not None
        assert (state.phase, state.have) == (inventory.PROBLEM, 0)
        assert any("damaged" in p for p in node.service.snapshot().problems)


async def test_a_damaged_file_of_a_person_is_never_written_to(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, node, model, _ = await two(network)
        theirs = seed.service.path_of(model)
        assert theirs is not None
        flip(theirs, 300_000)
        wrong, when = theirs.read_bytes(), theirs.stat().st_mtime_ns
        found = await seed.service.care.verify(model, (node.id,), quiet)
        assert (found.good, found.in_place) == (False, True)
        assert "add it again" in found.action
        assert (theirs.read_bytes(), theirs.stat().st_mtime_ns) == (wrong, when)
        assert seed.service.path_of(model) is None
        assert all(m.model != model for m in seed.service.held())


@pytest.mark.parametrize("step", ["rename", "restart", "_write_catalogue"])
def test_a_crash_at_any_step_of_a_repair_loses_nothing(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "models")
    store.open()
    helper = Store(tmp_path / "helper")
    helper.open()
    model = helper.share(kit.write(tmp_path / "toy.gguf", BIG)).root
    own = store.adopt(kit.write(store.downloads / "x" / "file", BIG), "toy.gguf")
    assert own.root == model
    flip(own.where, 300_000)
    wrong = own.where.read_bytes()
    verdict = care.compare(store, model)

    class Crash(BaseException):
        pass

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    where: Any = {"rename": os, "restart": PartFile, "_write_catalogue": store}[step]
    with monkeypatch.context() as patch:
        patch.setattr(where, step, crash)
        with pytest.raises(Crash):
            care.begin_repair(store, verdict)
    store.close()
    again = Store(tmp_path / "models")
    again.open()
    entry = again.entry(model)
    assert entry is not None, "it is where it was"
    assert entry.where.read_bytes() == wrong
    assert not list(again.state_dir.glob("*.part"))
    assert care.compare(again, model).bad == verdict.bad
    care.begin_repair(again, verdict)
    manifest = again.manifest(model)
    assert manifest is not None
    assert not entry.where.exists()
    part = again.open_part(manifest)
    assert set(range(len(manifest.pieces))) - part.have == set(verdict.bad)
    part.close()
    again.close()
    helper.close()


async def test_a_file_that_somebody_put_in_the_place_of_a_copy_is_not_touched(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, node, model, path = await two(network)
        node.service.unwant(model)
        os.replace(kit.write(tmp_path / "mine.gguf", OTHER), path)
        found = await node.service.care.verify(model, (seed.id,), quiet)
        assert not found.good
        assert "another file" in found.action
        await node.service.remove(model)
        assert path.read_bytes() == OTHER


async def test_a_copy_that_rots_is_repaired_when_that_is_seen_while_it_is_given(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, node, model, path = await two(network)
        node.service.set_holders(model, frozenset({seed.id}))
        await node.stop()
        again = await network.node("copy")
        again.service.set_holders(model, frozenset({seed.id}))
        flip(path, 300_000)
        third = await network.node("third")
        third.leech(model, again)
        await until(lambda: again.service.path_of(model) == path and is_(path, BIG))
        assert (await third.until_complete(model)).read_bytes() == BIG
        assert {p.name for p in again.folder.glob("*.gguf")} == {"toy.gguf"}


async def test_what_was_damaged_is_not_offered_after_a_restart_and_is_when_it_is_right_again(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, _, model, _ = await two(network)
        theirs = seed.service.path_of(model)
        assert theirs is not None
        flip(theirs, 300_000)
        await seed.service.care.verify(model, (), quiet)
        await seed.stop()
        again = await network.node("seed")
        assert again.service.path_of(model) is None
        flip(theirs, 300_000)
        assert (await again.service.care.verify(model, (), quiet)).good
        assert again.service.path_of(model) == theirs
        await again.stop()
        assert (await network.node("seed")).service.path_of(model) == theirs


async def test_a_file_whose_time_alone_changed_is_offered_again(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, _, model, _ = await two(network)
        theirs = seed.service.path_of(model)
        assert theirs is not None
        os.utime(theirs, (1, 1))
        assert seed.service.path_of(model) is None
        assert (await seed.service.care.verify(model, (), quiet)).good
        assert seed.service.path_of(model) == theirs


async def test_a_repair_goes_on_after_a_restart(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, node, model, path = await two(network)
        flip(path, 300_000)
        await network.mesh.cut(seed.id, node.id)
        await node.service.care.verify(model, (seed.id,), quiet)
        assert not path.exists(), "a damaged file has no model's name"
        await until(lambda: node.status(model).phase is not Phase.IDLE)
        await node.stop()
        again = await network.node("copy")
        network.mesh.heal(seed.id, again.id)
        again.service.set_holders(model, frozenset({seed.id}))
        assert (await again.until_complete(model)).read_bytes() == BIG


async def test_nothing_to_compare_is_said(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, node, model, path = await two(network)
        with pytest.raises(UnknownModel):
            await seed.service.care.verify(ModelId("ab" * 32), (), quiet)
        path.unlink()
        with pytest.raises(ModelError, match="is gone"):
            await node.service.care.verify(model, (seed.id,), quiet)
        (seed.folder / ".swarm" / f"{model}.manifest").unlink()
        seed.service.store._manifests.clear()
        with pytest.raises(ModelError, match="hashes"):
            await seed.service.care.verify(model, (), quiet)


async def test_a_comparison_can_be_called_off(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, _, model, _ = await two(network)
        with trio.fail_after(30), trio.CancelScope() as scope:
            scope.cancel()
            await seed.service.care.verify(model, (), quiet)
        assert scope.cancelled_caught
        assert seed.service.path_of(model) is not None


# Comparing for another node


async def polled(node: Node, run: str, model: ModelId, sources: tuple[NodeId, ...] = ()) -> caretaker.Finding:
    with trio.fail_after(30):
        while (answer := await node.service.care.poll(run, model, sources))["result"] is None:
            await trio.sleep(0.01)
    return caretaker.heard(unpack(pack(answer["result"])))


async def test_another_node_asks_how_far_it_is(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, node, model, path = await two(network)
        assert (await polled(seed, "one", model)).good
        flip(path, 300_000)
        assert not (await polled(node, "two", model, (seed.id,))).good
        with pytest.raises(UnknownModel):
            await seed.service.care.poll("three", ModelId("ab" * 32), ())


async def test_the_error_of_a_comparison_comes_back(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        _, node, model, path = await two(network)
        path.unlink()
        with pytest.raises(ModelError, match="is gone"):
            await polled(node, "one", model)


async def test_comparisons_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caretaker, "MAX_RUNS", 2)
    async with net(tmp_path) as network:
        seed, _, model, _ = await two(network)
        await polled(seed, "a", model)
        await polled(seed, "b", model)
        with pytest.raises(ModelError, match="too many"):
            await seed.service.care.poll("c", model, ())
        monkeypatch.setattr(caretaker, "ORPHAN_S", -1.0)
        assert await seed.service.care.poll("c", model, ()), "what ended and nobody asks about is forgotten"


async def test_a_comparison_that_nobody_asks_about_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caretaker, "ORPHAN_S", -1.0)
    async with net(tmp_path) as network:
        seed, _, model, _ = await two(network)
        await seed.service.care.poll("a", model, ())
        run = seed.service.care._runs["a"]
        await until(lambda: run.error is not None)
        assert "given up" in str(run.error)


# Cleaning up


def unfinished(store: Store, data: bytes, folder: Path) -> ModelId:
    """A store that has a part of a model."""
    helper = Store(folder)
    helper.open()
    manifest = helper.manifest(helper.share(kit.write(folder / "f.gguf", data)).root)
    helper.close()
    assert manifest is not None
    store.keep_manifest(manifest)
    part = store.open_part(manifest)
    piece = manifest.pieces[0]
    part.write(0, data[piece.offset : piece.offset + piece.length])
    part.close()
    return manifest.root


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


async def test_only_what_nobody_needs_goes(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, node, model, path = await two(network)
        node.service.unwant(model)
        await until(lambda: node.service._transfers[model].scope is None)
        before = files_of(node.folder)
        store = node.service.store
        lost = unfinished(store, OTHER, tmp_path / "other")
        elsewhere = unfinished(store, kit.llama(2, seed=5), tmp_path / "other2")
        wanted = unfinished(store, kit.llama(2, seed=6), tmp_path / "other3")
        node.service.want(wanted)
        await until(lambda: node.status(wanted).phase is Phase.FETCHING)  # and writes nothing any more
        kit.write(store.downloads / "abc" / "file.part", b"x" * 5000)
        kit.write(store.state_dir / "old.tmp", b"x")
        os.utime(store.state_dir / "old.tmp", (1, 1))
        kit.write(store.state_dir / "being-written.tmp", b"x")
        said = await node.service.care.collect({elsewhere}, downloading=False, dry_run=True)
        full = files_of(node.folder)
        done = await node.service.care.collect({elsewhere}, downloading=False, dry_run=False)
        assert [(i.what, i.n_bytes) for i in said] == [(i.what, i.n_bytes) for i in done]
        assert {i.model for i in done} == {lost, None}
        assert sum(i.n_bytes for i in done if i.model == lost) >= len(OTHER) // 2
        left = files_of(node.folder)
        assert full - left == {
            f".swarm/{lost}.part",
            f".swarm/{lost}.journal",
            f".swarm/{lost}.manifest",
            ".swarm/old.tmp",
            ".swarm/downloads/abc/file.part",
        }
        assert before <= left
        assert path.read_bytes() == BIG
        assert seed.service.path_of(model) is not None
        assert store.manifest(lost) is None


async def test_a_download_that_goes_on_is_left(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        node = await network.node("a")
        kept = kit.write(node.service.store.downloads / "abc" / "file.part", b"x" * 5000)
        assert await node.service.care.collect((), downloading=True, dry_run=False) == []
        assert kept.exists()


def aged(folder: Path, age_s: float) -> None:
    for path in [p for p in folder.rglob("*") if p.name not in ("lock", "catalogue")]:
        os.utime(path, (time.time() - age_s,) * 2)


@pytest.mark.parametrize(("age_s", "goes"), [(care.MAX_AGE_S + 3600, True), (care.MAX_AGE_S - 3600, False)])
def test_at_a_start_what_is_old_goes(
    tmp_path: Path, age_s: float, goes: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    store = Store(tmp_path / "models")
    store.open()
    mine = store.share(kit.write(tmp_path / "toy.gguf", BIG))
    root = unfinished(store, OTHER, tmp_path / "other")
    kit.write(store.downloads / "abc" / "file", b"x" * 5000)
    aged(store.state_dir, age_s)
    repairing = care.recall(store)
    found = care.clean_old(store, repairing)
    assert {i.model for i in found} == ({root, None} if goes else set())
    assert (store.state_dir / f"{root}.part").exists() != goes
    assert (store.state_dir / f"{mine.root}.manifest").exists()
    assert ("14 days" in caplog.text) == goes
    assert not care.clean_old(store, {root})
    store.close()


def test_notes_that_cannot_be_read_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(tmp_path)
    store.open()
    for data in (b"", b"\xc1", b"\x93\x01\x02\x03", os.urandom(100)):
        (store.state_dir / "care").write_bytes(data)
        assert care.read_notes(store) == Notes()
    assert "cannot be read" in caplog.text
    store.close()


# The limit


def test_the_arithmetic_of_the_limit() -> None:
    assert excess(0, 10**18, 10**18) == 0
    assert excess(100, 60, 40) == 0
    assert excess(100, 60, 41) == 1
    said = words(100, 60, 141, "toy.gguf")
    assert "141" in said
    assert "101" in said
    assert "max_models_bytes" in said


def test_what_is_promised_counts_once(tmp_path: Path) -> None:
    quota = Quota(1000, tmp_path)
    with quota.promised(600, "a", {}, "a"):
        assert quota.used({"b": 100}) == 700
        assert quota.used({"b": 100}, "a") == 100
        with pytest.raises(DiskFull, match="500"), quota.promised(500, "c", {}, "c"):
            pass
        (tmp_path / "a.part").write_bytes(b"x" * 600)
        assert quota.used({}) == 600
    assert quota.used({}) == 600
    assert quota.exceeded(401, {})
    assert not quota.exceeded(400, {})
    assert not Quota(0, tmp_path).exceeded(10**18, {})


async def test_a_transfer_beyond_the_limit_waits_with_its_reason_and_goes_on(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, held = await seed_of(network, "seed", BIG)
        node = await network.node("tight")
        small = node.service.store
        small.quota.limit = len(BIG) - 1
        node.leech(held.model, seed)
        await until(lambda: node.status(held.model).phase is Phase.NO_ROOM)
        said = node.status(held.model).problem
        assert f"{len(BIG):,}" in said
        assert "max_models_bytes" in said
        assert not list(small.state_dir.glob("*.part"))
        state = state_of(node, held.model)
        assert state is not None
        assert (state.phase, state.detail) == ("no room", said)
        small.quota.limit = len(BIG)
        assert (await node.until_complete(held.model)).read_bytes() == BIG
        assert small.quota.used(small.own_bytes()) == len(BIG), "a copy and no part"


async def test_files_shared_in_place_do_not_count(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        node = await network.node("tight")
        node.service.store.quota.limit = 1
        await node.service.add(str(kit.write(tmp_path / "mine.gguf", OTHER)))
        assert node.service.store.quota.used(node.service.store.own_bytes()) == 0


async def test_a_download_beyond_the_limit_does_not_start(tmp_path: Path, serve_files: Callable[[Path], str]) -> None:
    kit.write(tmp_path / "www" / "toy.gguf", BIG)
    async with net(tmp_path) as network:
        node = await network.node("tight")
        node.service.store.quota.limit = len(BIG) - 1
        with pytest.raises(DiskFull, match="max_models_bytes"):
            await node.service.add(serve_files(tmp_path / "www") + "/toy.gguf")
        node.service.store.quota.limit = len(BIG)
        assert (await node.service.add(serve_files(tmp_path / "www") + "/toy.gguf")).size == len(BIG)


@pytest.fixture
def serve_files() -> Any:
    """Serves a folder on loopback; gives its address."""
    import functools
    import http.server
    import threading

    servers = []

    def start(folder: Path) -> str:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# The directory, and names


READ_ONLY = """
import os, sys
from pathlib import Path
from tightwad_agent.errors import EnvironmentFault
from tightwad_agent.swarm.store import Store
from tightwad_agent.wire.codec import pack, unpack
from tightwad_agent.wire.control import MAX_CALL
from tightwad_agent.wire.rows import MAX_MODELS, ModelFacts
if os.getuid() == 0:
    os.setuid(65534)
try:
    Store(Path(sys.argv[1])).open()
except EnvironmentFault as exc:
    print(exc.exit_code, exc)
"""


@pytest.mark.parametrize("there", ["nothing", "folders", "folders and a lock"])
def test_a_models_directory_that_is_read_only_is_named(there: str) -> None:
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        if there != "nothing":
            (folder / ".swarm" / "downloads").mkdir(parents=True)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555)
        if there == "folders and a lock":
            (folder / ".swarm" / "lock").touch()
            (folder / ".swarm" / "lock").chmod(0o666)
        done = subprocess.run(
            [sys.executable, "-c", READ_ONLY, str(folder)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout.startswith(f"{EnvironmentFault.exit_code} cannot use the models directory {folder}"), done
        assert "--models-dir" in done.stdout
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)
        shutil.rmtree(folder)


async def test_names_that_differ_in_case_alone_get_different_files(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, held = await seed_of(network, "seed", BIG, "A.gguf")
        second, other = await seed_of(network, "second", OTHER, "a.gguf")
        node = await network.node("leech")
        node.leech(held.model, seed)
        node.leech(other.model, second)
        names = {(await node.until_complete(m)).name for m in (held.model, other.model)}
        assert {n.casefold() for n in names} == {"a.gguf", "a (2).gguf"}


# What is told of it


async def test_states_cross_between_nodes_as_they_are(tmp_path: Path) -> None:
    async with net(tmp_path) as network:
        seed, node, model, _ = await two(network)
        theirs = seed.service.path_of(model)
        assert theirs is not None
        theirs.unlink()
        for n in (seed, node):
            found = n.service.states()
            assert inventory.heard(inventory.told(found)) == found
        (broken,) = seed.service.states()
        assert (broken.phase, broken.in_place, broken.have) == (inventory.PROBLEM, True, 0)
        assert "is gone" in broken.detail
        (whole,) = node.service.states()
        assert (whole.phase, whole.in_place, whole.have) == (Phase.COMPLETE, False, len(BIG))
        assert whole.facts.architecture == "llama"


@pytest.mark.parametrize(
    "answer", [{}, {"models": 1}, {"models": [1]}, {"models": [[]]}, {"models": [["x", "n", 1, 1, False, "p"]]}]
)
def test_a_state_that_is_none_is_refused(answer: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        inventory.heard(answer)


@pytest.mark.parametrize("plain", [None, {}, [], [1, False, 1, 0], [False, False, 1, -1], [False, False, 1, 1, [[1]]]])
def test_a_finding_that_is_none_is_refused(plain: Any) -> None:
    with pytest.raises(ProtocolError):
        caretaker.heard(plain)


def test_the_longest_answer_fits_into_a_call() -> None:
    most = (1 << 63) - 1
    facts = ModelFacts("x" * 64, "x" * 32, most, most, most, most, "x" * 64)
    state = inventory.ModelState(
        ModelId("ab" * 32),
        "n" * 200,
        most,
        most,
        True,
        "p" * 32,
        most,
        most,
        most,
        "\N{GRINNING FACE}" * inventory.MAX_TEXT,
        facts,
    )
    assert len(pack(inventory.told([state] * MAX_MODELS))) < MAX_CALL
