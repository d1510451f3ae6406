"""Child processes that never outlive the agent.

Each child leads a session of its own, has a clean environment, and writes to a bounded log. It ends in one of four
ways: by itself; because its owner leaves `Spawner.running` (also by cancellation); because the agent dies, by
`PR_SET_PDEATHSIG` on Linux; or in the next agent's `sweep`, which goes by pid, start time and program.

The death signal is bound to the *thread* that forks, and trio forks in threads that end after ten idle seconds. So the
fork happens in trio's own thread (0.3 ms), and a tiny Python program sets the signal and becomes the real one.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import trio

from tightwad_agent.engine.children import Children, identify
from tightwad_agent.errors import EngineError

log = logging.getLogger(__name__)

RING_LINES = 200
MAX_LINE = 2048
LOG_BYTES = 2 << 20
GRACE_S = 2.0
_READ_SIZE = 4096
_POLL_S = 0.05
_DRAIN_S = 0.5

_LAUNCHER = """\
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        os._exit(0)
for name in ("SIGPIPE", "SIGXFSZ"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as exc:
    sys.stderr.write(f"cannot run {sys.argv[2]}: {exc.strerror}\\n")
    sys.stderr.flush()
    os._exit(127)
"""
"""Python ignores SIGPIPE, and what is ignored stays ignored across exec: hence the reset."""

_KEPT = frozenset(
    (
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "LANGUAGE",
        "TZ",
        "TMPDIR",
        "TEMP",
        "TMP",
        "XDG_CACHE_HOME",
        "XDG_RUNTIME_DIR",
        "SYSTEMROOT",
        "WINDIR",
        "USERPROFILE",
        "LOCALAPPDATA",
        "APPDATA",
        "OMP_NUM_THREADS",
        "HSA_OVERRIDE_GFX_VERSION",
        "ONEAPI_DEVICE_SELECTOR",
        "VK_ICD_FILENAMES",
        "VK_DRIVER_FILES",
    )
)
_KEPT_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "HIP_", "ROCR_", "ROCM_", "GGML_", "ZE_", "SYCL_")


def clean_environment(environ: Mapping[str, str], *, frozen: bool) -> dict[str, str]:
    """What a child inherits: places, language and what steers GPU drivers. No secret, no `LLAMA_ARG_*` that would
    change a command line of ours, and never the library path of a frozen bundle (it keeps the user's in `*_ORIG`)."""
    kept = {k: v for k, v in environ.items() if k in _KEPT or k.startswith(_KEPT_PREFIXES)}
    library_path = environ.get("LD_LIBRARY_PATH_ORIG" if frozen else "LD_LIBRARY_PATH")
    return kept | ({"LD_LIBRARY_PATH": library_path} if library_path else {})


def describe_exit(code: int) -> str:
    """An exit code as `subprocess` gives it, in words."""
    if code == 0:
        return "ended by itself"
    if code > 0:
        return f"exited with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


@dataclass(frozen=True, slots=True)
class Engine:
    """A llama.cpp build on this machine: its folder, SHA-256 over its files, and RPC version such as `7.0.0`."""

    folder: Path
    digest: str
    protocol: str

    @property
    def server(self) -> str:
        return str(self.folder / "llama-server")

    @property
    def worker(self) -> str:
        return str(self.folder / "ggml-rpc-server")


class Child:
    """One running program. Only `Spawner.running` makes and ends it."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], grace_s: float) -> None:
        self.name = name
        self.pid = popen.pid
        self.grace_s = grace_s
        """How long it may take to end after SIGTERM; 0 kills it at once. The owner may change it."""
        self.tail: deque[str] = deque(maxlen=RING_LINES)
        """The newest lines of its output."""
        self._popen = popen
        self._output_read = trio.Event()

    @property
    def code(self) -> int | None:
        """The exit code once it has ended: negative for a signal."""
        return self._popen.poll()

    def told(self) -> str:
        """How it ended, with its last line, for a log or a status."""
        code = self.code
        how = "is running" if code is None else describe_exit(code)
        last = next((line for line in reversed(self.tail) if line.strip()), "")
        return f"{self.name} {how}" + (f" ({last.strip()[:200]})" if last and code not in (None, 0) else "")

    async def wait(self) -> int:
        """Its exit code, once it has ended and what it wrote has been read."""
        await self._reap()
        with trio.move_on_after(_DRAIN_S):
            await self._output_read.wait()
        return self._popen.returncode

    async def stop(self) -> None:
        """SIGTERM, at most `grace_s` of patience, SIGKILL to its group; returns when it is reaped. Call it shielded."""
        if self.code is None and self.grace_s > 0:
            self._signal(signal.SIGTERM)
            with trio.move_on_after(self.grace_s):
                await self._reap()
        self._signal(signal.SIGKILL)
        await self._reap()

    async def _reap(self) -> None:
        fd = _pidfd(self.pid) if self._popen.poll() is None else None
        if fd is None:
            while self._popen.poll() is None:  # noqa: ASYNC110 - nothing to wait for on this system
                await trio.sleep(_POLL_S)
            return
        try:
            while self._popen.poll() is None:
                await trio.lowlevel.wait_readable(fd)
        finally:
            os.close(fd)

    def _signal(self, number: signal.Signals) -> None:
        if self._popen.poll() is not None:
            return  # reaped: the pid may be anybody's by now
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            self._popen.send_signal(number)  # a group that only holds a zombie; macOS says EPERM

    async def read_output(self, source: trio.abc.ReceiveStream, sink: LogFile, on_line: Callable[[str], None]) -> None:
        """Keeps the pipe empty until every writer is gone; lines beyond `MAX_LINE` are cut."""
        rest = b""
        try:
            async with source:
                while data := await source.receive_some(_READ_SIZE):
                    sink.write(bytes(data))
                    *lines, rest = (rest + data).split(b"\n")
                    rest = rest[:MAX_LINE]
                    for line in lines:
                        self._take(line, on_line)
            if rest:
                self._take(rest, on_line)
        finally:
            sink.close()
            self._output_read.set()

    def _take(self, line: bytes, on_line: Callable[[str], None]) -> None:
        text = line[:MAX_LINE].decode("utf-8", "replace").rstrip("\r")
        self.tail.append(text)
        on_line(text)


class LogFile:
    """An append-only file of at most `LOG_BYTES`, beside its predecessor `.1`. A disk that refuses ends the log, not
    the child."""

    def __init__(self, path: Path, max_bytes: int = LOG_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._fd: int | None = None
        self._size = 0
        self._open()

    def write(self, data: bytes) -> None:
        if self._fd is None:
            return
        try:
            if self._size + len(data) > self._max_bytes:
                os.close(self._fd)
                self._fd = None
                os.replace(self._path, self._path.with_name(self._path.name + ".1"))
                self._open()
            if self._fd is not None:
                self._size += os.write(self._fd, data)
        except OSError as exc:
            log.warning("%s: %s; the log ends here", self._path, exc.strerror)
            self.close()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            self._size = os.fstat(self._fd).st_size
        except OSError as exc:
            log.warning("%s: %s; output is not kept", self._path, exc.strerror)


class Spawner:
    """Starts children and remembers them in `state_dir/children.json`. `nursery` owns the tasks that read their output;
    it must outlive every `running` block. Make it in the thread that runs trio, and keep that thread."""

    def __init__(
        self,
        nursery: trio.Nursery,
        state_dir: Path,
        *,
        environ: Mapping[str, str] | None = None,
        frozen: bool | None = None,
    ) -> None:
        self._nursery = nursery
        self._logs = state_dir / "logs"
        self._children = Children(state_dir / "children.json")
        is_frozen = bool(getattr(sys, "frozen", False)) if frozen is None else frozen
        self._environ = clean_environment(os.environ if environ is None else environ, frozen=is_frozen)

    async def sweep(self) -> list[str]:
        """Ends what an earlier agent with this state directory left behind; says what it ended. Call it once, before
        the first child, while holding the state directory's lock."""
        killed = await trio.to_thread.run_sync(self._children.sweep)
        for what in killed:
            log.warning("ended a left-over process: %s", what)
        return killed

    @asynccontextmanager
    async def running(
        self,
        name: str,
        argv: Sequence[str],
        *,
        grace_s: float = GRACE_S,
        on_line: Callable[[str], None] = lambda _line: None,
        pass_fds: Sequence[int] = (),
    ) -> AsyncIterator[Child]:
        """A child for the length of the block; afterwards it is gone and reaped, whatever happened in the block.

        `pass_fds`: file descriptors that it gets under the same numbers. Nothing else is inherited, and no other child
        gets these. Raises `EngineError` if nothing can be started at all; a program that cannot be run ends with code
        127.
        """
        child, output = self._start(name, argv, grace_s, pass_fds)
        try:
            self._nursery.start_soon(child.read_output, output, LogFile(self._logs / f"{name}.log"), on_line)
            await self._remember(child, argv[0])
            yield child
        finally:
            with trio.CancelScope(shield=True):
                await child.stop()
                with trio.move_on_after(_DRAIN_S):
                    await child.wait()
                await trio.to_thread.run_sync(self._children.forget, child.pid)
                log.info("%s (pid %d) %s", name, child.pid, describe_exit(child.code or 0))

    def _start(
        self, name: str, argv: Sequence[str], grace_s: float, pass_fds: Sequence[int]
    ) -> tuple[Child, trio.abc.ReceiveStream]:
        reader, writer = os.pipe()
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *argv]
        try:
            popen = subprocess.Popen(
                launcher,
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=subprocess.STDOUT,
                env=self._environ,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        except OSError as exc:
            os.close(reader)
            raise EngineError(f"cannot start {name}: {exc.strerror or exc}") from None
        finally:
            os.close(writer)
        log.info("started %s (pid %d)", name, popen.pid)
        return Child(name, popen, grace_s), trio.lowlevel.FdStream(reader)

    async def _remember(self, child: Child, exe: str) -> None:
        identity = identify(child.pid)
        if identity is not None:
            await trio.to_thread.run_sync(self._children.remember, child.pid, identity, exe)


async def free_port() -> int:
    """A loopback TCP port that nobody listens on now. Another program may take it before the child does: the child then
    ends, and is started again on another one."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port: int = listener.socket.getsockname()[1]
        return port


async def listens(pid: int, port: int) -> bool:
    """Whether this process itself listens on the port. An answer from the port proves nothing: it may be another's."""
    return await trio.to_thread.run_sync(_listens, pid, port)


def _listens(pid: int, port: int) -> bool:
    try:
        sockets = psutil.Process(pid).net_connections("tcp")
    except psutil.AccessDenied:
        return True  # a system that does not tell
    except psutil.Error:
        return False
    return any(s.status == psutil.CONN_LISTEN and s.laddr and s.laddr.port == port for s in sockets)


def _pidfd(pid: int) -> int | None:
    """A file descriptor that becomes readable when the process ends, where the system has such a thing."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError as exc:
        if exc.errno in (errno.ENOSYS, errno.EPERM, errno.EINVAL, errno.EMFILE, errno.ENFILE):
            return None
        raise
