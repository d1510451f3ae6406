"""The verifier child with the real libllama: its answers are the model's own, whatever is drafted."""

from __future__ import annotations

import json
import math
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tiny_models
from gbnf import Grammar
from json_schemas import TAKES
from verifier_kit import Child, Drafter, flat, follows

from tightwad_agent.engine.tinymodel import tiny_model
from tightwad_agent.proxy.json_grammar import grammar_of
from tightwad_agent.wire.frames import encode
from tightwad_agent.wire.verify import (
    GREEDY,
    TO_VERIFIER,
    Accepted,
    Close,
    Detokenize,
    Ended,
    Failed,
    Load,
    Loading,
    Refused,
    Rollback,
    Sampling,
    Text,
    pack_tokens,
    unpack_tokens,
)

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPTS = (
    "Once upon a time in a small village,",
    "def fibonacci(n):\n    ",
    "Three facts about the Moon:\n1.",
    "The recipe needs flour, eggs and",
)
WARM = Sampling(seed=11)
ENDLESS = Sampling(temperature=0.0, logit_bias=((2, -1000.0),))
"""Never draws the token that ends an answer of the small models."""
TIE = 0.05
"""Logits: what the order of summing up was seen to make of the F32 model's logits on a processor."""
NOISE = 0.5
"""Logits: the same with weights of 4 bits, when requests share passes as it happens, or memory is laid out in another
order: processors differ in whether that shows."""
MANY = "The harbour master wrote down every ship that came in, its name, its cargo and the weather of the day. "


@pytest.fixture(scope="module")
def child(engine_dir: Path, demo_model: Path) -> Iterator[Child]:
    """Loaded once; each test leaves it idle."""
    with Child() as child:
        child.load(engine_dir, demo_model)
        yield child


@pytest.fixture(scope="module")
def prompts(child: Child) -> list[list[int]]:
    return [child.tokenize(text) for text in PROMPTS]


@pytest.fixture(scope="module")
def server(engine_dir: Path, demo_model: Path) -> Iterator[httpx.Client]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [engine_dir / "llama-server", "-m", demo_model, "--port", str(port), "-c", "2048", "-np", "1", "-t", "1"]
    with running([*argv, "-dev", "none", "--no-ui"]), httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        until_healthy(client)
        yield client


@pytest.fixture(scope="module")
def workers(engine_dir: Path) -> Iterator[tuple[int, int]]:
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports.append(free.getsockname()[1])
    server = [engine_dir / "ggml-rpc-server", "-H", "127.0.0.1", "-d", "CPU", "-t", "1"]
    with running([*server, "-p", ports[0]]), running([*server, "-p", ports[1]]):
        for port in ports:
            until_open(port)
        yield ports[0], ports[1]


def difference(child: Child, prompt: Sequence[int], left: Sequence[int], right: Sequence[int]) -> float:
    """How far apart the model sees the tokens at which two answers part, in logits. 0 if they do not."""
    n = next((i for i, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1]), None)
    if n is None:
        return 0.0
    (answer,) = child.answers([*prompt, *left[:n]], max_tokens=1, n_probs=64)
    logprobs = {one.token: one.logprob for one in answer.probabilities[0].top}
    return abs(logprobs[left[n]] - logprobs[right[n]])


def poor(recorded: Sequence[int], seed: int) -> Drafter:
    """Right in the beginning, as often as not wrong after that."""
    rng = random.Random(seed)

    def draft(tokens: list[int]) -> list[int]:
        found = list(recorded[len(tokens) : len(tokens) + rng.randrange(1, 9)])
        return [token if rng.random() < 0.7 else rng.randrange(49152) for token in found]

    return draft


def garbage(tokens: list[int]) -> Sequence[int]:
    rng = random.Random(len(tokens))
    return [rng.randrange(49152) for _ in range(rng.randrange(7))]


def wrong(recorded: Sequence[int]) -> Drafter:
    return lambda tokens: [(token + 1) % 49152 for token in recorded[len(tokens) : len(tokens) + 4]]


def out_of_range(recorded: Sequence[int]) -> Drafter:
    return lambda tokens: [*recorded[len(tokens) : len(tokens) + 2], 49152, -1, 2**31 - 1, -(2**31)]


def drafters(recorded: Sequence[int]) -> dict[str, Drafter]:
    return {
        "good": follows(recorded, 8),
        "poor": poor(recorded, 1),
        "garbage": garbage,
        "wrong": wrong(recorded),
        "out of range": out_of_range(recorded),
    }


