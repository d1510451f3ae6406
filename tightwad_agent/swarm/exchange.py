"""One model among this node and its peers: who is connected, what is asked of whom, what came, what went.

Everything runs in the nursery of `run`: a task that watches deadlines, one for each peer that is dialled, three for
each link. State changes only in the trio thread; what comes is decrypted, hashed and written by the threads of the
links (`intake`).
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from tightwad_agent.errors import DiskFull, PeerSilent, TightwadError
from tightwad_agent.ids import NodeId
from tightwad_agent.streams import Framed, OpenStream, close_quietly
from tightwad_agent.swarm.arrivals import Arrivals, Found
from tightwad_agent.swarm.dialler import DIAL_S, Dialler
from tightwad_agent.swarm.intake import Intake, Landed
from tightwad_agent.swarm.link import NEWS_S, Link
from tightwad_agent.swarm.manifest import Manifest
from tightwad_agent.swarm.outside import OUTSIDE, LastResort, Outside
from tightwad_agent.swarm.part import PartFile
from tightwad_agent.swarm.peer import Conversation, Effect, Joined, Progress, Received, Refused, Updated
from tightwad_agent.swarm.pieces import Limits, PieceTracker, Rng
from tightwad_agent.swarm.source import CompleteFile
from tightwad_agent.swarm.uploads import Uploads
from tightwad_agent.wire.swarm import BLOCK_BYTES, CODEC, MAX_SWARM_HEADER, Bye, Hello

log = logging.getLogger(__name__)

SERVICE = "swarm"
MAX_LINKS = 64
IDLE_S = 10.0
LEAVE_S = 10.0
IDLE_NEWS_S = 1.0
BREATH_S = 0.02
"""What happens together is looked at together."""
RATE_WINDOW_S = 5.0
READ_BYTES = 4 << 20
"""What is read of a piece at once, to be sent."""


@dataclass
class Traffic:
    """Verified bytes that came, and bytes that went, by peer; cumulative over all exchanges of a model."""

    from_each_peer: Counter[str] = field(default_factory=Counter)
    to_each_peer: Counter[NodeId] = field(default_factory=Counter)


class Exchange:
    """`part` while pieces are missing, `complete` when all are here; exactly one is given at first."""

    def __init__(
        self,
        manifest: Manifest,
        me: NodeId,
        open_stream: OpenStream,
        rng: Rng,
        *,
        part: PartFile | None = None,
        complete: CompleteFile | None = None,
        traffic: Traffic | None = None,
        limits: Limits | None = None,
        uploads: Uploads | None = None,
        outside: Outside | None = None,
        on_piece: Callable[[], None] = lambda: None,
        on_damage: Callable[[], None] = lambda: None,
    ) -> None:
        self.manifest = manifest
        self.have = set(range(len(manifest.pieces))) if part is None else set(part.have)
        self.links: dict[NodeId, Link] = {}
        self.leeched = trio.Event()
        """All pieces are here, or `failure` says why not."""
        self.failure: TightwadError | None = None
        self.traffic = traffic or Traffic()
        self._me = me
        self._part = part
        self._complete = complete
        self._lengths = [piece.length for piece in manifest.pieces]
        self._n_bytes = sum(self._lengths[i] for i in self.have)
        self.tracker = PieceTracker(self._lengths, self.have, rng, limits) if part is not None else None
        self._arrivals = Arrivals(manifest, part) if part is not None else None
        self._uploads = uploads or Uploads()
        self._limits = limits or Limits()
        self._outside = LastResort(outside, self) if outside is not None and part is not None else None
        self._on_piece = on_piece
        self._on_damage = on_damage
        self._dialler = Dialler(
            str(manifest.name),
            lambda peer: open_stream(peer, SERVICE, {"model": str(manifest.root)}),
            changed=self._stir,
            forgive=self._forgive,
        )
        self._recent: deque[tuple[float, int]] = deque()
        self.poke = trio.Event()
        self._stopping = False
        self._nursery: trio.Nursery | None = None
        if self.tracker is not None and self.tracker.complete:
            self.leeched.set()

    # What others see

    @property
    def n_bytes(self) -> int:
        """Bytes of pieces that are here."""
        return self._n_bytes

    @property
    def sources(self) -> int:
        """Connected peers that have something that is not here."""
        tracker = self.tracker
        return 0 if tracker is None else sum(tracker.is_useful(p) for p in tracker.peers if p != OUTSIDE)

    def rate(self, now: float) -> float:
        """Bytes per second that came in over the last seconds."""
        self._forget_old(now)
        if not self._recent:
            return 0.0
        return sum(n for _, n in self._recent) / max(now - self._recent[0][0], 0.5)

    def _forget_old(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - RATE_WINDOW_S:
            self._recent.popleft()

    def problem(self) -> str:
        """Why nothing comes, in words; empty while something does."""
        tracker = self.tracker
        if tracker is None or tracker.complete or tracker.fetching:
            return ""
        holders = self._dialler.holders
        bad = [p for p in holders if self._dialler.is_banned(p)]
        tail = f" ({len(bad)} sent bad data and are not asked)" if bad else ""
        tail += f" ({self._outside.problem})" if self._outside and self._outside.problem else ""
        if not holders:
            return f"no node has it any more, waiting for one to return{tail}"
        if not self.links:
            if not self._dialler.all_failed:
                return ""  # about to be dialled, or being dialled for the first time
            return f"none of the {len(holders)} nodes that have it can be reached, waiting{tail}"
        if any(peer not in tracker.peers for peer in self.links):
            return ""  # it has not said yet what it has
        if missing := tracker.missing_everywhere():
            return f"{missing} pieces are on none of the connected nodes, waiting{tail}"
        return tail.strip(" ()")

    # What others do

    def set_holders(self, holders: frozenset[NodeId]) -> None:
        """Nodes that have at least part of it. One that is new is dialled at once."""
        self._dialler.set_holders(holders - {self._me})

    def now_complete(self, source: CompleteFile) -> None:
        """The file has its final name: serve from there."""
        self._complete = source
        self.tracker = None
        for link in list(self.links.values()):
            self._end_if_done(link)
        self.poke.set()

    def stop(self, reason: str) -> None:
        """Ends all links after telling why; `run` returns."""
        self._stopping = True
        self.have.clear()
        self._n_bytes = 0
        for link in self.links.values():
            link.bye(reason)
        if self._nursery is not None:
            self._nursery.cancel_scope.deadline = trio.current_time() + 1.0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled, stopped, or complete and idle."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if self._arrivals is not None:
                nursery.start_soon(self._sync, self._arrivals)
            if self._outside is not None:
                for _ in range(self._limits.outside):
                    nursery.start_soon(self._outside.run)
            nursery.start_soon(self._tick)
            task_status.started()
            await self._drive()
            nursery.cancel_scope.cancel()
        self._nursery = None

    async def accept(self, peer: NodeId, framed: Framed, hello: Hello) -> None:
        """Serves a stream that a peer opened; returns when the conversation is over."""
        refusal = self._refusal(peer)
        if refusal or self._nursery is None or self._stopping:
            await framed.send(Bye(refusal or "this model is being closed"), deadline_s=DIAL_S)
            return
        if peer in self._dialler.under_way:
            self._dialler.under_way[peer].cancel()
        link = self._add_link(peer, framed, dialled=False, first=hello)
        self._nursery.start_soon(self._run_link, link)
        try:
            await link.finished.wait()
        finally:
            link.drop()
            with trio.move_on_after(LEAVE_S, shield=True):
                await link.finished.wait()

    # Links

    def _refusal(self, peer: NodeId) -> str:
        """Of two streams between the same two nodes, the one that the lower id opened stays."""
        if self._dialler.is_banned(peer):
            return "you sent bad data"
        link = self.links.get(peer)
        if self._me < peer and (peer in self._dialler.under_way or (link is not None and link.dialled)):
            return "we are connected already"
        if len(self.links) >= MAX_LINKS and link is None:
            return f"{MAX_LINKS} nodes are connected"
        return ""

    def _add_link(self, peer: NodeId, framed: Framed, *, dialled: bool, first: Hello | None = None) -> Link:
        old = self.links.pop(peer, None)
        if old is not None:
            self._forget(old)
            old.drop()
        conversation = Conversation(self.manifest.root, self._lengths)
        conversation.hello(self.have, self.tracker.fetching if self.tracker else ())
        source = self._arrivals.source() if self._arrivals is not None else None
        intake = Intake(source, self._lengths, conversation.wants)
        link = Link(peer, framed, conversation, intake, self, uploads=self._uploads, dialled=dialled, first=first)
        self.links[peer] = link
        return link

    async def _run_link(self, link: Link) -> None:
        await link.run()
        if self.links.get(link.peer) is link:
            del self.links[link.peer]
            self._forget(link)
            self._dialler.ended(link.peer, link.ended)
        self.poke.set()

    def _forget(self, link: Link) -> None:
        link.intake.close()
        if self.tracker is not None and link.peer in self.tracker.peers:
            self.tracker.peer_left(link.peer)
            self.fill_all()

    async def _dial(self, peer: NodeId) -> None:
        stream = await self._dialler.open(peer)
        if stream is None:
            return
        try:
            if peer not in self.links:
                framed = Framed(
                    stream, CODEC, max_header=MAX_SWARM_HEADER, max_payload=BLOCK_BYTES, read_size=BLOCK_BYTES
                )
                await self._run_link(self._add_link(peer, framed, dialled=True))
        finally:
            await close_quietly(stream)

    def _stir(self) -> None:
        self.poke.set()

    def _forgive(self, peer: NodeId) -> None:
        if self.tracker is not None:
            self.tracker.forgive(peer)

    # The tasks that watch the clock

    async def _drive(self) -> None:
        assert self._nursery is not None
        while True:
            self.poke = trio.Event()
            now = trio.current_time()
            if self.tracker is not None and not self.tracker.complete and not self._stopping:
                self._leave_slow(now)
                self.fill_all()
                for peer in self._dialler.begin(self.links, MAX_LINKS - len(self.links), now):
                    self._nursery.start_soon(self._dial, peer)
            deadline = self._next_deadline(now)
            with trio.move_on_at(deadline) as scope:
                await self.poke.wait()
            if scope.cancelled_caught and self._complete is not None and not self.links:
                return
            await trio.sleep(BREATH_S)

    async def _tick(self) -> None:
        while True:
            await trio.sleep(NEWS_S if self.links else IDLE_NEWS_S)
            now = trio.current_time()
            for link in self.links.values():
                link.tick(now)

    def _next_deadline(self, now: float) -> float:
        if self._complete is not None:
            return math.inf if self.links else now + IDLE_S
        if self.tracker is None or self.tracker.complete:
            return math.inf
        return min(self._dialler.next_due(self.links, now), self.tracker.next_deadline(now))

    def _leave_slow(self, now: float) -> None:
        assert self.tracker is not None
        for name in self.tracker.expire(now):
            link = self.links.pop(NodeId(name))
            log.info("%s: %s is too slow, its pieces are asked elsewhere", self.manifest.name, link.peer.short)
            self._dialler.ended(link.peer, PeerSilent("stalled"))
            self._forget(link)
            link.drop()

    # What comes

    def on_effects(self, link: Link, effects: Sequence[Effect]) -> None:
        """Called by a link for everything that comes."""
        for effect in effects:
            if self.links.get(link.peer) is not link:
                return
            if self.tracker is not None:
                self._on_effect(link, self.tracker, effect)
            if isinstance(effect, Joined | Updated):
                self._end_if_done(link)
        self._fill(link)

    def _on_effect(self, link: Link, tracker: PieceTracker, effect: Effect) -> None:
        match effect:
            case Progress(n_bytes):
                tracker.progress(link.peer, trio.current_time(), n_bytes)
                self.came(n_bytes)
            case Received(piece, Landed() as landed, _, last):
                self._take(link, tracker, piece, landed, last)
            case Updated(has, fetching):
                tracker.peer_has(link.peer, has)
                tracker.peer_fetching(link.peer, fetching)
                self._ask_rarer(tracker, link.peer, has)
            case Joined(has, fetching):
                tracker.peer_joined(link.peer)
                tracker.peer_has(link.peer, has)
                tracker.peer_fetching(link.peer, fetching)
            case Refused(piece):
                link.intake.drop(piece)
                tracker.rejected(link.peer, piece)
                self.poke.set()

    def _ask_rarer(self, tracker: PieceTracker, peer: NodeId, has: Sequence[int]) -> None:
        """What `peer` can give now need not be waited for at those who have what nobody else has."""
        for other, piece in tracker.better_elsewhere(peer, has):
            link = self.links.get(NodeId(other))
            if link is not None:
                link.conversation.cancel(piece)
                link.wake()
                tracker.returned(other, piece)
                self._fill(link)

    def _take(self, link: Link, tracker: PieceTracker, piece: int, landed: Landed, last: bool) -> None:
        if landed.failure is not None:
            self._fail(landed.failure)
            return
        if last:
            tracker.arrived(link.peer, piece)
        self._judge(link.peer, piece, landed.found)
        if landed.found is Found.BAD:
            if tracker.bad(link.peer, piece):
                self._dialler.ban(link.peer)
                link.drop()
            self.fill_all()
        elif last and landed.found is Found.MORE:  # not all of it was taken
            tracker.returned(link.peer, piece)

    async def store(self, source: str, piece: int, data: bytes) -> Found:
        """A whole piece that came by another way."""
        if self._arrivals is None or self.failure is not None:
            return Found.MORE
        try:
            found = await trio.to_thread.run_sync(self._arrivals.source().take, piece, data)
        except (DiskFull, OSError) as exc:
            self._fail(exc)
            return Found.MORE
        self._judge(source, piece, found)
        return found

    def _judge(self, source: str, piece: int, found: Found) -> None:
        if found is Found.BAD:
            log.warning("%s: piece %d from %s is not what it should be", self.manifest.name, piece, source[:10])
        elif found is Found.GOOD and self.failure is None and piece not in self.have:
            self._is_here(source, piece)

    async def _sync(self, arrivals: Arrivals) -> None:
        try:
            await arrivals.run()
        except (DiskFull, OSError) as exc:
            self._fail(exc)

    def _is_here(self, source: str, piece: int) -> None:
        tracker = self.tracker
        if tracker is None:
            return
        if self._arrivals is not None:
            self._arrivals.noted()
        self._dialler.useful(source)
        self.traffic.from_each_peer[source] += self._lengths[piece]
        self.have.add(piece)
        self._n_bytes += self._lengths[piece]
        if self._part is not None:
            self._part.have.add(piece)
        for peer, _ in tracker.finished(piece):
            other = self.links.get(NodeId(peer)) if peer != OUTSIDE else None
            if other is not None:
                other.conversation.cancel(piece)
                other.wake()
                self._fill(other)
        fetching = tracker.fetching
        for other in self.links.values():
            other.conversation.we_have([piece])
            other.conversation.we_fetch(fetching)
            other.has_news()
        self.poke.set()
        self._on_piece()
        if tracker.complete:
            self.leeched.set()
            for other in list(self.links.values()):
                self._end_if_done(other)

    def came(self, n_bytes: int) -> None:
        """Counts for the rate."""
        now = trio.current_time()
        self._forget_old(now)
        if n_bytes:
            self._recent.append((now, n_bytes))

    @property
    def dialling(self) -> bool:
        """Peers are about to be connected."""
        return any(peer not in self.links for peer in self._dialler.under_way)

    def tell_fetching(self, tracker: PieceTracker) -> None:
        fetching = tracker.fetching
        for other in self.links.values():
            other.conversation.we_fetch(fetching)
            other.has_news()

    def _fail(self, exc: TightwadError | OSError) -> None:
        if isinstance(exc, OSError):
            exc = TightwadError(f"{self.manifest.name} cannot be written: {exc.strerror or exc}")
        self.failure = self.failure or exc
        self.leeched.set()

    def _fill(self, link: Link) -> None:
        """Asks a peer for as much as it should be asked for now."""
        tracker = self.tracker
        if tracker is None or self.failure is not None or self.links.get(link.peer) is not link:
            return
        asked = False
        while link.conversation.may_ask and link.peer in tracker.peers:
            piece = tracker.choose(link.peer, trio.current_time())
            if piece is None:
                break
            if link.conversation.is_asked(piece):  # cancelled, and the answer still on its way
                tracker.returned(link.peer, piece)
                break
            link.conversation.request(piece)
            asked = True
        if asked:
            self.tell_fetching(tracker)
            link.wake()
            self.poke.set()

    def fill_all(self) -> None:
        for link in list(self.links.values()):
            self._fill(link)

    def _end_if_done(self, link: Link) -> None:
        if len(self.have) == len(self._lengths) and link.conversation.peer_complete:
            link.bye("complete")

    # What goes

    async def read(self, piece: int, offset: int) -> bytes | None:
        """The next bytes of a piece for a peer, at most `READ_BYTES`; None if they are no longer what they were, in
        which case nothing more is offered."""
        if piece not in self.have:
            return None
        source = self._complete or self._part
        assert source is not None
        n_bytes = min(READ_BYTES, self._lengths[piece] - offset)
        data = await trio.to_thread.run_sync(source.read, piece, offset, n_bytes)
        if data is None and self._complete is source:
            self._on_damage()
            self.stop("the file changed")
        return data

    def copies(self, piece: int) -> int:
        """How many connected peers have it."""
        return sum(link.conversation.peer_has(piece) for link in self.links.values())

    def uploaded(self, link: Link, n_bytes: int) -> None:
        self.traffic.to_each_peer[link.peer] += n_bytes
