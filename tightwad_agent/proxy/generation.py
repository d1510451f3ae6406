"""Answers from the verifier, sped up by drafters: `ports.Generator` over `ports.Verifier` and `ports.Drafter`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from tightwad_agent.ids import ModelId, NodeId
from tightwad_agent.proxy.costs import Costs
from tightwad_agent.proxy.ports import Drafter, Timings, Verifier
from tightwad_agent.proxy.record import DrafterRecord
from tightwad_agent.proxy.speculate import Speculation
from tightwad_agent.proxy.speculate_events import Bounds
from tightwad_agent.proxy.verified import VerifierGeneration
from tightwad_agent.wire.verify import Loaded, Rollback, Sampling


@dataclass(frozen=True, slots=True)
class Settings:
    """`drafts` off: nothing is drafted. `ngram` off: nothing from the text itself. (How long a draft may be at most is
    `Costs`' to know.)"""

    drafts: bool = True
    ngram: bool = True


class VerifierGenerator:
    """See `ports.Generator`. `drafters` are those that are ready now; `costs` is kept as long as the pool is the same.

    `ended` is told the timings of each answer when it is over, however it ended.
    """

    def __init__(
        self,
        verifier: Verifier,
        drafters: Callable[[], Sequence[Drafter]],
        costs: Costs,
        settings: Settings = Settings(),
        ended: Callable[[Timings], None] = lambda _: None,
    ) -> None:
        self._verifier, self._drafters, self._ended = verifier, drafters, ended
        self._settings = settings
        self.costs = costs
        self.live: set[VerifierGeneration] = set()
        """Answers being made; their `timings` are not with `ended` yet."""

    @property
    def info(self) -> Loaded:
        return self._verifier.info

    @property
    def drafts(self) -> bool:
        """Whether anything may be drafted for this model at all."""
        return self._settings.drafts and self.info.rollback is not Rollback.NONE

    def decision(self) -> str:
        """Whether and why drafts are used, for people."""
        if self.drafts:
            return self.costs.words()
        if self._settings.drafts:
            return "not drafting: the model's memory cannot be rolled back"
        return "not drafting: switched off"

    def record_of(self, node: NodeId, model: ModelId) -> DrafterRecord | None:
        """What is known of that node as a drafter with that model, if it has ever been there for a request."""
        return self.costs.records.get((node, model))

    async def tokenize(self, text: bytes, *, special: bool = True, begin: bool = True) -> list[int]:
        """See `ports.Verifier`."""
        return await self._verifier.tokenize(text, special=special, begin=begin)

    async def detokenize(self, tokens: Sequence[int]) -> bytes:
        """See `ports.Verifier`."""
        return await self._verifier.detokenize(tokens)

    @asynccontextmanager
    async def start(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int,
        n_probs: int = -1,
        drafts: bool = True,
        said: Sequence[int] = (),
    ) -> AsyncIterator[VerifierGeneration]:
        """An answer to `prompt`; see `ports.Generator`. Raises what `ports.Verifier.open` does."""
        info = self.info
        drafts = drafts and self.drafts
        bounds = Bounds(max_tokens - len(said), info.context, info.n_vocab, drafts, self._settings.ngram)
        drafters = self._drafters if drafts else tuple
        machine = Speculation([*prompt, *said], self.costs, bounds)
        generation = VerifierGeneration(machine, drafters, self.costs, n_said=len(said))
        try:
            generation.open(
                partial(self._verifier.open, prompt, sampling, max_tokens=max_tokens, n_probs=n_probs, said=said),
            )
            self.live.add(generation)
            yield generation
        finally:
            generation.close()
            if generation in self.live:
                self.live.discard(generation)
                self._ended(generation.timings)
