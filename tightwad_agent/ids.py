"""Names that were checked once, at the edge, and need no second look.

Each type can only be made by a constructor that validates; the rest of the code takes the type and trusts it. All are
plain `str` or tuples underneath, so they print, compare and pack as one expects. Bad input raises `ValueError`.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
from typing import NamedTuple

_BASE32_52 = re.compile(r"[a-z2-7]{52}\Z")
_HEX_64 = re.compile(r"[0-9a-f]{64}\Z")
_NODE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+@()\[\],=-]{0,199}\Z")
_WINDOWS_DEVICES = frozenset(
    {"con", "prn", "aux", "nul"} | {f"com{i}" for i in range(10)} | {f"lpt{i}" for i in range(10)}
)


_HOST_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}\Z")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9._-]{1,15})?\Z")


def _is_host(text: str) -> bool:
    try:
        if ":" in text:
            return _IPV6.match(text) is not None and bool(ipaddress.IPv6Address(text))
        if re.match(r"[0-9.]+\Z", text):
            return bool(ipaddress.IPv4Address(text))
    except ValueError:
        return False
    return _HOST_NAME.match(text) is not None


def _base32_sha256(data: bytes) -> str:
    return base64.b32encode(hashlib.sha256(data).digest()).decode().lower().rstrip("=")


class _Checked(str):
    """A string that matched its type's pattern."""

    __slots__ = ()

    def __new__(cls, text: str) -> _Checked:
        if not isinstance(text, str):
            raise ValueError(f"a {type(text).__name__} is not a {cls.__name__}")  # noqa: TRY004 - one error for bad input
        if not cls.is_valid(text):
            raise ValueError(f"{text[:80]!r} is not a {cls.__name__}")
        return super().__new__(cls, text)

    @classmethod
    def is_valid(cls, text: str) -> bool:
        raise NotImplementedError


class NodeId(_Checked):
    """Base32 of SHA-256 of a node's public key (SubjectPublicKeyInfo, DER): 52 lower-case characters."""

    __slots__ = ()

    @classmethod
    def is_valid(cls, text: str) -> bool:
        return _BASE32_52.match(text) is not None

    @classmethod
    def of_spki(cls, spki_der: bytes) -> NodeId:
        return cls(_base32_sha256(spki_der))

    @property
    def short(self) -> str:
        """Enough to tell machines of one home apart."""
        return self[:8]


class ClusterId(_Checked):
    """Base32 of SHA-256 of the cluster CA's raw Ed25519 public key: 52 lower-case characters."""

    __slots__ = ()

    @classmethod
    def is_valid(cls, text: str) -> bool:
        return _BASE32_52.match(text) is not None

    @classmethod
    def of_ca_key(cls, raw_public_key: bytes) -> ClusterId:
        return cls(_base32_sha256(raw_public_key))

    @property
    def short(self) -> str:
        return self[:8]


class ModelId(_Checked):
    """Root of a manifest: SHA-256 in hex, 64 lower-case characters. Equal ids mean equal bytes."""

    __slots__ = ()

    @classmethod
    def is_valid(cls, text: str) -> bool:
        return _HEX_64.match(text) is not None

    @property
    def short(self) -> str:
        return self[:12]


class SafeName(_Checked):
    """A file name that is one path component on every system: no separator, no `..`, no device name."""

    __slots__ = ()

    @classmethod
    def is_valid(cls, text: str) -> bool:
        if _SAFE_NAME.match(text) is None or text[-1] in " .":
            return False
        return text.split(".", 1)[0].rstrip().lower() not in _WINDOWS_DEVICES


class NodeName(_Checked):
    """What a person calls a machine: a host name of at most 63 characters."""

    __slots__ = ()

    @classmethod
    def is_valid(cls, text: str) -> bool:
        return _NODE_NAME.match(text) is not None

    @classmethod
    def cleaned(cls, text: str) -> NodeName:
        """The nearest valid name to `text`; never fails."""
        kept = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:63].rstrip("-._")
        return cls(kept or "node")


class Epoch(NamedTuple):
    """A coordinator's term. Greater means newer; `node` breaks ties between two that rose at once."""

    counter: int
    node: str

    def __str__(self) -> str:
        return f"{self.counter}@{self.node[:8]}"


NO_EPOCH = Epoch(0, "")


class Address(NamedTuple):
    """Where a node may be reached: an IP address literal (or a host name the user gave) and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str, default_port: int | None = None) -> Address:
        """`host:port`, `[v6]:port`, or a bare host where a default port is given; `ValueError` otherwise."""
        host, port = text, ""
        if text.startswith("["):
            host, bracket, rest = text[1:].partition("]")
            if not bracket or (rest and not rest.startswith(":")):
                raise ValueError(f"{text!r} is not an address: write [IPv6]:PORT")
            port = rest[1:]
        elif text.count(":") == 1:
            host, _, port = text.partition(":")
        if not port and default_port is not None:
            port = str(default_port)
        if not _is_host(host) or re.match(r"[0-9]{1,5}\Z", port) is None or not 0 < int(port) < 65536:
            raise ValueError(f"{text[:300]!r} is not an address: write HOST:PORT")
        return cls(host, int(port))

    @classmethod
    def checked(cls, host: str, port: int) -> Address:
        """An address whose parts came from a peer; `ValueError` if they are none."""
        if not _is_host(host) or not 0 < port < 65536:
            raise ValueError(f"{host[:80]!r}, {port} is not an address")
        return cls(host, port)
