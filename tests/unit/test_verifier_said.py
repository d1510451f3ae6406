"""Answers that another verifier began: they go on as they would have gone on there."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verifier_fake import EOG, N_VOCAB, FakeModel, expected, facts

from tightwad_agent.engine.verifier.loop import Loop
from tightwad_agent.wire.verify import (
    GREEDY,
    MAX_ROUND,
    TO_VERIFIER,
    Accepted,
    Close,
    Ended,
    Failed,
    Open,
    Rollback,
    Round,
    Sampling,
    pack_tokens,
    unpack_tokens,
)

WARM = Sampling(temperature=1.0, seed=3)
MINDING = Sampling(temperature=0.0, repeat_penalty=1.5)
PROMPT = [*range(20, 40)]
N = 24


@dataclass
class Agent:
    """Opens requests, and asks for one round after the other until all are over."""

    opened: list[Open]
    heard: dict[int, list[Any]] = field(default_factory=dict)
    queue: deque[Any] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.queue.extend(self.opened)

    def read(self, wait_s: float | None) -> list[Any] | None:
        messages, self.queue = [*self.queue], deque()
        return messages if messages or wait_s is not None else None

    def send(self, *messages: object) -> bool:
        for message in messages:
            number = message.request
            self.heard.setdefault(number, []).append(message)
            if isinstance(message, Accepted) and message.ended is Ended.NOT and message.batch:
                self.queue.append(Round(number, message.at + len(message.pieces)))
        return True


def asked(
    said: Sequence[int], sampling: Sampling = WARM, *, number: int = 1, n_probs: int = -1, max_tokens: int = N
) -> Open:
    return Open(number, pack_tokens(PROMPT), sampling, max_tokens, n_probs, pack_tokens(said))


def run(model: FakeModel, *opened: Open) -> dict[int, list[Any]]:
    agent = Agent([*opened])
    ticks = iter(range(1 << 30))
    Loop(model, agent, lambda: next(ticks) / 1e4).run()
    return agent.heard


def tokens(heard: Sequence[Accepted]) -> list[int]:
    """All of one request; each begins where the one before ended."""
    assert all(isinstance(one, Accepted) for one in heard), heard
    made: list[int] = []
    for one in heard:
        assert one.at == len(PROMPT) + len(made)
        assert len(one.pieces) == len(one.tokens) // 4
        made += unpack_tokens(one.tokens)
    return made


@pytest.mark.parametrize("sampling", [GREEDY, WARM, MINDING])
@pytest.mark.parametrize("n_probs", [-1, 2])
def test_it_goes_on_as_it_would_have(sampling, n_probs):
    whole = expected(PROMPT, sampling, N, 64)
    for n in range(len(whole)):
        model = FakeModel(facts(batch=8, n_outputs=4))
        heard = run(model, asked(whole[:n], sampling, n_probs=n_probs))[1]
        assert tokens(heard) == whole
        assert heard[-1].ended is (Ended.EOG if whole[-1] == EOG else Ended.LENGTH)
        assert model.n_samplers == 0
        if n_probs >= 0:
            assert [p.chosen.token for one in heard for p in one.probabilities] == whole


def test_what_was_said_is_told_apart_from_what_is_new():
    whole = expected(PROMPT, WARM, N, 64)
    heard = run(FakeModel(facts()), asked(whole[:5]))[1]
    echoes = [one for one in heard if not one.batch]
    assert tokens(echoes) == whole[:5]
    first = heard[len(echoes)]
    assert (first.at, first.n_prompt, first.n_cached) == (len(PROMPT) + 5, len(PROMPT) + 5, 0)


def test_greedy_needs_no_logits_of_what_was_said():
    model = FakeModel(facts(n_outputs=3))
    run(model, asked(expected(PROMPT, GREEDY, N, 64)[:9], GREEDY))
    assert model.turns[0][0].n_outputs == 1
    assert len(model.turns[0][0].tokens) == len(PROMPT) + 9


def test_the_prompt_comes_from_the_cache_and_what_was_said_is_sampled_again():
    whole = expected(PROMPT, WARM, N, 64)

    class Later(Agent):
        def read(self, wait_s: float | None) -> list[Any] | None:
            if not self.queue and wait_s is None and 2 not in self.heard:
                return [asked(whole[:6], number=2)]
            return super().read(wait_s)

    agent = Later([asked([], number=1)])
    ticks = iter(range(1 << 30))
    Loop(FakeModel(facts()), agent, lambda: next(ticks) / 1e4).run()
    assert tokens(agent.heard[2]) == whole
    first = next(one for one in agent.heard[2] if one.n_prompt)
    assert first.n_cached == len(PROMPT) - 1


def test_many_at_once_share_the_outputs_of_a_turn():
    whole = expected(PROMPT, WARM, N, 64)
    model = FakeModel(facts(slots=3, batch=32, n_outputs=6))
    heard = run(model, *(asked(whole[: 3 * i], number=i) for i in range(1, 4)))
    assert all(tokens(one) == whole for one in heard.values())


def test_a_long_answer_comes_back_in_several_messages():
    said = [20 + i % 50 for i in range(MAX_ROUND + 10)]
    model = FakeModel(facts(context=8192, batch=2048, n_outputs=8))
    heard = run(model, asked(said, GREEDY, max_tokens=len(said) + 1))[1]
    assert [len(one.pieces) for one in heard] == [MAX_ROUND, 10, 1]
    assert tokens(heard)[:-1] == said


def test_one_that_is_closed_meanwhile_hears_nothing():
    class Leaving(Agent):
        def read(self, wait_s: float | None) -> list[Any] | None:
            if wait_s == 0.0 and self.opened and not self.queue:
                self.opened.clear()
                return [Close(1)]
            return super().read(wait_s)

    agent = Leaving([asked([30, 31])])
    Loop(FakeModel(facts()), agent, lambda: 0.0).run()
    assert agent.heard == {}


@pytest.mark.parametrize(
    ("opened", "reason"),
    [
        (asked([30] * N), "whole answer"),
        (asked([30, EOG]), "whole answer"),
        (asked([30, N_VOCAB]), "is not one of"),
        (asked([30] * 60, max_tokens=100), "must hold one more"),
        (Open(1, b"", GREEDY, 5, -1, pack_tokens([30])), "empty"),
    ],
)
def test_refused(opened, reason):
    [failed] = run(FakeModel(facts()), opened)[1]
    assert isinstance(failed, Failed)
    assert reason in failed.reason


def test_a_model_whose_memory_cannot_be_taken_back():
    whole = expected(PROMPT, WARM, N, 64)
    model = FakeModel(facts(rollback=Rollback.NONE))
    assert tokens(run(model, asked(whole[:7]))[1]) == whole


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, N), max_size=4),
    batch=st.integers(3, 20),
    n_outputs=st.integers(3, 8),
)
def test_however_often_it_is_taken_over(seed, cuts, batch, n_outputs):
    sampling = Sampling(temperature=1.0, seed=seed)
    whole = expected(PROMPT, sampling, N, 64)
    said: list[int] = []
    for cut in sorted(cuts):
        if cut >= len(whole):
            break
        model = FakeModel(facts(batch=batch, n_outputs=min(batch, n_outputs)))
        said = tokens(run(model, asked(said, sampling))[1])[: max(cut, len(said))]
        if said == whole:
            return
    model = FakeModel(facts(batch=batch, n_outputs=min(batch, n_outputs)))
    assert tokens(run(model, asked(said, sampling))[1]) == whole


def test_an_agent_that_does_not_know_the_field_still_opens():
    plain = TO_VERIFIER.decode(TO_VERIFIER.encode(Open(1, b"", GREEDY, 1)))
    assert plain.said == b""
