"""Gemma 3 on the verifier: attention that slides over 512 tokens, K-quants, a vocabulary of 262,144.

With K-quants a forward pass of several tokens gives other last digits than several of one: a tenth of a logit was seen.
Where an answer with drafts says something else, its token must have been as likely as the other but for that.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from verifier_kit import Child, Drafter, flat, follows

from tightwad_agent.wire.verify import Rollback

pytestmark = [pytest.mark.engine, pytest.mark.slow]

WINDOW = 512
N_VOCAB = 262144
N = 16
TIE = 0.3
"""Logarithms of probabilities: two tokens that are closer are as good as each other here. A token that comes from a
wrong place in memory is off by several."""
MOST_TIES = 4
"""Of `N` tokens of an answer, counted against what the model would have said after the same tokens."""
PROMPTS = ("def fibonacci(n):\n    ", "The recipe needs flour, eggs and")
LOG = "The harbour master wrote down every ship that came in, its name, its cargo and the weather of the day. "


@pytest.fixture(scope="module")
def child(engine_dir: Path, window_model: Path) -> Iterator[Child]:
    with Child(stderr=subprocess.DEVNULL) as child:
        loaded = child.load(engine_dir, window_model, context=1024, slots=1, batch=32)
        assert (loaded.rollback, loaded.window, loaded.n_vocab) == (Rollback.WINDOW, WINDOW, N_VOCAB)
        yield child


def ties(child: Child, prompt: Sequence[int], said: Sequence[int], plain: Sequence[int]) -> int:
    """How often `said` left what the model says without drafts. It may at ties only; after each the model is asked what
    it would have said from there. `plain`: what it says from the prompt on."""
    n = next((i for i, pair in enumerate(zip(said, plain, strict=True)) if pair[0] != pair[1]), None)
    if n is None:
        return 0
    begun = [*prompt, *said[:n]]
    (answer,) = child.answers(begun, max_tokens=1, n_probs=32)
    likely = {one.token: one.logprob for one in answer.probabilities[0].top}
    assert likely[plain[n]] - likely.get(said[n], -99.0) <= TIE
    begun.append(said[n])
    rest = said[n + 1 :]
    return 1 + (ties(child, begun, rest, child.tokens(begun, max_tokens=len(rest))) if rest else 0)


def spoilt(recorded: Sequence[int], seed: int) -> Drafter:
    """Drafts of any length, every other one with a wrong token in it."""
    rng = random.Random(seed)

    def draft(tokens: list[int]) -> list[int]:
        found = list(recorded[len(tokens) : len(tokens) + rng.randrange(1, 9)])
        if found and rng.random() < 0.5:
            found[rng.randrange(len(found))] = rng.randrange(N_VOCAB)
        return found

    return draft


def check(child: Child, prompt: Sequence[int], plain: Sequence[int], drafter: Drafter) -> int:
    """An answer with drafts; how many draft tokens were right."""
    answers = child.answers(prompt, max_tokens=N, drafter=drafter)
    n_ties = ties(child, prompt, flat(answers), plain)
    assert n_ties <= MOST_TIES
    if n_ties == 0:
        assert flat(answers) == plain
    assert sum(answer.n_draft for answer in answers) >= N // 2
    return sum(answer.n_accepted for answer in answers)


@pytest.mark.parametrize("text", PROMPTS)
def test_drafts_change_nothing(child: Child, text: str) -> None:
    prompt = child.tokenize(text)
    plain = child.tokens(prompt, max_tokens=N)
    assert check(child, prompt, plain, spoilt([*prompt, *plain], len(text))) > 0


def test_drafts_change_nothing_beyond_the_window(child: Child) -> None:
    """Memory has 768 cells for a window of 512 tokens, and this is longer: old cells are written over, and what a draft
    got wrong is still taken back."""
    prompt = child.tokenize(LOG * 35)
    assert len(prompt) > 768 + N
    plain = child.answers(prompt, max_tokens=N)
    assert plain[0].n_cached == 0
    tokens = flat(plain)
    recorded = [*prompt, *tokens]
    assert check(child, prompt, tokens, follows(recorded, 8)) > N // 2
    assert check(child, prompt, tokens, follows([(token + 1) % N_VOCAB for token in recorded], 6)) == 0
    # memory has the end of it: that goes on, and what begins like it is read again
    assert child.answers([*recorded, 9, 9], max_tokens=1)[0].n_cached >= len(prompt)
    assert child.answers(prompt[:60], max_tokens=1)[0].n_cached == 0
