"""Transfers as events: when a model begins to come, when it is there and how long that took, and what is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from tightwad_agent.events import Tell
from tightwad_agent.ids import ModelId
from tightwad_agent.swarm.service import Phase, SwarmService, TransferStatus
from tightwad_agent.units import duration, size

QUIET_S = 60.0
"""A model's problem whose words change all the time is told so often at most."""
ENDED = (Phase.IDLE, Phase.COMPLETE)

Note = tuple[str, dict[str, Any]]


@dataclass(slots=True)
class _Coming:
    """`n_here`: bytes that were here when it began. `told_at`: when a problem was told last."""

    since: float
    n_here: int
    fetches: bool = False
    problem: str = ""
    told_at: float = -QUIET_S


class TransferNews:
    """Compares what is with what was. Holds something for models that are on their way only."""

    def __init__(self) -> None:
        self._coming: dict[ModelId, _Coming] = {}
        self._problems: tuple[str, ...] = ()

    def look(self, transfers: Sequence[TransferStatus], problems: tuple[str, ...], now: float) -> Iterator[Note]:
        """What is new. `problems`: of the store; `now`: seconds of a clock that never goes back."""
        for status in transfers:
            yield from self._of(status, now)
        there = {status.model for status in transfers}
        self._coming = {model: coming for model, coming in self._coming.items() if model in there}
        new = [problem for problem in problems if problem not in self._problems]
        self._problems = problems
        yield from ((problem, {}) for problem in new)

    def _of(self, status: TransferStatus, now: float) -> Iterator[Note]:
        if status.phase in ENDED:
            coming = self._coming.pop(status.model, None)
            if coming is not None:
                yield _ended(status, coming, now)
            return
        coming = self._coming.setdefault(status.model, _Coming(now, status.done))
        if status.phase is Phase.FETCHING and not coming.fetches:
            coming.fetches = True
            here = f", {size(status.done)} of it are here already" if status.done else ""
            yield f"{status.name} ({size(status.total)}) is being fetched{here}", _facts(status)
        if status.problem and status.problem != coming.problem and now >= coming.told_at + QUIET_S:
            coming.told_at, coming.problem = now, status.problem
            how = "does not come" if status.phase in (Phase.NO_ROOM, Phase.FAILED) else "has to wait"
            yield f"{status.name} {how}: {status.problem}", _facts(status) | {"problem": status.problem}
        elif not status.problem:
            coming.problem = ""


def _ended(status: TransferStatus, coming: _Coming, now: float) -> Note:
    took_s, n_bytes = now - coming.since, status.done - coming.n_here
    facts = _facts(status) | {"took_s": took_s}
    if status.phase is Phase.IDLE:
        return f"{status.name} is not fetched any more, {size(status.done)} of it are here", facts
    how = f" in {duration(took_s)}"
    if n_bytes > 0 and took_s > 0:
        how += f", {size(n_bytes / took_s)}/s"
    if n_peers := len(status.from_each_peer):
        how += f", from {n_peers} source{'s' * (n_peers > 1)}"
    if status.reused:
        how += f"; {size(status.reused)} were on this disk in other files"
    return f"{status.name} is complete: {size(n_bytes)}{how}", facts


def _facts(status: TransferStatus) -> dict[str, Any]:
    return {"model": str(status.model), "have": status.done, "n_bytes": status.total, "reused": status.reused}


async def follow(swarm: SwarmService, tell: Tell) -> None:
    """Tells what is new, until cancelled."""
    news = TransferNews()
    while True:
        revision, snapshot = swarm.revision, swarm.snapshot()
        for text, facts in news.look(snapshot.transfers, snapshot.problems, trio.current_time()):
            tell(text, **facts)
        await swarm.wait_changed(revision)
