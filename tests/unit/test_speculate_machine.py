"""Whatever order things come in, and whatever drafters send: the target's own tokens come out, effects make sense."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tightwad_agent.proxy.costs import Costs
from tightwad_agent.proxy.panel import AHEAD_MOST
from tightwad_agent.proxy.speculate import FREE, Speculation
from tightwad_agent.proxy.speculate_events import (
    Ask,
    Bounds,
    Confirmed,
    Draft,
    Effect,
    Event,
    Extend,
    Forget,
    Joined,
    Lost,
    Silenced,
    SubmitRound,
    Tick,
)
from tightwad_agent.wire.draft import Drafted, NoDraft
from tightwad_agent.wire.verify import Accepted, Ended

N_VOCAB = 12
NAMES = ["a", "b", "c"]


@dataclass
class Far:
    """A drafter as the machine's messages leave it. `lines`: what it has drafted in its newest branch."""

    known: list[int] = field(default_factory=list)
    branch: int = 0
    base: int = 0
    left: int = 0
    made: int = 0


class SpeculationMachine(RuleBasedStateMachine):
    """A verifier that keeps to its contract, and drafters that need not."""

    @initialize(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=6),
        answer=st.lists(st.integers(0, 2), min_size=1, max_size=40),
        max_draft=st.sampled_from([0, 1, 3]),
        queues=st.booleans(),
        names=st.sets(st.sampled_from(NAMES)),
        ngram=st.booleans(),
    )
    def start(
        self, prompt: list[int], answer: list[int], max_draft: int, queues: bool, names: set[str], ngram: bool
    ) -> None:
        self.costs = Costs(max_draft)
        self.max_draft = max_draft or 32
        self.whole = prompt + answer
        self.n_prompt = len(prompt)
        self.queues = queues
        self.now = 1.0
        self.heard = list(prompt)  # what the machine was told
        self.sequence = list(prompt)  # what the verifier has
        self.rounds: list[SubmitRound] = []
        self.free = 0
        self.prompted = self.ended = False
        self.answers: list[Confirmed] = []
        self.far: dict[Hashable, Far] = {}
        self.said: dict[int, set[int]] = {}  # by position, what any drafter guessed
        self.machine = Speculation(prompt, self.costs, Bounds(len(answer), 1 << 20, N_VOCAB, ngram=ngram))
        self.ngram = ngram
        self.here = set(names)
        records = [(name, self.costs.record(name, name, 0.01)) for name in sorted(names)]
        self.perform(self.machine.begin(self.now, records))

    # What the machine does

    def give(self, event: Event) -> None:
        self.perform(self.machine.handle(event, self.now))

    def perform(self, effects: list[Effect]) -> None:
        n_rounds = 0
        for effect in effects:
            match effect:
                case Ask(key, branch, keep, tokens, n):
                    far = self.far.setdefault(key, Far())
                    assert branch > far.branch
                    assert keep <= len(far.known)
                    far.known[keep:] = tokens
                    assert far.known == self.heard
                    assert 1 <= n <= AHEAD_MOST
                    far.branch, far.base, far.left, far.made = branch, len(far.known), n, 0
                case Extend(key, branch, n):
                    assert branch == self.far[key].branch
                    assert n > 0
                    self.far[key].left += n
                    far = self.far[key]
                    assert far.base + far.made + far.left <= len(self.whole) - 1
                    assert far.left <= 2 * AHEAD_MOST
                case Forget(key):
                    del self.far[key]
                case SubmitRound():
                    n_rounds += 1
                    self.submit(effect)
        assert n_rounds <= 1

    def submit(self, effect: SubmitRound) -> None:
        assert effect.at == len(self.heard)
        assert len(effect.draft) <= self.max_draft
        assert len(self.heard) + len(effect.draft) < len(self.whole)
        assert effect.free <= FREE
        assert not (effect.draft and effect.free)
        for i, token in enumerate(effect.draft):
            assert 0 <= token < N_VOCAB
            assert self.ngram or token in self.said[effect.at + i]
        self.rounds = [*self.rounds, effect] if self.queues else [effect]

    # The verifier

    @precondition(lambda self: not self.prompted)
    @rule()
    def prompt(self) -> None:
        self.prompted = True
        self.evaluate([], n_prompt=self.n_prompt)

    @precondition(lambda self: self.prompted and not self.ended and (self.rounds or self.free))
    @rule()
    def turn(self) -> None:
        draft: list[int] = []
        if self.rounds:
            submitted = self.rounds.pop(0)
            self.free = submitted.free
            behind = len(self.sequence) - submitted.at
            assert behind >= 0
            if submitted.draft[:behind] == self.sequence[submitted.at : submitted.at + len(submitted.draft)]:
                draft = submitted.draft[behind:]
        else:
            self.free -= 1
        self.evaluate(draft)

    def evaluate(self, draft: list[int], n_prompt: int = 0) -> None:
        at, right = len(self.sequence), 0
        while right < len(draft) and draft[right] == self.whole[at + right]:
            right += 1
        tokens = self.whole[at : at + right + 1]
        self.sequence += tokens
        self.ended = len(self.sequence) == len(self.whole)
        ended = Ended.LENGTH if self.ended else Ended.NOT
        batch = len(draft) + 1
        answer = Accepted(0, at, b"", (), len(draft), right, ended, 20_000 + 1000 * batch, batch, 1, n_prompt)
        self.answers.append(Confirmed(answer, tokens))

    @precondition(lambda self: self.prompted and not self.ended and (self.rounds or self.free))
    @rule()
    def turn_and_answer(self) -> None:
        self.turn()
        self.now += 0.02
        while self.answers:
            self.answer()

    @precondition(lambda self: self.answers)
    @rule()
    def answer(self) -> None:
        confirmed = self.answers.pop(0)
        self.heard += confirmed.tokens
        self.give(confirmed)

    # Drafters

    @precondition(lambda self: self.far)
    @rule(
        data=st.data(),
        right=st.booleans(),
        n=st.integers(1, 9),
        ended=st.sampled_from([False, False, True]),
        unread_s=st.sampled_from([0.0, 0.0, 0.05]),
    )
    def draft(self, data: st.DataObject, right: bool, n: int, ended: bool, unread_s: float) -> None:
        """A drafter goes on as it should."""
        key = data.draw(st.sampled_from(sorted(self.far, key=str)))
        far = self.far[key]
        n = min(n, far.left)
        guesses = [self.guess(len(far.known) + i, right or i < n - 1) for i in range(n)]
        for i, token in enumerate(guesses):
            self.said.setdefault(len(far.known) + i, set()).add(token)
        far.known += guesses
        offset, far.made, far.left = far.made, far.made + n, far.left - n
        if ended:
            far.left = 0
        if n or ended:
            drafted = Drafted(0, far.branch, offset, b"", 1000 * far.made, ended)
            self.give(Draft(key, drafted, guesses, self.now - unread_s))

    def guess(self, position: int, right: bool) -> int:
        token = self.whole[position] if position < len(self.whole) else 0
        return token if right else (token + 1) % N_VOCAB

    @precondition(lambda self: self.far)
    @rule(data=st.data(), kind=st.sampled_from(["nonsense", "nonsense", "bad token", "no draft", "lose"]))
    def fault(self, data: st.DataObject, kind: str) -> None:
        key = str(data.draw(st.sampled_from(sorted(self.far, key=str))))
        far = self.far[key]
        match kind:
            case "nonsense":
                self.nonsense(data, key, far)
            case "bad token":
                token = data.draw(st.sampled_from([-1, N_VOCAB, 1 << 30]))
                self.here.discard(key)
                self.give(Draft(key, Drafted(0, far.branch, far.made, b"", 5), [token]))
                assert key not in self.far
            case "no draft":
                self.give(Silenced(key, NoDraft(0, far.branch - data.draw(st.integers(0, 1)), "full")))
            case _:
                self.here.discard(key)
                self.give(Lost(key))
                assert key not in self.far

    def nonsense(self, data: st.DataObject, key: str, far: Far) -> None:
        """Branches that are over, offsets with gaps, repeated tokens, somebody unknown."""
        branch, offset = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 300))
        tokens = data.draw(st.lists(st.integers(0, 2), max_size=4))
        if branch != far.branch or offset > far.made or offset + len(tokens) <= far.made:
            self.give(Draft(key, Drafted(0, branch, offset, b"", 5), tokens))
        self.give(Draft("nobody", Drafted(0, branch, offset, b"", 5), tokens))

    @rule(key=st.sampled_from(NAMES))
    def join(self, key: str) -> None:
        self.here.add(key)
        self.give(Joined(key, self.costs.record(key, key, 0.01)))

    # Time

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.3, 1000.0]))
    def time(self, seconds: float) -> None:
        """Time goes by, or jumps to the deadline if that comes first."""
        self.now = min(self.now + seconds, max(self.now, self.machine.next_deadline()))
        self.give(Tick())

    @invariant()
    def comes_out(self) -> None:
        if hasattr(self, "machine"):
            assert self.heard == self.whole[: len(self.heard)]
            assert self.machine.sequence == self.heard
            assert self.machine.over == (len(self.heard) == len(self.whole))
            assert self.machine.timings.waited_ms >= 0

    def teardown(self) -> None:
        """With nobody to help, it still comes to its end."""
        if not hasattr(self, "machine"):
            return
        for _ in range(40 * len(self.whole)):
            if self.machine.over:
                break
            if not self.prompted:
                self.prompt()
            elif self.answers:
                self.answer()
            elif self.rounds or self.free:
                self.now += 0.02
                self.turn()
            else:
                self.time(1000.0)
        assert self.machine.over
        assert self.heard == self.whole
        assert not self.far
        assert all(record.sessions == 0 for record in self.costs.records.values())


SpeculationMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=80, deadline=None)
TestSpeculationMachine = SpeculationMachine.TestCase
