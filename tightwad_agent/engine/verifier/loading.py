"""From `Load` to a model that can serve, or to the reason why not."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tightwad_agent.engine.pins import BUILD
from tightwad_agent.engine.verifier import abi
from tightwad_agent.engine.verifier.journal import Journal, lacking
from tightwad_agent.engine.verifier.llama import Llama
from tightwad_agent.engine.verifier.model import Facts, Outcome, Piece
from tightwad_agent.engine.verifier.placement import HEAD, Placement, fault, placement
from tightwad_agent.engine.verifier.threads import physical_cores
from tightwad_agent.wire.verify import MAX_TOKENS, Load, Loaded, Rollback, pack_tokens, unpack_tokens

MAX_SLOTS = 64
MAX_BATCH = 1 << 14
MAX_TEMPLATE = 1 << 20
MAX_SPECIAL_TEXT = 256
_OUTPUTS_PER_SLOT = 32
_LEAST_CONTEXT = 256
_RECORD = "tightwad-engine.json"
_MAX_RECORD = 1 << 16


class Refusal(Exception):
    """It cannot be served; the fields are those of `wire.verify.Refused`."""

    def __init__(self, kind: str, reason: str, needed: int = 0, device: str = "") -> None:
        super().__init__(reason)
        self.kind, self.reason, self.needed, self.device = kind, reason, needed, device


class Abandoned(Exception):
    """Whoever wanted the model is gone."""


@dataclass(slots=True)
class Pointers:
    """`llama.Handles`, filled step by step."""

    model: int = 0
    context: int = 0
    vocab: int = 0
    memory: int = 0
    alive: list[object] = field(default_factory=list)

    def hold(self, array: ctypes.Array[Any]) -> int:
        """The address of an array that must live as long as the model."""
        self.alive.append(array)
        return ctypes.addressof(array)


def bring_up(load: Load, progress: Callable[[float], bool], journal: Journal) -> Llama:
    """`progress` gets the loaded part, 0 to 1, often; answering `False` gives up. Raises `Refusal` or `Abandoned`."""
    _check(load)
    functions = _library(Path(load.library), journal)
    here = placement(load)
    pointers = Pointers(alive=[journal])  # libllama logs for as long as it runs
    params = _model_params(functions, here, _devices(functions, load, here), pointers)
    pointers.model = _load_model(functions, load.model, params, _Watch(progress), journal)
    _check_model(functions, pointers)
    _make_context(functions, load, journal, pointers)
    return _ready(functions, load, journal, pointers)


def _check(load: Load) -> None:
    if not Path(load.model).is_file():
        raise Refusal("model", f"{load.model} is no file that can be read")
    if not 0 < load.context <= MAX_TOKENS:
        raise Refusal("model", f"a context of {load.context} tokens; 1 to {MAX_TOKENS} can be served")
    if not 0 < load.slots <= MAX_SLOTS or not 0 < load.batch <= MAX_BATCH:
        raise Refusal("internal", f"{load.slots} slots with batches of {load.batch}")
    if load.threads > 512:
        raise Refusal("internal", f"{load.threads} threads; ggml takes 512")


def _library(folder: Path, journal: Journal) -> Any:
    if (build := recorded_build(folder)) not in ("", "custom", BUILD):  # what nobody can tell, the layouts will
        raise Refusal("build", f"{folder} holds {build}, and this verifier is for {BUILD}")
    try:
        functions = abi.load(folder)
    except abi.NoFit as exc:
        raise Refusal("build", f"not libllama {BUILD}: {exc}"[:4000]) from None
    functions.llama_log_set(journal.callback, None)
    functions.llama_backend_init()
    functions.ggml_backend_load_all_from_path(str(folder).encode())
    return functions


def recorded_build(folder: Path) -> str:
    """The build that was written down when the engine was installed; empty text if none was."""
    try:
        with (folder / _RECORD).open("rb") as file:
            record = json.loads(file.read(_MAX_RECORD))
    except (OSError, ValueError, RecursionError):
        return ""
    build = record.get("build") if isinstance(record, dict) else None
    return build if isinstance(build, str) else ""


def _devices(f: Any, load: Load, here: Placement) -> list[int]:
    """Pointers in the order of the plan."""
    if reason := fault(load, f.llama_max_devices()):
        raise Refusal("device", reason)
    if load.rpc_ports:
        _add_workers(f, load.rpc_ports)
    names = [f.ggml_backend_dev_name(f.ggml_backend_dev_get(i)).decode() for i in range(f.ggml_backend_dev_count())]
    n_remote = sum(name.startswith("RPC") for name in names)
    if n_remote != len(load.rpc_shares):
        raise Refusal("device", f"the workers have {n_remote} devices, the plan uses {len(load.rpc_shares)}")
    found = [f.ggml_backend_dev_by_name(name.encode()) for name in here.devices]
    for name, device in zip(here.devices, found, strict=True):
        if not device or f.ggml_backend_dev_type(device) == abi.DEVICE_CPU:
            raise Refusal("device", f"no device {name} here; there are {', '.join(names)}", device=name)
    return found


def _add_workers(f: Any, ports: tuple[int, ...]) -> None:
    backend = f.ggml_backend_reg_by_name(b"RPC")
    address = backend and f.ggml_backend_reg_get_proc_address(backend, b"ggml_backend_rpc_add_server")
    if not address:
        raise Refusal("build", "this build of llama.cpp has no RPC")
    add = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(address)
    for port in ports:
        worker = add(f"127.0.0.1:{port}".encode())
        if not worker:
            raise Refusal("device", f"the worker behind port {port} has no device")
        f.ggml_backend_register(worker)


def _model_params(f: Any, here: Placement, devices: list[int], pointers: Pointers) -> abi.ModelParams:
    params: abi.ModelParams = f.llama_model_default_params()
    params.devices = pointers.hold((ctypes.c_void_p * (len(devices) + 1))(*devices, None))
    params.n_gpu_layers = here.gpu_layers
    if here.shares:
        n_max = f.llama_max_devices()
        params.tensor_split = pointers.hold((ctypes.c_float * n_max)(*here.shares))
    if here.head_on_cpu:
        memory = f.ggml_backend_dev_buffer_type(f.ggml_backend_dev_by_type(abi.DEVICE_CPU))
        overrides = (abi.BufferOverride(HEAD.encode(), memory), abi.BufferOverride(None, None))
        params.tensor_buft_overrides = pointers.hold((abi.BufferOverride * 2)(*overrides))
    return params


def _load_model(f: Any, path: str, params: abi.ModelParams, watch: _Watch, journal: Journal) -> int:
    params.progress_callback = ctypes.cast(watch.callback, ctypes.c_void_p)
    model = f.llama_model_load_from_file(path.encode(), params)
    if watch.stopped:
        raise Abandoned
    if not model:
        raise _failed(journal, "the model could not be loaded")
    return int(model)


class _Watch:
    """libllama's progress callback: nothing may be raised through it."""

    def __init__(self, progress: Callable[[float], bool]) -> None:
        self.stopped = False
        self._progress = progress
        self.callback = abi.PROGRESS_CALLBACK(self._heard)

    def _heard(self, part: float, _data: object) -> bool:
        try:
            self.stopped = self.stopped or not self._progress(part)
        except Exception:  # noqa: BLE001 - the caller is C++
            self.stopped = True
        return not self.stopped


