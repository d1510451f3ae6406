"""Manifests: where they cut, what they refuse, and what their root covers."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import pytest
import swarm_kit as kit
from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent.errors import BadManifest
from tightwad_agent.ids import ModelId, SafeName
from tightwad_agent.swarm import names
from tightwad_agent.swarm.gguf import Gguf, Tensor
from tightwad_agent.swarm.manifest import MAX_PIECE_BYTES, MAX_SIZE, PIECE_BYTES, Manifest, Piece, cut, decode
from tightwad_agent.wire.codec import pack
from tightwad_agent.wire.rows import ModelFacts
from tightwad_agent.wire.swarm import MAX_MANIFEST_BYTES, MAX_PIECES

MIB = 1 << 20
HALF = MIB // 2
H = bytes(range(32))
NAME = SafeName("m.gguf")


def layout(*sizes: int, header: int = 1000, tail: int = 0) -> tuple[int, Gguf]:
    """A header with tensors of these many bytes."""
    at, tensors = header, []
    for i, n in enumerate(sizes):
        tensors.append(Tensor(f"t{i}", (n,), "I8", at, n))
        at += n
    return at + tail, Gguf(3, at + tail, 32, {}, (), tuple(tensors), header)


def manifest(*lengths: int, size: int | None = None) -> Manifest:
    at, pieces = 0, []
    for n in lengths:
        pieces.append(Piece(at, n, hashlib.sha256(b"%d" % at).digest()))
        at += n
    return Manifest(NAME, at if size is None else size, H, tuple(pieces))


# Where to cut


def test_header_large_tensors_and_glued_small_ones() -> None:
    size, gguf = layout(100, 200, 40 * MIB, 300, 2 * MIB, 400, 500)
    assert cut(size, gguf) == (
        (0, 1000),
        (1000, 300),
        *((1300 + i * HALF, HALF) for i in range(80)),
        (1300 + 40 * MIB, 300),
        *((1600 + i * HALF, HALF) for i in range(80, 84)),
        (1600 + 42 * MIB, 900),
    )


@pytest.mark.parametrize(
    ("n_weights", "kib"),
    [
        (10**7, 512),
        (135 * 10**6, 512),
        (500 * 10**6, 1024),
        (1100 * 10**6, 4096),
        (3 * 10**9, 8192),
        (4 << 30, 16384),
        (70 * 10**9, 16384),
    ],
)
def test_small_models_have_short_pieces_and_all_quantisations_the_same(n_weights: int, kib: int) -> None:
    for bits in (4, 16, 32):
        n_bytes = n_weights * bits // 8
        tensors = (Tensor("t", (n_weights,), "F32", 1000, n_bytes),)
        gguf = Gguf(3, 1000 + n_bytes, 32, {}, (), tensors, 1000)
        longest = max(n for _, n in cut(1000 + n_bytes, gguf))
        assert longest == kib << 10


def test_runs_of_small_tensors_end_at_the_piece_size() -> None:
    size, gguf = layout(*[MIB - 1] * 40, 1024 * MIB)
    spans = cut(size, gguf)
    assert [n // MIB for _, n in spans[1:12]] == [3] * 10 + [4]
    assert all(n <= 4 * MIB for _, n in spans)


def test_bytes_behind_the_last_tensor_belong_to_it_and_no_gguf_is_cut_evenly() -> None:
    size, gguf = layout(100, tail=20 * MIB)
    assert cut(size, gguf)[1:] == (*((1000 + i * HALF, HALF) for i in range(40)), (1000 + 20 * MIB, 100))
    assert cut(33 * MIB + 1, None) == (*((i * HALF, HALF) for i in range(66)), (33 * MIB, 1))
    assert cut(5, kit.read(kit.make_gguf(()))) == ((0, 5),)


@pytest.mark.parametrize(("mib", "large_kib"), [(1, 64), (100, 64), (129, 128), (540, 512), (1024, 1024), (9000, 1024)])
def test_what_counts_as_a_small_tensor_depends_on_the_model(mib: int, large_kib: int) -> None:
    """Roots of models of 1 GiB and more do not depend on it."""
    size, gguf = layout(large_kib << 10, (large_kib << 10) - 1, 5, mib * MIB)
    assert [n for _, n in cut(size, gguf)[1:3]] == [large_kib << 10, (large_kib << 10) + 4]


def test_a_longer_header_moves_nothing_else() -> None:
    sizes = (100, 200, 40 * MIB, 300, 2 * MIB)
    short, long = cut(*layout(*sizes)), cut(*layout(*sizes, header=5000))
    assert [n for _, n in short[1:]] == [n for _, n in long[1:]]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 4096, MIB - 1, MIB, 5 * MIB, 16 * MIB, 70 * MIB]), max_size=40), st.integers(0, 99)
)
def test_pieces_cover_the_file_once(sizes: list[int], tail: int) -> None:
    size, gguf = layout(*sizes, tail=tail)
    spans = cut(size, gguf)
    at = 0
    for offset, length in spans:
        assert offset == at
        assert 0 < length <= MAX_PIECE_BYTES
        at += length
    assert at == size
    starts = {offset for offset, _ in spans}
    for tensor in gguf.tensors:
        if tensor.n_bytes >= MIB:
            assert tensor.offset in starts, "a large tensor begins a piece"


def test_very_large_files_get_larger_pieces_and_a_limit() -> None:
    assert len(cut(MAX_PIECES * PIECE_BYTES, None)) == MAX_PIECES
    assert cut(MAX_PIECES * PIECE_BYTES + 1, None)[0] == (0, 2 * PIECE_BYTES)
    assert len(cut(MAX_SIZE, None)) == MAX_PIECES
    for size in (0, -1, MAX_SIZE + 1):
        with pytest.raises(BadManifest):
            cut(size, None)
    size, gguf = layout(*([1, MIB] * 40_000), header=24)
    assert len(cut(size, gguf)) <= MAX_PIECES


# Rules


def refuse(word: str, size: int, *pieces: tuple[int, int], sha: bytes = H, piece_sha: bytes = H) -> None:
    with pytest.raises(BadManifest, match=word):
        Manifest(NAME, size, sha, tuple(Piece(o, n, piece_sha) for o, n in pieces))
    if len(sha) == len(piece_sha) == 32 and all(0 <= o < 2**64 and 0 <= n < 2**32 for o, n in pieces) and size >= 0:
        good = manifest(5).encode()
        head = good[: good.index(b"tightwad manifest")]
        body = struct.pack("!Q32sI", size, sha, len(pieces))
        body += b"".join(struct.pack("!QI32s", o, n, piece_sha) for o, n in pieces)
        with pytest.raises(BadManifest, match=word):
            decode(head + b"tightwad manifest 1\n" + body)


def test_each_rule() -> None:
    refuse("overlaps", 20, (0, 10), (9, 11))
    refuse("overlaps", 20, (0, 10), (0, 10))
    refuse("gap", 21, (0, 10), (11, 10))
    refuse("gap", 11, (1, 10))
    refuse("at 10, expected 0", 20, (10, 10), (0, 10))
    refuse("beyond", 19, (0, 10), (10, 10))
    refuse("end at 20, the file at 21", 21, (0, 10), (10, 10))
    refuse("0 bytes", 10, (0, 10), (10, 0))
    refuse("expected 1 to", MAX_PIECE_BYTES + 1, (0, MAX_PIECE_BYTES + 1))
    refuse("size of", 2**63, (0, 10))
    refuse("size of", 2**64 - 1, (0, 10))
    refuse("size of", 0)
    refuse("0 pieces", 10)
    refuse("size of", -1, (0, 10))
    refuse("has -1 bytes", 10, (0, -1))
    refuse("file hash of 31", 10, (0, 10), sha=H[:31])
    refuse("hash of 33", 10, (0, 10), piece_sha=H + b"x")


def test_too_many_pieces() -> None:
    many = tuple(Piece(i, 1, H) for i in range(MAX_PIECES + 1))
    with pytest.raises(BadManifest, match="65537 pieces"):
        Manifest(NAME, len(many), H, many)
    most = Manifest(NAME, MAX_PIECES, H, many[:-1])
    assert len(most.encode()) < MAX_MANIFEST_BYTES
    assert decode(most.encode()) == most


@pytest.mark.parametrize(
    "name",
    ["../up.gguf", "/etc/passwd", "a\0b", "a/b", "..", "", "c:\\x", "con.gguf", "x" * 300, "a\n", ".hidden", b"x", 7],
)
def test_names_that_are_no_names(name: object) -> None:
    data = manifest(5).encode()
    body = data[data.index(b"tightwad manifest") :]
    head = pack([name, [""] * 2])
    with pytest.raises(BadManifest, match=r"head.*name"):
        decode(b"TWM1" + struct.pack("!I", len(head)) + head + body)


# Encoding


def test_round_trip_and_identity() -> None:
    one = replace(manifest(10, 20, 5), facts=ModelFacts("llama", "Q4_0", 7, 2, 10, 4, "ab"))
    assert decode(one.encode()) == one
    assert decode(one.encode(), one.root) == one
    same = replace(one, name=SafeName("other.gguf"), facts=ModelFacts())
    assert same.root == one.root, "neither name nor facts are part of the identity"
    others = {manifest(10, 20, 6).root, manifest(10, 25).root, replace(one, sha256=H[::-1]).root}
    others |= {replace(one, pieces=(*one.pieces[:-1], Piece(30, 5, H))).root}
    assert len(others | {one.root}) == 5
    with pytest.raises(BadManifest, match="not of"):
        decode(one.encode(), ModelId("0" * 64))


def test_the_root_is_a_fixed_function_of_the_bytes() -> None:
    canonical = b"tightwad manifest 1\n" + struct.pack("!Q32sI", 5, H, 1) + struct.pack("!QI32s", 0, 5, H)
    made = Manifest(NAME, 5, H, (Piece(0, 5, H),))
    assert made.canonical == canonical
    assert made.root == hashlib.sha256(canonical).hexdigest()


def test_every_cut_and_every_extra_byte_is_refused() -> None:
    data = manifest(10, 20).encode()
    for n in range(len(data)):
        with pytest.raises(BadManifest):
            decode(data[:n])
    with pytest.raises(BadManifest):
        decode(data + b"\0")
    with pytest.raises(BadManifest, match="at most"):
        decode(data + bytes(MAX_MANIFEST_BYTES))
    with pytest.raises(BadManifest, match="head of"):
        decode(b"TWM1\xff\xff\xff\xff" + data[8:])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_never_pass_for_the_same_model(data: st.DataObject) -> None:
    one = manifest(10, 20)
    raw = bytearray(one.encode())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        got = decode(bytes(raw), one.root)
    except BadManifest:
        return
    assert (got.size, got.sha256, got.pieces) == (one.size, one.sha256, one.pieces)


# Names


@pytest.mark.parametrize(
    ("given_name", "safe"),
    [
        ("model.gguf", "model.gguf"),
        ("/home/x/мой model.gguf", "model.gguf"),
        ("../../etc/passwd", "passwd"),
        ("..", "model.gguf"),
        ("", "model.gguf"),
        ("con.gguf", "model-con.gguf"),
        ("a:b*c?.gguf", "a-b-c-.gguf"),
        ("a\0b\nc.gguf", "a-b-c.gguf"),
        ("x" * 500 + ".gguf", "x" * 200),
    ],
)
def test_safe_names(given_name: str, safe: str) -> None:
    assert names.safe_name(given_name) == safe


@given(st.text(max_size=300))
def test_any_text_becomes_a_safe_name(text: str) -> None:
    assert SafeName.is_valid(names.safe_name(text))


@given(st.lists(st.sampled_from(["a.gguf", "A.GGUF", "a (2).gguf", "b", "b (2)", "x" * 200]), max_size=6))
def test_distinct_names_differ_in_more_than_case(taken: list[str]) -> None:
    for name in (SafeName("a.gguf"), SafeName("b"), SafeName("x" * 200)):
        got = names.distinct(name, taken)
        assert got.casefold() not in {t.casefold() for t in taken}
        assert SafeName.is_valid(got)


def test_distinct_keeps_the_extension() -> None:
    assert names.distinct(SafeName("a.gguf"), ["A.gguf", "a (2).GGUF"]) == "a (3).gguf"
