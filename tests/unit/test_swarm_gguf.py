"""The GGUF parser believes nothing."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import swarm_kit as kit
from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent.errors import BadGguf
from tightwad_agent.swarm import gguf
from tightwad_agent.swarm.facts import facts_of, vocab_difference, vocabulary_of
from tightwad_agent.swarm.gguf import HeaderIncomplete, parse

TWO = (("a.weight", (256, 4), "Q4_K"), ("b.weight", (33,), "F32"))


def refuse(data: bytes, *words: str, size: int | None = None) -> None:
    with pytest.raises(BadGguf) as caught:
        parse(data, len(data) if size is None else size)
    for word in words:
        assert word in str(caught.value)


def test_places_of_tensors() -> None:
    data = kit.make_gguf(TWO, {"general.alignment": 64}, alignment=64)
    got = kit.read(data)
    assert [t.name for t in got.tensors] == ["a.weight", "b.weight"]
    first, second = got.tensors
    assert (first.offset, first.n_bytes, first.n_elements) == (got.data_start, 4 * 144, 1024)
    assert got.data_start % 64 == 0
    assert second.offset == got.data_start + 576
    assert second.offset + 128 + 64 == len(data)  # 132 bytes, padded to 64s


def test_version_2_has_the_same_layout() -> None:
    assert kit.read(kit.make_gguf(TWO, version=2)).version == 2


def test_metadata_of_every_kind() -> None:
    odd = {
        "u8": (0, b"\xff"),
        "i8": (1, b"\xff"),
        "u16": (2, b"\xff\xff"),
        "i16": (3, b"\xff\xff"),
        "i32": (5, b"\xff\xff\xff\xff"),
        "u64": (10, b"\xff" * 8),
        "i64": (11, b"\xff" * 8),
        "f64": (12, struct.pack("<d", 0.5)),
        "yes": True,
        "f32": 0.25,
        "list": [1, 2, 3],
        "merges": ["a b", "c d"],
        "text": "ä",
        "long": [7] * 5000,
    }
    got = kit.read(kit.make_gguf(metadata=odd)).metadata
    assert (got["u8"], got["i8"], got["u16"], got["i16"], got["i32"]) == (255, -1, 65535, -1, -1)
    assert (got["u64"], got["i64"], got["f64"], got["f32"]) == (2**64 - 1, -1, 0.5, 0.25)
    assert got["yes"] is True
    assert got["list"] == (1, 2, 3)
    assert got["text"] == "ä"
    assert "merges" not in got
    assert "long" not in got


def test_a_reader_of_ranges_gives_the_same_as_the_whole() -> None:
    data = kit.llama()
    for step in (1, 7, 1000):
        asked = []

        def read(at: int, n: int, step: int = step, asked: list[int] = asked) -> bytes:
            asked.append(at)
            return data[at : at + min(n, step)]

        assert parse(read, len(data)) == kit.read(data)
        assert len(asked) > 1
    header = kit.read(data).data_start
    assert parse(data[:header], len(data)) == kit.read(data)


def test_a_prefix_says_how_much_is_missing_until_it_is_enough() -> None:
    data = kit.llama()
    n, rounds = 0, 0
    while True:
        try:
            got = parse(data[:n], len(data))
            break
        except HeaderIncomplete as exc:
            before, n, rounds = n, exc.n_bytes, rounds + 1
        assert before < n <= got_start(data)
    assert got == kit.read(data)
    assert rounds > 10


def got_start(data: bytes) -> int:
    return kit.read(data).data_start


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 8, 12, 20, 24, 30, 60, 100, -29, -130])
def test_a_file_that_is_cut(cut: int) -> None:
    data = kit.make_gguf(TWO)
    refuse(data[:cut])


def test_every_cut_is_refused() -> None:
    data = kit.make_gguf(TWO, {"tokenizer.ggml.tokens": ["a", "bb"], "n": [1, 2]})
    end = kit.read(data).tensors[-1]
    for n in range(end.offset + end.n_bytes):
        refuse(data[:n])


def test_not_a_gguf() -> None:
    refuse(b"PK\x03\x04 a zip archive", "not a GGUF", "PK")
    refuse(b"", "not a GGUF")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"version": 1}, ["version 1"]),
        ({"version": 4}, ["version 4"]),
        ({"version": 0x03000000}, ["big endian"]),
        ({"n_tensors": 2**63}, ["tensors", "at most"]),
        ({"n_tensors": 60_000}, ["do not fit"]),
        ({"n_metadata": 2**64 - 1}, ["metadata entries", "at most"]),
        ({"n_metadata": 60_000}, ["do not fit"]),
        ({"metadata": {"general.alignment": 0}}, ["general.alignment"]),
        ({"metadata": {"general.alignment": 33}}, ["general.alignment"]),
        ({"metadata": {"general.alignment": 1 << 30}}, ["general.alignment"]),
        ({"metadata": {"general.alignment": "32"}}, ["general.alignment"]),
        ({"metadata": {"": 1}}, ["empty metadata key"]),
        ({"metadata": {"k": (13, b"")}}, ["'k'", "unknown value type 13"]),
        ({"metadata": {"k": (9, struct.pack("<IQ", 9, 1))}}, ["'k'", "list of lists"]),
        ({"metadata": {"k": (9, struct.pack("<IQ", 77, 1))}}, ["'k'", "value type 77"]),
        ({"metadata": {"k": (9, struct.pack("<IQ", 4, 2**62))}}, ["'k'", "claims"]),
        ({"metadata": {"k": (9, struct.pack("<IQ", 8, 2**61))}}, ["'k'", "claims"]),
        ({"metadata": {"k": (9, struct.pack("<IQQ", 8, 1, 2**63))}}, ["'k'", "text of"]),
        ({"metadata": {"tokenizer.ggml.tokens": (9, struct.pack("<IQQ", 8, 1, 2**63))}}, ["tokens", "bytes"]),
        ({"metadata": {"k": (8, struct.pack("<Q", 2**63))}}, ["'k'", "at most"]),
        ({"metadata": {"k": (8, struct.pack("<Q", 1 << 21))}}, ["'k'", "file ends inside"]),
        ({"tensors": [("t" * 64, (1,), "F32")]}, ["name of tensor 0", "64 bytes"]),
        ({"tensors": [("t", (1, 1, 1, 1, 1), "F32")]}, ["'t'", "5 dimensions"]),
        ({"tensors": [("t", (2**63,), "F32")]}, ["'t'", "too large"]),
        ({"tensors": [("t", (2**32, 2**31), "F32")]}, ["'t'", "too large"]),
        ({"tensors": [("t", (2**62,), "F32")]}, ["cut short", "'t'"]),
        ({"tensors": [("t", (4,), 4)]}, ["'t'", "unknown type 4"]),
        ({"tensors": [("t", (4,), 1000)]}, ["'t'", "unknown type 1000"]),
        ({"tensors": [("t", (33,), "Q4_0")]}, ["'t'", "rows of 33"]),
        ({"tensors": [("t", (), "Q4_0")]}, ["'t'", "rows of 1"]),
        ({"tensors": [("t", (4,), "F32"), ("t", (4,), "F32")]}, ["'t'", "second time"]),
        ({"tensors": [("t", (4,), "F32"), ("u", (4,), "F32", 0)]}, ["'u'", "offset 0", "expected 32"]),
        ({"tensors": [("t", (4,), "F32"), ("u", (4,), "F32", 2**63)]}, ["'u'", "expected 32"]),
        ({"tensors": [("t", (4,), "F32", 32)]}, ["'t'", "expected 0"]),
    ],
)
def test_each_rule_names_what_breaks_it(made: dict[str, object], words: list[str]) -> None:
    refuse(kit.make_gguf(**made), *words)  # type: ignore[arg-type]


def test_a_key_twice() -> None:
    data = kit.make_gguf(metadata={"k": 1}, n_metadata=3)
    entry = kit.text("k") + kit.value_of(1)
    refuse(data.replace(entry, entry + entry), "'k'", "second time")


def test_limits_of_a_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MAX_HEADER_BYTES", 4096)
    monkeypatch.setattr(gguf, "MAX_STRINGS", 10)
    refuse(kit.make_gguf(metadata={"k": "x" * 5000}), "beyond")
    refuse(kit.make_gguf(metadata={"k": ["x"] * 11}), "11 texts")


def test_a_file_that_shrinks_under_the_reader() -> None:
    data = kit.llama()
    with pytest.raises(BadGguf, match="became shorter"):
        parse(lambda at, n: data[at : min(at + n, 50)], len(data))


def test_no_tensors_and_empty_tensors() -> None:
    assert kit.read(kit.make_gguf(())).tensors == ()
    got = kit.read(kit.make_gguf([("none", (0, 4), "F32"), ("one", (), "F32")]))
    assert [t.n_bytes for t in got.tensors] == [0, 4]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_read_but_nothing_else(data: st.DataObject) -> None:
    whole = bytearray(kit.make_gguf(TWO, {"tokenizer.ggml.tokens": ["a", "bb"], "n": [1, 2], "s": "text"}))
    header = got_start(bytes(whole))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header - 1))
        whole[at] = data.draw(st.integers(0, 255))
    try:
        got = parse(bytes(whole), len(whole))
    except BadGguf:
        return
    for tensor in got.tensors:
        assert got.data_start <= tensor.offset <= tensor.offset + tensor.n_bytes <= len(whole)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_behind_the_magic(tail: bytes) -> None:
    try:
        parse(b"GGUF\x03\0\0\0" + tail, len(tail) + 8)
    except BadGguf:
        pass


# Facts


def test_facts_of_a_small_model() -> None:
    facts = facts_of(kit.read(kit.llama(3, **{"general.file_type": 15})))
    assert (facts.architecture, facts.quantisation, facts.n_layers, facts.context_train) == ("llama", "Q4_K_M", 3, 4096)
    assert facts.n_params == 3 * 256 * 64
    assert facts.kv_bytes_per_token == 3 * 2 * (16 + 16) * 2
    assert len(facts.vocab) == 32


def test_quantisation_by_weight_where_no_type_is_named() -> None:
    tensors = [("a", (256, 100), "Q6_K"), ("b", (256,), "F32"), ("c", (256,), "F32")]
    assert facts_of(kit.read(kit.make_gguf(tensors))).quantisation == "Q6_K"
    assert facts_of(kit.read(kit.make_gguf(()))).quantisation == ""


def test_heads_per_layer_and_lengths_of_their_own() -> None:
    more = {
        "llama.attention.head_count_kv": [2, 0, 4],
        "llama.attention.key_length": 128,
        "llama.attention.value_length": 64,
    }
    assert facts_of(kit.read(kit.llama(3, **more))).kv_bytes_per_token == (2 + 0 + 4) * (128 + 64) * 2


def test_kv_heads_default_to_heads_and_nonsense_to_zero() -> None:
    metadata = {"llama.block_count": 2, "llama.embedding_length": 64, "llama.attention.head_count": 4}
    assert facts_of(kit.read(kit.make_gguf(metadata=metadata))).kv_bytes_per_token == 2 * 4 * 32 * 2
    for broken in ({"llama.block_count": 2**32 - 1}, {"llama.attention.head_count": 0}, {"llama.block_count": "2"}):
        assert facts_of(kit.read(kit.make_gguf(metadata=metadata | broken))).kv_bytes_per_token == 0


def differ(**draft: object) -> str | None:
    return vocab_difference(kit.read(kit.llama()), kit.read(kit.llama(seed=2, **draft)))


def tokens(n: int, **changed: str) -> list[str]:
    return [changed.get(f"t{i}", f"t{i}") for i in range(n)]


def test_the_first_difference_of_two_vocabularies() -> None:
    assert differ() is None
    assert "kind BPE" in str(differ(**{"tokenizer.ggml.model": "llama"}))
    assert "adds a BOS" in str(differ(**{"tokenizer.ggml.add_bos_token": True}))
    assert "adds a EOS" in str(differ(**{"tokenizer.ggml.add_eos_token": True}))
    assert "300 tokens and the draft 429" in str(differ(**{"tokenizer.ggml.tokens": tokens(429)}))
    assert differ(**{"tokenizer.ggml.tokens": tokens(428)}) is None
    text = str(differ(**{"tokenizer.ggml.tokens": tokens(300, t7="seven", t9="nine")}))
    assert text == "token 7 is 't7' in the target and 'seven' in the draft"
    assert differ(**{"tokenizer.ggml.tokens": tokens(300, t4="four")}) is None
    assert "the draft has no vocabulary" in str(differ(**{"tokenizer.ggml.tokens": (9, struct.pack("<IQ", 8, 0))}))


def test_special_ids_count_only_where_they_are_added() -> None:
    assert differ(**{"tokenizer.ggml.bos_token_id": 9, "tokenizer.ggml.eos_token_id": 9}) is None
    adds = {"tokenizer.ggml.add_bos_token": True}
    target = kit.read(kit.llama(**adds))
    draft = kit.read(kit.llama(**adds, **{"tokenizer.ggml.bos_token_id": 9}))
    assert vocab_difference(target, draft) == "BOS is token 1 in the target and token 9 in the draft"


def test_defaults_of_the_engine() -> None:
    plain = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens(30)}
    spm = vocabulary_of(kit.read(kit.make_gguf(metadata=plain)))
    assert (spm.kind, spm.bos, spm.eos, spm.add_bos, spm.add_eos) == ("SPM", 1, 2, True, False)
    pre = vocabulary_of(kit.read(kit.llama(**{"tokenizer.ggml.pre": "llama-bpe"})))
    assert (pre.add_bos, pre.bos) == (True, 1)
    beyond = vocabulary_of(kit.read(kit.llama(**{"tokenizer.ggml.bos_token_id": 300, "tokenizer.ggml.model": "none"})))
    assert beyond.bos == -1


def test_vocabulary_digest_sees_every_token_and_special_id() -> None:
    base = facts_of(kit.read(kit.llama())).vocab
    assert facts_of(kit.read(kit.llama(seed=5))).vocab == base
    for change in (
        {"tokenizer.ggml.tokens": tokens(300, t299="x")},
        {"tokenizer.ggml.tokens": tokens(299)},
        {"tokenizer.ggml.eos_token_id": 3},
        {"tokenizer.ggml.add_bos_token": True},
        {"tokenizer.ggml.model": "t5"},
    ):
        assert facts_of(kit.read(kit.llama(**change))).vocab != base
    assert facts_of(kit.read(kit.make_gguf())).vocab == ""


@pytest.mark.engine
def test_a_real_model(demo_model: Path) -> None:
    size = demo_model.stat().st_size
    with demo_model.open("rb") as file:

        def read(at: int, n: int) -> bytes:
            file.seek(at)
            return file.read(n)

        got = parse(read, size)
        file.seek(0)
        assert parse(file.read(got.data_start), size) == got
    last = got.tensors[-1]
    assert last.offset + last.n_bytes == size
    facts = facts_of(got)
    assert (facts.architecture, facts.quantisation, facts.n_params) == ("llama", "Q4_1", 134_515_008)
    assert (facts.n_layers, facts.context_train, facts.kv_bytes_per_token) == (30, 8192, 30 * 3 * 128 * 2)
    assert len(got.tokens) == 49152
    for cut in (3, 100, 5000, got.data_start - 1, got.data_start + 5, size - 1):
        with demo_model.open("rb") as file:
            head = file.read(min(cut, got.data_start))
        refuse(head, size=cut)
