"""Gets an engine onto this machine: the first of these that works.

    --engine-dir   only that one, if it is given; what is wrong with it is an error
    PATH           `llama-server` and `ggml-rpc-server` in one folder, speaking the pinned RPC protocol
    cache          an earlier download or build, if its files still are what was installed
    release        the official archive of the pinned build, if its hash is known (see `pins`)
    build          from the source distribution on the package index

Each candidate is tested before it is used. Each way that led nowhere leaves a reason.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from tightwad_agent.engine.build import Progress
from tightwad_agent.engine.installed import MANIFEST, Installed, NotHere, Request, Skip, checked, dotted, speaks
from tightwad_agent.engine.installing import exclusive
from tightwad_agent.engine.obtain import from_release, from_source
from tightwad_agent.engine.pins import RPC_SERVER, SERVER, platform_key
from tightwad_agent.engine.stamps import cpu_identity, read_json
from tightwad_agent.errors import (
    DiskFull,
    EngineError,
    EngineMismatch,
    EngineMissing,
    EnvironmentFault,
    OriginError,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """What is here without fetching anything."""

    engine: Installed | None
    skipped: tuple[Skip, ...]


def quiet(_stage: str, _done: int, _total: int, _unit: str) -> None:
    """No progress."""


async def locate(request: Request) -> Found:
    """The engine that is here already, tested. Raises `EngineError` only for a folder the user named."""
    if request.engine_dir is not None:
        return Found(await _given(request, request.engine_dir), ())
    ways: list[tuple[str, Callable[[], Awaitable[Installed]]]] = [
        ("PATH", lambda: _on_path(request)),
        ("cache", lambda: _cached(request)),
    ]
    return await _first_of(ways)


async def ensure(request: Request, progress: Progress = quiet) -> Installed:
    """The engine that is here, or else a fresh one. Raises `EngineMissing` with all reasons, `EngineBroken` and
    `EngineMismatch` for a folder the user named, `DiskFull`."""
    found = await locate(request)
    if found.engine is not None:
        return found.engine

    def waiting(who: str) -> None:
        log.info("%s", who)
        progress(f"wait: {who}", 0, 0, "")

    async with exclusive(request.home, waiting):
        found = await locate(request)  # another agent may have been faster
        if found.engine is not None:
            return found.engine
        ways: list[tuple[str, Callable[[], Awaitable[Installed]]]] = [
            ("release", lambda: from_release(request, progress)),
            ("build", lambda: from_source(request, progress)),
        ]
        fresh = await _first_of(ways)
    skipped = (*found.skipped, *fresh.skipped)
    if fresh.engine is None:
        raise _missing(skipped)
    return replace(fresh.engine, skipped=skipped)


async def _first_of(ways: list[tuple[str, Callable[[], Awaitable[Installed]]]]) -> Found:
    skipped: list[Skip] = []
    for name, way in ways:
        try:
            engine = await way()
        except DiskFull:
            raise
        except (NotHere, EngineError, OriginError, EnvironmentFault) as exc:
            skipped.append((name, str(exc)))
            log.info("engine from %s: no: %s", name, exc)
        else:
            return Found(replace(engine, skipped=tuple(skipped)), tuple(skipped))
    return Found(None, tuple(skipped))


def _missing(skipped: tuple[Skip, ...]) -> EngineMissing:
    """The last way is the one a person can do something about: its words come last."""
    lines = [f"  {name}: {reason.splitlines()[0]}" for name, reason in skipped]
    hint = "\n".join(skipped[-1][1].splitlines()[1:]) if skipped else ""
    return EngineMissing("\n".join(["llama.cpp is not on this machine and could not be installed:", *lines]), hint=hint)


# Engines that are here


async def _given(request: Request, folder: Path) -> Installed:
    for name in (SERVER, RPC_SERVER):
        if not await trio.to_thread.run_sync(_has, folder, name):
            raise EngineMissing(f"{folder} has no {name}", hint="--engine-dir wants the folder of a llama.cpp build")
    engine = await checked(request, folder, "--engine-dir")
    if not speaks(request, engine):
        raise EngineMismatch(
            f"{folder} speaks RPC protocol {engine.protocol}, this release needs {dotted(request.pins.protocol)}",
            hint=f"build llama.cpp {request.pins.build}, or leave --engine-dir out",
        )
    return engine


async def _on_path(request: Request) -> Installed:
    path = request.environ.get("PATH", "")
    programs = await trio.to_thread.run_sync(_programs_on, path)
    for name, program in programs.items():
        if program is None:
            raise NotHere(f"there is no {name} on PATH")
    folders = {program.parent for program in programs.values() if program is not None}
    if len(folders) != 1:
        raise NotHere(f"{SERVER} and {RPC_SERVER} on PATH are of different builds: {' and '.join(map(str, folders))}")
    engine = await checked(request, folders.pop(), "PATH")
    if not speaks(request, engine):
        needed = dotted(request.pins.protocol)
        raise NotHere(f"{engine.folder} speaks RPC protocol {engine.protocol}, this release needs {needed}")
    return engine


def _programs_on(path: str) -> dict[str, Path | None]:
    """Where the engine's programs on PATH really are: package managers put links there."""
    found = {name: shutil.which(name, path=path) for name in (SERVER, RPC_SERVER)}
    return {name: Path(program).resolve() if program else None for name, program in found.items()}


async def _cached(request: Request) -> Installed:
    """A folder in the cache that was made for this machine and has not changed since."""
    pattern = f"{request.pins.build}-{platform_key()}-*"
    folders = await trio.to_thread.run_sync(lambda: sorted(request.home.glob(pattern)))
    reasons = []
    for folder in folders:
        manifest = await trio.to_thread.run_sync(read_json, folder / MANIFEST)
        if not isinstance(manifest.get("digest"), str):
            reasons.append(f"{folder.name} is not a whole installation")
            continue
        if manifest.get("cpu") not in ("", cpu_identity()):
            reasons.append(f"{folder.name} was built for another CPU")
            continue
        try:
            engine = await checked(
                request, folder, f"cache ({manifest.get('origin', 'unknown')})", manifest.get("digest")
            )
        except (NotHere, EngineError) as exc:
            reasons.append(str(exc))
            continue
        if speaks(request, engine):
            return replace(engine, build=request.pins.build)
        reasons.append(f"{folder.name} speaks RPC protocol {engine.protocol}")
    raise NotHere("; ".join(reasons) or f"no {request.pins.build} in {request.home}")


def _has(folder: Path, name: str) -> bool:
    return any(os.access(folder / f"{name}{suffix}", os.X_OK) for suffix in ("", ".exe"))


__all__ = ["Found", "Installed", "Progress", "Request", "Skip", "ensure", "locate", "quiet"]
