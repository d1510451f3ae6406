"""Keys, certificates, `state.yaml`, and the messages of the link's opening."""

from __future__ import annotations

import dataclasses
import json
import os
import ssl
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from tightwad_agent.errors import NotTrusted, PeerRefused, ProtocolError, StateDamaged, UsageError
from tightwad_agent.ids import NO_EPOCH, Address, ClusterId, Epoch, ModelId, NodeId, NodeName
from tightwad_agent.mesh import certs, files, identity
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.ledger import Ledger
from tightwad_agent.mesh.state import MAX_PEERS, NodeState
from tightwad_agent.testing import node_id
from tightwad_agent.wire import handshake
from tightwad_agent.wire.codec import pack
from tightwad_agent.wire.handshake import JOIN, LINK, Hello, Line, RememberedPeer, agree
from tightwad_agent.wire.rows import Role, ServeRecord, Want
from tightwad_agent.wire.trust import Denial, Denied, Succession

VECTORS = Path(__file__).parent.parent / "vectors"
NOW = 1_800_000_000.0
NAME = NodeName("attic")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def founder(home: Path) -> Identity:
    return identity.create_cluster(home, NAME, NOW)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Making and loading


def test_founder_is_an_authority_that_loads_as_it_was_made(home: Path, founder: Identity) -> None:
    loaded = identity.load(home)
    assert loaded is not None
    assert (loaded.node, loaded.cluster, loaded.role) == (founder.node, founder.cluster, Role.AUTHORITY)
    assert loaded.can_issue
    assert loaded.state == founder.state
    assert loaded.leaf_der == founder.leaf_der
    assert loaded.state.cluster_name == NAME
    assert loaded.state.joined_at == NOW


def test_no_directory_is_no_identity(tmp_path: Path) -> None:
    assert identity.load(tmp_path / "nothing") is None
    assert identity.load(tmp_path) is None


def test_directory_and_files_are_private(home: Path, founder: Identity) -> None:
    Ledger(home).add(identity.issue_token(founder, Ledger(home), NOW), NOW)
    assert mode(home) == 0o700
    names = {p.name for p in home.iterdir()}
    assert names == {"state.yaml", "node.key", "node.crt", "ca.crt", "ca.key", "tokens.ledger"}
    assert {mode(p) for p in home.iterdir()} == {0o600}


def test_loose_modes_are_tightened_and_named(home: Path, founder: Identity, caplog: pytest.LogCaptureFixture) -> None:
    (home / "ca.key").chmod(0o644)
    assert identity.load(home) is not None
    assert mode(home / "ca.key") == 0o600
    assert "ca.key was readable by others" in caplog.text
    assert founder.state.api_key not in caplog.text


def test_a_second_cluster_in_one_place_is_refused(home: Path, founder: Identity) -> None:
    with pytest.raises(UsageError, match="already"):
        identity.create_cluster(home, NAME, NOW)
    again = identity.load(home)
    assert again is not None
    assert again.cluster == founder.cluster


def test_secrets_are_not_in_repr(founder: Identity) -> None:
    text = repr(founder) + repr(founder.state)
    assert founder.state.api_key not in text
    assert "PrivateKey" not in text


def test_api_keys_are_long_and_different() -> None:
    keys = {identity.new_api_key() for _ in range(50)}
    assert len(keys) == 50
    assert {len(k) for k in keys} == {47}
    assert all(k.startswith("twk_") for k in keys)


