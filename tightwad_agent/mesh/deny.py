"""The deny list: who was removed from the cluster, and which join tokens no longer count. Pure.

Each entry is signed by a key of the cluster's CA, so that it does not matter who brings it. Lists are merged as sets:
in any order, any number of times, all nodes come to hold the same. An entry is dropped only at its `until`, when
every certificate that it could stop has expired.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tightwad_agent.errors import ProtocolError, UsageError
from tightwad_agent.ids import NodeId
from tightwad_agent.mesh.tokens import verifies
from tightwad_agent.wire.codec import pack
from tightwad_agent.wire.trust import MAX_NOTE, Denial, Denied

MAX_DENIALS = 1000
"""Entries that authorities make."""
MAX_KEPT = 2 * MAX_DENIALS
"""Entries that are kept: two halves of a cluster that was cut in two may each have made all theirs."""
TOKEN_SLACK_S = 32 * 86_400
"""A denied token is remembered this long after its end: clocks are wrong."""
_DOMAIN = b"tightwad-deny-list-v1\0"

Verify = Callable[[Denial], bool]


def signed(
    ca_key: Ed25519PrivateKey, kind: Denied, subject: str, *, since: float, until: float, note: str = ""
) -> Denial:
    """An entry as an authority makes it. Unix seconds."""
    ca = ca_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    bare = Denial(kind, subject, int(since), int(until), ca, note[:MAX_NOTE])
    return replace(bare, signature=ca_key.sign(_text(bare)))


def is_signed(denial: Denial) -> bool:
    """Whether the key that the entry names signed it; whether that key counts is another question."""
    return verifies(denial.ca, denial.signature, _text(denial))


def _text(d: Denial) -> bytes:
    return _DOMAIN + pack([str(d.kind), d.subject, d.since, d.until, d.ca, d.note])


class DenyList:
    """What one node holds. `verify` is `is_signed`, or in a simulation something quicker."""

    def __init__(self, verify: Verify = is_signed) -> None:
        self._verify = verify
        self._entries: dict[tuple[Denied, str], Denial] = {}

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> tuple[Denial, ...]:
        """All of them, oldest first."""
        return tuple(sorted(self._entries.values(), key=_rank))

    @property
    def digest(self) -> bytes:
        """Equal on nodes that hold the same entries; 8 bytes."""
        text = b"".join(d.signature for d in self.entries)
        return hashlib.sha256(text).digest()[:8]

    def node(self, node: NodeId) -> Denial | None:
        """Why this node is no member any more, if so."""
        return self._entries.get((Denied.NODE, str(node)))

    def token(self, token_id: bytes) -> Denial | None:
        """Why this token admits nobody any more, if so."""
        return self._entries.get((Denied.TOKEN, token_id.hex()))

    def merge(self, entries: Iterable[Denial], trusted: Collection[bytes], now: float) -> tuple[Denial, ...]:
        """Takes what is new, and returns that. `trusted`: raw public keys of the CA, old ones among them.

        Entries of other keys and those that are over are left out. Raises `ProtocolError` for a forged entry; nothing
        of such a list is taken.
        """
        fresh = [d for d in entries if d.ca in trusted and d.until > now and self._is_news(d)]
        for denial in fresh:
            if not self._verify(denial) or not _is_formed(denial):
                raise ProtocolError("a deny list with an entry that the cluster did not sign")
        taken = [d for d in fresh if self._put(d)]
        self._bound()
        return tuple(d for d in taken if self._entries.get(_key(d)) is d)

    def check_room(self) -> None:
        """Raises `UsageError` where no authority may add an entry."""
        if len(self._entries) >= MAX_DENIALS:
            raise UsageError(
                f"the cluster's deny list is full: {MAX_DENIALS} machines and tokens were removed",
                hint="found a new cluster: tightwad-agent leave on all machines, then join one of them anew",
            )

    def expire(self, now: float) -> bool:
        """Drops what can stop nothing any more; whether there was any."""
        over = [key for key, d in self._entries.items() if d.until <= now]
        for key in over:
            del self._entries[key]
        return bool(over)

    def _is_news(self, denial: Denial) -> bool:
        known = self._entries.get(_key(denial))
        return known is None or _rank(known) < _rank(denial)

    def _put(self, denial: Denial) -> bool:
        if not self._is_news(denial):  # twice in one list
            return False
        self._entries[_key(denial)] = denial
        return True

    def _bound(self) -> None:
        for denial in self.entries[: max(0, len(self._entries) - MAX_KEPT)]:
            del self._entries[_key(denial)]


def _is_formed(denial: Denial) -> bool:
    """Whether it names a node, or could name a token."""
    return denial.kind is not Denied.NODE or NodeId.is_valid(denial.subject)


def _key(denial: Denial) -> tuple[Denied, str]:
    return (denial.kind, denial.subject)


def _rank(d: Denial) -> tuple[int, int, str, str, bytes, bytes]:
    """Orders all entries: of two about one subject the greater stays, whichever came first."""
    return (d.until, d.since, str(d.kind), d.subject, d.ca, d.signature)


def parts(entries: Sequence[Denial], size: int) -> list[tuple[Denial, ...]]:
    """In pieces of at most `size`, as messages carry them."""
    return [tuple(entries[i : i + size]) for i in range(0, len(entries), size)]
