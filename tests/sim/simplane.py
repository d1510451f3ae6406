"""The whole control plane simulated: on top of `simcluster` who is let in and thrown out, what is served and by which
pool, with disks that fill up or tear, and wall clocks that jump.

What decides is the program's own: `Ledger` (on a real file), `tokens.decide`, `DenyList`, `decide.next_version`,
`engine.plan.place`, `engine.restart.Restarter`, and the fence of `election`. The shells around them are played here.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from simcluster import CONTROLS as BASE_CONTROLS
from simcluster import STABLE_S, Cluster, Controls, Net, Node

from tightwad_agent import decide
from tightwad_agent.engine import plan
from tightwad_agent.engine.restart import GiveUp, Restarter, RestartPolicy
from tightwad_agent.errors import DoesNotFit, EnvironmentFault
from tightwad_agent.ids import Epoch, ModelId, NodeId, NodeName, SafeName
from tightwad_agent.mesh import election as el
from tightwad_agent.mesh import members as mb
from tightwad_agent.mesh import tokens
from tightwad_agent.mesh.deny import DenyList
from tightwad_agent.mesh.ledger import Ledger
from tightwad_agent.wire.rows import (
    Capabilities,
    Device,
    EngineInfo,
    HeldModel,
    ModelFacts,
    NodeRow,
    Role,
    ServeRecord,
    Stamp,
    Want,
)
from tightwad_agent.wire.trust import Denial, Denied

GB = 1_000_000_000
REVOKED_S = 5.0
"""Promise: a revoked node is cut off by all who can hear of it."""
STEP_S = 1.0
LEASE_S = 4.0
"""A worker that hears no more of its coordinator stops."""
LOAD_S = 0.5
CA_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
CA = bytes(32)
ENGINE = EngineInfo(build="b11434", digest="d" * 64, protocol="7.0.0")
FACTS = ModelFacts("llama", "Q4_K_M", 0, 40, 32768, 0, "v")
MODELS = [HeldModel(ModelId(c * 64), SafeName(f"{c}.gguf"), n * GB, n * GB, FACTS) for c, n in {"a": 3, "b": 9}.items()]
T0 = 1_800_000_000.0
SHM = "/dev/shm"


class Died(Exception):
    """The process ended in the middle of a write."""


class SimLedger(Ledger):
    """The real ledger; `fate` says what the disk does to the next line. Without `durable` a use is only counted in
    memory (a negative control)."""

    def __init__(self, folder: Path, fate: Callable[[], str], dice: random.Random, *, durable: bool) -> None:
        self.fate, self.durable, self.dice = fate, durable, dice
        super().__init__(folder)

    def _append(self, fact: dict[str, Any]) -> None:
        fate = self.fate()
        if fate in ("full", "torn"):
            self._tear()
            raise EnvironmentFault("disk full") if fate == "full" else Died
        if self.durable or "token" in fact:
            super()._append(fact)
        if fate == "dies":
            raise Died

    def _tear(self) -> None:
        """Part of a line reaches the disk."""
        self._n_seen = -1
        junk = b'3f00aa17 {"admit":["00112233'[: self.dice.randrange(1, 28)] + self.dice.choice([b"", b"\0" * 40])
        self._path.touch(0o600)
        with self._path.open("r+b") as file:
            file.truncate(self._n_good)
            file.seek(self._n_good)
            file.write(junk)


@dataclass(frozen=True)
class PlaneControls:
    """What is switched off beside the base's mechanisms."""

    base: Controls = BASE_CONTROLS["none"]
    durable: bool = True
    deny: bool = True
    resend: bool = True
    direct: bool = True


def _without(name: str, **changes: bool) -> PlaneControls:
    return PlaneControls(replace(BASE_CONTROLS["none"], option=f" --without {name}"), **changes)


