"""Answers that go on after their engine was lost: wherever the way between the nodes is cut, the client has what it
would have had."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent.errors import ContextOverflow, EngineStopped, NotBegun, PeerGone, PeerRefused, PeerUnreachable
from tightwad_agent.proxy import relay as relay_module
from tightwad_agent.proxy.app import App
from tightwad_agent.proxy.client import Answer, ask
from tightwad_agent.proxy.cluster import Local, Own, Remote, Unavailable
from tightwad_agent.proxy.fakes import Asked, FakeCluster, FakeGenerator, fake_chunks, fake_info
from tightwad_agent.proxy.heads import Peer
from tightwad_agent.proxy.http1 import serve_connection
from tightwad_agent.proxy.limits import Limits
from tightwad_agent.testing import node_id
from tightwad_agent.wire.journal import Began, Broke, Ended, JournalDecoder, Said, entry
from tightwad_agent.wire.verify import Ended as Why

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
GONE = PeerGone("the verifier is gone")
SAYS = "Grüße 😀, then STO and ST".encode() + b"\xf0\x9f" + b" and the STOP of it"
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}}),
    "stop and half characters": (CHAT, {"messages": HELLO, "stop": ["STOP", "ST\n"], "logprobs": True}),
    "several": (TEXT, {"prompt": "Once", "n": 3, "seed": 4, "stream_options": {"include_usage": True}}),
    "completion": (TEXT, {"prompt": ["Once", "Twice"], "echo": True, "max_tokens": 12}),
    "offsets": (TEXT, {"prompt": "Once", "logprobs": 2, "stream_options": {"include_usage": True}}),
}
SIZES = {0: 3, 1: 1, 2: 5}


def script(asked: Asked) -> list[Any]:
    """What is said depends on the seed, and on nothing else."""
    seed = asked.sampling.seed
    text = (b"%d " % (seed % 7) + SAYS)[: asked.max_tokens]
    ended = Why.LENGTH if asked.max_tokens < len(SAYS) else Why.EOG
    return list(fake_chunks(text, SIZES[seed % 3], ended, asked.n_probs))


class Cut(trio.abc.Stream):
    """The way to another node, which ends after so many bytes of its answer."""

    def __init__(self, inner: trio.abc.Stream, n: int) -> None:
        self._inner, self._left = inner, n
        self.n_read = 0

    async def send_all(self, data: Any) -> None:
        await self._inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._left:
            return b""
        data = bytes(await self._inner.receive_some(min(self._left, 1 << 16)))
        self._left -= len(data)
        self.n_read += len(data)
        return data

    async def aclose(self) -> None:
        await self._inner.aclose()


@dataclass
class Rig:
    """A node that clients talk to, and one behind it. `cuts`: after how many bytes each way to it ends."""

    nursery: trio.Nursery
    generator: FakeGenerator = field(default_factory=lambda: FakeGenerator(script))
    cuts: list[int] = field(default_factory=list)
    services: list[str] = field(default_factory=list)
    ways: list[Cut] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    knows_resume: bool = True

    def __post_init__(self) -> None:
        self.behind = FakeCluster(where=Own(self.generator))
        self.other = App(self.behind, admin_key=lambda: "admin")
        self.front = FakeCluster(where=Remote(node_id("other")), opener=self._open)
        self.app = App(self.front, admin_key=lambda: "admin", hold_s=90, paused=self.pauses.append)

    async def _open(self, node: Any, service: str, args: Any) -> trio.abc.Stream:
        self.services.append(service)
        await trio.lowlevel.checkpoint()
        if service == "resume" and not self.knows_resume:
            raise PeerRefused("no service resume")
        near, far = trio.testing.memory_stream_pair()
        self.nursery.start_soon(self._serve, far)
        way = Cut(near, self.cuts.pop(0) if self.cuts else 1 << 40)
        self.ways.append(way)
        return way

    async def _serve(self, far: trio.abc.Stream) -> None:
        await self.other.handle_mesh(node_id("edge"), far, {})

    async def post(self, path: str, body: dict[str, Any]) -> Answer:
        return await post(self.nursery, self.app, path, body)


async def post(nursery: trio.Nursery, app: App, path: str, body: dict[str, Any]) -> Answer:
    near, far = trio.testing.memory_stream_pair()
    nursery.start_soon(lambda: serve_connection(far, app.handle, Limits(), peer=Peer("127.0.0.1")))
    with trio.fail_after(600):
        answer = await ask(near, "POST", path, [(b"content-type", b"application/json")], json.dumps(body).encode())
        answer.text = await answer.read(100 << 20)
    await near.aclose()
    return answer


def in_turn(scripts: list[Callable[[Asked], Any]]) -> Callable[[Asked], Any]:
    """Each start has a script of its own."""

    def now(asked: Asked) -> Any:
        return scripts.pop(0)(asked)

    return now


def plain_of(data: bytes) -> Any:
    """Of one event or body, without what differs between two answers to the same request."""
    if data == b"data: [DONE]":
        return "done"
    plain = json.loads(data.removeprefix(b"data: "))
    for name in ("timings", "id", "created"):
        plain.pop(name, None)
    return plain


def seen(answer: Answer) -> list[Any]:
    """What a client sees: one answer, under one name, without an error."""
    assert answer.status == 200, answer.text
    parts = [part for part in answer.text.split(b"\n\n") if part and not part.startswith(b":")]
    names = {(json.loads(part[6:])["id"], json.loads(part[6:])["created"]) for part in parts if part[6:7] == b"{"}
    assert len(names) <= 1
    return [plain_of(part) for part in parts]


def by_choice(events: list[Any]) -> list[Any]:
    """Answers side by side come in any order."""
    return sorted(events, key=lambda e: e["choices"][0]["index"] if e != "done" and e["choices"] else 99)


@pytest.fixture
async def inner():
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


def request(name: str, *, stream: bool) -> tuple[str, dict[str, Any]]:
    path, body = REQUESTS[name]
    body = {"seed": 4, **body, "stream": stream}
    if not stream:
        body.pop("stream_options", None)
    return path, body


async def undisturbed(nursery: trio.Nursery, name: str, *, stream: bool) -> tuple[list[Any], int]:
    """What a client sees, and how many bytes crossed between the nodes for it."""
    rig = Rig(nursery)
    answer = await rig.post(*request(name, stream=stream))
    return seen(answer), rig.ways[0].n_read


@pytest.mark.parametrize("stream", [True, False])
async def test_the_way_is_cut_at_many_bytes(nursery, autojump_clock, stream):
    """Half a character and half a stop string are held back at the ends of rounds. (Every byte: in the unit tests.)"""
    generator = FakeGenerator(lambda _: fake_chunks("a😀 STé STOP".encode(), 3))
    body = {"prompt": "x", "stop": ["STOP"], "stream": stream, "stream_options": {"include_usage": True}}
    if not stream:
        del body["stream_options"]
    rig = Rig(nursery, generator)
    expected, n = seen(await rig.post(TEXT, body)), rig.ways[0].n_read
    for cut in range(1, n + 1, 17):
        rig = Rig(nursery, generator, cuts=[cut])
        assert seen(await rig.post(TEXT, body)) == expected, cut
        assert len(rig.ways) == 2 or cut > 0.8 * n, "the last entry's figures are longer or shorter each time"
    assert generator.running == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", REQUESTS)
def test_the_way_is_cut_anywhere_again_and_again(name, stream):
    @settings(max_examples=6, deadline=None)
    @given(st.lists(st.floats(0.02, 1.2), min_size=1, max_size=6))
    def cut(shares: list[float]) -> None:
        trio.run(go, shares)

    async def go(shares: list[float]) -> None:
        async with trio.open_nursery() as nursery:
            expected, n = await undisturbed(nursery, name, stream=stream)
            rig = Rig(nursery, cuts=[max(1, int(n * share)) for share in shares])
            answer = await rig.post(*request(name, stream=stream))
            if answer.status == 503 or b'"answer_lost"' in answer.text:
                assert len(rig.ways) >= 3, "only a request that gets nowhere is given up"
            else:
                assert by_choice(seen(answer)) == by_choice(expected)
            nursery.cancel_scope.cancel()

    cut()


async def test_only_the_rest_is_generated(inner):
    whole = (await undisturbed(inner, "chat", stream=True))[1]
    rig = Rig(inner, cuts=[whole * 2 // 3])
    await rig.post(*request("chat", stream=True))
    first, second = rig.generator.asked
    assert not first.said
    assert len(second.said) > 10
    assert second.sampling == first.sampling
    assert second.prompt == first.prompt
    assert rig.services == ["http", "resume"]
    assert len(rig.pauses) == 1


async def test_a_broken_resume_shows(inner, monkeypatch):
    """The control: with one id too few the answer is another."""
    real = relay_module.with_resume

    def forgetful(resume, body):
        [choice] = resume.choices
        choice = type(choice)(choice.index, choice.tokens[:-4], choice.n_cached)
        return real(type(resume)(resume.began, (choice,), resume.opened), body)

    expected, n = await undisturbed(inner, "chat", stream=True)
    monkeypatch.setattr(relay_module, "with_resume", forgetful)
    rig = Rig(inner, cuts=[n * 2 // 3])
    assert seen(await rig.post(*request("chat", stream=True))) != expected


async def test_a_seed_that_was_drawn_is_kept(inner):
    rig = Rig(inner, cuts=[1500])
    path, body = request("chat", stream=True)
    del body["seed"]
    await rig.post(path, body)
    first, second = rig.generator.asked
    assert first.sampling.seed == second.sampling.seed


async def test_the_time_that_a_template_is_told_is_kept(inner):
    """Else the prompt would read differently a second later, and another prompt cannot go on with an answer."""
    template = "{{ strftime_now('%H:%M:%S') }} {{ messages[0].content }}"
    rig = Rig(inner, FakeGenerator(script, info=fake_info(chat_template=template)), cuts=[1500])
    seconds = iter(range(1_700_000_000, 1_800_000_000, 1000))
    rig.other._relay._answerer._clock = lambda: float(next(seconds))
    assert seen(await rig.post(*request("chat", stream=True)))[-1] == "done"
    first, second = rig.generator.asked
    assert first.prompt == second.prompt


async def test_on_this_very_node(inner):
    """The verifier here is killed twice, and another comes up each time."""
    chunks = fake_chunks(b"abcdefghijklmnopqrstuvwxyz0123456789", 2)
    left = [lambda _: [*chunks[:6], GONE], lambda _: [*chunks[:12], GONE], lambda _: chunks]
    generator = FakeGenerator(in_turn(left))
    down = Unavailable("restarting", {"state": "restarting"}, hold=True)
    cluster = FakeCluster(where=Own(generator), routes=[Own(generator), down])
    pauses: list[float] = []
    app = App(cluster, admin_key=lambda: "admin", paused=pauses.append)
    answer = await post(inner, app, CHAT, {"messages": HELLO, "stream": True})
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in seen(answer) if e != "done")
    assert text == "abcdefghijklmnopqrstuvwxyz0123456789"
    assert [bytes(asked.said) for asked in generator.asked] == [b"", b"abcdefghijkl", b"abcdefghijklmnopqrstuvwx"]
    assert len(pauses) == 2


async def test_losses_with_progress_are_not_counted(inner):
    chunks = fake_chunks(bytes(range(33, 127)), 1)
    n = iter(range(10, 90, 10))
    generator = FakeGenerator(lambda _: [*chunks[: next(n)], GONE] if len(generator.asked) < 7 else chunks)
    app = App(FakeCluster(where=Own(generator)), admin_key=lambda: "admin")
    answer = await post(inner, app, TEXT, {"prompt": "x", "stream": True})
    assert seen(answer)[-1] == "done"
    assert len(generator.asked) == 7


async def test_a_prompt_that_reads_differently_there(inner):
    """Another model is served meanwhile: its tokens are not the first one's."""
    rig = Rig(inner, cuts=[1500])
    path, body = request("chat", stream=True)

    def swap() -> None:
        if rig.ways:
            rig.generator.info = fake_info(n_vocab=300)

    rig.front.on_route = swap
    answer = await rig.post(path, body)
    error = json.loads(answer.text.split(b"\n\n")[-2][6:])["error"]
    assert error["code"] == "answer_changed"
    assert answer.text.startswith(b"data: {")


