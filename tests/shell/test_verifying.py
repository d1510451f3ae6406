"""The agent's end of the verifier, against a test that speaks the other one byte for byte."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

import tightwad_agent
from tightwad_agent.engine.by_verifier import command
from tightwad_agent.engine.verifying import VerifierClient
from tightwad_agent.errors import (
    ContextOverflow,
    EngineStopped,
    NotReady,
    PeerGone,
    PeerSilent,
    RequestTooLarge,
    UsageError,
)
from tightwad_agent.wire.frames import FrameDecoder, encode
from tightwad_agent.wire.verify import (
    FROM_VERIFIER,
    GREEDY,
    MAX_HEADER,
    MAX_ROUND,
    MAX_TEXT,
    MAX_TOKENS,
    TO_VERIFIER,
    Accepted,
    Close,
    Detokenize,
    Ended,
    Failed,
    Load,
    Loaded,
    Loading,
    Open,
    Probability,
    Refused,
    Rollback,
    Round,
    Sampling,
    Text,
    Tokenize,
    Tokenized,
    TokenProbabilities,
    pack_tokens,
)

LOADED = Loaded(512, 2048, 4, 49152, Rollback.FULL, eog=pack_tokens([2]))


def accepted(request: int, at: int, *tokens: int, **more: Any) -> Accepted:
    return Accepted(request, at, pack_tokens(tokens), tuple(b"x" for _ in tokens), **more)


class Peer:
    """The verifier's side, by hand."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = trio.socket.from_stdlib_socket(sock)
        self._sock = sock
        self._decoder = FrameDecoder(MAX_HEADER)
        self._frames: list[Any] = []

    async def tell(self, *messages: Any) -> None:
        """All in one piece."""
        await self.write(b"".join(encode(FROM_VERIFIER.encode(message)) for message in messages))

    async def write(self, data: bytes) -> None:
        with trio.fail_after(10):
            while data:
                data = data[await self.socket.send(data) :]

    def read_now(self) -> None:
        """What is there."""
        self._frames += self._decoder.feed(self._sock.recv(1 << 20))

    async def hear(self) -> Any:
        with trio.fail_after(10):
            while not self._frames:
                data = await self.socket.recv(1 << 20)
                assert data, "the client closed"
                self._frames += self._decoder.feed(data)
        return TO_VERIFIER.decode(self._frames.pop(0).header)


class Lab:
    """A client that runs, and what its requests hear."""

    def __init__(self, nursery: trio.Nursery, **options: Any) -> None:
        ours, theirs = socket.socketpair()
        self.client = VerifierClient(ours, **options)
        self.peer = Peer(theirs)
        self.events: list[Any] = []
        self.why = ""
        self.scope = trio.CancelScope()
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        try:
            with self.scope:
                self.why = await self.client.run()
        finally:
            self.peer.socket.close()

    async def loaded(self) -> Lab:
        await self.peer.tell(LOADED)
        assert await self.client.settled(10)
        return self

    def open(self, prompt: list[int] | None = None, deliver: Callable[[Any], None] | None = None, **more: Any) -> Any:
        options: dict[str, Any] = {"max_tokens": 99, "deliver": deliver or self.events.append} | more
        return self.client.open(prompt or [1, 2, 3], GREEDY, **options)

    async def heard(self, n: int) -> list[Any]:
        """All events, once there are so many."""
        with trio.fail_after(10):
            while len(self.events) < n:
                await trio.sleep(0.001)
        return self.events

    async def lost(self) -> str:
        with trio.fail_after(10):
            await self.client.ended.wait()
            await trio.sleep(0)
        assert not self.client.alive
        return self.why


@pytest.fixture
async def lab(nursery: trio.Nursery) -> Lab:
    return await Lab(nursery).loaded()


# Loading


