"""What the command `events` does: asks the agent, or reads the files of one that is stopped, and shows it. Blocks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tightwad_agent import control, event_log, render_events
from tightwad_agent.errors import AgentNotRunning, TightwadError
from tightwad_agent.event_commands import shown
from tightwad_agent.event_merge import Told, chosen, merge
from tightwad_agent.events import MAX_EVENTS, Kind
from tightwad_agent.mesh.state import NodeState

FOLLOW_PERIOD_S = 1.0

Plain = dict[str, Any]


def look(state_dir: Path, name: str, params: Plain, *, follow: bool, as_json: bool) -> None:
    """Shows once, or goes on until Ctrl-C."""
    client = control.AgentClient(state_dir)
    try:
        first = client.call("events", params)
    except AgentNotRunning:
        if follow or not (state_dir / event_log.FILE).exists():
            raise
        render_events.events(from_files(state_dir, name, params), as_json=as_json)
        return
    if not follow:
        render_events.events(first, as_json=as_json)
        return
    try:
        _follow(client, params, first, as_json)
    except KeyboardInterrupt:
        return


def from_files(state_dir: Path, name: str, params: Plain) -> Plain:
    """As the agent would answer for itself alone."""
    since = time.time() - params["since_s"] if params["since_s"] else 0.0
    kinds = [Kind(kind) for kind in params["kinds"]]
    node = (params["node"], params["node"]) if params["node"] else None
    found = chosen(merge([Told(name, event_log.read(state_dir))]), since=since, kinds=kinds, node=node, n=params["n"])
    with_names = _names(state_dir)
    return {
        "events": [shown(h, with_names) for h in found],
        "silent": [],
        "clocks": [],
        "note": f"No agent runs with {state_dir}; these are the events in its files.",
    }


def _names(state_dir: Path) -> Callable[[str], str]:
    """Puts names in place of the short ids of nodes that this one has met."""
    try:
        peers = NodeState.load(state_dir).peers
    except TightwadError:
        peers = ()

    def with_names(text: str) -> str:
        for peer in peers:
            text = text.replace(peer.node.short, peer.name)
        return text

    return with_names


def _follow(client: control.AgentClient, params: Plain, first: Plain, as_json: bool) -> None:
    news = render_events.News(as_json)
    news.show(first)
    later = {**params, "since_s": 0, "since": first["now"], "n": MAX_EVENTS}
    cursor = first["cursor"]
    while True:
        sys.stdout.flush()
        time.sleep(FOLLOW_PERIOD_S)
        found = client.call("events", {**later, "after": cursor})
        cursor = found["cursor"]
        news.show(found)
