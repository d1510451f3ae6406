"""The single file: it is built from the locked wheels, and runs with a Python and nothing else."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tightwad_agent import __version__

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_PATH = os.pathsep.join([str(Path(sys.base_prefix) / "bin"), "/usr/bin", "/bin"])

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`dist/tightwad-agent` for the Python that runs the tests, made in a folder of its own."""
    output = tmp_path_factory.mktemp("dist") / "tightwad-agent"
    version = ".".join(map(str, sys.version_info[:2]))
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "single_file.py", "--output", output, "--python", version],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert version in done.stdout
    return output


def run(file: Path, home: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs the file on a host that has a Python and nothing else."""
    env = {"PATH": SYSTEM_PATH, "HOME": str(home), **environ}
    return subprocess.run([file, *args], env=env, cwd="/", capture_output=True, text=True, timeout=120, check=False)


def test_it_is_one_program(single_file: Path) -> None:
    assert single_file.stat().st_mode & stat.S_IXUSR
    assert 1 << 20 < single_file.stat().st_size < 100 << 20
    assert [p.name for p in single_file.parent.iterdir()] == [single_file.name]


def test_it_runs_with_nothing_but_a_python(single_file: Path, tmp_path: Path) -> None:
    done = run(single_file, tmp_path, "--version")
    assert __version__ in done.stdout, done.stderr
    shown = run(single_file, tmp_path, "--help").stdout
    assert "Usage: tightwad-agent" in shown
    assert {p.name for p in tmp_path.iterdir()} == {".cache"}


def test_it_carries_all_it_needs(single_file: Path, tmp_path: Path) -> None:
    """Every import of the package works, and pip, which fetches and builds, can be run from it."""
    modules = sorted(
        str(p.relative_to(ROOT).with_suffix("")).replace(os.sep, ".").removesuffix(".__init__")
        for p in (ROOT / "tightwad_agent").rglob("*.py")
        if p.name != "__main__.py"
    )
    program = f"import {', '.join(modules)}; from tightwad_agent.fetch import pip_command; print(*pip_command())"
    done = run(single_file, tmp_path, "-c", program, PEX_INTERPRETER="1")
    assert done.returncode == 0, done.stderr[-2000:]
    pip = subprocess.run([*done.stdout.split(), "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert str(tmp_path) in pip.stdout


def test_an_unwritable_home_is_no_obstacle(single_file: Path, tmp_path: Path) -> None:
    done = run(single_file, Path("/nonexistent"), "--version", TMPDIR=str(tmp_path))
    assert __version__ in done.stdout, done.stderr


def test_the_lock_names_no_host_and_hashes_everything() -> None:
    lines = (ROOT / "requirements-dev.lock").read_text().splitlines()
    assert not any("://" in line for line in lines)
    pinned = [i for i, line in enumerate(lines) if re.match(r"[A-Za-z0-9._-]+==\S+ \\$", line)]
    others = [line for line in lines if line and not line.startswith(("#", "    --hash=sha256:"))]
    assert len(others) == len(pinned) > 50
    assert all(lines[i + 1].startswith("    --hash=sha256:") for i in pinned)


@pytest.mark.engine
def test_a_node_runs_from_it(single_file: Path, tmp_path: Path, engine_dir: Path) -> None:
    """Founds a cluster, finds the engine, answers commands given with the same file, and ends when told to."""
    state = ("--state-dir", str(tmp_path / "state"))
    flags = (
        "--mesh-port",
        "0",
        "--endpoint-port",
        "0",
        "--endpoint-host",
        "127.0.0.1",
        "--no-mdns",
        "--interface",
        "lo",
    )
    log = tmp_path / "log"
    with log.open("w") as out:
        node = subprocess.Popen(
            [single_file, "up", *state, *flags, "--engine-dir", engine_dir],
            env={"PATH": SYSTEM_PATH, "HOME": str(tmp_path)},
            cwd="/",
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        status = None
        for _ in range(60):
            assert node.poll() is None, log.read_text()
            done = run(single_file, tmp_path, "status", *state, "--json")
            status = json.loads(done.stdout) if done.returncode == 0 else None
            if status and status["engine"]["build"] and status["coordinator"]:
                break
            time.sleep(0.5)
        assert status is not None, log.read_text()
        assert status["coordinator"]["id"] == status["node"]["id"]
        assert status["engine"]["protocol"] == "7.0.0", log.read_text()
    finally:
        node.terminate()
    assert node.wait(20) == 0
