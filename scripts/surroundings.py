"""What measured figures depend on: machine, load, versions."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from tightwad_agent.engine.pins import BUILD


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    revision = subprocess.run(git, capture_output=True, text=True, check=False)
    return {
        "cores": os.cpu_count(),
        "cpu": cpu_model(),
        "load_before": os.getloadavg(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "engine": BUILD,
        "revision": revision.stdout.strip() or None,
    }


class Stolen:
    """How much of this machine's time its host has given to others since this was made."""

    def __init__(self) -> None:
        self._before = self._ticks()

    def percent(self) -> float | None:
        """Of all cores' time that was wanted here; `None` where the kernel does not say."""
        if self._before is None or (now := self._ticks()) is None:
            return None
        (stolen, wanted), (stolen_then, wanted_then) = now, self._before
        return round(100 * (stolen - stolen_then) / max(1, wanted - wanted_then), 1)

    @staticmethod
    def _ticks() -> tuple[int, int] | None:
        """(stolen, used or stolen), by proc(5)."""
        try:
            with open("/proc/stat", encoding="utf-8") as lines:
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, lines.readline().split()[1:9])
        except (OSError, ValueError):
            return None
        return steal, user + nice + system + irq + softirq + steal


def cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()
