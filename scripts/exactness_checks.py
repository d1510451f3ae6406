"""What exactness means, in numbers: where two answers part, and whether draws follow the model's own law. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tightwad_agent.wire.verify import Sampling

Cell = TypeVar("Cell")

TIE = 0.05
"""Logits. The F32 model on a processor moves by a few hundredths with the shape of a batch and the order of memory; two
tokens that are further apart than this are not exchanged by it."""
FEWEST = 5.0
"""Draws that a cell of a chi-square test must expect; smaller cells are counted together."""
P_LEAST = 1e-4
"""A sampler that is right falls below this with one choice of seeds in 10,000."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where the model without drafts said `own`, the answer to prompt number `prompt` has `other`, as token `at`.

    The logarithms of the probabilities are the verifier's own, asked again without drafts. `adjacent`: nothing lies
    between the two in order of probability.
    """

    kind: str
    prompt: int
    at: int
    own: int = -1
    other: int = -1
    own_logprob: float = 0.0
    other_logprob: float = 0.0
    adjacent: bool = False
    greedy: bool = True

    @property
    def gap(self) -> float:
        """Between the two logits."""
        return abs(self.own_logprob - self.other_logprob)

    def explained(self, tie: float = TIE) -> bool:
        """By float noise: greedy, two logits that are as good as equal; sampled, a random number that fell on the edge
        between two neighbours."""
        return self.gap <= tie if self.greedy else self.adjacent

    def words(self, tie: float = TIE) -> str:
        """For people, who count from 1."""
        verdict = "float noise" if self.explained(tie) else "WRONG"
        return (
            f"{self.kind}, prompt {self.prompt + 1}, token {self.at + 1}: {self.own} ({self.own_logprob:.4f}) without "
            f"drafts, {self.other} ({self.other_logprob:.4f}) with them, {self.gap:.4f} apart: {verdict}"
        )


def parting(own: Sequence[int], other: Sequence[int]) -> int | None:
    """The first place where two answers differ; one that ends earlier differs there. `None`: they are equal."""
    for i, (left, right) in enumerate(zip(own, other, strict=False)):
        if left != right:
            return i
    return None if len(own) == len(other) else min(len(own), len(other))


def law(logprobs: Mapping[int, float], sampling: Sampling) -> dict[int, float]:
    """Probabilities with which a token is to be drawn, best first: `logprobs` of at least the `top_k` likeliest tokens
    through top-k, top-p, min-p and temperature, in this order. Penalties and bias are not taken into account."""
    if not 0 < sampling.top_k <= len(logprobs) or sampling.temperature <= 0:
        raise ValueError(f"no law of top_k {sampling.top_k} at temperature {sampling.temperature} is known")
    kept = sorted(logprobs.items(), key=lambda item: -item[1])[: sampling.top_k]
    weights = shares([logprob for _token, logprob in kept])
    n, reached = 0, 0.0
    while n < len(kept) and reached < sampling.top_p:
        reached += weights[n]
        n += 1
    kept = [item for item, weight in zip(kept[:n], weights, strict=False) if weight >= sampling.min_p * weights[0]]
    drawn = shares([logprob / sampling.temperature for _token, logprob in kept])
    return {token: share for (token, _logprob), share in zip(kept, drawn, strict=True)}


def shares(logits: Sequence[float]) -> list[float]:
    """Softmax."""
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def chi_square(counts: Mapping[Cell, int], expected: Mapping[Cell, float]) -> tuple[float, int, float]:
    """(statistic, degrees of freedom, probability of one as large). `expected`: each cell's probability. Infinite where
    something was drawn that cannot be."""
    n = sum(counts.values())
    if any(cell not in expected for cell in counts):
        return math.inf, max(1, len(expected) - 1), 0.0
    large = [cell for cell, p in expected.items() if n * p >= FEWEST]
    cells = [(counts.get(cell, 0), n * expected[cell]) for cell in large]
    rest = n - sum(count for count, _ in cells), n - sum(mean for _, mean in cells)
    if rest[1] >= FEWEST:
        cells.append(rest)
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    dof = max(1, len(cells) - 1)
    return statistic, dof, beyond(statistic, dof)


def beyond(x: float, dof: int) -> float:
    """The probability that a chi-square variable with `dof` >= 1 degrees of freedom exceeds `x`, exactly."""
    half = x / 2
    if dof % 2:
        terms = (math.exp((i - 0.5) * math.log(half) - half - math.lgamma(i + 0.5)) for i in range(1, (dof + 1) // 2))
        return math.erfc(math.sqrt(half)) + (sum(terms) if half > 0 else 0.0)
    terms = (math.exp((i * math.log(half) if i else 0.0) - half - math.lgamma(i + 1)) for i in range(dof // 2))
    return sum(terms) if half > 0 else 1.0
