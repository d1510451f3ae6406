"""Announcing this node over mDNS and hearing of others: python-zeroconf's threads on one side, trio on the other.

zeroconf runs an asyncio loop and a browser in threads of their own. Their callbacks leave a service's name in a bounded
backlog; one trio task reads the records from zeroconf's cache, checks them, and sends what changed to whoever dials.
Nothing heard is believed, and nothing missing means that a node is dead: records live for up to 75 minutes.

mDNS that does not work never stops the agent: `problem` says what is wrong, it is logged once, and `run` tries again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio
import zeroconf

from tightwad_agent.errors import ConfigError
from tightwad_agent.ids import Address, NodeId
from tightwad_agent.mesh import netif
from tightwad_agent.mesh.advert import SERVICE_TYPE, Advert, parse, to_txt

log = logging.getLogger(__name__)

MAX_SIGHTINGS = 256
"""Nodes remembered, to report changes only; five times the largest cluster."""
MAX_BACKLOG = 256
"""Names heard of and not looked at yet; beyond it the oldest is dropped and counted."""
MAX_ASKED = 64
"""Names whose records did not come along and are waiting to be asked for."""
MAX_ADDRESSES = 16
"""Addresses taken from one node."""

PERIOD_S = 3.0
"""Own interfaces and own advert are looked at this often; both change the announcement at most so often."""
RETRY_S = 30.0
"""After a failure with the same interfaces."""
ASK_S = 3.0
N_ASKERS = 4
CLOSE_DEADLINE_S = 2.0
"""A goodbye takes 0.3 s; a network that takes longer does not get one."""
QUERY_ALONE_S = 5.0
"""zeroconf asks four times in 14 seconds and then not for an hour: too rarely for two halves of a network that
are joined later, or for a WiFi that lost the first packets. While no other node is known, ask this often."""
QUERY_S = 60.0
"""The same once somebody is known; the answers we have go along, so that only others answer."""
MAX_KNOWN_ANSWERS = 64
HEAR_SELF_S = 10.0
"""By then our own announcement should have come back through the multicast loop."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """A node that announces itself, of this cluster or another; its addresses are those worth dialling, best first."""

    node: NodeId
    cluster_hash: str
    addresses: tuple[Address, ...]
    advert: Advert


@dataclass(frozen=True, slots=True)
class Gone:
    """A node said goodbye, or its records ran out. It says nothing about links to it."""

    node: NodeId


News = Sighting | Gone


@dataclass(frozen=True, slots=True)
class Record:
    """What zeroconf's cache holds about a service: unchecked."""

    properties: dict[bytes, bytes | None]
    port: int
    hosts: tuple[str, ...]


