"""A machine that drafts, for measuring: the node's own drafter service, with a TCP port in place of the mesh.

    drafter_node.py PORT --engine DIR --model FILE --work DIR [--threads N] [--slots N] [--context N] [--host ADDRESS]

It listens once its model is loaded; each connection is one `draft` stream. SIGTERM and SIGKILL end its server with it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import trio

from tightwad_agent.engine.commands import DRAFT, START_DRAFTER, StartDrafter, plain_epoch
from tightwad_agent.engine.drafter import DrafterLimits, DrafterService
from tightwad_agent.engine.process import Engine, Spawner
from tightwad_agent.errors import TightwadError
from tightwad_agent.ids import Epoch, ModelId, NodeId
from tightwad_agent.streams import close_quietly

ASKING = NodeId.of_spki(b"the coordinator of a measurement")
EPOCH = Epoch(1, ASKING)
MODEL = ModelId("d" * 64)
LEASE_S = 1e9
"""It is kept while others are measured."""


async def serve(options: argparse.Namespace) -> None:
    engine = Engine(options.engine, digest="", protocol="")
    async with trio.open_nursery() as nursery:
        service = DrafterService(
            engine=lambda: engine,
            spawner=Spawner(nursery, options.work),
            path_of=lambda _model: options.model,
            accepts=lambda _epoch, _peer: True,
            threads=options.threads,
            limits=DrafterLimits(lease_s=LEASE_S),
        )
        await nursery.start(service.run)
        order = StartDrafter(EPOCH, MODEL, options.context, options.slots)
        await service.methods[START_DRAFTER](ASKING, order.to_params())

        async def stream(tcp: trio.SocketStream) -> None:
            try:
                await service.streams[DRAFT](ASKING, tcp, {"epoch": plain_epoch(EPOCH)})
            except TightwadError as exc:
                print(f"a stream ended: {exc}", file=sys.stderr)
            finally:
                await close_quietly(tcp)

        await trio.serve_tcp(stream, options.port, host=options.host)


async def main(options: argparse.Namespace) -> None:
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            nursery.start_soon(serve, options)
            async for _number in signals:
                nursery.cancel_scope.cancel()
                break


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--host", default="127.0.0.1", help="where it listens")
    trio.run(main, parser.parse_args())
