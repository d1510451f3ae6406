"""Who this node is: its keys and certificate, the cluster's, and how they lie in the state directory.

    state.yaml   node.key   node.crt   ca.crt   ca.lineage   and on an authority   ca.key   tokens.ledger

`state.yaml` is written last and makes the identity whole. Until then the file `setup.incomplete` says that what lies
there was never used, so an interrupted `create_cluster` or join leaves nothing that counts. `ca.lineage` is there once
the cluster's key was changed; it is written before a new key takes its place, and `ca.key.next` waits until then. All
of it blocks on the disk, in milliseconds.
"""

from __future__ import annotations

import base64
import dataclasses
import logging
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tightwad_agent.errors import EnvironmentFault, NotTrusted, ProtocolError, StateDamaged, UsageError
from tightwad_agent.ids import Address, ClusterId, NodeId, NodeName
from tightwad_agent.mesh import certs, ledger, lineage, tokens
from tightwad_agent.mesh.files import is_there, make_private_dir, read_private, remove, write_private
from tightwad_agent.mesh.state import FILE as STATE
from tightwad_agent.mesh.state import NodeState
from tightwad_agent.wire.codec import Mismatch, from_plain, pack, to_plain, unpack
from tightwad_agent.wire.rows import Role
from tightwad_agent.wire.trust import MAX_LINEAGE, Lineage, Succession

log = logging.getLogger(__name__)

NODE_KEY = "node.key"
NODE_CERT = "node.crt"
CA_CERT = "ca.crt"
CA_KEY = "ca.key"
CA_KEY_NEXT = "ca.key.next"
LINEAGE = "ca.lineage"
DENY_LIST = "deny.list"
INCOMPLETE = "setup.incomplete"
MAX_PEM_BYTES = 16 << 10
MAX_LINEAGE_BYTES = 128 << 10
KEY_BYTES = 32
_HINT = (
    "restore the files from one backup; or run `tightwad-agent leave` (models are kept) and join again with a new token"
)
_OWNER = "run it as the user who owns the state directory, or choose another with --state-dir"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A checked set: the keys fit the certificates, all are of one cluster. `state` is as it was when loaded.

    `ca` is the newest one; the leaf may still be of one before. An authority that has not been given the newest CA's
    key yet has none.
    """

    state_dir: Path
    cluster: ClusterId
    node: NodeId
    role: Role
    key: Ed25519PrivateKey = field(repr=False)
    leaf: x509.Certificate = field(repr=False)
    ca: x509.Certificate = field(repr=False)
    ca_key: Ed25519PrivateKey | None = field(repr=False)
    state: NodeState = field(repr=False)
    lineage: tuple[Succession, ...] = field(repr=False, default=())

    @property
    def can_issue(self) -> bool:
        """Whether this node may enrol others."""
        return self.ca_key is not None

    @property
    def leaf_der(self) -> bytes:
        return certs.der(self.leaf)

    @property
    def leaf_expires(self) -> float:
        """Unix seconds."""
        return self.leaf.not_valid_after_utc.timestamp()

    def renewal_due(self, now: float) -> bool:
        """Whether two thirds of the leaf's life are over, or it is not of the newest CA."""
        return now >= self.leaf_expires - certs.LEAF_S / 3 or not certs.is_issued_by(self.leaf, self.ca)

    def anchors(self, now: float) -> tuple[x509.Certificate, ...]:
        """The CAs whose leafs are believed now."""
        return lineage.anchors(self.lineage, self.ca, now)

    def trusted_keys(self, now: float) -> frozenset[bytes]:
        """Raw public keys of `anchors`."""
        return frozenset(certs.raw_public(certs.public_of(ca)) for ca in self.anchors(now))

    def check_peer(self, leaf: x509.Certificate, now: float) -> None:
        """The leaf is of a CA that counts now, and in date. Raises `NotTrusted`."""
        anchors = self.anchors(now)
        certs.check_leaf(leaf, lineage.issuer_of(leaf, anchors) or self.ca, now)


def create_cluster(state_dir: Path, name: NodeName, now: float, cluster_name: NodeName | None = None) -> Identity:
    """Makes a cluster with this node as its founder and first authority.

    Raises `UsageError` if the directory already belongs to a cluster, `StateDamaged` if it half does,
    `EnvironmentFault` if it cannot be written.
    """
    if load(state_dir) is not None:
        raise UsageError(f"{state_dir} already belongs to a cluster", hint="to start anew: tightwad-agent leave")
    key = begin(state_dir)
    ca_key = certs.new_key()
    ca = certs.make_ca(ca_key, now)
    made = NodeState(
        cluster=ClusterId.of_ca_key(certs.raw_public(ca_key.public_key())),
        cluster_name=cluster_name or name,
        node=NodeId.of_spki(certs.spki(key.public_key())),
        name=name,
        joined_at=int(now),
        api_key=new_api_key(),
    )
    leaf = certs.issue_leaf(ca, ca_key, key.public_key(), Role.AUTHORITY, now)
    return commit(assemble(state_dir=state_dir, key=key, leaf=leaf, ca=ca, ca_key=ca_key, state=made))


