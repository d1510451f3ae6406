"""What a node writes down of itself: soon, or when it ends, whichever comes first."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import trio
import trio.testing
from mesh_lab import founder, until

from tightwad_agent.errors import EnvironmentFault
from tightwad_agent.ids import Address, Epoch, NodeName
from tightwad_agent.mesh import memory
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.memory import Memory
from tightwad_agent.mesh.state import FILE, NodeState
from tightwad_agent.testing import node_id
from tightwad_agent.wire.handshake import RememberedPeer

PEER = RememberedPeer(node_id("peer"), NodeName("peer"), (Address("10.0.0.2", 8089),))


@pytest.fixture
def me(tmp_path: Path) -> Identity:
    return founder(tmp_path)


def memory_of(me: Identity) -> tuple[Memory, list[str]]:
    told: list[str] = []
    return Memory(me.state, me.state_dir, told.append), told


def on_disk(me: Identity) -> NodeState:
    return NodeState.load(me.state_dir)


async def run_briefly(kept: Memory) -> None:
    """Starts it and ends it at once."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kept.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def test_a_node_that_ends_at_once_remembers_whom_it_met(me: Identity) -> None:
    kept, _ = memory_of(me)
    kept.met(PEER)
    await run_briefly(kept)
    assert on_disk(me).peers == (PEER,)


async def test_a_save_that_was_cancelled_before_it_began_is_made_up_for(me: Identity) -> None:
    kept, _ = memory_of(me)
    epoch = Epoch(7, str(me.node))
    with trio.CancelScope() as scope:
        scope.cancel()
        await kept.save(epoch=epoch)
    assert on_disk(me).epoch != epoch
    await run_briefly(kept)
    assert on_disk(me).epoch == epoch


async def test_what_comes_while_the_disk_writes_is_not_lost(me: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = memory_of(me)
    save = NodeState.save

    def slowly(state: NodeState, state_dir: Path) -> None:
        if PEER not in state.peers:
            trio.from_thread.run_sync(kept.met, PEER)
        save(state, state_dir)

    monkeypatch.setattr(NodeState, "save", slowly)
    await kept.save(incarnation=3)
    assert (on_disk(me).incarnation, on_disk(me).peers) == (3, ())
    await run_briefly(kept)
    assert (on_disk(me).incarnation, on_disk(me).peers) == (3, (PEER,))


async def test_nothing_new_is_not_written(me: Identity) -> None:
    kept, _ = memory_of(me)
    (me.state_dir / FILE).unlink()
    await run_briefly(kept)
    assert not (me.state_dir / FILE).exists()


async def test_a_disk_that_refuses_is_told_and_ends_nothing(me: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_state: NodeState, _state_dir: Path) -> None:
        raise EnvironmentFault("the disk is full")

    kept, told = memory_of(me)
    monkeypatch.setattr(NodeState, "save", refuse)
    kept.met(PEER)
    await run_briefly(kept)
    assert told == ["state not saved: the disk is full"]


async def test_it_is_written_soon_also_when_it_goes_on(me: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LATER_S", 0.05)
    kept, _ = memory_of(me)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(kept.run)
        for peer in (PEER, dataclasses.replace(PEER, addresses=())):
            kept.met(peer)
            await until(lambda p=peer: on_disk(me).peers == (p,))
        nursery.cancel_scope.cancel()
