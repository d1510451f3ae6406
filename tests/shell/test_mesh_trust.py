"""Removal, revocation, roles, promotion and change of the cluster's key, in whole meshes over real sockets."""

from __future__ import annotations

import dataclasses
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from test_mesh_service import Net, Node, agree, all_see, three, until

from tightwad_agent.errors import (
    NotTrusted,
    PeerError,
    PeerRefused,
    PeerUnreachable,
    RemoteError,
    TokenError,
    UsageError,
)
from tightwad_agent.ids import Address, Epoch, NodeName
from tightwad_agent.mesh import certs, identity, tokens
from tightwad_agent.mesh.advert import to_txt
from tightwad_agent.mesh.enrol import join
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.ledger import Ledger
from tightwad_agent.wire import control
from tightwad_agent.wire.rows import Role, ServeRecord, Stamp, Want

WITHIN_S = 5.0
"""What the cluster promises: a removed node is cut off everywhere."""


@pytest.fixture
async def net(tmp_path: Path) -> AsyncIterator[Net]:
    async with trio.open_nursery() as nursery:
        yield Net(nursery, tmp_path)
        nursery.cancel_scope.cancel()


def new_token(via: Node, **options: Any) -> tokens.Token:
    book = via.mesh.ledger
    assert book is not None
    return identity.issue_token(via.mesh.identity, book, time.time(), **options)


async def enter(net: Net, via: Node, token: tokens.Token, name: str) -> Identity:
    where = [Address("127.0.0.1", via.mesh.port)]
    return await join(tokens.parse(token.text), where, name=NodeName(name), state_dir=net._root / name, clock=time.time)


async def enter_as(net: Net, via: Node, name: str, role: Role) -> Node:
    return await net.start(await enter(net, via, new_token(via, role=role), name))


def told(node: Node, words: str) -> int:
    return sum(words in e for e in node.events)


async def echo(_peer: Any, stream: trio.abc.Stream, _args: Any) -> None:
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


async def is_over(stream: trio.abc.Stream) -> bool:
    """It ends, by itself, cleanly or not."""
    try:
        with trio.fail_after(WITHIN_S):
            return not await stream.receive_some(1)
    except trio.BrokenResourceError:
        return True
    finally:
        await trio.aclose_forcefully(stream)


# Removal


async def test_a_removed_node_is_cut_off_everywhere_and_told_once(net: Net) -> None:
    a, b, mallory = await three(net)
    for node in (a, b, mallory):
        node.mesh.streams["echo"] = echo
    out = await mallory.mesh.open_stream(b.me.node, "echo", {})
    into = await a.mesh.open_stream(mallory.me.node, "echo", {})
    began = trio.current_time()
    await b.mesh.trust.remove_node(mallory.me.node)  # no authority: asks one
    await until(lambda: all_see([a, b]) and agree([a, b]), WITHIN_S)
    assert await is_over(out)
    assert await is_over(into)
    assert trio.current_time() - began < WITHIN_S
    assert mallory.me.node not in {p.node for n in (a, b) for p in n.mesh.peers()}
    await until(lambda: mallory.mesh.n_links == 0)
    assert told(mallory, "this machine was removed from the cluster (asked for on b)") == 1
    assert "leave" in mallory.mesh.problem
    for node in (a, b):
        with pytest.raises(PeerError):
            await mallory.mesh.open_stream(node.me.node, "echo", {})
        await until(lambda n=node: told(n, "was removed from the cluster (asked for on b)") == 1)
    saved = identity.load(mallory.me.state_dir)
    assert saved is not None
    assert stat.S_IMODE((a.me.state_dir / identity.DENY_LIST).stat().st_mode) == 0o600


async def test_a_node_that_was_away_hears_of_a_removal_when_it_comes_back(net: Net) -> None:
    a, b, mallory = await three(net)
    await b.stop()
    await until(lambda: all_see([a, mallory]))
    await a.mesh.trust.remove_node(mallory.me.node)
    await until(lambda: all_see([a]))
    back = await net.restart(b)
    a.mesh._contacts.sighted(b.me.node, [Address("127.0.0.1", back.mesh.port)], trio.current_time())
    back.mesh._contacts.sighted(mallory.me.node, [Address("127.0.0.1", mallory.mesh.port)], trio.current_time())
    await until(lambda: back.mesh.trust.denial_of(mallory.me.node) is not None and all_see([a, back]))
    with pytest.raises(PeerError):
        await mallory.mesh.open_stream(back.me.node, "call", {})


