"""One installation at a time: a lock on the cache of engines, and folders that appear there whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

import trio

from tightwad_agent.errors import EngineMissing

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_POLL_S = 0.25
_WORK_PREFIX = ".work-"


@asynccontextmanager
async def exclusive(folder: Path, waiting: Callable[[str], None]) -> AsyncIterator[None]:
    """Holds the lock of `folder`; the system drops it when the process dies. `waiting` is told once who holds it.

    Raises `EngineMissing` if the folder cannot be written.
    """
    try:
        await trio.to_thread.run_sync(lambda: folder.mkdir(parents=True, exist_ok=True))
        file = await trio.to_thread.run_sync((folder / "lock").open, "a+b")
    except OSError as exc:
        raise EngineMissing(
            f"{folder} cannot be written: {exc.strerror or exc}", hint="choose another cache_dir in the configuration"
        ) from None
    try:
        told = False
        while not _try_lock(file):
            if not told:
                waiting(f"another agent (pid {_holder(file)}) is installing the engine")
                told = True
            await trio.sleep(_POLL_S)
        _sign(file)
        yield
    finally:
        file.close()


@asynccontextmanager
async def work_folder(folder: Path) -> AsyncIterator[Path]:
    """A folder beside the final ones, gone afterwards; first sweeps those of agents that died. Hold the lock."""
    await trio.to_thread.run_sync(_sweep, folder)
    work = Path(await trio.to_thread.run_sync(lambda: tempfile.mkdtemp(dir=folder, prefix=_WORK_PREFIX)))
    try:
        yield work
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lambda: shutil.rmtree(work, ignore_errors=True))


def put_in_place(built: Path, final: Path, work: Path) -> None:
    """Renames `built` to `final`; what was there goes to `work`, to be deleted with it. Blocks."""
    if final.exists() or final.is_symlink():
        final.rename(work / "replaced")
    built.chmod(0o755)
    built.rename(final)


def _sweep(folder: Path) -> None:
    for stale in folder.glob(f"{_WORK_PREFIX}*"):
        shutil.rmtree(stale, ignore_errors=True)


def _try_lock(file: IO[bytes]) -> bool:
    try:
        if sys.platform == "win32":
            file.seek(1 << 30)  # a byte nobody reads: locks are mandatory there
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sign(file: IO[bytes]) -> None:
    file.truncate(0)
    file.write(str(os.getpid()).encode())
    file.flush()


def _holder(file: IO[bytes]) -> str:
    file.seek(0)
    text = file.read(20).decode("ascii", "replace")
    return text if text.isdecimal() else "unknown"
