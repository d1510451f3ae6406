"""The cluster's X.509: one CA, and leafs it signs directly. Bytes in, bytes out; no file, no clock.

Ed25519 throughout. A leaf's public key is the node's identity, its subject carries the role. SKI, AKI, KeyUsage and
BasicConstraints are there because `VERIFY_X509_STRICT` asks for them. Times are Unix seconds.
"""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tightwad_agent.errors import NotTrusted, OutOfDate
from tightwad_agent.ids import ClusterId, NodeId
from tightwad_agent.wire.rows import Role

DAY_S = 86_400
LEAF_S = 30 * DAY_S
CA_S = 20 * 365 * DAY_S
BACKDATE_S = 2 * DAY_S
"""A home lab's clocks are off by up to a day after a flat battery; a leaf must be valid there at once."""
COMPARE = "compare the clocks of both machines"


def new_key() -> Ed25519PrivateKey:
    """A fresh private key from the system's random source."""
    return Ed25519PrivateKey.generate()


def raw_public(key: Ed25519PublicKey) -> bytes:
    """The 32 bytes of a public key."""
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)


def raw_private(key: Ed25519PrivateKey) -> bytes:
    """The 32 bytes of a private key. Secret."""
    return key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())


def spki(key: Ed25519PublicKey) -> bytes:
    """SubjectPublicKeyInfo, DER, 44 bytes: what a node id is a hash of."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def key_of_spki(der: bytes) -> Ed25519PublicKey:
    """The inverse of `spki` for bytes from a peer; `NotTrusted` unless they are exactly one Ed25519 key."""
    try:
        key = load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        raise NotTrusted("not a public key") from None
    if not isinstance(key, Ed25519PublicKey) or spki(key) != der:
        raise NotTrusted("not an Ed25519 public key")
    return key


def private_pem(key: Ed25519PrivateKey) -> bytes:
    """PKCS 8, PEM, not encrypted: the file's mode protects it. Secret."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def private_of_pem(pem: bytes) -> Ed25519PrivateKey:
    """The inverse of `private_pem`; `ValueError` for anything else."""
    try:
        key = load_pem_private_key(pem, None)
    except (TypeError, UnsupportedAlgorithm):
        raise ValueError("not an unencrypted private key") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("not an Ed25519 key")  # noqa: TRY004 - one kind of error for one kind of damage
    return key


def pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(Encoding.PEM)


def der(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(Encoding.DER)


def parse_der(data: bytes) -> x509.Certificate:
    """A certificate from a peer's bytes. Raises `NotTrusted`."""
    try:
        return x509.load_der_x509_certificate(data)
    except (ValueError, TypeError, x509.InvalidVersion):
        raise NotTrusted("the peer's certificate cannot be read") from None


def make_ca(key: Ed25519PrivateKey, now: float, name: x509.Name | None = None) -> x509.Certificate:
    """The cluster's self-signed certificate; it may sign leafs and nothing below them.

    `name`: that of the CA whose place it takes. Equal names are what lets a path of length 0 lead over the old one.
    """
    if name is None:
        cluster = ClusterId.of_ca_key(raw_public(key.public_key()))
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"tightwad cluster {cluster.short}")])
    return _ca_draft(name, key.public_key(), now).sign(key, None)


def cross_sign(
    old: x509.Certificate, old_key: Ed25519PrivateKey, new: x509.Certificate, now: float
) -> x509.Certificate:
    """The new CA's key as the old one certifies it: for nodes that know the old one only."""
    draft = _ca_draft(old.subject, public_of(new), now)
    draft = draft.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(old_key.public_key()), critical=False
    )
    return draft.sign(old_key, None)


def _ca_draft(name: x509.Name, key: Ed25519PublicKey, now: float) -> x509.CertificateBuilder:
    draft = _draft(name, name, key, now - BACKDATE_S, now + CA_S)
    draft = draft.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return draft.add_extension(_usage(ca=True), critical=True)


def issue_leaf(
    ca: x509.Certificate, ca_key: Ed25519PrivateKey, node_key: Ed25519PublicKey, role: Role, now: float
) -> x509.Certificate:
    """A node's certificate for 30 days from `now`, valid from two days before."""
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role.value),
            x509.NameAttribute(NameOID.COMMON_NAME, NodeId.of_spki(spki(node_key))),
        ]
    )
    end = min(now + LEAF_S, ca.not_valid_after_utc.timestamp())
    draft = _draft(ca.subject, name, node_key, now - BACKDATE_S, end)
    draft = draft.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    draft = draft.add_extension(_usage(ca=False), critical=True)
    draft = draft.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
    )
    draft = draft.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    return draft.sign(ca_key, None)


def _draft(
    issuer: x509.Name, subject: x509.Name, key: Ed25519PublicKey, start: float, end: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_utc(start))
        .not_valid_after(_utc(end))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _utc(unix_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(unix_s), datetime.UTC)


def public_of(cert: x509.Certificate) -> Ed25519PublicKey:
    """The certificate's key. Raises `NotTrusted` if it is not Ed25519."""
    try:
        key = cert.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise NotTrusted("the certificate's key cannot be read") from None
    if not isinstance(key, Ed25519PublicKey):
        raise NotTrusted("the certificate's key is not Ed25519")
    return key


def node_of(leaf: x509.Certificate) -> NodeId:
    """The node a leaf belongs to."""
    return NodeId.of_spki(spki(public_of(leaf)))


def role_of(leaf: x509.Certificate) -> Role:
    """The role the CA wrote into the leaf. Raises `NotTrusted`."""
    units = leaf.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    try:
        (unit,) = units
        return Role(str(unit.value))
    except ValueError:
        raise NotTrusted("the certificate names no role") from None


def check_ca(ca: x509.Certificate, pinned: bytes) -> None:
    """The CA certificate is signed by itself with exactly the pinned raw key. Raises `NotTrusted`."""
    if raw_public(public_of(ca)) != pinned:
        raise NotTrusted("it presents another cluster's key")
    _check_signed(ca, ca)


def check_leaf(leaf: x509.Certificate, ca: x509.Certificate, now: float) -> None:
    """The leaf was signed directly by this CA and is in date. Raises `NotTrusted`, or `OutOfDate`."""
    _check_signed(leaf, ca)
    start, end = leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
    if now < start:
        raise OutOfDate("its certificate is not yet valid", hint=COMPARE)
    if now > end:
        raise OutOfDate("its certificate has expired", hint=COMPARE)


def is_issued_by(cert: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether this CA signed it, in date or not."""
    try:
        _check_signed(cert, ca)
    except NotTrusted:
        return False
    return True


def _check_signed(cert: x509.Certificate, ca: x509.Certificate) -> None:
    try:
        cert.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise NotTrusted("its certificate is not signed by the cluster's key") from None
