"""The one door to the web: files into the cache, pages of the package index.

A download goes to `NAME.part` beside its destination, is resumed where the server allows it, checked against its hash
as a whole, and only then renamed: what stands under the final name is right. Plain http is for loopback addresses.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import trio

from tightwad_agent.errors import DiskFull, EnvironmentFault, OriginError
from tightwad_agent.package_index import (
    ACCEPT,
    MAX_PAGE_BYTES,
    IndexConfig,
    IndexFile,
    Kind,
    choose,
    config_from_list,
    normalised,
    page_url,
    parse_page,
)
from tightwad_agent.web import (
    RETRIED,
    Get,
    Pace,
    Patience,
    Response,
    Retry,
    body_of,
    check_status,
    client,
    length_in,
    sha256_in,
    shown,
    start_in,
    total_in,
    validator_in,
    version_in,
)

log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]
"""(bytes here, bytes in all where known)"""

MAX_FILE_BYTES = 2 << 40
DISK_MARGIN_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file as its server sees it: bytes, what tells this version from others (empty: unknown), range requests."""

    n_bytes: int
    version: str
    has_ranges: bool


async def download(
    url: str,
    dest: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    headers: Mapping[str, str] | None = None,
    progress: Progress = lambda _done, _total: None,
    limit_bytes: int = MAX_FILE_BYTES,
    cert: str = "",
    trusted_hosts: tuple[str, ...] = (),
    patience: Patience | None = None,
    hub: bool = False,
    ask_ranges: bool = False,
) -> Fetched:
    """Fetches `url` to `dest`, whole and checked or not at all.

    `sha256` in hex and `size` in bytes are what the file must have. `cert` is a CA bundle trusted beside the system's;
    `trusted_hosts` may be reached over plain http. `hub`: the hash that a model hub says the file has must be
    its hash. `ask_ranges`: asked in a way that shows whether the server answers range requests. Raises `OriginError`
    (with the reason), `DiskFull`, or `EnvironmentFault` if the destination cannot be written.
    """
    job = _Download(
        url=url,
        part=_Part(dest),
        sha256=sha256.lower() if sha256 else None,
        size=size,
        headers=dict(headers or {}),
        progress=progress,
        limit_bytes=limit_bytes,
        patience=patience or Patience(),
        hub=hub,
        ask_ranges=ask_ranges,
    )
    async with client(job.patience, cert, trusted_hosts) as get:
        try:
            await job.run(get)
        except OSError as exc:
            raise EnvironmentFault(f"{dest}: cannot be written: {exc.strerror or exc}") from None
    return Fetched(job.part.n_bytes, job.version, job.has_ranges)


async def fetch_bytes(
    url: str,
    *,
    limit_bytes: int,
    headers: Mapping[str, str] | None = None,
    cert: str = "",
    trusted_hosts: tuple[str, ...] = (),
    patience: Patience | None = None,
) -> tuple[int, Mapping[str, str], bytes]:
    """(status, headers, body) of a small resource; the caller judges the status. Raises `OriginError`."""
    patience = patience or Patience()
    reason = "no try was made"
    async with client(patience, cert, trusted_hosts) as get:
        for attempt in range(patience.n_tries):
            if attempt:
                await trio.sleep(patience.backoff_s * 2 ** (attempt - 1))
            try:
                return await _fetch_once(get, url, dict(headers or {}), limit_bytes, patience)
            except Retry as exc:
                reason = str(exc)
    raise OriginError(f"{shown(url)}: {reason}")


async def _fetch_once(
    get: Get, url: str, headers: dict[str, str], limit_bytes: int, patience: Patience
) -> tuple[int, Mapping[str, str], bytes]:
    body, pace = bytearray(), Pace(patience)
    async with get(url, headers) as response:
        if response.status_code in RETRIED:
            raise Retry(f"HTTP {response.status_code}")
        async with body_of(response, response.aiter_bytes()) as chunks:
            async for chunk in chunks:
                body += chunk
                pace.count(len(chunk))
                if len(body) > limit_bytes:
                    raise OriginError(f"{shown(url)}: more than {limit_bytes} bytes came")
        return response.status_code, response.headers, bytes(body)


async def index_file(package: str, version: str | None = None, kind: Kind = "wheel") -> IndexFile:
    """The file of `package` on the package index that pip is configured with; the newest final one without `version`.

    Raises `OriginError` if no index has it or none answers.
    """
    normalised(package)  # a name that is none is an error before anybody is asked
    config = await index_config()
    failure = OriginError(f"the package index has no {kind} of {package} {version or ''}".rstrip())
    for index in config.indexes:
        try:
            found = await _index_file(config, index, package, version, kind)
        except OriginError as exc:
            failure = exc
            continue
        if found is not None:
            return replace(found, cert=config.cert, trusted_hosts=config.trusted_hosts)
    raise failure


