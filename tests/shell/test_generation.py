"""The generator over a verifier and drafters that answer after a while, on trio's mock clock."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import trio
import trio.testing

from tightwad_agent.errors import (
    ContextOverflow,
    EngineError,
    NotReady,
    PeerGone,
    ProtocolError,
    TightwadError,
    UsageError,
)
from tightwad_agent.proxy.costs import Costs
from tightwad_agent.proxy.generation import Settings, VerifierGeneration, VerifierGenerator
from tightwad_agent.proxy.ports import Chunk, DrafterInfo, DraftEvent, Timings, VerifierEvent
from tightwad_agent.proxy.tally import Tally
from tightwad_agent.proxy.verified import MAX_BACKLOG
from tightwad_agent.testing import node_id
from tightwad_agent.wire.draft import Drafted, NoDraft
from tightwad_agent.wire.verify import (
    GREEDY,
    Accepted,
    Ended,
    Failed,
    Loaded,
    Probability,
    Rollback,
    Sampling,
    TokenProbabilities,
    pack_tokens,
    unpack_tokens,
)

N_VOCAB = 1000
PASS_S, SLOPE_S = 0.05, 0.005
INFO = Loaded(context=100_000, context_train=100_000, slots=4, n_vocab=N_VOCAB, rollback=Rollback.FULL)
PROMPT = list(range(10))
USUAL = Settings()


def make_target(n: int, seed: int = 1) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(N_VOCAB) for _ in range(n)]


@dataclass
class SlowRequest:
    """Says `target`, one round after the other; `rounds` are those that were asked for."""

    verifier: SlowVerifier
    deliver: Callable[[VerifierEvent], None]
    sequence: list[int]
    target: list[int]
    rounds: list[tuple[int, list[int], int]] = field(default_factory=list)
    closed: bool = False
    passes: int = 0
    n_said: int = 0

    def __post_init__(self) -> None:
        self.due: tuple[int, list[int], int] | None = None
        self.free = 0
        self.whole = self.sequence + self.target
        self.wake = trio.Event()

    def round(self, at: int, draft: Sequence[int], free: int) -> None:
        assert not self.closed
        self.due = (at, list(draft), free)
        self.rounds.append(self.due)
        self.wake.set()

    def close(self) -> None:
        self.closed = True
        self.wake.set()

    def repeat(self) -> None:
        """What was said, two tokens at a time."""
        end = len(self.sequence)
        for at in range(end - self.n_said, end, 2):
            tokens = self.sequence[at : min(at + 2, end)]
            answer = Accepted(0, at, pack_tokens(tokens), tuple(b"%d " % token for token in tokens))
            if not self.closed:
                self.deliver(self.verifier.change(answer))

    async def run(self) -> None:
        n_prompt = len(self.sequence)
        await trio.lowlevel.checkpoint()
        self.repeat()
        await self.evaluate([], n_prompt=n_prompt)
        while not self.closed and len(self.sequence) < len(self.whole):
            if self.due is None and not self.free:
                self.wake = trio.Event()
                await self.wake.wait()
            elif self.due is None:
                self.free -= 1
                await self.evaluate([])
            else:
                (at, draft, self.free), self.due = self.due, None
                behind = len(self.sequence) - at
                same = draft[:behind] == self.sequence[at : at + len(draft)]
                await self.evaluate(draft[behind:] if same else [])

    async def evaluate(self, draft: list[int], n_prompt: int = 0) -> None:
        took = PASS_S + SLOPE_S * len(draft)
        await trio.sleep(took)
        self.passes += 1
        at, right = len(self.sequence), 0
        while right < len(draft) and draft[right] == self.whole[at + right]:
            right += 1
        tokens = self.whole[at : at + right + 1]
        self.sequence += tokens
        ended = Ended.LENGTH if len(self.sequence) == len(self.whole) else Ended.NOT
        answer = Accepted(
            0,
            at,
            pack_tokens(tokens),
            tuple(b"%d " % token for token in tokens),
            len(draft),
            right,
            ended,
            int(1e6 * took),
            len(draft) + 1,
            1,
            n_prompt,
        )
        if not self.closed:
            self.deliver(self.verifier.change(answer))


@dataclass
class SlowVerifier:
    """`change` may replace an answer, to break something."""

    nursery: trio.Nursery
    target: list[int]
    info: Loaded = INFO
    change: Callable[[Accepted], VerifierEvent] = lambda answer: answer
    requests: list[SlowRequest] = field(default_factory=list)

    async def tokenize(self, text: bytes, *, special: bool = True, begin: bool = True) -> list[int]:
        await trio.lowlevel.checkpoint()
        return [len(text), special, begin]

    async def detokenize(self, tokens: Sequence[int]) -> bytes:
        await trio.lowlevel.checkpoint()
        return bytes(tokens)

    def open(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int,
        n_probs: int = -1,
        said: Sequence[int] = (),
        deliver: Callable[[VerifierEvent], None],
    ) -> SlowRequest:
        if len(prompt) > 50:
            raise ContextOverflow("too long")
        assert list(said) == self.target[: len(said)]
        request = SlowRequest(self, deliver, [*prompt, *said], self.target[len(said) : max_tokens], n_said=len(said))
        self.requests.append(request)
        self.nursery.start_soon(request.run)
        return request


@dataclass
class SlowSession:
    """Knows the target (`share` of its tokens are right), and takes `token_s` for each."""

    drafter: SlowDrafter
    deliver: Callable[[DraftEvent], None]
    tokens: list[int] = field(default_factory=list)
    branch: int = 0
    left: int = 0
    made: int = 0
    since: float = 0.0
    forgotten: bool = False
    patience: list[bool] = field(default_factory=list)
    held: list[Drafted] = field(default_factory=list)

    def ask(self, branch: int, keep: int, tokens: Sequence[int], n: int) -> None:
        assert not self.forgotten
        assert keep <= len(self.tokens)
        self.tokens[keep:] = tokens
        self.branch, self.left, self.made, self.since, self.held = branch, n, 0, 0.0, []
        if self.drafter.refuses:
            self.deliver(NoDraft(0, branch, "not now"))
        else:
            self.drafter.nursery.start_soon(self.run, branch)

    def extend(self, branch: int, n: int) -> None:
        assert not self.forgotten
        idle, self.left = self.left == 0, self.left + n
        if idle and branch == self.branch:
            self.drafter.nursery.start_soon(self.run, branch)

    def collect(self) -> None:
        held, self.held = self.held, []
        for event in held:
            self.deliver(event)

    def patient(self, is_patient: bool) -> None:
        self.patience.append(is_patient)
        if not is_patient:
            self.collect()

    def send(self, event: Drafted) -> None:
        """As late as it may."""
        if self.drafter.holds and self.patience[-1] and event.offset:
            self.held.append(event)
        else:
            self.collect()
            self.deliver(event)

    def forget(self) -> None:
        self.forgotten = True

    async def run(self, branch: int) -> None:
        while self.left and not self.forgotten:
            await trio.sleep(self.drafter.token_s)
            if branch != self.branch or self.forgotten or not self.drafter.alive or self.drafter.hangs:
                return
            token = self.drafter.guess(len(self.tokens))
            self.tokens.append(token)
            self.left, self.made = self.left - 1, self.made + 1
            self.since += self.drafter.token_s
            self.send(Drafted(0, branch, self.made - 1, pack_tokens([token]), int(self.since * 1e6)))


@dataclass
class SlowDrafter:
    nursery: trio.Nursery
    whole: list[int]
    share: float = 1.0
    token_s: float = 0.01
    name: str = "den"
    alive: bool = True
    hangs: bool = False
    refuses: bool = False
    holds: bool = False
    sessions: list[SlowSession] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dice = random.Random(7)
        self.info = DrafterInfo(node_id(self.name), self.name, "small", 4, 0.0)

    def guess(self, position: int) -> int:
        if position < len(self.whole) and self.dice.random() < self.share:
            return self.whole[position]
        return (self.whole[position % len(self.whole)] + 1) % N_VOCAB

    def open(self, deliver: Callable[[DraftEvent], None]) -> SlowSession:
        self.sessions.append(SlowSession(self, deliver))
        return self.sessions[-1]


@dataclass
class Rig:
    generator: VerifierGenerator
    verifier: SlowVerifier
    drafters: list[SlowDrafter]
    tally: Tally

    async def answer(
        self, max_tokens: int = 100, into: list[Chunk] | None = None, said: Sequence[int] = ()
    ) -> tuple[list[Chunk], Timings]:
        chunks = [] if into is None else into
        async with self.generator.start(PROMPT, GREEDY, max_tokens=max_tokens, said=said) as generation:
            async for chunk in generation:
                chunks.append(chunk)
        return chunks, generation.timings


@asynccontextmanager
async def rig(n: int = 100, settings: Settings = USUAL, info: Loaded = INFO, **drafter: float) -> AsyncIterator[Rig]:
    """A verifier that has `n` tokens to say, and a drafter if anything is said of it."""
    async with trio.open_nursery() as nursery:
        verifier = SlowVerifier(nursery, make_target(n), info)
        drafters = [SlowDrafter(nursery, PROMPT + verifier.target, **drafter)] if drafter else []  # type: ignore[arg-type]
        tally = Tally()
        generator = VerifierGenerator(verifier, lambda: list(drafters), Costs(), settings, tally.generated)
        yield Rig(generator, verifier, drafters, tally)
        nursery.cancel_scope.cancel()


def ids(chunks: list[Chunk]) -> list[int]:
    return [token.id for chunk in chunks for token in chunk.tokens]


async def test_without_drafters_the_verifier_goes_on_by_itself(autojump_clock: trio.testing.MockClock) -> None:
    async with rig(200) as r:
        started = trio.current_time()
        chunks, timings = await r.answer(200)
        assert ids(chunks) == r.verifier.target
        assert trio.current_time() - started == pytest.approx(200 * PASS_S, rel=0.01)
        assert len(r.verifier.requests[0].rounds) <= 6
        assert [chunk.ended for chunk in chunks[-2:]] == [Ended.NOT, Ended.LENGTH]
        assert chunks[3].tokens[0].piece == b"%d " % r.verifier.target[3]
        assert (timings.n_prompt, timings.n_generated, timings.rounds) == (10, 200, 199)
        assert timings.drafted == timings.draft_ms == 0
        assert timings.generate_ms == pytest.approx(199 * PASS_S * 1e3, rel=0.01)
        assert r.generator.decision() == "not drafting: no drafter"


async def test_tokens_that_come_together_at_the_end_of_a_round_are_as_good(
    autojump_clock: trio.testing.MockClock,
) -> None:
    times = {}
    for holds in (False, True):
        async with rig(200, share=0.9, holds=holds) as r:
            started = trio.current_time()
            chunks, _ = await r.answer(200)
            times[holds] = trio.current_time() - started
            assert ids(chunks) == r.verifier.target
            patience = r.drafters[0].sessions[0].patience
            assert patience[0] is False
            assert patience.count(True) > 0
            assert all(a is not b for a, b in pairwise(patience)), "told once"
    assert times[True] < 1.1 * times[False]


async def test_a_good_drafter_makes_it_faster(autojump_clock: trio.testing.MockClock) -> None:
    async with rig(200, share=0.95) as r:
        started = trio.current_time()
        chunks, timings = await r.answer(200)
        assert ids(chunks) == r.verifier.target
        assert trio.current_time() - started < 200 * PASS_S / 2.2
        assert timings.n_generated == timings.rounds + timings.accepted + 1 == 200
        assert timings.drafters == {"den": timings.drafted}
        assert timings.tried_at[0] <= timings.rounds
        assert sum(timings.tried_at) == timings.drafted
        assert sum(timings.accepted_at) == timings.accepted
        assert 0 <= timings.waited_ms < timings.draft_ms
        assert "drafting on den: 0.9" in r.generator.decision()
        assert r.tally.n_generated == 200
        assert r.verifier.requests[0].closed
        assert all(session.forgotten for session in r.drafters[0].sessions)


@pytest.mark.parametrize("trouble", [{"share": 0.0}, {"hangs": True}, {"refuses": True}])
async def test_a_useless_drafter_costs_next_to_nothing(
    autojump_clock: trio.testing.MockClock, trouble: dict[str, float]
) -> None:
    async with rig(300, **trouble) as r:
        started = trio.current_time()
        chunks, _ = await r.answer(300)
        assert ids(chunks) == r.verifier.target
        assert trio.current_time() - started < 300 * PASS_S / 0.97
        assert "not drafting: den" in r.generator.decision()


@pytest.mark.parametrize("change", ["switched off", "no rollback"])
async def test_nobody_is_asked_where_nothing_may_be_drafted(
    autojump_clock: trio.testing.MockClock, change: str
) -> None:
    info = Loaded(**{**{k: getattr(INFO, k) for k in INFO.__slots__}, "rollback": Rollback.NONE})
    off = change == "switched off"
    async with rig(100, Settings(drafts=not off), INFO if off else info, share=1.0) as r:
        r.verifier.target = [1, 2] * 50
        chunks, timings = await r.answer()
        assert ids(chunks) == r.verifier.target
        assert timings.drafted == 0
        assert not r.drafters[0].sessions
        assert all(not draft for _, draft, _ in r.verifier.requests[0].rounds)
        assert change.rsplit(maxsplit=1)[-1] in r.generator.decision() or "rolled back" in r.generator.decision()


async def test_repetition_is_drafted_from_the_text_itself(autojump_clock: trio.testing.MockClock) -> None:
    async with rig() as r:
        r.verifier.target = make_target(20) * 10
        started = trio.current_time()
        chunks, timings = await r.answer(200)
        assert ids(chunks) == r.verifier.target
        assert trio.current_time() - started < 200 * PASS_S / 2
        assert timings.drafters == {"n-gram": timings.drafted}


async def test_a_drafter_that_dies_is_left_and_another_takes_over(autojump_clock: trio.testing.MockClock) -> None:
    async with rig(300, share=0.95) as r:
        second = SlowDrafter(r.drafters[0].nursery, r.drafters[0].whole, 0.95, name="attic")
        async with r.generator.start(PROMPT, GREEDY, max_tokens=300) as generation:
            chunks = []
            async for chunk in generation:
                chunks.append(chunk)
                if len(ids(chunks)) > 100 and len(r.drafters) == 1:
                    r.drafters[0].alive = False
                    r.drafters.append(second)
        assert ids(chunks) == r.verifier.target
        assert all(session.forgotten for session in r.drafters[0].sessions)
        assert generation.timings.drafters["attic"] > 50


async def test_a_drafter_that_hangs_while_it_is_waited_for_is_left_in_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with rig(300, Settings(ngram=False), share=1.0) as r, r.generator.start(PROMPT, GREEDY, max_tokens=300) as g:
        n, hung = 0, math.inf
        async for chunk in g:
            n += len(chunk.tokens)
            if n > 100 and hung == math.inf:
                r.drafters[0].hangs, hung, left = True, trio.current_time(), 300 - n
        assert n == 300
        assert trio.current_time() - hung < (left + 4) * PASS_S


async def test_the_next_round_is_asked_for_before_the_chunk_is_read(autojump_clock: trio.testing.MockClock) -> None:
    """A reader that takes as long as a round costs no more than the rounds."""
    async with rig(100, Settings(ngram=False), share=1.0) as r:
        started = trio.current_time()
        async with r.generator.start(PROMPT, GREEDY, max_tokens=100) as generation:
            async for _ in generation:
                await trio.sleep(PASS_S)
        passes = r.verifier.requests[0].passes
        assert passes < 40
        assert trio.current_time() - started < passes * (PASS_S + 8 * SLOPE_S) + 10 * PASS_S


async def test_a_reader_that_stopped_stops_the_rounds(autojump_clock: trio.testing.MockClock) -> None:
    async with rig(3000, share=1.0) as r, r.generator.start(PROMPT, GREEDY, max_tokens=3000) as generation:
        await anext(generation)
        await trio.sleep(1000)
        made = len(r.verifier.requests[0].sequence) - len(PROMPT)
        assert MAX_BACKLOG / 2 < made < 2 * MAX_BACKLOG
        got = [chunk async for chunk in generation]
        assert len(ids(got)) == 2999
    assert ids(got) == r.verifier.target[1:]


async def test_leaving_early_closes_everything(autojump_clock: trio.testing.MockClock) -> None:
    async with rig(100, share=1.0) as r:
        async with r.generator.start(PROMPT, GREEDY, max_tokens=100) as generation:
            async for _ in generation:
                break
            assert r.generator.live == {generation}
        assert r.verifier.requests[0].closed
        assert not r.generator.live
        assert r.tally.n_generated == generation.timings.n_generated >= 1
        assert all(record.sessions == 0 for record in r.generator.costs.records.values())


async def test_a_prompt_too_long_is_said_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with rig(share=1.0) as r:
        with pytest.raises(ContextOverflow):
            async with r.generator.start(list(range(60)), GREEDY, max_tokens=5):
                pass
        assert not r.drafters[0].sessions
        assert r.tally.rounds == 0


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (Failed(0, "context", "too long"), ContextOverflow),
        (Failed(0, "cache"), NotReady),
        (Failed(0, "input"), UsageError),
        (Failed(0, "internal", "broken"), EngineError),
        (PeerGone("the verifier died"), PeerGone),
    ],
)
async def test_failures_reach_the_reader_after_what_came_before(
    autojump_clock: trio.testing.MockClock, event: VerifierEvent, error: type[TightwadError]
) -> None:
    async with rig(share=1.0) as r:
        r.verifier.change = lambda answer: event if answer.at > 30 else answer
        chunks: list[Chunk] = []
        with pytest.raises(error):
            await r.answer(into=chunks)
        assert ids(chunks) == r.verifier.target[: len(ids(chunks))]
        assert len(ids(chunks)) >= 20


@pytest.mark.parametrize("n", [1, 7, 99])
@pytest.mark.parametrize("share", [None, 0.9])
async def test_an_answer_that_began_elsewhere_goes_on(
    autojump_clock: trio.testing.MockClock, n: int, share: float | None
) -> None:
    async with rig(**({} if share is None else {"share": share})) as r:
        said = r.verifier.target[:n]
        chunks, timings = await r.answer(said=said)
        assert ids(chunks) == r.verifier.target
        assert [t.piece for c in chunks for t in c.tokens] == [b"%d " % t for t in r.verifier.target]
        assert chunks[-1].ended is Ended.LENGTH
        assert ids(chunks[: (n + 1) // 2]) == said
        assert timings.n_generated == 100 - n
        for session in (s for d in r.drafters for s in d.sessions):
            assert session.tokens[: 10 + n] == PROMPT + said, "who drafts knows what was said"


async def test_more_repeated_than_was_said(autojump_clock: trio.testing.MockClock) -> None:
    def change(answer: Accepted) -> Accepted:
        tokens = [*unpack_tokens(answer.tokens), 1] if answer.at == len(PROMPT) + 2 else unpack_tokens(answer.tokens)
        return Accepted(0, answer.at, pack_tokens(tokens), (b"",) * len(tokens), answer.n_draft)

    async with rig() as r:
        r.verifier.change = change
        with pytest.raises(ProtocolError, match="repeated"):
            await r.answer(said=r.verifier.target[:3])


@pytest.mark.parametrize("broken", ["position", "pieces", "bytes", "none"])
async def test_answers_that_make_no_sense_end_the_request(autojump_clock: trio.testing.MockClock, broken: str) -> None:
    def change(answer: Accepted) -> Accepted:
        match broken:
            case "position":
                return Accepted(0, answer.at + 1, answer.tokens, answer.pieces)
            case "pieces":
                return Accepted(0, answer.at, answer.tokens, ())
            case "bytes":
                return Accepted(0, answer.at, b"abc", answer.pieces)
            case _:
                return Accepted(0, answer.at, b"", ())

    async with rig(share=1.0) as r:
        r.verifier.change = change
        with pytest.raises(ProtocolError):
            await r.answer()
        assert r.verifier.requests[0].closed


@pytest.mark.parametrize("message", [b"abc", pack_tokens([N_VOCAB]), pack_tokens([-5])])
async def test_a_drafter_that_sends_nonsense_is_dropped(autojump_clock: trio.testing.MockClock, message: bytes) -> None:
    async with rig(share=1.0) as r:
        async with r.generator.start(PROMPT, GREEDY, max_tokens=100) as generation:
            await anext(aiter(generation))
            session = r.drafters[0].sessions[0]
            session.deliver(Drafted(0, session.branch, session.made, message))
            assert session.forgotten
            r.drafters[0].alive = False
            r.drafters.append(SlowDrafter(r.verifier.nursery, PROMPT + r.verifier.target))
            chunks = [chunk async for chunk in generation]
        assert ids(chunks) == r.verifier.target[1:]
        assert [len(drafter.sessions) for drafter in r.drafters] == [1, 0], "not even after it was started again"


async def test_a_drafter_that_floods_is_dropped(autojump_clock: trio.testing.MockClock) -> None:
    async with rig(3000, share=1.0) as r, r.generator.start(PROMPT, GREEDY, max_tokens=3000) as generation:
        await anext(aiter(generation))
        await trio.sleep(1000)
        session = r.drafters[0].sessions[0]
        for _ in range(2000):
            session.deliver(Drafted(0, session.branch, 0, pack_tokens([1])))
        assert session.forgotten
        assert len(ids([chunk async for chunk in generation])) == 2999


async def test_probabilities_go_with_their_tokens(autojump_clock: trio.testing.MockClock) -> None:
    def change(answer: Accepted) -> Accepted:
        n = len(answer.pieces)
        probabilities = tuple(TokenProbabilities(Probability(answer.at + i, -1.0)) for i in range(n))
        return Accepted(0, answer.at, answer.tokens, answer.pieces, ended=answer.ended, probabilities=probabilities)

    async with rig(20) as r:
        r.verifier.change = change
        chunks, _ = await r.answer(20)
        tokens = [token for chunk in chunks for token in chunk.tokens]
        assert [t.probabilities.chosen.token for t in tokens if t.probabilities] == list(range(10, 30))


async def test_several_answers_share_what_is_learned(autojump_clock: trio.testing.MockClock) -> None:
    async with rig(60, share=0.9) as r:
        done: list[Timings] = []

        async def one() -> None:
            chunks, timings = await r.answer(60)
            assert ids(chunks) == r.verifier.target
            done.append(timings)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(one)
        assert len(done) == 4
        assert r.tally.n_generated == 240
        assert len(r.generator.costs.records) == 1


async def test_tokens_and_texts_are_the_verifiers(autojump_clock: trio.testing.MockClock) -> None:
    async with rig() as r:
        assert r.generator.info is INFO
        assert await r.generator.tokenize(b"abc", special=False) == [3, False, True]
        assert await r.generator.detokenize([65]) == b"A"


async def test_an_error_in_the_machine_is_the_readers(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not end the one who delivers: other answers hang on it."""
    async with rig() as r:
        monkeypatch.setattr(VerifierGeneration, "_look_around", lambda *_: math.sqrt(-1))
        with pytest.raises(ValueError, match="math domain"):
            await r.answer()
