"""An agent that writes down what its mesh does, for `scripts/bench failover`. It takes the agent's own arguments.

Below the folder that TIGHTWAD_TRACE names, one JSON line each, with `t` by the clock that all processes share:

    {"what": "beat", "to": ID, "heard_ago_s": 0.98}                a heartbeat goes out; when its receiver was heard
    {"what": "state", "node": ID, "old": "alive", "new": "dead"}   what this node thinks of another
    {"what": "obeys", "epoch": [3, ID], "who": ID or null}         whose commands it carries out from now on
    {"what": "command", "epoch": [3, ID], "obeyed": [3, ID], "accepted": true}
    {"what": "joining"}  {"what": "sighted"}                       a token was read; a member was seen over mDNS
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tightwad_agent import main as commands
from tightwad_agent.__main__ import main
from tightwad_agent.ids import Epoch
from tightwad_agent.mesh.service import MeshService


class Trace:
    """Lines of one process."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / f"{os.getpid()}.jsonl").open("a", buffering=1, encoding="utf-8")

    def note(self, what: str, **facts: Any) -> None:
        self._file.write(json.dumps({"t": time.monotonic(), "what": what, **facts}) + "\n")


def install(trace: Trace) -> None:
    """Puts the trace around what the mesh does anyway."""
    beat, state_changed, accept = MeshService.beat, MeshService.state_changed, MeshService.accept_command
    coordinator_changed = MeshService.coordinator_changed
    enrol, search = commands._enrol, commands._search

    def traced_beat(self: MeshService, effect: Any) -> Any:
        trace.note("beat", to=str(effect.node), heard_ago_s=effect.heard_ago_s)
        return beat(self, effect)

    def traced_state(self: MeshService, effect: Any) -> None:
        trace.note("state", node=str(effect.node), old=effect.old and str(effect.old), new=str(effect.new))
        state_changed(self, effect)

    def traced_coordinator(self: MeshService, effect: Any) -> None:
        trace.note("obeys", epoch=_plain(self.epoch), who=self.coordinator and str(self.coordinator))
        coordinator_changed(self, effect)

    async def traced_accept(self: MeshService, peer: Any, epoch: Epoch) -> bool:
        accepted = await accept(self, peer, epoch)
        trace.note("command", epoch=_plain(epoch), obeyed=_plain(self.epoch), accepted=accepted)
        return accepted

    async def traced_enrol(*args: Any) -> Any:
        trace.note("joining")
        return await enrol(*args)

    async def traced_search(*args: Any) -> Any:
        found = await search(*args)
        trace.note("sighted")
        return found

    MeshService.beat = traced_beat  # type: ignore[method-assign]
    MeshService.state_changed = traced_state  # type: ignore[method-assign]
    MeshService.coordinator_changed = traced_coordinator  # type: ignore[method-assign]
    MeshService.accept_command = traced_accept  # type: ignore[method-assign]
    commands._enrol, commands._search = traced_enrol, traced_search


def _plain(epoch: Epoch) -> list[Any]:
    return [epoch.counter, str(epoch.node)]


if __name__ == "__main__":
    if "up" in sys.argv[1:2]:
        install(Trace(Path(os.environ["TIGHTWAD_TRACE"])))
    main()
