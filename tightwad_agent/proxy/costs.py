"""What rounds and drafts were measured to cost on one pool, shared by all its requests.

`RoundTimes` learns the seconds of a forward pass by the tokens in it; `Costs` holds that and the drafters' records, and
answers what the best way to use one would gain. All times are seconds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Final

from tightwad_agent.proxy.averages import WILD, Smooth
from tightwad_agent.proxy.ngram import CopyOdds
from tightwad_agent.proxy.policy import MAX_AUTO, Policy
from tightwad_agent.proxy.record import DrafterRecord

BUCKETS: Final = 136
"""Tokens of a batch that are told apart; more are extrapolated."""
OFF: Final = 1.4
"""A pass that takes so many times what is expected, or as much less, may be a hiccup."""
SLOPE: Final = 0.1
"""A further token costs this share of a plain round, until it is known better."""
FIRST_PLAIN_S: Final = 0.05
"""A plain round takes so long, until it is known better."""
POLICIES: Final = 32
SLOWER: Final = 0.02
"""When all takes so much longer or shorter, it is the same policy at another pace."""
REST: Final = 6
REST_AGAIN: Final = 8192
DOUBTFUL: Final = 1.5
"""A drafter that promises less than this is left alone for `REST` rounds, once in so many tokens, to see whether plain
rounds are faster without it."""
DISTURBED: Final = 0.93
"""Less of a difference than this may be chance."""


class RoundTimes:
    """Seconds of a forward pass by tokens in its batch: a line, corrected where sizes were seen, never falling."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[float, float, int]] = {}  # size: weight, mean, when
        self._clock = 0
        self._table: list[float] = []
        self.seen = 0
        self.guess_s = FIRST_PLAIN_S
        self._off = 0

    def add(self, batch: int, seconds: float) -> None:
        """A pass with `batch` tokens took so long. Sizes below 1 are ignored."""
        if batch < 1 or not 0 < seconds < math.inf:
            return
        batch, self._clock, self.seen = min(batch, BUCKETS), self._clock + 1, self.seen + 1
        known = self.of(batch)
        if self.seen > 3:
            seconds = self._tamed(seconds, known)
        weight, mean, when = self._sums.get(batch, (0.0, seconds, self._clock))
        weight = min(weight * 0.995 ** (self._clock - when), 12.0) + 1
        self._sums[batch] = (weight, mean + (seconds - mean) / weight, self._clock)
        if self.seen < 12 or self.seen % 16 == 0 or abs(seconds - known) > 0.25 * known:
            self._table = []

    def _tamed(self, seconds: float, known: float) -> float:
        """One that is far off counts as much less; the next that is off to the same side counts as it is."""
        was, self._off = self._off, (seconds > known * OFF) - (seconds < known / OFF)
        if self._off and self._off != was:
            return min(max(seconds, known / OFF), known * OFF)
        return min(max(seconds, known / WILD), known * WILD)

    def hint(self, seconds: float) -> None:
        """What a pass with one token may take; counts while nothing is measured."""
        if not self.seen:
            self.guess_s, self._table = seconds, []

    def of(self, batch: float) -> float:
        """Seconds expected of a pass with so many tokens; a fraction lies between its neighbours."""
        if not self._table:
            self._table = self._fit()
        low = int(batch)
        if low >= BUCKETS:
            return self._table[-1] + (batch - BUCKETS) * (self._table[-1] - self._table[-2])
        share = batch - low
        return self._table[low] * (1 - share) + self._table[min(low + 1, BUCKETS)] * share

    def _fit(self) -> list[float]:
        base, slope, points = self._line()
        table = [base + slope * x for x in range(BUCKETS + 1)]
        for size, weight, mean in points:
            table[size] += (mean - table[size]) * weight / (weight + 3)
        return rising(table)

    def _line(self) -> tuple[float, float, list[tuple[int, float, float]]]:
        """Weighted least squares through the sizes seen, the slope pulled to `SLOPE` a little."""
        points = [(size, w * 0.995 ** (self._clock - when), m) for size, (w, m, when) in self._sums.items()]
        if not points:
            return self.guess_s * (1 - SLOPE), SLOPE * self.guess_s, []
        total = sum(w for _, w, _ in points)
        x0 = sum(w * x for x, w, _ in points) / total
        y0 = sum(w * y for _, w, y in points) / total
        sxx = sum(w * (x - x0) ** 2 for x, w, _ in points)
        sxy = sum(w * (x - x0) * (y - y0) for x, w, y in points)
        guess = SLOPE * y0 / (1 + SLOPE * (x0 - 1))
        slope = min(max((sxy + 1.5 * guess) / (sxx + 1.5), 1e-3 * guess), y0 / x0)
        return y0 - slope * x0, slope, points


