"""The command lines of llama.cpp b11434, the only place that knows its flags, and the same for the verifier. Pure.

llama-server listens on loopback and takes no key there: whoever can open a loopback connection on this machine can
already read what this user's programs serve. `--cors-origins localhost` keeps web pages of other origins out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tightwad_agent.wire.verify import Load

LOOPBACK = "127.0.0.1"
N_SLOTS = 4
DRAFT_N_MAX = 8
HEAD_ON_CPU = r"^(output|token_embd)\.weight=CPU"
"""Keeps the logits off the network: 2.3 KB instead of 197 KB a token come back from the last worker (49k tokens)."""
BATCH = 512
"""Tokens of a prompt per decode call, and so per sign of progress; also what one device takes at once by default."""
PROMPT_CACHE_MIB = 1024
DRAFT_BATCH = 128
"""Prompt tokens per decode call of a drafter: a long prompt of one session holds up the others' tokens no longer."""
MAX_RPC_SERVERS = 16
"""GGML_RPC_MAX_SERVERS."""
MAX_DEVICES = 15
"""llama_max_devices is 16, and `-ts` takes one less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What llama-server or the verifier is asked to do. The verifier takes neither `port` nor `draft` nor `alias`.

    `rpc_ports`: loopback ports of the forwarders, in the order of the plan; empty means no pool. `rpc_shares`: relative
    size of the part of each device behind them, `local_shares` of each of `local_devices`. `offload_layers`: blocks on
    devices, `None` for all; the first blocks of the model stay in this machine's memory. `threads` 0: the default.
    """

    model: str
    port: int
    context: int
    draft: str | None = None
    alias: str = ""
    threads: int = 0
    slots: int = N_SLOTS
    rpc_ports: tuple[int, ...] = ()
    rpc_shares: tuple[int, ...] = ()
    local_devices: tuple[str, ...] = ()
    local_shares: tuple[int, ...] = ()
    offload_layers: int | None = None


def worker_argv(exe: str, *, port: int, devices: Sequence[str], threads: int = 0) -> list[str]:
    """`ggml-rpc-server` on loopback with exactly these devices: without `-d` it would expose every accelerator."""
    if not devices:
        raise ValueError("a worker needs at least one device")
    argv = [exe, "-H", LOOPBACK, "-p", str(port), "-d", ",".join(devices)]
    return argv + (["-t", str(threads)] if threads > 0 else [])


def server_argv(exe: str, options: ServerOptions) -> list[str]:
    """`llama-server` on loopback. The context is one pool for all slots (`--kv-unified`): a single request may use it
    whole, which separate slots would divide by their number."""
    argv = [exe, "--host", LOOPBACK, "--port", str(options.port)]
    argv += ["-m", options.model, "-c", str(options.context), "-b", str(BATCH)]
    argv += ["-np", str(options.slots), "--kv-unified"]
    if options.alias and "," not in options.alias:  # a comma separates several aliases
        argv += ["--alias", options.alias]
    if options.threads > 0:
        argv += ["-t", str(options.threads)]
    if options.rpc_ports:
        argv += _pool(options)
    else:
        argv += ["-dev", ",".join(options.local_devices) or "none", "--cache-ram", str(PROMPT_CACHE_MIB)]
    if options.draft is not None:
        argv += _draft(options)
    return [*argv, "--jinja", "--metrics", "--slots", "--no-ui", "--offline", "--cors-origins", "localhost"]


def _pool(options: ServerOptions) -> list[str]:
    """Our plan instead of `--fit`, and all devices by name: llama.cpp would add others and shift the shares. No prompt
    cache: each request would fetch the idle slots' KV from the workers."""
    devices = [f"RPC{i}" for i in range(len(options.rpc_shares))] + list(options.local_devices)
    shares = _shares(options.rpc_shares + options.local_shares)
    n_layers = "all" if options.offload_layers is None else str(options.offload_layers + 1)  # the head counts as one
    argv = ["--rpc", ",".join(f"{LOOPBACK}:{port}" for port in options.rpc_ports)]
    argv += ["-dev", ",".join(devices), "-ts", ",".join(map(str, shares)), "-ngl", n_layers, "--fit", "off"]
    if not options.local_devices:  # a local device is last in line, and holds the head by itself
        argv += ["-ot", HEAD_ON_CPU]
    return [*argv, "--cache-ram", "0"]


def _draft(options: ServerOptions) -> list[str]:
    argv = ["-md", options.draft or "", "--spec-type", "draft-simple", "--spec-draft-n-max", str(DRAFT_N_MAX)]
    if options.rpc_ports:  # by default the draft would follow the target onto the workers: 1.57 MB back a round
        argv += ["-devd", ",".join(options.local_devices) or "none"]
    return argv


def draft_argv(
    exe: str, *, model: str, port: int, context: int, slots: int, devices: Sequence[str] = (), threads: int = 0
) -> list[str]:
    """`llama-server` as a drafter on loopback: made for many short requests of known prefixes. No devices: the CPU.

    `--swa-full`: drafts are rolled back all the time, and a sliding window would be computed anew each time. `-lv 1`:
    otherwise it writes eight lines for each token."""
    argv = [exe, "--host", LOOPBACK, "--port", str(port), "-m", model, "-c", str(context)]
    argv += ["-b", str(DRAFT_BATCH), "-ub", str(DRAFT_BATCH), "-np", str(slots), "--kv-unified", "--swa-full"]
    argv += ["-dev", ",".join(devices) or "none", "--cache-ram", "0", "--no-slots", "-lv", "1"]
    if threads > 0:
        argv += ["-t", str(threads)]
    return [*argv, "--no-ui", "--offline", "--cors-origins", "localhost"]


def _shares(shares: Sequence[int]) -> tuple[int, ...]:
    """A device that is named gets something."""
    return tuple(max(1, share) for share in shares)


_RUN_VERIFIER = """\
import sys
fd, *sys.path = sys.argv[1:]
sys.argv[1:] = [fd]
import runpy
runpy.run_module("tightwad_agent.engine.verifier", run_name="__main__", alter_sys=True)
"""


def verifier_argv(python: str, *, fd: int, paths: Sequence[str]) -> list[str]:
    """The verifier, with its end of the socket pair as `fd`. It imports from `paths` only, which are the agent's own:
    it finds the package as the agent found it, whatever the environment says."""
    return [python, "-I", "-S", "-c", _RUN_VERIFIER, str(fd), *paths]


def verifier_load(library: str, options: ServerOptions) -> Load:
    """What the verifier is told, so that it places the model as llama-server would be told to. Head on the CPU unless
    there are local devices, no fitting and no prompt cache go without saying there. `library`: the engine's folder."""
    return Load(
        library=library,
        model=options.model,
        context=options.context,
        slots=options.slots,
        batch=BATCH,
        threads=options.threads,
        rpc_ports=options.rpc_ports,
        rpc_shares=_shares(options.rpc_shares),
        local_devices=options.local_devices,
        local_shares=_shares(options.local_shares),
        offload_layers=-1 if options.offload_layers is None else options.offload_layers,
    )
