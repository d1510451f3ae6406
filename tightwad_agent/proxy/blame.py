"""Whether a request may be the cause of what happens to the servers that are to answer it. Pure."""

from __future__ import annotations

from collections.abc import Hashable


class Blame:
    """Counts how often a request lost its server without getting on: `n`.

    Where the `membership` becomes another before the next loss, a machine died or another node coordinates, and the
    loss was none of the request's doing. That a machine died is often known only after the loss.
    """

    def __init__(self) -> None:
        self.n = 0
        self._before: Hashable = None
        self._is_open = False

    def tried(self, membership: Hashable) -> None:
        """It is about to be sent, or judged; `membership` is what it is now."""
        if self._is_open:
            if membership == self._before:
                return
            self.n -= 1
            self._is_open = False
        self._before = membership

    def lost(self, *, got_on: bool, from_outside: bool = False) -> None:
        """Its server is gone; `got_on`: it had brought more of the answer; `from_outside`: known to be no request's
        doing."""
        if got_on:
            self.n, self._is_open = 0, False
        if not from_outside:
            self.n, self._is_open = self.n + 1, True
