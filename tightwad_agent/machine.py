"""Facts about this machine, through psutil and a few files. Sizes in bytes, times in Unix seconds.

Every function is synchronous, takes milliseconds, and is meant for `trio.to_thread.run_sync`. A fact that cannot be
read is zero or empty text, never an error: the agent works without it.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

MAX_CPU_NAME = 200
_ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64", "i386": "i686"}
_SYSTEMS = {"darwin": "macos", "win32": "windows"}
_NO_LIMIT = 1 << 60
"""cgroup v1 says "no limit" with a number near 2**63."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine is.

    `n_cores`: cores this process may use at once (affinity and container quota counted); `n_logical`: all the machine
    has, hardware threads included; `n_physical`: without them, 0 where unknown. Memory is what this process may have:
    in a container with a limit, the limit.
    """

    platform: str
    cpu: str
    n_cores: int
    n_physical: int
    n_logical: int
    memory_total: int
    memory_available: int
    disk_free: int
    boot_time: float


def read(path: Path, root: Path = Path("/")) -> Machine:
    """All facts; `path` says which disk is meant. `root` is where `/proc` and `/sys` are (for tests)."""
    total, available = memory(root)
    return Machine(
        platform=platform_name(sys.platform, platform.machine()),
        cpu=cpu_name(root),
        n_cores=usable_cores(root),
        n_physical=psutil.cpu_count(logical=False) or 0,
        n_logical=psutil.cpu_count() or 1,
        memory_total=total,
        memory_available=available,
        disk_free=disk_free(path),
        boot_time=psutil.boot_time(),
    )


def platform_name(system: str, machine: str) -> str:
    """`linux-x86_64`, `linux-aarch64`, `macos-aarch64`, `windows-x86_64`."""
    architecture = machine.lower() or "unknown"
    return f"{_SYSTEMS.get(system, system)}-{_ARCHITECTURES.get(architecture, architecture)}"


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's marketing name; on boards that have none, the board's."""
    text = _text(root / "proc/cpuinfo")
    for key in ("model name", "Model", "Hardware", "cpu model"):
        if found := re.search(rf"^{key}\s*:\s*(\S.*)$", text, re.MULTILINE):
            return _one_line(found[1])
    if board := _text(root / "proc/device-tree/model").strip("\0 \n"):
        return _one_line(board)
    if sys.platform == "darwin":
        return _one_line(_output("sysctl", "-n", "machdep.cpu.brand_string"))
    return _one_line(platform.processor() or platform.machine())


def usable_cores(root: Path = Path("/")) -> int:
    """Cores this process may keep busy; at least 1."""
    n_allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    quota, _, period = _text(root / "sys/fs/cgroup/cpu.max").strip().partition(" ")
    if quota.isdecimal() and period.isdecimal() and int(period) > 0:
        n_allowed = min(n_allowed, -(-int(quota) // int(period)))
    return max(1, n_allowed)


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """(total, available) memory that this process may have, the container's limit counted."""
    machine = psutil.virtual_memory()
    total, available = int(machine.total), int(machine.available)
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit = _number(root / "sys/fs/cgroup" / limit_file)
        if 0 < limit < min(total, _NO_LIMIT):
            used = _number(root / "sys/fs/cgroup" / used_file) - _reclaimable(root / "sys/fs/cgroup" / limit_file)
            return limit, max(0, min(available, limit - max(0, used)))
    return total, available


def disk_free(path: Path) -> int:
    """Bytes an ordinary user may still write where `path` is or will be; 0 where that cannot be known."""
    for existing in (path, *path.absolute().parents):
        try:
            return int(psutil.disk_usage(str(existing)).free)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            break
    return 0


def _reclaimable(limit_file: Path) -> int:
    """Page cache counted as used by the cgroup, which the kernel gives back when asked."""
    found = re.search(r"^(?:total_)?inactive_file (\d+)$", _text(limit_file.parent / "memory.stat"), re.MULTILINE)
    return int(found[1]) if found else 0


def _text(path: Path, most: int = 64 << 10) -> str:
    try:
        with path.open("rb") as file:
            return file.read(most).decode("utf-8", "replace")
    except OSError:
        return ""


def _number(path: Path) -> int:
    text = _text(path, 64).strip()
    return int(text) if text.isdecimal() else 0


def _one_line(text: str) -> str:
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.split())[:MAX_CPU_NAME]


def _output(*argv: str) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=2, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def anonymous_memory(pids: Iterable[int]) -> int:
    """Bytes of RAM that these processes hold for themselves. Pages of a mapped file are not counted: they count as
    available while they lie there."""
    total = 0
    for pid in pids:
        with suppress(psutil.Error):
            memory = psutil.Process(pid).memory_info()
            total += max(0, memory.rss - getattr(memory, "shared", 0))
    return total
