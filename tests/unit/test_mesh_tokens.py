"""Join tokens and the ledger: every refusal, every bit, every place where a crash may cut."""

from __future__ import annotations

import base64
import json
import os
import random
import stat
import threading
import zlib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent.errors import EnvironmentFault, StateDamaged, TokenError, UsageError
from tightwad_agent.ids import Address, NodeId
from tightwad_agent.mesh import ledger as ledger_module
from tightwad_agent.mesh import tokens
from tightwad_agent.mesh.ledger import Ledger
from tightwad_agent.mesh.tokens import Entry, Token, Verdict, decide, issue, parse
from tightwad_agent.testing import node_id
from tightwad_agent.wire.codec import pack
from tightwad_agent.wire.rows import Role

VECTORS = Path(__file__).parent.parent / "vectors"
CA = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_CA = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
SEED = bytes(range(32, 64))
ID = bytes(range(64, 72))
NOW = 1_800_000_000
ADDRESSES = (Address("192.168.1.20", 8089), Address("fd00::20", 8089))


def made(**changes: object) -> Token:
    given = {"now": NOW, "ttl_s": 3600, "uses": 1, "role": Role.NODE, "addresses": ADDRESSES} | changes
    return issue(CA, SEED, ID, **given)  # type: ignore[arg-type]


def encoded(body: bytes, checksum: bytes | None = None) -> str:
    body += zlib.crc32(body).to_bytes(4, "big") if checksum is None else checksum
    return "tw1" + base64.urlsafe_b64encode(body).decode().rstrip("=")


def body_of(token: Token) -> bytes:
    text = token.text[3:]
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))[:-4]


# The text


def test_token_says_what_was_issued() -> None:
    token = parse(made(uses=3, role=Role.AUTHORITY).text)
    assert token == made(uses=3, role=Role.AUTHORITY)
    assert token.claims.addresses == ADDRESSES
    assert (token.claims.role, token.claims.uses, token.claims.expires) == (Role.AUTHORITY, 3, NOW + 3600)
    assert token.public_key != token.seed


def test_token_bytes_are_those_of_version_1() -> None:
    vector = json.loads((VECTORS / "mesh_token.json").read_text())
    assert made().text == vector["text"]
    assert parse(vector["text"]) == made()
    assert made().cluster == vector["cluster"]


def test_token_without_addresses_is_short_enough_to_paste() -> None:
    assert len(made(addresses=()).text) < 220


def test_token_may_be_wrapped_by_a_terminal() -> None:
    text = made().text
    assert parse(f"  {text[:70]}\n  {text[70:140]}\r\n{text[140:]}\n") == made()


def test_token_keeps_its_secret_out_of_repr() -> None:
    shown = repr(made())
    assert repr(SEED)[2:-1] not in shown
    assert SEED.hex() not in shown
    assert made().text not in shown


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no join token"),
        ("hello", "no join token"),
        ("tw2abc", "another version"),
        ("tw1", "cut off"),
        ("tw1AAAA", "cut off"),
        ("tw1!!!!", "character"),
        ("tw1" + "é" * 200, "character"),
        ("tw1" + "A" * 5000, "characters long"),
        ("tw1" + "A" * 300, "checksum"),
        (made().text + "AAAA", "checksum"),
        (encoded(bytes(128) + b"\xc1" * 40, b"none"), "checksum"),
    ],
)
def test_text_that_is_no_token_is_told_apart(text: str, says: str) -> None:
    with pytest.raises(TokenError, match=says):
        parse(text)


def test_every_truncation_is_called_cut_off() -> None:
    text = made().text
    for n in range(3, len(text)):
        with pytest.raises(TokenError, match="cut off"):
            parse(text[:n])


