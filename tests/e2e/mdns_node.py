"""One node of the mDNS tests: announces itself, prints news as JSON lines, and takes commands on standard input.

    mdns_node.py NAME PORT [INTERFACE ...]

Commands: `model NAME` announces another model, `hush` and `speak` end and begin announcing, `status` prints the state,
end of file says goodbye and ends.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import replace

import trio

from tightwad_agent.ids import NodeName, SafeName
from tightwad_agent.mesh.advert import Advert, ShortModel
from tightwad_agent.mesh.mdns import Gone, Mdns, News
from tightwad_agent.testing import node_id


def say(**event: object) -> None:
    print(json.dumps(event), flush=True)


async def main(name: str, port: int, interfaces: list[str]) -> None:
    shown = True
    advert = Advert(cluster="c" * 16, node=node_id(name), port=port, name=NodeName(name))
    send, receive = trio.open_memory_channel[News](0)
    mdns = Mdns(advert.node, lambda: advert if shown else None, send, interfaces=interfaces, period_s=0.2, retry_s=1)

    async def show() -> None:
        async for news in receive:
            if isinstance(news, Gone):
                say(event="gone", node=news.node)
            else:
                models = [m.name for m in news.advert.models]
                say(event="seen", name=news.advert.name, addresses=[str(a) for a in news.addresses], models=models)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(show)
        nursery.start_soon(mdns.run)
        say(event="ready")
        async for line in lines():
            command, _, rest = line.strip().partition(" ")
            if command == "model":
                advert = replace(advert, models=(*advert.models, ShortModel(SafeName(rest), 100)))
            elif command in ("hush", "speak"):
                shown = command == "speak"
            elif command == "status":
                say(event="status", problem=mdns.problem, n_refused=mdns.n_refused)
        nursery.cancel_scope.cancel()
    say(event="ended")


async def lines() -> AsyncIterator[str]:
    stream = trio.lowlevel.FdStream(os.dup(0))
    rest = b""
    while chunk := await stream.receive_some():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode()


if __name__ == "__main__":
    trio.run(main, sys.argv[1], int(sys.argv[2]), sys.argv[3:])
