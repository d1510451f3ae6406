"""Speculative decoding measured: llama-server's ways and ours over the same three workers, through one network.

All ways run in turn within one call, prompt by prompt, so that what this machine does otherwise hits all alike; each
has workers of its own. A relay puts the round trip and the rate between the coordinator's programs and each worker, and
the drafter. The verifier reaches its workers through the product's tunnels, as in an agent; llama-server as one runs it
without agents. Ratios are medians over the repeats. Exit code 1 if an answer differs from the pool's own, or something
broke; a missed goal is in the table, not in the exit code.

The last line of `--json` is one object: environment, options, ratios with goals, acceptance, relay, all samples.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mesh_way
import speculation_table as table
import trio
from netlab import NetLabError
from rig import LlamaServer, Rig, RigError, quantised
from speculation_table import HANGS, HANGS_MIDWAY, LOCAL, POOL, POOR, SPECULATION, VERIFIER, WRONG, Sample
from speculation_trace import Trace, explain
from speculation_ways import FOUR, VerifierWays, Way, server_way
from surroundings import Stolen, environment
from tightwad_peer import Peer, install
from tunnelled import Tunnels

from tightwad_agent.config import load
from tightwad_agent.errors import TightwadError
from tightwad_agent.prompts import PROMPTS

N_LOCAL = (3, 8, 16)
FIRST_PROMPTS = (
    "Once upon a time in a small village,",
    "def fibonacci(n):\n    ",
    "The capital of France is",
    "Explain step by step how to compute 17 * 24:",
)
WARM_UP = "Hello"
WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for on the command line."""

    rtts: tuple[float, ...]
    mbit: float
    repeats: int
    n_prompts: int
    n_tokens: int
    n_local: tuple[int, ...]
    extras_rtt: tuple[float, ...]
    threads: int
    ngram: bool
    peer: bool
    mesh: bool
    tunnels: bool


def prompts(n: int) -> list[str]:
    """The first four are the same in every run; more come from the kinds in turn."""
    more = [prompt for row in zip(*PROMPTS.values(), strict=False) for prompt in row]
    return [*FIRST_PROMPTS, *more][:n]


@dataclass
class Bench:
    """The ways that run, and what they have brought."""

    rig: Rig
    options: Options
    trace: Trace | None = None
    texts: list[str] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    servers: dict[str, Way] = field(default_factory=dict)
    verifier: VerifierWays | None = None
    tunnels: Tunnels | None = None
    peer: Peer | None = None
    peer_problem: str = ""
    samples: list[Sample] = field(default_factory=list)
    relay: list[dict[str, Any]] = field(default_factory=list)

    async def open(self, models: Models, work_dir: Path) -> None:
        """Starts and loads all that is compared, with nothing slowed down yet."""
        self.texts = prompts(self.options.n_prompts)
        pool = await self._server(models.target)
        self.servers[POOL] = server_way(pool)
        for n in self.options.n_local:
            self.servers[LOCAL.format(n)] = server_way(await self._server(models.target, draft=models.draft, n_max=n))
        say("loading the verifier and its drafters")
        ports = await self._workers(work_dir)
        self.verifier = await VerifierWays.start(self.rig, ports, models.target, models.draft, models.poor, work_dir)
        self.verifier.trace, self.verifier.ngram = self.trace, self.options.ngram
        self.prompts = [await pool.tokenize(text) for text in self.texts]
        for text, prompt in zip(self.texts, self.prompts, strict=True):
            if await self.verifier.client.tokenize(text.encode()) != prompt:
                raise RigError(f"the verifier tokenizes {text!r} otherwise than llama-server")

    async def _workers(self, work_dir: Path) -> tuple[int, ...]:
        """Those of the verifier."""
        if not self.options.tunnels:
            return await self.rig.workers()
        self.tunnels = Tunnels.founded(work_dir)
        return await self.tunnels.workers(self.rig)

    async def open_peer(self, models: Models) -> None:
        """The other program; without it the rest is measured all the same."""
        say("installing and loading Tightwad 0.5.4")
        try:
            python = await install(load().cache_dir)
            self.peer = await Peer.start(self.rig, python, models.target, models.draft)
        except RigError as exc:
            self.peer_problem = str(exc)
            say(self.peer_problem)

    async def _server(self, target: Path, **how: Any) -> LlamaServer:
        say(f"loading llama-server {how.get('n_max') or ''}")
        return await self.rig.server(target, await self.rig.workers(), **how)

    async def run(self) -> None:
        for rtt_ms in self.options.rtts:
            await self.rig.relay.set(rtt_ms, self.options.mbit)
            ways = await self._ways(rtt_ms)
            await self._warm_up(rtt_ms, ways)
            await self.rig.relay.stats()
            for repeat in range(self.options.repeats):
                await self._repeat(rtt_ms, repeat, ways)
                if rtt_ms in self.options.extras_rtt:
                    await self._at_once(rtt_ms, repeat)
                if self.peer:
                    await self.peer.ask(self.texts, self.options.n_tokens, rtt_ms, repeat)
            crossed = self.tunnels.crossed() if self.tunnels else {}
            self.relay.append({"rtt_ms": rtt_ms, **await self.rig.relay.stats(), **crossed})

    async def _ways(self, rtt_ms: float) -> dict[str, Way]:
        assert self.verifier
        extras = (POOR, WRONG, HANGS, HANGS_MIDWAY) if rtt_ms in self.options.extras_rtt else ()
        return {**self.servers, **await self.verifier.at(rtt_ms, (VERIFIER, SPECULATION, *extras))}

    async def _warm_up(self, rtt_ms: float, ways: dict[str, Way]) -> None:
        """Caches, clocks, and what adapts itself to the network."""
        say(f"{rtt_ms:g} ms: warming up")
        for way in ways.values():
            for prompt in self.prompts[:2]:
                await way(prompt, WARM_UP_TOKENS)

    async def _repeat(self, rtt_ms: float, repeat: int, ways: dict[str, Way]) -> None:
        names = list(ways)
        for i, prompt in enumerate(self.prompts):
            turn = (repeat + i) % len(names)
            for name in names[turn:] + names[:turn]:
                made = await ways[name](prompt, self.options.n_tokens)
                self.samples.append(replace(made, way=name, rtt_ms=rtt_ms, repeat=repeat, prompt=i))
        say(f"{rtt_ms:g} ms, repeat {repeat + 1}: " + ", ".join(self._rates(names, rtt_ms, repeat)))

    def _rates(self, names: Sequence[str], rtt_ms: float, repeat: int) -> list[str]:
        return [f"{table.rates(self.samples, name, rtt_ms)[repeat]:.1f} {name}" for name in names]

    async def _at_once(self, rtt_ms: float, repeat: int) -> None:
        """The same prompts as one at a time, so many at once; with fewer prompts some are asked twice."""
        assert self.verifier
        which = [i % len(self.prompts) for i in range(FOUR)]
        for name in (VERIFIER, SPECULATION):
            made = await self.verifier.at_once(name, [self.prompts[i] for i in which], self.options.n_tokens)
            for i, one in zip(which, made, strict=True):
                self.samples.append(replace(one, way=name, rtt_ms=rtt_ms, repeat=repeat, prompt=i))


