"""`events` over calls between nodes: what is asked, what hostile and old nodes answer, what fits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import trio

from tightwad_agent import event_commands
from tightwad_agent.errors import PeerGone, ProtocolError, RemoteError, UsageError
from tightwad_agent.event_commands import LIST, MAX_ANSWER, EventCommands, Heard, fitting, heard_of, shown
from tightwad_agent.event_merge import Happening
from tightwad_agent.events import MAX_AT, MAX_EVENTS, MAX_FACTS, Event, Journal, Kind
from tightwad_agent.ids import NodeId, NodeName
from tightwad_agent.mesh.members import Reach, State
from tightwad_agent.mesh.service import PeerStatus
from tightwad_agent.wire.codec import pack, unpack
from tightwad_agent.wire.rows import NodeRow, Role

ME, B, C, D = (NodeId(letter * 52) for letter in "abcd")
PATIENCE_S = 30.0


def row(node: NodeId, name: str) -> NodeRow:
    return NodeRow(node, NodeName(name), Role.NODE, 1, 1, 1, True, 0, 1)


@dataclass
class Node:
    commands: EventCommands
    journal: Journal


class Mesh:
    """The mesh as `events` uses it: calls cross as bytes."""

    def __init__(self, **states: State) -> None:
        self.me = ME
        self.nodes: dict[NodeId, Any] = {}
        self.names = {ME: "attic", B: "cellar", C: "den", D: "hall"}
        self.states = {ME: State.ALIVE, B: State.ALIVE, C: State.ALIVE, D: State.DEAD}

    def peers(self) -> list[PeerStatus]:
        return [
            PeerStatus(node, state, Reach.DIRECT, "silent for 4.0 s", row(node, self.names[node]), None, None)
            for node, state in self.states.items()
        ]

    def name_of(self, node: NodeId) -> str:
        return self.names[node]

    def with_names(self, text: str) -> str:
        for node, name in self.names.items():
            text = text.replace(node.short, name)
        return text

    async def call(self, node: NodeId, method: str, params: dict[str, Any]) -> dict[str, Any]:
        handler = self.nodes[node]
        if isinstance(handler, Exception):
            raise handler
        if isinstance(handler, Node):
            handler = handler.commands.methods()[method]
        result = await handler(ME, unpack(pack(params)))
        back = unpack(pack(result))
        assert isinstance(back, dict)
        return back


def node(mesh: Any, name: NodeId, clock: float = 1000.0) -> Node:
    journal = Journal(str(name))
    return Node(EventCommands(mesh, journal, lambda: clock), journal)


async def ask(commands: EventCommands, **params: Any) -> dict[str, Any]:
    with trio.fail_after(PATIENCE_S):
        result: dict[str, Any] = await commands.table()["events"](params, lambda _progress: None)
    return result


@pytest.fixture
def mesh() -> Mesh:
    return Mesh()


@pytest.fixture
def here(mesh: Mesh) -> Node:
    """This node; the others tell nothing yet."""
    mesh.nodes |= {B: node(mesh, B), C: node(mesh, C)}
    return node(mesh, ME)


async def test_what_living_nodes_tell_is_one_list(mesh: Mesh, here: Node) -> None:
    here.journal.add(10.0, "b coordinates", Kind.ELECTION, {"same": "epoch 2"})
    mesh.nodes[B].journal.add(10.5, f"{B.short} does", Kind.ELECTION, {"same": "epoch 2", "first_hand": True})
    mesh.nodes[C].journal.add(11.0, "the pool went down", Kind.POOL)
    answer = await ask(here.commands)
    assert [(e["node"], e["text"], e["seen_by"]) for e in answer["events"]] == [
        ("cellar", "cellar does", ["cellar", "attic"]),
        ("den", "the pool went down", ["den"]),
    ]
    assert answer["events"][1]["at"] == "1970-01-01T00:00:11Z"
    assert answer["silent"] == [{"name": "hall", "reason": "dead: silent for 4.0 s"}]
    assert answer["clocks"] == []
    assert answer["cursor"] == {str(ME): 1, str(B): 1, str(C): 1}


async def test_the_next_look_has_only_what_is_new(mesh: Mesh, here: Node) -> None:
    here.journal.add(10.0, "a")
    mesh.nodes[B].journal.add(11.0, "b")
    first = await ask(here.commands)
    assert (await ask(here.commands, after=first["cursor"]))["events"] == []
    mesh.nodes[B].journal.add(12.0, "c")
    later = await ask(here.commands, after=first["cursor"])
    assert [e["text"] for e in later["events"]] == ["c"]
    assert later["cursor"] == {str(ME): 1, str(B): 2}


async def test_events_are_chosen(mesh: Mesh, here: Node) -> None:
    here.journal.add(950.0, "a", Kind.POOL)
    here.journal.add(990.0, "b", Kind.LINK, {"peer": str(B)})
    mesh.nodes[C].journal.add(999.0, "c", Kind.POOL)

    async def texts(**params: Any) -> list[str]:
        return [e["text"] for e in (await ask(here.commands, **params))["events"]]

    assert await texts(kinds=["pool"]) == ["a", "c"]
    assert await texts(since_s=20) == ["b", "c"]
    assert await texts(since=995.0) == ["c"]
    assert await texts(n=1) == ["c"]
    assert await texts(node="cellar") == ["b"]
    assert await texts(node=C.short) == ["c"]


@pytest.mark.parametrize(
    "params",
    [
        {"n": 0},
        {"n": MAX_EVENTS + 1},
        {"n": "5"},
        {"kinds": ["of tomorrow"]},
        {"kinds": "pool"},
        {"kinds": [["pool"]]},
        {"node": "nobody"},
        {"node": 5},
        {"since": -1},
        {"since_s": "1h"},
        {"since": math.inf},
        {"after": [1]},
        {"after": {"x": -1}},
        {"after": {"x": "1"}},
    ],
    ids=repr,
)
async def test_what_cannot_be_meant_is_refused(here: Node, params: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        await ask(here.commands, **params)


async def test_two_machines_of_one_name_are_not_guessed(mesh: Mesh, here: Node) -> None:
    mesh.names[C] = "cellar"
    with pytest.raises(UsageError, match="2 machines"):
        await ask(here.commands, node="cellar")


async def test_nodes_that_do_not_answer_are_named_and_hold_nobody_up(
    mesh: Mesh, here: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(_peer: NodeId, _params: Any) -> Any:
        await trio.sleep_forever()

    monkeypatch.setattr(event_commands, "ASK_S", 0.2)
    mesh.states[D] = State.ALIVE
    mesh.nodes |= {B: never, C: PeerGone("the connection broke"), D: RemoteError("no method 'events.list' here")}
    here.journal.add(1.0, "a")
    answer = await ask(here.commands)
    assert [e["text"] for e in answer["events"]] == ["a"]
    assert [s["name"] for s in answer["silent"]] == ["cellar", "den", "hall"]
    assert "0.2 s" in answer["silent"][0]["reason"]


async def test_one_that_left_is_not_missed(mesh: Mesh, here: Node) -> None:
    mesh.states[D] = State.LEFT
    assert (await ask(here.commands))["silent"] == []


async def test_many_are_asked_a_few_at_a_time(mesh: Mesh, here: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_commands, "MAX_ASKED", 2)
    now, most = 0, 0

    async def slow(_peer: NodeId, _params: Any) -> dict[str, Any]:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await trio.sleep(0.01)
        now -= 1
        return {"now": 1000.0, "events": []}

    for letter in "efghij":
        other = NodeId(letter * 52)
        mesh.names[other], mesh.states[other], mesh.nodes[other] = letter, State.ALIVE, slow
    await ask(here.commands)
    assert most == 2


# Clocks


async def test_a_clock_that_is_wrong_is_named_and_its_times_corrected(mesh: Mesh, here: Node) -> None:
    mesh.nodes[B] = node(mesh, B, clock=1000.0 + 93_600)
    here.journal.add(100.0, "first")
    mesh.nodes[B].journal.add(93_701.0, "second")
    here.journal.add(102.0, "third")
    answer = await ask(here.commands)
    assert [e["text"] for e in answer["events"]] == ["first", "second", "third"]
    assert answer["clocks"] == [{"name": "cellar", "ahead_s": pytest.approx(93_600, abs=30)}]


@pytest.mark.parametrize(("now", "ahead"), [(1000.5, 0.0), (1001.04, 0.0), (1010.5, 10.0), (985.5, -15.0), (-1, 0.0)])
def test_a_difference_counts_when_the_call_was_quick_enough_to_tell(now: float, ahead: float) -> None:
    heard = heard_of(B, {"now": now, "events": []}, asked_at=1000.0, took_s=1.0)
    assert heard == Heard((), ahead)


# What a peer may answer


@pytest.mark.parametrize(
    "answer", [{}, {"now": 1}, {"events": []}, {"now": "1", "events": []}, {"now": 1, "events": 1}]
)
def test_what_is_no_list_is_refused(answer: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        heard_of(B, answer, 0.0, 0.0)


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf, 10**400, True])
def test_a_clock_that_is_none_corrects_nothing(now: Any) -> None:
    assert abs(heard_of(B, {"now": now, "events": []}, 1.0, 0.0).ahead_s) <= 1.0


def test_a_peer_speaks_for_itself_and_what_is_no_event_is_left_out() -> None:
    good = {"at": 5, "seq": 2, "text": "\x1b[2Jgood\nnews", "node": str(ME), "facts": {"a": [1], "B": 2}}
    listed = [good, {"at": 5}, None, 7, {**good, "seq": 1}, {**good, "text": ""}, {**good, "at": math.nan}]
    heard = heard_of(B, {"now": 5, "events": listed}, 5.0, 0.0)
    assert [(e.seq, e.node) for e in heard.events] == [(1, str(B)), (2, str(B))]
    assert heard.events[0].facts == {"a": "[1]"}
    many = [{"at": 5, "seq": i, "text": "x"} for i in range(3 * MAX_EVENTS)]
    assert len(heard_of(B, {"now": 5, "events": many}, 5.0, 0.0).events) == MAX_EVENTS


@pytest.mark.parametrize("at", [-5.0, 0.0, float(MAX_AT), MAX_AT + 1e9])
def test_any_time_can_be_shown(at: float) -> None:
    assert shown(Happening(at, Event(at, "x"), ("b",)), str)["at"].endswith("Z")


def test_an_answer_fits_into_a_call_whatever_is_in_it() -> None:
    journal = Journal(str(B))
    for i in range(MAX_EVENTS):
        journal.add(
            1.0, f"{i} " + "\U0001f600" * 500, Kind.POOL, {f"k{j}": "\U0001f600" * 200 for j in range(MAX_FACTS)}
        )
    kept = fitting(journal.last())
    assert MAX_ANSWER // 2 < len(pack(kept)) < MAX_ANSWER + 100
    assert kept[-1]["seq"] == MAX_EVENTS
    assert [e["seq"] for e in kept] == list(range(kept[0]["seq"], MAX_EVENTS + 1))


async def test_a_peer_that_asks_nonsense_is_refused(here: Node) -> None:
    with pytest.raises(UsageError):
        await here.commands.methods()[LIST](B, {"after": "x"})
