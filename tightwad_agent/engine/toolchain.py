"""Compilers and build tools: what is on PATH, what pip can bring, and what to install where neither helps."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from tightwad_agent.errors import EngineMissing
from tightwad_agent.fetch import pip_command

MIN_CMAKE = (3, 14)
_PIP_S = 600.0
_VERSION_S = 60.0
_VERSION = re.compile(r"(\d+)\.(\d+)")
_FIXED_AMX_GCC = 14

NO_AMX = ("-DCMAKE_C_FLAGS=-U__AMX_INT8__", "-DCMAKE_CXX_FLAGS=-U__AMX_INT8__")
"""GCC before 14 (12.4 and 13.3 of the older lines) drops stores that `_tile_loadconfig` reads: llama.cpp built by it on
a CPU with AMX dies of SIGILL at its first quantised matrix [measured with 12.2]. Without this macro it leaves AMX out.
"""


@dataclass(frozen=True, slots=True)
class Compilers:
    """Paths of the C and C++ compilers (empty on Windows: CMake finds Visual Studio), and of nvcc if it is of use."""

    c: str
    cxx: str
    breaks_amx: bool = False
    nvcc: str = ""

    @property
    def flags(self) -> tuple[str, ...]:
        """What CMake must be told about them."""
        named = (f"-DCMAKE_C_COMPILER={self.c}", f"-DCMAKE_CXX_COMPILER={self.cxx}") if self.c else ()
        cuda = (f"-DCMAKE_CUDA_COMPILER={self.nvcc}",) if self.nvcc else ()
        return (*named, *cuda, *(NO_AMX if self.breaks_amx else ()))


@dataclass(frozen=True, slots=True)
class Tools:
    """Paths of CMake and Ninja; without Ninja, make does it."""

    cmake: str
    ninja: str

    @property
    def flags(self) -> tuple[str, ...]:
        return ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={self.ninja}") if self.ninja else ()

    def compile_argv(self, tree: Path, targets: tuple[str, ...], n_jobs: int) -> list[str]:
        """Ninja itself where there is one: it gets the signal when the agent dies, not a parent in between."""
        if self.ninja:
            return [self.ninja, "-C", str(tree), "-j", str(n_jobs), *targets]
        return [self.cmake, "--build", str(tree), "--config", "Release", "-j", str(n_jobs), "--target", *targets]


async def find_compilers(environ: Mapping[str, str]) -> Compilers:
    """The compilers that `CC` and `CXX` name, or the usual ones. Raises `EngineMissing` that says what to install."""
    if sys.platform == "win32":
        return Compilers("", "")
    path = environ.get("PATH", "")
    c = _first(path, environ.get("CC", ""), "cc", "gcc", "clang")
    cxx = _first(path, environ.get("CXX", ""), "c++", "g++", "clang++")
    if not c or not cxx:
        missing = " and ".join(what for what, found in (("no C compiler", c), ("no C++ compiler", cxx)) if not found)
        raise EngineMissing(f"llama.cpp cannot be built: there is {missing}", hint=packages_hint())
    about = await _say([cxx, "--version"])
    gcc = "Free Software Foundation" in about
    major = _VERSION.search(about.partition("\n")[0].rpartition(" ")[2] or "")
    breaks_amx = gcc and (major is None or int(major[1]) < _FIXED_AMX_GCC)
    nvcc = _first(path, "nvcc") if has_nvidia_card(path) else ""
    return Compilers(c, cxx, breaks_amx, nvcc)


async def find_tools(environ: Mapping[str, str], folder: Path) -> Tools:
    """CMake and Ninja from PATH, from `folder`, or from the package index into `folder`. Raises `EngineMissing`."""
    path = os.pathsep.join(
        [str(folder / "cmake" / "data" / "bin"), str(folder / "bin"), str(folder / "ninja" / "data")]
    )
    cmake = await _recent_cmake(environ.get("PATH", "")) or await _recent_cmake(path)
    ninja = _first(environ.get("PATH", ""), "ninja", "ninja-build") or _first(path, "ninja")
    make = _first(environ.get("PATH", ""), "make", "gmake")
    wanted = [name for name, found in (("cmake", cmake), ("ninja", ninja)) if not found]
    if wanted:
        problem = await _pip_install(wanted, folder, environ)
        cmake, ninja = cmake or await _recent_cmake(path), ninja or _first(path, "ninja")
        if not cmake or not (ninja or make or sys.platform == "win32"):
            named = " and ".join(wanted)
            raise EngineMissing(
                f"llama.cpp cannot be built: {named} missing, and pip could not install it: {problem}",
                hint=packages_hint(),
            )
    return Tools(cmake, ninja)


def has_nvidia_card(path: str) -> bool:
    """Whether a CUDA build has something to run on; with a toolkit alone it would take an hour and help nobody."""
    driver = (
        Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
    )
    return driver or shutil.which("nvidia-smi", path=path) is not None


def packages_hint() -> str:
    """What to install, in the words of this system's package manager."""
    if sys.platform == "darwin":
        return "install the compilers with: xcode-select --install"
    if sys.platform == "win32":
        return "install the Visual Studio Build Tools with the C++ workload"
    known = {
        "apt-get": "apt-get install build-essential",
        "dnf": "dnf install gcc-c++ make",
        "zypper": "zypper install gcc-c++ make",
        "pacman": "pacman -S base-devel",
        "apk": "apk add build-base linux-headers",
    }
    for program, command in known.items():
        if shutil.which(program, path="/usr/bin:/bin:/usr/sbin:/sbin"):
            return f"install the compilers with: {command}"
    return "install GCC or Clang with C++, e.g.: apt-get install build-essential, or: dnf install gcc-c++ make"


async def _recent_cmake(path: str) -> str:
    cmake = _first(path, "cmake")
    if not cmake:
        return ""
    version = _VERSION.search(await _say([cmake, "--version"]))
    return cmake if version and (int(version[1]), int(version[2])) >= MIN_CMAKE else ""


async def _pip_install(packages: list[str], folder: Path, environ: Mapping[str, str]) -> str:
    """Installs wheels into `folder`, which is no environment of anybody's; what went wrong, or empty text."""
    argv = [
        *pip_command(),
        "install",
        "--quiet",
        "--only-binary=:all:",
        "--no-deps",
        "--upgrade",
        "--target",
        str(folder),
    ]
    try:
        with trio.fail_after(_PIP_S):
            done = await trio.run_process(
                [*argv, *packages],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env={**environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_USER": "0"},
            )
    except trio.TooSlowError:
        return f"it took longer than {_PIP_S:g} s"
    lines = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if line.startswith("ERROR")]
    return "" if done.returncode == 0 else (lines or ["pip failed"])[-1][:300]


async def _say(argv: list[str]) -> str:
    """What a program prints about itself; empty if it does not run."""
    try:
        with trio.fail_after(_VERSION_S):
            done = await trio.run_process(argv, capture_stdout=True, stderr=subprocess.DEVNULL, check=False)
    except (OSError, trio.TooSlowError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def _first(path: str, *names: str) -> str:
    """The first of these programs that is on `path` (and only there)."""
    found = (shutil.which(name, path=path) for name in names if name)
    return next((program for program in found if program), "")
