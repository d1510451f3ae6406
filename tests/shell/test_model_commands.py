"""The commands about models between nodes: real swarms and commands, with the mesh of `testing`.

What is asked of the mesh and the agent beside that is answered by `Box`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import swarm_kit as kit
import trio
from test_swarm_care import flip
from test_swarm_service import BIG, Net, Node, _fast, net, seed_of  # noqa: F401 - a fixture among them

from tightwad_agent import model_commands, report
from tightwad_agent.decide import catalogue
from tightwad_agent.errors import ModelError, UnknownModel, UsageError
from tightwad_agent.ids import ModelId, NodeId, NodeName
from tightwad_agent.model_commands import ModelCommands
from tightwad_agent.testing import MemoryNode
from tightwad_agent.wire.rows import NodeRow, Role, ServeRecord

PATIENCE_S = 60


class Box:
    """An agent, its mesh and its conductor, as far as these commands look at them."""

    def __init__(self, node: Node, cluster: Cluster) -> None:
        self.swarm = node.service
        self.mesh = self.conductor = self
        self.me = node.id
        self.record = ServeRecord()
        self.told: list[str] = []
        self._node = node
        self._cluster = cluster
        self.commands = ModelCommands(cast("Any", self))
        node.mesh.methods |= self.commands.methods()

    def row(self) -> NodeRow:
        name = NodeName(self._node.name)
        return NodeRow(self.me, name, Role.NODE, 1, 1, 1, True, 0, 1, models=self.swarm.held())

    def living_rows(self) -> tuple[NodeRow, ...]:
        others = [b.row() for b in self._cluster.boxes if b is not self]
        return (self.row(), *others, *self._cluster.strangers)

    def name_of(self, node: NodeId) -> str:
        return next((str(r.name) for r in self.living_rows() if r.node == node), node.short)

    def catalogue(self) -> Any:
        return catalogue(self.living_rows())

    def serving(self) -> dict[str, Any]:
        return report.NOT_SERVING

    def tell(self, text: str, /, **_facts: Any) -> None:
        self.told.append(text)

    async def call(self, node: NodeId, method: str, params: dict[str, Any]) -> dict[str, Any]:
        return await self._node.mesh.call(node, method, params)

    async def run(self, command: str, **params: Any) -> dict[str, Any]:
        with trio.fail_after(PATIENCE_S):
            result: dict[str, Any] = await self.commands.table()[command](params, lambda _progress: None)
        return result


class Cluster:
    def __init__(self, network: Net) -> None:
        self.network = network
        self.boxes: list[Box] = []
        self.strangers: list[NodeRow] = []

    def stranger(self, name: str, methods: Mapping[str, Any]) -> MemoryNode:
        """A living node that does what it likes."""
        mesh = self.network.mesh.add(name)
        mesh.methods |= methods
        self.strangers.append(NodeRow(mesh.node, NodeName(name), Role.NODE, 1, 1, 1, True, 0, 1))
        return mesh


@asynccontextmanager
async def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Cluster, Box, Box, ModelId]]:
    """`theirs` shares a model in place, `own` has a copy of it."""
    monkeypatch.setattr(model_commands, "POLL_S", 0.01)
    async with net(tmp_path) as network:
        seed, held = await seed_of(network, "theirs", BIG)
        node = await network.node("own")
        node.leech(held.model, seed)
        await node.until_read_back(held.model)
        node.service.unwant(held.model)
        cluster = Cluster(network)
        cluster.boxes += [Box(seed, cluster), Box(node, cluster)]
        yield cluster, *cluster.boxes, held.model


async def test_nodes_that_do_not_answer_hold_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nonsense(_peer: NodeId, _params: Any) -> dict[str, Any]:
        return {"models": [["\x1b", 1, 2, 3]]}

    async def nothing(_peer: NodeId, _params: Any) -> dict[str, Any]:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(model_commands, "STATES_S", 0.5)
    async with two(tmp_path, monkeypatch) as (cluster, theirs, own, model):
        cluster.stranger("old", {})
        cluster.stranger("odd", {model_commands.STATES: nonsense})
        cluster.stranger("silent", {model_commands.STATES: nothing})
        for box in (theirs, own):
            (m,) = (await box.run("models"))["models"]
            copies = {n["name"]: (n["copy"], n["phase"]) for n in m["nodes"]}
            assert copies == {"theirs": ("in place", "complete"), "own": ("own", "complete")}
        found = (await own.run("verify", model="toy", everywhere=True))["results"]
        assert [(r["node"], r["state"]) for r in found[:2]] == [("own", "good"), ("theirs", "good")]
        assert {(r["node"], r["state"]) for r in found[2:]} == {(n, "unchecked") for n in ("old", "odd", "silent")}
        assert model == m["id"]


async def test_only_this_node_is_asked_unless_everywhere_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two(tmp_path, monkeypatch) as (_, theirs, own, model):
        path = own.swarm.path_of(model)
        assert path is not None
        flip(path, 300_000)
        assert [r["state"] for r in (await theirs.run("verify"))["results"]] == ["good"]
        found = (await theirs.run("verify", model="toy", everywhere=True))["results"]
        assert [(r["node"], r["state"], r["damaged"]) for r in found] == [("own", "damaged", 1), ("theirs", "good", 0)]
        told = {text.partition(" of ")[0] for text in theirs.told}
        assert told == {"toy.gguf is damaged on own: 1", "toy.gguf was compared on theirs and is whole"}


async def test_a_model_that_is_gone_everywhere_is_still_found_and_taken_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with two(tmp_path, monkeypatch) as (_, theirs, own, model):
        for box in (theirs, own):
            path = box.swarm.path_of(model)
            assert path is not None
            path.unlink()
        assert not own.catalogue()
        (m,) = (await own.run("models"))["models"]
        assert {n["phase"] for n in m["nodes"]} == {"problem"}
        found = (await own.run("verify", everywhere=True))["results"]
        assert {(r["state"], r["problem"].endswith("is gone")) for r in found} == {("failed", True)}
        assert sorted((await own.run("remove", model="toy"))["nodes"]) == ["own", "theirs"]
        assert (await own.run("models"))["models"] == []


async def test_what_cannot_be_compared_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with two(tmp_path, monkeypatch) as (_, theirs, own, model):
        await own.swarm.remove(model)
        with pytest.raises(ModelError, match="not complete on this machine"):
            await own.run("verify", model="toy")
        assert (await own.run("verify", model="toy", everywhere=True))["results"][0]["node"] == "theirs"
        with pytest.raises(UnknownModel):
            await own.run("verify", model="other")
        for params in ({"model": 5}, {"model": ""}):
            with pytest.raises(UsageError):
                await theirs.run("verify", **params)
        with pytest.raises(UsageError, match="too long"):
            await theirs.commands.methods()[model_commands.VERIFY](own.me, {"model": str(model), "run": "x" * 65})


async def test_what_a_removal_frees_is_said_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with two(tmp_path, monkeypatch) as (_, theirs, own, model):
        path = theirs.swarm.path_of(model)
        assert path is not None
        for dry_run in (True, False):
            said = await theirs.run("remove", model="toy", dry_run=dry_run)
            assert {f["node"]: (f["bytes"], f["in_place"]) for f in said["frees"]} == {
                "own": (len(BIG), False),
                "theirs": (0, True),
            }
            assert (own.swarm.path_of(model) is None) != dry_run
        assert path.read_bytes() == BIG


async def test_gc_asks_what_others_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with two(tmp_path, monkeypatch) as (_, theirs, own, _model):
        for name in (kept := theirs.swarm.held()[0].model, "ab" * 32):
            kit.write(own.swarm.store.state_dir / f"{name}.journal", b"x" * 100)
        held = await theirs.swarm.add(str(kit.write(tmp_path / "second.gguf", kit.llama(3, seed=4))))
        kit.write(own.swarm.store.state_dir / f"{held.model}.part", b"x" * 100)
        done = await own.run("gc")
        assert (done["bytes"], len(done["items"])) == (100, 1)
        assert (own.swarm.store.state_dir / f"{held.model}.part").exists(), "another node holds it"
        assert (own.swarm.store.state_dir / f"{kept}.journal").exists(), "it is complete here"
