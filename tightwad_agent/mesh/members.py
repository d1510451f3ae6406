"""Who is there: failure detection over a full mesh of persistent links, as a pure machine.

Per node two things are kept apart. The *record* `(incarnation, fate)` is shared by all and only grows, so views
converge whatever the order of messages: only the node itself raises its incarnation, anyone may call it dead at the
present one, and it refutes that with the next. The *opinion* (alive or suspect, reached directly or not) is this node's
own, made of when it last proved two-way contact itself and when others say they did.

`STATE.md` has the states, the rules and the reasons for the numbers. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any, Final

from tightwad_agent.ids import NodeId
from tightwad_agent.mesh.member_events import (
    Answer,
    Answered,
    Ask,
    Asked,
    Disconnect,
    Effect,
    Event,
    Fate,
    Forget,
    Heard,
    HeartbeatReceived,
    LeaveRequested,
    LinkDown,
    LinkUp,
    LocalLate,
    PeerView,
    Probed,
    Reach,
    Redial,
    RedialFailed,
    Refuted,
    Remembered,
    Rumour,
    RumoursReceived,
    SendHeartbeat,
    SendProbe,
    Snapshot,
    State,
    StateChanged,
    Tell,
    TellAll,
    Tick,
)
from tightwad_agent.mesh.member_judgement import Judgement, OwnHealth
from tightwad_agent.mesh.member_record import LAN, Peer, Timings

__all__ = [
    "LAN",
    "MAX_INCARNATION_JUMP",
    "MAX_NODES",
    "NEVER_S",
    "Answer",
    "Answered",
    "Ask",
    "Asked",
    "Disconnect",
    "Effect",
    "Event",
    "Fate",
    "Forget",
    "Heard",
    "HeartbeatReceived",
    "LeaveRequested",
    "LinkDown",
    "LinkUp",
    "LocalLate",
    "Members",
    "PeerView",
    "Probed",
    "Reach",
    "Redial",
    "RedialFailed",
    "Refuted",
    "Remembered",
    "Rumour",
    "RumoursReceived",
    "SendHeartbeat",
    "SendProbe",
    "Snapshot",
    "State",
    "StateChanged",
    "Tell",
    "TellAll",
    "Tick",
    "Timings",
]

MAX_NODES: Final = 256
"""Nodes a table holds at most; rumours about more are not believed."""

MAX_INCARNATION_JUMP: Final = 1_000_000
"""A rumour further ahead of what is known than this is nonsense: nobody is refuted that often."""

NEVER_S: Final = 3600.0
"""The longest time an answer admits to; stands for never, too."""

_FATE = {State.ALIVE: Fate.ALIVE, State.DEAD: Fate.DEAD, State.LEFT: Fate.LEFT}
_STATE = {fate: state for state, fate in _FATE.items()}


class Members:
    """The table of one node. `incarnation` must be greater than any this node ever used (persisted + 1)."""

    def __init__(self, me: NodeId, incarnation: int, now: float, timings: Timings = LAN) -> None:
        self.me = me
        self.incarnation = incarnation
        self._t = timings
        self._left = False
        self._peers: dict[NodeId, Peer] = {}
        self._forgotten: dict[NodeId, int] = {}
        self._digest: bytes | None = None
        self._next_beat = now
        self._due = now
        self._own = OwnHealth(timings, now)
        self._judge = Judgement(timings, self._own)
        self._effects: list[Effect] = []

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Takes one event; the effects are to be carried out in order."""
        self._effects = []
        self._notice_own_lateness(now)
        _HANDLERS[type(event)](self, event, now)
        if now >= self._next_beat:
            self._beat(now)
        for peer in list(self._peers.values()):
            if now >= peer.wake:
                self._review(peer, now)
        self._due = min((peer.wake for peer in self._peers.values()), default=math.inf)
        if not self._left:
            self._due = min(self._due, self._next_beat)
        return self._effects

    def next_deadline(self) -> float | None:
        """When `Tick` is due; None: only when something happens."""
        return self._due if self._due < math.inf else None

    def snapshot(self) -> Snapshot:
        peers = [
            PeerView(
                node=p.node,
                state=p.shown or _STATE[p.fate],
                reach=p.reach,
                incarnation=p.incarnation,
                linked=p.linked,
                heard_at=p.heard,
                since=p.since,
                reason=p.reason,
            )
            for p in self._peers.values()
        ]
        return Snapshot(self.me, self.incarnation, self._left, self._own.stretch(self._own.now), tuple(peers))

    # The own machine

    def _notice_own_lateness(self, now: float) -> None:
        stalled_s = self._own.notice(now, self._due)
        if stalled_s is not None:
            for peer in self._peers.values():  # while we did not run, nobody was silent
                peer.forgive(stalled_s, now)

    def _beat(self, now: float) -> None:
        if (
            now == self._own.resumed_at
        ):  # once more as soon as what lay unread is read: others hear that they were heard
            self._next_beat = now + self._t.unread_s
        else:
            self._next_beat = max(self._next_beat + self._t.heartbeat_s, now + self._t.heartbeat_s / 2)
        if self._left:
            return
        for peer in self._peers.values():
            if peer.linked:
                self._send_heartbeat(peer, now)

    def _send_heartbeat(self, peer: Peer, now: float) -> None:
        # after a stall, what others sent meanwhile lies unread: that they were heard long ago says nothing of the way
        ago = min(max(now - peer.heard - peer.credit, 0.0), NEVER_S)
        self._effects.append(SendHeartbeat(peer.node, self.incarnation, self._own_digest(), ago))

    def _own_digest(self) -> bytes:
        if self._digest is None:
            records = [(p.node, p.incarnation, p.fate) for p in self._peers.values()]
            records.append((self.me, self.incarnation, Fate.LEFT if self._left else Fate.ALIVE))
            text = "\n".join(f"{node} {incarnation} {fate:d}" for node, incarnation, fate in sorted(records))
            self._digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return self._digest

    def _raise_incarnation(self, above: int) -> None:
        self.incarnation = above + 1
        self._digest = None
        self._effects.append(Refuted(self.incarnation))
        self._effects.append(TellAll((Rumour(self.me, State.ALIVE, self.incarnation),)))

    def _on_local_late(self, event: LocalLate, now: float) -> None:
        if event.late_s >= self._t.late_s:
            self._own.strained(event.late_s, now)

    def _on_leave(self, _event: LeaveRequested, _now: float) -> None:
        if not self._left:
            self._left = True
            self._digest = None
            self._effects.append(TellAll((Rumour(self.me, State.LEFT, self.incarnation),)))

    def _on_tick(self, _event: Tick, _now: float) -> None:
        """All that is due is done after every event."""

    # Links

    def _on_link_up(self, event: LinkUp, now: float) -> None:
        peer = self._peer(event.node, event.incarnation, Fate.ALIVE)
        if peer is None:
            return
        returned = peer.fate is not Fate.ALIVE
        peer.linked = True
        peer.heard = peer.echo = now
        peer.credit = 0.0
        peer.broken_at = -math.inf
        peer.refused_at = None
        peer.vouchers.clear()
        peer.asked.clear()
        peer.sync_pair = None
        self._forgotten.pop(peer.node, None)
        self._learn_incarnation(peer, event.incarnation, now)
        self._send_heartbeat(peer, now)
        if returned:  # a cut has healed: others behind it are probably back, too
            for other in self._peers.values():
                if other.fate is Fate.DEAD and not other.linked:
                    self._redial(other, now)
        self._review(peer, now)

    def _on_link_down(self, event: LinkDown, now: float) -> None:
        peer = self._peers.get(event.node)
        if peer is None or not peer.linked:
            return
        peer.linked = False
        if peer.fate is not Fate.ALIVE:
            self._review(peer, now)
            return
        peer.broken_at = now
        peer.refused_at = None
        peer.vouchers.clear()
        peer.reason = "closed the connection" if event.clean else "the connection broke"
        peer.next_ask = peer.next_redial = now
        self._review(peer, now)

    def _on_redial_failed(self, event: RedialFailed, now: float) -> None:
        peer = self._peers.get(event.node)
        if peer is None or peer.linked:
            return
        peer.refused_at = now if event.refused else None
        if not event.refused and now < peer.broken_at + self._t.redial_s:
            # a process that is just ending may close its links before its port
            peer.next_redial = min(peer.next_redial, now + self._t.redial_soon_s)
        self._review(peer, now)

    def _on_remembered(self, event: Remembered, now: float) -> None:
        if event.node in self._peers:
            return
        peer = self._peer(event.node, 0, Fate.DEAD)
        if peer is not None:
            self._show(peer, State.DEAD, Reach.NONE, "not seen since this agent started", now)
            self._review(peer, now)

    def _on_forget(self, event: Forget, _now: float) -> None:
        peer = self._peers.pop(event.node, None)
        if peer is None:
            return
        self._digest = None
        self._forgotten[peer.node] = peer.incarnation
        while len(self._forgotten) > MAX_NODES:
            del self._forgotten[next(iter(self._forgotten))]
        if peer.linked:
            self._effects.append(Disconnect(peer.node))

    # Messages

    def _on_heard(self, event: Heard, now: float) -> None:
        self._hear(event.node, now)

    def _hear(self, node: NodeId, now: float) -> Peer | None:
        peer = self._peers.get(node)
        if peer is None or not peer.linked:
            return None
        peer.heard = now
        peer.credit = 0.0
        if peer.reach is not Reach.DIRECT:
            self._review(peer, now)
        return peer

    def _on_heartbeat(self, event: HeartbeatReceived, now: float) -> None:
        peer = self._peers.get(event.node)
        if peer is None or not peer.linked:
            return
        peer.echo = max(peer.echo, now - max(event.heard_ago_s, 0.0))
        self._learn_incarnation(peer, event.incarnation, now)
        self._hear(event.node, now)
        if peer.fate is not Fate.ALIVE:  # it lives and has to say so itself
            self._effects.append(Tell(peer.node, (Rumour(peer.node, _STATE[peer.fate], peer.incarnation),)))
        if event.digest != self._own_digest():
            self._sync(peer, event.digest, now)

    def _sync(self, peer: Peer, theirs: bytes, now: float) -> None:
        """Views differ: tell ours, less and less often while neither changes."""
        pair = (self._own_digest(), theirs)
        if pair != peer.sync_pair:
            peer.sync_pair = pair
            peer.sync_wait = self._t.sync_s
        elif now < peer.sync_at:
            return
        peer.sync_at = now + peer.sync_wait
        peer.sync_wait = min(2 * peer.sync_wait, self._t.max_sync_s)
        table = [Rumour(p.node, _STATE[p.fate], p.incarnation) for p in self._peers.values()]
        table.append(Rumour(self.me, State.LEFT if self._left else State.ALIVE, self.incarnation))
        self._effects.append(Tell(peer.node, tuple(table)))

    def _on_probed(self, event: Probed, now: float) -> None:
        peer = self._hear(event.node, now)
        if peer is not None and not self._left:
            self._send_heartbeat(peer, now)

    def _on_asked(self, event: Asked, now: float) -> None:
        self._hear(event.node, now)
        peer = self._peers.get(event.about)
        reachable, ago = False, NEVER_S
        if event.about == self.me:
            reachable, ago = True, 0.0
        elif peer is not None:
            reachable = peer.fate is Fate.ALIVE and self._judge.in_contact(peer, now)
            ago = min(max(now - self._judge.evidence(peer), 0.0), NEVER_S)
        self._effects.append(Answer(event.node, event.about, event.asked_at, reachable, ago))

    def _on_answered(self, event: Answered, now: float) -> None:
        self._hear(event.node, now)
        peer = self._peers.get(event.about)
        if peer is None or peer.fate is not Fate.ALIVE or not now - NEVER_S < event.asked_at <= now:
            return
        # counted from when we asked: a relayed proof of life never looks younger than it is
        proof = event.asked_at - max(event.ago_s, 0.0)
        if proof > peer.indirect:
            peer.indirect = proof
            peer.credit = 0.0
        peer.asked.discard(event.node)
        if event.reachable:
            peer.vouchers[event.node] = now + self._t.vouch_s
        else:
            peer.vouchers.pop(event.node, None)
        self._review(peer, now)

    def _on_rumours(self, event: RumoursReceived, now: float) -> None:
        self._hear(event.node, now)
        for rumour in event.rumours:
            if rumour.node == self.me:
                self._about_me(event.node, rumour, now)
            elif rumour.state is State.SUSPECT:
                self._doubted(event.node, rumour, now)
            else:
                self._told(event.node, rumour, now)

    def _about_me(self, source: NodeId, rumour: Rumour, now: float) -> None:
        if self._left or rumour.incarnation > self.incarnation + MAX_INCARNATION_JUMP:
            return
        if rumour.state is State.SUSPECT:
            if source in self._peers and self._peers[source].linked:
                self._send_heartbeat(self._peers[source], now)
            return
        if (rumour.incarnation, _FATE[rumour.state]) > (self.incarnation, Fate.ALIVE):
            self._raise_incarnation(rumour.incarnation)

    def _doubted(self, source: NodeId, rumour: Rumour, now: float) -> None:
        peer = self._peers.get(rumour.node)
        if peer is not None and peer.fate is Fate.ALIVE:
            peer.vouchers.pop(source, None)
            peer.asked.discard(source)
            self._review(peer, now)

    def _told(self, source: NodeId, rumour: Rumour, now: float) -> None:
        fate = _FATE[rumour.state]
        if self._forgotten.get(rumour.node, -1) >= rumour.incarnation:
            return
        peer = self._peers.get(rumour.node)
        record = peer.record if peer else (0, Fate.ALIVE)
        if (rumour.incarnation, fate) <= record or rumour.incarnation > record[0] + MAX_INCARNATION_JUMP:
            return
        peer = self._peer(rumour.node, 0, Fate.DEAD)
        if peer is None:
            return
        if fate is Fate.ALIVE:
            self._learn_incarnation(peer, rumour.incarnation, now)
        elif source != rumour.node and now < self._judge.hearsay_counts_at(peer, source):
            peer.accused = (rumour.incarnation, fate)
            for node in [peer.node] if peer.linked else sorted(peer.vouchers):
                self._effects.append(Tell(node, (rumour,)))
        else:
            peer.incarnation = rumour.incarnation
            left = "left the cluster"
            self._gone(peer, fate, left if fate is Fate.LEFT else f"{source.short} saw it die", now, announce=False)

    # Records

    def _peer(self, node: NodeId, incarnation: int, fate: Fate) -> Peer | None:
        peer = self._peers.get(node)
        if peer is None and node != self.me and len(self._peers) < MAX_NODES:
            peer = self._peers[node] = Peer(node, incarnation, fate)
            self._digest = None
        return peer

    def _learn_incarnation(self, peer: Peer, incarnation: int, now: float) -> None:
        """The node lives at `incarnation`, if that is news."""
        if incarnation <= peer.incarnation:
            return
        was_gone = peer.fate is not Fate.ALIVE
        peer.incarnation = incarnation
        peer.fate = Fate.ALIVE
        self._digest = None
        self._forgotten.pop(peer.node, None)
        if was_gone:
            peer.refused_at = None
            peer.vouchers.clear()
            # the news may be old: it has to be confirmed soon
            peer.indirect = max(peer.indirect, now - self._t.suspect_s)
            peer.next_ask = peer.next_redial = now
        self._review(peer, now)

    def _gone(self, peer: Peer, fate: Fate, reason: str, now: float, *, announce: bool) -> None:
        peer.fate = fate
        self._digest = None
        peer.vouchers.clear()
        peer.asked.clear()
        peer.refused_at = None
        self._show(peer, _STATE[fate], Reach.NONE, reason, now)
        if announce:
            self._effects.append(TellAll((Rumour(peer.node, _STATE[fate], peer.incarnation),)))
        if peer.linked:
            peer.linked = False
            self._effects.append(Disconnect(peer.node))
        peer.next_redial = now + self._t.redial_dead_s
        self._review(peer, now)

    # Opinions

    def _review(self, peer: Peer, now: float) -> None:
        """Brings the opinion up to date, does what is due, and sets when to look again."""
        if peer.fate is not Fate.ALIVE:
            self._review_gone(peer, now)
            return
        silent_at = self._judge.silent_at(peer, now)
        if peer.linked and now < silent_at:
            if peer.reach is not Reach.DIRECT or peer.shown is not State.ALIVE:
                self._show(peer, State.ALIVE, Reach.DIRECT, "connected", now)
            peer.wake = silent_at
        else:
            self._review_silent(peer, now)
        if self._own.stretch(now) > 1.01:
            peer.wake = min(peer.wake, now + self._t.probe_s)

    def _review_gone(self, peer: Peer, now: float) -> None:
        if peer.fate is Fate.LEFT or peer.linked:
            peer.wake = math.inf
            return
        if now >= peer.next_redial:
            self._redial(peer, now)
        peer.wake = peer.next_redial

    def _review_silent(self, peer: Peer, now: float) -> None:
        refused_at = self._judge.refusal_counts_at(peer)
        if now >= refused_at:
            reason = "its process is gone: the connection broke, a new one was refused"
            self._gone(peer, Fate.DEAD, reason, now, announce=True)
            return
        dead_at = self._judge.dead_at(peer, now)
        doubtful_at = min(dead_at, self._judge.vouched_until(peer, now))
        if peer.indirect > peer.broken_at and now < doubtful_at:
            dead_at = doubtful_at
            if peer.reach is not Reach.INDIRECT or peer.shown is not State.ALIVE:
                self._show(peer, State.ALIVE, Reach.INDIRECT, self._vouched_text(peer), now)
        else:
            self._suspect(peer, now)
            # nobody dies before others were asked and had the time to answer
            dead_at = max(dead_at, max(peer.since, self._own.resumed_at) + self._t.ask_s)
            if now >= dead_at:
                reason = f"no sign of life for {now - self._judge.evidence(peer):.1f} s"
                self._gone(
                    peer, Fate.DEAD, reason, now, announce=not self._judge.everyone_silent(self._peers.values(), now)
                )
                return
        self._investigate(peer, now)
        peer.wake = min(dead_at, refused_at, peer.next_probe, peer.next_ask, peer.next_redial)

    def _suspect(self, peer: Peer, now: float) -> None:
        if peer.shown is State.SUSPECT:
            return
        if peer.linked:
            reason = f"silent for {now - self._judge.contact(peer):.1f} s"
        else:
            reason = peer.reason if peer.broken_at > -math.inf else "heard of, not reached yet"
        self._show(peer, State.SUSPECT, Reach.NONE, reason, now)
        peer.next_probe = peer.next_ask = peer.next_redial = now
        if not self._judge.everyone_silent(self._peers.values(), now):
            self._effects.append(TellAll((Rumour(peer.node, State.SUSPECT, peer.incarnation),)))

    def _vouched_text(self, peer: Peer) -> str:
        via = ", ".join(v.short for v in sorted(peer.vouchers)) or "others"
        return f"not reachable from here, but from {via}"

    def _investigate(self, peer: Peer, now: float) -> None:
        if not peer.linked:
            peer.next_probe = math.inf
        elif now >= peer.next_probe:
            peer.next_probe = now + self._t.probe_s
            self._effects.append(SendProbe(peer.node))
        if now >= peer.next_ask:
            self._ask(peer, now)
        if now >= peer.next_redial:
            self._redial(peer, now)

    def _ask(self, peer: Peer, now: float) -> None:
        peer.next_ask = now + self._t.probe_s
        able = [p.node for p in self._peers.values() if p is not peer and self._judge.in_contact(p, now)]
        peer.asked = set(self._pick_helpers(peer, able))
        self._effects.extend(Ask(helper, peer.node, now) for helper in sorted(peer.asked))

    def _pick_helpers(self, peer: Peer, able: Iterable[NodeId]) -> list[NodeId]:
        """Those that reached it last time, then the others in turn."""
        others = sorted(able)
        known = [v for v in others if v in peer.vouchers][:1]
        rest = [v for v in others if v not in known]
        if rest:
            start = peer.n_asks * self._t.n_helpers % len(rest)
            rest = rest[start:] + rest[:start]
        peer.n_asks += 1
        return (known + rest)[: self._t.n_helpers]

    def _redial(self, peer: Peer, now: float) -> None:
        peer.next_redial = now + (self._t.redial_s if peer.fate is Fate.ALIVE else self._t.redial_dead_s)
        self._effects.append(Redial(peer.node))

    def _show(self, peer: Peer, state: State, reach: Reach, reason: str, now: float) -> None:
        old = peer.shown
        peer.shown, peer.reach, peer.reason = state, reach, reason
        if old is not state:
            peer.since = now
        self._effects.append(StateChanged(peer.node, old, state, reach, reason))


_HANDLERS: Final[dict[type, Callable[[Members, Any, float], None]]] = {
    LinkUp: Members._on_link_up,
    LinkDown: Members._on_link_down,
    Heard: Members._on_heard,
    HeartbeatReceived: Members._on_heartbeat,
    Probed: Members._on_probed,
    RumoursReceived: Members._on_rumours,
    Asked: Members._on_asked,
    Answered: Members._on_answered,
    RedialFailed: Members._on_redial_failed,
    Remembered: Members._on_remembered,
    LocalLate: Members._on_local_late,
    LeaveRequested: Members._on_leave,
    Forget: Members._on_forget,
    Tick: Members._on_tick,
}
