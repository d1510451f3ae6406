"""Changes of the CA's key: what both keys must have signed, what goes on where, and what TLS makes of the chain."""

from __future__ import annotations

import ssl
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tightwad_agent.errors import NotTrusted
from tightwad_agent.ids import ClusterId
from tightwad_agent.mesh import certs, lineage
from tightwad_agent.wire.codec import from_plain, pack, to_plain, unpack
from tightwad_agent.wire.rows import Role
from tightwad_agent.wire.trust import Lineage, Succession

NOW = 1_800_000_000.0
DAY_S = 86_400


def key(n: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)


FIRST = certs.make_ca(key(0), NOW)
ONE = lineage.succeed(FIRST, key(0), key(1), now=NOW + 1, until=NOW + DAY_S)
SECOND = certs.parse_der(ONE.new)
TWO = lineage.succeed(SECOND, key(1), key(2), now=NOW + 2, until=NOW + 2 * DAY_S)
BOTH = (ONE, TWO)
FOREIGN = lineage.succeed(certs.make_ca(key(8), NOW), key(8), key(9), now=NOW, until=NOW + DAY_S)


def raw(cert: Any) -> bytes:
    return certs.raw_public(certs.public_of(cert))


def test_a_line_of_keys_holds_and_keeps_the_clusters_name() -> None:
    lineage.check(())
    lineage.check(BOTH)
    assert lineage.cluster_of(BOTH, FIRST) == lineage.cluster_of((), FIRST) == ClusterId.of_ca_key(raw(FIRST))
    assert raw(lineage.newest(BOTH, FIRST)) == certs.raw_public(key(2).public_key())
    assert lineage.newest((), FIRST) is FIRST


@pytest.mark.parametrize(
    "change",
    [
        {"until": ONE.until + 1},
        {"since": 0},
        {"new": FOREIGN.new},
        {"old": FOREIGN.old},
        {"cross": FOREIGN.cross},
        {"cross": TWO.cross},
        {"old_signature": bytes(64)},
        {"new_signature": bytes(64)},
        {"old_signature": ONE.new_signature},
        {"new": b"no certificate"},
    ],
    ids=str,
)
def test_a_step_that_either_key_did_not_sign_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(NotTrusted):
        lineage.check((replace(ONE, **change),))


def test_a_certificate_for_another_key_is_refused_though_both_keys_signed() -> None:
    bare = replace(ONE, cross=certs.der(certs.cross_sign(FIRST, key(0), certs.make_ca(key(5), NOW), NOW)))
    text = lineage._text(bare)
    both = replace(bare, old_signature=key(0).sign(text), new_signature=key(1).sign(text))
    with pytest.raises(NotTrusted, match="another key"):
        lineage.check((both,))


def test_a_gap_is_refused() -> None:
    with pytest.raises(NotTrusted, match="gap"):
        lineage.check((ONE, FOREIGN))
    with pytest.raises(NotTrusted, match="gap"):
        lineage.check((TWO, ONE))


def test_only_what_goes_on_where_the_known_ends_is_news() -> None:
    other = lineage.succeed(FIRST, key(0), key(7), now=NOW, until=NOW + 9)
    assert lineage.is_longer((), (ONE,))
    assert lineage.is_longer((ONE,), BOTH)
    assert not lineage.is_longer(BOTH, (ONE,))
    assert not lineage.is_longer((ONE,), (ONE,))
    assert not lineage.is_longer((other,), BOTH)


def test_old_keys_count_until_their_overlap_ends() -> None:
    def counting(days: float) -> list[bytes]:
        return [raw(ca) for ca in lineage.anchors(BOTH, FIRST, NOW + days * DAY_S)]

    newest, middle, oldest = (certs.raw_public(key(n).public_key()) for n in (2, 1, 0))
    assert counting(0) == [newest, middle, oldest]
    assert counting(1) == [newest, middle]
    assert counting(2) == [newest]
    assert [raw(ca) for ca in lineage.everyone(BOTH, FIRST)] == [newest, middle, oldest]


def test_the_issuer_of_a_leaf_is_found_by_its_key_though_the_names_are_equal() -> None:
    leaf = certs.issue_leaf(SECOND, key(1), key(50).public_key(), Role.NODE, NOW)
    everyone = lineage.everyone(BOTH, FIRST)
    found = lineage.issuer_of(leaf, everyone)
    assert found is not None
    assert raw(found) == raw(SECOND)
    assert FIRST.subject == SECOND.subject
    assert lineage.issuer_of(leaf, [FIRST]) is None


def test_it_comes_back_from_the_wire() -> None:
    assert from_plain(Lineage, unpack(pack(to_plain(BOTH)))) == BOTH  # type: ignore[arg-type]
    assert "signature" not in repr(ONE)
    assert isinstance(ONE, Succession)


# What OpenSSL makes of it


def context(
    folder: Path, anchors: list[Any], issuer: Any, issuer_key: Ed25519PrivateKey, chain: Any, *, server: bool
) -> Any:
    mine = certs.new_key()
    leaf = certs.issue_leaf(issuer, issuer_key, mine.public_key(), Role.NODE, time.time())
    folder.mkdir()
    shown = [leaf, *(certs.parse_der(der) for der in chain)]
    (folder / "crt").write_bytes(b"".join(certs.pem(cert) for cert in shown))
    (folder / "key").write_bytes(certs.private_pem(mine))
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    if not server:
        made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    for anchor in anchors:
        made.load_verify_locations(cadata=certs.der(anchor))
    made.load_cert_chain(folder / "crt", folder / "key")
    return made


def shake(server: Any, client: Any) -> None:
    ends = [ssl.MemoryBIO() for _ in range(4)]
    s = server.wrap_bio(ends[0], ends[1], server_side=True)
    c = client.wrap_bio(ends[2], ends[3])
    for _ in range(6):
        for end, out, into in ((c, ends[3], ends[0]), (s, ends[1], ends[2])):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            into.write(out.read())
    assert s.getpeercert(binary_form=True)
    assert c.getpeercert(binary_form=True)


def test_a_node_that_knows_the_first_key_only_meets_one_of_the_third(tmp_path: Path) -> None:
    """Both ways round, over two changes, although the first CA may not have other CAs below it."""
    now = time.time()
    first = certs.make_ca(key(0), now)
    one = lineage.succeed(first, key(0), key(1), now=now, until=now + 99)
    two = lineage.succeed(certs.parse_der(one.new), key(1), key(2), now=now, until=now + 99)
    third, steps = certs.parse_der(two.new), (one, two)
    chain = lineage.chain(steps)
    all_three = list(lineage.anchors(steps, first, now))
    new_server = context(tmp_path / "a", all_three, third, key(2), chain, server=True)
    old_client = context(tmp_path / "b", [first], first, key(0), (), server=False)
    shake(new_server, old_client)
    new_client = context(tmp_path / "c", all_three, third, key(2), chain, server=False)
    old_server = context(tmp_path / "d", [first], first, key(0), (), server=True)
    shake(old_server, new_client)
    after = context(tmp_path / "e", [third], third, key(2), chain, server=True)
    shake(after, new_client)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(after, old_client)
