"""What `scripts/bench swarm` compares with: one TCP stream, the file sent to each in turn, libtorrent."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import swarm_torrent
from netlab import NetLab
from swarm_lab import SCRIPTS, WIRE_PORT, Child, Children, SwarmLabError

from tightwad_agent.config import load

VERSION = swarm_torrent.REQUIREMENT.partition("==")[2]
WIRE_S = 600.0


def goodput(lab: NetLab, folder: Path, file: Path, n_bytes: int) -> float:
    """Bytes per second of one TCP stream from the first node to the second."""
    n = min(n_bytes, file.stat().st_size)
    with tempfile.TemporaryDirectory(dir=folder) as place, Children(lab, Path(place)) as children:
        _receiver(children, lab, 1, "-")
        sent = _sender(children, lab, file, n, [1])
        (event,) = children.wait("sent", [sent], WIRE_S)
    return float(n / event["seconds"])


def in_turn(lab: NetLab, folder: Path, file: Path, n: int) -> float:
    """Seconds until the first node has sent the file to all `n` others, one after the other."""
    size = file.stat().st_size
    with tempfile.TemporaryDirectory(dir=folder) as place, Children(lab, Path(place)) as children:
        for i in range(1, n + 1):
            _receiver(children, lab, i, str(Path(place) / f"got{i}"))
        sent = _sender(children, lab, file, size, list(range(1, n + 1)))
        return float(sum(children.wait("sent", [sent], WIRE_S)[0]["seconds"] for _ in range(n)))


def _receiver(children: Children, lab: NetLab, node: int, out: str) -> None:
    where = f"{lab.nodes[node].address}:{WIRE_PORT}"
    child = children.start(node, [sys.executable, SCRIPTS / "swarm_wire.py", "receive", where, out])
    children.wait("ready", [child])


def _sender(children: Children, lab: NetLab, file: Path, n_bytes: int, to: list[int]) -> Child:
    wheres = [f"{lab.nodes[node].address}:{WIRE_PORT}" for node in to]
    return children.start(0, [sys.executable, SCRIPTS / "swarm_wire.py", "send", file, str(n_bytes), *wheres])


class Torrent:
    """libtorrent on the same nodes. `problem` says why it is left out."""

    def __init__(self, folder: Path, file: Path) -> None:
        self.problem = ""
        self.makespans: dict[int, list[float]] = {}
        self._folder = folder
        self._file = file
        self._torrent = folder / "model.torrent"
        found = swarm_torrent.installed(load().cache_dir / swarm_torrent.REQUIREMENT.replace("==", "-"))
        if isinstance(found, str):
            self.problem = found
            return
        self._python = found
        made = subprocess.run(self._argv("make", file, self._torrent), capture_output=True, text=True, check=False)
        if made.returncode:
            self.problem = f"no torrent could be made: {made.stderr[-300:]}"

    @property
    def works(self) -> bool:
        return not self.problem

    def _argv(self, *rest: str | Path) -> list[str | Path]:
        return [self._python, "-I", SCRIPTS / "swarm_torrent.py", *rest]

    def distribute(self, lab: NetLab, n: int, timeout_s: float) -> None:
        """One transfer from the first node to `n` others; a failure ends the comparison, not the benchmark."""
        try:
            with tempfile.TemporaryDirectory(dir=self._folder) as place, Children(lab, Path(place)) as children:
                self.makespans.setdefault(n, []).append(self._distribute(children, lab, n, timeout_s))
        except SwarmLabError as exc:
            self.problem = f"libtorrent: {exc}"

    def _distribute(self, children: Children, lab: NetLab, n: int, timeout_s: float) -> float:
        nodes = []
        for i in range(n + 1):
            saved = children.folder / f"torrent{i}"
            saved.mkdir()
            others = [node.address for node in lab.nodes[: n + 1] if node.index != i]
            place = self._file.parent if i == 0 else saved
            nodes.append(children.start(i, self._argv("run", self._torrent, place, "01"[i == 0], *others)))
        children.wait("ready", nodes)
        nodes[0].tell(do="go")
        children.wait("begun", nodes[:1])
        began = time.monotonic()
        for node in nodes[1:]:
            node.tell(do="go")
        return float(max(e["at"] for e in children.wait("complete", nodes[1:], timeout_s)) - began)
