"""Measures one address of a node over a stream of its own, and answers those who measure this one."""

from __future__ import annotations

import math
import random
from typing import Any

import psutil
import trio

from tightwad_agent.errors import PeerError, PeerRefused, ProtocolError
from tightwad_agent.ids import Address, NodeId
from tightwad_agent.mesh.links import Links
from tightwad_agent.mesh.paths import Sample
from tightwad_agent.streams import Framed, close_quietly
from tightwad_agent.wire.frames import MAX_HEADER
from tightwad_agent.wire.gauge import GAUGE, MAX_GAUGE, MAX_GAUGES, Gauge, Gauged

SERVICE = "gauge"
DIAL_S = 2.0
RTT_S = 1.0
RATE_S = 3.0
"""A path that takes longer for one measurement has the rate that this comes to."""
ANSWER_S = 10.0
N_PINGS = 4
WARM_BYTES = 48 << 10
"""Before the bytes that are timed: TCP starts slowly."""
RATE_BYTES = 160 << 10
IDLE_BYTES_S = 250_000
IDLE_WINDOW_S = 0.3
IDLE_TRIES = 4
MAX_AT_ONCE = 8


class GaugeService:
    """Answers; at most MAX_AT_ONCE at a time, so that measuring is never the load."""

    def __init__(self) -> None:
        self._n = 0

    async def serve(self, _peer: NodeId, stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
        if self._n >= MAX_AT_ONCE:
            raise PeerRefused("others are measuring")
        self._n += 1
        try:
            with trio.move_on_after(ANSWER_S):
                await self._answer(Framed(stream, GAUGE, max_header=MAX_HEADER))
        finally:
            self._n -= 1

    async def _answer(self, framed: Framed) -> None:
        for _ in range(MAX_GAUGES):
            question: Gauge = await framed.expect(Gauge)
            if question.size > MAX_GAUGE:
                raise ProtocolError(f"gauge: {question.size} bytes asked for, at most {MAX_GAUGE} are sent")
            await framed.send(Gauged(), bytes(question.size))


async def measure(links: Links, node: NodeId, address: Address, *, rate: bool) -> Sample | None:
    """One address; None if the node did not answer there. A node of an older version answers without figures."""
    try:
        stream, _ = await links.dial([address], want=node, service=SERVICE, deadline_s=DIAL_S)
    except PeerRefused:
        return Sample(math.inf)
    except PeerError:
        return None
    try:
        framed = Framed(stream, GAUGE, max_header=MAX_HEADER, max_payload=MAX_GAUGE)
        rtt_s = min([await _round_trip(framed) for _ in range(N_PINGS)])
        return Sample(rtt_s, await _rate(framed) if rate else None)
    except PeerError:
        return None
    finally:
        await close_quietly(stream)


async def _round_trip(framed: Framed) -> float:
    began = trio.current_time()
    await framed.send(Gauge(), deadline_s=RTT_S)
    await framed.expect(Gauged, deadline_s=RTT_S)
    return trio.current_time() - began


async def _rate(framed: Framed) -> float:
    """Bytes a second towards this node."""
    with trio.move_on_after(RATE_S):
        await framed.send(Gauge(WARM_BYTES))
        await framed.send(Gauge(RATE_BYTES))
        await framed.expect(Gauged)
        began = trio.current_time()
        await framed.expect(Gauged)
        return RATE_BYTES / max(1e-6, trio.current_time() - began)
    return RATE_BYTES / RATE_S


async def is_idle() -> bool:
    """Whether this machine's network is: little traffic on all interfaces but the loopback, for a moment.

    A few moments are tried: another node's measurement, at the same time for the same reason, is no load.
    """
    for _ in range(IDLE_TRIES):
        before = await trio.to_thread.run_sync(_traffic)
        await trio.sleep(IDLE_WINDOW_S)
        if await trio.to_thread.run_sync(_traffic) - before < IDLE_BYTES_S * IDLE_WINDOW_S:
            return True
        await trio.sleep(random.uniform(0.0, IDLE_WINDOW_S))  # noqa: S311 - no secret
    return False


def _traffic() -> int:
    counters = psutil.net_io_counters(pernic=True, nowrap=False)
    return sum(c.bytes_sent + c.bytes_recv for name, c in counters.items() if not name.startswith("lo"))
