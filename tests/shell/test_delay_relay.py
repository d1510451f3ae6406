"""The network that measurements go through: what it delays, limits, keeps in order, and closes."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from delay_relay import MAX_QUEUED, Lane, Pipe, Relay, Wire
from hypothesis import given
from hypothesis import strategies as st

SCRIPT = Path(__file__).parents[2] / "scripts" / "delay_relay.py"
DEADLINE_S = 20.0


def connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def read(sock: socket.socket, n: int) -> bytes:
    """Exactly `n` bytes, or fewer if the stream ends."""
    data = b""
    while len(data) < n and (more := sock.recv(n - len(data))):
        data += more
    return data


class Echo:
    """Sends back what comes, in capitals, and ends when its peer does. Counts its connections."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self.listener.getsockname()[1]
        self.peers: list[socket.socket] = []
        self.n_ended = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            self.peers.append(peer)
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        with peer:
            try:
                while data := peer.recv(65536):
                    peer.sendall(data.upper())
            except OSError:
                pass
        self.n_ended += 1

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join(DEADLINE_S)


@pytest.fixture
def echo() -> Iterator[Echo]:
    with closing(Echo()) as server:
        yield server


class Running:
    """A relay on a thread, told what to do through its own commands' methods before and while it runs."""

    def __init__(self) -> None:
        self.relay = Relay()
        self._wake, wake = socket.socketpair()
        self.relay.watch(wake.fileno(), 1, lambda _events: self.relay.stop())
        self._keep = wake
        self._thread = threading.Thread(target=self.relay.run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._wake.close()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        self._keep.close()
        self.relay.close()


@pytest.fixture
def running() -> Iterator[Running]:
    with closing(Running()) as relay:
        yield relay


def until(met: Any) -> None:
    end = time.monotonic() + DEADLINE_S
    while not met():
        assert time.monotonic() < end
        time.sleep(0.005)


# When bytes arrive


def test_without_a_limit_only_the_delay_counts() -> None:
    lane = Lane(Wire(delay_s=0.005))
    assert lane.due(10.0, 1_000_000) == pytest.approx(10.005)
    assert lane.due(10.0, 1) == pytest.approx(10.005)


def test_a_chunk_takes_its_bytes_time_at_the_rate_and_then_the_delay() -> None:
    lane = Lane(Wire(delay_s=0.010, rate=25_000_000))
    assert lane.due(1.0, 25_000) == pytest.approx(1.0 + 0.001 + 0.010)


def test_a_chunk_waits_for_those_before_it() -> None:
    lane = Lane(Wire(rate=1000.0))
    assert lane.due(0.0, 500) == pytest.approx(0.5)
    assert lane.due(0.1, 500) == pytest.approx(1.0)
    assert lane.due(5.0, 500) == pytest.approx(5.5)  # nothing is saved up while the lane is idle


def test_the_end_of_a_stream_comes_behind_its_bytes_and_takes_no_time() -> None:
    lane = Lane(Wire(delay_s=0.01, rate=1000.0))
    left, right = socket.socketpair()
    with left, right:
        pipe = Pipe(left, right, lane)
        assert pipe.put(0.0, b"x" * 1000)
        assert not pipe.put(0.0, b"")
        assert [due for due, _ in pipe.queue] == pytest.approx([1.01, 1.01])


@given(
    st.lists(st.tuples(st.floats(0, 0.01), st.integers(1, 100_000), st.floats(0, 0.02)), min_size=1, max_size=50),
    st.floats(1e5, 1e9),
)
def test_no_chunk_overtakes_another_and_the_rate_is_never_exceeded(
    sent: list[tuple[float, int, float]], rate: float
) -> None:
    wire = Wire(rate=rate)
    left, right = socket.socketpair()
    with left, right:
        pipe = Pipe(left, right, Lane(wire))
        now = 0.0
        for pause_s, n_bytes, wire.delay_s in sent:
            now += pause_s
            pipe.put(now, b"x" * n_bytes)
        dues = [due for due, _ in pipe.queue]
        assert dues == sorted(dues)
        assert dues[-1] >= sum(n for _, n, _ in sent) / rate


# Through sockets


def test_bytes_come_whole_and_in_order_both_ways(running: Running, echo: Echo) -> None:
    port = running.relay.link(echo.port)
    running.relay.set(rtt_ms=2, mbit=400)
    running.start()
    data = b"".join(struct.pack("!I", i).hex().encode() for i in range(100_000))
    with connect(port) as sock:
        threading.Thread(target=sock.sendall, args=(data,), daemon=True).start()
        assert read(sock, len(data)) == data.upper()


def test_a_round_trip_is_added(running: Running, echo: Echo) -> None:
    port = running.relay.link(echo.port)
    running.relay.set(rtt_ms=60, mbit=0)
    running.start()
    with connect(port) as sock:
        for _ in range(3):
            began = time.monotonic()
            sock.sendall(b"a")
            assert read(sock, 1) == b"A"
            assert 0.060 <= time.monotonic() - began < 0.5


def test_half_of_the_round_trip_is_added_each_way(running: Running) -> None:
    running.relay.set(rtt_ms=400, mbit=0)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        connect(running.relay.link(listener.getsockname()[1])) as near,
    ):
        running.start()
        far, _ = listener.accept()
        with far:
            for source, sink in ((near, far), (far, near)):
                began = time.monotonic()
                source.sendall(b"x")
                assert read(sink, 1) == b"x"
                assert 0.2 <= time.monotonic() - began < 0.39


