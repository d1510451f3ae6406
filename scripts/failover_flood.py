"""What a hostile or broken machine sends: garbage, connections that stay, frames and heads without end.

    failover_flood.py PLAN        PLAN: JSON, see `Plan`; it runs on a machine of the lab, and prints one JSON object

Each connection of garbage is closed with a reset, so that the sender's own ports do not run out.
"""

from __future__ import annotations

import contextlib
import errno
import json
import random
import selectors
import socket
import ssl
import struct
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

RESET = struct.pack("ii", 1, 0)
MAX_OPEN = 400
"""Connections of garbage that are being made at once, for each of the ports."""
STUCK_S = 2.0
N_SLOW = 64
"""Slow connections to each port."""
SLOW_PERIOD_S = 1.0
TURN_S = 0.01
HUGE = 1 << 31
TLS_RECORD = b"\x16\x03\x01\xff\xff\x01"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`ports`: (host, port, whether it talks TLS). `rate`: connections a second to each of them."""

    ports: Sequence[tuple[str, int, bool]]
    rate: float
    seconds: float
    seed: int = 0

    def text(self) -> str:
        return json.dumps(asdict(self))


class Flood:
    """Runs a plan in one thread."""

    def __init__(self, plan: Plan) -> None:
        self.told: Counter[str] = Counter()
        self._plan = plan
        self._rng = random.Random(plan.seed)
        self._waiting = selectors.DefaultSelector()
        self._open: dict[socket.socket, float] = {}
        self._slow: list[socket.socket] = []

    def run(self) -> dict[str, float]:
        began = time.monotonic()
        n_due, slow_at = 0, began
        while (now := time.monotonic()) < began + self._plan.seconds:
            due = int((now - began) * self._plan.rate)
            self._connect(due - n_due)
            n_due = due
            if now >= slow_at:
                slow_at = now + SLOW_PERIOD_S
                self._drip()
                self._oversize()
            self._send(TURN_S)
            self._forget(now)
        self._close()
        return {**self.told, "rate": self.told["connected"] / self._plan.seconds / len(self._plan.ports)}

    def _connect(self, n: int) -> None:
        for _ in range(n):
            for host, port, _tls in self._plan.ports:
                if len(self._open) >= MAX_OPEN * len(self._plan.ports):
                    self.told["held back"] += 1
                    continue
                sock = socket.socket()
                sock.setblocking(False)
                if sock.connect_ex((host, port)) not in (0, errno.EINPROGRESS):
                    self.told["not made"] += 1
                    sock.close()
                    continue
                self._open[sock] = time.monotonic()
                self._waiting.register(sock, selectors.EVENT_WRITE)

    def _send(self, wait_s: float) -> None:
        for key, _ in self._waiting.select(wait_s):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            try:
                sock.send(self._garbage())
                self.told["connected"] += 1
            except OSError:
                self.told["refused"] += 1
            self._drop(sock)

    def _garbage(self) -> bytes:
        noise = self._rng.randbytes(self._rng.choice((1, 64, 700)))
        return self._rng.choice((noise, TLS_RECORD + noise, b"GET " + noise, b"POST / HTTP/1.1\r\n" + noise))

    def _forget(self, now: float) -> None:
        for sock in [s for s, since in self._open.items() if now - since > STUCK_S]:
            self.told["unanswered"] += 1
            self._drop(sock)

    def _drop(self, sock: socket.socket) -> None:
        self._waiting.unregister(sock)
        del self._open[sock]
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        sock.close()

    def _drip(self) -> None:
        """Slow-loris: as many as there may be at each port, a byte a second on each."""
        for sock in list(self._slow):
            try:
                sock.send(b"G")
            except BlockingIOError:
                pass  # its buffer is full: it stays open all the same
            except OSError:
                self.told["slow ones cut"] += 1
                self._slow.remove(sock)
                sock.close()
        missing = N_SLOW - len(self._slow) // len(self._plan.ports)
        for host, port, _tls in list(self._plan.ports) * max(0, missing):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex((host, port))
            self._slow.append(sock)

    def _oversize(self) -> None:
        """One frame, and one head of a request, that announce far more than there is room for."""
        host, port, tls = self._rng.choice(self._plan.ports)
        try:
            with socket.create_connection((host, port), 0.5) as plain:
                sock = _unchecked().wrap_socket(plain) if tls else plain
                frame = struct.pack("!II", HUGE - 1, HUGE - 1) + b"x" * 4096
                head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % (1 << 60)
                sock.sendall(frame if tls else head + b"x-a: " + b"b" * (1 << 20))
                self.told["oversized"] += 1
        except OSError:
            self.told["oversized ones cut"] += 1

    def _close(self) -> None:
        for sock in [*self._open, *self._slow]:
            sock.close()
        self._waiting.close()


def _unchecked() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


if __name__ == "__main__":
    print(json.dumps(Flood(Plan(**json.loads(sys.argv[1]))).run()), flush=True)