def rising(values: Sequence[float]) -> list[float]:
    """The closest sequence that never falls (pool adjacent violators)."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, n = blocks.pop()
            last = blocks[-1]
            last[0] = (last[0] * last[1] + mean * n) / (last[1] + n)
            last[1] += n
    return [mean for mean, n in blocks for _ in range(int(n))]


def _steps(value: float, size: float) -> float:
    """`value` in steps of a factor 1 + `size`."""
    return math.log(max(value, 1e-6)) / size


Place = tuple[float, ...]
"""A policy's parameters, in steps: the rate of acceptance, the drafter's times, the rounds'; in plain rounds."""


def _near(one: Place, other: Place) -> bool:
    """Less than a step apart in each; measured times that wander a little so do not make for ever new policies."""
    return all(abs(a - b) <= 0.75 for a, b in zip(one, other, strict=True))


class Costs:
    """Everything measured about one pool and its drafters. `tokens` generated so far are its clock for tries."""

    def __init__(self, max_draft: int = 0) -> None:
        self.limit = max_draft or MAX_AUTO
        self.passes = RoundTimes()
        self.asked_s = Smooth(0.001)
        """Seconds that a round that is asked for takes beside its pass; `free_s`: one that follows by itself."""
        self.free_s = Smooth(0.0003)
        self.records: dict[Hashable, DrafterRecord] = {}
        self.copies = CopyOdds()
        self.tokens = 0
        self.live = 0
        """Requests being answered."""
        self.leading: DrafterRecord | None = None
        """Whose tokens were used last; `None`: nobody is worth it now."""
        self.quiet_s, self.busy_s = Smooth(0.0), Smooth(0.0)
        """Plain passes of a lone request while no drafter was at work, and while one was: it may share a machine."""
        self._rested_at = -REST_AGAIN
        self.made = Smooth(1.0, 0.03)
        """Tokens that a round brings."""
        self._others = 0.0
        self._policies: deque[tuple[Place, Policy]] = deque(maxlen=POLICIES)
        """Those used last come first."""
        self._stale = True
        self._plain_s = self._round_s = 0.0
        self._shape: Place = (0.0,)

    def record(self, key: Hashable, name: str, rtt_s: float = 0.0, slots: int = 1) -> DrafterRecord:
        """The drafter's record, made when it is new; the newest `rtt_s` and `slots` count."""
        if key not in self.records:
            self.records[key] = DrafterRecord(name, rtt_s, slots)
        record = self.records[key]
        record.rtt_s, record.slots = rtt_s, max(1, slots)
        return record

    def prompt_came(self, n: int, took_s: float) -> None:
        """A prompt of which `n` tokens were evaluated took so long; before any round, it hints at what one takes."""
        if n > 0 and took_s > 0:
            self._stale = True
            self.passes.hint(took_s / (1 + SLOPE * n))

    def round_came(self, own: int, batch: int, requests: int, took_s: float) -> None:
        """A pass with `own` tokens of this request took `took_s`."""
        batch, requests = max(batch, own), max(requests, 1)
        if batch > own + (requests - 1) * (self.limit + 1):
            return  # tokens of a prompt were in it
        self.passes.add(batch, took_s)
        self._stale = True
        self._others += (0.3 if requests > 1 else 0.5) * (batch - own - self._others)

    @property
    def known(self) -> bool:
        """Rounds have been measured."""
        return self.passes.seen > 1

    @property
    def crowded(self) -> bool:
        """Other requests' rounds run too: one that is late misses a whole pass."""
        return self.live > 1

    def pass_s(self, n: int) -> float:
        """What a pass with n draft tokens of one request costs, with what its tokens cost the others' requests."""
        mine = self.passes.of(self._others + 1 + n)
        if self.live <= 1:
            return mine
        return mine + (self.live - 1) * (mine - self.passes.of(self._others + 1))

    @property
    def beside_s(self) -> float:
        """What a round that is asked for takes beside its pass; not less than one that follows by itself."""
        return max(self.asked_s.value, self.free_s.value)

    def _refresh(self) -> None:
        """What decisions use is worked out once a round."""
        self._stale = False
        beside = self.beside_s
        self._plain_s = self.pass_s(0)
        self._round_s = self._plain_s + beside
        longer = (self.pass_s(min(n, self.limit)) + beside for n in (4, 16))
        self._shape = (2.0 * self.crowded, *(_steps(seconds / self._round_s, 0.08) for seconds in longer))

    @property
    def plain_s(self) -> float:
        """`pass_s(0)`."""
        if self._stale or bool(self._shape[0]) != self.crowded:
            self._refresh()
        return self._plain_s

    @property
    def plain_gain(self) -> float:
        """Tokens per second without any draft, rounds following by themselves."""
        return 1 / (self.plain_s * self._undisturbed() + self.free_s.value)

    def _undisturbed(self) -> float:
        """How much of a plain pass is left while no drafter is at work."""
        if min(self.quiet_s.n, self.busy_s.n) < REST // 2:
            return 1.0
        share = self.quiet_s.value / max(self.busy_s.value, 1e-9)
        return max(share, 0.5) if share < DISTURBED else 1.0

    def rests(self, gain: float) -> bool:
        """Whether to try for a while how fast plain rounds are without a drafter that promises `gain`; asked once."""
        if self.live > 1 or not self.known or gain > DOUBTFUL * self.plain_gain:
            return False
        due = self.tokens - self._rested_at >= REST_AGAIN
        self._rested_at = self.tokens if due else self._rested_at
        return due

    def policy(
        self, record: DrafterRecord, accept: float, *, more: bool = False, instead: Policy | None = None
    ) -> Policy:
        """The best way to use this drafter if `accept` of its tokens are right. `more`: as one session more. `instead`:
        good enough where it would take milliseconds to find out."""
        accept = min(max(accept, 0.02), 0.985)
        crowd = record.crowding() if more else 1.0
        token_s, first_s = record.token_s.value * crowd, record.first_s.value * crowd
        if self._stale or bool(self._shape[0]) != self.crowded:
            self._refresh()
        drafter = (token_s / self._round_s, first_s / self._round_s)
        place = (_steps(1 - accept, 0.2), *(_steps(rounds, 0.15) for rounds in drafter), *self._shape)
        return self._known(place) or instead or self._solve(place, accept, token_s, first_s)

    def _known(self, place: Place) -> Policy | None:
        for at, known in enumerate(self._policies):
            if _near(known[0], place):
                factor = self._round_s / known[1].round_s[0]
                if at or abs(factor - 1) > SLOWER:
                    del self._policies[at]
                    policy = known[1] if abs(factor - 1) <= SLOWER else known[1].paced(factor)
                    self._policies.appendleft((known[0], policy))
                return self._policies[0][1]
        return None

    def _solve(self, place: Place, accept: float, token_s: float, first_s: float) -> Policy:
        rounds = [self.pass_s(n) + self.beside_s for n in range(self.limit + 1)]
        like = self._policies[0][1] if self._policies else None
        policy = Policy(accept, token_s, first_s, rounds, self.limit, patient=not self.crowded, like=like)
        self._policies.appendleft((place, policy))
        return policy

    def words(self) -> str:
        """The last decision, for people."""
        lead = self.leading
        if lead is not None:
            return f"drafting on {lead.name}: {lead.accepted:.2f} accepted, {self.made.value:.1f} tokens a round"
        if not self.records:
            return "not drafting: no drafter"
        return "not drafting: " + ", ".join(record.excuse for record in self.records.values())
