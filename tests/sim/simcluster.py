"""A simulated cluster: the real `members` and `election` machines over a simulated network, clock and disk.

One seed decides everything: how many nodes, how slow and lossy the network is, what breaks and when. The checker
watches from above, with knowledge no node has, and raises `Violation` at the first broken promise.

The network has TCP's manners: messages of one connection arrive in order; a killed process answers with a reset, a
cable that was pulled with nothing. Loss is either a delay (TCP repeats) or, harsher, the message is simply gone.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tightwad_agent.ids import NO_EPOCH, Epoch, NodeId
from tightwad_agent.mesh import election as el
from tightwad_agent.mesh import members as mb
from tightwad_agent.testing import node_id
from tightwad_agent.wire.rows import Stamp

DIAL_S = 2.0
"""A dial without an answer is given up after this."""
STABLE_S = 6.0
"""What was undisturbed for this long is held to every promise."""
QUIET_S = 5.0
"""Promise: one coordinator this long after the last disturbance."""
ONE_WAY_S = 1.0
"""So much longer where a link is left that works in one direction only: that takes a heartbeat more to be noticed."""
WATCH_S = 3.0
"""How long after that nothing may change any more."""


class Violation(AssertionError):
    """A promise was broken."""


class NoRefutation(mb.Members):
    """Negative control: never contradicts what is said of it."""

    def _raise_incarnation(self, above: int) -> None:
        pass


class NoPreCheck(el.Election):
    """Negative control: claims without asking anybody."""

    def _pre_check(self, now: float) -> None:
        super()._pre_check(now)
        self._waiting = set()


@dataclass(frozen=True)
class Controls:
    """What is switched off; nothing, in a real run."""

    members: type[mb.Members] = mb.Members
    election: type[el.Election] = el.Election
    timings: mb.Timings = mb.LAN
    fencing: bool = True
    persist_epoch: bool = True
    option: str = ""


CONTROLS = {
    "none": Controls(),
    "refutation": Controls(members=NoRefutation),
    "pre-check": Controls(election=NoPreCheck),
    "fencing": Controls(fencing=False),
    "persisted-epoch": Controls(persist_epoch=False),
    # of a stalled node: not to notice it, and to judge before anybody was asked
    "lateness": Controls(timings=replace(mb.LAN, late_s=math.inf, ask_s=0.0)),
}
CONTROLS = {name: replace(c, option=f" --without {name}" if name != "none" else "") for name, c in CONTROLS.items()}


@dataclass
class Net:
    """One seed's network, fixed over its run. Seconds and probabilities."""

    base: float
    jitter: float
    loss: float
    duplicate: float
    drops: bool

    @classmethod
    def draw(cls, rnd: random.Random) -> Net:
        slow = rnd.random() < 0.5
        base = rnd.uniform(0.0002, 0.05 if slow else 0.002)
        return cls(
            base=base,
            jitter=rnd.uniform(0, 0.2 - base) if slow else rnd.uniform(0, 0.01),
            loss=rnd.uniform(0, 0.05) if rnd.random() < 0.6 else 0.0,
            duplicate=rnd.choice([0.0, 0.02]),
            drops=rnd.random() < 0.5,
        )


@dataclass
class Pipe:
    """One direction of a connection: what waits for a repeat, and when the last message arrives."""

    last_arrival: float = 0.0
    queue: list[Any] = field(default_factory=list)
    rto: float = 0.2


@dataclass
class Node:
    i: int
    id: NodeId
    eligible: bool
    klass: int
    joined_at: int
    offset: float
    up: bool = False
    powered: bool = True
    paused_until: float = 0.0
    incarnation_on_disk: int = 0
    epoch_on_disk: Epoch = NO_EPOCH
    life: int = 0
    members: mb.Members = None  # type: ignore[assignment]
    election: el.Election = None  # type: ignore[assignment]
    conns: dict[int, int] = field(default_factory=dict)  # peer -> connection written to
    readable: dict[int, int] = field(default_factory=dict)  # connection -> peer
    dialling: dict[int, int] = field(default_factory=dict)  # peer -> connection being made
    connected: set[int] = field(default_factory=set)  # of these: TCP is there, the hello was sent
    unresolved: set[int] = field(default_factory=set)
    blind_to: set[int] = field(default_factory=set)  # its failure detector is wrong about these
    inbox: list[tuple[Any, ...]] = field(default_factory=list)
    wake: float = math.inf
    ok_since: float = 0.0  # for the checker: up and not stalled for long
    pause_ended: float = -math.inf
    started: float = 0.0
    first_incarnation: int = 0  # of this life
    coordinates_since: float = math.inf