async def test_a_removal_survives_restarts_on_both_sides(net: Net) -> None:
    a, b, mallory = await three(net)
    await a.mesh.trust.remove_node(mallory.me.node)
    await until(lambda: all_see([a, b]) and mallory.mesh.trust.removal is not None)
    await until(lambda: all((n.me.state_dir / identity.DENY_LIST).exists() for n in (a, b, mallory)))
    await b.stop()
    await mallory.stop()
    b, mallory = await net.restart(b), await net.restart(mallory)
    assert mallory.mesh.problem
    assert mallory.mesh._linker.closing, "it dials nobody"
    assert b.mesh.trust.denial_of(mallory.me.node) is not None
    assert told(mallory, "was removed") == 0, "it was told before"


async def test_a_node_that_was_away_when_it_was_removed_is_told_when_it_knocks(net: Net) -> None:
    a, b, mallory = await three(net)
    await mallory.stop()
    await until(lambda: all_see([a, b]))
    await a.mesh.trust.remove_node(mallory.me.node)
    await until(lambda: b.mesh.trust.denial_of(mallory.me.node) is not None)
    back = await net.restart(mallory)
    for node in (a, b):
        back.mesh._contacts.sighted(node.me.node, [Address("127.0.0.1", node.mesh.port)], trio.current_time())
    await until(lambda: back.mesh.trust.removal is not None)
    assert told(back, "this machine was removed from the cluster") == 1
    await until(lambda: back.mesh.n_links == 0)


async def test_who_was_removed_while_away_believes_a_key_that_it_has_not_heard_of(net: Net) -> None:
    a, b, mallory = await three(net)
    await a.mesh.trust.promote(mallory.me.node)
    await until(lambda: mallory.mesh.identity.can_issue)
    await mallory.stop()
    await until(lambda: all_see([a, b]))
    await a.mesh.trust.remove_node(mallory.me.node)
    await a.mesh.trust.rotate(86400)
    back = await net.restart(mallory)
    back.mesh._contacts.sighted(a.me.node, [Address("127.0.0.1", a.mesh.port)], trio.current_time())
    await until(lambda: back.mesh.trust.removal is not None)
    assert told(back, "this machine was removed from the cluster (asked for on a)") == 1
    assert not back.mesh.identity.can_issue


async def test_its_old_key_stays_out_and_a_new_identity_gets_in(net: Net) -> None:
    a, b, mallory = await three(net)
    await a.mesh.trust.remove_node(mallory.me.node)
    await mallory.stop()
    with pytest.raises(RemoteError):  # an authority does not renew it either, were it still linked
        await b.mesh.call(a.me.node, "leaf.renew", {"leaf": mallory.me.leaf_der})
    key = identity.begin(net._root / "again")
    assert key
    (net._root / "again" / "node.key").write_bytes((mallory.me.state_dir / "node.key").read_bytes())
    with pytest.raises(TokenError, match="removed") as caught:
        await enter(net, a, new_token(a), "again")
    assert "leave" in caught.value.hint
    identity.destroy(mallory.me.state_dir)
    assert not (mallory.me.state_dir / identity.DENY_LIST).exists()
    fresh = await net.start(await enter(net, a, new_token(a), mallory.me.state.name))
    assert fresh.me.node != mallory.me.node
    await until(lambda: all_see([a, b, fresh]))


async def test_a_removed_coordinator_is_followed_by_another(net: Net) -> None:
    a, b, c = await three(net)
    boss = next(n for n in (a, b, c) if n.mesh.coordinating)
    left = [n for n in (a, b, c) if n is not boss]
    if boss is a:
        await a.mesh.trust.promote(b.me.node)
        await b.mesh.trust.remove_node(a.me.node)
    else:
        await a.mesh.trust.remove_node(boss.me.node)
    await until(lambda: all_see(left) and agree(left), WITHIN_S)


