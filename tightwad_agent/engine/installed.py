"""An engine in a folder: what is asked for, what was found, and whether it works on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import trio

from tightwad_agent.config import Config
from tightwad_agent.engine.pins import PINNED, Pins
from tightwad_agent.engine.process import Engine
from tightwad_agent.engine.smoke import Limits, SmokeResult, smoke
from tightwad_agent.engine.stamps import digest_of, read_smoke, write_smoke
from tightwad_agent.errors import (
    EngineBroken,
)
from tightwad_agent.wire.rows import Device, EngineInfo

MANIFEST = "tightwad-engine.json"

Skip = tuple[str, str]
"""(way, why it led nowhere)"""


@dataclass(frozen=True, slots=True)
class Installed(Engine):
    """An engine that passed its test on this machine: beside folder, digest and protocol its `build` (`b11434`, or
    `custom` where nobody can tell), where it came from, its devices (no CPUs), and the ways that led nowhere before it.
    """

    build: str = ""
    origin: str = ""
    devices: tuple[Device, ...] = ()
    skipped: tuple[Skip, ...] = ()

    @property
    def info(self) -> EngineInfo:
        """What other nodes are told."""
        return EngineInfo(build=self.build, digest=self.digest, protocol=self.protocol)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Where to look and what is allowed. `release_url`: a mirror instead of the official host."""

    cache_dir: Path
    engine_dir: Path | None = None
    release_url: str | None = None
    allow_download: bool = True
    allow_build: bool = True
    pins: Pins = PINNED
    limits: Limits = field(default_factory=Limits)
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @classmethod
    def of(cls, config: Config) -> Request:
        return cls(cache_dir=config.cache_dir, engine_dir=config.engine_dir, release_url=config.engine_url)

    @property
    def home(self) -> Path:
        """The cache of engines."""
        return self.cache_dir / "engine"

    @property
    def stamps(self) -> Path:
        return self.home / "stamps"


class NotHere(Exception):
    """This way leads nowhere; the text is why."""


async def checked(request: Request, folder: Path, origin: str, expected_digest: object = None) -> Installed:
    """The engine in a folder, tested on this machine now or before. Raises `EngineBroken` or `NotHere`."""
    try:
        digest = await trio.to_thread.run_sync(digest_of, folder, request.stamps)
    except OSError as exc:
        raise EngineBroken(f"{folder} cannot be read: {exc.strerror or exc}") from None
    if expected_digest is not None and digest != expected_digest:
        raise NotHere(f"the files in {folder} are not those that were installed")
    result = await trio.to_thread.run_sync(read_smoke, digest, request.stamps)
    if result is None:
        result = await smoke(folder, limits=request.limits, environ=request.environ)
        await trio.to_thread.run_sync(write_smoke, digest, request.stamps, result)
    return _installed(folder, digest, result, origin)


def _installed(folder: Path, digest: str, result: SmokeResult, origin: str) -> Installed:
    return Installed(
        folder=folder,
        digest=digest,
        protocol=str(result.protocol),
        build=f"b{result.build_number}" if result.build_number else "custom",
        origin=origin,
        devices=result.devices,
    )


def speaks(request: Request, engine: Engine) -> bool:
    """Major and minor as pinned; the patch number changes nothing on the wire."""
    return engine.protocol.split(".")[:2] == [str(n) for n in request.pins.protocol[:2]]


def dotted(protocol: tuple[int, int, int]) -> str:
    return ".".join(str(n) for n in protocol)
