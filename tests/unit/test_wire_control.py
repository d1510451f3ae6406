from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent.errors import ProtocolError
from tightwad_agent.ids import NO_EPOCH, Address, Epoch, ModelId, NodeName, SafeName
from tightwad_agent.testing import node_id
from tightwad_agent.wire import control as wire
from tightwad_agent.wire.codec import Codec, pack, to_plain, unpack
from tightwad_agent.wire.control import CALL, CONTROL, MAX_CALL, MAX_CONTROL, MAX_NODES
from tightwad_agent.wire.frames import encode
from tightwad_agent.wire.rows import (
    MAX_ADDRESSES,
    MAX_DEVICES,
    MAX_FETCHING,
    MAX_MODELS,
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
from tightwad_agent.wire.trust import Denial, Denied, Succession

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "control.json").read_text())

NODE, OTHER = node_id("attic"), node_id("cellar")
EPOCH = Epoch(7, NODE)
ROW = NodeRow(
    NODE,
    NodeName("attic"),
    Role.AUTHORITY,
    incarnation=3,
    version=41,
    joined_at=1766000000,
    eligible=True,
    klass=7,
    endpoint_port=8088,
    addresses=(Address("192.168.1.10", 8089),),
)
MESSAGES: dict[str, tuple[Codec, Any]] = {
    "beat": (CONTROL, wire.Beat(3, b"\x01\x02", 0.25, Stamp(EPOCH, NODE), b"\x03" * 8, 1766000000123456)),
    "beat, nobody coordinates": (CONTROL, wire.Beat(0, b"", 0.0, Stamp(NO_EPOCH, None), b"", 0)),
    "echo": (CONTROL, wire.Echo(1766000000123456)),
    "probe": (CONTROL, wire.Probe()),
    "question": (CONTROL, wire.Question(OTHER, 12.5)),
    "answer": (CONTROL, wire.Answer(OTHER, 12.5, True, 0.75)),
    "rumours": (CONTROL, wire.Rumours((wire.Said(NODE, "alive", 3), wire.Said(OTHER, "suspect", 9)))),
    "rumours, none": (CONTROL, wire.Rumours(())),
    "coordinates": (CONTROL, wire.Coordinates(Stamp(EPOCH, NODE))),
    "precheck": (CONTROL, wire.PreCheck(5)),
    "precheck reply": (CONTROL, wire.PreCheckReply(5, Stamp(EPOCH, None))),
    "hand over": (CONTROL, wire.HandOver(EPOCH)),
    "row stamps": (CONTROL, wire.RowStamps({str(NODE): (3, 41), str(OTHER): (1, 0)})),
    "rows": (CONTROL, wire.Rows((ROW,))),
    "record": (CONTROL, wire.Record(ServeRecord(Want.PINNED, ModelId("0f" * 32), "off", 8192, 2, (7, 3, NODE)))),
    "record, nothing chosen": (CONTROL, wire.Record(ServeRecord())),
    "goodbye": (CONTROL, wire.Goodbye("leaving")),
    "denials": (
        CONTROL,
        wire.Denials((Denial(Denied.TOKEN, "0102030405060708", 5, 9, b"c" * 32, "asked for on a", b"s" * 64),)),
    ),
    "key history": (CONTROL, wire.KeyHistory((Succession(b"old", b"new", b"cross", 5, 9, b"o" * 64, b"n" * 64),))),
    "call request": (CALL, wire.CallRequest(pack({"model": "m"}))),
    "call reply": (CALL, wire.CallReply(pack({}))),
    "call failed": (CALL, wire.CallFailed("does_not_fit", "needs 80 GB", "add a machine")),
}


@pytest.mark.parametrize("vector", VECTORS, ids=[v["name"] for v in VECTORS])
def test_golden_vectors(vector: dict[str, str]) -> None:
    codec, message = MESSAGES[vector["name"]]
    assert codec.name == vector["codec"]
    assert codec.encode(message).hex() == vector["wire"]
    assert codec.decode(bytes.fromhex(vector["wire"])) == message


def test_every_message_has_a_vector() -> None:
    assert [v["name"] for v in VECTORS] == list(MESSAGES)
    tried = {(codec.name, type(message)) for codec, message in MESSAGES.values()}
    assert tried == {(codec.name, kind) for codec in (CONTROL, CALL) for kind in codec._tag_of}


def test_a_record_of_before_there_was_a_choice_of_engines_is_understood() -> None:
    old = bytes.fromhex("920d96a46175746fc0a46175746f00ff930000a0")
    assert CONTROL.decode(old) == wire.Record(ServeRecord(engine="auto", drafters=(), max_draft=-1))


numbers = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
ids = st.sampled_from([NODE, OTHER])
stamps = st.builds(Stamp, st.builds(Epoch, numbers, st.sampled_from(["", NODE])), st.none() | ids)
digests = st.binary(max_size=32)
messages = st.one_of(
    st.builds(wire.Beat, numbers, digests, floats, stamps, digests, numbers),
    st.builds(wire.Echo, numbers),
    st.builds(wire.Question, ids, floats),
    st.builds(wire.Answer, ids, floats, st.booleans(), floats),
    st.builds(wire.Rumours, st.lists(st.builds(wire.Said, ids, st.text(max_size=8), numbers), max_size=4).map(tuple)),
    st.builds(wire.Coordinates, stamps),
    st.builds(wire.PreCheckReply, numbers, stamps),
    st.builds(wire.RowStamps, st.dictionaries(st.text(max_size=60), st.tuples(numbers, numbers), max_size=4)),
    st.builds(wire.Goodbye, st.text(max_size=200)),
    st.builds(
        wire.Record,
        st.builds(
            ServeRecord,
            st.sampled_from(Want),
            st.none() | st.just(ModelId("ab" * 32)),
            st.text(max_size=64),
            numbers,
            numbers,
            st.tuples(numbers, numbers, st.text(max_size=60)),
        ),
    ),
)


