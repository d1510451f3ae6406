"""Whether what is drawn follows the model's own law: the same few tokens drawn thousands of times, with drafts of the
very position and without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import trio
from exactness_checks import law
from exactness_lab import Keen, Lab, Scripted, answer
from exactness_ways import likeliest

from tightwad_agent.wire.verify import Sampling, unpack_tokens

Pair = tuple[int, int]
OVER = -1
"""Stands for the token behind one that ends an answer."""


@dataclass(frozen=True, slots=True)
class Draws:
    """How often each pair of first tokens was drawn, and with what probability it should be. The second token was in a
    draft `drafted` times, and right `accepted` times."""

    counts: Mapping[Pair, int]
    law: Mapping[Pair, float]
    drafted: int
    accepted: int


class Draw:
    """Draws the first two tokens behind one prompt, again and again with other seeds. The draft, if there is one, is of
    the second: the likeliest behind the first."""

    def __init__(self, lab: Lab, prompt: Sequence[int], sampling: Sampling) -> None:
        self.lab, self.prompt, self.sampling = lab, list(prompt), sampling
        self.law: dict[Pair, float] = {}
        self._next: dict[int, int] = {}

    async def prepare(self) -> None:
        """Asks the model for its law."""
        ends = unpack_tokens(self.lab.client.info.eog)
        for first, p in law(await likeliest(self.lab, self.prompt), self.sampling).items():
            if first in ends:
                self.law[first, OVER] = p
                continue
            second = law(await likeliest(self.lab, [*self.prompt, first]), self.sampling)
            self._next[first] = next(iter(second))
            self.law |= {(first, token): p * share for token, share in second.items()}

    def guess(self, sequence: Sequence[int]) -> int:
        """For `Scripted`."""
        here = len(sequence) - len(self.prompt)
        return self._next.get(sequence[-1], 0) if here == 1 else next(iter(self._next))

    async def run(self, n: int, first_seed: int, at_once: int, *, drafts: bool) -> Draws:
        """`n` draws with seeds from `first_seed` on, so many at a time."""
        generator = self.lab.generator([Scripted(self.guess)], Keen()) if drafts else self.lab.generator()
        counts: Counter[Pair] = Counter()
        seeds = iter(range(first_seed, first_seed + n))
        drafted = accepted = 0

        async def some() -> None:
            nonlocal drafted, accepted
            for seed in seeds:
                how = replace(self.sampling, seed=seed)
                made = await answer(generator, self.prompt, how, n_tokens=3, enough=2)
                counts[made.tokens[0], made.tokens[1] if len(made.tokens) > 1 else OVER] += 1
                drafted += made.timings.drafted
                accepted += made.timings.accepted

        async with trio.open_nursery() as nursery:
            for _ in range(at_once):
                nursery.start_soon(some)
        return Draws(counts, self.law, drafted, accepted)
