"""One real agent whose verifier serves: what the endpoint answers over HTTP, with llama-server as the measure."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tiny_models
from lab import Agent, Lab, free_port

pytestmark = [pytest.mark.engine, pytest.mark.slow]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
CONTEXT = 256
WAIT_S = 90.0
YES = [{"role": "user", "content": "Answer with one word: yes or no?"}]
COUNT = [{"role": "user", "content": "Count from one to ten."}]
STORY = "Once upon a time in a small village,"
PARTY = "Smile: 😀 Party: 🎉 " * 10 + "Smile:"
EMOJI = " 😀 Party: 🎉 Smile: 😀 Party: 🎉"
"""What the demo model says after it: 16 tokens, none of which is a whole emoji. After three rounds it has
doubts, and other processors, which add in another order, make other answers."""
AGAIN = "one two three " * 8
SPECULATION = {"rounds", "drafted", "accepted", "acceptance_at", "tokens_per_round", "draft_ms", "verify_ms", "hidden"}


@pytest.fixture(scope="module")
def box(engine_dir: Path) -> Iterator[Agent]:
    """An agent that serves nothing yet."""
    with Lab(1, namespaces=False, flags=("--engine-dir", str(engine_dir), "--threads", "1")) as lab:
        lab.start()
        yield lab.agents[0]


@pytest.fixture
def agent(box: Agent, demo_model: Path) -> Agent:
    """It serves the demo model alone."""
    if status(box)["target"]["model"] != demo_model.stem:
        serve(box, demo_model, "--draft", "off")
    return box


@pytest.fixture(scope="module")
def server(engine_dir: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a llama-server with the same model."""
    port = free_port()
    argv = [engine_dir / "llama-server", "-m", demo_model, "--port", port, "-c", CONTEXT, "-np", 1, "-t", 1, "--no-ui"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as out:
        process = subprocess.Popen([*map(str, argv)], stdout=out, stderr=out)
    try:
        end = time.monotonic() + WAIT_S
        while not healthy(f"http://127.0.0.1:{port}"):
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            assert time.monotonic() < end
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def serve(agent: Agent, model: Path, *options: str) -> Any:
    """Adds a model and serves it with the verifier, until it is ready."""
    name = agent.cli("add", str(model), timeout_s=WAIT_S)["name"]
    flags = ("--engine", "verifier", "--ctx", str(CONTEXT), *options)
    served = agent.cli("serve", name, *flags, timeout_s=WAIT_S)
    assert served["target"]["state"] == "ready"
    return served


def status(box: Agent) -> Any:
    return httpx.get(box.url("/v1/tightwad/status"), timeout=10, trust_env=False).json()


def ask(where: Agent | str, path: str, **body: Any) -> httpx.Response:
    url = where + path if isinstance(where, str) else where.url(path)
    return httpx.post(url, json=body, timeout=60, trust_env=False)


def greedy(where: Agent | str, path: str, **body: Any) -> Any:
    answer = ask(where, path, **{"temperature": 0, "max_tokens": 16, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def said(answer: Any, index: int = 0) -> str:
    choice = answer["choices"][index]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def events(agent: Agent, path: str, **body: Any) -> list[Any]:
    """Of a stream, to its end."""
    data = [line.removeprefix("data: ") for line in ask(agent, path, stream=True, **body).text.splitlines() if line]
    assert data[-1] == "[DONE]"
    return [json.loads(one) for one in data[:-1]]


def texts(stream: list[Any]) -> list[str]:
    choices = [choice for event in stream for choice in event["choices"]]
    return [c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices]


class TestLikeLlamaServer:
    """The same question to llama-server: text, usage and the reason of the end must be its own."""

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            (CHAT, {"messages": YES}),
            (CHAT, {"messages": [{"role": "system", "content": "You are a pirate."}, *COUNT], "stop": ["\n", "three"]}),
            (CHAT, {"messages": COUNT, "repeat_penalty": 1.3, "presence_penalty": 0.2, "repeat_last_n": 32}),
            (CHAT, {"messages": COUNT, "logit_bias": {"28": -100, "339": 2.5}}),
            (TEXT, {"prompt": AGAIN, "frequency_penalty": 0.1}),
            (CHAT, {"messages": COUNT, "temperature": 0.9, "seed": 5, "top_k": 20, "top_p": 0.8, "min_p": 0.1}),
            (TEXT, {"prompt": STORY, "temperature": 1.3, "seed": 42, "top_k": 0, "top_p": 1.0, "min_p": 0.02}),
            (TEXT, {"prompt": PARTY}),
        ],
    )
    def test_one_answer(self, agent: Agent, server: str, path: str, body: Any) -> None:
        theirs, ours = greedy(server, path, cache_prompt=False, **body), greedy(agent, path, **body)
        assert said(ours) == said(theirs)
        assert ours["choices"][0]["finish_reason"] == theirs["choices"][0]["finish_reason"]
        counts = ("prompt_tokens", "completion_tokens", "total_tokens")
        assert [ours["usage"][name] for name in counts] == [theirs["usage"][name] for name in counts]
        assert ours["timings"]["predicted_n"] == ours["usage"]["completion_tokens"]

    def test_an_answer_that_was_begun(self, agent: Agent, server: str) -> None:
        """llama-server repeats the beginning in a whole answer, and not in a stream; here it is never repeated."""
        begun = [*COUNT, {"role": "assistant", "content": "One, two,"}]
        theirs, ours = (greedy(where, CHAT, messages=begun, max_tokens=8) for where in (server, agent))
        assert "One, two," + said(ours) == said(theirs)
        assert ours["usage"]["prompt_tokens"] == theirs["usage"]["prompt_tokens"]

    def test_log_probabilities(self, agent: Agent, server: str) -> None:
        body = {"messages": YES, "logprobs": True, "top_logprobs": 3}
        theirs, ours = (greedy(where, CHAT, **body)["choices"][0]["logprobs"]["content"] for where in (server, agent))
        assert [one["token"] for one in ours] == [one["token"] for one in theirs[: len(ours)]]
        for one, other in zip(ours, theirs, strict=False):
            assert one["logprob"] == pytest.approx(other["logprob"], abs=5e-3)
            assert [top["id"] for top in one["top_logprobs"]] == [top["id"] for top in other["top_logprobs"]]
            assert one["bytes"] == list(one["token"].encode())


class TestFields:
    def test_stop_strings_over_the_boundaries_of_tokens(self, agent: Agent) -> None:
        plain = greedy(agent, TEXT, prompt=STORY, logprobs=0)
        pieces, text = plain["choices"][0]["logprobs"]["tokens"], said(plain)
        assert "".join(pieces) == text
        n_cut = 0
        for i in range(2, 9, 3):
            stop = pieces[i][-1] + pieces[i + 1][:2]
            if text.find(stop) != len("".join(pieces[: i + 1])) - 1:
                continue  # it is met earlier
            n_cut += 1
            for more in ({}, {"stop": [stop, "never said"]}):
                cut = greedy(agent, TEXT, prompt=STORY, **{"stop": stop, **more})
                assert said(cut) == text[: text.find(stop)]
                assert cut["choices"][0]["finish_reason"] == "stop"
                assert cut["usage"]["completion_tokens"] == i + 2
            stream = events(agent, TEXT, prompt=STORY, stop=stop, temperature=0, max_tokens=16)
            assert "".join(texts(stream)) == text[: text.find(stop)]
        assert n_cut

    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n_predict"])
    def test_a_limit_of_tokens(self, agent: Agent, name: str) -> None:
        answer = ask(agent, TEXT, prompt=STORY, **{name: 3}).json()
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (3, "length")

    @pytest.mark.parametrize("cold", [{"top_k": 1}, {"top_p": 0}, {"min_p": 1}])
    def test_what_leaves_one_token_is_greedy(self, agent: Agent, cold: dict[str, float]) -> None:
        assert said(greedy(agent, TEXT, prompt=STORY, temperature=2, **cold)) == said(greedy(agent, TEXT, prompt=STORY))

    def test_seeds(self, agent: Agent) -> None:
        def drawn(**more: Any) -> Any:
            return greedy(agent, TEXT, **{"prompt": STORY, "temperature": 1, "max_tokens": 8, **more})

        first = said(drawn(seed=7))
        assert said(drawn(seed=7)) == first != said(drawn(seed=9))
        assert len({said(drawn(max_tokens=4)) for _ in range(4)}) > 1

    def test_several_answers(self, agent: Agent) -> None:
        """One token each: passes of several requests compute the logits of later ones in other last digits."""
        ask = {"prompt": STORY, "temperature": 2, "top_p": 1, "min_p": 0, "max_tokens": 1}
        many = greedy(agent, TEXT, n=4, seed=7, **ask)
        alone = [greedy(agent, TEXT, seed=7 + i, **ask) for i in range(4)]
        assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
        assert [said(many, i) for i in range(4)] == [said(one) for one in alone]
        assert len(set(map(said, alone))) > 1
        assert many["usage"]["completion_tokens"] == 4
        assert many["usage"]["prompt_tokens"] == alone[0]["usage"]["prompt_tokens"]

    def test_bias_by_text_and_by_id(self, agent: Agent) -> None:
        plain = greedy(agent, TEXT, prompt=STORY, logprobs=0)["choices"][0]["logprobs"]["tokens"]
        banned = next(piece for piece in plain if plain.count(piece) > 1)
        for bias in ([[banned, False]], [[banned, -100]]):
            tokens = greedy(agent, TEXT, prompt=STORY, logprobs=0, logit_bias=bias)["choices"][0]["logprobs"]["tokens"]
            assert banned not in tokens
        assert said(greedy(agent, TEXT, prompt=STORY, max_tokens=2, logit_bias={"30": 100})) == ".."

    def test_the_end_is_not_said_where_it_is_not_wanted(self, agent: Agent) -> None:
        plain = greedy(agent, CHAT, messages=YES)
        assert plain["choices"][0]["finish_reason"] == "stop"
        on = greedy(agent, CHAT, messages=YES, ignore_eos=True)
        assert on["choices"][0]["finish_reason"] == "length"
        assert said(on).startswith(said(plain))

    def test_usage_counts_what_the_tokenizer_counts(self, agent: Agent) -> None:
        prompt = ask(agent, "/apply-template", messages=COUNT).json()["prompt"]
        n_prompt = len(ask(agent, "/tokenize", content=prompt).json()["tokens"])
        stream = events(
            agent, CHAT, messages=COUNT, max_tokens=9, temperature=0, stream_options={"include_usage": True}
        )
        usage = stream[-1]["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (n_prompt, 9)
        assert "".join(texts(stream)) == said(greedy(agent, CHAT, messages=COUNT, max_tokens=9))

    def test_a_prompt_is_given_back(self, agent: Agent) -> None:
        plain = said(greedy(agent, TEXT, prompt=STORY))
        assert said(greedy(agent, TEXT, prompt=STORY, echo=True)) == STORY + plain


VERDICT = {
    "type": "object",
    "properties": {"verdict": {"enum": ["yes", "no"]}, "why": {"type": "string", "maxLength": 40}},
    "required": ["verdict", "why"],
    "additionalProperties": False,
}


class TestForms:
    @pytest.mark.parametrize(
        "form",
        [
            {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": VERDICT}},
            {"type": "json_object", "schema": VERDICT},
        ],
        ids=["OpenAI's", "llama-server's"],
    )
    @pytest.mark.parametrize("temperature", [0, 1])
    def test_an_answer_is_what_the_schema_says(self, agent: Agent, form: Any, temperature: float) -> None:
        asked = {"messages": YES, "response_format": form, "temperature": temperature, "seed": 7, "max_tokens": 150}
        answer = greedy(agent, CHAT, **asked)
        assert answer["choices"][0]["finish_reason"] == "stop"
        found = json.loads(said(answer))
        assert list(found) == ["verdict", "why"]
        assert found["verdict"] in ("yes", "no")
        assert len(found["why"]) <= 40
        assert "".join(texts(events(agent, CHAT, **asked))) == said(answer)
        assert said(greedy(agent, CHAT, **asked, speculation=False)) == said(answer)

    def test_any_object(self, agent: Agent) -> None:
        asked = {"messages": YES, "response_format": {"type": "json_object"}, "max_tokens": 200, "temperature": 0.8}
        answers = [greedy(agent, CHAT, **asked, seed=seed) for seed in range(4)]
        whole = [said(answer) for answer in answers if answer["choices"][0]["finish_reason"] == "stop"]
        assert whole
        assert all(isinstance(json.loads(text), dict) for text in whole)

    def test_of_a_text_that_goes_on(self, agent: Agent) -> None:
        answer = greedy(
            agent, TEXT, prompt="Two and two is", response_format={"type": "json_object", "schema": {"const": 4}}
        )
        assert said(answer) == "4"


class TestRefused:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("tools", [{"type": "function", "function": {"name": "f"}}]),
            ("response_format", {"type": "json_object", "schema": {"type": "string", "pattern": "a+"}}),
            ("grammar", 'root ::= "a"'),
            ("mirostat", 2),
            ("dry_multiplier", 0.8),
            ("reasoning_budget_tokens", 5),
            ("an_invention", 1),
        ],
    )
    def test_what_llama_server_would_do(self, agent: Agent, field: str, value: Any) -> None:
        answer = ask(agent, CHAT, messages=YES, **{field: value})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (400, field, "unsupported_parameter")
        assert f"`{field}`" in error["message"]
        assert "serve MODEL --engine llama-server" in error["message"]

    @pytest.mark.parametrize(
        ("path", "body", "words", "param"),
        [
            (TEXT, {"prompt": ""}, ["`prompt` is empty"], "prompt"),
            (TEXT, {"prompt": []}, ["`prompt`"], "prompt"),
            (CHAT, {"messages": []}, ["`messages`"], "messages"),
            (TEXT, {"prompt": [5] * 2000}, ["2000 tokens", f"context {CONTEXT}"], None),
            (TEXT, {"prompt": "word " * 1200}, ["1201 tokens", f"context {CONTEXT}"], None),
            (TEXT, {"prompt": [5] * CONTEXT}, [f"{CONTEXT} tokens", f"context {CONTEXT}"], None),
            (TEXT, {"prompt": [5, 49152]}, ["49152"], "prompt"),
            (TEXT, {"prompt": [-1]}, ["-1"], "prompt"),
            (CHAT, {"messages": YES, "temperature": -1}, ["`temperature`"], "temperature"),
            (CHAT, {"messages": YES, "logit_bias": {"49152": 1}}, ["`logit_bias`", "49152"], "logit_bias"),
        ],
    )
    def test_what_cannot_be_answered(self, agent: Agent, path: str, body: Any, words: list[str], param: str) -> None:
        answer = ask(agent, path, **body)
        error = answer.json()["error"]
        assert answer.status_code == 400, error
        assert all(word in error["message"] for word in words), error["message"]
        assert error["param"] == param
        assert said(greedy(agent, CHAT, messages=YES)) == "Yes.", "the verifier goes on as if nothing was"

    def test_a_prompt_that_just_fits(self, agent: Agent) -> None:
        answer = greedy(agent, TEXT, prompt=[5] * (CONTEXT - 1))
        assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (1, "length")


class TestCharacters:
    """No event of a stream has a part of a character, wherever the tokens cut it."""

    def test_of_several_tokens_each(self, agent: Agent) -> None:
        stream = events(agent, TEXT, prompt=PARTY, max_tokens=16, temperature=0, logprobs=0)
        assert "".join(texts(stream)) == EMOJI
        assert not any("\N{REPLACEMENT CHARACTER}" in text for text in texts(stream))
        pieces = [t for e in stream for c in e["choices"] if c["logprobs"] for t in c["logprobs"]["tokens"]]
        assert sum(piece.startswith("bytes:") for piece in pieces) == 10

    def test_cut_off_by_the_limit(self, agent: Agent) -> None:
        stream = events(agent, TEXT, prompt=PARTY, max_tokens=6, temperature=0)
        assert "".join(texts(stream)) == " 😀 Party: \N{REPLACEMENT CHARACTER}"

    def test_a_stop_string_of_several_tokens(self, agent: Agent) -> None:
        stream = events(agent, TEXT, prompt=PARTY, max_tokens=16, temperature=0, stop="🎉")
        assert "".join(texts(stream)) == " 😀 Party: "
        assert stream[-1]["choices"][0]["finish_reason"] == "stop"


class TestKilled:
    def test_in_the_middle_of_an_answer(self, agent: Agent) -> None:
        """SIGKILL: another verifier is started, and what no part was sent of is answered by it, whole."""
        plain = greedy(agent, TEXT, prompt=STORY, max_tokens=24)
        restarts, answers = metrics(agent)["tightwad_pool_restarts_total"], []
        asking = threading.Thread(target=lambda: answers.append(greedy(agent, TEXT, prompt=STORY, max_tokens=24)))
        asking.start()
        agent.wait(lambda: metrics(agent)["tightwad_requests_in_flight"], "for the request to run", 20)
        verifier(agent).kill()
        asking.join(60)
        assert [said(answer) for answer in answers] == [said(plain)]
        assert metrics(agent)["tightwad_pool_restarts_total"] == restarts + 1
        assert any("SIGKILL" in event["text"] for event in agent.status()["events"])

    def test_in_the_middle_of_a_stream(self, agent: Agent) -> None:
        """The client reads a pause: the next verifier goes on where the last one was cut off."""
        body = {"prompt": STORY, "temperature": 0, "max_tokens": 200, "ignore_eos": True}
        plain, body = said(ask(agent, TEXT, **body).json()), {**body, "stream": True}
        with httpx.stream("POST", agent.url(TEXT), json=body, timeout=60, trust_env=False) as answer:
            lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
            first = [next(lines) for _ in range(3)]
            doomed = verifier(agent)
            doomed.kill()
            *rest, last = [line for line in lines if not line.startswith(":")]
        assert last == "[DONE]"
        assert "".join(texts([json.loads(line) for line in first + rest])) == plain
        assert verifier(agent).pid != doomed.pid


def verifier(agent: Agent) -> psutil.Process:
    (found,) = [p for p in map(psutil.Process, agent.pids()) if "engine.verifier" in " ".join(p.cmdline())]
    return found


class TestMemory:
    """What a model's memory can do is known before it answers, and said."""

    def test_a_state_that_only_moves_on(self, box: Agent, tmp_path: Path) -> None:
        serve(box, tiny_models.recurrent(tmp_path / "state.gguf"), "--draft", "auto")
        speculation = status(box)["speculation"]
        assert "recurrent" in speculation["rollback"]
        assert speculation["decision"] == "not drafting: the model's memory cannot be rolled back"
        again = "abcdefgh" * 12  # a text that is easy to go on with, if anybody drafted
        timings = greedy(box, TEXT, prompt=again, max_tokens=40, ignore_eos=True)["timings"]
        assert (timings["predicted_n"], timings["drafted"]) == (40, 0)

    def test_bytes_that_are_no_text(self, box: Agent, tmp_path: Path) -> None:
        """A model of random weights, made to say nothing but parts of `€`: `\\xe2\\x82\\xac`."""
        serve(box, tiny_models.recurrent(tmp_path / "bytes.gguf"), "--draft", "off")
        bias = {str(3 + byte): 1000 for byte in b"\xe2\x82\xac"}
        body = {"prompt": "a", "max_tokens": 60, "temperature": 1, "logit_bias": bias}
        n_euros = 0
        for seed in range(3):
            stream = events(box, TEXT, seed=seed, logprobs=0, **body)
            pieces = [t for e in stream for c in e["choices"] if c["logprobs"] for t in c["logprobs"]["tokens"]]
            data = bytes(int(piece.removeprefix("bytes:\\x"), 16) for piece in pieces)
            assert len(data) == 60
            assert (
                "".join(texts(stream))
                == data.decode("utf-8", "replace")
                == said(ask(box, TEXT, seed=seed, **body).json())
            )
            n_euros += data.count("€".encode())
        assert n_euros > 0

    def test_attention_that_slides(self, box: Agent, tmp_path: Path) -> None:
        serve(box, tiny_models.windowed(tmp_path / "window.gguf"), "--draft", "auto")
        assert f"slides over {tiny_models.WINDOW} tokens: drafts work" in status(box)["speculation"]["rollback"]
        again = "abcdefgh" * 12
        drafted = greedy(box, TEXT, prompt=again, max_tokens=60, ignore_eos=True)
        plain = greedy(box, TEXT, prompt=again, max_tokens=60, ignore_eos=True, speculation=False)
        assert said(drafted) == said(plain)
        assert plain["timings"]["drafted"] == 0


@pytest.fixture(scope="module")
def answers(box: Agent, f32_model: Path, demo_model: Path) -> list[Any]:
    """The timings of what was asked, newest last."""
    box.cli("add", str(demo_model), timeout_s=WAIT_S)
    serve(box, f32_model, "--drafters", box.name)
    wait_for(box, lambda found: [d for d in found["drafters"] if d["state"] == "ready"])
    asked = [greedy(box, CHAT, messages=COUNT, max_tokens=24)["timings"]]
    again = "one two three four five six seven eight nine ten " * 3
    for _ in range(8):  # on one machine drafts hardly pay, and whether they do is measured all the time
        asked.append(greedy(box, TEXT, prompt=again, max_tokens=24)["timings"])
        if asked[-1]["accepted"]:
            break
    return asked


class TestNumbers:
    """With a drafter and drafts from the text itself: `timings`, `status` and `/metrics` tell the same story."""

    def test_timings_of_an_answer(self, answers: list[Any]) -> None:
        for timings in answers:
            assert timings["engine"] == "verifier"
            assert timings["predicted_n"] == timings["rounds"] + timings["accepted"] + 1
            assert sum(timings["tried_at"]) == timings["drafted"] == sum(timings["drafters"].values())
            assert sum(timings["accepted_at"]) == timings["accepted"]
            assert len(timings["acceptance_by_position"]) == len(timings["tried_at"])
            assert timings["verify_ms"] > 0
        drafted = answers[-1]
        assert drafted["drafted"] > 0
        assert drafted["acceptance"] == pytest.approx(drafted["accepted"] / drafted["drafted"], abs=1e-4)
        assert drafted["tokens_per_round"] == pytest.approx(1 + drafted["accepted"] / drafted["rounds"], abs=1e-4)
        assert drafted["tokens_per_round"] > 1

    def test_the_drafter_is_named_with_its_figures(self, box: Agent, answers: list[Any]) -> None:
        """It answered or was too slow for this machine: either is told, never nothing."""
        (drafter,) = status(box)["speculation"]["drafters"]
        assert (drafter["name"], drafter["state"]) == (box.name, "ready")
        used = sum(timings["drafters"].get(box.name, 0) for timings in answers)
        if used:
            assert 0 <= drafter["acceptance"] <= 1
            assert drafter["first_token_ms"] > 0
            assert sum(timings["draft_ms"] for timings in answers) > 0
        else:
            assert box.name in status(box)["speculation"]["decision"]

    def test_status_and_metrics(self, box: Agent, answers: list[Any]) -> None:
        before, page = status(box)["speculation"], metrics(box)
        assert before.keys() >= SPECULATION
        assert page["tightwad_rounds_total"] == before["rounds"] >= sum(t["rounds"] for t in answers)
        assert page["tightwad_draft_tokens_total"] == before["drafted"]
        assert page["tightwad_draft_tokens_accepted_total"] == before["accepted"]
        assert before["tokens_per_round"] == pytest.approx(1 + before["accepted"] / before["rounds"], abs=1e-3)
        for at, share in enumerate(before["acceptance_at"], 1):
            tried = page[f'tightwad_draft_position_tokens_total{{position="{at}"}}']
            right = page[f'tightwad_draft_position_tokens_accepted_total{{position="{at}"}}']
            assert share == pytest.approx(right / tried, abs=1e-3)
        assert page["tightwad_verify_seconds_total"] == pytest.approx(
            before["verify_ms"] * before["rounds"] / 1e3, rel=1e-3
        )
        assert page['tightwad_serving_info{engine="verifier",model="SmolLM2-135M-F32"}'] == 1
        by_drafter = [n for name, n in page.items() if name.startswith("tightwad_drafter_tokens_total")]
        assert sum(by_drafter) == before["drafted"] > 0
        assert page["tightwad_draft_seconds_total"] >= sum(t["draft_ms"] for t in answers) / 1e3 - 1e-6

    def test_one_answer_moves_the_sums_by_its_own(self, box: Agent, answers: list[Any]) -> None:
        before = metrics(box)
        timings = greedy(box, TEXT, prompt=AGAIN, max_tokens=16)["timings"]
        after = metrics(box)
        for name, figure in (("rounds", "rounds"), ("draft_tokens", "drafted"), ("generated_tokens", "predicted_n")):
            assert after[f"tightwad_{name}_total"] - before[f"tightwad_{name}_total"] == timings[figure]

    def test_requests_are_counted_by_how_they_ended(self, box: Agent) -> None:
        before = metrics(box)
        ask(box, CHAT, messages=YES, max_tokens=1)
        ask(box, CHAT, messages=YES, tools=[{}])
        events(box, CHAT, messages=YES, max_tokens=1)
        after = metrics(box)
        assert moved(before, after, 'tightwad_requests_total{status="2xx"}') == 2
        assert moved(before, after, 'tightwad_requests_total{status="4xx"}') == 1


def wait_for(box: Agent, found: Callable[[Any], Any]) -> None:
    box.wait(lambda: found(status(box)["speculation"]), "for the drafter", WAIT_S)


def metrics(box: Agent) -> dict[str, float]:
    page = httpx.get(box.url("/metrics"), timeout=10, trust_env=False).text
    return {name: float(value) for name, value in re.findall(r"^(tightwad_\S+) (\S+)$", page, re.MULTILINE)}


def moved(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after[name] - before.get(name, 0)