def wipe(child: Child) -> None:
    """Other prompts take all slots. What follows starts from the same memory: where tokens lie in it decides in which
    order attention sums up, and so the last digits of logits."""
    for i in range(4):
        child.tokens([1000 + i] * 3, max_tokens=1)


class TestExactness:
    @pytest.mark.parametrize("sampling", [GREEDY, WARM, Sampling(seed=5, repeat_penalty=1.3, frequency_penalty=0.2)])
    def test_drafts_change_nothing_but_the_number_of_rounds(
        self, child: Child, prompts: list[list[int]], sampling: Sampling
    ) -> None:
        for prompt in prompts[: 2 if sampling == GREEDY else 1]:
            wipe(child)
            plain = child.answers(prompt, sampling, max_tokens=20)
            assert len(plain) == len(flat(plain))
            for name, drafter in drafters([*prompt, *flat(plain)]).items():
                wipe(child)
                answers = child.answers(prompt, sampling, max_tokens=20, drafter=drafter)
                assert flat(answers) == flat(plain), name
                assert len(answers) == len(plain) - sum(answer.n_accepted for answer in answers), name
                if name == "good":
                    assert len(answers) <= 4
                if name == "wrong":
                    assert sum(answer.n_accepted for answer in answers) == 0
                if name == "out of range":
                    assert max(answer.n_draft for answer in answers) == 2

    def test_four_requests_interleaved(self, child: Child, prompts: list[list[int]]) -> None:
        """Each with its own sampling. Who shares a pass with whom is chance, and moves the last digits of logits: a
        greedy answer parts at a tie then, and of the drawn ones hardly ever more than one."""
        samplings = [GREEDY, WARM, Sampling(seed=2), Sampling(seed=3, top_k=0, temperature=1.1)]
        alone = []
        for prompt, how in zip(prompts, samplings, strict=True):
            wipe(child)
            alone.append(child.tokens(prompt, how, max_tokens=20))
        asked = [
            (prompt, how, follows([*prompt, *tokens], n))
            for prompt, how, tokens, n in zip(prompts, samplings, alone, (1, 3, 4, 0), strict=True)
        ]
        wipe(child)
        together = child.together(asked, max_tokens=20)
        greedy, *drawn = [flat(answers) for answers in together]
        assert difference(child, prompts[0], alone[0], greedy) <= NOISE
        assert sum(left != right for left, right in zip(drawn, alone[1:], strict=True)) <= 1
        assert max(answer.requests for answers in together for answer in answers) == 4

    def test_four_requests_interleaved_with_drafts_of_all_kinds(
        self, engine_dir: Path, f32_model: Path, prompts: list[list[int]]
    ) -> None:
        """Cells that one request's wrong draft leaves are filled by another's tokens: attention then sums up in another
        order. Where two tokens are as likely as each other but for that, either is right."""
        with Child() as slow:
            slow.load(engine_dir, f32_model)
            alone = [slow.tokens(prompt, max_tokens=14) for prompt in prompts]
            kinds = ["good", "poor", "garbage", "wrong"]
            asked = [
                (prompt, GREEDY, drafters([*prompt, *tokens])[kind])
                for prompt, tokens, kind in zip(prompts, alone, kinds, strict=True)
            ]
            together = slow.together(asked, max_tokens=14)
            for prompt, tokens, answers in zip(prompts, alone, together, strict=True):
                assert difference(slow, prompt, tokens, flat(answers)) <= TIE

    def test_a_draft_that_is_believed_shows(self, child: Child, prompts: list[list[int]]) -> None:
        """What the comparison above is worth: another token anywhere gives another answer."""
        plain = child.tokens(prompts[0], max_tokens=24)
        other = [*plain[:5], (plain[5] + 1) % 49152]
        assert child.tokens([*prompts[0], *other], max_tokens=18) != plain[6:]

    def test_the_beginning_is_used_again_and_changes_nothing(self, child: Child, prompts: list[list[int]]) -> None:
        prompt = child.tokenize(MANY * 4)
        wipe(child)
        first = child.answers(prompt, max_tokens=8)
        again = child.answers(prompt, max_tokens=8)
        assert (again[0].n_prompt, again[0].n_cached) == (len(prompt), len(prompt) - 1)
        assert flat(again) == flat(first)
        longer = [*prompt, *flat(first), *prompts[0]]
        reused = child.answers(longer, max_tokens=8)
        assert reused[0].n_cached >= len(prompt) + 7
        wipe(child)
        fresh = child.answers(longer, max_tokens=8)
        assert fresh[0].n_cached == 0
        assert difference(child, longer, flat(fresh), flat(reused)) <= NOISE

    def test_a_beginning_is_shared_with_a_request_that_runs(self, child: Child) -> None:
        prompt = child.tokenize("Shared: " + MANY * 3)
        wipe(child)
        first = child.open(prompt, ENDLESS, max_tokens=30)
        assert child.receive().n_cached == 0
        answers = child.answers([*prompt, 260], ENDLESS, max_tokens=6)
        assert answers[0].n_cached == len(prompt)
        child.round(first, len(prompt) + 1, free=30)
        rest = [child.receive() for _ in range(29)]
        wipe(child)
        alone = child.tokens([*prompt, 260], ENDLESS, max_tokens=6)
        assert difference(child, [*prompt, 260], alone, flat(answers)) <= NOISE
        assert rest[-1].ended is Ended.LENGTH


