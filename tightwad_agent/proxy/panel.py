"""The drafters of one request: which one leads, which one is being tried, and when each is asked.

The lead's tokens go into rounds; as soon as one of them is wrong it is asked anew. Another drafter is tried beside it
now and then, or while none leads: a few tokens, compared with what the model says, in no round. Who does not deliver
in time stops leading, and the next best is asked; what the late one still sends may make it lead again.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

from tightwad_agent.proxy.branch import Branch
from tightwad_agent.proxy.costs import REST, Costs
from tightwad_agent.proxy.policy import Policy
from tightwad_agent.proxy.record import DrafterRecord
from tightwad_agent.proxy.speculate_events import Bounds, Draft, Effect, Forget

PROBE, PROBE_MOST = 4, 32
"""Tokens that a drafter is tried with: the more, the better it is thought to be."""
WORTH: Final = 1.03
KEEP: Final = 1.005
"""A drafter must promise so many times what none gives before it is used, and when it is used."""
BETTER: Final = 1.1
"""And so much more than the one that leads."""
SLACK: Final = 2
"""Tokens that a drafter may be ahead beside what a round can use."""
SEEN: Final = 20
"""Tokens after which a drafter's share of right ones means something."""
AHEAD_MOST: Final = 128
CHUNK: Final = 4
"""Permission to go on is given for so many tokens at least, unless the drafter is about to stop."""
LATE_S: Final = 0.02


