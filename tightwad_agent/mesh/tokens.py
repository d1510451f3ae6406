"""Join tokens: what they say, how they are signed, and who may still use one. Pure.

    "tw1" + base64url( CA public key 32 | one-purpose seed 32 | CA signature 64 | claims | CRC-32 )

The CA signs its own key, the public key of the seed, and the claims, so that a token can be checked with nothing else
at hand. The seed never leaves the token's text: an authority keeps its public key, a joiner proves that it has it.
Times are Unix seconds of the authority's clock.
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

import msgpack  # type: ignore[import-untyped]
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tightwad_agent.errors import ProtocolError, TokenError
from tightwad_agent.ids import Address, ClusterId, NodeId
from tightwad_agent.wire.codec import Max, Mismatch, from_plain, pack, to_plain, unpack
from tightwad_agent.wire.rows import Role

PREFIX = "tw1"
VERSION = 1
ID_BYTES = 8
MAX_TTL_S = 366 * 86_400
MAX_USES = 1000
MAX_ADDRESSES = 16
MAX_TEXT = 4096
DEFAULT_TTL_S = 3600
DEFAULT_USES = 1
_IN_ALPHABET = re.compile(r"[A-Za-z0-9_-]*\Z")
_FIXED = 128
_MIN_BODY = _FIXED + 16 + 4
_TOKEN_DOMAIN = b"cluster-join-token-v1\0"
_JOIN_DOMAIN = b"join-v1\0"
_NEW = "make a new one on a machine of the cluster: tightwad-agent token create"
_AGAIN = "copy the whole line again, or " + _NEW


@dataclass(frozen=True, slots=True)
class Claims:
    """What the cluster says about a token. `cluster`: its name, where it is not that of the key that signed."""

    version: int
    token_id: Annotated[bytes, Max(ID_BYTES)]
    issued: int
    ttl_s: int
    uses: int
    role: Role
    addresses: Annotated[tuple[Address, ...], Max(MAX_ADDRESSES)] = ()
    cluster: Annotated[str, Max(52)] = ""

    @property
    def expires(self) -> int:
        return self.issued + self.ttl_s


@dataclass(frozen=True, slots=True)
class Token:
    """A token whose signature and form were checked; whether it may still be used, only an authority knows."""

    ca_public: bytes
    seed: bytes = field(repr=False)
    ca_signature: bytes = field(repr=False)
    claims: Claims
    claims_bytes: bytes = field(repr=False)

    @property
    def text(self) -> str:
        """The line a person copies. Secret."""
        body = self.ca_public + self.seed + self.ca_signature + self.claims_bytes
        body += zlib.crc32(body).to_bytes(4, "big")
        return PREFIX + base64.urlsafe_b64encode(body).decode().rstrip("=")

    @property
    def cluster(self) -> ClusterId:
        named = self.claims.cluster
        return ClusterId(named) if named else ClusterId.of_ca_key(self.ca_public)

    @property
    def public_key(self) -> bytes:
        """Raw public key of the seed: what an authority keeps."""
        return _public(Ed25519PrivateKey.from_private_bytes(self.seed))

    def check(self, now: float) -> None:
        """Raises `TokenError` once the token has expired by this clock."""
        if now >= self.claims.expires:
            raise TokenError("the join token has expired", hint=_NEW)

    def sign_join(self, *, nonce: bytes, leaf_digest: bytes, spki: bytes) -> bytes:
        """The proof of possession for one connection."""
        text = join_text(nonce=nonce, leaf_digest=leaf_digest, spki=spki, claims=self.claims_bytes)
        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(text)


def issue(
    ca_key: Ed25519PrivateKey,
    seed: bytes,
    token_id: bytes,
    *,
    now: float,
    ttl_s: int = DEFAULT_TTL_S,
    uses: int = DEFAULT_USES,
    role: Role = Role.NODE,
    addresses: Sequence[Address] = (),
    cluster: str = "",
) -> Token:
    """A new token. `seed` (32 bytes) and `token_id` (8 bytes) come from the system's random source.

    Raises `TokenError` for a lifetime, use count or address that is out of range; addresses beyond 16 are dropped.
    """
    claims = Claims(VERSION, token_id, int(now), ttl_s, uses, role, tuple(addresses)[:MAX_ADDRESSES], cluster)
    plain = to_plain(claims)
    claims_bytes = pack(plain if cluster else plain[:-1])  # shorter to paste, and as it always was
    parse_claims(claims_bytes)
    ca_public = _public(ca_key)
    token_public = _public(Ed25519PrivateKey.from_private_bytes(seed))
    signature = ca_key.sign(_TOKEN_DOMAIN + ca_public + token_public + claims_bytes)
    return Token(ca_public, seed, signature, claims, claims_bytes)


def parse(text: str) -> Token:
    """A checked token. Raises `TokenError`; a typo is told apart from a forgery."""
    body = _body(text)
    ca_public, seed, signature = body[:32], body[32:64], body[64:_FIXED]
    claims_bytes = body[_FIXED:-4]
    token_public = _public(Ed25519PrivateKey.from_private_bytes(seed))
    if not is_signed(ca_public, token_public, claims_bytes, signature):
        raise TokenError("the join token is forged: the cluster key it names did not sign it", hint=_NEW)
    return Token(ca_public, seed, signature, parse_claims(claims_bytes), claims_bytes)


def parse_claims(data: bytes) -> Claims:
    """Claims from bytes whose signature is checked elsewhere. Raises `TokenError`."""
    try:
        claims = from_plain(Claims, unpack(data))
    except (ProtocolError, Mismatch) as exc:
        raise TokenError(f"the join token's claims cannot be read: {exc}", hint=_NEW) from None
    if claims.version != VERSION:
        raise TokenError(f"the join token is of version {claims.version}; this program reads {VERSION}", hint=_NEW)
    _check_ranges(claims)
    return claims


def is_signed(ca_public: bytes, token_public: bytes, claims: bytes, signature: bytes) -> bool:
    """Whether the cluster's key signed these claims for the token with this public key."""
    return verifies(ca_public, signature, _TOKEN_DOMAIN + ca_public + token_public + claims)


