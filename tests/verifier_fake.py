"""A model for the verifier's loop without libllama: strict about what is in memory, and as wrong as its memory is."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from tightwad_agent.engine.verifier.model import Facts, Outcome, Piece
from tightwad_agent.wire.verify import Loaded, Probability, Rollback, Sampling, TokenProbabilities, pack_tokens

EOG = 7
N_VOCAB = 97


def facts(
    *,
    context: int = 64,
    slots: int = 3,
    batch: int = 32,
    n_outputs: int = 16,
    rollback: Rollback = Rollback.FULL,
    window: int = 0,
) -> Facts:
    loaded = Loaded(context, context, slots, N_VOCAB, rollback, window, pack_tokens([EOG]))
    return Facts(batch, n_outputs, frozenset([EOG]), loaded)


def token_after(tokens: Sequence[int], sampling: Sampling, n_drawn: int) -> int:
    """What this model says next. A draw depends on how often was drawn before, as with a real generator."""
    key = [*tokens, -1, sampling.seed, n_drawn] if sampling.temperature else list(tokens)
    return zlib.crc32(repr(key).encode()) % N_VOCAB


def expected(prompt: Sequence[int], sampling: Sampling, max_tokens: int, context: int) -> list[int]:
    """A whole answer, one token after the other."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens and len(tokens) < context:
        tokens.append(token_after(tokens, sampling, len(tokens) - len(prompt)))
        if tokens[-1] == EOG:
            break
    return tokens[len(prompt) :]


@dataclass
class FakeSampler:
    model: FakeModel
    sampling: Sampling
    n_drawn: int = 0
    closed: bool = False
    said: int = 0
    """Tokens before the next one, as far as they were given."""

    def sample(self, index: int) -> int:
        assert not self.closed
        token = token_after(self.model.outputs[index], self.sampling, self.n_drawn)
        self.n_drawn += 1
        return token

    def retrace(self, index: int, token: int) -> None:
        assert not self.closed
        assert self.said == len(self.model.outputs[index]), "logits of another position"
        self.said += 1
        self.n_drawn += 1
        assert 0 <= token < N_VOCAB

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        self.model.n_samplers -= 1


@dataclass
class FakeModel:
    """`memory[seq]`: its tokens. `cells`: how many fit, over all sequences. With a window, what lies before it is lost
    at once. `failing`: outcomes for the next passes."""

    facts: Facts
    cells: int = 1 << 20
    memory: list[list[int]] = field(init=False)
    lost: list[int] = field(init=False)
    outputs: dict[int, list[int]] = field(default_factory=dict)
    turns: list[list[Piece]] = field(default_factory=list)
    failing: list[Outcome] = field(default_factory=list)
    n_samplers: int = 0

    def __post_init__(self) -> None:
        self.memory = [[] for _ in range(self.facts.slots)]
        self.lost = [0] * self.facts.slots

    def decode(self, pieces: Sequence[Piece]) -> Outcome:
        n_tokens = sum(len(piece.tokens) for piece in pieces)
        assert 0 < n_tokens <= self.facts.batch
        assert sum(piece.n_outputs for piece in pieces) <= self.facts.n_outputs
        assert len({piece.seq for piece in pieces}) == len(pieces)
        if self.failing:
            return self.failing.pop(0)
        if sum(map(len, self.memory)) + n_tokens > self.cells:
            return Outcome.NO_ROOM
        self.turns.append([*pieces])
        self.outputs.clear()
        index = 0
        for piece in pieces:
            index = self._evaluate(piece, index)
        return Outcome.DONE

    def _evaluate(self, piece: Piece, index: int) -> int:
        memory = self.memory[piece.seq]
        assert piece.tokens
        assert piece.position == len(memory), "a hole in the sequence"
        assert len(memory) + len(piece.tokens) <= self.facts.context
        if self.facts.window:
            needed = max(0, piece.position - self.facts.window + 1)
            assert self.lost[piece.seq] <= needed, "what the window needs is gone"
            self.lost[piece.seq] = needed
        for i, token in enumerate(piece.tokens):
            assert 0 <= token < N_VOCAB
            memory.append(token)
            if i >= len(piece.tokens) - piece.n_outputs:
                self.outputs[index + i] = [*memory]
        return index + len(piece.tokens)

    def parses(self, grammar: str) -> bool:
        return grammar.startswith("root ::= ")

    def sampler(self, sampling: Sampling, prompt: Sequence[int]) -> FakeSampler:
        self.n_samplers += 1
        return FakeSampler(self, sampling, said=len(prompt))

    def probabilities(self, index: int, token: int, n_top: int) -> TokenProbabilities:
        one = Probability(token, -0.5, self.piece(token))
        return TokenProbabilities(one, (one,) * n_top)

    def keep(self, seq: int, n: int) -> bool:
        if 0 < n < len(self.memory[seq]) and self.facts.rollback is Rollback.NONE:
            return False
        del self.memory[seq][n:]
        if n == 0:
            self.lost[seq] = 0
        return True

    def share(self, source: int, seq: int, n: int) -> None:
        assert not self.memory[seq]
        assert self.facts.rollback is Rollback.FULL
        assert n <= len(self.memory[source])
        self.memory[seq] = self.memory[source][:n]

    def oldest(self, seq: int) -> int:
        return self.lost[seq] if self.memory[seq] else -1

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return b"<%d>" % token if special or token != EOG else b""

    def tokenize(self, text: bytes, *, special: bool, begin: bool) -> list[int]:
        return [1] * begin + [byte % N_VOCAB for byte in text]