def test_the_rate_holds_for_all_connections_of_a_link_together(running: Running, echo: Echo) -> None:
    """Three of 250 KB at 40 Mbit/s: 150 ms if they share the link, 50 ms if they do not."""
    port = running.relay.link(echo.port)
    running.relay.set(rtt_ms=0, mbit=40)
    running.start()
    data = b"x" * 250_000
    socks = [connect(port) for _ in range(3)]
    began = time.monotonic()
    for sock in socks:
        threading.Thread(target=sock.sendall, args=(data,), daemon=True).start()
    for sock in socks:
        assert len(read(sock, len(data))) == len(data)
        sock.close()
    assert 0.149 <= time.monotonic() - began < 2.0


def test_links_do_not_share_a_rate_and_directions_do_not_either(running: Running, echo: Echo) -> None:
    """Four links of 250 KB at 8 Mbit/s each way, echoed: little more than 250 ms, not 1 s, and not 500 ms each."""
    ports = [running.relay.link(echo.port) for _ in range(4)]
    running.relay.set(rtt_ms=0, mbit=8)
    running.start()
    data = b"x" * 250_000
    socks = [connect(port) for port in ports]
    began = time.monotonic()
    for sock in socks:
        threading.Thread(target=sock.sendall, args=(data,), daemon=True).start()
    for sock in socks:
        assert len(read(sock, len(data))) == len(data)
        sock.close()
    assert 0.249 <= time.monotonic() - began < 0.49


def test_settings_change_while_it_runs(running: Running, echo: Echo) -> None:
    port = running.relay.link(echo.port)
    running.relay.set(rtt_ms=150, mbit=0)
    running.start()
    with connect(port) as sock:
        began = time.monotonic()
        sock.sendall(b"a")
        time.sleep(0.02)
        running.relay.set(rtt_ms=0, mbit=0)
        sock.sendall(b"b")
        assert read(sock, 2) == b"AB"
        assert time.monotonic() - began >= 0.075  # b waited behind a
        began = time.monotonic()
        sock.sendall(b"c")
        assert read(sock, 1) == b"C"
        assert time.monotonic() - began < 0.075


