"""The examinations of `exactness.py`: the same prompts with every kind of draft and with none, and many draws of few
tokens."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import trio
from exactness_checks import Difference, parting
from exactness_lab import Answer, Keen, Lab, answer
from rig import Rig

from tightwad_agent.engine.draft_link import DraftLink
from tightwad_agent.engine.process import Child
from tightwad_agent.proxy.costs import Costs
from tightwad_agent.proxy.generation import VerifierGenerator
from tightwad_agent.proxy.ports import Timings
from tightwad_agent.wire.verify import GREEDY, Sampling

PLAIN, GOOD, POOR, WRONG, DYING, FOUR = "no drafts", "good", "poor", "wrong", "dying", "four at once"
WARM_PLAIN, WARM = "sampled, no drafts", "sampled"
GREEDY_KINDS = (GOOD, POOR, WRONG, DYING, FOUR)
FOUR_STREAMS = 4
LANES = 2
MOST = {GOOD: 4, POOR: 2, WRONG: 2}
"""Tokens of a draft."""
TOP = 64


def _unseen(_timings: Timings) -> None:
    pass


@dataclass
class Mortal:
    """Drafters that are killed -9 while they draft: the first's llama-server after a third of the prompts, the second
    as a whole after two thirds. `present`: those that may be asked. `deaths`: the prompts that saw them. `unaided`: the
    prompts that were asked and answered while all who were present were dead."""

    present: list[DraftLink]
    victims: list[tuple[DraftLink, Child]]
    deaths: list[int] = field(default_factory=list)
    unaided: list[int] = field(default_factory=list)

    @asynccontextmanager
    async def asked(self, i: int) -> AsyncIterator[None]:
        """Around the asking of prompt `i`."""
        before = len(self.deaths), len(self.present)
        yield
        if before == (len(self.deaths), len(self.present)) and len(self.deaths) == len(self.present):
            self.unaided.append(i)

    def watch(self, i: int, n: int) -> Callable[[Timings], None]:
        """What is to see the answer to prompt `i` of `n`: it kills as soon as tokens of a draft are in it."""
        if 2 * i >= n and len(self.deaths) == 1 and len(self.present) == 1:
            self.present.append(self.victims[1][0])
        died = len(self.deaths)
        if died == len(self.victims) or 3 * i < (died + 1) * n:
            return _unseen

        def kill(timings: Timings) -> None:
            if timings.drafted and len(self.deaths) == died and len(self.present) > died:
                child = self.victims[died][1]
                os.kill(child.pid if died else psutil.Process(child.pid).children()[0].pid, signal.SIGKILL)
                self.deaths.append(i)

        return kill


@dataclass(frozen=True, slots=True)
class Models:
    """Files."""

    target: Path
    good: Path
    poor: Path


@dataclass
class Exam:
    """What was said, by kind of draft and place of the prompt.

    `alone`: verifiers that hold one request at a time, so that its tokens lie in memory in their own order whatever was
    drafted. `crowd`: one that holds four.
    """

    alone: list[Lab]
    crowd: Lab
    drafters: dict[str, DraftLink]
    mortal: Mortal
    n_tokens: int
    prompts: list[list[int]] = field(default_factory=list)
    answers: dict[str, dict[int, Answer]] = field(default_factory=dict)
    _done: int = 0

    @classmethod
    async def start(cls, rig: Rig, models: Models, work_dir: Path, n_tokens: int, context: int = 4096) -> Exam:
        """Starts three verifiers and five drafters."""
        alone = [await Lab.start(rig, models.target, context=context, slots=1) for _ in range(LANES)]
        crowd = await Lab.start(rig, models.target, context=FOUR_STREAMS * context, slots=FOUR_STREAMS)
        drafters = {WRONG: await crowd.wrong()}
        for kind, model in ((GOOD, models.good), (POOR, models.poor)):
            drafters[kind], _child = await crowd.drafter(kind, model, work_dir / kind)
        victims = [await crowd.drafter(name, models.good, work_dir / name) for name in ("first", "second")]
        return cls(alone, crowd, drafters, Mortal([victims[0][0]], victims), n_tokens)

    async def run(self, prompts: Sequence[Sequence[int]], n_warm: int, say: Callable[[str], None]) -> None:
        """All kinds with all prompts; the first `n_warm` are sampled too. `say` is told how far it is."""
        self.prompts = [list(prompt) for prompt in prompts]
        self.answers = {kind: {} for kind in (PLAIN, *GREEDY_KINDS, WARM_PLAIN, WARM)}
        places = iter(range(len(prompts)))
        async with trio.open_nursery() as nursery:
            for lab in self.alone:
                nursery.start_soon(self._lane, lab, places, n_warm, say)
            nursery.start_soon(self._four_at_once)

    async def _lane(self, lab: Lab, places: Iterator[int], n_warm: int, say: Callable[[str], None]) -> None:
        """One prompt after the other, each with all kinds, so that it is read once."""
        generators = {
            PLAIN: lab.generator(),
            **self._keen(lab),
            DYING: lab.generator(self.mortal.present, Keen(MOST[GOOD])),
        }
        for i in places:
            for kind, generator in generators.items():
                if kind != DYING:
                    await self._ask(kind, i, generator)
                    continue
                seen = self.mortal.watch(i, len(self.prompts))
                async with self.mortal.asked(i):
                    await self._ask(kind, i, generator, seen=seen)
            if i < n_warm:
                how = Sampling(seed=i)
                await self._ask(WARM_PLAIN, i, generators[PLAIN], how)
                await self._ask(WARM, i, generators[GOOD], how)
            self._done += 1
            if self._done % 20 == 0 or self._done == len(self.prompts):
                say(f"{self._done} of {len(self.prompts)} prompts")

    def _keen(self, lab: Lab) -> dict[str, VerifierGenerator]:
        return {kind: lab.generator([self.drafters[kind]], Keen(most)) for kind, most in MOST.items()}

    async def _four_at_once(self) -> None:
        """Three with one drafter each; the fourth as in use, with all of them, the text itself, and what it costs."""
        usual = self.crowd.generator(list(self.drafters.values()), Costs(), ngram=True)
        places = iter(range(len(self.prompts)))

        async def some(generator: VerifierGenerator) -> None:
            for i in places:
                await self._ask(FOUR, i, generator)

        async with trio.open_nursery() as nursery:
            for generator in (usual, *self._keen(self.crowd).values()):
                nursery.start_soon(some, generator)

    async def _ask(
        self,
        kind: str,
        i: int,
        generator: VerifierGenerator,
        how: Sampling = GREEDY,
        seen: Callable[[Timings], None] = _unseen,
    ) -> None:
        made = await answer(generator, self.prompts[i], how, n_tokens=self.n_tokens, seen=seen)
        self.answers[kind][i] = made

    async def differences(self, kind: str) -> list[Difference]:
        """Where answers of this kind part from those without drafts, with the two tokens' logits."""
        plain = self.answers[WARM_PLAIN if kind == WARM else PLAIN]
        found = []
        for i, other in sorted(self.answers[kind].items()):
            at = parting(plain[i].tokens, other.tokens)
            if at is not None:
                where = Difference(kind, i, at, greedy=kind != WARM)
                found.append(await difference(self.alone[0], self.prompts[i], plain[i].tokens, other.tokens, where))
        return found


async def difference(
    lab: Lab, prompt: Sequence[int], own: Sequence[int], other: Sequence[int], where: Difference
) -> Difference:
    """`where` with the two tokens and their logits."""
    at = where.at
    logprobs = await likeliest(lab, [*prompt, *own[:at]])
    ranks = {token: rank for rank, token in enumerate(logprobs)}
    left, right = (made[at] if at < len(made) else -1 for made in (own, other))
    return replace(
        where,
        own=left,
        other=right,
        own_logprob=logprobs.get(left, -math.inf),
        other_logprob=logprobs.get(right, -math.inf),
        adjacent=abs(ranks.get(left, 2 * TOP) - ranks.get(right, -2)) == 1,
    )


async def likeliest(lab: Lab, prompt: Sequence[int]) -> dict[int, float]:
    """Logarithms of the probabilities of the `TOP` tokens that may follow, best first."""
    made = await answer(lab.generator(), prompt, n_tokens=1, n_probs=TOP)
    return {one.token: one.logprob for one in made.probabilities[0].top}
