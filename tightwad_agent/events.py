"""What happened on this node and why, in words, the last of it. Pure: the caller says when."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol

MAX_EVENTS: Final = 1000
MAX_TEXT: Final = 500
MAX_FACTS: Final = 16
MAX_FACT: Final = 200
"""Characters of a fact that is text."""
MAX_KEY: Final = 32
MAX_SEQ: Final = 2**53
MAX_AT: Final = 253_370_764_800
"""The beginning of the year 9999, which is a date in every time zone."""
SAME: Final = "same"
"""The fact that is equal on all nodes that tell of one and the same happening."""
FIRST_HAND: Final = "first_hand"
"""The fact that this node did it or saw it itself: its words are shown before those of others."""

_KEY = re.compile(r"[a-z][a-z0-9_]*\Z")

Fact = str | int | float | bool | None
Facts = Mapping[str, Fact]


class Kind(StrEnum):
    """Which part of the agent an event is about."""

    MEMBERSHIP = "membership"
    ELECTION = "election"
    POOL = "pool"
    DRAFTING = "drafting"
    LINK = "link"
    SWARM = "swarm"
    TRUST = "trust"
    ENDPOINT = "endpoint"
    ENGINE = "engine"
    AGENT = "agent"


@dataclass(frozen=True, slots=True)
class Event:
    """`at`: Unix seconds by the clock of the node `node` (its id). `seq` rises by one with each event of a node, also
    when its clock jumps, and over restarts. `facts`: the same as `text` for programs."""

    at: float
    text: str
    kind: Kind = Kind.AGENT
    facts: Facts = field(default_factory=dict)
    node: str = ""
    seq: int = 0


class Tell(Protocol):
    """Keeps an event; `kind` None: the kind of the part that tells."""

    def __call__(self, text: str, /, *, kind: Kind | None = None, **facts: Any) -> None: ...


def of_kind(tell: Tell, default: Kind) -> Tell:
    """`tell` for one part of the agent: what names no kind is of `default`."""

    def told(text: str, /, *, kind: Kind | None = None, **facts: Any) -> None:
        tell(text, kind=kind or default, **facts)

    return told


class Journal:
    """A bounded list of the events of one node; a repetition of the last one is not kept twice. `clean` takes secrets
    out of whatever is told."""

    def __init__(self, node: str = "", clean: Callable[[str], str] = str) -> None:
        self._node = node
        self._clean = clean
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._last: tuple[str, Kind] | None = None
        self.seq = 0
        """Of the last event."""

    def restore(self, events: Iterable[Event]) -> None:
        """Puts what an earlier run has kept in front. Before the first `add`."""
        self._events.extend(sorted(events, key=lambda event: event.seq))
        self.seq = self._events[-1].seq if self._events else 0

    def add(self, at: float, text: str, kind: Kind = Kind.AGENT, facts: Facts | None = None) -> bool:
        """Keeps an event; False if it only repeats the last one."""
        text = _line(self._clean(text[: 4 * MAX_TEXT]), MAX_TEXT)
        if self._last == (text, kind):
            return False
        self._last = (text, kind)
        self.seq += 1
        kept = {key: self._clean(v) if isinstance(v, str) else v for key, v in bounded(facts or {}).items()}
        self._events.append(Event(at, text, kind, bounded(kept), self._node, self.seq))
        return True

    def last(self, n: int = MAX_EVENTS) -> tuple[Event, ...]:
        return tuple(self._events)[-n:] if n > 0 else ()

    def after(self, seq: int) -> tuple[Event, ...]:
        """What is still kept of all that came after the event with this number."""
        return tuple(event for event in self._events if event.seq > seq)


def bounded(facts: Mapping[str, Any]) -> dict[str, Fact]:
    """Facts as they are kept: few, short, and what JSON can say; anything else as its text."""
    kept = ((key, _fact(value)) for key, value in facts.items() if _is_key(key))
    return dict([*kept][:MAX_FACTS])


def _is_key(key: object) -> bool:
    return isinstance(key, str) and len(key) <= MAX_KEY and _KEY.match(key) is not None


def _fact(value: Any) -> Fact:
    if value is None or type(value) is bool or (type(value) is int and abs(value) <= MAX_SEQ):
        return value
    if type(value) is float:
        return round(value, 3) if math.isfinite(value) else None
    return _line(str(value), MAX_FACT)


def _line(text: str, limit: int) -> str:
    """One line of characters that can be sent and stored."""
    return " ".join(text[: 4 * limit].encode("utf-8", "replace").decode().split())[:limit].rstrip()


# As plain data: in the file, between nodes, for programs


def plain(event: Event) -> dict[str, Any]:
    """What `parse` takes."""
    return {
        "at": round(event.at, 3),
        "seq": event.seq,
        "kind": str(event.kind),
        "text": event.text,
        "facts": dict(event.facts),
        "node": event.node,
    }


def parse(data: object) -> Event:
    """An event from a file or a peer, whatever is in it. Raises `ValueError`; a kind that is not known is `agent`."""
    if not isinstance(data, dict):
        raise ValueError("an event is a map")  # noqa: TRY004 - callers tell bad data from faults by it
    at, seq, text, kind = data.get("at"), data.get("seq"), data.get("text"), data.get("kind")
    if type(at) not in (int, float) or not 0 <= at <= MAX_AT:  # type: ignore[operator]
        raise ValueError("an event without a time")
    if type(seq) is not int or not 0 <= seq <= MAX_SEQ:
        raise ValueError("an event without its number")
    if not isinstance(text, str) or not (text := _line(text, MAX_TEXT)):
        raise ValueError("an event without words")
    facts, node = data.get("facts"), data.get("node")
    return Event(
        float(at),  # type: ignore[arg-type]
        text,
        Kind(kind) if kind in list(Kind) else Kind.AGENT,
        bounded(facts) if isinstance(facts, dict) else {},
        _line(node, MAX_FACT) if isinstance(node, str) else "",
        seq,
    )
