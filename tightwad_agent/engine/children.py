"""The list of child processes on disk, and the sweep of those that an agent left behind.

A pid alone names nobody: it is used again. A process is ended only if pid, boot, start time and program all are what
was written down, and where the system allows it (Linux) through a handle that was taken before the check.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 1 << 20
MAX_CHILDREN = 256
_START_TOLERANCE_S = 0.5


def identify(pid: int) -> str | None:
    """What tells this process from every other that has or will have its pid; `None` if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {stat.rpartition(b')')[2].split()[19].decode()}"  # start time in clock ticks since boot
    except (OSError, IndexError, ValueError):
        pass  # no /proc: not Linux, or no such process
    try:
        return f"{psutil.Process(pid).create_time():.2f}"
    except psutil.Error:
        return None


def same(left: str | None, right: str) -> bool:
    """Whether two identities are one process."""
    if left is None or left == right:
        return left == right
    try:
        return abs(float(left) - float(right)) < _START_TOLERANCE_S
    except ValueError:
        return False


def program(pid: int) -> str:
    """The file a process runs, or empty text."""
    try:
        return psutil.Process(pid).exe().removesuffix(" (deleted)")
    except psutil.Error:
        return ""


class Children:
    """The list. Its methods touch the disk: call them in a thread, from several at once if need be."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def remember(self, pid: int, identity: str, exe: str) -> None:
        with self._lock:
            self._rows[pid] = {"pid": pid, "identity": identity, "exe": os.path.realpath(exe)}
            self._write()

    def forget(self, pid: int) -> None:
        with self._lock:
            if self._rows.pop(pid, None) is not None:
                self._write()

    def sweep(self) -> list[str]:
        """Ends all that is written down and still is what was written down. Forgets the rest."""
        with self._lock:
            killed = [what for row in self._read() if (what := _end(row))]
            self._write()
            return killed

    def _read(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                rows = json.loads(file.read(MAX_FILE_BYTES))
        except FileNotFoundError:
            return []
        except (OSError, ValueError, RecursionError) as exc:
            log.warning("%s cannot be used, nothing is swept: %s", self._path, exc)
            return []
        return [row for row in rows[:MAX_CHILDREN] if isinstance(row, dict)] if isinstance(rows, list) else []

    def _write(self) -> None:
        rows = list(self._rows.values())
        temporary = self._path.with_name(self._path.name + ".tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                json.dump(rows, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except OSError as exc:
            log.warning("%s: %s; a child may outlive a killed agent", self._path, exc.strerror)


def _end(row: dict[str, Any]) -> str:
    """Kills the process of one row if it is that process; what it was, or empty text."""
    pid, identity, exe = row.get("pid"), row.get("identity"), row.get("exe")
    if type(pid) is not int or pid <= 1 or not isinstance(identity, str) or not isinstance(exe, str):
        return ""
    if pid == os.getpid():
        return ""
    try:
        handle = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    except OSError:
        return ""  # gone
    try:
        if not same(identify(pid), identity) or program(pid) != exe:
            return ""
        if handle is None:
            os.kill(pid, signal.SIGKILL)
        else:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
    except OSError:
        return ""
    finally:
        if handle is not None:
            os.close(handle)
    return f"{exe} (pid {pid})"