@pytest.mark.parametrize("host", ["10.0.0.1", "10.0.0.12", "10.0.0.123"])
def test_every_single_changed_bit_is_refused(host: str) -> None:
    """Three lengths: in two of them the last character has bits that no byte needs."""
    text = made(addresses=[Address(host, 8089)]).text.encode()
    for i in range(len(text) * 8):
        changed = bytearray(text)
        changed[i // 8] ^= 1 << i % 8
        with pytest.raises(TokenError):
            parse(changed.decode("latin-1"))


def test_every_single_changed_bit_with_a_repaired_checksum_is_refused() -> None:
    body = body_of(made())
    for i in range(len(body) * 8):
        changed = bytearray(body)
        changed[i // 8] ^= 1 << i % 8
        with pytest.raises(TokenError, match="forged"):
            parse(encoded(bytes(changed)))


def test_random_mutants_are_refused() -> None:
    """20,000 mutants; half of them with a repaired checksum, so that the signature has to find them."""
    dice = random.Random(20_000)
    body, text = body_of(made()), made().text
    for i in range(20_000):
        changed = bytearray(body if i % 2 else text.encode())
        for _ in range(dice.randint(1, 4)):
            match dice.randrange(3):
                case 0:
                    changed[dice.randrange(len(changed))] = dice.randrange(256)
                case 1:
                    del changed[dice.randrange(len(changed))]
                case _:
                    changed.insert(dice.randrange(len(changed) + 1), dice.randrange(256))
        mutant = encoded(bytes(changed)) if i % 2 else changed.decode("latin-1")
        if "".join(mutant.split()) == text:
            continue
        with pytest.raises(TokenError):
            parse(mutant)


@given(st.text(max_size=400))
def test_any_text_is_a_token_or_a_token_error(text: str) -> None:
    for candidate in (text, "tw1" + text):
        with pytest.raises(TokenError):
            parse(candidate)


@given(st.binary(max_size=600))
def test_any_bytes_with_a_right_checksum_are_refused(body: bytes) -> None:
    with pytest.raises(TokenError):
        parse(encoded(body))


@settings(max_examples=50)
@given(
    st.integers(1, tokens.MAX_TTL_S),
    st.integers(1, tokens.MAX_USES),
    st.sampled_from(Role),
    st.lists(st.builds(Address, st.ip_addresses().map(str), st.integers(1, 65535)), max_size=16),
)
def test_what_is_issued_is_parsed(ttl_s: int, uses: int, role: Role, addresses: list[Address]) -> None:
    token = issue(CA, SEED, ID, now=NOW, ttl_s=ttl_s, uses=uses, role=role, addresses=addresses)
    assert parse(token.text) == token


def signed(claims: object, ca: Ed25519PrivateKey = CA) -> str:
    """A token whose signature is right over any claims at all."""
    data = pack(claims)
    ca_public = ca.public_key().public_bytes_raw()
    public = Ed25519PrivateKey.from_private_bytes(SEED).public_key().public_bytes_raw()
    signature = ca.sign(b"cluster-join-token-v1\0" + ca_public + public + data)
    return encoded(ca_public + SEED + signature + data)


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ([2, ID, NOW, 60, 1, "node"], "version 2"),
        ([1, ID[:7], NOW, 60, 1, "node"], "out of range"),
        ([1, ID, -1, 60, 1, "node"], "out of range"),
        ([1, ID, NOW, 0, 1, "node"], "lives"),
        ([1, ID, NOW, 2**40, 1, "node"], "lives"),
        ([1, ID, NOW, 60, 0, "node"], "uses"),
        ([1, ID, NOW, 60, 10**6, "node"], "uses"),
        ([1, ID, NOW, 60, 1, "root"], "cannot be read"),
        ([1, ID, NOW, 60, 1], "cannot be read"),
        (["x" * 200], "cannot be read"),
        ([1, ID, NOW, 60, 1, "node", [["host name", 80]]], "not an address"),
        ([1, ID, NOW, 60, 1, "node", [["h", 70000]]], "not an address"),
        ([1, ID, NOW, 60, 1, "node", [["h", 1]] * 17], "cannot be read"),
        ([1, ID, NOW, 60, 1, "node", [], "a name"], "names no cluster"),
    ],
)
def test_claims_are_checked_even_if_signed(claims: object, says: str) -> None:
    with pytest.raises(TokenError, match=says):
        parse(signed(claims))


@pytest.mark.parametrize(("ttl_s", "uses"), [(0, 1), (-5, 1), (tokens.MAX_TTL_S + 1, 1), (60, 0), (60, 1001)])
def test_issue_refuses_what_parse_would(ttl_s: int, uses: int) -> None:
    with pytest.raises(TokenError):
        made(ttl_s=ttl_s, uses=uses)


def test_issue_refuses_an_address_that_is_none() -> None:
    with pytest.raises(TokenError, match="not an address"):
        made(addresses=[Address("no host", 1)])


def test_another_cluster_cannot_take_over_a_token() -> None:
    ours, theirs = body_of(made()), OTHER_CA.public_key().public_bytes_raw()
    with pytest.raises(TokenError, match="forged"):
        parse(encoded(theirs + ours[32:]))


def test_expiry_is_the_first_second_that_is_too_late() -> None:
    token = made(ttl_s=60)
    token.check(NOW + 59)
    with pytest.raises(TokenError, match="expired"):
        token.check(NOW + 60)


