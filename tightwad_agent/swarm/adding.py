"""`add`: from a path at once; from elsewhere together with the other nodes, so that each source is downloaded once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Protocol

import trio

from tightwad_agent.errors import DiskFull
from tightwad_agent.ids import ModelId, NodeId
from tightwad_agent.swarm import flight, origin
from tightwad_agent.swarm.flight import Holding
from tightwad_agent.swarm.origin import Landed, LocalFile, Origins, Package, Progress, WebFile
from tightwad_agent.swarm.single_flight import SingleFlight, Work
from tightwad_agent.swarm.sources import Sources, digest_of, source_of
from tightwad_agent.swarm.store import Entry, Store
from tightwad_agent.swarm.transfer import Phase, TransferStatus
from tightwad_agent.wire.rows import Fetching, HeldModel, NodeRow

TAKE_LOOK_S = 0.5
TAKE_STALL_S = 180.0
"""A model that other nodes have, but of which no piece comes for so long, is downloaded instead."""
MAX_PROBLEM = 160
_WAITING = (Phase.IDLE, Phase.LOOKING, Phase.FETCHING)
"""Elsewhere the node itself works, for as long as it takes."""


class Transfers(Protocol):
    """What `add` wants of the swarm: a model from other nodes."""

    def take(self, model: ModelId) -> TransferStatus:
        """Fetches it, if it does not do so already; how far that is."""

    def leave(self, model: ModelId) -> None:
        """Nobody waits for it in `add` any more."""


class Adder:
    """See the module. `changed(at_once)` is told when `fetching` or `with_source` give something else."""

    def __init__(
        self, store: Store, origins: Origins, transfers: Transfers, me: NodeId, changed: Callable[[bool], None]
    ) -> None:
        self._store = store
        self._origins = origins
        self._transfers = transfers
        self._changed = changed
        self._sources = Sources(store)
        self._flights = SingleFlight(me, time.time, changed)
        self._busy: dict[str, trio.Lock] = {}

    def load(self) -> None:
        """After the store was opened. Blocks."""
        self._sources.load()

    def fetching(self) -> tuple[Fetching, ...]:
        """What this node downloads or waits for, for its row."""
        return self._flights.fetching()

    def with_source(self, held: HeldModel) -> HeldModel:
        source = self._sources.of(held.model) if held.complete else ""
        return replace(held, source=source) if source else held

    def set_elsewhere(self, rows: Iterable[NodeRow]) -> None:
        """`rows` are those of the other living nodes."""
        self._flights.set_elsewhere(flight.read_rows(rows))

    async def bring(self, spec: str, progress: Progress) -> Entry:
        """Makes the model of `spec` part of the store. Raises `UsageError`, `ModelError` and kin, `DiskFull`."""
        parsed = self._origins.parse(spec)
        if isinstance(parsed, LocalFile):
            return await origin.share(self._store, parsed.path, progress)
        digest = digest_of(origin.canonical(parsed))
        lock = self._busy.setdefault(digest, trio.Lock())
        try:
            async with lock:
                return await self._flights.bring(self._work(parsed, digest), self._sources.held(digest), progress)
        finally:
            if not lock.locked():
                self._busy.pop(digest, None)

    def _work(self, parsed: WebFile | Package, digest: str) -> Work[Landed]:
        async def current() -> str:
            return source_of(digest, await self._origins.current(parsed))

        return Work(
            digest,
            fetch=partial(self._origins.fetch, self._store, parsed),
            keep=partial(self._keep, digest),
            current=current,
            take=partial(self._take, parsed),
        )

    async def _keep(self, digest: str, landed: Landed, progress: Progress) -> Entry:
        entry = await origin.keep(self._store, landed, progress)
        await self._note(entry, source_of(digest, landed.version))
        return entry

    async def _note(self, entry: Entry, source: str) -> None:
        await trio.to_thread.run_sync(self._sources.note, entry.root, source)
        self._changed(True)

    # From other nodes

    async def _take(self, parsed: WebFile | Package, holding: Holding, progress: Progress) -> Entry | None:
        try:
            entry = await self._until_here(holding, progress)
        finally:
            self._transfers.leave(holding.model)
        if entry is not None:
            await self._note(entry, holding.source)
            await trio.to_thread.run_sync(self._origins.forget, self._store, parsed)
        return entry

    async def _until_here(self, holding: Holding, progress: Progress) -> Entry | None:
        """None if nothing comes. Raises `DiskFull` if there is no room."""
        if (entry := self._store.entry(holding.model)) is not None:
            return entry
        before, moved_at = -1, trio.current_time()
        while (status := self._transfers.take(holding.model)).phase is not Phase.COMPLETE:
            if status.phase is Phase.NO_ROOM:
                raise DiskFull(f"{holding.name} is on other nodes, but {status.problem}")
            if status.phase is Phase.FAILED:
                return None
            if status.done != before or status.phase not in _WAITING:
                before, moved_at = status.done, trio.current_time()
            elif trio.current_time() - moved_at > TAKE_STALL_S:
                return None
            problem = f" ({status.problem[:MAX_PROBLEM]})" if status.problem else ""
            progress(f"taking it from other nodes{problem}", status.done, status.total or None)
            await trio.sleep(TAKE_LOOK_S)
        return self._store.entry(holding.model)
