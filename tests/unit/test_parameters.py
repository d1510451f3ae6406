"""Every field of a request: what it becomes, what it may be, and which are refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent.errors import TightwadError, Unsupported, UsageError
from tightwad_agent.proxy.fields import BadField, parse_object
from tightwad_agent.proxy.helper_requests import check_text, check_tokens, detokenize_request, tokenize_request
from tightwad_agent.proxy.parameters import (
    BANNED,
    MAX_CHOICES,
    MAX_STOP_CHARS,
    Ask,
    chat_request,
    completion_request,
    seed_of,
)
from tightwad_agent.wire.verify import Sampling

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields):
    return chat_request({"messages": HELLO, **fields})


def completion(**fields):
    return completion_request({"prompt": "Once", **fields})


def sampled(**fields) -> Sampling:
    return chat(**fields).ask.sampling


def refusal(kind, read, body) -> str:
    """The name of the field that is refused."""
    with pytest.raises(kind) as caught:
        read(body)
    assert f"`{caught.value.param}" in caught.value.message
    return caught.value.param


class TestDefaults:
    def test_are_those_of_llama_server(self):
        assert chat().ask == completion().ask == Ask(Sampling())
        assert Sampling() == Sampling(
            temperature=0.8,
            top_k=40,
            top_p=0.95,
            min_p=0.05,
            repeat_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repeat_last_n=64,
        )

    def test_null_is_the_same_as_nothing(self):
        names = ["temperature", "stop", "n", "seed", "tools", "logit_bias", "stream_options", "logprobs", "nonsense"]
        assert chat(**dict.fromkeys(names)) == chat()


READ = [
    ("temperature", 0, "temperature", 0.0),
    ("temperature", 1.5, "temperature", 1.5),
    ("top_p", 0.5, "top_p", 0.5),
    ("top_k", 7, "top_k", 7),
    ("top_k", 7.0, "top_k", 7),
    ("top_k", -1, "top_k", 0),
    ("min_p", 0, "min_p", 0.0),
    ("repeat_penalty", 1.1, "repeat_penalty", 1.1),
    ("presence_penalty", -2, "presence_penalty", -2.0),
    ("frequency_penalty", 2, "frequency_penalty", 2.0),
    ("repeat_last_n", -1, "repeat_last_n", -1),
]


@pytest.mark.parametrize(("name", "value", "attribute", "becomes"), READ)
def test_sampling(name, value, attribute, becomes):
    assert getattr(sampled(**{name: value}), attribute) == becomes
    assert getattr(completion(**{name: value}).ask.sampling, attribute) == becomes


ASKED = [
    ({"max_tokens": 5}, "max_tokens", 5),
    ({"max_completion_tokens": 5}, "max_tokens", 5),
    ({"n_predict": 5, "max_tokens": 5}, "max_tokens", 5),
    ({"max_tokens": -1}, "max_tokens", None),
    ({"seed": 42}, "seed", 42),
    ({"seed": -1}, "seed", None),
    ({"seed": -7}, "seed", -7),
    ({"seed": (1 << 63) + 1}, "seed", (1 << 63) + 1),
    ({"stop": "x"}, "stop", ("x",)),
    ({"stop": ["x", "y", "x", ""]}, "stop", ("x", "y")),
    ({"stop": []}, "stop", ()),
    ({"n": 8}, "n", 8),
    ({"n_cmpl": 2}, "n", 2),
    ({"n": 2, "best_of": 2}, "n", 2),
    ({"logit_bias": {"5": -100}}, "bias", ((5, -100.0),)),
    ({"logit_bias": [[5, False], [" the", 1]]}, "bias", ((5, BANNED), (" the", 1.0))),
    ({"logit_bias": {"the": 1, "５": 2}}, "bias", (("the", 1.0), ("５", 2.0))),
    ({"ignore_eos": True}, "ignore_eos", True),
    ({"stream": True}, "stream", True),
    ({"stream_options": {"include_usage": True}}, "include_usage", True),
    ({"stream_options": {"include_obfuscation": False}}, "include_usage", False),
    ({"timings_per_token": True}, "timings_per_token", True),
    ({"speculation": False}, "speculation", False),
    ({"sse_ping_interval": 5}, "ping_s", 5.0),
    ({"sse_ping_interval": -1}, "ping_s", 0.0),
    ({"n_probs": 3}, "n_probs", 3),
    ({"n_probs": 0}, "n_probs", -1),
]


@pytest.mark.parametrize(("fields", "attribute", "becomes"), ASKED)
def test_asked(fields, attribute, becomes):
    assert getattr(chat(**fields).ask, attribute) == becomes
    assert getattr(completion(**fields).ask, attribute) == becomes


@pytest.mark.parametrize(
    ("fields", "n_probs"),
    [
        ({}, -1),
        ({"logprobs": False}, -1),
        ({"logprobs": False, "top_logprobs": 0}, -1),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
        ({"logprobs": True, "n_probs": 4}, 4),
    ],
)
def test_chat_logprobs(fields, n_probs):
    assert chat(**fields).ask.n_probs == n_probs


def test_completion_logprobs():
    assert completion(logprobs=0).ask.n_probs == 0
    assert completion(logprobs=5).ask.n_probs == 5


BAD = [
    ("temperature", -0.1),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", 1e400),
    ("temperature", 10**400),
    ("top_p", 1.1),
    ("min_p", -1),
    ("top_k", 1.5),
    ("top_k", 10**30),
    ("repeat_penalty", 0),
    ("presence_penalty", 1e9),
    ("frequency_penalty", []),
    ("repeat_last_n", -2),
    ("max_tokens", 0),
    ("max_tokens", -2),
    ("max_tokens", "5"),
    ("max_completion_tokens", 1.5),
    ("n_predict", 1 << 40),
    ("seed", 1 << 64),
    ("seed", "one"),
    ("stop", 5),
    ("stop", ["a", 5]),
    ("stop", ["a"] * 17),
    ("stop", "a" * (MAX_STOP_CHARS + 1)),
    ("n", 0),
    ("n", 9),
    ("stream", "yes"),
    ("stream_options", []),
    ("stream_options", {"include_usage": 1}),
    ("logit_bias", 5),
    ("logit_bias", {"5": "x"}),
    ("logit_bias", {"5": 1e300}),
    ("logit_bias", {"": 1}),
    ("logit_bias", {"5": True}),
    ("logit_bias", [[5]]),
    ("logit_bias", [[None, 1]]),
    ("logit_bias", {str(i): 1 for i in range(3000)}),
    ("ignore_eos", 1),
    ("sse_ping_interval", "x"),
    ("n_probs", 21),
    ("timings_per_token", 1),
    ("speculation", "off"),
    ("response_format", "json"),
    ("response_format", {"type": "xml"}),
    ("response_format", {"type": ["text"]}),
    ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}),
    ("response_format", {"type": "json_object", "schema": {}, "json_schema": {"schema": {}}}),
]


@pytest.mark.parametrize("value", [None, {}, {"type": "text"}])
def test_any_text_needs_no_grammar(value):
    for read, body in ((chat_request, {"messages": HELLO}), (completion_request, {"prompt": "x"})):
        assert read({**body, "response_format": value}).ask.sampling.grammar == ""


@pytest.mark.parametrize(("name", "value"), BAD)
def test_wrong_values(name, value):
    for read, body in ((chat_request, {"messages": HELLO}), (completion_request, {"prompt": "x"})):
        assert refusal(BadField, read, {**body, name: value}).split(".")[0] == name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 5, "n_predict": 6}, "n_predict"),
        ({"n": 2, "n_cmpl": 3}, "n_cmpl"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"reasoning_effort": 5}, "reasoning_effort"),
    ],
)
def test_contradictions(fields, param):
    assert refusal(BadField, chat_request, {"messages": HELLO, **fields}) == param


UNSUPPORTED = [
    ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("functions", [{"name": "f"}]),
    ("function_call", {"name": "f"}),
    ("response_format", {"type": "json_object", "schema": {"type": "string", "pattern": "a+"}}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"minimum": 1}}}),
    ("response_format", {"type": "json_object", "strict": True}),
    ("response_format", {"type": "text", "schema": {}}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {}, "strict": "yes"}}),
    ("grammar", "root ::= 'a'"),
    ("json_schema", {}),
    ("audio", {"voice": "alloy", "format": "wav"}),
    ("modalities", ["text", "audio"]),
    ("prediction", {"type": "content", "content": "x"}),
    ("web_search_options", {}),
    ("store", True),
    ("service_tier", "flex"),
    ("verbosity", "high"),
    ("best_of", 2),
    ("suffix", "x"),
    ("cache_prompt", False),
    ("return_progress", True),
    ("return_tokens", True),
    ("id_slot", 0),
    ("id_slot", False),
    ("n_keep", 5),
    ("t_max_predict_ms", 100),
    ("top_n_sigma", 1.0),
    ("typical_p", 0.9),
    ("xtc_probability", 0.1),
    ("dynatemp_range", 0.5),
    ("dry_multiplier", 0.8),
    ("mirostat", 2),
    ("min_keep", 1),
    ("samplers", ["temperature"]),
    ("samplers", ["top_k", "penalties", "top_p", "min_p", "temperature"]),
    ("lora", [{"id": 0, "scale": 1}]),
    ("reasoning_format", "deepseek"),
    ("adaptive_target", 0.5),
    ("stream_options", {"include_obfuscation": True}),
    ("stream_options", {"else": 1}),
    ("guided_json", {}),
    ("nonsense", False),
    ("nonsense" * 1000, 1),
]


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED)
def test_refused_by_name(name, value):
    for read, body in ((chat_request, {"messages": HELLO}), (completion_request, {"prompt": "x"})):
        with pytest.raises(Unsupported) as caught:
            read({**body, name: value})
        assert name.startswith(caught.value.param.split(".")[0])
        assert "serve MODEL --engine llama-server" in caught.value.hint


NEUTRAL = {
    "model": "default",
    "user": "me",
    "metadata": {"a": "b"},
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "store": False,
    "service_tier": "auto",
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "cache_prompt": True,
    "return_progress": False,
    "id_slot": -1,
    "top_n_sigma": -1,
    "typ_p": 1,
    "xtc_probability": 0,
    "xtc_threshold": 0.1,
    "dynatemp_range": 0,
    "dynatemp_exponent": 1,
    "dry_multiplier": 0,
    "dry_base": 1.75,
    "dry_sequence_breakers": ["\n"],
    "mirostat": 0,
    "mirostat_tau": 5,
    "samplers": ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"],
    "grammar": "",
    "lora": [],
    "reasoning_format": "none",
}


def test_values_that_ask_for_nothing_are_taken():
    assert chat(**NEUTRAL) == chat()
    assert completion(**NEUTRAL) == completion()


def test_the_same_values_of_another_type_are_not():
    """`False` is no number, and `1` is not true."""
    for name in ("xtc_probability", "dry_base", "mirostat", "id_slot"):
        with pytest.raises(Unsupported):
            chat(**{name: False})
    with pytest.raises(Unsupported):
        chat(cache_prompt=1)


class TestSeeds:
    def test_answers_differ_and_never_mean_random(self):
        assert [seed_of(5, i) for i in range(3)] == [5, 6, 7]
        assert seed_of((1 << 32) - 2, 1) == 0
        assert all(0 <= seed_of(s, i) < (1 << 32) - 1 for s in (-7, (1 << 32) - 1, 1 << 63) for i in range(3))


class TestMessages:
    def test_roles_and_parts(self):
        said = [
            {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "", "name": "Jo"},
            {"role": "assistant", "content": None, "tool_calls": [], "refusal": None, "annotations": []},
            {"role": "user", "content": "c"},
        ]
        messages = chat(messages=said).messages
        assert [(m.role, m.content) for m in messages] == [
            ("system", "a\nb"),
            ("user", ""),
            ("assistant", ""),
            ("user", "c"),
        ]
        assert messages[1].extra == {"name": "Jo"}

    @pytest.mark.parametrize(
        ("value", "param"),
        [
            (None, "messages"),
            ([], "messages"),
            ("hi", "messages"),
            (["hi"], "messages[0]"),
            ([{}], "messages[0].role"),
            ([{"role": 5, "content": "x"}], "messages[0].role"),
            ([{"role": "user"}], "messages[0].content"),
            ([{"role": "user", "content": 5}], "messages[0].content"),
            ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
            ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
            ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
            ([*HELLO, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], "messages"),
        ],
    )
    def test_wrong(self, value, param):
        assert refusal(BadField, chat_request, {"messages": value}) == param

    @pytest.mark.parametrize(
        ("message", "param"),
        [
            ({"role": "tool", "content": "x", "tool_call_id": "1"}, "messages[0].role"),
            ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0].type"),
            ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0].type"),
            ({"role": "user", "content": [{"type": "text", "text": "x", "more": 1}]}, "messages[0].content[0].more"),
            ({"role": "assistant", "content": "", "tool_calls": [{}]}, "messages[0].tool_calls"),
            ({"role": "user", "content": "x", "odd": 1}, "messages[0].odd"),
        ],
    )
    def test_refused(self, message, param):
        assert refusal(Unsupported, chat_request, {"messages": [message]}) == param

    def test_a_last_message_of_the_assistant_is_continued(self):
        said = [*HELLO, {"role": "assistant", "content": "Well"}]
        assert chat(messages=said).continues
        assert chat(messages=said, continue_final_message=True).continues
        assert not chat().continues
        assert refusal(Unsupported, chat_request, {"messages": said, "continue_final_message": "reasoning_content"})

    def test_template_options(self):
        assert chat(reasoning_effort="low").template_options == {"reasoning_effort": "low"}
        assert chat(reasoning_effort="none").template_options == {"enable_thinking": False}
        assert chat(chat_template_kwargs={"a": [1]}).template_options == {"a": [1]}


class TestPrompts:
    @pytest.mark.parametrize(
        ("prompt", "prompts"),
        [
            ("x", ("x",)),
            ("", ("",)),
            ([1, 2], ((1, 2),)),
            (["x", "y"], ("x", "y")),
            ([[1], [2, 3]], ((1,), (2, 3))),
            (["x", [1]], ("x", (1,))),
        ],
    )
    def test_forms(self, prompt, prompts):
        assert completion(prompt=prompt).prompts == prompts

    @pytest.mark.parametrize("prompt", [None, [], 5, {}, [1, "x"], ["x", 1], [1.5], [True], [[1, "x"]], ["x"] * 65])
    def test_wrong(self, prompt):
        assert refusal(BadField, completion_request, {"prompt": prompt}) == "prompt"
        assert MAX_CHOICES == 64

    def test_echo(self):
        assert completion(echo=True).echo
        assert refusal(Unsupported, completion_request, {"prompt": "x", "echo": True, "logprobs": 1}) == "echo"
        assert refusal(Unsupported, chat_request, {"messages": HELLO, "echo": True}) == "echo"

    def test_fields_of_the_other_endpoint_are_refused(self):
        assert refusal(Unsupported, completion_request, {"prompt": "x", "messages": HELLO}) == "messages"
        assert refusal(Unsupported, chat_request, {"prompt": "x", "messages": HELLO}) == "prompt"
        assert refusal(Unsupported, completion_request, {"prompt": "x", "top_logprobs": 1}) == "top_logprobs"


class TestHelpers:
    def test_tokenize(self):
        request = tokenize_request({"content": "x"})
        assert (request.parts, request.add_special, request.parse_special) == (("x",), False, True)
        assert tokenize_request({}).parts == ()
        assert tokenize_request({"content": ["x", 5], "with_pieces": True}).parts == ("x", 5)
        assert refusal(BadField, tokenize_request, {"content": {}}) == "content"
        assert refusal(Unsupported, tokenize_request, {"content": "x", "odd": 1}) == "odd"

    def test_texts_and_tokens_have_bounds(self, monkeypatch):
        monkeypatch.setattr("tightwad_agent.proxy.helper_requests.MAX_TEXT", 4)
        assert check_text("éé", "prompt") == "éé".encode()
        assert refusal(BadField, lambda text: check_text(text, "prompt"), "ééa") == "prompt"
        check_tokens([0, 9], 10, "tokens")
        assert refusal(BadField, lambda ids: check_tokens(ids, 10, "tokens"), [10]) == "tokens"
        assert refusal(BadField, lambda ids: check_tokens(ids, 10, "tokens"), [-1]) == "tokens"

    def test_detokenize(self):
        assert detokenize_request({"tokens": [1, 2]}) == (1, 2)
        assert detokenize_request({}) == ()
        assert refusal(BadField, detokenize_request, {"tokens": ["1"]}) == "tokens"


class TestJson:
    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"[]",
            b"5",
            b"null",
            b'{"a": NaN}',
            b'{"a": -Infinity}',
            b'{"a": 1, "a": 2}',
            b'{"m": {"a": 1, "a": 1}}',
            b'{"a": "\xff"}',
            b'{"a": "\\ud800"}',
            b'{"\\udfff": 1}',
            b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
            b'{"a": ' + b"9" * 5000 + b"}",
            b'{"a": 1}}',
            b"\xef\xbb\xbf{}",
        ],
    )
    def test_refused(self, body):
        with pytest.raises(UsageError) as caught:
            parse_object(body)
        assert caught.value.http_status == 400
        assert len(caught.value.message) < 200

    def test_whole_pairs_are_text(self):
        assert parse_object(b'{"a": "\\ud83d\\ude00", "b": "\\u00e9"}') == {"a": "😀", "b": "é"}

    _plain = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    )
    _names = st.sampled_from([*NEUTRAL, *(case[0] for case in READ), *(name for case in ASKED for name in case[0])])

    @settings(deadline=None)
    @given(st.dictionaries(_names, _plain, max_size=4), _plain)
    def test_anything_is_read_or_refused_by_name(self, fields, value):
        for read, needed in ((chat_request, "messages"), (completion_request, "prompt")):
            for body in ({needed: value, **fields}, {"messages": HELLO, **fields}, {"prompt": "x", **fields}):
                refused = error_of(read, body)
                if refused is not None:
                    assert (refused.http_status, bool(refused.param)) == (400, True)
                    assert json.dumps(refused.message).encode()


def error_of(read, body) -> TightwadError | None:
    try:
        read(body)
    except TightwadError as exc:
        return exc
    return None
