"""`events`: what happened in the cluster, asked of each living node and put together; and the call that answers it."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio

from tightwad_agent.errors import PeerError, ProtocolError, UsageError
from tightwad_agent.event_merge import Happening, Told, chosen, merge
from tightwad_agent.events import MAX_AT, MAX_EVENTS, MAX_SEQ, Event, Journal, Kind, parse, plain
from tightwad_agent.ids import NodeId
from tightwad_agent.mesh.members import State
from tightwad_agent.mesh.service import MeshService, PeerStatus
from tightwad_agent.proxy.cluster import Command, Progress
from tightwad_agent.report import iso
from tightwad_agent.streams import MethodHandler, peer_errors
from tightwad_agent.wire.codec import pack

log = logging.getLogger(__name__)

LIST = "events.list"
ASK_S = 3.0
MAX_ANSWER = 1 << 19
"""Bytes of events in one answer; the newest are in it."""
MAX_ASKED = 16
"""Nodes that are asked at a time."""
MAX_KINDS = 32
CLOCK_S = 0.5
"""A clock that differs by less than this is not mentioned."""

Plain = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Heard:
    """What one node said. `ahead_s`: its clock before this one's; 0 where the call took too long to tell."""

    events: tuple[Event, ...] = ()
    ahead_s: float = 0.0


class EventCommands:
    """`clock`: Unix seconds."""

    def __init__(self, mesh: MeshService, journal: Journal, clock: Callable[[], float] = time.time) -> None:
        self._mesh = mesh
        self._journal = journal
        self._clock = clock

    def table(self) -> Mapping[str, Command]:
        return {"events": self.events}

    def methods(self) -> Mapping[str, MethodHandler]:
        """Calls from other nodes of the cluster."""
        return {LIST: self._list_here}

    # Of all nodes

    async def events(self, params: Plain, _progress: Progress) -> Plain:
        """{since, since_s, kinds, node, n, after: {id: seq}} -> {events, silent, clocks, cursor, now}

        `since`: Unix seconds by this node's clock, `since_s`: so long before now. `after`: of each node only what it
        told after that number. `cursor` is the `after` of the next look.
        """
        after, node, wanted = _after(params), self._node(params.get("node")), _kinds(params)
        n = _int(params, "n", 50, 1, MAX_EVENTS)
        since = self._since(params)
        heard, silent = await self._ask_all(after)
        happenings = chosen(
            merge(Told(self._mesh.name_of(peer), h.events, h.ahead_s) for peer, h in heard.items()),
            since=since,
            kinds=wanted,
            node=node,
            n=n,
        )
        clocks = [(self._mesh.name_of(peer), h.ahead_s) for peer, h in heard.items() if abs(h.ahead_s) >= CLOCK_S]
        return {
            "events": [shown(h, self._mesh.with_names) for h in happenings],
            "silent": [{"name": name, "reason": reason} for name, reason in sorted(silent)],
            "clocks": [{"name": name, "ahead_s": round(ahead_s, 1)} for name, ahead_s in sorted(clocks)],
            "cursor": after | {str(peer): h.events[-1].seq for peer, h in heard.items() if h.events},
            "now": self._clock(),
        }

    def _since(self, params: Plain) -> float:
        since, since_s = _number(params, "since"), _number(params, "since_s")
        return max(since, self._clock() - since_s if since_s else 0.0)

    def _node(self, name: object) -> tuple[str, str] | None:
        """(id, name) of the node that a person means."""
        if name is None:
            return None
        peers = self._mesh.peers()
        found = [p for p in peers if name in (str(p.node), p.node.short, _name(p))]
        if len(found) != 1:
            why = "no machine of the cluster is" if not found else f"{len(found)} machines are"
            there = ", ".join(sorted(_name(p) for p in peers))
            raise UsageError(f"{why} called {str(name)[:64]!r}", hint=f"there are: {there}")
        return str(found[0].node), _name(found[0])

    async def _ask_all(self, after: Mapping[str, int]) -> tuple[dict[NodeId, Heard], list[tuple[str, str]]]:
        """What each node says, and (name, why) of those that say nothing."""
        me = self._mesh.me
        heard = {me: Heard(self._journal.after(after.get(str(me), 0)))}
        silent: list[tuple[str, str]] = []
        at_once = trio.CapacityLimiter(MAX_ASKED)

        async def ask(peer: NodeId) -> None:
            async with at_once:
                try:
                    heard[peer] = await self._ask(peer, after.get(str(peer), 0))
                except PeerError as exc:
                    silent.append((self._mesh.name_of(peer), exc.message))

        async with trio.open_nursery() as nursery:
            for peer in self._mesh.peers()[1:]:
                if peer.state.living:
                    nursery.start_soon(ask, peer.node)
                elif peer.state is State.DEAD:
                    silent.append((_name(peer), f"dead: {peer.reason}"))
        return heard, silent

    async def _ask(self, peer: NodeId, after: int) -> Heard:
        asked_at, since = self._clock(), trio.current_time()
        with peer_errors(ASK_S):
            answer = await self._mesh.call(peer, LIST, {"after": after})
        return heard_of(peer, answer, asked_at, trio.current_time() - since)

    # Of this one

    async def _list_here(self, _peer: NodeId, params: Plain) -> Plain:
        """{after} -> {now, events}: the newest that fit into an answer."""
        await trio.lowlevel.checkpoint()
        found = self._journal.after(_int(params, "after", 0, 0, MAX_SEQ))
        return {"now": self._clock(), "events": fitting(found)}


