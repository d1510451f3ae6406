"""Answers with drafts are the model's own: prompts with drafts of every kind, and draws that follow its law.

A real verifier, real drafters, and the product's own loop between them. `scripts/exactness` is the long version, with
200 prompts, the F32 model and longer answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import trio
from exactness import texts
from exactness_checks import P_LEAST, TIE, Difference, chi_square, parting
from exactness_draws import Draw, Draws
from exactness_lab import Answer, Keen, Lab, answer, believing
from exactness_ways import (
    DYING,
    FOUR,
    GOOD,
    GREEDY_KINDS,
    PLAIN,
    POOR,
    WARM,
    WARM_PLAIN,
    WRONG,
    Exam,
    Models,
    difference,
)
from rig import Rig, quantised

from tightwad_agent.wire.verify import Sampling

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
N_PROMPTS, N_WARM, N_TOKENS = 24, 8, 6
PROMPT_TOKENS = 18
"""Of each prompt, and of an answer: what does not show in so few tokens is for the long version."""
CONTEXT = 256
ALONE = (GOOD, POOR, WRONG, DYING, WARM)
NOISE = 0.5
"""Logits. Weights of 4 bits move by 0.2 when four requests' tokens lie in memory in another order."""
EXCHANGED = N_PROMPTS // 5
N_DRAWS = 5000
AT_ONCE = 32
DRAWN = Sampling(temperature=0.8, top_k=6, top_p=0.95, min_p=0.05)
N_F32 = 10


@dataclass(frozen=True, slots=True)
class Made:
    """What all kinds said, where that differs from what is said without drafts, which prompts saw a drafter die, and
    which saw none but dead ones."""

    answers: dict[str, dict[int, Answer]]
    differences: dict[str, list[Difference]]
    deaths: list[int]
    unaided: list[int]

    def total(self, kind: str, what: str) -> int:
        return sum(getattr(made.timings, what) for made in self.answers[kind].values())

    def with_draft(self, kind: str) -> int:
        """Rounds."""
        return sum(made.rounds_with_draft for made in self.answers[kind].values())