async def test_progress_and_then_the_model(nursery: trio.Nursery) -> None:
    lab = Lab(nursery)
    load = Load("/e", "/m", 512)
    lab.client.load(load)
    assert await lab.peer.hear() == load
    assert not await lab.client.settled(0.01)
    for ask in (lab.open, lambda: lab.client.tokenize(b"a")):
        with pytest.raises(NotReady, match="being loaded"):
            await ask()  # type: ignore[misc]
    await lab.peer.tell(Loading(3), Loading(100), LOADED)
    assert await lab.client.settled(10)
    assert (lab.client.percent, lab.client.info, lab.client.alive) == (99, LOADED, True)


@pytest.mark.parametrize("kind", ["build", "memory", "model", "device", "internal"])
async def test_a_refusal_is_kept_though_the_process_ends_right_behind_it(nursery: trio.Nursery, kind: str) -> None:
    lab = Lab(nursery)
    refused = Refused(kind, "why", 7, "CPU")
    await lab.peer.tell(refused)
    lab.peer.socket.close()
    assert await lab.lost() == "the verifier closed its connection"
    assert lab.client.refused == refused
    assert not lab.client.broken


# Requests


async def test_a_request_is_opened_and_told_and_closed(lab: Lab) -> None:
    sampling = Sampling(seed=5, logit_bias=((7, -1.5),))
    request = lab.client.open([1, 2, 3], sampling, max_tokens=9, n_probs=2, deliver=lab.events.append)
    assert await lab.peer.hear() == Open(0, pack_tokens([1, 2, 3]), sampling, 9, 2)
    top = TokenProbabilities(Probability(4, -0.1, b"x"))
    first = accepted(0, 3, 4, n_prompt=3, probabilities=(top,))
    await lab.peer.tell(first)
    assert await lab.heard(1) == [first]
    request.round(4, [5, 6], 3)
    assert await lab.peer.hear() == Round(0, 4, pack_tokens([5, 6]), 3)
    second, third = accepted(0, 4, 5, 6, 7, n_draft=2, n_accepted=2), accepted(0, 7, 2, ended=Ended.EOG)
    await lab.peer.tell(second, third)
    assert await lab.heard(3) == [first, second, third]
    request.round(8, [], 0)  # over: not sent
    request.close()
    request.close()
    assert await lab.peer.hear() == Close(0)
    assert lab.open().id == 1
    assert (await lab.peer.hear()).request == 1


async def test_what_was_said_elsewhere_is_repeated_before_its_prompt_counts_as_done(lab: Lab) -> None:
    request = lab.client.open([1, 2, 3], GREEDY, max_tokens=9, said=[4, 5, 6], deliver=lab.events.append)
    assert await lab.peer.hear() == Open(0, pack_tokens([1, 2, 3]), GREEDY, 9, -1, pack_tokens([4, 5, 6]))
    await lab.peer.tell(accepted(0, 3, 4, 5), accepted(0, 5, 6))
    await lab.heard(2)
    assert request.waits
    assert not request.prompted
    await lab.peer.tell(accepted(0, 6, 7))
    await lab.heard(3)
    assert not request.waits
    assert request.prompted


async def test_nothing_is_delivered_after_close(lab: Lab) -> None:
    closed, other = lab.open(), lab.open()
    closed.close()
    await lab.peer.tell(accepted(0, 3, 4), Failed(0, "cache"), accepted(1, 3, 4))
    assert [event.request for event in await lab.heard(1)] == [1]
    other.close()
    lab.peer.socket.close()
    await lab.lost()
    assert len(lab.events) == 1


async def test_nothing_is_delivered_after_the_end(lab: Lab) -> None:
    lab.open()
    lab.open()
    await lab.peer.tell(Failed(0, "context", "long"), Failed(0, "context"), accepted(0, 3, 4), accepted(1, 3, 4))
    assert await lab.heard(2) == [Failed(0, "context", "long"), accepted(1, 3, 4)]
    lab.peer.socket.close()
    await lab.lost()
    assert [type(event) for event in lab.events] == [Failed, Accepted, PeerGone]  # of the second only


