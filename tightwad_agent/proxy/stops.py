"""Stop strings, wherever the boundaries between tokens fall."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Lets text through up to the first stop string; holds back what may be the beginning of one.

    The first is the one that is complete first; of several that end there, the longest. So the outcome does not depend
    on how the text was split.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._reach = max(map(len, self._stops), default=1) - 1
        self._held = ""
        self.stopped: str | None = None
        """The stop string that was met. Nothing comes out after it."""

    def feed(self, text: str) -> str:
        """What may go out now."""
        if self.stopped is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        if (cut := self._first_stop(text)) is None:
            cut = self._safe(text)
            self._held = text[cut:]
        return text[:cut]

    def rest(self) -> str:
        """What is held, for a text that ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> int | None:
        ends = [(at + len(s), -len(s), s) for s in self._stops if (at := text.find(s)) >= 0]
        if not ends:
            return None
        end, _, self.stopped = min(ends)
        self._held = ""
        return end - len(self.stopped)

    def _safe(self, text: str) -> int:
        """How many characters cannot belong to a stop string any more."""
        for at in range(max(0, len(text) - self._reach), len(text)):
            if text[at] in self._firsts and any(stop.startswith(text[at:]) for stop in self._stops):
                return at
        return len(text)
