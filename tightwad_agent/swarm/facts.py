"""What a GGUF header says about placement and drafting.

Rules and defaults are those of the engine (build b11434: `llama-hparams.cpp`, `llama-vocab.cpp`,
`common/speculative.cpp`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from tightwad_agent.swarm.gguf import Gguf
from tightwad_agent.wire.rows import ModelFacts

MAX_LAYERS = 4_096
MAX_FACT = 2**62

MAX_SIZE_DIFFERENCE = 128
"""Tokens by which a draft's vocabulary may be longer or shorter than the target's (speculative.cpp)."""

FIRST_COMPARED_TOKEN = 5
"""Texts of the tokens before this one are not compared (speculative.cpp)."""

F16_BYTES = 2

# general.file_type (llama.h, enum llama_ftype)
FILE_TYPES: Mapping[int, str] = MappingProxyType(
    {
        0: "F32",
        1: "F16",
        2: "Q4_0",
        3: "Q4_1",
        7: "Q8_0",
        8: "Q5_0",
        9: "Q5_1",
        10: "Q2_K",
        11: "Q3_K_S",
        12: "Q3_K_M",
        13: "Q3_K_L",
        14: "Q4_K_S",
        15: "Q4_K_M",
        16: "Q5_K_S",
        17: "Q5_K_M",
        18: "Q6_K",
        19: "IQ2_XXS",
        20: "IQ2_XS",
        21: "Q2_K_S",
        22: "IQ3_XS",
        23: "IQ3_XXS",
        24: "IQ1_S",
        25: "IQ4_NL",
        26: "IQ3_S",
        27: "IQ3_M",
        28: "IQ2_S",
        29: "IQ2_M",
        30: "IQ4_XS",
        31: "IQ1_M",
        32: "BF16",
        36: "TQ1_0",
        37: "TQ2_0",
        38: "MXFP4_MOE",
        39: "NVFP4",
        40: "Q1_0",
        41: "Q2_0",
    }
)

_KIND_NAMES = {"llama": "SPM", "gpt2": "BPE", "bert": "WPM", "t5": "UGM", "rwkv": "RWKV", "plamo2": "PLAMO2"}
_DEFAULT_BOS = {"llama": 1, "gpt2": 11, "bert": 101, "plamo2": 1}
_DEFAULT_EOS = {"llama": 2, "gpt2": 11, "t5": 1, "plamo2": 2}
_ADDS_BOS = frozenset({"llama", "bert"})
_ADDS_EOS = frozenset({"t5"})
_PRE_ADDS_BOS = frozenset(
    {
        "chameleon",
        "falcon-h1",
        "falcon3",
        "jina-v5-nano",
        "lfm2",
        "llama-bpe",
        "llama-v3",
        "llama3",
        "midm-2.0",
        "pixtral",
        "tekken",
    }
)


def facts_of(first: Gguf, *more: Gguf) -> ModelFacts:
    """The facts of one model, of several files perhaps; what the header does not say, or says absurdly, is zero or
    empty."""
    gguf = replace(first, tensors=tuple(t for g in (first, *more) for t in g.tensors)) if more else first
    architecture = _text(gguf, "general.architecture")[:64]
    return ModelFacts(
        architecture=architecture,
        quantisation=_quantisation(gguf)[:32],
        n_params=min(sum(t.n_elements for t in gguf.tensors), MAX_FACT),
        n_layers=_number(gguf, f"{architecture}.block_count"),
        context_train=_number(gguf, f"{architecture}.context_length"),
        kv_bytes_per_token=_kv_bytes_per_token(gguf, architecture),
        vocab=vocabulary_of(gguf).digest,
    )


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the engine compares before it lets one model draft for another. `-1`: no such token."""

    kind: str
    tokens: tuple[bytes, ...]
    bos: int
    eos: int
    add_bos: bool
    add_eos: bool

    @property
    def digest(self) -> str:
        """32 hex characters; empty where there are no tokens."""
        if not self.tokens:
            return ""
        ids = (self.bos, self.eos, int(self.add_bos), int(self.add_eos), len(self.tokens))
        digest = hashlib.sha256(f"{self.kind}\0{ids}\0".encode())
        for token in self.tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()[:32]


def vocabulary_of(gguf: Gguf) -> Vocabulary:
    """The vocabulary with the engine's defaults filled in."""
    model = _text(gguf, "tokenizer.ggml.model")
    n = len(gguf.tokens)
    pre = _text(gguf, "tokenizer.ggml.pre")
    return Vocabulary(
        kind=_KIND_NAMES.get(model, model[:40]),
        tokens=gguf.tokens,
        bos=_token_id(gguf, "tokenizer.ggml.bos_token_id", _DEFAULT_BOS.get(model, -1), n),
        eos=_token_id(gguf, "tokenizer.ggml.eos_token_id", _DEFAULT_EOS.get(model, -1), n),
        add_bos=_flag(gguf, "tokenizer.ggml.add_bos_token", model in _ADDS_BOS or pre in _PRE_ADDS_BOS),
        add_eos=_flag(gguf, "tokenizer.ggml.add_eos_token", model in _ADDS_EOS),
    )