async def test_without_an_authority_nobody_is_removed_and_the_message_says_so(net: Net) -> None:
    a, b, c = await three(net)
    await a.stop()
    await until(lambda: all_see([b, c]))
    with pytest.raises(PeerUnreachable, match="authority") as caught:
        await b.mesh.trust.remove_node(c.me.node)
    assert "founder" in caught.value.hint
    assert b.mesh.trust.denial_of(c.me.node) is None


async def test_an_authority_does_not_remove_itself(net: Net) -> None:
    a = await net.found()
    b = await net.join(a, "b")
    await until(lambda: all_see([a, b]))
    with pytest.raises(UsageError, match="itself"):
        await b.mesh.trust.remove_node(a.me.node)


async def test_a_forged_denial_ends_the_link_that_brought_it_and_removes_nobody(net: Net) -> None:
    a, b, c = await three(net)
    forged = dataclasses.replace(await _denial(a, c), subject=str(a.me.node))
    session = b.mesh._linker.session(c.me.node)
    assert session is not None
    session.post(control.Denials((forged,)))
    await until(lambda: b.mesh._linker.session(c.me.node) is not session)
    assert c.mesh.trust.denial_of(a.me.node) is None
    await until(lambda: all_see([a, b, c]))


async def _denial(a: Node, about: Node) -> Any:
    from tightwad_agent.mesh import deny
    from tightwad_agent.wire.trust import Denied

    me = a.mesh.identity
    assert me.ca_key is not None
    return deny.signed(me.ca_key, Denied.NODE, str(about.me.node), since=time.time(), until=time.time() + 999)


# Tokens


async def test_a_revoked_token_admits_nobody_and_may_take_its_nodes_along(net: Net) -> None:
    a = await net.found()
    made = new_token(a, uses=5)
    b = await net.start(await enter(net, a, made, "b"))
    c = await net.join(a, "c")
    await until(lambda: all_see([a, b, c]))
    token_id = made.claims.token_id.hex()
    done = await c.mesh.trust.revoke(token_id[:6], nodes=False)
    assert done == {"token": token_id, "nodes": []}
    with pytest.raises(TokenError, match="revoked"):
        await enter(net, a, made, "late")
    assert all_see([a, b, c]), "whom it admitted stays"
    done = await a.mesh.trust.revoke(token_id, nodes=True)
    assert done["nodes"] == [str(b.me.node)]
    await until(lambda: all_see([a, c]) and b.mesh.n_links == 0, WITHIN_S)


@pytest.mark.parametrize("text", ["", "ab", "ffffffffffffffff"])
async def test_a_token_that_is_not_meant_clearly_is_not_revoked(net: Net, text: str) -> None:
    a = await net.found()
    b = await net.join(a, "b")
    await until(lambda: all_see([a, b]))
    for node in (a, b):
        with pytest.raises(UsageError, match="begins with"):
            await node.mesh.trust.revoke(text, nodes=False)


# Roles


async def test_a_client_looks_on_and_forwards_and_does_nothing_else(net: Net) -> None:
    a = await net.found()
    b = await net.join(a, "b")
    client = await enter_as(net, a, "client", Role.CLIENT)
    everybody = [a, b, client]
    await until(lambda: all_see(everybody) and agree(everybody))
    for node in everybody:
        node.mesh.streams |= {"http": echo, "rpc": echo, "swarm": echo}
    stream = await client.mesh.open_stream(a.me.node, "http", {})
    await stream.send_all(b"x")
    assert await stream.receive_some(1) == b"x"
    await stream.aclose()
    for service in ("rpc", "swarm"):
        with pytest.raises(PeerRefused, match="client"):
            await client.mesh.open_stream(a.me.node, service, {})
    for method in ("trust.deny", "trust.revoke", "trust.promoted", "worker.start"):
        with pytest.raises(PeerRefused, match="client"):
            await client.mesh.call(a.me.node, method, {"node": str(b.me.node)})
    with pytest.raises(UsageError, match="client"):
        await a.mesh.trust.promote(client.me.node)
    await client.mesh._leaf.renew()


