"""How commands find the agent that runs with a state directory, and how an agent makes itself the only one there."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tightwad_agent.errors import AgentNotRunning, AgentRunning, EnvironmentFault
from tightwad_agent.mesh.files import is_there, read_private, write_private

LOCK_FILE = "agent.lock"
RUN_FILE = "run.json"
ADMIN_KEY_FILE = "admin.key"
MAX_KEY = 1024
_KEY = re.compile(r"[A-Za-z0-9_-]{32,}")


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a running agent leaves for commands."""

    pid: int
    endpoint_port: int
    mesh_port: int


def admin_key(state_dir: Path) -> str:
    """The secret by which commands of this user reach the agent; made at the first call."""
    path = state_dir / ADMIN_KEY_FILE
    what_to_do = f"run as the user who runs the agent, or delete {path}"
    if is_there(path, what_to_do):
        text = read_private(path, MAX_KEY, what_to_do).decode("ascii", "replace").strip()
        if _KEY.fullmatch(text):
            return text
    made = secrets.token_urlsafe(32)
    write_private(path, made.encode())
    return made


class StateLock:
    """Exclusive use of a state directory for the life of the object.

    Waits `patience_s` for another to let go: a command that looks whether an agent runs has the lock for a moment.
    """

    def __init__(self, state_dir: Path, *, patience_s: float = 0.5) -> None:
        try:
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file: IO[str] = (state_dir / LOCK_FILE).open("a+")
        except OSError as exc:
            raise EnvironmentFault(
                f"cannot use the state directory {state_dir}: {exc.strerror}",
                hint="choose another with --state-dir or TIGHTWAD_STATE_DIR",
            ) from None
        ends_at = time.monotonic() + patience_s
        while not (locked := _lock(self._file)) and time.monotonic() < ends_at:
            time.sleep(0.02)
        if not locked:
            self._file.close()
            raise AgentRunning(
                f"an agent already runs with {state_dir}",
                hint="stop it first, or give the second one a --state-dir of its own",
            )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> StateLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(file: IO[str]) -> bool:
    try:
        import fcntl  # noqa: PLC0415 - not on Windows
    except ImportError:
        return _lock_windows(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_windows(file: IO[str]) -> bool:
    import msvcrt  # noqa: PLC0415 - only there

    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return False
    return True


def announce(state_dir: Path, info: RunInfo) -> None:
    """Tells commands where the agent is."""
    write_private(state_dir / RUN_FILE, json.dumps(asdict(info)).encode())


def retract(state_dir: Path) -> None:
    (state_dir / RUN_FILE).unlink(missing_ok=True)


def running(state_dir: Path) -> RunInfo | None:
    """The agent that uses the directory right now, if there is one."""
    try:
        with StateLock(state_dir, patience_s=0):
            return None
    except AgentRunning:
        pass
    try:
        plain = json.loads((state_dir / RUN_FILE).read_text(encoding="utf-8"))
        return RunInfo(int(plain["pid"]), int(plain["endpoint_port"]), int(plain["mesh_port"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


class AgentClient:
    """Calls to the agent that runs with a state directory."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir

    def call(
        self,
        command: str,
        params: dict[str, Any] | None = None,
        show: Callable[[str, int, int, str], None] | None = None,
    ) -> dict[str, Any]:
        """One command. Raises `AgentNotRunning`, or the error the agent answered with."""
        import trio  # noqa: PLC0415 - `--help` does not wait for it

        from tightwad_agent.proxy.admin_client import admin_call  # noqa: PLC0415

        info = running(self._state_dir) if self._state_dir.is_dir() else None
        if info is None:
            raise AgentNotRunning(
                f"no agent runs with {self._state_dir}",
                hint="start it with `tightwad-agent`, or name its directory with --state-dir",
            )

        def on_progress(progress: dict[str, Any]) -> None:
            if show is not None:
                show(progress["stage"], progress["done"], progress["total"], progress["unit"])

        async def ask() -> dict[str, Any]:
            key = admin_key(self._state_dir)
            result: dict[str, Any] = await admin_call(info.endpoint_port, key, command, params or {}, on_progress)
            return result

        return trio.run(ask)
