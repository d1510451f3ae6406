"""Chains of libllama's samplers, put together as llama-server does it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from tightwad_agent.engine.verifier import abi
from tightwad_agent.engine.verifier.model import Facts
from tightwad_agent.errors import EngineError
from tightwad_agent.wire.verify import Sampling

COLDEST = 1e-6
"""A lower temperature is greedy: dividing logits by it would overflow."""
_LARGEST = 1e6
_RANDOM_SEED = 0xFFFFFFFF  # libllama takes it as "choose one"


def fault(sampling: Sampling, n_vocab: int) -> str:
    """What libllama could not compute with, or empty text."""
    checks = (
        (0 <= sampling.temperature <= _LARGEST, f"temperature {sampling.temperature}"),
        (0 <= sampling.top_p <= 1, f"top_p {sampling.top_p}"),
        (0 <= sampling.min_p <= 1, f"min_p {sampling.min_p}"),
        (1 / _LARGEST <= sampling.repeat_penalty <= _LARGEST, f"repeat_penalty {sampling.repeat_penalty}"),
        (abs(sampling.presence_penalty) <= _LARGEST, f"presence_penalty {sampling.presence_penalty}"),
        (abs(sampling.frequency_penalty) <= _LARGEST, f"frequency_penalty {sampling.frequency_penalty}"),
        (sampling.repeat_last_n >= -1, f"repeat_last_n {sampling.repeat_last_n}"),
    )
    for good, what in checks:
        if not good:
            return f"{what} is out of range"
    for token, bias in sampling.logit_bias:
        if not 0 <= token < n_vocab or abs(bias) > _LARGEST:
            return f"logit_bias {bias} of token {token} is out of range"
    return ""


def penalized(sampling: Sampling) -> bool:
    """Whether what was said before changes what is said next, by penalties."""
    return sampling.repeat_last_n != 0 and (
        sampling.repeat_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
    )


def draws(sampling: Sampling) -> bool:
    """Whether dice decide: then what was drawn before decides what is drawn next."""
    return sampling.temperature >= COLDEST


class Row:
    """Logits of one position as libllama's samplers take them; one array that is written over each time."""

    def __init__(self, n_vocab: int) -> None:
        self._n = n_vocab
        self._fresh = (abi.TokenData * n_vocab)(*(abi.TokenData(token, 0.0, 0.0) for token in range(n_vocab)))
        self._data = (abi.TokenData * n_vocab)()
        self._logits = memoryview(self._data).cast("B").cast("f")[1::3]

    def of(self, logits: Any) -> abi.TokenDataArray:
        """Good until the next call. `logits`: a pointer to as many floats as the vocabulary has tokens."""
        ctypes.memmove(self._data, self._fresh, ctypes.sizeof(self._data))
        row = (ctypes.c_float * self._n).from_address(ctypes.addressof(logits.contents))
        self._logits[:] = memoryview(row).cast("B").cast("f")
        return abi.TokenDataArray(self._data, self._n, -1, False)

    @property
    def is_empty(self) -> bool:
        """No token can be drawn any more."""
        return max(self._logits) == -math.inf


class Grammar:
    """What has been said, as far as a grammar follows it; `close` frees it. libllama ends the process when it is told
    of a token that is not allowed."""

    def __init__(self, functions: Any, handle: int, eog: Collection[int]) -> None:
        self._apply = functions.llama_sampler_apply
        self._accept = functions.llama_sampler_accept
        self._free = functions.llama_sampler_free
        self._handle = handle
        self._eog = eog
        self._one = (abi.TokenData * 1)()
        self.end = min(eog, default=0)
        """What to say where nothing is allowed."""
        self.over = False

    def allows(self, token: int) -> bool:
        self._one[0] = abi.TokenData(token, 0.0, 0.0)
        self._apply(self._handle, ctypes.byref(abi.TokenDataArray(self._one, 1, -1, False)))
        return bool(self._one[0].logit > -math.inf)

    def restrict(self, found: abi.TokenDataArray) -> None:
        """What is not allowed can no longer be drawn."""
        self._apply(self._handle, ctypes.byref(found))

    def accept(self, token: int) -> None:
        """What it does not allow ends it, as the end of the text does."""
        self.over = self.over or token in self._eog or not self.allows(token)
        if not self.over:
            self._accept(self._handle, token)

    def close(self) -> None:
        self._free(self._handle)


