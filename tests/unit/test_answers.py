"""Answers in OpenAI's forms, read back by the types of its SDK."""

from __future__ import annotations

import json

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tightwad_agent.proxy.answers import (
    DONE,
    NEVER,
    Events,
    Heading,
    Usage,
    chat_logprobs,
    choice_object,
    completion_logprobs,
    sum_timings,
    timings_object,
    usage_object,
    whole_body,
)
from tightwad_agent.proxy.fakes import fake_token
from tightwad_agent.proxy.ports import Timings, Token
from tightwad_agent.wire.verify import Probability, TokenProbabilities

CHAT = Heading("chatcmpl-1", 1700, "demo", True, "tightwad-1")
TEXT = Heading("cmpl-1", 1700, "demo", False, "tightwad-1")
SPENT = Timings(
    n_prompt=10,
    n_cached=4,
    n_generated=9,
    prompt_ms=12.0,
    generate_ms=180.0,
    rounds=4,
    drafted=10,
    accepted=5,
    tried_at=[4, 3, 3],
    accepted_at=[3, 2, 0],
    verify_ms=100.0,
    draft_ms=40.0,
    waited_ms=10.0,
    drafters={"box": 8, "n-gram": 2},
)


def event(data: bytes):
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    assert data.count(b"\n") == 2
    return json.loads(data[6:])


class TestTimings:
    def test_names_of_llama_server_and_ours(self):
        assert timings_object(SPENT) == {
            "cache_n": 4,
            "prompt_n": 6,
            "prompt_ms": 12.0,
            "prompt_per_token_ms": 2.0,
            "prompt_per_second": 500.0,
            "predicted_n": 9,
            "predicted_ms": 180.0,
            "predicted_per_token_ms": 20.0,
            "predicted_per_second": 50.0,
            "draft_n": 10,
            "draft_n_accepted": 5,
            "engine": "verifier",
            "rounds": 4,
            "drafted": 10,
            "accepted": 5,
            "tried_at": [4, 3, 3],
            "accepted_at": [3, 2, 0],
            "acceptance": 0.5,
            "acceptance_by_position": [0.75, 0.6667, 0.0],
            "tokens_per_round": 2.25,
            "draft_ms": 40.0,
            "verify_ms": 100.0,
            "hidden_share": 0.75,
            "drafters": {"box": 8, "n-gram": 2},
        }

    def test_nothing_is_divided_by_nothing(self):
        empty = timings_object(Timings())
        assert empty["predicted_per_second"] is None
        assert empty["hidden_share"] is None
        assert "draft_n" not in empty

    def test_sum(self):
        both = sum_timings([SPENT, Timings(n_prompt=1, tried_at=[1], accepted_at=[1], drafters={"box": 1})])
        assert (both.n_prompt, both.rounds, both.verify_ms) == (11, 4, 100.0)
        assert (both.tried_at, both.accepted_at, both.drafters) == ([5, 3, 3], [4, 2, 0], {"box": 9, "n-gram": 2})
        assert sum_timings([SPENT]) == SPENT


def test_usage():
    assert usage_object([Usage(10, 5, 4), Usage(0, 7)]) == {
        "prompt_tokens": 10,
        "completion_tokens": 12,
        "total_tokens": 22,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


class TestLogprobs:
    def test_chat(self):
        [one] = chat_logprobs([fake_token(65, n_probs=2)])["content"]
        assert one == {
            "id": 65,
            "token": "A",
            "logprob": -0.5,
            "bytes": [65],
            "top_logprobs": [
                {"id": 65, "token": "A", "logprob": -0.5, "bytes": [65]},
                {"id": 66, "token": "B", "logprob": -1.5, "bytes": [66]},
            ],
        }

    def test_completion(self):
        tokens = [fake_token(t, n_probs=1) for t in (65, 195, 66)] + [fake_token(67)]
        made = completion_logprobs(tokens, 7)
        assert made["tokens"] == ["A", "bytes:\\xc3", "B"]
        assert made["token_logprobs"] == [-0.5] * 3
        assert made["top_logprobs"][1] == {"bytes:\\xc3": -0.5}
        assert made["text_offset"] == [7, 8, 8]
        cut = [fake_token(t, n_probs=0) for t in (*"é".encode(), 65)]
        assert completion_logprobs(cut, 0)["text_offset"] == [0, 0, 1]

    @pytest.mark.parametrize("logprob", [float("-inf"), float("nan"), -1e30])
    def test_what_json_cannot_say(self, logprob):
        token = Token(1, b"a", TokenProbabilities(Probability(1, logprob)))
        assert chat_logprobs([token])["content"][0]["logprob"] == NEVER


class TestWhole:
    def test_chat(self):
        logprobs = chat_logprobs([fake_token(65, n_probs=1)])
        choices = [choice_object(i, "Aé\u2028", "stop", logprobs, chat=True) for i in range(2)]
        answer = ChatCompletion.model_validate_json(whole_body(CHAT, choices, [Usage(3, 2)], SPENT), strict=True)
        assert [c.message.content for c in answer.choices] == ["Aé\u2028"] * 2
        assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "A"
        assert answer.usage.total_tokens == 5
        assert answer.timings["engine"] == "verifier"

    def test_completion(self):
        logprobs = completion_logprobs([fake_token(65, n_probs=1)], 0)
        body = whole_body(TEXT, [choice_object(0, "A", "length", logprobs, chat=False)], [Usage(3, 2)], SPENT)
        answer = Completion.model_validate_json(body, strict=True)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("A", "length")
        assert answer.choices[0].logprobs.text_offset == [0]


class TestStream:
    def test_chat(self):
        events = Events(CHAT)
        parts = [
            events.role(1),
            events.text(1, 'a"\n😀'),
            events.text(1, "b", chat_logprobs([fake_token(66, n_probs=0)]), SPENT),
            events.finish(1, "stop", SPENT),
        ]
        chunks = [ChatCompletionChunk.model_validate_json(json.dumps(event(p)), strict=True) for p in parts]
        assert [c.choices[0].index for c in chunks] == [1] * 4
        assert [c.choices[0].delta.content for c in chunks] == ["", 'a"\n😀', "b", None]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[2].choices[0].logprobs.content[0].token == "B"
        assert [c.choices[0].finish_reason for c in chunks] == [None, None, None, "stop"]
        assert chunks[3].timings == chunks[2].timings == timings_object(SPENT)
        last = ChatCompletionChunk.model_validate_json(json.dumps(event(events.usage([Usage(1, 2)], SPENT))))
        assert (last.choices, last.usage.total_tokens) == ([], 3)

    def test_completion(self):
        events = Events(TEXT)
        assert events.role(0) == b""
        chunk = event(events.text(0, "x"))
        assert chunk["choices"] == [{"index": 0, "text": "x", "logprobs": None, "finish_reason": None}]
        assert chunk["object"] == "text_completion"
        assert event(events.finish(0, "length", SPENT))["choices"] == [
            {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
        ]

    def test_a_percent_sign_is_text(self):
        """A model's name goes into what every event begins with."""
        events = Events(Heading("id", 1, "50%s", True, "f"))
        assert event(events.text(0, "%d"))["model"] == "50%s"

    def test_the_end(self):
        assert DONE == b"data: [DONE]\n\n"