def load(state_dir: Path) -> Identity | None:
    """The identity in this directory, or None if there is none yet. Raises `StateDamaged`, never guesses.

    An expired leaf is no damage: see `renewal_due` and `leaf_expires`.
    """
    if not is_there(state_dir / STATE, _OWNER):
        _check_unused(state_dir)
        return None
    try:
        remove(state_dir / INCOMPLETE)  # the set-up died between its last two steps
    except EnvironmentFault as exc:
        log.warning("%s", exc.message)
    node_state = NodeState.load(state_dir)
    key = _read_key(state_dir / NODE_KEY)
    leaf, ca = _read_cert(state_dir / NODE_CERT), _read_cert(state_dir / CA_CERT)
    steps = _read_lineage(state_dir / LINEAGE)
    _finish_change(state_dir, steps)
    ca_key = _read_key(state_dir / CA_KEY) if is_there(state_dir / CA_KEY, _HINT) else None
    return assemble(state_dir=state_dir, key=key, leaf=leaf, ca=ca, ca_key=ca_key, state=node_state, steps=steps)


def begin(state_dir: Path) -> Ed25519PrivateKey:
    """The node key for an identity that is being made: the one an interrupted attempt left, or a new one, saved."""
    make_private_dir(state_dir)
    write_private(state_dir / INCOMPLETE, b"an identity is being made here\n")
    path = state_dir / NODE_KEY
    if path.exists():
        return _read_key(path)
    key = certs.new_key()
    write_private(path, certs.private_pem(key))
    return key


def commit(identity: Identity) -> Identity:
    """Writes the set; whole from the moment `state.yaml` has its name."""
    state_dir = identity.state_dir
    write_private(state_dir / CA_CERT, certs.pem(identity.ca))
    if identity.lineage:
        _write_lineage(identity)
    if identity.ca_key is not None:
        write_private(state_dir / CA_KEY, certs.private_pem(identity.ca_key))
    _write_leaf(identity)
    identity.state.save(state_dir)
    remove(state_dir / INCOMPLETE)
    return identity


def install_leaf(identity: Identity, leaf_der: bytes, now: float) -> Identity:
    """Replaces the leaf by a renewed one. Raises `NotTrusted` if it is not this node's, not the CA's or out of date."""
    leaf = certs.parse_der(leaf_der)
    certs.check_leaf(leaf, identity.ca, now)
    if certs.node_of(leaf) != identity.node or certs.role_of(leaf) != identity.role:
        raise NotTrusted("the renewed certificate belongs to another node or role")
    renewed = dataclasses.replace(identity, leaf=leaf)
    _write_leaf(renewed)
    return renewed


def promote(identity: Identity, leaf_der: bytes, raw_ca_key: bytes, now: float) -> Identity:
    """Makes this node an authority: with a leaf that says so, and the CA's key that signed it.

    Both are proof of each other. Raises `NotTrusted`. An authority that has only an older key gets the newest so.
    """
    leaf = certs.parse_der(leaf_der)
    certs.check_leaf(leaf, identity.ca, now)
    if certs.node_of(leaf) != identity.node or certs.role_of(leaf) is not Role.AUTHORITY:
        raise NotTrusted("the certificate belongs to another node, or to no authority")
    if len(raw_ca_key) != KEY_BYTES:
        raise NotTrusted("the cluster's key did not come")
    ca_key = Ed25519PrivateKey.from_private_bytes(raw_ca_key)
    if certs.raw_public(ca_key.public_key()) != certs.raw_public(certs.public_of(identity.ca)):
        raise NotTrusted("the cluster's key that came is another")
    write_private(identity.state_dir / CA_KEY, certs.private_pem(ca_key))
    promoted = dataclasses.replace(identity, leaf=leaf, role=Role.AUTHORITY, ca_key=ca_key)
    _write_leaf(promoted)
    return promoted


def adopt(identity: Identity, steps: tuple[Succession, ...]) -> Identity:
    """With this history of the CA's key, which must be checked and go on where the known one ends."""
    lineage.check(steps)
    if lineage.cluster_of(steps, identity.ca) != identity.cluster:
        raise NotTrusted("the history is that of another cluster's key")
    ca = lineage.newest(steps, identity.ca)
    adopted = dataclasses.replace(identity, lineage=steps, ca=ca, ca_key=None)
    _write_lineage(adopted)
    return adopted