# around it


def say(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


def given(variable: str) -> Path:
    path = Path(os.environ.get(variable, ""))
    if not os.environ.get(variable) or not path.exists():
        raise RigError(f"{variable} must name a file or folder that exists; scripts/bench sets it")
    return path


@dataclass(frozen=True, slots=True)
class Models:
    """GGUF files of one vocabulary. `poor`: a draft model of which most is wrong."""

    target: Path
    draft: Path
    poor: Path


async def measure(options: Options, trace: Trace | None) -> Bench:
    engine, draft, target = (given(f"TIGHTWAD_TEST_{name}") for name in ("ENGINE", "MODEL", "F32"))
    poor = load().cache_dir / "demo-target" / "SmolLM2-135M-Q2_K.gguf"
    await trio.to_thread.run_sync(quantised, engine, draft, poor, "Q2_K")
    models = Models(target, draft, poor)
    async with AsyncExitStack() as stack:
        work_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tightwad-bench-")))
        direct = not options.mbit and not any(options.rtts)
        rig = await stack.enter_async_context(Rig.running(engine, work_dir, threads=options.threads, direct=direct))
        bench = Bench(rig, options, trace)
        await bench.open(models, work_dir)
        if options.peer:
            await bench.open_peer(models)
        await bench.run()
    return bench


def attempt(options: Options, trace: Trace | None) -> tuple[Bench | None, list[str]]:
    """The bench that ran, or what went wrong."""
    problems: list[str] = []

    def note(group: BaseExceptionGroup[RigError | TightwadError]) -> None:
        for exc in group.exceptions:
            if isinstance(exc, BaseExceptionGroup):
                note(exc)
            else:
                problems.append(str(exc))

    try:
        return trio.run(measure, options, trace), []
    except* (RigError, TightwadError) as broken:
        note(broken)
    return None, problems


def through_agents(options: Options) -> mesh_way.Measured:
    """`--mesh`. A failure is in what it gives, so that the rest is not lost."""
    try:
        engine, draft, target = (given(f"TIGHTWAD_TEST_{name}") for name in ("ENGINE", "MODEL", "F32"))
        asked = mesh_way.Asked(
            engine=engine,
            target=target,
            draft=draft,
            rtts=options.extras_rtt,
            mbit=options.mbit,
            repeats=options.repeats,
            texts=prompts(options.n_prompts),
            n_tokens=options.n_tokens,
            threads=options.threads,
        )
        return mesh_way.measure(asked, say)
    except mesh_way.PROBLEMS as exc:
        say(str(exc))
        return mesh_way.Measured(problem=str(exc))


def report(bench: Bench, facts: dict[str, Any]) -> dict[str, Any]:
    """What `--json` prints of the ways over the relay."""
    facts |= {
        "relay": not bench.rig.direct,
        "relay_realtime": bench.rig.relay.realtime,
        "traced": bench.trace is not None,
    }
    return {
        **table.plain(bench.samples),
        "relay": bench.relay,
        "peer": bench.peer.report() if bench.peer else {"problem": bench.peer_problem or "not asked for"},
        "samples": [asdict(s) for s in bench.samples],
    }


def numbers(kind: type) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(kind(part) for part in text.split(",") if part)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench speculation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--rtt",
        type=numbers(float),
        default=(0.0, 4.0, 10.0, 20.0),
        help="round trips in ms (0,4,10,20); empty: only --mesh",
    )
    add("--rate", type=float, default=200.0, help="Mbit/s each way, 0 for no limit (200)")
    add("--repeats", type=int, default=5, help="of everything, in turn (5)")
    add("--prompts", type=int, default=4, help="how many (4)")
    add("--tokens", type=int, default=96, help="of each answer (96)")
    add("--local", type=numbers(int), default=N_LOCAL, help="draft lengths of llama-server (3,8,16)")
    add("--extras-rtt", type=numbers(float), default=(10.0,), help="where bad drafters and four streams run, too (10)")
    add("--threads", type=int, default=1, help="of each program (1)")
    add("--no-ngram", action="store_true", help="no drafts from the text itself beside the drafter's")
    add("--no-tunnel", action="store_true", help="the verifier's workers without tunnels in front, as llama-server's")
    add("--peer", choices=("tightwad",), help="Tightwad 0.5.4's proxy, too, in an environment of its own")
    add("--mesh", action="store_true", help="through three real agents, too, at the round trips of --extras-rtt; root")
    add("--trace", type=Path, help="write what the verifier and the drafters were asked and said, one JSON a line")
    add("--json", action="store_true", help="one JSON object on the last line of stdout")
    add("--out", type=Path, help="write that object to a file, too")
    return parser.parse_args(argv)


