"""Messages of the control link <-> events and effects of the machines. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tightwad_agent.errors import ProtocolError
from tightwad_agent.ids import NodeId
from tightwad_agent.mesh import election, members
from tightwad_agent.wire import control

MemberEvents: dict[type, Callable[[NodeId, Any], members.Event]] = {
    control.Echo: lambda node, _m: members.Heard(node),
    control.Probe: lambda node, _m: members.Probed(node),
    control.Question: lambda node, m: members.Asked(node, m.about, m.asked_at),
    control.Answer: lambda node, m: members.Answered(node, m.about, m.asked_at, m.reachable, max(0.0, m.ago_s)),
    control.Rumours: lambda node, m: members.RumoursReceived(node, _heard(m)),
    control.Beat: lambda node, m: members.HeartbeatReceived(node, m.incarnation, m.digest, max(0.0, m.heard_ago_s)),
}
"""What a message tells the failure detector."""

ElectionEvents: dict[type, Callable[[NodeId, Any], election.Event]] = {
    control.Beat: lambda node, m: election.StampHeard(node, m.stamp),
    control.Coordinates: lambda node, m: election.StampHeard(node, m.stamp),
    control.PreCheck: lambda node, m: election.PreCheckAsked(node, m.round),
    control.PreCheckReply: lambda node, m: election.PreCheckAnswered(node, m.round, m.stamp),
    control.HandOver: lambda node, m: election.HandOverReceived(node, m.epoch),
}
"""What a message tells the election."""

Messages: dict[type, Callable[[Any], object]] = {
    members.SendProbe: lambda _e: control.Probe(),
    members.Ask: lambda e: control.Question(e.about, e.asked_at),
    members.Answer: lambda e: control.Answer(e.about, e.asked_at, e.reachable, e.ago_s),
    members.Tell: lambda e: _said(e.rumours),
    election.Tell: lambda e: control.Coordinates(e.stamp),
    election.AskPreCheck: lambda e: control.PreCheck(e.round),
    election.AnswerPreCheck: lambda e: control.PreCheckReply(e.round, e.stamp),
    election.SendHandOver: lambda e: control.HandOver(e.epoch),
}
"""Effects that are nothing but a message to `effect.node`."""

Broadcasts: dict[type, Callable[[Any], object]] = {
    members.TellAll: lambda e: _said(e.rumours),
    election.Announce: lambda e: control.Coordinates(e.stamp),
}
"""Effects that are nothing but a message to all."""


def _said(rumours: tuple[members.Rumour, ...]) -> control.Rumours:
    return control.Rumours(tuple(control.Said(r.node, r.state, r.incarnation) for r in rumours))


def _heard(message: control.Rumours) -> tuple[members.Rumour, ...]:
    try:
        return tuple(members.Rumour(s.node, members.State(s.state), s.incarnation) for s in message.said)
    except ValueError as exc:
        raise ProtocolError(f"control: {exc}") from None
