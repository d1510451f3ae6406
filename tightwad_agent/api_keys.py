"""The API keys of the cluster: which are good, and how what nodes know of them comes together. Pure.

The set only grows, but for keys that expired long ago. Two nodes that know different things merge: what either knows
stays, and a key that either has seen revoked is revoked. So it does not matter in which order, how often or over whom
the records come. The keys themselves are nowhere; SHA-256 of a key of 256 random bits leads back to nothing.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import replace
from enum import StrEnum

from tightwad_agent.errors import UsageError
from tightwad_agent.wire.codec import pack, to_plain
from tightwad_agent.wire.keys import DIGEST_BYTES, MAX_RECORDS, ApiKey, KeyName

MAX_LIVE = 100
"""Keys that are good at one time."""
KEEP_EXPIRED_S = 30 * 86400
"""An expired key is listed for so long; then nobody needs to know of it, not even that it was revoked."""
DEFAULT = KeyName("default")
"""The cluster's first key, which every node holds and `key` prints."""


class KeyState(StrEnum):
    """What a key is worth now."""

    VALID = "valid"
    EXPIRED = "expired"
    REVOKED = "revoked"


def digest_of(key: bytes) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key).digest()


def state_of(record: ApiKey, now: float) -> KeyState:
    if record.revoked:
        return KeyState.REVOKED
    return KeyState.EXPIRED if record.expires and now >= record.expires else KeyState.VALID


class KeyBook:
    """What this node knows of all keys. `default` is the text of the cluster's first one."""

    def __init__(self, default: str) -> None:
        self._default = digest_of(default.encode())
        self._records: dict[bytes, ApiKey] = {}

    def records(self) -> tuple[ApiKey, ...]:
        """All, the oldest first."""
        return tuple(sorted(self._records.values(), key=lambda r: (r.created, r.digest)))

    def fingerprint(self) -> bytes:
        """Equal for nodes that know the same; empty for none."""
        if not self._records:
            return b""
        return hashlib.sha256(pack([to_plain(r) for r in self.records()])).digest()[:8]

    def holder(self, key: bytes, now: float) -> str:
        """The name of this key if it is good; empty otherwise."""
        digest = digest_of(key)
        record = self._records.get(digest)
        if record is not None:
            return str(record.name) if state_of(record, now) is KeyState.VALID else ""
        return str(DEFAULT) if hmac.compare_digest(digest, self._default) else ""

    def default_is_good(self) -> bool:
        return self._default not in self._records

    def create(self, name: str, digest: bytes, now: float, expires: int = 0) -> ApiKey:
        """Records a new key. Raises `UsageError` where the name is taken or no more may be made."""
        checked = _name(name)
        valid = [r for r in self._records.values() if state_of(r, now) is KeyState.VALID]
        if checked == DEFAULT or any(r.name == checked for r in valid):
            raise UsageError(
                f"there is an API key {checked!r} already", hint=f"take another name, or `key revoke {checked}` first"
            )
        if len(valid) >= MAX_LIVE:
            raise UsageError(f"there are {MAX_LIVE} API keys already", hint="`key revoke NAME` makes room")
        if len(self._records) >= MAX_RECORDS:
            raise UsageError(
                f"{MAX_RECORDS} API keys were made, revoked ones among them, and none may be forgotten",
                hint="keys with `--expires` are forgotten 30 days after they have expired",
            )
        record = ApiKey(digest, checked, int(now), expires)
        self._records[digest] = record
        return record

    def revoke(self, which: str, now: float) -> tuple[ApiKey, ...]:
        """Revokes all good keys of that name, or the one of that id. Raises `UsageError` for none."""
        valid = [r for r in self._records.values() if state_of(r, now) is KeyState.VALID]
        if self.default_is_good():
            valid.append(ApiKey(self._default, DEFAULT, 0))
        found = tuple(replace(r, revoked=int(now)) for r in valid if which in (r.name, r.short))
        if not found:
            names = ", ".join(sorted(str(r.name) for r in valid))
            raise UsageError(f"no API key {which[:40]!r} is in force", hint=f"there are: {names or 'none'}")
        self._records |= {r.digest: r for r in found}
        return found

    def merge(self, records: Iterable[ApiKey], now: float) -> tuple[ApiKey, ...]:
        """Takes in what another node knows; returns what is new here."""
        taken = {}
        for record in records:
            known = self._records.get(record.digest)
            joined = record if known is None else _joined(known, record)
            if joined != known and len(record.digest) == DIGEST_BYTES and not _is_forgotten(joined, now):
                taken[record.digest] = self._records[record.digest] = joined
        self._trim(now)
        return tuple(r for r in taken.values() if r.digest in self._records)

    def forget(self, now: float) -> None:
        """Drops what expired long ago."""
        self._trim(now)

    def _trim(self, now: float) -> None:
        """Revoked ones stay before all others, and among these the older ones: every node drops the same."""
        kept = [r for r in self._records.values() if not _is_forgotten(r, now)]
        kept.sort(key=lambda r: (not r.revoked, r.created, r.digest))
        self._records = {r.digest: r for r in kept[:MAX_RECORDS]}


def _joined(one: ApiKey, other: ApiKey) -> ApiKey:
    """Of two records of one key, the same whichever comes first."""
    base = min(one, other, key=lambda r: (r.expires or 2**63, r.created, r.name))
    return replace(base, revoked=max(one.revoked, other.revoked))


def _is_forgotten(record: ApiKey, now: float) -> bool:
    return bool(record.expires) and now >= record.expires + KEEP_EXPIRED_S


def _name(text: str) -> KeyName:
    try:
        return KeyName(text)
    except ValueError:
        raise UsageError(
            f"{text[:40]!r} is no name for a key", hint="letters, digits, dots, dashes and underscores, at most 32"
        ) from None
