"""When silence means something: the own machine's lateness, and what may be concluded of a peer. Pure, and without
effects; `members` acts on it. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from tightwad_agent.ids import NodeId
from tightwad_agent.mesh.member_events import Fate
from tightwad_agent.mesh.member_record import Peer, Timings


class OwnHealth:
    """How far the own loop lags behind its deadlines (Lifeguard's local health): who is late suspects others later."""

    def __init__(self, timings: Timings, now: float) -> None:
        self.resumed_at = -math.inf
        """When the loop last ran again after a stall."""
        self.now = now
        """When it ran last."""
        self._t = timings
        self._strain = 0.0
        self._strain_at = now

    def notice(self, now: float, due: float) -> float | None:
        """The loop runs at `now` and should have at `due`. Seconds it did not run, if it is late; else None."""
        stalled, self.now = now - self.now, now
        if now - due < self._t.late_s:
            return None
        self.strained(now - due, now)
        self.resumed_at = now
        return stalled

    def strained(self, late_s: float, now: float) -> None:
        strain = self.stretch(now) - 1.0 + late_s / self._t.heartbeat_s
        self._strain = min(strain, self._t.max_stretch - 1.0)
        self._strain_at = now

    def stretch(self, now: float) -> float:
        """By how much patience with others is longer now; 1 if the own loop is in time."""
        if self._strain == 0.0:
            return 1.0
        return 1.0 + self._strain * math.exp2((self._strain_at - now) / self._t.stretch_half_life_s)


class Judgement:
    """What is known of a peer, put into times: from when on what may be concluded."""

    def __init__(self, timings: Timings, own: OwnHealth) -> None:
        self._t = timings
        self._own = own

    def contact(self, peer: Peer) -> float:
        """When two-way contact was last proved."""
        return min(peer.heard, peer.echo + self._t.echo_slack_s)

    def evidence(self, peer: Peer) -> float:
        """When it last lived, as far as anybody could tell: its last message, though a heartbeat passes between
        what it heard of us and the telling."""
        return max(min(peer.heard, peer.echo + self._t.echo_slack_s + self._t.heartbeat_s), peer.indirect)

    def in_contact(self, peer: Peer, now: float) -> bool:
        return peer.linked and now - self.contact(peer) < self._t.suspect_s

    def silent_at(self, peer: Peer, now: float) -> float:
        """From when on a link without proof of contact counts as silent."""
        return self.contact(peer) + self._patience(peer, self._t.suspect_s, now)

    def vouched_until(self, peer: Peer, now: float) -> float:
        """From when on others' word that it lives is too old."""
        return peer.indirect + self._patience(peer, self._t.suspect_s, now)

    def dead_at(self, peer: Peer, now: float) -> float:
        own = self.evidence(peer) + self._patience(peer, self._t.suspect_s + self._t.confirm_s, now)
        return min(own, self.hearsay_counts_at(peer)) if peer.is_accused else own

    def refusal_counts_at(self, peer: Peer) -> float:
        """A broken link and a refused redial mean a dead process, unless somebody still reaches it."""
        if peer.linked or peer.refused_at is None or self.evidence(peer) > peer.broken_at:
            return math.inf
        patience = peer.refused_at + (self._t.refused_s if peer.asked else 0.0)
        return max(patience, *peer.vouchers.values(), -math.inf)

    def hearsay_counts_at(self, peer: Peer, source: NodeId | None = None) -> float:
        """From when on others' word that it is gone is believed: not while our own link may still prove the opposite,
        nor while somebody else than the teller reaches it."""
        if peer.fate is not Fate.ALIVE:
            return -math.inf
        if peer.linked:
            own = self.evidence(peer) + self._t.suspect_s + self._t.confirm_s
        else:
            own = self.contact(peer) + self._t.suspect_s
        unread = self._own.resumed_at + self._t.ask_s  # after a stall, what contradicts it may not be read yet
        return max(own, unread, *(until for v, until in peer.vouchers.items() if v != source))

    def everyone_silent(self, peers: Iterable[Peer], now: float) -> bool:
        """More than half of the linked peers at once: the fault is likelier here, so nobody is accused."""
        linked = [p for p in peers if p.linked and p.fate is Fate.ALIVE]
        n_silent = sum(not self.in_contact(p, now) for p in linked)
        return 2 * n_silent > len(linked)

    def _patience(self, peer: Peer, span_s: float, now: float) -> float:
        """What `span_s` of silence comes to when our own lateness is allowed for; others' certainty ends that."""
        return span_s if peer.is_accused else span_s * self._own.stretch(now) + peer.credit
