"""What a client has been given of one answer, to the token: enough to have the rest made by another engine. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tightwad_agent.errors import NotReady
from tightwad_agent.wire.journal import Began, Choice, Resume, Said

MAX_BYTES = 8 << 20
"""Of one answer, ids and text together: a million tokens."""
WORTH = 8
"""So many more tokens than at the last loss count as progress: the request is not what brings its servers down."""


@dataclass(slots=True)
class _Choice:
    ids: bytearray = field(default_factory=bytearray)
    texts: list[str] = field(default_factory=list)
    n_cached: int = 0
    over: bool = False
    n_answer: int = 0


class Book:
    """Kept by the node that the client talks to. `take` is told of bytes that are kept, and raises `NotReady` if there
    is no room for them: then nothing is kept any more, and the answer cannot go on elsewhere."""

    def __init__(self, take: Callable[[int], None] = lambda _n: None) -> None:
        self.opened = False
        """Something of a stream was sent."""
        self.is_full = False
        self.n_tokens = 0
        self._take = take
        self._began: Began | None = None
        self._choices: dict[int, _Choice] = {}
        self._n_bytes = 0
        self._n_at_loss = 0

    def begin(self, began: Began) -> None:
        """An engine begins, or goes on: the word of the first that made something stays."""
        if self._began is None or not self._choices:
            self._began = began

    def add(self, said: Said, *, sent: bool) -> None:
        """More of a choice was made; `sent`: and something of it went to the client."""
        self.opened = self.opened or sent
        self.n_tokens += len(said.tokens) // 4
        if not self._keeps(len(said.tokens) + len(said.text)):
            return
        choice = self._choices.setdefault(said.index, _Choice())
        if not choice.ids:
            choice.n_cached = said.n_cached
        choice.ids += said.tokens
        if said.text:
            choice.texts.append(said.text)
        choice.over, choice.n_answer = said.over, said.n_answer

    def resume(self) -> Resume | None:
        """For the next engine; `None` if there is nothing to go on from."""
        if self._began is None or not self._choices or self.is_full:
            return None
        choices = tuple(
            Choice(index, bytes(c.ids), c.n_cached, c.over, c.n_answer) for index, c in sorted(self._choices.items())
        )
        return Resume(self._began, choices, self.opened)

    def texts(self) -> dict[int, str]:
        """What the client has of each choice's text."""
        return {index: "".join(choice.texts) for index, choice in self._choices.items()}

    def finished(self) -> set[int]:
        """The choices that the client knows to be complete."""
        return {index for index, choice in self._choices.items() if choice.over}

    @property
    def began(self) -> Began | None:
        return self._began

    def restart(self) -> None:
        """The answer is made anew from its first token: by an engine that cannot go on with another's."""
        self._began, self._choices, self.n_tokens = None, {}, 0

    def progressed(self) -> bool:
        """The engine was lost. Whether it had brought more than a little since the last one was."""
        worth = self.n_tokens >= self._n_at_loss + WORTH
        self._n_at_loss = max(self._n_at_loss, self.n_tokens)
        return worth

    def _keeps(self, n_bytes: int) -> bool:
        if self.is_full:
            return False
        self._n_bytes += n_bytes
        if self._n_bytes > MAX_BYTES or not taken(self._take, n_bytes):
            self.is_full = True
            self._choices = {}
        return not self.is_full


def taken(take: Callable[[int], None], n_bytes: int) -> bool:
    """Whether there was room."""
    try:
        take(n_bytes)
    except NotReady:
        return False
    return True