def options_of(given_options: argparse.Namespace) -> Options:
    return Options(
        rtts=given_options.rtt,
        mbit=given_options.rate,
        repeats=given_options.repeats,
        n_prompts=given_options.prompts,
        n_tokens=given_options.tokens,
        n_local=given_options.local,
        extras_rtt=given_options.extras_rtt,
        threads=given_options.threads,
        ngram=not given_options.no_ngram,
        peer=given_options.peer is not None,
        mesh=given_options.mesh,
        tunnels=not given_options.no_tunnel,
    )


def main(argv: Sequence[str]) -> int:
    """Exit code 0 unless an answer differs or something broke."""
    asked = parse(argv)
    facts, stolen, began = environment(), Stolen(), time.monotonic()
    trace = Trace() if asked.trace else None
    options = options_of(asked)
    try:
        if options.mesh:
            mesh_way.check()
    except NetLabError as exc:
        say(f"--mesh: {exc}")
        return 1
    bench, problems = attempt(options, trace) if options.rtts else (None, [])
    if trace:
        trace.write(asked.trace)
    if problems:
        say("; ".join(problems))
        return 1
    result: dict[str, Any] = {"name": "speculation", "environment": facts, "options": asdict(options)}
    if bench:
        result |= report(bench, facts)
        print(table.text(bench.samples), file=sys.stderr)
        if bench.peer:
            print("\n".join(f"Tightwad 0.5.4: {row}" for row in result["peer"]["rows"]), file=sys.stderr)
    if trace:
        print(explain(trace), file=sys.stderr)
    differences, broken = list(result.get("different", [])), False
    if options.mesh:
        measured = through_agents(options)
        result["mesh"] = measured.plain()
        print(f"\nthrough agents\n{table.text(measured.samples)}", file=sys.stderr)
        differences += result["mesh"]["different"]
        broken = bool(measured.problem)
    facts["stolen_percent"] = stolen.percent()
    result["took_s"] = round(time.monotonic() - began, 1)
    if asked.out:
        asked.out.write_text(json.dumps(result), encoding="utf-8")
    if asked.json:
        print(json.dumps(result))
    for difference in differences:
        say(f"different: {difference}")
    return 1 if differences or broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