def fitting(events: Sequence[Event]) -> list[Plain]:
    """As plain data, as many of the last as fit into an answer."""
    room, kept = MAX_ANSWER, []
    for event in reversed(events):
        data = plain(event)
        room -= len(pack(data))
        if room < 0:
            break
        kept.append(data)
    return kept[::-1]


def heard_of(peer: NodeId, answer: Plain, asked_at: float, took_s: float) -> Heard:
    """What a peer answered, whatever it is. `asked_at`: by our clock. Raises `ProtocolError`."""
    now, listed = answer.get("now"), answer.get("events")
    if not isinstance(now, (int, float)) or not isinstance(listed, list):
        raise ProtocolError("its answer is no list of events")
    found: dict[int, Event] = {}
    for data in listed[-MAX_EVENTS:]:
        try:
            event = dataclasses.replace(parse(data), node=str(peer))
        except ValueError as exc:
            log.debug("%s told something that is no event: %s", peer.short, exc)
        else:
            found[event.seq] = event
    return Heard(tuple(found[seq] for seq in sorted(found)), _ahead_s(now, asked_at, took_s))


def _ahead_s(now: float, asked_at: float, took_s: float) -> float:
    """`now` is what the peer's clock said at some moment of the call."""
    if not 0 <= now <= MAX_AT:
        return 0.0
    ahead_s = now - (asked_at + took_s / 2)
    return ahead_s if abs(ahead_s) > took_s / 2 + 0.05 else 0.0


def shown(happening: Happening, with_names: Callable[[str], str]) -> Plain:
    """One event for people and programs. `with_names` puts names in place of ids that had none when it was told."""
    event, at = happening.event, max(0.0, min(happening.at, MAX_AT - 1.0))
    return {
        "at": iso(at),
        "at_s": round(at, 3),
        "node": happening.seen_by[0],
        "kind": str(event.kind),
        "text": with_names(event.text),
        "facts": dict(event.facts),
        "seen_by": list(happening.seen_by),
    }


def _name(peer: PeerStatus) -> str:
    return str(peer.row.name) if peer.row else peer.node.short


def _after(params: Plain) -> dict[str, int]:
    after = params.get("after") or {}
    if not isinstance(after, dict) or any(type(v) is not int or not 0 <= v <= MAX_SEQ for v in after.values()):
        raise UsageError("after: a map of node ids to numbers is expected")
    return after


def _kinds(params: Plain) -> frozenset[Kind]:
    wanted = params.get("kinds") or []
    known = [str(kind) for kind in Kind]
    if not isinstance(wanted, list) or len(wanted) > MAX_KINDS or any(kind not in known for kind in wanted):
        raise UsageError(f"kinds: {str(wanted)[:64]} are not all known", hint=f"there are: {', '.join(known)}")
    return frozenset(Kind(kind) for kind in wanted)


def _number(params: Plain, key: str) -> float:
    value = params.get(key) or 0
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise UsageError(f"{key}: {str(value)[:32]!r} is no number of seconds")
    return float(value)


def _int(params: Plain, key: str, default: int, low: int, high: int) -> int:
    value = params.get(key, default)
    if type(value) is not int or not low <= value <= high:
        raise UsageError(f"{key}: {str(value)[:32]!r} is out of range, {low} to {high} is allowed")
    return value