CONTROLS = {name: PlaneControls(base) for name, base in BASE_CONTROLS.items()} | {
    "use-count": _without("use-count", durable=False),
    "deny-list": _without("deny-list", deny=False),
    "record-sync": _without("record-sync", resend=False),
    "direct-reach": _without("direct-reach", direct=False),
}


@dataclass
class Pool:
    """What a coordinator runs: `run` counts its starts."""

    epoch: Epoch
    run: int
    model: HeldModel
    workers: tuple[int, ...]
    ready: set[int] = field(default_factory=set)

    @property
    def serving(self) -> bool:
        return self.ready >= set(self.workers)


@dataclass
class Job:
    """What a worker runs, and for whom."""

    epoch: Epoch
    run: int
    until: float


@dataclass
class Extra:
    """One node's part beyond membership and election."""

    free: float
    wall: float = 0.0
    disk: str = "good"
    record: ServeRecord = field(default_factory=ServeRecord)
    record_on_disk: ServeRecord = field(default_factory=ServeRecord)
    deny: DenyList = field(default_factory=lambda: DenyList(lambda _d: True))
    deny_on_disk: tuple[Denial, ...] = ()
    ledger: SimLedger | None = None
    pool: Pool | None = None
    job: Job | None = None
    n_runs: int = 0
    restarter: Restarter = field(default_factory=lambda: Restarter(RestartPolicy(settled_s=60.0)))
    start_at: float = 0.0


@dataclass
class Ticket:
    """One token, and who got a certificate by it."""

    token: tokens.Token
    maker: int
    issued: set[NodeId] = field(default_factory=set)


