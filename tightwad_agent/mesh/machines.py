"""Drives the two machines of a node, `members` and `election`: events in, effects carried out in their order.

What must be on the disk before others hear of it makes all later effects of its machine wait; the rest is done at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import trio

from tightwad_agent.ids import Epoch, NodeId
from tightwad_agent.mesh import election, members
from tightwad_agent.mesh.linker import Linker
from tightwad_agent.mesh.translate import Broadcasts, ElectionEvents, MemberEvents, Messages
from tightwad_agent.pulse import Pulse
from tightwad_agent.wire.rows import Stamp

MAX_EFFECTS = 4096
"""Effects that may wait for the disk; it is written at each change of the coordinator only."""

Effect = election.Effect | members.Effect


class Keeper(Protocol):
    """What the machines need of their node."""

    async def keep_epoch(self, epoch: Epoch) -> None:
        """Returns once the epoch is on the disk."""

    async def keep_incarnation(self, incarnation: int) -> None:
        """The same for an incarnation; the node's row is of it from then on."""

    def beat(self, effect: members.SendHeartbeat) -> object:
        """The heartbeat message for one node."""

    def state_changed(self, effect: members.StateChanged) -> None: ...

    def coordinator_changed(self, effect: election.CoordinatorChanged | election.SteppedDown) -> None: ...


class Machines:
    """`incarnation` and `epoch` as persisted; `links` carries the messages."""

    def __init__(self, me: NodeId, incarnation: int, epoch: Epoch, keeper: Keeper, wake: Pulse) -> None:
        now = trio.current_time()
        self._members = members.Members(me, incarnation, now)
        self._election = election.Election(me, now, epoch)
        self._keeper = keeper
        self._wake = wake
        self._links: Linker | None = None
        self._ordered, self._performing = trio.open_memory_channel[Effect](MAX_EFFECTS)
        self._n_pending = 0
        self._settled = Pulse()
        self._told = self._election.snapshot().stamp

    def use(self, links: Linker) -> None:
        """The links to send over; before the first event."""
        self._links = links

    # Looking

    @property
    def incarnation(self) -> int:
        return self._members.incarnation

    @property
    def epoch(self) -> Epoch:
        """The highest epoch this node knows."""
        return self._election.epoch

    @property
    def coordinator(self) -> NodeId | None:
        return self._election.coordinator

    @property
    def coordinating(self) -> bool:
        return self._election.coordinating

    @property
    def stamp(self) -> Stamp:
        """What may be said to others: never an epoch that is not on the disk yet."""
        if not self._n_pending:
            self._told = self._election.snapshot().stamp
        return self._told

    def accepts(self, epoch: Epoch) -> bool:
        return self._election.accepts(epoch)

    def peers(self) -> tuple[members.PeerView, ...]:
        return self._members.snapshot().peers

    def living(self) -> frozenset[NodeId]:
        """The others that live."""
        return frozenset(p.node for p in self.peers() if p.state.living)

    def suspects(self) -> frozenset[NodeId]:
        """Of the living, those that are in doubt."""
        return frozenset(p.node for p in self.peers() if p.state is members.State.SUSPECT)

    # Events

    def member(self, event: members.Event) -> None:
        """An event for the failure detector."""
        effects = self._members.handle(event, trio.current_time())
        if any(isinstance(e, members.Refuted) for e in effects):
            self._queue(effects)
        else:
            for effect in effects:
                self._perform(effect)
        self._wake.beat()

    def elect(self, event: election.Event) -> None:
        """An event for the election."""
        self._queue(self._election.handle(event, trio.current_time()))
        self._wake.beat()

    def take(self, node: NodeId, message: Any) -> bool:
        """A message of the control link; False if it is for neither machine. Raises `ProtocolError`."""
        for_members = MemberEvents.get(type(message))
        for_election = ElectionEvents.get(type(message))
        if for_members is not None:
            self.member(for_members(node, message))
        if for_election is not None:
            self.elect(for_election(node, message))
        return for_members is not None or for_election is not None

    def tick(self, now: float) -> None:
        """Gives each machine its time when it is due."""
        if _is_due(self._members.next_deadline(), now):
            self.member(members.Tick())
        if _is_due(self._election.next_deadline(), now):
            self.elect(election.Tick())

    def deadlines(self) -> list[float]:
        """When `tick` is due."""
        both = (self._members.next_deadline(), self._election.next_deadline())
        return [deadline for deadline in both if deadline is not None]

    # Effects

    async def settled(self) -> None:
        """Returns when everything decided so far has been carried out."""
        while self._n_pending:
            await self._settled.wait(self._settled.count)
        await trio.lowlevel.checkpoint()

    async def run(self) -> None:
        """Carries out what may have to wait for the disk. Until cancelled."""
        async for effect in self._performing:
            if isinstance(effect, election.Persist):
                await self._keeper.keep_epoch(effect.epoch)
            elif isinstance(effect, members.Refuted):
                await self._keeper.keep_incarnation(effect.incarnation)
            else:
                self._perform(effect)
            self._n_pending -= 1
            self._settled.beat()

    def _queue(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            self._n_pending += 1
            self._ordered.send_nowait(effect)

    def _perform(self, effect: Any) -> None:
        links = self._links
        assert links is not None
        kind = type(effect)
        if kind in Messages:
            links.post(effect.node, Messages[kind](effect))
        elif kind in Broadcasts:
            links.broadcast(Broadcasts[kind](effect))
        elif isinstance(effect, members.SendHeartbeat):
            links.post(effect.node, self._keeper.beat(effect))
        elif isinstance(effect, members.Redial):
            links.redial(effect.node)
        elif isinstance(effect, members.Disconnect):
            links.disconnect(effect.node)
        elif isinstance(effect, members.StateChanged):
            self._keeper.state_changed(effect)
        else:
            self._keeper.coordinator_changed(effect)


def _is_due(deadline: float | None, now: float) -> bool:
    return deadline is not None and deadline <= now
