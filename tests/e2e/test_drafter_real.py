"""A drafter with the real llama-server and the demo model, over memory streams in place of the mesh."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trio

from tightwad_agent.engine import draft_desk
from tightwad_agent.engine.drafter import DrafterService
from tightwad_agent.engine.drafting import DrafterSpec, DraftingService
from tightwad_agent.engine.leased import Phase
from tightwad_agent.engine.process import Engine, Spawner
from tightwad_agent.engine.restart import RestartPolicy
from tightwad_agent.errors import RemoteError
from tightwad_agent.ids import Epoch, ModelId
from tightwad_agent.testing import MemoryMesh, MemoryNode
from tightwad_agent.wire.draft import Drafted, NoDraft
from tightwad_agent.wire.verify import unpack_tokens

pytestmark = [pytest.mark.engine, pytest.mark.slow]

POLICY = RestartPolicy(first_delay_s=0.05, max_delay_s=0.2)
DEMO = ModelId("a" * 64)
VOCAB = 49152
STORY = [6403, 1980, 253, 655, 281, 253, 1165, 6560, 28]  # Once upon a time in a small village,
CODE = [1604, 3987, 46477, 24, 94, 727, 198]  # def fibonacci(n):
EMOJI = [504, 40303, 218, 649, 33777, 284, 17097, 137, 112, 36518, 42]  # three tokens each, in the draft too
CHAT = [1, 4093, 198, 36218, 15876, 30, 2, 198, 1, 520, 9531, 198, 26843, 17]  # an answer that began with: Hi!
END = 2


async def until(met: Callable[[], object], deadline_s: float = 60) -> None:
    with trio.fail_after(deadline_s):
        while not met():
            await trio.sleep(0.005)


@dataclass
class Inbox:
    events: list[Drafted | NoDraft] = field(default_factory=list)

    def __call__(self, event: Drafted | NoDraft) -> None:
        self.events.append(event)

    @property
    def refusals(self) -> list[str]:
        return [e.reason for e in self.events if isinstance(e, NoDraft)]

    def tokens(self, branch: int = 0) -> list[int]:
        drafted = [e for e in self.events if isinstance(e, Drafted) and e.branch == branch]
        return [token for e in drafted for token in unpack_tokens(e.tokens)]

    async def drafted(self, n: int, branch: int = 0) -> list[int]:
        await until(lambda: len(self.tokens(branch)) >= n or self.refusals)
        assert not self.refusals
        return self.tokens(branch)


@dataclass
class Lab:
    nursery: trio.Nursery
    tmp_path: Path
    engine: Engine
    model: Path
    home: MemoryNode = field(init=False)
    node: MemoryNode = field(init=False)
    service: DrafterService = field(init=False)
    drafting: DraftingService = field(init=False)

    async def open(self) -> Lab:
        mesh = MemoryMesh(self.nursery)
        self.home, self.node = mesh.add("c"), mesh.add("d")
        self.epoch = Epoch(1, self.home.node)
        self.service = DrafterService(
            engine=lambda: self.engine,
            spawner=Spawner(self.nursery, self.tmp_path),
            path_of=lambda model: self.model if model == DEMO else None,
            accepts=lambda epoch, peer: peer == self.home.node,
            threads=1,
            policy=POLICY,
        )
        self.node.methods |= self.service.methods
        self.node.streams |= self.service.streams
        await self.nursery.start(self.service.run)
        self.drafting = DraftingService(call=self.home.call, open_stream=self.home.open_stream, policy=POLICY)
        await self.nursery.start(self.drafting.run)
        return self

    async def ready(self, **values: Any) -> Any:
        given = {"n_vocab": VOCAB, "context": 512, "slots": 2, "model": DEMO, "epoch": self.epoch} | values
        self.drafting.set_drafters([DrafterSpec(node=self.node.node, name="d", **given)])
        await until(self.drafting.ready)
        return self.drafting.ready()[0]

    async def ask_server(self, **body: Any) -> dict[str, Any]:
        args = psutil.Process(self.service.state.pid).cmdline()
        url = f"http://127.0.0.1:{args[args.index('--port') + 1]}/completion"
        plain = {"temperature": 0, "return_tokens": True, "cache_prompt": False} | body
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            answer: dict[str, Any] = (await client.post(url, json=plain)).raise_for_status().json()
            return answer

    async def continuation(self, prompt: list[int], n: int) -> list[int]:
        """What llama-server itself makes of it, asked once for all tokens, with nothing cached."""
        return list((await self.ask_server(prompt=prompt, n_predict=n))["tokens"])

    async def worst(self, prompt: list[int], tokens: list[int]) -> float:
        """How far below the likeliest token any of these is, as a logarithm; the other shapes of batches in which
        drafts are computed move that by 0.1 in this small model, a wrong context by far more."""
        gaps = []
        for i, token in enumerate(tokens):
            answer = await self.ask_server(prompt=prompt + tokens[:i], n_predict=1, n_probs=20)
            top = {t["id"]: t["logprob"] for t in answer["completion_probabilities"][0]["top_logprobs"]}
            gaps.append(max(top.values()) - top.get(token, -99))
        return max(gaps)


@pytest.fixture
async def lab(nursery: trio.Nursery, engine_dir: Path, demo_model: Path, tmp_path: Path) -> Lab:
    return await Lab(nursery, tmp_path, Engine(engine_dir, "d" * 64, "7.0.0"), demo_model).open()


def engines() -> list[str]:
    return [p.name() for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


async def test_the_drafts_are_what_the_model_makes_by_itself(lab: Lab) -> None:
    drafter = await lab.ready()
    inboxes = [Inbox() for _ in range(3)]
    sessions = [drafter.open(inbox) for inbox in inboxes]

    # one alone, then more of the same branch
    expected = await lab.continuation(STORY, 24)
    sessions[0].ask(0, 0, STORY, 12)
    assert await inboxes[0].drafted(12) == expected[:12]
    sessions[0].extend(0, 12)
    assert await inboxes[0].drafted(24) == expected

    # from a corrected prefix, while the old branch is being made
    sessions[0].extend(0, 100)
    await inboxes[0].drafted(26)
    corrected = [*STORY, *expected[:7], 253]
    sessions[0].ask(1, len(corrected) - 1, [253], 10)
    assert await lab.worst(corrected, await inboxes[0].drafted(10, branch=1)) < 0.3

    # two at once
    sessions[1].ask(0, 0, CODE, 8)
    sessions[0].ask(2, 0, STORY, 8)
    assert await lab.worst(CODE, await inboxes[1].drafted(8)) < 0.3
    assert await lab.worst(STORY, await inboxes[0].drafted(8, branch=2)) < 0.3
    assert await lab.worst(STORY, [40000, 40001]) > 3  # what the measure says of tokens out of place
    sessions[0].forget()
    sessions[1].forget()

    # tokens that are parts of characters are tokens like any other
    sessions[2].ask(0, 0, EMOJI, 12)
    assert await inboxes[2].drafted(12) == await lab.continuation(EMOJI, 12)

    # the vocabulary is the model's
    sessions[2].ask(1, 0, [VOCAB], 1)
    await until(lambda: inboxes[2].refusals)
    assert f"not among the model's {VOCAB}" in inboxes[2].refusals[0]
    state = lab.service.state
    assert state.tokens_per_s > 0
    assert state.restarts == 0


async def test_a_full_context_and_a_text_that_ends(lab: Lab) -> None:
    drafter, inbox = await lab.ready(context=64), Inbox()
    session = drafter.open(inbox)
    session.ask(0, 0, STORY, 200)
    await until(lambda: inbox.refusals)
    assert inbox.refusals == ["the context of 64 tokens is full"]
    assert len(STORY) + len(inbox.tokens()) == 63
    assert lab.service.state.restarts == 0

    other = Inbox()
    drafter = await lab.ready(context=256)
    drafter.open(other).ask(0, 0, CHAT, 100)
    await until(lambda: other.refusals or any(isinstance(e, Drafted) and e.ended for e in other.events))
    assert other.tokens()[-1] == END
    assert not other.refusals


async def test_a_killed_and_a_stopped_server_come_back(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_desk, "TURN_DEADLINE_S", 2.0)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        drafter, inbox = await lab.ready(), Inbox()
        drafter.open(inbox).ask(0, 0, STORY, 200)
        await inbox.drafted(2)
        pid = lab.service.state.pid
        assert pid is not None
        os.kill(pid, number)
        await until(lambda inbox=inbox: inbox.refusals)
        await until(lambda drafter=drafter: not drafter.alive)
        await until(lambda pid=pid: not psutil.pid_exists(pid))
    again = Inbox()
    (await lab.ready()).open(again).ask(0, 0, STORY, 2)
    await again.drafted(2)
    assert lab.service.state.restarts == 2


async def test_who_may_not_and_what_is_not_here(lab: Lab) -> None:
    await lab.ready()
    for change, code in (
        ({"epoch": [0, str(lab.home.node)]}, "stale_epoch"),
        ({"model": "b" * 64}, "model_not_found"),
    ):
        order = {"epoch": [1, str(lab.home.node)], "model": str(DEMO), "context": 512, "slots": 2} | change
        with pytest.raises(RemoteError) as caught:
            await lab.home.call(lab.node.node, "draft.start", order)
        assert caught.value.code == code
    assert lab.service.state.phase is Phase.READY


async def test_cancelling_leaves_nothing_behind(engine_dir: Path, demo_model: Path, tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        lab = await Lab(nursery, tmp_path, Engine(engine_dir, "d" * 64, "7.0.0"), demo_model).open()
        inbox = Inbox()
        (await lab.ready()).open(inbox).ask(0, 0, STORY, 200)
        await inbox.drafted(2)
        nursery.cancel_scope.cancel()
    assert engines() == []
