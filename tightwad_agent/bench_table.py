"""What a measurement with and without drafts says: what is read from each answer, statistics, rows of the table. Pure.

An answer comes from the machine that coordinates, so nothing in it is taken for granted; what an engine does not tell
(llama-server tells less than the verifier) is `None` and stays out of the figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from tightwad_agent.errors import ProtocolError
from tightwad_agent.proxy.tally import MAX_POSITIONS, add_each, share, shares

Plain = dict[str, Any]

MIN_TOKENS = 8
"""Answers of fewer tokens are compared, but their speed says nothing."""
MIN_PER_S = 1e-3
MAX_COUNT = 1 << 48
MAX_NAMES = 32
ALL = "all"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the endpoint. `per_s`: generated tokens a second, the prompt left out. `hidden`: the share of the
    drafting during which a forward pass ran. `wall_s`: until the whole answer was there, by the asker's clock."""

    text: str
    n_tokens: int
    per_s: float | None
    wall_s: float
    rounds: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    tried_at: tuple[int, ...] = ()
    accepted_at: tuple[int, ...] = ()
    hidden: float | None = None
    engine: str = ""
    drafters: tuple[str, ...] = ()

    @property
    def fast(self) -> float | None:
        """The speed, if the answer is long enough for one."""
        return self.per_s if self.n_tokens >= MIN_TOKENS else None


@dataclass(frozen=True, slots=True)
class Pair:
    """The answers to one prompt. `without` is `None` where drafts cannot be switched off."""

    kind: str
    prompt: str
    drafts: Answer
    without: Answer | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as fast with drafts."""
        if self.without is None or not self.without.fast or not self.drafts.fast:
            return None
        return self.drafts.fast / self.without.fast

    @property
    def equal(self) -> bool | None:
        if self.without is None:
            return None
        return (self.drafts.text, self.drafts.n_tokens) == (self.without.text, self.without.n_tokens)


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of prompts, or all. Speeds in tokens a second and `speedup` are medians over the prompts."""

    kind: str
    prompts: int
    drafts_per_s: float | None
    without_per_s: float | None
    speedup: float | None
    drafted: int
    accepted: int
    acceptance: float | None
    acceptance_at: tuple[float | None, ...]
    tokens_per_round: float | None
    hidden: float | None
    compared: int
    equal: int


# Reading


def read_answer(body: object, wall_s: float) -> Answer:
    """From the JSON of a chat completion. Raises `ProtocolError` where it is none."""
    plain = _mapping(body)
    choices = plain.get("choices")
    if not isinstance(choices, list) or not choices:
        raise ProtocolError("the endpoint's answer has no `choices`")
    message = _mapping(_mapping(choices[0]).get("message"))
    timings, usage = _mapping(plain.get("timings")), _mapping(plain.get("usage"))
    n_tokens = _first(_count(timings.get("predicted_n")), _count(usage.get("completion_tokens")), 0)
    return Answer(
        text="".join(_text(message.get(key)) for key in ("reasoning_content", "content")),
        n_tokens=n_tokens,
        per_s=_speed(timings, n_tokens, wall_s),
        wall_s=wall_s,
        rounds=_count(timings.get("rounds")),
        drafted=_first(_count(timings.get("drafted")), _count(timings.get("draft_n"))),
        accepted=_first(_count(timings.get("accepted")), _count(timings.get("draft_n_accepted"))),
        tried_at=_counts(timings.get("tried_at")),
        accepted_at=_counts(timings.get("accepted_at")),
        hidden=_share(_first(_number(timings.get("hidden")), _number(timings.get("hidden_share")))),
        engine=_text(timings.get("engine"))[:64],
        drafters=_names(timings.get("drafters")),
    )


def _speed(timings: Mapping[str, Any], n_tokens: int, wall_s: float) -> float | None:
    """As the engine measured it, else by the asker's clock, with the prompt in it."""
    told = _number(timings.get("predicted_per_second"))
    if told is not None and told >= MIN_PER_S:
        return told
    return n_tokens / wall_s if n_tokens and wall_s > 0 else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= MAX_COUNT else None


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value <= MAX_COUNT else None


