"""Every way to an engine, with stand-ins for llama.cpp: what is wrong is named, what is right is tested and cached."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import trio
from fake_engine import make_engine, sdist, server_script, shell_script, tar_of, tar_with, worker_script
from web_host import Asked, Resource, WebHost, page

from tightwad_agent.engine import installing, provision, stamps, toolchain
from tightwad_agent.engine.installed import Request
from tightwad_agent.engine.pins import PINNED, Archive, Pins, platform_key
from tightwad_agent.engine.provision import ensure, locate
from tightwad_agent.engine.smoke import Limits
from tightwad_agent.errors import EngineBroken, EngineMismatch, EngineMissing

HASTY = Limits(program_s=20, worker_s=20, hello_s=5, generate_s=20)


@pytest.fixture
async def host(nursery: trio.Nursery) -> WebHost:
    return await WebHost().start(nursery)


@pytest.fixture
def empty_path(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


@pytest.fixture
def request_here(tmp_path: Path, empty_path: Path) -> Request:
    """Nothing on PATH, an empty cache, nobody to ask."""
    environ = {"PATH": str(empty_path), "HOME": str(tmp_path)}
    return Request(
        cache_dir=tmp_path / "cache",
        limits=HASTY,
        environ=environ,
        allow_build=False,
        pins=Pins(release_url="https://x.invalid"),
    )


# A folder the user named, and PATH


async def test_a_named_folder_is_used_or_its_fault_is_the_error(request_here: Request, tmp_path: Path) -> None:
    engine = make_engine(tmp_path / "mine", server_script(build=11434))
    found = await ensure(replace(request_here, engine_dir=engine))
    assert (found.folder, found.protocol, found.origin, found.build) == (engine, "7.0.0", "--engine-dir", "b11434")
    assert found.info.usable
    assert len(found.digest) == 64

    with pytest.raises(EngineMissing, match="has no llama-server"):
        await ensure(replace(request_here, engine_dir=tmp_path / "nowhere"))
    (engine / "ggml-rpc-server").chmod(0o644)
    with pytest.raises(EngineMissing, match="has no ggml-rpc-server"):
        await ensure(replace(request_here, engine_dir=engine))
    old = make_engine(tmp_path / "old", worker=worker_script((6, 9, 0)))
    with pytest.raises(EngineMismatch, match=r"speaks RPC protocol 6\.9\.0, this release needs 7\.0\.0"):
        await ensure(replace(request_here, engine_dir=old))
    ill = make_engine(tmp_path / "ill", shell_script("kill -ILL $$"))
    with pytest.raises(EngineBroken, match="another CPU"):
        await locate(replace(request_here, engine_dir=ill))


async def test_an_engine_on_path_is_used_through_links(request_here: Request, tmp_path: Path, empty_path: Path) -> None:
    engine = make_engine(tmp_path / "opt")
    for name in ("llama-server", "ggml-rpc-server"):
        (empty_path / name).symlink_to(engine / name)
    found = await ensure(request_here)
    assert (found.origin, found.folder, found.skipped) == ("PATH", engine, ())
    assert not (request_here.home / "lock").exists()


@pytest.mark.parametrize(
    ("server", "worker", "words"),
    [
        (None, worker_script((8, 0, 0)), "speaks RPC protocol 8.0.0, this release needs 7.0.0"),
        (shell_script("kill -ILL $$"), None, "built for another CPU"),
    ],
)
async def test_an_engine_on_path_that_does_not_fit_is_passed_over_with_a_reason(
    request_here: Request, empty_path: Path, server: str | None, worker: str | None, words: str
) -> None:
    empty_path.rmdir()
    make_engine(empty_path, server, worker)
    found = await locate(request_here)
    assert found.engine is None
    assert [name for name, _ in found.skipped] == ["PATH", "cache"]
    assert words in found.skipped[0][1]


async def test_two_halves_of_different_builds_on_path_are_no_engine(
    request_here: Request, tmp_path: Path, empty_path: Path
) -> None:
    (empty_path / "llama-server").symlink_to(make_engine(tmp_path / "a") / "llama-server")
    assert "no ggml-rpc-server on PATH" in (await locate(request_here)).skipped[0][1]
    (empty_path / "ggml-rpc-server").symlink_to(make_engine(tmp_path / "b") / "ggml-rpc-server")
    assert "of different builds" in (await locate(request_here)).skipped[0][1]


async def test_a_test_that_was_passed_is_not_repeated(request_here: Request, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    script = server_script().replace("import http", f"open({str(ran)!r}, 'a').write('x')\nimport http")
    here = replace(request_here, engine_dir=make_engine(tmp_path / "e", script))
    first = await ensure(here)
    n_runs = len(ran.read_text())
    assert await ensure(here) == first
    assert len(ran.read_text()) == n_runs
    (tmp_path / "e" / "libggml-base.so.0.1").write_bytes(b"another library")
    assert (await ensure(here)).digest != first.digest
    assert len(ran.read_text()) == 2 * n_runs


async def test_another_cpu_means_another_test(
    request_here: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = replace(request_here, engine_dir=make_engine(tmp_path / "e"))
    found = await ensure(here)
    assert stamps.read_smoke(found.digest, here.stamps) is not None
    monkeypatch.setattr(stamps, "cpu_identity", lambda: "another")
    assert stamps.read_smoke(found.digest, here.stamps) is None


@pytest.mark.parametrize(
    "junk", [b"", b"{", b"[]", b'{"protocol": [7]}', b'{"protocol": 7, "devices": {}}', b"[" * 10**5]
)
async def test_damaged_stamps_are_no_stamps(request_here: Request, tmp_path: Path, junk: bytes) -> None:
    here = replace(request_here, engine_dir=make_engine(tmp_path / "e"))
    first = await ensure(here)
    for stamp in here.stamps.iterdir():
        stamp.write_bytes(junk)
    assert await ensure(here) == first


# Release archives


def serve_release(host: WebHost, data: bytes, *, sha256: str | None = None) -> Pins:
    """Pins whose archive for this platform is `data` on `host`."""
    name = f"llama-b11434-bin-{platform_key()}.tar.gz"
    host.routes[f"/b11434/{name}"] = Resource(data)
    digest = hashlib.sha256(data).hexdigest() if sha256 is None else sha256
    return Pins(release_url=host.url, archives={platform_key(): Archive(name, digest)})


async def test_a_release_is_fetched_tested_and_kept(request_here: Request, host: WebHost, tmp_path: Path) -> None:
    pins = serve_release(host, tar_of(make_engine(tmp_path / "e"), "llama-b11434"))
    here = replace(request_here, pins=pins)
    told: list[tuple[str, int, int, str]] = []
    found = await ensure(here, lambda *p: told.append(p))
    assert found.build == "b11434"
    assert found.origin.startswith("release llama-b11434-bin-")
    assert found.folder.parent == here.home
    assert [name for name, _ in found.skipped] == ["PATH", "cache"]
    stages = [stage for stage, *_ in told]
    assert list(dict.fromkeys(stages)) == ["download", "unpack", "test"]

    again = await ensure(here)
    assert (again.folder, again.digest, again.build) == (found.folder, found.digest, "b11434")
    assert again.origin.startswith("cache (release ")
    assert len(host.asked) == 1
    assert (await locate(here)).engine == again
    assert {p.name for p in here.home.iterdir()} == {"downloads", "lock", "stamps", found.folder.name}
    assert list((here.home / "downloads").iterdir()) == []


async def test_a_changed_file_in_the_cache_is_noticed_and_the_engine_fetched_anew(
    request_here: Request, host: WebHost, tmp_path: Path
) -> None:
    here = replace(request_here, pins=serve_release(host, tar_of(make_engine(tmp_path / "e"), "llama-b11434")))
    first = await ensure(here)
    assert (await locate(here)).engine is not None  # from here on the digest comes from a stamp
    library = first.folder / "libggml-base.so.0.1"
    before = library.stat()
    library.write_bytes(b"A library")  # same length,
    os.utime(library, ns=(before.st_atime_ns, before.st_mtime_ns))  # same time
    found = await locate(here)
    assert found.engine is None
    assert "are not those that were installed" in dict(found.skipped)["cache"]
    again = await ensure(here)
    assert again.digest == first.digest
    assert again.folder == first.folder
    assert library.read_bytes() == b"a library"
    assert len(host.asked) == 2


async def test_an_installation_without_its_manifest_is_not_trusted(
    request_here: Request, host: WebHost, tmp_path: Path
) -> None:
    here = replace(request_here, pins=serve_release(host, tar_of(make_engine(tmp_path / "e"), "x")))
    first = await ensure(here)
    (first.folder / "tightwad-engine.json").write_text("{")
    assert "not a whole installation" in dict((await locate(here)).skipped)["cache"]
    assert (await ensure(here)).digest == first.digest


async def refused(request: Request, way: str) -> str:
    """The reason why `ensure` did not take that way."""
    with pytest.raises(EngineMissing) as caught:
        await ensure(request)
    lines = [line.strip() for line in caught.value.message.splitlines()]
    [reason] = [line.removeprefix(f"{way}: ") for line in lines if line.startswith(f"{way}: ")]
    assert [p.name for p in request.home.glob("b*")] == []
    assert [p.name for p in request.home.glob(".work*")] == []
    return reason


async def test_releases_that_cannot_be_used_say_why(request_here: Request, host: WebHost, tmp_path: Path) -> None:
    good = tar_of(make_engine(tmp_path / "e"), "x")
    wrong_hash = serve_release(host, good, sha256="0" * 64)
    assert "expected " + "0" * 64 in await refused(replace(request_here, pins=wrong_hash), "release")
    unknown = serve_release(host, good, sha256="")
    assert "no SHA-256 is known" in await refused(replace(request_here, pins=unknown), "release")
    elsewhere = replace(unknown, archives={})
    assert f"no release archive for {platform_key()}" in await refused(replace(request_here, pins=elsewhere), "release")
    assert "switched off" in await refused(replace(request_here, allow_download=False, pins=unknown), "release")
    empty = serve_release(host, tar_with())
    assert "the archive has no llama-server" in await refused(replace(request_here, pins=empty), "release")
    old = serve_release(host, tar_of(make_engine(tmp_path / "o", worker=worker_script((6, 0, 0))), "x"))
    assert "speaks RPC protocol 6.0.0" in await refused(replace(request_here, pins=old), "release")
    ill = serve_release(host, tar_of(make_engine(tmp_path / "i", shell_script("kill -ILL $$")), "x"))
    assert "built for another CPU" in await refused(replace(request_here, pins=ill), "release")
    host.routes.clear()
    assert "HTTP 404" in await refused(replace(request_here, pins=wrong_hash), "release")


def test_the_official_archives_are_not_used_without_a_pinned_hash() -> None:
    assert PINNED.release_url.startswith("https://")
    assert all(len(a.sha256) in (0, 64) for a in PINNED.archives.values())


async def test_a_mirror_the_user_named_may_publish_the_hash(
    request_here: Request, host: WebHost, tmp_path: Path
) -> None:
    data = tar_of(make_engine(tmp_path / "e"), "x")
    pins = replace(serve_release(host, data, sha256=""), release_url="https://official.invalid")
    mirrored = replace(request_here, pins=pins, release_url=host.url + "/")
    assert "no SHA-256 is known" in await refused(mirrored, "release")
    [path] = host.routes
    host.routes[f"{path}.sha256"] = page(f"{hashlib.sha256(data).hexdigest()}  x.tar.gz\n".encode(), "text/plain")
    assert (await ensure(mirrored)).build == "b11434"


async def test_two_agents_at_once_install_once(request_here: Request, host: WebHost, tmp_path: Path) -> None:
    resource = Resource(tar_of(make_engine(tmp_path / "e"), "x"))
    here = replace(request_here, pins=serve_release(host, resource.data))
    [path] = host.routes
    second_waits = trio.Event()

    async def slowly(asked: Asked, stream: trio.abc.Stream) -> None:
        await second_waits.wait()
        await resource(asked, stream)

    host.routes[path] = slowly
    stages: list[str] = []

    def told(stage: str, _done: int, _total: int, _unit: str) -> None:
        stages.append(stage)
        if stage.startswith("wait"):
            second_waits.set()

    found: list[provision.Installed] = []

    async def one() -> None:
        found.append(await ensure(here, told))

    async with trio.open_nursery() as inner:
        inner.start_soon(one)
        inner.start_soon(one)
    assert found[0].digest == found[1].digest
    assert found[0].folder == found[1].folder
    assert len(host.asked) == 1
    assert f"wait: another agent (pid {os.getpid()}) is installing the engine" in stages


async def test_what_a_dead_agent_left_is_swept(request_here: Request, host: WebHost, tmp_path: Path) -> None:
    here = replace(request_here, pins=serve_release(host, tar_of(make_engine(tmp_path / "e"), "x")))
    stale = here.home / ".work-dead" / "deep"
    stale.mkdir(parents=True)
    (stale / "file").write_bytes(b"x")
    await ensure(here)
    assert not stale.parent.exists()


async def test_a_cancelled_download_leaves_no_half_engine(request_here: Request, host: WebHost, tmp_path: Path) -> None:
    data = tar_of(make_engine(tmp_path / "e"), "x")
    here = replace(request_here, pins=serve_release(host, data))
    [path] = host.routes
    resource = host.routes[path]
    asked_now = trio.Event()

    async def never(_asked: Asked, _stream: trio.abc.Stream) -> None:
        asked_now.set()
        await trio.sleep_forever()

    host.routes[path] = never
    async with trio.open_nursery() as inner:
        inner.start_soon(ensure, here)
        await asked_now.wait()
        inner.cancel_scope.cancel()
    assert (await locate(here)).engine is None
    host.routes[path] = resource
    assert (await ensure(here)).build == "b11434"


async def test_a_cache_that_cannot_be_written_is_said(request_here: Request, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    with pytest.raises(EngineMissing, match="cannot be written"):
        await ensure(request_here)


# Building

CMAKE = """\
cmake_minimum_required(VERSION 3.14)
project(standin C CXX)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_library(ggml-base SHARED base.c)
foreach(program llama-server ggml-rpc-server llama-quantize)
  add_custom_target(${program} DEPENDS ggml-base
    COMMAND ${CMAKE_COMMAND} -E copy ${CMAKE_SOURCE_DIR}/${program} ${CMAKE_BINARY_DIR}/bin/${program}
    COMMAND chmod +x ${CMAKE_BINARY_DIR}/bin/${program})
