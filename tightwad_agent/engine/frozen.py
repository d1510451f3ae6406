"""Is a child process stopped by a signal? A stopped one holds its connections and computes nothing."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import trio

FROZEN_S = 2.0
"""Stopped for so long, it counts as lost: a short stop is forgiven, a longer one must not keep everybody waiting."""
_LOOKS = 4


async def frozen(pid: int, for_s: float, look: Callable[[int], bool] | None = None) -> None:
    """Returns when the process has been seen stopped for so long without a break; waits for ever once it is gone."""
    n_seen = 0
    while n_seen < _LOOKS:
        await trio.sleep(for_s / _LOOKS)
        n_seen = n_seen + 1 if (look or is_stopped)(pid) else 0


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped it. One that a debugger holds is not: somebody looks at it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False