async def index_config(environ: Mapping[str, str] | None = None) -> IndexConfig:
    """pip's configuration, asked of pip itself, and its default index where nothing else is said."""
    environ = os.environ if environ is None else environ
    env = {**environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        with trio.fail_after(60):
            done = await trio.run_process(
                [*pip_command(), "config", "list"], capture_stdout=True, stderr=subprocess.DEVNULL, env=env, check=False
            )
    except trio.TooSlowError:
        raise OriginError("pip did not say within 60 s which package index it uses") from None
    return config_from_list(done.stdout.decode("utf-8", "replace"), environ, _default_index())


def pip_command() -> list[str]:
    """How to run pip as a child: by the path of the package, so that it also works from a pex or a pipx environment."""
    spec = importlib.util.find_spec("pip")
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentFault(
            "the pip package is missing", hint=f"install it for {sys.executable}, e.g. with ensurepip"
        )
    return [sys.executable, str(Path(spec.submodule_search_locations[0]) / "__main__.py")]


# One download


class _Startover(Exception):
    """What is in the `.part` is of no use."""


@dataclass(kw_only=True)
class _Download:
    url: str
    part: _Part
    sha256: str | None
    size: int | None
    headers: dict[str, str]
    progress: Progress
    limit_bytes: int
    patience: Patience
    hub: bool = False
    ask_ranges: bool = False
    total: int | None = None
    promised: str = ""
    """The SHA-256 that the hub says the file has."""
    version: str = ""
    has_ranges: bool = False

    async def run(self, get: Get) -> None:
        await trio.to_thread.run_sync(self.part.open)
        try:
            await self._until_complete(get)
            await trio.to_thread.run_sync(self.part.finish)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.part.close)

    async def _until_complete(self, get: Get) -> None:
        n_left, n_startovers = self.patience.n_tries, 1
        while True:
            n_before = self.part.n_bytes
            try:
                await self._attempt(get)
                self._check_hash()
                return
            except _Startover as exc:
                resumed = n_before > 0
                await trio.to_thread.run_sync(self.part.restart, "")
                n_startovers -= 1
                if not resumed or n_startovers < 0:
                    raise OriginError(f"{shown(self.url)}: {exc}", hint="nothing of it was kept") from None
            except Retry as exc:
                if self.part.n_bytes - n_before >= _CHUNK_BYTES:
                    n_left = self.patience.n_tries
                n_left -= 1
                if n_left <= 0:
                    raise OriginError(f"{shown(self.url)}: {exc}", hint="what came is kept; try again") from None
                log.info("%s: %s; trying again", shown(self.url), exc)
                await trio.sleep(self.patience.backoff_s * 2 ** (self.patience.n_tries - n_left - 1))

    def _check_hash(self) -> None:
        expected = self.sha256 or self.promised
        if expected not in ("", self.part.hexdigest()):
            raise _Startover(f"its SHA-256 is {self.part.hexdigest()}, expected {expected}")

    async def _attempt(self, get: Get) -> None:
        """One request, appended to the `.part`."""
        part = self.part
        if part.n_bytes and not (part.validator or self.sha256):
            await trio.to_thread.run_sync(part.restart, "")
        headers = {**self.headers, "Accept-Encoding": "identity"}
        if part.n_bytes or self.ask_ranges:
            headers["Range"] = f"bytes={part.n_bytes}-"
            if part.n_bytes and part.validator:
                headers["If-Range"] = part.validator
        async with get(self.url, headers) as response:
            self._note(response)
            if response.status_code == 416 and part.n_bytes:
                if total_in(response) == part.n_bytes:
                    return
                raise _Startover("the server's file is shorter than what is here")
            check_status(self.url, response)
            await self._begin(response)
            await self._receive(response)
        if self.total is not None and part.n_bytes != self.total:
            raise Retry(f"it ended after {part.n_bytes} of {self.total} bytes")

    def _note(self, response: Response) -> None:
        self.version = version_in(response)
        self.promised = sha256_in(response) if self.hub else ""
        self.has_ranges = self.has_ranges or response.status_code in (206, 416)

    async def _begin(self, response: Response) -> None:
        """Decides between appending and starting over; checks size and disk before a byte is written."""
        part = self.part
        start, total = 0, length_in(response)
        if response.status_code == 206:
            start, total = start_in(response), total_in(response)
        if start not in (0, part.n_bytes):
            raise _Startover(f"the server answered with bytes from {start}, asked were {part.n_bytes}")
        if start == 0:
            await trio.to_thread.run_sync(part.restart, validator_in(response))
        if self.size is not None and total is not None and total != self.size:
            raise OriginError(f"{shown(self.url)}: it has {total} bytes, expected {self.size}")
        self.total = self.size if total is None else total
        if self.total is not None:
            if self.total > self.limit_bytes:
                raise OriginError(f"{shown(self.url)}: it has {self.total} bytes, at most {self.limit_bytes} are taken")
            await trio.to_thread.run_sync(check_disk, part.dest, self.total - part.n_bytes)
        self.progress(part.n_bytes, self.total)

    async def _receive(self, response: Response) -> None:
        pending = bytearray()
        limit = self.limit_bytes if self.total is None else self.total
        pace = Pace(self.patience)
        try:
            async with body_of(response, response.aiter_raw()) as chunks:
                async for chunk in chunks:
                    pending += chunk
                    pace.count(len(chunk))
                    if self.part.n_bytes + len(pending) > limit:
                        pending.clear()
                        raise OriginError(f"{shown(self.url)}: more than {limit} bytes came")
                    if len(pending) >= _CHUNK_BYTES:
                        await self._write(pending)
        finally:
            with trio.CancelScope(shield=True):
                await self._write(pending)

    async def _write(self, pending: bytearray) -> None:
        if pending:
            data = bytes(pending)
            pending.clear()
            await trio.to_thread.run_sync(self.part.write, data)
            self.progress(self.part.n_bytes, self.total)


