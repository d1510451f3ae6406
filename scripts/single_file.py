"""Makes the single file: wheels of the locked dependencies for several Pythons, and the agent, in one pex.

The wheels are checked against the hashes in requirements-dev.lock. Those of the Python that runs this must be there; a
Python for which a dependency has no wheel is left out with a word. At its first start on a host the file unpacks itself
below $PEX_ROOT (the user's cache by default).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags, mac_platforms
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements-dev.lock"
VERSIONS = ((3, 11), (3, 12), (3, 13), (3, 14))
GLIBC_MINORS = range(28, 4, -1)
"""Oldest to newest glibc that wheels may ask for: 2.28 is RHEL 8, Debian 10 and Ubuntu 20.04."""
OLD_NAMES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}

Version = tuple[int, int]


def platforms() -> list[str]:
    """Platform tags of wheels that run on machines like this one, best first."""
    if sys.platform == "darwin":
        return list(mac_platforms())
    if sys.platform != "linux":
        return [sysconfig.get_platform().replace("-", "_").replace(".", "_")]
    machine = platform.machine()
    tags = []
    for minor in GLIBC_MINORS:
        tags.append(f"manylinux_2_{minor}_{machine}")
        if minor in OLD_NAMES:
            tags.append(f"{OLD_NAMES[minor]}_{machine}")
    return [*tags, f"linux_{machine}"]


def environment(version: Version) -> dict[str, str]:
    """What markers see on a machine like this one with another Python."""
    dotted = ".".join(map(str, version))
    return default_environment() | {  # type: ignore[operator, no-any-return]
        "python_version": dotted,
        "python_full_version": f"{dotted}.0",
        "implementation_version": f"{dotted}.0",
    }


def runtime_packages(version: Version) -> set[str]:
    """Names of all packages that the agent needs to run."""
    needed: set[str] = set()
    waiting = [Requirement("tightwad-agent")]
    while waiting:
        requirement = waiting.pop()
        for text in importlib.metadata.requires(requirement.name) or []:
            child = Requirement(text)
            wanted = [environment(version) | {"extra": extra} for extra in ("", *requirement.extras)]
            name = canonicalize_name(child.name)
            if (child.marker is None or any(child.marker.evaluate(e) for e in wanted)) and name not in needed:
                needed.add(name)
                waiting.append(child)
    return needed


def locked(names: set[str]) -> str:
    """The lines of the lock, hashes and all, for these packages."""
    blocks = re.split(r"^(?=[A-Za-z0-9])", LOCK.read_text(), flags=re.MULTILINE)
    chosen = [block for block in blocks if canonicalize_name(block.partition("==")[0].strip()) in names]
    missing = names - {canonicalize_name(block.partition("==")[0].strip()) for block in chosen}
    if missing:
        sys.exit(f"requirements-dev.lock lacks {', '.join(sorted(missing))}: make it anew")
    return "".join(chosen)


def fetch_wheels(version: Version, work: Path, wheels: Path) -> bool:
    """Downloads the wheels for one Python; False if there is none of some package."""
    requirements = work / f"requirements-{version[1]}.txt"
    requirements.write_text(locked(runtime_packages(version)))
    short = "".join(map(str, version))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--only-binary=:all:", "--dest", str(wheels), "--requirement", str(requirements)]
    command += ["--implementation", "cp", "--python-version", ".".join(map(str, version))]
    command += [f"--abi={abi}" for abi in (f"cp{short}", "abi3", "none")] + [f"--platform={p}" for p in platforms()]
    return subprocess.run(command, check=False).returncode == 0


def complete_platform(version: Version, work: Path) -> Path:
    """Describes a Python that may not be installed here, in pex's terms."""
    short = "".join(map(str, version))
    tags: list[Tag] = list(cpython_tags(version, [f"cp{short}"], platforms()))
    tags += compatible_tags(version, f"cp{short}", platforms())
    path = work / f"platform-{short}.json"
    path.write_text(json.dumps({"marker_environment": environment(version), "compatible_tags": [str(t) for t in tags]}))
    return path


def build_pex(output: Path, versions: list[Version], work: Path, wheels: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT)], check=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    newest = max(versions)
    command = [sys.executable, "-m", "pex", "tightwad-agent", "--pre-resolved-dists", str(wheels)]
    for version in versions:
        command += ["--complete-platform", str(complete_platform(version, work))]
    command += ["--interpreter-constraint", f"CPython>=3.11,<3.{newest[1] + 1}"]
    command += ["--console-script", "tightwad-agent", "--sh-boot", "--venv", "prepend", "--no-compile"]
    command += ["--python-shebang", "/usr/bin/env python3", "--output-file", str(output)]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("PEX_")}
    subprocess.run(command, check=True, env=environ | {"PEX_ROOT": str(work / "pex-root")})


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist" / "tightwad-agent")
    parser.add_argument("--python", action="append", metavar="X.Y", help="a Python version to include")
    options = parser.parse_args()
    here: Version = sys.version_info[:2]
    asked = {tuple(map(int, text.split("."))) for text in options.python or []} or set(VERSIONS)
    with tempfile.TemporaryDirectory(prefix="tightwad-single-file-") as scratch:
        work = Path(scratch)
        (work / "wheels").mkdir()
        included: list[Version] = []
        for version in sorted(asked | {here}):
            if fetch_wheels(version, work, work / "wheels"):
                included.append(version)
            elif version == here:
                sys.exit("some dependency has no wheel for this Python")
            else:
                print(f"left out: Python {version[0]}.{version[1]}, some dependency has no wheel", file=sys.stderr)
        build_pex(options.output, included, work, work / "wheels")
    size = options.output.stat().st_size
    versions = ", ".join(f"{a}.{b}" for a, b in included)
    print(f"{options.output}: {size / 1e6:.1f} MB, for Python {versions} on {platforms()[0]}")


if __name__ == "__main__":
    run()
