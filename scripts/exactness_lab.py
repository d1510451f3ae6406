"""A real verifier with real drafters around the product's own speculation loop, to compare what it says with drafts and
without."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio
from drafter_node import MODEL
from rig import LOAD_S, Rig, RigError
from speculation_ways import stand_in

import tightwad_agent
from tightwad_agent.engine import by_verifier
from tightwad_agent.engine.argv import ServerOptions, verifier_argv, verifier_load
from tightwad_agent.engine.draft_link import DraftLink
from tightwad_agent.engine.process import Child
from tightwad_agent.engine.verifying import VerifierClient
from tightwad_agent.ids import NodeId
from tightwad_agent.proxy.costs import Costs
from tightwad_agent.proxy.generation import Settings, VerifierGenerator
from tightwad_agent.proxy.policy import Policy
from tightwad_agent.proxy.ports import Drafter, DraftEvent, Timings
from tightwad_agent.proxy.record import DrafterRecord
from tightwad_agent.wire.draft import Drafted, DrafterInfo
from tightwad_agent.wire.verify import GREEDY, Sampling, TokenProbabilities, pack_tokens

ANSWER_S = 300.0
"""Deadline of one answer."""
SURE = 0.8
PASS_S = 60.0
"""A drafter that is silent for longer counts as lost."""


class Forgiven(DrafterRecord):
    """Never benched, whatever it did, and waited for from the first token on."""

    @property
    def measured(self) -> bool:
        return True

    def failed(self, clock: int, *, silent: bool = False) -> None:  # noqa: ARG002 - there is no next try to put off
        self.late += silent


class Keen(Costs):
    """Never gives a drafter up, and waits for as many tokens as a round may have: to this one each pass takes `PASS_S`,
    whatever is in it, and drafts are right. So drafts that are wrong are verified round after round."""

    def record(self, key: Hashable, name: str, rtt_s: float = 0.0, slots: int = 1) -> DrafterRecord:
        self.records.setdefault(key, Forgiven(name, rtt_s, slots))
        return super().record(key, name, rtt_s, slots)

    @property
    def plain_s(self) -> float:
        return PASS_S

    @property
    def plain_gain(self) -> float:
        return 0.01 / PASS_S

    @property
    def crowded(self) -> bool:
        return False

    def pass_s(self, n: int) -> float:  # noqa: ARG002 - as if drafts were free
        return PASS_S

    def policy(
        self, record: DrafterRecord, accept: float, *, more: bool = False, instead: Policy | None = None
    ) -> Policy:
        return super().policy(record, max(accept, SURE), more=more, instead=instead)


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids, what they cost, and, where they were asked for, probabilities of each."""

    tokens: tuple[int, ...]
    timings: Timings
    probabilities: tuple[TokenProbabilities, ...] = ()

    @property
    def rounds_with_draft(self) -> int:
        return self.timings.tried_at[0] if self.timings.tried_at else 0


async def answer(
    generator: VerifierGenerator,
    prompt: Sequence[int],
    sampling: Sampling = GREEDY,
    *,
    n_tokens: int,
    enough: int = 0,
    n_probs: int = -1,
    seen: Callable[[Timings], None] = lambda _timings: None,
) -> Answer:
    """One answer through the speculation loop. `enough`: it is given up after so many tokens. `seen` is told after each
    chunk."""
    tokens: list[int] = []
    probabilities: list[TokenProbabilities] = []
    with trio.fail_after(ANSWER_S):
        async with generator.start(prompt, sampling, max_tokens=n_tokens, n_probs=n_probs) as generation:
            async for chunk in generation:
                tokens += [token.id for token in chunk.tokens]
                probabilities += [token.probabilities for token in chunk.tokens if token.probabilities]
                seen(generation.timings)
                if 0 < enough <= len(tokens):
                    break
            timings = generation.timings
    return Answer(tuple(tokens), timings, tuple(probabilities))