class _Part:
    """The file on its way: `NAME.part`, and `NAME.part.etag` with what If-Range needs. Its methods block."""

    def __init__(self, dest: Path) -> None:
        self.dest = dest
        self.path = dest.with_name(dest.name + ".part")
        self._mark = dest.with_name(dest.name + ".part.etag")
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self.n_bytes = 0
        self.validator = ""

    def open(self) -> None:
        self.dest.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self._file.seek(0)
        while data := self._file.read(_CHUNK_BYTES):
            self._hash.update(data)
            self.n_bytes += len(data)
        try:
            self.validator = self._mark.read_text(encoding="latin-1").strip()[:500]
        except OSError:
            self.validator = ""

    def restart(self, validator: str) -> None:
        assert self._file is not None
        self._file.truncate(0)
        self._hash, self.n_bytes, self.validator = hashlib.sha256(), 0, validator
        if validator:
            self._mark.write_text(validator, encoding="latin-1")
        else:
            self._mark.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        assert self._file is not None
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as exc:
            check_disk(self.dest, len(data), exc)
            raise
        self._hash.update(data)
        self.n_bytes += len(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def finish(self) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.path.replace(self.dest)
        self._mark.unlink(missing_ok=True)
        sync_directory(self.dest.parent)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            if self.n_bytes == 0:
                self.path.unlink(missing_ok=True)
                self._mark.unlink(missing_ok=True)


def check_disk(dest: Path, n_bytes: int, cause: OSError | None = None) -> None:
    """Raises `DiskFull`, with the arithmetic, unless `n_bytes` more fit beside `dest`. Blocks."""
    free = shutil.disk_usage(dest.parent).free
    if n_bytes + DISK_MARGIN_BYTES > free:
        raise DiskFull(
            f"{dest.parent}: {n_bytes / 1e9:.2f} GB more are needed for {dest.name}, {free / 1e9:.2f} GB are free",
            hint="free some space, or choose another folder",
        ) from cause


def sync_directory(folder: Path) -> None:
    """Makes a rename in `folder` last. Blocks."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


# The package index


async def _index_file(
    config: IndexConfig, index: str, package: str, version: str | None, kind: Kind
) -> IndexFile | None:
    url = page_url(index, package)
    status, headers, body = await fetch_bytes(
        url,
        limit_bytes=MAX_PAGE_BYTES,
        headers={"Accept": ACCEPT},
        cert=config.cert,
        trusted_hosts=config.trusted_hosts,
    )
    if status == 404:
        return None
    if status != 200:
        raise OriginError(f"{shown(url)}: HTTP {status}")
    content_type = headers.get("Content-Type", "")
    listed = await trio.to_thread.run_sync(parse_page, url, content_type, body)
    return choose(listed, package, version, kind)


def _default_index() -> str:
    """pip's own default, taken from the pip that is installed."""
    try:
        return str(importlib.import_module("pip._internal.models.index").PyPI.simple_url)
    except (ImportError, AttributeError):
        raise OriginError("this pip does not say what its default index is", hint="set PIP_INDEX_URL") from None
