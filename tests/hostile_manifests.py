"""Manifests that break one rule each, as bytes; their ids are right, so only the rules can refuse them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any

import msgpack

from tightwad_agent.ids import ModelId

FACTS = ["llama", "Q4_0", 1, 1, 1, 1, ""]
SHA = bytes(32)
TEN_MILLION = 10_000_000
HUGE = 2**63


def canonical(size: int, pieces: Sequence[tuple[int, int]], *, n: int | None = None, sha256: bytes = SHA) -> bytes:
    """`n`: what is claimed in place of the number of pieces."""
    head = b"tightwad manifest 1\n" + struct.pack("!Q32sI", size, sha256, len(pieces) if n is None else n)
    return head + b"".join(struct.pack("!QI32s", offset, length, SHA) for offset, length in pieces)


def encoded(body: bytes, name: Any = "toy.gguf", facts: Any = FACTS, *more: Any) -> tuple[ModelId, bytes]:
    """(its id, its bytes)"""
    head = msgpack.packb([name, facts, *more], use_bin_type=True)
    return ModelId(hashlib.sha256(body).hexdigest()), b"TWM1" + struct.pack("!I", len(head)) + head + body


GOOD = canonical(30, [(0, 10), (10, 20)])

BAD_NAMES = ["../toy.gguf", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "a\0b", "C:\\x", "nul", "com1.gguf", "x" * 201]
BAD_NAMES += ["\N{RIGHT-TO-LEFT OVERRIDE}fugg", "a\nb", ".hidden", "trailing ", "trailing."]

HOSTILE: dict[str, tuple[ModelId, bytes]] = {
    "overlapping": encoded(canonical(30, [(0, 20), (10, 20)])),
    "duplicate": encoded(canonical(10, [(0, 10), (0, 10)])),
    "out of order": encoded(canonical(30, [(10, 20), (0, 10)])),
    "gap": encoded(canonical(30, [(0, 10), (15, 15)])),
    "beyond the end": encoded(canonical(30, [(0, 10), (10, 30)])),
    "before the end": encoded(canonical(31, [(0, 10), (10, 20)])),
    "far away": encoded(canonical(30, [(HUGE, 10), (HUGE + 10, 20)])),
    "empty piece": encoded(canonical(30, [(0, 0), (0, 30)])),
    "no pieces": encoded(canonical(30, [])),
    "no bytes": encoded(canonical(0, [])),
    "2^63 bytes": encoded(canonical(HUGE, [(0, 10)])),
    "2^64-1 bytes": encoded(canonical(2**64 - 1, [(0, 10)])),
    "piece of 4 GiB": encoded(canonical(2**32 - 1, [(0, 2**32 - 1)])),
    "ten million pieces claimed": encoded(canonical(30, [(0, 10), (10, 20)], n=TEN_MILLION)),
    "2^32-1 pieces claimed": encoded(canonical(30, [(0, 10), (10, 20)], n=2**32 - 1)),
    "one piece more": encoded(canonical(30, [(0, 10), (10, 20)], n=3)),
    "one piece less": encoded(canonical(30, [(0, 10), (10, 20)], n=1)),
    "another version": encoded(GOOD.replace(b"manifest 1", b"manifest 9")),
    "a byte behind": encoded(GOOD + b"\0"),
    "facts of other types": encoded(GOOD, "toy.gguf", ["llama", 5, "x"]),
    "facts below zero": encoded(GOOD, "toy.gguf", ["llama", "Q4_0", -1, 1, 1, 1, ""]),
    "facts of 2^64": encoded(GOOD, "toy.gguf", ["llama", "Q4_0", 2**64 - 1, 1, 1, 1, ""]),
    "name of another type": encoded(GOOD, 7),
    "origin without encryption": encoded(GOOD, "toy.gguf", FACTS, "http://example.org/toy.gguf"),
    "origin on the disk": encoded(GOOD, "toy.gguf", FACTS, "file:///etc/passwd"),
    "origin with a password": encoded(GOOD, "toy.gguf", FACTS, "https://user:secret@example.org/x"),
    **{f"name {name[:14]!r}": encoded(GOOD, name) for name in BAD_NAMES},
}
