"""One model on its way to this node, or from it: manifest, room on disk, exchange, whole-file check, final name.

`run` does the whole of it once, from whatever was there before; each step can be interrupted at any point and is taken
up by the next `run`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum

import trio

from tightwad_agent.errors import BadManifest, DiskFull, PeerError, PeerRefused, ProtocolError, TightwadError
from tightwad_agent.ids import ModelId, NodeId
from tightwad_agent.streams import Framed, OpenStream, close_quietly, peer_errors
from tightwad_agent.swarm.exchange import SERVICE, Exchange, Traffic
from tightwad_agent.swarm.manifest import Manifest, decode
from tightwad_agent.swarm.origin import ticker
from tightwad_agent.swarm.outside import Outside
from tightwad_agent.swarm.part import PartFile
from tightwad_agent.swarm.pieces import Limits, Rng
from tightwad_agent.swarm.reuse import take_local
from tightwad_agent.swarm.source import CompleteFile
from tightwad_agent.swarm.store import Entry, Store
from tightwad_agent.swarm.uploads import Uploads
from tightwad_agent.wire.rows import HeldModel
from tightwad_agent.wire.swarm import CODEC, MAX_MANIFEST_BYTES, MAX_SWARM_HEADER, Bye, GetManifest, ManifestIs

log = logging.getLogger(__name__)

MANIFEST_S = 20.0
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 15.0
ROOM_CHECK_S = 5.0
FAILED_RETRY_S = 120.0


class Phase(StrEnum):
    """What a transfer is doing, in one word or two, for people and programs."""

    IDLE = "idle"
    LOOKING = "looking"  # for its manifest
    CHECKING = "checking"  # pieces that were here before
    REUSING = "reusing"  # pieces that other files on this disk have
    FETCHING = "fetching"
    FINISHING = "finishing"  # its name
    COMPLETE = "complete"
    NO_ROOM = "no room"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class TransferStatus:
    """One model that came or comes from peers, or goes to them. Bytes; `rate` in bytes per second."""

    model: ModelId
    name: str
    phase: Phase
    done: int
    total: int
    rate: float
    sources: int
    from_each_peer: dict[str, int]
    uploaded: int
    problem: str
    reused: int = 0
    """Bytes that came from other files on this disk."""


@dataclass(frozen=True, slots=True)
class Around:
    """What every transfer of a node shares. `changed(at_once)` tells the owner that `held` is another."""

    store: Store
    open_stream: OpenStream
    me: NodeId
    rng: Rng
    limits: Limits
    changed: Callable[[bool], None]
    uploads: Uploads = field(default_factory=Uploads)
    outside: Callable[[Manifest], AbstractAsyncContextManager[Outside | None]] = lambda _manifest: nullcontext()
    """Where else a model's pieces may be asked for, open as long as they are fetched."""


