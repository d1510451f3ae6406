"""The door of the mesh port under a flood: what it costs, and whom."""

from __future__ import annotations

import contextlib
import errno
import resource
import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from mesh_lab import PATIENCE_S, Box, check_echo, echo, founder, links_of, member, read_exactly, start

from tightwad_agent.ids import Address
from tightwad_agent.mesh import doorman
from tightwad_agent.mesh.doorman import MAX_HOSTS, MAX_LET_IN, MAX_TAKEN, MEMBER_S, Doorman, Pace
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.links import Limits, Services
from tightwad_agent.wire.frames import PREFIX

SLOW, QUICK = Pace(10.0, 20.0), Pace(100.0, 200.0)
FLOOD_S = 5.0
FLOODER = "127.0.0.9"


def n_admitted(door: Doorman, host: str, now: float, n: int = 500) -> int:
    return sum(door.admits(host, now) for _ in range(n))


def test_a_host_may_come_so_often_and_then_so_fast() -> None:
    door = Doorman(SLOW, QUICK)
    assert n_admitted(door, "10.0.0.1", 0.0) == 20
    assert n_admitted(door, "10.0.0.1", 1.0) == 10
    assert n_admitted(door, "10.0.0.1", 100.0) == 20
    assert n_admitted(door, "10.0.0.2", 100.0) == 20
    assert door.n_refused == 4 * 500 - 70


def test_a_members_host_may_come_more_often_for_a_while() -> None:
    door = Doorman(SLOW, QUICK)
    assert n_admitted(door, "10.0.0.1", 0.0) == 20
    door.knows("10.0.0.1", 0.0)
    assert n_admitted(door, "10.0.0.1", 0.0) == 200
    door.knows("10.0.0.1", 0.5)  # again: that fills nothing up
    assert n_admitted(door, "10.0.0.1", 1.0) == 100
    assert n_admitted(door, "10.0.0.1", 1.0 + MEMBER_S) == 20


def test_one_ipv6_network_is_one_host() -> None:
    door = Doorman(SLOW, QUICK)
    assert sum(door.admits(f"2001:db8::{i:x}", 0.0) for i in range(100)) == 20
    assert door.admits("2001:db8:0:1::1", 0.0)
    assert door.admits("fe80::1%eth0", 0.0)
    assert door.admits("::ffff:10.0.0.1", 0.0)
    assert door.admits("no:address", 0.0)


def test_hosts_are_bounded_and_the_latest_are_kept() -> None:
    door = Doorman(SLOW, QUICK)
    for i in range(3 * MAX_HOSTS):
        door.admits("10.0.0.1", 0.0)
        door.admits(f"10.1.{i // 256}.{i % 256}", 0.0)
    assert len(door) == MAX_HOSTS
    assert not door.admits("10.0.0.1", 0.0)


def test_a_flood_is_said_once_in_a_while() -> None:
    door = Doorman(SLOW, QUICK)
    assert [door.should_say(t) for t in (0.0, 1.0, 9.0, 10.0, 11.0)] == [True, False, False, True, False]


class Port:
    """A listening socket in which so many connections wait; then what `end` says."""

    def __init__(self, waiting: int, end: OSError) -> None:
        self.waiting, self.end = waiting, end
        self.pairs: list[socket.socket] = []

    def accept(self) -> tuple[socket.socket, tuple[str, int]]:
        if not self.waiting:
            raise self.end
        self.waiting -= 1
        near, far = socket.socketpair()
        self.pairs += [near, far]
        return near, ("10.0.0.1", 1)

    def close(self) -> None:
        for s in self.pairs:
            s.close()


@pytest.fixture
def ports() -> Iterator[list[Port]]:
    made: list[Port] = []
    yield made
    for port in made:
        port.close()


@pytest.mark.parametrize(
    ("waiting", "end", "goes_on", "let_in"),
    [
        (3, BlockingIOError(), True, 3),
        (MAX_TAKEN, BlockingIOError(), True, MAX_LET_IN),  # the others wait for the next turn
        (2, OSError(errno.ECONNABORTED, "gone"), True, 2),
        (2, OSError(errno.EMFILE, "too many files"), False, 2),
    ],
)
async def test_some_are_taken_in_at_a_time(
    ports: list[Port], waiting: int, end: OSError, goes_on: bool, let_in: int
) -> None:
    port: Any = Port(waiting, end)
    ports.append(port)
    came: list[trio.SocketStream] = []
    assert doorman._take_some(port, Doorman(), came.append) is goes_on
    assert len(came) == let_in


async def test_a_system_without_room_is_asked_again_later(
    nursery: trio.Nursery, one: Identity, two: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_some, tries = doorman._take_some, iter([False])
    monkeypatch.setattr(doorman, "_take_some", lambda *args: next(tries, True) and take_some(*args))
    box = await start(nursery, one)
    await check_echo(links_of(two), box)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return founder(tmp_path_factory.mktemp("door"), "one")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, one: Identity) -> Identity:
    return member(one, tmp_path_factory.mktemp("door"), "two")


class Flood:
    """Threads of another host that open connections as fast as they can: garbage, oversized frames, TLS without a
    certificate, and silence that is held for good."""

    KINDS = ("garbage", "oversized", "tls", "silence")

    def __init__(self, address: Address) -> None:
        self.n = dict.fromkeys(self.KINDS, 0)
        self._address = address
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(kind,)) for kind in self.KINDS]

    def __enter__(self) -> Flood:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, kind: str) -> None:
        held: list[socket.socket] = []
        while not self._over.wait(0.001):
            with contextlib.suppress(OSError):
                made = socket.create_connection(self._address, timeout=1, source_address=(FLOODER, 0))
                held += self._one(kind, made)
                self.n[kind] += 1
            while len(held) > 200:
                held.pop(0).close()
        for s in held:
            s.close()

    def _one(self, kind: str, made: socket.socket) -> list[socket.socket]:
        if kind == "silence":
            return [made]
        with made:
            if kind == "tls":
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                with contextlib.suppress(OSError), context.wrap_socket(made) as tls:
                    tls.sendall(PREFIX.pack(1 << 30, 1 << 30))
            else:
                made.sendall(b"\xff" * 400 if kind == "garbage" else PREFIX.pack(1 << 31, 1 << 31))
        return []


async def test_a_flood_neither_stops_nor_swells_a_node_and_members_get_in(
    nursery: trio.Nursery, one: Identity, two: Identity
) -> None:
    box: Box = await start(nursery, one, Services({"echo": echo}), limits=Limits())
    links = links_of(two)
    stream, _ = await links.dial([box.address], want=box.node, service="echo", deadline_s=PATIENCE_S)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Flood(box.address) as flood:
        end, n_beats = trio.current_time() + FLOOD_S, 0
        while trio.current_time() < end:
            await stream.send_all(b"beat")  # an open link goes on
            assert await read_exactly(stream, 4) == b"beat"
            n_beats += 1
            await check_echo(links, box)  # and a member may open others
            assert box.links.n_waiting <= Limits().max_unauthenticated
    assert n_beats >= 3
    assert all(flood.n.values())
    assert box.links._doorman.n_refused > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB
    assert len(box.links._connections._open) < 50
    await stream.aclose()
