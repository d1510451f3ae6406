"""How the runs of an agent began and ended, in words, read from its own events. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from tightwad_agent.events import Event
from tightwad_agent.units import duration

LIFE = "life"
"""The fact that marks the beginning and the end of a run: one of the three below."""
STARTED, STOPPED, FAILED = "started", "stopped", "failed"


def started(earlier: Sequence[Event], now: float, version: str) -> str:
    """What to tell of a start. `earlier`: the events of the runs before; `now`: Unix seconds."""
    begun = f"tightwad-agent {version} started"
    ended = next((e for e in reversed(earlier) if LIFE in e.facts), None)
    if ended is None:
        return begun
    if ended.facts[LIFE] == STOPPED:
        return f"{begun}{_after(ended, now, 'it was stopped')}"
    if ended.facts[LIFE] == FAILED:
        return f"{begun}{_after(ended, now, 'it had ended with an error')}"
    last = _after(earlier[-1], now, "the last event before")
    return f"{begun}{last}; the last time it was not stopped in order (a crash, a kill or a power cut)"


def ended(why: str, up_s: float) -> str:
    """What to tell of an end in good order."""
    return f"the agent was stopped ({why}) after {duration(up_s)}"


def failed(exc: BaseException) -> str:
    """What to tell of an end by an error that nobody took."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return f"the agent ended with an error: {type(exc).__name__}: {exc}"


def _after(event: Event, now: float, what: str) -> str:
    """Nothing where the clock was set back meanwhile."""
    return f", {duration(now - event.at)} after {what}" if now >= event.at else ""