def test_a_side_that_is_done_sending_still_receives(running: Running) -> None:
    running.relay.set(rtt_ms=20, mbit=0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = connect(running.relay.link(listener.getsockname()[1]))
        running.start()
        far, _ = listener.accept()
        with near, far:
            near.sendall(b"question")
            near.shutdown(socket.SHUT_WR)
            assert read(far, 100) == b"question"  # and the end
            far.sendall(b"answer" * 1000)
            far.close()
            assert read(near, 100_000) == b"answer" * 1000
    until(lambda: running.relay.stats()["connections"] == 0)


def test_what_is_on_the_way_arrives_after_both_sides_are_done(running: Running) -> None:
    """The first to end has a hang-up pending for as long as the other's bytes travel."""
    running.relay.set(rtt_ms=100, mbit=0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = connect(running.relay.link(listener.getsockname()[1]))
        running.start()
        far, _ = listener.accept()
        with near, far:
            far.shutdown(socket.SHUT_WR)
            assert read(near, 1) == b""
            near.sendall(b"last words")
            near.shutdown(socket.SHUT_WR)
            assert read(far, 100) == b"last words"
    until(lambda: running.relay.stats()["connections"] == 0)


def test_a_broken_connection_breaks_on_the_other_side(running: Running) -> None:
    running.relay.set(rtt_ms=10, mbit=0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = connect(running.relay.link(listener.getsockname()[1]))
        running.start()
        far, _ = listener.accept()
        with far:
            far.settimeout(DEADLINE_S)
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            near.close()
            with pytest.raises(ConnectionResetError):
                far.recv(1)
    until(lambda: running.relay.stats()["connections"] == 0)


def test_chunks_on_their_way_to_one_who_left_stop_nobody_else(running: Running, echo: Echo) -> None:
    """The first is answered with a reset, the second finds the connection broken."""
    running.relay.set(rtt_ms=100, mbit=0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near, elsewhere = connect(running.relay.link(listener.getsockname()[1])), running.relay.link(echo.port)
        running.start()
        far, _ = listener.accept()
        with far:
            for _ in range(5):
                far.sendall(b"too late")
                time.sleep(0.005)
            near.close()
            time.sleep(0.1)
            with connect(elsewhere) as other:
                other.sendall(b"still there")
                assert read(other, 11) == b"STILL THERE"
    until(lambda: running.relay.stats()["connections"] == 0)


def test_nobody_behind_the_link(running: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    link = running.relay.link(port)
    running.start()
    with pytest.raises(ConnectionResetError), connect(link) as sock:
        sock.recv(1)


def test_many_connections_open_at_once_and_all_close(running: Running, echo: Echo) -> None:
    port = running.relay.link(echo.port)
    running.relay.set(rtt_ms=5, mbit=200)
    running.start()
    socks = [connect(port) for _ in range(100)]
    for i, sock in enumerate(socks):
        sock.sendall(b"connection %d" % i)
    for i, sock in enumerate(socks):
        assert read(sock, len(b"connection %d" % i)) == b"CONNECTION %d" % i
    assert running.relay.stats()["connections"] == 100
    for sock in socks:
        sock.close()
    until(lambda: running.relay.stats()["connections"] == 0)
    until(lambda: echo.n_ended == 100)


def test_a_sender_waits_for_a_receiver_that_does_not_read(running: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = connect(running.relay.link(listener.getsockname()[1]))
        running.start()
        far, _ = listener.accept()
        with near, far:
            near.setblocking(False)
            n_sent = 0
            quiet_since = time.monotonic()
            while time.monotonic() - quiet_since < 0.5:
                try:
                    n_sent += near.send(b"x" * 65536)
                    quiet_since = time.monotonic()
                except BlockingIOError:
                    time.sleep(0.01)
                assert n_sent < MAX_QUEUED + (64 << 20)
            assert n_sent >= MAX_QUEUED
            near.settimeout(DEADLINE_S)
            near.shutdown(socket.SHUT_WR)
            n_received = 0
            while data := far.recv(1 << 20):
                n_received += len(data)
            assert n_received == n_sent


# As a process


def test_the_process_obeys_counts_and_ends_with_its_input(echo: Echo) -> None:
    argv = [sys.executable, "-I", SCRIPT]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(**command: Any) -> Any:
            print(json.dumps(command), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        assert json.loads(process.stdout.readline()) == {"realtime": False}
        port = ask(do="link", port=echo.port)["port"]
        assert ask(do="set", rtt_ms=10, mbit=100) == {}
        with connect(port) as sock:
            sock.sendall(b"a" * 1000)
            assert read(sock, 1000) == b"A" * 1000
            stats = ask(do="stats")
        assert stats["bytes"] == 2000
        assert stats["chunks"] >= 2
        assert stats["connections"] == 1
        assert 0 <= stats["late_us_median"] <= stats["late_us_worst"] < 5e6
        assert 0 < stats["cpu_percent"] <= 100
        assert ask(do="stats")["bytes"] == 0
        assert "fly" in ask(do="fly")["error"]
        process.stdin.close()
        assert process.wait(DEADLINE_S) == 0
