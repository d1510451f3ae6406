"""What libllama logs: passed on to standard error, and the last of it kept to say what went wrong."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tightwad_agent.engine.verifier import abi

MAX_LINES = 100
MAX_LINE = 1000
_INFO, _WARN, _ERROR, _CONTINUES = 2, 3, 4, 5

_BYTES = re.compile(r"failed to allocate (?:(\S+) )?buffer of size (\d{1,20})")
_MIB = re.compile(r"allocating (\d{1,12}(?:\.\d{1,6})?) MiB on device (\d{1,4}).*(?:failed|out of memory)")
_OUTPUT = re.compile(r"failed to allocate output buffer of size (\d{1,12}(?:\.\d{1,6})?) MiB")


class Lacking(NamedTuple):
    """A buffer that could not be had. `device` may be empty: this machine's memory."""

    needed: int
    device: str


def lacking(lines: Iterable[str]) -> Lacking | None:
    """The first allocation that failed, as the log tells it."""
    for line in lines:
        if match := _OUTPUT.search(line):
            return Lacking(int(float(match[1]) * 2**20), "CPU")
        if match := _BYTES.search(line):
            return Lacking(int(match[2]), match[1] or "CPU")
        if match := _MIB.search(line):
            return Lacking(int(float(match[1]) * 2**20), f"device {match[2]}")
    return None


class Journal:
    """Collects lines. `callback` is what `llama_log_set` gets, and must live as long as the library is used."""

    def __init__(self, write: Callable[[bytes], Any] = lambda line: os.write(2, line)) -> None:
        self.lines: deque[str] = deque(maxlen=MAX_LINES)
        self._error = ""
        self._write = write
        self._level = _INFO
        self.callback = abi.LOG_CALLBACK(self._heard)

    def _heard(self, level: int, text: bytes | None, _data: object) -> None:
        try:
            self.note(level, text or b"")
        except Exception:  # noqa: BLE001 - the caller is C++, nothing may pass through it
            return

    def note(self, level: int, text: bytes) -> None:
        """One call of the callback: usually a line with its end."""
        self._level = level = self._level if level == _CONTINUES else level
        if level < _INFO:
            return
        self._write(text)
        line = text.decode(errors="replace").strip()[:MAX_LINE]
        if not line or line.strip(".") == "":
            return
        self.lines.append(line)
        if level >= _ERROR:
            self._error = self._error or line

    def cause(self) -> str:
        """The first line that was an error (what follows from it comes later), or else the newest of all."""
        if self._error:
            return self._error
        return self.lines[-1] if self.lines else "libllama did not say why"
