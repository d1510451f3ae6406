"""The ways of answering that `scripts/bench speculation` compares: each takes a prompt and gives a `Sample`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import trio
from drafter_node import ASKING, MODEL
from rig import LlamaServer, Rig, RigError
from speculation_table import HANGS, HANGS_MIDWAY, POOR, SPECULATION, VERIFIER, WRONG, Sample
from speculation_trace import Trace, TracedDrafter, TracedVerifier

from tightwad_agent.engine.verifying import VerifierClient
from tightwad_agent.proxy.costs import Costs
from tightwad_agent.proxy.generation import Settings, VerifierGenerator
from tightwad_agent.proxy.ports import Drafter, Verifier
from tightwad_agent.wire.draft import DrafterInfo
from tightwad_agent.wire.verify import GREEDY

Way = Callable[[Sequence[int], int], Awaitable[Sample]]
"""Answers a prompt of token ids with so many tokens; its place in the table is filled in by who asks."""

FOUR = 4


def blank(tokens: Sequence[int], *, prompt_s: float, generate_s: float, **more: Any) -> Sample:
    return Sample("", 0, 0, 0, tuple(tokens), prompt_s, generate_s, **more)


def server_way(server: LlamaServer) -> Way:
    """llama-server's own clock counts, which leaves HTTP out."""

    async def run(prompt: Sequence[int], n_tokens: int) -> Sample:
        done = await server.complete(prompt, n_tokens)
        return blank(
            done.tokens,
            prompt_s=done.prompt_ms / 1000,
            generate_s=done.generate_ms / 1000,
            drafted=done.drafted,
            accepted=done.accepted,
        )

    return run


async def answer(generator: VerifierGenerator, prompt: Sequence[int], n_tokens: int) -> Sample:
    """One answer, by the clock on the wall of this process, which plays the agent."""
    began, cpu_began = time.perf_counter(), time.process_time()
    first = 0.0
    tokens: list[int] = []
    async with generator.start(prompt, GREEDY, max_tokens=n_tokens) as generation:
        async for chunk in generation:
            first = first or time.perf_counter()
            tokens += [token.id for token in chunk.tokens]
        last = time.perf_counter()
        timings = generation.timings
    return blank(
        tokens,
        prompt_s=first - began,
        generate_s=last - first,
        began_s=began,
        cpu_s=time.process_time() - cpu_began,
        drafted=timings.drafted,
        accepted=timings.accepted,
        rounds=timings.rounds,
        more={
            "verify_ms": timings.verify_ms,
            "draft_ms": timings.draft_ms,
            "waited_ms": timings.waited_ms,
            "drafters": dict(timings.drafters),
        },
    )


@dataclass
class VerifierWays:
    """All ways over one verifier: without drafts, and with each kind of drafter on a port of its own.

    `ports`: where each way's drafter listens, behind the relay. A drafter that is sound keeps its stream and its record
    over the answers of one round trip, as it does in use; those that hang are met for the first time in each answer.
    `ngram`: with drafts from the text itself beside those of the sound drafter; the others never have them, so that
    their figures are theirs alone.
    """

    rig: Rig
    client: VerifierClient
    ports: dict[str, int]
    trace: Trace | None = None
    ngram: bool = True
    rtt_ms: float = 0.0
    generators: dict[str, VerifierGenerator] = field(default_factory=dict)
    streams: list[trio.CancelScope] = field(default_factory=list)

    @classmethod
    async def start(
        cls, rig: Rig, rpc_ports: tuple[int, ...], target: Path, draft: Path, poor: Path, work_dir: Path
    ) -> VerifierWays:
        """Loads and starts all of it, over the workers behind these ports. Raises `RigError`."""
        client, _child = await rig.verifier(target, rpc_ports)
        good = await rig.drafter(draft, work_dir / "good")
        behind = {
            SPECULATION: good,
            POOR: await rig.drafter(poor, work_dir / "poor"),
            WRONG: await stand_in(rig, client, "wrong"),
            HANGS: await stand_in(rig, client, "hangs"),
            HANGS_MIDWAY: await stand_in(rig, client, "midway", "--behind", str(good)),
        }
        return cls(rig, client, {way: await rig.link(port) for way, port in behind.items()})

    async def at(self, rtt_ms: float, names: Sequence[str]) -> dict[str, Way]:
        """Fresh streams and fresh measurements for another round trip: the ways by name."""
        for stream in self.streams:
            stream.cancel()
        self.streams.clear()
        self.generators.clear()
        self.rtt_ms = rtt_ms
        for name in names:
            if name not in (HANGS, HANGS_MIDWAY):
                self.generators[name] = await self._generator(name)
        return {name: self._way(name) for name in names}

    def _way(self, name: str) -> Way:
        async def run(prompt: Sequence[int], n_tokens: int) -> Sample:
            kept = self.generators.get(name)
            generator = kept or await self._generator(name)
            if self.trace:
                self.trace.context = {"way": name, "rtt_ms": self.rtt_ms}
            made = await answer(generator, prompt, n_tokens)
            if not kept:
                self.streams.pop().cancel()
            return made

        return run

    async def _generator(self, name: str) -> VerifierGenerator:
        drafters = [] if name == VERIFIER else [await self._drafter(name)]
        verifier: Verifier = TracedVerifier(self.client, self.trace) if self.trace else self.client
        settings = Settings(drafts=name != VERIFIER, ngram=self.ngram and name == SPECULATION)
        return VerifierGenerator(verifier, lambda: drafters, Costs(), settings)

    async def _drafter(self, name: str) -> Drafter:
        info = DrafterInfo(ASKING, name, str(MODEL), 4, self.rtt_ms / 1000)
        describe = partial(_with_slots, info)
        link, stream = await self.rig.link_to(self.ports[name], describe, self.client.info.n_vocab)
        self.streams.append(stream)
        return TracedDrafter(link, self.trace) if self.trace else link

    async def at_once(self, name: str, prompts: Sequence[Sequence[int]], n_tokens: int) -> list[Sample]:
        """Several answers at the same time."""
        made: list[Sample | None] = [None] * len(prompts)

        async def one(i: int) -> None:
            made[i] = await answer(self.generators[name], prompts[i], n_tokens)

        if self.trace:
            self.trace.context = {"way": f"{name}, {len(prompts)} streams", "rtt_ms": self.rtt_ms}
        async with trio.open_nursery() as nursery:
            for i in range(len(prompts)):
                nursery.start_soon(one, i)
        return [replace(sample, n_streams=len(prompts)) for sample in made if sample is not None]


def _with_slots(info: DrafterInfo, slots: int) -> DrafterInfo:
    return replace(info, slots=slots)


async def stand_in(rig: Rig, client: VerifierClient, kind: str, *more: str) -> int:
    facts = ["--model", str(MODEL), "--vocab", str(client.info.n_vocab)]
    try:
        return (await rig.script("stand_in_drafter", kind, *facts, *more))[1]
    except RigError as exc:
        raise RigError(f"the stand-in that is {kind}: {exc}") from None
