from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.ids import ClusterId, ModelId, NodeName, SafeName
from tightwad_agent.mesh import advert as adverts
from tightwad_agent.mesh.advert import Advert, ShortDevice, ShortModel, cluster_hash, of_row, parse, to_txt
from tightwad_agent.testing import node_id
from tightwad_agent.wire.rows import Capabilities, Device, EngineInfo, HeldModel, NodeRow, Role

GIB = 1 << 30
CLUSTER = ClusterId.of_ca_key(b"k" * 32)
ATTIC = Advert(
    cluster=cluster_hash(CLUSTER),
    node=node_id("attic"),
    port=8089,
    name=NodeName("attic"),
    role=Role.AUTHORITY,
    engine="b11434",
    devices=(ShortDevice("CUDA0", 24 * GIB), ShortDevice("CUDA1", 8 * GIB)),
    memory_total=63 * GIB,
    models=(ShortModel(SafeName("big.gguf"), 100), ShortModel(SafeName("x (1).gguf"), 40)),
)


def wire(txt: dict[str, str]) -> dict[bytes, bytes | None]:
    return {k.encode(): v.encode() for k, v in txt.items()}


def record_size(txt: dict[str, str]) -> int:
    return sum(1 + len(f"{k}={v}".encode()) for k, v in txt.items())


def test_the_record_as_it_is_announced() -> None:
    assert to_txt(ATTIC) == {
        "v": "1",
        "c": CLUSTER[:16],
        "id": node_id("attic"),
        "p": "8089",
        "n": "attic",
        "r": "authority",
        "e": "b11434",
        "mem": "63G",
        "d": "CUDA0:24G;CUDA1:8192M",
        "m": "big.gguf:100;x (1).gguf:40",
    }
    assert parse(wire(to_txt(ATTIC))) == (ATTIC, "")


def test_a_record_without_optional_keys_is_read_and_unknown_keys_are_ignored() -> None:
    txt = wire({"v": "1", "c": ATTIC.cluster, "id": ATTIC.node, "p": "1", "n": "a", "r": "node", "mem": "0M"})
    assert parse(txt | {b"future": b"\xff\x00", b"flag": None}) == (
        Advert(cluster=ATTIC.cluster, node=ATTIC.node, port=1, name=NodeName("a")),
        "",
    )


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("v", b"2", "announces version '2', this agent reads 1"),
        ("v", None, "announces version ''"),
        ("c", b"short", "'short' is not a cluster"),
        ("c", b"A" * 16, "is not a cluster"),
        ("id", b"nobody", "'nobody' is not a NodeId"),
        ("p", b"0", "'0' is not a number from 1 to 65535"),
        ("p", b"65536", "is not a number"),
        ("p", b"+1", "is not a number"),
        ("p", "٣".encode(), "is not a number"),
        ("p", b"9" * 400, "is not a number"),
        ("n", b"../../etc", "is not a NodeName"),
        ("n", b"a\nb", "is not a NodeName"),
        ("r", b"root", "'root' is not a valid Role"),
        ("e", b"b1; rm", "is not an engine build"),
        ("e", b"\xff", "codec can't decode"),
        ("mem", b"63", "'63' is not a size"),
        ("mem", b"-1G", "is not a size"),
        ("mem", b"9999999999G", "is not a size"),
        ("d", b"CUDA0", "is not a device"),
        ("d", b"a b:1G", "'a b' is not a device"),
        ("d", b";;", "is not a device"),
        ("m", b"../x:100", "is not a SafeName"),
        ("m", b"x.gguf:101", "is not a number"),
        ("m", b"x.gguf:", "is not a number"),
        ("m", b"+0", "is not a number"),
        ("m", b"+1;x.gguf:1", "is not a"),
    ],
)
def test_anything_else_is_refused_with_the_reason(key: str, value: bytes | None, reason: str) -> None:
    advert, why = parse(wire(to_txt(ATTIC)) | {key.encode(): value})
    assert advert is None
    assert reason in why


def test_an_oversized_record_is_refused_unread() -> None:
    advert, why = parse(wire(to_txt(ATTIC)) | {b"pad": b"x" * 1000})
    assert advert is None
    assert "at most 1000 are read" in why


def test_lists_are_cut_with_a_count_of_what_is_left_out() -> None:
    models = tuple(ShortModel(SafeName(f"model-number-{i:03}.gguf"), 100) for i in range(100))
    devices = tuple(ShortDevice(f"CUDA{i}", 24 * GIB) for i in range(100))
    txt = to_txt(replace(ATTIC, models=models, devices=devices, n_more_devices=5))
    read, _ = parse(wire(txt))
    assert read is not None
    assert read.models == models[: len(read.models)]
    assert len(read.models) + read.n_more_models == 100
    assert len(read.models) > 8
    assert len(read.devices) + read.n_more_devices == 105
    assert txt["m"].endswith(f";+{read.n_more_models}")


