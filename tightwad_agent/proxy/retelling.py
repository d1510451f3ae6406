"""An answer that is told again from its beginning, to a client that has part of it already. Pure.

llama-server says text and no token ids, so what it began cannot be handed to another engine. With the same seed it says
the same again: what the client has is compared and left out, and the answer goes on behind it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tightwad_agent.errors import TightwadError
from tightwad_agent.proxy.book import taken
from tightwad_agent.proxy.openai import dump

MAX_BYTES = 8 << 20
"""Of one answer's text, and of digests of events that have none."""
MAX_DEPTH = 8

_EVENT = re.compile(rb".*?(?:\r\n\r\n|\n\n|\r\r)|.+\Z", re.DOTALL)
_VOLATILE = frozenset(
    {"id", "created", "created_at", "item_id", "response_id", "system_fingerprint", "timings", "usage"}
)
_ONCE = frozenset({"role", "id"})
"""Texts that come once and may be drawn by dice."""

Key = tuple[object, ...]


class AnswerChanged(TightwadError):
    """The engine that took over says something else than what the client has been given already."""

    code = "answer_changed"
    http_status = 502


class Retelling:
    """Server-sent events on their way to a client. `take` as in `book.Book`."""

    def __init__(self, take: Callable[[int], None] = lambda _n: None) -> None:
        self.is_full = False
        self.done = False
        """The client has the event that ends the stream."""
        self._take = take
        self._again = False
        self._roles_sent = False
        self._n_bytes = 0
        self._had: dict[Key, str] = {}
        self._more: dict[Key, list[str]] = {}
        self._at: dict[Key, int] = {}
        self._over: set[int] = set()
        self._head: dict[str, Any] = {}
        self._plain: list[bytes] = []
        self._n_plain = 0

    def knows(self, texts: Mapping[int, str], over: set[int], head: Mapping[str, Any], *, chat: bool) -> None:
        """It begins as a stream whose roles were sent, and these texts of its choices. `head`: `id` and `created`."""
        path = ("delta", "content") if chat else ("text",)
        self._more = {(index, *path): [text] for index, text in texts.items()}
        self._over, self._roles_sent, self._head = set(over), True, dict(head)

    @property
    def empty(self) -> bool:
        """Nothing has gone out."""
        return not (self._had or self._more or self._over or self._plain or self._roles_sent)

    @property
    def n_chars(self) -> int:
        """Of all choices, gone out."""
        return sum(map(len, self._had.values())) + sum(len(t) for texts in self._more.values() for t in texts)

    def again(self) -> None:
        """Another engine tells it, from the beginning."""
        self._again = not self.empty
        for key, texts in self._more.items():
            self._had[key] = self._had.get(key, "") + "".join(texts)
        self._more, self._at, self._n_plain = {}, {}, 0

    def pass_on(self, data: bytes) -> bytes:
        """What of whole events the client does not have. Raises `AnswerChanged`."""
        return b"".join(self._event(event) for event in _EVENT.findall(data))

    def _event(self, event: bytes) -> bytes:
        lines = [line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")]
        if not lines:
            return b"" if self._behind() else event
        data = b"\n".join(lines)
        if data == b"[DONE]":
            return self._end(event)
        try:
            plain = json.loads(data)
        except (ValueError, RecursionError):
            return self._other(event, data)
        choices = plain.get("choices") if isinstance(plain, dict) else None
        if isinstance(choices, list) and choices and all(isinstance(one, dict) for one in choices):
            return self._choices(event, plain, choices)
        if self._again and choices == []:
            event = b"data: " + dump({**plain, **self._head}) + b"\n\n"
        return self._other(event, dump(_lasting(plain)))

    def _end(self, event: bytes) -> bytes:
        if self._behind():
            raise AnswerChanged(_SHORTER)
        self.done = True
        return event

    # Events with choices

    def _choices(self, event: bytes, plain: dict[str, Any], choices: list[dict[str, Any]]) -> bytes:
        self._head = self._head or {name: plain[name] for name in ("id", "created") if name in plain}
        fresh = [choice for choice in choices if self._choice(_index(choice, 0), choice)]
        if not self._again:
            return event
        return b"data: " + dump({**plain, **self._head, "choices": fresh}) + b"\n\n" if fresh else b""

    def _choice(self, index: int, choice: dict[str, Any]) -> bool:
        """Leaves in the choice what is new; whether anything is."""
        if index in self._over:
            return False
        is_new = False
        for path, holder, name in _texts(choice):
            said = holder[name]
            holder[name] = left = self._text((index, *path), said)
            is_new = is_new or bool(left)
            if left != said and "logprobs" in choice:
                choice["logprobs"] = None
        if choice.get("finish_reason") is None:
            return is_new
        if self._behind(index):
            raise AnswerChanged(_SHORTER)
        self._over.add(index)
        return True

    def _text(self, key: Key, text: str) -> str:
        had, at = self._had.get(key, ""), self._at.get(key, 0)
        if key[-1] in _ONCE and (had or key in self._more or (key[-1] == "role" and self._roles_sent)):
            self._at[key] = len(had)
            return ""
        known = had[at : at + len(text)]
        if not text.startswith(known):
            raise AnswerChanged(f"{_OTHER}: {text[:40]!r} where the client has {known[:40]!r}")
        self._at[key] = at + len(known)
        left = text[len(known) :]
        if left and self._keeps(len(left)):
            self._more.setdefault(key, []).append(left)
        return left

    def _behind(self, index: int | None = None) -> bool:
        """The client has more than was told again, of all choices or one."""
        return any(
            self._at.get(key, 0) < len(text)
            for key, text in self._had.items()
            if (index is None or key[0] == index) and key[-1] not in _ONCE and key[0] not in self._over
        )

    # Others

    def _other(self, event: bytes, lasting: bytes) -> bytes:
        """Events without choices, one by one in their order."""
        digest = hashlib.sha256(lasting).digest()[:8]
        at, self._n_plain = self._n_plain, self._n_plain + 1
        if at >= len(self._plain):
            if self._keeps(len(digest)):
                self._plain.append(digest)
            return event
        if self._plain[at] != digest:
            raise AnswerChanged(f"{_OTHER}: an event differs from the one that the client has")
        return b""

    def _keeps(self, n_bytes: int) -> bool:
        self._n_bytes += n_bytes
        if self._n_bytes > MAX_BYTES or not taken(self._take, n_bytes):
            self.is_full = True
        return not self.is_full


_OTHER = "the engine that took over says something else"
_SHORTER = "the engine that took over ends the answer before where the client has it"


def _index(plain: dict[str, Any], at: int) -> int:
    found = plain.get("index")
    return found if isinstance(found, int) else at


def _texts(choice: dict[str, Any]) -> list[tuple[Key, dict[str, Any], str]]:
    """Every text of a choice that grows from event to event: its path, and where it is."""
    found: list[tuple[Key, dict[str, Any], str]] = []
    if isinstance(choice.get("text"), str):
        found.append((("text",), choice, "text"))
    if isinstance(choice.get("delta"), dict):
        found += _walk(choice["delta"], ("delta",))
    return found


def _walk(plain: dict[str, Any], path: Key) -> Iterator[tuple[Key, dict[str, Any], str]]:
    if len(path) > MAX_DEPTH:
        return
    for name, value in plain.items():
        if isinstance(value, str):
            yield (*path, name), plain, name
        elif isinstance(value, dict):
            yield from _walk(value, (*path, name))
        elif isinstance(value, list):
            for at, one in enumerate(value):
                if isinstance(one, dict):
                    yield from _walk(one, (*path, name, _index(one, at)))


def _lasting(plain: Any, depth: int = 0) -> Any:
    """Without what differs each time the same is said."""
    if depth > MAX_DEPTH:
        return None
    if isinstance(plain, dict):
        return {name: _lasting(value, depth + 1) for name, value in plain.items() if name not in _VOLATILE}
    if isinstance(plain, list):
        return [_lasting(value, depth + 1) for value in plain]
    return plain