class Cluster:
    """One run. `controls` switches safety mechanisms off."""

    def __init__(self, seed: int, controls: Controls = CONTROLS["none"], *, n: int = 0, net: Net | None = None) -> None:
        self.seed = seed
        self.rnd = random.Random(seed)
        self.controls = controls
        self.now = 0.0
        self.net = net or Net.draw(self.rnd)
        self.loss = self.net.loss
        n = n or self.rnd.choice([3, 3, 3, 3, 4, 4, 5, 5, 6, 8])
        self.nodes = [
            Node(
                i=i,
                id=node_id(f"n{i}"),
                eligible=self.rnd.random() < 0.9,
                klass=self.rnd.randrange(3),
                joined_at=self.rnd.randrange(1000, 1005),
                offset=self.rnd.uniform(0, 1e6),
            )
            for i in range(n)
        ]
        self.index = {node.id: node.i for node in self.nodes}
        self.blocked: dict[tuple[int, int], int] = {}
        self.edge_ok_since = {(a, b): 0.0 for a in range(n) for b in range(a + 1, n)}
        self.pipes: dict[tuple[int, int], Pipe] = {}
        self.n_conns = 0
        self.heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.seq = 0
        self.trace: deque[tuple[float, str]] = deque(maxlen=80)
        self.n_events = 0
        # what the checker remembers
        self.claims: dict[Epoch, tuple[int, int]] = {}
        self.obeyed = [NO_EPOCH] * n
        self.changes: list[tuple[float, int, Epoch | None]] = []
        self.deaths: list[tuple[float, int, int]] = []
        self.n_executed = 0
        self.n_checked: dict[float, int] = {}  # promises about deaths, by their limit in seconds
        self.disturbances: list[float] = []
        self.expelled: set[int] = set()  # nodes that nothing is promised of any more

    # Running

    def at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        self.seq += 1
        heapq.heappush(self.heap, (when, self.seq, action, args))

    def run_until(self, end: float) -> None:
        heap = self.heap
        while heap and heap[0][0] <= end:
            self.now, _, action, args = heapq.heappop(heap)
            self.n_events += 1
            action(*args)
        self.now = end

    def disturbed(self) -> None:
        self.disturbances.append(self.now)

    def note(self, text: str) -> None:
        self.trace.append((self.now, text))

    def fail(self, text: str) -> None:
        last = "\n".join(f"  {t:9.3f}  {line}" for t, line in self.trace)
        raise Violation(
            f"seed {self.seed}: at {self.now:.3f} s: {text}\nlast events:\n{last}\n"
            f"reproduce: scripts/sim --seeds 1 --start {self.seed}{self.controls.option}"
        )

    # Nodes

    def start(self, i: int) -> None:
        node = self.nodes[i]
        self.disturbed()
        node.up = node.powered = True
        node.life += 1
        node.paused_until = 0.0
        node.wake = math.inf
        node.incarnation_on_disk += 1
        node.first_incarnation = node.incarnation_on_disk
        node.offset = self.rnd.uniform(0, 1e6)
        node.ok_since = node.started = self.now
        node.coordinates_since = math.inf
        local = self.now + node.offset
        node.members = self.controls.members(node.id, node.incarnation_on_disk, local, self.controls.timings)
        epoch = node.epoch_on_disk if self.controls.persist_epoch else NO_EPOCH
        node.election = self.controls.election(node.id, local, epoch)
        node.unresolved = {p.i for p in self.nodes if p is not node}
        self.note(f"n{i} starts, incarnation {node.incarnation_on_disk}, epoch {epoch}")
        for peer in self.nodes:
            if peer is not node:
                self.tell_members(node, mb.Remembered(peer.id))
        self.feed_view(node)

    def crash(self, i: int, *, power: bool) -> None:
        node = self.nodes[i]
        if not node.up:
            return
        self.note(f"n{i} {'loses power' if power else 'is killed'}")
        for conn, peer in list(node.readable.items()):
            if not power:
                self.send_reset(i, peer, conn)
        node.up = False
        node.powered = not power
        node.conns.clear()
        node.readable.clear()
        node.dialling.clear()
        node.connected.clear()
        node.inbox.clear()
        node.wake = math.inf
        node.paused_until = 0.0
        node.ok_since = math.inf
        if not power and self.loss == 0.0:
            self.at(self.now + 1.0, self.check_known, i, node.life, self.now, 1.0)
        limit = 5.0 if power else 3.0
        self.at(self.now + limit, self.check_known, i, node.life, self.now, limit)
        self.disturbed()

    def leave(self, i: int) -> None:
        """On purpose, as a shell does it: say so, give the messages time, stop."""
        node = self.nodes[i]
        if not node.up or self.is_paused(node):
            return
        self.note(f"n{i} leaves")
        self.disturbed()
        node.ok_since = math.inf
        audience = [j for j in sorted(self.component(i, 0.0, exempt=i)) if self.calm(i, j)]
        self.tell_election(node, el.LeaveRequested())
        self.tell_members(node, mb.LeaveRequested())
        self.at(self.now + 1.0, lambda life: self.crash(i, power=False) if node.life == life else None, node.life)
        self.at(self.now + 5.0, self.check_left, i, node.life, audience)

    def hand_over(self, i: int) -> None:
        node = self.nodes[i]
        if node.up and not self.is_paused(node) and node.election.coordinating:
            self.note(f"n{i} is to hand over")
            self.disturbed()
            self.tell_election(node, el.HandOver())

    def pause(self, i: int, duration: float) -> None:
        node = self.nodes[i]
        if not node.up or self.now < node.paused_until:
            return
        self.disturbed()
        self.note(f"n{i} stalls for {duration:.2f} s")
        node.paused_until = self.now + duration
        if duration > (1.0 if self.net.drops and self.loss else 2.0) or self.now - node.pause_ended < 3.0:
            node.ok_since = max(node.ok_since, node.paused_until)
        node.pause_ended = node.paused_until
        self.at(node.paused_until, self.resume, i, node.life)

    def resume(self, i: int, life: int) -> None:
        node = self.nodes[i]
        if not node.up or node.life != life or self.now < node.paused_until:
            return
        self.note(f"n{i} runs again")
        if self.rnd.random() < 0.5:
            self.tick(i, node.wake)
        pending, node.inbox = node.inbox, []
        for item in pending:
            self.take(node, *item)
        node.wake = math.inf
        self.reschedule(node)

    def is_paused(self, node: Node) -> bool:
        return self.now < node.paused_until

    def tick(self, i: int, due: float) -> None:
        node = self.nodes[i]
        if not node.up or node.wake != due or self.is_paused(node):
            return
        node.wake = math.inf
        self.tell_members(node, mb.Tick())
        self.tell_election(node, el.Tick())

    def reschedule(self, node: Node) -> None:
        if not node.up:
            return  # it ended while it carried something out
        local = node.members.next_deadline()
        other = node.election.next_deadline()
        due = min(math.inf if local is None else local, math.inf if other is None else other) - node.offset
        # rounding must not make a tick come before its time: the machines would ask for it again and again
        due = max(due, self.now) + 1e-6
        if due < node.wake:
            node.wake = due
            self.at(due, self.tick, node.i, due)

    # The shell, as mesh/service.py does it

    def tell_members(self, node: Node, event: mb.Event) -> None:
        changed = isinstance(event, mb.LinkUp | mb.LinkDown)
        for effect in node.members.handle(event, self.now + node.offset):
            kind = type(effect)
            if kind is mb.SendHeartbeat:
                beat = (effect.incarnation, effect.digest, effect.heard_ago_s, node.election.snapshot().stamp)
                self.send(node, self.index[effect.node], "beat", beat)
                if node.election.coordinating:
                    self.send(node, self.index[effect.node], "command", node.election.epoch)
            elif kind is mb.StateChanged:
                changed = True
                self.on_state(node, effect)
            else:
                self.do_members(node, effect)
        if changed:
            self.feed_view(node)
        self.reschedule(node)

    def do_members(self, node: Node, effect: Any) -> None:
        match effect:
            case mb.SendProbe(to):
                self.send(node, self.index[to], "probe", None)
            case mb.Ask(to, about, asked_at):
                self.send(node, self.index[to], "ask", (about, asked_at))
            case mb.Answer(to, about, asked_at, reachable, ago_s):
                self.send(node, self.index[to], "answer", (about, asked_at, reachable, ago_s))
            case mb.Tell(to, rumours):
                self.send(node, self.index[to], "rumours", rumours)
            case mb.TellAll(rumours):
                for peer in list(node.conns):
                    self.send(node, peer, "rumours", rumours)
            case mb.Refuted(incarnation):
                self.note(f"n{node.i} refutes: incarnation {incarnation}")
                node.incarnation_on_disk = incarnation
            case mb.Redial(to):
                self.dial(node.i, self.index[to])
            case mb.Disconnect(to):
                self.close(node, self.index[to])

    def feed_view(self, node: Node) -> None:
        candidates = [el.Candidate(node.id, node.eligible, node.klass, node.joined_at, linked=False)]
        for peer in node.members.snapshot().peers:
            row = self.nodes[self.index[peer.node]]
            if peer.state.living and row.i not in node.blind_to:
                suspect = peer.state is mb.State.SUSPECT
                candidates.append(
                    el.Candidate(row.id, row.eligible, row.klass, row.joined_at, peer.linked, suspect=suspect)
                )
        self.tell_election(node, el.View(tuple(candidates), len(node.unresolved)))

    def tell_election(self, node: Node, event: el.Event) -> None:
        for effect in node.election.handle(event, self.now + node.offset):
            match effect:
                case el.Persist(epoch):
                    if not self.persist(node, epoch):
                        return
                case el.Announce(stamp):
                    for peer in list(node.conns):
                        self.send(node, peer, "stamp", stamp)
                case el.Tell(to, stamp):
                    self.send(node, self.index[to], "stamp", stamp)
                case el.AskPreCheck(to, number):
                    self.send(node, self.index[to], "check", number)
                case el.AnswerPreCheck(to, number, stamp):
                    self.send(node, self.index[to], "checked", (number, stamp))
                case el.SendHandOver(to, epoch):
                    self.send(node, self.index[to], "hand over", epoch)
                case el.CoordinatorChanged():
                    self.on_coordinator(node, effect)
                case el.SteppedDown(epoch, reason):
                    self.note(f"n{node.i} steps down from {self.show(epoch)}: {reason}")
        self.reschedule(node)

    def persist(self, node: Node, epoch: Epoch) -> bool:
        """The epoch to the disk; False if the node ended with that."""
        node.epoch_on_disk = epoch
        return True

    def take(self, node: Node, what: str, peer: int, body: Any) -> None:
        """One thing that came in from outside, when the process runs."""
        source = self.nodes[peer].id
        if what == "up":
            conn, incarnation = body
            self.link_up(node, peer, conn, incarnation)
        elif what == "down":
            if node.conns.get(peer) == body:
                del node.conns[peer]
                self.note(f"n{node.i} lost the link to n{peer}")
                self.tell_members(node, mb.LinkDown(source))
        elif what == "failed":
            conn, refused = body
            if node.dialling.get(peer) == conn:
                node.connected.discard(node.dialling.pop(peer))
                self.resolved(node, peer)
                self.tell_members(node, mb.RedialFailed(source, refused))
        elif what == "hello":
            self.hello(node, peer, *body)
        else:
            conn, kind, content = body
            if conn in node.readable:
                self.message(node, peer, source, kind, content)
            else:
                self.send_reset(node.i, peer, conn)

    def message(self, node: Node, peer: int, source: NodeId, what: str, body: Any) -> None:
        if what == "beat":
            incarnation, digest, ago, stamp = body
            self.tell_members(node, mb.HeartbeatReceived(source, incarnation, digest, ago))
            self.tell_election(node, el.StampHeard(source, stamp))
            return
        if what == "rumours":
            self.tell_members(node, mb.RumoursReceived(source, body))
        elif what == "probe":
            self.tell_members(node, mb.Probed(source))
        elif what == "ask":
            self.tell_members(node, mb.Asked(source, *body))
        elif what == "answer":
            self.tell_members(node, mb.Answered(source, *body))
        else:
            self.tell_members(node, mb.Heard(source))
            self.election_message(node, peer, source, what, body)

    def election_message(self, node: Node, peer: int, source: NodeId, what: str, body: Any) -> None:
        if what == "stamp":
            self.tell_election(node, el.StampHeard(source, body))
        elif what == "check":
            self.tell_election(node, el.PreCheckAsked(source, body))
        elif what == "checked":
            self.tell_election(node, el.PreCheckAnswered(source, *body))
        elif what == "hand over":
            self.tell_election(node, el.HandOverReceived(source, body))
        elif what == "command":
            if self.controls.fencing:
                self.tell_election(node, el.StampHeard(source, Stamp(body, source)))
            if node.election.accepts(body) or not self.controls.fencing:
                self.n_executed += 1
                if body < self.obeyed[node.i]:
                    newer = self.show(self.obeyed[node.i])
                    self.fail(f"n{node.i} carried out a command of n{peer} at {self.show(body)} after obeying {newer}")
                self.obeyed[node.i] = max(self.obeyed[node.i], body)

    # Links

    def resolved(self, node: Node, peer: int) -> None:
        if peer in node.unresolved:
            node.unresolved.discard(peer)
            self.feed_view(node)

    def delay(self) -> float:
        return self.net.base + self.rnd.random() * self.net.jitter

    def send(self, node: Node, peer: int, what: str, body: Any) -> None:
        conn = node.conns.get(peer)
        if conn is not None:
            self.put(conn, node.i, peer, what, body)

    def put(self, conn: int, a: int, b: int, what: str, body: Any, *, reliable: bool = False) -> None:
        pipe = self.pipes.get((conn, a))
        if pipe is None:
            pipe = self.pipes[conn, a] = Pipe()
        if pipe.queue:
            pipe.queue.append((what, body))
        elif (a, b) in self.blocked:
            if reliable or not self.net.drops:
                pipe.queue.append((what, body))
                pipe.rto = 0.2
                self.at(self.now + pipe.rto, self.repeat, conn, a, b)
        else:
            extra = 0.0
            while self.rnd.random() < self.loss:
                if self.net.drops and not reliable:
                    return
                extra = 2 * extra + 0.2
            self.arrive(pipe, self.now + extra + self.delay(), conn, a, b, what, body)
            if self.rnd.random() < self.net.duplicate and not reliable:
                self.arrive(pipe, self.now + extra + self.delay(), conn, a, b, what, body)

    def arrive(self, pipe: Pipe, when: float, conn: int, a: int, b: int, what: str, body: Any) -> None:
        pipe.last_arrival = max(pipe.last_arrival + 1e-6, when)
        self.at(pipe.last_arrival, self.deliver, conn, a, b, what, body)

    def repeat(self, conn: int, a: int, b: int) -> None:
        pipe = self.pipes[conn, a]
        if not self.nodes[a].powered:
            return
        if (a, b) in self.blocked:
            pipe.rto = min(2 * pipe.rto, 8.0)
            self.at(self.now + pipe.rto, self.repeat, conn, a, b)
            return
        waiting, pipe.queue = pipe.queue, []
        for what, body in waiting:
            self.arrive(pipe, self.now + self.delay(), conn, a, b, what, body)

    def deliver(self, conn: int, a: int, b: int, what: str, body: Any) -> None:
        node = self.nodes[b]
        if not node.powered:
            return
        if what == "reset":
            known = node.readable.pop(conn, None)
            if known is not None and node.up:
                self.give(node, "down", a, conn)
        elif what == "welcome":
            if node.up:
                self.give(node, "up", a, (conn, body))
        elif what in ("hello", "failed"):
            if node.up:
                self.give(node, what, a, (conn, body))
        elif not node.up or (conn not in node.readable and node.dialling.get(a) != conn):
            self.send_reset(b, a, conn)
        else:
            self.give(node, "data", a, (conn, what, body))

    def give(self, node: Node, what: str, peer: int, body: Any) -> None:
        if self.is_paused(node):
            node.inbox.append((what, peer, body))
        else:
            self.take(node, what, peer, body)

    def send_reset(self, a: int, b: int, conn: int) -> None:
        if (a, b) in self.blocked:
            return
        pipe = self.pipes.setdefault((conn, a), Pipe())
        self.arrive(pipe, self.now + self.delay(), conn, a, b, "reset", None)

    def close(self, node: Node, peer: int) -> None:
        node.conns.pop(peer, None)
        for conn in [c for c, p in node.readable.items() if p == peer]:
            del node.readable[conn]
            self.send_reset(node.i, peer, conn)

    def dial(self, a: int, b: int) -> None:
        node = self.nodes[a]
        if b in node.dialling:
            return
        self.n_conns += 1
        conn = node.dialling[b] = self.n_conns
        self.syn(conn, a, b, node.life, 1)
        self.at(self.now + DIAL_S, self.give_up, a, b, conn)

    def give_up(self, a: int, b: int, conn: int) -> None:
        node = self.nodes[a]
        if node.up and node.dialling.get(b) == conn:
            self.give(node, "failed", b, (conn, False))

    def syn(self, conn: int, a: int, b: int, life: int, tries_left: int) -> None:
        node, peer = self.nodes[a], self.nodes[b]
        if not node.up or node.life != life or node.dialling.get(b) != conn:
            return
        if (a, b) in self.blocked or (b, a) in self.blocked or not peer.powered:
            if tries_left:
                self.at(self.now + 1.0, self.syn, conn, a, b, life, tries_left - 1)
        elif not peer.up:
            self.at(self.now + self.delay() + self.delay(), self.deliver, conn, b, a, "failed", True)
        else:
            handshake = self.delay() + self.delay()
            self.at(self.now + handshake, self.put_hello, conn, a, b, node.life)

    def put_hello(self, conn: int, a: int, b: int, life: int) -> None:
        node = self.nodes[a]
        if node.up and node.life == life and node.dialling.get(b) == conn:
            node.connected.add(conn)
            self.put(conn, a, b, "hello", node.incarnation_on_disk, reliable=True)

    def hello(self, node: Node, peer: int, conn: int, incarnation: int) -> None:
        if node.dialling.get(peer) in node.connected and node.i < peer:
            return  # both dial at once: the connection of the first in order is kept
        self.put(conn, node.i, peer, "welcome", node.incarnation_on_disk, reliable=True)
        self.establish(node, peer, conn, incarnation)

    def link_up(self, node: Node, peer: int, conn: int, incarnation: int) -> None:
        if node.dialling.get(peer) != conn:
            self.send_reset(node.i, peer, conn)
            return
        old = node.conns.get(peer)
        self.establish(node, peer, conn, incarnation)
        if old is not None:
            node.readable.pop(old, None)
            self.send_reset(node.i, peer, old)

    def establish(self, node: Node, peer: int, conn: int, incarnation: int) -> None:
        node.connected.discard(node.dialling.pop(peer, 0))
        node.conns[peer] = conn
        node.readable[conn] = peer
        self.note(f"n{node.i} linked to n{peer}")
        node.unresolved.discard(peer)
        self.tell_members(node, mb.LinkUp(self.nodes[peer].id, incarnation))

    # Faults

    def block(self, a: int, b: int) -> None:
        """One direction."""
        self.disturbed()
        self.blocked[a, b] = self.blocked.get((a, b), 0) + 1
        self.edge_ok_since[min(a, b), max(a, b)] = math.inf

    def unblock(self, a: int, b: int) -> None:
        left = self.blocked.get((a, b), 0) - 1
        if left > 0:
            self.blocked[a, b] = left
        else:
            self.blocked.pop((a, b), None)
        if (a, b) not in self.blocked and (b, a) not in self.blocked:
            self.edge_ok_since[min(a, b), max(a, b)] = self.now

    def cut(self, pairs: list[tuple[int, int]], what: str) -> None:
        self.note(f"{what}: {', '.join(f'n{a}->n{b}' for a, b in pairs)}")
        for a, b in pairs:
            self.block(a, b)

    def heal(self, pairs: list[tuple[int, int]]) -> None:
        self.disturbed()
        self.note(f"healed: {', '.join(f'n{a}->n{b}' for a, b in pairs)}")
        for a, b in pairs:
            self.unblock(a, b)

    def blind(self, i: int, other: int, *, on: bool) -> None:
        node = self.nodes[i]
        self.disturbed()
        self.note(f"n{i} wrongly holds n{other} for dead" if on else f"n{i} sees n{other} again")
        (node.blind_to.add if on else node.blind_to.discard)(other)
        if node.up and self.is_paused(node):  # it takes notice when it runs again
            self.at(node.paused_until + 1e-6, lambda: self.feed_view(node) if node.up else None)
        elif node.up:
            self.feed_view(node)

    def quiet(self) -> None:
        self.loss = 0.0
        self.note("quiet from here on")

    # The checker

    def show(self, epoch: Epoch | None) -> str:
        if epoch is None:
            return "none"
        owner = self.index.get(NodeId(epoch.node)) if epoch.node else None
        return f"{epoch.counter}@n{owner}"

    def component(self, i: int, stable_s: float | None = None, *, exempt: int = -1) -> set[int]:
        """Nodes connected with `i` both ways; with `stable_s` only over what was undisturbed for that long (a node that
        stalled may be at the end of a path, not on it)."""
        since = self.now if stable_s is None else self.now - stable_s

        def usable(j: int) -> bool:
            node = self.nodes[j]
            return node.up and (stable_s is None or j == exempt or node.ok_since <= since)

        if not usable(i):
            return set()
        found, todo = {i}, [i]
        while todo:
            a = todo.pop()
            if a != i and stable_s is not None and self.nodes[a].pause_ended > since:
                continue
            for b in range(len(self.nodes)):
                if b not in found and self.edge_ok_since[min(a, b), max(a, b)] <= since and usable(b):
                    found.add(b)
                    todo.append(b)
        return found

    def on_state(self, node: Node, effect: mb.StateChanged) -> None:
        peer = self.index[effect.node]
        self.note(f"n{node.i}: n{peer} is {effect.new} ({effect.reason})")
        if effect.new is mb.State.DEAD and effect.old is not None:
            self.deaths.append((self.now, node.i, peer))
            if peer in self.expelled or self.incarnation_known(node, peer) < self.nodes[peer].first_incarnation:
                return  # true of its life before
            if node.started <= self.now - STABLE_S and peer in self.component(node.i, STABLE_S, exempt=node.i):
                self.fail(f"n{node.i} declared n{peer} dead, which is up and connected: {effect.reason}")

    def on_coordinator(self, node: Node, effect: el.CoordinatorChanged) -> None:
        epoch = effect.epoch
        self.note(f"n{node.i} obeys {self.show(epoch)} ({effect.reason})")
        self.changes.append((self.now, node.i, epoch))
        node.coordinates_since = self.now if effect.coordinator == node.id else math.inf
        if epoch is None:
            return
        if epoch < self.obeyed[node.i]:
            self.fail(f"n{node.i} went back from {self.show(self.obeyed[node.i])} to {self.show(epoch)}")
        self.obeyed[node.i] = epoch
        if effect.coordinator == node.id:
            self.on_claim(node, epoch, effect.reason)

    def on_claim(self, node: Node, epoch: Epoch, reason: str) -> None:
        owner = self.claims.setdefault(epoch, (node.i, node.life))
        if owner != (node.i, node.life):
            self.fail(f"n{node.i} claims {self.show(epoch)}, which n{owner[0]} claimed before")
        if "in sight" not in reason:
            return
        around = self.component(node.i, STABLE_S, exempt=node.i)
        witnesses = [self.nodes[j] for j in sorted(around - {node.i}) if self.can_object(self.nodes[j], node)]
        for i in sorted(around - {node.i}):
            other = self.nodes[i]
            if other.coordinates_since > self.now - STABLE_S or self.is_paused(other) or i in self.expelled:
                continue
            if any(w.election.coordinator == other.id and w.i not in node.blind_to for w in witnesses):
                self.fail(f"n{node.i} claims {self.show(epoch)} although n{i} coordinates, is up and connected")

    def can_object(self, witness: Node, claimant: Node) -> bool:
        """Whether a witness had the chance to speak up against a claim."""
        edge = self.edge_ok_since[min(witness.i, claimant.i), max(witness.i, claimant.i)]
        return witness.pause_ended <= self.now - STABLE_S and edge <= self.now - STABLE_S

    def check_known(self, i: int, life: int, died_at: float, limit: float) -> None:
        if self.nodes[i].life != life:
            return  # it came back in time
        if limit == 5.0 and any(node.pause_ended > died_at - STABLE_S for node in self.nodes):
            return  # who stalled takes what lay unread for news, and says so to others
        if limit < 2.0 and sum(t > died_at - STABLE_S for t in self.disturbances) > 1:
            return  # other things broke at the same time; then only the longer limit is promised
        for node in self.nodes:
            edge = self.edge_ok_since.get((min(i, node.i), max(i, node.i)), math.inf)
            undisturbed = node.up and node.ok_since <= died_at - STABLE_S and node.pause_ended <= died_at - STABLE_S
            if undisturbed and edge <= died_at - STABLE_S:
                state = self.state(node.i, i)
                self.n_checked[limit] = self.n_checked.get(limit, 0) + 1
                if state.living:
                    self.fail(f"n{node.i} still holds n{i} for {state}, {limit:g} s after it died")

    def calm(self, i: int, j: int) -> bool:
        """Whether the link between two nodes and the second of them were undisturbed for long."""
        edge = self.edge_ok_since.get((min(i, j), max(i, j)), math.inf)
        node, since = self.nodes[j], self.now - STABLE_S
        return node.up and node.ok_since <= since and node.pause_ended <= since and edge <= since

    def check_left(self, i: int, life: int, audience: list[int]) -> None:
        if self.nodes[i].life != life or sum(t > self.now - 5.1 for t in self.disturbances) > 2:
            return  # it came back, or something else broke
        for j in audience:
            if self.nodes[j].up and (state := self.state(j, i)) is not mb.State.LEFT:
                self.fail(f"n{j} holds n{i} for {state}, it left")

    def state(self, observer: int, peer: int) -> mb.State:
        views = self.nodes[observer].members.snapshot().peers
        return next((p.state for p in views if p.node == self.nodes[peer].id), mb.State.DEAD)

    def incarnation_known(self, node: Node, peer: int) -> int:
        views = node.members.snapshot().peers
        return next(p.incarnation for p in views if p.node == self.nodes[peer].id)

    def check_agreement(self) -> None:
        """Promise 1: one coordinator per component, everybody of it agrees; and views are right."""
        done: set[int] = set()
        for node in self.nodes:
            if node.i in done or not node.up:
                continue
            component = self.component(node.i)
            done |= component
            self.check_component(sorted(component))

    def check_component(self, component: list[int]) -> None:
        stamps = {i: self.nodes[i].election.snapshot().stamp for i in component}
        shown = ", ".join(f"n{i}: {self.show(s.epoch)} {'' if s.coordinator else 'vacant'}" for i, s in stamps.items())
        for i in component:
            for peer in self.nodes:
                if peer.i != i and self.state(i, peer.i).living != (peer.i in component):
                    right = "alive" if peer.i in component else "dead"
                    self.fail(f"n{i} holds n{peer.i} for {self.state(i, peer.i)}, it is {right}")
        if not any(self.nodes[i].eligible for i in component):
            if any(s.coordinator is not None for s in stamps.values()):
                self.fail(f"nobody is eligible, yet somebody is obeyed: {shown}")
            return
        if len(set(stamps.values())) != 1:
            self.fail(f"no agreement: {shown}")
        coordinator = stamps[component[0]].coordinator
        if coordinator is None or self.index[coordinator] not in component:
            self.fail(f"no coordinator in the component: {shown}")


