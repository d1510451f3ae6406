"""The verifier's loop over a model that is strict about its memory: whatever drafts say, and whenever commands come."""

from __future__ import annotations

import random
import socket
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verifier_fake import EOG, N_VOCAB, FakeModel, expected, facts, token_after

from tightwad_agent.engine.verifier import channel as channel_module
from tightwad_agent.engine.verifier.channel import Channel
from tightwad_agent.engine.verifier.desk import MAX_WAITING
from tightwad_agent.engine.verifier.loop import Loop
from tightwad_agent.engine.verifier.model import Outcome
from tightwad_agent.errors import EngineError, PeerGone, PeerSilent, ProtocolError
from tightwad_agent.wire.frames import FrameDecoder, encode
from tightwad_agent.wire.verify import (
    FROM_VERIFIER,
    GREEDY,
    MAX_HEADER,
    TO_VERIFIER,
    Accepted,
    Close,
    Detokenize,
    Ended,
    Failed,
    Load,
    Open,
    Rollback,
    Round,
    Sampling,
    Text,
    Tokenize,
    Tokenized,
    pack_tokens,
    unpack_tokens,
)

WARM = Sampling(temperature=1.0, seed=3)
LONG = [*range(20, 40)]
Pair = tuple[socket.socket, Channel]


class Clock:
    """Moves a little whenever it is read."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 0.0001
        return self.now


@dataclass
class Script:
    """A wire that gives one list of messages per read, and then hangs up. Waiting with nothing to come is a bug."""

    reads: deque[list[Any]]
    sent: list[Any] = field(default_factory=list)

    def read(self, wait_s: float | None) -> list[Any] | None:
        return self.reads.popleft() if self.reads else None

    def send(self, *messages: object) -> bool:
        self.sent += messages
        return True


def served(model: FakeModel, *reads: list[Any]) -> list[Any]:
    """What a loop answers to these reads."""
    script = Script(deque(reads))
    Loop(model, script, Clock()).run()
    return script.sent


def open_(
    number: int, prompt: Sequence[int], sampling: Sampling = GREEDY, *, max_tokens: int = 10, n_probs: int = -1
) -> Open:
    return Open(number, pack_tokens(prompt), sampling, max_tokens, n_probs)


def round_(number: int, at: int, draft: Sequence[int] = (), free: int = 0) -> Round:
    return Round(number, at, pack_tokens(draft), free)


@dataclass
class Asked:
    """One request of the simulated agent, and what came of it."""

    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    tokens: list[int] = field(default_factory=list)
    ended: Ended = Ended.NOT
    given_up: bool = False
    n_accepted: int = 0


class Agent:
    """Plays the agent at the loop's wire: opens requests at odd moments, drafts well and badly, answers late."""

    def __init__(self, model: FakeModel, asked: list[Asked], rng: random.Random) -> None:
        self.model = model
        self.asked = asked
        self.rng = rng
        self.queue: deque[Any] = deque()
        self.unopened = deque(range(len(asked)))
        self.idle = 0

    def read(self, wait_s: float | None) -> list[Any] | None:
        if self.unopened and (wait_s is None or self.rng.random() < 0.3):
            number = self.unopened.popleft()
            one = self.asked[number]
            self.queue.append(open_(number, one.prompt, one.sampling, max_tokens=one.max_tokens))
        n = len(self.queue) if wait_s is None else self.rng.randrange(len(self.queue) + 1)
        messages = [self.queue.popleft() for _ in range(n)]
        if not messages and wait_s is None:
            assert all(one.ended or one.given_up for one in self.asked), "the loop waits, and requests are unfinished"
            return None
        return messages

    def send(self, *messages: object) -> bool:
        for message in messages:
            assert isinstance(message, Accepted), message
            self.heard(message)
        return True

    def heard(self, answer: Accepted) -> None:
        one = self.asked[answer.request]
        assert not one.ended
        assert answer.at == len(one.prompt) + len(one.tokens)
        tokens = unpack_tokens(answer.tokens)
        assert len(answer.pieces) == len(tokens) > 0
        assert answer.n_accepted <= answer.n_draft
        one.tokens += tokens
        one.n_accepted += answer.n_accepted
        one.ended = answer.ended
        if one.ended:
            return
        if self.rng.random() < 0.05:
            one.given_up = True
            self.queue.append(Close(answer.request))
        else:
            self.queue.append(self.next_round(answer.request, one))

    def next_round(self, number: int, one: Asked) -> Round:
        sequence = [*one.prompt, *one.tokens]
        at = max(0, len(sequence) - self.rng.choice([0, 0, 0, 1, 5]) + self.rng.choice([0] * 9 + [1]))
        right = expected(one.prompt, one.sampling, 99, 999)
        draft = [*one.prompt, *right][at : at + self.rng.randrange(9)]
        if draft and self.rng.random() < 0.4:
            draft[self.rng.randrange(len(draft))] = self.rng.choice([3, -1, N_VOCAB, 2**31 - 1, EOG])
        return round_(number, at, draft, self.rng.choice([0, 0, 1, 3]))