async def test_an_error_there_ends_the_stream_here(inner):
    chunks = fake_chunks(b"abcdef", 2)
    rig = Rig(inner, FakeGenerator(lambda _: [*chunks[:2], ContextOverflow("too long now")]))
    answer = await rig.post(CHAT, {"messages": HELLO, "stream": True})
    error = json.loads(answer.text.split(b"\n\n")[-2][6:])["error"]
    assert (error["code"], error["message"]) == ("context_length_exceeded", "too long now")
    whole = await rig.post(CHAT, {"messages": HELLO})
    assert (whole.status, json.loads(whole.text)["error"]["code"]) == (400, "context_length_exceeded")


async def test_the_verifier_there_is_lost(inner):
    """The node behind is well and says so: it is asked again."""
    chunks = fake_chunks(SAYS, 4)
    left = [lambda _: [*chunks[:3], GONE], lambda _: chunks]
    rig = Rig(inner, FakeGenerator(in_turn(left)))
    answer = await rig.post(CHAT, {"messages": HELLO, "stream": True})
    assert seen(answer)[-1] == "done"
    assert rig.generator.asked[1].said == tuple(SAYS[:12])


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("here", [True, False])
async def test_one_that_waits_for_its_turn_outlives_any_number_of_verifiers(nursery, autojump_clock, stream, here):
    """It had no part in what they died of, and its wait is not one for an engine."""
    lost = [NotBegun("the machine is gone")]
    left = [lambda _: [130.0, *lost], *[lambda _: lost] * 5, lambda _: fake_chunks(SAYS, 4)]
    rig = Rig(nursery, FakeGenerator(in_turn(left)))
    if here:
        rig.front.where = rig.behind.where
    answer = await rig.post(TEXT, {"prompt": "x", "stream": stream})
    assert len(rig.generator.asked) == 7
    assert answer.status == 200
    assert (seen(answer)[-1] == "done") == stream


