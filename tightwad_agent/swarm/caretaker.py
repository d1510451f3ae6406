"""Care of the disk in a running node: comparing, repairing and cleaning up, in step with its transfers.

Another node asks for a comparison by asking again and again for its progress, under a name of its own choice for the
run; one that nobody asks about for `ORPHAN_S` ends.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import trio

from tightwad_agent.errors import ModelError, ProtocolError, TightwadError
from tightwad_agent.ids import ModelId
from tightwad_agent.swarm import care
from tightwad_agent.swarm.care import Litter, Verdict
from tightwad_agent.swarm.origin import Progress, ticker
from tightwad_agent.swarm.store import Store
from tightwad_agent.swarm.transfer import Transfer
from tightwad_agent.wire.codec import NATURAL, Max, Mismatch, from_plain, to_plain

log = logging.getLogger(__name__)

MAX_RANGES = 64
"""Damaged ranges that are named; the rest is counted."""
MAX_RUNS = 32
MAX_TEXT = 500
ORPHAN_S = 20.0

Plain = dict[str, Any]
Natural = Annotated[int, NATURAL]


@dataclass(frozen=True, slots=True)
class Range:
    """A damaged piece: `length` bytes of the file from `offset`."""

    piece: Natural
    offset: Natural
    length: Natural


@dataclass(frozen=True, slots=True)
class Finding:
    """What a comparison found. `damaged` of `pieces` are not what they were, the first of them are in `ranges`;
    `problem`: what else is wrong, `action`: what is done about it, or what to do."""

    good: bool
    in_place: bool
    pieces: Natural
    damaged: Natural
    ranges: Annotated[tuple[Range, ...], Max(MAX_RANGES)] = ()
    problem: Annotated[str, Max(MAX_TEXT)] = ""
    action: Annotated[str, Max(MAX_TEXT)] = ""


@dataclass
class _Run:
    """A comparison that somebody asked for."""

    model: ModelId
    asked_at: float
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    done: int = 0
    total: int = 0
    result: Finding | None = None
    error: TightwadError | None = None


class Caretaker:
    """See the module. `transfers`: those of the node, of which `transfer_of` makes one where there is none; `want`
    fetches a model; `changed` tells that `held` is another; `start` runs something beside."""

    def __init__(
        self,
        store: Store,
        *,
        transfers: Mapping[ModelId, Transfer],
        transfer_of: Callable[[ModelId], Transfer],
        want: Callable[[ModelId], None],
        changed: Callable[[], Awaitable[None]],
        start: Callable[[Callable[[], Awaitable[None]]], None],
    ) -> None:
        self._store = store
        self._transfers = transfers
        self._transfer_of = transfer_of
        self._want = want
        self._changed = changed
        self._start = start
        self._one = trio.CapacityLimiter(1)
        self._runs: dict[str, _Run] = {}

    async def begin(self) -> None:
        """At a start, before anything is fetched."""
        repairing = await trio.to_thread.run_sync(care.recall, self._store)
        await trio.to_thread.run_sync(care.clean_old, self._store, repairing)
        for model in repairing:
            self._want(model)

    # Comparing

    async def verify(self, model: ModelId, sources: Collection[object], progress: Progress) -> Finding:
        """Compares a complete model with its hashes; what is damaged is no longer offered, and an own copy is repaired
        if `sources` (other nodes that have it complete) are there. Raises `UnknownModel` or `ModelError`."""
        size = care.entry_of(self._store, model).size
        async with self._one:
            tick = ticker("comparing", progress, size)
            verdict = await trio.to_thread.run_sync(care.compare, self._store, model, tick)
            action = "" if verdict.good else await self._on_damage(verdict, len(sources))
            if verdict.good and not await trio.to_thread.run_sync(care.note_good, self._store, verdict):
                raise ModelError(f"{verdict.entry.where} changed while it was compared", hint="Verify it again.")
        await self._changed()
        return finding(verdict, action)

    async def _on_damage(self, verdict: Verdict, n_sources: int) -> str:
        """Nothing is sent or fetched meanwhile: who has a `.part` open does not see that it is another."""
        entry, transfer = verdict.entry, self._transfer_of(verdict.entry.root)
        log.warning("%s is damaged: %d pieces are not what they were", entry.where, len(verdict.bad))
        self._hold(transfer)
        try:
            await transfer.stop("the file is damaged")
            await trio.to_thread.run_sync(care.note_damage, self._store, verdict)
            return await self._repair(verdict, n_sources)
        finally:
            self._release(transfer)

    def _hold(self, transfer: Transfer) -> None:
        transfer.not_before = math.inf

    def _release(self, transfer: Transfer) -> None:
        transfer.not_before = -math.inf
        if transfer.wanted:
            self._want(transfer.model)

    async def _repair(self, verdict: Verdict, n_sources: int) -> str:
        entry = verdict.entry
        if entry.in_place:
            return (
                "it is shared in place and was not touched: put the right file there and add it again, "
                "or take it out (tightwad-agent remove)"
            )
        if not care.is_ours(self._store, verdict):
            return (
                "it is another file than the one that was put there, and was not touched: move it away, "
                "or take the model out (tightwad-agent remove)"
            )
        if not n_sources and not self._transfer_of(entry.root).wanted:
            return "no other node has it whole, so nothing was changed: add it again from where it came"
        try:
            await trio.to_thread.run_sync(care.begin_repair, self._store, verdict)
        except (ModelError, OSError) as exc:
            return f"it cannot be repaired: {exc}"
        self._transfer_of(entry.root).wanted = True
        source = f"{n_sources} node{'s' * (n_sources > 1)}" if n_sources else "the first node that has it"
        return f"it is being repaired from {source}; what is good of it was kept"

    def mend(self, model: ModelId, sources: Collection[object]) -> None:
        """Compares an own copy that is not offered any more, and repairs it; in the background, so it only logs."""
        entry = next((e for e in self._store.entries() if e.root == model and not e.in_place), None)
        if entry is not None and sources:
            self._hold(self._transfer_of(model))  # it would be fetched anew beside the damaged one
            self._start(partial(self._mend, model, sources))

    async def _mend(self, model: ModelId, sources: Collection[object]) -> None:
        try:
            found = await self.verify(model, sources, lambda *_: None)
            log.info("%s: %s", model.short, found.action or "it was good after all")
        except (TightwadError, OSError) as exc:
            log.info("%s cannot be repaired: %s", model.short, exc)
        finally:
            self._release(self._transfer_of(model))

    # Comparing for others

    async def poll(self, run: str, model: ModelId, sources: Collection[object]) -> Plain:
        """Begins a comparison, or says how far it is: `{"done", "total"}`, at last a `"result"`; or its error."""
        self._forget()
        now = trio.current_time()
        if run not in self._runs:
            if len(self._runs) >= MAX_RUNS:
                raise ModelError("too many comparisons at once on this machine", hint="Try again later.")
            made = self._runs[run] = _Run(model, now, total=care.entry_of(self._store, model).size)
            self._start(lambda: self._perform(made, sources))
        found = self._runs[run]
        found.asked_at = now
        if found.error is not None:
            raise found.error
        await trio.lowlevel.checkpoint()
        return {"done": found.done, "total": found.total, "result": to_plain(found.result)}

    async def _perform(self, run: _Run, sources: Collection[object]) -> None:
        def seen(_what: str, done: int, _total: int | None) -> None:
            run.done = done
            if trio.current_time() > run.asked_at + ORPHAN_S:
                run.scope.cancel()

        with run.scope:
            try:
                run.result = await self.verify(run.model, sources, seen)
            except TightwadError as exc:
                run.error = exc
            except OSError as exc:
                run.error = ModelError(f"it cannot be read: {exc.strerror or exc}")
        if run.scope.cancelled_caught:
            run.error = ModelError("the comparison was given up: nobody asked how far it is")

    def _forget(self) -> None:
        old = trio.current_time() - ORPHAN_S
        self._runs = {key: run for key, run in self._runs.items() if run.asked_at >= old or not _ended(run)}

    # Cleaning up

    async def collect(self, held: Collection[ModelId], *, downloading: bool, dry_run: bool) -> list[Litter]:
        """Removes what nobody needs: what is not in `held` by any node, not wanted here, and not being downloaded."""
        found = await trio.to_thread.run_sync(
            lambda: care.litter(self._store, {*held, *self._busy()}, downloads=not downloading)
        )
        if not dry_run:
            for item in found:
                await self._remove(item)
        return found

    async def _remove(self, item: Litter) -> None:
        paths = list(item.paths)
        if item.model is not None:
            if item.model in self._busy():
                return
            paths = self._store.put_aside(item.model)  # renames only: nobody can begin to use them meanwhile
        await trio.to_thread.run_sync(care.delete, paths)
        log.info("removed %s: %d bytes that nobody needs", item.what, item.n_bytes)

    def _busy(self) -> frozenset[ModelId]:
        return frozenset(m for m, t in self._transfers.items() if t.wanted or t.scope is not None)


def _ended(run: _Run) -> bool:
    return run.result is not None or run.error is not None


def finding(verdict: Verdict, action: str) -> Finding:
    """What a person is told of a comparison."""
    pieces = verdict.manifest.pieces
    return Finding(
        good=verdict.good,
        in_place=verdict.entry.in_place,
        pieces=len(pieces),
        damaged=len(verdict.bad),
        ranges=tuple(Range(i, pieces[i].offset, pieces[i].length) for i in verdict.bad[:MAX_RANGES]),
        problem=verdict.problem,
        action=action[:MAX_TEXT],
    )


def heard(plain: Any) -> Finding:
    """From another node; raises `ProtocolError`."""
    try:
        return from_plain(Finding, plain)
    except Mismatch as exc:
        raise ProtocolError(f"a comparison{exc}") from None
