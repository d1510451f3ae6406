"""How many threads llama-server would use on this machine: one per fast physical core."""

from __future__ import annotations

import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_FAST = Path("/sys/devices/cpu_core/cpus")  # there only where a processor has fast and slow cores


def physical_cores() -> int:
    """At least 1."""
    fast = _listed(_FAST)
    cores = {
        text
        for path in _CPUS.glob("cpu[0-9]*/topology/thread_siblings")
        if (fast is None or int(path.parts[-3][3:]) in fast) and (text := _read(path))
    }
    if cores:
        return len(cores)
    n_cpus = os.cpu_count() or 4
    return n_cpus if n_cpus <= 4 else n_cpus // 2


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _listed(path: Path) -> set[int] | None:
    text = _read(path)
    return cpu_list(text) if text else None


def cpu_list(text: str) -> set[int] | None:
    """`0-3,8` -> {0, 1, 2, 3, 8}; `None` for anything else."""
    found: set[int] = set()
    for part in text.split(","):
        first, _dash, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) >= 1 << 16:
            return None
        found.update(range(int(first), int(last or first) + 1))
    return found
