"""An agent with a window into it, for measurements. It takes the agent's own arguments.

After SIGUSR2 it writes `PID.json` into the folder that TIGHTWAD_WATCH names: `serial` counts the signals, `live` the
objects of the package's classes that exist. With TIGHTWAD_WATCH_HZ it also samples where processor time goes: `stacks`
counts stacks since the signal before, innermost call last, as `module:function`.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

from tightwad_agent.__main__ import main

PACKAGE = "tightwad_agent."
DEPTH = 60


class Window:
    """Installed once, in the main thread."""

    def __init__(self, folder: Path, hz: float) -> None:
        self._path = folder / f"{os.getpid()}.json"
        self._stacks: Counter[str] = Counter()
        self._serial = 0
        signal.signal(signal.SIGUSR2, self._write)
        if hz:
            signal.signal(signal.SIGPROF, self._sample)
            signal.setitimer(signal.ITIMER_PROF, 1 / hz, 1 / hz)
            atexit.register(signal.setitimer, signal.ITIMER_PROF, 0)

    def _sample(self, _number: int, frame: FrameType | None) -> None:
        names: list[str] = []
        while frame is not None and len(names) < DEPTH:
            code = frame.f_code
            names.append(f"{frame.f_globals.get('__name__', '?')}:{code.co_name}")
            frame = frame.f_back
        self._stacks[";".join(reversed(names))] += 1

    def _write(self, _number: int, _frame: FrameType | None) -> None:
        stacks, self._stacks = self._stacks, Counter()
        self._serial += 1
        gc.collect()
        kinds = Counter(type(thing) for thing in gc.get_objects())
        live = {
            f"{k.__module__}.{k.__qualname__}": n for k, n in kinds.items() if str(k.__module__).startswith(PACKAGE)
        }
        told = {"serial": self._serial, "live": live, "objects": kinds.total(), "stacks": stacks}
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(told))
        part.replace(self._path)
        self._stacks = Counter()


if __name__ == "__main__":
    if "up" in sys.argv[1:2]:
        window = Window(Path(os.environ["TIGHTWAD_WATCH"]), float(os.environ.get("TIGHTWAD_WATCH_HZ", "0")))
    main()
