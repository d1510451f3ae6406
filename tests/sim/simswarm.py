"""Whole swarms of pure machines on a simulated clock: honest nodes, liars, stallers, leavers, and late joiners.

A node is a tracker and one conversation for each peer. The line between two nodes carries one message at a time, for a
time that depends on its bytes; everything is driven from one seeded event queue. Promises are checked while it runs,
with knowledge no node has: `Violation` names the seed.

    tests/sim/test_swarm_sim.py  some hundred seeds        scripts/sim-swarm --seeds 10000  more of the same
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tightwad_agent.errors import PeerRefused, ProtocolError
from tightwad_agent.ids import ModelId
from tightwad_agent.swarm.peer import Conversation, Joined, Outgoing, Progress, Received, Refused, Updated
from tightwad_agent.swarm.pieces import Limits, PieceTracker, State
from tightwad_agent.wire.swarm import BLOCK_BYTES, CODEC, Block

MODEL = ModelId("ab" * 32)
LIMITS = Limits(per_peer=2, total=8, stall_s=5.0, late_s=0.5, slack_s=30, slowest_bytes_s=1 << 16)
BYTES_S = 1 << 20
RECONNECT_S = 3.0
UNTIL_S = 600.0
"""Promise: by then every honest node has the file, whatever the others do."""


class Violation(AssertionError):
    """A promise was broken."""


class Hasty(PieceTracker):
    """Negative control: asks a second peer for what is in flight, also while other pieces are wanted."""

    def choose(self, peer: str, now: float) -> int | None:
        known = self._peers[peer]
        for piece, askers in self._askers.items():
            if peer not in askers and len(askers) < 2 and piece in known.has and len(known.asked) < LIMITS.per_peer:
                self._ask(peer, known, piece, now)
                return piece
        return super().choose(peer, now)


class Patient(PieceTracker):
    """Negative control: never leaves a peer that is stalled, and asks no second one."""

    def expire(self, now: float) -> list[str]:
        return []

    def _is_late(self, *_args: Any) -> bool:
        return False


class Blind(PieceTracker):
    """Negative control: what is on its way to others is no copy."""

    def peer_fetching(self, peer: str, pieces: Any) -> None:
        pass


class Planned(PieceTracker):
    """Negative control: the same order of pieces for everybody."""

    def _rarest(self, known: Any, bad: Any) -> int | None:
        return min((known.has & self._wanted) - bad, default=None)


@dataclass(frozen=True)
class Rules:
    """What the nodes do; each negative control changes one thing."""

    tracker: type[PieceTracker] = PieceTracker
    compares: bool = True


CONTROLS: dict[str, Rules] = {
    "none": Rules(),
    "hash-check": Rules(compares=False),
    "endgame-last": Rules(tracker=Hasty),
    "leaving-stalled": Rules(tracker=Patient),
}
"""By what is missing. Copies in flight and rarest first are no promise of any one run: their tests compare uploads."""


@dataclass
class Node:
    name: str
    kind: str  # honest, liar, staller, mixer
    have: set[int]
    tracker: PieceTracker
    data: dict[int, bytes]
    talks: dict[str, Conversation] = field(default_factory=dict)
    banned: set[str] = field(default_factory=set)
    came: dict[str, int] = field(default_factory=dict)
    coming: dict[tuple[str, int], bytes] = field(default_factory=dict)
    sent: int = 0
    alive: bool = True
    twice_asked: set[int] = field(default_factory=set)
    """Pieces that a second peer was asked for in the endgame."""
    whole: Counter[int] = field(default_factory=Counter)
    """How often all bytes of a piece came, and were right."""

    @property
    def done(self) -> bool:
        return self.tracker.complete


class Swarm:
    def __init__(
        self, seed: int, n_nodes: int, n_pieces: int, kinds: dict[str, str], n_seeds: int, rules: Rules | None = None
    ) -> None:
        self.seed = seed
        self.rules = rules or Rules()
        self.rng = random.Random(seed)
        self.now = 0.0
        self._count = 0
        self._events: list[tuple[float, int, Any]] = []
        lengths = [self.rng.choice([7, BLOCK_BYTES // 64, BLOCK_BYTES + 9, 2 * BLOCK_BYTES]) for _ in range(n_pieces)]
        self.lengths = lengths
        self.truth = {i: self.rng.randbytes(16) * (n // 16 + 1) for i, n in enumerate(lengths)}
        self.truth = {i: data[: lengths[i]] for i, data in self.truth.items()}
        self.hashes = {i: hashlib.sha256(d).digest() for i, d in self.truth.items()}
        self.nodes: dict[str, Node] = {}
        self.busy: dict[tuple[str, str], bool] = {}
        self.epoch: dict[tuple[str, str], int] = {}
        for i in range(n_nodes):
            name = f"n{i:02}"
            kind = kinds.get(name, "honest")
            have = set(range(n_pieces)) if i < n_seeds or kind != "honest" else set()
            tracker = self.rules.tracker(lengths, have, random.Random(f"{seed}/{name}"), LIMITS)
            self.nodes[name] = Node(name, kind, have, tracker, {p: self.truth[p] for p in have})

    # clock and lines

    def at(self, delay: float, action: Any) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + delay, self._count, action))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()
            if all(n.done for n in self.honest()):
                return

    def honest(self) -> list[Node]:
        return [n for n in self.nodes.values() if n.kind == "honest"]

    def connect(self, a: str, b: str) -> None:
        one, two = self.nodes[a], self.nodes[b]
        if not (one.alive and two.alive) or b in one.talks or b in one.banned or a in two.banned:
            return
        for me, other in ((one, two), (two, one)):
            self.epoch[me.name, other.name] = self.epoch.get((me.name, other.name), 0) + 1
            talk = me.talks[other.name] = Conversation(MODEL, self.lengths)
            talk.hello(me.have, me.tracker.fetching)
        self.pump(a, b)
        self.pump(b, a)

    def cut(self, a: str, b: str, *, again: bool = True) -> None:
        for me, other in ((self.nodes[a], b), (self.nodes[b], a)):
            if me.talks.pop(other, None) is not None:
                self.epoch[me.name, other] += 1
                if other in me.tracker.peers:
                    me.tracker.peer_left(other)
                    self.fill_all(me)
        if again:
            self.at(RECONNECT_S * (0.5 + self.rng.random()), lambda: self.connect(a, b))

    def leave(self, name: str, back_after: float | None) -> None:
        node = self.nodes[name]
        for other in list(node.talks):
            self.cut(name, other, again=False)
        node.alive = False
        if back_after is not None:
            self.at(back_after, lambda: self.come_back(name))

    def come_back(self, name: str) -> None:
        self.nodes[name].alive = True
        for other in self.nodes:
            if other != name:
                self.connect(*sorted((name, other)))

    def pump(self, a: str, b: str) -> None:
        """Sends the next message from a to b, if the line is free."""
        talk = self.nodes[a].talks.get(b)
        if talk is None or self.busy.get((a, b)) == self.epoch[a, b]:
            return
        out = talk.outgoing()
        if out is None:
            return
        payload = self.payload(self.nodes[a], out)
        if payload is None:
            return  # a staller: the line stays silent for ever
        message = CODEC.decode(CODEC.encode(out.message))
        epoch = self.epoch[a, b]
        self.busy[a, b] = epoch
        delay = 0.001 + self.rng.random() * 0.01 + len(payload) / BYTES_S * (0.5 + self.rng.random())
        self.at(delay, lambda: self.arrive(a, b, epoch, message, payload))

    def payload(self, node: Node, out: Outgoing) -> bytes | None:
        if out.span is None:
            return b""
        if node.kind == "staller":
            return None
        node.sent += out.span.length
        data = node.data[out.span.piece][out.span.offset : out.span.offset + out.span.length]
        if node.kind == "liar" and self.rng.random() < 0.7:
            return bytes(len(data))
        return data

    def arrive(self, a: str, b: str, epoch: int, message: Any, payload: bytes) -> None:
        if self.epoch[a, b] != epoch:
            return
        self.busy[a, b] = False
        node, sender = self.nodes[b], self.nodes[a]
        if sender.kind == "mixer" and isinstance(message, Block) and self.rng.random() < 0.3:
            message = Block((message.piece + 1) % len(self.lengths), message.offset)
        try:
            effects = node.talks[a].handle(message, payload)
        except ProtocolError as exc:
            if sender.kind == node.kind == "honest":
                raise self.violation(f"{b} says that {a} breaks the rules: {exc}") from None
            node.banned.add(a)
            self.cut(*sorted((a, b)), again=False)
            return
        except PeerRefused:
            self.cut(*sorted((a, b)), again=False)
            return
        if isinstance(message, Block) and sender.kind == "honest":
            self.count_whole(node, message, len(payload))
        for effect in effects:
            self.on_effect(node, a, effect)
            if a not in node.talks:
                return
        self.fill(node, a)
        self.pump(b, a)
        self.pump(a, b)

    def count_whole(self, node: Node, block: Block, n_bytes: int) -> None:
        """Promise: nothing comes whole twice, but in the endgame."""
        if block.offset + n_bytes < self.lengths[block.piece]:
            return
        node.whole[block.piece] += 1
        if node.whole[block.piece] > 1 + (block.piece in node.twice_asked):
            raise self.violation(f"piece {block.piece} came to {node.name} a second time outside the endgame")

    def violation(self, what: str) -> Violation:
        return Violation(f"seed {self.seed}, at {self.now:.2f} s: {what}")

    # what exchange.py does, without the waiting

    def on_effect(self, node: Node, peer: str, effect: Any) -> None:
        t = node.tracker
        match effect:
            case Joined(has, fetching):
                t.peer_joined(peer)
                t.peer_has(peer, has)
                t.peer_fetching(peer, fetching)
            case Updated(has, fetching):
                t.peer_has(peer, has)
                t.peer_fetching(peer, fetching)
            case Progress():
                t.progress(peer, self.now)
            case Refused(piece):
                t.rejected(peer, piece)
            case Received(piece, bytes(data), offset, last):
                came = b"" if offset == 0 else node.coming.get((peer, piece), b"")
                node.coming[peer, piece] = came + data
                if last:
                    self.take(node, peer, piece, node.coming.pop((peer, piece)))

    def take(self, node: Node, peer: str, piece: int, data: bytes) -> None:
        t = node.tracker
        if self.rules.compares and hashlib.sha256(data).digest() != self.hashes[piece]:
            if self.nodes[peer].kind == "honest":
                raise self.violation(f"piece {piece} from {peer} is wrong")
            if t.bad(peer, piece):
                node.banned.add(peer)
                self.cut(*sorted((node.name, peer)), again=False)
            self.fill_all(node)
            return
        node.came[peer] = node.came.get(peer, 0) + len(data)
        node.data[piece] = data
        node.have.add(piece)
        for other, _ in t.finished(piece):
            node.talks[other].cancel(piece)
            self.fill(node, other)
        for other, talk in list(node.talks.items()):
            talk.we_have([piece])
            talk.we_fetch(t.fetching)
            self.pump(node.name, other)
        self.fill_all(node)

    def fill(self, node: Node, peer: str) -> None:
        talk = node.talks.get(peer)
        asked = False
        while talk is not None and talk.may_ask and peer in node.tracker.peers:
            before = set(node.tracker.fetching)
            piece = node.tracker.choose(peer, self.now)
            if piece is None:
                break
            if talk.is_asked(piece):  # cancelled, and the answer still on its way
                node.tracker.returned(peer, piece)
                break
            self.check_choice(node, piece, before)
            talk.request(piece)
            asked = True
        if asked:
            for other, talk in list(node.talks.items()):
                talk.we_fetch(node.tracker.fetching)
                self.pump(node.name, other)

    def check_choice(self, node: Node, piece: int, in_flight: set[int]) -> None:
        """Promise: what is here is not asked for, and what is in flight only when nothing else is wanted."""
        if piece in node.have:
            raise self.violation(f"{node.name} asks for piece {piece}, which it has")
        if piece not in in_flight:
            return
        wanted = [i for i in range(len(self.lengths)) if node.tracker.state(i) is State.WANTED]
        if wanted:
            raise self.violation(f"{node.name} asks twice for piece {piece} while {wanted[:5]} are wanted")
        node.twice_asked.add(piece)

    def fill_all(self, node: Node) -> None:
        for peer in list(node.talks):
            self.fill(node, peer)

    def tick(self) -> None:
        for node in self.nodes.values():
            for peer in node.tracker.expire(self.now):
                if peer in node.talks:
                    self.cut(*sorted((node.name, peer)))
            self.fill_all(node)
        self.at(0.5, self.tick)


def make(seed: int, rules: Rules | None = None) -> Swarm:
    """A swarm, and all that will go wrong in it."""
    rng = random.Random(seed)
    n = rng.randint(2, 7)
    n_seeds = rng.randint(1, 2)
    kinds = {f"n{i:02}": rng.choice(["liar", "staller", "mixer", "honest"]) for i in range(n_seeds, n)}
    if all(k != "honest" for k in kinds.values()):
        kinds[f"n{n - 1:02}"] = "honest"
    swarm = Swarm(seed, n, rng.randint(1, 25), kinds, n_seeds, rules)
    names = sorted(swarm.nodes)
    for a in names:
        for b in names:
            if a < b:
                swarm.at(rng.random() * 3, lambda a=a, b=b: swarm.connect(a, b))
    for name in names:
        if rng.random() < 0.3:
            back = rng.uniform(0.5, 20)
            swarm.at(rng.uniform(0.2, 10), lambda name=name, back=back: swarm.leave(name, back))
    for _ in range(rng.randint(0, 4)):
        a, b = sorted(rng.sample(names, 2))
        swarm.at(rng.uniform(0.1, 10), lambda a=a, b=b: swarm.cut(a, b))
    swarm.at(0.5, swarm.tick)
    return swarm


def run(seed: int, rules: Rules | None = None) -> Swarm:
    """One swarm until all honest nodes are done. Raises `Violation`."""
    swarm = make(seed, rules)
    swarm.run(until=UNTIL_S)
    for node in swarm.honest():
        if not node.done:
            raise swarm.violation(f"{node.name} has {len(node.have)} of {len(swarm.lengths)} pieces")
        if node.data != swarm.truth:
            raise swarm.violation(f"{node.name} has wrong bytes")
        if unjust := [p for p in node.banned if swarm.nodes[p].kind == "honest"]:
            raise swarm.violation(f"{node.name} banned {unjust[0]} unjustly")
    return swarm


def all_honest(
    seed: int,
    n_leechers: int,
    n_seeds: int = 1,
    rules: Rules | None = None,
    prepare: Callable[[Swarm], None] = lambda _: None,
) -> Swarm:
    """Everybody keeps the rules and stays."""
    swarm = Swarm(seed, n_leechers + n_seeds, 40, {}, n_seeds, rules)
    prepare(swarm)
    names = sorted(swarm.nodes)
    for a in names:
        for b in names:
            if a < b:
                swarm.at(0.01, lambda a=a, b=b: swarm.connect(a, b))
    swarm.at(0.5, swarm.tick)
    swarm.run(until=UNTIL_S)
    return swarm


def main(argv: list[str]) -> int:
    """Many seeds, or one again. Exit status 1 at a violation."""
    parser = argparse.ArgumentParser(prog="scripts/sim-swarm", description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many (default %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="the first seed (default %(default)s)")
    parser.add_argument("--without", choices=list(CONTROLS), default="none", help="switch one mechanism off")
    options = parser.parse_args(argv)
    began, n_pieces, n_twice = time.monotonic(), 0, 0
    for seed in range(options.start, options.start + options.seeds):
        try:
            swarm = run(seed, CONTROLS[options.without])
        except Violation as violation:
            print(f"{violation}\nagain: scripts/sim-swarm --seeds 1 --start {seed} --without {options.without}")
            return 1
        n_pieces += sum(node.whole.total() for node in swarm.honest())
        n_twice += sum(n - 1 for node in swarm.honest() for n in node.whole.values())
    took = time.monotonic() - began
    print(f"{options.seeds} seeds in {took:.1f} s: {n_pieces} pieces came, {n_twice} of them twice in an endgame")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