def _failed(journal: Journal, what: str) -> Refusal:
    if found := lacking(journal.lines):
        reason = f"{what}: {found.needed} bytes on {found.device} could not be had"
        return Refusal("memory", reason, needed=found.needed, device=found.device[:200])
    return Refusal("model", f"{what}: {journal.cause()}"[:4000])


def _check_model(f: Any, pointers: Pointers) -> None:
    model = pointers.model
    pointers.vocab = f.llama_model_get_vocab(model)
    if f.llama_vocab_type(pointers.vocab) == abi.VOCAB_NONE or f.llama_vocab_n_tokens(pointers.vocab) <= 0:
        raise Refusal("model", "the model has no vocabulary")
    if f.llama_model_has_encoder(model) or not f.llama_model_has_decoder(model) or f.llama_model_is_diffusion(model):
        raise Refusal("model", "the model does not write one token after the other")


def _make_context(f: Any, load: Load, journal: Journal, pointers: Pointers) -> None:
    """The settings are llama-server's. Batches are never cut in two: sliding-window memory can be rolled back within
    what went through the model at once."""
    params = f.llama_context_default_params()
    params.n_ctx = max(load.context, _LEAST_CONTEXT)
    params.n_batch = params.n_ubatch = max(load.batch, 32, 2 * load.slots)
    params.n_seq_max = load.slots
    params.n_outputs_max = min(params.n_ubatch, _OUTPUTS_PER_SLOT * load.slots)  # logits are the largest buffer
    params.n_threads = params.n_threads_batch = load.threads or physical_cores()
    params.swa_full = False
    params.kv_unified = True
    pointers.context = f.llama_init_from_model(pointers.model, params) or 0
    if not pointers.context:
        raise _failed(journal, f"a context of {load.context} tokens could not be made")
    pointers.memory = f.llama_get_memory(pointers.context) or 0
    if not pointers.memory:
        raise Refusal("model", "the model keeps no memory of what it read")
    _attach_threads(f, params.n_threads, pointers)


