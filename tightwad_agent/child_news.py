"""What goes wrong with the processes of this node, and how long answers stood still for that, as events."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tightwad_agent.events import Tell
from tightwad_agent.pulse import Pulse

QUIET_S = 5.0
"""Answers that go on together are told once."""

Trouble = tuple[int, str]
"""How often a process was started again, and what is wrong with it in words."""


async def follow(changed: Pulse, troubles: Mapping[str, Callable[[], Trouble]], tell: Tell) -> None:
    """Tells each new trouble of each process, named by what it is; until cancelled. `changed` beats with each."""
    known = {what: trouble() for what, trouble in troubles.items()}
    while True:
        seen = changed.count
        for what, trouble in troubles.items():
            before, known[what] = known[what], trouble()
            restarts, problem = known[what]
            if problem and known[what] != before:
                tell(f"{what}: {problem}", restarts=restarts)
        await changed.wait(seen)


class Pauses:
    """Tells of answers that went on; `clock` never goes back."""

    def __init__(self, tell: Tell, clock: Callable[[], float]) -> None:
        self._tell = tell
        self._clock = clock
        self._told_at = float("-inf")
        self._n = 0

    def paused(self, seconds: float) -> None:
        """One answer stood still for so long, and goes on."""
        self._n += 1
        if self._clock() >= self._told_at + QUIET_S:
            self._told_at = self._clock()
            since = f"; {self._n} did since the start" if self._n > 1 else ""
            text = f"an answer goes on after {seconds:.1f} s in which its engine was lost and another was made ready"
            self._tell(text + since, took_s=seconds, n=self._n)
