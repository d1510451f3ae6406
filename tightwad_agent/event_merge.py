"""The events of several nodes as one list: in the order of time, and what several nodes tell of the same once. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tightwad_agent.events import FIRST_HAND, SAME, Event, Fact, Kind

SAME_S: Final = 10.0
"""What several nodes tell of the same within this is one happening: a cut link is known to all within five seconds."""


@dataclass(frozen=True, slots=True)
class Told:
    """What the node `name` tells, by rising `seq`. `ahead_s`: its clock before ours, 0 where that is not known."""

    name: str
    events: Sequence[Event]
    ahead_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Happening:
    """`at`: Unix seconds by our clock. `seen_by`: the names of all who told; the words are those of the first."""

    at: float
    event: Event
    seen_by: tuple[str, ...]


def merge(told: Iterable[Told]) -> list[Happening]:
    """All that was told, earliest first."""
    merged: list[Happening] = []
    open_: dict[Fact | tuple[str, str], int] = {}
    for at, name, event in sorted(_timed(told), key=lambda item: (item[0], item[1], item[2].seq)):
        same = _common_name(event)
        i = open_.get(same, -1) if same else -1
        if i >= 0 and at - merged[i].at <= SAME_S and name not in merged[i].seen_by:
            merged[i] = _joined(merged[i], event, name)
            continue
        merged.append(Happening(at, event, (name,)))
        if same:
            open_[same] = len(merged) - 1
    return merged


def _common_name(event: Event) -> Fact | tuple[str, str]:
    """What is equal on all nodes that tell of this; nothing if it is the node's own affair. Whom to trust is the same
    everywhere, so equal words about it are enough."""
    return event.facts.get(SAME) or ((event.kind, event.text) if event.kind is Kind.TRUST else None)


def _timed(told: Iterable[Told]) -> Iterator[tuple[float, str, Event]]:
    for one in told:
        for at, event in zip(ordered([e.at for e in one.events]), one.events, strict=True):
            yield at - one.ahead_s, one.name, event


def _joined(known: Happening, event: Event, name: str) -> Happening:
    """Who did it, or saw it, has the word."""
    if event.facts.get(FIRST_HAND) and not known.event.facts.get(FIRST_HAND):
        return replace(known, event=event, seen_by=(name, *known.seen_by))
    return replace(known, seen_by=(*known.seen_by, name))


def ordered(times: Sequence[float]) -> list[float]:
    """`times` made to never fall: the longest run of them that fits together is believed, and one that does not fit (a
    clock that jumped) becomes the believed one before it, or the first."""
    believed = _longest_rise(times)
    last, result = times[min(believed)] if believed else 0.0, []
    for i, time in enumerate(times):
        last = time if i in believed else last
        result.append(last)
    return result


def _longest_rise(times: Sequence[float]) -> set[int]:
    """Where the longest run of times that never falls has its members (patience sorting)."""
    ends: list[float] = []  # of the runs of each length: the smallest last time
    at: list[int] = []  # where that time is
    before: list[int] = []
    for i, time in enumerate(times):
        n = bisect_right(ends, time)
        before.append(at[n - 1] if n else -1)
        ends[n : n + 1] = [time]
        at[n : n + 1] = [i]
    found, i = set(), at[-1] if at else -1
    while i >= 0:
        found.add(i)
        i = before[i]
    return found


def chosen(
    happenings: Iterable[Happening],
    *,
    since: float = 0.0,
    kinds: Collection[Kind] = (),
    node: tuple[str, str] | None = None,
    n: int,
) -> list[Happening]:
    """The last `n` that are wanted. `node`: (id, name) of one that told of it, or that it is about."""
    kept = [h for h in happenings if h.at >= since and (not kinds or h.event.kind in kinds) and _of(h, node)]
    return kept[-n:] if n > 0 else []


def _of(happening: Happening, node: tuple[str, str] | None) -> bool:
    return node is None or node[1] in happening.seen_by or node[0] in happening.event.facts.values()
