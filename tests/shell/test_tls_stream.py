"""TLS as our own stream: against Python's blocking `ssl`, against trio's stream, and against peers that misbehave."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import psutil
import pytest
import trio
import trio.testing
from mesh_lab import PATIENCE_S, context_of, founder, member, read_exactly, read_to_end

from tightwad_agent.direct import TAKE_SIZE
from tightwad_agent.errors import NotTrusted, PeerGone, ProtocolError
from tightwad_agent.mesh import certs, tls
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.tls_stream import TlsStream
from tightwad_agent.tunnel import join

ROLES = pytest.mark.parametrize("server_side", [False, True], ids=["client", "server"])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return founder(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(one: Identity, tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return member(one, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """Of another cluster."""
    return founder(tmp_path_factory.mktemp("other"), "other")


Contexts = Callable[[bool], ssl.SSLContext]
"""By role: True is the server's."""
Pair = tuple[trio.SocketStream, socket.socket]


@pytest.fixture(scope="module")
def contexts(one: Identity, two: Identity) -> Contexts:
    return lambda server_side: tls.server_context(one) if server_side else tls.client_context(two)


@pytest.fixture(scope="module")
def leafs(one: Identity, two: Identity) -> dict[bool, bytes]:
    return {True: certs.der(one.leaf), False: certs.der(two.leaf)}


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """A TCP connection on loopback: the near end for trio, the far end without it, not blocking."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = await trio.open_tcp_stream(*listener.getsockname())
        far, _ = listener.accept()
    far.setblocking(False)
    with far:
        yield near, far


Make = Callable[..., TlsStream]


@pytest.fixture
async def ours_of(contexts: Contexts) -> AsyncIterator[Make]:
    """`TlsStream(transport, server_side)` of our contexts, closed when the test ends."""
    made: list[TlsStream] = []

    def make(transport: trio.SocketStream, server_side: bool = False) -> TlsStream:
        made.append(TlsStream(transport, contexts(server_side), server_side=server_side))
        return made[-1]

    yield make
    for stream in made:
        await trio.aclose_forcefully(stream)


class Puppet:
    """The far end of TLS with every byte in the test's hand; needs no task of its own."""

    def __init__(self, wire: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        self.wire = wire
        self.came, self.goes = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.came, self.goes, server_side=server_side)

    async def shake(self, *, send_last: bool = True) -> None:
        """The handshake; without `send_last` what completes it waits in `goes`."""
        with trio.fail_after(PATIENCE_S):
            while True:
                try:
                    self.tls.do_handshake()
                except ssl.SSLWantReadError:
                    self.send()
                    await trio.lowlevel.wait_readable(self.wire)
                    self.came.write(self.wire.recv(1 << 16))
                else:
                    break
        if send_last:
            self.send()

    async def shake_in_vain(self) -> None:
        """A handshake that must fail; says so to the other side."""
        with pytest.raises(ssl.SSLError):
            await self.shake()
        self.send()

    async def shake_until(self, n: int) -> None:
        """Sends the first `n` bytes of its part in the handshake and hangs up."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
        while not self.goes.pending:
            await trio.lowlevel.wait_readable(self.wire)
            self.came.write(self.wire.recv(1 << 16))
            with contextlib.suppress(ssl.SSLWantReadError):
                self.tls.do_handshake()
        self.send(lambda record: record[:n])
        self.wire.shutdown(socket.SHUT_WR)

    def send(self, change: Callable[[bytes], bytes] = bytes) -> None:
        self.wire.sendall(change(self.goes.read()))

    async def send_all(self) -> None:
        """`send` for more than the socket takes at once."""
        data = memoryview(self.goes.read())
        while data:
            await trio.lowlevel.wait_writable(self.wire)
            data = data[self.wire.send(data) :]

    def write(self, data: bytes | memoryview) -> None:
        self.tls.write(data)

    async def read(self, n: int) -> bytes:
        data = bytearray()
        with trio.fail_after(PATIENCE_S):
            while len(data) < n:
                with contextlib.suppress(ssl.SSLWantReadError):
                    data += self.tls.read(n - len(data))
                    continue
                await trio.lowlevel.wait_readable(self.wire)
                if got := self.wire.recv(1 << 16):
                    self.came.write(got)
                else:
                    self.came.write_eof()
        return bytes(data)

    async def end(self) -> bytes:
        """Nothing, if the next thing is a goodbye."""
        with trio.fail_after(PATIENCE_S):
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    return self.tls.read(1)
                await trio.lowlevel.wait_readable(self.wire)
                if got := self.wire.recv(1 << 16):
                    self.came.write(got)
                else:
                    self.came.write_eof()


MakePuppet = Callable[[socket.socket, bool], Puppet]


@pytest.fixture
def puppet_of(contexts: Contexts) -> MakePuppet:
    return lambda wire, server_side: Puppet(wire, contexts(server_side), server_side=server_side)


Wired = tuple[TlsStream, Puppet]


@pytest.fixture
async def wired(pair: Pair, ours_of: Make, puppet_of: MakePuppet) -> Wired:
    """Our client and a puppet server, the handshake done."""
    near, far = pair
    ours, puppet = ours_of(near), puppet_of(far, True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(puppet.shake)
        await ours.do_handshake()
    return ours, puppet


def text(n: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(n)


def cuts(data: bytes, seed: int, largest: int) -> Iterator[bytes]:
    dice, at = random.Random(seed), 0
    while at < len(data):
        n = int(largest ** dice.random())
        yield data[at : at + n]
        at += n


async def send_cut(stream: trio.abc.SendStream, data: bytes, seed: int, largest: int = 700_000) -> None:
    for chunk in cuts(data, seed, largest):
        await stream.send_all(chunk)


async def receive_cut(stream: trio.abc.ReceiveStream, n: int, seed: int) -> bytes:
    dice, data = random.Random(seed), bytearray()
    with trio.fail_after(PATIENCE_S):
        while len(data) < n:
            most = dice.choice([1, 100, 16_384, 20_000, 65_536, 1 << 20, None])
            got = await stream.receive_some(most)
            assert got
            assert most is None or len(got) <= most
            data += got
    return bytes(data)


async def both_ways(ours: trio.abc.Stream, theirs: trio.abc.Stream, seed: int, n: int = 2_000_000) -> None:
    up, down = text(n, seed), text(n, seed + 1)
    got: dict[str, bytes] = {}

    async def receive(name: str, stream: trio.abc.ReceiveStream, n: int) -> None:
        got[name] = await receive_cut(stream, n, seed)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_cut, ours, up, seed)
        nursery.start_soon(send_cut, theirs, down, seed + 2)
        nursery.start_soon(receive, "up", theirs, len(up))
        nursery.start_soon(receive, "down", ours, len(down))
    assert got == {"up": up, "down": down}


# Other implementations


def trio_stream(raw: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(raw))


@ROLES
@pytest.mark.parametrize("kind", [trio.SSLStream, TlsStream], ids=["trio's", "our own"])
@pytest.mark.parametrize("seed", [1, 2])
async def test_bytes_pass_unchanged_both_ways_at_once(
    pair: Pair, ours_of: Make, contexts: Contexts, leafs: dict[bool, bytes], server_side: bool, kind: Any, seed: int
) -> None:
    near, far = pair
    ours = ours_of(near, server_side)
    theirs = kind(trio_stream(far), contexts(not server_side), server_side=not server_side)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(theirs.do_handshake)
        await ours.do_handshake()
    assert (ours.version(), ours.peer_der()) == ("TLSv1.3", leafs[not server_side])
    await both_ways(ours, theirs, seed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.aclose)
        assert await theirs.receive_some(1) == b""
    await theirs.aclose()


@ROLES
async def test_bytes_pass_unchanged_to_and_from_blocking_ssl(
    pair: Pair, ours_of: Make, contexts: Contexts, server_side: bool
) -> None:
    near, far = pair
    ours = ours_of(near, server_side)
    data = text(1_500_000)

    def converse() -> bytes:
        far.settimeout(PATIENCE_S)
        with contexts(not server_side).wrap_socket(far, server_side=not server_side) as theirs:
            theirs.sendall(data)  # and reads nothing meanwhile
            got = bytearray()
            while len(got) < len(data):
                got += theirs.recv(50_000)
            with contextlib.suppress(ssl.SSLError):
                theirs.unwrap()
        return bytes(got)

    async def check() -> None:
        assert await trio.to_thread.run_sync(converse) == data

    async with trio.open_nursery() as nursery:
        nursery.start_soon(check)
        await ours.do_handshake()
        nursery.start_soon(send_cut, ours, data, 5)
        assert await receive_cut(ours, len(data), 6) == data
        assert await ours.receive_some() == b""
        await ours.aclose()


# Handshakes that fail


async def failed(stream: TlsStream) -> BaseException:
    with trio.fail_after(PATIENCE_S), pytest.raises(trio.BrokenResourceError) as caught:
        await stream.do_handshake()
    return caught.value


@ROLES
async def test_garbage_in_place_of_tls(pair: Pair, ours_of: Make, server_side: bool) -> None:
    near, far = pair
    ours = ours_of(near, server_side)
    far.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 10)
    assert isinstance(tls.fault(await failed(ours)), ProtocolError)


@ROLES
@pytest.mark.parametrize("n", [0, 1, 40, 200])
async def test_a_handshake_cut_short(
    pair: Pair, ours_of: Make, puppet_of: MakePuppet, server_side: bool, n: int
) -> None:
    near, far = pair
    ours = ours_of(near, server_side)
    puppet = puppet_of(far, not server_side)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(puppet.shake_until, n)
        assert isinstance(tls.fault(await failed(ours)), PeerGone)


async def test_a_server_of_another_cluster_is_refused(pair: Pair, ours_of: Make, other: Identity) -> None:
    near, far = pair
    ours = ours_of(near)
    puppet = Puppet(far, tls.server_context(other), server_side=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(puppet.shake)
        error = await failed(ours)
        nursery.cancel_scope.cancel()
    assert isinstance(error.__cause__, ssl.SSLCertVerificationError)
    assert isinstance(tls.fault(error), NotTrusted)


async def test_a_client_of_another_cluster_is_refused_and_told_why(
    pair: Pair, ours_of: Make, one: Identity, other: Identity
) -> None:
    near, far = pair
    ours = ours_of(near, True)
    puppet = Puppet(far, context_of(other, one), server_side=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(puppet.shake)
        assert isinstance(tls.fault(await failed(ours)), NotTrusted)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(tls.refuse, ours)
        with pytest.raises(ssl.SSLError, match="ALERT_UNKNOWN_CA"):
            await puppet.read(1)
        puppet.wire.close()


@ROLES
async def test_nothing_older_than_1_3_is_spoken(
    pair: Pair, ours_of: Make, contexts: Contexts, server_side: bool
) -> None:
    near, far = pair
    old = contexts(not server_side)
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    ours = ours_of(near, server_side)
    puppet = Puppet(far, old, server_side=not server_side)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(puppet.shake_in_vain)
        assert isinstance(tls.fault(await failed(ours)), ProtocolError)
        nursery.cancel_scope.cancel()


async def test_what_came_with_the_end_of_the_handshake_is_not_waited_for(
    pair: Pair, ours_of: Make, puppet_of: MakePuppet
) -> None:
    near, far = pair
    ours, puppet = ours_of(near, True), puppet_of(far, False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.do_handshake)
        await puppet.shake(send_last=False)
        puppet.write(b"early")
        puppet.send()  # one segment: `Finished`, and the first of the data
    await trio.sleep(0)
    with trio.fail_after(PATIENCE_S):
        assert await ours.receive_some() == b"early"


# Ends


async def test_an_end_with_goodbye_is_an_end_also_if_the_wire_stays_open(wired: Wired) -> None:
    ours, puppet = wired
    puppet.write(b"last words")
    with contextlib.suppress(ssl.SSLWantReadError):
        puppet.tls.unwrap()
    puppet.send()
    with trio.fail_after(PATIENCE_S):
        assert await ours.receive_some() == b"last words"
        await ours.readable()  # what a pump does in between
        assert await ours.receive_some() == b""
        assert await ours.receive_some() == b""
    await ours.send_all(b"I go on")
    assert await puppet.read(7) == b"I go on"


@pytest.mark.parametrize("how", ["closed", "reset"])
async def test_an_end_without_goodbye_is_a_broken_stream(wired: Wired, how: str) -> None:
    ours, puppet = wired
    puppet.write(b"half a")
    puppet.send()
    with trio.fail_after(PATIENCE_S):
        assert await ours.receive_some() == b"half a"
        if how == "reset":
            puppet.wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        puppet.wire.close()
        with pytest.raises(trio.BrokenResourceError):
            await ours.receive_some()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await ours.receive_some()
    if how == "closed":
        assert isinstance(caught.value.__cause__, ssl.SSLEOFError)
    assert isinstance(tls.fault(caught.value), PeerGone)


async def test_a_forged_record_breaks_the_stream_after_what_was_good(wired: Wired) -> None:
    ours, puppet = wired
    puppet.write(b"good")
    good = puppet.goes.read()
    puppet.write(b"bad")
    puppet.send(lambda record: good + record[:-1] + bytes([record[-1] ^ 1]))
    with trio.fail_after(PATIENCE_S):
        assert await ours.receive_some() == b"good"
        await ours.readable()
        with pytest.raises(trio.BrokenResourceError):
            await ours.receive_some()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await ours.receive_some()
    assert isinstance(tls.fault(caught.value), ProtocolError)


async def test_closing_says_goodbye(wired: Wired) -> None:
    ours, puppet = wired
    await ours.send_all(b"bye")
    await ours.aclose()
    await ours.aclose()
    assert await puppet.read(3) == b"bye"
    assert await puppet.end() == b""


async def test_closing_at_once_does_not(wired: Wired) -> None:
    ours, puppet = wired
    await trio.aclose_forcefully(ours)
    with pytest.raises(ssl.SSLEOFError):
        await puppet.end()


async def test_a_closed_stream_says_so(wired: Wired) -> None:
    ours, _ = wired
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await ours.receive_some()

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        await ours.aclose()
    for use in (ours.receive_some, lambda: ours.send_all(b"x"), ours.wait_send_all_might_not_block):
        with pytest.raises(trio.ClosedResourceError):
            await use()
    with pytest.raises(trio.ClosedResourceError):
        ours.take()
    with pytest.raises(trio.ClosedResourceError):
        ours.give(b"x")


# Several tasks, cancellation, pressure


async def test_one_sends_and_one_receives_but_no_two_of_a_kind(wired: Wired) -> None:
    ours, _ = wired
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.receive_some)
        nursery.start_soon(ours.send_all, bytes(64 << 20))
        await trio.testing.wait_all_tasks_blocked(0.1)
        for use in (ours.receive_some, lambda: ours.send_all(b"x"), ours.wait_send_all_might_not_block):
            with pytest.raises(trio.BusyResourceError):
                await use()
        with pytest.raises(trio.BusyResourceError):
            ours.give(b"x")
        nursery.cancel_scope.cancel()


async def test_a_receive_that_is_cancelled_loses_nothing(wired: Wired) -> None:
    ours, puppet = wired
    data = text(300_000)
    got = bytearray()
    for i, chunk in enumerate(cuts(data, 3, 20_000)):
        with trio.move_on_after(0):
            got += await ours.receive_some()
        puppet.write(chunk)
        record = puppet.goes.read()
        puppet.wire.sendall(record[: len(record) // 2])
        with trio.move_on_after(0.001 * (i % 2)):
            got += await ours.receive_some()
        puppet.wire.sendall(record[len(record) // 2 :])
    got += await read_exactly(ours, len(data) - len(got))
    assert got == data


async def test_a_send_that_is_cancelled_half_way_is_the_last_one(wired: Wired) -> None:
    ours, puppet = wired
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.send_all, bytes(64 << 20))
        await trio.testing.wait_all_tasks_blocked(0.1)
        nursery.cancel_scope.cancel()
    with pytest.raises(trio.BrokenResourceError):
        await ours.send_all(b"x")
    puppet.write(b"still heard")
    puppet.send()
    assert await read_exactly(ours, 11) == b"still heard"
    with trio.fail_after(PATIENCE_S):
        await ours.aclose()  # without a goodbye: nobody may take the half for a whole
        with pytest.raises(ssl.SSLEOFError):
            await puppet.read(64 << 20)


async def test_a_cancelled_task_sends_nothing(wired: Wired) -> None:
    ours, puppet = wired
    with trio.CancelScope() as scope:
        scope.cancel()
        await ours.send_all(b"never said")
    await ours.send_all(b"said")
    assert await puppet.read(4) == b"said"


async def test_what_was_not_taken_is_not_waited_for(wired: Wired) -> None:
    ours, puppet = wired
    puppet.write(b"one record")
    puppet.send()
    with trio.fail_after(PATIENCE_S):
        await ours.readable()
        assert ours.take(3) == b"one"
        await ours.readable()
        assert ours.take() == b" record"
        assert ours.take() is None


@pytest.mark.parametrize("use", ["receive_some", "send_all", "send nothing", "readable"])
async def test_every_call_is_a_checkpoint(wired: Wired, use: str) -> None:
    ours, puppet = wired
    puppet.write(b"xx")
    puppet.send()
    assert await ours.receive_some(1) == b"x"  # so that the next byte is here already
    calls: dict[str, Callable[[], Any]] = {
        "receive_some": lambda: ours.receive_some(1),
        "send_all": lambda: ours.send_all(b"x"),
        "send nothing": lambda: ours.send_all(b""),
        "readable": ours.readable,
    }
    with trio.testing.assert_checkpoints():
        await calls[use]()


async def test_a_peer_that_does_not_read_costs_no_memory(wired: Wired) -> None:
    ours, puppet = wired
    data = memoryview(text(64 << 20))
    before = psutil.Process().memory_info().rss
    sent_bytes = 0

    async def send() -> None:
        nonlocal sent_bytes
        for start in range(0, len(data), 1 << 20):
            await ours.send_all(data[start : start + (1 << 20)])
            sent_bytes += 1 << 20

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked(0.3)
        stalled_at = sent_bytes
        assert stalled_at < len(data) // 2
        assert len(ours._unsent) <= TAKE_SIZE + 4096
        assert ours._out.pending == 0
        assert psutil.Process().memory_info().rss - before < 16 << 20
        assert await puppet.read(len(data)) == data
    assert sent_bytes == len(data)


async def test_part_of_what_is_expected_may_be_here_already(wired: Wired) -> None:
    """A record of which the wire holds only the rest."""
    ours, puppet = wired
    puppet.write(bytes(16_000))
    record = puppet.goes.read()
    puppet.wire.sendall(record[:10_000])
    with trio.fail_after(PATIENCE_S):
        await trio.lowlevel.wait_readable(ours.transport_stream.socket)
        assert ours.take() is None
        ours.expect(16_000)
        puppet.wire.sendall(record[10_000:])
        await ours.readable()
    data = ours.take()
    assert data is not None
    assert len(data) == 16_000


# Joined to a plain socket, as tunnels are


@contextlib.asynccontextmanager
async def tunnel(ours: TlsStream) -> AsyncIterator[tuple[trio.SocketStream, list[tuple[str, int]], trio.Event]]:
    """A loopback connection that `join` carries over `ours`; what was counted, and when it is over."""
    counted: list[tuple[str, int]] = []
    over = trio.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        user = await trio.open_tcp_stream(*listener.getsockname())
        local = trio_stream(listener.accept()[0])

    async def run() -> None:
        tls_ended = await join(local, ours, lambda n: counted.append(("up", n)), lambda n: counted.append(("down", n)))
        counted.append(("tls ended first", tls_ended))
        over.set()

    async with trio.open_nursery() as nursery, user:
        nursery.start_soon(run)
        yield user, counted, over
        nursery.cancel_scope.cancel()


async def test_a_tunnel_carries_both_ways_and_counts(wired: Wired) -> None:
    ours, puppet = wired
    up, down = text(3_000_000, 1), text(2_000_000, 2)
    async with tunnel(ours) as (user, counted, over):

        async def send_down() -> None:
            for chunk in cuts(down, 4, 400_000):
                puppet.write(chunk)
                await puppet.send_all()

        async def read_down() -> None:
            assert await read_exactly(user, len(down)) == down

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_down)
            nursery.start_soon(read_down)
            nursery.start_soon(send_cut, user, up, 3)
            assert await puppet.read(len(up)) == up
        await user.aclose()
        with trio.fail_after(PATIENCE_S):
            await over.wait()
    totals = {way: sum(n for name, n in counted if name == way) for way in ("up", "down", "tls ended first")}
    assert totals == {"up": len(up), "down": len(down), "tls ended first": False}
    with pytest.raises(ssl.SSLEOFError):  # who sends raw bytes has ends of its own; a tunnel only breaks
        await puppet.end()


@pytest.mark.parametrize("goodbye", [True, False])
async def test_a_tunnel_whose_far_side_ends_hands_on_the_rest_and_says_so(wired: Wired, goodbye: bool) -> None:
    ours, puppet = wired
    async with tunnel(ours) as (user, counted, over):
        puppet.write(b"the rest")
        if goodbye:
            with contextlib.suppress(ssl.SSLWantReadError):
                puppet.tls.unwrap()
        puppet.send()
        if not goodbye:
            puppet.wire.shutdown(socket.SHUT_WR)
        assert await read_to_end(user) == b"the rest"
        with trio.fail_after(PATIENCE_S):
            await over.wait()
    assert counted == [("down", 8), ("tls ended first", True)]


@pytest.mark.parametrize("full", ["up", "down"])
async def test_a_tunnel_takes_no_more_than_its_end_does(wired: Wired, full: str) -> None:
    ours, puppet = wired
    data = memoryview(bytes(64 << 20))

    async def send(user: trio.SocketStream) -> None:
        if full == "up":
            await user.send_all(data)
        for start in range(0, len(data), 1 << 20):
            puppet.write(data[start : start + (1 << 20)])
            await puppet.send_all()

    async with tunnel(ours) as (user, counted, _), trio.open_nursery() as nursery:
        nursery.start_soon(send, user)
        await trio.testing.wait_all_tasks_blocked(0.3)
        assert 0 < sum(n for _, n in counted) < len(data) // 2
        nursery.cancel_scope.cancel()


async def test_a_busy_tunnel_lets_others_run(wired: Wired) -> None:
    ours, puppet = wired
    async with tunnel(ours) as (user, counted, _), trio.open_nursery() as nursery:

        async def flood() -> None:
            while True:
                await user.send_all(bytes(1 << 20))

        async def swallow() -> None:
            while True:
                await trio.lowlevel.wait_readable(puppet.wire)
                puppet.wire.recv(1 << 20)

        nursery.start_soon(flood)
        nursery.start_soon(swallow)
        with trio.fail_after(PATIENCE_S):
            for _ in range(100):
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()
    assert len(counted) > 20


async def test_threads_read_both_ends_while_tasks_write_to_both(ours_of: Make) -> None:
    """OpenSSL's connection is used by two threads at once; whatever was mixed up would break a record's seal."""
    near, far = map(trio.socket.from_stdlib_socket, socket.socketpair())
    ends = ours_of(trio.SocketStream(near)), ours_of(trio.SocketStream(far), True)
    said = [random.Random(i).randbytes(6 << 20) for i in (1, 2)]
    heard: list[bytearray] = [bytearray(), bytearray()]

    def read(which: int) -> None:
        stream, n = ends[which], len(said[1 - which])
        while len(heard[which]) < n:
            stream.expect(n - len(heard[which]))
            data = stream.take()
            if data is None:
                assert stream.wait(PATIENCE_S)
            else:
                assert data, "it ended early"
                heard[which] += data

    async def write(which: int) -> None:
        dice, rest = random.Random(which), memoryview(said[which])
        while rest:
            n = dice.choice([1, 20, 5000, 300_000])
            await ends[which].send_all(rest[:n])
            rest = rest[n:]

    with trio.fail_after(6 * PATIENCE_S):
        async with trio.open_nursery() as nursery:
            for end in ends:
                nursery.start_soon(end.do_handshake)
        async with trio.open_nursery() as nursery:
            for which in (0, 1):
                nursery.start_soon(ends[which].read_in_thread, lambda which=which: read(which), lambda: None)
                nursery.start_soon(write, which)
    assert [bytes(b) for b in heard] == said[::-1]
