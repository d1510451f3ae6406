"""Manifests and GGUF headers made to hurt: each rule alone, and every field with every hostile value."""

from __future__ import annotations

import struct
import time
import tracemalloc

import hostile_manifests as hostile
import pytest
import swarm_kit as kit

from tightwad_agent.errors import BadGguf, BadManifest
from tightwad_agent.swarm.gguf import parse
from tightwad_agent.swarm.manifest import MAX_MANIFEST_BYTES, decode

ENOUGH_S = 20.0
"""CPU time that stands for ever."""
MEMORY_BYTES = 8 << 20


@pytest.mark.parametrize("name", list(hostile.HOSTILE))
def test_a_hostile_manifest_is_refused_though_its_id_is_right(name: str) -> None:
    root, data = hostile.HOSTILE[name]
    with pytest.raises(BadManifest, match="manifest"):
        decode(data, root)


def test_without_what_is_wrong_it_is_taken() -> None:
    """Else the test above would show nothing."""
    root, data = hostile.encoded(hostile.GOOD)
    assert decode(data, root).root == root


def test_ten_million_pieces_cost_nothing() -> None:
    body = hostile.canonical(hostile.TEN_MILLION, [], n=hostile.TEN_MILLION)
    root, data = hostile.encoded(body + bytes(44 * hostile.TEN_MILLION))
    assert len(data) > 100 * MAX_MANIFEST_BYTES
    tracemalloc.start()
    try:
        began = time.process_time()
        with pytest.raises(BadManifest, match="at most"):
            decode(data, root)
        assert time.process_time() - began < ENOUGH_S
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES
    finally:
        tracemalloc.stop()


VALUES = (0, 1, 2**7, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def test_every_field_of_a_gguf_with_every_hostile_value() -> None:
    """At each byte of the header, so in each field, in each width."""
    metadata = {"tokenizer.ggml.tokens": ["a", "bb"], "n": [1, 2], "s": "text", "general.alignment": 32}
    whole = kit.make_gguf([("a.weight", (256, 4), "Q4_K"), ("b", (33,), "F32")], metadata)
    n_refused = n_taken = 0
    began = time.process_time()
    for at in range(kit.read(whole).data_start):
        for width in ("<Q", "<I"):
            for value in VALUES:
                field = struct.pack("<Q", value)[: struct.calcsize(width)]
                data = whole[:at] + field + whole[at + len(field) :]
                try:
                    got = parse(data, len(data))
                except BadGguf:
                    n_refused += 1
                    continue
                n_taken += 1
                assert all(got.data_start <= t.offset <= t.offset + t.n_bytes <= len(data) for t in got.tensors)
    assert n_refused > n_taken > 0
    assert time.process_time() - began < 10 * ENOUGH_S


@pytest.mark.parametrize("count", [2**16, 2**20, 2**32, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("field", ["n_tensors", "n_metadata"])
def test_counts_of_a_gguf_cost_no_memory(field: str, count: int) -> None:
    data = kit.make_gguf(**{field: count})  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        with pytest.raises(BadGguf):
            parse(data, len(data))
        with pytest.raises(BadGguf):
            parse(data, 1 << 50)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES
    finally:
        tracemalloc.stop()
