"""What the mesh decides, in words."""

from __future__ import annotations

from typing import Any

from tightwad_agent.events import Kind
from tightwad_agent.ids import Epoch, NodeId
from tightwad_agent.mesh.election import CoordinatorChanged, SteppedDown
from tightwad_agent.mesh.members import Reach, State, StateChanged
from tightwad_agent.mesh.telling import GOODBYE, Note, Telling

ME, A, B = (NodeId(letter * 52) for letter in "mab")
DIRECT, INDIRECT, NONE = Reach.DIRECT, Reach.INDIRECT, Reach.NONE
ALIVE, SUSPECT, DEAD, LEFT = State.ALIVE, State.SUSPECT, State.DEAD, State.LEFT


class Story:
    def __init__(self) -> None:
        self.telling = Telling(ME)
        self.now = 100.0
        self.last: dict[NodeId, State] = {}
        self.note: Note | None = None

    def state(self, node: NodeId, new: State, reach: Reach, reason: str, after_s: float = 1.0) -> str | None:
        self.now += after_s
        self.note = self.telling.state_changed(StateChanged(node, self.last.get(node), new, reach, reason), self.now)
        self.last[node] = new
        return self.note.text if self.note else None

    def office(self, node: NodeId | None, counter: int, reason: str, after_s: float = 1.0) -> str:
        self.now += after_s
        epoch = Epoch(counter, node or B)
        effect = CoordinatorChanged(epoch if node else None, node, reason)
        self.note = self.telling.coordinator_changed(effect, epoch, self.now)
        return self.note.text

    @property
    def facts(self) -> Any:
        assert self.note is not None
        return self.note.facts


def test_a_node_that_comes_and_dies_and_comes_back() -> None:
    story = Story()
    assert story.state(A, ALIVE, DIRECT, "connected") == "aaaaaaaa is alive: connected"
    assert story.state(A, SUSPECT, NONE, "silent for 2.5 s") == "aaaaaaaa is suspect: silent for 2.5 s"
    assert story.facts["same"] == f"{A} suspect"
    dead = "aaaaaaaa is dead: no sign of life for 4.0 s"
    assert story.state(A, DEAD, NONE, "no sign of life for 4.0 s", 1.5) == dead
    assert story.note is not None
    assert story.note.kind is Kind.MEMBERSHIP
    assert story.facts == {
        "peer": str(A),
        "state": "dead",
        "reach": "none",
        "reason": "no sign of life for 4.0 s",
        "same": f"{A} dead",
    }
    assert story.state(A, ALIVE, DIRECT, "connected", 9) == "aaaaaaaa is alive again after 10.5 s of absence: connected"
    assert story.facts["away_s"] == 10.5


def test_a_doubt_that_was_wrong() -> None:
    story = Story()
    story.state(A, ALIVE, DIRECT, "connected")
    story.state(A, SUSPECT, NONE, "silent for 2.5 s")
    assert story.state(A, ALIVE, DIRECT, "connected", 0.4) == "aaaaaaaa is alive again after 0.4 s in doubt: connected"


def test_a_goodbye() -> None:
    story = Story()
    story.state(A, ALIVE, DIRECT, "connected")
    assert story.state(A, LEFT, NONE, "left the cluster") == f"aaaaaaaa is gone: {GOODBYE}"


def test_one_that_is_only_remembered_is_not_told_until_it_comes() -> None:
    story = Story()
    assert story.state(A, DEAD, NONE, "not seen yet") is None
    assert story.state(A, ALIVE, DIRECT, "connected") == "aaaaaaaa is alive: connected"
    assert (
        story.state(B, SUSPECT, NONE, "heard of, not reached yet") == "bbbbbbbb is suspect: heard of, not reached yet"
    )
    assert story.state(B, ALIVE, DIRECT, "connected") == "bbbbbbbb is alive: connected"


def test_a_state_whose_beginning_was_not_seen() -> None:
    story = Story()
    story.last[A] = ALIVE
    assert story.state(A, DEAD, NONE, "gone") == "aaaaaaaa is dead: gone"
    assert story.state(A, ALIVE, DIRECT, "connected", 3) == "aaaaaaaa is alive again after 3.0 s of absence: connected"