def crash_at(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """The n-th private file is never written: the process died before it."""
    real: Callable[[Path, bytes], None] = files.write_private
    count = 0

    def write(path: Path, data: bytes) -> None:
        nonlocal count
        count += 1
        if count == n:
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(identity, "write_private", write)
    monkeypatch.setattr("tightwad_agent.mesh.state.write_private", write)


@pytest.mark.parametrize("n", range(1, 7))
def test_interrupted_creation_leaves_nothing_that_counts(home: Path, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, n)
        with pytest.raises(KeyboardInterrupt):
            identity.create_cluster(home, NAME, NOW)
    assert identity.load(home) is None
    made = identity.create_cluster(home, NAME, NOW)
    loaded = identity.load(home)
    assert loaded is not None
    assert loaded.cluster == made.cluster


def test_creation_writes_what_the_crash_test_counts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash_at(monkeypatch, 7)
    identity.create_cluster(home, NAME, NOW)


def test_node_key_survives_an_interrupted_attempt(home: Path) -> None:
    first, second = identity.begin(home), identity.begin(home)
    assert certs.raw_private(first) == certs.raw_private(second)
    assert identity.load(home) is None


def test_leave_forgets_the_identity_and_keeps_models(home: Path, founder: Identity) -> None:
    identity.issue_token(founder, Ledger(home), NOW)
    (home / "models").mkdir()
    (home / "models" / "m.gguf").write_bytes(b"GGUF")
    (home / ".ca.key.abc.new").write_bytes(b"secret left by a crash")
    identity.destroy(home)
    assert [p.name for p in home.iterdir()] == ["models"]
    assert identity.load(home) is None
    identity.destroy(home)
    identity.destroy(home / "never")


# Damage


def swap(home: Path, other: Path, name: str) -> None:
    (home / name).write_bytes((other / name).read_bytes())


@pytest.mark.parametrize("name", ["state.yaml", "node.key", "node.crt", "ca.crt", "ca.key"])
@pytest.mark.parametrize("how", ["missing", "empty", "garbage", "huge", "truncated", "other cluster's", "directory"])
def test_damage_names_the_file_and_what_to_do(
    home: Path, tmp_path: Path, founder: Identity, name: str, how: str
) -> None:
    path = home / name
    whole = path.read_bytes()
    if how == "other cluster's":
        identity.create_cluster(tmp_path / "other", NAME, NOW)
        swap(home, tmp_path / "other", name)
    else:
        path.unlink()
        match how:
            case "empty":
                path.write_bytes(b"")
            case "garbage":
                path.write_bytes(b"\xff\x00garbage: [")
            case "huge":
                path.write_bytes(b"#" * (2 << 20))
            case "truncated":
                path.write_bytes(whole[: len(whole) // 2])
            case "directory":
                path.mkdir()
    with pytest.raises(StateDamaged) as caught:
        identity.load(home)
    assert str(home) in caught.value.message
    assert "leave" in caught.value.hint
    assert founder.state.api_key not in str(caught.value)


def test_a_directory_of_somebody_else_is_named(home: Path, founder: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(StateDamaged, match="Permission denied") as caught:
        identity.load(founder.state_dir)
    assert "owns" in caught.value.hint


def test_a_set_up_that_died_after_its_last_write_is_whole(home: Path, founder: Identity) -> None:
    (home / identity.INCOMPLETE).write_bytes(b"")
    loaded = identity.load(home)
    assert loaded is not None
    assert loaded.node == founder.node
    (home / "state.yaml").unlink()
    with pytest.raises(StateDamaged, match="missing"):  # the mark is gone, so this is a loss and no interruption
        identity.load(home)


def test_lost_state_is_not_taken_for_a_fresh_machine(home: Path, founder: Identity) -> None:
    """`up` would make a new cluster and overwrite the only CA key."""
    (home / "state.yaml").unlink()
    with pytest.raises(StateDamaged, match=r"state\.yaml is missing"):
        identity.create_cluster(home, NAME, NOW)
    assert certs.private_of_pem((home / "ca.key").read_bytes())
    assert founder.can_issue


def test_node_keys_of_another_kind_are_refused(home: Path, founder: Identity) -> None:
    pkcs8 = (Encoding.PEM, PrivateFormat.PKCS8)
    wrong = ec.generate_private_key(ec.SECP256R1()).private_bytes(*pkcs8, NoEncryption())
    locked = founder.key.private_bytes(*pkcs8, BestAvailableEncryption(b"x"))
    for data in (wrong, locked):
        (home / "node.key").write_bytes(data)
        with pytest.raises(StateDamaged, match=r"node\.key"):
            identity.load(home)


# state.yaml


def full_state() -> NodeState:
    return NodeState(
        cluster=ClusterId.of_ca_key(b"k" * 32),
        cluster_name=NodeName("home"),
        node=node_id("a"),
        name=NodeName("no"),  # `no` is a boolean in YAML if it is not quoted
        joined_at=1_800_000_000,
        api_key="twk_" + "a" * 43,
        incarnation=7,
        epoch=Epoch(3, node_id("b")),
        peers=(
            RememberedPeer(
                node_id("b"),
                NodeName("1e3"),
                (Address("fd00::1", 8089), Address("10.0.0.2", 1)),
            ),
        ),
        serve=ServeRecord(Want.PINNED, ModelId("ab" * 32), "off", 4096, 2, (3, 1, node_id("b"))),
    )


def test_state_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    for state in (full_state(), dataclasses.replace(full_state(), peers=(), serve=None, epoch=NO_EPOCH)):
        state.save(tmp_path)
        assert NodeState.load(tmp_path) == state
    assert mode(tmp_path / "state.yaml") == 0o600


def test_optional_keys_of_a_state_have_defaults(tmp_path: Path) -> None:
    full_state().save(tmp_path)
    plain = yaml.safe_load((tmp_path / "state.yaml").read_text())
    for key in ("incarnation", "epoch", "peers", "serve"):
        del plain[key]
    (tmp_path / "state.yaml").write_text(yaml.safe_dump(plain))
    assert NodeState.load(tmp_path).epoch == NO_EPOCH


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("node", "nobody", "node"),
        ("cluster", 5, "cluster"),
        ("name", True, "name"),
        ("name", "../x", "name"),
        ("joined_at", "yesterday", "joined_at"),
        ("joined_at", -1, "joined_at"),
        ("incarnation", 2**60, "incarnation"),
        ("epoch", [1], "epoch"),
        ("epoch", [-1, "x"], "epoch"),
        ("api_key", "twk_short", "api_key"),
        ("api_key", 12345, "api_key"),
        ("peers", [["x"]], "peers"),
        ("peers", [[node_id("b") + "", "b", [["h", 0]]]], "peers"),
        ("peers", [[str(node_id("b")), "b", []]] * 257, "peers"),
        ("serve", ["never"], "serve"),
        ("colour", "red", "colour"),
        ("node", None, "node"),
    ],
)
def test_state_is_read_strictly(tmp_path: Path, key: str, value: object, says: str) -> None:
    full_state().save(tmp_path)
    plain = yaml.safe_load((tmp_path / "state.yaml").read_text())
    plain[key] = str(value) if isinstance(value, NodeId) else value
    (tmp_path / "state.yaml").write_text(json.dumps(plain))
    with pytest.raises(StateDamaged, match=says) as caught:
        NodeState.load(tmp_path)
    assert str(tmp_path) in caught.value.message
    assert "twk_" not in str(caught.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.yaml").write_text("incarnation: 1\n")
    with pytest.raises(StateDamaged, match="cluster is missing"):
        NodeState.load(tmp_path)


def test_a_broken_line_is_named_and_not_quoted(tmp_path: Path) -> None:
    full_state().save(tmp_path)
    text = (tmp_path / "state.yaml").read_text()
    (tmp_path / "state.yaml").write_text(text.replace("api_key: ", "api_key: ]"))
    with pytest.raises(StateDamaged, match="line") as caught:
        NodeState.load(tmp_path)
    assert "twk_" not in str(caught.value)


@settings(max_examples=60)
@given(st.binary(max_size=200))
def test_any_state_file_loads_or_is_damaged(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("s")
    (folder / "state.yaml").write_bytes(data)
    with pytest.raises(StateDamaged):
        NodeState.load(folder)


def test_a_failed_save_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_state().save(tmp_path)
    before = (tmp_path / "state.yaml").read_bytes()

    def broken(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(Exception, match="No space left"):
        dataclasses.replace(full_state(), incarnation=8).save(tmp_path)
    assert (tmp_path / "state.yaml").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.yaml"]


def test_peers_are_remembered_newest_first_and_bounded() -> None:
    state = dataclasses.replace(full_state(), peers=())
    for number in range(300):
        state = state.remembering(RememberedPeer(node_id(f"n{number}"), NodeName("n"), (Address("h", 1),) * 40))
    state = state.remembering(RememberedPeer(node_id("n100"), NodeName("again")))
    assert len(state.peers) == MAX_PEERS
    assert (state.peers[0].name, state.peers[1].node) == ("again", node_id("n299"))
    assert sum(p.node == node_id("n100") for p in state.peers) == 1
    assert len(state.peers[1].addresses) == 16


# Certificates


def contexts(
    leaf: x509.Certificate, key: Ed25519PrivateKey, ca: x509.Certificate, folder: Path
) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    chain = folder / "chain.pem"
    chain.write_bytes(certs.private_pem(key) + certs.pem(leaf))
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    for context in (server, client):
        context.load_cert_chain(chain)
        context.load_verify_locations(cadata=certs.der(ca))
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    return server, client


def shake(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """A handshake in memory, and one byte each way: a refused client learns of it only when it reads."""
    a, b, c, d = (ssl.MemoryBIO() for _ in range(4))
    one, two = server.wrap_bio(a, b, server_side=True), client.wrap_bio(c, d)
    pending = {one, two}
    for _ in range(10):
        for side in list(pending):
            try:
                side.do_handshake()
                pending.discard(side)
            except ssl.SSLWantReadError:
                pass
            c.write(b.read())
            a.write(d.read())
    assert not pending


def test_leafs_pass_strict_verification(tmp_path: Path) -> None:
    now = time.time()
    ca_key, key = certs.new_key(), certs.new_key()
    ca = certs.make_ca(ca_key, now)
    leaf = certs.issue_leaf(ca, ca_key, key.public_key(), Role.NODE, now)
    shake(*contexts(leaf, key, ca, tmp_path))


@pytest.mark.parametrize("shift_days", [-32, 3])
def test_leafs_out_of_date_do_not(tmp_path: Path, shift_days: int) -> None:
    now = time.time()
    ca_key, key = certs.new_key(), certs.new_key()
    ca = certs.make_ca(ca_key, now - 50 * certs.DAY_S)
    leaf = certs.issue_leaf(ca, ca_key, key.public_key(), Role.NODE, now + shift_days * certs.DAY_S)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(*contexts(leaf, key, ca, tmp_path))


def test_leaf_says_who_what_and_how_long(founder: Identity) -> None:
    key = certs.new_key().public_key()
    assert founder.ca_key is not None
    leaf = certs.issue_leaf(founder.ca, founder.ca_key, key, Role.NODE, NOW)
    assert certs.node_of(leaf) == NodeId.of_spki(certs.spki(key))
    assert certs.role_of(leaf) is Role.NODE
    certs.check_leaf(leaf, founder.ca, NOW - 86_000)
    certs.check_leaf(leaf, founder.ca, NOW + 30 * 86_400)
    for wrong in (NOW - 2 * 86_400 - 100, NOW + 30 * 86_400 + 1):
        with pytest.raises(NotTrusted):
            certs.check_leaf(leaf, founder.ca, wrong)


def test_a_node_cannot_issue(founder: Identity) -> None:
    stranger = certs.new_key().public_key()
    below = certs.issue_leaf(founder.leaf, founder.key, stranger, Role.NODE, NOW)
    with pytest.raises(NotTrusted):
        certs.check_leaf(below, founder.ca, NOW)


def test_another_ca_with_the_same_name_does_not_pass(founder: Identity) -> None:
    evil_key = certs.new_key()
    evil = certs.make_ca(evil_key, NOW)
    ours = certs.raw_public(certs.public_of(founder.ca))
    with pytest.raises(NotTrusted, match="another cluster"):
        certs.check_ca(evil, ours)
    leaf = certs.issue_leaf(founder.ca, evil_key, certs.new_key().public_key(), Role.NODE, NOW)
    with pytest.raises(NotTrusted, match="not signed"):
        certs.check_leaf(leaf, founder.ca, NOW)


@given(st.binary(max_size=300))
def test_foreign_bytes_are_no_certificate_and_no_key(data: bytes) -> None:
    with pytest.raises(NotTrusted):
        certs.parse_der(data)
    with pytest.raises(NotTrusted):
        certs.key_of_spki(data)


def test_renewal_keeps_node_and_role(home: Path, founder: Identity) -> None:
    key = certs.new_key().public_key()
    assert founder.ca_key is not None
    leaf = certs.issue_leaf(founder.ca, founder.ca_key, key, Role.NODE, NOW)
    node, later = certs.node_of(leaf), NOW + 20 * 86_400
    fresh = certs.parse_der(identity.renew(founder, node, certs.der(leaf), later))
    assert (certs.node_of(fresh), certs.role_of(fresh)) == (node, Role.NODE)
    assert fresh.not_valid_after_utc.timestamp() == later + 30 * 86_400
    with pytest.raises(NotTrusted):
        identity.renew(founder, founder.node, certs.der(leaf), later)
    with pytest.raises(NotTrusted, match="expired"):
        identity.renew(founder, node, certs.der(leaf), NOW + 31 * 86_400)
    with pytest.raises(NotTrusted, match="another node"):
        identity.install_leaf(founder, certs.der(fresh), later)


def test_renewal_is_due_after_two_thirds_and_an_authority_helps_itself(home: Path, founder: Identity) -> None:
    assert not founder.renewal_due(NOW + 19 * 86_400)
    assert founder.renewal_due(NOW + 20 * 86_400)
    renewed = identity.renew_own(founder, NOW + 90 * 86_400)
    assert not renewed.renewal_due(NOW + 100 * 86_400)
    loaded = identity.load(home)
    assert loaded is not None
    assert loaded.leaf_der == renewed.leaf_der
    with pytest.raises(NotTrusted):
        identity.renew_own(dataclasses.replace(founder, ca_key=None), NOW)
    with pytest.raises(UsageError):
        identity.issue_token(dataclasses.replace(founder, ca_key=None), Ledger(home), NOW)


# Messages


def hello(**changes: object) -> Hello:
    base = {
        "version_min": 1,
        "version_max": 1,
        "node": node_id("a"),
        "name": NAME,
        "role": Role.NODE,
        "cluster": ClusterId.of_ca_key(bytes(32)),
        "incarnation": 4,
        "software": Line("tightwad-agent/0.1.0"),
    }
    return Hello(**base | changes)  # type: ignore[arg-type]


DENIAL = Denial(Denied.NODE, str(node_id("b")), 5, 9, b"c" * 32, "asked for on a", b"s" * 64)
STEP = Succession(b"old", b"new", b"cross", 5, 9, b"o" * 64, b"n" * 64)
MESSAGES = {
    "Hello": hello(),
    "Hello, with its clock": hello(version_max=2, clock_s=1766000000),
    "Open": handshake.Open("control", handshake.pack_args({"epoch": [1, "x"]})),
    "Accepted": handshake.Accepted(),
    "Refused": handshake.Refused("busy", Line("later")),
    "Challenge": handshake.Challenge(b"ca", bytes(32)),
    "JoinRequest": handshake.JoinRequest(b"c", b"s" * 64, b"k" * 44, b"t" * 64, b"n" * 64, NAME),
    "Joined": handshake.Joined(
        b"leaf", "twk_x", NAME, 5, (RememberedPeer(node_id("b"), NAME, (Address("10.0.0.1", 8089),)),), b"k" * 32
    ),
    "JoinRefused": handshake.JoinRefused("used_up", Line("no"), (Address("10.0.0.1", 8089),)),
    "Removed": handshake.Removed(DENIAL),
    "History": handshake.History((STEP,)),
}
BEFORE = {"Hello"}
"""As nodes of the version before write them, which lack the last field."""


def codec_of(message: object) -> object:
    return LINK if type(message) in LINK._tag_of else JOIN


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_have_the_bytes_they_always_had(name: str) -> None:
    vectors = json.loads((VECTORS / "mesh_handshake.json").read_text())
    codec = codec_of(MESSAGES[name])
    if name not in BEFORE:
        assert codec.encode(MESSAGES[name]).hex() == vectors[name]  # type: ignore[attr-defined]
    assert codec.decode(bytes.fromhex(vectors[name])) == MESSAGES[name]  # type: ignore[attr-defined]


def test_every_message_has_a_vector() -> None:
    vectors = json.loads((VECTORS / "mesh_handshake.json").read_text())
    assert vectors.keys() == MESSAGES.keys()
    assert len(MESSAGES) - len(BEFORE) == len(LINK._by_tag) + len(JOIN._by_tag)


@given(st.binary(max_size=200), st.sampled_from([LINK, JOIN]))
def test_any_header_is_a_message_or_a_protocol_error(data: bytes, codec: object) -> None:
    try:
        codec.decode(data)  # type: ignore[attr-defined]
    except ProtocolError:
        pass


@given(st.sampled_from(list(MESSAGES)), st.data())
def test_mutated_messages_are_messages_or_protocol_errors(name: str, data: st.DataObject) -> None:
    codec = codec_of(MESSAGES[name])
    raw = bytearray(codec.encode(MESSAGES[name]))  # type: ignore[attr-defined]
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        codec.decode(bytes(raw))  # type: ignore[attr-defined]
    except ProtocolError:
        pass


def test_text_from_peers_cannot_move_the_cursor() -> None:
    evil = [4, "denied", "\x1b[2J all is well"]
    with pytest.raises(ProtocolError, match="Line"):
        LINK.decode(pack(evil))
    assert Line.cleaned("a\n\x1b[2Jb" + "x" * 2000) == ("a  [2Jb" + "x" * 2000)[:1000]


def test_joined_does_not_show_its_secrets() -> None:
    assert "twk_" not in repr(MESSAGES["Joined"])


@pytest.mark.parametrize(
    ("mine", "theirs", "agreed"), [((1, 1), (1, 1), 1), ((1, 3), (2, 5), 3), ((2, 5), (1, 3), 3), ((1, 9), (4, 4), 4)]
)
def test_newest_common_version(mine: tuple[int, int], theirs: tuple[int, int], agreed: int) -> None:
    one = hello(version_min=mine[0], version_max=mine[1])
    two = hello(version_min=theirs[0], version_max=theirs[1])
    assert agree(one, two) == agreed


@pytest.mark.parametrize(("mine", "theirs", "older"), [((1, 2), (3, 4), "this node"), ((3, 4), (1, 2), "attic")])
def test_disjoint_versions_name_both_ranges(mine: tuple[int, int], theirs: tuple[int, int], older: str) -> None:
    one = hello(version_min=mine[0], version_max=mine[1])
    two = hello(version_min=theirs[0], version_max=theirs[1])
    with pytest.raises(PeerRefused) as caught:
        agree(one, two)
    for low, high in (mine, theirs):
        assert f"{low} to {high}" in caught.value.message
    assert older in caught.value.hint


@pytest.mark.parametrize("theirs", [(2, 1), (0, 1), (-3, 5)])
def test_a_range_that_is_none_is_a_protocol_error(theirs: tuple[int, int]) -> None:
    with pytest.raises(ProtocolError):
        agree(hello(), hello(version_min=theirs[0], version_max=theirs[1]))


@pytest.mark.parametrize("address", [["", 1], ["h", 0], ["h", 65536], ["a b", 1], ["a\n", 1], ["h" * 254, 1]])
def test_addresses_from_peers_are_checked(address: list[object]) -> None:
    with pytest.raises(ProtocolError, match="addresses"):
        JOIN.decode(pack([4, "used_up", "no", [address]]))


def test_arguments_are_maps_with_text_keys() -> None:
    assert handshake.unpack_args(handshake.Open("x").args) == {}
    for wrong in ([], 5, None):
        with pytest.raises(ProtocolError):
            handshake.unpack_args(pack(wrong))
    with pytest.raises(ProtocolError):
        handshake.unpack_args(pack({b"k": 1}))
    with pytest.raises(ValueError, match="at most"):
        handshake.pack_args({"x": "y" * 70_000})
