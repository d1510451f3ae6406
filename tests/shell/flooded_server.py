"""An endpoint in a process of its own, for tests that flood it: prints its port, serves until its input ends.

Its limits are the first argument, as JSON. Answers come from a generator that says "Hello!", or for the prompt `long`
without end.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import trio

from tightwad_agent.proxy.app import App
from tightwad_agent.proxy.cluster import Own
from tightwad_agent.proxy.fakes import Asked, FakeCluster, FakeGenerator, Step, fake_chunks
from tightwad_agent.proxy.limits import Limits
from tightwad_agent.wire.verify import Ended

PIECE = bytes(range(97, 123)) * 80


def script(asked: Asked) -> Iterator[Step]:
    if bytes(t for t in asked.prompt if t < 256) != b"long":
        return iter(fake_chunks(b"Hello!", 2))
    return (chunk for _ in range(10**9) for chunk in fake_chunks(PIECE, len(PIECE), Ended.NOT))


async def main() -> None:
    cluster = FakeCluster(where=Own(FakeGenerator(script)))
    app = App(cluster, admin_key=lambda: "admin", limits=Limits(**json.loads(sys.argv[1])))
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(app.serve, listeners)
        print(listeners[0].socket.getsockname()[1], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