class Panel:
    """Effects are appended to `effects`; `sequence` is the request's, and grows."""

    def __init__(self, sequence: list[int], costs: Costs, bounds: Bounds, effects: list[Effect]) -> None:
        self.lead: Branch | None = None
        self.probe: Branch | None = None
        self._sequence, self._costs, self._effects = sequence, costs, effects
        self._n_vocab = bounds.n_vocab
        self._last = len(sequence) + bounds.max_tokens - 1  # a draft for this position or later is no use
        self._branches: dict[Hashable, Branch] = {}
        self._last_policy: Policy | None = None
        self._settled = False
        """`_last_policy` is the right one until more is known."""
        self._rests_until = 0

    # Who is there

    def join(self, key: Hashable, record: DrafterRecord) -> None:
        """It may be asked from now on."""
        if key not in self._branches:
            self._branches[key] = Branch(key, record)

    def lose(self, key: Hashable, now: float, *, bad: bool = False) -> None:
        """It is gone, and will not answer; or it is `bad`, and must not."""
        branch = self._branches.pop(key, None)
        if branch is None:
            return
        branch.record.lost += 1
        branch.record.benched = bad  # who comes back after a loss may be as good as new
        self._forget(branch)
        self.choose(now)

    def silenced(self, key: Hashable, number: int, now: float) -> None:
        """Its branch `number` gets no more tokens."""
        branch = self._branches.get(key)
        if branch is not None and branch.number == number and not branch.closed:
            branch.fail()
            self._leave(branch, silent=True)
            self.choose(now)

    def close(self) -> None:
        """All sessions end."""
        for branch in self._branches.values():
            self._forget(branch)
        self._branches.clear()

    def _forget(self, branch: Branch) -> None:
        if branch.number:
            branch.record.sessions -= 1
            self._effects.append(Forget(branch.key))
        self.lead = None if branch is self.lead else self.lead
        self.probe = None if branch is self.probe else self.probe

    # What they say

    def drafted(self, event: Draft, now: float) -> bool:
        """Whether the lead has more tokens now."""
        branch = self._branches.get(event.drafter)
        drafted = event.drafted
        if branch is None or drafted.branch != branch.number:
            return False
        if any(not 0 <= token < self._n_vocab for token in event.tokens):
            branch.record.failed(self._costs.tokens, silent=True)
            self.lose(event.drafter, now, bad=True)
            return False
        if event.tokens and not branch.take(drafted.offset, event.tokens, drafted.us, min(event.came, now)):
            return False
        branch.closed = branch.closed or drafted.ended
        right = branch.check(self._sequence)
        if branch is self.lead:
            self._keep_up(branch, now) if right else self._lead_was_wrong(now)
        else:
            self._judge(branch, now)
        return branch is self.lead

    def confirmed(self, now: float) -> None:
        """The sequence has grown."""
        self._settled = False
        for branch in (self.lead, self.probe):
            if branch is not None and not self._is_late(branch, now):
                branch.check(self._sequence)
        lead, probe = self.lead, self.probe
        if lead is not None:
            self._lead_was_wrong(now) if not lead.valid else self._keep_up(lead, now)
        if probe is not None and probe is self.probe:
            self._judge(probe, now)
        self.choose(now)
        self._try_another(now)

    # Who leads

    def policy(self, now: float, *, urgent: bool = True) -> Policy | None:
        """How to use the lead, if there is one that is worth it and in time. `urgent`: the verifier is idle, so that
        the last one will do."""
        lead = self.lead
        if lead is None or self._is_late(lead, now):
            self._last_policy = None
            return None
        if self._settled and self._last_policy is not None:
            return self._last_policy
        policy = self._costs.policy(lead.record, lead.accepted, instead=self._last_policy if urgent else None)
        floor = KEEP * self._costs.plain_gain
        if policy.gain < floor and self._costs.known and lead.record.measured:
            policy = self._costs.policy(lead.record, lead.hoped)
            if policy.gain < floor:
                self._leave(lead)
                return None
        if lead.record.odds.tries > SEEN and self._costs.rests(policy.gain):
            self.lead, self._rests_until = None, len(self._sequence) + 2 * REST
            return None
        self._last_policy, self._settled = policy, not urgent
        return policy

    @property
    def quiet(self) -> bool:
        """No drafter is at work for this request."""
        return not any(branch.waiting for branch in self._branches.values())

    def choose(self, now: float) -> None:
        """Asks the most promising one, if none leads."""
        if self.lead is not None or not self._branches or len(self._sequence) < self._rests_until:
            return
        bar, best = self._costs.plain_gain * WORTH if self._costs.known else 0.0, None
        for branch in self._branches.values():
            if not branch.record.benched and branch is not self.probe:
                gain = self._costs.policy(branch.record, branch.hoped, more=not branch.number).gain
                if gain > bar:
                    bar, best = gain, branch
        if best is not None:
            self._lead_with(best, now)

    def _lead_with(self, branch: Branch, now: float) -> None:
        self.lead, self._last_policy = branch, None
        self.probe = None if branch is self.probe else self.probe
        if not branch.valid or branch.closed:
            self._ask(branch, now)
        else:
            self._keep_up(branch, now)

    def _lead_was_wrong(self, now: float) -> None:
        self._settled = False
        if self.policy(now) is not None and self.lead is not None:
            self._ask(self.lead, now)

    def _leave(self, branch: Branch, *, silent: bool = False) -> None:
        branch.record.failed(self._costs.tokens, silent=silent)
        self.lead = None if branch is self.lead else self.lead
        self.probe = None if branch is self.probe else self.probe

    def _is_late(self, branch: Branch, now: float) -> bool:
        """Whether it should have delivered long ago; then it is left."""
        if not branch.waiting:
            return False
        usual = branch.record.token_s.value if branch.tokens else branch.record.first_s.value
        late = now - branch.expected_at() > max(2 * usual, self._costs.plain_s) + LATE_S
        if late:
            self._leave(branch, silent=True)
        return late

    # Trying others

    def _try_another(self, now: float) -> None:
        if self.probe is not None or len(self._sequence) < self._rests_until:
            return
        clock = self._costs.tokens
        for branch in self._branches.values():
            if branch is not self.lead and not branch.waiting and branch.record.due(clock):
                branch.record.tried(clock)
                self.probe = branch
                self._ask(branch, now, min(max(PROBE, round(1 / (1.001 - branch.accepted))), PROBE_MOST))
                return

    def _judge(self, branch: Branch, now: float) -> None:
        """One that does not lead has shown more of itself."""
        tested = branch.checked == len(branch.tokens) and not branch.waiting
        if (branch.valid and not (tested or self.lead is None)) or len(self._sequence) < self._rests_until:
            return
        bar = self._costs.plain_gain * WORTH
        if self.lead is not None:
            bar = max(bar, BETTER * self._costs.policy(self.lead.record, self.lead.accepted).gain)
        if branch.checked and self._costs.policy(branch.record, branch.accepted).gain > bar:
            branch.record.helped()
            self._lead_with(branch, now)
        elif branch is self.probe and (tested or not branch.valid):
            self._try_more(branch, now)

    def _try_more(self, branch: Branch, now: float) -> None:
        """So far it was right: a few tokens more. Otherwise the try is over."""
        more = min(branch.asked, PROBE_MOST - branch.asked, self._last - branch.base - branch.asked)
        if branch.valid and not branch.closed and more > 0:
            self._effects.append(branch.extend(more, now))
        else:
            self._leave(branch)

    # Asking

    def _ahead(self, branch: Branch, policy: Policy, reserve: int) -> int:
        """The position up to which drafting is of use now, with `reserve` tokens being verified: a round's worth, and
        what is used up while permission to go on travels."""
        record, per_round = branch.record, policy.reach + 1
        travels = record.rtt_s * min(1 / record.token_s.value, per_round / policy.round_s[0])
        return min(len(self._sequence) + min(reserve + per_round + SLACK + int(travels), AHEAD_MOST), self._last)

    def _ask(self, branch: Branch, now: float, n: int = 0) -> None:
        if not n:
            instead = self._last_policy if branch is self.lead else None
            policy = self._costs.policy(branch.record, branch.accepted, instead=instead)
            n = self._ahead(branch, policy, 0) - len(self._sequence)
        n = min(n, self._last - len(self._sequence))
        if n < 1:
            return
        if not branch.number:
            branch.record.sessions += 1
        self._effects.append(branch.ask(self._sequence, n, now))

    def _keep_up(self, lead: Branch, now: float) -> None:
        """Asks anew if the lead is too far behind or has ended."""
        missing = len(self._sequence) - lead.end
        if lead.closed and missing >= 0:
            self._ask(lead, now)
        elif missing > 0 and lead.tokens:
            token_s, right = lead.record.token_s.value, lead.accepted**missing
            if lead.due_s(now) + missing * token_s > right * lead.record.first_s.value:
                self._ask(lead, now)

    def stretch(self, policy: Policy, reserve: int, now: float) -> None:
        """Lets the lead draft on before it runs out, with `reserve` tokens being verified."""
        lead = self.lead
        if lead is None or not lead.valid or lead.closed:
            return
        left = lead.asked - len(lead.tokens)
        more = self._ahead(lead, policy, reserve) - lead.base - lead.asked
        soon = (lead.record.rtt_s + 0.003) / lead.record.token_s.value + 1
        if more > 0 and left <= soon and more >= min(CHUNK, left):
            self._effects.append(lead.extend(more, now))
