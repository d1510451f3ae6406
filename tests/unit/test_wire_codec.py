from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.errors import ProtocolError
from tightwad_agent.ids import Address, Epoch, ModelId, NodeId, NodeName, SafeName
from tightwad_agent.testing import node_id
from tightwad_agent.wire import codec
from tightwad_agent.wire.codec import Codec, Max, Mismatch, from_plain, pack, to_plain, unpack
from tightwad_agent.wire.rows import (
    Capabilities,
    Device,
    EngineInfo,
    Fetching,
    HeldModel,
    ModelFacts,
    NodeRow,
    Role,
    ServeRecord,
    Stamp,
    Want,
)

VECTORS = {
    v["name"]: bytes.fromhex(v["wire"])
    for v in json.loads((Path(__file__).parents[1] / "vectors" / "node_row.json").read_text())
}

FULL = NodeRow(
    node_id("attic"),
    NodeName("attic"),
    Role.AUTHORITY,
    incarnation=3,
    version=41,
    joined_at=1766000000,
    eligible=True,
    klass=7,
    endpoint_port=8088,
    addresses=(Address("192.168.1.10", 8089), Address("fd00:1::10", 8089)),
    capabilities=Capabilities(
        "linux-x86_64",
        "AMD Ryzen 9 7950X",
        16,
        67430879232,
        51539607552,
        1000204886016,
        (Device("CUDA0", "NVIDIA GeForce RTX 4090", 25757220864, 25000000000),),
        EngineInfo("b11434", "ab" * 32, "7.0.0"),
    ),
    models=(
        HeldModel(
            ModelId("0f" * 32),
            SafeName("SmolLM2-135M-Instruct.Q4_1.gguf"),
            98_000_000,
            49_000_000,
            ModelFacts("llama", "Q4_1", 134515008, 30, 8192, 23040, "0123456789abcdef"),
            "5c" * 64,
        ),
    ),
    note="loading",
    fetching=(Fetching("6d" * 32, 1766000500, 1 << 30, 40 << 30),),
)
LEAST = NodeRow(node_id("shed"), NodeName("shed"), Role.NODE, 1, 0, 1766000001, False, 0, 8088)


class Colour(StrEnum):
    RED = "red"


class Pair(NamedTuple):
    left: int
    right: str


@dataclass(frozen=True)
class Inner:
    n: int
    text: Annotated[str, Max(5)] = ""


@dataclass(frozen=True)
class Everything:
    flag: bool
    n: int
    x: float
    text: Annotated[str, Max(10)]
    data: Annotated[bytes, Max(4)]
    maybe: Annotated[int, Max(9)] | None
    many: Annotated[tuple[Inner, ...], Max(2)]
    fixed: tuple[int, str]
    pair: Pair
    table: Annotated[dict[str, int], Max(2)]
    colour: Colour
    node: NodeId
    where: Address
    later: int = 7


WHOLE = Everything(
    True, -5, 1.5, "text", b"data", 9, (Inner(1), Inner(2, "two")), (1, "x"), Pair(1, "r"), {"a": 1}, Colour.RED,
    node_id("n"), Address("10.0.0.1", 1), 8,
)  # fmt: skip
TALK = Codec("talk", {1: Everything, 2: Inner})


def plain_of(value: Any = WHOLE, **changes: Any) -> list[Any]:
    """The plain form with some fields replaced by name."""
    plain = to_plain(value)
    names = list(value.__dataclass_fields__)
    for name, to in changes.items():
        plain[names.index(name)] = to
    return plain


def test_every_kind_of_field_comes_back_as_it_went() -> None:
    back = TALK.decode(TALK.encode(WHOLE))
    assert back == WHOLE
    assert type(back.node) is NodeId
    assert type(back.colour) is Colour
    assert type(back.where) is Address
    assert type(back.pair) is Pair
    assert type(back.fixed) is tuple


