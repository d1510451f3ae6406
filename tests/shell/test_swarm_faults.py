"""What disks, peers and people do to a transfer: real disks that are full or read-only, peers that drip, hostile
manifests with a right id, files that are exchanged under us."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile_manifests as hostile
import pytest
import swarm_kit as kit
import test_swarm_service
import trio
from test_swarm_service import BIG, _fast, fight, greet, net, next_request, seed_of, sha, until  # noqa: F401

from tightwad_agent.errors import EnvironmentFault
from tightwad_agent.ids import NodeId
from tightwad_agent.streams import Framed, peer_errors
from tightwad_agent.swarm import manifest
from tightwad_agent.swarm.manifest import Manifest
from tightwad_agent.swarm.pieces import Limits
from tightwad_agent.swarm.service import Phase
from tightwad_agent.swarm.store import Store
from tightwad_agent.wire.frames import encode
from tightwad_agent.wire.swarm import BLOCK_BYTES, CODEC, MAX_SWARM_HEADER, Block, ManifestIs

MIB = 1 << 20

# Disks


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], check=True, capture_output=True)

    def change(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True, capture_output=True)

    def fill(self) -> Path:
        """Leaves no byte."""
        filler = self.path / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        return filler


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.fail("a small disk of one's own needs root to mount it", pytrace=False)
    made = Disk(tmp_path / "disk")
    yield made
    subprocess.run(["umount", "--lazy", made.path], check=True)


async def test_a_real_disk_without_room_then_with_room(tmp_path: Path, disk: Disk) -> None:
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        network.folder = disk.path
        node = await network.node("leech")
        node.leech(model.model, seed)
        await until(lambda: node.status(model.model).phase is Phase.NO_ROOM)
        problem = node.status(model.model).problem
        assert f"needs {len(BIG):,} more bytes" in problem
        assert "are missing" in problem
        assert not list((node.folder / ".swarm").glob("*.part")), "nothing takes room meanwhile"
        disk.change("size=16m")
        assert (await node.until_complete(model.model)).read_bytes() == BIG
        await node.stop()


async def test_a_real_disk_that_others_fill_in_the_middle(tmp_path: Path, disk: Disk) -> None:
    disk.change("size=8m")
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        network.folder = disk.path
        node = await network.node("leech", limits=Limits(per_peer=1, total=1))
        node.leech(model.model, seed)
        await until(lambda: node.status(model.model).done > len(BIG) // 4)
        filler = disk.fill()
        await until(lambda: node.status(model.model).phase is Phase.NO_ROOM)
        assert "no room for" in node.status(model.model).problem
        assert [p.name for p in node.folder.glob("*.gguf")] == []
        filler.unlink()
        assert (await node.until_complete(model.model)).read_bytes() == BIG
        assert sum(node.status(model.model).from_each_peer.values()) == len(BIG), "nothing came twice"
        await node.stop()


def test_a_disk_that_is_read_only_is_named(disk: Disk) -> None:
    disk.change("ro")
    store = Store(disk.path / "m")
    with pytest.raises(
        EnvironmentFault, match=r"cannot use the models directory .*/m: Read-only file system"
    ) as caught:
        store.open()
    assert "writable" in caught.value.hint
    disk.change("rw")
    store.open()
    store.close()


# Peers


async def test_a_peer_that_drips_one_byte_at_a_time(tmp_path: Path) -> None:
    """Its frame never gets whole, so nothing counts as progress."""
    dripped = 0

    async def drips(framed: Framed, plan: Manifest) -> None:
        nonlocal dripped
        request = await next_request(framed)
        length = min(BLOCK_BYTES, plan.pieces[request.piece].length)
        with peer_errors():
            for byte in encode(CODEC.encode(Block(request.piece, 0)), bytes(length)):
                await framed.stream.send_all(bytes([byte]))
                dripped += 1
                await trio.sleep(0.02)

    await fight(tmp_path, drips, Limits(stall_s=0.3, max_askers=1))
    assert dripped > 3


async def test_a_peer_that_drips_one_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block is progress, but the piece takes too long."""
    monkeypatch.setattr(manifest, "PIECE_BYTES", MIB)
    monkeypatch.setattr(test_swarm_service, "BIG", kit.llama(3, tensor_kb=1024))  # pieces of four blocks
    blocks = 0

    async def drips(framed: Framed, plan: Manifest) -> None:
        nonlocal blocks
        request = await next_request(framed)
        length = plan.pieces[request.piece].length
        for at in range(0, length, BLOCK_BYTES):
            await trio.sleep(0.4)
            await framed.send(Block(request.piece, at), bytes(min(BLOCK_BYTES, length - at)))
            blocks += 1

    limits = Limits(per_peer=1, stall_s=60, slack_s=0.9, slowest_bytes_s=1 << 40, max_askers=1)
    await fight(tmp_path, drips, limits)
    assert 0 < blocks < 4, "it was left before the piece was whole"