def test_how_a_node_is_reached() -> None:
    story = Story()
    story.state(A, ALIVE, DIRECT, "connected")
    assert story.state(A, ALIVE, DIRECT, "connected") is None
    text = story.state(A, ALIVE, INDIRECT, "not reachable from here, but from bbbbbbbb")
    assert text == "aaaaaaaa is reached through others only: not reachable from here, but from bbbbbbbb"
    assert story.note is not None
    assert story.note.kind is Kind.LINK
    assert story.state(A, ALIVE, DIRECT, "connected", 7) == "aaaaaaaa is reached directly again, after 7.0 s"
    story.state(A, DEAD, NONE, "gone")
    assert story.state(A, DEAD, NONE, "still gone") is None
    story.last[B] = ALIVE
    assert story.state(B, ALIVE, INDIRECT, "not seen before") is None


def test_the_first_coordinator() -> None:
    story = Story()
    text = story.office(ME, 1, "no coordinator was in sight")
    assert text == "coordinator is mmmmmmmm (epoch 1): no coordinator was in sight"
    assert story.facts["first_hand"] is True
    assert story.note is not None
    assert story.note.kind is Kind.ELECTION


def test_a_coordinator_that_died_is_named_with_how_long_it_took() -> None:
    story = Story()
    story.state(A, ALIVE, DIRECT, "connected")
    story.office(A, 1, "aaaaaaaa coordinates")
    assert story.facts["first_hand"] is False
    story.state(A, DEAD, NONE, "no sign of life for 4.0 s")
    text = story.office(None, 1, "the coordinator aaaaaaaa is gone")
    assert text == "there is no coordinator: aaaaaaaa is dead: no sign of life for 4.0 s"
    text = story.office(ME, 2, "no coordinator was in sight", 0.9)
    why = "aaaaaaaa is dead: no sign of life for 4.0 s"
    assert text == f"coordinator is mmmmmmmm (epoch 2), elected within 0.9 s: {why}"
    assert round(story.facts["after_s"], 3) == 0.9
    assert story.facts["instead_of"] == str(A)
    assert story.facts["same"] == f"{ME} at epoch 2"


def test_a_coordinator_that_said_goodbye() -> None:
    story = Story()
    story.state(A, ALIVE, DIRECT, "connected")
    story.office(A, 1, "aaaaaaaa coordinates")
    story.state(A, LEFT, NONE, "left the cluster")
    assert (
        story.office(None, 1, "the coordinator aaaaaaaa is gone")
        == f"there is no coordinator: aaaaaaaa is gone: {GOODBYE}"
    )


def test_a_coordinator_that_lives_and_gave_up() -> None:
    story = Story()
    story.state(A, ALIVE, DIRECT, "connected")
    story.office(A, 1, "aaaaaaaa coordinates")
    assert story.office(None, 1, "aaaaaaaa restarted and no longer coordinates").startswith("aaaaaaaa restarted")
    assert "within 2.0 s: aaaaaaaa no longer coordinates: aaaaaaaa restarted" in story.office(B, 2, "b does", 2.0)
    assert story.office(A, 3, "aaaaaaaa handed over").endswith("aaaaaaaa handed over; before it was bbbbbbbb")
    assert story.office(A, 4, "renewed").endswith("(epoch 4): renewed")


def test_an_office_that_was_empty_stays_so() -> None:
    story = Story()
    assert story.office(None, 3, "epoch 3 is newer, and nobody holds it") == "epoch 3 is newer, and nobody holds it"
    assert story.office(B, 4, "bbbbbbbb coordinates") == "coordinator is bbbbbbbb (epoch 4): bbbbbbbb coordinates"


def test_one_that_steps_down() -> None:
    note = Telling(ME).coordinator_changed(SteppedDown(Epoch(3, ME), "epoch 4 is newer"), Epoch(4, A), 5.0)
    assert note.text == "this machine no longer coordinates: epoch 4 is newer"
    assert note.facts == {"epoch": 3, "reason": "epoch 4 is newer"}
