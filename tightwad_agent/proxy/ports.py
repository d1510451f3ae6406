"""What generating on the verifier needs of the rest; `engine` provides it, the agent hands it over.

Handles deliver to a callback in trio's thread: one task per request reads its own inbox, so nothing else is scheduled
between an event and the decision that follows from it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from tightwad_agent.errors import TightwadError
from tightwad_agent.wire import draft
from tightwad_agent.wire.draft import Drafted, NoDraft
from tightwad_agent.wire.verify import Accepted, Ended, Failed, Loaded, Sampling, TokenProbabilities

VerifierEvent = Accepted | Failed | TightwadError
"""A `TightwadError`: the verifier is gone, and this request with it."""
DraftEvent = Drafted | NoDraft


class VerifierRequest(Protocol):
    """One open request. Nothing here blocks."""

    def round(self, at: int, draft: Sequence[int], free: int) -> None:
        """As `wire.verify.Round`. Does nothing once the verifier is gone; its events say so."""
        ...

    def close(self) -> None:
        """Idempotent. No event comes after it."""
        ...


class Verifier(Protocol):
    """A verifier that has loaded its model."""

    @property
    def info(self) -> Loaded: ...

    async def tokenize(self, text: bytes, *, special: bool = True, begin: bool = True) -> list[int]:
        """Token ids. Raises a `PeerError` if the verifier goes away."""
        ...

    async def detokenize(self, tokens: Sequence[int]) -> bytes: ...

    def open(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int,
        n_probs: int = -1,
        said: Sequence[int] = (),
        deliver: Callable[[VerifierEvent], None],
    ) -> VerifierRequest:
        """As `wire.verify.Open`. Raises `NotBegun` if the verifier is gone, or holds too many requests already."""
        ...


class DraftSession(Protocol):
    """One request at one drafter. Nothing here blocks; what cannot be sent is answered with `NoDraft`."""

    def ask(self, branch: int, keep: int, tokens: Sequence[int], n: int) -> None: ...

    def extend(self, branch: int, n: int) -> None: ...

    def collect(self) -> None:
        """Delivers what has arrived by now."""
        ...

    def patient(self, is_patient: bool) -> None:
        """Whether tokens may be delivered a little later, several together. At first they come at once."""
        ...

    def forget(self) -> None:
        """Idempotent. No event comes after it."""
        ...


DrafterInfo = draft.DrafterInfo


class Drafter(Protocol):
    """A drafter that is ready. `alive` turns false for good when it is lost."""

    @property
    def info(self) -> DrafterInfo: ...

    @property
    def alive(self) -> bool: ...

    def open(self, deliver: Callable[[DraftEvent], None]) -> DraftSession: ...


# What the endpoint asks of the generating side


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer; `piece` may be part of a character."""

    id: int
    piece: bytes
    probabilities: TokenProbabilities | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one round brought, at least one token. `ended` other than `NOT`: the last chunk."""

    tokens: tuple[Token, ...]
    ended: Ended = Ended.NOT


@dataclass(slots=True)
class Timings:
    """What one request cost so far. Times in milliseconds of wall clock.

    `rounds`: forward passes after the prompt. `drafted` tokens were in them, `accepted` of those were right;
    `tried_at[i]` and `accepted_at[i]`: the same for the i-th position of a draft. `verify_ms`: in forward passes.
    `draft_ms`: time the drafters took for the tokens that were used in rounds; `waited_ms`: time in which no forward
    pass ran for want of drafts, so 1 - waited/draft is the share that was hidden. `drafters`: tokens in rounds by
    who drafted them (a node's name, or `n-gram`).
    """

    n_prompt: int = 0
    n_cached: int = 0
    n_generated: int = 0
    prompt_ms: float = 0.0
    generate_ms: float = 0.0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    tried_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    verify_ms: float = 0.0
    draft_ms: float = 0.0
    waited_ms: float = 0.0
    drafters: dict[str, int] = field(default_factory=dict)


class Generation(Protocol):
    """One running answer. Leaving the `async with` that gave it ends it, within one round."""

    timings: Timings

    def __aiter__(self) -> AsyncIterator[Chunk]:
        """Chunks until one says `ended`. Raises `ContextOverflow` or another `TightwadError` that says what happened;
        a `PeerError` where the verifier was lost."""
        ...


class Generator(Protocol):
    """Starts answers on the verifier that serves now."""

    @property
    def info(self) -> Loaded: ...

    async def tokenize(self, text: bytes, *, special: bool = True, begin: bool = True) -> list[int]: ...

    async def detokenize(self, tokens: Sequence[int]) -> bytes: ...

    def start(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int,
        n_probs: int = -1,
        drafts: bool = True,
        said: Sequence[int] = (),
    ) -> AbstractAsyncContextManager[Generation]:
        """`drafts` false: without any, which changes nothing but the speed. `said`: how the answer began elsewhere; it
        comes first once more, in chunks of its own, and counts for `max_tokens`."""
        ...