def plan_faults(cluster: Cluster) -> float:
    """Draws what breaks and when; gives the time of the last disturbance."""
    rnd, n = cluster.rnd, len(cluster.nodes)
    t = rnd.uniform(7.0, 9.0)
    last = t
    for _ in range(rnd.choice([1, 1, 2, 2, 3, 4])):
        ends = _plan_one(cluster, rnd, n, t)
        last = max(last, ends)
        t += rnd.choice([0.0, rnd.uniform(0, 1), rnd.uniform(0, 6)])
        last = max(last, t)
    return last


KINDS = [
    *("kill", "kill", "power", "partition", "partition", "one way", "link"),
    *("pause", "stall", "stall", "thrash", "blind", "leave", "hand over"),
]


def _plan_one(cluster: Cluster, rnd: random.Random, n: int, t: float) -> float:
    kind = rnd.choice(KINDS)
    i = rnd.randrange(n)
    if kind in ("kill", "power"):
        cluster.at(t, lambda: cluster.crash(i, power=kind == "power"))
        if rnd.random() < 0.5:
            return t
        back = t + rnd.uniform(0.2, 6)
        cluster.at(back, lambda: None if cluster.nodes[i].up else cluster.start(i))
        return back
    if kind == "leave":
        cluster.at(t, cluster.leave, i)
        back = t + rnd.choice([0.0, rnd.uniform(1.5, 6)])
        if back > t:
            cluster.at(back, lambda: None if cluster.nodes[i].up else cluster.start(i))
        return max(back, t + 1.0)
    if kind == "hand over":
        for j in range(n):
            cluster.at(t, cluster.hand_over, j)
        return t
    if kind in ("pause", "stall"):
        duration = rnd.uniform(2, 15) if kind == "pause" and rnd.random() < 0.5 else rnd.uniform(0.5, 2)
        cluster.at(t, cluster.pause, i, duration)
        return t + duration
    if kind == "thrash":  # a machine so busy that the agent runs only now and then
        for _ in range(rnd.randrange(2, 8)):
            duration = rnd.uniform(0.5, 3)
            cluster.at(t, cluster.pause, i, duration)
            t += duration + rnd.uniform(0.01, 0.3)
        return t
    if kind == "blind":
        other = rnd.choice([j for j in range(n) if j != i])
        until = t + rnd.uniform(0.5, 6)
        cluster.at(t, lambda: cluster.blind(i, other, on=True))
        cluster.at(until, lambda: cluster.blind(i, other, on=False))
        return until
    pairs = _draw_pairs(rnd, n, kind)
    cluster.at(t, cluster.cut, pairs, kind)
    if rnd.random() < 0.4:
        return t
    healed = t + rnd.uniform(0.3, 8)
    cluster.at(healed, cluster.heal, pairs)
    return healed


