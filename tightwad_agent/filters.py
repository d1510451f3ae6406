"""What a tunnel does with the bytes that pass in one direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Chunk = bytes | bytearray | memoryview
Later = Callable[[], Chunk]
"""Bytes that have to be fetched, by a thread, when it is their turn. Raises `ProtocolError`."""
Item = Chunk | Later


class Filter:
    """Sees each chunk of one direction and says what to pass on in its place. This one changes nothing.

    One that follows the messages can also say what is worth waiting for, so that many small writes become few. That is
    about what was fed so far; where it errs, bytes come a little later.
    """

    in_bursts = False
    """What follows comes in several writes."""

    @property
    def missing(self) -> int:
        """The least number of bytes, 1 or more, that can come next before anybody waits for something."""
        return 1

    @property
    def is_inside(self) -> bool:
        """A message has begun and is not whole."""
        return False

    @property
    def more_follows(self) -> bool:
        """Nobody on the other side can do anything with what was passed on before more comes."""
        return False

    def feed(self, data: Chunk) -> Sequence[Item]:
        """Nothing, itself, or other items, in order. Parts of `data` need not be copied. Raises `ProtocolError`."""
        return (data,)


class Changing(Filter):
    """A function as a filter."""

    def __init__(self, change: Callable[[Chunk], Sequence[Item]]) -> None:
        self._change = change

    def feed(self, data: Chunk) -> Sequence[Item]:
        """What the function makes of it."""
        return self._change(data)