class TestAgainstLlamaServer:
    """The same engine's own server is the measure of tokens, draws and probabilities."""

    @pytest.mark.parametrize(
        "sampling",
        [
            GREEDY,
            Sampling(seed=42),
            Sampling(seed=7, temperature=1.2, top_k=0, top_p=0.9, min_p=0.0),
            Sampling(seed=9, repeat_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.1, repeat_last_n=-1),
            Sampling(temperature=0.0, logit_bias=((260, 5.0), (216, -50.0))),
        ],
    )
    def test_same_tokens(
        self, child: Child, prompts: list[list[int]], server: httpx.Client, sampling: Sampling
    ) -> None:
        for prompt in prompts[1:3]:
            theirs = completion(server, prompt, sampling, n_predict=16)["tokens"]
            wipe(child)
            assert child.tokens(prompt, sampling, max_tokens=16, drafter=follows([*prompt, *theirs], 4)) == theirs

    def test_same_probabilities(self, child: Child, prompts: list[list[int]], server: httpx.Client) -> None:
        theirs = completion(server, prompts[0], GREEDY, n_predict=4, n_probs=5)["completion_probabilities"]
        ours = [one for answer in child.answers(prompts[0], max_tokens=4, n_probs=5) for one in answer.probabilities]
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert one.chosen == one.top[0]
            assert [found.token for found in one.top] == [found["id"] for found in other["top_logprobs"]]
            assert [found.logprob for found in one.top] == pytest.approx(
                [found["logprob"] for found in other["top_logprobs"]], abs=2e-3
            )
            assert one.chosen.piece.decode() == other["token"]

    def test_same_special_texts(self, child: Child, prompts: list[list[int]], server: httpx.Client) -> None:
        text = "<|im_start|>user\nHi \N{GRINNING FACE}<|im_end|>\n"
        theirs = server.post("/tokenize", json={"content": text, "add_special": True}).json()["tokens"]
        assert child.tokenize(text) == theirs
        child.send(Detokenize(3, pack_tokens([*theirs, -5, 1 << 30])))
        assert child.receive() == Text(3, text.encode())


def completion(server: httpx.Client, prompt: Sequence[int], how: Sampling, **more: Any) -> dict[str, Any]:
    asked = {
        "prompt": list(prompt),
        "temperature": how.temperature,
        "top_k": how.top_k,
        "top_p": how.top_p,
        "min_p": how.min_p,
        "repeat_penalty": how.repeat_penalty,
        "presence_penalty": how.presence_penalty,
        "frequency_penalty": how.frequency_penalty,
        "repeat_last_n": how.repeat_last_n if how.repeat_last_n >= 0 else 2048,
        "seed": how.seed,
        "logit_bias": [list(pair) for pair in how.logit_bias],
        "return_tokens": True,
        "cache_prompt": False,
        **more,
    }
    answer = server.post("/completion", json=asked, timeout=60)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