class Mdns:
    """The presence of `node` on mDNS.

    `advert` is asked for what to announce; `None` means nothing, only listen. What is heard goes into `found`: a slow
    reader delays the news and loses none of up to 256 nodes. `interfaces` as in `Config`.
    """

    def __init__(
        self,
        node: NodeId,
        advert: Callable[[], Advert | None],
        found: trio.MemorySendChannel[News],
        *,
        interfaces: Sequence[str] = (),
        scan: Callable[[], list[netif.Interface]] = netif.interfaces,
        period_s: float = PERIOD_S,
        retry_s: float = RETRY_S,
    ) -> None:
        self.problem = ""
        """Why mDNS does not work, for `status` and `doctor`; empty while it does."""
        self.choice = netif.Choice((), ())
        """What is announced at the moment, and what is not and why."""
        self.seen: dict[NodeId, Sighting] = {}
        self.n_dropped = 0
        """Names that came faster than they were looked at."""
        self.n_refused = 0
        """Records that were none of ours; `last_refusal` says why the last one was not taken."""
        self.last_refusal = ""
        self._me = node
        self._advert = advert
        self._found = found
        self._wanted = tuple(interfaces)
        self._scan = scan
        self._period_s = period_s
        self._retry_s = retry_s
        self._responder: _Responder | None = None
        self._announced: tuple[dict[str, str], tuple[str, ...]] = ({}, ())
        self._tried: tuple[str, ...] | None = None
        self._retry_at = 0.0
        self._queried_at = 0.0
        self._silent_since = math.inf
        self._heard_self = False
        self._backlog: dict[str, bool] = {}
        self._wake = trio.Event()
        self._ask_send, self._ask_receive = trio.open_memory_channel[NodeId](MAX_ASKED)

    async def run(self) -> None:
        """Until cancelled; then says goodbye, within `CLOSE_DEADLINE_S`."""
        token = trio.lowlevel.current_trio_token()
        limiter = trio.CapacityLimiter(N_ASKERS)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._report)
                for _ in range(N_ASKERS):
                    nursery.start_soon(self._ask, limiter)
                while True:
                    await self._refresh(token)
                    await trio.sleep(self._period_s)
        finally:
            await self._stop()

    # Announcing

    async def _refresh(self, token: trio.lowlevel.TrioToken) -> None:
        """Brings what is announced in line with this machine's interfaces and with the advert."""
        try:
            self.choice = netif.choose(await trio.to_thread.run_sync(self._scan), self._wanted)
        except (ConfigError, OSError) as exc:
            self._say(str(exc).replace("\n", "; "))
            return
        sources = self.choice.multicast_from
        now = trio.current_time()
        try:
            if self._responder is None or sources != self._responder.sources:
                if sources != self._tried or now >= self._retry_at:
                    await self._restart(sources, token)
            else:
                await self._announce(self._responder)
                self._query(self._responder, now)
        except (OSError, RuntimeError, zeroconf.Error) as exc:
            await self._stop()
            self._say(f"multicast on UDP port 5353 does not work: {str(exc) or type(exc).__name__}")
            return
        self._judge(now)

    async def _restart(self, sources: tuple[str, ...], token: trio.lowlevel.TrioToken) -> None:
        await self._stop()
        self._tried, self._retry_at = sources, trio.current_time() + self._retry_s
        if not sources:
            return
        self._heard_self, self._silent_since = False, math.inf
        self._queried_at = trio.current_time()

        def heard(name: str, gone: bool) -> None:  # in zeroconf's browser thread
            try:
                trio.from_thread.run_sync(self._note, name, gone, trio_token=token)
            except trio.RunFinishedError:
                pass  # the agent is ending

        self._responder = await trio.to_thread.run_sync(_Responder, sources, heard)
        self._wake.set()  # its browser may have heard of nodes before it was ours to look them up with
        await self._announce(self._responder)

    async def _announce(self, responder: _Responder) -> None:
        advert = self._advert()
        if advert is None:
            self._announced, self._silent_since = ({}, ()), math.inf
            await trio.to_thread.run_sync(responder.withdraw, abandon_on_cancel=True)
            return
        txt, hosts = to_txt(advert), tuple(own.ip for own in self.choice.addresses)
        if self._announced == (txt, hosts):
            return
        await trio.to_thread.run_sync(responder.announce, self._me, advert.port, txt, hosts, abandon_on_cancel=True)
        self._announced = (txt, hosts)
        self._silent_since = min(self._silent_since, trio.current_time())

    def _query(self, responder: _Responder, now: float) -> None:
        """From time to time: asks the network, and takes up what is cached and was missed."""
        if now - self._queried_at < (QUERY_S if self.seen else QUERY_ALONE_S):
            return
        self._queried_at = now
        responder.query()
        for name in responder.names()[: MAX_SIGHTINGS - len(self.seen)]:
            if _node_of(name) not in self.seen:
                self._note(name, gone=False)

    async def _stop(self) -> None:
        responder, self._responder = self._responder, None
        self._announced = ({}, ())
        if responder is None:
            return
        with trio.move_on_after(CLOSE_DEADLINE_S, shield=True) as scope:
            await trio.to_thread.run_sync(responder.close, abandon_on_cancel=True)
        if scope.cancelled_caught:
            log.warning("mDNS did not close within %g s; its thread is left to end by itself", CLOSE_DEADLINE_S)

    def _judge(self, now: float) -> None:
        if self._responder is None:
            if not self.choice.multicast_from:
                skipped = "; ".join(map(str, self.choice.skipped[:8]))
                self._say(f"no network interface to announce on ({skipped or 'this machine has none'})")
        elif self._heard_self or self._silent_since == math.inf:
            self._say("")
        elif now - self._silent_since > HEAR_SELF_S:
            self._say(
                f"the announcement from {', '.join(self._responder.sources)} does not come back: "
                "a firewall may block UDP port 5353, or the interface has no multicast"
            )

    def _say(self, problem: str) -> None:
        if problem == self.problem:
            return
        self.problem = problem
        if problem:
            log.warning("mDNS: %s. Other machines are found by --seed, by tokens and by memory meanwhile", problem)
        else:
            log.info("mDNS works again")

    # Hearing

    def _note(self, name: str, gone: bool) -> None:
        self._backlog.pop(name, None)
        if len(self._backlog) >= MAX_BACKLOG:
            del self._backlog[next(iter(self._backlog))]
            self.n_dropped += 1
        self._backlog[name] = gone
        self._wake.set()

    async def _report(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._backlog and self._responder is not None:
                name = next(iter(self._backlog))
                gone = self._backlog.pop(name)
                if (news := self._news(name, gone)) is not None:
                    await self._found.send(news)

    def _news(self, name: str, gone: bool) -> News | None:
        """What a change of the service `name` means, if anything."""
        node = _node_of(name)
        if node is None:
            self._refuse(f"{name[:80]!r} is not named after a node")
            return None
        if node == self._me:
            self._heard_self = self._heard_self or not gone
            return None
        if gone:
            return Gone(node) if self.seen.pop(node, None) else None
        record = self._responder.cached(node) if self._responder else None
        if record is None:
            self._ask_for(node)
            return None
        sighting = self._checked(node, record)
        return sighting if sighting and self._remember(sighting) else None

    def _checked(self, node: NodeId, record: Record) -> Sighting | None:
        advert, reason = parse(record.properties)
        if advert is None:
            self._refuse(f"{node.short}: {reason}")
            return None
        if advert.node != node or advert.port != record.port:
            self._refuse(f"{node.short}: the record contradicts itself")
            return None
        networks = self.choice.networks
        hosts = netif.dialable(record.hosts, networks)
        addresses = netif.same_subnet_first([Address(host, advert.port) for host in hosts], networks)
        return Sighting(node, advert.cluster, tuple(addresses[:MAX_ADDRESSES]), advert)

    def _refuse(self, reason: str) -> None:
        self.n_refused += 1
        if reason != self.last_refusal:
            self.last_refusal = reason
            log.debug("mDNS: not taken: %s", reason)

    def _remember(self, sighting: Sighting) -> bool:
        """Whether it says anything new."""
        if self.seen.get(sighting.node) == sighting:
            return False
        self.seen.pop(sighting.node, None)
        if len(self.seen) >= MAX_SIGHTINGS:
            del self.seen[next(iter(self.seen))]
        self.seen[sighting.node] = sighting
        return True

    def _ask_for(self, node: NodeId) -> None:
        try:
            self._ask_send.send_nowait(node)
        except trio.WouldBlock:
            self.n_dropped += 1

    async def _ask(self, limiter: trio.CapacityLimiter) -> None:
        """Asks the network for records that did not come with the name."""
        while True:
            node = await self._ask_receive.receive()
            if (responder := self._responder) is None:
                continue
            if await trio.to_thread.run_sync(responder.ask, node, abandon_on_cancel=True, limiter=limiter):
                self._note(_service_name(node), gone=False)


_QUERY, _PTR, _IN = 0x0000, 12, 1  # of DNS: flags of a query, record type, class


class _Responder:
    """A `Zeroconf` on the given source addresses, and a browser. Its methods block, unless they say otherwise."""

    def __init__(self, sources: tuple[str, ...], heard: Callable[[str, bool], None]) -> None:
        self.sources = sources
        self._info: zeroconf.ServiceInfo | None = None
        self._zeroconf = zeroconf.Zeroconf(interfaces=list(sources))

        def on_change(name: str, state_change: zeroconf.ServiceStateChange, **_others: object) -> None:
            heard(name, state_change is zeroconf.ServiceStateChange.Removed)

        # QM: answers to all. A unicast answer reaches only one of several mDNS programs on a machine.
        try:
            zeroconf.ServiceBrowser(
                self._zeroconf, SERVICE_TYPE, handlers=[on_change], question_type=zeroconf.DNSQuestionType.QM
            )
        except BaseException:
            self.close()
            raise

    def announce(self, node: NodeId, port: int, txt: dict[str, str], hosts: tuple[str, ...]) -> None:
        """Announces, or replaces what was announced. Takes half a second."""
        info = zeroconf.ServiceInfo(
            SERVICE_TYPE,
            _service_name(node),
            port=port,
            properties=txt,
            server=f"{node}.local.",
            parsed_addresses=list(hosts),
        )
        if self._info is None:
            # A node id is unique by construction; probing for it would only let a stranger veto our name.
            self._zeroconf.register_service(info, cooperating_responders=True)
        else:
            self._zeroconf.update_service(info)
        self._info = info

    def withdraw(self) -> None:
        """Announces nothing from here on."""
        if self._info is not None:
            self._zeroconf.unregister_service(self._info)
            self._info = None

    def query(self) -> None:
        """Asks all nodes but those in the cache to answer. Does not block."""
        now = zeroconf.current_time_millis()
        packet = zeroconf.DNSOutgoing(_QUERY)  # type: ignore[attr-defined]  # there, not in its __all__
        packet.add_question(zeroconf.DNSQuestion(SERVICE_TYPE, _PTR, _IN))  # type: ignore[attr-defined]
        for record in self._zeroconf.cache.get_all_by_details(SERVICE_TYPE, _PTR, _IN)[:MAX_KNOWN_ANSWERS]:
            if not record.is_stale(now):
                packet.add_answer_at_time(record, now)
        self._zeroconf.send(packet)

    def names(self) -> list[str]:
        """All services in the cache. Does not block."""
        records = self._zeroconf.cache.get_all_by_details(SERVICE_TYPE, _PTR, _IN)
        return [alias for record in records if (alias := getattr(record, "alias", ""))]

    def cached(self, node: NodeId) -> Record | None:
        """What the cache has; `None` unless it is whole. Does not block."""
        info = zeroconf.ServiceInfo(SERVICE_TYPE, _service_name(node))
        if not info.load_from_cache(self._zeroconf) or info.port is None:
            return None
        return Record(info.properties, info.port, tuple(info.parsed_addresses()))

    def ask(self, node: NodeId) -> bool:
        """Whether the records came within `ASK_S`."""
        info = zeroconf.ServiceInfo(SERVICE_TYPE, _service_name(node))
        try:
            return info.request(self._zeroconf, ASK_S * 1000, zeroconf.DNSQuestionType.QM)
        except (AssertionError, RuntimeError, OSError, zeroconf.Error) as exc:  # closed meanwhile
            log.debug("mDNS: asking for %s: %r", node.short, exc)
            return False

    def close(self) -> None:
        """Says goodbye and ends the threads."""
        try:
            self._zeroconf.close()
        except (RuntimeError, OSError, zeroconf.Error) as exc:
            log.debug("mDNS: closing: %r", exc)


def _service_name(node: NodeId) -> str:
    return f"{node}.{SERVICE_TYPE}"


def _node_of(name: str) -> NodeId | None:
    label, _, rest = name.partition(".")
    if rest.lower() != SERVICE_TYPE:
        return None
    try:
        return NodeId(label.lower())
    except ValueError:
        return None