def _share(value: float | None) -> float | None:
    return None if value is None else min(1.0, value)


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        return ()
    return tuple(_count(n) or 0 for n in value[:MAX_POSITIONS])


def _names(value: object) -> tuple[str, ...]:
    """Of a list of names, or of a mapping from names to tokens."""
    found = list(value) if isinstance(value, list | dict) else []
    return tuple(name[:128] for name in found[:MAX_NAMES] if isinstance(name, str))


# Statistics


def row(kind: str, pairs: Sequence[Pair]) -> Row:
    """The figures of these pairs together."""
    answers = [pair.drafts for pair in pairs]
    drafted, accepted = sum(a.drafted or 0 for a in answers), sum(a.accepted or 0 for a in answers)
    rounds = sum(a.rounds or 0 for a in answers)
    compared = [pair.equal for pair in pairs if pair.equal is not None]
    return Row(
        kind=kind,
        prompts=len(pairs),
        drafts_per_s=_median(a.fast for a in answers),
        without_per_s=_median(pair.without.fast for pair in pairs if pair.without),
        speedup=_median(pair.ratio for pair in pairs),
        drafted=drafted,
        accepted=accepted,
        acceptance=share(accepted, drafted),
        acceptance_at=_by_position(answers),
        tokens_per_round=share(rounds + sum(a.accepted or 0 for a in answers if a.rounds), rounds),
        hidden=_median(a.hidden for a in answers if a.drafted),
        compared=len(compared),
        equal=sum(compared),
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _by_position(answers: Sequence[Answer]) -> tuple[float | None, ...]:
    tried: list[int] = []
    accepted: list[int] = []
    for answer in answers:
        add_each(tried, answer.tried_at)
        add_each(accepted, answer.accepted_at)
    return shares(tried, accepted)


def rows(pairs: Sequence[Pair]) -> list[Row]:
    """A row for each kind, in the order in which the kinds came, and one for all if there are several."""
    kinds = list(dict.fromkeys(pair.kind for pair in pairs))
    each = [row(kind, [pair for pair in pairs if pair.kind == kind]) for kind in kinds]
    return [*each, row(ALL, pairs)] if len(kinds) > 1 else each


def differences(pairs: Sequence[Pair]) -> list[Plain]:
    """Which answers differ, and at which character."""
    return [
        {"kind": p.kind, "prompt": p.prompt, "at": _first_difference(p.drafts.text, p.without.text)}
        for p in pairs
        if p.equal is False and p.without is not None
    ]


def _first_difference(left: str, right: str) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))


def notes(pairs: Sequence[Pair]) -> list[str]:
    """What a reader of the table must know of it."""
    found = []
    short = sum(p.drafts.n_tokens < MIN_TOKENS for p in pairs)
    if short:
        found.append(f"{short} of {len(pairs)} answers have fewer than {MIN_TOKENS} tokens and do not count as speeds")
    if pairs and not any(p.drafts.drafted for p in pairs):
        found.append("nothing was drafted: `tightwad-agent status` says why")
    return found


def plain(pairs: Sequence[Pair]) -> Plain:
    """All of it as JSON has it: rows by kind, `total`, and every single answer without its text."""
    table = rows(pairs)
    total = asdict(table[-1]) if table else None
    return {
        "kinds": [asdict(r) for r in table if r.kind != ALL],
        "total": total,
        "differences": differences(pairs),
        "notes": notes(pairs),
        "answers": [_single(pair) for pair in pairs],
    }


def _single(pair: Pair) -> Plain:
    return {
        "kind": pair.kind,
        "prompt": pair.prompt,
        "drafts": _figures(pair.drafts),
        "without": _figures(pair.without) if pair.without else None,
        "ratio": pair.ratio,
        "equal": pair.equal,
    }


def _figures(answer: Answer) -> Plain:
    figures = asdict(answer)
    del figures["text"]
    return figures
