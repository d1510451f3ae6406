"""What authorities sign for everybody: who was removed, which join tokens no longer count, and the CA's next key.

A record is believed for its signature, whoever passes it on. New fields go to the end with defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from tightwad_agent.wire.codec import NATURAL, Max

MAX_NOTE = 200
MAX_CA = 2048
"""Bytes of a CA certificate, DER; ours are below 400."""
MAX_LINEAGE = 16
"""How often a cluster may change its key."""


class Denied(StrEnum):
    """What a denial is about."""

    NODE = "node"
    TOKEN = "token"  # noqa: S105 - a word of the protocol


@dataclass(frozen=True, slots=True)
class Denial:
    """`subject`: a node id, or a token id in hex. Unix seconds; `until`: nothing that it could stop is valid any more.

    `ca`: raw public key of the CA whose key signed. `note`: who asked for it, for people.
    """

    kind: Denied
    subject: Annotated[str, Max(64)]
    since: Annotated[int, NATURAL]
    until: Annotated[int, NATURAL]
    ca: Annotated[bytes, Max(32)]
    note: Annotated[str, Max(MAX_NOTE)] = ""
    signature: Annotated[bytes, Max(64)] = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Succession:
    """One change of the CA's key. Certificates are DER; Unix seconds.

    `old`, `new`: the self-signed certificates; `cross`: the new key certified by the old one. From `since` to `until`
    both count. Signed by the old key, which says who is next, and by the new one, which says until when.
    """

    old: Annotated[bytes, Max(MAX_CA)]
    new: Annotated[bytes, Max(MAX_CA)]
    cross: Annotated[bytes, Max(MAX_CA)]
    since: Annotated[int, NATURAL]
    until: Annotated[int, NATURAL]
    old_signature: Annotated[bytes, Max(64)] = field(default=b"", repr=False)
    new_signature: Annotated[bytes, Max(64)] = field(default=b"", repr=False)


Lineage = Annotated[tuple[Succession, ...], Max(MAX_LINEAGE)]
"""All changes of a cluster's key, the first one first. The cluster keeps the name of its first key."""
