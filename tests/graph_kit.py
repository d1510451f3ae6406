"""Traffic like that of llama.cpp's RPC client: messages, and compute graphs that differ from one another as its do."""

from __future__ import annotations

import random
import struct

HELLO, SET_TENSOR, GRAPH_COMPUTE, GRAPH_RECOMPUTE = 14, 6, 10, 16
_HEADER = struct.Struct("<BQ")
_TENSOR = struct.Struct("<QIQ4I4I244x")
"""Id, type, buffer, elements and strides by dimension; the rest is left zero."""
GREETING = _HEADER.pack(HELLO, 24) + bytes(24)


def message(command: int, payload: bytes = b"") -> bytes:
    return _HEADER.pack(command, len(payload)) + payload


def graph(batch: int, *, n_layers: int = 10, at: int = 0) -> bytes:
    """A payload of about 15 KB a layer. `batch` is the number of tokens, `at` where things lie in memory."""
    base = (1 << 46) + at * 4096
    nodes, per_layer = 34 * n_layers, 47
    ids = [base + 368 * i for i in range(nodes)]
    made = []
    for layer in range(n_layers):
        rng = random.Random(0)  # layers are alike
        made += [_tensor(base + 368 * (per_layer * layer + i), rng, batch) for i in range(per_layer)]
    return struct.pack(f"<II{nodes}QI", 0, nodes, *ids, len(made)) + b"".join(made)


def _tensor(ident: int, rng: random.Random, batch: int) -> bytes:
    row, is_weight = rng.choice((64, 192, 576, 1536)), rng.random() < 0.4
    rows = rng.choice((192, 576, 1536)) if is_weight else batch
    kind, buffer = rng.choice((0, 1, 8)), 1 << 46 | rng.randrange(4) << 20
    return _TENSOR.pack(ident, kind, buffer, row, rows, 1, 1, 4, 4 * row, 4 * row * rows, 4 * row * rows)
