"""What a client may ask, and what is believed of it."""

from __future__ import annotations

from typing import Any

import pytest

from tightwad_agent.ids import NO_EPOCH, Epoch, ModelId, NodeName, SafeName
from tightwad_agent.mesh import roles
from tightwad_agent.testing import node_id
from tightwad_agent.wire import control
from tightwad_agent.wire.rows import Capabilities, Device, HeldModel, NodeRow, Role, ServeRecord, Stamp

ME, OTHER = node_id("client"), node_id("other")
STAMP = Stamp(Epoch(4, str(OTHER)), OTHER)


def row(node: Any = ME) -> NodeRow:
    return NodeRow(
        node=node,
        name=NodeName("c"),
        role=Role.AUTHORITY,
        incarnation=1,
        version=2,
        joined_at=3,
        eligible=True,
        klass=9,
        endpoint_port=8088,
        capabilities=Capabilities(n_cores=4, memory_total=1 << 40, devices=(Device("GPU", "", 1, 1),)),
        models=(HeldModel(ModelId("a" * 64), SafeName("m.gguf"), 1, 1),),
    )


@pytest.mark.parametrize("service", ["rpc", "swarm", "draft", "anything new"])
def test_a_client_gets_no_service_that_costs_or_changes_something(service: str) -> None:
    assert repr(service) in roles.refusal(Role.CLIENT, service, {})
    assert not roles.refusal(Role.NODE, service, {})
    assert not roles.refusal(Role.AUTHORITY, service, {})


@pytest.mark.parametrize("method", ["worker.start", "trust.deny", "trust.promoted", "model.remove", "keys.sync", None])
def test_a_client_calls_nothing_that_commands(method: Any) -> None:
    assert "may not call" in roles.refusal(Role.CLIENT, "call", {"method": method})
    assert not roles.refusal(Role.NODE, "call", {"method": method})


def test_a_client_may_look_on_and_forward() -> None:
    for service in ("control", "http", "serving"):
        assert not roles.refusal(Role.CLIENT, service, {})
    assert not roles.refusal(Role.CLIENT, "call", {"method": "leaf.renew"})


@pytest.mark.parametrize(
    "message",
    [
        control.Coordinates(STAMP),
        control.PreCheck(1),
        control.PreCheckReply(1, STAMP),
        control.HandOver(Epoch(9, str(ME))),
        control.Record(ServeRecord()),
        control.Answer(OTHER, 1.0, True, 0.0),
    ],
)
def test_a_client_decides_nothing(message: Any) -> None:
    assert roles.of_client(ME, message, STAMP) is None


def test_a_clients_heartbeat_is_a_heartbeat_and_no_claim() -> None:
    claim = Stamp(Epoch(99, str(ME)), ME)
    beat = control.Beat(3, b"d", 0.5, claim, b"r", 7)
    assert roles.of_client(ME, beat, STAMP) == control.Beat(3, b"d", 0.5, STAMP, b"r", 7)
    assert roles.of_client(ME, beat, Stamp(NO_EPOCH, None)).stamp.coordinator is None


def test_a_client_speaks_of_itself_alone() -> None:
    mine, others = control.Said(ME, "alive", 2), control.Said(OTHER, "dead", 2)
    assert roles.of_client(ME, control.Rumours((mine, others)), STAMP) == control.Rumours((mine,))
    assert roles.of_client(ME, control.Rows((row(OTHER),)), STAMP) == control.Rows(())


def test_a_clients_row_offers_nothing_whatever_it_says() -> None:
    (seen,) = roles.of_client(ME, control.Rows((row(),)), STAMP).rows
    assert (seen.role, seen.eligible, seen.klass, seen.models) == (Role.CLIENT, False, 0, ())
    assert not seen.capabilities.devices
    assert seen.capabilities.memory_total == 0
    assert (seen.node, seen.stamp, seen.capabilities.n_cores) == (ME, row().stamp, 4)


def test_other_messages_pass() -> None:
    for message in (control.Probe(), control.Echo(1), control.RowStamps({})):
        assert roles.of_client(ME, message, STAMP) is message