def test_an_integer_is_a_float_but_not_the_other_way() -> None:
    assert type(from_plain(Everything, plain_of(x=3)).x) is float
    with pytest.raises(Mismatch, match=r"\.n: expected int, got float"):
        from_plain(Everything, plain_of(n=3.0))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("flag", 1, "expected bool, got int"),
        ("flag", None, "expected bool"),
        ("n", True, "expected int, got bool"),
        ("n", 2**63, "out of range"),
        ("n", -(2**63) - 1, "out of range"),
        ("n", "1", "expected int"),
        ("x", math.nan, "not a finite number"),
        ("x", math.inf, "not a finite number"),
        ("x", True, "expected float, got bool"),
        ("x", 10**400, "number too large"),
        ("text", "x" * 11, "11 long, at most 10"),
        ("text", b"bytes", "expected str, got bytes"),
        ("data", "text", "expected bytes, got str"),
        ("data", b"12345", "5 long, at most 4"),
        ("maybe", 10, "10 is out of range"),
        ("maybe", "9", "expected int"),
        ("many", [[1], [2], [3]], "3 items, at most 2"),
        ("many", {"0": [1]}, "expected a list, got dict"),
        ("many", [[1, "toolong"]], "[0].text: 7 long, at most 5"),
        ("many", [[]], "[0]: 0 fields, at least 1 expected"),
        ("many", [[1, "x", *range(33)]], "[0]: 35 items, at most 34"),
        ("many", [5], "[0]: expected a list, got int"),
        ("fixed", [1], "1 items, expected 2"),
        ("fixed", [1, "x", 2], "3 items, at most 2"),
        ("fixed", ["x", 1], "[0]: expected int"),
        ("pair", [1, 2], "[1]: expected str"),
        ("table", {"a": 1, "b": 2, "c": 3}, "at most 2 entries"),
        ("table", {"a": "b"}, ".a: expected int"),
        ("table", [["a", 1]], "expected a map"),
        ("table", {1: 1}, "expected str, got int"),
        ("colour", "blue", "'blue' is not a Colour"),
        ("colour", None, "expected Colour, got NoneType"),
        ("colour", [["red"]], "expected Colour, got list"),
        ("node", "short", "'short' is not a NodeId"),
        ("node", 5, "5 is not a NodeId"),
        ("node", b"a" * 52, "expected NodeId, got bytes"),
        ("where", ["10.0.0.1", 0], "is not an address"),
        ("where", ["10.0.0.1", 65536], "is not an address"),
        ("where", ["10.0.0.1; rm -rf /", 80], "is not an address"),
        ("where", ["x" * 4000, 80], "is not an address"),
    ],
)
def test_a_wrong_field_is_refused_by_its_path(field: str, value: Any, said: str) -> None:
    with pytest.raises(Mismatch) as caught:
        from_plain(Everything, plain_of(**{field: value}))
    assert str(caught.value).startswith(f".{field}")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300


def test_extremes_that_fit_are_taken() -> None:
    for n in (2**63 - 1, -(2**63)):
        assert from_plain(Everything, plain_of(n=n)).n == n
    assert from_plain(Everything, plain_of(maybe=None)).maybe is None
    assert from_plain(Everything, plain_of(maybe=-10)).maybe == -10


def test_default_bounds_hold_where_none_is_given() -> None:
    @dataclass(frozen=True)
    class Loose:
        text: str = ""
        data: bytes = b""
        items: tuple[int, ...] = ()
        table: dict[str, int] | None = None

    assert len(from_plain(Loose, ["x" * codec.MAX_STR, b"x" * codec.MAX_BYTES, [0] * codec.MAX_ITEMS]).items) == 1024
    for bad in (
        ["x" * 4097],
        ["", b"x" * 65537],
        ["", b"", [0] * 1025],
        ["", b"", [], {str(i): 0 for i in range(1025)}],
    ):
        with pytest.raises(Mismatch):
            from_plain(Loose, bad)
    with pytest.raises(Mismatch):
        from_plain(Loose, ["", b"", [], {"k" * 4097: 0}])


@pytest.mark.parametrize("kind", [complex, str | int, list[int], dict[int, int], object])
def test_a_message_class_with_an_impossible_field_is_a_bug_found_at_once(kind: Any) -> None:
    with pytest.raises(TypeError):
        from_plain(kind, [])


# Versions


