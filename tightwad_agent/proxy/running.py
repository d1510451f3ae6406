"""The answers to one request, generated side by side: tokens from the generator, parts into a sink."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import trio

from tightwad_agent.errors import ProtocolError, TightwadError
from tightwad_agent.proxy.answers import Usage, sum_timings
from tightwad_agent.proxy.parameters import Ask, seed_of
from tightwad_agent.proxy.ports import Chunk, Generator, Timings
from tightwad_agent.proxy.sinks import Sink
from tightwad_agent.proxy.transcript import Part, Transcript
from tightwad_agent.wire.verify import Sampling

AT_ONCE = 8
"""Of one request; the others wait."""


@dataclass(frozen=True, slots=True)
class Job:
    """One answer to generate: the `index`-th choice, from `prompt`, to begin with `echo`. `again`: another choice has
    the same prompt and counts it. `said`: token ids that another engine has said of it, which found `n_cached` of the
    prompt in its cache."""

    index: int
    prompt: tuple[int, ...]
    echo: str = ""
    again: bool = False
    said: tuple[int, ...] = ()
    n_cached: int = 0

    def usage(self, n_answer: int, n_cached: int) -> Usage:
        if self.again:
            return Usage(0, n_answer)
        return Usage(len(self.prompt), n_answer, self.n_cached if self.said else n_cached)


class Run:
    """One request. `sampling` has the seed of its first answer. `usages`: of answers that are complete already.
    `beside` runs meanwhile."""

    def __init__(
        self,
        generator: Generator,
        ask: Ask,
        sampling: Sampling,
        sink: Sink,
        *,
        usages: Sequence[Usage] = (),
        beside: Sequence[Callable[[], Awaitable[None]]] = (),
    ) -> None:
        self._generator = generator
        self._ask = ask
        self._sampling = sampling
        self._sink = sink
        self._failed: TightwadError | None = None
        self._at_once = trio.CapacityLimiter(AT_ONCE)
        self._beside = beside
        self._usages = list(usages)
        self._timings: list[Timings] = []

    async def all(self, jobs: Sequence[Job]) -> None:
        """Raises the first error."""
        async with trio.open_nursery() as outer:
            for beside in (self._sink.keep_alive, *self._beside):
                outer.start_soon(beside)
            async with trio.open_nursery() as nursery:
                for job in jobs:
                    nursery.start_soon(self._guarded, job, outer.cancel_scope)
            outer.cancel_scope.cancel()
        if self._failed is not None:
            raise self._failed
        await self._sink.close(self._usages, sum_timings(self._timings))

    async def _guarded(self, job: Job, scope: trio.CancelScope) -> None:
        """One job. Its error ends all of them, and comes out of `all` as itself, in no group."""
        try:
            async with self._at_once:
                await self._one(job)
        except TightwadError as exc:
            async with self._sink.between_writes():
                self._failed = self._failed or exc
                scope.cancel()

    async def _one(self, job: Job) -> None:
        transcript = Transcript(self._ask.stop, with_tokens=self._ask.n_probs >= 0)
        last, timings = await self._followed(job, transcript)
        if not last.finish:
            raise ProtocolError("the verifier ended an answer without saying why")
        await self._sink.part(job.index, last, timings, transcript.n_tokens)
        self._usages.append(job.usage(transcript.n_tokens, timings.n_cached))
        self._timings.append(timings)

    async def _followed(self, job: Job, transcript: Transcript) -> tuple[Part, Timings]:
        """Passes all parts on but the last. When this returns, the verifier works on this job no more."""
        sampling = replace(self._sampling, seed=seed_of(self._sampling.seed, job.index))
        room = self._generator.info.context - len(job.prompt)
        limit = room if self._ask.max_tokens is None else min(room, self._ask.max_tokens)
        part, echo, n_said = Part(""), job.echo, len(job.said)
        async with self._generator.start(
            job.prompt,
            sampling,
            max_tokens=limit,
            n_probs=self._ask.n_probs,
            drafts=self._ask.speculation,
            said=job.said,
        ) as generation:
            async with _closed_after(aiter(generation)) as chunks:
                async for chunk in chunks:
                    part = transcript.feed(chunk)
                    if echo:
                        part, echo = replace(part, text=echo + part.text), ""
                    if part.finish:
                        break
                    if n_said > 0:
                        self._sink.repeat(job.index, part)
                        n_said -= len(part.ids)
                        continue
                    await self._sink.part(job.index, part, generation.timings)
            return part, generation.timings


@asynccontextmanager
async def _closed_after(chunks: AsyncIterator[Chunk]) -> AsyncIterator[AsyncIterator[Chunk]]:
    """An async generator that is not run to its end must be closed by who leaves it."""
    try:
        yield chunks
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()
