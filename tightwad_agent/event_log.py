"""The events of a node on its disk: JSON lines in two files of bounded size, so that a restart forgets nothing.

What was torn by a crash or a full disk is left out when it is read again. Nothing waits for this file: it is written by
a task of its own, and a disk that refuses is said once and tried again.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import trio

from tightwad_agent.events import MAX_EVENTS, Event, Journal, parse, plain
from tightwad_agent.mesh.files import remove

log = logging.getLogger(__name__)

FILE: Final = "events.jsonl"
OLD_FILE: Final = "events.1.jsonl"
MAX_FILE: Final = 1 << 20
RETRY_S: Final = 30.0
"""After the disk refused."""


class EventLog:
    """Keeps `journal` in `state_dir`, which is there. `problem`: why the disk takes no events; empty if it does."""

    def __init__(self, state_dir: Path, journal: Journal) -> None:
        self.problem = ""
        self._path = state_dir / FILE
        self._old = state_dir / OLD_FILE
        self._journal = journal
        self._written = 0
        self._news = trio.Event()

    def restore(self) -> None:
        """Gives the journal what earlier runs have kept. Blocks; before the first event."""
        self._journal.restore(read(self._path.parent)[-MAX_EVENTS:])
        self._written = self._journal.seq

    def note(self) -> None:
        """The journal has something new; `run` writes it."""
        self._news.set()

    async def run(self) -> None:
        """Until cancelled. What came last is written by `flush`."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            await trio.to_thread.run_sync(self._write, self._journal.after(self._written))
            if self.problem:
                with trio.move_on_after(RETRY_S):
                    await self._news.wait()
                self._news.set()

    def flush(self) -> None:
        """Writes at once. Blocks; when `run` has ended."""
        self._write(self._journal.after(self._written))

    def _write(self, events: Sequence[Event]) -> None:
        try:
            for event in events:
                self._append(_line(event))
                self._written = event.seq
        except OSError as exc:
            if not self.problem:
                log.warning("events are not kept on the disk: %s: %s", self._path, exc.strerror)
            self.problem = f"events are not kept on the disk: {exc.strerror}"
        else:
            self.problem = ""

    def _append(self, line: bytes) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(self._path, flags, 0o600), "r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if 0 < size <= MAX_FILE - len(line):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line  # behind what was torn
            elif size:
                os.replace(self._path, self._old)
                self._append(line)
                return
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _line(event: Event) -> bytes:
    return json.dumps(plain(event), ensure_ascii=False).encode() + b"\n"


def read(state_dir: Path) -> list[Event]:
    """All events in the files, oldest first, as far as they can be read. Blocks; never raises on what is in there."""
    found = {event.seq: event for name in (OLD_FILE, FILE) for event in _read(state_dir / name)}
    return [found[seq] for seq in sorted(found)]


def _read(path: Path) -> Iterator[Event]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MAX_FILE))
            data = file.read(MAX_FILE)
    except FileNotFoundError:
        return
    except OSError as exc:
        log.warning("earlier events cannot be read: %s: %s", path, exc.strerror)
        return
    n_bad = 0
    for line in data.split(b"\n"):
        try:
            yield parse(json.loads(line))
        except (ValueError, RecursionError):
            n_bad += bool(line)
    if n_bad:
        log.warning("%s: %d lines are no events; they were left out", path, n_bad)


def forget(state_dir: Path) -> None:
    """Deletes the files: a node that left its cluster takes nothing of it along. Raises `EnvironmentFault`."""
    for name in (FILE, OLD_FILE):
        remove(state_dir / name)
