"""One answer as it grows: tokens in, text out, and when it is over.

Stop strings, characters cut by tokens and the end of a generation are seen token by token, so that neither the text nor
the count depends on how many tokens a round happened to bring.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from tightwad_agent.proxy.ports import Chunk, Token
from tightwad_agent.proxy.stops import StopScanner
from tightwad_agent.proxy.text import TextDecoder
from tightwad_agent.wire.verify import Ended

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True, slots=True)
class Part:
    """What a chunk added. `tokens`: those whose text is out, where they are asked for; `finish` not empty: the last.
    `ids`: of all tokens of the chunk, whether or not their text is out."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: str = ""
    ids: tuple[int, ...] = field(default=(), compare=False)


class Transcript:
    """`n_tokens` counts what was generated, the token that ends it included, up to where a stop string was complete.

    `with_tokens`: parts bring the tokens (for log probabilities), each with the part that has the first of its text.
    """

    def __init__(self, stops: Sequence[str] = (), *, with_tokens: bool = False) -> None:
        self.n_tokens = 0
        self._decoder = TextDecoder()
        self._scanner = StopScanner(stops)
        self._with_tokens = with_tokens
        self._waiting: deque[tuple[int, Token]] = deque()
        self._n_read = 0
        self._n_out = 0

    def feed(self, chunk: Chunk) -> Part:
        """Raises nothing; must not be called after a part with `finish`."""
        ids = tuple([token.id for token in chunk.tokens])
        shown = chunk.tokens[:-1] if chunk.ended is Ended.EOG else chunk.tokens
        texts = []
        for token in shown:
            texts.append(self._read(token))
            if self._scanner.stopped is not None:
                return self._part(texts, STOP, ids)
        self.n_tokens += len(chunk.tokens) - len(shown)
        if chunk.ended is Ended.NOT:
            return self._part(texts, "", ids)
        texts += [self._scanner.feed(self._decoder.rest()), self._scanner.rest()]
        stopped = chunk.ended is Ended.EOG or self._scanner.stopped is not None
        return self._part(texts, STOP if stopped else LENGTH, ids)

    def _read(self, token: Token) -> str:
        self.n_tokens += 1
        if self._with_tokens:
            self._waiting.append((self._n_read, token))
        text = self._decoder.feed(token.piece)
        self._n_read += len(text)
        return self._scanner.feed(text)

    def _part(self, texts: list[str], finish: str, ids: tuple[int, ...]) -> Part:
        text = "".join(texts)
        self._n_out += len(text)
        everything = bool(finish) and self._scanner.stopped is None
        tokens = []
        while self._waiting and (everything or self._waiting[0][0] < self._n_out):
            tokens.append(self._waiting.popleft()[1])
        return Part(text, tuple(tokens), finish, ids)