def join_text(*, nonce: bytes, leaf_digest: bytes, spki: bytes, claims: bytes) -> bytes:
    """What a joiner signs: `leaf_digest` (SHA-256 of the server's leaf) ties it to this one TLS connection."""
    return _JOIN_DOMAIN + nonce + leaf_digest + spki + claims


def verifies(raw_public: bytes, signature: bytes, text: bytes) -> bool:
    """Ed25519; false for anything that is no key or no signature."""
    try:
        Ed25519PublicKey.from_public_bytes(raw_public).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True


def _public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def _check_ranges(claims: Claims) -> None:
    if len(claims.token_id) != ID_BYTES or claims.issued < 0:
        raise TokenError("the join token's claims are out of range", hint=_NEW)
    if not 1 <= claims.ttl_s <= MAX_TTL_S:
        raise TokenError(f"a join token lives 1 second to {MAX_TTL_S // 86_400} days, not {claims.ttl_s} s")
    if not 1 <= claims.uses <= MAX_USES:
        raise TokenError(f"a join token has 1 to {MAX_USES} uses, not {claims.uses}")
    if claims.cluster and not ClusterId.is_valid(claims.cluster):
        raise TokenError("the join token names no cluster", hint=_NEW)


def _body(text: str) -> bytes:
    """The decoded bytes, with the checksum right and still at the end."""
    if len(text) > MAX_TEXT:
        raise TokenError(f"a join token is about 215 characters long, this has {len(text)}", hint=_AGAIN)
    joined = "".join(text.split())  # terminals wrap long lines
    if not joined.startswith(PREFIX):
        if joined[:2] == "tw" and joined[2:3].isdigit():
            raise TokenError("the join token is of another version of tightwad-agent", hint="update this machine")
        raise TokenError(f"this is no join token: one begins with {PREFIX}", hint=_AGAIN)
    encoded = joined[len(PREFIX) :]
    try:
        body = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        if len(encoded) % 4 == 1 and _IN_ALPHABET.match(encoded):
            raise _cut() from None
        raise TokenError("the join token holds a character that cannot be part of one", hint=_AGAIN) from None
    exact = base64.urlsafe_b64encode(body).decode().rstrip("=") == encoded
    if len(body) >= _MIN_BODY and exact and zlib.crc32(body[:-4]) == int.from_bytes(body[-4:], "big"):
        return body
    if _is_cut(body):
        raise _cut()
    raise TokenError("the join token was changed on the way: its checksum does not match", hint=_AGAIN)


def _cut() -> TokenError:
    return TokenError("the join token is cut off: its end is missing", hint=_AGAIN)


def _is_cut(body: bytes) -> bool:
    """Whether the claims, or the checksum behind them, end too early. A guess, for the message only."""
    if len(body) < _MIN_BODY:
        return True
    unpacker = msgpack.Unpacker(max_buffer_size=MAX_TEXT)
    unpacker.feed(body[_FIXED:])
    try:
        unpacker.skip()
    except msgpack.OutOfData:
        return True
    except (ValueError, msgpack.UnpackException):
        return False
    return len(body) - _FIXED - int(unpacker.tell()) < 4


# Who may still use one


class Verdict(StrEnum):
    """What an authority says about one node and one token; the value is the code on the wire."""

    ADMIT = "admit"
    AGAIN = "again"  # the node was admitted before: same answer
    UNKNOWN = "unknown_token"
    EXPIRED = "expired"
    USED_UP = "used_up"

    @property
    def is_yes(self) -> bool:
        return self in (Verdict.ADMIT, Verdict.AGAIN)

    @property
    def reason(self) -> str:
        """For a person; empty for a yes."""
        return {
            Verdict.UNKNOWN: "this authority did not make the join token",
            Verdict.EXPIRED: "the join token has expired",
            Verdict.USED_UP: "the join token has been used as often as it may be",
        }.get(self, "")


@dataclass(frozen=True, slots=True)
class Entry:
    """One token as an authority remembers it: no secret in it."""

    token_id: bytes
    public_key: bytes
    issued: int
    ttl_s: int
    uses: int
    role: Role
    nodes: tuple[NodeId, ...] = ()

    @classmethod
    def of(cls, token: Token) -> Entry:
        claims = token.claims
        return cls(claims.token_id, token.public_key, claims.issued, claims.ttl_s, claims.uses, claims.role)

    @property
    def expires(self) -> int:
        return self.issued + self.ttl_s

    @property
    def uses_left(self) -> int:
        return max(0, self.uses - len(self.nodes))


def decide(entry: Entry | None, node: NodeId, now: float) -> Verdict:
    """Whether this node may be admitted now."""
    if entry is None:
        return Verdict.UNKNOWN
    if now >= entry.expires:
        return Verdict.EXPIRED
    if node in entry.nodes:
        return Verdict.AGAIN
    return Verdict.ADMIT if entry.uses_left else Verdict.USED_UP