async def test_events_in_any_cut(nursery: trio.Nursery) -> None:
    lab = Lab(nursery)
    told = [accepted(0, 3 + i, i) for i in range(20)]
    data = b"".join(encode(FROM_VERIFIER.encode(message)) for message in [LOADED, *told])
    [await lab.peer.write(data[i : i + 1]) for i in range(len(encode(FROM_VERIFIER.encode(LOADED))))]
    assert await lab.client.settled(10)
    lab.open()
    for byte in data[len(encode(FROM_VERIFIER.encode(LOADED))) :]:
        await lab.peer.write(bytes([byte]))
    assert await lab.heard(20) == told


async def test_whoever_is_told_may_go_on_at_once(lab: Lab) -> None:
    """In `deliver` itself: the next round, a close, and another request."""
    more: list[Any] = []

    def deliver(event: Any) -> None:
        more.append(event)
        if len(more) == 1:
            first.round(4, [], 0)
        else:
            first.close()
            lab.open()

    first = lab.open(deliver=deliver)
    assert isinstance(await lab.peer.hear(), Open)
    await lab.peer.tell(accepted(0, 3, 4))
    assert await lab.peer.hear() == Round(0, 4)
    await lab.peer.tell(accepted(0, 4, 5), accepted(0, 5, 6))
    assert await lab.peer.hear() == Close(0)
    assert (await lab.peer.hear()).request == 1
    assert len(more) == 2


async def test_a_draft_is_cut_to_what_a_round_takes(lab: Lab) -> None:
    lab.open().round(3, [7] * (MAX_ROUND + 5), 0)
    await lab.peer.hear()
    assert len((await lab.peer.hear()).draft) == 4 * MAX_ROUND


async def test_open_requests_are_bounded(nursery: trio.Nursery) -> None:
    lab = await Lab(nursery, max_requests=2).loaded()
    first = lab.open()
    lab.open()
    with pytest.raises(NotReady, match="2 requests are open"):
        lab.open()
    first.close()
    lab.open()


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": float("nan")},
        {"top_p": float("inf")},
        {"seed": -1},
        {"seed": 1 << 65},
        {"top_k": -1},
        {"logit_bias": tuple((i, 1.0) for i in range(4097))},
        {"logit_bias": ((1 << 64, 1.0),)},
    ],
)
async def test_values_that_would_end_the_verifier_are_not_sent(lab: Lab, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="does not take this request"):
        lab.client.open([1], dataclasses.replace(GREEDY, **changes), max_tokens=1, deliver=lab.events.append)
    for prompt, max_tokens in (([1 << 31], 1), ([1], -1)):
        with pytest.raises(UsageError):
            lab.client.open(prompt, GREEDY, max_tokens=max_tokens, deliver=lab.events.append)
    lab.open([5])
    assert await lab.peer.hear() == Open(0, pack_tokens([5]), GREEDY, 99)


async def test_lengths_beyond_the_limits_are_not_sent(lab: Lab) -> None:
    with pytest.raises(ContextOverflow, match="512 are served"):
        lab.open([1] * (MAX_TOKENS + 1))
    with pytest.raises(RequestTooLarge):
        await lab.client.tokenize(bytes(MAX_TEXT + 1))
    with pytest.raises(RequestTooLarge):
        await lab.client.detokenize([1] * (MAX_TOKENS + 1))
    assert lab.client.alive


# Questions


async def test_text_and_tokens(lab: Lab, nursery: trio.Nursery) -> None:
    answers: dict[str, Any] = {}

    async def ask(name: str, question: Any) -> None:
        answers[name] = await question

    nursery.start_soon(ask, "tokens", lab.client.tokenize(b"ab", special=False, begin=False))
    assert await lab.peer.hear() == Tokenize(0, b"ab", special=False, begin=False)
    nursery.start_soon(ask, "text", lab.client.detokenize([1, 2]))
    assert await lab.peer.hear() == Detokenize(1, pack_tokens([1, 2]))
    await lab.peer.tell(Text(1, b"\xff"), Tokenized(0, pack_tokens([7, 8])))
    with trio.fail_after(10):
        while len(answers) < 2:
            await trio.sleep(0.001)
    assert answers == {"tokens": [7, 8], "text": b"\xff"}


