"""The cables of a lab, slow: a switch in user space that delays every frame between the namespaces of a `NetLab`.

    with NetLab(3) as lab, slowed(lab) as cables:
        cables.set(10, 200)             # round trip in ms, Mbit/s each way; 0: as fast as it goes
        ...
        cables.stats()

Each node's `eth0` becomes a TAP device with the same address, whose frames pass through one process. Half of the round
trip is added each way. A frame occupies the cables of its sender and of its receiver for the time its bytes take, both
at once. Frames are as large as devices allow, so that Python's time per frame does not limit the rate.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import heapq
import json
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delay_relay import go_first
from netlab import CLONE_NEWNET, NetLab, NetLabError

DEVICE = Path("/dev/net/tun")
NAME = "eth0"
MTU = 65_500
MAX_FRAME = MTU + 18
BURST = 32
"""Frames that are read from one cable before the others have their turn."""
MAX_LATE_SAMPLES = 200_000
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x2, 0x1000
START_S = 20.0


class Cables:
    """The switch's process, and what it is told."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid
        self.realtime: bool = self._answer()["realtime"]

    def set(self, rtt_ms: float, mbit: float, node: int | None = None) -> None:
        """Holds for what is sent from now on. `node`: only its cable is long; the others delay nothing then."""
        self._ask(do="set", rtt_ms=rtt_ms, mbit=mbit, node=node)

    def stats(self) -> dict[str, Any]:
        """Since the last call: frames, bytes, frames that the other end did not take, microseconds that frames came too
        late (mean, median, 99th percentile, worst), and the switch's CPU in percent of a core."""
        return self._ask(do="stats")

    def _ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], START_S)
        line = self._process.stdout.readline() if readable else ""
        if not line:
            raise NetLabError("the slow cables' process " + ("ended" if readable else "does not answer"))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise NetLabError(answer["error"])
        return answer


def check() -> None:
    """Raises `NetLabError` if there can be no such cables here."""
    if not DEVICE.exists():
        raise NetLabError(f"slow cables need {DEVICE}, which is not there: modprobe tun")
    try:
        os.close(os.open(DEVICE, os.O_RDWR))
    except OSError as exc:
        raise NetLabError(f"slow cables need {DEVICE}: {exc.strerror}; modprobe tun, and run this with sudo") from None


