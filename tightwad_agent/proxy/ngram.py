"""Drafts without a model: where the newest tokens stood before in the same text, what followed then may follow again.

Two tables say where each pair and each run of four tokens was last seen. A copy once found is followed for as long as
it predicts right, so a token costs a few dictionary accesses, whatever the length of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, takewhile
from operator import mul
from typing import Final

from tightwad_agent.proxy.averages import Odds

SHORT, LONG = 2, 4
LONGEST: Final = 32
"""Tokens in common that are counted; more say nothing more."""
MAX_INDEXED: Final = 1 << 17
"""Positions in the tables; a longer text forgets its beginning."""
CLASSES: Final = (3, 4, 6, 8, 12, 16, 24, LONGEST)
"""Lengths in common are judged by: up to 2, 3, 4 or 5, 6 or 7, ..."""
GUESSES: Final = (0.25, 0.35, 0.5, 0.65, 0.75, 0.8, 0.87, 0.92, 0.95)


def _classes() -> list[int]:
    return [sum(n >= edge for edge in CLASSES) for n in range(LONGEST + 1)]


CLASS_OF: Final = _classes()


class CopyOdds:
    """How often a copy went on, by the length in common so far. One for all requests, one for each over it."""

    def __init__(self, general: CopyOdds | None = None) -> None:
        self._general = general
        keep = 0.98 if general else 0.995
        self._odds = [Odds(keep) for _ in GUESSES]

    def add(self, common: int, *, hit: bool) -> None:
        self._odds[CLASS_OF[min(common, LONGEST)]].add(hit=hit)
        if self._general:
            self._general.add(common, hit=hit)

    def of_request(self) -> CopyOdds:
        """For one request, which begins with these."""
        return CopyOdds(self)

    def rate(self, common: int) -> float:
        """Probability that the next token is as in the copy, with `common` tokens before it equal."""
        k = CLASS_OF[min(common, LONGEST)]
        guess = self._general.rate(common) if self._general else GUESSES[k]
        return self._odds[k].rate(guess, 6.0 if self._general else 4.0)

    def reached(self, common: int, n: int) -> list[float]:
        """For each of `n` tokens to copy: the probability that it and all before it are right."""
        return list(accumulate((self.rate(common + i) for i in range(n)), mul))


def _last_places(text: list[int], length: int) -> dict[tuple[int, ...], int]:
    """The position after the last place of each run of `length` tokens."""
    return dict(zip(zip(*(text[i:] for i in range(length)), strict=False), range(length, len(text) + 1), strict=False))


class NGram:
    """The text of one request, prompt included, and where its end stood before."""

    def __init__(self, odds: CopyOdds, tokens: Sequence[int] = (), max_indexed: int = MAX_INDEXED) -> None:
        self.odds = odds
        self.text = list(tokens[-max_indexed:-1])
        self.common = 0
        """Tokens before the end that are equal to those before `at`; 0: no copy."""
        self._at = 0
        self._tables = _last_places(self.text, SHORT), _last_places(self.text, LONG)
        self._most = max_indexed
        for token in tokens[-1:]:
            self._append(token)

    def add(self, tokens: Sequence[int]) -> None:
        """The text went on; what was predicted is judged by it."""
        for token in tokens:
            if self.common:
                self.odds.add(self.common, hit=self.text[self._at] == token)
            self._append(token)

    def propose(self, n: int) -> list[int]:
        """`n` tokens that may follow; none without a copy."""
        return self.behind((), n)[0]

    def behind(self, draft: Sequence[int], n: int) -> tuple[list[int], int]:
        """`n` tokens that may follow `draft`, if that is how the text goes on; and how many tokens before are equal
        to those before the copy. Without a copy none, and 0. One that reaches the end goes round."""
        at, common = self._place_behind(draft) if draft else (self._at, self.common)
        if not common:
            return [], 0
        copied = self.text[at : at + n]
        copied += draft[: n - len(copied)]
        return (copied * -(-n // len(copied)))[:n] if n else [], common

    def _place_behind(self, draft: Sequence[int]) -> tuple[int, int]:
        at, n = self._at, len(draft)
        if self.common and self.text[at : at + n] == list(draft):
            return at + n, min(self.common + n, LONGEST)
        tail = [*self.text[-LONGEST:], *draft][-LONGEST:]
        for table, length in zip(reversed(self._tables), (LONG, SHORT), strict=True):
            if at := table.get(tuple(tail[-length:]), 0):
                return at, self._common(at, tail)
        return 0, 0

    def _append(self, token: int) -> None:
        follows = self.common and self.text[self._at] == token
        self.text.append(token)
        if follows:
            self.common, self._at = min(self.common + 1, LONGEST), self._at + 1
        long, short = self._place(LONG), self._place(SHORT)
        if not follows:
            self._find(long or short)

    def _place(self, length: int) -> int:
        """Where the last `length` tokens stood before (the position after them), and now stand. 0: nowhere."""
        end = len(self.text)
        if end < length:
            return 0
        table = self._tables[length == LONG]
        key = tuple(self.text[-length:])
        before = table.pop(key, 0)
        table[key] = end
        if len(table) > self._most:
            del table[next(iter(table))]
        return before

    def _find(self, at: int) -> None:
        self._at, self.common = at, self._common(at, self.text[-LONGEST:])

    def _common(self, at: int, tail: Sequence[int]) -> int:
        """How many tokens before `at` are equal to the last ones of `tail`, `LONGEST` at most."""
        before = self.text[max(0, at - LONGEST) : at]
        pairs = zip(reversed(before), reversed(tail), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