def test_fields_a_newer_node_added_are_ignored_up_to_a_bound() -> None:
    plain = to_plain(WHOLE)
    assert from_plain(Everything, [*plain, "new", {"x": [1]}]) == WHOLE
    assert from_plain(Everything, [*plain, *[0] * codec.MAX_EXTRA_FIELDS]) == WHOLE
    with pytest.raises(Mismatch, match="items, at most"):
        from_plain(Everything, [*plain, *[0] * (codec.MAX_EXTRA_FIELDS + 1)])


def test_optional_fields_an_older_node_did_not_send_are_filled() -> None:
    assert from_plain(Everything, to_plain(WHOLE)[:-1]) == replace(WHOLE, later=7)
    with pytest.raises(Mismatch, match="12 fields, at least 13 expected"):
        from_plain(Everything, to_plain(WHOLE)[:-2])


@pytest.mark.parametrize(("name", "row"), [("full", FULL), ("least", LEAST)])
def test_golden_rows(name: str, row: NodeRow) -> None:
    assert pack(to_plain(row)) == VECTORS[name]
    assert from_plain(NodeRow, unpack(VECTORS[name])) == row


@pytest.mark.parametrize("name", ["least, from an older node", "least, from a newer node"])
def test_golden_rows_of_other_versions(name: str) -> None:
    assert from_plain(NodeRow, unpack(VECTORS[name])) == LEAST


def test_a_golden_row_from_before_sources_were_told() -> None:
    (model,) = FULL.models
    old = replace(FULL, models=(replace(model, source=""),), fetching=())
    assert from_plain(NodeRow, unpack(VECTORS["full, without sources"])) == old


def test_the_other_shared_records_come_back() -> None:
    for value in (
        ServeRecord(Want.PINNED, ModelId("0" * 64), "off", 4096, 2, (7, 1, node_id("a"))),
        ServeRecord(),
        Stamp(Epoch(4, node_id("a")), node_id("b")),
        Stamp(Epoch(0, ""), None),
    ):
        assert from_plain(type(value), unpack(pack(to_plain(value)))) == value


# Conversations


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ([], "must be a list that begins with its tag"),
        ({}, "must be a list"),
        (5, "must be a list"),
        (None, "must be a list"),
        (["1"], "must be a list that begins with its tag"),
        ([True, 1], "must be a list that begins with its tag"),
        ([99], "unknown message 99"),
        ([-1], "unknown message -1"),
        ([2], "Inner: 0 fields, at least 1 expected"),
        ([2, "x"], "Inner.n: expected int, got str"),
    ],
)
def test_what_is_no_message_is_a_protocol_error(plain: Any, said: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        TALK.decode(pack(plain))
    assert caught.value.message.startswith("talk: ")
    assert said in caught.value.message


def test_sending_what_the_conversation_does_not_know_is_a_bug() -> None:
    with pytest.raises(KeyError):
        TALK.encode(LEAST)


# msgpack


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x92\x01",
        b"\x01\x02",
        b"\xa2\xff\xfe",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x81\x01\x01",
        b"\x81\xc4\x01a\x01",
        b"\x81\x90\x01",
        b"\x81\xc0\x01",
        b"\xd4\x05a",
        b"\xc7\x00\x05",
        b"\xd6\xff\x00\x00\x00\x01",
        b"\xc7\x0c\xff" + b"\xff" * 12,
        b"\xc7\x00\xff",
        b"\x91" * 5000 + b"\xc0",
        b"\x81\xa1a" * 5000 + b"\xc0",
    ],
)
def test_bytes_that_are_not_plain_values_are_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="not msgpack"):
        unpack(data)


@pytest.mark.parametrize("claim", [2**32 - 1, (1 << 20) - 1])
def test_nested_arrays_that_claim_more_than_came_are_refused(claim: int) -> None:
    bomb = (b"\xdd" + claim.to_bytes(4, "big")) * 1000
    with pytest.raises(ProtocolError):
        unpack(bomb + b"\xc0" * ((1 << 20) - len(bomb)))


