"""The mesh port's door: who may come in how often, and a loop that takes in many at once.

A flood from one host costs that host its connections, before anything is spent on TLS. Hosts of nodes that have shown
who they are may come more often.
"""

from __future__ import annotations

import errno
import logging
import math
import socket
from collections.abc import Callable
from dataclasses import dataclass

import trio

log = logging.getLogger(__name__)

MAX_HOSTS = 1024
"""Hosts that are counted one by one; beyond it the one that came least lately is forgotten."""
MAX_LET_IN = 16
MAX_TAKEN = 256
"""Connections that are let in, and that are taken at all, before the other tasks have their turn."""
PAUSE_S = 0.1
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class Pace:
    """Connections a second, and how many may come at once."""

    per_s: float
    burst: float


STRANGERS = Pace(50.0, 100.0)
MEMBERS = Pace(1000.0, 2000.0)
MEMBER_S = 120.0
"""How long a host counts as a member's after one has shown a certificate."""
_SAID_S = 10.0


@dataclass(slots=True)
class _Guest:
    left: float
    at: float
    member_until: float = -math.inf


class Doorman:
    """Counts connections of each host. IPv6 hosts of one /64 are one host."""

    def __init__(self, strangers: Pace = STRANGERS, members: Pace = MEMBERS) -> None:
        self._strangers = strangers
        self._members = members
        self._guests: dict[str, _Guest] = {}
        self._said_at = -math.inf
        self.n_refused = 0

    def __len__(self) -> int:
        return len(self._guests)

    def admits(self, host: str, now: float) -> bool:
        """Whether one more connection of this host is taken in."""
        guest = self._guest(_network(host), now)
        pace = self._members if now < guest.member_until else self._strangers
        guest.left = min(pace.burst, guest.left + (now - guest.at) * pace.per_s)
        guest.at = now
        if guest.left < 1.0:
            self.n_refused += 1
            return False
        guest.left -= 1.0
        return True

    def knows(self, host: str, now: float) -> None:
        """A member has shown its certificate from there."""
        guest = self._guest(_network(host), now)
        if now >= guest.member_until:
            guest.left = self._members.burst
        guest.member_until = now + MEMBER_S

    def should_say(self, now: float) -> bool:
        """Whether a refusal is worth a line in the log; seldom."""
        if now - self._said_at < _SAID_S:
            return False
        self._said_at = now
        return True

    def _guest(self, network: str, now: float) -> _Guest:
        guest = self._guests.pop(network, None) or _Guest(self._strangers.burst, now)
        self._guests[network] = guest  # the latest are at the end
        if len(self._guests) > MAX_HOSTS:
            del self._guests[next(iter(self._guests))]
        return guest


def _network(host: str) -> str:
    """IPv6 addresses cost nothing: whoever has one has a /64 of them."""
    plain = host.partition("%")[0]
    if ":" not in plain or "." in plain:
        return plain
    try:
        return socket.inet_pton(socket.AF_INET6, plain)[:8].hex()
    except OSError:
        return plain


Handler = Callable[[trio.SocketStream], object]
"""Starts a task for one connection."""


async def take_in(listener: trio.SocketListener, doorman: Doorman, start: Handler) -> None:
    """Takes in connections until cancelled; closes the listener then."""
    async with listener:
        with socket.fromfd(listener.socket.fileno(), listener.socket.family, listener.socket.type) as raw:
            raw.setblocking(False)
            while True:
                await trio.lowlevel.wait_readable(raw)
                if not _take_some(raw, doorman, start):
                    await trio.sleep(PAUSE_S)


def _take_some(raw: socket.socket, doorman: Doorman, start: Handler) -> bool:
    """False if the system has no room for more connections now."""
    n_in = 0
    for _ in range(MAX_TAKEN):
        if n_in == MAX_LET_IN:
            break
        try:
            connection, address = raw.accept()
        except BlockingIOError:
            return True
        except OSError as exc:
            if exc.errno not in _EXHAUSTED:
                return True  # the one that came is gone again
            log.warning("no more connections are taken in for now: %s", exc.strerror)
            return False
        n_in += _let_in(connection, str(address[0]), doorman, start)
    return True


def _let_in(connection: socket.socket, host: str, doorman: Doorman, start: Handler) -> bool:
    now = trio.current_time()
    if doorman.admits(host, now):
        connection.setblocking(False)
        start(trio.SocketStream(trio.socket.from_stdlib_socket(connection)))
        return True
    connection.close()
    if doorman.should_say(now):
        log.warning("%s opens too many connections; most are closed at once", host)
    return False
