"""Means and shares that forget."""

from __future__ import annotations

from typing import Final

WILD: Final = 4.0
"""A measured value so many times above or below what is known counts as that many times only."""


class Smooth:
    """A mean that forgets, and that no single wild value moves far."""

    __slots__ = ("_weight", "n", "value")

    def __init__(self, guess: float, weight: float = 0.1) -> None:
        self.value, self._weight, self.n = guess, weight, 0

    def add(self, value: float) -> None:
        self.n += 1
        if self.n == 1:
            self.value = value
            return
        near = max(self.value, 1e-4)
        value = min(max(value, near / WILD), near * WILD)
        self.value += max(self._weight, 1 / self.n) * (value - self.value)


class Odds:
    """A share of successes that forgets: each try counts `keep` times what the next counts."""

    __slots__ = ("hits", "keep", "tries")

    def __init__(self, keep: float = 0.99) -> None:
        self.hits, self.tries, self.keep = 0.0, 0.0, keep

    def add(self, *, hit: bool) -> None:
        self.hits = self.hits * self.keep + hit
        self.tries = self.tries * self.keep + 1

    def rate(self, guess: float, weight: float) -> float:
        """With `guess` counting as `weight` tries."""
        return (self.hits + guess * weight) / (self.tries + weight)
