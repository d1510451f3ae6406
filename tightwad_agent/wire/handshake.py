"""What two nodes say before a stream belongs to a service, and what a joiner and an authority say.

After TLS both sides send `Hello`; then the dialler sends `Open`, and the listener answers `Accepted` (from there on the
bytes are the service's) or `Refused`. Tags are append-only; new fields go to the end with defaults.

Joining is the service `join`, the only one without a client certificate:

    authority  ->  History          only if the cluster's key was ever changed
    authority  ->  Challenge        its CA certificate, a nonce
    joiner     ->  JoinRequest      claims and two signatures; no secret
    authority  ->  Joined | JoinRefused
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from tightwad_agent.errors import PeerRefused, ProtocolError
from tightwad_agent.ids import Address, ClusterId, NodeId, NodeName
from tightwad_agent.wire.codec import NATURAL, OMITTED, Codec, Max, pack, unpack
from tightwad_agent.wire.rows import Role
from tightwad_agent.wire.trust import Denial, Lineage

LINK_VERSION_MIN = 1
LINK_VERSION_MAX = 2
"""Raised when there is something that an old node would not understand. From 2 on nodes tell one another whom the
cluster removed and how its key changed, here and on the control link."""
TRUST_VERSION = 2

MAX_OPENING = 80 << 10
"""Header bytes of one opening message from a node with a certificate: `Open` with its arguments."""
MAX_STRANGER_OPENING = 8 << 10
"""The same from anybody: the largest honest one, `JoinRequest`, stays below 2 KiB."""
MAX_ARGS = 64 << 10
MAX_REASON = 1000
MAX_JOIN_ADDRESSES = 32
MAX_JOIN_MEMBERS = 64
MAX_PEER_ADDRESSES = 16
NONCE_BYTES = 32
MAX_CERT = 4096


class Line(str):
    """One line of printable text that may be shown on a terminal: no control characters, at most 1,000 long."""

    __slots__ = ()

    def __new__(cls, text: str) -> Line:
        if not isinstance(text, str) or len(text) > MAX_REASON or not text.isprintable():
            raise ValueError("not a line of printable text")
        return super().__new__(cls, text)

    @classmethod
    def cleaned(cls, text: str) -> Line:
        """The nearest line to `text`; never fails."""
        return cls("".join(c if c.isprintable() else " " for c in text)[:MAX_REASON])


@dataclass(frozen=True, slots=True)
class Hello:
    """Who speaks. `node`, `role` and `cluster` are claims until compared with the certificate.

    Versions are of the link's opening, both inclusive. A joiner names the cluster it wants to enter. `clock_s`: Unix
    seconds as the speaker has them, for saying whose clock is wrong; 0 from nodes that do not say.
    """

    version_min: int
    version_max: int
    node: NodeId
    name: NodeName
    role: Role
    cluster: ClusterId
    incarnation: int
    software: Line
    clock_s: Annotated[int, NATURAL] = 0

    @property
    def knows_trust(self) -> bool:
        """Whether it understands deny lists and changes of the cluster's key."""
        return self.version_max >= TRUST_VERSION


@dataclass(frozen=True, slots=True)
class Open:
    """Asks for a service; `args` is a msgpack map with text keys."""

    service: Annotated[str, Max(32)]
    args: Annotated[bytes, Max(MAX_ARGS)] = b"\x80"


@dataclass(frozen=True, slots=True)
class Accepted:
    """The stream is the service's from the next byte on."""


@dataclass(frozen=True, slots=True)
class Refused:
    """No. `code` is for programs (`denied`, `busy`, `no_service`, `certificate_required`, ...), `reason` for people."""

    code: Annotated[str, Max(64)]
    reason: Line


@dataclass(frozen=True, slots=True)
class Removed:
    """No, for good: the cluster removed you, and here is its word for it. `lineage` as in `History`: the key that
    signed may be newer than the one that you know."""

    denial: Denial
    lineage: Lineage = field(default=(), metadata=OMITTED)


