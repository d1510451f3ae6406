"""Answers that another verifier began, with the real libllama: they go on as they would have gone on there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from verifier_kit import Child, flat

from tightwad_agent.wire.verify import GREEDY, Accepted, Ended, Open, Sampling, pack_tokens

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPT = "Once upon a time in a small village,"
N = 40
SAMPLINGS = {
    "greedy": GREEDY,
    "seeded": Sampling(seed=11),
    "hot": Sampling(seed=5, temperature=1.5, top_k=0, top_p=1.0, min_p=0.0),
    "penalties": Sampling(seed=7, repeat_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    "greedy penalties": Sampling(temperature=0.0, repeat_penalty=1.4, repeat_last_n=-1),
}


@pytest.fixture(scope="module")
def child(engine_dir: Path, demo_model: Path) -> Iterator[Child]:
    with Child() as child:
        child.load(engine_dir, demo_model)
        yield child


def said_on(
    child: Child, prompt: Sequence[int], sampling: Sampling, said: Sequence[int], **more: Any
) -> list[Accepted]:
    """One request that has begun elsewhere, to its end."""
    number = child._number = child._number + 1
    n_probs = more.get("n_probs", -1)
    child.send(Open(number, pack_tokens(prompt), sampling, N, n_probs, pack_tokens(said)))
    answers, at = [], len(prompt)
    while not answers or answers[-1].ended is Ended.NOT:
        answer = child.receive()
        assert isinstance(answer, Accepted), answer
        assert answer.at == at
        at += len(answer.pieces)
        answers.append(answer)
        if answer.batch and answer.ended is Ended.NOT:
            child.round(number, at)
    return answers


@pytest.mark.parametrize("name", SAMPLINGS)
def test_it_goes_on_as_it_would_have(child: Child, name: str) -> None:
    sampling, prompt = SAMPLINGS[name], child.tokenize(PROMPT)
    whole = child.answers(prompt, sampling, max_tokens=N)
    tokens, pieces = flat(whole), [piece for one in whole for piece in one.pieces]
    for n in (1, 2, 13, len(tokens) - 1):
        other = child.tokenize("Another text, so that nothing of it is in a cache. " + str(n))
        for _slot in range(4):
            child.tokens(other, max_tokens=1)
        again = said_on(child, prompt, sampling, tokens[:n])
        assert flat(again) == tokens, (name, n)
        assert [piece for one in again for piece in one.pieces] == pieces


def test_dice_that_are_not_brought_forward_show(child: Child) -> None:
    """The control: the same tokens as a longer prompt go on differently."""
    sampling, prompt = SAMPLINGS["hot"], child.tokenize(PROMPT)
    tokens = child.tokens(prompt, sampling, max_tokens=N)
    assert child.tokens(prompt + tokens[:13], sampling, max_tokens=N - 13) != tokens[13:]


def test_probabilities_of_what_was_said(child: Child) -> None:
    prompt = child.tokenize(PROMPT)
    whole = child.answers(prompt, GREEDY, max_tokens=N, n_probs=3)
    again = said_on(child, prompt, GREEDY, flat(whole)[:20], n_probs=3)
    known = [p for one in whole for p in one.probabilities]
    told = [p for one in again for p in one.probabilities]
    assert [p.chosen.token for p in told] == [p.chosen.token for p in known]
    assert [p.chosen.logprob for p in told] == pytest.approx([p.chosen.logprob for p in known], abs=0.05)
