"""What a machine can do, read from what the engine prints; pure.

`llama-server --list-devices` prints

    Available devices:
      CUDA0: NVIDIA GeForce RTX 4090 (24077 MiB, 23643 MiB free)

and `(none)` where there is only a CPU: CPUs are never listed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tightwad_agent.errors import UsageError
from tightwad_agent.wire.rows import MAX_DEVICES, Capabilities, Device

CPU = "CPU"
_MIB = 1 << 20
_GIB = 1 << 30
_LINE = re.compile(r"  (\S{1,64}): (.*) \((\d{1,12}) MiB, (\d{1,12}) MiB free\)\Z")
_HEADING = "Available devices:"
_KLASS_STEP = 64


def parse_devices(text: str) -> tuple[Device, ...]:
    """The devices in the output of `--list-devices`; () for a machine with only a CPU. Other lines are ignored."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.strip() == _HEADING:
            break
    found: dict[str, Device] = {}
    for line in lines:
        match = _LINE.match(line)
        if match is None:
            continue
        name, description, total, free = match[1], match[2].strip()[:200], int(match[3]) * _MIB, int(match[4]) * _MIB
        found.setdefault(name, Device(name, description, total, min(free, total)))
    return tuple(found.values())[:MAX_DEVICES]


def offered(
    devices: Sequence[Device], allowed: Sequence[str], *, cpu: str, memory_total: int, memory_free: int
) -> tuple[Device, ...]:
    """The devices a worker here would open: those with memory of their own, or else the CPU with the machine's.

    `allowed`: names the user chose, in any case; all by default. Naming `CPU` offers the CPU, beside others or alone.
    Devices without memory (BLAS and its like) help the CPU and are never offered. Raises `UsageError` for a name that
    is not here.
    """
    usable = {d.name.lower(): d for d in devices if d.memory_total > 0}
    processor = Device(CPU, cpu[:200], memory_total, min(memory_free, memory_total))
    if not allowed:
        return tuple(usable.values()) or (processor,)
    usable[CPU.lower()] = processor
    for name in allowed:
        if name.lower() not in usable:
            here = ", ".join(d.name for d in usable.values())
            raise UsageError(f"there is no device {name} on this machine", hint=f"there are: {here}")
    return tuple(usable[name] for name in dict.fromkeys(a.lower() for a in allowed))


def klass(capabilities: Capabilities) -> int:
    """Coarse rank of a machine, higher is stronger: first GPU memory, then RAM, each in powers of two of GiB.

    Coarse, so that the coordinator does not depend on which of two like machines has a few MiB more.
    """
    gpu = sum(d.memory_total for d in capabilities.devices if d.name != CPU)
    return _log2_gib(gpu) * _KLASS_STEP + _log2_gib(capabilities.memory_total)


def _log2_gib(n_bytes: int) -> int:
    """0 below 1 GiB, then 1, 2, 3… for each doubling. Machines report a little less than what was bought: hence 9/8."""
    return min(_KLASS_STEP - 1, (max(0, n_bytes) * 9 // 8 // _GIB).bit_length())