def test_proof_holds_for_one_nonce_leaf_and_key() -> None:
    token = made()
    facts = {"nonce": b"n" * 32, "leaf_digest": b"l" * 32, "spki": b"s" * 44}
    proof = token.sign_join(**facts)

    def holds(**changes: bytes) -> bool:
        text = tokens.join_text(**facts | {"claims": token.claims_bytes} | changes)
        return tokens.verifies(token.public_key, proof, text)

    assert holds()
    assert not holds(nonce=b"N" * 32)
    assert not holds(leaf_digest=b"L" * 32)
    assert not holds(spki=b"S" * 44)
    assert not holds(claims=token.claims_bytes[:-1])


@given(st.binary(max_size=70), st.binary(max_size=70))
def test_verifies_is_false_for_nonsense(key: bytes, signature: bytes) -> None:
    assert not tokens.verifies(key, signature, b"text")


# Decisions


def entry(*nodes: str, uses: int = 2) -> Entry:
    return Entry(ID, b"p" * 32, NOW, 3600, uses, Role.NODE, tuple(node_id(n) for n in nodes))


@pytest.mark.parametrize(
    ("known", "node", "at", "verdict"),
    [
        (None, "a", NOW, Verdict.UNKNOWN),
        (entry(), "a", NOW, Verdict.ADMIT),
        (entry("a"), "b", NOW, Verdict.ADMIT),
        (entry("a"), "a", NOW, Verdict.AGAIN),
        (entry("a", "b"), "b", NOW, Verdict.AGAIN),
        (entry("a", "b"), "c", NOW, Verdict.USED_UP),
        (entry(), "a", NOW + 3600, Verdict.EXPIRED),
        (entry("a"), "a", NOW + 3600, Verdict.EXPIRED),
    ],
)
def test_decisions(known: Entry | None, node: str, at: int, verdict: Verdict) -> None:
    assert decide(known, node_id(node), at) is verdict
    assert verdict.is_yes == (verdict in (Verdict.ADMIT, Verdict.AGAIN))
    assert bool(verdict.reason) != verdict.is_yes


# The ledger


def token_of(number: int, *, uses: int = 1, now: int = NOW, ttl_s: int = 3600) -> Token:
    return issue(CA, number.to_bytes(32, "big"), number.to_bytes(8, "big"), now=now, ttl_s=ttl_s, uses=uses)


