"""A verifier and drafters on a simulated clock, for the speculation machine; and fixed draft lengths to compare with.

The target's tokens are fixed beforehand. For each position it is fixed too whether a drafter would guess it, so that
every way of drafting meets the same luck.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tightwad_agent.proxy.costs import Costs
from tightwad_agent.proxy.speculate import Speculation
from tightwad_agent.proxy.speculate_events import (
    Ask,
    Bounds,
    Confirmed,
    Draft,
    Effect,
    Event,
    Extend,
    Forget,
    SubmitRound,
    Tick,
)
from tightwad_agent.wire.draft import Drafted
from tightwad_agent.wire.verify import Accepted, Ended

N_VOCAB = 50_000
IPC_S = 0.0003
"""One way between the agent and the verifier process."""


@dataclass(frozen=True)
class Speeds:
    """Seconds. A pass with n tokens takes `pass_s + slope_s * (n - 1)`, `noise` of it more or less at random. A draft
    token takes `token_s`, a message to or from the drafter `delay_s`; it is silent after `hangs_from`. While it drafts,
    passes take `disturbs` longer, as where it shares a machine with a worker. A pass with more than one token takes
    `jump_s` longer, as where a matrix is multiplied by a matrix."""

    pass_s: float = 0.05
    slope_s: float = 0.006
    token_s: float = 0.015
    delay_s: float = 0.0
    noise: float = 0.0
    hangs_from: float = math.inf
    disturbs: float = 0.0
    jump_s: float = 0.0

    @property
    def first_s(self) -> float:
        return 2 * self.delay_s + self.token_s

    def round_s(self, n: int) -> float:
        return self.pass_s + self.slope_s * n + self.jump_s * (n > 0)


@dataclass(frozen=True)
class Text:
    """A prompt and what the target makes of it; `guessed[i]`: whether a drafter gets target token i right."""

    prompt: list[int]
    target: list[int]
    guessed: list[bool]
    rates: list[float]
    seed: str

    @classmethod
    def make(cls, seed: str, length: int, accept: float | Callable[[int], float]) -> Text:
        """A text of random tokens; `accept` may depend on the position."""
        dice = random.Random(seed)
        rate = accept if callable(accept) else lambda _: accept
        prompt = [dice.randrange(N_VOCAB) for _ in range(20)]
        target = [dice.randrange(N_VOCAB) for _ in range(length)]
        rates = [rate(i) for i in range(length + 400)]
        return cls(prompt, target, [dice.random() < share for share in rates], rates, seed)

    def luck(self, key: str) -> Text:
        """The same text with another drafter's luck; "a" has the text's own."""
        if key == "a":
            return self
        dice = random.Random(f"{self.seed}/{key}")
        return replace(self, guessed=[dice.random() < share for share in self.rates])

    def at(self, position: int) -> int:
        """The target's token for a position of the sequence."""
        i = position - len(self.prompt)
        return self.target[i] if i < len(self.target) else 7

    def guess(self, sequence: Sequence[int], n_checked: int) -> tuple[int, bool]:
        """A drafter's token behind `sequence`, whose first `n_checked` tokens are right, and whether it is right."""
        position, i = len(sequence), len(sequence) - len(self.prompt)
        right = n_checked == position and (i < 0 or self.guessed[i])
        return (self.at(position) if right else (self.at(position) + 1) % N_VOCAB), right


class SimDrafter:
    """One drafter's session for one request: streams tokens; it never answers after `hangs_from`."""

    def __init__(self, line: Line, key: str, speeds: Speeds, text: Text) -> None:
        self.line, self.sim, self.key, self.speeds, self.text = line, line.sim, key, speeds, text
        self.sequence: list[int] = []
        self.right = self.branch = self.left = self.made = self.turn = self.total = 0
        self.busy = False
        self.started = 0.0

    def ask(self, ask: Ask) -> None:
        assert ask.branch > self.branch
        assert 0 <= ask.keep <= len(self.sequence)
        self.sequence[ask.keep :] = ask.tokens
        self.right = len(self.sequence)
        self.branch, self.left, self.made = ask.branch, ask.n, 0
        self.turn += 1
        self.started = self.sim.now
        self._work()

    def extend(self, extend: Extend) -> None:
        if extend.branch == self.branch:
            self.left += extend.n
            if not self.busy:
                self._work()

    def _work(self) -> None:
        self.busy = self.left > 0
        if self.busy:
            turn = self.turn
            self.sim.after(self.speeds.token_s * self.sim.jitter(), lambda: self._made(turn))

    def _made(self, turn: int) -> None:
        if turn != self.turn or self.sim.now > self.speeds.hangs_from:
            return
        token, right = self.text.guess(self.sequence, self.right)
        self.sequence.append(token)
        self.right += right
        drafted = Drafted(0, self.branch, self.made, b"", int(1e6 * (self.sim.now - self.started)))
        self.left, self.made, self.total = self.left - 1, self.made + 1, self.total + 1
        self.sim.after(self.speeds.delay_s, lambda: self.line.give(Draft(self.key, drafted, [token])))
        self._work()


