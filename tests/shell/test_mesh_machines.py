"""The driver of the two machines: what must be on the disk is there before anybody hears of it."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tightwad_agent.errors import ProtocolError
from tightwad_agent.ids import NO_EPOCH, Epoch, NodeId
from tightwad_agent.mesh import election, members
from tightwad_agent.mesh.machines import Machines
from tightwad_agent.pulse import Pulse
from tightwad_agent.testing import node_id
from tightwad_agent.wire import control
from tightwad_agent.wire.rows import Stamp

ME, OTHER = node_id("me"), node_id("other")


class Keeper:
    """Writes to a disk that can be made to wait."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.disk = trio.Event()

    async def keep_epoch(self, epoch: Epoch) -> None:
        await self.disk.wait()
        self.log.append(epoch)

    async def keep_incarnation(self, incarnation: int) -> None:
        await self.disk.wait()
        self.log.append(incarnation)

    def beat(self, effect: members.SendHeartbeat) -> object:
        return effect

    def state_changed(self, effect: members.StateChanged) -> None:
        self.log.append((effect.node, str(effect.new)))

    def coordinator_changed(self, effect: Any) -> None:
        self.log.append(type(effect).__name__)


class Links:
    def __init__(self, log: list[Any]) -> None:
        self._log = log

    def post(self, node: NodeId, message: object) -> None:
        self._log.append((node, type(message).__name__))

    def broadcast(self, message: object) -> None:
        self._log.append(type(message).__name__)

    def redial(self, node: NodeId) -> None:
        self._log.append(("redial", node))

    def disconnect(self, node: NodeId) -> None:
        self._log.append(("disconnect", node))


@pytest.fixture
async def made(nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> tuple[Machines, Keeper]:
    keeper = Keeper()
    machines = Machines(ME, 1, NO_EPOCH, keeper, Pulse())
    links: Any = Links(keeper.log)
    machines.use(links)
    nursery.start_soon(machines.run)
    return machines, keeper


async def claim(machines: Machines) -> None:
    """This node, alone, takes the office."""
    machines.elect(election.View((election.Candidate(ME, True, 1, 0, True),)))
    while machines.coordinator is None:
        await trio.sleep(0.1)
        machines.tick(trio.current_time())


async def test_an_epoch_is_told_only_when_it_is_on_the_disk(made: tuple[Machines, Keeper]) -> None:
    machines, keeper = made
    await claim(machines)
    assert machines.epoch.counter == 1
    assert machines.stamp == Stamp(NO_EPOCH, None), "the heartbeat would tell of it before the disk has it"
    assert keeper.log == []
    keeper.disk.set()
    await machines.settled()
    assert machines.stamp == Stamp(Epoch(1, str(ME)), ME)
    assert keeper.log == [Epoch(1, str(ME)), "CoordinatorChanged", "Coordinates"]


async def test_a_refutation_waits_for_the_disk_and_so_does_what_follows_it(made: tuple[Machines, Keeper]) -> None:
    machines, keeper = made
    machines.member(members.LinkUp(OTHER, 1))
    machines.take(OTHER, control.Rumours((control.Said(ME, "dead", 1),)))
    assert machines.incarnation == 2
    before = list(keeper.log)
    keeper.disk.set()
    await machines.settled()
    after = keeper.log[len(before) :]
    assert after[0] == 2
    assert "Rumours" in [e[1] if isinstance(e, tuple) else e for e in after[1:]]


async def test_messages_go_to_the_machine_they_are_for(made: tuple[Machines, Keeper]) -> None:
    machines, keeper = made
    keeper.disk.set()
    machines.member(members.LinkUp(OTHER, 1))
    assert OTHER in machines.living()
    assert machines.take(OTHER, control.PreCheck(7))
    await machines.settled()
    assert (OTHER, "PreCheckReply") in keeper.log
    assert not machines.take(OTHER, control.RowStamps({}))
    with pytest.raises(ProtocolError):
        machines.take(OTHER, control.Rumours((control.Said(ME, "asleep", 1),)))


async def test_time_makes_suspects_and_then_dead_of_the_silent(made: tuple[Machines, Keeper]) -> None:
    machines, keeper = made
    keeper.disk.set()
    machines.member(members.LinkUp(OTHER, 1))
    ends_at = trio.current_time() + 10
    seen: set[str] = set()
    while OTHER in machines.living():
        assert trio.current_time() < ends_at
        seen |= {"suspect"} if OTHER in machines.suspects() else set()
        with trio.move_on_at(min(machines.deadlines())):
            await trio.sleep_forever()
        machines.tick(trio.current_time())
    assert seen == {"suspect"}
    assert ("redial", OTHER) in keeper.log