class Chain:
    """A chain with its state; `close` frees it."""

    def __init__(self, functions: Any, context: int, handle: int) -> None:
        self._sample = functions.llama_sampler_sample
        self._accept = functions.llama_sampler_accept
        self._free = functions.llama_sampler_free
        self._context = context
        self._handle: int | None = handle

    def sample(self, index: int) -> int:
        return int(self._sample(self._handle, self._context, index))

    def accept(self, token: int) -> None:
        """As if it had been drawn."""
        self._accept(self._handle, token)

    def retrace(self, index: int, token: int) -> None:  # noqa: ARG002 - nothing remembers which it was
        """Draws as `sample` does, where `token` was said: the dice are then as they were behind it."""
        self.sample(index)

    def close(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._free(handle)


class Minding(Chain):
    """A chain with penalties: it remembers what was said."""

    def __init__(self, functions: Any, context: int, handle: int, row: Callable[[], Row]) -> None:
        super().__init__(functions, context, handle)
        self._f = functions
        self._row = row

    def retrace(self, index: int, token: int) -> None:
        """Notes what was said, even where logits that differ in their last digits draw something else."""
        found = self._row().of(self._f.llama_get_logits_ith(self._context, index))
        self._f.llama_sampler_apply(self._handle, ctypes.byref(found))
        self.accept(token)


class Guided(Chain):
    """A chain with a grammar, which is asked about the one token that was drawn. Where it does not allow that, another
    is drawn from all that it allows: seldom, since it takes time to ask about each token of the vocabulary."""

    def __init__(self, functions: Any, context: int, handle: int, row: Callable[[], Row], grammar: Grammar) -> None:
        super().__init__(functions, context, handle)
        self._f = functions
        self._row = row
        self._grammar = grammar

    def sample(self, index: int) -> int:
        token = self._pick(index)
        self._note(token)
        return token

    def retrace(self, index: int, token: int) -> None:
        """Draws as `sample` does, and notes what was said."""
        self._pick(index)
        self._note(token)

    def _note(self, token: int) -> None:
        self.accept(token)
        self._grammar.accept(token)

    def _pick(self, index: int) -> int:
        logits = self._f.llama_get_logits_ith(self._context, index)
        token = self._drawn(self._row().of(logits))
        if self._grammar.over or self._grammar.allows(token):
            return token
        found = self._row().of(logits)
        self._grammar.restrict(found)
        if self._row().is_empty:  # the vocabulary has nothing that goes on
            return self._grammar.end
        return self._drawn(found)

    def _drawn(self, found: abi.TokenDataArray) -> int:
        self._f.llama_sampler_apply(self._handle, ctypes.byref(found))
        return int(found.data[found.selected].id)

    def close(self) -> None:
        if self._handle is not None:
            self._grammar.close()
        super().close()


class Plain(Chain):
    """Greedy without bias and penalties has no state: one chain serves all requests, and is never freed."""

    def close(self) -> None:
        pass


class Chains:
    """Makes them."""

    def __init__(self, functions: Any, context: int, vocab: int, facts: Facts) -> None:
        self._f = functions
        self._context = context
        self._vocab = vocab
        self._facts = facts
        n = ctypes.c_int32(0)
        tokens = functions.llama_vocab_get_suppress_tokens(vocab, ctypes.byref(n))
        self._suppressed = [(tokens[i], -math.inf) for i in range(n.value)] if tokens else []
        self._greedy = Plain(functions, context, self._chain([functions.llama_sampler_init_greedy()]))
        self._made_row: Row | None = None

    def make(self, sampling: Sampling, prompt: Sequence[int]) -> Chain:
        """A chain that has seen the prompt, as far as it matters to it."""
        steps = list(self._steps(sampling))
        if sampling.grammar:
            chain: Chain = self._guided(sampling.grammar, steps or [self._f.llama_sampler_init_greedy()])
        elif not steps:
            return self._greedy
        elif penalized(sampling):
            chain = Minding(self._f, self._context, self._chain(steps), self._row)
        else:
            chain = Chain(self._f, self._context, self._chain(steps))
        if penalized(sampling):
            for token in prompt[-self._looks_back(sampling) :]:
                chain.accept(token)
        return chain

    def parses(self, grammar: str) -> bool:
        """Whether libllama takes it."""
        handle = self._grammar(grammar)
        if handle:
            self._f.llama_sampler_free(handle)
        return bool(handle)

    def _grammar(self, text: str) -> int | None:
        handle: int | None = self._f.llama_sampler_init_grammar(self._vocab, text.encode(), b"root")
        return handle

    def _guided(self, text: str, steps: Sequence[int]) -> Guided:
        handle = self._grammar(text)
        if not handle:
            raise EngineError("the grammar, which was tried before, is not taken")
        grammar = Grammar(self._f, handle, self._facts.eog)
        return Guided(self._f, self._context, self._chain(steps), self._row, grammar)

    def _row(self) -> Row:
        if self._made_row is None:
            self._made_row = Row(self._facts.n_vocab)
        return self._made_row

    def _chain(self, steps: Sequence[int]) -> int:
        chain = self._f.llama_sampler_chain_init(self._f.llama_sampler_chain_default_params())
        for step in steps:
            self._f.llama_sampler_chain_add(chain, step)
        return int(chain)

    def _steps(self, sampling: Sampling) -> Iterator[int]:
        """Nothing at all for plain greedy."""
        f, n_vocab = self._f, self._facts.n_vocab
        cold = sampling.temperature < COLDEST
        changes = bool(self._suppressed or sampling.logit_bias or penalized(sampling))
        if biases := [*sampling.logit_bias, *self._suppressed]:
            listed = (abi.LogitBias * len(biases))(*(abi.LogitBias(*bias) for bias in biases))
            yield f.llama_sampler_init_logit_bias(n_vocab, len(biases), listed)
        if penalized(sampling):
            yield f.llama_sampler_init_penalties(
                n_vocab,
                self._looks_back(sampling),
                sampling.repeat_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            )
        if cold:
            if changes:
                yield f.llama_sampler_init_greedy()
            return
        if sampling.top_k:
            yield f.llama_sampler_init_top_k(min(sampling.top_k, n_vocab))
        yield f.llama_sampler_init_top_p(sampling.top_p, 0)
        yield f.llama_sampler_init_min_p(sampling.min_p, 0)
        yield f.llama_sampler_init_temp(sampling.temperature)
        yield f.llama_sampler_init_dist(sampling.seed % _RANDOM_SEED)

    def _looks_back(self, sampling: Sampling) -> int:
        n, context = sampling.repeat_last_n, self._facts.context
        return context if n < 0 else min(n, context)
