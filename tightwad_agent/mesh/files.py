"""Small secret files, written so that a crash leaves the old one or the new one, and nobody else can read either.

All of it blocks: call it from a thread where the trio loop is busy.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from tightwad_agent.errors import EnvironmentFault, StateDamaged

log = logging.getLogger(__name__)

FILE_MODE = 0o600
DIR_MODE = 0o700
_POSIX = os.name == "posix"


def make_private_dir(path: Path) -> None:
    """Creates the directory with mode 0700 if it is not there; one that is there keeps its mode."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=DIR_MODE)
    except FileExistsError:
        if not path.is_dir():
            raise EnvironmentFault(f"{path} is a file; it must be a directory") from None
    except OSError as exc:
        hint = "choose another with --state-dir"
        raise EnvironmentFault(f"{path} cannot be made: {exc.strerror}", hint=hint) from exc


def write_private(path: Path, data: bytes) -> None:
    """Replaces the file as one step, mode 0600, on the disk when this returns. Raises `EnvironmentFault`."""
    temporary: str | None = None
    try:
        # mkstemp: O_EXCL, 0600 from the first moment, never through a link somebody left there
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".new")
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        sync_dir(path.parent)
    except OSError as exc:
        raise EnvironmentFault(f"{path} cannot be written: {exc.strerror}") from exc
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def read_private(path: Path, limit: int, what_to_do: str) -> bytes:
    """The file's bytes; a mode that lets others read it is tightened and logged. Raises `StateDamaged`."""
    try:
        with path.open("rb") as file:
            _tighten(path, os.fstat(file.fileno()).st_mode)
            data = file.read(limit + 1)
    except OSError as exc:
        raise StateDamaged(f"{path} cannot be read: {exc.strerror}", hint=what_to_do) from None
    if len(data) > limit:
        raise StateDamaged(f"{path} is larger than {limit} bytes; this is no file of ours", hint=what_to_do)
    return data


def _tighten(path: Path, mode: int) -> None:
    if not _POSIX or not mode & 0o077:
        return
    log.warning("%s was readable by others (mode %o); it is 0600 now", path, mode & 0o777)
    try:
        path.chmod(FILE_MODE)
    except OSError as exc:
        log.warning("%s keeps its mode: %s", path, exc.strerror)


def remove(path: Path) -> None:
    """Deletes the file if it is there, and leftovers of interrupted writes to it. Raises `EnvironmentFault`."""
    try:
        path.unlink(missing_ok=True)
        for leftover in path.parent.glob(f".{path.name}.*.new"):
            leftover.unlink(missing_ok=True)
    except OSError as exc:
        raise EnvironmentFault(f"{path} cannot be deleted: {exc.strerror}") from exc


def is_there(path: Path, what_to_do: str) -> bool:
    """Whether there is something of that name; `StateDamaged` if the directory does not let us know."""
    try:
        return path.exists()
    except OSError as exc:
        raise StateDamaged(f"{path} cannot be reached: {exc.strerror}", hint=what_to_do) from None


def sync_dir(path: Path) -> None:
    """Makes renames and new names in a directory durable, where the system has such a thing."""
    if not _POSIX:
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
