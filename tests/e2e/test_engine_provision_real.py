"""The smoke test and the release way with the real llama.cpp."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import trio
from fake_engine import tar_of
from web_host import Resource, WebHost

from tightwad_agent.engine.devices import list_devices
from tightwad_agent.engine.installed import Request
from tightwad_agent.engine.pins import PINNED, Archive, Pins, platform_key
from tightwad_agent.engine.process import Engine
from tightwad_agent.engine.provision import ensure, locate
from tightwad_agent.engine.smoke import smoke
from tightwad_agent.engine.stamps import digest_of, engine_files
from tightwad_agent.engine.tinymodel import tiny_model
from tightwad_agent.errors import EngineBroken

pytestmark = pytest.mark.engine


def children() -> list[str]:
    return [p.name() for p in psutil.Process().children(recursive=True) if "server" in p.name()]


async def test_the_real_engine_passes_its_test(engine_dir: Path) -> None:
    result = await smoke(engine_dir)
    assert result.protocol == PINNED.protocol
    listed = await list_devices(Engine(engine_dir, "", ""))
    assert [d.name for d in result.devices] == [d.name for d in listed]
    assert children() == []


async def test_the_real_engine_runs_the_demo_model(engine_dir: Path, demo_model: Path) -> None:
    assert (await smoke(engine_dir, demo_model)).protocol == PINNED.protocol


async def test_a_model_that_is_none_fails_the_test_and_is_named(engine_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(tiny_model()[:-100_000])
    with pytest.raises(EngineBroken, match=r"llama-server exited with code 1") as caught:
        await smoke(engine_dir, tmp_path / "bad.gguf")
    assert "bad.gguf" in caught.value.hint
    assert children() == []


def test_the_made_up_model_is_what_a_reader_of_gguf_expects(tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFReader, dequantize

    (tmp_path / "tiny.gguf").write_bytes(tiny_model())
    reader = GGUFReader(tmp_path / "tiny.gguf")
    kinds = {t.tensor_type.name for t in reader.tensors}
    assert kinds == {"F32", "F16", "Q8_0", "Q4_0", "Q6_K"}
    for tensor in reader.tensors:
        weights = dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(weights).all()
        assert weights.std() < 1
    assert tiny_model() == tiny_model()


def test_the_digest_covers_programs_and_libraries(engine_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(engine_dir, copy, symlinks=True)
    names = {p.name for p in engine_files(copy)}
    assert {"llama-server", "ggml-rpc-server", "libggml-base.so", "libllama.so"} <= names
    before = digest_of(copy, tmp_path / "stamps")
    assert before == digest_of(engine_dir, tmp_path / "stamps")
    (copy / "llama-quantize").unlink()
    assert digest_of(copy, tmp_path / "stamps") == before
    for name in sorted(names)[:3]:
        path = copy / name
        if path.is_symlink():
            path.unlink()
        else:
            path.write_bytes(path.read_bytes() + b"x")
        after = digest_of(copy, tmp_path / "stamps")
        assert after != before
        before = after


async def test_a_release_of_the_real_engine_is_fetched_tested_kept_and_mended(
    engine_dir: Path, tmp_path: Path, nursery: trio.Nursery
) -> None:
    host = await WebHost().start(nursery)
    data = await trio.to_thread.run_sync(tar_of, engine_dir, f"llama-{PINNED.build}")
    name = PINNED.archives[platform_key()].name
    host.routes[f"/{PINNED.build}/{name}"] = Resource(data, cuts=[len(data) // 2])
    pins = Pins(release_url=host.url, archives={platform_key(): Archive(name, hashlib.sha256(data).hexdigest())})
    environ = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    here = Request(cache_dir=tmp_path / "cache", pins=pins, environ=environ, allow_build=False)

    first = await ensure(here)
    assert (first.build, first.protocol, first.origin) == (PINNED.build, "7.0.0", f"release {name}")
    assert first.digest == digest_of(engine_dir, tmp_path / "stamps")
    n_asked = len(host.asked)
    assert n_asked == 2  # the first answer broke off in the middle
    assert replace(await ensure(here), origin="", skipped=()) == replace(first, origin="", skipped=())
    assert len(host.asked) == n_asked

    library = (first.folder / "libggml-base.so").resolve()
    damaged = bytearray(library.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    library.write_bytes(damaged)
    assert (await locate(here)).engine is None
    assert (await ensure(here)).digest == first.digest
    assert len(host.asked) == n_asked + 1
    assert children() == []
