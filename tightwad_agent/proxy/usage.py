"""What was asked with each API key on this node: requests and tokens of answers. Pure.

Tokens are counted where the client is: from the end of each answer, where both engines say how many there were.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

MAX_NAMES = 128
"""Names that are counted one by one."""
OTHERS = "others"
TAIL_BYTES = 4096
"""How much of an answer's end is looked at."""
_TOKENS = re.compile(rb'(?<!\\)"(?:completion_tokens|predicted_n)"\s*:\s*(\d{1,12})\b')


@dataclass(frozen=True, slots=True)
class Used:
    """Since the agent started. `tokens`: of answers."""

    requests: int = 0
    tokens: int = 0


class Usage:
    """Sums by name of key; requests without a key are counted as of nobody."""

    def __init__(self) -> None:
        self._used: dict[str, Used] = {}

    def count(self, name: str, answer_tail: bytes) -> None:
        """One request of this key was answered."""
        known = name if name in self._used or len(self._used) < MAX_NAMES else OTHERS
        before = self._used.get(known, Used())
        self._used[known] = replace(before, requests=before.requests + 1, tokens=before.tokens + tokens_of(answer_tail))

    def of(self, name: str) -> Used:
        return self._used.get(name, Used())

    def all(self) -> dict[str, Used]:
        return dict(self._used)


def tokens_of(tail: bytes) -> int:
    """How many tokens an answer had, as its end says; 0 where it says nothing. What the model wrote itself cannot pass
    for it: a quotation mark in a text is escaped."""
    said = [int(n) for n in _TOKENS.findall(tail)]
    return max(said, default=0)
