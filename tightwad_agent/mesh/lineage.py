"""The CA's key and those before it: which count now, and why a new one does. Pure.

A cluster is named after its first key for ever. Each change is a `Succession` that the old key and the new key signed.
While it overlaps both count; after that, only the new one. A node that knows only the old key believes the new one for
the certificate that the old one gave it, and learns of the change then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tightwad_agent.errors import NotTrusted
from tightwad_agent.ids import ClusterId
from tightwad_agent.mesh import certs
from tightwad_agent.mesh.tokens import verifies
from tightwad_agent.wire.codec import pack
from tightwad_agent.wire.trust import Succession

_DOMAIN = b"tightwad-ca-succession-v1\0"


def succeed(
    old: x509.Certificate, old_key: Ed25519PrivateKey, new_key: Ed25519PrivateKey, *, now: float, until: float
) -> Succession:
    """The change from one key to the next. Unix seconds."""
    new = certs.make_ca(new_key, now, old.subject)
    cross = certs.cross_sign(old, old_key, new, now)
    bare = Succession(certs.der(old), certs.der(new), certs.der(cross), int(now), int(until))
    text = _text(bare)
    return replace(bare, old_signature=old_key.sign(text), new_signature=new_key.sign(text))


def check(lineage: Sequence[Succession]) -> None:
    """Each step is signed by both keys and begins where the one before ended. Raises `NotTrusted`."""
    before = b""
    for step in lineage:
        if before and step.old != before:
            raise NotTrusted("the history of the cluster's key has a gap")
        _check_step(step)
        before = step.new


def _check_step(step: Succession) -> None:
    old, new, cross = (certs.parse_der(der) for der in (step.old, step.new, step.cross))
    old_public, new_public = _raw(old), _raw(new)
    certs.check_ca(old, old_public)
    certs.check_ca(new, new_public)
    text = _text(step)
    if not verifies(old_public, step.old_signature, text) or not verifies(new_public, step.new_signature, text):
        raise NotTrusted("a change of the cluster's key is not signed by both keys")
    if not certs.is_issued_by(cross, old) or _raw(cross) != new_public:
        raise NotTrusted("a change of the cluster's key comes with a certificate for another key")


def is_longer(known: Sequence[Succession], told: Sequence[Succession]) -> bool:
    """Whether `told` goes on where `known` ends."""
    return len(told) > len(known) and [s.new for s in told[: len(known)]] == [s.new for s in known]


def cluster_of(lineage: Sequence[Succession], ca: x509.Certificate) -> ClusterId:
    """The name of the cluster: that of its first key."""
    first = certs.parse_der(lineage[0].old) if lineage else ca
    return ClusterId.of_ca_key(_raw(first))


def newest(lineage: Sequence[Succession], ca: x509.Certificate) -> x509.Certificate:
    """The CA that signs today; `ca` where the key was never changed."""
    return certs.parse_der(lineage[-1].new) if lineage else ca


def anchors(lineage: Sequence[Succession], ca: x509.Certificate, now: float) -> tuple[x509.Certificate, ...]:
    """The CAs whose leafs are believed now, the newest first."""
    old = [certs.parse_der(step.old) for step in reversed(lineage) if now < step.until]
    return (newest(lineage, ca), *old)


def everyone(lineage: Sequence[Succession], ca: x509.Certificate) -> tuple[x509.Certificate, ...]:
    """All CAs that the cluster ever had, the newest first."""
    return anchors(lineage, ca, float("-inf"))


def issuer_of(leaf: x509.Certificate, cas: Sequence[x509.Certificate]) -> x509.Certificate | None:
    """Which of them signed it."""
    return next((ca for ca in cas if certs.is_issued_by(leaf, ca)), None)


def chain(lineage: Sequence[Succession]) -> tuple[bytes, ...]:
    """What is shown beside a leaf of the newest CA (DER), so that those who know only an older one believe it."""
    return tuple(step.cross for step in reversed(lineage))


def _raw(cert: x509.Certificate) -> bytes:
    return certs.raw_public(certs.public_of(cert))


def _text(s: Succession) -> bytes:
    return _DOMAIN + pack([s.old, s.new, s.cross, s.since, s.until])
