"""Events as people read them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from tightwad_agent import event_log, event_look, render_events, terminal
from tightwad_agent.event_merge import SAME_S
from tightwad_agent.events import MAX_AT, Journal, Kind
from tightwad_agent.render_events import News


def event(at: float = 1766000000.0, text: str = "it went down", **more: Any) -> dict[str, Any]:
    plain = {"at": "2025-12-17T19:33:20Z", "at_s": at, "node": "attic", "kind": "pool", "text": text}
    return {**plain, "facts": {}, "seen_by": ["attic"], **more}


def answer(*events: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"events": list(events), "silent": [], "clocks": [], **more}


SILENT = [{"name": "cellar", "reason": "no answer within 3 s"}]
CLOCKS = [{"name": "den", "ahead_s": 93600.0}, {"name": "hall", "ahead_s": -4.2}]


def test_a_line_each_and_what_is_odd_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    both = event(text="b coordinates", seen_by=["attic", "den"])
    render_events.events(answer(event(), both, silent=SILENT, clocks=CLOCKS), as_json=False)
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "2025-12-17T19:33:20Z  attic  pool  it went down",
        "2025-12-17T19:33:20Z  attic  pool  b coordinates (seen by 2 machines)",
    ]
    assert said.err.splitlines() == [
        "Not heard: cellar (no answer within 3 s)",
        "The clock of den is 26 h 0 min ahead of this one; its times are corrected.",
        "The clock of hall is 4 s behind this one; its times are corrected.",
    ]


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    render_events.events(answer(event(), silent=SILENT, note="x", cursor={"a": 1}), as_json=True)
    plain = json.loads(capsys.readouterr().out)
    assert plain.keys() == {"events", "silent", "clocks"}
    assert plain["silent"] == SILENT


def test_no_event_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    render_events.events(answer(note="from its files"), as_json=False)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == ["No events are known that fit.", "from its files"]


@pytest.fixture
def far_east() -> Iterator[None]:
    """14 hours before UTC."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "LINT-14")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_east")
def test_on_a_terminal_it_is_a_table_in_local_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(terminal, "console", lambda: Console(width=100, force_terminal=False, markup=False))
    hostile = event(text="\x1b[2Jcleared [bold]x[/bold]")
    render_events.events(answer(event(at=float(MAX_AT)), hostile), as_json=False)
    out = capsys.readouterr().out
    assert re.search(r"time +machine +about +what happened", out)
    assert re.search(r"9999-01-01 14:00:00 +attic +pool +it went down", out)
    assert "\x1b[2J" not in out
    assert "[bold]x[/bold]" in out


# Following


def test_news_are_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    news = News(as_json=False)
    mine = event(100.0, "b does", facts={"same": "epoch 2"})
    news.show(answer(event(99.0, "plain"), mine, silent=SILENT))
    news.show(answer(event(100.5, "b does, later", facts={"same": "epoch 2"}), event(99.0, "plain"), silent=SILENT))
    news.show(answer(event(101.0 + SAME_S, "b again", facts={"same": "epoch 2"})))
    said = capsys.readouterr()
    assert [line.rpartition("  ")[2] for line in said.out.splitlines()] == ["plain", "b does", "plain", "b again"]
    assert said.err.count("Not heard") == 1


def test_news_of_trust_are_told_by_all_in_the_same_words(capsys: pytest.CaptureFixture[str]) -> None:
    news = News(as_json=True)
    news.show(answer(event(100.0, "den was removed", kind="trust")))
    news.show(answer(event(101.0, "den was removed", kind="trust"), silent=SILENT))
    said = capsys.readouterr()
    assert [json.loads(line)["at_s"] for line in said.out.splitlines()] == [100.0]
    assert said.err == ""


# Without an agent


def test_the_files_of_a_stopped_agent(tmp_path: Any) -> None:
    journal = Journal("n" * 52)
    kept = event_log.EventLog(tmp_path, journal)
    journal.add(1000.0, "old", Kind.POOL)
    journal.add(1001.0, "of den", Kind.LINK, {"peer": "den"})
    kept.flush()
    params: dict[str, Any] = {"since_s": 0, "kinds": [], "node": None, "n": 50}
    found = event_look.from_files(tmp_path, "attic", params)
    assert [(e["node"], e["text"]) for e in found["events"]] == [("attic", "old"), ("attic", "of den")]
    assert "No agent runs" in found["note"]

    def texts(**wanted: Any) -> list[str]:
        return [e["text"] for e in event_look.from_files(tmp_path, "attic", {**params, **wanted})["events"]]

    assert texts(kinds=["pool"]) == ["old"]
    assert texts(node="den") == ["of den"]
    assert texts(n=1) == ["of den"]
    assert texts(since_s=3600) == []