async def test_a_client_cannot_take_the_office_or_change_what_is_served(net: Net) -> None:
    a = await net.found()
    b = await net.join(a, "b")
    client = await enter_as(net, a, "client", Role.CLIENT)
    everybody = [a, b, client]
    await until(lambda: all_see(everybody) and agree(everybody))
    epoch, boss = a.mesh.epoch, a.mesh.coordinator
    client.mesh.edit_row(
        lambda row: dataclasses.replace(row, role=Role.AUTHORITY, eligible=True, klass=99, note="hello")
    )
    mine = Epoch(epoch.counter + 5, str(client.me.node))
    for session in client.mesh._linker.sessions():
        session.post(control.Coordinates(Stamp(mine, client.me.node)))
        session.post(control.HandOver(mine))
        session.post(control.Record(ServeRecord(want=Want.NONE, version=(epoch.counter, 99, "x"))))

    def seen(node: Node) -> Any:
        return node.mesh.row_of(client.me.node)

    await until(lambda: all(seen(n) and seen(n).note == "hello" for n in (a, b)))
    for node in (a, b):
        assert (seen(node).role, seen(node).eligible, seen(node).klass) == (Role.CLIENT, False, 0)
        assert (node.mesh.epoch, node.mesh.coordinator) == (epoch, boss)
        assert node.mesh.record.want is not Want.NONE


# Authorities


async def test_the_founder_is_lost_for_good_and_the_promoted_one_goes_on(net: Net) -> None:
    a, b, c = await three(net)
    with pytest.raises(UsageError, match="no authority"):
        await b.mesh.trust.promote(c.me.node)
    await a.mesh.trust.promote(b.me.node)
    assert b.mesh.identity.can_issue
    await until(lambda: all((r := n.mesh.row_of(b.me.node)) and r.role is Role.AUTHORITY for n in (a, b, c)))
    assert stat.S_IMODE((b.me.state_dir / identity.CA_KEY).stat().st_mode) == 0o600
    await a.stop()
    await until(lambda: all_see([b, c]))
    d = await net.start(await enter(net, b, new_token(b), "d"))
    await until(lambda: all_see([b, c, d]))
    await c.mesh._leaf.renew()
    await d.mesh.trust.remove_node(c.me.node)
    await until(lambda: all_see([b, d]), WITHIN_S)
    again = await net.restart(b)
    assert again.mesh.identity.can_issue


async def test_a_promotion_is_believed_for_the_key_and_not_for_who_sends_it(net: Net) -> None:
    a, b, c = await three(net)
    leaf = identity.elevate(a.me, c.me.node, c.me.leaf_der, time.time())
    bad = [
        {"leaf": leaf},
        {"leaf": leaf, "ca_key": bytes(32)},
        {"leaf": leaf, "ca_key": b"short"},
        {"leaf": c.me.leaf_der, "ca_key": certs.raw_private(certs.new_key())},
        {"leaf": b.me.leaf_der, "ca_key": certs.raw_private(certs.new_key())},
    ]
    for params in bad:
        with pytest.raises(RemoteError):
            await b.mesh.call(c.me.node, "trust.promoted", params)
        assert not c.mesh.identity.can_issue
    assert c.mesh.identity.role is Role.NODE


# The cluster's key


async def test_the_key_is_changed_and_everybody_follows(net: Net) -> None:
    a, b, c = await three(net)
    await a.mesh.trust.promote(b.me.node)
    old = new_token(a, uses=2)
    before = a.mesh.identity
    since, until_s = await a.mesh.trust.rotate(86400)
    assert until_s - since == 86400
    nodes = [a, b, c]
    await until(lambda: all(certs.is_issued_by(n.mesh.identity.leaf, a.mesh.identity.ca) for n in nodes))
    assert certs.der(before.ca) != certs.der(a.mesh.identity.ca)
    assert all(n.mesh.identity.cluster == before.cluster for n in nodes)
    assert b.mesh.identity.can_issue, "the other authority was given the new key"
    assert all_see(nodes)
    assert agree(nodes)
    d = await net.start(await enter(net, a, new_token(a), "d"))
    e = await net.start(await enter(net, a, old, "e"))  # made before; the old key still counts
    await until(lambda: all_see([*nodes, d, e]))
    again = await net.restart(c)
    for node in (a, b, d, e):
        again.mesh._contacts.sighted(node.me.node, [Address("127.0.0.1", node.mesh.port)], trio.current_time())
    await until(lambda: all_see([a, b, again, d, e]))


