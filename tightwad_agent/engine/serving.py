"""What the two ways of serving a connected target share: the job, the wait for the model, the words for an exit."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from tightwad_agent.engine.argv import ServerOptions
from tightwad_agent.engine.forward import Forwarder
from tightwad_agent.engine.frozen import frozen
from tightwad_agent.engine.process import Child, Engine, describe_exit
from tightwad_agent.engine.target import Loss, Report, TargetSpec, Tools


@dataclass(kw_only=True)
class Job:
    """A target to serve over workers that can be reached through `forwarders`. `lose` cancels whoever serves it.

    `ending` is told of the loss, so that what waits on the program hears of it at once.
    """

    spec: TargetSpec
    engine: Engine
    tools: Tools
    forwarders: Sequence[Forwarder]
    report: Report
    lose: Callable[[Loss], None]
    child: Child | None = None
    ending: Callable[[Loss], None] = lambda _loss: None

    def options(self, port: int = 0) -> ServerOptions:
        plan = self.spec.plan
        return ServerOptions(
            model=str(self.spec.model.absolute()),
            port=port,
            context=plan.context,
            draft=None if self.spec.draft is None else str(self.spec.draft.absolute()),
            alias=self.spec.alias,
            threads=self.tools.threads,
            slots=self.spec.slots,
            rpc_ports=tuple(forwarder.port for forwarder in self.forwarders),
            rpc_shares=tuple(device.n_bytes >> 20 for use in plan.workers for device in use.devices),
            local_devices=tuple(device.name for device in plan.local_devices),
            local_shares=tuple(device.n_bytes >> 20 for device in plan.local_devices),
            offload_layers=plan.offload_layers,
        )

    def bytes_moved(self) -> int:
        return sum(forwarder.bytes_up + forwarder.bytes_down for forwarder in self.forwarders)

    def percent(self, n_bytes: int) -> int | None:
        """Bytes sent to workers of those in the files, for a program that says nothing while it loads."""
        if not self.forwarders or not n_bytes:
            return None
        return min(99, 100 * sum(forwarder.bytes_up for forwarder in self.forwarders) // n_bytes)


async def until_loaded(
    job: Job,
    loaded: Callable[[], Awaitable[bool]],
    *,
    files: Sequence[Path],
    percent: Callable[[], int | None] = lambda: None,
) -> None:
    """Asks `loaded` (which takes its time) again and again; a deadline by size, and an earlier one if nothing flows to
    the workers. `percent`: what the program itself says about it."""
    limits = job.tools.limits
    n_bytes = await trio.to_thread.run_sync(_sizes, files)
    began = moved_at = trio.current_time()
    moved = (job.bytes_moved(), percent())
    job.report.loading(percent())
    while not await loaded():
        now = trio.current_time()
        if moved != (job.bytes_moved(), percent()):
            moved, moved_at = (job.bytes_moved(), percent()), now
        if now - began > limits.load_s + n_bytes / limits.load_bytes_per_s:
            job.lose(Loss(None, f"the model was not loaded within {now - began:.0f} s", crash=True))
        elif job.forwarders and now - moved_at > job.tools.stall_s:
            job.lose(Loss(None, f"loading stood still for {now - moved_at:.0f} s"))
        told = percent()
        job.report.loading(job.percent(n_bytes) if told is None else told)


async def await_frozen(job: Job, child: Child) -> None:
    """The job is lost once its program has been stopped for a while."""
    await frozen(child.pid, job.tools.limits.frozen_s)
    job.lose(Loss(None, f"{job.spec.served_by.words} was stopped (SIGSTOP) and did not go on", from_outside=True))


def exit_reason(child: Child, code: int, what: str, *, pooled: bool) -> str:
    """Why a program of llama.cpp's ended, in words; `what` it was."""
    hints = {
        -signal.SIGABRT: "a worker's connection broke" if pooled else "an assertion in llama.cpp failed",
        -signal.SIGILL: "this build uses instructions that this CPU does not have",
        -signal.SIGSEGV: "a fault in llama.cpp",
        -signal.SIGKILL: "most likely the system ran out of memory",
    }
    last = next((line for line in reversed(child.tail) if line.strip()), "").strip()[:200]
    why = hints.get(code) or last
    return f"{what} {describe_exit(code)}" + (f": {why}" if why else "")


def _sizes(files: Sequence[Path]) -> int:
    try:
        return sum(path.stat().st_size for path in files)
    except OSError:
        return 0  # the program will say what is wrong with it
