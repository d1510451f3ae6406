"""Who else announces itself here: nodes of this cluster become contacts, other clusters are told of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from tightwad_agent.ids import ClusterId, NodeId
from tightwad_agent.mesh.advert import Advert, cluster_hash
from tightwad_agent.mesh.mdns import Gone, Mdns, News, Sighting

MAX_UNREAD = 64
MAX_STRANGERS = 8
"""Other clusters that an event tells of; `peers` shows what is seen now."""


class Neighbours:
    """mDNS for one node. `met` is given what a node of this cluster announces, `tell` the words about a stranger;
    `ignores` says of whom neither."""

    def __init__(
        self,
        me: NodeId,
        cluster: Callable[[], ClusterId],
        advert: Callable[[], Advert],
        *,
        interfaces: Sequence[str],
        ignores: Callable[[NodeId], bool],
        met: Callable[[Sighting], None],
        tell: Callable[[str], None],
    ) -> None:
        self._cluster = cluster
        self._ignores = ignores
        self._met = met
        self._tell = tell
        send, self._news = trio.open_memory_channel[News](MAX_UNREAD)
        self._mdns = Mdns(me, advert, send, interfaces=interfaces)

    @property
    def problem(self) -> str:
        """Why mDNS does not work; empty if it does."""
        return self._mdns.problem

    def strangers(self) -> list[Sighting]:
        """Agents of other clusters, as they announce themselves; nothing of it is proved."""
        mine = cluster_hash(self._cluster())
        return [s for s in self._mdns.seen.values() if s.cluster_hash != mine]

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._mdns.run)
            await self._take()

    async def _take(self) -> None:
        mine = cluster_hash(self._cluster())
        strangers: set[str] = set()
        async for item in self._news:
            if isinstance(item, Gone):
                continue  # mDNS is never a failure detector
            if self._ignores(item.node):
                continue
            if item.cluster_hash == mine:
                self._met(item)
            elif item.cluster_hash not in strangers and len(strangers) < MAX_STRANGERS:
                strangers.add(item.cluster_hash)
                self._tell(
                    f"{item.advert.name} nearby is of another cluster; to join that one: `tightwad-agent leave` here, "
                    "`tightwad-agent token create` there"
                )
