"""Compares what the pooled model says with drafts of every kind to what it says without, and draws to its own law.

200 prompts are answered greedily without drafts, with good and poor ones, with drafts that are always wrong, with a
drafter that is killed -9 half-way, and four at once with all of them; the first 50 also at temperature 0.8. For each
answer that differs it says where, and with which two logits. Logits of several tokens in one batch are not those of one
token to the last digit: two tokens that are closer than --tie may be exchanged by that, and count as noise.
Then the first two tokens behind a prompt are drawn thousands of times, with and without drafts, and compared with the
probabilities that the model's logits give (chi-square).

Exit code 1 on a difference that is no noise, on drafts that were not used, or on draws that follow another law. The
last line of --json is one object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trio
from exactness_checks import P_LEAST, TIE, Difference, chi_square
from exactness_draws import Draw
from exactness_lab import Lab
from exactness_ways import GREEDY_KINDS, PLAIN, WARM, WRONG, Exam, Models
from rig import Rig, RigError, quantised
from surroundings import environment

from tightwad_agent.config import load
from tightwad_agent.errors import TightwadError
from tightwad_agent.wire.verify import Sampling

PROMPTS = Path(__file__).parents[1] / "tests" / "data" / "prompts200.json"
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
DRAWN_BEHIND = "The weather in the mountains changes fast, so before you set out you should always take your"
DRAWN = Sampling(temperature=0.8, top_k=8, top_p=0.95, min_p=0.05)
AT_ONCE = 32

Say = Callable[[str], None]


def texts(n: int) -> list[str]:
    """The first `n` of the project's own 200 prompts."""
    return [prompt["text"] for prompt in json.loads(PROMPTS.read_text(encoding="utf-8"))][:n]


def row(kind: str, exam: Exam, differences: Sequence[Difference], tie: float) -> dict[str, Any]:
    """What one kind of draft brought. `used`: drafts were in rounds."""
    timings = [made.timings for made in exam.answers[kind].values()]
    drafted, accepted = (sum(getattr(one, what) for one in timings) for what in ("drafted", "accepted"))
    return {
        "kind": kind,
        "answers": len(timings),
        "tokens": sum(one.n_generated for one in timings),
        "rounds": sum(one.rounds for one in timings),
        "with_draft": sum(made.rounds_with_draft for made in exam.answers[kind].values()),
        "drafted": drafted,
        "accepted": accepted,
        "used": drafted > 0 if kind == WRONG else accepted > 0,
        "differ": len(differences),
        "unexplained": sum(not one.explained(tie) for one in differences),
        "differences": [{**asdict(one), "gap": one.gap} for one in differences],
    }


async def compare(
    rig: Rig, models: Models, work_dir: Path, given: argparse.Namespace, say: Say
) -> list[dict[str, Any]]:
    """One row for each kind of draft."""
    exam = await Exam.start(rig, models, work_dir, given.tokens)
    tokenize = exam.crowd.client.tokenize
    prompts = [await tokenize(CHAT.format(text).encode()) for text in texts(given.prompts)]
    say(f"{len(prompts)} prompts, {given.tokens} tokens each, {len(GREEDY_KINDS)} kinds of drafts")
    await exam.run(prompts, given.warm, say)
    rows = []
    for kind in (*GREEDY_KINDS, WARM) if given.warm else GREEDY_KINDS:
        differences = await exam.differences(kind)
        found = row(kind, exam, differences, given.tie)
        rows.append(found)
        say(
            f"{kind}: {found['differ']} of {found['answers']} answers differ from those with {PLAIN}, "
            f"{found['unexplained']} of them beyond noise; {found['drafted']} tokens drafted in "
            f"{found['with_draft']} of {found['rounds']} rounds, {found['accepted']} right"
        )
        for one in differences:
            say("  " + one.words(given.tie))
    return rows


