"""A `Cluster` and a `Generator` for tests of the endpoint; they ship, so that others can use them too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from tightwad_agent.errors import PeerUnreachable, TightwadError
from tightwad_agent.ids import NodeId
from tightwad_agent.proxy.cluster import Command, Route, Unavailable
from tightwad_agent.proxy.metrics import MetricsView
from tightwad_agent.proxy.openai import ModelEntry
from tightwad_agent.proxy.ports import Chunk, Timings, Token
from tightwad_agent.streams import OpenStream
from tightwad_agent.wire.verify import Ended, Loaded, Probability, Rollback, Sampling, TokenProbabilities, pack_tokens


@dataclass
class FakeCluster:
    """Says what it is told to say. `routes`: what `route` answers next, before `where`."""

    where: Route = field(default_factory=lambda: Unavailable("nothing is served", {"state": "stopped"}))
    routes: list[Route] = field(default_factory=list)
    entries: list[ModelEntry] = field(default_factory=lambda: [ModelEntry("ab" * 32, "demo.gguf", served=True)])
    key: str = "the-api-key"
    opener: OpenStream | None = None
    dead: set[NodeId] = field(default_factory=set)
    commands: Mapping[str, Command] = field(default_factory=dict)
    in_flight: int = 0
    on_route: Callable[[], None] = lambda: None

    def status(self) -> dict[str, Any]:
        return {"node": "fake", "target": {"state": "ready"}}

    def peers(self) -> list[dict[str, Any]]:
        return [{"id": "fake", "state": "alive"}]

    def models(self) -> list[ModelEntry]:
        return self.entries

    def route(self) -> Route:
        self.on_route()
        return self.routes.pop(0) if self.routes else self.where

    def metrics(self) -> MetricsView:
        return MetricsView(version="0", llama_cpp="b0", in_flight=self.in_flight)

    def alive(self, node: NodeId) -> bool:
        return node not in self.dead

    def membership(self) -> frozenset[NodeId]:
        return frozenset(self.dead)

    async def open_stream(self, node: NodeId, service: str, args: dict[str, Any]) -> trio.abc.Stream:
        if self.opener is None:
            await trio.lowlevel.checkpoint()
            raise PeerUnreachable(f"no address of {node.short} accepted a connection")
        return await self.opener(node, service, args)

    def key_holder(self, key: bytes) -> str:
        return "default" if key == self.key.encode() else ""

    @contextmanager
    def request_started(self) -> Iterator[None]:
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1


BOS, EOS, TURN = 256, 257, 258
_SPECIAL = {BOS: b"<s>", EOS: b"</s>", TURN: b"<|turn|>"}

Step = Chunk | TightwadError | trio.Event | float
"""A chunk to bring, an error to raise, an event to wait for, seconds to sleep."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What `FakeGenerator.start` was asked for."""

    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    n_probs: int
    drafts: bool = True
    said: tuple[int, ...] = ()


def fake_info(**more: Any) -> Loaded:
    """Of a model whose tokens are bytes, and three control tokens."""
    facts: dict[str, Any] = {
        "context": 4096,
        "context_train": 4096,
        "slots": 4,
        "n_vocab": 259,
        "rollback": Rollback.FULL,
        "eog": pack_tokens([EOS]),
        "bos": BOS,
        "eos": EOS,
        "adds_bos": True,
        "bos_text": "<s>",
        "eos_text": "</s>",
    }
    return Loaded(**{**facts, **more})


def fake_token(token: int, n_probs: int = -1) -> Token:
    """As the verifier sends it: control tokens without text; of alternatives, the ids that follow."""
    piece = bytes([token]) if token < 256 else b""
    if n_probs < 0:
        return Token(token, piece)
    others = [Probability((token + i) % 256, -0.5 - i, bytes([(token + i) % 256])) for i in range(n_probs)]
    return Token(token, piece, TokenProbabilities(Probability(token, -0.5, piece), tuple(others)))


def fake_chunks(text: bytes, size: int, ended: Ended = Ended.EOG, n_probs: int = -1) -> list[Chunk]:
    """The text in rounds of `size` tokens."""
    ids = [*text, EOS] if ended is Ended.EOG else [*text]
    rounds = [ids[i : i + size] for i in range(0, len(ids), size)]
    last = len(rounds) - 1
    return [
        Chunk(tuple(fake_token(t, n_probs) for t in ids), ended if i == last else Ended.NOT)
        for i, ids in enumerate(rounds)
    ]


@dataclass
class _FakeGeneration:
    steps: Iterator[Step]
    timings: Timings

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        for step in self.steps:
            await trio.lowlevel.checkpoint()
            if isinstance(step, TightwadError):
                raise step
            if isinstance(step, trio.Event):
                await step.wait()
            elif isinstance(step, Chunk):
                self.timings.n_generated += len(step.tokens)
                self.timings.rounds += 1
                yield step
            else:
                await trio.sleep(step)


def _repeated(steps: Iterable[Step], said: list[int]) -> Iterator[Step]:
    """What was said in a chunk of its own, and then the rest; an assertion fails if something else was said."""
    n_left, held = len(said), list[Token]()
    for step in steps:
        if not n_left or not isinstance(step, Chunk):
            yield step
            continue
        n = min(n_left, len(step.tokens))
        held += step.tokens[:n]
        n_left -= n
        if not n_left:
            assert [token.id for token in held] == said, "another answer was begun"
            yield Chunk(tuple(held))
            if rest := step.tokens[n:]:
                yield Chunk(rest, step.ended)


@dataclass
class FakeGenerator:
    """A `Generator` that does what `script` says to each thing asked of it."""

    script: Callable[[Asked], Iterable[Step]] = lambda asked: fake_chunks(b"Hello!", 2, n_probs=asked.n_probs)
    info: Loaded = field(default_factory=fake_info)
    asked: list[Asked] = field(default_factory=list)
    running: int = 0
    started: trio.Event = field(default_factory=trio.Event)
    fails: TightwadError | None = None
    """What the helpers raise."""

    async def tokenize(self, text: bytes, *, special: bool = True, begin: bool = True) -> list[int]:
        await self._checkpoint()
        tokens = [BOS] if begin and self.info.adds_bos else []
        while text:
            found = next((t for t, name in _SPECIAL.items() if special and text.startswith(name)), text[0])
            tokens.append(found)
            text = text[len(_SPECIAL.get(found, b".")) :]
        return tokens

    async def detokenize(self, tokens: Sequence[int]) -> bytes:
        await self._checkpoint()
        return b"".join(_SPECIAL.get(t, bytes([t % 256])) for t in tokens)

    async def _checkpoint(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.fails is not None:
            raise self.fails

    @asynccontextmanager
    async def start(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int,
        n_probs: int = -1,
        drafts: bool = True,
        said: Sequence[int] = (),
    ) -> AsyncIterator[_FakeGeneration]:
        """`script` is asked for the whole answer; what was said of it comes first, as one chunk."""
        asked = Asked(tuple(prompt), sampling, max_tokens, n_probs, drafts, tuple(said))
        self.asked.append(asked)
        self.running += 1
        self.started.set()
        try:
            steps = _repeated(self.script(asked), list(said))
            yield _FakeGeneration(steps, Timings(n_prompt=len(prompt), n_cached=1))
        finally:
            self.running -= 1
