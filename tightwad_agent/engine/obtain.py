"""Fresh engines: the official release archive, or a build from sources. Both end in the cache, tested and whole."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import trio

from tightwad_agent.engine import build as building
from tightwad_agent.engine.build import Progress, unpack_in_thread
from tightwad_agent.engine.installed import MANIFEST, Installed, NotHere, Request, checked, dotted, speaks
from tightwad_agent.engine.installing import put_in_place, work_folder
from tightwad_agent.engine.pins import RPC_SERVER, SERVER, build_flags, cache_name, platform_key
from tightwad_agent.engine.stamps import cpu_identity, write_json
from tightwad_agent.engine.toolchain import find_compilers, find_tools
from tightwad_agent.errors import (
    EnvironmentFault,
    OriginError,
)
from tightwad_agent.fetch import download, fetch_bytes

MAX_ARCHIVE_BYTES = 2 << 30
_SHA256 = re.compile(r"[0-9a-f]{64}")


async def from_release(request: Request, progress: Progress) -> Installed:
    if not request.allow_download:
        raise NotHere("downloads are switched off")
    pins = request.pins
    archive = pins.archives.get(platform_key())
    if archive is None:
        raise NotHere(f"there is no release archive for {platform_key()}")
    base = (request.release_url or pins.release_url).rstrip("/")
    url = f"{base}/{pins.build}/{archive.name}"
    sha256 = archive.sha256
    if not sha256 and request.release_url is not None:
        sha256 = await _mirrored_hash(url)
    if not sha256:
        raise NotHere(f"no SHA-256 is known for {archive.name}, so it is not used")
    downloads = request.home / "downloads"
    await download(
        url,
        downloads / archive.name,
        sha256=sha256,
        limit_bytes=MAX_ARCHIVE_BYTES,
        progress=lambda done, total: progress("download", done, total or 0, "B"),
    )
    async with work_folder(request.home) as work:
        await unpack_in_thread(downloads / archive.name, work / "archive", progress)
        folder = await trio.to_thread.run_sync(_find_programs, work / "archive")
        final = request.home / cache_name(pins, "release", archive.name)
        engine = await _install(
            request, folder, final, work=work, origin=f"release {archive.name}", cpu="", progress=progress
        )
    await trio.to_thread.run_sync((downloads / archive.name).unlink)
    return engine


async def _mirrored_hash(url: str) -> str:
    """The hash a mirror publishes as `ARCHIVE.sha256`; the user named that mirror, so its word counts."""
    status, _headers, body = await fetch_bytes(f"{url}.sha256", limit_bytes=4096)
    match = _SHA256.match(body.decode("ascii", "replace").lower().strip())
    return match[0] if status == 200 and match else ""


async def from_source(request: Request, progress: Progress) -> Installed:
    if not (request.allow_download and request.allow_build):
        raise NotHere("building is switched off")
    pins = request.pins
    compilers = await find_compilers(request.environ)
    tools = await find_tools(request.environ, request.home / "tools")
    sdist = await building.fetch_source(pins, request.home / "downloads", progress)
    flags = build_flags(pins, cuda=bool(compilers.nvcc))
    async with work_folder(request.home) as work:
        folder = await building.build(
            pins,
            sdist,
            work,
            flags=flags,
            compilers=compilers,
            tools=tools,
            logs=request.home / "build",
            progress=progress,
            environ=request.environ,
        )
        final = request.home / cache_name(pins, "build", *flags, *compilers.flags, cpu_identity())
        origin = f"build of {pins.package} {pins.version}"
        engine = await _install(request, folder, final, work=work, origin=origin, cpu=cpu_identity(), progress=progress)
    await trio.to_thread.run_sync(sdist.unlink)
    return engine


async def _install(
    request: Request, folder: Path, final: Path, *, work: Path, origin: str, cpu: str, progress: Progress
) -> Installed:
    """Tests what was fetched, and puts it into the cache whole. `cpu`: whom it was built for; empty: for all."""
    progress("test", 0, 0, "")
    engine = await checked(request, folder, origin)
    if not speaks(request, engine):
        raise NotHere(f"{origin} speaks RPC protocol {engine.protocol}, not {dotted(request.pins.protocol)}")
    manifest = {"build": request.pins.build, "digest": engine.digest, "origin": origin, "cpu": cpu}

    def place() -> None:
        write_json(folder / MANIFEST, manifest)
        put_in_place(folder, final, work)

    try:
        await trio.to_thread.run_sync(place)
    except OSError as exc:
        raise EnvironmentFault(f"{final} cannot be written: {exc.strerror or exc}") from None
    return replace(engine, folder=final, build=request.pins.build)


def _find_programs(folder: Path) -> Path:
    """The folder inside an archive that holds the programs."""
    suffix = ".exe" if sys.platform == "win32" else ""
    found = sorted(folder.rglob(f"{SERVER}{suffix}"), key=lambda p: len(p.parts))
    for program in found:
        if (program.parent / f"{RPC_SERVER}{suffix}").is_file():
            return program.parent
    raise OriginError(f"the archive has no {SERVER} with {RPC_SERVER} beside it")
