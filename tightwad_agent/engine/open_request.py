"""A request at the verifier, as the agent holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tightwad_agent.errors import PeerGone, ProtocolError, TightwadError
from tightwad_agent.wire.verify import MAX_ROUND, Accepted, Close, Ended, Failed, Round, pack_tokens

Deliver = Callable[[Accepted | Failed | TightwadError], None]


class Client(Protocol):
    """The verifier that a request is open at."""

    def send(self, message: object) -> None: ...

    def forget(self, number: int) -> bool:
        """Whether it was open."""
        ...


class OpenRequest:
    """See `proxy.ports.VerifierRequest`. Only `VerifierClient.open` makes one."""

    __slots__ = ("_client", "_deliver", "_end", "_is_over", "_n_given", "id", "prompted", "waits")

    def __init__(self, client: Client, number: int, n_prompt: int, deliver: Deliver, n_said: int = 0) -> None:
        self.id = number
        self.prompted = False
        """Its prompt is evaluated."""
        self.waits = True
        """An answer is due: of the prompt, or of the newest round."""
        self._is_over = False
        self._end = n_prompt  # tokens of its sequence so far
        self._n_given = n_prompt + n_said
        self._deliver = deliver
        self._client = client

    def round(self, at: int, draft: Sequence[int], free: int) -> None:
        """As `wire.verify.Round`, with as much of the draft as one round takes. Nothing once the request is over."""
        if not self._is_over:
            self.waits = True
            self._client.send(Round(self.id, at, pack_tokens(draft[:MAX_ROUND]), free))

    def close(self) -> None:
        """Idempotent. No event comes after it."""
        self._is_over, self.waits = True, False
        if self._client.forget(self.id):
            self._client.send(Close(self.id))

    def take(self, message: Accepted | Failed) -> None:
        """Delivers what the verifier says, unless it is over. Raises `ProtocolError` for what does not continue it."""
        if self._is_over:
            return
        if isinstance(message, Accepted):
            _check(message, self._end)
            self._end += len(message.pieces)
            self.prompted = self._end > self._n_given
            self._is_over = message.ended is not Ended.NOT
        else:
            self._is_over = True
        self.waits = not (self._is_over or self.prompted)
        self._deliver(message)

    def lose(self, error: PeerGone) -> None:
        """The verifier is gone."""
        if not self._is_over:
            self._is_over, self.waits = True, False
            self._deliver(error)


def _check(message: Accepted, end: int) -> None:
    """Raises `ProtocolError` for an event that does not continue a sequence of `end` tokens."""
    n = len(message.pieces)
    if len(message.tokens) != 4 * n or (message.probabilities and len(message.probabilities) != n):
        raise ProtocolError(f"{len(message.tokens)} bytes of tokens with {n} pieces")
    if message.at != end:
        raise ProtocolError(f"tokens for position {message.at} of a sequence of {end}")
    if not n and message.ended is Ended.NOT:
        raise ProtocolError("a round without a token")