@contextmanager
def running(argv: Sequence[object]) -> Iterator[int]:
    """The id of its process."""
    process = subprocess.Popen([*map(str, argv)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def until_healthy(client: httpx.Client) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    pytest.fail("llama-server did not start")


class TestRequests:
    def test_probabilities_add_up(self, child: Child, prompts: list[list[int]]) -> None:
        (answer,) = child.answers(prompts[2], WARM, max_tokens=1, n_probs=64)
        (found,) = answer.probabilities
        assert 0.5 < sum(math.exp(one.logprob) for one in found.top) <= 1 + 1e-6
        assert [one.logprob for one in found.top] == sorted((one.logprob for one in found.top), reverse=True)
        assert found.chosen.token == unpack_tokens(answer.tokens)[0]

    def test_free_rounds_and_a_draft_that_comes_late(self, child: Child, prompts: list[list[int]]) -> None:
        prompt = prompts[0]
        right = child.tokens(prompt, max_tokens=20)
        number = child.open(prompt, max_tokens=20)
        tokens = unpack_tokens(child.receive().tokens)
        child.round(number, len(prompt) + 1, free=4)
        tokens += unpack_tokens(child.receive().tokens)
        child.round(number, len(prompt) + 1, right[1:9])  # made before the free rounds went on
        while len(tokens) < 9:
            answer = child.receive()
            tokens += unpack_tokens(answer.tokens)
        assert tokens == right[: len(tokens)]
        assert answer.n_accepted >= 3
        child.close(number)

    def test_an_answer_ends_by_itself(self, child: Child) -> None:
        prompt = child.tokenize("<|im_start|>user\nAnswer with one word: yes or no?<|im_end|>\n<|im_start|>assistant\n")
        plain = child.answers(prompt, max_tokens=200)
        assert plain[-1].ended is Ended.EOG
        assert plain[-1].pieces[-1] == b""
        recorded = [*prompt, *flat(plain), 5, 6, 7]
        drafted = child.answers(prompt, max_tokens=200, drafter=follows(recorded, 300))
        assert flat(drafted) == flat(plain)
        assert len(drafted) <= 4
        assert drafted[-1].ended is Ended.EOG

    def test_a_request_closed_inside_its_prompt(self, child: Child, prompts: list[list[int]]) -> None:
        long = child.tokenize(MANY * 80)[:1900]
        number = child.open(long)
        time.sleep(0.05)
        child.close(number)
        answers = child.answers(prompts[0], max_tokens=2)
        assert {answer.request for answer in answers} == {number + 1}
        again = child.answers(long[:300], max_tokens=1)
        assert again[0].n_cached > 16, "what was read before is kept; how much that is, is a matter of speed"

    def test_a_long_prompt_lets_others_go_on(self, child: Child, prompts: list[list[int]]) -> None:
        number = child.open(prompts[0], max_tokens=400)
        child.receive()
        child.round(number, len(prompts[0]) + 1, free=400)
        child.receive()
        other = child.open(child.tokenize("Again! " + MANY * 20)[:380], max_tokens=1)
        n_beside = 0
        while (answer := child.receive()).request != other:
            n_beside += 1
        child.close(number)
        assert n_beside >= 4
        assert answer.n_prompt == 380

    @pytest.mark.parametrize(
        ("prompt", "code", "words"),
        [
            ([], "input", "empty"),
            ([49152], "input", "49152"),
            ([5] * 2048, "context", "2048"),
        ],
    )
    def test_what_cannot_be_served(self, child: Child, prompt: list[int], code: str, words: str) -> None:
        failed = child.failure(prompt)
        assert failed.code == code
        assert words in failed.reason


FORM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["kind", "old", "bold"]}, "minItems": 1, "maxItems": 3},
        "home": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
    "required": ["name", "tags"],
}
MINDING = Sampling(seed=5, repeat_penalty=1.2)


