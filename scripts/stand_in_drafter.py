"""Drafters that are of no use, for measuring what they cost: each a process that speaks `wire/draft.py` on a port.

stand_in_drafter.py PORT wrong  --model ID --vocab N      tokens that are never right, 5 ms each
stand_in_drafter.py PORT hangs  --model ID --vocab N      says hello, then nothing
stand_in_drafter.py PORT midway --behind PORT             a real drafter's answers, until 20 have passed
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field

import trio

from tightwad_agent.errors import PeerError, ProtocolError
from tightwad_agent.streams import Framed, close_quietly
from tightwad_agent.wire.draft import FROM_DRAFTER, MAX_DRAFT, MAX_HEADER, TO_DRAFTER, Ask, Drafted, Extend, Hello
from tightwad_agent.wire.frames import FrameDecoder, encode
from tightwad_agent.wire.verify import pack_tokens

TOKEN_S = 0.005
CONTEXT = 8192
N_SLOTS = 4
NEVER_RIGHT = range(3, 13)
"""Names of repositories, files and notebooks in SmolLM2's vocabulary: control tokens that end nothing and that it does
not write in an answer."""
N_MIDWAY = 20


@dataclass
class Session:
    """The newest branch of a request: how far it is wanted and made."""

    branch: int = 0
    wanted: int = 0
    made: int = 0
    more: trio.Event = field(default_factory=trio.Event)

    def want(self, branch: int, n: int, *, anew: bool) -> None:
        if anew:
            self.branch, self.wanted, self.made = branch, 0, 0
        if branch == self.branch:
            self.wanted = min(self.wanted + n, self.made + MAX_DRAFT)
            self.more.set()


class Wrong:
    """One connection of a drafter whose tokens are never right."""

    def __init__(self, stream: trio.abc.Stream, nursery: trio.Nursery) -> None:
        self._out = Framed(stream, FROM_DRAFTER)
        self._lock = trio.Lock()
        self._nursery = nursery
        self._sessions: dict[int, Session] = {}

    def take(self, message: object) -> None:
        if not isinstance(message, Ask | Extend):
            return  # a session that is over asks for nothing more
        if message.session not in self._sessions:
            self._sessions[message.session] = Session()
            self._nursery.start_soon(self._make, message.session)
        session = self._sessions[message.session]
        session.want(message.branch, message.n, anew=isinstance(message, Ask))

    async def _make(self, number: int) -> None:
        session = self._sessions[number]
        while True:
            while session.made < session.wanted:
                branch = session.branch
                await trio.sleep(TOKEN_S)
                if branch != session.branch:
                    continue
                token = NEVER_RIGHT[session.made % len(NEVER_RIGHT)]
                session.made += 1
                drafted = Drafted(
                    number, branch, session.made - 1, pack_tokens([token]), int(session.made * TOKEN_S * 1e6)
                )
                async with self._lock:
                    await self._out.send(drafted)
            session.more = trio.Event()
            await session.more.wait()


async def wrong(stream: trio.abc.Stream, hello: Hello) -> None:
    async with trio.open_nursery() as nursery:
        drafter = Wrong(stream, nursery)
        await Framed(stream, FROM_DRAFTER).send(hello)
        asked = Framed(stream, TO_DRAFTER, max_header=MAX_HEADER)
        try:
            while True:
                message, _ = await asked.receive()
                drafter.take(message)
        finally:
            nursery.cancel_scope.cancel()


async def hangs(stream: trio.abc.Stream, hello: Hello) -> None:
    await Framed(stream, FROM_DRAFTER).send(hello)
    while await stream.receive_some():
        pass


async def midway(stream: trio.abc.Stream, port: int) -> None:
    """Passes on what is asked, and of the answers the first `N_MIDWAY` after the hello."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as real, trio.open_nursery() as nursery:
        no_delay(real)
        nursery.start_soon(pass_on, stream, real)
        decoder = FrameDecoder(MAX_HEADER)
        n = 0
        while data := await real.receive_some():
            for frame in decoder.feed(bytes(data)):
                if n <= N_MIDWAY:
                    await stream.send_all(encode(frame.header, frame.payload))
                n += 1
        nursery.cancel_scope.cancel()


async def pass_on(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
    while data := await source.receive_some():
        await sink.send_all(data)
    raise PeerError("the other side is done")


def no_delay(stream: trio.SocketStream) -> None:
    stream.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, True)


async def main(options: argparse.Namespace) -> None:
    hello = Hello(options.model, options.vocab, CONTEXT, N_SLOTS)

    async def serve(stream: trio.SocketStream) -> None:
        no_delay(stream)
        try:
            if options.kind == "wrong":
                await wrong(stream, hello)
            elif options.kind == "hangs":
                await hangs(stream, hello)
            else:
                await midway(stream, options.behind)
        except* (PeerError, ProtocolError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client went away
        finally:
            await close_quietly(stream)

    await trio.serve_tcp(serve, options.port, host="127.0.0.1")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("kind", choices=("wrong", "hangs", "midway"))
    parser.add_argument("--model", default="")
    parser.add_argument("--vocab", type=int, default=0)
    parser.add_argument("--behind", type=int, default=0)
    try:
        trio.run(main, parser.parse_args())
    except KeyboardInterrupt:
        sys.exit(130)
