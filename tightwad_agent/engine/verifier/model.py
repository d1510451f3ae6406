"""What the loop needs of a loaded model; `llama.Llama` is the real one. Positions and token counts are per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from tightwad_agent.wire.verify import Loaded, Rollback, Sampling, TokenProbabilities


class Piece(NamedTuple):
    """Tokens of one sequence in a forward pass, from `position` on; logits are wanted for the last `n_outputs`."""

    seq: int
    position: int
    tokens: list[int]
    n_outputs: int


class Outcome(Enum):
    """How a forward pass ended. After `NO_ROOM` memory is as before; after `FAILED` it is unknown."""

    DONE = "done"
    NO_ROOM = "no room"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Facts:
    """`batch` tokens fit into one forward pass, `n_outputs` of them with logits. `loaded`: what the agent is told."""

    batch: int
    n_outputs: int
    eog: frozenset[int]
    loaded: Loaded

    @property
    def context(self) -> int:
        return self.loaded.context

    @property
    def slots(self) -> int:
        return self.loaded.slots

    @property
    def n_vocab(self) -> int:
        return self.loaded.n_vocab

    @property
    def rollback(self) -> Rollback:
        return self.loaded.rollback

    @property
    def window(self) -> int:
        return self.loaded.window


class Sampler(Protocol):
    """A request's chain of samplers with its state: what was drawn, what was said."""

    def sample(self, index: int) -> int:
        """Draws from the logits of the batch's token `index`, and takes note of what it drew."""
        ...

    def retrace(self, index: int, token: int) -> None:
        """As `sample` where `token` was said already: draws, and takes note of `token`."""
        ...

    def close(self) -> None: ...


class Model(Protocol):
    """Nothing here checks ids or positions: who calls it has."""

    @property
    def facts(self) -> Facts: ...

    def decode(self, pieces: Sequence[Piece]) -> Outcome:
        """One forward pass. An output's index is the place of its token in the batch, pieces in the given order."""
        ...

    def sampler(self, sampling: Sampling, prompt: Sequence[int]) -> Sampler: ...

    def parses(self, grammar: str) -> bool:
        """Whether a sampler can follow it."""
        ...

    def probabilities(self, index: int, token: int, n_top: int) -> TokenProbabilities: ...

    def keep(self, seq: int, n: int) -> bool:
        """Drops what lies at position `n` and after; `False` if this model cannot. 0 never fails."""
        ...

    def share(self, source: int, seq: int, n: int) -> None:
        """The first `n` tokens of `source` become those of the empty `seq` too, without being evaluated."""
        ...

    def oldest(self, seq: int) -> int:
        """The first position of which everything is still in memory; -1 if the sequence is empty."""
        ...

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes a token stands for; a control token's only with `special`."""
        ...

    def tokenize(self, text: bytes, *, special: bool, begin: bool) -> list[int]: ...