class TestGrammars:
    ASKED = "<|im_start|>user\nDescribe a person as JSON.<|im_end|>\n<|im_start|>assistant\n"

    @pytest.mark.parametrize(
        "how",
        [GREEDY, WARM, MINDING, Sampling(temperature=0.0, presence_penalty=0.5)],
        ids=["greedy", "warm", "warm, penalties", "greedy, penalties"],
    )
    def test_the_answer_has_the_form_whatever_is_drafted(self, child: Child, how: Sampling) -> None:
        grammar = grammar_of(FORM)
        prompt, guided = child.tokenize(self.ASKED), replace(how, grammar=grammar)
        plain = child.answers(prompt, guided, max_tokens=200)
        text = b"".join(piece for answer in plain for piece in answer.pieces).decode()
        assert plain[-1].ended is Ended.EOG, text
        assert Grammar(grammar).takes(text), text
        assert set(json.loads(text)) >= {"name", "tags"}
        recorded = [*prompt, *flat(plain)]
        for name, drafter in drafters(recorded).items():
            assert child.tokens(prompt, guided, max_tokens=200, drafter=drafter) == flat(plain), name

    @pytest.mark.parametrize("how", [GREEDY, WARM, MINDING], ids=["greedy", "warm", "penal"])
    def test_an_answer_goes_on_where_another_verifier_stopped(self, child: Child, how: Sampling) -> None:
        prompt, guided = child.tokenize(self.ASKED), replace(how, grammar=grammar_of(FORM))
        whole = child.tokens(prompt, guided, max_tokens=200)
        for n in (1, 7, len(whole) - 1):
            assert child.tokens(prompt, guided, max_tokens=200, said=whole[:n]) == whole

    def test_without_a_form_the_same_is_said(self, child: Child, prompts: list[list[int]]) -> None:
        """A grammar that allows anything changes nothing."""
        anything = "root ::= [^\\x00]*\n"
        for how in (GREEDY, WARM, MINDING):
            plain = child.tokens(prompts[0], how, max_tokens=24)
            assert child.tokens(prompts[0], replace(how, grammar=anything), max_tokens=24) == plain

    @pytest.mark.parametrize("grammar", ["root ::= nonsense", "root ::= root", "x", 'begin ::= "a"', "root ::= ("])
    def test_what_is_no_grammar_is_refused(self, child: Child, prompts: list[list[int]], grammar: str) -> None:
        failed = child.failure(prompts[0], replace(GREEDY, grammar=grammar))
        assert failed.code == "input"
        assert "grammar" in failed.reason
        assert child.tokens(prompts[0], max_tokens=1), "and nothing else happens"

    def test_where_nothing_is_allowed_the_answer_ends(self, child: Child, prompts: list[list[int]]) -> None:
        for how in (GREEDY, WARM):
            stuck = replace(how, grammar='root ::= "a" [^\\x00-\\U0010FFFF]')
            answers = child.answers(prompts[0], stuck, max_tokens=20)
            assert b"".join(piece for answer in answers for piece in answer.pieces) == b"a"
            assert answers[-1].ended is Ended.EOG

    def test_libllama_takes_every_grammar_that_is_made(self, engine_dir: Path, tmp_path: Path) -> None:
        """With a model that babbles, byte by byte."""
        model = tmp_path / "tiny.gguf"
        model.write_bytes(tiny_model())
        n_ended = 0
        with Child() as child:
            child.load(engine_dir, model, context=1024)
            for schema, *_ in TAKES:
                grammar = grammar_of(schema)
                how = Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=3, grammar=grammar)
                answers = child.answers([1, 80], how, max_tokens=300)
                said = b"".join(piece for answer in answers for piece in answer.pieces)
                text = said.decode(errors="replace")
                if answers[-1].ended is Ended.EOG and text.encode() == said:  # libllama lets odd bytes pass as a letter
                    n_ended += 1
                    assert Grammar(grammar).takes(text), (schema, text)
        assert n_ended > len(TAKES) / 2


class TestSmallContext:
    def test_a_full_cache_ends_the_newest_and_the_context_the_others(self, engine_dir: Path, tmp_path: Path) -> None:
        model = tmp_path / "tiny.gguf"
        model.write_bytes(tiny_model())
        with Child() as child:
            assert child.load(engine_dir, model, context=256).context == 256
            numbers = [child.open([100 + i] * 50, ENDLESS, max_tokens=1000) for i in range(4)]
            ended: dict[int, object] = {}
            n_tokens = dict.fromkeys(numbers, 0)
            while len(ended) < 4:
                answer = child.receive()
                if isinstance(answer, Failed):
                    ended[answer.request] = answer.code
                    continue
                assert isinstance(answer, Accepted)
                n_tokens[answer.request] += len(answer.pieces)
                if answer.ended:
                    ended[answer.request] = answer.ended
                else:
                    child.round(answer.request, 50 + n_tokens[answer.request], [1, 3, 3])
            assert ended[numbers[0]] is Ended.LENGTH
            assert n_tokens[numbers[0]] == 256 - 50
            assert [ended[number] for number in numbers[1:]] == ["cache"] * 3
            assert child.answers([3] * 60, ENDLESS, max_tokens=2)[-1].ended is Ended.LENGTH


