"""Serving with the verifier: it answers frames on a socket pair."""

from __future__ import annotations

import os
import re
import socket
import sys
from contextlib import closing
from pathlib import Path

import trio

import tightwad_agent
from tightwad_agent.engine.argv import verifier_argv, verifier_load
from tightwad_agent.engine.plan import Plan
from tightwad_agent.engine.process import Child
from tightwad_agent.engine.serving import Job, await_frozen, exit_reason, until_loaded
from tightwad_agent.engine.target import Loss, ServedBy
from tightwad_agent.engine.verifying import VerifierClient
from tightwad_agent.engine.watchdog import watch
from tightwad_agent.errors import EngineStopped, PeerGone
from tightwad_agent.ids import NodeId
from tightwad_agent.units import size
from tightwad_agent.wire.verify import Refused

_POLL_S = 0.1
_WATCH_S = 1.0
"""It is asked nothing that disturbs, so its pace can be known to the second."""
_EXIT_S = 1.0
"""How far apart the end of the process and that of its connection may be seen."""
_MAX_REASON = 500
_WHAT = ServedBy.VERIFIER.words


async def serve(job: Job) -> str:
    """Until something is lost, which cancels it. Returns only where the verifier does not know this engine, with the
    reason: llama-server may still be able to."""
    ours, theirs = socket.socketpair()
    client = VerifierClient(ours, call_s=job.tools.stall_s)
    job.ending = lambda loss: client.lose(loss.words, EngineStopped if loss.from_outside else PeerGone)
    with theirs, closing(client):
        fd, grace_s = theirs.fileno(), job.tools.limits.grace_s
        argv = job.tools.verifier(fd)
        async with job.tools.spawner.running("verifier", argv, grace_s=grace_s, pass_fds=(fd,)) as child:
            theirs.close()
            job.child = child
            refused = await _session(job, client, child)
            if refused.kind != "build":
                job.lose(refusal(refused, job.spec.plan))
                await trio.lowlevel.checkpoint()
            return refused.reason[:_MAX_REASON]


async def _session(job: Job, client: VerifierClient, child: Child) -> Refused:
    """Loads and serves until something is lost, which cancels it, or returns the refusal."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_await_exit, job, child, client)
        nursery.start_soon(_await_end, job, client)
        nursery.start_soon(await_frozen, job, child)
        refused = await _load(job, client)
        if refused is None:
            job.report.ready(None, client)
            stall_s = job.tools.stall_s
            job.lose(Loss(None, await watch(client, stall_s=stall_s, moved=job.bytes_moved, poll_s=_WATCH_S)))
            await trio.sleep_forever()
        nursery.cancel_scope.cancel()
    return refused


async def _load(job: Job, client: VerifierClient) -> Refused | None:
    """Until the model is loaded; or why not."""
    client.load(verifier_load(str(job.engine.folder.absolute()), job.options()))
    await until_loaded(job, lambda: client.settled(_POLL_S), files=[job.spec.model], percent=lambda: client.percent)
    if client.refused is None and not client.alive:
        await trio.sleep_forever()  # how it ended is told by others
    return client.refused


async def _await_exit(job: Job, child: Child, client: VerifierClient) -> None:
    code = await child.wait()
    with trio.move_on_after(_EXIT_S):
        await client.ended.wait()  # what it said last comes first
    if client.refused is None:
        job.lose(Loss(None, exit_reason(child, code, _WHAT, pooled=bool(job.forwarders)), crash=True))


async def _await_end(job: Job, client: VerifierClient) -> None:
    why = await client.run()
    if client.refused is None:
        await trio.sleep(0 if client.broken else _EXIT_S)  # the exit code, if there is one, says more
        job.lose(Loss(None, why, crash=True))


def refusal(refused: Refused, plan: Plan) -> Loss:
    """What it means for the target that the verifier will not serve it."""
    reason = refused.reason[:_MAX_REASON]
    if refused.kind == "memory":
        node, where = _place(refused.device, plan)
        needed = f"{size(refused.needed)} needed" if refused.needed else "too little"
        return Loss(node, f"out of memory while loading: {needed} on {where}: {reason}", excluded=True)
    if refused.kind == "model":
        return Loss(None, f"the verifier cannot load this model: {reason}", excluded=True)
    return Loss(None, f"the verifier gave up ({refused.kind}): {reason}", crash=True)


def _place(device: str, plan: Plan) -> tuple[NodeId | None, str]:
    """The machine of a device as the verifier names it, and its name in words: `RPC1` is the second of the workers'."""
    remote = [(use.node, use_device.name) for use in plan.workers for use_device in use.devices]
    match = re.match(r"RPC(\d{1,3})", device)
    if match is None or int(match[1]) >= len(remote):
        return None, device or "this machine"
    node, name = remote[int(match[1])]
    return node, f"{name} of {node.short}"


def command(fd: int) -> list[str]:
    """Starts the verifier that belongs to this very agent, from a checkout, an installation or the single file."""
    home = str(Path(tightwad_agent.__file__).parent.parent)
    paths = [os.path.abspath(path) for path in sys.path if path]
    return verifier_argv(sys.executable, fd=fd, paths=paths if home in paths else [*paths, home])