@dataclass(frozen=True, slots=True)
class History:
    """Before `Challenge`, to joiners that understand it: how the cluster's key changed, if it did."""

    lineage: Lineage


@dataclass(frozen=True, slots=True)
class Challenge:
    """An authority (or any member) shows its cluster's CA certificate (DER); the nonce makes the request fresh."""

    ca_cert: Annotated[bytes, Max(MAX_CERT)]
    nonce: Annotated[bytes, Max(NONCE_BYTES)]


@dataclass(frozen=True, slots=True)
class JoinRequest:
    """The token's claims and proofs of possession: of the token's key and of the node's own key."""

    claims: Annotated[bytes, Max(4096)]
    ca_signature: Annotated[bytes, Max(64)]
    spki: Annotated[bytes, Max(128)]
    token_signature: Annotated[bytes, Max(64)]
    node_signature: Annotated[bytes, Max(64)]
    name: NodeName


@dataclass(frozen=True, slots=True)
class RememberedPeer:
    """Where a node of the cluster was last met."""

    node: NodeId
    name: NodeName
    addresses: Annotated[tuple[Address, ...], Max(MAX_PEER_ADDRESSES)] = ()


@dataclass(frozen=True, slots=True)
class Joined:
    """Welcome: the leaf (DER), the endpoint's key, who else is there, and for an authority the CA's private key."""

    leaf: Annotated[bytes, Max(MAX_CERT)]
    api_key: Annotated[str, Max(64)]
    cluster_name: NodeName
    joined_at: int
    members: Annotated[tuple[RememberedPeer, ...], Max(MAX_JOIN_MEMBERS)] = ()
    ca_key: Annotated[bytes, Max(32)] = b""

    def __repr__(self) -> str:
        return f"Joined({self.cluster_name}, secrets not shown)"


@dataclass(frozen=True, slots=True)
class JoinRefused:
    """No. Codes are those of `tokens.Verdict` and of `enrol`. `addresses`: authorities that may say yes."""

    code: Annotated[str, Max(64)]
    reason: Line
    addresses: Annotated[tuple[Address, ...], Max(MAX_JOIN_ADDRESSES)] = ()


LINK = Codec("link", {1: Hello, 2: Open, 3: Accepted, 4: Refused, 5: Removed})
JOIN = Codec("join", {1: Challenge, 2: JoinRequest, 3: Joined, 4: JoinRefused, 5: History})


def agree(mine: Hello, theirs: Hello) -> int:
    """The newest link version both speak. Raises `PeerRefused` that names both ranges."""
    if not 0 < theirs.version_min <= theirs.version_max:
        raise ProtocolError(f"link: versions {theirs.version_min} to {theirs.version_max} make no range")
    newest = min(mine.version_max, theirs.version_max)
    if newest >= max(mine.version_min, theirs.version_min):
        return newest
    older = theirs.name if theirs.version_max < mine.version_min else "this node"
    raise PeerRefused(
        f"{theirs.name} ({theirs.software}) speaks link versions {theirs.version_min} to {theirs.version_max}, "
        f"this node ({mine.software}) {mine.version_min} to {mine.version_max}",
        hint=f"update tightwad-agent on {older}",
    )


def pack_args(args: dict[str, Any]) -> bytes:
    """Arguments as `Open` carries them; `ValueError` beyond 64 KiB (a bug of the caller)."""
    data = pack(args)
    if len(data) > MAX_ARGS:
        raise ValueError(f"arguments of {len(data)} bytes, at most {MAX_ARGS} fit")
    return data


def unpack_args(data: bytes) -> dict[str, Any]:
    """The arguments of an `Open`. Raises `ProtocolError`."""
    args = unpack(data)
    if not isinstance(args, dict) or not all(isinstance(key, str) for key in args):
        raise ProtocolError("link: arguments must be a map with text keys")
    return args
