"""Events as people read them: a table on a terminal, a line each elsewhere, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import datetime

from rich.table import Table

from tightwad_agent.event_merge import SAME_S
from tightwad_agent.events import SAME, Kind
from tightwad_agent.render import note
from tightwad_agent.terminal import Plain, add_row, columns, print_json, say
from tightwad_agent.units import duration


def events(info: Plain, *, as_json: bool) -> None:
    """What `events` answered. What is odd about it goes to stderr, so that stdout holds events alone."""
    if as_json:
        print_json({key: info[key] for key in ("events", "silent", "clocks")})
        return
    if not info["events"]:
        note("No events are known that fit.")
    elif sys.stdout.isatty():
        say(_table(info["events"]))
    else:
        say(*map(line, info["events"]))
    for text in _remarks(info):
        note(text)


def _table(found: list[Plain]) -> Table:
    table = columns("time", "machine", "about", "what happened")
    for event in found:
        add_row(table, _local(event["at_s"]), event["node"], event["kind"], _words(event))
    return table


def line(event: Plain) -> str:
    """`2026-01-31T23:59:59Z  attic  pool  the pool went down: ... (seen by 3 machines)`"""
    return f"{event['at']}  {event['node']}  {event['kind']}  {_words(event)}"


def _words(event: Plain) -> str:
    n = len(event["seen_by"])
    return f"{event['text']} (seen by {n} machines)" if n > 1 else str(event["text"])


def _local(at: float) -> str:
    """In the time zone of whoever reads."""
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _remarks(info: Plain) -> Iterator[str]:
    if "note" in info:
        yield info["note"]
    for silent in info["silent"]:
        yield f"Not heard: {silent['name']} ({silent['reason']})"
    for clock in info["clocks"]:
        way = "ahead of" if clock["ahead_s"] > 0 else "behind"
        by = duration(abs(clock["ahead_s"]))
        yield f"The clock of {clock['name']} is {by} {way} this one; its times are corrected."


class News:
    """Shows events as they come; what was shown is not shown again when a node tells of it later."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._shown: dict[str, float] = {}
        self._remarked: list[str] = []

    def show(self, info: Plain) -> None:
        for event in info["events"]:
            if self._is_news(event):
                self._print(event)
        if not self._as_json and (remarks := [*_remarks(info)]) != self._remarked:
            self._remarked = remarks
            for text in remarks:
                note(text)

    def _print(self, event: Plain) -> None:
        if self._as_json:
            print(json.dumps(event), flush=True)  # noqa: T201
        else:
            say(line(event))

    def _is_news(self, event: Plain) -> bool:
        same, at = event["facts"].get(SAME), event["at_s"]
        if not same and event["kind"] == Kind.TRUST:
            same = event["text"]
        if not same:
            return True
        self._shown = {key: seen for key, seen in self._shown.items() if at - seen <= SAME_S}
        known = same in self._shown
        self._shown.setdefault(same, at)
        return not known