async def draw(rig: Rig, model: Path, n: int, say: Say) -> list[dict[str, Any]]:
    """The chi-square test, without drafts and with them, with other seeds."""
    lab = await Lab.start(rig, model, slots=AT_ONCE)
    experiment = Draw(lab, await lab.client.tokenize(DRAWN_BEHIND.encode()), DRAWN)
    await experiment.prepare()
    rows = []
    for drafts in (False, True):
        made = await experiment.run(n, n * drafts, AT_ONCE, drafts=drafts)
        statistic, dof, p = chi_square(made.counts, made.law)
        how = "with drafts" if drafts else "without drafts"
        say(f"{n} draws {how}: chi-square {statistic:.1f} with {dof} degrees of freedom, p = {p:.4f}")
        finite = statistic if math.isfinite(statistic) else None
        rows.append({"drafts": drafts, "draws": n, "chi_square": finite, "dof": dof, "p": p, "drafted": made.drafted})
    return rows


async def examine(given: argparse.Namespace, engine: Path, models: Models, work_dir: Path, say: Say) -> dict[str, Any]:
    """Everything; what `--json` prints."""
    before = environment()
    async with Rig.running(engine, work_dir, threads=given.threads, direct=True) as rig:
        rows = await compare(rig, models, work_dir, given, say) if given.prompts else []
        draws = await draw(rig, models.target, given.draws, say) if given.draws else []
    wrong = [found["kind"] for found in rows if found["unexplained"] or not found["used"]]
    off = [found["drafts"] for found in draws if found["p"] < P_LEAST or found["drafts"] != (found["drafted"] > 0)]
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
    return {
        "name": "exactness",
        "ok": not wrong and not off,
        "environment": before,
        "options": options,
        "kinds": rows,
        "draws": draws,
    }


def models_of(given: argparse.Namespace, engine: Path) -> Models:
    """Target: the F32 model unless another is named. Raises `RigError`."""
    files = {}
    for variable in ("TIGHTWAD_TEST_MODEL", "TIGHTWAD_TEST_F32"):
        files[variable] = Path(os.environ.get(variable, ""))
        if not files[variable].is_file():
            raise RigError(f"{variable} does not name a model; scripts/exactness sets it")
    good = files["TIGHTWAD_TEST_MODEL"]
    target = given.target or files["TIGHTWAD_TEST_F32"]
    poor = load(None).cache_dir / "demo-target" / "SmolLM2-135M-Q2_K.gguf"
    return Models(target, good, quantised(engine, good, poor, "Q2_K"))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/exactness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--prompts", type=int, default=200, help="how many of the 200; 0: only the draws (200)")
    add("--warm", type=int, default=50, help="how many of them at temperature 0.8 too (50)")
    add("--tokens", type=int, default=64, help="of each answer (64)")
    add("--draws", type=int, default=5000, help="with drafts and as many without; 0: none (5000)")
    add("--tie", type=float, default=TIE, help=f"logits that are as good as equal ({TIE})")
    add("--target", type=Path, help="another target than the demo model as F32; a GGUF of the same vocabulary")
    add("--threads", type=int, default=1, help="of each program (1)")
    add("--json", action="store_true", help="one JSON object on the last line of stdout")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    given = parse(argv)
    engine = Path(os.environ.get("TIGHTWAD_TEST_ENGINE", ""))

    def say(line: str) -> None:
        print(line, file=sys.stderr if given.json else sys.stdout, flush=True)

    try:
        models = models_of(given, engine)
        with tempfile.TemporaryDirectory(prefix="tightwad-exactness-") as work_dir:
            result = trio.run(examine, given, engine, models, Path(work_dir), say)
    except RigError as exc:
        print(f"scripts/exactness: {exc}", file=sys.stderr)
        return 1
    except BaseExceptionGroup as group:
        broken, _rest = group.split((RigError, TightwadError))
        if broken is None:
            raise
        print(f"scripts/exactness: {first(broken)}", file=sys.stderr)
        return 1
    say("everything is the model's own" if result["ok"] else "NOT the model's own")
    if given.json:
        print(json.dumps(result))
    return 0 if result["ok"] else 1


def first(group: BaseExceptionGroup[Any]) -> BaseException:
    """What one of the group's tasks raised."""
    exc: BaseException = group
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
