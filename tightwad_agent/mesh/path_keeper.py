"""Keeps each node on the best of its addresses: measures when `paths` says so, and moves the link when it decides.

Streams ask `order` for where to dial. What went over an address that broke is cut, so that nobody waits for it.
"""

from __future__ import annotations

import ipaddress
import logging
import math
from collections.abc import Callable, Iterable, Sequence

import trio

from tightwad_agent.errors import PeerError
from tightwad_agent.events import Kind, Tell
from tightwad_agent.ids import Address, NodeId
from tightwad_agent.mesh import gauge, paths
from tightwad_agent.mesh.linker import Linker
from tightwad_agent.mesh.links import Links
from tightwad_agent.mesh.paths import Measured, Paths, PathView, Sample
from tightwad_agent.mesh.session import Session
from tightwad_agent.pulse import Pulse

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""How often the links are looked at for silence."""
SILENT_S = 1.6
"""More than a heartbeat's pause, less than what makes a node suspect."""
LATE_S = 0.25
PATIENT_S = 1.0
"""Head start of an address that is known to work; a busy machine must not lose it."""
CUT_S = 2.0


class PathKeeper:
    """`name_of` and `tell` are for people; `start` starts a task beside `run`."""

    def __init__(
        self,
        links: Links,
        linker: Linker,
        *,
        start: Callable[..., None],
        name_of: Callable[[NodeId], str],
        tell: Tell,
    ) -> None:
        self._links = links
        self._linker = linker
        self._start = start
        self._name_of = name_of
        self._tell = tell
        self._paths = Paths()
        self._wake = Pulse()
        self._offered: dict[NodeId, tuple[Address, ...]] = {}
        self._measuring = trio.CapacityLimiter(1)
        self._told: dict[NodeId, Address] = {}

    # What others ask

    def order(self, node: NodeId, candidates: Sequence[Address]) -> list[Address]:
        """Where to dial, best first."""
        return self._paths.order(node, candidates)

    def stagger_s(self, node: NodeId) -> float | None:
        """The first address's head start, where it is known to work."""
        session = self._linker.session(node)
        sound = session is not None and trio.current_time() - session.heard_at < SILENT_S
        return PATIENT_S if sound and self._paths.works(node, trio.current_time()) else None

    def views(self, node: NodeId) -> tuple[PathView, ...]:
        return self._paths.views(node)

    def in_use(self, node: NodeId) -> Address | None:
        return self._paths.in_use(node)

    # What it hears

    def offered(self, node: NodeId, addresses: tuple[Address, ...]) -> None:
        """What the node's row says now."""
        if self._offered.get(node) != addresses:
            if len(self._offered) >= paths.MAX_NODES:
                self._offered.pop(next(iter(self._offered)))
            self._offered[node] = addresses
            self._handle(paths.Offered(node, addresses))

    def link_up(self, session: Session) -> None:
        node, remote = session.peer.node, session.peer.remote
        address = remote if session.outgoing else _announced(remote.host, self._offered.get(node, ()))
        self._handle(paths.Linked(node, address, session.outgoing))

    def link_down(self, node: NodeId) -> None:
        self._handle(paths.Unlinked(node))

    def own_gone(self, hosts: Iterable[str]) -> None:
        """These addresses of this machine are gone: links move, and what is left on them is lost."""
        for host in hosts:
            over = [s for s in self._linker.sessions() if s.peer.local.host == host]
            for session in over:
                if (address := self._used(session)) is not None:
                    why = f"this machine no longer has {host}"
                    self._handle(paths.Broken(session.peer.node, address, why))
            self._start(self._cut_later, [s.peer.node for s in over], host)

    def _used(self, session: Session) -> Address | None:
        remote = session.peer.remote
        return remote if session.outgoing else _announced(remote.host, self._offered.get(session.peer.node, ()))

    # Running

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            seen, now = self._wake.count, trio.current_time()
            wake_at = min(now + LOOK_S, self._paths.next_deadline() or math.inf)
            with trio.move_on_at(wake_at):
                await self._wake.wait(seen)
            now = trio.current_time()
            self._handle(paths.Tick())
            if now - wake_at < LATE_S:  # else what lies unread is no silence of others
                self._look(now)

    def _look(self, now: float) -> None:
        for session in self._linker.sessions():
            if now - session.heard_at > SILENT_S:
                self._handle(paths.Silent(session.peer.node))

    def _handle(self, event: paths.Event) -> None:
        for effect in self._paths.handle(event, trio.current_time()):
            if isinstance(effect, paths.Measure):
                self._start(self._hurry if effect.urgent else self._measure, effect)
            else:
                self._use(effect)
        self._wake.beat()

    async def _measure(self, effect: paths.Measure) -> None:
        """One round after another, of all nodes: they would disturb one another."""
        async with self._measuring:
            idle = bool(effect.rates) and await gauge.is_idle()
            results: dict[Address, Sample | None] = {}
            for address in effect.addresses:
                rate = idle and address in effect.rates
                results[address] = await gauge.measure(self._links, effect.node, address, rate=rate)
        self._handle(Measured(effect.node, results, urgent=False))

    async def _hurry(self, effect: paths.Measure) -> None:
        """All at once; the first that answers is enough."""
        found: dict[Address, Sample | None] = {}
        async with trio.open_nursery() as nursery:

            async def one(address: Address) -> None:
                if sample := await gauge.measure(self._links, effect.node, address, rate=False):
                    found[address] = sample
                    nursery.cancel_scope.cancel()

            for address in effect.addresses:
                nursery.start_soon(one, address)
        self._handle(Measured(effect.node, found, urgent=True, silent=self._is_silent(effect.node)))

    def _is_silent(self, node: NodeId) -> bool:
        session = self._linker.session(node)
        return session is not None and trio.current_time() - session.heard_at > SILENT_S

    # Changing

    def _use(self, effect: paths.Use) -> None:
        self._say(effect)
        session = self._linker.session(effect.node)
        here = session is not None and session.outgoing and session.peer.remote == effect.address
        if session is not None and not here and (session.outgoing or effect.broken):
            self._start(self._move, effect)

    async def _move(self, effect: paths.Use) -> None:
        """The control link to the address; then what is left on the broken one ends."""
        try:
            await self._linker.relink(effect.node, effect.address)
        except PeerError as exc:
            log.debug("no link over %s: %s", effect.address, exc)
            self._handle(paths.Broken(effect.node, effect.address, exc.message))
            return
        if effect.broken and effect.before is not None and effect.before.host != effect.address.host:
            self._links.cut(effect.node, host=effect.before.host)

    async def _cut_later(self, nodes: Sequence[NodeId], host: str) -> None:
        """Only where the link has found another way: a cable that was out for a moment has broken nothing."""
        await trio.sleep(CUT_S)
        for node in nodes:
            session = self._linker.session(node)
            if session is not None and session.peer.local.host != host:
                self._links.cut(node, host=host)

    def _say(self, effect: paths.Use) -> None:
        views = {v.address: v for v in self.views(effect.node)}
        now = shown(effect.address, views.get(effect.address))
        before = shown(effect.before, views.get(effect.before)) if effect.before else "nothing"
        self._tell(
            f"linked to {self._name_of(effect.node)} over {now}; before {before}: {effect.why}",
            kind=Kind.LINK,
            peer=str(effect.node),
            address=str(effect.address),
            before=str(effect.before or ""),
            reason=effect.why,
        )


def shown(address: Address, view: PathView | None) -> str:
    """`10.0.2.4 (0.2 ms, 940 Mbit/s)`."""
    facts = []
    if view is not None and view.rtt_s is not None and view.rtt_s < math.inf:
        facts.append(f"{view.rtt_s * 1000:.1f} ms")
    if view is not None and view.rate is not None:
        facts.append(f"{view.rate * 8 / 1e6:.0f} Mbit/s")
    return address.host + (f" ({', '.join(facts)})" if facts else "")


def _announced(host: str, offered: Sequence[Address]) -> Address | None:
    """The announced address that a connection came from."""
    same = (a for a in offered if _same(a.host, host))
    return next(same, None)


def _same(a: str, b: str) -> bool:
    try:
        return _plain(a) == _plain(b)
    except ValueError:
        return a == b


def _plain(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    ip = ipaddress.ip_address(host.partition("%")[0])
    return getattr(ip, "ipv4_mapped", None) or ip