@contextlib.contextmanager
def slowed(lab: NetLab) -> Iterator[Cables]:
    """Puts the switch in place of the lab's own, before anything runs on the nodes. What the lab can do to its cables
    is without effect then."""
    check()
    for node in lab.nodes:
        lab.run(node, ["ip", "link", "delete", NAME])
    argv = [sys.executable, __file__, *(node.netns for node in lab.nodes)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        cables = Cables(process)
        for node in lab.nodes:
            lab.run(node, ["ip", "address", "add", f"{node.address}/{lab.network.prefixlen}", "dev", NAME])
            lab.run(node, ["ip", "link", "set", NAME, "mtu", str(MTU), "up"])
        yield cables
    finally:
        process.kill()
        process.communicate()


# the process


@dataclass(slots=True)
class Cable:
    """One node's. Until when each direction is taken, by the clock of this process."""

    fd: int
    delay_s: float = 0.0
    up_free_at: float = 0.0
    down_free_at: float = 0.0


@dataclass(slots=True)
class Counts:
    """Since the last `stats`."""

    n_frames: int = 0
    n_bytes: int = 0
    n_lost: int = 0
    late_s: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    cpu_began: float = field(default_factory=time.process_time)


class Switch:
    """Learns who is where from the senders; floods what is for nobody it knows."""

    def __init__(self, fds: Sequence[int]) -> None:
        self._cables = [Cable(fd) for fd in fds]
        self._where: dict[bytes, Cable] = {}
        self._on_the_way: list[tuple[float, int, int, bytes]] = []
        self._n_ever = 0
        self._rate = 0.0
        self._counts = Counts()
        self._commands = b""

    def run(self) -> None:
        """Until standard input ends. `select` wakes within microseconds of a deadline, epoll within milliseconds."""
        by_fd = {cable.fd: cable for cable in self._cables}
        fds = [0, *by_fd]
        while True:
            wait = max(0.0, self._on_the_way[0][0] - time.monotonic()) if self._on_the_way else None
            readable, _, _ = select.select(fds, (), (), wait)
            self._deliver()
            for fd in readable:
                if fd:
                    self._take(by_fd[fd])
                elif not self._obey():
                    return

    def _take(self, source: Cable) -> None:
        for _ in range(BURST):
            try:
                frame = os.read(source.fd, MAX_FRAME)
            except OSError:  # nothing more, or the device is down
                return
            now = time.monotonic()
            self._where[frame[6:12]] = source
            known = self._where.get(frame[:6])
            for sink in (known,) if known else self._cables:
                if sink is not source:
                    self._send(frame, source, sink, now)

    def _send(self, frame: bytes, source: Cable, sink: Cable, now: float) -> None:
        due = now
        if self._rate:
            due = max(now, source.up_free_at, sink.down_free_at) + len(frame) / self._rate
            source.up_free_at = sink.down_free_at = due
        self._n_ever += 1
        due += max(source.delay_s, sink.delay_s)
        heapq.heappush(self._on_the_way, (due, self._n_ever, sink.fd, frame))

    def _deliver(self) -> None:
        counts, waiting = self._counts, self._on_the_way
        while waiting and waiting[0][0] <= (now := time.monotonic()):
            due, _, fd, frame = heapq.heappop(waiting)
            try:
                os.write(fd, frame)
            except OSError:  # the device is down, or its node has no memory for it: lost, as on a cable
                counts.n_lost += 1
                continue
            counts.n_frames += 1
            counts.n_bytes += len(frame)
            if len(counts.late_s) < MAX_LATE_SAMPLES:
                counts.late_s.append(now - due)

    def _obey(self) -> bool:
        data = os.read(0, 1 << 16)
        *lines, self._commands = (self._commands + data).split(b"\n")
        for line in lines:
            command = json.loads(line)
            answer: dict[str, Any] = {}
            if command["do"] == "set":
                self._rate = command["mbit"] * 125_000
                for i, cable in enumerate(self._cables):
                    cable.delay_s = command["rtt_ms"] / 2000 if command["node"] in (None, i) else 0.0
            else:
                answer = self._stats()
            print(json.dumps(answer), flush=True)
        return bool(data)

    def _stats(self) -> dict[str, Any]:
        counts, self._counts = self._counts, Counts()
        late = sorted(counts.late_s) or [0.0]
        wall = max(self._counts.began - counts.began, 1e-9)
        return {
            "frames": counts.n_frames,
            "bytes": counts.n_bytes,
            "lost": counts.n_lost,
            "late_us_mean": round(sum(late) / len(late) * 1e6, 1),
            "late_us_median": round(late[len(late) // 2] * 1e6, 1),
            "late_us_p99": round(late[int(len(late) * 0.99)] * 1e6, 1),
            "late_us_worst": round(late[-1] * 1e6, 1),
            "cpu_percent": round((self._counts.cpu_began - counts.cpu_began) / wall * 100, 2),
        }


def tap(netns: str) -> int:
    """A TAP device called `eth0` in a namespace, which this process enters for it; it goes with the descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{netns}").open("rb") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), netns)
    fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", NAME.encode(), _IFF_TAP | _IFF_NO_PI))
    return fd


def main(namespaces: Sequence[str]) -> int:
    try:
        switch = Switch([tap(netns) for netns in namespaces])
    except OSError as exc:
        hint = ": a TAP device needs root (CAP_NET_ADMIN)" if exc.errno == errno.EPERM else ""
        print(json.dumps({"error": f"no slow cable: {exc}{hint}"}), flush=True)
        return 1
    print(json.dumps({"realtime": go_first()}), flush=True)
    gc.freeze()
    gc.disable()  # no cycles are made
    switch.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
