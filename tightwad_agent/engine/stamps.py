"""What is known about a build on this machine: the digest over its files, and whether it passed its test here.

Both cost time, so both are kept as small files in the cache. A stamp that cannot be read is a stamp that is not there.
Everything here blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import tempfile
from pathlib import Path
from typing import Any

from tightwad_agent.engine.hello import RpcVersion
from tightwad_agent.engine.pins import RPC_SERVER, SERVER
from tightwad_agent.engine.smoke import SmokeResult
from tightwad_agent.wire.rows import Device

MAX_STAMP_BYTES = 1 << 20
_MAX_FILES = 1000
_FILES = re.compile(
    rf"(?:{SERVER}|{RPC_SERVER})(?:\.exe)?\Z"
    r"|(?:lib)?(?:ggml|llama|mtmd)[A-Za-z0-9_.-]*\.(?:so|dylib|dll|metal|metallib)(?:\.[0-9.]+)?\Z"
)
_NOT_USED = "quantize"


def engine_files(engine_dir: Path) -> list[Path]:
    """The files that decide how the engine behaves: the two programs, and llama.cpp's libraries beside them."""
    found = [p for p in engine_dir.iterdir() if _FILES.match(p.name) and _NOT_USED not in p.name]
    return sorted(found, key=lambda p: p.name)[:_MAX_FILES]


def digest_of(engine_dir: Path, stamps: Path) -> str:
    """SHA-256 (hex) over names and contents of `engine_files`; taken from a stamp while no file has changed.

    Raises `OSError` if a file cannot be read.
    """
    files = engine_files(engine_dir)
    signature = _signature(files)
    stamp = stamps / f"digest-{_short(str(engine_dir.resolve()))}.json"
    known = read_json(stamp)
    if known.get("signature") == signature and isinstance(known.get("digest"), str):
        return str(known["digest"])
    digest = _digest(files)
    write_json(stamp, {"signature": signature, "digest": digest})
    return digest


def read_smoke(digest: str, stamps: Path) -> SmokeResult | None:
    """The result of an earlier test of these files on this CPU, or None."""
    plain = read_json(_smoke_stamp(digest, stamps))
    try:
        major, minor, patch = (int(n) for n in plain["protocol"])
        devices = tuple(Device(str(d[0]), str(d[1]), int(d[2]), int(d[3])) for d in plain["devices"])
        return SmokeResult(RpcVersion(major, minor, patch), devices, int(plain["build_number"]))
    except (KeyError, TypeError, ValueError, IndexError):
        return None


def write_smoke(digest: str, stamps: Path, result: SmokeResult) -> None:
    """Remembers that these files work on this CPU."""
    devices = [[d.name, d.description, d.memory_total, d.memory_free] for d in result.devices]
    plain = {"protocol": list(result.protocol), "devices": devices, "build_number": result.build_number}
    write_json(_smoke_stamp(digest, stamps), plain)


def cpu_name() -> str:
    """The processor as it calls itself."""
    return _cpu_facts()[0] or platform.processor() or platform.machine()


def cpu_identity() -> str:
    """A hash over what decides which binaries run: machine, processor, its instruction sets."""
    return _short("\0".join((platform.machine(), platform.processor(), *_cpu_facts())))


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object, or {} if there is none that can be read."""
    try:
        if path.stat().st_size > MAX_STAMP_BYTES:
            return {}
        plain = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return plain if isinstance(plain, dict) else {}


def write_json(path: Path, plain: dict[str, Any]) -> None:
    """Writes by rename, so that readers see the old or the new. A cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(plain, file)
        Path(name).replace(path)
    except OSError:
        return


def _smoke_stamp(digest: str, stamps: Path) -> Path:
    return stamps / f"smoke-{_short(digest + cpu_identity())}.json"


def _signature(files: list[Path]) -> str:
    lines = []
    for path in files:
        s = path.lstat()
        lines.append(f"{path.name} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns} {s.st_ino} {s.st_dev}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest(files: list[Path]) -> str:
    total = hashlib.sha256()
    for path in files:
        if path.is_symlink():
            what = f"-> {path.readlink()}"
        else:
            with path.open("rb") as file:
                what = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name}\0{what}\n".encode())
    return total.hexdigest()


def _cpu_facts() -> tuple[str, str]:
    """(model name, instruction sets) of the first processor, where the system tells (Linux)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    first = text.partition("\n\n")[0]
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    return facts.get("model name", ""), facts.get("flags", "") or facts.get("Features", "")


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