@settings(deadline=None)
@given(messages)
def test_whatever_fits_the_types_comes_back(message: Any) -> None:
    assert CONTROL.decode(CONTROL.encode(message)) == message


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(MESSAGES)), st.data())
def test_a_damaged_message_is_a_message_or_a_protocol_error(name: str, data: st.DataObject) -> None:
    codec, message = MESSAGES[name]
    raw = bytearray(codec.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    for wild in (bytes(raw), bytes(raw[: data.draw(st.integers(0, len(raw)))])):
        try:
            codec.decode(wild)
        except ProtocolError:
            pass


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_a_message_of_a_newer_node_is_read_and_a_shorter_one_refused(name: str) -> None:
    codec, message = MESSAGES[name]
    plain = unpack(codec.encode(message))
    assert codec.decode(pack([*plain, "a field of the future", {"x": [1]}])) == message
    n_required = sum(f.default is dataclasses.MISSING for f in dataclasses.fields(message))
    if n_required:
        with pytest.raises(ProtocolError):
            codec.decode(pack(plain[:n_required]))


FULL_ROW = replace(
    ROW,
    name=NodeName("a" * 63),
    incarnation=2**63 - 1,
    version=2**63 - 1,
    joined_at=2**63 - 1,
    klass=2**63 - 1,
    endpoint_port=2**63 - 1,
    addresses=(Address("a" * 253, 65535),) * MAX_ADDRESSES,
    capabilities=Capabilities(
        "\U0001f600" * 64,
        "\U0001f600" * 200,
        2**63 - 1,
        2**63 - 1,
        2**63 - 1,
        2**63 - 1,
        (Device("\U0001f600" * 64, "\U0001f600" * 200, 2**63 - 1, 2**63 - 1),) * MAX_DEVICES,
        EngineInfo("\U0001f600" * 64, "\U0001f600" * 64, "\U0001f600" * 16, "\U0001f600" * 500),
    ),
    models=(
        HeldModel(
            ModelId("a" * 64),
            SafeName("a" * 200),
            2**63 - 1,
            2**63 - 1,
            ModelFacts(
                "\U0001f600" * 64, "\U0001f600" * 32, 2**63 - 1, 2**63 - 1, 2**63 - 1, 2**63 - 1, "\U0001f600" * 64
            ),
            "\U0001f600" * 128,
        ),
    )
    * MAX_MODELS,
    note="\U0001f600" * 200,
    fetching=(Fetching("\U0001f600" * 64, 2**63 - 1, 2**63 - 1, 2**63 - 1),) * MAX_FETCHING,
)


@pytest.mark.parametrize(
    "message",
    [
        wire.Rows((FULL_ROW,) * wire.MAX_ROWS_PER_MESSAGE),
        wire.RowStamps({f"{i:052}": (2**63 - 1, 2**63 - 1) for i in range(MAX_NODES)}),
        wire.Rumours((wire.Said(NODE, "\U0001f600" * 8, 2**63 - 1),) * MAX_NODES),
        wire.Goodbye("\U0001f600" * 200),
        wire.Record(ServeRecord(Want.PINNED, ModelId("a" * 64), "\U0001f600" * 64, 1, 1, (1, 1, "x" * 4096))),
    ],
    ids=lambda m: type(m).__name__,
)
def test_the_largest_message_of_each_kind_fits_a_frame(message: Any) -> None:
    header = CONTROL.encode(message)
    assert len(header) <= MAX_CONTROL
    assert CONTROL.decode(header) == message


@pytest.mark.parametrize("kind", [wire.CallRequest, wire.CallReply])
def test_the_largest_call_fits_a_frame(kind: type) -> None:
    header = CALL.encode(kind(b"\x00" * MAX_CALL))
    assert len(header) <= MAX_CONTROL
    assert CALL.decode(header) == kind(b"\x00" * MAX_CALL)
    with pytest.raises(ProtocolError):
        CALL.decode(CALL.encode(kind(b"\x00" * (MAX_CALL + 1))))


@pytest.mark.parametrize(
    "message",
    [
        wire.Rows((ROW,) * (wire.MAX_ROWS_PER_MESSAGE + 1)),
        wire.RowStamps({str(i): (0, 0) for i in range(MAX_NODES + 1)}),
        wire.Rumours((wire.Said(NODE, "alive", 1),) * (MAX_NODES + 1)),
        wire.Rumours((wire.Said(NODE, "x" * 9, 1),)),
        wire.Beat(0, b"x" * 33, 0.0, Stamp(NO_EPOCH, None), b"", 0),
        wire.Beat(0, b"", 0.0, Stamp(NO_EPOCH, None), b"x" * 33, 0),
        wire.Beat(0, b"", float("nan"), Stamp(NO_EPOCH, None), b"", 0),
        wire.Question(NODE, float("inf")),
        wire.Echo(2**63),
        wire.Goodbye("x" * 201),
    ],
)
def test_what_is_beyond_a_bound_is_refused(message: Any) -> None:
    with pytest.raises(ProtocolError):
        CONTROL.decode(CONTROL.encode(message))


def test_a_message_of_the_other_conversation_is_not_taken() -> None:
    with pytest.raises(KeyError):
        CALL.encode(wire.Probe())
    with pytest.raises(ProtocolError):
        CALL.decode(pack([14, "bye"]))
    assert len(encode(CONTROL.encode(wire.Probe()))) == 10
    assert to_plain(wire.Probe()) == []