class Line:
    """One request: its machine on one side, its sequence at the verifier on the other."""

    def __init__(self, sim: Sim, text: Text, machine: Speculation, drafters: dict[str, SimDrafter]) -> None:
        self.sim, self.text, self.machine, self.drafters = sim, text, machine, drafters
        self.sequence = list(text.prompt)
        self.heard: list[int] = []
        self.pending: SubmitRound | None = None
        self.free = 0
        self.prompted = False
        self.first_at = self.done_at = 0.0
        self._tick_at = math.inf

    @property
    def ended(self) -> bool:
        return len(self.sequence) >= len(self.text.prompt) + len(self.text.target)

    @property
    def due(self) -> bool:
        return not self.ended and (not self.prompted or self.pending is not None or self.free > 0)

    def give(self, event: Event) -> None:
        self.perform(self.machine.handle(event, self.sim.now))

    def perform(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case SubmitRound():
                    self.sim.after(IPC_S, lambda e=effect: self._submitted(e))
                case Ask(drafter=key):
                    self._send(str(key), lambda drafter, e=effect: drafter.ask(e))
                case Extend(drafter=key):
                    self._send(str(key), lambda drafter, e=effect: drafter.extend(e))
                case Forget():
                    pass
        deadline = self.machine.next_deadline()
        if deadline < self._tick_at or self._tick_at <= self.sim.now:
            self._tick_at = deadline
            if deadline < math.inf:
                self.sim.after(max(0.0, deadline - self.sim.now), self._tick)

    def _send(self, key: str, action: Callable[[SimDrafter], None]) -> None:
        drafter = self.drafters[key]
        self.sim.after(drafter.speeds.delay_s, lambda: action(drafter))

    def _tick(self) -> None:
        self._tick_at = math.inf
        self.give(Tick())

    def _submitted(self, submitted: SubmitRound) -> None:
        self.pending = submitted
        self.sim.wake()

    def take_draft(self) -> list[int]:
        """What of the pending round is still ahead; one round less is due."""
        submitted, self.pending = self.pending, None
        if submitted is None:
            self.free -= self.prompted
            return []
        self.free = submitted.free
        behind = len(self.sequence) - submitted.at
        assert behind >= 0
        same = submitted.draft[:behind] == self.sequence[submitted.at : submitted.at + len(submitted.draft)]
        return submitted.draft[behind:] if same else []

    def evaluated(self, draft: list[int], took_s: float, batch: int, requests: int) -> None:
        at, right = len(self.sequence), 0
        while right < len(draft) and draft[right] == self.text.at(at + right):
            right += 1
        tokens = [self.text.at(at + i) for i in range(right + 1)]
        self.sequence += tokens
        ended = Ended.LENGTH if self.ended else Ended.NOT
        answer = Accepted(0, at, b"", (), len(draft), right, ended, int(took_s * 1e6), batch, requests)
        if not self.prompted:
            self.prompted = True
            answer = replace(answer, n_prompt=at, prompt_us=answer.decode_us, decode_us=0)
        self.sim.after(IPC_S, lambda: self._answered(answer, tokens))

    def _answered(self, answer: Accepted, tokens: list[int]) -> None:
        self.heard += tokens
        self.first_at = self.first_at or self.sim.now
        if answer.ended is not Ended.NOT:
            self.done_at = self.sim.now
        self.give(Confirmed(answer, list(tokens)))


class Sim:
    """A verifier that evaluates all requests that are due in one pass, and waits a little for those of the last one."""

    def __init__(self, speeds: Speeds, seed: str = "0") -> None:
        self.speeds, self.now = speeds, 0.0
        self.lines: list[Line] = []
        self._dice = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._busy = False
        self._last: list[Line] = []
        self._gathers_until = 0.0

    def jitter(self) -> float:
        return 1 + self.speeds.noise * (2 * self._dice.random() - 1)

    def after(self, delay: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + delay, self._count, action))

    def add(self, text: Text, costs: Costs, drafters: dict[str, Speeds], bounds: Bounds) -> Line:
        """One more request, now, with these drafters; each has luck of its own."""
        line = Line(self, text, Speculation(text.prompt, costs, bounds), {})
        line.drafters = {key: SimDrafter(line, key, speeds, text.luck(key)) for key, speeds in drafters.items()}
        self.lines.append(line)
        records = [(key, costs.record(key, key, 2 * speeds.delay_s, 4)) for key, speeds in drafters.items()]
        line.perform(line.machine.begin(self.now, records))
        self.wake()
        return line

    def run(self, limit_s: float = 1e5) -> None:
        while self._events and not all(line.done_at for line in self.lines):
            self.now, _, action = heapq.heappop(self._events)
            assert self.now < limit_s, "stuck"
            action()
        assert all(line.heard == line.text.target for line in self.lines)

    def wake(self) -> None:
        """Starts a pass, if there is reason to."""
        due = [line for line in self.lines if line.due]
        if self._busy or not due:
            return
        absent = [line for line in self._last if not line.due and not line.ended]
        if absent and self.now < self._gathers_until:
            return
        drafts = [line.take_draft() for line in due]
        batch = sum(
            len(draft) + 1 if line.prompted else len(line.text.prompt) for line, draft in zip(due, drafts, strict=True)
        )
        took = self.speeds.round_s(batch - 1) * self.jitter()
        drafters = [drafter for line in self.lines for drafter in line.drafters.values()]
        took *= 1 + self.speeds.disturbs * any(drafter.busy for drafter in drafters)
        self._busy, self._last = True, due
        self.after(took, lambda: self._passed(due, drafts, took, batch))

    def _passed(self, due: list[Line], drafts: list[list[int]], took: float, batch: int) -> None:
        self._busy = False
        for line, draft in zip(due, drafts, strict=True):
            line.evaluated(draft, took, batch, len(due))
        if len(self.lines) > 1:
            self._gathers_until = self.now + min(0.003, 0.08 * took)
            self.after(self._gathers_until - self.now, self.wake)
        self.wake()


