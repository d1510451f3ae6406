"""Joining over real sockets and real TLS: the good way, every refusal, and everybody who might stand in between."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import logging
import stat
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from mesh_lab import (
    PATIENCE_S,
    Box,
    Wires,
    check_echo,
    echo,
    founder,
    hello,
    links_of,
    member,
    read_to_end,
    start,
    stranger_hello,
    until,
)

from tightwad_agent.errors import (
    EnvironmentFault,
    NotTrusted,
    PeerError,
    PeerUnreachable,
    ProtocolError,
    TokenError,
    UsageError,
)
from tightwad_agent.ids import Address, NodeId, NodeName
from tightwad_agent.mesh import certs, enrol, identity, tls, tokens
from tightwad_agent.mesh.enrol import Registrar, join
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.ledger import Ledger
from tightwad_agent.mesh.links import Limits, Services, open_listeners
from tightwad_agent.mesh.tls_stream import TlsStream
from tightwad_agent.mesh.tokens import Token
from tightwad_agent.streams import Framed
from tightwad_agent.testing import node_id
from tightwad_agent.wire.handshake import (
    JOIN,
    LINK,
    Accepted,
    Challenge,
    Hello,
    Joined,
    JoinRefused,
    JoinRequest,
    Line,
    Open,
    RememberedPeer,
)
from tightwad_agent.wire.rows import Role

NAME = NodeName("joiner")


@pytest.fixture
async def wires() -> AsyncIterator[Wires]:
    async with Wires() as made:
        yield made


@dataclass
class Desk:
    """A member that answers joiners."""

    box: Box
    ledger: Ledger | None
    offset_s: float = 0.0
    joined: list[tuple[NodeId, str, Role]] = field(default_factory=list)

    @property
    def who(self) -> Identity:
        return self.box.who

    def token(self, **options: Any) -> Token:
        assert self.ledger is not None
        return identity.issue_token(self.who, self.ledger, time.time() + self.offset_s, **options)


async def desk(
    nursery: trio.Nursery,
    who: Identity,
    *,
    has_ledger: bool = True,
    authorities: Sequence[Address] = (),
    members: Sequence[RememberedPeer] = (),
    denied: Sequence[NodeId] = (),
    limits: Limits | None = None,
) -> Desk:
    ledger = Ledger(who.state_dir) if has_ledger and who.can_issue else None
    made: list[Desk] = []
    registrar = Registrar(
        who=lambda: who,
        ledger=ledger,
        clock=lambda: time.time() + made[0].offset_s,
        members=lambda: members,
        authorities=lambda: authorities,
        is_denied=lambda node: node in denied,
        on_joined=lambda node, name, role: made[0].joined.append((node, name, role)),
    )
    box = await start(nursery, who, Services({"echo": echo}, join=registrar.serve), limits=limits)
    made.append(Desk(box, ledger))
    return made[0]


async def enter(token: Token, where: Sequence[Address], folder: Path, **options: Any) -> Identity:
    return await join(
        token, where, name=NAME, state_dir=folder, clock=time.time, deadline_s=options.pop("deadline_s", PATIENCE_S)
    )


def secrets_of(who: Identity, token: Token | None = None) -> list[str]:
    """Everything that must never be seen, in the forms in which it might be."""
    raw = [certs.raw_private(who.key)]
    if who.ca_key is not None:
        raw.append(certs.raw_private(who.ca_key))
    texts = [who.state.api_key]
    if token is not None:
        raw.append(token.seed)
        texts.append(token.text)
    for data in raw:
        texts += [data.hex(), base64.urlsafe_b64encode(data).decode()[:40], base64.b64encode(data).decode()[:40]]
        texts.append(repr(data)[2:-1])
    return texts


# The good way


@pytest.mark.parametrize("role", list(Role))
async def test_a_machine_with_a_token_becomes_a_node(
    nursery: trio.Nursery, tmp_path: Path, role: Role, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    friend = RememberedPeer(node_id("friend"), NodeName("friend"), (Address("10.0.0.9", 8089),))
    office = await desk(nursery, founder(tmp_path), members=[friend])
    token = office.token(role=role)
    made = await enter(tokens.parse(token.text), [office.box.address], tmp_path / "joiner")
    loaded = identity.load(tmp_path / "joiner")
    assert loaded is not None
    assert (loaded.node, loaded.role, loaded.cluster) == (made.node, role, office.who.cluster)
    assert loaded.can_issue is (role is Role.AUTHORITY)
    assert loaded.state.api_key == office.who.state.api_key
    assert loaded.state.cluster_name == office.who.state.cluster_name
    assert [(p.node, p.addresses) for p in loaded.state.peers] == [
        (office.who.node, (office.box.address,)),
        (friend.node, friend.addresses),
    ]
    assert office.joined == [(made.node, "joiner", role)]
    if role is not Role.CLIENT:
        await check_echo(links_of(loaded), office.box)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "joiner").iterdir()}
    assert set(modes.values()) == {0o600}
    assert ("ca.key" in modes) is (role is Role.AUTHORITY)
    assert stat.S_IMODE((tmp_path / "joiner").stat().st_mode) == 0o700
    for secret in secrets_of(office.who, token) + secrets_of(loaded):
        assert secret not in caplog.text


async def test_addresses_in_the_token_are_enough(nursery: trio.Nursery, tmp_path: Path) -> None:
    office = await desk(nursery, founder(tmp_path))
    token = office.token(addresses=(Address("127.0.0.1", 1), office.box.address))
    assert (await enter(token, [], tmp_path / "joiner")).cluster == office.who.cluster


async def test_a_new_authority_enrols_others(nursery: trio.Nursery, tmp_path: Path) -> None:
    office = await desk(nursery, founder(tmp_path))
    second = await enter(office.token(role=Role.AUTHORITY), [office.box.address], tmp_path / "second")
    branch = await desk(nursery, second)
    third = await enter(branch.token(), [branch.box.address], tmp_path / "third")
    await check_echo(links_of(third), office.box)


async def test_nothing_secret_is_sent_by_the_joiner(nursery: trio.Nursery, tmp_path: Path) -> None:
    """Reads the joiner's own words inside TLS, by playing the authority."""
    who = founder(tmp_path)
    token = identity.issue_token(who, Ledger(who.state_dir), time.time())
    heard = bytearray()

    async def listen(transport: trio.SocketStream) -> None:
        stream = trio.SSLStream(transport, tls.server_context(who), server_side=True)
        framed = Framed(Recording(stream, heard), LINK)
        await framed.send(hello(who))
        await framed.expect(Hello)
        await framed.expect(Open)
        await framed.send(Accepted())
        talk = Framed(framed.detach(), JOIN)
        await talk.send(Challenge(certs.der(who.ca), bytes(32)))
        await talk.expect(JoinRequest)
        await talk.send(JoinRefused("used_up", Line("no")))
        await trio.aclose_forcefully(stream)

    address = await listener(nursery, listen)
    with pytest.raises(TokenError):
        await enter(token, [address], tmp_path / "joiner")
    key = identity.begin(tmp_path / "joiner")
    assert token.claims_bytes in heard
    assert token.seed not in heard
    assert certs.raw_private(key) not in heard


