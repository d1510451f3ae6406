"""The drafter's book: what it takes, what it asks of the server, and what it makes of the answers."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tightwad_agent.engine.draft_sessions import SEAT_KEPT_S, DraftBook
from tightwad_agent.engine.draft_turn import MAX_TURN, Made, Pace, Turn
from tightwad_agent.wire.draft import MAX_DRAFT, MAX_SESSIONS, Ask, Drafted, Extend, NoDraft
from tightwad_agent.wire.verify import pack_tokens, unpack_tokens

VOCAB = 1000


def book(context: int = 200, slots: int = 2) -> DraftBook:
    return DraftBook(n_vocab=VOCAB, context=context, slots=slots)


def ask(session: int, branch: int, keep: int, tokens: list[int], n: int = 4) -> Ask:
    return Ask(session, branch, keep, pack_tokens(tokens), n)


def made(*tokens: int, ended: bool = False) -> Made:
    return Made(list(tokens), ended, 0.02)


def prompt(turn: Turn, i: int = 0) -> list[int]:
    return list(json.loads(b"[%s]" % turn.prompts[i]))


def only(turns: list[Turn]) -> Turn:
    [turn] = turns
    return turn


def done(b: DraftBook, turn: Turn, *answers: Made, now: float = 1.0) -> list[Drafted | NoDraft]:
    return [message for _, message in b.done(turn, list(answers), 0.021, now)]


def started(b: DraftBook, *prompts: list[int], n: int = 4) -> None:
    """Sessions 1, 2, ... whose first token, 500, is made."""
    for session, tokens in enumerate(prompts, start=1):
        assert b.ask(1, ask(session, 0, 0, tokens, n), 0.0) is None
    for turn in b.turns():
        done(b, turn, made(500))


def refusal(answer: NoDraft | None) -> str:
    assert isinstance(answer, NoDraft)
    return answer.reason


def test_a_branch_is_made_token_by_token_until_it_has_what_was_asked_for() -> None:
    b = book()
    assert b.ask(7, ask(1, 0, 0, [1, 2], 3), 10.0) is None
    turn = only(b.turns())
    assert (prompt(turn), turn.n, turn.slot, turn.n_new) == ([1, 2], 1, 0, 2)
    assert b.turns() == []  # under way
    assert b.done(turn, [made(3)], 0.02, 10.5) == [(7, Drafted(1, 0, 0, pack_tokens([3]), 500_000))]
    turn = only(b.turns())
    assert (prompt(turn), turn.n_new) == ([1, 2, 3], 1)
    assert done(b, turn, made(4), now=11) == [Drafted(1, 0, 1, pack_tokens([4]), 1_000_000)]
    done(b, only(b.turns()), made(5))
    assert b.turns() == []


def test_extend_goes_on_where_the_branch_was() -> None:
    b = book()
    started(b, [1], n=1)
    assert b.turns() == []
    assert b.extend(1, Extend(1, 0, 2), 1.0) is None
    assert prompt(only(b.turns())) == [1, 500]


def test_extend_of_an_older_branch_is_ignored() -> None:
    b = book()
    started(b, [1], n=1)
    assert b.ask(1, ask(1, 1, 1, [2], 1), 1.0) is None
    done(b, only(b.turns()), made(3))
    assert b.extend(1, Extend(1, 0, 2), 1.0) is None
    assert b.extend(1, Extend(9, 0, 2), 1.0) is None
    assert b.turns() == []


def test_an_ended_branch_stays_ended() -> None:
    b = book()
    assert b.ask(1, ask(1, 0, 0, [1]), 0) is None
    assert done(b, only(b.turns()), made(2, ended=True), now=0) == [Drafted(1, 0, 0, pack_tokens([2]), 0, True)]
    assert b.extend(1, Extend(1, 0, 2), 0) is None
    assert b.turns() == []


def test_a_new_branch_replaces_the_old_one_after_the_turn_that_is_under_way() -> None:
    b = book()
    started(b, [1, 2])
    turn = only(b.turns())
    assert b.ask(1, ask(1, 1, 2, [9]), 2.0) is None
    assert b.turns() == []
    assert done(b, turn, made(501)) == []  # nobody wants it any more
    turn = only(b.turns())
    assert (prompt(turn), turn.n_new) == ([1, 2, 9], 1)
    assert done(b, turn, made(10), now=2.5) == [Drafted(1, 1, 0, pack_tokens([10]), 500_000)]


def test_an_ask_that_was_overtaken_is_ignored() -> None:
    b = book()
    assert b.ask(1, ask(1, 5, 0, [1]), 0) is None
    assert b.ask(1, ask(1, 5, 0, [2]), 0) is None
    assert b.ask(1, ask(1, 4, 0, [2]), 0) is None
    assert prompt(only(b.turns())) == [1]


def test_a_prompt_is_a_turn_of_its_own_beside_the_common_one() -> None:
    b = book()
    started(b, [1])
    assert b.ask(1, ask(2, 0, 0, list(range(100))), 0) is None
    alone, common = b.turns()
    assert (alone.alone, alone.slot, alone.n_new) == (True, 1, 100)
    assert (common.alone, common.slot, prompt(common)) == (False, 0, [1, 500])
    done(b, common, made(501))
    assert prompt(only(b.turns())) == [1, 500, 501]


def test_sessions_share_a_turn() -> None:
    b = book()
    started(b, [1], [2])
    turn = only(b.turns())
    assert (prompt(turn, 0), prompt(turn, 1), turn.slot) == ([1, 500], [2, 500], None)
    messages = b.done(turn, [made(3), made(4)], 0.02, 1.0)
    assert [(m.session, unpack_tokens(m.tokens)) for _, m in messages if isinstance(m, Drafted)] == [(1, [3]), (2, [4])]


def test_a_much_shorter_keep_is_computed_anew_and_so_alone() -> None:
    b = book()
    started(b, [1])
    assert b.ask(1, ask(1, 1, 1, list(range(40))), 0) is None
    turn = only(b.turns())
    assert (turn.alone, turn.n_new) == (True, 40)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (ask(1, 1, 3, [1]), "3 tokens are to be kept, the session has 2"),
        (ask(1, 1, 0, [1, VOCAB]), f"token {VOCAB} is not among the model's {VOCAB}"),
        (ask(1, 1, 0, [-1]), "token -1 is not"),
        (ask(1, 1, 0, []), "nothing to continue"),
        (ask(1, 1, 0, [1], MAX_DRAFT + 1), f"{MAX_DRAFT} are the most"),
        (ask(1, 1, 0, list(range(199))), "the context of 200 tokens is full"),
        (Ask(1, 1, 0, b"\0\0\0", 1), "no whole number of tokens"),
    ],
)
def test_what_cannot_be_drafted_is_answered_with_the_reason_and_may_begin_again(asked: Ask, reason: str) -> None:
    b = book()
    started(b, [1], n=1)
    answer = b.ask(1, asked, 0)
    assert reason in refusal(answer)
    assert answer is not None
    assert (answer.session, answer.branch) == (1, 1)
    assert b.turns() == []
    assert b.extend(1, Extend(1, 1, 1), 0) is None
    assert b.turns() == []
    assert b.ask(1, ask(1, 2, 0, [1]), 0) is None
    assert prompt(only(b.turns())) == [1]


def test_the_longest_context_is_drafted_up_to_its_end() -> None:
    b = book(context=10)
    assert b.ask(1, ask(1, 0, 0, list(range(8)), 5), 0) is None
    first, last = done(b, only(b.turns()), made(8))
    assert isinstance(first, Drafted)
    assert "the context of 10 tokens is full" in refusal(last)  # type: ignore[arg-type]
    assert b.turns() == []


def test_extending_too_far_ends_the_branch() -> None:
    b = book()
    assert b.ask(1, ask(1, 0, 0, [1], MAX_DRAFT), 0) is None
    assert f"{MAX_DRAFT} are the most" in refusal(b.extend(1, Extend(1, 0, 1), 0))
    assert b.turns() == []


def test_sessions_of_a_stream_are_bounded() -> None:
    b = book()
    for i in range(MAX_SESSIONS):
        b.ask(1, ask(i, 0, 0, [1]), 0)
    assert "64 sessions are open" in refusal(b.ask(1, ask(99, 0, 0, [1]), 0))
    assert "slots are in use" in refusal(b.ask(2, ask(99, 0, 0, [1]), 0))
    b.forget(1, 0)
    assert b.ask(1, ask(99, 0, 0, [1]), 0) is None


def test_a_session_too_many_gets_the_slot_of_one_that_has_been_idle() -> None:
    b = book(slots=1)
    started(b, [1], n=1)  # its last token at 1.0
    assert "all 1 slots are in use" in refusal(b.ask(1, ask(2, 0, 0, [2]), 1.0 + SEAT_KEPT_S))
    assert b.ask(1, ask(2, 1, 0, [2]), 1.1 + SEAT_KEPT_S) is None
    assert prompt(only(b.turns())) == [2]
    assert "all 1 slots are in use" in refusal(b.extend(1, Extend(1, 0, 1), 9.0))


def test_a_slot_that_the_server_is_at_work_in_is_not_given_away() -> None:
    b = book(slots=1)
    assert b.ask(1, ask(1, 0, 0, list(range(100))), 0) is None
    turn = only(b.turns())
    assert b.ask(1, ask(1, 1, 0, [1], 0), 0) is None
    assert "all 1 slots are in use" in refusal(b.ask(1, ask(2, 0, 0, [2]), 9.0))
    done(b, turn, made(1))
    assert b.ask(1, ask(2, 1, 0, [2]), 9.0) is None


def test_a_session_that_lost_its_slot_and_gets_one_again_goes_on() -> None:
    b = book(slots=1)
    started(b, [1], n=1)
    assert b.ask(1, ask(2, 0, 0, [2]), 5.0) is None
    b.forget(1, 2)
    assert b.extend(1, Extend(1, 0, 1), 9.0) is None
    turn = only([t for t in b.turns() if prompt(t) == [1, 500]])
    assert (turn.n_new, turn.slot) == (2, 0)  # the server has to compute it again


def test_a_context_that_others_fill_is_a_refusal_until_they_are_idle() -> None:
    b = book(context=100)
    started(b, list(range(60)), n=1)
    assert "is full with other requests" in refusal(b.ask(1, ask(2, 0, 0, list(range(50))), 1.0))
    assert b.ask(1, ask(2, 1, 0, list(range(50))), 2.0 + SEAT_KEPT_S) is None


def test_what_fails_together_is_tried_alone_and_only_then_given_up() -> None:
    b = book()
    started(b, [1], [2])
    assert b.failed(only(b.turns()), "no") == []
    first, second = b.turns()
    assert first.alone
    assert second.alone
    assert b.failed(first, "no") == [(1, NoDraft(1, 0, "no"))]
    done(b, second, made(3))
    assert prompt(only(b.turns())) == [2, 500, 3]


def test_a_forgotten_session_gets_nothing_of_the_turn_it_was_in_and_neither_does_its_namesake() -> None:
    b = book()
    started(b, [1])
    turn = only(b.turns())
    b.forget(1, 1)
    assert b.ask(1, ask(1, 0, 0, [9]), 0) is None
    assert done(b, turn, made(501)) == []
    assert [prompt(t) for t in b.turns()] == [[9]]


def test_a_stream_that_is_gone_takes_its_sessions_along() -> None:
    b = book()
    started(b, [1])
    assert b.ask(2, ask(1, 0, 0, [2]), 0) is None
    b.drop(1)
    assert b.n_sessions == 1
    assert [prompt(turn) for turn in b.turns()] == [[2]]


def test_a_lost_server_ends_every_branch_that_waits() -> None:
    b = book()
    started(b, [1], [2])
    assert b.ask(1, ask(2, 1, 0, [1], 0), 0) is None
    assert b.lost("gone") == [(1, NoDraft(1, 0, "gone"))]
    assert b.turns() == []


def test_tokens_that_are_none_end_the_branch() -> None:
    b = book()
    assert b.ask(1, ask(1, 0, 0, [1]), 0) is None
    assert "made no token" in refusal(done(b, only(b.turns()), made(VOCAB))[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("token_s", "asking_s", "n"), [(0.02, 0.005, 1), (0.005, 0.001, 1), (0.003, 0.0006, 2), (0.0005, 0.0006, MAX_TURN)]
)
def test_only_fast_models_make_several_tokens_a_turn(token_s: float, asking_s: float, n: int) -> None:
    pace = Pace()
    pace.took(token_s * 2 + asking_s, token_s * 2, 2)
    assert pace.turn == n


def test_the_speed_that_is_shown_counts_the_asking() -> None:
    pace = Pace()
    assert pace.tokens_per_s == 0
    pace.took(0.025, 0.02, 1)
    assert pace.tokens_per_s == pytest.approx(40)


def test_a_turn_that_fails_after_its_session_is_gone_tells_nobody() -> None:
    b = book()
    started(b, [1])
    turn = only(b.turns())
    b.forget(1, 1)
    assert b.failed(turn, "no") == []
    started(b, [2])  # and the next common turn is not held up


def test_turns_of_a_fast_model_are_longer_but_for_the_first() -> None:
    b = book()
    started(b, [1], n=20)
    turn = only(b.turns())
    b.done(turn, [Made([2], False, 0.001)], 0.002, 0)
    turn = only(b.turns())
    assert turn.n == MAX_TURN
    assert done(b, turn, made(*range(3, 3 + MAX_TURN))) == [
        Drafted(1, 0, 2, pack_tokens(range(3, 3 + MAX_TURN)), 1_000_000)
    ]
    assert b.ask(1, ask(1, 1, 1, [7]), 0) is None
    assert only(b.turns()).n == 1


class Machine(RuleBasedStateMachine):
    """A coordinator that asks for whatever comes to mind, and a server that answers n tokens: session tokens + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.book = DraftBook(n_vocab=VOCAB, context=60, slots=2)
        self.now = 0.0
        self.branch = 0
        self.flying: list[Turn] = []
        self.tokens: dict[int, list[int]] = {}
        self.current: dict[int, tuple[int, int]] = {}  # session: (branch, tokens that are due)

    @rule(session=st.integers(0, 3), keep=st.integers(0, 40), new=st.lists(st.integers(0, 99), max_size=50),
          n=st.integers(0, 30))  # fmt: skip
    def ask(self, session: int, keep: int, new: list[int], n: int) -> None:
        self.branch += 1
        keep = min(keep, len(self.tokens.get(session, [])))
        answer = self.book.ask(1, ask(session, self.branch, keep, new, n), self.now)
        if answer is None:
            self.tokens[session] = self.tokens.get(session, [])[:keep] + new
            self.current[session] = (self.branch, n)
        else:
            self.book.forget(1, session)
            self.tokens.pop(session, None)
            self.current.pop(session, None)

    @rule(session=st.integers(0, 3))
    def forget(self, session: int) -> None:
        self.book.forget(1, session)
        self.tokens.pop(session, None)
        self.current.pop(session, None)

    @rule(s=st.floats(0, 3))
    def wait(self, s: float) -> None:
        self.now += s

    @rule()
    def go(self) -> None:
        self.flying += self.book.turns()

    @precondition(lambda self: self.flying)
    @rule(i=st.integers(0, 5), fails=st.booleans())
    def land(self, i: int, fails: bool) -> None:
        turn = self.flying.pop(i % len(self.flying))
        answers = [made(*(100 + k for k in range(turn.n))) for _ in turn.members]
        out = self.book.failed(turn, "no") if fails else self.book.done(turn, answers, 0.02, self.now)
        for stream, message in out:
            assert stream == 1
            branch, due = self.current[message.session]
            assert message.branch == branch
            if isinstance(message, Drafted):
                new = unpack_tokens(message.tokens)
                assert 0 < len(new) <= due
                self.tokens[message.session] += new
                self.current[message.session] = (branch, due - len(new))
            else:
                del self.current[message.session]

    @invariant()
    def what_the_server_is_asked_is_what_the_coordinator_has(self) -> None:
        flying = [member for turn in self.flying for member in turn.members]
        assert len({(m.key, m.serial) for m in flying}) == len(flying)
        assert sum(not turn.alone for turn in self.flying) <= 1
        for turn in self.flying:
            for i, member in enumerate(turn.members):
                session = member.key[1]
                if self.current.get(session, (0, 0))[0] == member.branch:
                    assert prompt(turn, i) == self.tokens[session]
                    assert len(prompt(turn, i)) + turn.n < 60


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), st.data())
@settings(deadline=None, max_examples=50)
def test_the_text_that_is_sent_follows_the_tokens(tokens: list[int], data: st.DataObject) -> None:
    b = book()
    assert b.ask(1, ask(1, 0, 0, tokens), 0) is None
    b.turns()
    keep = data.draw(st.integers(0, len(tokens)))
    new = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=not keep, max_size=5))
    assert b.ask(1, ask(1, 1, keep, new), 0) is None
    b._sessions[1, 1].busy = False
    assert prompt(only(b.turns())) == tokens[:keep] + new