class Plane(Cluster):
    """A cluster with all of the control plane. Call `wipe` after it."""

    def __init__(
        self, seed: int, controls: PlaneControls = CONTROLS["none"], *, n: int = 0, net: Net | None = None
    ) -> None:
        super().__init__(seed, controls.base, n=n, net=net)
        self.plane = controls
        self.dice = random.Random(f"plane {seed}")
        self.folder = Path(tempfile.mkdtemp(prefix="sim-", dir=SHM if Path(SHM).is_dir() else None))
        self.extras = [Extra(free=self.dice.choice([2.0, 6.0, 8.0, 12.0, 20.0])) for _ in self.nodes]
        self.n_authorities = self.dice.choice([1, 1, 2])
        self.tickets: list[Ticket] = []
        self.denied_at: dict[int, float] = {}
        self.learned_at: dict[tuple[int, int], float] = {}
        self.blocks: list[float] = []
        self.late = 0.0
        """The last disturbance that nobody planned."""
        self.n_admitted = self.n_cut = self.n_served = self.n_edits = self.n_torn = 0

    def wipe(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def wall(self, i: int) -> float:
        return T0 + self.now + self.extras[i].wall

    # Life of a node

    def start(self, i: int) -> None:
        x = self.extras[i]
        x.disk = "good"
        x.record = x.record_on_disk
        x.deny = DenyList(lambda _d: True)
        x.deny.merge(x.deny_on_disk, {CA}, 0.0)
        x.pool = x.job = None
        x.restarter.reset()
        x.start_at = 0.0
        if i < self.n_authorities:
            folder = self.folder / str(i)
            folder.mkdir(exist_ok=True)
            x.ledger = SimLedger(folder, lambda: self.fate(i), self.dice, durable=self.plane.durable)
        super().start(i)
        self.at(self.now + STEP_S, self.step, i, self.nodes[i].life)

    def crash(self, i: int, *, power: bool) -> None:
        self.extras[i].pool = self.extras[i].job = None
        super().crash(i, power=power)

    def fate(self, i: int) -> str:
        """What the disk does with the next line."""
        x = self.extras[i]
        if x.disk in ("torn", "dies"):
            fate, x.disk = x.disk, "good"
            return fate
        return x.disk

    def persist(self, node: Node, epoch: Epoch) -> bool:
        """A full disk ends the agent: what it cannot remember it must not claim."""
        disk = self.fate(node.i)
        if disk == "good":
            return super().persist(node, epoch)
        if disk == "dies":
            super().persist(node, epoch)
        self.note(f"n{node.i}: the disk is {disk}, it ends")
        self.fall(node.i)
        return False

    def fall(self, i: int) -> None:
        """Ends it now, and starts it again on a good disk."""
        self.n_torn += 1
        self.crash(i, power=self.dice.random() < 0.5)
        back = self.now + self.dice.uniform(0.5, 4)
        self.at(back, lambda: None if self.nodes[i].up else self.start(i))
        self.late = max(self.late, back)

    # Links

    def refuses(self, i: int, peer: int) -> bool:
        """Whether a node knows that the peer was thrown out."""
        return self.plane.deny and self.extras[i].deny.node(self.nodes[peer].id) is not None

    def hello(self, node: Node, peer: int, conn: int, incarnation: int) -> None:
        if self.refuses(node.i, peer):
            self.at(self.now + self.delay(), self.turned_away, peer, node.i, conn)
            return
        super().hello(node, peer, conn, incarnation)

    def turned_away(self, i: int, by: int, conn: int) -> None:
        node = self.nodes[i]
        if node.up and node.dialling.get(by) == conn:
            self.give(node, "failed", by, (conn, False))

    def link_up(self, node: Node, peer: int, conn: int, incarnation: int) -> None:
        if self.refuses(node.i, peer) and node.dialling.get(peer) == conn:
            self.send_reset(node.i, peer, conn)
            self.take(node, "failed", peer, (conn, False))
            return
        super().link_up(node, peer, conn, incarnation)

    def establish(self, node: Node, peer: int, conn: int, incarnation: int) -> None:
        super().establish(node, peer, conn, incarnation)
        if node.conns.get(peer) != conn:
            return
        x = self.extras[node.i]
        self.tell(node, peer, "deny", x.deny.entries)
        if self.plane.resend:
            self.tell(node, peer, "record", x.record)

    def tell(self, node: Node, peer: int, what: str, body: Any) -> None:
        """As TCP: it comes, or the connection ends."""
        if (conn := node.conns.get(peer)) is not None:
            self.put(conn, node.i, peer, what, body, reliable=True)

    def tell_all(self, node: Node, what: str, body: Any) -> None:
        for peer in list(node.conns):
            self.tell(node, peer, what, body)

    def message(self, node: Node, peer: int, source: NodeId, what: str, body: Any) -> None:
        handler = {
            "deny": self.on_denials,
            "record": self.on_record,
            "pool": self.on_pool,
            "ready": self.on_ready,
        }.get(what)
        if handler is None:
            super().message(node, peer, source, what, body)
            return
        self.tell_members(node, mb.Heard(source))
        handler(node, peer, body)

    # Thrown out

    def throw_out(self, by: int, victim: int) -> None:
        """An authority denies a member."""
        node = self.nodes[by]
        if not node.up or self.is_paused(node) or victim in self.denied_at:
            return
        self.note(f"n{by} throws n{victim} out")
        self.denied_at[victim] = self.now
        self.expelled.add(victim)
        now = int(self.wall(by))
        denial = Denial(Denied.NODE, str(self.nodes[victim].id), now, now + 10**8, CA, "", bytes([victim]) * 8)
        reachable = [j for j in sorted(self.component(by, STABLE_S, exempt=by)) if self.calm(by, j)]
        lives = [node.life, *(self.nodes[j].life for j in reachable)]
        self.at(self.now + REVOKED_S, self.check_revoked, by, victim, reachable, lives)
        self.on_denials(node, by, (denial,))

    def revoke(self, by: int, ticket: Ticket) -> None:
        node = self.nodes[by]
        if node.up and not self.is_paused(node):
            now, subject = int(self.wall(by)), ticket.token.claims.token_id.hex()
            self.on_denials(node, by, (Denial(Denied.TOKEN, subject, now, now + 10**8, CA, "", b"t" * 8),))

    def on_denials(self, node: Node, peer: int, entries: tuple[Denial, ...]) -> None:
        x = self.extras[node.i]
        fresh = x.deny.merge(entries, {CA}, 0.0)
        if not fresh:
            return
        x.deny_on_disk = x.deny.entries
        self.tell_all(node, "deny", fresh)
        for denial in fresh:
            if denial.kind is Denied.NODE:
                self.cut_off(node, self.index[NodeId(denial.subject)])

    def cut_off(self, node: Node, victim: int) -> None:
        if victim == node.i:
            if self.seed % 2:  # an honest program ends; another one goes on as if nothing had been said
                self.crash(victim, power=False)
            return
        self.note(f"n{node.i} cuts n{victim} off")
        self.disturbed()
        self.late = max(self.late, self.now)
        self.learned_at[node.i, victim] = self.now
        self.edge_ok_since[min(node.i, victim), max(node.i, victim)] = float("inf")
        if self.plane.deny:
            self.n_cut += 1
            self.close(node, victim)
            self.tell_members(node, mb.Forget(self.nodes[victim].id))
            self.feed_view(node)

    def unblock(self, a: int, b: int) -> None:
        super().unblock(a, b)
        if (a, b) in self.learned_at or (b, a) in self.learned_at:
            self.edge_ok_since[min(a, b), max(a, b)] = float("inf")

    def check_revoked(self, by: int, victim: int, reachable: list[int], lives: list[int]) -> None:
        if (
            any(t >= self.denied_at[victim] for t in self.blocks)
            or not self.nodes[by].up
            or self.nodes[by].life != lives[0]
        ):
            return  # a cable was cut meanwhile, or who said so is gone
        for j, life in zip(reachable, lives[1:], strict=True):
            node = self.nodes[j]
            if j == victim or not node.up or node.life != life or node.pause_ended > self.denied_at[victim]:
                continue
            if victim in node.conns or (j, victim) not in self.learned_at:
                self.fail(f"n{j} has not cut n{victim} off, {REVOKED_S:g} s after it was thrown out")
            self.n_checked[REVOKED_S + 0.5] = self.n_checked.get(REVOKED_S + 0.5, 0) + 1

    def block(self, a: int, b: int) -> None:
        super().block(a, b)
        self.blocks.append(self.now)

    # Let in

    def make_token(self, i: int) -> None:
        x, node = self.extras[i], self.nodes[i]
        if not node.up or x.ledger is None or self.is_paused(node):
            return
        token_id = len(self.tickets).to_bytes(8, "big")
        uses, ttl_s = self.dice.choice([1, 1, 2, 3]), self.dice.choice([5, 20, 3600])
        token = tokens.issue(CA_KEY, bytes(24) + token_id, token_id, now=self.wall(i), ttl_s=ttl_s, uses=uses)
        try:
            x.ledger.add(token, self.wall(i))
        except EnvironmentFault:
            return
        except Died:
            self.fall(i)
            return
        self.tickets.append(Ticket(token, i))

    def ask_in(self, joiner: NodeId, ticket: Ticket, at: int, tries: int) -> None:
        """Somebody asks an authority; what the answer is, it may never hear, and asks again."""
        again = self.now + self.dice.uniform(0.2, 3)
        if tries:
            self.at(again, self.ask_in, joiner, ticket, at, tries - 1)
        node, x = self.nodes[at], self.extras[at]
        if not node.up or self.is_paused(node) or x.ledger is None:
            return
        claims = ticket.token.claims
        if self.plane.deny and (x.deny.token(claims.token_id) or x.deny.node(joiner)):
            return
        try:
            verdict = x.ledger.admit(claims.token_id, joiner, self.wall(at))
        except EnvironmentFault:
            return
        except Died:
            self.fall(at)
            return
        if verdict.is_yes:
            self.let_in(joiner, ticket, at)

    def let_in(self, joiner: NodeId, ticket: Ticket, at: int) -> None:
        claims = ticket.token.claims
        ticket.issued.add(joiner)
        self.n_admitted += 1
        if len(ticket.issued) > claims.uses:
            self.fail(f"n{at} let {len(ticket.issued)} nodes in by a token for {claims.uses}")
        if at != ticket.maker:
            self.fail(f"n{at} honours a token of n{ticket.maker}")
        if self.wall(at) >= claims.expires:
            self.fail(f"n{at} honours a token that has expired by its clock")
        if self.extras[at].deny.token(claims.token_id):
            self.fail(f"n{at} honours a token that it knows to be revoked")

    # What is served

    def edit(self, i: int) -> None:
        node, x = self.nodes[i], self.extras[i]
        if node.up and not self.is_paused(node) and i not in self.expelled:
            self.n_edits += 1
            version = decide.next_version(x.record, node.election.epoch.counter, node.id)
            want = self.dice.choice([Want.PINNED, Want.PINNED, Want.NONE])
            self.on_record(node, i, ServeRecord(want, self.dice.choice(MODELS).model, version=version))

    def on_record(self, node: Node, _peer: int, record: ServeRecord) -> None:
        x = self.extras[node.i]
        if record.version <= x.record.version:
            return
        x.record = record
        self.at(self.now + 0.3, self.save_record, node.i, node.life, record)
        self.tell_all(node, "record", record)

    def save_record(self, i: int, life: int, record: ServeRecord) -> None:
        x = self.extras[i]
        if self.nodes[i].up and self.nodes[i].life == life and record.version > x.record_on_disk.version:
            x.record_on_disk = record

    # The pool

    def row(self, i: int) -> NodeRow:
        free = int(self.extras[i].free * GB)
        device = Device("CPU", "", 64 * GB, free)
        able = Capabilities("linux", memory_total=64 * GB, memory_free=free, devices=(device,), engine=ENGINE)
        node = self.nodes[i]
        return NodeRow(node.id, NodeName(f"n{i}"), Role.NODE, 1, 1, 0, True, 1, 1, capabilities=able)

    def placement(self, i: int, others: list[int]) -> tuple[HeldModel, tuple[int, ...]] | None:
        """What a coordinator would run with these; None for nothing."""
        record = self.extras[i].record
        model = next((m for m in MODELS if m.model == record.model), None)
        if record.want is Want.NONE or model is None:
            return None
        facts = [plan.NodeFacts(self.row(j)) for j in others]
        try:
            made = plan.place(coordinator=plan.NodeFacts(self.row(i)), others=facts, model=model)
        except DoesNotFit:
            return None
        return model, tuple(self.index[w.node] for w in made.workers)

    def step(self, i: int, life: int) -> None:
        """What a coordinator's conductor and a worker's lease do each second."""
        node, x = self.nodes[i], self.extras[i]
        if not node.up or node.life != life:
            return
        self.at(self.now + STEP_S, self.step, i, life)
        if self.is_paused(node):
            return
        if x.job is not None and (self.now > x.job.until or not node.election.accepts(x.job.epoch)):
            x.job = None
        if not node.election.coordinating:
            x.pool = None
            return
        self.conduct(node, x)

    def conduct(self, node: Node, x: Extra) -> None:
        peers = [p for p in node.members.snapshot().peers if p.state.living]
        alive = [self.index[p.node] for p in peers if p.reach is mb.Reach.DIRECT or not self.plane.direct]
        wanted = self.placement(node.i, sorted(alive))
        pool = x.pool
        if pool is not None and (pool.epoch != node.election.epoch or wanted is None or pool.model != wanted[0]):
            x.pool = pool = None
            x.restarter.reset()
            x.start_at = 0.0
        if pool is not None and not set(pool.workers) <= set(alive):
            decision = x.restarter.exited(self.now, "a worker is gone", crash=False)
            assert not isinstance(decision, GiveUp)
            x.start_at, x.pool, pool = decision.at, None, None
        if pool is None and wanted is not None and self.now >= x.start_at:
            x.n_runs += 1
            x.pool = pool = Pool(node.election.epoch, 1000 * node.life + x.n_runs, wanted[0], wanted[1])
            x.restarter.started(self.now)
        if pool is not None:
            for worker in pool.workers:
                self.tell(node, worker, "pool", (pool.epoch, pool.run))

    def on_pool(self, node: Node, peer: int, body: tuple[Epoch, int]) -> None:
        """A worker is told to run, or that it still should."""
        epoch, run = body
        if self.controls.fencing:
            self.tell_election(node, el.StampHeard(self.nodes[peer].id, Stamp(epoch, self.nodes[peer].id)))
        if self.controls.fencing and not node.election.accepts(epoch):
            return
        if epoch < self.obeyed[node.i]:
            self.fail(f"n{node.i} works for {self.show(epoch)} after obeying {self.show(self.obeyed[node.i])}")
        self.obeyed[node.i] = max(self.obeyed[node.i], epoch)
        x = self.extras[node.i]
        if x.job is None or (x.job.epoch, x.job.run) != body:
            x.job = Job(epoch, run, self.now + LEASE_S)
            self.at(self.now + LOAD_S, self.loaded, node.i, node.life, peer, run)
        else:
            x.job.until = self.now + LEASE_S
            self.tell(node, peer, "ready", run)

    def loaded(self, i: int, life: int, coordinator: int, run: int) -> None:
        node, x = self.nodes[i], self.extras[i]
        if node.up and node.life == life and x.job is not None and x.job.run == run:
            self.tell(node, coordinator, "ready", run)

    def on_ready(self, node: Node, peer: int, run: int) -> None:
        pool = self.extras[node.i].pool
        if pool is not None and pool.run == run:
            pool.ready.add(peer)

    # The verdict

    def check_component(self, component: list[int]) -> None:
        members = [i for i in component if i not in self.expelled or not self.knowers(i)]
        if not members:
            return
        if len(members) == len(component):
            super().check_component(component)
        self.check_records(members)
        for i in members:
            for victim in self.denied_at:
                if (i, victim) in self.learned_at and victim in self.nodes[i].conns:
                    self.fail(f"n{i} has a link to n{victim}, which was thrown out")

    def knowers(self, victim: int) -> list[int]:
        return [i for i, v in self.learned_at if v == victim]

    def check_records(self, component: list[int]) -> None:
        versions = {self.extras[i].record.version for i in component}
        if len(versions) > 1:
            self.fail(f"records differ in one component: {sorted(versions)}")

    def serving(self) -> bool:
        """Whether every component serves what it was told to, or cannot."""
        return all(
            self.serves(node)
            for node in self.nodes
            if node.up and node.election.coordinating and node.i not in self.expelled
        )

    def serves(self, node: Node) -> bool:
        others = [i for i in sorted(self.component(node.i) - {node.i}) if self.edge_ok(node.i, i)]
        wanted, pool = self.placement(node.i, others), self.extras[node.i].pool
        if wanted is None or pool is None:
            return wanted is None and pool is None
        jobs = [self.extras[i].job for i in pool.workers]
        right = all(job is not None and (job.epoch, job.run) == (pool.epoch, pool.run) for job in jobs)
        return pool.serving and right and pool.epoch == node.election.epoch and pool.model == wanted[0]

    def edge_ok(self, a: int, b: int) -> bool:
        return self.edge_ok_since[min(a, b), max(a, b)] <= self.now

    def check_jobs(self) -> None:
        """Nobody works for a pool that is not there."""
        pools = {(x.pool.epoch, x.pool.run) for x in self.extras if x.pool is not None}
        for node, x in zip(self.nodes, self.extras, strict=True):
            if node.up and x.job is not None and (x.job.epoch, x.job.run) not in pools:
                self.fail(f"n{node.i} works for {self.show(x.job.epoch)}, whose pool is gone")