class Recording(trio.abc.Stream):
    """Keeps what is read."""

    def __init__(self, stream: trio.abc.Stream, heard: bytearray) -> None:
        self._stream = stream
        self._heard = heard

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._stream.receive_some(max_bytes)
        self._heard += data
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


async def listener(nursery: trio.Nursery, serve: Callable[[trio.SocketStream], Any]) -> Address:
    """A server that does as it likes; what goes wrong in it is its own affair."""

    async def wall(transport: trio.SocketStream) -> None:
        try:
            await serve(transport)
        except* (PeerError, trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass
        finally:
            await trio.aclose_forcefully(transport)

    listeners = await open_listeners(0, "127.0.0.1")
    nursery.start_soon(trio.serve_listeners, wall, listeners)
    return Address("127.0.0.1", listeners[0].socket.getsockname()[1])


# Refusals


async def test_an_expired_token_is_refused_by_the_authoritys_clock(nursery: trio.Nursery, tmp_path: Path) -> None:
    office = await desk(nursery, founder(tmp_path))
    token = office.token(ttl_s=60)
    office.offset_s = 61
    with pytest.raises(TokenError, match="expired"):
        await enter(token, [office.box.address], tmp_path / "joiner")
    assert identity.load(tmp_path / "joiner") is None
    assert not office.joined


async def test_one_use_admits_one_of_two_that_race(nursery: trio.Nursery, tmp_path: Path) -> None:
    office = await desk(nursery, founder(tmp_path))
    token = office.token()
    results: list[Identity | TokenError] = []

    async def runner(folder: Path) -> None:
        try:
            results.append(await enter(token, [office.box.address], folder))
        except TokenError as exc:
            results.append(exc)

    async with trio.open_nursery() as racers:
        for i in range(6):
            racers.start_soon(runner, tmp_path / f"racer{i}")
    winners = [r for r in results if isinstance(r, Identity)]
    losers = [r for r in results if isinstance(r, TokenError)]
    assert (len(winners), len(losers)) == (1, 5)
    assert all("as often as it may be" in str(e) for e in losers)
    assert len(office.joined) == 1


async def test_a_repeated_join_gets_the_same_answer(nursery: trio.Nursery, tmp_path: Path) -> None:
    """The answer was lost on the way: same node key, same token, one use."""
    office = await desk(nursery, founder(tmp_path))
    token = office.token()
    first = await enter(token, [office.box.address], tmp_path / "joiner")
    for name in ("state.yaml", "node.crt", "ca.crt"):
        (tmp_path / "joiner" / name).unlink()
    second = await enter(token, [office.box.address], tmp_path / "joiner")
    assert second.node == first.node
    with pytest.raises(TokenError, match="as often"):
        await enter(token, [office.box.address], tmp_path / "another")
    assert [node for node, _, _ in office.joined] == [first.node, first.node]


async def test_a_member_does_not_join_again(nursery: trio.Nursery, tmp_path: Path) -> None:
    """A service unit keeps its --join for ever; there may be nobody to ask."""
    office = await desk(nursery, founder(tmp_path))
    token = office.token()
    first = await enter(token, [office.box.address], tmp_path / "joiner")
    again = await enter(token, [], tmp_path / "joiner")
    assert again.node == first.node
    assert len(office.joined) == 1


async def test_a_member_of_another_cluster_is_not_moved(nursery: trio.Nursery, tmp_path: Path) -> None:
    office = await desk(nursery, founder(tmp_path))
    other = founder(tmp_path, "other")
    with pytest.raises(UsageError, match=other.cluster.short) as caught:
        await enter(office.token(), [office.box.address], other.state_dir)
    assert "leave" in caught.value.hint
    assert not office.joined


async def test_a_node_whose_leaf_ran_out_joins_again_as_itself(nursery: trio.Nursery, tmp_path: Path) -> None:
    office = await desk(nursery, founder(tmp_path))
    stale = member(office.who, tmp_path, "stale", issued_days_ago=40)
    remembered = RememberedPeer(node_id("old friend"), NodeName("old"))
    dataclasses.replace(stale.state, incarnation=9).remembering(remembered).save(stale.state_dir)
    fresh = await enter(office.token(), [office.box.address], stale.state_dir)
    assert fresh.node == stale.node
    assert fresh.state.incarnation == 9
    assert fresh.state.joined_at == stale.state.joined_at
    assert {p.node for p in fresh.state.peers} == {office.who.node, node_id("old friend")}
    await check_echo(links_of(fresh), office.box)


async def test_a_token_of_another_cluster_finds_no_door(nursery: trio.Nursery, tmp_path: Path) -> None:
    office = await desk(nursery, founder(tmp_path))
    other = founder(tmp_path, "other")
    token = identity.issue_token(other, Ledger(other.state_dir), time.time())
    with pytest.raises(NotTrusted, match="another cluster answers there") as caught:
        await enter(token, [office.box.address], tmp_path / "joiner")
    assert str(office.box.address) in caught.value.message
    assert not office.joined


async def test_the_wrong_clusters_listener_is_simply_not_chosen(nursery: trio.Nursery, tmp_path: Path) -> None:
    wrong = await desk(nursery, founder(tmp_path, "wrong"))
    office = await desk(nursery, founder(tmp_path))
    token = office.token()
    made = await enter(token, [wrong.box.address, Address("127.0.0.1", 1), office.box.address], tmp_path / "joiner")
    assert made.cluster == office.who.cluster
    assert not wrong.joined


async def test_a_token_that_this_cluster_forgot_is_unknown(nursery: trio.Nursery, tmp_path: Path) -> None:
    office = await desk(nursery, founder(tmp_path))
    token = office.token()
    (office.who.state_dir / "tokens.ledger").unlink()
    with pytest.raises(PeerError, match="did not make the join token"):
        await enter(token, [office.box.address], tmp_path / "joiner")


async def test_a_denied_node_cannot_come_back_with_a_token(nursery: trio.Nursery, tmp_path: Path) -> None:
    node = NodeId.of_spki(certs.spki(identity.begin(tmp_path / "joiner").public_key()))
    office = await desk(nursery, founder(tmp_path), denied=[node])
    with pytest.raises(TokenError, match="was removed"):
        await enter(office.token(), [office.box.address], tmp_path / "joiner")
    assert office.ledger is not None
    assert office.ledger.entries()[0].uses_left == 1


async def test_an_authority_that_cannot_write_admits_nobody(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    office = await desk(nursery, founder(tmp_path))
    token = office.token()

    def broken(*_args: object) -> None:
        raise EnvironmentFault("the disk is full")

    monkeypatch.setattr(office.ledger, "_append", broken)
    with pytest.raises(PeerError, match="cannot write to its disk"):
        await enter(token, [office.box.address], tmp_path / "joiner")
    assert not office.joined
    monkeypatch.undo()
    assert (await enter(token, [office.box.address], tmp_path / "joiner")).cluster == office.who.cluster


async def test_the_ledger_is_written_before_the_certificate(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    office = await desk(nursery, founder(tmp_path))
    real, seen = certs.issue_leaf, []

    def spy(*args: Any) -> Any:
        seen.append([e.nodes for e in Ledger(office.who.state_dir).entries()])
        return real(*args)

    token = office.token()
    monkeypatch.setattr(certs, "issue_leaf", spy)
    made = await enter(token, [office.box.address], tmp_path / "joiner")
    assert seen == [[(made.node,)]]


# Members that are no authority


async def test_a_member_sends_the_joiner_on(nursery: trio.Nursery, tmp_path: Path) -> None:
    office = await desk(nursery, founder(tmp_path))
    helper = await desk(nursery, member(office.who, tmp_path), authorities=[office.box.address])
    made = await enter(office.token(), [helper.box.address], tmp_path / "joiner")
    assert office.joined == [(made.node, "joiner", Role.NODE)]
    assert made.state.peers[0].node == office.who.node


async def test_an_authority_that_did_not_make_the_token_sends_on(nursery: trio.Nursery, tmp_path: Path) -> None:
    office = await desk(nursery, founder(tmp_path))
    second = member(office.who, tmp_path, "second", role=Role.AUTHORITY)
    branch = await desk(nursery, second, authorities=[office.box.address])
    made = await enter(office.token(), [branch.box.address], tmp_path / "joiner")
    assert office.joined == [(made.node, "joiner", Role.NODE)]


async def test_members_that_send_on_in_circles_are_an_end(nursery: trio.Nursery, tmp_path: Path) -> None:
    who = founder(tmp_path)
    token = identity.issue_token(who, Ledger(who.state_dir), time.time())
    addresses: list[Address] = []
    helpers = [await desk(nursery, member(who, tmp_path, f"m{i}"), authorities=addresses) for i in range(3)]
    addresses += [h.box.address for h in helpers] + [Address("127.0.0.1", p) for p in range(1, 60)]
    with pytest.raises(PeerUnreachable, match="not an authority"):
        await enter(token, [helpers[0].box.address], tmp_path / "joiner")


async def test_nobody_there_names_every_address(tmp_path: Path) -> None:
    who = founder(tmp_path)
    token = identity.issue_token(who, Ledger(who.state_dir), time.time())
    with pytest.raises(PeerUnreachable, match="no address is known"):
        await enter(token, [], tmp_path / "joiner")
    with pytest.raises(PeerUnreachable, match=r"127\.0\.0\.1:1: Connection refused"):
        await enter(token, [Address("127.0.0.1", 1), Address("127.0.0.1", 2)], tmp_path / "joiner")
    assert identity.load(tmp_path / "joiner") is None


# Forged requests


async def opened(wires: Wires, office: Desk) -> tuple[Framed, Challenge, bytes]:
    """A join conversation up to the challenge, and the digest of the leaf that was shown."""
    framed = await wires.link(office.box.address, tls.stranger_context())
    assert isinstance(framed.stream, TlsStream)
    shown = framed.stream.peer_der()
    await framed.send(stranger_hello(office.who.cluster))
    await framed.expect(Hello)
    await framed.send(Open("join"))
    await framed.expect(Accepted)
    talk = Framed(framed.detach(), JOIN)
    return talk, await talk.expect(Challenge), hashlib.sha256(shown or b"").digest()


def request_of(token: Token, nonce: bytes, digest: bytes, key: Any = None, **changes: Any) -> JoinRequest:
    key = key or certs.new_key()
    spki = certs.spki(key.public_key())
    text = tokens.join_text(nonce=nonce, leaf_digest=digest, spki=spki, claims=token.claims_bytes)
    honest = JoinRequest(
        token.claims_bytes,
        token.ca_signature,
        spki,
        token.sign_join(nonce=nonce, leaf_digest=digest, spki=spki),
        key.sign(text),
        NAME,
    )
    return dataclasses.replace(honest, **changes)


def better(token: Token, **changes: Any) -> bytes:
    """The claims of a token, made better by its owner."""
    from tightwad_agent.wire.codec import pack, to_plain

    return pack(to_plain(dataclasses.replace(token.claims, **changes)))


FORGERIES: dict[str, Callable[[Token, bytes, bytes], JoinRequest]] = {
    "more uses": lambda t, n, d: request_of(dataclasses.replace(t, claims_bytes=better(t, uses=100)), n, d),
    "longer life": lambda t, n, d: request_of(dataclasses.replace(t, claims_bytes=better(t, ttl_s=10**6)), n, d),
    "more power": lambda t, n, d: request_of(dataclasses.replace(t, claims_bytes=better(t, role=Role.AUTHORITY)), n, d),
    "no token": lambda t, n, d: request_of(dataclasses.replace(t, seed=b"guess" + bytes(27)), n, d),
    "another nonce": lambda t, n, d: request_of(t, bytes(32), d),
    "another server": lambda t, n, d: request_of(t, n, bytes(32)),
    "no ca signature": lambda t, n, d: request_of(t, n, d, ca_signature=bytes(64)),
    "short signatures": lambda t, n, d: request_of(t, n, d, token_signature=b"", node_signature=b""),
    "another's key": lambda t, n, d: request_of(t, n, d, spki=certs.spki(certs.new_key().public_key())),
    "no node key": lambda t, n, d: request_of(t, n, d, node_signature=bytes(64)),
    "no key at all": lambda t, n, d: request_of(t, n, d, spki=b"\x30\x00"),
    "claims that are none": lambda t, n, d: request_of(t, n, d, claims=b"\xc1"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_forged_requests_get_no_certificate_and_use_nothing_up(
    nursery: trio.Nursery, tmp_path: Path, wires: Wires, forgery: str
) -> None:
    office = await desk(nursery, founder(tmp_path))
    token = office.token()
    talk, challenge, digest = await opened(wires, office)
    await talk.send(FORGERIES[forgery](token, challenge.nonce, digest))
    assert (await talk.expect(JoinRefused, deadline_s=PATIENCE_S)).code == enrol.FORGED
    assert office.ledger is not None
    assert office.ledger.entries()[0].uses_left == 1
    talk, challenge, digest = await opened(wires, office)
    await talk.send(request_of(token, challenge.nonce, digest))
    await talk.expect(Joined, deadline_s=PATIENCE_S)  # the honest one passes by the same way


@pytest.mark.parametrize("role", list(Role))
async def test_only_an_authority_is_given_the_clusters_key(
    nursery: trio.Nursery, tmp_path: Path, wires: Wires, role: Role
) -> None:
    """What is on the wire, not what the joiner keeps of it."""
    office = await desk(nursery, founder(tmp_path))
    assert office.who.ca_key is not None
    token = office.token(role=role)
    talk, challenge, digest = await opened(wires, office)
    await talk.send(request_of(token, challenge.nonce, digest))
    joined = await talk.expect(Joined, deadline_s=PATIENCE_S)
    expected = certs.raw_private(office.who.ca_key) if role is Role.AUTHORITY else b""
    assert joined.ca_key == expected
    assert certs.role_of(certs.parse_der(joined.leaf)) is role


async def test_a_transcript_works_once_and_nowhere_else(nursery: trio.Nursery, tmp_path: Path, wires: Wires) -> None:
    office = await desk(nursery, founder(tmp_path))
    twin = await desk(nursery, member(office.who, tmp_path, "twin", role=Role.AUTHORITY))
    assert twin.ledger is not None
    token = office.token(uses=5)
    twin.ledger.add(token, time.time())  # even if it knew the token
    talk, challenge, digest = await opened(wires, office)
    recorded = request_of(token, challenge.nonce, digest)
    await talk.send(recorded)
    await talk.expect(Joined)
    for other in (office, twin):
        talk, _, _ = await opened(wires, other)
        await talk.send(recorded)
        assert (await talk.expect(JoinRefused)).code == enrol.FORGED


@pytest.mark.parametrize("junk", [b"\xff" * 50, b"\x00" * 8, b"\x7f\xff\xff\xff\x00\x00\x00\x00", b""])
async def test_junk_in_place_of_a_request_ends_the_conversation(
    nursery: trio.Nursery, tmp_path: Path, wires: Wires, junk: bytes
) -> None:
    office = await desk(nursery, founder(tmp_path), limits=Limits(join_s=1.0))
    talk, _, _ = await opened(wires, office)
    await talk.stream.send_all(junk)
    assert await read_to_end(talk.stream) == b""
    await until(lambda: office.box.links.n_waiting == 0)
    await enter(office.token(), [office.box.address], tmp_path / "joiner")


# Somebody in between


async def test_a_man_in_the_middle_with_his_own_ca_gets_nothing_and_is_named(
    nursery: trio.Nursery, tmp_path: Path
) -> None:
    """He knows everything public: cluster id, the real CA certificate, the authority's name."""
    real = founder(tmp_path)
    token = identity.issue_token(real, Ledger(real.state_dir), time.time())
    evil = founder(tmp_path, "evil")
    heard: list[object] = []

    async def pose(ca_cert: bytes, transport: trio.SocketStream) -> None:
        stream = trio.SSLStream(transport, tls.server_context(evil), server_side=True)
        framed = Framed(stream, LINK)
        await framed.send(hello(real))
        heard.append(await framed.expect(Hello))
        heard.append(await framed.expect(Open))
        await framed.send(Accepted())
        talk = Framed(framed.detach(), JOIN)
        await talk.send(Challenge(ca_cert, bytes(32)))
        heard.append(await read_to_end(talk.stream))

    shown_cas = {certs.der(evil.ca): "another cluster's key", certs.der(real.ca): "not signed by", b"x": "read"}
    for ca_cert, says in shown_cas.items():
        heard.clear()
        address = await listener(nursery, lambda t, ca_cert=ca_cert: pose(ca_cert, t))
        with pytest.raises(NotTrusted, match="not of the token's cluster") as caught:
            await enter(token, [address], tmp_path / "joiner")
        assert says in caught.value.message
        assert str(address) in caught.value.message
        await until(lambda: len(heard) == 3)
        assert [type(m) for m in heard[:2]] == [Hello, Open]
        assert heard[2] == b""
        shown = str(caught.value) + repr(heard)
        assert not [s for s in secrets_of(real, token) if s in shown]


@pytest.mark.parametrize("he_is", ["a member", "an authority that made no token"])
async def test_a_relay_with_another_leaf_gets_no_certificate(nursery: trio.Nursery, tmp_path: Path, he_is: str) -> None:
    """The worst case: he is of the cluster, passes the real challenge on, and the joiner's answer back."""
    office = await desk(nursery, founder(tmp_path))
    token = office.token()
    # only an authority's leaf is answered at all, so the relay of the second case has one
    role = Role.NODE if he_is == "a member" else Role.AUTHORITY
    relay_is = member(office.who, tmp_path, "relay", role=role)
    answers: list[object] = []

    async def relay(transport: trio.SocketStream) -> None:
        stream = trio.SSLStream(transport, tls.server_context(relay_is), server_side=True)
        framed = Framed(stream, LINK)
        await framed.send(hello(relay_is))
        await framed.expect(Hello)
        await framed.expect(Open)
        await framed.send(Accepted())
        async with Wires() as own:
            there, challenge, _ = await opened(own, office)
            here = Framed(framed.detach(), JOIN)
            await here.send(challenge)
            request = await here.expect(JoinRequest)
            await there.send(request)
            answer, _ = await there.receive()
            answers.append(answer)
            await here.send(answer)

    address = await listener(nursery, relay)
    with pytest.raises((PeerError, TokenError)):
        await enter(token, [address], tmp_path / "joiner", deadline_s=1.0 if role is Role.NODE else 5.0)
    assert [type(a) for a in answers] == ([] if role is Role.NODE else [JoinRefused])
    assert not office.joined
    assert office.ledger is not None
    assert office.ledger.entries()[0].uses_left == 1


async def test_an_authority_out_of_date_is_not_believed(nursery: trio.Nursery, tmp_path: Path) -> None:
    who = founder(tmp_path)
    token = identity.issue_token(who, Ledger(who.state_dir), time.time())
    stale = await desk(nursery, member(who, tmp_path, "stale", role=Role.AUTHORITY, issued_days_ago=40))
    with pytest.raises(NotTrusted, match="expired") as caught:
        await enter(token, [stale.box.address], tmp_path / "joiner")
    assert "clocks" in caught.value.hint


def answers_of(who: Identity, foreign: Identity) -> dict[str, Callable[[JoinRequest], object]]:
    """What a faulty authority might answer."""
    assert who.ca_key is not None
    assert foreign.ca_key is not None
    ca_key, foreign_key = who.ca_key, foreign.ca_key

    def leaf(request: JoinRequest, **changes: Any) -> bytes:
        facts = {"ca_key": ca_key, "key": certs.key_of_spki(request.spki), "role": Role.AUTHORITY, "ago": 0.0} | changes
        return certs.der(
            certs.issue_leaf(who.ca, facts["ca_key"], facts["key"], facts["role"], time.time() - facts["ago"])
        )

    def joined(request: JoinRequest, **changes: Any) -> Joined:
        whole = Joined(leaf(request), who.state.api_key, NAME, 1, (), certs.raw_private(ca_key))
        return dataclasses.replace(whole, **changes)

    return {
        "another key": lambda r: joined(r, leaf=leaf(r, key=certs.new_key().public_key())),
        "another role": lambda r: joined(r, leaf=leaf(r, role=Role.NODE)),
        "another ca": lambda r: joined(r, leaf=leaf(r, ca_key=foreign_key)),
        "out of date": lambda r: joined(r, leaf=leaf(r, ago=40 * 86_400)),
        "no leaf": lambda r: joined(r, leaf=b""),
        "odd api key": lambda r: joined(r, api_key="sk-1234"),
        "no ca key": lambda r: joined(r, ca_key=b""),
        "foreign ca key": lambda r: joined(r, ca_key=certs.raw_private(foreign_key)),
        "no answer at all": lambda r: r,
    }


ANSWERS = (
    "another key",
    "another role",
    "another ca",
    "out of date",
    "no leaf",
    "odd api key",
    "no ca key",
    "foreign ca key",
    "no answer at all",
)


@pytest.mark.parametrize("fault", ANSWERS)
async def test_an_answer_that_does_not_fit_is_not_kept(nursery: trio.Nursery, tmp_path: Path, fault: str) -> None:
    who, foreign = founder(tmp_path), founder(tmp_path, "foreign")
    token = identity.issue_token(who, Ledger(who.state_dir), time.time(), role=Role.AUTHORITY)
    answers = answers_of(who, foreign)
    assert set(answers) == set(ANSWERS)

    async def serve(transport: trio.SocketStream) -> None:
        stream = trio.SSLStream(transport, tls.server_context(who), server_side=True)
        framed = Framed(stream, LINK)
        await framed.send(hello(who))
        await framed.expect(Hello)
        await framed.expect(Open)
        await framed.send(Accepted())
        talk = Framed(framed.detach(), JOIN)
        await talk.send(Challenge(certs.der(who.ca), bytes(32)))
        await talk.send(answers[fault](await talk.expect(JoinRequest)))
        await read_to_end(stream)

    address = await listener(nursery, serve)
    with pytest.raises(PeerError) as caught:
        await enter(token, [address], tmp_path / "joiner")
    assert not [s for s in secrets_of(who, token) if s in str(caught.value)]
    assert identity.load(tmp_path / "joiner") is None


# Interruptions


@pytest.mark.parametrize("n", range(6))
async def test_a_join_interrupted_at_any_write_leaves_nothing_or_all(
    nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    from tightwad_agent.mesh import files

    office = await desk(nursery, founder(tmp_path))
    token = office.token(role=Role.AUTHORITY)
    count = -1

    def dying(path: Path, data: bytes) -> None:
        nonlocal count
        count += 1
        if count == n:
            raise EnvironmentFault("the plug was pulled")
        files.write_private(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(identity, "write_private", dying)
        patch.setattr("tightwad_agent.mesh.state.write_private", dying)
        with pytest.raises(EnvironmentFault, match="plug"):
            await enter(token, [office.box.address], tmp_path / "joiner")
    assert identity.load(tmp_path / "joiner") is None
    made = await enter(token, [office.box.address], tmp_path / "joiner")
    assert identity.load(tmp_path / "joiner") is not None
    assert {node for node, _, _ in office.joined} == {made.node}


async def test_a_join_cancelled_at_any_moment_can_be_repeated(nursery: trio.Nursery, tmp_path: Path) -> None:
    office = await desk(nursery, founder(tmp_path))
    token = office.token()
    for n in (0, 1, 3, 10, 20, 25, 30, 35, 40, 50, 60, 80):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as watch:

                async def cut(after: int = n, scope: trio.CancelScope = scope) -> None:
                    for _ in range(after):
                        await trio.sleep(0.0005)
                    scope.cancel()

                watch.start_soon(cut)
                await enter(token, [office.box.address], tmp_path / "joiner")
        identity.load(tmp_path / "joiner")  # whole or nothing, never damaged
    made = await enter(token, [office.box.address], tmp_path / "joiner")
    assert {node for node, _, _ in office.joined} == {made.node}


async def test_a_silent_listener_costs_the_deadline(nursery: trio.Nursery, tmp_path: Path) -> None:
    who = founder(tmp_path)
    token = identity.issue_token(who, Ledger(who.state_dir), time.time())

    async def mute(transport: trio.SocketStream) -> None:
        await read_to_end(transport)

    address = await listener(nursery, mute)
    with pytest.raises(PeerUnreachable, match=r"no answer within"):
        await enter(token, [address], tmp_path / "joiner", deadline_s=0.3)


async def test_joined_nodes_do_not_get_in_elsewhere(nursery: trio.Nursery, tmp_path: Path) -> None:
    office = await desk(nursery, founder(tmp_path))
    other = await desk(nursery, founder(tmp_path, "other"))
    made = await enter(office.token(), [office.box.address], tmp_path / "joiner")
    with pytest.raises(NotTrusted):
        await links_of(made).dial([other.box.address], want=None, service="echo")


async def test_join_over_a_members_connection_is_no_service(nursery: trio.Nursery, tmp_path: Path) -> None:
    office = await desk(nursery, founder(tmp_path))
    made = await enter(office.token(), [office.box.address], tmp_path / "joiner")
    with pytest.raises(PeerError, match="no service"):
        await links_of(made).dial([office.box.address], want=None, service="join")


def test_errors_are_of_the_families_that_callers_catch() -> None:
    assert issubclass(ProtocolError, PeerError)
    assert not issubclass(TokenError, PeerError)