def test_a_name_too_long_for_the_record_is_counted_and_the_next_one_kept() -> None:
    long, short = ShortModel(SafeName("m" * 200), 100), ShortModel(SafeName("s.gguf"), 10)
    assert to_txt(replace(ATTIC, models=(long, long, short)))["m"] == f"{'m' * 200}:100;s.gguf:10;+1"
    assert to_txt(replace(ATTIC, models=(), n_more_models=3))["m"] == "+3"


def test_a_row_in_short() -> None:
    facts = Capabilities(
        memory_total=63 * GIB,
        devices=(Device("CUDA0", "RTX", 24 * GIB - 5_000_000, 1), Device("Vulkan 0 ü", "", 500 << 20, 1)),
        engine=EngineInfo(build="b11434"),
    )
    models = (
        HeldModel(ModelId("0" * 64), SafeName("half.gguf"), 1000, 599),
        HeldModel(ModelId("1" * 64), SafeName("small.gguf"), 10, 10),
        HeldModel(ModelId("2" * 64), SafeName("big.gguf"), 2000, 2000),
    )
    row = NodeRow(
        node_id("attic"), NodeName("attic"), Role.NODE, 1, 1, 0, True, 0, 8088, capabilities=facts, models=models
    )
    txt = to_txt(of_row(row, CLUSTER, 7000))
    assert txt["d"] == "CUDA0:24G;Vulkan-0:500M"
    assert txt["m"] == "big.gguf:100;small.gguf:100;half.gguf:50"
    assert (txt["e"], txt["p"], txt["c"]) == ("b11434", "7000", CLUSTER[:16])
    broken = replace(row, capabilities=replace(facts, engine=EngineInfo(build="b1", problem="SIGILL")))
    assert of_row(broken, CLUSTER, 7000).engine == ""


@pytest.mark.parametrize(
    ("have", "size", "percent"), [(0, 10, 0), (9, 100, 0), (99, 100, 90), (100, 100, 100), (0, 0, 100)]
)
def test_completeness_is_rounded_down_to_tens(have: int, size: int, percent: int) -> None:
    assert adverts._tens(have, size) == percent


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9 ._+@()\[\],=-]{0,199}", fullmatch=True).filter(SafeName.is_valid)
sizes = st.integers(0, 1 << 50)
any_advert = st.builds(
    Advert,
    cluster=st.just(ATTIC.cluster),
    node=st.just(ATTIC.node),
    port=st.integers(1, 65535),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True).map(NodeName),
    role=st.sampled_from(Role),
    engine=st.text(max_size=80).map(adverts._label),
    devices=st.lists(st.builds(ShortDevice, st.text(max_size=64).map(adverts._label), sizes), max_size=64).map(tuple),
    n_more_devices=st.integers(0, 10),
    memory_total=sizes,
    models=st.lists(st.builds(ShortModel, names.map(SafeName), st.integers(0, 100)), max_size=40).map(tuple),
    n_more_models=st.integers(0, 10),
)


@given(any_advert)
def test_every_advert_fits_its_record_and_reads_back_as_the_same_record(advert: Advert) -> None:
    txt = to_txt(advert)
    assert all(len(f"{k}={v}".encode()) <= 255 for k, v in txt.items())
    assert record_size(txt) <= adverts.MAX_RECORD
    read, why = parse(wire(txt))
    assert read is not None, why
    assert to_txt(read) == txt
    assert abs(read.memory_total - advert.memory_total) <= max(1 << 20, advert.memory_total // 15)


@given(
    st.dictionaries(
        st.one_of(st.sampled_from([k.encode() for k in to_txt(ATTIC)]), st.binary(max_size=9)),
        st.one_of(st.none(), st.binary(max_size=255)),
        max_size=12,
    )
)
def test_no_bytes_raise(changes: dict[bytes, bytes | None]) -> None:
    advert, why = parse(wire(to_txt(ATTIC)) | changes)
    assert (advert is None) == bool(why)
    if advert is not None:
        assert parse(wire(to_txt(advert)))[0] is not None


@given(st.integers(0, 9), st.integers(0, 80), st.integers(0, 255))
def test_one_changed_byte_gives_a_valid_advert_or_a_reason(which: int, at: int, byte: int) -> None:
    txt = wire(to_txt(ATTIC))
    key = list(txt)[which]
    value = bytearray(txt[key] or b"")
    if at < len(value):
        value[at] = byte
    advert, why = parse(txt | {key: bytes(value)})
    assert (advert is None) == bool(why)
