from __future__ import annotations

from tightwad_agent import life
from tightwad_agent.events import Event, Kind

STARTED = Event(100.0, "up", Kind.AGENT, {"life": "started"})
WORKED = Event(160.0, "a pool")


def test_the_first_start_says_only_that() -> None:
    assert life.started((), 5.0, "1.2") == "tightwad-agent 1.2 started"
    assert life.started((WORKED,), 5.0, "1.2") == "tightwad-agent 1.2 started"


def test_a_start_after_an_orderly_stop() -> None:
    stopped = Event(200.0, "down", Kind.AGENT, {"life": "stopped"})
    assert life.started((STARTED, stopped), 245.0, "1") == "tightwad-agent 1 started, 45 s after it was stopped"
    assert life.started((STARTED, stopped), 100.0, "1") == "tightwad-agent 1 started", "the clock was set back"


def test_a_start_after_an_error() -> None:
    failed = Event(200.0, "down", Kind.AGENT, {"life": "failed"})
    assert life.started((STARTED, failed), 245.0, "1").endswith("45 s after it had ended with an error")


def test_a_start_after_a_kill() -> None:
    text = life.started((STARTED, WORKED), 165.0, "1")
    assert "5 s after the last event before" in text
    assert "was not stopped in order" in text


def test_ends_in_words() -> None:
    assert life.ended("SIGTERM", 7500) == "the agent was stopped (SIGTERM) after 2 h 5 min"
    group = ExceptionGroup("nursery", [ExceptionGroup("inner", [OSError("no disk")])])
    assert life.failed(group) == "the agent ended with an error: OSError: no disk"
