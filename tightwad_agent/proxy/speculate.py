"""One request on the verifier, with whoever drafts for it: a pure machine.

Whenever the verifier has nothing to do it decides: a round with some of the tokens at hand, or a little patience. While
no drafter is worth it the verifier goes on by itself (free rounds). `Panel` has the drafters, `Outstanding` knows what
the verifier is at, `Costs` what things cost, `Policy` how to weigh them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Final

from tightwad_agent.errors import ProtocolError
from tightwad_agent.proxy.branch import Branch
from tightwad_agent.proxy.costs import Costs
from tightwad_agent.proxy.ngram import NGram
from tightwad_agent.proxy.outstanding import Outstanding, Sent
from tightwad_agent.proxy.panel import Panel
from tightwad_agent.proxy.policy import WAIT, Policy
from tightwad_agent.proxy.ports import Timings
from tightwad_agent.proxy.record import DrafterRecord
from tightwad_agent.proxy.speculate_events import (
    Bounds,
    Confirmed,
    Draft,
    Effect,
    Event,
    Joined,
    Lost,
    Silenced,
    SubmitRound,
    Tick,
)
from tightwad_agent.wire.verify import Accepted, Ended

FREE: Final = 64
"""Rounds that the verifier may do by itself, and how many are left when it gets more."""
FREE_LOW: Final = 16
COPY: Final = "n-gram"
COPY_MOST: Final = 16
UNLIKELY: Final = 0.03
GAIN_LEAST: Final = 0.05
"""Tokens that leaving free rounds must promise."""
SILENT_S: Final = 0.25
SILENT_PASSES: Final = 8
MAX_SILENT_S: Final = 120.0
"""The verifier is reminded of a round after so long, then twice as long, at most."""
POSITIONS: Final = 64
"""Positions of a draft that are counted one by one."""


class Speculation:
    """Drives one request. `begin` as soon as it is open; then `handle` whatever happens, until `over`.

    `timings` is filled in as it goes.
    """

    def __init__(self, prompt: list[int], costs: Costs, bounds: Bounds) -> None:
        self.sequence = list(prompt)
        self.timings = Timings()
        self.over = False
        self._costs, self._bounds = costs, bounds
        self._end = len(prompt) + bounds.max_tokens
        self._effects: list[Effect] = []
        self._panel = Panel(self.sequence, costs, bounds, self._effects)
        self._copies = NGram(costs.copies.of_request(), prompt) if bounds.drafts and bounds.ngram else None
        self._verifier = Outstanding()
        self._began = self._heard_at = self._idle_at = 0.0
        self._first_at = 0.0
        self._counted = False
        self._quiet = False
        self._recheck_at = math.inf
        self._silent_s = SILENT_S

    # From outside

    def begin(self, now: float, drafters: Iterable[tuple[Hashable, DrafterRecord]] = ()) -> list[Effect]:
        """The prompt is being evaluated; the best drafter may do so at the same time."""
        self._began = self._heard_at = now
        self._counted = True
        self._costs.live += 1
        for key, record in drafters:
            self._join(key, record)
        self._panel.choose(now)
        return self._flush()

    def handle(self, event: Event, now: float) -> list[Effect]:
        """What is to be done, in order. Raises `ProtocolError` if the verifier's answers do not fit together."""
        if self.over:
            return []
        if isinstance(event, Draft):
            if self._panel.drafted(event, now):
                self._more_tokens(now)
        elif isinstance(event, Confirmed):
            self._confirmed(event.answer, event.tokens, now)
        else:
            self._other(event, now)
        return self._flush()

    def next_deadline(self) -> float:
        """When to send a `Tick`, by the clock that `now` is of; infinite for never."""
        if self.over:
            return math.inf
        if not self._verifier.running:
            return self._recheck_at
        return self._heard_at + self._silent_s if self._first_at else math.inf

    def close(self) -> list[Effect]:
        """The request is over, in whatever way. Idempotent."""
        if not self.over:
            self.over = True
            self._costs.live -= self._counted
            self._panel.close()
        return self._flush()

    def _flush(self) -> list[Effect]:
        effects = self._effects[:]
        self._effects.clear()
        return effects

    # Events

    def _other(self, event: Event, now: float) -> None:
        match event:
            case Tick():
                if self._verifier.running and now >= self.next_deadline():
                    self._remind(now)
            case Silenced(key, answer):
                self._panel.silenced(key, answer.branch, now)
            case Joined(key, record):
                self._join(key, record)
                self._panel.choose(now)
            case Lost(key):
                self._panel.lose(key, now)
        if not self._verifier.running:
            self._decide(now)

    def _join(self, key: Hashable, record: DrafterRecord) -> None:
        if self._bounds.drafts:
            self._panel.join(key, record)

    def _more_tokens(self, now: float) -> None:
        if not self._verifier.running:
            self._decide(now)
        else:
            self._while_running(now)

    def _confirmed(self, answer: Accepted, tokens: list[int], now: float) -> None:
        if answer.at != len(self.sequence) or not tokens:
            raise ProtocolError(f"{len(tokens)} tokens for position {answer.at}; {len(self.sequence)} are known")
        sent = self._verifier.came(answer, self.sequence)
        self._account(answer, sent, len(tokens), now)
        self._heard_at, self._silent_s = now, SILENT_S + SILENT_PASSES * self._costs.plain_s
        self.sequence += tokens
        self._costs.tokens += len(tokens)
        if answer.ended is not Ended.NOT:
            self._effects += self.close()
            return
        if self._copies:
            self._copies.add(tokens)
        self._panel.confirmed(now)
        if self._verifier.running:
            self._while_running(now)
        else:
            self._idle_at = now
            self._decide(now)

    def _account(self, answer: Accepted, sent: Sent | None, n: int, now: float) -> None:
        timings, took = self.timings, now - self._heard_at
        timings.n_generated += n
        if not self._first_at:
            self._first_at = now
            timings.n_prompt, timings.n_cached = answer.n_prompt, answer.n_cached
            timings.prompt_ms = 1e3 * (now - self._began)
            self._costs.prompt_came(answer.n_prompt - answer.n_cached, answer.prompt_us / 1e6)
            return
        timings.generate_ms = 1e3 * (now - self._first_at)
        pass_s = answer.decode_us / 1e6 or took
        timings.rounds += 1
        self._costs.made.add(n)
        timings.verify_ms += 1e3 * pass_s
        self._costs.round_came(answer.n_draft + 1, answer.batch, answer.requests, pass_s)
        if answer.n_draft == 0 and self._costs.live == 1:
            was_quiet, self._quiet = self._quiet, self._panel.quiet
            if was_quiet == self._quiet:
                (self._costs.quiet_s if self._quiet else self._costs.busy_s).add(pass_s)
        if sent is None:
            self._costs.free_s.add(max(0.0, took - pass_s))
        elif not sent.unsure:
            self._costs.asked_s.add(max(0.0, now - sent.when - pass_s))
        if sent and answer.n_draft:
            self._account_draft(sent, answer.n_draft, min(answer.n_accepted, answer.n_draft))

    def _account_draft(self, sent: Sent, n: int, n_right: int) -> None:
        timings = self.timings
        timings.drafted += n
        timings.accepted += n_right
        timings.draft_ms += 1e3 * sent.draft_s
        n_copied = min(n, sent.n_copied)
        for source, part in ((sent.source, n - n_copied), (COPY, n_copied)):
            if part:
                timings.drafters[source] = timings.drafters.get(source, 0) + part
        grow = min(n, POSITIONS) - len(timings.tried_at)
        if grow > 0:
            timings.tried_at += [0] * grow
            timings.accepted_at += [0] * grow
        for i in range(min(n, POSITIONS)):
            timings.tried_at[i] += 1
        for i in range(min(n_right, POSITIONS)):
            timings.accepted_at[i] += 1

    # Decisions

    def _room(self) -> int:
        """Draft tokens that can still be of use: a round brings one token beside its draft."""
        return max(0, min(self._costs.limit, self._left() - 1))

    def _left(self) -> int:
        """Tokens that the answer may still have."""
        return min(self._end, self._bounds.context) - len(self.sequence)

    def _decide(self, now: float) -> None:
        """The verifier is idle."""
        policy = self._panel.policy(now)
        if policy is None:
            self._panel.choose(now)
            policy = self._panel.policy(now)
        self._costs.leading = self._panel.lead.record if self._panel.lead else None
        if policy is None:
            copied, _ = self._copy(self._costs.plain_gain, self._room())
            self._submit(now, copied, COPY, 0 if copied else FREE)
        else:
            self._with_lead(policy, now)

    def _with_lead(self, policy: Policy, now: float) -> None:
        lead = self._panel.lead
        assert lead is not None
        have, due_s, room, left = lead.have(len(self.sequence)), lead.due_s(now), self._room(), self._left()
        if have and (lead.closed or have >= left - 1):
            size, _ = policy.finish(have, have if lead.closed else left, room)
            self._submit_lead(now, lead, size)
            return
        may_wait = lead.record.measured and due_s < math.inf
        size, worth = policy.choose(have, due_s, room, may_wait=may_wait)
        copied, copy_worth = self._copy(policy.gain, room)
        longer, longer_worth = self._behind(policy, lead, have, due_s, room)
        if longer and longer_worth > max(worth, copy_worth):
            self._submit_lead(now, lead, have, longer)
        elif copied and copy_worth > worth:
            self._submit(now, copied, COPY, 0)
        elif size == WAIT:
            self._recheck_at = now + 1.5 * due_s + 0.001
        elif not have and due_s > 2 * self._costs.plain_s + policy.token_s:
            self._submit(now, [], "", FREE)
            return
        else:
            self._submit_lead(now, lead, size)
        self._panel.stretch(policy, self._reserve(), now)

    def _reserve(self) -> int:
        sent = self._verifier.sent
        return len(sent.draft) + 1 if sent else 0

    def _behind(self, policy: Policy, lead: Branch, have: int, due_s: float, room: int) -> tuple[list[int], float]:
        """The best tokens from the text itself to put behind all that the lead has made, and what that is worth."""
        copies, most = self._copies, min(room - have, COPY_MOST)
        if copies is None or most < 1:
            return [], 0.0
        copied, common = copies.behind(lead.tail(have), most)
        if not copied:
            return [], 0.0
        reached = [share for share in copies.odds.reached(common, len(copied)) if share >= UNLIKELY]
        size, worth = policy.choose_behind(have, due_s, reached)
        return copied[:size], worth

    def _copy(self, gain: float, room: int) -> tuple[list[int], float]:
        """The best draft from the text itself, and what it is worth at a rate of `gain`."""
        copies = self._copies
        if copies is None or not copies.common or room < 1:
            return [], 0.0
        pass_s, beside_s = self._costs.pass_s, self._costs.beside_s
        made, best, size = 1.0, 1 - gain / self._costs.plain_gain + GAIN_LEAST, 0
        for n, reached in enumerate(copies.odds.reached(copies.common, min(room, COPY_MOST)), 1):
            if reached < UNLIKELY:
                break
            made += reached
            worth = made - gain * (pass_s(n) + beside_s)
            if worth > best:
                best, size = worth, n
        draft = copies.propose(size)
        return draft, best

    def _while_running(self, now: float) -> None:
        """The verifier is at work: keep the lead drafting, and leave free rounds once there is something to verify."""
        policy = self._panel.policy(now, urgent=False)
        if not self._verifier.free:
            if policy:
                self._panel.stretch(policy, self._reserve(), now)
        elif self._verifier.sent is None and not self._leave_free(policy, now) and self._verifier.free <= FREE_LOW:
            self._submit(now, [], "", FREE)

    def _leave_free(self, policy: Policy | None, now: float) -> bool:
        """A draft while a free round runs: its first token is confirmed by that one, the others count."""
        lead, room = self._panel.lead, self._room()
        if policy and lead:
            have, due_s = lead.have(len(self.sequence)), lead.due_s(now)
            if have > 1 and room > 1:
                size, _ = policy.choose(have - 1, due_s, room - 1, may_wait=False)
                self._submit_lead(now, lead, size + 1)
            elif due_s < self._costs.plain_s:
                self._submit(now, [], "", 0)
            self._panel.stretch(policy, self._reserve(), now)
            return not self._verifier.free
        copied, _ = self._copy(self._costs.plain_gain, room)
        if len(copied) > 1:
            self._submit(now, copied, COPY, 0)
            return True
        return False

    def _submit_lead(self, now: float, lead: Branch, size: int, behind: Sequence[int] = ()) -> None:
        """`size` of the lead's tokens, and some from the text itself `behind` them."""
        part = slice(len(self.sequence) - lead.base, len(self.sequence) - lead.base + size)
        draft, spent = [*lead.tokens[part], *behind], sum(lead.spent[part])
        self._send(Sent(len(self.sequence), draft, now, lead.record.name, spent, len(behind)), 0)

    def _submit(self, now: float, draft: list[int], source: str, free: int) -> None:
        self._send(Sent(len(self.sequence), draft, now, source), free)

    def _send(self, sent: Sent, free: int) -> None:
        verifier, draft = self._verifier, list(sent.draft)
        if not verifier.running and self._panel.lead is not None and self._idle_at:
            self.timings.waited_ms += 1e3 * (sent.when - self._idle_at)
        if verifier.running and free and verifier.sent is None:
            verifier.free = free  # more of the same: no answer of its own is waited for
        else:
            verifier.submit(sent, free)
        if not draft:
            free = min(free, max(0, self._end - len(self.sequence)))
        self._recheck_at = math.inf
        self._effects.append(SubmitRound(len(self.sequence), draft, free))

    def _remind(self, now: float) -> None:
        """An answer is long due: perhaps the verifier had nothing to do after all."""
        self._heard_at, self._silent_s = now, min(2 * self._silent_s, MAX_SILENT_S)
        self._verifier.submit(Sent(len(self.sequence), [], now), FREE)
        self._effects.append(SubmitRound(len(self.sequence), [], FREE))