def _draw_pairs(rnd: random.Random, n: int, kind: str) -> list[tuple[int, int]]:
    if kind == "link":
        a, b = rnd.sample(range(n), 2)
        return [(a, b), (b, a)]
    side = set(rnd.sample(range(n), rnd.randrange(1, n)))
    out = [(a, b) for a in sorted(side) for b in range(n) if b not in side]
    return out if kind == "one way" else out + [(b, a) for a, b in out]


def run(seed: int, controls: Controls = CONTROLS["none"]) -> Cluster:
    """One seed of membership and election, from start to verdict. Raises `Violation`."""
    cluster = Cluster(seed, controls)
    for node in cluster.nodes:
        cluster.at(cluster.rnd.uniform(0, 0.5), cluster.start, node.i)
    last = plan_faults(cluster)
    cluster.at(last, cluster.quiet)
    cluster.run_until(last)
    one_way = any((b, a) not in cluster.blocked for a, b in cluster.blocked)
    settled = last + QUIET_S + (ONE_WAY_S if one_way else 0.0)
    cluster.run_until(settled)
    cluster.check_agreement()
    n_changes = len(cluster.changes)
    cluster.run_until(settled + WATCH_S)
    if len(cluster.changes) != n_changes:
        cluster.fail("the coordinator changed although nothing had happened for 5 s")
    cluster.check_agreement()
    return cluster
