"""Links over real sockets and real TLS: who gets in, who does not, and what a hostile connection can do (nothing)."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mesh_lab import (
    PATIENCE_S,
    Box,
    Wires,
    check_echo,
    context_of,
    echo,
    founder,
    hello,
    links_of,
    member,
    read_exactly,
    read_to_end,
    start,
    stranger_hello,
    until,
)

from tightwad_agent.errors import (
    DialledSelf,
    NotTrusted,
    PeerError,
    PeerGone,
    PeerRefused,
    PeerUnreachable,
    PortTaken,
    ProtocolError,
)
from tightwad_agent.ids import Address, NodeId
from tightwad_agent.mesh import identity, tls
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.links import Limits, Peer, Services, open_listeners
from tightwad_agent.streams import Framed
from tightwad_agent.testing import node_id
from tightwad_agent.wire.frames import PREFIX, encode
from tightwad_agent.wire.handshake import LINK, Accepted, Hello, Open, Refused
from tightwad_agent.wire.rows import Role

QUICK = Limits(handshake_s=0.5)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def one(lab: Path) -> Identity:
    return founder(lab, "one")


@pytest.fixture(scope="module")
def two(lab: Path, one: Identity) -> Identity:
    return member(one, lab, "two")


@pytest.fixture(scope="module")
def foreign(lab: Path) -> Identity:
    return founder(lab, "foreign")


@pytest.fixture
async def box(nursery: trio.Nursery, one: Identity) -> Box:
    return await start(nursery, one)


@pytest.fixture
async def wires() -> AsyncIterator[Wires]:
    async with Wires() as made:
        yield made


# The good way


async def test_a_stream_carries_bytes_both_ways(box: Box, two: Identity) -> None:
    await check_echo(links_of(two), box, b"x" * 300_000)


async def test_a_service_may_know_its_peer(nursery: trio.Nursery, one: Identity, two: Identity, wires: Wires) -> None:
    seen: list[Any] = []

    async def control(peer: Peer, stream: trio.abc.Stream, args: dict[str, Any]) -> None:
        seen.append((peer, args))
        await echo(peer, stream, args)

    async def plain(peer: NodeId, stream: trio.abc.Stream, args: dict[str, Any]) -> None:
        seen.append((peer, args))

    box = await start(nursery, one, Services({"plain": plain}, {"control": control}))
    args = {"epoch": [3, "x"], "data": b"\x00"}
    stream, peer = await links_of(two).dial([box.address], want=None, service="control", args=args)
    await stream.send_all(b"a")
    assert await read_exactly(stream, 1) == b"a"
    ((caller, got),) = seen
    assert got == args
    assert (caller.node, caller.role, caller.hello.name) == (two.node, Role.NODE, "two")
    assert (peer.node, peer.role, peer.remote) == (one.node, Role.AUTHORITY, box.address)
    assert caller.remote == peer.local
    assert caller.local == box.address
    await stream.aclose()
    stream = await wires.dial(links_of(two), box, "plain")
    assert await read_to_end(stream) == b""
    assert seen[1] == (two.node, {})
    await stream.aclose()


async def test_bytes_sent_with_the_opening_reach_the_service(
    box: Box, one: Identity, two: Identity, wires: Wires
) -> None:
    """What comes in one TCP segment with `Open` belongs to the service."""
    framed = await wires.link(box.address, context_of(two, one))
    await framed.send(hello(two))
    await framed.expect(Hello)
    await framed.stream.send_all(encode(LINK.encode(Open("echo"))) + b"early")
    await framed.expect(Accepted)
    assert await read_exactly(framed.detach(), 5) == b"early"
    await framed.stream.aclose()


async def test_the_end_of_a_service_is_a_clean_end(
    nursery: trio.Nursery, one: Identity, two: Identity, wires: Wires
) -> None:
    async def done(_peer: NodeId, stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
        await stream.send_all(b"all of it")

    async def broken(_peer: NodeId, stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
        await stream.send_all(b"half of it")
        raise PeerGone("the disk went away")

    box = await start(nursery, one, Services({"done": done, "broken": broken}))
    stream = await wires.dial(links_of(two), box, "done")
    assert await read_exactly(stream, 9) == b"all of it"
    assert await stream.receive_some(1) == b""
    stream = await wires.dial(links_of(two), box, "broken")
    assert await read_exactly(stream, 10) == b"half of it"
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some(1)


async def test_services_may_be_added_later(nursery: trio.Nursery, one: Identity, two: Identity) -> None:
    streams: dict[str, Any] = {}
    box = await start(nursery, one, Services(streams))
    with pytest.raises(PeerRefused, match="no service 'echo'"):
        await links_of(two).dial([box.address], want=None, service="echo")
    streams["echo"] = echo
    await check_echo(links_of(two), box)


async def test_a_renewed_leaf_is_shown_from_then_on(nursery: trio.Nursery, lab: Path, two: Identity) -> None:
    first = founder(lab, "renewing")
    stranger_sees = []
    box = await start(nursery, first)
    renewed = identity.renew_own(first, time.time() + 100)
    for current in (first, renewed):
        box.links.use(current) if current is renewed else None
        stream = await tls.connect(box.address, tls.stranger_context())
        stranger_sees.append(stream.peer_der())
        await trio.aclose_forcefully(stream)
    assert stranger_sees == [first.leaf_der, renewed.leaf_der]


# Whom to trust


async def test_another_clusters_listener_is_not_trusted(
    nursery: trio.Nursery, foreign: Identity, two: Identity
) -> None:
    box = await start(nursery, foreign)
    with pytest.raises(NotTrusted, match="not of this cluster"):
        await links_of(two).dial([box.address], want=None, service="echo")


async def test_another_clusters_certificate_does_not_get_in(
    box: Box, one: Identity, foreign: Identity, wires: Wires
) -> None:
    framed = await wires.link(box.address, context_of(foreign, one))
    await framed.send(hello(foreign))
    with pytest.raises(PeerError) as caught:
        await framed.expect(Hello, deadline_s=PATIENCE_S)
    assert isinstance(tls.fault(caught.value), NotTrusted)
    assert "unknown ca" in tls.fault(caught.value).message


async def test_an_expired_listener_is_not_trusted(
    nursery: trio.Nursery, lab: Path, one: Identity, two: Identity
) -> None:
    box = await start(nursery, member(one, lab, "stale-listener", issued_days_ago=31))
    with pytest.raises(NotTrusted, match="expired") as caught:
        await links_of(two).dial([box.address], want=None, service="echo")
    assert "clocks" in caught.value.hint


async def test_an_expired_dialler_is_told_why(box: Box, lab: Path, one: Identity) -> None:
    stale = member(one, lab, "stale-dialler", issued_days_ago=31)
    with pytest.raises(NotTrusted, match=r"does not trust this node's certificate.*expired") as caught:
        await links_of(stale).dial([box.address], want=None, service="echo")
    assert "clocks" in caught.value.hint


async def test_a_leaf_issued_by_a_leaf_does_not_get_in(
    box: Box, lab: Path, one: Identity, two: Identity, wires: Wires
) -> None:
    from tightwad_agent.mesh import certs

    key = certs.new_key()
    below = certs.issue_leaf(two.leaf, two.key, key.public_key(), Role.AUTHORITY, time.time())
    (lab / "chain.pem").write_bytes(certs.private_pem(key) + certs.pem(below) + certs.pem(two.leaf))
    context = tls.stranger_context()
    context.load_cert_chain(lab / "chain.pem")
    framed = await wires.link(box.address, context)
    with pytest.raises(PeerError):
        await framed.expect(Hello, deadline_s=PATIENCE_S)


async def test_another_node_behind_an_address_is_not_taken(box: Box, two: Identity) -> None:
    with pytest.raises(NotTrusted, match=f"another node \\({box.node.short}\\)"):
        await links_of(two).dial([box.address], want=node_id("somebody else"), service="echo")


async def test_dialling_oneself_says_so(box: Box, one: Identity) -> None:
    for want in (None, one.node, node_id("x")):
        with pytest.raises(DialledSelf, match="this node itself"):
            await links_of(one).dial([box.address], want=want, service="echo")


async def test_a_node_cannot_dial_itself_past_the_check(box: Box, one: Identity, wires: Wires) -> None:
    framed = await wires.link(box.address, context_of(one, one))
    await framed.send(hello(one))
    await framed.expect(Hello)
    await framed.send(Open("echo"))
    assert (await framed.expect(Refused)).code == "self"


@pytest.mark.parametrize("lie", ["node", "role", "cluster"])
async def test_a_hello_that_is_not_the_certificates_is_refused(
    nursery: trio.Nursery, one: Identity, two: Identity, foreign: Identity, lie: str
) -> None:
    lies = {"node": node_id("x"), "role": Role.AUTHORITY, "cluster": foreign.cluster}
    liar = links_of(two, lambda: dataclasses.replace(hello(two), **{lie: lies[lie]}))
    honest = await start(nursery, one)
    with pytest.raises(PeerError):
        await liar.dial([honest.address], want=None, service="echo")
    lying = await start(nursery, two, links=liar)
    with pytest.raises(NotTrusted, match="says that it is"):
        await links_of(one).dial([lying.address], want=two.node, service="echo")


async def test_a_denied_node_gets_nothing_and_is_given_nothing(
    nursery: trio.Nursery, one: Identity, two: Identity
) -> None:
    denied: set[NodeId] = set()
    guard = links_of(one, is_denied=denied.__contains__)
    box = await start(nursery, one, links=guard)
    back = await start(nursery, two)
    await check_echo(links_of(two), box)
    denied.add(two.node)
    with pytest.raises(PeerRefused, match="was removed from the cluster"):
        await links_of(two).dial([box.address], want=None, service="echo")
    with pytest.raises(NotTrusted, match="was removed"):
        await guard.dial([back.address], want=two.node, service="echo")


@pytest.mark.parametrize("service", ["control", "rpc", "call", "echo", "swarm", "http", ""])
async def test_without_a_certificate_nothing_but_join_is_open(
    nursery: trio.Nursery, one: Identity, service: str, wires: Wires
) -> None:
    called: list[str] = []

    async def handler(_peer: Any, _stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
        called.append("!")

    names = ("control", "rpc", "call", "echo", "swarm", "http")
    box = await start(nursery, one, Services(dict.fromkeys(names, handler), dict.fromkeys(names, handler)))
    framed = await wires.link(box.address, tls.stranger_context())
    await framed.send(stranger_hello(one.cluster))
    await framed.expect(Hello)
    await framed.send(Open(service))
    refused = await framed.expect(Refused, deadline_s=PATIENCE_S)
    assert refused.code == "certificate_required"
    assert not called


async def test_join_is_refused_where_nobody_enrols_and_for_other_clusters(
    box: Box, one: Identity, foreign: Identity, wires: Wires
) -> None:
    for cluster, code in ((one.cluster, "no_service"), (foreign.cluster, "wrong_cluster")):
        framed = await wires.link(box.address, tls.stranger_context())
        await framed.send(stranger_hello(cluster))
        await framed.expect(Hello)
        await framed.send(Open("join"))
        assert (await framed.expect(Refused)).code == code


async def test_versions_that_do_not_meet_are_named_on_both_sides(
    nursery: trio.Nursery, one: Identity, two: Identity, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    newer = links_of(two, lambda: dataclasses.replace(hello(two), version_min=7, version_max=9))
    box = await start(nursery, one)
    with pytest.raises(PeerRefused, match=r"1 to 2.*7 to 9"):
        await newer.dial([box.address], want=None, service="echo")
    await until(lambda: "7 to 9" in caplog.text)


async def test_a_peer_that_is_full_says_busy(nursery: trio.Nursery, one: Identity, two: Identity, wires: Wires) -> None:
    box = await start(nursery, one, limits=Limits(max_streams=1, handshake_s=60))
    first = await wires.dial(links_of(two), box, "echo")
    with pytest.raises(PeerRefused, match="streams are open already"):
        await links_of(two).dial([box.address], want=None, service="echo")
    await trio.aclose_forcefully(first)
    await until(lambda: box.links.n_streams == 0)
    await check_echo(links_of(two), box)


# Several addresses


async def closed_port() -> Address:
    (listener,) = await open_listeners(0, "127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    return Address("127.0.0.1", port)


@contextlib.asynccontextmanager
async def silent_port() -> AsyncIterator[Address]:
    """Accepts (the kernel does) and never says a word."""
    (listener,) = await open_listeners(0, "127.0.0.1")
    try:
        yield Address("127.0.0.1", listener.socket.getsockname()[1])
    finally:
        await listener.aclose()


async def test_the_first_address_that_works_wins(
    nursery: trio.Nursery, box: Box, foreign: Identity, two: Identity
) -> None:
    other = await start(nursery, foreign)
    async with silent_port() as silent:
        addresses = [await closed_port(), silent, other.address, box.address]
        links = links_of(two, limits=Limits(stagger_s=0.01))
        stream, peer = await links.dial(addresses, want=box.node, service="echo", deadline_s=PATIENCE_S)
        assert peer.remote == box.address
        await stream.aclose()


async def test_every_address_is_named_with_its_reason(nursery: trio.Nursery, foreign: Identity, two: Identity) -> None:
    other = await start(nursery, foreign)
    closed = await closed_port()
    async with silent_port() as silent:
        links = links_of(two, limits=Limits(stagger_s=0.01))
        with pytest.raises(PeerUnreachable) as caught:
            await links.dial([closed, silent, other.address, closed], want=foreign.node, service="echo", deadline_s=2.0)
    text = caught.value.message
    assert text.count(str(closed)) == 1
    assert f"{closed}: Connection refused" in text
    assert f"{silent}: no answer within 2 s" in text
    assert f"{other.address}: its certificate is not of this cluster" in text
    assert foreign.node.short in text


async def test_no_address_and_a_name_that_does_not_resolve(two: Identity) -> None:
    with pytest.raises(PeerUnreachable, match="no address is known"):
        await links_of(two).dial([], want=None, service="echo")
    with pytest.raises(PeerUnreachable, match=r"no-such-host\.invalid:1"):
        await links_of(two).dial([Address("no-such-host.invalid", 1)], want=None, service="echo")


async def test_two_good_addresses_leave_one_connection(nursery: trio.Nursery, one: Identity, two: Identity) -> None:
    boxes = [await start(nursery, one) for _ in range(3)]
    for _ in range(10):
        links = links_of(two, limits=Limits(stagger_s=0))
        stream, _ = await links.dial([b.address for b in boxes], want=one.node, service="echo", deadline_s=PATIENCE_S)
        await until(
            lambda: [b.links.n_streams for b in boxes].count(1) == 1 and not any(b.links.n_waiting for b in boxes)
        )
        await trio.aclose_forcefully(stream)
        await until(lambda: not any(b.links.n_streams for b in boxes))


async def test_a_cancelled_dial_leaves_nothing_behind(box: Box, two: Identity, wires: Wires) -> None:
    """Cut at every point of the conversation."""
    for n in range(60):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as watch:

                async def cut(after: int = n, scope: trio.CancelScope = scope) -> None:
                    for _ in range(after):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()

                watch.start_soon(cut)
                stream = await wires.dial(links_of(two), box, "echo")
                await trio.aclose_forcefully(stream)
    await until(lambda: box.links.n_waiting == 0 and box.links.n_streams == 0)


async def test_a_peer_that_accepts_and_then_is_silent_costs_the_deadline(
    nursery: trio.Nursery, one: Identity, two: Identity
) -> None:
    async def mute(transport: trio.SocketStream) -> None:
        stream = trio.SSLStream(transport, tls.server_context(one), server_side=True)
        framed = Framed(stream, LINK)
        await framed.expect(Hello)
        await framed.send(hello(one))
        await read_to_end(stream)

    listeners = await open_listeners(0, "127.0.0.1")
    nursery.start_soon(trio.serve_listeners, mute, listeners)
    address = Address("127.0.0.1", listeners[0].socket.getsockname()[1])
    with pytest.raises(PeerError, match="no answer"):
        await links_of(two).dial([address], want=one.node, service="echo", deadline_s=0.3)


async def test_a_peer_that_answers_nonsense_is_a_peer_error(
    nursery: trio.Nursery, one: Identity, two: Identity
) -> None:
    answers = [
        encode(LINK.encode(hello(one))) + encode(LINK.encode(hello(one))),
        encode(LINK.encode(hello(one))) + b"\xff" * 100,
        encode(LINK.encode(Accepted())),
        PREFIX.pack(1 << 30, 0),
        encode(b"\xc1"),
        b"",
    ]

    async def odd(transport: trio.SocketStream) -> None:
        stream = trio.SSLStream(transport, tls.server_context(one), server_side=True)
        try:
            await stream.send_all(answers[0])
            await read_to_end(stream) if answers[0] else None
        except trio.BrokenResourceError:
            pass
        await trio.aclose_forcefully(stream)

    listeners = await open_listeners(0, "127.0.0.1")
    nursery.start_soon(trio.serve_listeners, odd, listeners)
    address = Address("127.0.0.1", listeners[0].socket.getsockname()[1])
    while answers:
        with pytest.raises(PeerError):
            await links_of(two).dial([address], want=one.node, service="echo", deadline_s=PATIENCE_S)
        answers.pop(0) if len(answers) > 1 else answers.clear()
        if not answers:
            break


# Hostile connections


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blobs=st.lists(st.binary(max_size=600), min_size=1, max_size=8), data=st.data())
def test_garbage_closes_only_its_own_connection(
    one: Identity, two: Identity, blobs: list[bytes], data: st.DataObject
) -> None:
    """Raw bytes, and the same bytes after something that looks like TLS; whole and one at a time."""
    one_by_one = data.draw(st.booleans())
    looks_like_tls = data.draw(st.booleans())

    async def run() -> None:
        async with Wires() as wires, trio.open_nursery() as nursery:
            box = await start(nursery, one)
            for blob in blobs:
                stream = await wires.tcp(box.address)
                raw = b"\x16\x03\x01" + struct.pack("!H", len(blob)) + blob if looks_like_tls else blob
                with contextlib.suppress(trio.BrokenResourceError):
                    for i in range(0, len(raw), 1 if one_by_one else max(1, len(raw))):
                        await stream.send_all(raw[i : i + (1 if one_by_one else len(raw))])
                    await stream.send_eof()
                await read_to_end(stream)
                await stream.aclose()
            await check_echo(links_of(two), box)
            assert box.links.n_streams <= 1
            nursery.cancel_scope.cancel()

    trio.run(run)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(blob=st.binary(min_size=1, max_size=400), certified=st.booleans(), polite=st.booleans(), cut=st.booleans())
def test_garbage_inside_tls_closes_only_its_own_connection(
    one: Identity, two: Identity, blob: bytes, certified: bool, polite: bool, cut: bool
) -> None:
    async def run() -> None:
        async with Wires() as wires, trio.open_nursery() as nursery:
            box = await start(nursery, one)
            context = context_of(two, one) if certified else tls.stranger_context()
            framed = await wires.link(box.address, context)
            if polite:
                await framed.send(hello(two) if certified else stranger_hello(one.cluster))
                await framed.expect(Hello)
            with contextlib.suppress(trio.BrokenResourceError):
                for piece in [blob[i : i + 1] for i in range(len(blob))] if cut else [blob]:
                    await framed.stream.send_all(piece)
                await framed.stream.send_all(encode(blob))
            await trio.aclose_forcefully(framed.stream)
            await check_echo(links_of(two), box)
            nursery.cancel_scope.cancel()

    trio.run(run)


async def test_plain_http_is_closed(box: Box, two: Identity, wires: Wires) -> None:
    stream = await wires.tcp(box.address)
    await stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"HTTP" not in await read_to_end(stream)
    await check_echo(links_of(two), box)


async def test_tls_below_1_3_is_closed(box: Box, one: Identity, two: Identity) -> None:
    context = context_of(two, one)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(PeerError):
        await tls.connect(box.address, context)
    await check_echo(links_of(two), box)


@pytest.mark.parametrize("certified", [True, False])
@pytest.mark.parametrize("lengths", [(1 << 31, 0), (90 << 10, 0), (0, 1), (10, 1 << 20)])
async def test_an_oversized_frame_ends_the_connection_before_its_body(
    box: Box, one: Identity, two: Identity, certified: bool, lengths: tuple[int, int], wires: Wires
) -> None:
    framed = await wires.link(box.address, context_of(two, one) if certified else tls.stranger_context())
    await framed.stream.send_all(PREFIX.pack(*lengths))
    await framed.expect(Hello)
    assert await read_to_end(framed.stream) == b""
    await until(lambda: box.links.n_waiting == 0)


async def test_strangers_may_send_less_than_members(box: Box, one: Identity, two: Identity, wires: Wires) -> None:
    for context, gone in ((tls.stranger_context(), True), (context_of(two, one), False)):
        framed = await wires.link(box.address, context)
        await framed.stream.send_all(PREFIX.pack(20_000, 0))
        await framed.expect(Hello)
        with trio.move_on_after(PATIENCE_S if gone else 0.1) as waited:
            assert await read_to_end(framed.stream) == b""
        assert waited.cancelled_caught is not gone
        await trio.aclose_forcefully(framed.stream)


@pytest.mark.parametrize("says", ["nothing", "tls", "hello", "half a hello"])
async def test_silence_costs_a_deadline_and_a_place(
    nursery: trio.Nursery, one: Identity, two: Identity, says: str, wires: Wires
) -> None:
    box = await start(nursery, one, limits=QUICK)
    if says == "nothing":
        stream: trio.abc.Stream = await wires.tcp(box.address)
    else:
        framed = await wires.link(box.address, context_of(two, one))
        stream = framed.stream
        await framed.expect(Hello)
        text = encode(LINK.encode(hello(two)))
        await stream.send_all({"tls": b"", "hello": text, "half a hello": text[:20]}[says])
    assert await read_to_end(stream) == b""
    await until(lambda: box.links.n_waiting == 0)
    await check_echo(links_of(two), box)


async def test_an_accepted_stream_has_no_deadline_of_the_lobby(
    nursery: trio.Nursery, one: Identity, two: Identity, wires: Wires
) -> None:
    box = await start(nursery, one, limits=QUICK)
    stream = await wires.dial(links_of(two), box, "echo")
    await trio.sleep(0.7)  # longer than the handshake may take
    await stream.send_all(b"still here")
    assert await read_exactly(stream, 10) == b"still here"


async def test_resets_at_every_stage_are_survived(box: Box, one: Identity, two: Identity, wires: Wires) -> None:
    async def reset(stream: Any) -> None:
        sock = stream.socket if isinstance(stream, trio.SocketStream) else stream.transport_stream.socket
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await trio.aclose_forcefully(stream)

    await reset(await wires.tcp(box.address))
    await reset((await wires.link(box.address, tls.stranger_context())).stream)
    framed = await wires.link(box.address, context_of(two, one))
    await framed.send(hello(two))
    await reset(framed.stream)
    framed = await wires.link(box.address, context_of(two, one))
    await framed.send(hello(two))
    await framed.expect(Hello)
    await framed.send(Open("echo"))
    await framed.expect(Accepted)
    await reset(framed.stream)
    await until(lambda: box.links.n_waiting == 0 and box.links.n_streams == 0)
    await check_echo(links_of(two), box)


async def test_the_lobby_is_bounded_and_a_newcomer_gets_a_place(
    nursery: trio.Nursery, one: Identity, two: Identity, wires: Wires
) -> None:
    box = await start(nursery, one, limits=Limits(max_unauthenticated=8, handshake_s=60))
    crowd = [await wires.tcp(box.address) for _ in range(20)]
    await until(lambda: box.links.n_waiting == 8)
    for stream in crowd[:12]:
        assert await read_to_end(stream) == b""  # the oldest were dropped
    await check_echo(links_of(two), box)
    for stream in crowd:
        await stream.aclose()


async def test_a_flood_from_one_host_costs_that_hosts_connections(
    nursery: trio.Nursery, one: Identity, two: Identity, wires: Wires
) -> None:
    box = await start(nursery, one, limits=Limits(max_unauthenticated=8, handshake_s=60))
    framed = await wires.link(box.address, context_of(two, one))
    await framed.expect(Hello)  # an honest, slow node, in the lobby before the flood
    for _ in range(30):
        stream = await wires.tcp(box.address, "127.0.0.2")
        nursery.start_soon(read_to_end, stream)
    await until(lambda: box.links.n_waiting == 8)
    await framed.send(hello(two))
    await framed.send(Open("echo"))
    await framed.expect(Accepted, deadline_s=PATIENCE_S)
    nursery.cancel_scope.cancel()


async def test_a_thousand_garbage_connections_do_not_stop_a_good_one(box: Box, two: Identity, wires: Wires) -> None:
    """Every fourth stays open for good and says nothing, so that the lobby overflows; the others talk nonsense."""
    nonsense = [b"", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 40]

    async def rubbish(number: int) -> None:
        with contextlib.suppress(OSError, trio.BrokenResourceError):
            stream = await wires.tcp(box.address)
            await stream.send_all(nonsense[number % 4])
            if number % 4 == 3:
                await read_to_end(stream)
            if number % 4:
                await stream.aclose()

    links = links_of(two)
    for batch in range(20):
        async with trio.open_nursery() as nursery:
            for i in range(50):
                nursery.start_soon(rubbish, batch * 50 + i)
            await check_echo(links, box)
    await until(lambda: box.links.n_waiting > 16)  # and many of the silent ones are still there


async def test_a_fault_in_a_service_ends_only_its_stream(
    nursery: trio.Nursery, one: Identity, two: Identity, caplog: pytest.LogCaptureFixture, wires: Wires
) -> None:
    async def buggy(_peer: NodeId, _stream: trio.abc.Stream, _args: dict[str, Any]) -> None:
        async with trio.open_nursery() as inner:
            inner.start_soon(trio.lowlevel.checkpoint)
            raise ZeroDivisionError("a bug")

    box = await start(nursery, one, Services({"buggy": buggy, "echo": echo}))
    stream = await wires.dial(links_of(two), box, "buggy")
    assert await read_to_end(stream) == b""
    await check_echo(links_of(two), box)
    await until(lambda: box.links.n_streams == 0)
    assert "a fault of this program" in caplog.text
    assert "a bug" in caplog.text


async def test_the_end_of_serving_ends_every_stream(
    nursery: trio.Nursery, one: Identity, two: Identity, wires: Wires
) -> None:
    box = await start(nursery, one)
    stream = await wires.dial(links_of(two), box, "echo")
    waiting = await wires.tcp(box.address)
    box.scope.cancel()
    assert await read_to_end(stream) == b""
    assert await read_to_end(waiting) == b""
    with pytest.raises(OSError, match="all attempts"):
        await wires.tcp(box.address)


async def test_a_taken_port_names_itself_and_the_flag() -> None:
    (listener,) = await open_listeners(0, "127.0.0.1")
    port = listener.socket.getsockname()[1]
    with pytest.raises(PortTaken, match=str(port)) as caught:
        await open_listeners(port, "127.0.0.1")
    assert "--mesh-port" in caught.value.hint
    await listener.aclose()


async def test_a_free_port_is_one_port() -> None:
    listeners = await open_listeners(0)
    assert len({ls.socket.getsockname()[1] for ls in listeners}) == 1
    for listener in listeners:
        await listener.aclose()


async def test_mesh_sockets_are_tuned(box: Box, two: Identity) -> None:
    stream = await tls.connect(box.address, tls.client_context(two))
    sock = stream.transport_stream.socket
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == tls.USER_TIMEOUT_S * 1000
    await trio.aclose_forcefully(stream)


async def test_arguments_too_large_are_the_callers_fault(two: Identity) -> None:
    with pytest.raises(ValueError, match="at most"):
        await links_of(two).dial([], want=None, service="echo", args={"x": b"y" * 70_000})


async def test_arguments_that_are_no_map_end_the_stream(box: Box, one: Identity, two: Identity, wires: Wires) -> None:
    framed = await wires.link(box.address, context_of(two, one))
    await framed.send(hello(two))
    await framed.expect(Hello)
    await framed.send(Open("echo", b"\x93\x01\x02\x03"))
    with pytest.raises((PeerGone, ProtocolError)):
        await framed.expect(Accepted, deadline_s=PATIENCE_S)
