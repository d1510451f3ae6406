"""Archives that behave, and archives that try to get out or to fill the disk."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import Path

import pytest
import trio
from fake_engine import make_engine, tar_of, tar_with, zip_with
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tightwad_agent.engine.archive import UnpackLimits, unpack
from tightwad_agent.errors import OriginError


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, target, mode
    return info


def unpacked(tmp_path: Path, data: bytes, **limits: int) -> Path:
    (tmp_path / "a").write_bytes(data)
    unpack(tmp_path / "a", tmp_path / "out", limits=UnpackLimits(**limits))
    return tmp_path / "out"


def test_a_release_archive_keeps_links_and_modes(tmp_path: Path) -> None:
    out = unpacked(tmp_path, tar_of(make_engine(tmp_path / "engine"), "llama-b1"))
    top = out / "llama-b1"
    assert sorted(p.name for p in top.iterdir()) == sorted(p.name for p in (tmp_path / "engine").iterdir())
    assert stat.S_IMODE((top / "llama-server").stat().st_mode) & 0o111
    assert not stat.S_IMODE((top / "libggml-base.so.0.1").stat().st_mode) & 0o111
    assert os.readlink(top / "libggml-base.so") == "libggml-base.so.0.1"


def test_a_zip_archive_is_unpacked_too(tmp_path: Path) -> None:
    data = zip_with(
        ("llama-server", b"x", 0o100755), ("sub/lib.so.1", b"y", 0o100644), ("sub/lib.so", b"lib.so.1", 0o120777)
    )
    out = unpacked(tmp_path, data)
    assert os.access(out / "llama-server", os.X_OK)
    assert (out / "sub" / "lib.so").read_bytes() == b"y"


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/etc/evil", "C:/evil", "C:\\evil", "a\\..\\..\\evil", "x" * 2000]
)
@pytest.mark.parametrize("make", ["tar", "zip"])
def test_names_that_point_outside_are_refused(tmp_path: Path, name: str, make: str) -> None:
    data = tar_with((member(name), b"x")) if make == "tar" else zip_with((name, b"x", 0o100644))
    with pytest.raises(OriginError, match="points outside"):
        unpacked(tmp_path, data)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("target", ["../../x", "/etc/passwd", "..", ".", "", "sub/../../../x", "a/..", "C:x", "..\\x"])
def test_links_that_point_outside_are_refused(tmp_path: Path, target: str) -> None:
    with pytest.raises(OriginError, match="points outside"):
        unpacked(tmp_path, tar_with((member("d/link", tarfile.SYMTYPE, target), b"")))


def test_a_link_in_a_zip_that_points_outside_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OriginError, match="points outside"):
        unpacked(tmp_path, zip_with(("link", b"/etc/passwd", 0o120777)))


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    through_folder = tar_with((member("d/link", tarfile.SYMTYPE, "../e"), b""), (member("d/link/evil"), b"x"))
    with pytest.raises(OriginError, match="goes through a link"):
        unpacked(tmp_path, through_folder)


def test_a_file_after_a_link_of_its_name_replaces_the_link(tmp_path: Path) -> None:
    data = tar_with((member("other"), b"o"), (member("f", tarfile.SYMTYPE, "other"), b""), (member("f"), b"new"))
    out = unpacked(tmp_path, data)
    assert (out / "f").read_bytes() == b"new"
    assert (out / "other").read_bytes() == b"o"


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_pipes_and_hard_links_are_refused(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(OriginError, match="neither file, folder nor symbolic link"):
        unpacked(tmp_path, tar_with((member("x", kind, "other"), b"")))


@pytest.mark.parametrize("make", ["tar", "zip"])
def test_a_bomb_is_stopped_at_the_limit(tmp_path: Path, make: str) -> None:
    zeros = bytes(20 << 20)
    data = tar_with((member("bomb"), zeros)) if make == "tar" else zip_with(("bomb", zeros, 0o100644))
    assert len(data) < 100_000
    with pytest.raises(OriginError, match="more than is allowed"):
        unpacked(tmp_path, data, n_bytes=3 << 20)
    assert (tmp_path / "out" / "bomb").stat().st_size <= 3 << 20


def test_too_many_files_are_refused(tmp_path: Path) -> None:
    data = tar_with(*((member(f"f{i}"), b"") for i in range(20)))
    with pytest.raises(OriginError, match="more than 10 files"):
        unpacked(tmp_path, data, n_files=10)


GOOD = tar_with((member("a/b"), b"hello" * 2000), (member("a/c", mode=0o755), os.urandom(3000)))


@pytest.mark.parametrize(
    "data", [b"", b"not an archive", GOOD[: len(GOOD) // 2], b"PK\3\4" + bytes(100), b"\x1f\x8b" + bytes(50)]
)
def test_what_is_no_archive_is_said(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(OriginError, match=r"damaged archive|cannot be unpacked"):
        unpacked(tmp_path, data)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255))
def test_a_changed_byte_never_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int
) -> None:
    data = bytearray(GOOD)
    data[position] = byte
    try:
        unpacked(tmp_path_factory.mktemp("m"), bytes(data), n_bytes=1 << 20)
    except OriginError:
        pass


async def test_unpacking_stops_when_it_is_cancelled(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
        for i in range(200):
            info = member(f"f{i}")
            info.size = 100_000
            tar.addfile(info, io.BytesIO(bytes(100_000)))
    (tmp_path / "a").write_bytes(out.getvalue())
    with trio.CancelScope() as scope:

        def told(_n_bytes: int) -> None:
            trio.from_thread.run_sync(scope.cancel)

        await trio.to_thread.run_sync(lambda: unpack(tmp_path / "a", tmp_path / "out", progress=told))
    assert scope.cancelled_caught
    assert len(list((tmp_path / "out").iterdir())) < 200