def simulate(
    text: Text,
    speeds: Speeds,
    costs: Costs,
    *,
    seed: str = "0",
    ngram: bool = False,
    others: dict[str, Speeds] | None = None,
) -> tuple[float, Line]:
    """Seconds from the first token to the last that the machine takes for one request, with one drafter or more."""
    sim = Sim(speeds, seed)
    bounds = Bounds(len(text.target), 1 << 20, N_VOCAB, ngram=ngram)
    line = sim.add(text, costs, {"a": speeds, **(others or {})}, bounds)
    sim.run()
    return line.done_at - line.first_at, line


def fixed(text: Text, speeds: Speeds, k: int) -> float:
    """Seconds with always k draft tokens a round, the drafter never waiting, by arithmetic alone."""
    n, now, done = len(text.target), 0.0, 1
    if k == 0:
        return (n - 1) * speeds.pass_s
    asked, at = 0.0, 1  # the branch: when asked, and the position of its first token
    beside = 2 * IPC_S
    while done < n:
        size = min(k, n - done - 1)
        if size:
            now = max(now, asked + speeds.first_s + (done + size - 1 - at) * speeds.token_s)
        right = 0
        while right < size and text.guessed[done + right]:
            right += 1
        now += speeds.round_s(size) + beside
        done += right + 1
        if right < size or not text.guessed[done - 1]:
            asked, at = now, done
    return now


FIXED = (0, 1, 2, 3, 4, 6, 8, 12, 16)


def best_fixed(texts: Sequence[Text], speeds: Speeds) -> tuple[float, int]:
    """The best of the fixed lengths for all texts together, known in hindsight."""
    return min((sum(fixed(text, speeds, k) for text in texts), k) for k in FIXED)
