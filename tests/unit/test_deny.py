"""The deny list: what is believed, that merging is a union, and that entries outlive what they stop."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent.errors import ProtocolError, UsageError
from tightwad_agent.mesh import deny
from tightwad_agent.mesh.deny import DenyList, is_signed, signed
from tightwad_agent.testing import node_id
from tightwad_agent.wire.codec import from_plain, pack, to_plain, unpack
from tightwad_agent.wire.trust import Denial, Denied

CA = Ed25519PrivateKey.from_private_bytes(bytes(32))
OTHER = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
NODE = node_id("mallory")
TOKEN = b"12345678"


def entry(
    subject: str = str(NODE),
    kind: Denied = Denied.NODE,
    since: int = 100,
    until: int = 1000,
    key: Ed25519PrivateKey = CA,
) -> Denial:
    return signed(key, kind, subject, since=since, until=until, note="asked for on a")


TRUSTED = (entry().ca,)


def test_an_entry_is_believed_for_its_signature_alone() -> None:
    good = entry()
    assert is_signed(good)
    for change in (
        {"subject": str(node_id("bob"))},
        {"kind": Denied.TOKEN},
        {"since": 101},
        {"until": 2000},
        {"note": "asked for on b"},
        {"ca": entry(key=OTHER).ca},
        {"signature": bytes(64)},
        {"signature": b""},
    ):
        forged = replace(good, **change)  # type: ignore[arg-type]
        assert not is_signed(forged), change


def test_a_denied_node_and_a_denied_token_are_found() -> None:
    held = DenyList()
    token = entry(TOKEN.hex(), Denied.TOKEN)
    assert held.merge([entry(), token], TRUSTED, 100) == (entry(), token)
    assert held.node(NODE) == entry()
    assert held.token(TOKEN) == token
    assert held.node(node_id("bob")) is None
    assert held.token(b"87654321") is None
    assert len(held) == 2


def test_nothing_is_new_twice_and_a_repeated_entry_counts_once() -> None:
    held = DenyList()
    assert len(held.merge([entry(), entry()], TRUSTED, 100)) == 1
    assert held.merge([entry()], TRUSTED, 100) == ()


def test_of_two_entries_about_one_node_the_greater_stays() -> None:
    held, longer = DenyList(), entry(until=2000)
    held.merge([longer], TRUSTED, 100)
    assert held.merge([entry()], TRUSTED, 100) == ()
    assert held.node(NODE) == longer


def test_a_forged_entry_spoils_its_list() -> None:
    held = DenyList()
    forged = replace(entry(str(node_id("bob"))), since=1)
    with pytest.raises(ProtocolError):
        held.merge([entry(), forged], TRUSTED, 100)
    assert len(held) == 0


def test_an_entry_that_names_no_node_is_refused_though_it_is_signed() -> None:
    with pytest.raises(ProtocolError):
        DenyList().merge([entry("mallory")], TRUSTED, 100)


def test_entries_of_a_key_that_does_not_count_are_left_out() -> None:
    held = DenyList()
    assert held.merge([entry(key=OTHER)], TRUSTED, 100) == ()
    assert held.node(NODE) is None


def test_an_entry_is_dropped_at_its_end_and_not_before() -> None:
    held = DenyList()
    held.merge([entry(until=1000)], TRUSTED, 100)
    assert not held.expire(999)
    assert held.node(NODE)
    assert held.expire(1000)
    assert held.node(NODE) is None
    assert held.merge([entry(until=1000)], TRUSTED, 1000) == ()


def test_the_list_is_bounded_and_the_longest_lasting_stay() -> None:
    held = DenyList(lambda _d: True)
    many = [replace(entry(), subject=str(node_id(f"n{i}")), until=1000 + i) for i in range(deny.MAX_KEPT + 5)]
    taken = held.merge(many, TRUSTED, 100)
    assert len(held) == len(taken) == deny.MAX_KEPT
    assert held.node(node_id("n4")) is None
    assert held.node(node_id("n5")) is not None


def test_an_authority_is_told_that_the_list_is_full() -> None:
    held = DenyList(lambda _d: True)
    held.check_room()
    held.merge([replace(entry(), subject=str(node_id(f"n{i}"))) for i in range(deny.MAX_DENIALS)], TRUSTED, 100)
    with pytest.raises(UsageError) as caught:
        held.check_room()
    assert str(deny.MAX_DENIALS) in caught.value.message


@settings(deadline=None)
@given(st.lists(st.integers(0, 11), max_size=20), st.lists(st.integers(0, 11), max_size=20), st.randoms())
def test_merging_is_a_union_in_any_order(one: list[int], two: list[int], dice: object) -> None:
    pool = [replace(entry(), subject=str(node_id(f"n{i % 4}")), until=1000 + i) for i in range(12)]
    lists = []
    for order in ([*one, *two], [*two, *one], [*two, *one, *one]):
        held = DenyList(lambda _d: True)
        for i in order:
            held.merge([pool[i]], TRUSTED, 100)
        lists.append(held)
    whole = DenyList(lambda _d: True)
    mixed = [pool[i] for i in (*one, *two)]
    dice.shuffle(mixed)  # type: ignore[attr-defined]
    whole.merge(mixed, TRUSTED, 100)
    assert len({held.entries for held in (*lists, whole)}) == 1
    assert len({held.digest for held in (*lists, whole)}) == 1


def test_lists_that_differ_have_other_digests() -> None:
    held, empty = DenyList(), DenyList()
    held.merge([entry()], TRUSTED, 100)
    assert held.digest != empty.digest


def test_it_crosses_the_wire_and_fits_into_messages() -> None:
    assert from_plain(Denial, unpack(pack(to_plain(entry())))) == entry()
    assert deny.parts([entry()] * 5, 2) == [(entry(), entry()), (entry(), entry()), (entry(),)]


def test_a_long_note_is_cut() -> None:
    made = signed(CA, Denied.NODE, str(NODE), since=1, until=2, note="x" * 999)
    assert len(made.note) == 200
    assert is_signed(made)
