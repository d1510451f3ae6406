"""Questions to a child and their answers, by number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from tightwad_agent.errors import NotReady, PeerGone, PeerSilent, ProtocolError


class _Question:
    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.settled = trio.Event()
        self.answer: Any = None


class Questions:
    """At most `most` open ones, each with a deadline. One that nobody waits for any more stays open until it is
    answered: whoever watches the child wants to know."""

    def __init__(self, send: Callable[[Any], None], *, most: int, deadline_s: float) -> None:
        self._send = send
        self._most = most
        self._deadline_s = deadline_s
        self._open: dict[int, _Question] = {}
        self._n_asked = 0
        self._lost = ""
        self._error = PeerGone

    def __len__(self) -> int:
        return len(self._open)

    def put(self, kind: type, message: Callable[[int], Any]) -> _Question:
        """Asks without waiting; `message` is made with the question's number, its answer must be a `kind`."""
        question = self._open[self._n_asked] = _Question(kind)
        self._n_asked += 1
        self._send(message(self._n_asked - 1))
        return question

    async def ask(self, kind: type, message: Callable[[int], Any]) -> Any:
        """The answer. Raises `PeerGone`, `PeerSilent`, and `NotReady` when too much is asked at once."""
        if self._lost:
            raise self._error(self._lost)
        if len(self._open) >= self._most:
            raise NotReady(f"{len(self._open)} questions are open already")
        question = self.put(kind, message)
        with trio.move_on_after(self._deadline_s):
            await question.settled.wait()
        if question.answer is not None:
            return question.answer
        if self._lost:
            raise self._error(self._lost)
        raise PeerSilent(f"no answer within {self._deadline_s:g} s")

    def answer(self, number: int, message: Any) -> None:
        """Raises `ProtocolError` for one that was not asked for."""
        question = self._open.pop(number, None)
        if question is None or type(message) is not question.kind:
            raise ProtocolError(f"{type(message).__name__} for call {number}, where none was due")
        question.answer = message
        question.settled.set()

    def close(self, reason: str, error: type[PeerGone] = PeerGone) -> None:
        """Whoever waits, or asks from now on, gets `error`."""
        self._lost, self._error = reason, error
        for question in self._open.values():
            question.settled.set()
        self._open.clear()
