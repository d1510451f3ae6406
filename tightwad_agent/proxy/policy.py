"""How many draft tokens a round should have, and whether to wait for more: the best long-run rate, by value iteration.

While the verifier is idle, the state is the number of draft tokens at hand, with the next one due after `token_s`; or
"anew": the drafter has just been asked to start again, and its first token is due after `first_s`. One may submit a
round with some of the tokens, or wait for the next. A round that confirms all its draft, and whose extra token is
the one the drafter had guessed too, leaves the drafter's stream as it is, longer by what arrived meanwhile; any
other leads back to "anew". Tokens per second over such a cycle is what is maximised, and the value of a state is
what it is worth in tokens more than starting anew, at that rate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Final

MAX_AUTO: Final = 32
"""Draft tokens of a round, if nobody says otherwise."""
HOPELESS: Final = 0.03
"""A token less likely than this to be reached is never asked for."""
IMPROVEMENTS: Final = 10
SWEEPS: Final = 12
CLOSE: Final = 0.002
WAIT: Final = -1
"""The choice to submit nothing now."""
Step = tuple[int, float, float, float, float]
"""A size; the tokens a round of it brings, its seconds, how likely all of it is right, tokens made meanwhile."""
WAITING: Final[Step] = (WAIT, 0.0, 0.0, 0.0, 0.0)


def horizon(accept: float, limit: int) -> int:
    """The longest draft worth thinking about."""
    return max(1, min(limit, MAX_AUTO, math.ceil(math.log(HOPELESS) / math.log(accept))))


def sizes(top: int) -> list[int]:
    """Round sizes to try: all the small ones, then coarser."""
    return [n for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28) if n < top] + [top]


class Policy:
    """The best way to use one drafter: `gain` tokens per second; `reach` tokens is the longest round it would submit.

    `accept`: probability that a token is right if those before it were. `first_s`: until the first token after
    asking anew; `token_s`: between tokens. `round_s[n]`: seconds of a round with n draft tokens. Not `patient`: the
    verifier is never left idle. `like`: a policy for much the same figures, found faster from there.
    """

    __slots__ = (
        "_chosen",
        "_power",
        "_seconds",
        "_sum",
        "_tokens",
        "accept",
        "first_s",
        "gain",
        "patient",
        "reach",
        "round_s",
        "token_s",
        "top",
        "value",
    )

    def __init__(
        self,
        accept: float,
        token_s: float,
        first_s: float,
        round_s: Sequence[float],
        limit: int,
        *,
        patient: bool = True,
        like: Policy | None = None,
    ) -> None:
        self.patient = patient
        self.accept, self.token_s, self.first_s = accept, max(token_s, 1e-5), first_s
        self.top = horizon(accept, min(limit, len(round_s) - 1))
        self.round_s = round_s
        self._power = [accept**n for n in range(self.top + 2)]
        self._sum = [(1 - p) / (1 - accept) for p in self._power][1:]  # expected tokens of a round with n
        self.value: list[float] = []
        self._tokens: list[float] = []
        self._seconds: list[float] = []
        self._chosen: list[int] = []
        self.gain, self.reach = 1 / round_s[0], self.top
        self._solve(like if like is not None and like.top == self.top and like.patient == patient else None)

    def _solve(self, like: Policy | None) -> None:
        """Modified policy iteration over (expected tokens, expected seconds) until anew; the rate follows.

        The first guess is to submit all there is, so that speculation is given up only where its value is known.
        """
        top = self.top
        steps = [
            (n, self._sum[n], self.round_s[n], self._power[n + 1], self.round_s[n] / self.token_s) for n in sizes(top)
        ]
        if like is None:
            tokens, seconds = [0.0] * (top + 1), [0.0] * (top + 1)
            chosen = [[step for step in steps if step[0] <= k][-1] for k in range(top + 1)]
        else:
            factor = self.round_s[0] / like.round_s[0]
            tokens, seconds = like._tokens.copy(), [took * factor for took in like._seconds]
            self.gain = like.gain / factor
            by_size = {WAIT: WAITING, **{step[0]: step for step in steps}}
            chosen = [by_size[n] for n in like._chosen]
        for _ in range(IMPROVEMENTS):
            for _ in range(SWEEPS):
                self._evaluate(chosen, tokens, seconds)
            before = self.gain
            self.gain = self._anew(before, tokens, seconds)
            better = self._improve(steps, tokens, seconds)
            if better == chosen and (like is not None or abs(before - self.gain) < CLOSE * self.gain):
                break
            chosen = better
        self.value = [t - self.gain * s for t, s in zip(tokens, seconds, strict=True)]
        self._tokens, self._seconds, self._chosen = tokens, seconds, [step[0] for step in chosen]
        self.reach = max(1, *self._chosen)

    def _evaluate(self, chosen: list[Step], tokens: list[float], seconds: list[float]) -> None:
        """One sweep of what the choices bring."""
        top, token_s = self.top, self.token_s
        for k in range(top, -1, -1):
            n, made, took, on, arrived = chosen[k]
            if n == WAIT:
                tokens[k], seconds[k] = tokens[k + 1], seconds[k + 1] + token_s
                continue
            have = k - n + arrived
            if have < 1:
                t, s = tokens[0], seconds[0] + (1 - have) * token_s
            elif have >= top + 1:
                t, s = tokens[top], seconds[top]
            else:
                low = int(have) - 1
                share = have - 1 - low
                t = tokens[low] + (tokens[low + 1] - tokens[low]) * share
                s = seconds[low] + (seconds[low + 1] - seconds[low]) * share
            tokens[k], seconds[k] = made + on * t, took + on * s

    def _improve(self, steps: list[Step], tokens: list[float], seconds: list[float]) -> list[Step]:
        """The best choice in each state, if what follows is worth what it was."""
        gain, top = self.gain, self.top
        self.value = value = [t - gain * s for t, s in zip(tokens, seconds, strict=True)]
        chosen = []
        for k in range(top + 1):
            best, step = -math.inf, WAITING
            if self.patient and k < top:
                best = value[k + 1] - gain * self.token_s

            for candidate in steps:
                n, made, took, on, arrived = candidate
                if n > k:
                    break
                worth = made - gain * took + on * self.worth(k - n + arrived)
                if worth > best:
                    best, step = worth, candidate
            chosen.append(step)
        return chosen

    def _anew(self, gain: float, tokens: list[float], seconds: list[float]) -> float:
        """The rate of the cycle that begins with asking anew: wait for the first token, or a plain round meanwhile."""
        wait = (tokens[1], seconds[1] + self.first_s)
        plain_s = self.round_s[0]
        t, s = self._after(self._arrivals(plain_s, self.first_s), gain, tokens, seconds)
        plain = (1 + self.accept * t, plain_s + self.accept * s)
        t, s = max(wait, plain, key=lambda pair: pair[0] - gain * pair[1]) if self.patient else plain
        return t / s

    def _after(self, have: float, gain: float, tokens: list[float], seconds: list[float]) -> tuple[float, float]:
        """(tokens, seconds) until anew after a round that confirmed everything, as `worth`."""
        if have < 1:
            t, s = tokens[0], seconds[0] + (1 - have) * self.token_s
            return (t, s) if t > gain * s else (0.0, 0.0)
        k = min(round(have) - 1, self.top)
        return tokens[k], seconds[k]

    def _arrivals(self, took: float, due_s: float) -> float:
        """Tokens that come in `took` seconds, a fraction for the one being made; below 1: what that lacks as well."""
        return 1 + (took - due_s) / self.token_s

    def paced(self, factor: float) -> Policy:
        """The same where all takes `factor` times as long: what is best stays so."""
        slower = copy.copy(self)
        slower.gain, slower.token_s, slower.first_s = self.gain / factor, self.token_s * factor, self.first_s * factor
        slower.round_s = [seconds * factor for seconds in self.round_s]
        slower._seconds = [seconds * factor for seconds in self._seconds]
        return slower

    def choose(self, have: int, due_s: float, limit: int, *, may_wait: bool = True) -> tuple[int, float]:
        """(size of the round to submit now, or `WAIT`; what that is worth), with `have` tokens at hand and the next
        due in `due_s` seconds (infinite: none will come)."""
        gain, value = self.gain, self.value
        best, size = -math.inf, 0
        for n in range(min(have, limit, self.top) + 1):
            took = self.round_s[n]
            worth = self._sum[n] - gain * took + self._power[n + 1] * self._rest(have - n, took, due_s)
            if worth > best:
                best, size = worth, n
        if may_wait and self.patient and have < min(limit, self.top):
            worth = value[have + 1] - gain * due_s
            if worth > best:
                return WAIT, worth
        return size, best

    def finish(self, have: int, left: int, limit: int) -> tuple[int, float]:
        """As `choose` where no more than the `have` tokens will come, or the answer ends after `left` tokens: by what
        each order of using them up brings. A mistake leads to "anew", or, close to the end, to plain rounds."""
        have = min(have, 2 * self.top)
        value: list[float] = [0.0] * (have + 2)
        size, worth = 0, -math.inf
        for used in range(min(have, left - 1), -1, -1):
            most = min(have - used, left - used - 1, limit, self.top)
            size, worth = self._best_of(most, left - used, value[used + 1 : have + 1])
            value[used] = worth
        return size, worth

    def _best_of(self, most: int, left: int, after: Sequence[float]) -> tuple[int, float]:
        """`after[n]`: what follows a round of n tokens if the token behind them is as drafted, too."""
        best, size, wrong = -math.inf, 0, 0.0
        for n in range(most + 1):
            wrong += self._power[n - 1] * (1 - self.accept) * self._anew_with(left - n) if n else 0.0
            then = self._anew_with(left - n - 1)
            if n < len(after) and left > n + 1:
                then += self.accept * (after[n] - then)
            worth = self._sum[n] - self.gain * self.round_s[n] + wrong + self._power[n] * then
            if worth > best:
                best, size = worth, n
        return size, best

    def _anew_with(self, left: int) -> float:
        """The value of "anew" when so many tokens are left to be made: one round more at least."""
        return min(0.0, left - self.gain * self.round_s[0]) if left else 0.0

    def choose_behind(self, have: int, due_s: float, reached: Sequence[float]) -> tuple[int, float]:
        """(how many tokens from elsewhere to put behind all `have` of the drafter's, what such a round is worth).
        `reached[i]`: the probability that i + 1 of those are right if the drafter's are. Zero without any of them.

        Right ones that the drafter has not made yet it makes meanwhile, or is asked anew.
        """
        best, size = -math.inf, 0
        if have > self.top:
            return size, best
        on, made = self._power[have], self._sum[have]
        for n in range(1, min(len(reached), len(self.round_s) - 1 - have) + 1):
            made += on * reached[n - 1]
            took = self.round_s[have + n]
            worth = made - self.gain * took + on * self._overtaken(reached[:n], self._arrivals(took, due_s))
            if worth > best:
                best, size = worth, n
        return size, best

    def _overtaken(self, reached: Sequence[float], arrived: float) -> float:
        """The value after a round whose tokens from elsewhere were right as far as `reached` says, while `arrived` of
        the drafter's own came, which follow those of it that were part."""
        value, before, right = 0.0, 1.0, 1.0
        for n, share in enumerate([*reached, 0.0]):
            right *= self.accept
            value += (before - share) * right * self.worth(arrived - n)
            before = share
        return value

    def _rest(self, left: int, took: float, due_s: float) -> float:
        """The value after a round that confirmed everything, of which `left` tokens were not part."""
        if due_s == math.inf:
            return self.value[min(left - 1, self.top)] if left else 0.0
        return self.worth(left + self._arrivals(took, due_s))

    def worth(self, have: float) -> float:
        """The value once a further token is confirmed that used up one of `have` (a fraction: on average)."""
        if have < 1:
            return max(0.0, self.value[0] - self.gain * (1 - have) * self.token_s)
        low = int(have) - 1
        if low >= self.top:
            return self.value[self.top]
        share = have - 1 - low
        return self.value[low] * (1 - share) + self.value[low + 1] * share