samplings = st.builds(Sampling, temperature=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 3))
requests = st.lists(
    st.builds(
        Asked,
        prompt=st.builds(
            lambda n, own: [(i * i) % 11 for i in range(n)] + own,
            st.sampled_from([0, 0, 18, 25, 33]),  # many begin alike
            st.lists(st.integers(0, 3), min_size=1, max_size=12),
        ),
        sampling=samplings,
        max_tokens=st.integers(1, 30),
    ),
    min_size=1,
    max_size=7,
)


class TestAnswersDoNotDependOnDrafts:
    @settings(max_examples=150, deadline=None)
    @given(
        asked=requests,
        seed=st.integers(0, 2**32),
        batch=st.integers(8, 64),
        rollback=st.sampled_from(Rollback),
        window=st.integers(1, 30),
    )
    def test_any_order_of_commands_and_any_drafts(
        self, asked: list[Asked], seed: int, batch: int, rollback: Rollback, window: int
    ) -> None:
        model = FakeModel(
            facts(
                batch=batch,
                n_outputs=min(batch, 12),
                rollback=rollback,
                window=window if rollback is Rollback.WINDOW else 0,
            )
        )
        asked = [Asked(one.prompt, one.sampling, one.max_tokens) for one in asked]
        Loop(model, Agent(model, asked, random.Random(seed)), Clock()).run()
        for one in asked:
            right = expected(one.prompt, one.sampling, one.max_tokens, model.facts.context)
            assert one.tokens == (right[: len(one.tokens)] if one.given_up else right)
            if rollback is Rollback.NONE:
                assert one.n_accepted == 0
        assert model.n_samplers == 0

    @settings(max_examples=50, deadline=None)
    @given(asked=requests, seed=st.integers(0, 2**32))
    def test_with_a_full_cache_some_fail_and_the_rest_is_right(self, asked: list[Asked], seed: int) -> None:
        model = FakeModel(facts(), cells=70)
        asked = [Asked(one.prompt, one.sampling, one.max_tokens) for one in asked]

        class Patient(Agent):
            def send(self, *messages: object) -> bool:
                for message in messages:
                    if isinstance(message, Failed):
                        assert message.code == "cache"
                        self.asked[message.request].given_up = True
                    else:
                        super().send(message)
                return True

        Loop(model, Patient(model, asked, random.Random(seed)), Clock()).run()
        for one in asked:
            right = expected(one.prompt, one.sampling, one.max_tokens, model.facts.context)
            assert one.tokens == (right[: len(one.tokens)] if one.given_up else right)