def rotate(identity: Identity, now: float, overlap_s: float) -> Identity:
    """An authority gives the CA a new key; both count for `overlap_s` seconds. Raises `UsageError`.

    Whatever the moment of a crash, afterwards the change was made whole, or not at all.
    """
    if identity.ca_key is None:
        raise UsageError("this machine is no authority of the cluster", hint="do it on one that is")
    if len(identity.lineage) >= MAX_LINEAGE:
        raise UsageError(f"the cluster's key was changed {MAX_LINEAGE} times already", hint="found a new cluster")
    new_key = certs.new_key()
    step = lineage.succeed(identity.ca, identity.ca_key, new_key, now=now, until=now + overlap_s)
    write_private(identity.state_dir / CA_KEY_NEXT, certs.private_pem(new_key))
    adopted = adopt(identity, (*identity.lineage, step))
    _finish_change(identity.state_dir, adopted.lineage)
    return renew_own(dataclasses.replace(adopted, ca_key=new_key), now)


def renew(identity: Identity, peer: NodeId, leaf_der: bytes, now: float) -> bytes:
    """An authority's answer to a member that shows its leaf: the same for 30 more days, of the newest CA (DER).

    `peer` is who the link says it is. Raises `NotTrusted` for a leaf that is not this peer's or has expired.
    """
    return _reissue(identity, peer, leaf_der, now, None)


def elevate(identity: Identity, peer: NodeId, leaf_der: bytes, now: float) -> bytes:
    """The same as an authority's. Raises `NotTrusted` also for a client's leaf."""
    if certs.role_of(certs.parse_der(leaf_der)) is Role.CLIENT:
        raise NotTrusted("a client cannot become an authority")
    return _reissue(identity, peer, leaf_der, now, Role.AUTHORITY)


def _reissue(identity: Identity, peer: NodeId, leaf_der: bytes, now: float, role: Role | None) -> bytes:
    if identity.ca_key is None:
        raise NotTrusted("this node is no authority")
    leaf = certs.parse_der(leaf_der)
    identity.check_peer(leaf, now)
    if certs.node_of(leaf) != peer:
        raise NotTrusted("the certificate belongs to another node")
    key, role = certs.public_of(leaf), role or certs.role_of(leaf)
    return certs.der(certs.issue_leaf(identity.ca, identity.ca_key, key, role, now))


def renew_own(identity: Identity, now: float) -> Identity:
    """An authority renews itself, also after its leaf has expired."""
    if identity.ca_key is None:
        raise NotTrusted("this node is no authority")
    leaf = certs.issue_leaf(identity.ca, identity.ca_key, identity.key.public_key(), identity.role, now)
    return install_leaf(identity, certs.der(leaf), now)


def issue_token(
    identity: Identity,
    book: ledger.Ledger,
    now: float,
    *,
    ttl_s: int = tokens.DEFAULT_TTL_S,
    uses: int = tokens.DEFAULT_USES,
    role: Role = Role.NODE,
    addresses: tuple[Address, ...] = (),
) -> tokens.Token:
    """A new join token, remembered before it is returned; print its `text`. Raises `TokenError`, `UsageError`."""
    if identity.ca_key is None:
        raise UsageError("this machine is no authority of the cluster", hint="make the token on one that is")
    token = tokens.issue(
        identity.ca_key,
        secrets.token_bytes(32),
        secrets.token_bytes(tokens.ID_BYTES),
        now=now,
        ttl_s=ttl_s,
        uses=uses,
        role=role,
        addresses=addresses,
        cluster=str(identity.cluster) if identity.lineage else "",
    )
    book.add(token, now)
    return token


def destroy(state_dir: Path) -> None:
    """Forgets the identity, keys, tokens and state; everything else in the directory (models) stays.

    Interrupted anywhere, the next `load` still says None or raises; it never finds half an identity.
    """
    if not state_dir.is_dir():
        return
    write_private(state_dir / INCOMPLETE, b"the identity here is being forgotten\n")
    for name in (STATE, NODE_CERT, CA_CERT, CA_KEY, CA_KEY_NEXT, LINEAGE, DENY_LIST, ledger.FILE, NODE_KEY, INCOMPLETE):
        remove(state_dir / name)


def new_api_key() -> str:
    """A fresh key for the endpoint: `twk_` and 32 random bytes. Secret."""
    return "twk_" + base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")


def _check_unused(state_dir: Path) -> None:
    """Without `state.yaml`: certificates mean that it was lost, unless a set-up was interrupted before it."""
    if (state_dir / INCOMPLETE).exists():
        return
    for name in (NODE_CERT, CA_CERT, CA_KEY):
        if (state_dir / name).exists():
            raise StateDamaged(f"{state_dir / STATE} is missing, but {name} is there", hint=_HINT)


