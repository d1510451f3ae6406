"""OpenAI's forms, model names, and the gate for server-sent events."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.errors import NotReady, TightwadError, Unauthorized, UnknownModel, UsageError
from tightwad_agent.proxy import openai
from tightwad_agent.proxy.openai import ModelEntry, SseGate, choose_model, wanted_model

DEMO = ModelEntry("ab" * 32, "Demo-7B.Q4_1.gguf", size=10, served=True, created=5, meta={"n_ctx": 2048})
OTHER = ModelEntry("cd" * 32, "other.gguf")


class TestErrors:
    def test_form(self):
        body = json.loads(openai.error_body(UsageError("no", hint="do this"), state={"state": "loading"}))
        assert body == {
            "error": {"message": "no. do this", "type": "invalid_request_error", "code": "usage", "param": None},
            "tightwad": {"state": "loading"},
        }

    @pytest.mark.parametrize(
        ("exc", "kind"),
        [
            (Unauthorized("x"), "authentication_error"),
            (NotReady("x"), "service_unavailable"),
            (TightwadError("x"), "server_error"),
            (UnknownModel("x"), "invalid_request_error"),
        ],
    )
    def test_types(self, exc, kind):
        assert openai.error_object(exc)["type"] == kind

    def test_unknown_model_names_the_parameter(self):
        assert openai.error_object(UnknownModel("x"))["param"] == "model"

    def test_retry_after_is_at_least_one_second(self):
        assert openai.error_headers(NotReady("x", retry_after_s=0)) == [(b"retry-after", b"1")]
        assert openai.error_headers(UsageError("x")) == []

    def test_any_text_is_sent(self):
        message = "\ud800 \x00 \u2028 ü"
        assert json.loads(openai.error_body(UsageError(message)))["error"]["message"] == message

    def test_event_is_one_line_of_data(self):
        event = openai.error_event(UsageError("a\nb"))
        assert event.startswith(b"data: {")
        assert event.endswith(b"}\n\n")
        assert event.count(b"\n") == 2


class TestModels:
    def test_page_offers_only_what_answers(self):
        page = openai.models_page([OTHER, DEMO])
        assert [m["id"] for m in page["data"]] == ["Demo-7B.Q4_1"]
        assert [m["id"] for m in page["tightwad"]["catalogue"]] == ["other", "Demo-7B.Q4_1"]
        assert page["data"][0]["meta"]["n_ctx"] == 2048

    @pytest.mark.parametrize(
        "name",
        [None, "", "default", "Tightwad", " ", "Demo-7B.Q4_1", "demo-7b.q4_1.GGUF", "ab" * 32, "ab" * 6, "AB" * 6],
    )
    def test_names_of_the_served_one(self, name):
        assert choose_model(name, [OTHER, DEMO]) is DEMO

    @pytest.mark.parametrize("name", ["gpt-4o", "ab" * 5, "Demo", "cd" * 33])
    def test_unknown_says_what_is_there(self, name):
        with pytest.raises(UnknownModel, match=r"Demo-7B\.Q4_1"):
            choose_model(name, [OTHER, DEMO])

    def test_known_but_not_served_says_how(self):
        with pytest.raises(UnknownModel, match="tightwad-agent serve other"):
            choose_model("other.gguf", [OTHER, DEMO])

    def test_nothing_served(self):
        assert choose_model(None, []) is None
        assert choose_model("other", [OTHER]) is None  # the route says why it does not answer yet
        with pytest.raises(UnknownModel, match="`other`"):
            choose_model("gpt-4o", [OTHER])
        with pytest.raises(UnknownModel, match="none"):
            choose_model("gpt-4o", [])

    def test_long_names_are_not_repeated_whole(self):
        with pytest.raises(UnknownModel) as info:
            choose_model("x" * 100_000, [DEMO])
        assert len(str(info.value)) < 400


def _large(**extra) -> bytes:
    return json.dumps({"pad": "x" * openai.MAX_PARSED, **extra}).encode()


class TestWantedModel:
    @pytest.mark.parametrize(
        ("body", "model"),
        [
            (b"{}", None),
            (b'{"model": null}', None),
            (b' {"model": "a"} ', "a"),
            (b'{"model": "\\u00fc"}', "\u00fc"),
            (b'{"x": {"model": "inner"}, "y": [{"model": "b"}]}', None),
        ],
    )
    def test_small_and_large_agree(self, body, model):
        assert wanted_model(body) == model
        assert openai._scan_model(body) == model

    @pytest.mark.parametrize(
        "body",
        [b"", b"[]", b"null", b'"x"', b"{", b"\xff{}", b"[" * 100_000, b'{"model": 5}', b"{} {}", b'{"a":' * 50_000],
    )
    def test_refused(self, body):
        with pytest.raises(UsageError):
            wanted_model(body)

    def test_number_of_many_digits(self):
        with pytest.raises(UsageError):
            wanted_model(b'{"seed": ' + b"9" * 10_000 + b"}")

    def test_large_bodies(self):
        assert wanted_model(_large(model="late")) == "late"
        assert wanted_model(_large(x={"model": "inner"})) is None
        assert wanted_model(b'{"model": "first", "a": "' + b"y" * openai.MAX_PARSED + b'"}') == "first"
        with pytest.raises(UsageError):
            wanted_model(_large(model=5))
        with pytest.raises(UsageError):
            wanted_model(b"[" + b"0," * openai.MAX_PARSED + b"0]")

    def test_large_bodies_that_are_mean(self):
        for mean in (
            b"{" + b'"a":{' * openai.MAX_PARSED,
            b'{"' + b"\\" * openai.MAX_PARSED * 2,
            b"{" + b"[" * 9_999_999,
        ):
            assert wanted_model(mean) is None

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: (
                st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just("model"), inner, max_size=4)
            ),
        )
    )
    def test_scan_is_the_parser_s_answer(self, value):
        body = json.dumps(value).encode()
        try:
            expected = wanted_model(body)
        except UsageError:
            with pytest.raises(UsageError):
                openai._scan_model(body)
        else:
            assert openai._scan_model(body) == expected


class TestSseGate:
    STREAM = b'data: {"a":1}\n\n: ping\r\n\r\nevent: x\ndata: 2\n\ndata: [DONE]\n\nrest'

    def test_whole_events_only(self):
        gate = SseGate()
        assert gate.feed(b"data: 1\n") == b""
        assert gate.feed(b"\ndata: 2") == b"data: 1\n\n"
        assert gate.rest() == b"data: 2"
        assert gate.rest() == b""

    @given(st.integers(0, 1 << 30))
    def test_any_cut_gives_the_same_bytes(self, seed):
        rng = random.Random(seed)
        gate, out, at = SseGate(), b"", 0
        while at < len(self.STREAM):
            n = rng.choice([1, 1, 2, 5, 40])
            out += gate.feed(self.STREAM[at : at + n])
            assert out.endswith((b"\n\n", b"\r\n\r\n")) or not out
            at += n
        assert out == self.STREAM[:-4]
        assert gate.rest() == b"rest"

    def test_endless_event_is_let_through(self):
        gate = SseGate()
        out = b"".join(gate.feed(b"x" * 65536) for _ in range(40))
        assert len(out) > openai.MAX_EVENT
        assert gate.inside
        gate.feed(b"\n\ndata: 1\n\n")
        assert not gate.inside
