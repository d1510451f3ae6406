"""Sums over all requests since the agent started; `status` and `/metrics` are made from them. Pure."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

from tightwad_agent.proxy.ports import Timings

MAX_POSITIONS = 16
"""Positions of a draft that are counted one by one."""
MAX_DRAFTERS = 64
"""Drafters that are counted one by one; names come from other machines."""
OTHERS = "others"


@dataclass(slots=True)
class Tally:
    """`requests`: answers by class of status (`2xx`). `n_resumed`: times that an answer whose engine was lost went on,
    after `paused_s` altogether and `longest_pause_s` at most. The rest as in `Timings`, of all requests together."""

    requests: dict[str, int] = field(default_factory=dict)
    n_prompt: int = 0
    n_cached: int = 0
    n_generated: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    tried_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    prompt_ms: float = 0.0
    generate_ms: float = 0.0
    verify_ms: float = 0.0
    draft_ms: float = 0.0
    waited_ms: float = 0.0
    drafters: dict[str, int] = field(default_factory=dict)
    n_resumed: int = 0
    paused_s: float = 0.0
    longest_pause_s: float = 0.0

    def paused(self, seconds: float) -> None:
        """An answer goes on that stood still for so long, because its engine was lost."""
        self.n_resumed += 1
        self.paused_s += seconds
        self.longest_pause_s = max(self.longest_pause_s, seconds)

    def answered(self, status: int) -> None:
        """One request got this HTTP status."""
        _add(self.requests, f"{status // 100}xx", 1)

    def generated(self, timings: Timings) -> None:
        """One request has ended, in whatever way."""
        self.n_prompt += timings.n_prompt
        self.n_cached += timings.n_cached
        self.n_generated += timings.n_generated
        self.rounds += timings.rounds
        self.drafted += timings.drafted
        self.accepted += timings.accepted
        add_each(self.tried_at, timings.tried_at)
        add_each(self.accepted_at, timings.accepted_at)
        self.prompt_ms += timings.prompt_ms
        self.generate_ms += timings.generate_ms
        self.verify_ms += timings.verify_ms
        self.draft_ms += timings.draft_ms
        self.waited_ms += timings.waited_ms
        for name, n in timings.drafters.items():
            known = name in self.drafters or len(self.drafters) < MAX_DRAFTERS
            _add(self.drafters, name if known else OTHERS, n)

    def snapshot(self) -> Tally:
        """A copy that stays as it is."""
        return copy.deepcopy(self)

    @property
    def acceptance_at(self) -> tuple[float | None, ...]:
        """The accepted share of each position of a draft."""
        return shares(self.tried_at, self.accepted_at)

    @property
    def tokens_per_round(self) -> float | None:
        """The model's own token of each round among them."""
        return share(self.rounds + self.accepted, self.rounds)

    @property
    def hidden(self) -> float | None:
        """The share of the drafting during which a forward pass ran."""
        waited = share(self.waited_ms, self.draft_ms)
        return None if waited is None else max(0.0, 1.0 - waited)


def share(part: float, whole: float) -> float | None:
    """`part / whole`; `None` of nothing."""
    return part / whole if whole else None


def shares(tried: Sequence[int], accepted: Sequence[int]) -> tuple[float | None, ...]:
    """Position by position, up to the last one that was tried."""
    last = max((at for at, n in enumerate(tried) if n), default=-1)
    return tuple(share(accepted[at] if at < len(accepted) else 0, tried[at]) for at in range(last + 1))


def add_each(sums: list[int], counts: Sequence[int]) -> None:
    """Adds position by position, up to `MAX_POSITIONS`."""
    more = min(len(counts), MAX_POSITIONS)
    sums.extend([0] * (more - len(sums)))
    for at in range(more):
        sums[at] += counts[at]


def _add(counts: dict[str, int], name: str, n: int) -> None:
    counts[name] = counts.get(name, 0) + n