@pytest.mark.parametrize("name", list(hostile.HOSTILE)[::3])
async def test_a_hostile_manifest_from_a_peer(tmp_path: Path, name: str) -> None:
    """The id that is asked for is its own, so only its rules can refuse it."""
    root, data = hostile.HOSTILE[name]
    async with net(tmp_path) as network:

        async def gives_it(_peer: NodeId, stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
            framed = Framed(stream, CODEC, max_header=MAX_SWARM_HEADER, max_payload=BLOCK_BYTES)
            await framed.receive()
            await framed.send(ManifestIs(), data)
            await trio.sleep_forever()

        node = await network.node("leech")
        node.leech(root, network.peer("evil", gives_it))
        await until(lambda: "has not given the manifest: manifest:" in node.status(root).problem)
        assert node.service.held() == ()
        assert [p.name for p in node.folder.iterdir()] == [".swarm"]
        assert not list((node.folder / ".swarm").glob(f"{root}*"))


async def test_a_manifest_of_half_a_gigabyte_is_not_even_read(tmp_path: Path) -> None:
    root, _ = hostile.HOSTILE["ten million pieces claimed"]
    async with net(tmp_path) as network:
        sent = 0

        async def floods(_peer: NodeId, stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
            nonlocal sent
            framed = Framed(stream, CODEC, max_header=MAX_SWARM_HEADER, max_payload=BLOCK_BYTES)
            await framed.receive()
            header = CODEC.encode(ManifestIs())
            await stream.send_all(struct.pack("!II", len(header), 44 * hostile.TEN_MILLION) + header)
            with peer_errors():
                while True:
                    await stream.send_all(bytes(MIB))
                    sent += MIB
                    await trio.sleep(0.01)

        node = await network.node("leech")
        node.leech(root, network.peer("evil", floods))
        await until(lambda: "at most" in node.status(root).problem)
        assert sent < 64 * MIB


# Files


async def test_two_models_of_one_name_at_once(tmp_path: Path) -> None:
    datas = [kit.llama(12, tensor_kb=128, seed=i) for i in range(2)]
    async with net(tmp_path) as network:
        seeds = [await seed_of(network, f"seed{i}", data) for i, data in enumerate(datas)]
        node = await network.node("leech", limits=Limits(per_peer=1, total=1))
        for seed, model in seeds:
            node.leech(model.model, seed)
        paths = [await node.until_complete(model.model) for _, model in seeds]
        assert [path.read_bytes() for path in paths] == datas
        assert {path.name for path in paths} == {"toy.gguf", "toy (2).gguf"}


async def test_one_model_that_goes_by_two_names(tmp_path: Path) -> None:
    """The root does not cover the name: any of them will do, and it comes once."""
    async with net(tmp_path) as network:
        one, model = await seed_of(network, "one", BIG)
        two, same = await seed_of(network, "two", BIG, file="another name.gguf")
        assert model.model == same.model
        node = await network.node("leech")
        node.leech(model.model, one, two)
        path = await node.until_complete(model.model)
        assert path.name in ("toy.gguf", "another name.gguf")
        assert sorted(p.name for p in node.folder.glob("*.gguf")) == [path.name]
        assert sha(path) == sha(tmp_path / "one-files" / "toy.gguf")


async def test_the_final_file_replaced_by_another_of_the_same_name(tmp_path: Path) -> None:
    """What the user put there stays; the model comes again beside it."""
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        node = await network.node("leech")
        node.leech(model.model, seed)
        path = await node.until_complete(model.model)
        kit.write(tmp_path / "other", b"something of the user's").replace(path)
        await until(lambda: node.service.path_of(model.model) not in (None, path))
        again = await node.until_complete(model.model)
        assert again.name == "toy (2).gguf"
        assert again.read_bytes() == BIG
        assert path.read_bytes() == b"something of the user's"


async def test_all_seeds_gone_for_longer_than_any_patience(tmp_path: Path) -> None:
    """It waits, says so, keeps what is here on offer, and goes on by itself."""
    async with net(tmp_path) as network:
        seed, model = await seed_of(network, "seed", BIG)
        node = await network.node("leech", limits=Limits(per_peer=1, total=1))
        node.leech(model.model, seed)
        await until(lambda: node.status(model.model).done > len(BIG) // 4)
        await seed.stop()
        await network.mesh.cut(node.id, seed.id)
        node.service.set_holders(model.model, frozenset())
        await until(lambda: "waiting for one to return" in node.status(model.model).problem)
        have = node.service.held()[0].have
        assert 0 < have < len(BIG)
        again, _ = await seed_of(network, "again", BIG)
        node.leech(model.model, again)
        assert (await node.until_complete(model.model)).read_bytes() == BIG
        came = node.status(model.model).from_each_peer
        assert came[again.id] <= len(BIG) - have
        assert sum(came.values()) == len(BIG)