async def test_a_node_that_was_away_follows_within_the_overlap(net: Net) -> None:
    a, b, c = await three(net)
    await c.stop()
    await until(lambda: all_see([a, b]))
    await a.mesh.trust.remove_node(b.me.node)
    await a.mesh.trust.rotate(86400)
    await until(lambda: all_see([a]))
    back = await net.restart(c)
    back.mesh._contacts.sighted(a.me.node, [Address("127.0.0.1", a.mesh.port)], trio.current_time())
    await until(lambda: all_see([a, back]))
    await until(lambda: certs.is_issued_by(back.mesh.identity.leaf, a.mesh.identity.ca))
    newest = certs.raw_public(certs.public_of(a.mesh.identity.ca))
    await until(lambda: (d := back.mesh.trust.denial_of(b.me.node)) and d.ca == newest)
    loaded = identity.load(back.me.state_dir)
    assert loaded is not None
    assert len(loaded.lineage) == 1


async def test_after_the_overlap_the_old_key_opens_nothing_and_the_message_says_why(net: Net) -> None:
    a, b, c = await three(net)
    await c.stop()
    await until(lambda: all_see([a, b]))
    old = new_token(a)
    await a.mesh.trust.rotate(3)
    await until(lambda: certs.is_issued_by(b.mesh.identity.leaf, a.mesh.identity.ca))
    await until(lambda: all(told(n, "old key does not count") for n in (a, b)))
    assert all_see([a, b])
    back = await net.restart(c)
    back.mesh._contacts.sighted(a.me.node, [Address("127.0.0.1", a.mesh.port)], trio.current_time())
    await until(lambda: "key changed" in back.mesh.problem)
    assert back.mesh.n_links == 0
    with pytest.raises(TokenError, match="given up"):
        await enter(net, a, old, "late")


async def test_a_history_of_another_key_is_not_believed(net: Net) -> None:
    a, b, c = await three(net)
    foreign = identity.create_cluster(net._root / "foreign", NodeName("f"), time.time())
    changed = identity.rotate(foreign, time.time(), 999)
    session = b.mesh._linker.session(c.me.node)
    assert session is not None
    session.post(control.KeyHistory(changed.lineage))
    await until(lambda: b.mesh._linker.session(c.me.node) is not session)
    assert c.mesh.identity.lineage == ()
    with pytest.raises(NotTrusted):
        identity.adopt(a.me, changed.lineage)


async def test_whatever_the_moment_of_a_crash_the_change_was_made_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(1, 7):
        me = identity.create_cluster(tmp_path / str(n), NodeName("a"), time.time())
        real, count = identity.write_private, 0

        def write(path: Path, data: bytes, crash_at: int = n) -> None:
            nonlocal count
            count += 1
            if count == crash_at:
                raise KeyboardInterrupt
            real(path, data)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(identity, "write_private", write)
            try:
                identity.rotate(me, time.time(), 999)
            except KeyboardInterrupt:
                pass
            else:
                assert n == 5, "four files are written"
                break
        loaded = identity.load(me.state_dir)
        assert loaded is not None
        assert loaded.can_issue, n
        assert len(loaded.lineage) in (0, 1)
        Ledger(me.state_dir)
        assert not (me.state_dir / identity.CA_KEY_NEXT).exists()


async def test_nothing_secret_is_announced_or_shown(net: Net) -> None:
    a, b, _ = await three(net)
    made = new_token(a)
    texts = [str(to_txt(a.mesh._advert())), repr(a.mesh.row), repr(a.mesh.peers()), repr(a.mesh.trust.summary())]
    texts += [repr(a.me), repr(made), *a.events, *b.events]
    assert a.me.ca_key is not None
    raw = [made.seed, certs.raw_private(a.me.ca_key), certs.raw_private(a.me.key)]
    secrets = [made.text, a.me.state.api_key, *(data.hex() for data in raw), *(repr(data)[2:-1] for data in raw)]
    assert not [s[:4] for s in secrets if any(s in text for text in texts)]
