"""A machine that works for a pool, for measuring: the node's own worker service behind the mesh's own TLS streams.

    worker_node.py PORT --engine DIR --state DIR --work DIR [--threads N]

It listens once its worker runs, as the cluster's founder whose identity is in `--state`; each connection is an `rpc`
stream, as an agent opens it. SIGTERM and SIGKILL end its worker with it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

import trio

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "shell"), str(ROOT / "scripts")]
from mesh_lab import links_of  # noqa: E402
from tunnelled import ASKED, LEASE_S, order_of  # noqa: E402

from tightwad_agent.engine import hello  # noqa: E402
from tightwad_agent.engine.commands import RPC, START  # noqa: E402
from tightwad_agent.engine.process import Engine, Spawner  # noqa: E402
from tightwad_agent.engine.worker import WorkerLimits, WorkerService  # noqa: E402
from tightwad_agent.mesh import identity  # noqa: E402
from tightwad_agent.mesh.links import Services, open_listeners  # noqa: E402


async def serve(options: argparse.Namespace) -> None:
    me = identity.load(options.state / "founder")
    coordinator = identity.load(options.state / "member")
    assert me is not None
    assert coordinator is not None
    engine = Engine(options.engine, digest="", protocol="")
    async with trio.open_nursery() as nursery:
        service = WorkerService(
            engine=lambda: engine,
            spawner=Spawner(nursery, options.work),
            probe=hello.probe,
            accepts=lambda _epoch, _peer: True,
            offered=lambda: [ASKED],
            threads=options.threads,
            limits=WorkerLimits(lease_s=LEASE_S),
        )
        await nursery.start(service.run)
        await service.methods[START](coordinator.node, order_of(coordinator.node).to_params())
        listeners = await open_listeners(options.port, "127.0.0.1")
        await links_of(me).serve(listeners, Services({RPC: service.streams[RPC]}))


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
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    trio.run(main, parser.parse_args())
