"""What the speculation machine does in single situations; times are seconds."""

from __future__ import annotations

import math

import pytest

from tightwad_agent.errors import ProtocolError
from tightwad_agent.proxy.costs import Costs
from tightwad_agent.proxy.outstanding import Outstanding, Sent
from tightwad_agent.proxy.speculate import FREE, FREE_LOW, Speculation
from tightwad_agent.proxy.speculate_events import (
    Ask,
    Bounds,
    Confirmed,
    Draft,
    Effect,
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

PROMPT = [1, 2, 3]
PASS_S, SLOPE_S, TOKEN_S = 0.08, 0.006, 0.015


def known_costs(max_draft: int = 0, accepted: float = 0.95, *names: str) -> Costs:
    """A pool and drafters that have been measured."""
    costs = Costs(max_draft)
    for n in (1, 3, 5, 9) * 4:
        costs.round_came(n, n, 1, PASS_S + SLOPE_S * (n - 1))
    for name in names or ("a",):
        record = costs.record(name, name)
        for _ in range(20):
            record.first_s.add(TOKEN_S + 0.01)
            record.token_s.add(TOKEN_S)
        record.odds.hits, record.odds.tries = 80 * accepted, 80.0
        record.tried_at, record.gap = 0, 10_000
    return costs


class Desk:
    """One machine, and somebody who speaks for the others. The right tokens are 100 + position."""

    def __init__(self, costs: Costs | None = None, *names: str, **bounds: int) -> None:
        self.costs = known_costs() if costs is None else costs
        self.bounds = Bounds(**{"max_tokens": 1000, "context": 4096, "n_vocab": 5000, "ngram": False, **bounds})  # type: ignore[arg-type]
        self.machine = Speculation(PROMPT, self.costs, self.bounds)
        self.now = 10.0
        records = [(name, self.costs.records[name]) for name in names]
        self.effects: list[Effect] = self.machine.begin(self.now, records)

    @property
    def length(self) -> int:
        return len(self.machine.sequence)

    def confirm(
        self, n: int = 1, *, n_draft: int = 0, after: float = PASS_S, at: int = -1, ended: bool = False
    ) -> list[Effect]:
        self.now += after
        at = self.length if at < 0 else at
        tokens = [100 + at + i for i in range(n)]
        why = Ended.LENGTH if ended else Ended.NOT
        first = len(PROMPT) if self.length == len(PROMPT) else 0
        answer = Accepted(0, at, b"", (), n_draft, min(n - 1, n_draft), why, 80_000, n_draft + 1, 1, first)
        self.effects = self.machine.handle(Confirmed(answer, tokens), self.now)
        return self.effects

    def draft(
        self,
        branch: int,
        offset: int,
        tokens: list[int],
        *,
        name: str = "a",
        after: float = TOKEN_S,
        ended: bool = False,
    ) -> list[Effect]:
        self.now += after
        drafted = Drafted(0, branch, offset, b"", 0, ended)
        self.effects = self.machine.handle(Draft(name, drafted, tokens), self.now)
        return self.effects

    def tick(self) -> list[Effect]:
        self.now = max(self.now, self.machine.next_deadline())
        self.effects = self.machine.handle(Tick(), self.now)
        return self.effects


def asks(effects: list[Effect]) -> list[Ask]:
    return [effect for effect in effects if isinstance(effect, Ask)]


def rounds(effects: list[Effect]) -> list[SubmitRound]:
    return [effect for effect in effects if isinstance(effect, SubmitRound)]


def drafting_desk(*, max_tokens: int = 1000, max_draft: int = 0) -> Desk:
    """Drafts for positions 3 to 10 are here, the first token has come, and a round with the rest of them is out."""
    desk = Desk(known_costs(max_draft), "a", max_tokens=max_tokens)
    for i in range(9):
        desk.draft(1, i, [103 + i])
    desk.confirm(after=0.0)
    return desk


def test_the_drafter_evaluates_the_prompt_beside_the_verifier() -> None:
    desk = Desk(None, "a")
    (ask,) = asks(desk.effects)
    assert (ask.drafter, ask.branch, ask.keep, ask.tokens) == ("a", 1, 0, PROMPT)
    assert not rounds(desk.effects)


def test_drafts_that_are_there_go_into_a_round() -> None:
    desk = drafting_desk()
    (submitted,) = rounds(desk.effects)
    assert submitted.at == 4
    assert submitted.draft == [104 + i for i in range(len(submitted.draft))]
    assert 4 <= len(submitted.draft) <= 8
    assert submitted.free == 0


def test_nothing_restarts_while_everything_is_right() -> None:
    desk = drafting_desk()
    n = len(rounds(desk.effects)[0].draft)
    for i in range(9, 14):
        assert not asks(desk.draft(1, i, [103 + i]))
    desk.confirm(n + 1, n_draft=n)
    assert not asks(desk.effects)
    (submitted,) = rounds(desk.effects)
    assert submitted.draft[0] == 100 + submitted.at == 100 + desk.length


def test_the_drafter_may_go_on_before_it_has_to_stop() -> None:
    desk = Desk(None, "a")
    asked = asks(desk.effects)[0].n
    made = 0
    for _ in range(8):
        while made < asked and made < desk.length + 12:
            for effect in desk.draft(1, made, [103 + made]):
                asked += effect.n if isinstance(effect, Extend) else 0
            made += 1
            assert asked > made, "it would have to wait"
        n = len(rounds(desk.effects)[0].draft) if rounds(desk.effects) else 0
        desk.confirm(n + 1, n_draft=n)
        asked += sum(effect.n for effect in desk.effects if isinstance(effect, Extend))


def test_a_wrong_token_starts_a_branch_from_the_corrected_prefix_at_once() -> None:
    desk = drafting_desk()
    n = len(rounds(desk.effects)[0].draft)
    desk.machine.handle(Draft("a", Drafted(0, 1, 9, b""), [999]), desk.now)
    desk.machine.sequence  # noqa: B018 - positions 4 and 5 are right, 6 is not
    answer = Accepted(0, 4, b"", (), n, 2, Ended.NOT, 80_000, n + 1, 1)
    effects = desk.machine.handle(Confirmed(answer, [104, 105, 777]), desk.now + PASS_S)
    (ask,) = asks(effects)
    assert (ask.branch, ask.keep, ask.tokens) == (2, 6, [777])
    assert effects.index(ask) == 0


def test_a_wrong_extra_token_too() -> None:
    desk = drafting_desk()
    n = len(rounds(desk.effects)[0].draft)
    for i in range(9, 14):
        desk.draft(1, i, [103 + i])
    answer = Accepted(0, 4, b"", (), n, n, Ended.NOT, 80_000, n + 1, 1)
    effects = desk.machine.handle(Confirmed(answer, [*(104 + i for i in range(n)), 777]), desk.now)
    (ask,) = asks(effects)
    assert (ask.keep, ask.tokens) == (4 + n, [777])


def test_a_token_that_comes_late_and_is_wrong_starts_a_branch() -> None:
    desk = Desk(None, "a")
    desk.confirm(after=0.01)
    effects = desk.draft(1, 0, [999])
    assert [(ask.branch, ask.keep, ask.tokens) for ask in asks(effects)] == [(2, 3, [103])]


def test_without_drafters_rounds_are_free_and_never_run_out() -> None:
    desk = Desk()
    desk.confirm()
    assert desk.effects == [SubmitRound(4, [], FREE)]
    left, topped = FREE + 1, 0
    for _ in range(500):
        desk.confirm()
        left -= 1
        for submitted in rounds(desk.effects):
            assert left >= FREE_LOW
            left, topped = submitted.free + 1, topped + 1
        assert left > 0
    assert topped < 15


@pytest.mark.parametrize("free", [True, False])
def test_the_last_tokens_are_not_drafted_past_the_end(free: bool) -> None:
    desk = drafting_desk(max_tokens=5) if not free else Desk(None, max_tokens=5)
    if free:
        desk.confirm()
        assert desk.effects == [SubmitRound(4, [], 4)]
    else:
        assert len(rounds(desk.effects)[0].draft) <= 3


def test_the_context_is_a_bound_too() -> None:
    desk = Desk(None, "a", context=8)
    for i in range(9):
        desk.draft(1, i, [103 + i])
    desk.confirm(after=0.0)
    assert len(rounds(desk.effects)[0].draft) <= 3


def test_the_users_bound_on_drafts() -> None:
    assert len(rounds(drafting_desk(max_draft=2).effects)[0].draft) <= 2


def test_drafts_switched_off_are_off() -> None:
    desk = Desk(None, "a", drafts=False)
    assert desk.effects == []
    desk.confirm()
    assert desk.effects == [SubmitRound(4, [], FREE)]
    assert desk.machine.handle(Joined("b", desk.costs.record("b", "b")), desk.now) == []


def test_a_lost_drafter_does_not_hold_a_round_up() -> None:
    desk = Desk(None, "a")
    desk.draft(1, 0, [103])
    desk.confirm(after=0.0)
    assert not rounds(desk.effects), "it waits for the next"
    effects = desk.machine.handle(Lost("a"), desk.now)
    assert Forget("a") in effects
    assert rounds(effects) == [SubmitRound(4, [], FREE)]


def test_tokens_that_seem_to_take_no_time() -> None:
    costs = Costs()
    costs.record("a", "a")
    desk = Desk(costs, "a")
    for i, token in enumerate([103, 104, 999]):
        desk.draft(1, i, [token], after=0.0)
    desk.confirm(after=0.0)
    effects = desk.confirm(3, n_draft=3, after=0.0)
    assert asks(effects), "one was wrong: it is asked anew, for as many as can be of use"


@pytest.mark.parametrize("stale", [True, False])
def test_a_branch_that_gets_no_more_tokens(stale: bool) -> None:
    desk = Desk(None, "a")
    desk.draft(1, 0, [103])
    desk.confirm(after=0.0)
    effects = desk.machine.handle(Silenced("a", NoDraft(0, 0 if stale else 1, "full")), desk.now)
    assert bool(rounds(effects)) is not stale
    assert desk.costs.records["a"].benched is not stale


def test_after_that_nothing_is_taken_for_granted() -> None:
    """What the drafter remembers of the request is sent again."""
    desk = Desk(None, "a")
    desk.draft(1, 0, [103])
    desk.confirm(after=0.0)
    desk.machine.handle(Silenced("a", NoDraft(0, 1, "restarted")), desk.now)
    desk.costs.records["a"].gap = 0
    (ask,) = asks(desk.confirm())
    assert (ask.branch, ask.keep, ask.tokens) == (2, 0, desk.machine.sequence)


def test_who_is_late_is_left_within_a_round_and_another_is_asked() -> None:
    desk = Desk(known_costs(0, 0.95, "a", "b"), "a", "b")
    lead = asks(desk.effects)[0].drafter
    desk.draft(1, 0, [103], name=str(lead))
    desk.confirm(after=0.0)
    waited = desk.now
    effects: list[Effect] = []
    while not rounds(effects):
        effects = desk.tick()
    assert desk.now - waited < PASS_S
    effects = desk.confirm(after=2 * PASS_S)
    assert [ask.drafter for ask in asks(effects)] == [{"a": "b", "b": "a"}[str(lead)]]
    assert desk.costs.records[lead].benched


def test_the_late_one_leads_again_once_it_delivers() -> None:
    desk = Desk(None, "a")
    desk.confirm()
    desk.confirm(after=0.5)
    desk.confirm()
    assert desk.costs.records["a"].benched
    effects = desk.draft(1, 0, [103])
    assert not desk.costs.records["a"].benched
    assert [(ask.keep, ask.tokens) for ask in asks(effects)] == [(4, [104, 105])]
    assert rounds(effects) == [SubmitRound(6, [], 0)], "the free rounds end"
    for i in range(16):
        desk.draft(2, i, [106 + i])
    assert rounds(desk.confirm(after=0.0))[0].draft[0] == 107
    assert not rounds(desk.confirm()), "it was under way already"
    assert not asks(desk.confirm(3, n_draft=2))


def test_a_drafter_that_ends_where_the_model_does_not_is_asked_again() -> None:
    desk = Desk(None, "a")
    desk.draft(1, 0, [103])
    desk.draft(1, 1, [104, 105], ended=True)
    (submitted,) = rounds(desk.confirm(after=0.0))
    assert submitted.draft == [104]
    answer = Accepted(0, 4, b"", (), 1, 1, Ended.NOT, 80_000, 2, 1)
    effects = desk.machine.handle(Confirmed(answer, [104, 777]), desk.now + PASS_S)
    assert [(ask.branch, ask.keep, ask.tokens) for ask in asks(effects)] == [(2, 5, [777])]


def test_nobody_waits_for_a_draft_that_has_ended() -> None:
    desk = Desk(None, "a")
    desk.draft(1, 0, [103])
    assert not rounds(desk.confirm(after=0.0)), "it waits"
    assert rounds(desk.draft(1, 1, [], ended=True))


@pytest.mark.parametrize("token", [-1, 5000, 1 << 40])
def test_ids_that_are_no_tokens_end_the_drafters_part(token: int) -> None:
    desk = Desk(None, "a")
    assert desk.draft(1, 0, [103, token]) == [Forget("a")]
    assert desk.costs.records["a"].sessions == 0
    assert desk.costs.records["a"].benched


@pytest.mark.parametrize(("branch", "offset"), [(0, 0), (2, 0), (1, 1), (1, 100)])
def test_tokens_that_do_not_follow_are_ignored(branch: int, offset: int) -> None:
    desk = Desk(None, "a")
    assert desk.draft(branch, offset, [103, 104]) == []
    desk.draft(1, 0, [103])
    lead = desk.machine._panel.lead
    assert lead is not None
    assert lead.tokens == [103], "and the branch is none the worse"


def test_tokens_sent_twice_count_once_and_more_than_asked_for_not_at_all() -> None:
    desk = Desk(None, "a")
    desk.draft(1, 0, [103, 104])
    desk.draft(1, 1, [104, 105])
    desk.draft(1, 3, [106] * 1000)
    desk.draft(1, 3, [106, 107, 108, 109, 110])
    desk.confirm(after=0.0)
    draft = rounds(desk.effects)[0].draft
    assert draft == [104, 105, 106, 107, 108, 109, 110][: len(draft)]


def test_a_joined_drafter_is_used_and_waits_for_nobody() -> None:
    desk = Desk(known_costs())
    desk.confirm()
    effects = desk.machine.handle(Joined("a", desk.costs.records["a"]), desk.now)
    assert [(ask.keep, ask.tokens) for ask in asks(effects)] == [(0, [*PROMPT, 103])]
    assert not rounds(effects)
    for i in range(6):
        desk.draft(1, i, [104 + i])
    (submitted,) = rounds(desk.confirm())
    assert submitted.draft == [105, 106, 107, 108, 109][: len(submitted.draft)]
    assert submitted.free == 0, "the free rounds end"


def test_a_round_sent_into_free_rounds_is_told_from_those() -> None:
    outstanding = Outstanding()
    outstanding.came(Accepted(0, 3, b"", ()), [1, 2, 3])
    outstanding.submit(Sent(4, [], 0.0), 64)
    first = outstanding.came(Accepted(0, 4, b"", ()), [1, 2, 3, 103])
    assert first is not None
    outstanding.submit(Sent(5, [105, 106], 0.0), 0)
    assert outstanding.came(Accepted(0, 5, b"", ()), [0] * 5) is None
    assert outstanding.running
    answered = outstanding.came(Accepted(0, 6, b"", (), 1, 1), [0] * 5 + [105])
    assert answered is not None
    assert answered.draft == [105, 106]
    assert not outstanding.running


def test_a_dropped_draft_is_answered_by_the_second_plain_round() -> None:
    outstanding = Outstanding()
    outstanding.submit(Sent(5, [105, 106], 0.0), 0)
    assert outstanding.came(Accepted(0, 5, b"", ()), [0] * 5) is None
    assert outstanding.came(Accepted(0, 6, b"", ()), [0] * 5 + [9]) is not None
    outstanding.submit(Sent(7, [107, 108], 0.0), 0)
    assert outstanding.came(Accepted(0, 7, b"", ()), [0] * 7) is None, "it may have been another's"
    assert outstanding.came(Accepted(0, 8, b"", (), 1, 0), [0] * 7 + [107]) is not None


def test_where_an_answer_may_be_anothers_nobody_waits_for_ever() -> None:
    """The free rounds are to stop: one of them may be under way, or not."""
    outstanding = Outstanding()
    outstanding.submit(Sent(5, [], 0.0), 0)
    assert outstanding.came(Accepted(0, 5, b"", ()), [0] * 5) is not None
    assert not outstanding.running
    outstanding.submit(Sent(6, [106], 0.0), 0)
    assert outstanding.came(Accepted(0, 6, b"", ()), [0] * 6) is None, "there was one"
    assert outstanding.came(Accepted(0, 7, b"", ()), [0] * 6 + [106]) is not None


def test_an_answer_with_a_longer_draft_is_anothers() -> None:
    outstanding = Outstanding()
    outstanding.submit(Sent(5, [105], 0.0), 0)
    assert outstanding.came(Accepted(0, 5, b"", (), 3, 0), [0] * 5) is None


@pytest.mark.parametrize("change", ["later", "earlier", "nothing"])
def test_answers_that_do_not_fit_are_refused(change: str) -> None:
    desk = Desk()
    desk.confirm()
    with pytest.raises(ProtocolError):
        desk.confirm(
            n=0 if change == "nothing" else 1, at=desk.length + {"later": 1, "earlier": -1, "nothing": 0}[change]
        )


def test_the_verifier_is_reminded_ever_less_often() -> None:
    desk = Desk()
    assert desk.machine.next_deadline() == math.inf, "a prompt takes as long as it takes"
    desk.confirm()
    waits = []
    for _ in range(12):
        before = desk.now
        effects = desk.tick()
        assert rounds(effects) == [SubmitRound(4, [], FREE)]
        waits.append(desk.now - before)
    assert waits[0] < 2
    assert waits == pytest.approx(sorted(waits))
    assert waits[-1] == pytest.approx(120)
    assert desk.machine.handle(Tick(), desk.now) == []


def test_the_end_ends_everything_once() -> None:
    desk = drafting_desk()
    n = len(rounds(desk.effects)[0].draft)
    assert desk.costs.live == 1
    assert desk.confirm(n + 1, n_draft=n, ended=True) == [Forget("a")]
    assert desk.machine.over
    assert desk.costs.live == 0
    assert desk.machine.close() == []
    assert desk.machine.handle(Tick(), desk.now) == []
    assert desk.machine.next_deadline() == math.inf
    assert desk.costs.records["a"].sessions == 0


def test_closing_before_the_end() -> None:
    desk = drafting_desk()
    assert desk.machine.close() == [Forget("a")]
    assert desk.costs.live == 0


def test_timings_say_what_was_used_and_what_it_took() -> None:
    desk = drafting_desk()
    n = len(rounds(desk.effects)[0].draft)
    answer = Accepted(0, 4, b"", (), n, 2, Ended.NOT, 90_000, n + 1, 1)
    desk.machine.handle(Confirmed(answer, [104, 105, 777]), desk.now + 0.1)
    timings = desk.machine.timings
    assert (timings.n_prompt, timings.n_generated, timings.rounds) == (3, 4, 1)
    assert (timings.drafted, timings.accepted) == (n, 2)
    assert timings.tried_at == [1] * n
    assert timings.accepted_at == [1, 1, *[0] * (n - 2)]
    assert timings.drafters == {"a": n}
    assert timings.verify_ms == pytest.approx(90)
    assert timings.draft_ms == pytest.approx(1e3 * n * TOKEN_S, rel=0.01)
    assert timings.waited_ms == 0
    assert timings.generate_ms == pytest.approx(100)


def test_tokens_that_come_together_share_their_time() -> None:
    desk = Desk(None, "a")
    desk.draft(1, 0, [103, 104, 105, 106], after=0.025 + 3 * TOKEN_S)
    desk.draft(1, 4, [107, 108, 109, 110], after=4 * TOKEN_S)
    desk.confirm(after=0.0)
    n = len(rounds(desk.effects)[0].draft)
    desk.confirm(n + 1, n_draft=n)
    assert desk.machine.timings.draft_ms == pytest.approx(1e3 * n * TOKEN_S, rel=0.2)


def test_time_waited_for_drafts_is_counted() -> None:
    desk = Desk(None, "a")
    desk.draft(1, 0, [103])
    desk.confirm(after=0.0)
    i = 1
    while not rounds(desk.effects):
        desk.draft(1, i, [103 + i])
        i += 1
    assert desk.machine.timings.waited_ms == pytest.approx(1e3 * (i - 1) * TOKEN_S)


def test_a_copy_is_drafted_where_the_text_repeats() -> None:
    desk = Desk(None, ngram=True)
    desk.machine = Speculation([5, 6, 7, 8, 9, 10, 11, 12, 5, 6, 7, 8], desk.costs, desk.bounds)
    desk.machine.begin(desk.now)
    answer = Accepted(0, 12, b"", ())
    effects = desk.machine.handle(Confirmed(answer, [9]), desk.now)
    (submitted,) = rounds(effects)
    assert submitted.draft
    assert submitted.draft == [10, 11, 12, 5, 6, 7, 8][: len(submitted.draft)]


def test_a_long_copy_is_better_than_waiting_for_the_drafter() -> None:
    desk = Desk(None, ngram=True)
    passage = list(range(200, 260))
    desk.machine = Speculation([*passage, *passage[:40]], desk.costs, desk.bounds)
    (ask,) = asks(desk.machine.begin(desk.now, [("a", desk.costs.records["a"])]))
    assert ask.tokens == desk.machine.sequence
    desk.draft(1, 0, [240])
    effects = desk.machine.handle(Confirmed(Accepted(0, 100, b"", ()), [240]), desk.now)
    (submitted,) = rounds(effects)
    assert submitted.draft == passage[41 : 41 + len(submitted.draft)]
    assert len(submitted.draft) > 8


PASSAGE = list(range(200, 260))


def repeating(*drafted: int, accepted: float = 0.95) -> tuple[Desk, SubmitRound]:
    """A text that repeats a passage, of which the next tokens are drafted before the last one is confirmed."""
    desk = Desk(known_costs(0, accepted), ngram=True)
    desk.machine = Speculation([*PASSAGE, *PASSAGE[:20]], desk.costs, desk.bounds)
    desk.machine.begin(desk.now, [("a", desk.costs.records["a"])])
    for i, token in enumerate((220, *drafted)):
        desk.draft(1, i, [token])
    (submitted,) = rounds(desk.machine.handle(Confirmed(Accepted(0, 80, b"", ()), [220]), desk.now))
    return desk, submitted


def test_where_the_text_repeats_copies_go_behind_the_drafters_tokens() -> None:
    desk, submitted = repeating(221, 222)
    n = len(submitted.draft)
    assert n > 6
    assert submitted.draft == PASSAGE[21 : 21 + n]
    answer = Accepted(0, 81, b"", (), n, n, Ended.NOT, 90_000, n + 1, 1)
    desk.machine.handle(Confirmed(answer, [*submitted.draft, 7]), desk.now + 0.1)
    assert desk.machine.timings.drafters == {"a": 2, "n-gram": n - 2}


def test_nothing_is_put_behind_tokens_that_were_never_in_the_text() -> None:
    _, submitted = repeating(*range(300, 304))
    assert submitted.draft == [300, 301, 302, 303][: len(submitted.draft)]


def test_of_a_round_that_was_overtaken_the_copies_are_what_is_left() -> None:
    desk, submitted = repeating(221, 222)
    n = len(submitted.draft)
    answer = Accepted(0, 81, b"", (), n - 4, n - 4, Ended.NOT, 90_000, n - 3, 1)
    desk.machine.handle(Confirmed(answer, [*submitted.draft[: n - 4], 7]), desk.now + 0.1)
    assert desk.machine.timings.drafters == {"n-gram": n - 4}


def test_at_the_end_of_an_answer_what_is_drafted_is_used_up() -> None:
    desk = drafting_desk(max_tokens=10)
    (submitted,) = rounds(desk.effects)
    assert submitted.draft == list(range(104, 112))


def test_so_it_is_when_the_drafter_says_that_it_ends() -> None:
    desk = Desk(None, "a")
    for i in range(9):
        desk.draft(1, i, [103 + i], ended=i == 8)
    (submitted,) = rounds(desk.confirm(after=0.0))
    assert submitted.draft == list(range(104, 111)), "the last of them comes with the round"
