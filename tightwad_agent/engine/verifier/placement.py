"""Where the model goes: the same choices that `engine.argv` writes as llama-server's flags. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from tightwad_agent.wire.verify import Load

HEAD = r"^(output|token_embd)\.weight"
"""Kept in this machine's memory when no local device is last in line; see `engine.argv.HEAD_ON_CPU`."""
ALL_LAYERS = -2
"""`-ngl all`: also where llama.cpp would otherwise choose by free memory."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`devices` by name, in order; none: this machine's processor. `shares` are relative, empty: llama.cpp's own."""

    devices: tuple[str, ...]
    shares: tuple[int, ...]
    gpu_layers: int
    head_on_cpu: bool


def placement(load: Load) -> Placement:
    """What the fields of `Load` mean."""
    devices = (*(f"RPC{i}" for i in range(len(load.rpc_shares))), *load.local_devices)
    return Placement(
        devices=devices,
        shares=tuple(max(1, share) for share in load.rpc_shares + load.local_shares) if load.rpc_ports else (),
        gpu_layers=ALL_LAYERS if load.offload_layers < 0 else load.offload_layers + 1,  # the head counts as one
        head_on_cpu=bool(load.rpc_ports) and not load.local_devices,
    )


def fault(load: Load, max_devices: int) -> str:
    """Why this cannot be placed as asked, or empty text."""
    if bool(load.rpc_ports) != bool(load.rpc_shares):
        return f"{len(load.rpc_ports)} workers with {len(load.rpc_shares)} devices"
    if load.local_shares and len(load.local_shares) != len(load.local_devices):
        return f"{len(load.local_shares)} shares for {len(load.local_devices)} local devices"
    if load.rpc_ports and len(load.local_shares) != len(load.local_devices):
        return f"no share for each of {len(load.local_devices)} local devices"
    if len(load.rpc_shares) + len(load.local_devices) >= max_devices:
        return f"{len(load.rpc_shares) + len(load.local_devices)} devices; libllama takes {max_devices - 1}"
    if any(not 0 < port < 1 << 16 for port in load.rpc_ports):
        return f"ports {load.rpc_ports}"
    if len(set(load.rpc_ports)) != len(load.rpc_ports):
        return f"a port twice: {load.rpc_ports}"
    return ""