@pytest.mark.parametrize("here", [True, False])
async def test_an_engine_that_was_ended_from_outside_is_not_the_request_s_doing(inner, here):
    ended = EngineStopped("a machine is gone")
    left = [*[lambda _: [ended]] * 3, lambda _: [GONE], *[lambda _: [ended]] * 3, lambda _: fake_chunks(SAYS, 4)]
    rig = Rig(inner, FakeGenerator(in_turn(left)))
    if here:
        rig.front.where = rig.behind.where
    answer = await rig.post(TEXT, {"prompt": "x", "stream": True})
    assert seen(answer)[-1] == "done"
    assert len(rig.generator.asked) == 8


async def test_an_answer_that_has_begun_waits_for_its_turn_again(nursery, autojump_clock):
    chunks, lost = fake_chunks(SAYS, 4), [NotBegun("the machine is gone")]
    left = [lambda _: lost, lambda _: [*chunks[:3], GONE], lambda _: lost, lambda _: chunks]
    rig = Rig(nursery, FakeGenerator(in_turn(left)))
    answer = await rig.post(TEXT, {"prompt": "x", "stream": True})
    assert seen(answer)[-1] == "done"
    assert [asked.said for asked in rig.generator.asked] == [(), (), tuple(SAYS[:12]), tuple(SAYS[:12])]