def _attach_threads(f: Any, n: int, pointers: Pointers) -> None:
    """Threads that stay; without them ggml starts new ones for each part of a forward pass."""
    backend = f.ggml_backend_dev_backend_reg(f.ggml_backend_dev_by_type(abi.DEVICE_CPU))
    address = f.ggml_backend_reg_get_proc_address(backend, b"ggml_threadpool_new")
    if not address:
        return
    params = abi.ThreadPoolParams()
    f.ggml_threadpool_params_init(ctypes.byref(params), n)
    pool = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(abi.ThreadPoolParams))(address)(ctypes.byref(params))
    if pool:
        f.llama_attach_threadpool(pointers.context, pool, None)


def _ready(f: Any, load: Load, journal: Journal, pointers: Pointers) -> Llama:
    loaded = _loaded(f, load, pointers)
    n_batch = min(f.llama_n_batch(pointers.context), f.llama_n_ubatch(pointers.context))
    facts = Facts(n_batch, min(n_batch, _OUTPUTS_PER_SLOT * load.slots), frozenset(unpack_tokens(loaded.eog)), loaded)
    llama = Llama(f, pointers, facts, pointers.alive)
    if not _warm_up(f, llama, pointers):
        raise _failed(journal, "a first forward pass did not succeed")
    if facts.rollback is not Rollback.NONE and not llama.keep(0, 1):
        llama.facts = replace(facts, loaded=replace(loaded, rollback=Rollback.NONE))
    f.llama_memory_clear(pointers.memory, True)
    return llama


def _warm_up(f: Any, llama: Llama, pointers: Pointers) -> bool:
    """Reads the weights once, and leaves two tokens in sequence 0."""
    done = llama.decode([Piece(0, 0, [0, 0], 1)]) is Outcome.DONE
    f.llama_synchronize(pointers.context)
    return done


def _loaded(f: Any, load: Load, pointers: Pointers) -> Loaded:
    model, vocab = pointers.model, pointers.vocab
    template = f.llama_model_chat_template(model, None) or b""
    if len(template) > MAX_TEMPLATE:
        raise Refusal("model", f"a chat template of {len(template)} bytes")
    n_vocab = f.llama_vocab_n_tokens(vocab)
    bos, eos = f.llama_vocab_bos(vocab), f.llama_vocab_eos(vocab)
    return Loaded(
        context=min(f.llama_n_ctx_seq(pointers.context), MAX_TOKENS),
        context_train=max(0, f.llama_model_n_ctx_train(model)),
        slots=load.slots,
        n_vocab=n_vocab,
        rollback=_rollback(f, model),
        window=max(0, f.llama_model_n_swa(model)),
        eog=pack_tokens(token for token in range(n_vocab) if f.llama_vocab_is_eog(vocab, token)),
        bos=bos,
        eos=eos,
        adds_bos=f.llama_vocab_get_add_bos(vocab),
        bos_text=_special_text(f, vocab, bos, n_vocab),
        eos_text=_special_text(f, vocab, eos, n_vocab),
        chat_template=template.decode(errors="replace"),
    )


def _rollback(f: Any, model: int) -> Rollback:
    if f.llama_model_is_recurrent(model) or f.llama_model_is_hybrid(model):
        return Rollback.NONE
    return Rollback.WINDOW if f.llama_model_n_swa(model) > 0 else Rollback.FULL


def _special_text(f: Any, vocab: int, token: int, n_vocab: int) -> str:
    if not 0 <= token < n_vocab:
        return ""
    return (f.llama_vocab_get_text(vocab, token) or b"").decode(errors="replace")[:MAX_SPECIAL_TEXT]