def test_ledger_counts_and_repeats(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    token = token_of(1, uses=2)
    assert book.admit(token.claims.token_id, node_id("a"), NOW) is Verdict.UNKNOWN
    book.add(token, NOW)
    said = [book.admit(token.claims.token_id, node_id(n), NOW) for n in "aabcb"]
    assert said == [Verdict.ADMIT, Verdict.AGAIN, Verdict.ADMIT, Verdict.USED_UP, Verdict.AGAIN]
    (left,) = Ledger(tmp_path).entries()
    assert left.nodes == (node_id("a"), node_id("b"))
    assert left.uses_left == 0
    assert Ledger(tmp_path).admit(token.claims.token_id, node_id("c"), NOW) is Verdict.USED_UP
    assert book.find(token.claims.token_id) == left
    assert book.find(b"x" * 8) is None


def test_ledger_file_is_private_and_holds_no_secret(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    book.add(made(), NOW)
    path = tmp_path / ledger_module.FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    data = path.read_bytes()
    assert SEED not in data
    assert SEED.hex().encode() not in data
    assert base64.urlsafe_b64encode(SEED)[:40] not in data


def test_ledger_survives_a_kill_at_every_byte(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    path = tmp_path / ledger_module.FILE
    states: dict[int, list[Entry]] = {0: []}
    for number in (1, 2):
        book.add(token_of(number, uses=2), NOW)
        states[path.stat().st_size] = book.entries()
        for name in "ab":
            book.admit(number.to_bytes(8, "big"), node_id(name), NOW)
            states[path.stat().st_size] = book.entries()
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        expected = states[max(size for size in states if size <= cut)]
        again = Ledger(tmp_path)
        assert again.entries() == expected
        if not expected:
            again.add(token_of(1, uses=2), NOW)
        again.admit((1).to_bytes(8, "big"), node_id("after"), NOW)  # writing goes on behind what is whole
        assert Ledger(tmp_path).entries() == again.entries()


def test_ledger_takes_a_sector_that_never_reached_the_disk_for_a_torn_line(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    book.add(token_of(1), NOW)
    path = tmp_path / ledger_module.FILE
    before = path.read_bytes()
    path.write_bytes(before + bytes(40) + b'":1}\n')
    again = Ledger(tmp_path)
    assert [e.token_id for e in again.entries()] == [(1).to_bytes(8, "big")]
    again.add(token_of(2), NOW)
    assert path.read_bytes().startswith(before)
    assert b"\0" not in path.read_bytes()


def test_ledger_leaves_nothing_of_a_torn_line_behind_a_shorter_one(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    book.add(token_of(1), NOW)
    with (tmp_path / ledger_module.FILE).open("ab") as file:
        file.write(b"x" * 1000)
    again = Ledger(tmp_path)
    again.add(token_of(2), NOW)
    again.admit((2).to_bytes(8, "big"), node_id("a"), NOW)
    assert Ledger(tmp_path).entries() == again.entries()
    assert b"x" * 10 not in (tmp_path / ledger_module.FILE).read_bytes()


def test_ledger_refuses_damage_elsewhere_and_says_where(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    for number in (1, 2, 3):
        book.add(token_of(number), NOW)
    path = tmp_path / ledger_module.FILE
    lines = path.read_bytes().split(b"\n")
    for bad in (lines[1][:-3], b"", b"no line of ours", lines[1].replace(b"3600", b"9999"), b"00000000 {}"):
        path.write_bytes(b"\n".join([lines[0], bad, *lines[2:]]))
        with pytest.raises(StateDamaged, match="line 2"):
            Ledger(tmp_path)


def test_ledger_lets_one_of_many_threads_have_the_last_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: Any) -> Verdict:
        verdict = decide(*args)
        threading.Event().wait(0.01)  # widens the gap between deciding and writing
        return verdict

    monkeypatch.setattr(ledger_module, "decide", slow)
    book = Ledger(tmp_path)
    book.add(token_of(1), NOW)
    said: list[Verdict] = []
    gate = threading.Barrier(8)

    def ask(number: int) -> None:
        gate.wait()
        said.append(book.admit((1).to_bytes(8, "big"), node_id(f"n{number}"), NOW))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said) == sorted([Verdict.ADMIT] + [Verdict.USED_UP] * 7)


def test_ledger_sees_what_another_process_wrote(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    first.add(token_of(1), NOW)
    assert second.admit((1).to_bytes(8, "big"), node_id("a"), NOW) is Verdict.ADMIT
    assert first.admit((1).to_bytes(8, "big"), node_id("b"), NOW) is Verdict.USED_UP


def test_ledger_admits_nobody_when_the_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Ledger(tmp_path)
    book.add(token_of(1), NOW)
    real = os.fsync

    def broken(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(EnvironmentFault, match="Input/output"):
        book.admit((1).to_bytes(8, "big"), node_id("a"), NOW)
    monkeypatch.setattr(os, "fsync", real)
    # the line may or may not be on the disk: the same node may come again, nobody else can take a second place
    assert book.admit((1).to_bytes(8, "big"), node_id("a"), NOW).is_yes
    assert book.admit((1).to_bytes(8, "big"), node_id("b"), NOW) is Verdict.USED_UP


def test_admission_is_synced_before_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Ledger(tmp_path)
    book.add(token_of(1), NOW)
    synced: list[bytes] = []
    real = os.fsync

    def spy(fd: int) -> None:
        real(fd)
        synced.append((tmp_path / ledger_module.FILE).read_bytes())

    monkeypatch.setattr(os, "fsync", spy)
    assert book.admit((1).to_bytes(8, "big"), node_id("a"), NOW) is Verdict.ADMIT
    assert node_id("a").encode() in synced[-1]


def test_ledger_forgets_old_tokens_only_when_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_TOKENS", 3)
    book = Ledger(tmp_path)
    old = NOW - 60 * 86_400
    for number in (1, 2):
        book.add(token_of(number, now=old), old)
    book.add(token_of(3, uses=2), NOW)
    book.admit((3).to_bytes(8, "big"), node_id("a"), NOW)
    book.add(token_of(4), NOW)
    assert [(e.token_id[-1], len(e.nodes)) for e in Ledger(tmp_path).entries()] == [(3, 1), (4, 0)]
    book.add(token_of(5), NOW)
    with pytest.raises(UsageError, match="3 join tokens"):
        book.add(token_of(6), NOW)


def test_ledger_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    (tmp_path / ledger_module.FILE).mkdir()
    with pytest.raises(StateDamaged, match="cannot be read"):
        Ledger(tmp_path)


def test_node_ids_in_the_ledger_are_checked(tmp_path: Path) -> None:
    book = Ledger(tmp_path)
    book.add(token_of(1), NOW)
    text = json.dumps({"admit": [(1).to_bytes(8, "big").hex(), "nobody"]}).encode()
    with (tmp_path / ledger_module.FILE).open("ab") as file:
        file.write(f"{zlib.crc32(text):08x} ".encode() + text + b"\n")
    with pytest.raises(StateDamaged, match="line 2"):
        Ledger(tmp_path)
    assert NodeId.is_valid(node_id("a"))