async def test_a_node_of_the_version_before(inner):
    """It cannot go on with an answer, but tell it again: what the client has is left out."""
    expected, n = await undisturbed(inner, "chat", stream=True)
    rig = Rig(inner, cuts=[n * 2 // 3], knows_resume=False)
    answer = await rig.post(*request("chat", stream=True))
    assert rig.services == ["http", "resume", "http"]
    assert rig.generator.asked[1].said == ()
    texts = [e["choices"][0]["delta"].get("content") for e in seen(answer)[:-1] if e["choices"]]
    assert "".join(t for t in texts if t) == "".join(
        e["choices"][0]["delta"].get("content", "") for e in expected[:-1] if e["choices"]
    )
    assert seen(answer)[-2:] == expected[-2:]


async def test_clients_cannot_speak_between_nodes(inner):
    """What only nodes may say is taken out of what clients send."""
    rig = Rig(inner)
    near, far = trio.testing.memory_stream_pair()
    inner.start_soon(lambda: serve_connection(far, rig.app.handle, Limits(), peer=Peer("127.0.0.1")))
    forged = [(b"x-tightwad-journal", b"1"), (b"x-tightwad-resume", b"3")]
    answer = await ask(near, "POST", CHAT, forged, json.dumps({"messages": HELLO}).encode())
    assert answer.status == 200
    assert answer.header(b"content-type") == b"application/json"


@pytest.mark.parametrize("n_bytes", [b"0", b"x", b"99999", b"2", b"1" * 50])
async def test_a_beginning_that_is_none_is_refused(inner, n_bytes):
    rig = Rig(inner)
    near, far = trio.testing.memory_stream_pair()
    inner.start_soon(rig._serve, far)
    headers = [(b"x-tightwad-hop", b"1"), (b"x-tightwad-journal", b"1"), (b"x-tightwad-resume", n_bytes)]
    answer = await ask(near, "POST", CHAT, headers, b"{}" * 10)
    assert answer.status == 502
    assert not rig.generator.asked


class TestWaiting:
    async def test_comments_while_a_stream_waits(self, nursery, autojump_clock):
        chunks = fake_chunks(b"abcd", 2)
        left = [lambda _: [*chunks[:1], GONE], lambda _: chunks]
        generator = FakeGenerator(in_turn(left))
        cluster = FakeCluster(where=Own(generator))
        pauses: list[float] = []
        app = App(cluster, admin_key=lambda: "admin", paused=pauses.append)
        back_at = trio.current_time() + 60

        def route() -> None:
            if generator.asked and trio.current_time() < back_at:
                cluster.routes = [Unavailable("loading", {"state": "loading"})]

        cluster.on_route = route
        answer = await post(nursery, app, TEXT, {"prompt": "x", "stream": True})
        assert seen(answer)[-1] == "done"
        assert 15 <= answer.text.count(b": waiting") <= 21
        assert [round(p) for p in pauses] == [60]

    async def test_not_for_ever(self, nursery, autojump_clock):
        chunks = fake_chunks(b"abcd", 2)
        generator = FakeGenerator(lambda _: [*chunks[:1], GONE])
        cluster = FakeCluster(where=Unavailable("loading", {"state": "loading"}), routes=[Own(generator)])
        app = App(cluster, admin_key=lambda: "admin")
        began = trio.current_time()
        answer = await post(nursery, app, TEXT, {"prompt": "x", "stream": True})
        error = json.loads(answer.text.split(b"\n\n")[-2][6:])["error"]
        assert error["code"] == "answer_lost"
        assert "loading" in error["message"]
        assert 120 <= trio.current_time() - began <= 125

    async def test_what_was_stopped_is_not_waited_for(self, inner):
        chunks = fake_chunks(b"abcd", 2)
        generator = FakeGenerator(lambda _: [*chunks[:1], GONE])
        cluster = FakeCluster(where=Unavailable("stopped", {"stopped": True}), routes=[Own(generator)])
        answer = await post(inner, App(cluster, admin_key=lambda: "admin"), TEXT, {"prompt": "x", "stream": True})
        assert b'"answer_lost"' in answer.text

    async def test_another_coordinator_that_loads_is_waited_for(self, nursery, autojump_clock):
        rig = Rig(nursery, cuts=[1500])
        ready_at = trio.current_time() + 20

        def route() -> None:
            if rig.generator.asked and trio.current_time() < ready_at:
                rig.behind.routes = [Unavailable("loading demo", {"state": "loading"})]

        rig.behind.on_route = route
        answer = await rig.post(*request("offsets", stream=True))
        assert seen(answer)[-1] == "done"
        assert rig.pauses[0] >= 19

    async def test_a_node_that_says_nothing_counts_as_lost(self, nursery, autojump_clock):
        """Its links are well, and it does not get on: no entry comes, not even a sign of life."""
        near, far = trio.testing.memory_stream_pair()
        began = Began("cmpl-1", 5, 0, 4, "demo", "x", b"")
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/x-tightwad-journal\r\n\r\n" + entry(began)
        streams = [near]
        rig = Rig(nursery)
        usual = rig.front.opener

        async def opener(node: Any, service: str, args: Any) -> trio.abc.Stream:
            return streams.pop() if streams else await usual(node, service, args)

        rig.front.opener = opener
        await far.send_all(head)
        answer = await rig.post(TEXT, {"prompt": "x", "stream": True})
        assert seen(answer)[-1] == "done"

    async def test_signs_of_life_between_nodes(self, nursery, autojump_clock):
        rig = Rig(nursery, FakeGenerator(lambda _: [100.0, *fake_chunks(b"ab", 1)]))
        answer = await rig.post(TEXT, {"prompt": "x", "stream": True, "sse_ping_interval": 0})
        assert len(rig.ways) == 1
        assert answer.text.startswith(b"data: ")

    async def test_nobody_else_is_reached(self, nursery, autojump_clock):
        rig = Rig(nursery, cuts=[1500])
        usual = rig.front.opener

        async def opener(node: Any, service: str, args: Any) -> trio.abc.Stream:
            if rig.ways:
                await trio.lowlevel.checkpoint()
                raise PeerUnreachable("no address of it accepted a connection")
            return await usual(node, service, args)

        rig.front.opener = opener
        answer = await rig.post(*request("offsets", stream=True))
        assert b"no address of it" in answer.text.split(b"\n\n")[-2]

    @pytest.mark.parametrize("dies", [True, False])
    async def test_a_machine_whose_death_is_known_a_moment_later_excuses_the_last_loss(
        self, nursery, autojump_clock, dies
    ):
        left = [lambda _: [GONE]] * 4 + [lambda _: fake_chunks(SAYS, 4)]
        generator = FakeGenerator(in_turn(left))
        cluster = FakeCluster(where=Own(generator))

        async def die() -> None:
            while len(generator.asked) < 4:
                await trio.sleep(0.01)
            await trio.sleep(0.3)
            cluster.dead.add(node_id("worker"))

        if dies:
            nursery.start_soon(die)
        answer = await post(nursery, App(cluster, admin_key=lambda: "admin"), TEXT, {"prompt": "x"})
        assert (answer.status, len(generator.asked)) == ((200, 5) if dies else (503, 4))


class TestEntries:
    """Another node's journal, entry by entry."""

    async def test_what_was_sent_is_whole(self, inner):
        rig = Rig(inner)
        near, far = trio.testing.memory_stream_pair()
        inner.start_soon(rig._serve, far)
        headers = [(b"x-tightwad-hop", b"1"), (b"x-tightwad-journal", b"1")]
        path, body = request("chat", stream=True)
        answer = await ask(near, "POST", path, headers, json.dumps(body).encode())
        entries = JournalDecoder().feed(await answer.read(1 << 20))
        kinds = [type(one) for one, _ in entries]
        assert kinds[0] is Began
        assert kinds[-1] is Ended
        said = [one for one, _ in entries if isinstance(one, Said)]
        assert sum(len(one.tokens) // 4 for one in said) == said[-1].n_answer
        assert said[-1].over
        assert said[0].n_cached == 1

    async def test_a_loss_is_told(self, inner):
        rig = Rig(inner, FakeGenerator(lambda _: [*fake_chunks(b"abcd", 2)[:1], GONE]))
        near, far = trio.testing.memory_stream_pair()
        inner.start_soon(rig._serve, far)
        headers = [(b"x-tightwad-hop", b"1"), (b"x-tightwad-journal", b"1")]
        path, body = request("chat", stream=True)
        answer = await ask(near, "POST", path, headers, json.dumps(body).encode())
        entries = JournalDecoder().feed(await answer.read(1 << 20))
        assert entries[-1][0] == Broke("peer_gone", "the verifier is gone", "", 502, lost=True)


# llama-server: no token ids


def sse(*events: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + b"".join(events)


def delta(text: str, name: str = "chatcmpl-a") -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return b"data: " + json.dumps({"id": name, "created": 1, "choices": [choice]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


@pytest.fixture
async def server(inner):
    """Starts a llama-server by script: each connection is answered with the next bytes, then closed."""

    async def start(*answers: bytes) -> tuple[Local, list[bytes]]:
        left, requests = list(answers), []

        async def serve(stream: trio.SocketStream) -> None:
            data = b""
            while not data.endswith(b"}"):
                data += await stream.receive_some(65536)
            requests.append(data)
            await stream.send_all(left.pop(0))

        listeners = await inner.start(trio.serve_tcp, serve, 0)
        return Local(listeners[0].socket.getsockname()[1]), requests

    return start


CUT_OFF = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class TestLlamaServer:
    async def test_told_again(self, inner, server):
        first = CUT_OFF + chunk(delta("Hel")) + chunk(delta("lo"))
        again = sse(*(delta(t, "chatcmpl-b") for t in ("He", "llo", ", wor", "ld")), DONE)
        route, requests = await server(first, again)
        answer = await post(
            inner, App(FakeCluster(where=route), admin_key=lambda: "a"), CHAT, {"messages": HELLO, "stream": True}
        )
        events = [json.loads(p[6:]) for p in answer.text.split(b"\n\n") if p.startswith(b"data: {")]
        assert "".join(e["choices"][0]["delta"]["content"] for e in events) == "Hello, world"
        assert {e["id"] for e in events} == {"chatcmpl-a"}
        bodies = [json.loads(r.partition(b"\r\n\r\n")[2]) for r in requests]
        assert bodies[0] == bodies[1]
        assert bodies[0]["seed"] >= 0

    async def test_something_else_is_said(self, inner, server):
        route, _ = await server(CUT_OFF + chunk(delta("Hel")), sse(delta("Bye", "chatcmpl-b"), DONE))
        answer = await post(
            inner, App(FakeCluster(where=route), admin_key=lambda: "a"), CHAT, {"messages": HELLO, "stream": True}
        )
        first, error, rest = answer.text.split(b"\n\n")
        assert first + b"\n\n" == delta("Hel")
        assert json.loads(error[6:])["error"]["code"] == "answer_changed"
        assert rest == b""

    async def test_lost_behind_its_last_event(self, inner, server):
        route, requests = await server(CUT_OFF + chunk(delta("Hello")) + chunk(DONE))
        answer = await post(
            inner, App(FakeCluster(where=route), admin_key=lambda: "a"), CHAT, {"messages": HELLO, "stream": True}
        )
        assert answer.text == delta("Hello") + DONE
        assert len(requests) == 1

    async def test_through_the_mesh(self, inner, server):
        """The node that the client talks to tells it again; the one between cuts off what it cannot finish."""
        first = CUT_OFF + chunk(delta("Hel")) + chunk(delta("lo"))
        route, requests = await server(first, sse(delta("Hello, world", "chatcmpl-b"), DONE))
        rig = Rig(inner)
        rig.behind.where = route
        answer = await rig.post(CHAT, {"messages": HELLO, "stream": True})
        events = [json.loads(p[6:]) for p in answer.text.split(b"\n\n") if p.startswith(b"data: {")]
        assert [e["choices"][0]["delta"]["content"] for e in events] == ["Hel", "lo", ", world"]
        assert len(requests) == 2
        assert rig.services == ["http", "http"]

    @pytest.mark.parametrize("through_the_mesh", [False, True])
    async def test_a_verifier_goes_on_with_it(self, inner, server, through_the_mesh):
        text = "0123456789 and so on"
        route, _ = await server(CUT_OFF + b"".join(chunk(delta(t)) for t in text[:8]))
        verifier = Own(FakeGenerator(lambda asked: fake_chunks(text.encode(), 3)))
        rig = Rig(inner)
        cluster = rig.behind if through_the_mesh else rig.front
        cluster.where, cluster.routes = verifier, [route]
        answer = await rig.post(CHAT, {"messages": HELLO, "stream": True, "seed": 1})
        events = [json.loads(p[6:]) for p in answer.text.split(b"\n\n") if p.startswith(b"data: {")]
        assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == text
        assert {e["id"] for e in events} == {"chatcmpl-a"}
        assert answer.text.endswith(DONE)

    @pytest.mark.parametrize("through_the_mesh", [False, True])
    async def test_it_goes_on_with_a_verifier_s(self, inner, server, through_the_mesh):
        text = "0123456789 and so on"
        route, _ = await server(sse(*(delta(t, "chatcmpl-b") for t in text), DONE))
        chunks = fake_chunks(text.encode(), 3)
        verifier = Own(FakeGenerator(lambda asked: [*chunks[:4], GONE]))
        rig = Rig(inner)
        cluster = rig.behind if through_the_mesh else rig.front
        cluster.where, cluster.routes = route, [verifier]
        answer = await rig.post(CHAT, {"messages": HELLO, "stream": True, "seed": 1})
        events = [json.loads(p[6:]) for p in answer.text.split(b"\n\n") if p.startswith(b"data: {")]
        assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == text
        assert len({e["id"] for e in events}) == 1
        assert answer.text.endswith(DONE)


async def test_what_is_kept_is_bounded(inner, monkeypatch):
    """With no room for what was said the answer is given as before, and cannot go on."""
    monkeypatch.setattr(relay_module, "MAX_KEPT", 100)
    chunks = fake_chunks(b"x" * 200, 20)
    left: list[Callable[[Asked], Any]] = [lambda _: chunks, lambda _: [*chunks[:6], GONE]]
    generator = FakeGenerator(in_turn(left))
    app = App(FakeCluster(where=Own(generator)), admin_key=lambda: "admin")
    assert seen(await post(inner, app, TEXT, {"prompt": "x", "stream": True}))[-1] == "done"
    answer = await post(inner, app, TEXT, {"prompt": "x", "stream": True})
    assert b'"answer_lost"' in answer.text
    left[:] = [lambda _: [*chunks[:6], GONE], lambda _: chunks]
    whole = await post(inner, app, TEXT, {"prompt": "x"})
    assert len(json.loads(whole.text)["choices"][0]["text"]) == 200


async def test_memory_of_answers_comes_back(inner):
    rig = Rig(inner)
    await rig.post(*request("chat", stream=True))
    await trio.testing.wait_all_tasks_blocked()
    assert rig.app._relay._kept.left == relay_module.MAX_KEPT
