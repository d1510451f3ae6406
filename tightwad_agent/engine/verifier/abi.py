"""libllama and ggml of the pinned build as ctypes sees them: layouts, signatures, and the proof that they fit.

Only what the verifier calls. A library is believed to be the pinned build when all default parameters come back field
by field as that build sets them: a field more, less or moved shifts one of those values.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_ptr, _i32, _u32, _f32, _bool, _size = (
    ctypes.c_void_p,
    ctypes.c_int32,
    ctypes.c_uint32,
    ctypes.c_float,
    ctypes.c_bool,
    ctypes.c_size_t,
)
_text = ctypes.c_char_p
_ints = ctypes.POINTER(_i32)

VERSION = "0.6.0"
"""What `llama_version` of the pinned build begins with."""

LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, _text, _ptr)
PROGRESS_CALLBACK = ctypes.CFUNCTYPE(_bool, _f32, _ptr)

DEVICE_CPU = 0
VOCAB_NONE = 0


class ModelParams(ctypes.Structure):
    """`llama_model_params`."""

    _fields_ = (
        ("devices", _ptr),
        ("tensor_buft_overrides", _ptr),
        ("n_gpu_layers", _i32),
        ("split_mode", _i32),
        ("load_mode", _i32),
        ("lazy_mode", _i32),
        ("main_gpu", _i32),
        ("tensor_split", _ptr),
        ("progress_callback", _ptr),
        ("progress_callback_user_data", _ptr),
        ("kv_overrides", _ptr),
        ("vocab_only", _bool),
        ("check_tensors", _bool),
        ("use_extra_bufts", _bool),
        ("no_host", _bool),
        ("no_alloc", _bool),
        ("load_mtp", _bool),
    )


class ContextParams(ctypes.Structure):
    """`llama_context_params`."""

    _fields_ = (
        ("n_ctx", _u32),
        ("n_batch", _u32),
        ("n_ubatch", _u32),
        ("n_seq_max", _u32),
        ("n_rs_seq", _u32),
        ("n_outputs_max", _u32),
        ("n_outputs_max_per_seq", _u32),
        ("n_threads", _i32),
        ("n_threads_batch", _i32),
        ("ctx_type", _i32),
        ("rope_scaling_type", _i32),
        ("pooling_type", _i32),
        ("attention_type", _i32),
        ("flash_attn_type", _i32),
        ("rope_freq_base", _f32),
        ("rope_freq_scale", _f32),
        ("yarn_ext_factor", _f32),
        ("yarn_attn_factor", _f32),
        ("yarn_beta_fast", _f32),
        ("yarn_beta_slow", _f32),
        ("yarn_orig_ctx", _u32),
        ("defrag_thold", _f32),
        ("cb_eval", _ptr),
        ("cb_eval_user_data", _ptr),
        ("type_k", _i32),
        ("type_v", _i32),
        ("abort_callback", _ptr),
        ("abort_callback_data", _ptr),
        ("embeddings", _bool),
        ("offload_kqv", _bool),
        ("no_perf", _bool),
        ("op_offload", _bool),
        ("swa_full", _bool),
        ("kv_unified", _bool),
        ("samplers", _ptr),
        ("n_samplers", _size),
        ("ctx_other", _ptr),
    )


class ChainParams(ctypes.Structure):
    """`llama_sampler_chain_params`."""

    _fields_ = (("no_perf", _bool),)


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", _i32),
        ("token", _ints),
        ("embd", _ptr),
        ("pos", _ints),
        ("n_seq_id", _ints),
        ("seq_id", ctypes.POINTER(_ints)),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class TokenData(ctypes.Structure):
    """`llama_token_data`."""

    _fields_ = (("id", _i32), ("logit", _f32), ("p", _f32))


class TokenDataArray(ctypes.Structure):
    """`llama_token_data_array`."""

    _fields_ = (("data", ctypes.POINTER(TokenData)), ("size", _size), ("selected", ctypes.c_int64), ("sorted", _bool))


class LogitBias(ctypes.Structure):
    """`llama_logit_bias`."""

    _fields_ = (("token", _i32), ("bias", _f32))


class BufferOverride(ctypes.Structure):
    """`llama_model_tensor_buft_override`."""

    _fields_ = (("pattern", _text), ("buft", _ptr))


class ThreadPoolParams(ctypes.Structure):
    """`ggml_threadpool_params`."""

    _fields_ = (
        ("cpumask", _bool * 512),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", _u32),
        ("strict_cpu", _bool),
        ("paused", _bool),
    )


MODEL_DEFAULTS: dict[str, object] = {
    **dict.fromkeys((name for name, _kind in ModelParams._fields_), None),
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "main_gpu": 0,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
    "load_mtp": False,
}
CONTEXT_DEFAULTS: dict[str, object] = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_rs_seq": 0,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "ctx_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "rope_freq_scale": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0,
    "defrag_thold": -1.0,
    "cb_eval": None,
    "cb_eval_user_data": None,
    "type_k": 1,
    "type_v": 1,
    "abort_callback": None,
    "abort_callback_data": None,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
    "samplers": None,
    "n_samplers": 0,
    "ctx_other": None,
}
CHAIN_DEFAULTS: dict[str, object] = {"no_perf": True}

_GGML: dict[str, tuple[Any, ...]] = {  # function: (what it returns, arguments...)
    "ggml_backend_load_all_from_path": (None, _text),
    "ggml_backend_reg_by_name": (_ptr, _text),
    "ggml_backend_register": (None, _ptr),
    "ggml_backend_dev_count": (_size,),
    "ggml_backend_dev_get": (_ptr, _size),
    "ggml_backend_dev_by_name": (_ptr, _text),
    "ggml_backend_dev_by_type": (_ptr, ctypes.c_int),
}
_BASE: dict[str, tuple[Any, ...]] = {
    "ggml_backend_reg_get_proc_address": (_ptr, _ptr, _text),
    "ggml_backend_dev_name": (_text, _ptr),
    "ggml_backend_dev_type": (ctypes.c_int, _ptr),
    "ggml_backend_dev_buffer_type": (_ptr, _ptr),
    "ggml_backend_dev_backend_reg": (_ptr, _ptr),
    "ggml_threadpool_params_init": (None, ctypes.POINTER(ThreadPoolParams), ctypes.c_int),
}
_LLAMA: dict[str, tuple[Any, ...]] = {
    "llama_version": (_text,),
    "llama_log_set": (None, LOG_CALLBACK, _ptr),
    "llama_backend_init": (None,),
    "llama_max_devices": (_size,),
    "llama_model_default_params": (ModelParams,),
    "llama_context_default_params": (ContextParams,),
    "llama_sampler_chain_default_params": (ChainParams,),
    "llama_model_load_from_file": (_ptr, _text, ModelParams),
    "llama_init_from_model": (_ptr, _ptr, ContextParams),
    "llama_attach_threadpool": (None, _ptr, _ptr, _ptr),
    "llama_model_get_vocab": (_ptr, _ptr),
    "llama_model_n_ctx_train": (_i32, _ptr),
    "llama_model_n_swa": (_i32, _ptr),
    "llama_model_is_recurrent": (_bool, _ptr),
    "llama_model_is_hybrid": (_bool, _ptr),
    "llama_model_is_diffusion": (_bool, _ptr),
    "llama_model_has_encoder": (_bool, _ptr),
    "llama_model_has_decoder": (_bool, _ptr),
    "llama_model_chat_template": (_text, _ptr, _text),
    "llama_n_ctx_seq": (_u32, _ptr),
    "llama_n_batch": (_u32, _ptr),
    "llama_n_ubatch": (_u32, _ptr),
    "llama_get_memory": (_ptr, _ptr),
    "llama_memory_clear": (None, _ptr, _bool),
    "llama_memory_seq_rm": (_bool, _ptr, _i32, _i32, _i32),
    "llama_memory_seq_cp": (None, _ptr, _i32, _i32, _i32, _i32),
    "llama_memory_seq_pos_min": (_i32, _ptr, _i32),
    "llama_decode": (_i32, _ptr, Batch),
    "llama_synchronize": (None, _ptr),
    "llama_get_logits_ith": (ctypes.POINTER(_f32), _ptr, _i32),
    "llama_vocab_type": (ctypes.c_int, _ptr),
    "llama_vocab_n_tokens": (_i32, _ptr),
    "llama_vocab_get_text": (_text, _ptr, _i32),
    "llama_vocab_is_eog": (_bool, _ptr, _i32),
    "llama_vocab_bos": (_i32, _ptr),
    "llama_vocab_eos": (_i32, _ptr),
    "llama_vocab_get_add_bos": (_bool, _ptr),
    "llama_vocab_get_suppress_tokens": (_ints, _ptr, _ints),
    "llama_tokenize": (_i32, _ptr, _text, _i32, _ints, _i32, _bool, _bool),
    "llama_token_to_piece": (_i32, _ptr, _i32, _text, _i32, _i32, _bool),
    "llama_sampler_chain_init": (_ptr, ChainParams),
    "llama_sampler_chain_add": (None, _ptr, _ptr),
    "llama_sampler_init_greedy": (_ptr,),
    "llama_sampler_init_dist": (_ptr, _u32),
    "llama_sampler_init_top_k": (_ptr, _i32),
    "llama_sampler_init_top_p": (_ptr, _f32, _size),
    "llama_sampler_init_min_p": (_ptr, _f32, _size),
    "llama_sampler_init_temp": (_ptr, _f32),
    "llama_sampler_init_penalties": (_ptr, _i32, _i32, _f32, _f32, _f32),
    "llama_sampler_init_logit_bias": (_ptr, _i32, _i32, ctypes.POINTER(LogitBias)),
    "llama_sampler_init_grammar": (_ptr, _ptr, _text, _text),
    "llama_sampler_sample": (_i32, _ptr, _ptr, _i32),
    "llama_sampler_accept": (None, _ptr, _i32),
    "llama_sampler_apply": (None, _ptr, ctypes.POINTER(TokenDataArray)),
    "llama_sampler_free": (None, _ptr),
}


class NoFit(Exception):
    """The libraries are missing, or are another build than this was written for."""


def file_name(library: str, system: str = sys.platform) -> str:
    """`llama` -> `libllama.so`, by the system's habit."""
    if system == "win32":
        return f"{library}.dll"
    return f"lib{library}.dylib" if system == "darwin" else f"lib{library}.so"


