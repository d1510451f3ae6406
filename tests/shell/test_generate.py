"""Requests answered on a verifier: over HTTP, through the mesh, by the openai SDK; whatever the generator does."""

from __future__ import annotations

import json
import logging

import openai
import pytest
import trio
import trio.testing
from engine_fakes import until

from tightwad_agent.errors import ContextOverflow, EngineError, NotReady, PeerGone
from tightwad_agent.proxy.app import App
from tightwad_agent.proxy.client import Answer, ask
from tightwad_agent.proxy.cluster import Local, Own, Remote, Unavailable
from tightwad_agent.proxy.fakes import BOS, EOS, FakeCluster, FakeGenerator, fake_chunks, fake_info, fake_token
from tightwad_agent.proxy.heads import Peer
from tightwad_agent.proxy.http1 import serve_connection
from tightwad_agent.proxy.limits import Limits
from tightwad_agent.proxy.openai import ModelEntry
from tightwad_agent.proxy.parameters import BANNED
from tightwad_agent.proxy.ports import Chunk
from tightwad_agent.testing import MemoryMesh
from tightwad_agent.wire.verify import Ended

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def app_of(generator: FakeGenerator, **more) -> App:
    return App(FakeCluster(where=Own(generator)), admin_key=lambda: "admin", **more)


def says(text: bytes, size: int = 3, ended: Ended = Ended.EOG):
    return lambda asked: fake_chunks(text, size, ended, asked.n_probs)


def dial(nursery, app: App) -> trio.abc.Stream:
    near, far = trio.testing.memory_stream_pair()

    async def serve():
        await serve_connection(far, app.handle, Limits(), peer=Peer("127.0.0.1"))

    nursery.start_soon(serve)
    return near


async def post(nursery, app: App, path: str, **fields) -> Answer:
    """The answer, with its whole body as `answer.text`."""
    return await send(nursery, app, path, json.dumps(fields).encode())


async def send(nursery, app: App, path: str, body: bytes, method: str = "POST") -> Answer:
    stream = dial(nursery, app)
    answer = await ask(stream, method, path, [(b"content-type", b"application/json")], body)
    answer.text = await answer.read(100 << 20)
    await stream.aclose()
    return answer


def plain(answer: Answer):
    return json.loads(answer.text)


def events(answer: Answer) -> list[dict]:
    """Those of a stream that ended as it should."""
    assert answer.header(b"content-type") == b"text/event-stream"
    parts = answer.text.split(b"\n\n")
    assert parts[-2:] == [b"data: [DONE]", b""]
    return [json.loads(part.removeprefix(b"data: ")) for part in parts[:-2]]


def text_of(chunks: list[dict], index: int = 0) -> str:
    choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(c["delta"].get("content", "") for c in choices)


@pytest.fixture
async def inner():
    """A nursery that is cancelled at the end: servers run in it."""
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


