"""Fields that the verifier does not read, and the values of them that ask for nothing.

Clients send many fields always; those at these values are served. Any other value is refused by the field's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def only(*values: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(v) and value == v for v in values)


def _anything(_value: Any) -> bool:
    return True


def empty(value: Any) -> bool:
    return value in ("", [], {})


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _at_most(limit: float) -> Callable[[Any], bool]:
    return lambda value: is_number(value) and value <= limit


_ORDER = ["penalties", "top_k", "top_p", "min_p", "temperature"]
_OFF = frozenset({"dry", "top_n_sigma", "typ_p", "typical_p", "xtc"})
"""Steps that are refused by their own parameters where they would do something."""


def _usual_order(value: Any) -> bool:
    return isinstance(value, list) and [v for v in value if not (isinstance(v, str) and v in _OFF)] == _ORDER


NEUTRAL: dict[str, Callable[[Any], bool]] = {
    # labels and hints to a provider: without influence on any answer
    "model": lambda value: isinstance(value, str),
    "user": _anything,
    "metadata": _anything,
    "safety_identifier": _anything,
    "prompt_cache_key": _anything,
    "prompt_cache_retention": _anything,
    "store": only(False),
    "service_tier": only("auto", "default"),
    # OpenAI's, where they ask for what is done anyway
    "tools": empty,
    "tool_choice": only("none", "auto"),
    "parallel_tool_calls": only(True, False),
    "functions": empty,
    "function_call": only("none", "auto"),
    "modalities": only(["text"]),
    "verbosity": only("medium"),
    "suffix": empty,
    # llama-server's, where they are switched off
    "cache_prompt": only(True),
    "return_progress": only(False),
    "return_tokens": only(False),
    "verbose": only(False),
    "id_slot": only(-1),
    "n_keep": only(0),
    "n_discard": only(0),
    "n_indent": only(0),
    "n_cache_reuse": only(0),
    "t_max_predict_ms": _at_most(0),
    "response_fields": empty,
    "top_n_sigma": _at_most(0),
    "typical_p": only(1, 1.0),
    "typ_p": only(1, 1.0),
    "xtc_probability": _at_most(0),
    "xtc_threshold": is_number,
    "dynatemp_range": _at_most(0),
    "dynatemp_exponent": is_number,
    "dry_multiplier": only(0, 0.0),
    "dry_base": is_number,
    "dry_allowed_length": is_number,
    "dry_penalty_last_n": is_number,
    "dry_sequence_breakers": lambda value: isinstance(value, list),
    "mirostat": only(0),
    "mirostat_tau": is_number,
    "mirostat_eta": is_number,
    "adaptive_target": lambda value: is_number(value) and value < 0,
    "adaptive_decay": is_number,
    "min_keep": only(0),
    "samplers": _usual_order,
    "backend_sampling": only(False),
    "post_sampling_probs": only(False),
    "grammar": empty,
    "grammar_lazy": only(False),
    "lora": empty,
    "reasoning_format": only("none", "auto"),
    "reasoning_budget_tokens": only(-1),
    "thinking_budget_tokens": only(-1),
    "reasoning_control": only(False),
}
