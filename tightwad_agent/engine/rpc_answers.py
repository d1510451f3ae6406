"""What a worker answers: `u64 little-endian size | payload`, which it writes in two parts."""

from __future__ import annotations

from tightwad_agent.filters import Chunk, Filter

_SIZE = 8


class Answers(Filter):
    """Follows them, so that a size waits for what it is the size of. All that comes is taken for answers."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._left = 0  # of the payload

    @property
    def missing(self) -> int:
        """Of the answer that has begun; a size is written at once."""
        return self._left or (_SIZE - len(self._head) if self._head else 1)

    @property
    def is_inside(self) -> bool:
        """See `Filter`."""
        return bool(self._left or self._head)

    @property
    def more_follows(self) -> bool:
        """See `Filter`."""
        return self.is_inside

    def feed(self, data: Chunk) -> tuple[Chunk]:
        """Itself."""
        at, n = 0, len(data)
        while at < n:
            if self._left:
                step = min(self._left, n - at)
                self._left -= step
                at += step
                continue
            part = data[at : at + _SIZE - len(self._head)]
            self._head += part
            at += len(part)
            if len(self._head) == _SIZE:
                self._left = int.from_bytes(self._head, "little")
                self._head = bytearray()
        return (data,)
