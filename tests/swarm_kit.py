"""GGUFs made to measure, for the tests of the swarm."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tightwad_agent.swarm.gguf import TENSOR_TYPES, Gguf, parse

_NUMBER = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value_of(value: Any) -> bytes:
    """Type and value as a GGUF has them; `(number, raw bytes)` for anything odd."""
    if isinstance(value, tuple):
        return struct.pack("<I", value[0]) + value[1]
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str | bytes):
        return struct.pack("<I", 8) + text(value)
    if value and isinstance(value[0], int):
        return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(v) for v in value)


def make_gguf(
    tensors: Sequence[tuple[Any, ...]] = (("w", (64,), "F32"),),
    metadata: Mapping[str, Any] | None = None,
    *,
    seed: int = 1,
    version: int = 3,
    alignment: int = 32,
    n_tensors: int | None = None,
    n_metadata: int | None = None,
) -> bytes:
    """A GGUF with random weights. A tensor is (name, dims, type[, offset])."""
    entries = {"general.architecture": "llama", **(metadata or {})}
    head = b"".join(text(k) + value_of(v) for k, v in entries.items())
    infos, size = b"", 0
    for name, dims, kind, *offset in tensors:
        block, block_bytes = next(((b, n) for k, b, n in TENSOR_TYPES.values() if k == kind), (1, 4))
        number = _NUMBER.get(kind, kind)
        infos += text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        infos += struct.pack("<IQ", number, offset[0] if offset else size)
        n = 1
        for d in dims:
            n *= d
        size += -(-(n // block * block_bytes) // alignment) * alignment
    counts = (len(tensors) if n_tensors is None else n_tensors, len(entries) if n_metadata is None else n_metadata)
    data = b"GGUF" + struct.pack("<IQQ", version, *counts) + head + infos
    data += b"\0" * (-len(data) % alignment)
    return data + (random.Random(seed).randbytes(size) if size < 1 << 26 else b"")


def llama(n_layers: int = 2, *, seed: int = 1, tensor_kb: int = 64, **more: Any) -> bytes:
    """A small model: `n_layers` tensors of `tensor_kb` KiB each, and a vocabulary of 300."""
    metadata = {
        "general.name": f"toy {seed}",
        "llama.block_count": n_layers,
        "llama.context_length": 4096,
        "llama.embedding_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(300)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **more,
    }
    tensors = [(f"blk.{i}.w", (256, tensor_kb), "F32") for i in range(n_layers)]
    return make_gguf(tensors, metadata, seed=seed)


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read(data: bytes) -> Gguf:
    return parse(data, len(data))


def shards(n: int = 3, *, n_layers: int = 2, seed: int = 1) -> list[bytes]:
    """The files of a model; the first has the vocabulary."""
    more = [
        make_gguf([(f"blk.{i}.w", (256, 16), "F32")], {"split.no": i, "split.count": n}, seed=seed + i)
        for i in range(1, n)
    ]
    return [llama(n_layers, tensor_kb=16, seed=seed, **{"split.no": 0, "split.count": n}), *more]