async def test_a_question_has_a_deadline_and_its_late_answer_harms_nobody(nursery: trio.Nursery) -> None:
    lab = await Lab(nursery, call_s=0.1).loaded()
    with pytest.raises(PeerSilent, match=r"within 0\.1 s"):
        await lab.client.tokenize(b"a")
    assert (await lab.client.progress(1)).busy == 1  # the watchdog still wants to know
    await lab.peer.tell(Tokenized(0, b""))
    lab.open()
    await lab.peer.tell(accepted(0, 3, 1))
    await lab.heard(1)
    assert (await lab.client.progress(1)).busy == 0


async def test_questions_are_bounded(nursery: trio.Nursery) -> None:
    lab = await Lab(nursery, call_s=0.01, max_requests=2).loaded()
    for _ in range(2):
        with pytest.raises(PeerSilent):
            await lab.client.tokenize(b"a")
    with pytest.raises(NotReady, match="2 questions"):
        await lab.client.tokenize(b"a")


# Its end


async def test_an_end_reaches_everybody_once(lab: Lab, nursery: trio.Nursery) -> None:
    caught: list[Exception] = []

    async def ask() -> None:
        with pytest.raises(PeerGone) as info:
            await lab.client.tokenize(b"a")
        caught.append(info.value)

    requests = [lab.open() for _ in range(3)]
    nursery.start_soon(ask)
    for _ in range(4):
        await lab.peer.hear()
    lab.peer.socket.close()
    assert await lab.lost() == "the verifier closed its connection"
    assert [type(event) for event in lab.events] == [PeerGone] * 3
    await trio.testing.wait_all_tasks_blocked()
    assert len(caught) == 1
    with pytest.raises(NotReady, match="closed its connection"):
        lab.open()
    with pytest.raises(PeerGone):
        await lab.client.detokenize([1])
    for request in requests:
        request.round(3, [1], 0)
        request.close()
    lab.client.close()
    assert len(lab.events) == 3
    assert not lab.client.broken


async def test_a_request_that_another_closes_on_the_news_is_not_told(lab: Lab) -> None:
    first = lab.open(deliver=lambda event: (lab.events.append(event), second.close()))
    second = lab.open()
    assert first.id == 0
    lab.peer.socket.close()
    await lab.lost()
    assert len(lab.events) == 1


async def test_an_end_inside_a_frame_is_an_end(lab: Lab) -> None:
    await lab.peer.write(encode(FROM_VERIFIER.encode(accepted(0, 3, 1)))[:-1])
    lab.peer.socket.close()
    assert await lab.lost() == "the verifier closed its connection"
    assert not lab.client.broken


async def test_an_end_by_reset(lab: Lab) -> None:
    """It went away with our messages unread; what it said before still counts."""
    lab.open()
    await trio.sleep(0.01)
    await lab.peer.tell(accepted(0, 3, 1))
    lab.peer.socket.close()
    await lab.lost()
    assert [type(event) for event in lab.events] == [Accepted, PeerGone]


async def test_cancellation_tells_the_requests(lab: Lab) -> None:
    lab.open()
    lab.scope.cancel()
    await lab.lost()
    assert [event.message for event in lab.events] == ["the verifier was stopped"]
    assert isinstance(lab.events[0], EngineStopped)
    assert not lab.client.broken


@pytest.mark.parametrize("error", [PeerGone, EngineStopped])
async def test_the_loss_that_others_saw_is_what_requests_are_told(
    lab: Lab, nursery: trio.Nursery, error: type[PeerGone]
) -> None:
    async def ask() -> None:
        with pytest.raises(PeerGone) as info:
            await lab.client.tokenize(b"x")
        assert type(info.value) is error

    nursery.start_soon(ask)
    await trio.testing.wait_all_tasks_blocked()
    lab.open()
    lab.client.lose("worker w is gone", error)
    assert not lab.client.alive
    assert lab.events == []  # never from within a call
    await lab.lost()
    assert [(type(event), event.message) for event in lab.events] == [(error, "worker w is gone")]


