"""Stands in for the network between machines: TCP links with a round trip and a rate, on loopback, in one process.

    delay_relay.py [--realtime]            commands come as JSON lines on stdin, answers go out on stdout; EOF ends it

    {"do": "link", "port": 6001}           a new link to that loopback port; answers {"port": where it listens}
    {"do": "set", "rtt_ms": 10, "mbit": 200}   for all links from now on; 0 Mbit/s: no limit
    {"do": "stats"}                        what it did since the last time it was asked, see `Relay.stats`

Half of the round trip is added each way. Each link is a machine's cable: both directions have the full rate, and all
connections of the link share it. A chunk is on its way for the time its bytes take at that rate, after those before it,
and then for the delay. Handshakes are not delayed; what both peers' kernels hold is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import heapq
import json
import os
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

READ_SIZE = 64 << 10
MAX_QUEUED = 8 << 20
"""Bytes that one direction of one connection may have on the way; beyond it its sender has to wait."""
MAX_LATE_SAMPLES = 200_000
READ = select.EPOLLIN
WRITE = select.EPOLLOUT
FAILED = select.EPOLLERR | select.EPOLLHUP
ABORT = None
"""In a queue: the sender broke the connection off, and so will the relay."""


@dataclass(slots=True)
class Wire:
    """What all links have in common. `delay_s` one way; `rate` in bytes per second, 0 without a limit."""

    delay_s: float = 0.0
    rate: float = 0.0


@dataclass(slots=True)
class Lane:
    """One direction of one link: says when bytes that are sent now have arrived."""

    wire: Wire
    free_at: float = 0.0

    def due(self, now: float, n_bytes: int) -> float:
        """When the last of `n_bytes` arrives; takes the lane for as long as they need at its rate."""
        if self.wire.rate and n_bytes:
            self.free_at = max(self.free_at, now) + n_bytes / self.wire.rate
            return self.free_at + self.wire.delay_s
        return now + self.wire.delay_s


class Pipe:
    """One direction of one connection: what was read from `source` and is not yet written to `sink`."""

    __slots__ = (
        "blocked",
        "ended",
        "lane",
        "last_due",
        "n_queued",
        "paused",
        "queue",
        "reading",
        "sink",
        "source",
        "watched",
    )

    def __init__(self, source: socket.socket, sink: socket.socket, lane: Lane) -> None:
        self.source = source
        self.sink = sink
        self.lane = lane
        self.queue: deque[tuple[float, bytes | None]] = deque()
        self.n_queued = 0
        self.last_due = 0.0
        self.reading = True  # the source may still give something
        self.paused = False  # too much on the way
        self.blocked = False  # the sink takes nothing now
        self.ended = False  # the sink was told the end
        self.watched = READ  # what epoll was asked about the source

    def put(self, now: float, data: bytes | None) -> bool:
        """Sends off a chunk, `b""` for the end. Whether the queue was empty, so that its head needs a timer."""
        due = self.lane.due(now, len(data or b""))
        self.last_due = due = max(due, self.last_due)  # a shorter delay from now on overtakes nothing
        self.queue.append((due, data))
        self.n_queued += len(data or b"")
        return len(self.queue) == 1


@dataclass(slots=True)
class Counts:
    """Since the last `stats`."""

    n_bytes: int = 0
    n_chunks: int = 0
    late_s: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    cpu_began: float = field(default_factory=time.process_time)


class Relay:
    """One loop over all links. Not for use from several threads."""

    def __init__(self) -> None:
        self.wire = Wire()
        self._poll = select.epoll()
        self._timers: list[tuple[float, int, Pipe]] = []
        self._n_timers = 0
        self._ready: dict[int, Callable[[int], None]] = {}
        self._pairs: dict[int, tuple[Pipe, Pipe]] = {}
        self._listeners: list[socket.socket] = []
        self._counts = Counts()
        self._closed = False

    # links and settings

    def link(self, port: int) -> int:
        """A new link to a loopback port; the port it listens on."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        listener.setblocking(False)
        self._listeners.append(listener)
        up, down = Lane(self.wire), Lane(self.wire)
        self.watch(listener.fileno(), READ, lambda _events: self._accept(listener, port, up, down))
        return int(listener.getsockname()[1])

    def set(self, rtt_ms: float, mbit: float) -> None:
        """Holds for what is sent from now on."""
        self.wire.delay_s = rtt_ms / 2000
        self.wire.rate = mbit * 125_000

    def stats(self) -> dict[str, float]:
        """Connections now, bytes and chunks since the last call, how late chunks were delivered (microseconds: mean,
        median, 99th percentile, worst), and the relay's own CPU in percent of a core."""
        counts, self._counts = self._counts, Counts()
        late = sorted(counts.late_s) or [0.0]
        wall = max(self._counts.began - counts.began, 1e-9)
        return {
            "connections": len(self._pairs) // 2,
            "bytes": counts.n_bytes,
            "chunks": counts.n_chunks,
            "late_us_mean": round(sum(late) / len(late) * 1e6, 1),
            "late_us_median": round(late[len(late) // 2] * 1e6, 1),
            "late_us_p99": round(late[int(len(late) * 0.99)] * 1e6, 1),
            "late_us_worst": round(late[-1] * 1e6, 1),
            "cpu_percent": round((self._counts.cpu_began - counts.cpu_began) / wall * 100, 2),
        }

    # the loop

    def watch(self, fd: int, events: int, ready: Callable[[int], None]) -> None:
        self._ready[fd] = ready
        self._poll.register(fd, events)

    def stop(self) -> None:
        self._closed = True

    def close(self) -> None:
        """Everything that is open, once `run` is over."""
        for out, _into in list(self._pairs.values()):
            self._close(out)
        for listener in self._listeners:
            listener.close()
        self._poll.close()

    def run(self) -> None:
        """Until `stop`. Waits with `select` on the epoll descriptor, which takes microseconds where epoll itself
        takes milliseconds."""
        fds = [self._poll.fileno()]
        while not self._closed:
            wait = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            if wait is None or wait > 0:
                select.select(fds, (), (), wait)
            self._deliver_due()
            for fd, events in self._poll.poll(0):
                ready = self._ready.get(fd)
                if ready is not None:
                    ready(events)

    def _deliver_due(self) -> None:
        timers = self._timers
        while timers and timers[0][0] <= time.monotonic():
            self._deliver(heapq.heappop(timers)[2])

    def _arm(self, pipe: Pipe) -> None:
        self._n_timers += 1
        heapq.heappush(self._timers, (pipe.queue[0][0], self._n_timers, pipe))

    # connections

    def _accept(self, listener: socket.socket, port: int, up: Lane, down: Lane) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            near, _address = listener.accept()
            far = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            for end in (near, far):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(BlockingIOError):
                far.connect(("127.0.0.1", port))  # what comes before it is connected waits in its queue
            self._join(near, far, up, down)

    def _join(self, near: socket.socket, far: socket.socket, up: Lane, down: Lane) -> None:
        there, back = Pipe(near, far, up), Pipe(far, near, down)
        self._pairs[near.fileno()] = (there, back)
        self._pairs[far.fileno()] = (back, there)
        self.watch(near.fileno(), READ, lambda events: self._event(there, back, events))
        self.watch(far.fileno(), READ, lambda events: self._event(back, there, events))

    def _event(self, out: Pipe, into: Pipe, events: int) -> None:
        """Something happened at one socket: `out` reads from it, `into` writes to it."""
        if into.blocked and events & (WRITE | FAILED):
            into.blocked = False
            self._interest(out, into)
            self._deliver(into)
        if out.reading and not out.paused and out.source.fileno() in self._pairs:
            self._read(out)

    def _read(self, pipe: Pipe) -> None:
        data: bytes | None
        try:
            data = pipe.source.recv(READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = ABORT
        if not data:
            pipe.reading = False
        if pipe.put(time.monotonic(), data):
            self._deliver_or_arm(pipe)
        pipe.paused = pipe.n_queued >= MAX_QUEUED
        self._interest_of_source(pipe)

    def _deliver_or_arm(self, pipe: Pipe) -> None:
        if self.wire.delay_s or self.wire.rate:
            self._arm(pipe)
        else:
            self._deliver(pipe)

    def _deliver(self, pipe: Pipe) -> None:
        """Writes what is due; the timer of what is not."""
        if pipe.sink.fileno() not in self._pairs:
            return
        while pipe.queue and not pipe.blocked:
            due, data = pipe.queue[0]
            now = time.monotonic()
            if due > now:
                self._arm(pipe)
                break
            if not data:
                self._end(pipe, data)
                return
            self._write(pipe, due, data, now)
        if pipe.paused and pipe.n_queued < MAX_QUEUED // 2:
            pipe.paused = False
            self._interest_of_source(pipe)

    def _write(self, pipe: Pipe, due: float, data: bytes, now: float) -> None:
        try:
            n = pipe.sink.send(data)
        except BlockingIOError:
            n = 0
        except OSError:
            self._close(pipe)
            return
        pipe.n_queued -= n
        counts = self._counts
        counts.n_bytes += n
        if n < len(data):
            pipe.queue[0] = (due, data[n:])
            pipe.blocked = True
            self._interest(*self._pairs[pipe.sink.fileno()])
            return
        pipe.queue.popleft()
        counts.n_chunks += 1
        if len(counts.late_s) < MAX_LATE_SAMPLES:
            counts.late_s.append(now - due)

    def _end(self, pipe: Pipe, data: bytes | None) -> None:
        other = self._pairs[pipe.sink.fileno()][0]
        pipe.queue.popleft()
        pipe.ended = True
        if data is ABORT or other.ended:
            self._close(pipe, abort=data is ABORT)
            return
        try:
            pipe.sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._close(pipe)

    def _interest_of_source(self, pipe: Pipe) -> None:
        pair = self._pairs.get(pipe.source.fileno())
        if pair is not None:
            self._interest(*pair)

    def _interest(self, out: Pipe, into: Pipe) -> None:
        """What to be told of the socket that `out` reads from and `into` writes to. One that is wanted for nothing is
        not watched: its hang-up, which cannot be masked, would come for as long as there is something on the way."""
        fd = out.source.fileno()
        wanted = (READ if out.reading and not out.paused else 0) | (WRITE if into.blocked else 0)
        if wanted == out.watched:
            return
        if not out.watched:
            self._poll.register(fd, wanted)
        elif wanted:
            self._poll.modify(fd, wanted)
        else:
            self._poll.unregister(fd)
        out.watched = wanted

    def _close(self, pipe: Pipe, *, abort: bool = True) -> None:
        """Both sockets; what is still on the way is lost, as it is when a machine goes away."""
        for end in (pipe.source, pipe.sink):
            fd = end.fileno()
            if fd < 0:
                continue
            out = self._pairs[fd][0]
            out.queue.clear()
            if out.watched:
                self._poll.unregister(fd)
            del self._ready[fd], self._pairs[fd]
            if abort:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()


# the process


class Commands:
    """JSON lines on stdin, one answer each."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._rest = b""

    def ready(self, _events: int) -> None:
        data = os.read(0, READ_SIZE)
        if not data:
            self._relay.stop()
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            print(json.dumps(self.obey(json.loads(line))), flush=True)

    def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "link":
            return {"port": self._relay.link(command["port"])}
        if command["do"] == "set":
            self._relay.set(command["rtt_ms"], command["mbit"])
            return {}
        if command["do"] == "stats":
            return dict(self._relay.stats())
        return {"error": f"unknown command {command['do']!r}"}


def go_first() -> bool:
    """A cable does not wait for a core: the relay goes before the programs it connects, where that is allowed."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="delay_relay.py", description=__doc__)
    parser.add_argument("--realtime", action="store_true", help="with the scheduler's real-time priority, if allowed")
    options = parser.parse_args()
    relay = Relay()
    print(json.dumps({"realtime": options.realtime and go_first()}), flush=True)
    relay.watch(0, READ, Commands(relay).ready)
    gc.freeze()
    gc.disable()  # no cycles are made
    relay.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
