"""API keys between nodes, over a mesh in memory: told to all, also to those who come later, and never lost."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from tightwad_agent import keyring as keys
from tightwad_agent.api_keys import digest_of
from tightwad_agent.errors import EnvironmentFault, RemoteError, StateDamaged, UsageError
from tightwad_agent.ids import NodeName
from tightwad_agent.keyring import Keyring
from tightwad_agent.pulse import Pulse
from tightwad_agent.testing import MemoryMesh
from tightwad_agent.wire.codec import to_plain
from tightwad_agent.wire.keys import MAX_RECORDS, ApiKey, KeyName
from tightwad_agent.wire.rows import NodeRow, Role

DEFAULT = "twk_" + "d" * 43
DEADLINE_S = 20.0


@dataclass
class Box:
    """One node: its place in the mesh, its keys, and whom it takes for living."""

    net: Net
    name: str
    folder: Path
    role: Role = Role.NODE
    incarnation: int = 1
    events: list[str] = field(default_factory=list)
    speaks: bool = True

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.node = self.net.mesh.add(self.name)
        self.changed = Pulse()
        self.scope = trio.CancelScope()
        self.start()

    def start(self) -> None:
        self.ring = Keyring(self.folder, DEFAULT, wall=time.time, tell=self.events.append)
        if self.speaks:
            self.node.methods |= self.ring.methods()
        self.scope = trio.CancelScope()
        self.net.nursery.start_soon(self._run, self.scope)

    async def _run(self, scope: trio.CancelScope) -> None:
        with scope:
            await self.ring.run(self.node.call, self._others, self.changed)

    def _others(self) -> list[NodeRow]:
        return [box.row() for box in self.net.boxes if box is not self and box.name in self.net.living]

    def row(self) -> NodeRow:
        name = NodeName(self.name)
        return NodeRow(self.node.node, name, self.role, self.incarnation, 0, 0, eligible=True, klass=0, endpoint_port=1)

    def knows(self, key: str) -> bool:
        return bool(self.ring.holder(key.encode()))


class Net:
    def __init__(self, nursery: trio.Nursery, folder: Path) -> None:
        self.nursery = nursery
        self.folder = folder
        self.mesh = MemoryMesh(nursery)
        self.boxes: list[Box] = []
        self.living: set[str] = set()

    def add(self, name: str, *, role: Role = Role.NODE, speaks: bool = True) -> Box:
        box = Box(self, name, self.folder / name, role, speaks=speaks)
        self.boxes.append(box)
        self.come(name)
        return box

    def come(self, name: str) -> None:
        self.living.add(name)
        self._beat()

    def go(self, name: str) -> None:
        self.living.discard(name)
        self._beat()

    def _beat(self) -> None:
        for box in self.boxes:
            box.changed.beat()


@pytest.fixture
async def net(tmp_path: Path) -> AsyncIterator[Net]:
    async with trio.open_nursery() as nursery:
        yield Net(nursery, tmp_path)
        nursery.cancel_scope.cancel()


def reread(box: Box) -> tuple[ApiKey, ...]:
    """What a new start would find."""
    return Keyring(box.folder, DEFAULT, wall=time.time, tell=print).records()


async def until(true: Callable[[], bool]) -> None:
    with trio.fail_after(DEADLINE_S):
        while not true():
            await trio.sleep(0.01)


async def test_all_hear_of_keys_and_of_their_end(net: Net) -> None:
    boxes = [net.add(name) for name in "abcd"]
    await boxes[0].ring.create("phone", "k1")
    await boxes[3].ring.create("laptop", "k2", 3600)
    await until(lambda: all(box.knows("k1") and box.knows("k2") for box in boxes))
    await boxes[2].ring.revoke("phone")
    assert not boxes[2].knows("k1")
    await until(lambda: not any(box.knows("k1") for box in boxes))
    assert all(box.knows("k2") for box in boxes)
    assert any("phone" in text and "revoked" in text for text in boxes[0].events)
    assert not any("k1" in text for box in boxes for text in box.events)


async def test_who_was_away_is_told_and_cannot_bring_a_revoked_key_back(net: Net) -> None:
    a, b = net.add("a"), net.add("b")
    await a.ring.create("phone", "k1")
    await until(lambda: b.knows("k1"))
    net.go("b")
    await a.ring.revoke("phone")
    await b.ring.create("made-meanwhile", "k2")
    net.come("b")
    await until(lambda: not b.knows("k1") and a.knows("k2"))
    assert not a.knows("k1")


async def test_a_node_that_starts_anew_is_told_anew_even_if_it_lost_its_disk(net: Net) -> None:
    a, b = net.add("a"), net.add("b")
    await a.ring.create("phone", "k1")
    await until(lambda: reread(b) == a.ring.records())
    b.scope.cancel()
    (b.folder / keys.FILE).unlink()
    b.incarnation += 1
    b.start()
    assert not b.knows("k1")
    net.come("b")
    await until(lambda: b.knows("k1"))


async def test_what_is_known_is_on_the_disk_of_all(net: Net) -> None:
    a, b = net.add("a"), net.add("b")
    await a.ring.create("phone", "k1")
    await a.ring.create("gone", "k2")
    await a.ring.revoke("gone")
    assert a.ring.records() == reread(a) != ()
    await until(lambda: reread(b) == a.ring.records())
    text = (a.folder / keys.FILE).read_text()
    assert (a.folder / keys.FILE).stat().st_mode & 0o777 == 0o600
    assert "k1" not in text
    assert digest_of(b"k1").hex() in text


async def test_a_node_without_keys_does_not_disturb_the_others(net: Net) -> None:
    a, old, b = net.add("a"), net.add("old", speaks=False), net.add("b")
    await a.ring.create("phone", "k1")
    await until(lambda: b.knows("k1"))
    assert not old.knows("k1")


async def test_one_that_cannot_be_reached_is_told_later(net: Net) -> None:
    a, b, c = (net.add(name) for name in "abc")
    for other in (a, c):
        await net.mesh.cut(other.node.node, b.node.node)
    await a.ring.create("phone", "k1")
    await until(lambda: c.knows("k1"))
    assert not b.knows("k1")
    net.mesh.heal(a.node.node, b.node.node)
    await until(lambda: b.knows("k1"))


async def test_a_client_of_the_cluster_is_told_and_not_believed(net: Net) -> None:
    a, client = net.add("a"), net.add("client", role=Role.CLIENT)
    a.node.methods.pop(keys.METHOD)  # what the mesh refuses a client
    await client.ring.create("own", "k0")
    await a.ring.create("phone", "k1")
    await until(lambda: client.knows("k1"))
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert not a.knows("k0")


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"keys": None},
        {"keys": "x"},
        {"keys": [1]},
        {"keys": [[b"x"]]},
        {"keys": [[bytes(32), "bad name", 0, 0, 0]]},
        {"keys": [[bytes(32), "k", -1, 0, 0]]},
        {"keys": [[bytes(33), "k", 0, 0, 0]]},
        {"keys": [to_plain(ApiKey(bytes(32), KeyName("k"), 0))] * (MAX_RECORDS + 1)},
    ],
)
async def test_nonsense_of_another_node_is_refused_whole(net: Net, said: dict[str, object]) -> None:
    a, b = net.add("a"), net.add("b")
    with pytest.raises(RemoteError, match="keys"):
        await b.node.call(a.node.node, keys.METHOD, said)
    assert a.ring.records() == ()


NOT_HEX = "- {name: k, sha256: zz, created: 1, expires: 0, revoked: 0}"


@pytest.mark.parametrize("text", ["", "x: y", "- 1", "- {name: k}", "[", NOT_HEX, "\xff"])
async def test_a_damaged_file_is_said_and_nothing_is_guessed(tmp_path: Path, text: str) -> None:
    (tmp_path / keys.FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(StateDamaged, match="api-keys"):
        Keyring(tmp_path, DEFAULT, wall=time.time, tell=print)


async def test_revoked_at_once_even_where_the_disk_refuses(net: Net) -> None:
    a, b = net.add("a"), net.add("b")
    await a.ring.create("phone", "k1")
    await until(lambda: b.knows("k1"))
    (a.folder / keys.FILE).unlink()
    a.folder.rmdir()
    with pytest.raises(EnvironmentFault):
        await a.ring.revoke("phone")
    assert not a.knows("k1")
    await until(lambda: not b.knows("k1"))


async def test_the_first_key_is_not_printed_once_it_is_revoked(net: Net) -> None:
    a = net.add("a")
    keys.check_default(a.folder, DEFAULT)
    await a.ring.revoke("default")
    with pytest.raises(UsageError, match="was revoked"):
        keys.check_default(a.folder, DEFAULT)
    keys.forget(a.folder)
    keys.check_default(a.folder, DEFAULT)
