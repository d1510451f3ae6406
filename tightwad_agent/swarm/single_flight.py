"""One download of a source for the whole cluster: the claims of this node, and what to do while others have the office.

`flight` has the rule. The owner of this object feeds it what other nodes' rows say and puts `fetching()` into the own
row; no node learns more of a source than its hash.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from tightwad_agent.errors import OriginError, TightwadError, UsageError
from tightwad_agent.ids import NodeId
from tightwad_agent.swarm import flight
from tightwad_agent.swarm.flight import N_DIGEST, Claim, Elsewhere, Flight, Holding
from tightwad_agent.swarm.store import Entry
from tightwad_agent.wire.rows import MAX_FETCHING, Fetching

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int | None], None]
"""(what is being done, bytes done, bytes in all where known)"""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Work(Generic[T]):
    """How to get one source. `fetch` may be cancelled at any point and goes on from there when called again; `keep`
    makes what it brought a model. `current` is the source with the version it has now (see `HeldModel.source`). `take`
    gets a model from other nodes, None if it does not come."""

    digest: str
    fetch: Callable[[Progress], Awaitable[T]]
    keep: Callable[[T, Progress], Awaitable[Entry]]
    current: Callable[[], Awaitable[str]]
    take: Callable[[Holding, Progress], Awaitable[Entry | None]]


class SingleFlight:
    """See the module. `wall` is Unix time in seconds; `changed(at_once)` is told when `fetching()` is another."""

    def __init__(self, me: NodeId, wall: Callable[[], float], changed: Callable[[bool], None]) -> None:
        self._me = me
        self._wall = wall
        self._changed = changed
        self._own: dict[str, Claim] = {}
        self._elsewhere = Elsewhere()
        self._news = trio.Event()

    def fetching(self) -> tuple[Fetching, ...]:
        """For the own row."""
        return tuple(Fetching(d, c.since, c.done, c.total) for d, c in self._own.items())[:MAX_FETCHING]

    def set_elsewhere(self, elsewhere: Elsewhere) -> None:
        """What other nodes say."""
        if elsewhere != self._elsewhere:
            self._elsewhere = elsewhere
            self._news.set()
            self._news = trio.Event()

    async def bring(self, work: Work[T], held_here: tuple[Holding, ...], progress: Progress) -> Entry:
        """The model of a source: from other nodes where they have it, else downloaded by one of those that want it.

        `held_here` are the models of this node that came from it. Raises what `fetch`, `keep` and `take` raise.
        """
        known = (*held_here, *self._holdings(work.digest))
        if known and (entry := await self._if_current(work, known, progress)) is not None:
            return entry
        with self._claimed(work.digest):
            await self._settle(progress)
            return await self._take_part(work, set(known), progress)

    async def _if_current(self, work: Work[T], known: tuple[Holding, ...], progress: Progress) -> Entry | None:
        """What was downloaded before, if the source is still what it was, or does not answer."""
        progress("asking whether it changed", 0, None)
        try:
            current = await work.current()
        except OriginError as exc:
            log.info("taken as it was: %s", exc.message)
            current = ""
        for holding in known:
            if not current or (holding.source == current and len(current) > N_DIGEST):
                entry = await work.take(holding, progress)
                if entry is not None:
                    return entry
        return None

    # Claims

    @contextmanager
    def _claimed(self, digest: str) -> Iterator[None]:
        if len(self._own) >= MAX_FETCHING:
            raise UsageError(f"{MAX_FETCHING} sources are being added already", hint="Wait for one of them.")
        since = flight.since_for(self._wall(), self._elsewhere.claims.get(digest, ()))
        self._own[digest] = Claim(self._me, "this node", since, 0, 0)
        self._changed(True)
        try:
            yield
        finally:
            del self._own[digest]
            self._changed(True)

    def _claims(self, digest: str) -> tuple[Claim, ...]:
        return (self._own[digest], *self._elsewhere.claims.get(digest, ()))

    def _holdings(self, digest: str) -> tuple[Holding, ...]:
        return self._elsewhere.holdings.get(digest, ())

    async def _settle(self, progress: Progress) -> None:
        if self._elsewhere.n_nodes:
            progress("asking whether another node downloads it", 0, None)
            await trio.sleep(flight.SETTLE_S)

    # The office

    async def _take_part(self, work: Work[T], ignored: set[Holding], progress: Progress) -> Entry:
        office = Flight()
        while True:
            holding = self._new_holding(work.digest, ignored)
            if holding is not None:
                entry = await work.take(holding, progress)
                if entry is not None:
                    return entry
                ignored.add(holding)
            elif self._is_mine(office, work.digest):
                fetched = await self._fetch(office, work, ignored, progress)
                if fetched is not None:
                    return await work.keep(fetched.value, self._telling(work.digest, progress, fetched.n_told))
            else:
                await self._wait(office, work.digest, progress)

    def _new_holding(self, digest: str, ignored: set[Holding]) -> Holding | None:
        return next((h for h in self._holdings(digest) if h not in ignored), None)

    def _is_mine(self, office: Flight, digest: str) -> bool:
        return office.look(self._claims(digest), trio.current_time()) == self._me

    async def _wait(self, office: Flight, digest: str, progress: Progress) -> None:
        owner = next((c for c in self._claims(digest) if c.node == office.owner), None)
        if owner is not None:
            doing = "reads what it downloaded" if 0 < owner.total <= owner.done else "downloads it"
            done = min(owner.done, owner.total or owner.done)
            progress(f"waiting for {owner.name}, which {doing}", done, owner.total or None)
        with trio.move_on_at(office.deadline):
            await self._news.wait()

    async def _fetch(
        self, office: Flight, work: Work[T], ignored: set[Holding], progress: Progress
    ) -> _Fetched[T] | None:
        """What came, or None if another node has the office by now or has the model."""
        fetched: _Fetched[T] | None = None
        failure: TightwadError | OSError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, office, work.digest, ignored, nursery.cancel_scope)
            try:
                value = await work.fetch(self._telling(work.digest, progress))
                fetched = _Fetched(value, self._own[work.digest].done)
            except (TightwadError, OSError) as exc:
                failure = exc
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return fetched

    async def _watch(self, office: Flight, digest: str, ignored: set[Holding], scope: trio.CancelScope) -> None:
        while self._is_mine(office, digest) and self._new_holding(digest, ignored) is None:
            with trio.move_on_at(office.deadline):
                await self._news.wait()
        scope.cancel()

    def _telling(self, digest: str, progress: Progress, before: int = 0) -> Progress:
        """Progress that also goes into the own claim. There `done` goes on beyond `total` while what came is read."""
        stage_now, at = "", 0

        def tell(stage: str, done: int, total: int | None) -> None:
            nonlocal before, stage_now, at
            if stage != stage_now:
                before, stage_now = before + at, stage
            at = done
            claim = self._own[digest]
            known = total or 0 if stage == "fetching" else claim.total
            self._own[digest] = claim._replace(done=before + done, total=known)
            self._changed(False)
            progress(stage, done, total)

        return tell


@dataclass(frozen=True, slots=True)
class _Fetched(Generic[T]):
    value: T
    n_told: int
    """`done` of the claim when it was there."""
