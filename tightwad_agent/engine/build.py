"""Builds llama.cpp from the pinned source distribution.

The distribution is used as an archive of sources: nothing of its own build back end is run.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import trio

from tightwad_agent.engine.archive import unpack
from tightwad_agent.engine.pins import Pins
from tightwad_agent.engine.process import Child, Spawner
from tightwad_agent.engine.toolchain import Compilers, Tools
from tightwad_agent.errors import EngineMissing, OriginError
from tightwad_agent.fetch import download, index_file

Progress = Callable[[str, int, int, str], None]
"""(stage, done, total, unit): stages are `wait`, `download`, `unpack`, `compile`, `test`; total 0 means unknown."""

TAIL_LINES = 30
_CONFIGURE_S = 900.0
_COMPILE_S = 4 * 3600.0
_NICE = 10
_TELL_BYTES = 8 << 20
_BYTES_PER_JOB = 1 << 30
_NINJA = re.compile(r"\[(\d{1,6})/(\d{1,6})\] ")
_MAKE = re.compile(r"\[ *(\d{1,3})%\] ")


async def fetch_source(pins: Pins, downloads: Path, progress: Progress) -> Path:
    """The source distribution, checked against the pinned hash. Raises `OriginError` or `DiskFull`."""
    found = await index_file(pins.package, pins.version, kind="sdist")
    if found.sha256 and found.sha256 != pins.sha256:
        raise OriginError(f"the package index has another {found.filename}: SHA-256 {found.sha256}, not {pins.sha256}")
    dest = downloads / f"{pins.package}-{pins.version}{'.zip' if found.filename.endswith('.zip') else '.tar.gz'}"
    await download(
        found.url,
        dest,
        sha256=pins.sha256,
        size=found.size,
        progress=lambda done, total: progress("download", done, total or 0, "B"),
        cert=found.cert,
        trusted_hosts=found.trusted_hosts,
    )
    return dest


async def build(
    pins: Pins,
    sdist: Path,
    work: Path,
    *,
    flags: tuple[str, ...],
    compilers: Compilers,
    tools: Tools,
    logs: Path,
    progress: Progress,
    environ: Mapping[str, str],
) -> Path:
    """Unpacks and compiles inside `work`; the folder with programs and libraries. Raises `EngineMissing`.

    `logs`: where `logs/cmake.log` and `logs/compile.log` are kept. A cancellation ends every process of the build.
    """

    await unpack_in_thread(sdist, work / "source", progress)
    source = await trio.to_thread.run_sync(_find_source, work / "source", pins.source)
    tree, failures = work / "build", list[EngineMissing]()
    configure = [tools.cmake, "-S", str(source), "-B", str(tree), *tools.flags, *flags, *compilers.flags]
    async with trio.open_nursery() as nursery:
        run = _Runner(Spawner(nursery, logs, environ=environ), logs, progress)
        try:
            progress("compile", 0, 0, "steps")
            await run("cmake", configure, _CONFIGURE_S)
            await run("compile", tools.compile_argv(tree, pins.targets, n_jobs()), _COMPILE_S)
        except EngineMissing as exc:
            failures.append(exc)
    if failures:
        raise failures[0]
    return await trio.to_thread.run_sync(_collect, tree, source, work / "engine", pins.targets)


async def unpack_in_thread(archive: Path, dest: Path, progress: Progress) -> None:
    """`unpack`, with its progress told in the loop's thread now and then. Raises `OriginError`."""
    n_told = 0

    def told(n_bytes: int) -> None:
        nonlocal n_told
        if n_bytes - n_told >= _TELL_BYTES:
            n_told = n_bytes
            trio.from_thread.run_sync(progress, "unpack", n_bytes, 0, "B")

    progress("unpack", 0, 0, "B")
    await trio.to_thread.run_sync(lambda: unpack(archive, dest, progress=told))


def n_jobs() -> int:
    """All cores, as far as memory reaches: a compiler takes up to 1 GiB."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(n_cores, psutil.virtual_memory().total // _BYTES_PER_JOB))


def step_of(line: str) -> tuple[int, int, str] | None:
    """(done, total, unit) of a line of Ninja (`[12/345] …`) or make (`[ 42%] …`); None for any other."""
    if match := _NINJA.match(line):
        return int(match[1]), int(match[2]), "steps"
    if match := _MAKE.match(line):
        return min(100, int(match[1])), 100, "%"
    return None


class _Runner:
    def __init__(self, spawner: Spawner, logs: Path, progress: Progress) -> None:
        self._spawner = spawner
        self._logs = logs
        self._progress = progress

    async def __call__(self, name: str, argv: list[str], deadline_s: float) -> None:
        """Runs one step, at low priority. Raises `EngineMissing` with the end of what it printed."""
        async with self._spawner.running(name, argv, on_line=self._on_line) as child:
            with suppress(psutil.Error):
                psutil.Process(child.pid).nice(_NICE)
            with trio.move_on_after(deadline_s):
                if await child.wait() == 0:
                    return
            raise self._failure(name, child, deadline_s)

    def _on_line(self, line: str) -> None:
        step = step_of(line)
        if step is not None:
            self._progress("compile", *step)

    def _failure(self, name: str, child: Child, deadline_s: float) -> EngineMissing:
        how = f"took longer than {deadline_s:g} s" if child.code is None else "failed"
        tail = "\n".join(list(child.tail)[-TAIL_LINES:])
        return EngineMissing(
            f"building llama.cpp {how} in the step `{name}`",
            hint=f"{tail}\nthe whole log: {self._logs / 'logs'}/{name}.log",
        )


def _find_source(folder: Path, name: str) -> Path:
    """The tree to build: `NAME` in the one folder of the distribution."""
    found = sorted(p.parent for p in folder.glob(f"*/{name}/CMakeLists.txt"))
    if len(found) != 1:
        raise OriginError(
            f"the source distribution has {len(found)} folders {name} with a CMakeLists.txt, expected one"
        )
    return found[0]


def _collect(tree: Path, source: Path, dest: Path, targets: tuple[str, ...]) -> Path:
    """Moves what was built, links and all, to a folder that can go anywhere."""
    built = next((p for p in (tree / "bin" / "Release", tree / "bin") if p.is_dir()), None)
    if built is None:
        raise EngineMissing("building llama.cpp left no programs")
    shutil.copytree(built, dest, symlinks=True)
    for name in targets:
        if not any((dest / f"{name}{suffix}").is_file() for suffix in ("", ".exe")):
            raise EngineMissing(f"building llama.cpp left no {name}")
    licence = source / "LICENSE"
    if licence.is_file():
        shutil.copy(licence, dest / "LICENSE.llama.cpp")
    return dest