def _read_key(path: Path) -> Ed25519PrivateKey:
    data = read_private(path, MAX_PEM_BYTES, _HINT)
    try:
        return certs.private_of_pem(data)
    except ValueError:
        raise StateDamaged(f"{path} is no Ed25519 private key", hint=_HINT) from None


def _read_cert(path: Path) -> x509.Certificate:
    data = read_private(path, MAX_PEM_BYTES, _HINT)
    try:
        return x509.load_pem_x509_certificate(data)
    except (ValueError, TypeError, x509.InvalidVersion):
        raise StateDamaged(f"{path} is no certificate", hint=_HINT) from None


def _read_lineage(path: Path) -> tuple[Succession, ...]:
    if not is_there(path, _HINT):
        return ()
    try:
        steps: tuple[Succession, ...] = from_plain(Lineage, unpack(read_private(path, MAX_LINEAGE_BYTES, _HINT)))
        lineage.check(steps)
    except (Mismatch, ProtocolError, NotTrusted) as exc:
        raise StateDamaged(f"{path} is damaged: {exc}", hint=_HINT) from None
    return steps


def _write_lineage(identity: Identity) -> None:
    write_private(identity.state_dir / LINEAGE, pack(to_plain(identity.lineage)))


def _write_leaf(identity: Identity) -> None:
    """The leaf, and what leads from an older CA to its own."""
    chain = [certs.parse_der(der) for der in lineage.chain(identity.lineage)]
    path = identity.state_dir / NODE_CERT
    write_private(path, b"".join(certs.pem(cert) for cert in (identity.leaf, *chain)))


def _finish_change(state_dir: Path, steps: tuple[Succession, ...]) -> None:
    """The next key takes its place if the lineage names it; one that was never announced is forgotten."""
    path = state_dir / CA_KEY_NEXT
    if not is_there(path, _HINT):
        return
    key = _read_key(path)
    announced = certs.public_of(certs.parse_der(steps[-1].new)) if steps else None
    if announced is not None and certs.raw_public(announced) == certs.raw_public(key.public_key()):
        write_private(state_dir / CA_KEY, certs.private_pem(key))
    remove(path)


def assemble(
    *,
    state_dir: Path,
    key: Ed25519PrivateKey,
    leaf: x509.Certificate,
    ca: x509.Certificate,
    ca_key: Ed25519PrivateKey | None,
    state: NodeState,
    steps: tuple[Succession, ...] = (),
) -> Identity:
    """The identity these parts make; `StateDamaged` names the two that do not fit. Writes nothing.

    `ca` is any CA that the cluster had; `steps` lead to the newest one.
    """
    try:
        all_cas = lineage.everyone(steps, ca)
        publics = [certs.raw_public(certs.public_of(c)) for c in all_cas]
        certs.check_ca(ca, certs.raw_public(certs.public_of(ca)))
        cluster = lineage.cluster_of(steps, ca)
        node, role = certs.node_of(leaf), certs.role_of(leaf)
        issuer = lineage.issuer_of(leaf, all_cas) or ca
        certs.check_leaf(leaf, issuer, leaf.not_valid_before_utc.timestamp())
    except NotTrusted as exc:
        raise StateDamaged(f"{state_dir / NODE_CERT} and {CA_CERT} do not fit: {exc.message}", hint=_HINT) from None
    if certs.raw_public(certs.public_of(ca)) not in publics:
        raise StateDamaged(f"{state_dir / CA_CERT} is not of the keys in {LINEAGE}", hint=_HINT)
    if certs.spki(key.public_key()) != certs.spki(certs.public_of(leaf)):
        raise StateDamaged(f"{state_dir / NODE_KEY} is not the key of {NODE_CERT}", hint=_HINT)
    if state.cluster != cluster or state.node != node:
        raise StateDamaged(f"{state_dir / STATE} belongs to another node or cluster than {NODE_CERT}", hint=_HINT)
    if role is Role.AUTHORITY and ca_key is None:
        raise StateDamaged(f"{state_dir / CA_KEY} is missing; this node is an authority", hint=_HINT)
    if ca_key is not None and certs.raw_public(ca_key.public_key()) not in publics:
        raise StateDamaged(f"{state_dir / CA_KEY} is not the key of {CA_CERT}", hint=_HINT)
    is_newest = ca_key is not None and certs.raw_public(ca_key.public_key()) == publics[0]
    return Identity(
        state_dir=state_dir,
        cluster=cluster,
        node=node,
        role=role,
        key=key,
        leaf=leaf,
        ca=all_cas[0],
        ca_key=ca_key if is_newest else None,
        state=state,
        lineage=steps,
    )