@dataclass
class Lab:
    """One verifier and what drafts for it."""

    rig: Rig
    client: VerifierClient

    @classmethod
    async def start(
        cls, rig: Rig, model: Path, *, context: int = 4096, slots: int = 4, package: Path | None = None
    ) -> Lab:
        """`package`: the folder of another copy of this package, whose verifier is started instead. Raises
        `RigError`."""
        ours, theirs = socket.socketpair()
        with theirs:
            fd = theirs.fileno()
            argv = by_verifier.command(fd)
            if package is not None:
                argv = verifier_argv(sys.executable, fd=fd, paths=[str(package), *argv[argv.index(str(fd)) + 1 :]])
            child = await rig.start("verifier", argv, pass_fds=(fd,))
        client = VerifierClient(ours)
        rig.nursery.start_soon(client.run)
        options = ServerOptions(model=str(model), port=0, context=context, threads=rig.threads, slots=slots)
        client.load(verifier_load(str(rig.engine.folder), options))
        await client.settled(LOAD_S)
        if client.loaded is None:
            raise RigError(f"{child.told()}\n" + "\n".join(list(child.tail)[-10:]))
        return cls(rig, client)

    def generator(
        self, drafters: Sequence[Drafter] = (), costs: Costs | None = None, *, ngram: bool = False
    ) -> VerifierGenerator:
        """Without drafters: the verifier by itself. `drafters` may change while it is used."""
        settings = Settings(drafts=costs is not None, ngram=ngram)
        return VerifierGenerator(self.client, lambda: drafters, costs or Costs(), settings)

    async def drafter(self, name: str, model: Path, work_dir: Path) -> tuple[DraftLink, Child]:
        """A node that drafts with llama-server and this model, connected, and its process."""
        facts = {"engine": self.rig.engine.folder, "model": model, "work": work_dir, "threads": self.rig.threads}
        flags = [text for flag, value in facts.items() for text in (f"--{flag}", str(value))]
        child, port = await self.rig.script("drafter_node", *flags)
        return await self._link(name, port), child

    async def wrong(self) -> DraftLink:
        """One whose tokens are never right."""
        return await self._link("wrong", await stand_in(self.rig, self.client, "wrong"))

    async def _link(self, name: str, port: int) -> DraftLink:
        info = DrafterInfo(NodeId.of_spki(name.encode()), name, str(MODEL), 4, 0.0)

        def describe(slots: int) -> DrafterInfo:
            return replace(info, slots=slots)

        link, _scope = await self.rig.link_to(port, describe, self.client.info.n_vocab)
        return link


class Scripted:
    """A drafter in this process: `guess` says what follows a sequence. Its tokens are there as soon as they are asked
    for."""

    alive = True
    info = DrafterInfo(NodeId.of_spki(b"scripted"), "scripted", str(MODEL), 64, 0.0)

    def __init__(self, guess: Callable[[Sequence[int]], int]) -> None:
        self.guess = guess

    def open(self, deliver: Callable[[DraftEvent], None]) -> ScriptedSession:
        return ScriptedSession(self.guess, deliver)


class ScriptedSession:
    """See `ports.DraftSession`."""

    def __init__(self, guess: Callable[[Sequence[int]], int], deliver: Callable[[DraftEvent], None]) -> None:
        self._guess, self._deliver = guess, deliver
        self._sequence: list[int] = []
        self._made = 0

    def ask(self, branch: int, keep: int, tokens: Sequence[int], n: int) -> None:
        self._sequence[keep:] = tokens
        self._made = 0
        self.extend(branch, n)

    def extend(self, branch: int, n: int) -> None:
        start, began = self._made, len(self._sequence)
        for _ in range(n):
            self._sequence.append(self._guess(self._sequence))
        self._made += n
        self._deliver(Drafted(0, branch, start, pack_tokens(self._sequence[began:]), self._made))

    def collect(self) -> None:
        """Everything has been delivered."""

    def patient(self, is_patient: bool) -> None:
        """It has nothing to wait for."""

    def forget(self) -> None:
        self._deliver = _nothing


def _nothing(_event: Any) -> None:
    pass


def altered(work_dir: Path, file: str, old: str, new: str) -> Path:
    """A copy of this package in which `file` has `new` in place of `old`: the folder to import it from. Raises
    `RigError` if `old` is not there exactly once."""
    source = Path(tightwad_agent.__file__).parent
    copy = work_dir / source.name
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    text = (copy / file).read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise RigError(f"{file} has what is to be altered {text.count(old)} times: {old!r}")
    (copy / file).write_text(text.replace(old, new), encoding="utf-8")
    return work_dir


BELIEVES = (
    "engine/verifier/rounds.py",
    "        token = sample(len(tokens))\n",
    """        token = sample(len(tokens))
        if guess is not None and token != guess and BELIEVED:
            token = BELIEVED.pop()(guess)
""",
)


def believing(work_dir: Path, n: int) -> Path:
    """A copy whose verifier takes `n` tokens from drafts that are not the model's own."""
    folder = altered(work_dir, *BELIEVES)
    with (folder / "tightwad_agent" / BELIEVES[0]).open("a", encoding="utf-8") as file:
        file.write(f"\n\nBELIEVED = [int] * {n}\n")
    return folder


__all__ = [
    "Answer",
    "Keen",
    "Lab",
    "Scripted",
    "altered",
    "answer",
    "believing",
]
