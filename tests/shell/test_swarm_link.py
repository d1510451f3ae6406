"""One link of the swarm by the clock: when it says something although there is nothing to say, and when news go out."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import trio
import trio.testing

from tightwad_agent.errors import PeerSilent
from tightwad_agent.ids import ModelId
from tightwad_agent.streams import Framed
from tightwad_agent.swarm.intake import Intake
from tightwad_agent.swarm.link import KEEP_ALIVE_S, NEWS_S, Link
from tightwad_agent.swarm.peer import Conversation, Effect
from tightwad_agent.swarm.uploads import Uploads
from tightwad_agent.testing import node_id
from tightwad_agent.wire.swarm import BLOCK_BYTES, CODEC, Bye, Hello, KeepAlive, Update

MODEL = ModelId("a" * 64)
LENGTHS = (100, 100, 100)


class Nobody:
    """An exchange that wants nothing."""

    def on_effects(self, link: Link, effects: Sequence[Effect], /) -> None:
        pass

    async def read(self, piece: int, offset: int, /) -> bytes | None:
        return None

    def copies(self, piece: int, /) -> int:
        return 0

    def uploaded(self, link: Link, n_bytes: int, /) -> None:
        pass


class Linked:
    """A link that said hello, and the far end of it."""

    def __init__(self) -> None:
        near, far = trio.testing.memory_stream_pair()
        conversation = Conversation(MODEL, LENGTHS)
        conversation.hello((), ())
        intake = Intake(None, LENGTHS, conversation.wants)
        framed = Framed(near, CODEC, max_payload=BLOCK_BYTES)
        self.link = Link(node_id("far"), framed, conversation, intake, Nobody(), uploads=Uploads(), dialled=True)
        self.far = Framed(far, CODEC, max_payload=BLOCK_BYTES)

    async def next(self, within_s: float = 1.0) -> Any:
        return (await self.far.receive(deadline_s=within_s))[0]

    async def silent(self, for_s: float) -> None:
        """Ticks as an exchange does, and nothing is said."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.tick, for_s)
            with pytest.raises(PeerSilent):
                await self.next(for_s)

    async def tick(self, for_s: float) -> None:
        until = trio.current_time() + for_s
        while trio.current_time() < until:
            await trio.sleep(NEWS_S)
            self.link.tick(trio.current_time())


@contextlib.asynccontextmanager
async def linked() -> AsyncIterator[Linked]:
    made = Linked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.link.run)
        assert isinstance(await made.next(), Hello)
        yield made
        nursery.cancel_scope.cancel()


async def test_who_has_nothing_to_say_says_that_it_is_there(autojump_clock: trio.testing.MockClock) -> None:
    async with linked() as pair:
        for _ in range(3):
            await pair.silent(KEEP_ALIVE_S - 6 * NEWS_S)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pair.tick, 8 * NEWS_S)
                assert isinstance(await pair.next(), KeepAlive)


async def test_who_has_said_something_need_not(autojump_clock: trio.testing.MockClock) -> None:
    async with linked() as pair:
        await pair.silent(KEEP_ALIVE_S - 1)
        pair.link.conversation.we_have([0])
        pair.link.has_news()
        assert isinstance(await pair.next(), Update)
        await pair.silent(KEEP_ALIVE_S - 1)


async def test_what_changes_within_a_moment_is_told_together(autojump_clock: trio.testing.MockClock) -> None:
    async with linked() as pair:
        pair.link.conversation.we_have([0])
        pair.link.has_news()
        assert await pair.next() == Update((0,), ())
        at = trio.current_time()
        for piece in (1, 2):
            pair.link.conversation.we_have([piece])
            pair.link.has_news()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pair.tick, 3 * NEWS_S)
            assert await pair.next() == Update((1, 2), ())
            assert trio.current_time() - at >= NEWS_S


async def test_a_goodbye_is_the_last_word(autojump_clock: trio.testing.MockClock) -> None:
    async with linked() as pair:
        pair.link.bye("enough")
        assert await pair.next() == Bye("enough")
        with trio.fail_after(1):
            await pair.link.finished.wait()
        assert pair.link.ended is None
