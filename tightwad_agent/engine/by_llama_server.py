"""Serving with llama-server: it answers HTTP on a loopback port."""

from __future__ import annotations

from pathlib import Path

import trio

from tightwad_agent.engine.argv import server_argv
from tightwad_agent.engine.process import Child, free_port, listens
from tightwad_agent.engine.serving import Job, await_frozen, exit_reason, until_loaded
from tightwad_agent.engine.target import Loss
from tightwad_agent.engine.watchdog import ServerClient, watch

_HEALTH_POLL_S = 0.1
_HEALTH_ANSWER_S = 2.0


async def serve(job: Job) -> None:
    """Until something is lost, which cancels it."""
    port = await free_port()
    argv, grace_s = server_argv(job.engine.server, job.options(port)), job.tools.limits.grace_s
    async with job.tools.spawner.running("llama-server", argv, grace_s=grace_s) as child:
        job.child = child
        async with trio.open_nursery() as nursery, ServerClient(port) as client:
            nursery.start_soon(_await_exit, job, child)
            nursery.start_soon(await_frozen, job, child)
            await until_loaded(job, lambda: _healthy(client), files=_files(job))
            if not await listens(child.pid, port):
                job.lose(Loss(None, f"port {port} of llama-server was taken by another program", crash=True))
                await trio.lowlevel.checkpoint()
            job.report.ready(port, None)
            stall_s, in_flight = job.tools.stall_s, job.tools.in_flight
            job.lose(Loss(None, await watch(client, stall_s=stall_s, in_flight=in_flight, moved=job.bytes_moved)))


async def _healthy(client: ServerClient) -> bool:
    """Whether `/health` says 200."""
    if await client.healthy(_HEALTH_ANSWER_S):
        return True
    await trio.sleep(_HEALTH_POLL_S)
    return False


async def _await_exit(job: Job, child: Child) -> None:
    code = await child.wait()
    job.lose(Loss(None, exit_reason(child, code, "llama-server", pooled=bool(job.forwarders)), crash=True))


def _files(job: Job) -> list[Path]:
    return [job.spec.model, *([job.spec.draft] if job.spec.draft else [])]
