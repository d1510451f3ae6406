"""A loaded model behind the interface of `model.Model`: libllama's calls with Python types around them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, Protocol

from tightwad_agent.engine.verifier import abi
from tightwad_agent.engine.verifier.model import Facts, Outcome, Piece
from tightwad_agent.engine.verifier.sampling import Chains, Row
from tightwad_agent.wire.verify import MAX_TOKENS, Probability, Sampling, TokenProbabilities

LEAST_LOGPROB = -9999.0
"""Stands for a probability of zero, which has no logarithm."""
MAX_PIECE = 1024
_DONE, _NO_ROOM = 0, 1


class Handles(Protocol):
    """Pointers of a loaded model."""

    model: int
    context: int
    vocab: int
    memory: int


class PackedBatch:
    """A `llama_batch` of fixed arrays that are written over for each forward pass."""

    def __init__(self, n: int) -> None:
        self._token = (ctypes.c_int32 * n)()
        self._position = (ctypes.c_int32 * n)()
        self._n_seqs = (ctypes.c_int32 * n)(*[1] * n)
        self._seq = (ctypes.c_int32 * n)()
        pointer = ctypes.POINTER(ctypes.c_int32)
        start, size = ctypes.addressof(self._seq), ctypes.sizeof(ctypes.c_int32)
        self._seq_of = (pointer * n)(*(ctypes.cast(start + i * size, pointer) for i in range(n)))
        self._output = (ctypes.c_int8 * n)()
        self.struct = abi.Batch(0, self._token, None, self._position, self._n_seqs, self._seq_of, self._output)

    def pack(self, pieces: Sequence[Piece]) -> abi.Batch:
        """The structure for `llama_decode`, good until the next call."""
        end = 0
        for seq, position, tokens, n_outputs in pieces:
            start, n = end, len(tokens)
            end += n
            self._token[start:end] = [*tokens]
            self._position[start:end] = list(range(position, position + n))
            self._seq[start:end] = [seq] * n
            self._output[start:end] = [*[0] * (n - n_outputs), *[1] * n_outputs]
        self.struct.n_tokens = end
        return self.struct


class Llama:
    """`alive`: what libllama holds pointers into, kept from being collected."""

    def __init__(self, functions: Any, handles: Handles, facts: Facts, alive: Sequence[object]) -> None:
        self._f = functions
        self._context = handles.context
        self._memory = handles.memory
        self._vocab = handles.vocab
        self.facts = facts
        self._alive = alive
        self._batch = PackedBatch(facts.batch)
        self._chains = Chains(functions, handles.context, handles.vocab, facts)
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._candidates: Candidates | None = None

    def decode(self, pieces: Sequence[Piece]) -> Outcome:
        code = self._f.llama_decode(self._context, self._batch.pack(pieces))
        if code == _DONE:
            return Outcome.DONE
        return Outcome.NO_ROOM if code == _NO_ROOM else Outcome.FAILED

    def sampler(self, sampling: Sampling, prompt: Sequence[int]) -> Any:
        return self._chains.make(sampling, prompt)

    def parses(self, grammar: str) -> bool:
        return self._chains.parses(grammar)

    def probabilities(self, index: int, token: int, n_top: int) -> TokenProbabilities:
        if self._candidates is None:
            self._candidates = Candidates(self._f, self.facts.n_vocab)
        logits = self._f.llama_get_logits_ith(self._context, index)
        chosen, top = self._candidates.look(logits, token, n_top)
        return TokenProbabilities(self._probability(*chosen), tuple(self._probability(*pair) for pair in top))

    def keep(self, seq: int, n: int) -> bool:
        return bool(self._f.llama_memory_seq_rm(self._memory, seq, n if n else -1, -1))

    def share(self, source: int, seq: int, n: int) -> None:
        self._f.llama_memory_seq_cp(self._memory, source, seq, 0, n)

    def oldest(self, seq: int) -> int:
        return int(self._f.llama_memory_seq_pos_min(self._memory, seq))

    def piece(self, token: int, *, special: bool = False) -> bytes:
        known = self._pieces.get((token, special))
        if known is None:
            known = self._pieces[token, special] = self._piece(token, special)
        return known

    def tokenize(self, text: bytes, *, special: bool, begin: bool) -> list[int]:
        room = len(text) + 16
        while True:
            found = (ctypes.c_int32 * room)()
            n = self._f.llama_tokenize(self._vocab, text, len(text), found, room, begin, special)
            if n >= 0:
                return found[: min(n, MAX_TOKENS)]
            room = min(-n, 1 << 28)

    def _piece(self, token: int, special: bool) -> bytes:
        room = 64
        while True:
            found = ctypes.create_string_buffer(room)
            n = self._f.llama_token_to_piece(self._vocab, token, found, room, 0, special)
            if n >= 0:
                return found.raw[:n]
            room = -n

    def _probability(self, token: int, logprob: float) -> Probability:
        return Probability(token, logprob, self.piece(token, special=True)[:MAX_PIECE])


class Candidates:
    """Probabilities from raw logits, by libllama's own softmax and sorting: made only once somebody asks."""

    def __init__(self, functions: Any, n_vocab: int) -> None:
        self._f = functions
        self._row = Row(n_vocab)
        self._softmax = functions.llama_sampler_init_dist(0)
        self._best: dict[int, Any] = {}

    def look(self, logits: Any, token: int, n_top: int) -> tuple[tuple[int, float], list[tuple[int, float]]]:
        """(token, logarithm of its probability) of the chosen one, and of the `n_top` most likely, best first."""
        found = self._row.of(logits)
        self._f.llama_sampler_apply(self._softmax, ctypes.byref(found))
        self._f.llama_sampler_apply(self._sorter(max(1, n_top)), ctypes.byref(found))
        top = [found.data[i] for i in range(found.size)]
        scale = top[0].logit - math.log(top[0].p)  # of the most likely one: its probability is the most exact

        def logprob(logit: float) -> float:
            return float(max(LEAST_LOGPROB, logit - scale))

        return (token, logprob(logits[token])), [(one.id, logprob(one.logit)) for one in top[:n_top]]

    def _sorter(self, n: int) -> Any:
        if n not in self._best:
            self._best[n] = self._f.llama_sampler_init_top_k(n)
        return self._best[n]