endforeach()
"""


@pytest.fixture
def index(host: WebHost, monkeypatch: pytest.MonkeyPatch) -> WebHost:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{host.url}/simple")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "UV_INDEX_URL", "UV_DEFAULT_INDEX"):
        monkeypatch.delenv(name, raising=False)
    return host


def publish(host: WebHost, request: Request, **files: str) -> Request:
    """The request whose pins name a stand-in distribution with these sources on `host`, and that may build."""
    sources = {
        "CMakeLists__txt": CMAKE,
        "base__c": "int answer(void) { return 42; }\n",
        "llama-server": server_script(),
        "ggml-rpc-server": worker_script(),
        "llama-quantize": shell_script("exit 0"),
        "LICENSE": "MIT",
    }
    data = sdist(**(sources | files))
    digest = hashlib.sha256(data).hexdigest()
    entry = {"filename": "standin-1.0.0.tar.gz", "url": "/files/standin-1.0.0.tar.gz", "hashes": {"sha256": digest}}
    listing = json.dumps({"meta": {"api-version": "1.0"}, "files": [entry | {"size": len(data)}]})
    host.routes["/simple/standin/"] = page(listing.encode(), "application/vnd.pypi.simple.v1+json")
    host.routes["/files/standin-1.0.0.tar.gz"] = Resource(data)
    pins = Pins(package="standin", version="1.0.0", sha256=digest, archives={})
    return replace(request, pins=pins, allow_build=True, environ={**request.environ, "PATH": os.environ["PATH"]})


async def test_an_engine_is_built_tested_and_kept(index: WebHost, request_here: Request) -> None:
    here = publish(index, request_here)
    told: list[tuple[str, int, int, str]] = []
    found = await ensure(here, lambda *p: told.append(p))
    assert (found.build, found.origin) == ("b11434", "build of standin 1.0.0")
    assert {"libggml-base.so", "llama-quantize", "LICENSE.llama.cpp", "tightwad-engine.json"} <= {
        p.name for p in found.folder.iterdir()
    }
    stages = list(dict.fromkeys(stage for stage, *_ in told))
    assert stages == ["download", "unpack", "compile", "test"]
    steps = [(done, total) for stage, done, total, _unit in told if stage == "compile" and total]
    assert steps
    assert steps[-1][0] == steps[-1][1]
    assert (await ensure(here)).origin == "cache (build of standin 1.0.0)"
    assert sum(a.path.startswith("/files/") for a in index.asked) == 1
    assert list(here.home.glob(".work*")) == []
    manifest = json.loads((found.folder / "tightwad-engine.json").read_text())
    assert manifest["cpu"] == stamps.cpu_identity()


async def test_a_build_for_another_cpu_in_a_shared_cache_is_passed_over(index: WebHost, request_here: Request) -> None:
    here = publish(index, request_here)
    found = await ensure(here)
    manifest = json.loads((found.folder / "tightwad-engine.json").read_text())
    (found.folder / "tightwad-engine.json").write_text(json.dumps(manifest | {"cpu": "another"}))
    assert "was built for another CPU" in dict((await locate(here)).skipped)["cache"]


async def test_without_a_compiler_the_packages_are_named(
    index: WebHost, request_here: Request, empty_path: Path
) -> None:
    here = publish(index, request_here)
    here = replace(here, environ={"PATH": str(empty_path)})
    with pytest.raises(EngineMissing) as caught:
        await ensure(here)
    assert "there is no C compiler and no C++ compiler" in caught.value.message
    assert "install" in caught.value.hint
    assert index.asked == []
    (empty_path / "cc").symlink_to(shutil.which("cc") or "")
    with pytest.raises(EngineMissing, match=r"there is no C\+\+ compiler"):
        await ensure(here)


@pytest.mark.parametrize(
    ("manager", "command"),
    [("apt-get", "apt-get install build-essential"), ("dnf", "dnf install gcc-c++ make"), ("none", "build-essential")],
)
def test_the_hint_speaks_of_the_package_manager_that_is_there(
    monkeypatch: pytest.MonkeyPatch, manager: str, command: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/usr/bin/{name}" if name == manager else None)
    assert command in toolchain.packages_hint()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "xcode-select --install" in toolchain.packages_hint()


async def test_a_build_that_fails_shows_its_last_lines_and_its_log(index: WebHost, request_here: Request) -> None:
    here = publish(index, request_here, base__c="int answer(void) { return forty_two; }\n")
    with pytest.raises(EngineMissing) as caught:
        await ensure(here)
    assert "failed in the step `compile`" in caught.value.message
    assert "forty_two" in caught.value.hint
    log = Path(caught.value.hint.rpartition("the whole log: ")[2])
    assert "forty_two" in log.read_text()
    assert list(here.home.glob("b11434*")) == []
    assert list(here.home.glob(".work*")) == []
    fixed = publish(index, request_here)
    assert (await ensure(fixed)).build == "b11434"


async def test_a_configuration_that_fails_is_shown(index: WebHost, request_here: Request) -> None:
    here = publish(
        index,
        request_here,
        CMakeLists__txt='cmake_minimum_required(VERSION 3.14)\nproject(x C)\nmessage(FATAL_ERROR "no such thing")\n',
    )
    with pytest.raises(EngineMissing, match=r"(?s)failed in the step `cmake`.*no such thing"):
        await ensure(here)


async def test_another_source_than_the_pinned_one_is_refused(index: WebHost, request_here: Request) -> None:
    here = publish(index, request_here)
    here = replace(here, pins=replace(here.pins, sha256="0" * 64))
    with pytest.raises(EngineMissing, match="the package index has another standin"):
        await ensure(here)
    data = b"tampered"
    index.routes["/files/standin-1.0.0.tar.gz"] = Resource(data)
    with pytest.raises(EngineMissing, match=r"it has 8 bytes, expected"):
        await ensure(publish_only_page(index, request_here))


def publish_only_page(host: WebHost, request: Request) -> Request:
    kept = host.routes["/files/standin-1.0.0.tar.gz"]
    here = publish(host, request)
    host.routes["/files/standin-1.0.0.tar.gz"] = kept
    return here


async def test_a_cancelled_build_leaves_no_process_and_no_files(
    index: WebHost, request_here: Request, tmp_path: Path
) -> None:
    slow = CMAKE + "add_custom_command(TARGET ggml-base PRE_BUILD COMMAND sh ${CMAKE_SOURCE_DIR}/slow.sh)\n"
    script = f"echo $$ > {tmp_path}/pid; exec sleep 1000\n"
    here = publish(index, request_here, CMakeLists__txt=slow, slow__sh=script)
    async with trio.open_nursery() as inner:
        inner.start_soon(ensure, here)
        with trio.fail_after(60):
            while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()):
                await trio.sleep(0.02)
        inner.cancel_scope.cancel()
    pid = int((tmp_path / "pid").read_text())
    with trio.fail_after(10):
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            await trio.sleep(0.02)
    assert list(here.home.glob("b11434*")) == []
    assert list(here.home.glob(".work*")) == []
    assert (await ensure(publish(index, request_here))).build == "b11434"


# Tools


def tool(folder: Path, name: str, says: str) -> str:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(shell_script(f"echo '{says}'"))
    (folder / name).chmod(0o755)
    return str(folder / name)


@pytest.mark.parametrize(
    ("says", "breaks"),
    [
        ("g++ (Debian 12.2.0-14+deb12u1) 12.2.0\nFree Software Foundation", True),
        ("g++ (GCC) 14.2.1 20250110 (Red Hat 14.2.1-7)\nFree Software Foundation", False),
        ("g++ (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0\nFree Software Foundation", True),
        ("g++ (SUSE Linux) 15.1.1\nFree Software Foundation", False),
        ("Ubuntu clang version 14.0.0", False),
        ("Apple clang version 15.0.0", False),
        ("g++ unknown\nFree Software Foundation", True),
    ],
)
async def test_compilers_that_break_amx_build_without_it(tmp_path: Path, says: str, breaks: bool) -> None:
    environ = {"PATH": str(tmp_path), "CXX": "my-c++"}
    tool(tmp_path, "cc", "")
    cxx = tool(tmp_path, "my-c++", says)
    found = await toolchain.find_compilers(environ)
    assert found.cxx == cxx
    assert ("-DCMAKE_CXX_FLAGS=-U__AMX_INT8__" in found.flags) is breaks


async def test_a_cuda_compiler_without_a_card_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cc", "c++", "nvcc"):
        tool(tmp_path, name, "")
    monkeypatch.setattr(toolchain, "has_nvidia_card", lambda _path: False)
    assert (await toolchain.find_compilers({"PATH": str(tmp_path)})).nvcc == ""
    monkeypatch.setattr(toolchain, "has_nvidia_card", lambda _path: True)
    assert (await toolchain.find_compilers({"PATH": str(tmp_path)})).nvcc == str(tmp_path / "nvcc")


async def test_tools_come_from_path_if_they_are_recent(tmp_path: Path, index: WebHost) -> None:
    cmake, ninja = tool(tmp_path / "p", "cmake", "cmake version 3.28.1"), tool(tmp_path / "p", "ninja", "1.12")
    found = await toolchain.find_tools({"PATH": str(tmp_path / "p")}, tmp_path / "tools")
    assert (found.cmake, found.ninja) == (cmake, ninja)
    assert index.asked == []


async def test_an_old_cmake_is_replaced_or_said(tmp_path: Path, index: WebHost) -> None:
    tool(tmp_path / "p", "cmake", "cmake version 3.13.9")
    tool(tmp_path / "p", "ninja", "1.12")
    environ = {**os.environ, "PATH": str(tmp_path / "p")}
    with pytest.raises(EngineMissing, match="cmake missing, and pip could not install it"):
        await toolchain.find_tools(environ, tmp_path / "tools")
    assert any(a.path == "/simple/cmake/" for a in index.asked)
    cmake = tool(tmp_path / "tools" / "cmake" / "data" / "bin", "cmake", "cmake version 4.0.0")
    assert (await toolchain.find_tools(environ, tmp_path / "tools")).cmake == cmake


async def test_the_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        async with installing.exclusive(tmp_path / "home", lambda _who: None):
            fail()
    waited: list[str] = []
    async with installing.exclusive(tmp_path / "home", waited.append):
        pass
    assert waited == []