@pytest.mark.parametrize(
    "kind", [Everything, NodeRow, NodeId, Colour, Address, str, bytes, int, tuple[int, ...], dict[str, int]]
)
def test_deep_nesting_where_a_value_was_due_is_a_mismatch_not_a_stack_overflow(kind: Any) -> None:
    deep = unpack(b"\x91" * 1000 + b"\xc0")
    with pytest.raises(Mismatch):
        from_plain(kind, deep)
    with pytest.raises(Mismatch):
        from_plain(Everything, plain_of(node=deep))
    with pytest.raises(ValueError, match="is not a NodeId"):
        NodeId(deep)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@given(values)
def test_plain_values_survive_msgpack(value: Any) -> None:
    back = unpack(pack(value))
    assert msgpack.packb(back) == msgpack.packb(value)


@given(values)
def test_any_plain_value_is_a_message_or_a_protocol_error(value: Any) -> None:
    try:
        TALK.decode(pack([1, value] if not isinstance(value, list) else [1, *value]))
    except ProtocolError:
        pass


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    try:
        TALK.decode(data)
    except ProtocolError:
        pass


@given(st.integers(0, 10_000), st.integers(0, 255), st.integers(0, 10_000))
def test_a_changed_and_cut_row_is_a_row_or_a_protocol_error(at: int, byte: int, cut: int) -> None:
    rows = Codec("rows", {1: NodeRow})
    wire = bytearray(rows.encode(FULL))
    wire[at % len(wire)] = byte
    for data in (bytes(wire), bytes(wire[: cut % len(wire)])):
        try:
            row = rows.decode(data)
        except ProtocolError:
            continue
        assert rows.decode(rows.encode(row)) == row
        assert all(0 < a.port < 65536 for a in row.addresses)


@given(
    st.builds(
        Everything,
        flag=st.booleans(),
        n=st.integers(-(2**63), 2**63 - 1),
        x=st.floats(allow_nan=False, allow_infinity=False),
        text=st.text(max_size=10, alphabet=st.characters(exclude_categories=["Cs"])),
        data=st.binary(max_size=4),
        maybe=st.none() | st.integers(-10, 9),
        many=st.lists(st.builds(Inner, st.integers(0, 9)), max_size=2).map(tuple),
        fixed=st.tuples(st.integers(0, 9), st.just("x")),
        pair=st.builds(Pair, st.integers(0, 9), st.just("r")),
        table=st.dictionaries(st.sampled_from(["a", "b"]), st.integers(0, 9)),
        colour=st.just(Colour.RED),
        node=st.just(node_id("n")),
        where=st.builds(Address, st.ip_addresses().map(str), st.integers(1, 65535)),
        later=st.integers(0, 9),
    )
)
def test_every_message_comes_back(message: Everything) -> None:
    assert TALK.decode(TALK.encode(message)) == message


def test_sizes_that_a_peer_sends_are_not_negative() -> None:
    model, name = "0" * 64, "m.gguf"
    assert from_plain(HeldModel, [model, name, 0, 0]).complete
    for bad in ([model, name, -1, 0], [model, name, 1, -1]):
        with pytest.raises(Mismatch, match="less than zero"):
            from_plain(HeldModel, bad)


@dataclass(frozen=True, slots=True)
class Grown:
    """A message that got fields later."""

    a: int
    b: int = 1
    c: int = field(default=2, metadata=codec.OMITTED)
    d: tuple[int, ...] = field(default=(), metadata=codec.OMITTED)


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        (Grown(0), [0, 1]),
        (Grown(0, 5), [0, 5]),
        (Grown(0, 1, 3), [0, 1, 3]),
        (Grown(0, 1, 2, (4,)), [0, 1, 2, [4]]),
        (Grown(0, 1, 3, (4,)), [0, 1, 3, [4]]),
    ],
)
def test_what_has_its_default_at_the_end_is_left_out(message: Grown, plain: list[Any]) -> None:
    assert to_plain(message) == plain
    assert from_plain(Grown, plain) == message


def test_a_row_and_a_record_with_what_they_got_later_come_back() -> None:
    grown = replace(FULL, capabilities=replace(FULL.capabilities, held=5))
    assert from_plain(type(FULL), to_plain(grown)) == grown
    record = ServeRecord(allow_smaller=True)
    assert from_plain(ServeRecord, to_plain(record)) == record