class TestWhole:
    async def test_chat(self, inner):
        generator = FakeGenerator(says("Hé!".encode(), 1))
        answer = plain(await post(inner, app_of(generator), CHAT, messages=HELLO, model="demo"))
        assert answer["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hé!"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ]
        assert (answer["object"], answer["model"]) == ("chat.completion", "demo")
        n = len(generator.asked[0].prompt)
        assert answer["usage"] == {
            "prompt_tokens": n,
            "completion_tokens": 5,
            "total_tokens": n + 5,
            "prompt_tokens_details": {"cached_tokens": 1},
        }
        assert answer["timings"]["engine"] == "verifier"
        assert answer["timings"]["predicted_n"] == 5

    async def test_completion(self, inner):
        generator = FakeGenerator(says(b"abc", ended=Ended.LENGTH))
        answer = plain(await post(inner, app_of(generator), TEXT, prompt="Once", max_tokens=3))
        assert answer["object"] == "text_completion"
        assert [(c["text"], c["finish_reason"]) for c in answer["choices"]] == [("abc", "length")]
        assert generator.asked[0].prompt == (BOS, *b"Once")
        assert generator.asked[0].max_tokens == 3

    async def test_parameters_reach_the_generator(self, inner):
        generator = FakeGenerator()
        fields = {"temperature": 0, "top_k": 5, "seed": 9, "logit_bias": {"65": 2, "ab": False}, "ignore_eos": True}
        await post(inner, app_of(generator), CHAT, messages=HELLO, **fields)
        [asked] = generator.asked
        assert (asked.sampling.temperature, asked.sampling.top_k, asked.sampling.seed) == (0, 5, 9)
        assert dict(asked.sampling.logit_bias) == {65: 2.0, 97: BANNED, 98: BANNED, EOS: BANNED}
        assert asked.max_tokens == 4096 - len(asked.prompt)
        assert asked.n_probs == -1

    async def test_without_a_seed_answers_differ(self, inner):
        generator = FakeGenerator()
        for _ in range(3):
            await post(inner, app_of(generator), CHAT, messages=HELLO)
        assert len({asked.sampling.seed for asked in generator.asked}) == 3

    async def test_stop(self, inner):
        generator = FakeGenerator(says(b"one two three", 8))
        answer = plain(await post(inner, app_of(generator), CHAT, messages=HELLO, stop=["two"]))
        assert answer["choices"][0]["message"]["content"] == "one "
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 7
        assert generator.running == 0

    async def test_several_prompts_and_answers(self, inner):
        def script(asked):
            return fake_chunks(bytes(asked.prompt[1:]) + b"%d" % asked.sampling.seed, 2)

        generator = FakeGenerator(script)
        answer = plain(await post(inner, app_of(generator), TEXT, prompt=["a", "b"], n=2, seed=5, echo=True))
        assert [c["text"] for c in answer["choices"]] == ["aa5", "aa6", "bb7", "bb8"]
        assert answer["usage"]["prompt_tokens"] == 4
        assert answer["usage"]["completion_tokens"] == 12

    async def test_token_ids(self, inner):
        generator = FakeGenerator()
        await post(inner, app_of(generator), TEXT, prompt=[1, 2, 3])
        assert generator.asked[0].prompt == (1, 2, 3)

    async def test_logprobs(self, inner):
        app = app_of(FakeGenerator(says(b"ab")))
        chat = plain(await post(inner, app, CHAT, messages=HELLO, logprobs=True, top_logprobs=2))
        assert [t["token"] for t in chat["choices"][0]["logprobs"]["content"]] == ["a", "b"]
        assert len(chat["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2
        completion = plain(await post(inner, app, TEXT, prompt="x", logprobs=1))
        assert completion["choices"][0]["logprobs"]["text_offset"] == [0, 1]


class TestPrompts:
    TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"

    async def test_begins_once(self, inner):
        """A template that writes the beginning itself gets no second one."""
        generator = FakeGenerator(info=fake_info(chat_template=self.TEMPLATE))
        await post(inner, app_of(generator), CHAT, messages=HELLO)
        await post(inner, app_of(generator), TEXT, prompt="<s>Hello")
        generator.info = fake_info(chat_template=self.TEMPLATE.replace("{{ bos_token }}", ""))
        await post(inner, app_of(generator), CHAT, messages=HELLO)
        assert [asked.prompt for asked in generator.asked] == [(BOS, *b"Hello")] * 3

    async def test_a_model_that_wants_no_beginning(self, inner):
        generator = FakeGenerator(info=fake_info(adds_bos=False))
        await post(inner, app_of(generator), TEXT, prompt="Hi")
        assert generator.asked[0].prompt == tuple(b"Hi")
        answer = await post(inner, app_of(generator), TEXT, prompt="")
        assert (answer.status, plain(answer)["error"]["param"]) == (400, "prompt")

    async def test_empty_with_a_beginning(self, inner):
        generator = FakeGenerator()
        assert (await post(inner, app_of(generator), TEXT, prompt="")).status == 200
        assert generator.asked[0].prompt == (BOS,)

    async def test_the_answer_may_be_begun(self, inner):
        generator = FakeGenerator()
        said = [*HELLO, {"role": "assistant", "content": "Well"}]
        await post(inner, app_of(generator), CHAT, messages=said)
        assert bytes(generator.asked[0].prompt[1:]).endswith(b"<|im_start|>assistant\nWell")

    async def test_no_template_is_said_once(self, inner, caplog):
        app = app_of(FakeGenerator())
        for _ in range(3):
            await post(inner, app, CHAT, messages=HELLO)
        told = [r for r in caplog.records if r.levelno == logging.WARNING and "ChatML" in r.message]
        assert len(told) == 1

    async def test_a_new_model_brings_its_own_template(self, inner):
        generator = FakeGenerator(info=fake_info(chat_template="one"))
        app = app_of(generator)
        await post(inner, app, CHAT, messages=HELLO)
        generator.info = fake_info(chat_template="two")
        await post(inner, app, CHAT, messages=HELLO)
        assert [bytes(asked.prompt[1:]) for asked in generator.asked] == [b"one", b"two"]


class TestHelpers:
    async def test_tokenize(self, inner):
        app = app_of(FakeGenerator())
        assert plain(await post(inner, app, "/tokenize", content="Hi</s>")) == {"tokens": [72, 105, EOS]}
        assert plain(await post(inner, app, "/tokenize", content="H", add_special=True)) == {"tokens": [BOS, 72]}
        assert plain(await post(inner, app, "/tokenize", content=["a", 7, "b"], add_special=True))["tokens"] == [
            BOS,
            97,
            7,
            98,
        ]
        pieces = plain(await post(inner, app, "/tokenize", content="aé", with_pieces=True))["tokens"]
        assert pieces == [{"id": 97, "piece": "a"}, {"id": 0xC3, "piece": [0xC3]}, {"id": 0xA9, "piece": [0xA9]}]

    async def test_detokenize(self, inner):
        app = app_of(FakeGenerator())
        assert plain(await post(inner, app, "/detokenize", tokens=[72, 105])) == {"content": "Hi"}
        assert plain(await post(inner, app, "/detokenize", tokens=[])) == {"content": ""}
        answer = await post(inner, app, "/detokenize", tokens=[9999])
        assert (answer.status, plain(answer)["error"]["param"]) == (400, "tokens")

    async def test_apply_template(self, inner):
        app = app_of(FakeGenerator(info=fake_info(chat_template="{{ messages[0].content }}!")))
        assert plain(await post(inner, app, "/apply-template", messages=HELLO)) == {"prompt": "Hello!"}


REFUSED = [
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_object", "schema": {"not": {}}}}, "response_format"),
    (CHAT, {"messages": HELLO, "logit_bias": {"9999": 1}}, "logit_bias"),
    (CHAT, {"messages": HELLO, "temperature": "hot"}, "temperature"),
    (CHAT, {"messages": HELLO, "reasoning_effort": "high"}, "reasoning_effort"),
    (CHAT, {}, "messages"),
    (TEXT, {"prompt": [300]}, "prompt"),
    (TEXT, {"prompt": ["a"] * 9, "n": 8}, "n"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix"),
    ("/tokenize", {"content": [1 << 40], "with_pieces": True}, "content"),
]


class TestRefusals:
    @pytest.mark.parametrize(("path", "fields", "param"), REFUSED)
    async def test_names_the_field(self, inner, path, fields, param):
        generator = FakeGenerator()
        answer = await post(inner, app_of(generator), path, **fields)
        error = plain(answer)["error"]
        assert (answer.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
        assert generator.asked == []

    async def test_says_what_would_serve_it(self, inner):
        answer = await post(inner, app_of(FakeGenerator()), CHAT, messages=HELLO, tools=[{}])
        assert "tightwad-agent serve MODEL --engine llama-server" in plain(answer)["error"]["message"]

    @pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank", "/v1/responses", "/v1/messages", "/infill"])
    async def test_paths_of_llama_server(self, inner, path):
        answer = await send(inner, app_of(FakeGenerator()), path, b"{}")
        assert answer.status == 404
        assert "--engine llama-server" in plain(answer)["error"]["message"]

    async def test_a_prompt_beyond_the_context(self, inner):
        app = app_of(FakeGenerator(info=fake_info(context=5)))
        for stream in (False, True):
            answer = await post(inner, app, TEXT, prompt="Hello", stream=stream)
            assert (answer.status, plain(answer)["error"]["code"]) == (400, "context_length_exceeded")

    async def test_bounds_of_what_the_verifier_is_told(self, inner, monkeypatch):
        monkeypatch.setattr("tightwad_agent.proxy.generate.MAX_WIRE_BIASES", 3)
        monkeypatch.setattr("tightwad_agent.proxy.generate.MAX_PIECES", 3)
        app = app_of(FakeGenerator())
        for path, fields, param in [
            (TEXT, {"prompt": "x", "logit_bias": {"abcd": 1}}, "logit_bias"),
            ("/tokenize", {"content": "abcd", "with_pieces": True}, "with_pieces"),
        ]:
            answer = await post(inner, app, path, **fields)
            assert (answer.status, plain(answer)["error"]["param"]) == (400, param)

    async def test_a_body_that_is_too_large(self, inner):
        body = b'{"prompt": "' + b"a" * (8 << 20) + b'"}'
        answer = await send(inner, app_of(FakeGenerator()), TEXT, body)
        assert (answer.status, plain(answer)["error"]["code"]) == (413, "request_too_large")

    async def test_a_large_body_is_answered(self, inner):
        generator = FakeGenerator(info=fake_info(context=1 << 20))
        assert (await post(inner, app_of(generator), TEXT, prompt="a" * 100_000)).status == 200
        assert len(generator.asked[0].prompt) == 100_001

    async def test_a_harmful_template_takes_nobody_with_it(self, inner):
        """While it is rendered others are answered; then its own request is refused."""
        forever = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
        app = app_of(FakeGenerator(info=fake_info(chat_template=forever)))
        answers = []

        async def chat():
            answers.append(await post(inner, app, CHAT, messages=HELLO))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(chat)
            assert (await post(inner, app, TEXT, prompt="x")).status == 200
            assert not answers
        assert (answers[0].status, plain(answers[0])["error"]["code"]) == (400, "bad_chat_template")

    @pytest.mark.parametrize("error", [ContextOverflow("too long"), EngineError("broken")])
    async def test_errors_of_the_generator(self, inner, error):
        for stream in (False, True):
            answer = await post(inner, app_of(FakeGenerator(lambda _: [error])), CHAT, messages=HELLO, stream=stream)
            assert (answer.status, plain(answer)["error"]["message"]) == (error.http_status, error.message)


class TestStream:
    async def test_chat(self, inner):
        generator = FakeGenerator(says("Hello, wörld".encode(), 4))
        chunks = events(await post(inner, app_of(generator), CHAT, messages=HELLO, stream=True))
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert text_of(chunks) == "Hello, wörld"
        assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
        assert len(chunks) == 6  # the role, one for each round (three and the end's two bytes), the end
        assert chunks[-1]["timings"]["predicted_n"] == 14
        assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1

    async def test_usage_if_asked(self, inner):
        app = app_of(FakeGenerator(says(b"abc")))
        options = {"include_usage": True}
        chunks = events(await post(inner, app, CHAT, messages=HELLO, stream=True, stream_options=options))
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["completion_tokens"] == 4
        assert all("usage" not in chunk for chunk in chunks[:-1])

    @pytest.mark.parametrize("size", [1, 2, 5, 100])
    async def test_the_same_text_as_whole(self, inner, size):
        text = "Größe: 5 € 😀 then STO no ST".encode() + b"\xf0\x9f"
        generator = FakeGenerator(says(text, size))
        fields = {"messages": HELLO, "stop": ["STOP", "ST\n"], "logprobs": True}
        chunks = events(await post(inner, app_of(generator), CHAT, **fields, stream=True))
        whole = plain(await post(inner, app_of(generator), CHAT, **fields))
        assert text_of(chunks) == whole["choices"][0]["message"]["content"] == text.decode("utf-8", "replace")
        streamed = [t for c in chunks for t in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
        assert streamed == whole["choices"][0]["logprobs"]["content"]

    async def test_a_stop_string_is_not_shown_in_part(self, inner):
        generator = FakeGenerator(says(b"one STOP two", 1))
        chunks = events(await post(inner, app_of(generator), CHAT, messages=HELLO, stream=True, stop="STOP"))
        assert text_of(chunks) == "one "
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"

    async def test_completion(self, inner):
        generator = FakeGenerator(says(b"abcd", 2, Ended.LENGTH))
        answer = await post(inner, app_of(generator), TEXT, prompt="x", stream=True, echo=True, logprobs=None)
        chunks = events(answer)
        assert [c["choices"][0]["text"] for c in chunks] == ["xab", "cd", ""]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"

    async def test_several_at_once(self, inner):
        def script(asked):
            return [0.001 * (3 - asked.sampling.seed), *fake_chunks(b"answer %d" % asked.sampling.seed, 2)]

        generator = FakeGenerator(script)
        chunks = events(await post(inner, app_of(generator), CHAT, messages=HELLO, stream=True, n=3, seed=1))
        assert [text_of(chunks, i) for i in range(3)] == ["answer 1", "answer 2", "answer 3"]
        assert sum(c["choices"][0]["finish_reason"] == "stop" for c in chunks) == 3
        roles = [c["choices"][0]["index"] for c in chunks[:3] if c["choices"][0]["delta"].get("role") == "assistant"]
        assert roles == [0, 1, 2]  # whichever brings its first token first

    async def test_timings_per_token(self, inner):
        app = app_of(FakeGenerator(says(b"abcd", 2)))
        chunks = events(await post(inner, app, CHAT, messages=HELLO, stream=True, timings_per_token=True))
        assert [c["timings"]["predicted_n"] for c in chunks if "timings" in c] == [2, 4, 5]

    async def test_events_are_not_held_back(self, inner):
        go = trio.Event()
        first, second = fake_chunks(b"ab", 1, Ended.LENGTH)
        stream = dial(inner, app_of(FakeGenerator(lambda _: [first, go, second])))
        answer = await ask(stream, "POST", CHAT, [], json.dumps({"messages": HELLO, "stream": True}).encode())
        data = b""
        with trio.fail_after(5):
            while b'"content":"a"' not in data:
                data += await answer.receive()
        go.set()
        assert (await answer.read(10_000)).endswith(b"data: [DONE]\n\n")

    async def test_a_silent_stream_is_kept_alive(self, nursery, autojump_clock):
        generator = FakeGenerator(lambda _: [40.0, *fake_chunks(b"a", 1)])
        answer = await post(nursery, app_of(generator), CHAT, messages=HELLO, stream=True)
        assert answer.text.startswith(b":\n\n:\n\ndata: ")
        assert answer.text.count(b":\n\n") == 2
        never = await post(nursery, app_of(generator), CHAT, messages=HELLO, stream=True, sse_ping_interval=-1)
        assert never.text.startswith(b"data: ")

    async def test_an_answer_without_an_end_is_an_error(self, inner):
        app = app_of(FakeGenerator(lambda _: [Chunk((fake_token(65),))]), hold_s=0)
        assert (await post(inner, app, CHAT, messages=HELLO)).status == 503


def once(*scripts):
    """A script for each start; the last is repeated."""
    left = list(scripts)

    def script(asked):
        now = left.pop(0) if len(left) > 1 else left[0]
        return now(asked)

    return script


GONE = PeerGone("the verifier is gone")


class TestLost:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_before_anything_was_sent_it_is_sent_again(self, inner, stream):
        generator = FakeGenerator(once(lambda _: [GONE], says(b"ok")))
        answer = await post(inner, app_of(generator), CHAT, messages=HELLO, stream=stream)
        assert answer.status == 200
        assert b"ok" in answer.text
        assert len(generator.asked) == 2

    async def test_a_whole_answer_is_sent_again_until_it_is_complete(self, inner):
        chunks = fake_chunks(b"abcdef", 2)
        generator = FakeGenerator(once(lambda _: [*chunks[:2], GONE], lambda _: chunks))
        assert plain(await post(inner, app_of(generator), TEXT, prompt="x"))["choices"][0]["text"] == "abcdef"

    async def test_over_whatever_serves_then(self, inner):
        """The verifier dies, the pool is down for a moment, another verifier takes over."""
        old, new = FakeGenerator(lambda _: [GONE]), FakeGenerator(says(b"new"))
        down = Unavailable("the pool is being restarted", {"state": "restarting"}, 3, hold=True)
        cluster = FakeCluster(where=Own(new), routes=[Own(old), down])
        app = App(cluster, admin_key=lambda: "admin")
        assert b"new" in (await post(inner, app, CHAT, messages=HELLO)).text
        assert cluster.in_flight == 0

    async def test_not_for_ever(self, inner):
        generator = FakeGenerator(lambda _: [GONE])
        answer = await post(inner, app_of(generator), CHAT, messages=HELLO)
        assert (answer.status, len(generator.asked)) == (503, 4)
        assert answer.header(b"retry-after")

    async def test_the_tokenizer_may_be_what_is_lost(self, inner):
        generator = FakeGenerator(fails=GONE)
        assert (await post(inner, app_of(generator), "/tokenize", content="x")).status == 503

    async def test_a_stream_that_brings_its_verifiers_down_ends_with_an_error(self, inner):
        chunks = fake_chunks(b"abcdef", 2)
        generator = FakeGenerator(lambda _: [*chunks[:2], GONE])
        answer = await post(inner, app_of(generator), CHAT, messages=HELLO, stream=True)
        *before, last, empty = answer.text.split(b"\n\n")
        assert empty == b""
        assert text_of([json.loads(part.removeprefix(b"data: ")) for part in before]) == "abcd"
        error = json.loads(last.removeprefix(b"data: "))["error"]
        assert error["code"] == "answer_lost"
        assert "the verifier is gone" in error["message"]
        assert len(generator.asked) == 4

    async def test_one_of_several_answers(self, inner):
        go = trio.Event()

        def script(asked):
            return [*fake_chunks(b"ab", 1)[:1], go, GONE] if asked.sampling.seed == 1 else [go, 3600.0]

        generator = FakeGenerator(script)
        stream = dial(inner, app_of(generator))
        body = json.dumps({"messages": HELLO, "stream": True, "n": 3, "seed": 0}).encode()
        answer = await ask(stream, "POST", CHAT, [], body)
        go.set()
        with trio.fail_after(5):
            rest = await answer.read(10_000)
        assert json.loads(rest.split(b"\n\n")[-2].removeprefix(b"data: "))["error"]["code"] == "answer_lost"
        assert generator.running == 0

    async def test_a_verifier_without_room_is_asked_again(self, nursery, autojump_clock):
        generator = FakeGenerator(once(lambda _: [NotReady("all slots are taken")], says(b"ok")))
        assert b"ok" in (await post(nursery, app_of(generator), CHAT, messages=HELLO)).text
        full = FakeGenerator(lambda _: [NotReady("all slots are taken")])
        answer = await post(nursery, app_of(full), CHAT, messages=HELLO)
        assert answer.status == 503
        assert "all slots are taken" in plain(answer)["error"]["message"]


async def leaves(inner, app: App, cluster: FakeCluster, body: dict) -> None:
    """A client that leaves while the next chunk is far away."""
    generator = cluster.where.generator
    stream = dial(inner, app)

    async def go():
        try:
            answer = await ask(stream, "POST", CHAT, [], json.dumps({"messages": HELLO, **body}).encode())
            while True:
                await answer.receive()
        except PeerGone:
            pass

    async with trio.open_nursery() as client:
        client.start_soon(go)
        await generator.started.wait()
        await until(lambda: (generator.running, cluster.in_flight) == (body.get("n", 1), 1))
        await stream.aclose()
        await until(lambda: not generator.running)


LEAVING = {
    "whole, before the first chunk": ({}, 0),
    "whole, between chunks": ({}, 1),
    "streaming, before the first chunk": ({"stream": True}, 0),
    "streaming, between chunks": ({"stream": True}, 1),
    "several answers": ({"stream": True, "n": 3}, 1),
}


class TestLeaving:
    @pytest.mark.parametrize("case", LEAVING)
    @pytest.mark.parametrize("through_the_mesh", [False, True])
    async def test_ends_the_generation(self, inner, case, through_the_mesh):
        body, n = LEAVING[case]
        generator = FakeGenerator(lambda _: [*fake_chunks(b"abc", 1)[:n], 3600.0])
        cluster = FakeCluster(where=Own(generator))
        front = wire(inner, cluster) if through_the_mesh else cluster
        await leaves(inner, App(front, admin_key=lambda: "admin"), cluster, body)
        await until(lambda: cluster.in_flight == 0)

    async def test_a_client_that_reads_nothing(self, nursery, autojump_clock):
        """What is not taken for long is not generated for ever."""
        near, far = trio.testing.lockstep_stream_pair()
        generator = FakeGenerator(lambda _: (c for _ in range(10**9) for c in fake_chunks(b"abc", 3, Ended.NOT)))
        app = app_of(generator)
        nursery.start_soon(lambda: serve_connection(far, app.handle, Limits(), peer=Peer("127.0.0.1")))
        body = json.dumps({"messages": HELLO, "stream": True}).encode()
        await near.send_all(
            b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(body))
        )
        await near.send_all(body)
        await generator.started.wait()
        await trio.sleep(Limits().send_s + 1)
        assert generator.running == 0


def wire(nursery, coordinator: FakeCluster) -> FakeCluster:
    """A node whose requests go to `coordinator` over a mesh in memory."""
    mesh = MemoryMesh(nursery)
    edge, other = mesh.add("edge"), mesh.add("coordinator")
    other.streams["http"] = App(coordinator, admin_key=lambda: "admin").handle_mesh
    return FakeCluster(where=Remote(other.node), opener=edge.open_stream)


class TestForwarding:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_there_and_back(self, inner, stream):
        cluster = FakeCluster(where=Own(FakeGenerator(says(b"Hello"))))
        app = App(wire(inner, cluster), admin_key=lambda: "admin")
        answer = await post(inner, app, CHAT, messages=HELLO, stream=stream)
        assert (text_of(events(answer)) if stream else plain(answer)["choices"][0]["message"]["content"]) == "Hello"

    async def test_refusals_come_through(self, inner):
        app = App(wire(inner, FakeCluster(where=Own(FakeGenerator()))), admin_key=lambda: "admin")
        answer = await post(inner, app, CHAT, messages=HELLO, tools=[{}])
        assert (answer.status, plain(answer)["error"]["param"]) == (400, "tools")

    @pytest.mark.parametrize("method", ["GET", "DELETE"])
    async def test_only_posts(self, inner, method):
        near, far = trio.testing.memory_stream_pair()
        app = App(FakeCluster(where=Own(FakeGenerator())), admin_key=lambda: "admin")
        inner.start_soon(app.handle_mesh, MemoryMesh(inner).add("someone").node, far, {})
        answer = await ask(near, method, CHAT, [(b"x-tightwad-hop", b"1")])
        assert (answer.status, answer.header(b"allow")) == (405, b"POST")


class Sdk:
    """The openai SDK against an app on a socket."""

    def __init__(self, port: int) -> None:
        self._client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0)

    async def run(self, work):
        return await trio.to_thread.run_sync(work, self._client)


@pytest.fixture
async def sdk(inner):
    """Connects to an app over the given generator."""
    clients = []

    async def connect(generator: FakeGenerator) -> Sdk:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        cluster = FakeCluster(where=Own(generator), entries=[ModelEntry("ab" * 32, "demo.gguf", served=True)])
        await inner.start(App(cluster, admin_key=lambda: "admin").serve, listeners)
        clients.append(Sdk(listeners[0].socket.getsockname()[1]))
        return clients[-1]

    yield connect
    for client in clients:
        client._client.close()


class TestSdk:
    async def test_chat(self, sdk):
        client = await sdk(FakeGenerator(says("Grüße".encode(), 2)))
        answer = await client.run(lambda c: c.chat.completions.create(model="demo", messages=HELLO, user="me", seed=1))
        assert answer.choices[0].message.content == "Grüße"
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
        assert answer.timings["engine"] == "verifier"

    async def test_chat_stream_with_logprobs_and_usage(self, sdk):
        client = await sdk(FakeGenerator(says("Grüße".encode(), 2)))

        def work(c):
            options = {"include_usage": True}
            stream = c.chat.completions.create(
                model="demo", messages=HELLO, stream=True, stream_options=options, logprobs=True, top_logprobs=3
            )
            return list(stream)

        chunks = await client.run(work)
        assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Grüße"
        tokens = [t for c in chunks[:-1] if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
        assert b"".join(bytes(t.bytes) for t in tokens) == "Grüße".encode()
        assert all(len(t.top_logprobs) == 3 for t in tokens)
        assert chunks[-1].usage.completion_tokens == 8

    async def test_three_answers(self, sdk):
        client = await sdk(FakeGenerator(lambda asked: fake_chunks(b"%d" % asked.sampling.seed, 1)))
        answer = await client.run(lambda c: c.chat.completions.create(model="demo", messages=HELLO, n=3, seed=7))
        assert [c.message.content for c in answer.choices] == ["7", "8", "9"]

    async def test_accumulated_by_the_sdk(self, sdk):
        """Its own reader of streams puts the answers together."""
        late = [0.01, 0.0]
        client = await sdk(
            FakeGenerator(lambda asked: [late.pop(), *fake_chunks(b"answer %d" % asked.sampling.seed, 3)])
        )

        def work(c):
            with c.chat.completions.stream(model="demo", messages=HELLO, n=2, seed=1) as stream:
                stream.until_done()
                return stream.get_final_completion()

        answer = await client.run(work)
        assert sorted(c.message.content for c in answer.choices) == ["answer 1", "answer 2"]

    async def test_completion(self, sdk):
        client = await sdk(FakeGenerator(says(b"abc")))
        answer = await client.run(lambda c: c.completions.create(model="demo", prompt="x", logprobs=2, stop="c"))
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "stop")
        assert answer.choices[0].logprobs.tokens == ["a", "b"]
        stream = await client.run(lambda c: list(c.completions.create(model="demo", prompt="x", stream=True)))
        assert "".join(c.choices[0].text for c in stream) == "abc"

    async def test_errors(self, sdk):
        client = await sdk(FakeGenerator())
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        with pytest.raises(openai.BadRequestError) as caught:
            await client.run(lambda c: c.chat.completions.create(model="demo", messages=HELLO, tools=tools))
        assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")
        with pytest.raises(openai.NotFoundError) as missing:
            await client.run(lambda c: c.embeddings.create(model="demo", input="x"))
        assert "--engine llama-server" in str(missing.value)

    async def test_an_error_inside_a_stream(self, sdk):
        chunks = fake_chunks(b"abc", 1)
        client = await sdk(FakeGenerator(lambda _: [chunks[0], GONE]))
        with pytest.raises(openai.APIError, match="the verifier is gone"):
            await client.run(lambda c: list(c.chat.completions.create(model="demo", messages=HELLO, stream=True)))


async def test_other_routes_are_as_before(inner):
    """A verifier's route is one of several; health says ready for it."""
    app = app_of(FakeGenerator())
    assert plain(await send(inner, app, "/health", b"", "GET")) == {"status": "ok"}
    assert Own(FakeGenerator()) != Local(1)
