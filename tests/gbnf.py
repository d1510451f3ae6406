"""Whether a text follows a grammar of llama.cpp: slow, and written without looking at how llama.cpp does it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache

Match = Callable[[str, int], frozenset[int]]
"""Where in the text, from a place on, this may end."""

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|\{\d+,\d*\}|\{\d+\}|[()|?*+]|[A-Za-z0-9-]+')
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "]": "]", "[": "["}


class Grammar:
    def __init__(self, text: str) -> None:
        self._rules: dict[str, Match] = {}
        for line in text.removesuffix("\n").split("\n"):
            name, _, body = line.partition(" ::= ")
            assert name not in self._rules, name
            assert not _TOKEN.sub("", body).strip(), f"what is not of the language: {_TOKEN.sub('', body)}"
            self._tokens = _TOKEN.findall(body)
            self._rules[name] = self._alternatives()
            assert not self._tokens, self._tokens

    def takes(self, text: str) -> bool:
        return len(text) in self._rules["root"](text, 0)

    def _alternatives(self) -> Match:
        made = [self._sequence()]
        while self._tokens and self._tokens[0] == "|":
            del self._tokens[0]
            made.append(self._sequence())
        return lambda text, at: frozenset().union(*(one(text, at) for one in made))

    def _sequence(self) -> Match:
        made: list[Match] = []
        while self._tokens and self._tokens[0] not in ("|", ")"):
            made.append(self._repeated(self._one()))

        def match(text: str, at: int) -> frozenset[int]:
            ends = frozenset((at,))
            for one in made:
                ends = frozenset().union(*(one(text, end) for end in ends))
            return ends

        return match

    def _one(self) -> Match:
        token = self._tokens.pop(0)
        if token == "(":
            made = self._alternatives()
            assert self._tokens.pop(0) == ")"
            return made
        if token[0] == '"':
            wanted = _plain(token[1:-1])
            return lambda text, at: frozenset((at + len(wanted),)) if text.startswith(wanted, at) else frozenset()
        if token[0] == "[":
            letters = re.compile(token)
            return lambda text, at: frozenset((at + 1,)) if letters.match(text, at) else frozenset()

        @cache
        def match(text: str, at: int) -> frozenset[int]:  # the rule may come later
            return self._rules[token](text, at)

        return match

    def _repeated(self, one: Match) -> Match:
        for low, high in self._bounds():
            one = _times(one, low, high)
        return one

    def _bounds(self) -> Iterator[tuple[int, int]]:
        while self._tokens and (self._tokens[0] in "?*+" or self._tokens[0][0] == "{"):
            token = self._tokens.pop(0)
            if token[0] == "{":
                low, comma, high = token[1:-1].partition(",")
                yield int(low), int(high) if high else (1 << 30 if comma else int(low))
            else:
                yield {"?": (0, 1), "*": (0, 1 << 30), "+": (1, 1 << 30)}[token]


def _times(one: Match, low: int, high: int) -> Match:
    def match(text: str, at: int) -> frozenset[int]:
        found: set[int] = {at} if low == 0 else set()
        ends, n = frozenset((at,)), 0
        while ends and n < high:
            n += 1
            ends = frozenset().union(*(one(text, end) for end in ends)) - (found if n > low else frozenset())
            if n >= low:
                found |= ends
        return frozenset(found)

    return match


def _plain(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: _ESCAPES[match[1]], text)