class TestMemoryThatCannotBeRolledBack:
    def test_a_window(self, engine_dir: Path, tmp_path: Path) -> None:
        with Child() as child:
            loaded = child.load(engine_dir, tiny_models.windowed(tmp_path / "w.gguf"), context=1024, slots=1, batch=32)
            assert (loaded.rollback, loaded.window) == (Rollback.WINDOW, tiny_models.WINDOW)
            prompt = noise(300)
            plain = child.answers(prompt, ENDLESS, max_tokens=200, n_probs=9)
            recorded = [*prompt, *flat(plain)]
            assert len(recorded) == 500
            child.tokens(noise(300, seed=2), max_tokens=1)
            for drafter in (follows(recorded, 8), mixed(recorded), follows([0] * 500, 16)):
                answers = child.answers(prompt, ENDLESS, max_tokens=200, drafter=drafter, n_probs=9)
                assert apart(plain, answers) < 0.01  # a token missing from its window would make it more than 1
                assert difference(child, prompt, flat(plain), flat(answers)) < 0.01
                assert sum(answer.n_draft for answer in answers) > 150
            assert child.answers(prompt[:100], max_tokens=1)[0].n_cached == 0  # memory has the end of it only
            child.tokens(prompt, max_tokens=1)
            longer = [*prompt, 9, 9]
            reused = child.answers(longer, ENDLESS, max_tokens=30, n_probs=9)
            assert reused[0].n_cached == 300
            child.tokens(noise(300, seed=2), max_tokens=1)
            fresh = child.answers(longer, ENDLESS, max_tokens=30, n_probs=9)
            assert fresh[0].n_cached == 0
            assert apart(fresh, reused) < 0.01

    def test_a_state(self, engine_dir: Path, tmp_path: Path) -> None:
        with Child() as child:
            loaded = child.load(engine_dir, tiny_models.recurrent(tmp_path / "r.gguf"), context=1024, slots=2)
            assert loaded.rollback is Rollback.NONE
            prompts = [noise(100, seed) for seed in range(3)]
            plain = [child.answers(prompt, ENDLESS, max_tokens=40, n_probs=9) for prompt in prompts]
            asked = [(p, ENDLESS, follows([*p, *flat(a)], 6)) for p, a in zip(prompts, plain, strict=True)]
            together = child.together(asked, max_tokens=40, n_probs=9)
            assert max(map(apart, plain, together)) < 0.01
            assert sum(answer.n_draft for answers in together for answer in answers) == 0
            longer = [*prompts[2], *flat(together[2]), 9]
            reused = child.answers(longer, ENDLESS, max_tokens=20, n_probs=9)
            assert reused[0].n_cached == 139
            assert child.answers(longer[:50], max_tokens=1)[0].n_cached == 0
            for seed in (7, 8):
                child.tokens(noise(60, seed), max_tokens=1)
            fresh = child.answers(longer, ENDLESS, max_tokens=20, n_probs=9)
            assert fresh[0].n_cached == 0
            assert apart(fresh, reused) < 0.01


def apart(left: Sequence[Accepted], right: Sequence[Accepted]) -> float:
    """The largest difference between two answers' logarithms of probabilities, up to where their tokens part."""
    worst = 0.0
    pairs = zip(
        (one for answer in left for one in answer.probabilities),
        (one for answer in right for one in answer.probabilities),
        strict=False,
    )
    for one, other in pairs:
        logprobs = {found.token: found.logprob for found in other.top}
        common = [abs(found.logprob - logprobs[found.token]) for found in one.top if found.token in logprobs]
        worst = max([worst, *common]) if common else math.inf
        if one.chosen.token != other.chosen.token:
            break
    return worst


def noise(n: int, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, tiny_models.N_VOCAB) for _ in range(n)]


def mixed(recorded: Sequence[int]) -> Drafter:
    rng = random.Random(3)

    def draft(tokens: list[int]) -> list[int]:
        found = list(recorded[len(tokens) : len(tokens) + rng.randrange(1, 20)])
        if found and rng.random() < 0.7:
            found[rng.randrange(len(found))] = rng.randrange(tiny_models.N_VOCAB)
        return found

    return draft