def load(folder: Path) -> Any:
    """All functions by name, as attributes. Raises `NoFit`."""
    if sys.platform == "win32":
        os.add_dll_directory(str(folder))
    functions = SimpleNamespace()
    try:
        for library, table in (("ggml-base", _BASE), ("ggml", _GGML), ("llama", _LLAMA)):
            handle = ctypes.CDLL(str(folder / file_name(library)), mode=ctypes.RTLD_GLOBAL)
            _bind(functions, handle, table)
    except (OSError, AttributeError) as exc:
        raise NoFit(f"{folder}: {exc}") from None
    check(functions)
    return functions


def _bind(functions: SimpleNamespace, handle: Any, table: dict[str, tuple[Any, ...]]) -> None:
    for name, (result, *arguments) in table.items():
        function = getattr(handle, name)
        function.restype, function.argtypes = result, arguments
        setattr(functions, name, function)


def check(functions: Any) -> None:
    """Raises `NoFit` unless version and all defaults are the pinned build's."""
    version = (functions.llama_version() or b"").decode(errors="replace")
    if not version.startswith(VERSION):
        raise NoFit(f"libllama says it is version {version}, not {VERSION}")
    for function, expected in (
        ("llama_model_default_params", MODEL_DEFAULTS),
        ("llama_context_default_params", CONTEXT_DEFAULTS),
        ("llama_sampler_chain_default_params", CHAIN_DEFAULTS),
    ):
        if wrong := differences(getattr(functions, function)(), expected):
            raise NoFit(f"{function}: {', '.join(wrong)}")


def differences(params: Any, expected: dict[str, object]) -> list[str]:
    """Fields of a parameter structure that are not as expected, in words."""
    return [
        f"{name} is {getattr(params, name)!r}, not {value!r}"
        for name, value in expected.items()
        if getattr(params, name) != value
    ]