@pytest.fixture(scope="module")
def models(engine_dir: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The target has weights of 4 bits in a form that is fast in batches."""
    folder = tmp_path_factory.mktemp("models")
    target = quantised(engine_dir, demo_model, folder / "q4_0.gguf", "Q4_0")
    return Models(target, demo_model, quantised(engine_dir, demo_model, folder / "q2_k.gguf", "Q2_K"))


@pytest.fixture(scope="module")
def made(engine_dir: Path, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Made:
    work_dir = tmp_path_factory.mktemp("exam")

    async def run() -> Made:
        async with Rig.running(engine_dir, work_dir, direct=True) as rig:
            exam = await Exam.start(rig, models, work_dir, N_TOKENS, CONTEXT)
            tokenize = exam.crowd.client.tokenize
            prompts = [(await tokenize(text.encode()))[:PROMPT_TOKENS] for text in texts(N_PROMPTS)]
            await exam.run(prompts, N_WARM, lambda line: print(line, flush=True))
            differences = {kind: await exam.differences(kind) for kind in (*GREEDY_KINDS, WARM)}
            return Made(exam.answers, differences, exam.mortal.deaths, exam.mortal.unaided)

    return trio.run(run)


class TestTokens:
    @pytest.mark.parametrize("kind", ALONE)
    def test_equal_one_request_at_a_time(self, made: Made, kind: str) -> None:
        """To the last bit: nothing is put down to noise."""
        assert len(made.answers[kind]) == (N_WARM if kind == WARM else N_PROMPTS)
        assert [one.words() for one in made.differences[kind]] == []

    def test_equal_with_four_requests_at_once_but_for_ties(self, made: Made) -> None:
        """Cells that a wrong draft leaves are filled by another request's tokens, and attention sums up in the order of
        memory. Tokens whose logits differ by less than that makes are exchanged now and then; no others are."""
        assert len(made.answers[FOUR]) == N_PROMPTS
        assert [one.words(NOISE) for one in made.differences[FOUR] if not one.explained(NOISE)] == []
        assert len(made.differences[FOUR]) <= EXCHANGED

    def test_drafts_were_verified(self, made: Made) -> None:
        rounds = {kind: made.total(kind, "rounds") for kind in (PLAIN, *ALONE, FOUR)}
        said = {kind: sum(len(one.tokens) for one in made.answers[kind].values()) for kind in rounds}
        assert made.total(PLAIN, "drafted") == made.total(WARM_PLAIN, "drafted") == 0
        assert made.total(GOOD, "accepted") > 0.4 * said[GOOD]
        assert 0.02 < made.total(POOR, "accepted") / made.total(POOR, "drafted") < 0.8
        assert made.with_draft(POOR) > 0.3 * rounds[POOR]
        assert made.with_draft(WRONG) > 0.5 * rounds[WRONG]
        assert made.total(WRONG, "accepted") == 0
        assert rounds[WRONG] == rounds[PLAIN]
        assert made.with_draft(WARM) > 0.3 * rounds[WARM]
        assert 0 < made.total(WARM, "accepted") < made.total(WARM, "drafted")
        assert made.total(FOUR, "drafted") > 0

    def test_drafters_died_while_they_drafted(self, made: Made) -> None:
        drafted = {i: one.timings.drafted for i, one in made.answers[DYING].items()}
        first, second = made.deaths
        assert first < N_PROMPTS // 2 < second < N_PROMPTS - 1
        assert drafted[first] > 0
        assert drafted[second] > 0
        assert sum(drafted[i] for i in range(first)) > first
        assert sum(drafted[i] for i in range(N_PROMPTS // 2, second)) > 0
        for early, late in ((first, N_PROMPTS // 2), (second, N_PROMPTS)):
            assert [i for i in made.unaided if early < i < late]
        assert [i for i in made.unaided if drafted[i]] == []


class TestNoise:
    async def test_f32_parts_at_ties_only(
        self, engine_dir: Path, f32_model: Path, models: Models, tmp_path: Path
    ) -> None:
        """Logits of the F32 model do depend on what else is in a batch. That moves each by less than `TIE`, so only
        tokens that are as close as that can change places."""
        async with Rig.running(engine_dir, tmp_path, direct=True) as rig:
            lab = await Lab.start(rig, f32_model)
            drafter, _child = await lab.drafter("good", models.good, tmp_path / "good")
            plain, drafted = lab.generator(), lab.generator([drafter], Keen(3))
            prompts = [(await lab.client.tokenize(text.encode()))[:PROMPT_TOKENS] for text in texts(N_F32)]
            alone = [await answer(plain, prompt, n_tokens=12, n_probs=0) for prompt in prompts]
            others = await at_once(drafted, prompts, n_tokens=12, n_probs=0)
            found = []
            for i, (own, other) in enumerate(zip(alone, others, strict=True)):
                if (at := parting(own.tokens, other.tokens)) is not None:
                    found.append(await difference(lab, prompts[i], own.tokens, other.tokens, Difference(FOUR, i, at)))
        assert sum(one.timings.drafted for one in others) > N_F32
        most = max(map(moved, alone, others))
        print(f"logits moved by {most:.4f} at most, {len(found)} answers of {N_F32} differ")
        assert most < TIE
        assert [one.words() for one in found if not one.explained()] == []
        assert len(found) <= N_F32 // 5


async def at_once(generator: Any, prompts: Sequence[Sequence[int]], **how: Any) -> list[Answer]:
    made: dict[int, Answer] = {}

    async def one(i: int) -> None:
        made[i] = await answer(generator, prompts[i], **how)

    async with trio.open_nursery() as nursery:
        for i in range(len(prompts)):
            nursery.start_soon(one, i)
    return [made[i] for i in range(len(prompts))]


def moved(own: Answer, other: Answer) -> float:
    """The largest difference between the logarithms of what both said, as far as both said the same."""
    pairs = zip(own.probabilities, other.probabilities, strict=False)
    same = [(a.chosen, b.chosen) for a, b in pairs][: parting(own.tokens, other.tokens)]
    return max((abs(a.logprob - b.logprob) for a, b in same), default=0.0)


class TestNegativeControl:
    """A copy of the verifier that believes one wrong token of a draft must be found out."""

    @pytest.mark.parametrize("n_believed", [0, 1])
    async def test_one_token_too_much_is_found(
        self, engine_dir: Path, models: Models, tmp_path: Path, n_believed: int
    ) -> None:
        (tmp_path / "copy").mkdir()
        package = believing(tmp_path / "copy", n_believed)
        async with Rig.running(engine_dir, tmp_path, direct=True) as rig:
            lab = await Lab.start(rig, models.target, context=CONTEXT, slots=1, package=package)
            plain, wrong = lab.generator(), lab.generator([await lab.wrong()], Keen())
            found = []
            for i, text in enumerate(texts(6)):
                prompt = (await lab.client.tokenize(text.encode()))[:PROMPT_TOKENS]
                own, other = [await answer(how, prompt, n_tokens=N_TOKENS) for how in (plain, wrong)]
                if (at := parting(own.tokens, other.tokens)) is not None:
                    found.append(await difference(lab, prompt, own.tokens, other.tokens, Difference(WRONG, i, at)))
        assert len(found) == n_believed
        assert not any(one.explained(NOISE) for one in found)


async def draw(engine_dir: Path, work_dir: Path, n: int, *, drafts: bool, package: Path | None = None) -> Draws:
    """From a model with random weights: many tokens are about as likely as one another, and a pass costs nothing."""
    model = tiny_models.windowed(work_dir / "tiny.gguf")
    async with Rig.running(engine_dir, work_dir, direct=True) as rig:
        lab = await Lab.start(rig, model, slots=AT_ONCE, package=package)
        experiment = Draw(lab, list(range(40, 60)), DRAWN)
        await experiment.prepare()
        return await experiment.run(n, N_DRAWS * drafts, AT_ONCE, drafts=drafts)


class TestDraws:
    @pytest.mark.parametrize("drafts", [False, True])
    async def test_follow_the_models_own_law(self, engine_dir: Path, tmp_path: Path, drafts: bool) -> None:
        made = await draw(engine_dir, tmp_path, N_DRAWS, drafts=drafts)
        statistic, dof, p = chi_square(made.counts, made.law)
        print(f"seeds {N_DRAWS * drafts} and up: chi-square {statistic:.1f}, {dof} degrees of freedom, p = {p:.4f}")
        assert sum(made.counts.values()) == N_DRAWS
        assert dof >= 20
        assert p > P_LEAST
        if drafts:
            assert made.drafted > 0.95 * N_DRAWS
            assert 0.2 < made.accepted / made.drafted < 0.6
        else:
            assert made.drafted == 0

    async def test_believing_drafts_now_and_then_is_found(self, engine_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "copy").mkdir()
        package = believing(tmp_path / "copy", 200)
        made = await draw(engine_dir, tmp_path, 2000, drafts=True, package=package)
        assert chi_square(made.counts, made.law)[2] < P_LEAST


class TestLongVersion:
    def test_a_tiny_run(self, models: Models, f32_model: Path) -> None:
        small = ("--prompts", "3", "--warm", "1", "--tokens", "4", "--draws", "0", "--json")
        done = long_version("--target", str(models.target), "--tie", str(NOISE), *small)
        assert done.returncode == 0, done.stderr[-4000:]
        result = json.loads(done.stdout.splitlines()[-1])
        assert {found["kind"] for found in result["kinds"]} == {*GREEDY_KINDS, WARM}
        assert [found["answers"] for found in result["kinds"]] == [3] * len(GREEDY_KINDS) + [1]
        assert "3 of 3 prompts" in done.stderr

    def test_a_model_that_is_not_there_is_named(self) -> None:
        done = long_version("--prompts", "1", env={"TIGHTWAD_TEST_F32": "/nowhere.gguf"})
        assert done.returncode == 1
        assert "TIGHTWAD_TEST_F32" in done.stderr


def long_version(*flags: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(ROOT / "scripts" / "exactness.py"), *flags]
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=280, check=False, env={**os.environ, **(env or {})}
    )