class TestPool:
    def test_the_same_tokens_from_two_workers(
        self, child: Child, prompts: list[list[int]], workers: tuple[int, int], engine_dir: Path, demo_model: Path
    ) -> None:
        with Child(stderr=subprocess.PIPE) as pooled:
            pooled.load(engine_dir, demo_model, rpc_ports=workers, rpc_shares=(3, 1), offload_layers=20)
            for how in (GREEDY, WARM):
                alone = child.tokens(prompts[0], how, max_tokens=16)
                drafter = follows([*prompts[0], *alone], 5)
                assert pooled.tokens(prompts[0], how, max_tokens=16, drafter=drafter) == alone
            pooled.sock.shutdown(socket.SHUT_WR)
            assert pooled.process.stderr is not None
            log = pooled.process.stderr.read().decode(errors="replace")
        assert "offloaded 21/31 layers" in log
        assert "RPC0" in log
        assert "RPC1" in log

    def test_devices_that_are_not_there(self, workers: tuple[int, int], engine_dir: Path, demo_model: Path) -> None:
        with Child() as child:
            child.send(Load(str(engine_dir), str(demo_model), 512, rpc_ports=workers, rpc_shares=(1, 1, 1)))
            refused = refusal(child)
        assert refused.kind == "device"
        assert "2 devices" in refused.reason

    def test_memory_that_a_worker_does_not_have(self, engine_dir: Path, f32_model: Path) -> None:
        """It is said on which of the devices, and how much of it, and the worker lives on."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        argv = [engine_dir / "ggml-rpc-server", "-H", "127.0.0.1", "-d", "CPU", "-t", "1", "-p", port]
        with running(argv) as pid, Child(stderr=subprocess.DEVNULL) as child:
            until_open(port)
            has = psutil.Process(pid).memory_info().vms
            resource.prlimit(pid, resource.RLIMIT_AS, (has + (100 << 20),) * 2)
            where = {"rpc_ports": (port,), "rpc_shares": (1,), "offload_layers": 20}
            child.send(Load(str(engine_dir), str(f32_model), 512, threads=1, **where))
            refused = refusal(child)
            assert psutil.Process(pid).is_running()
        assert refused.kind == "memory"
        assert refused.device.startswith("RPC0")
        assert 200 << 20 < refused.needed < 600 << 20
        assert str(refused.needed) in refused.reason


def until_open(port: int) -> None:
    """It listens; a connection would keep it busy."""
    end = time.monotonic() + 20
    wanted = f"0100007F:{port:04X} 00000000:0000 0A"
    while time.monotonic() < end:
        if wanted in Path("/proc/net/tcp").read_text():
            return
        time.sleep(0.02)
    pytest.fail("ggml-rpc-server did not start")


def refusal(child: Child) -> Refused:
    while isinstance(message := child.receive(), Loading):
        pass
    assert isinstance(message, Refused), message
    with pytest.raises(EOFError):
        child.receive()
    assert child.process.wait(10) == 0
    return message


class TestLoading:
    def refused(self, library: Path, model: Path, context: int = 512, **fields: Any) -> Refused:
        with Child(stderr=subprocess.DEVNULL) as child:
            child.send(Load(str(library), str(model), context, **fields))
            return refusal(child)

    def test_what_is_told_of_the_model(self, engine_dir: Path, demo_model: Path) -> None:
        with Child(stderr=subprocess.DEVNULL) as child:
            loaded = child.load(engine_dir, demo_model, context=1000, slots=3)
        assert (loaded.context, loaded.context_train, loaded.slots, loaded.n_vocab) == (1024, 8192, 3, 49152)
        assert (loaded.rollback, loaded.window) == (Rollback.FULL, 0)
        assert 2 in unpack_tokens(loaded.eog)
        assert (loaded.eos, loaded.eos_text, loaded.adds_bos) == (2, "<|im_end|>", False)
        assert "<|im_start|>" in loaded.chat_template
        assert loaded.load_ms > 0

    def test_a_broken_model(self, engine_dir: Path, demo_model: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(demo_model.read_bytes()[: 50 << 20])
        refused = self.refused(engine_dir, broken)
        assert refused.kind == "model"
        assert "corrupted or incomplete" in refused.reason

    def test_no_model(self, engine_dir: Path, tmp_path: Path) -> None:
        assert self.refused(engine_dir, tmp_path).kind == "model"

    def test_a_device_that_is_not_there(self, engine_dir: Path, demo_model: Path) -> None:
        refused = self.refused(engine_dir, demo_model, local_devices=("CUDA7",), local_shares=(1,))
        assert (refused.kind, refused.device) == ("device", "CUDA7")
        assert "CPU" in refused.reason

    @pytest.mark.parametrize("context", [0, 1 << 21, 1 << 62])
    def test_a_context_that_is_none(self, engine_dir: Path, demo_model: Path, context: int) -> None:
        refused = self.refused(engine_dir, demo_model, context)
        assert (refused.kind, str(context) in refused.reason) == ("model", True)

    def test_another_library(self, tmp_path: Path, engine_dir: Path, demo_model: Path) -> None:
        assert self.refused(tmp_path, demo_model).kind == "build"
        for file in engine_dir.iterdir():
            if ".so" in file.name:
                (tmp_path / file.name).symlink_to(file)
        (tmp_path / "tightwad-engine.json").write_text('{"build": "b11435"}')
        refused = self.refused(tmp_path, demo_model)
        assert refused.kind == "build"
        assert "b11435" in refused.reason

    @pytest.mark.parametrize(("structure", "field"), [("ModelParams", "lazy_mode"), ("ContextParams", "n_rs_seq")])
    def test_a_library_with_other_layouts(self, engine_dir: Path, structure: str, field: str) -> None:
        """As a build with one field less would look: its defaults are not where they are expected."""
        code = (
            "import ctypes, sys; from pathlib import Path; from tightwad_agent.engine.verifier import abi\n"
            f"fields = tuple(one for one in abi.{structure}._fields_ if one[0] != {field!r})\n"
            f"abi.{structure} = type({structure!r}, (ctypes.Structure,), {{'_fields_': fields}})\n"
            "for table in (abi._BASE, abi._GGML, abi._LLAMA):\n"
            f"    table |= {{name: (abi.{structure}, *rest) for name, (result, *rest) in table.items()"
            f" if getattr(result, '__name__', '') == {structure!r}}}\n"
            f"expected = {{'ModelParams': abi.MODEL_DEFAULTS, 'ContextParams': abi.CONTEXT_DEFAULTS}}[{structure!r}]\n"
            f"del expected[{field!r}]\n"
            "try:\n    abi.load(Path(sys.argv[1]))\nexcept abi.NoFit as exc:\n    print(exc)\n"
        )
        argv = [sys.executable, "-c", code, str(engine_dir)]
        said = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=30).stdout
        assert "_default_params: " in said
        assert " is " in said

    def test_memory_that_cannot_be_had(self, engine_dir: Path, demo_model: Path) -> None:
        with Child(stderr=subprocess.DEVNULL) as child:
            resource.prlimit(child.process.pid, resource.RLIMIT_AS, (4 << 30, 4 << 30))
            child.send(Load(str(engine_dir), str(demo_model), 1 << 20, threads=1))
            refused = refusal(child)
        assert (refused.kind, refused.device) == ("memory", "CPU")
        assert refused.needed > 20 << 30
        assert str(refused.needed) in refused.reason

    def test_an_agent_that_goes_away_while_it_loads(self, engine_dir: Path, f32_model: Path) -> None:
        with Child(stderr=subprocess.DEVNULL) as child:
            child.send(Load(str(engine_dir), str(f32_model), 512, threads=1))
            child.receive()
            child.sock.close()
            assert child.process.wait(20) == 0


class TestProcess:
    def test_ends_with_its_agent_while_it_computes(self, engine_dir: Path, demo_model: Path) -> None:
        with Child(stderr=subprocess.DEVNULL) as child:
            child.load(engine_dir, demo_model)
            number = child.open([5] * 10, max_tokens=500)
            child.receive()
            child.round(number, 11, free=500)
            child.receive()
            child.sock.close()
            assert child.process.wait(20) == 0

    @pytest.mark.parametrize(
        "data",
        [encode(TO_VERIFIER.encode(Close(1))), b"GET / HTTP/1.1\r\n\r\n", encode(b"\x93\x01\x02\x03"), b"\0" * 8],
    )
    def test_what_is_no_load_ends_it_with_a_word(self, data: bytes) -> None:
        with Child(stderr=subprocess.PIPE) as child:
            child.sock.sendall(data)
            assert child.process.wait(20) == 1
            assert child.process.stderr is not None
            said = child.process.stderr.read()
        assert said.startswith(b"verifier: ")
        assert said.count(b"\n") == 1

    def test_imports_little(self) -> None:
        code = (
            "import sys, tightwad_agent.engine.verifier.program;"
            "print(*sorted({'trio', 'click', 'httpx', 'numpy', 'rich', 'asyncio', 'psutil'} & set(sys.modules)))"
        )
        found = subprocess.run([sys.executable, "-I", "-c", code], check=True, capture_output=True, timeout=30)
        assert found.stdout.strip() == b""
