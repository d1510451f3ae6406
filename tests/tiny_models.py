"""GGUFs of some 100 KB with random weights, of kinds whose memory cannot simply be rolled back."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

N_VOCAB = 259
WINDOW = 32
_N_EMBD = 64
_N_CONTEXT = 4096


class _Writer:
    """Adds tensors of reproducible noise. Shapes are given as ggml has them, innermost first."""

    def __init__(self, path: Path, architecture: str, n_blocks: int) -> None:
        self.gguf = gguf.GGUFWriter(path, architecture)
        self._rng = np.random.default_rng(1)
        self.gguf.add_context_length(_N_CONTEXT)
        self.gguf.add_embedding_length(_N_EMBD)
        self.gguf.add_block_count(n_blocks)
        self.gguf.add_layer_norm_rms_eps(1e-6)
        self.gguf.add_tokenizer_model("llama")
        self.gguf.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))])
        self.gguf.add_token_scores([0.0] * N_VOCAB)
        self.gguf.add_token_types([2, 3, 3, *[6] * 256])
        self.gguf.add_bos_token_id(1)
        self.gguf.add_eos_token_id(2)
        self.gguf.add_unk_token_id(0)
        self.noise("token_embd.weight", _N_EMBD, N_VOCAB, scale=1.0)
        self.ones("output_norm.weight", _N_EMBD)
        self.noise("output.weight", _N_EMBD, N_VOCAB)

    def noise(self, name: str, *sizes: int, scale: float = 0.2) -> None:
        values = self._rng.standard_normal(sizes[::-1]) * scale
        self.gguf.add_tensor(name, values.astype(np.float32))

    def ones(self, name: str, *sizes: int, value: float = 1.0) -> None:
        self.gguf.add_tensor(name, np.full(sizes[::-1], value, np.float32))

    def close(self) -> None:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


def windowed(path: Path) -> Path:
    """Gemma 3: five of its six blocks look back `WINDOW` tokens only."""
    n_blocks, n_head, n_key, n_ff = 6, 2, 32, 128
    out = _Writer(path, "gemma3", n_blocks)
    out.gguf.add_feed_forward_length(n_ff)
    out.gguf.add_head_count(n_head)
    out.gguf.add_head_count_kv(1)
    out.gguf.add_key_length(n_key)
    out.gguf.add_value_length(n_key)
    out.gguf.add_sliding_window(WINDOW)
    for block in (f"blk.{i}." for i in range(n_blocks)):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            out.ones(f"{block}{name}.weight", _N_EMBD, value=1.0)
        out.ones(f"{block}attn_q_norm.weight", n_key)
        out.ones(f"{block}attn_k_norm.weight", n_key)
        out.noise(f"{block}attn_q.weight", _N_EMBD, n_head * n_key)
        out.noise(f"{block}attn_k.weight", _N_EMBD, n_key)
        out.noise(f"{block}attn_v.weight", _N_EMBD, n_key)
        out.noise(f"{block}attn_output.weight", n_head * n_key, _N_EMBD)
        out.noise(f"{block}ffn_gate.weight", _N_EMBD, n_ff)
        out.noise(f"{block}ffn_up.weight", _N_EMBD, n_ff)
        out.noise(f"{block}ffn_down.weight", n_ff, _N_EMBD)
    out.close()
    return path


def recurrent(path: Path) -> Path:
    """Mamba: its memory is one state, which only ever moves on."""
    n_blocks, n_inner, n_state, n_rank, n_conv = 2, 128, 16, 4, 4
    out = _Writer(path, "mamba", n_blocks)
    out.gguf.add_feed_forward_length(0)
    out.gguf.add_head_count(0)
    out.gguf.add_ssm_conv_kernel(n_conv)
    out.gguf.add_ssm_inner_size(n_inner)
    out.gguf.add_ssm_state_size(n_state)
    out.gguf.add_ssm_time_step_rank(n_rank)
    for block in (f"blk.{i}." for i in range(n_blocks)):
        out.ones(f"{block}attn_norm.weight", _N_EMBD)
        out.noise(f"{block}ssm_in.weight", _N_EMBD, 2 * n_inner)
        out.noise(f"{block}ssm_conv1d.weight", n_conv, n_inner)
        out.noise(f"{block}ssm_conv1d.bias", n_inner)
        out.noise(f"{block}ssm_x.weight", n_inner, n_rank + 2 * n_state)
        out.noise(f"{block}ssm_dt.weight", n_rank, n_inner)
        out.noise(f"{block}ssm_dt.bias", n_inner)
        out.ones(f"{block}ssm_a", n_state, n_inner, value=-0.5)
        out.noise(f"{block}ssm_d", n_inner)
        out.noise(f"{block}ssm_out.weight", n_inner, _N_EMBD)
    out.close()
    return path
