"""One request in the verifier, from its slot to its last token."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from tightwad_agent.engine.verifier import rounds
from tightwad_agent.engine.verifier.model import Facts, Sampler
from tightwad_agent.engine.verifier.sampling import draws, fault
from tightwad_agent.wire.verify import Ended, Open, Round, unpack_tokens

MAX_TOP = 64
_FIRST_DELAY_S = 0.0005
_BLEND = 0.5


@dataclass(slots=True, eq=False)
class Request:
    """`tokens`: prompt and what was sampled. `n_given`: prompt and what was said before. `retraced`: that is to be
    sampled once more, to bring dice, penalties, grammar and probabilities to where they were.

    `asked`: the round it waits to have evaluated; `free`: rounds it may go on without one. `delay_s`: how long the
    agent usually takes from an answer to the next round.
    """

    opened: Open
    tokens: list[int]
    n_prompt: int
    n_given: int
    retraced: bool = False
    seq: int = -1
    sampler: Sampler | None = None
    n_cached: int = 0
    began_s: float = 0.0
    asked: Round | None = None
    free: int = 0
    answered_s: float = 0.0
    delay_s: float = _FIRST_DELAY_S

    @classmethod
    def of(cls, opened: Open) -> Request:
        prompt, said = unpack_tokens(opened.prompt), unpack_tokens(opened.said)
        retraced = bool(said) and (draws(opened.sampling) or bool(opened.sampling.grammar) or opened.n_probs >= 0)
        return cls(opened, prompt + said, len(prompt), len(prompt) + len(said), retraced)

    @property
    def cacheable(self) -> list[int]:
        """Of this a beginning may be in a cache, short of its last token: the logits from there on are needed."""
        return self.tokens[: self.n_prompt] if self.retraced else self.tokens

    @property
    def generating(self) -> bool:
        """All that was given is evaluated."""
        return len(self.tokens) > self.n_given

    def n_outputs(self, position: int, n: int) -> int:
        """How many of `n` given tokens from `position` on are evaluated for their logits: always the last ones."""
        first = self.n_prompt - 1 if self.retraced else self.n_given - 1
        return max(0, min(n, position + n - first))

    @property
    def due(self) -> bool:
        """A round of it can be evaluated now."""
        return self.generating and (self.asked is not None or self.free > 0)

    def ask(self, asked: Round, now: float) -> None:
        """The agent's newest word replaces what it said before."""
        if self.asked is None and self.generating:
            self.delay_s += _BLEND * (now - self.answered_s - self.delay_s)
        self.asked, self.free = asked, 0

    def draft(self, facts: Facts) -> list[int]:
        """What of the round's draft is worth evaluating."""
        if self.asked is None:
            return []
        found = rounds.ahead(unpack_tokens(self.asked.draft), self.asked.at, self.tokens)
        n = rounds.room(self.n_prompt, len(self.tokens), self.opened.max_tokens, facts.context)
        return rounds.sensible(found[:n], facts.n_vocab, facts.eog)

    def used(self) -> None:
        """The round that was due is evaluated."""
        self.free = self.free - 1 if self.asked is None else self.asked.free
        self.asked = None

    def ended(self, context: int, eog: Container[int]) -> Ended:
        return rounds.ended(self.tokens, self.n_prompt, self.opened.max_tokens, context, eog)


def refusal(opened: Open, tokens: list[int], facts: Facts) -> tuple[str, str] | None:
    """(code, reason) if this request cannot be served at all."""
    if not opened.prompt:
        return "input", "the prompt is empty"
    if bad := next((token for token in tokens if not 0 <= token < facts.n_vocab), None):
        return "input", f"token {bad} is not one of the model's {facts.n_vocab}"
    n_said = len(opened.said) // 4
    if n_said and (opened.max_tokens <= n_said or not facts.eog.isdisjoint(tokens[-n_said:])):
        return "input", "what was said already is a whole answer"
    if len(tokens) >= facts.context:
        return "context", f"the prompt has {len(tokens)} tokens, and the context of {facts.context} must hold one more"
    if opened.n_probs > MAX_TOP:
        return "input", f"the probabilities of {opened.n_probs} tokens; at most {MAX_TOP} are reported"
    reason = fault(opened.sampling, facts.n_vocab)
    return ("input", reason) if reason else None
