"""A GGUF of 150 KB with made-up weights: enough for llama.cpp to load and to generate from, worth nothing as a model.

The smoke test runs it. Its matrices are F16, Q8_0, Q4_0 and Q6_K, so that the quantised kernels, where binaries of
another CPU die, are run too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

_ALIGNMENT = 32
_VERSION = 3
_U32, _F32, _STRING, _ARRAY, _I32 = 4, 6, 8, 9, 5
_TYPE_F32, _TYPE_F16, _TYPE_Q4_0, _TYPE_Q8_0, _TYPE_Q6_K = 0, 1, 2, 8, 14

_N_EMBD = 256
_N_FF = 256
_N_HEAD = 4
_N_CONTEXT = 256
_CONTROL, _BYTE, _UNKNOWN = 3, 6, 2

Tensor = tuple[str, tuple[int, ...], int, bytes]
"""(name, sizes with the innermost first, ggml type, bytes)"""


def tiny_model() -> bytes:
    """The whole file; always the same bytes."""
    entries = list(_metadata())
    tensors = list(_tensors())
    out = bytearray(struct.pack("<4sIQQ", b"GGUF", _VERSION, len(tensors), len(entries)))
    for entry in entries:
        out += entry
    offset = 0
    for name, sizes, kind, data in tensors:
        out += _text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
        offset += _padded(len(data))
    out += bytes(_padded(len(out)) - len(out))
    for _name, _sizes, _kind, data in tensors:
        out += data + bytes(_padded(len(data)) - len(data))
    return bytes(out)


def _metadata() -> Iterator[bytes]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    kinds = [_UNKNOWN, _CONTROL, _CONTROL, *([_BYTE] * 256)]
    yield _key("general.architecture", _STRING) + _text("llama")
    yield _key("general.name", _STRING) + _text("smoke test")
    for name, number in (
        ("llama.context_length", _N_CONTEXT),
        ("llama.embedding_length", _N_EMBD),
        ("llama.block_count", 1),
        ("llama.feed_forward_length", _N_FF),
        ("llama.attention.head_count", _N_HEAD),
        ("llama.rope.dimension_count", _N_EMBD // _N_HEAD),
        ("tokenizer.ggml.unknown_token_id", 0),
        ("tokenizer.ggml.bos_token_id", 1),
        ("tokenizer.ggml.eos_token_id", 2),
    ):
        yield _key(name, _U32) + struct.pack("<I", number)
    yield _key("llama.attention.layer_norm_rms_epsilon", _F32) + struct.pack("<f", 1e-5)
    yield _key("tokenizer.ggml.model", _STRING) + _text("llama")
    yield _array("tokenizer.ggml.tokens", _STRING, [_text(token) for token in tokens])
    yield _array("tokenizer.ggml.scores", _F32, [struct.pack("<f", 0.0)] * len(tokens))
    yield _array("tokenizer.ggml.token_type", _I32, [struct.pack("<i", kind) for kind in kinds])


def _tensors() -> Iterator[Tensor]:
    square = _N_EMBD * _N_EMBD
    yield "token_embd.weight", (_N_EMBD, 259), _TYPE_Q8_0, _q8_0(_N_EMBD * 259)
    yield "output_norm.weight", (_N_EMBD,), _TYPE_F32, _ones(_N_EMBD)
    yield "blk.0.attn_norm.weight", (_N_EMBD,), _TYPE_F32, _ones(_N_EMBD)
    yield "blk.0.attn_q.weight", (_N_EMBD, _N_EMBD), _TYPE_F16, _f16(square)
    yield "blk.0.attn_k.weight", (_N_EMBD, _N_EMBD), _TYPE_Q8_0, _q8_0(square)
    yield "blk.0.attn_v.weight", (_N_EMBD, _N_EMBD), _TYPE_Q4_0, _q4_0(square)
    yield "blk.0.attn_output.weight", (_N_EMBD, _N_EMBD), _TYPE_Q6_K, _q6_k(square)
    yield "blk.0.ffn_norm.weight", (_N_EMBD,), _TYPE_F32, _ones(_N_EMBD)
    yield "blk.0.ffn_gate.weight", (_N_EMBD, _N_FF), _TYPE_Q4_0, _q4_0(square)
    yield "blk.0.ffn_up.weight", (_N_EMBD, _N_FF), _TYPE_Q8_0, _q8_0(square)
    yield "blk.0.ffn_down.weight", (_N_FF, _N_EMBD), _TYPE_Q6_K, _q6_k(square)


def _ones(n: int) -> bytes:
    return struct.pack("<f", 1.0) * n


def _f16(n: int) -> bytes:
    return b"".join(struct.pack("<e", (b - 128) / 2048) for b in _noise(n))


def _q8_0(n: int) -> bytes:
    """Blocks of 32: scale f16, 32 signed bytes."""
    scale = struct.pack("<e", 1 / 1024)
    noise = _noise(n)
    return b"".join(scale + noise[i : i + 32] for i in range(0, n, 32))


def _q4_0(n: int) -> bytes:
    """Blocks of 32: scale f16, 16 bytes of two nibbles."""
    scale = struct.pack("<e", 1 / 64)
    noise = _noise(n // 2)
    return b"".join(scale + noise[i : i + 16] for i in range(0, n // 2, 16))


def _q6_k(n: int) -> bytes:
    """Super-blocks of 256: 128 + 64 bytes of quants, 16 signed scales, scale f16."""
    tail = bytes([1] * 16) + struct.pack("<e", 1 / 256)
    noise = _noise(n * 3 // 4)
    return b"".join(noise[i : i + 192] + tail for i in range(0, len(noise), 192))


def _noise(n: int) -> bytes:
    """Bytes that look random and never change: a linear congruential generator's upper bits."""
    state, out = 0x2545F491, bytearray()
    for _ in range(4096):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        out.append(state >> 24)
    return bytes(out * (n // len(out) + 1))[:n]


def _padded(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _key(name: str, kind: int) -> bytes:
    return _text(name) + struct.pack("<I", kind)


def _array(name: str, kind: int, items: Sequence[bytes]) -> bytes:
    return _key(name, _ARRAY) + struct.pack("<IQ", kind, len(items)) + b"".join(items)