class Transfer:
    """All that is known of one model beside the disk. At most one `run` at a time, started by the service."""

    def __init__(self, model: ModelId, around: Around) -> None:
        self.model = model
        self.wanted = False
        self.phase = Phase.IDLE
        self.exchange: Exchange | None = None
        self.scope: trio.CancelScope | None = None
        """Of the `run` that is going on."""
        self.not_before = -math.inf
        """No run starts earlier: the last one failed for a reason that does not pass by itself."""
        self.ready = trio.Event()
        """An exchange is there, or the run has ended without one."""
        self.ended = trio.Event()
        self._around = around
        self._traffic = Traffic()
        self._holders: frozenset[NodeId] = frozenset()
        self._holders_changed = trio.Event()
        self._manifest: Manifest | None = None
        self._n_checked = 0
        self._n_reused = 0
        self._problem = ""

    # What others see and say

    @property
    def is_leeching(self) -> bool:
        return self.scope is not None and self.phase not in (Phase.COMPLETE, Phase.IDLE)

    def held(self) -> HeldModel | None:
        """What of it is here and good, while it is on its way."""
        if self.exchange is None:
            return None
        m = self.exchange.manifest
        return HeldModel(m.root, m.name, m.size, self.exchange.n_bytes, m.facts)

    def status(self) -> TransferStatus:
        now = trio.current_time()
        exchange = self.exchange
        entry = None if self.is_leeching else self._around.store.entry(self.model)
        known = entry or self._manifest
        done = exchange.n_bytes if exchange else self._n_checked
        return TransferStatus(
            model=self.model,
            name=str(known.name) if known else self.model.short,
            phase=Phase.COMPLETE if entry else self.phase,
            done=entry.size if entry else done,
            total=known.size if known else 0,
            rate=exchange.rate(now) if exchange else 0.0,
            sources=exchange.sources if exchange else 0,
            from_each_peer=dict(self._traffic.from_each_peer),
            uploaded=self._traffic.to_each_peer.total(),
            problem=self._problem or (exchange.problem() if exchange else ""),
            reused=self._n_reused,
        )

    def set_holders(self, holders: frozenset[NodeId]) -> None:
        """Nodes that have at least part of it."""
        holders -= {self._around.me}
        if holders == self._holders:
            return
        self._holders = holders
        self._holders_changed.set()
        if self.exchange is not None:
            self.exchange.set_holders(holders)

    async def stop(self, reason: str) -> None:
        """Ends a run, telling those it serves why; returns when nothing of it is left."""
        if self.exchange is not None and not self.is_leeching:
            self.exchange.stop(reason)
            with trio.move_on_after(2.0):
                await self.ended.wait()
        if self.scope is not None:
            self.scope.cancel()
            await self.ended.wait()

    # One run

    def begin(self) -> None:
        """Must be called just before `run` is started."""
        self.scope, self.ready, self.ended = trio.CancelScope(), trio.Event(), trio.Event()

    async def run(self) -> None:
        """Serves the model if it is complete here, else fetches it (and serves it then, while somebody asks)."""
        assert self.scope is not None
        try:
            with self.scope:
                entry = self._around.store.entry(self.model)
                if entry is not None:
                    await self._serve(entry)
                elif self.wanted:
                    await self._leech()
        finally:
            if self.phase not in (Phase.COMPLETE, Phase.FAILED):
                self.phase = Phase.IDLE
            self.exchange = self.scope = None
            self.ready.set()
            self.ended.set()
            self._around.changed(True)

    async def _serve(self, entry: Entry) -> None:
        manifest = await trio.to_thread.run_sync(self._around.store.manifest, self.model)
        if manifest is None:
            return  # the service makes it anew
        self._manifest, self.phase, self._problem = manifest, Phase.COMPLETE, ""
        exchange = self._exchange(manifest, complete=CompleteFile(entry, manifest))
        async with trio.open_nursery() as nursery:
            await nursery.start(exchange.run)
            self.exchange = exchange
            self.ready.set()

    async def _leech(self) -> None:
        while True:
            try:
                self._manifest = await self._find_manifest()
                await self._fetch(self._manifest)
                return
            except DiskFull as exc:
                self._pause(Phase.NO_ROOM, exc)
                await self._wait_for_room()
            except BadManifest as exc:
                self._pause(Phase.FAILED, exc)
                self.not_before = trio.current_time() + FAILED_RETRY_S
                return
            except (TightwadError, OSError) as exc:
                self._pause(Phase.LOOKING, exc)
                await trio.sleep(LAST_RETRY_S)

    def _pause(self, phase: Phase, exc: Exception) -> None:
        log.warning("%s: %s", self._manifest.name if self._manifest else self.model.short, exc)
        self.phase, self._problem = phase, exc.message if isinstance(exc, TightwadError) else str(exc)
        self.exchange = None
        self._around.changed(True)

    async def _wait_for_room(self) -> None:
        store, manifest = self._around.store, self._manifest
        assert manifest is not None
        while True:
            await trio.sleep(ROOM_CHECK_S)
            if not await trio.to_thread.run_sync(store.missing_room, manifest):
                return

    # Manifest

    async def _find_manifest(self) -> Manifest:
        self.phase = Phase.LOOKING
        delay = FIRST_RETRY_S
        while True:
            self._holders_changed = trio.Event()
            manifest = await trio.to_thread.run_sync(self._around.store.manifest, self.model)
            manifest = manifest or await self._ask_around()
            if manifest is not None:
                self._problem = ""
                return manifest
            with trio.move_on_after(delay):
                await self._holders_changed.wait()
            delay = min(LAST_RETRY_S, delay * 2)

    async def _ask_around(self) -> Manifest | None:
        holders = sorted(self._holders)
        self._problem = "" if holders else "no node has it, waiting for one"
        first = self._around.rng.randrange(len(holders)) if holders else 0
        for peer in holders[first:] + holders[:first]:
            try:
                manifest = await self._ask_manifest(peer)
            except (PeerError, BadManifest) as exc:
                self._problem = f"{peer.short} has not given the manifest: {exc.message}"
                log.info("%s: %s", self.model.short, self._problem)
                continue
            await trio.to_thread.run_sync(self._around.store.keep_manifest, manifest)
            return manifest
        return None

    async def _ask_manifest(self, peer: NodeId) -> Manifest:
        with peer_errors(MANIFEST_S):
            stream = await self._around.open_stream(peer, SERVICE, {"model": str(self.model)})
            try:
                framed = Framed(stream, CODEC, max_header=MAX_SWARM_HEADER, max_payload=MAX_MANIFEST_BYTES)
                await framed.send(GetManifest(self.model))
                message, payload = await framed.receive()
            finally:
                await close_quietly(stream)
        if isinstance(message, Bye):
            raise PeerRefused(message.reason)
        if not isinstance(message, ManifestIs):
            raise ProtocolError(f"swarm: {type(message).__name__} in place of a manifest")
        return await trio.to_thread.run_sync(decode, payload, self.model)

    # Pieces

    async def _fetch(self, manifest: Manifest) -> None:
        self.phase = Phase.CHECKING
        part = await trio.to_thread.run_sync(
            self._around.store.open_part, manifest, ticker("checking", self._on_checked, manifest.size)
        )
        try:
            await self._reuse(part)
            async with self._around.outside(manifest) as outside:
                failure = await self._run_exchange(part, outside)
        finally:
            self.exchange = None
            part.close()
        if failure is not None:
            raise failure

    async def _run_exchange(self, part: PartFile, outside: Outside | None) -> Exception | None:
        """Fetches what is missing, then serves while somebody asks; what went wrong, if something did."""
        exchange = self._exchange(part.manifest, part=part, outside=outside)
        async with trio.open_nursery() as nursery:
            await nursery.start(exchange.run)
            self.exchange, self.phase, self._problem = exchange, Phase.FETCHING, ""
            self.ready.set()
            self._around.changed(True)
            await exchange.leeched.wait()
            failure = exchange.failure or await self._finish(part, exchange)
            if failure is not None:
                nursery.cancel_scope.cancel()
        return failure

    async def _reuse(self, part: PartFile) -> None:
        """Takes what other files on this disk have of it."""
        store, before, rotten = self._around.store, part.n_bytes, list[ModelId]()
        self.phase, self._n_checked = Phase.REUSING, before
        tick = ticker("reusing", lambda what, done, total: self._on_checked(what, before + done, total), None)
        try:
            await trio.to_thread.run_sync(
                lambda: take_local(part, store.elsewhere(self.model), tick, on_rot=rotten.append)
            )
        finally:
            self._n_reused += part.n_bytes - before
            for model in rotten:
                store.mark_damaged(model)
                self._around.changed(True)
        if part.n_bytes > before:
            log.info("%s: %d bytes were on this disk already", part.manifest.name, part.n_bytes - before)

    def _on_checked(self, _what: str, done: int, _total: int | None) -> None:
        self._n_checked = done

    async def _finish(self, part: PartFile, exchange: Exchange) -> Exception | None:
        """The final name; what went wrong, if it did."""
        store = self._around.store
        self.phase = Phase.FINISHING
        try:
            entry = await trio.to_thread.run_sync(store.finish, part)
            manifest = await trio.to_thread.run_sync(store.manifest, self.model)
        except (TightwadError, OSError) as exc:
            return exc
        self.phase, self._manifest = Phase.COMPLETE, manifest or part.manifest
        exchange.now_complete(CompleteFile(entry, part.manifest))
        log.info("%s is complete: %s", entry.name, entry.where)
        self._around.changed(True)
        return None

    def _exchange(
        self,
        manifest: Manifest,
        *,
        part: PartFile | None = None,
        complete: CompleteFile | None = None,
        outside: Outside | None = None,
    ) -> Exchange:
        exchange = Exchange(
            manifest,
            self._around.me,
            self._around.open_stream,
            self._around.rng,
            part=part,
            complete=complete,
            traffic=self._traffic,
            limits=self._around.limits,
            uploads=self._around.uploads,
            on_piece=lambda: self._around.changed(False),
            on_damage=self._on_damage,
            outside=outside,
        )
        exchange.set_holders(self._holders)
        return exchange

    def _on_damage(self) -> None:
        self._around.store.mark_damaged(self.model)
        self._around.changed(True)