BROKEN: list[tuple[str, Any]] = [
    ("Loaded after", LOADED),
    ("Refused after", Refused("model", "late")),
    ("Loading after", Loading(5)),
    ("was never opened", accepted(1, 3, 4)),
    ("was never opened", Failed(9, "cache")),
    ("position 4 of a sequence of 3", accepted(0, 4, 4)),
    ("position 2 of a sequence of 3", accepted(0, 2, 4)),
    ("a round without a token", accepted(0, 3)),
    ("bytes of tokens", Accepted(0, 3, b"abc", (b"a",))),
    ("bytes of tokens", Accepted(0, 3, bytes(8), (b"a",))),
    ("bytes of tokens", accepted(0, 3, 4, probabilities=(TokenProbabilities(Probability(1, 0.0)),) * 2)),
    ("none was due", Tokenized(1, b"")),
    ("none was due", Text(0, b"")),
    ("no whole number", Tokenized(0, b"abc")),
]


@pytest.mark.parametrize(("text", "message"), BROKEN)
async def test_what_it_must_not_say(lab: Lab, nursery: trio.Nursery, text: str, message: Any) -> None:
    async def ask() -> None:
        with pytest.raises(PeerGone):
            await lab.client.tokenize(b"a")

    lab.open()
    nursery.start_soon(ask)
    for _ in range(2):
        await lab.peer.hear()
    await lab.peer.tell(message, accepted(0, 3, 4))  # what comes behind it does not count any more
    assert text in await lab.lost()
    assert lab.client.broken
    assert [type(event) for event in lab.events] == [PeerGone]


@pytest.mark.parametrize(
    "message", [accepted(0, 3, 4), Text(0, b""), dataclasses.replace(LOADED, eog=b"abc"), Tokenized(0, b"")]
)
async def test_what_it_must_not_say_before_it_has_loaded(nursery: trio.Nursery, message: Any) -> None:
    lab = Lab(nursery)
    await lab.peer.tell(message)
    assert "broke the protocol" in await lab.lost()
    assert await lab.client.settled(0)
    assert lab.client.loaded is None


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 8,
        (MAX_HEADER + 1).to_bytes(4, "big") + bytes(4),
        encode(b"\x90"),
        encode(b""),
        encode(b"\xc1"),
        encode(b"\x91\x63"),
        encode(b"\x91\x06"),
        encode(FROM_VERIFIER.encode(accepted(0, 3, 1)), b"payload"),
        encode(FROM_VERIFIER.encode(dataclasses.replace(accepted(0, 3, 1), at=-1))),
    ],
)
async def test_bytes_that_are_no_message(lab: Lab, data: bytes) -> None:
    lab.open()
    await lab.peer.write(data)
    assert await lab.lost()
    assert lab.client.broken
    assert [type(event) for event in lab.events] == [PeerGone]


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200), whole=st.booleans(), cut=st.integers(1, 200))
def test_any_bytes_are_taken_without_a_fault_of_ours(data: bytes, whole: bool, cut: int) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            lab = await Lab(nursery).loaded()
            lab.open()
            sent = encode(data) if whole else data
            try:
                for i in range(0, len(sent), cut):
                    await lab.peer.write(sent[i : i + cut])
            except OSError:
                pass  # it was had enough of
            lab.peer.socket.close()
            assert await lab.lost()
            assert isinstance(lab.events[-1], PeerGone)

    trio.run(main)


# A verifier that does not read


async def test_what_it_does_not_read_yet_waits(lab: Lab, nursery: trio.Nursery) -> None:
    text, got = bytes(range(256)) * 40_000, []

    async def ask() -> None:
        got.append(await lab.client.tokenize(text))

    nursery.start_soon(ask)
    await trio.testing.wait_all_tasks_blocked()
    request = lab.open()
    request.close()
    assert (await lab.peer.hear()).text == text
    assert isinstance(await lab.peer.hear(), Open)
    assert await lab.peer.hear() == Close(0)
    await lab.peer.tell(Tokenized(0, pack_tokens([1])))
    with trio.fail_after(10):
        while not got:
            await trio.sleep(0.001)
    with trio.fail_after(10):
        await trio.testing.wait_all_tasks_blocked(0.01)  # nobody keeps trying to send nothing
    lab.open()
    assert isinstance(await lab.peer.hear(), Open)


