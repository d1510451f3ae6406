"""When a child that ended is started again, and when that is given up. Pure: the caller owns clock and process."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """Seconds. An exit within `crash_window_s` of its start is a crash; `max_crashes` in a row are a loop. An exit
    after a run of `settled_s` is answered at once: what ran for a while will most likely run again."""

    first_delay_s: float = 0.5
    factor: float = 2.0
    max_delay_s: float = 30.0
    max_crashes: int = 5
    crash_window_s: float = 60.0
    settled_s: float = math.inf


@dataclass(frozen=True, slots=True)
class StartAt:
    """Start again at `at`, on the clock of the `now` that was given."""

    at: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Do not start again until `Restarter.reset`; `reason` is for people."""

    reason: str


Decision = StartAt | GiveUp


class Restarter:
    """Back-off and crash loop detection for one child.

    The delay doubles with each early exit up to a bound; a run that outlives the crash window makes the next delay the
    first one again. Exits that were somebody else's fault (`crash=False`: a worker that went away) back off, but never
    count towards giving up, and forgive nothing either.
    """

    def __init__(self, policy: RestartPolicy | None = None) -> None:
        self.policy = policy or RestartPolicy()
        self.restarts = 0
        """How often a restart was decided, ever."""
        self._started_at: float | None = None
        self._crashes = 0
        self._delays = 0
        self._given_up: GiveUp | None = None

    @property
    def given_up(self) -> GiveUp | None:
        return self._given_up

    def started(self, now: float) -> None:
        """The child was started."""
        self._started_at = now

    def exited(self, now: float, why: str, *, crash: bool = True) -> Decision:
        """The child that was started ended; `why` in words."""
        if self._given_up is not None:
            return self._given_up
        uptime_s = 0.0 if self._started_at is None else max(0.0, now - self._started_at)
        self._started_at = None
        if uptime_s >= self.policy.crash_window_s:
            self._crashes = self._delays = 0
        self._crashes += crash
        if self._crashes >= self.policy.max_crashes:
            times = f"{self._crashes} times in a row within {self.policy.crash_window_s:g} s of its start"
            self._given_up = GiveUp(f"ended {times}; the last time: {why}")
            return self._given_up
        self.restarts += 1
        if uptime_s >= self.policy.settled_s:
            self._delays = 0
            return StartAt(now)
        delay_s = self._delay()
        self._delays += 1
        return StartAt(now + delay_s)

    def reset(self) -> None:
        """A person or a new target says: try as if nothing had happened."""
        self._crashes = self._delays = 0
        self._started_at = None
        self._given_up = None

    def _delay(self) -> float:
        delay_s = self.policy.first_delay_s
        for _ in range(self._delays):
            if delay_s >= self.policy.max_delay_s:
                break
            delay_s *= self.policy.factor
        return min(delay_s, self.policy.max_delay_s)