class TestRequests:
    def test_the_first_answer_tells_about_the_prompt(self) -> None:
        model = FakeModel(facts())
        first, again = (
            answer
            for answer in served(model, [open_(1, LONG)], [], [], [Close(1), open_(2, LONG)], [], [])
            if isinstance(answer, Accepted)
        )
        assert (first.at, first.n_prompt, first.n_cached, first.batch, first.requests) == (20, 20, 0, 20, 1)
        assert first.prompt_us >= first.decode_us > 0
        assert (again.n_cached, again.batch) == (19, 1)
        assert again.tokens == first.tokens

    def test_good_drafts_save_turns(self) -> None:
        model = FakeModel(facts())
        right = expected([1], GREEDY, 6, 64)
        _first, second = served(model, [open_(1, [1], max_tokens=6)], [], [], [round_(1, 2, right[1:])])
        assert unpack_tokens(second.tokens) == right[1:]
        assert (second.n_draft, second.n_accepted, second.ended) == (4, 4, Ended.LENGTH)

    def test_a_draft_is_not_evaluated_beyond_the_last_token_that_is_wanted(self) -> None:
        model = FakeModel(facts())
        served(model, [open_(1, [1], max_tokens=3)], [], [], [round_(1, 2, [5] * 9)])
        assert [len(pieces[0].tokens) for pieces in model.turns] == [1, 2]

    def test_free_rounds_go_on_until_another_round_comes(self) -> None:
        model = FakeModel(facts())
        answers = served(model, [open_(1, [1], max_tokens=9)], [], [], [round_(1, 2, free=3)], *[[]] * 20)
        assert [unpack_tokens(answer.tokens) for answer in answers] == [[t] for t in expected([1], GREEDY, 5, 64)]

    def test_a_round_without_free_ones_stops_them(self) -> None:
        model = FakeModel(facts())
        answers = served(
            model, [open_(1, [1], max_tokens=9)], [], [], [round_(1, 2, free=30)], [], [round_(1, 2)], *[[]] * 20
        )
        assert 2 <= len(answers) <= 4

    def test_several_requests_share_turns(self) -> None:
        model = FakeModel(facts())
        served(
            model,
            [open_(n, [n, n], max_tokens=9) for n in (1, 2, 3)],
            [],
            [],
            [round_(n, 3) for n in (1, 2, 3)],
            [],
        )
        assert [len(pieces) for pieces in model.turns] == [3, 3]

    def test_a_long_prompt_does_not_stop_the_others(self) -> None:
        model = FakeModel(facts(context=640, batch=64, n_outputs=32))
        first = [open_(1, [1], max_tokens=99)], [], [], [round_(1, 2, free=99)]
        served(model, *first, [open_(2, [2] * 500)], *[[]] * 60)
        prompt_turns = [pieces for pieces in model.turns if any(piece.seq == 1 for piece in pieces)]
        assert len(prompt_turns) > 5
        assert all(any(piece.seq == 0 for piece in pieces) for pieces in prompt_turns[:-1])

    def test_a_request_closed_while_it_was_computed_gets_no_answer_and_leaves_its_tokens(self) -> None:
        model = FakeModel(facts())
        answers = served(model, [open_(1, LONG)], [Close(1)], [], [open_(2, [*LONG, 5])], [], [])
        assert [answer.request for answer in answers] == [2]
        assert answers[0].n_cached == 20

    def test_closing_in_the_middle_of_a_prompt_frees_the_slot(self) -> None:
        model = FakeModel(facts(context=640, slots=1, batch=32))
        answers = served(model, [open_(1, [1] * 500), open_(2, [2])], [], [], [Close(1)], [], [])
        assert [answer.request for answer in answers] == [2]
        assert len(model.turns) < 10

    def test_closing_one_that_waits_or_is_unknown(self) -> None:
        model = FakeModel(facts(slots=1))
        answers = served(model, [open_(1, [1]), open_(2, [2]), Close(2), Close(9), round_(9, 1)], [], [])
        assert [answer.request for answer in answers] == [1]

    def test_nothing_wanted_is_an_answer_without_work(self) -> None:
        model = FakeModel(facts())
        (answer,) = served(model, [open_(1, [1, 2], max_tokens=0)], [])
        assert (answer.ended, answer.tokens, answer.n_prompt) == (Ended.LENGTH, b"", 2)
        assert model.turns == []

    def test_the_context_ends_an_answer(self) -> None:
        model = FakeModel(facts(context=8))
        answers = served(model, [open_(1, [1, 2, 3, 4, 5, 6], max_tokens=50)], [], [], [round_(1, 7, [1] * 9)])
        assert answers[-1].ended is Ended.LENGTH
        assert sum(len(unpack_tokens(answer.tokens)) for answer in answers) == 2

    def test_an_eog_token_is_the_last_one(self) -> None:
        start = next(n for n in range(3000) if token_after([n % N_VOCAB, n // N_VOCAB], GREEDY, 0) == EOG)
        model = FakeModel(facts())
        (answer,) = served(model, [open_(1, [start % N_VOCAB, start // N_VOCAB])], [], [])
        assert (answer.ended, unpack_tokens(answer.tokens), answer.pieces) == (Ended.EOG, [EOG], (b"",))

    def test_probabilities_on_demand(self) -> None:
        model = FakeModel(facts())
        right = expected([1], GREEDY, 9, 64)
        first, second = served(model, [open_(1, [1], n_probs=2)], [], [], [round_(1, 2, right[1:3])])
        for answer in (first, second):
            assert [one.chosen.token for one in answer.probabilities] == unpack_tokens(answer.tokens)
            assert all(len(one.top) == 2 for one in answer.probabilities)
        assert len(second.probabilities) == 3

    @pytest.mark.parametrize(
        ("asked", "code", "words"),
        [
            (open_(1, []), "input", "empty"),
            (open_(1, [1, N_VOCAB]), "input", f"token {N_VOCAB}"),
            (open_(1, [-1]), "input", "token -1"),
            (open_(1, [1] * 64), "context", "64 tokens"),
            (open_(1, [1], Sampling(top_p=2.0)), "input", "top_p"),
            (open_(1, [1], n_probs=65), "input", "65"),
        ],
    )
    def test_what_cannot_be_served_has_a_reason_and_hurts_nobody(self, asked: Open, code: str, words: str) -> None:
        answers = served(FakeModel(facts()), [asked, open_(2, [1])], [], [])
        assert isinstance(answers[0], Failed)
        assert (answers[0].request, answers[0].code) == (1, code)
        assert words in answers[0].reason
        assert isinstance(answers[1], Accepted)

    def test_too_many_requests_are_refused(self) -> None:
        model = FakeModel(facts(slots=1))
        answers = served(model, [open_(n, [1]) for n in range(MAX_WAITING + 2)])
        assert [(type(answer), answer.request) for answer in answers if isinstance(answer, Failed)] == [
            (Failed, MAX_WAITING + 1)
        ]

    def test_texts_and_tokens(self) -> None:
        asked = [Tokenize(5, b"ab"), Tokenize(6, b"ab", begin=False), Detokenize(7, pack_tokens([1, -1, EOG, N_VOCAB]))]
        assert served(FakeModel(facts()), asked) == [
            Tokenized(5, pack_tokens([1, 0, 1])),
            Tokenized(6, pack_tokens([0, 1])),
            Text(7, b"<1><7>"),
        ]


class TestTrouble:
    def test_a_full_cache_takes_from_idle_slots_first(self) -> None:
        model = FakeModel(facts(), cells=12)
        answers = served(
            model, [open_(1, [1] * 8)], [], [], [Close(1), open_(2, [2] * 8)], *[[]] * 4, [round_(2, 9)], []
        )
        assert all(isinstance(answer, Accepted) for answer in answers)
        assert model.memory[0] == []

    def test_then_leaves_drafts_out(self) -> None:
        model = FakeModel(facts(), cells=10)
        answers = served(model, [open_(1, [1] * 8)], [], [], [round_(1, 9, expected([1] * 8, GREEDY, 9, 99)[1:])], [])
        assert [(type(answer), answer.n_draft) for answer in answers] == [(Accepted, 0), (Accepted, 0)]

    def test_and_then_fails_the_newest(self) -> None:
        model = FakeModel(facts(), cells=14)
        rounds = [[round_(1, 7 + i), round_(2, 7 + i)] for i in range(4)]
        answers = served(
            model, [open_(1, [1] * 6), open_(2, [2] * 6)], [], [], *(r for one in rounds for r in (one, []))
        )
        failed = [answer for answer in answers if isinstance(answer, Failed)]
        assert [(answer.request, answer.code) for answer in failed] == [(2, "cache")]
        assert "14 of the 64" in failed[0].reason
        assert sum(answer.request == 1 for answer in answers) == 5

    def test_the_newest_is_not_who_happens_to_be_due(self) -> None:
        model = FakeModel(facts(), cells=14)
        opened = [[open_(1, [1] * 6), open_(2, [2] * 6)], [], []]
        answers = served(model, *opened, *(r for i in range(4) for r in ([round_(1, 7 + i)], [])))
        assert [answer.request for answer in answers if isinstance(answer, Failed)] == [2]
        assert sum(answer.request == 1 for answer in answers) == 5

    def test_a_failed_pass_fails_its_requests_and_the_next_go_on(self) -> None:
        model = FakeModel(facts(), failing=[Outcome.FAILED])
        answers = served(model, [open_(1, [1])], [], [open_(2, [1])], [], [])
        assert [(type(answer), answer.request) for answer in answers] == [(Failed, 1), (Accepted, 2)]

    def test_a_model_that_computes_no_more_ends_it(self) -> None:
        model = FakeModel(facts(), failing=[Outcome.FAILED] * 9)
        with pytest.raises(EngineError, match="3 forward passes"):
            served(model, *([open_(n, [1])] for n in range(9)))

    @pytest.mark.parametrize("wrong", [Load("/", "/", 1), [open_(1, [1]), open_(1, [2])]])
    def test_what_is_not_due_ends_it(self, wrong: Any) -> None:
        with pytest.raises(ProtocolError):
            served(FakeModel(facts()), wrong if isinstance(wrong, list) else [wrong])

    def test_an_agent_that_is_gone_ends_it(self) -> None:
        class Gone(Script):
            def send(self, *_messages: object) -> bool:
                return False

        script = Gone(deque([[open_(1, [1])], [], [round_(1, 2)], *[[]] * 9]))
        Loop(FakeModel(facts()), script, Clock()).run()
        assert len(script.reads) > 5


class TestChannel:
    """Frames over a real socket pair."""

    @pytest.fixture
    def pair(self) -> Iterator[tuple[socket.socket, Channel]]:
        ours, theirs = socket.socketpair()
        ours.settimeout(10)
        wire = Channel(theirs)
        yield ours, wire
        ours.close()
        wire.close()

    def talk(self, ours: socket.socket, wire: Channel, data: bytes, cut: int) -> list[Any]:
        found: list[Any] = []
        for start in range(0, len(data), cut):
            ours.sendall(data[start : start + cut])
            found += wire.read(1.0) or []
        return found

    @pytest.mark.parametrize("cut", [1, 3, 1 << 16])
    def test_whole_and_byte_by_byte(self, pair: Pair, cut: int) -> None:
        ours, wire = pair
        messages = [open_(1, [1, 2], WARM), round_(1, 2, [3]), Close(1), Tokenize(1, b"\xff")]
        data = b"".join(encode(TO_VERIFIER.encode(message)) for message in messages)
        assert self.talk(ours, wire, data, cut) == messages
        assert wire.read(0.0) == []
        ours.close()
        assert wire.ended()
        assert wire.read(None) is None

    @pytest.mark.parametrize(
        "data",
        [
            struct.pack("!II", MAX_HEADER + 1, 0),
            struct.pack("!II", 2**32 - 1, 2**32 - 1),
            encode(b"\x91\x04", b"payload"),
            encode(b""),
            encode(b"\xc1"),
            encode(b"\x91\x63"),
            encode(TO_VERIFIER.encode(open_(1, [1]))[:-1]),
            encode(TO_VERIFIER.encode(Close(1)).replace(b"\x01", b"\xff")),
            encode(b"\xdd\xff\xff\xff\xff"),
        ],
    )
    @pytest.mark.parametrize("cut", [1, 1 << 16])
    def test_what_is_no_command(self, pair: Pair, data: bytes, cut: int) -> None:
        ours, wire = pair
        with pytest.raises(ProtocolError):
            self.talk(ours, wire, data, cut)

    def test_an_odd_number_of_bytes_of_tokens(self, pair: Pair) -> None:
        ours, wire = pair
        ours.sendall(encode(TO_VERIFIER.encode(Open(1, b"\1\2\3", GREEDY, 1))))
        with pytest.raises(ProtocolError, match="whole number"):
            Loop(FakeModel(facts()), wire, Clock()).run()

    def test_an_end_inside_a_frame(self, pair: Pair) -> None:
        ours, wire = pair
        ours.sendall(encode(TO_VERIFIER.encode(Close(1)))[:-1])
        ours.close()
        assert wire.read(1.0) == []
        with pytest.raises(PeerGone):
            wire.read(1.0)

    def test_an_agent_that_is_gone_takes_nothing(self, pair: Pair) -> None:
        ours, wire = pair
        ours.close()
        assert not wire.send(Failed(1, "input")) or not wire.send(Failed(1, "input"))

    def test_an_agent_that_does_not_read(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(channel_module, "WRITE_DEADLINE_S", 0.05)
        _ours, wire = pair
        with pytest.raises(PeerSilent):
            wire.send(*[Failed(1, "input", "x" * 1000)] * 2000)

    def test_a_whole_conversation(self, pair: Pair) -> None:
        ours, wire = pair
        ours.sendall(encode(TO_VERIFIER.encode(open_(1, [1, 2, 3], max_tokens=1))))
        ours.shutdown(socket.SHUT_WR)
        Loop(FakeModel(facts()), wire, Clock()).run()
        wire.close()
        (frame,) = FrameDecoder().feed(b"".join(iter(lambda: ours.recv(1 << 16), b"")))
        answer = FROM_VERIFIER.decode(frame.header)
        assert isinstance(answer, Accepted)
        assert unpack_tokens(answer.tokens) == expected([1, 2, 3], GREEDY, 1, 64)