async def test_what_waits_is_not_overtaken(lab: Lab, nursery: trio.Nursery) -> None:
    """There is room again, and the outbox has not been told yet."""
    texts = [b"a" * (1 << 20), b"b"]
    for text in texts:
        nursery.start_soon(lab.client.tokenize, text)
        await trio.testing.wait_all_tasks_blocked()
        lab.peer.read_now()
    lab.open()
    assert (await lab.peer.hear()).text in texts
    assert (await lab.peer.hear()).text in texts
    assert isinstance(await lab.peer.hear(), Open)
    await lab.peer.tell(Tokenized(0, b""), Tokenized(1, b""))


async def test_what_it_never_reads_is_bounded(nursery: trio.Nursery) -> None:
    lab = await Lab(nursery, max_outbox=1 << 20).loaded()
    request = lab.open()
    n_rounds = 0
    while lab.client.alive:
        request.round(3, [1] * 1000, 0)
        n_rounds += 1
    assert (1 << 20) / 4100 < n_rounds < 1000
    assert lab.events == []  # never from within a call
    assert await lab.lost() == "the verifier does not read what is sent to it"
    assert [type(event) for event in lab.events] == [PeerGone]
    assert lab.client.broken


# What the watchdog sees


async def test_progress_counts_what_is_owed(lab: Lab) -> None:
    look = lab.client.progress
    assert (await look(1)).busy == 0
    request = lab.open()
    before = await look(1)
    assert (before.busy, before.in_prompt) == (1, True)
    assert isinstance(await lab.peer.hear(), Open)
    assert await lab.peer.hear() == Detokenize(0, b"")  # a long prompt gives no other sign
    await lab.peer.tell(Text(0, b""), accepted(0, 3, 4))
    await lab.heard(1)
    request.round(4, [], 5)
    after = await look(1)
    assert (after.busy, after.in_prompt) == (1, False)
    assert after.mark != before.mark
    assert (await look(1)).mark == after.mark


async def test_a_quiet_verifier_with_open_requests_is_asked(lab: Lab) -> None:
    lab.open()
    await lab.peer.hear()
    await lab.peer.tell(accepted(0, 3, 4))
    await lab.heard(1)
    assert (await lab.client.progress(1)).busy == 0
    assert await lab.peer.hear() == Detokenize(0, b"")
    assert (await lab.client.progress(1)).busy == 1
    await lab.peer.tell(Text(0, b""))
    with trio.fail_after(10):
        while (await lab.client.progress(1)).busy:
            await trio.sleep(0.001)


async def test_without_requests_it_is_left_alone(lab: Lab) -> None:
    await lab.client.progress(1)
    lab.open()
    assert isinstance(await lab.peer.hear(), Open)


# The program itself


async def test_the_command_starts_the_verifier_that_belongs_to_this_agent(nursery: trio.Nursery) -> None:
    """With nothing in its environment, and from anywhere."""
    ours, theirs = socket.socketpair()
    client = VerifierClient(ours)
    nursery.start_soon(client.run)
    argv = command(theirs.fileno())
    process = subprocess.Popen(argv, pass_fds=(theirs.fileno(),), cwd="/", env={})
    theirs.close()
    client.load(Load("/nonexistent", __file__, 512))
    assert await client.settled(20)
    assert client.refused is not None
    assert client.refused.kind == "build"
    assert await trio.to_thread.run_sync(process.wait) == 0


def test_the_command_names_the_folder_of_the_package_though_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", "/elsewhere"])
    assert command(7)[5:] == ["7", "/elsewhere", str(Path(tightwad_agent.__file__).parent.parent)]
