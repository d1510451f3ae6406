"""Manifests of models in several files: what they refuse, what their root covers, where their pieces are."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import pytest
import swarm_kit as kit
from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent.errors import BadManifest
from tightwad_agent.ids import SafeName
from tightwad_agent.swarm.facts import facts_of
from tightwad_agent.swarm.manifest import (
    MAX_FILES,
    MAX_PIECE_BYTES,
    MAX_SIZE,
    FileHash,
    Manifest,
    Piece,
    cut_files,
    decode,
)
from tightwad_agent.swarm.names import shard_names, shard_of
from tightwad_agent.wire.codec import pack
from tightwad_agent.wire.rows import ModelFacts
from tightwad_agent.wire.swarm import MAX_MANIFEST_BYTES, MAX_PIECES

MAGIC = b"tightwad manifest 2\n"
H = bytes(range(32))
NAME = SafeName("m.gguf")


def pieces_of(*lengths: int) -> tuple[Piece, ...]:
    at, pieces = 0, []
    for n in lengths:
        pieces.append(Piece(at, n, hashlib.sha256(b"%d" % at).digest()))
        at += n
    return tuple(pieces)


def three(**changes: object) -> Manifest:
    files = (FileHash(30, H), FileHash(5, H[::-1]), FileHash(20, H))
    made = Manifest.of_files(NAME, files, pieces_of(10, 20, 5, 20), ModelFacts("llama", "Q4_0", 7))
    return replace(made, **changes)  # type: ignore[arg-type]


def encoded(files: list[tuple[int, bytes]], pieces: list[tuple[int, int]], name: str = "m.gguf") -> bytes:
    head = pack([name])
    body = MAGIC + struct.pack("!I", len(files)) + b"".join(struct.pack("!Q32s", *f) for f in files)
    body += struct.pack("!I", len(pieces)) + b"".join(struct.pack("!QI32s", o, n, H) for o, n in pieces)
    return b"TWM1" + struct.pack("!I", len(head)) + head + body


def test_round_trip_and_the_root_as_a_fixed_function_of_the_bytes() -> None:
    made = three()
    assert decode(made.encode(), made.root) == made
    canonical = MAGIC + struct.pack("!I", 3)
    canonical += struct.pack("!Q32s", 30, H) + struct.pack("!Q32s", 5, H[::-1]) + struct.pack("!Q32s", 20, H)
    canonical += struct.pack("!I", 4) + b"".join(struct.pack("!QI32s", *p) for p in made.pieces)
    assert made.canonical == canonical
    assert made.root == hashlib.sha256(canonical).hexdigest()
    assert (made.size, made.sizes, made.hashes) == (55, (30, 5, 20), (H, H[::-1], H))
    others = {three(name=SafeName("other.gguf")).root, three(facts=ModelFacts()).root}
    assert others == {made.root}, "neither name nor facts are part of the identity"
    moved = Manifest.of_files(NAME, (FileHash(10, H), FileHash(25, H), FileHash(20, H)), made.pieces, made.facts)
    assert moved.root != made.root


def test_places_and_names_of_files() -> None:
    made = three()
    assert [made.place(i) for i in range(4)] == [(0, 0), (0, 10), (1, 0), (2, 0)]
    assert made.file_names == tuple(f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3))
    single = Manifest(NAME, 30, H, pieces_of(10, 20))
    assert [single.place(i) for i in range(2)] == [(0, 0), (0, 10)]
    assert (single.sizes, single.hashes, single.file_names) == ((30,), (H,), (NAME,))


@pytest.mark.parametrize(
    ("files", "pieces", "word"),
    [
        ([(30, H), (25, H)], [(0, 20), (20, 35)], "no piece begins where file 1 does, at 30"),
        ([(30, H), (0, H), (25, H)], [(0, 30), (30, 25)], "file 1 has 0 bytes"),
        ([(30, H)], [(0, 30)], "1 files, expected 2"),
        ([], [(0, 30)], "size of 0"),
        ([], [], "size of 0"),
        ([(30, H), (25, H)], [(0, 30), (30, 26)], "beyond the 55"),
        ([(30, H), (25, H)], [(0, 30), (30, 24)], "end at 54, the file at 55"),
        ([(30, H), (25, H)], [(0, 30), (30, 0), (30, 25)], "has 0 bytes"),
        ([(2**63, H), (2**63, H)], [(0, 30)], "size of"),
        ([(2**64 - 1, H), (1, H)], [(0, 30)], "size of"),
        ([(MAX_SIZE, H), (1, H)], [(0, 30)], "size of"),
        ([(1, H)] * (MAX_FILES + 1), [(i, 1) for i in range(MAX_FILES + 1)], "1025 files"),
    ],
)
def test_each_rule(files: list[tuple[int, bytes]], pieces: list[tuple[int, int]], word: str) -> None:
    with pytest.raises(BadManifest, match=word):
        decode(encoded(files, pieces))


def test_rules_that_no_encoding_can_break() -> None:
    with pytest.raises(BadManifest, match="hash of 31"):
        three(files=(FileHash(30, H[:31]), FileHash(25, H)))
    with pytest.raises(BadManifest, match="have 54 bytes, it has 55"):
        three(files=(FileHash(30, H), FileHash(24, H)))


@pytest.mark.parametrize(
    "name", ["../m.gguf", "/m.gguf", "a/b.gguf", "..", "m\0.gguf", "", "con.gguf", "x" * 190 + ".gguf"]
)
def test_names_from_which_no_names_of_files_can_be_made(name: str) -> None:
    with pytest.raises(BadManifest, match="name"):
        decode(encoded([(30, H), (25, H)], [(0, 30), (30, 25)], name))


def with_address(url: str) -> Manifest:
    data = encoded([(30, H), (25, H)], [(0, 30), (30, 25)])
    head = pack(["m.gguf", [], url])
    return decode(b"TWM1" + struct.pack("!I", len(head)) + head + data[data.index(MAGIC) :])


def test_one_address_stands_for_those_of_all_files() -> None:
    url = "https://example.org/a-00003-of-00004/other-%05d-of-00002.gguf"
    made = with_address(url % 1)
    assert made.origins == (url % 1, url % 2)
    assert decode(made.encode()) == made
    assert with_address(url % 2).origins == made.origins
    assert with_address("").origins == ()


@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00003.gguf", "m-00001-of-00001.gguf", "m-1-of-2.gguf"])
def test_an_address_that_is_not_of_so_many_files(name: str) -> None:
    with pytest.raises(BadManifest, match="origin"):
        with_address(f"https://example.org/{name}")


def test_every_cut_and_every_extra_byte_is_refused() -> None:
    data = three().encode()
    for n in range(len(data)):
        with pytest.raises(BadManifest):
            decode(data[:n])
    with pytest.raises(BadManifest):
        decode(data + b"\0")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_manifests_are_refused_or_other_models(data: st.DataObject) -> None:
    good = three()
    raw = bytearray(good.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        got = decode(bytes(raw))
    except BadManifest:
        return
    assert decode(got.encode()) == got
    assert got.canonical == good.canonical or got.root != good.root


def test_the_largest_fits() -> None:
    files = tuple(FileHash(1, H) for _ in range(MAX_FILES))
    pieces = tuple(Piece(i, 1, H) for i in range(MAX_FILES))
    assert len(Manifest.of_files(NAME, files, pieces, ModelFacts()).encode()) < MAX_MANIFEST_BYTES - MAX_PIECES * 44


# Where to cut


def test_each_file_is_cut_by_its_own_header() -> None:
    one, two = (kit.read(kit.llama(3, seed=i, tensor_kb=256)) for i in (1, 2))
    spans = cut_files([(one.file_size, one), (two.file_size, two)])
    assert spans[0] == spans[1]
    assert [offset for offset, _ in spans[0]] == [0, *(t.offset for t in one.tensors)]
    assert [n for _, n in spans[0]][1:] == [256 << 10] * 3


def test_files_that_cannot_be_cut() -> None:
    for sizes in ([5, 0], [MAX_SIZE, 1], [-1, 7]):
        with pytest.raises(BadManifest, match="cannot be shared"):
            cut_files([(n, None) for n in sizes])
    with pytest.raises(BadManifest, match="needs more than"):
        cut_files([(MAX_SIZE // 2, None), (MAX_SIZE // 2 - MAX_PIECE_BYTES, None), (5, None), (5, None)])
    most = cut_files([(MAX_SIZE // 2, None), (MAX_SIZE // 2, None)])
    assert sum(map(len, most)) == MAX_PIECES


# Names and facts


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("m-00001-of-00003.gguf", ("m.gguf", 1, 3)),
        ("a-b-00002-of-00002.gguf", ("a-b.gguf", 2, 2)),
        ("m-00001-of-00001.gguf", ("m.gguf", 1, 1)),
        ("m-00004-of-00003.gguf", None),
        ("m-00000-of-00003.gguf", None),
        ("m-0001-of-0003.gguf", None),
        ("-00001-of-00003.gguf", None),
        ("m-00001-of-00003.gguf\n", None),
        ("m.gguf", None),
    ],
)
def test_names_of_files(name: str, found: tuple[str, int, int] | None) -> None:
    assert shard_of(name) == found
    if found is not None:
        assert shard_names(SafeName(found[0]), found[2])[found[1] - 1] == name


def test_facts_count_the_tensors_of_all_files() -> None:
    one, two = kit.read(kit.llama(3)), kit.read(kit.llama(2, seed=4))
    assert facts_of(one, two).n_params == facts_of(one).n_params + facts_of(two).n_params
    assert facts_of(one, two).n_layers == 3