def vocabulary_difference(target: Vocabulary, draft: Vocabulary) -> str | None:
    """Why `draft` cannot draft for `target`: the first difference in the engine's own order, or None."""
    if not target.tokens or not draft.tokens:
        return f"the {'draft' if target.tokens else 'target'} has no vocabulary in its file"
    if target.kind != draft.kind:
        return f"the target's vocabulary is of kind {target.kind or '?'}, the draft's of kind {draft.kind or '?'}"
    for name, mine, its in (
        ("BOS", (target.add_bos, target.bos), (draft.add_bos, draft.bos)),
        ("EOS", (target.add_eos, target.eos), (draft.add_eos, draft.eos)),
    ):
        if mine[0] != its[0]:
            return f"the {'target' if mine[0] else 'draft'} adds a {name} token to a prompt and the other does not"
        if mine[0] and mine[1] != its[1]:
            return f"{name} is token {mine[1]} in the target and token {its[1]} in the draft"
    n_target, n_draft = len(target.tokens), len(draft.tokens)
    if abs(n_target - n_draft) > MAX_SIZE_DIFFERENCE:
        return f"the target has {n_target} tokens and the draft {n_draft}; they may differ by {MAX_SIZE_DIFFERENCE}"
    for index in range(FIRST_COMPARED_TOKEN, min(n_target, n_draft)):
        if target.tokens[index] != draft.tokens[index]:
            return (
                f"token {index} is {_shown(target.tokens[index])} in the target "
                f"and {_shown(draft.tokens[index])} in the draft"
            )
    return None


def vocab_difference(target: Gguf, draft: Gguf) -> str | None:
    """`vocabulary_difference` of two headers."""
    return vocabulary_difference(vocabulary_of(target), vocabulary_of(draft))


def _shown(token: bytes) -> str:
    return repr(token.decode(errors="backslashreplace")[:40])


def _quantisation(gguf: Gguf) -> str:
    number = gguf.metadata.get("general.file_type")
    if type(number) is int and number in FILE_TYPES:
        return FILE_TYPES[number]
    weight: Counter[str] = Counter()
    for tensor in gguf.tensors:
        weight[tensor.type] += tensor.n_bytes
    return weight.most_common(1)[0][0] if weight else ""


def _kv_bytes_per_token(gguf: Gguf, architecture: str) -> int:
    """Keys and values of one token over all layers, in f16. Heads may be listed per layer; layers without attention
    count nothing. Sliding windows are not subtracted: this is what must be there at most."""
    n_layers = _number(gguf, f"{architecture}.block_count")
    if n_layers > MAX_LAYERS:
        return 0
    heads = _per_layer(gguf, f"{architecture}.attention.head_count", n_layers, (0,) * n_layers)
    kv_heads = _per_layer(gguf, f"{architecture}.attention.head_count_kv", n_layers, heads)
    widest = max(heads, default=0)
    by_embedding = _number(gguf, f"{architecture}.embedding_length") // widest if widest else 0
    k = _number(gguf, f"{architecture}.attention.key_length", by_embedding)
    v = _number(gguf, f"{architecture}.attention.value_length", by_embedding)
    return min(sum(kv_heads) * (k + v) * F16_BYTES, MAX_FACT)


def _per_layer(gguf: Gguf, key: str, n_layers: int, default: tuple[int, ...]) -> tuple[int, ...]:
    value = gguf.metadata.get(key)
    if isinstance(value, tuple):
        numbers = tuple(v if type(v) is int and 0 <= v < MAX_FACT else 0 for v in value)
        return (numbers + (0,) * n_layers)[:n_layers]
    return (_number(gguf, key),) * n_layers if value is not None else default


def _text(gguf: Gguf, key: str) -> str:
    value = gguf.metadata.get(key, "")
    return value if isinstance(value, str) else ""


def _number(gguf: Gguf, key: str, default: int = 0) -> int:
    value = gguf.metadata.get(key, default)
    return value if type(value) is int and 0 <= value < MAX_FACT else default


def _flag(gguf: Gguf, key: str, default: bool) -> bool:
    value = gguf.metadata.get(key, default)
    return value if isinstance(value, bool) else default


def _token_id(gguf: Gguf, key: str, default: int, n_tokens: int) -> int:
    value = gguf.metadata.get(key)
    if type(value) is int and 0 <= value < n_tokens:
        return value
    return default if 0 <= default < n_tokens else -1
