"""Who may ask the endpoint: pure decisions from an address and headers.

Programs on this machine need no key. A web page open in a browser on this machine is not such a program, although its
requests come from loopback as well: it gives itself away by the `Host` it was fooled into using (DNS rebinding), by an
`Origin` that is not ours, or by `Sec-Fetch-Site`. Whoever knows the key is past all of that.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from tightwad_agent.errors import Forbidden, Unauthorized

Headers = Sequence[tuple[bytes, bytes]]

Holder = Callable[[bytes], str]
"""The name of a key that is in force; empty for any other bytes."""

MAX_KEY = 512
"""Bytes of a key that are looked at; none is that long."""
_IPV6 = rb"\[([0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9._-]{1,15})?)\]"
_HOST = re.compile(rb"(?:" + _IPV6 + rb"|([A-Za-z0-9._-]{1,253}))(?::[0-9]{1,5})?\Z")


@dataclass(frozen=True, slots=True)
class Access:
    """`names`: what this machine is called (host names and addresses, without port). `open_endpoint`: other machines
    need no key."""

    names: frozenset[str] = frozenset()
    open_endpoint: bool = False


def machine_names(host_name: str, addresses: Iterable[str] = ()) -> frozenset[str]:
    """The names a machine answers to: its host name, the first label of it, both with `.local`, and addresses."""
    host = host_name.rstrip(".").casefold()
    labels = {host, host.split(".", 1)[0]}
    return frozenset(n for n in labels | {f"{n}.local" for n in labels} | {a.casefold() for a in addresses} if n)


def is_loopback(address: str) -> bool:
    """Of a peer's IP literal; an IPv4 address inside IPv6 counts as what it is."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return bool((mapped or ip).is_loopback)


def check(access: Access, holder: Holder, peer: str, method: str, headers: Headers) -> str:
    """Returns the name of the API key if the request may go on; empty where it came without one and needs none.

    Raises `Unauthorized` or `Forbidden`.
    """
    if name := key_holder(headers, holder):
        return name
    local = is_loopback(peer)
    if not local and not access.open_endpoint:
        raise Unauthorized(
            "this endpoint needs an API key from other machines, and the one sent is not in force"
            if _sent_keys(headers)
            else "this endpoint needs the cluster's API key from other machines",
            hint="`tightwad-agent key` prints one; send it as `Authorization: Bearer KEY`.",
        )
    host = _one(headers, b"host")
    if (local or _is_browser(headers)) and not _is_own_host(access, _host_of(host)):
        raise Forbidden(
            f"`{_shown(host)}` is no name of this machine",
            hint="use localhost, an IP address or the machine's name, or send the API key.",
        )
    _check_site(method, headers, host)
    return ""


def check_admin(admin_key: str, peer: str, headers: Headers) -> None:
    """Commands of this machine's own command line: loopback, the admin key, and no browser."""
    if not is_loopback(peer):
        raise Forbidden("commands are taken from this machine only")
    if _all(headers, b"origin") or _all(headers, b"sec-fetch-site"):
        raise Forbidden("commands are not taken from web pages")
    if not presents_key(headers, admin_key):
        raise Unauthorized(
            "the agent on this port has another admin key",
            hint="give the same --state-dir as the running agent has.",
        )


def key_holder(headers: Headers, holder: Holder) -> str:
    """Whose key was sent, as `Authorization: Bearer` or as `x-api-key` (the Anthropic SDK's way); empty for none.

    Any bytes may come, also several keys: then all must be the same.
    """
    sent = _sent_keys(headers)
    if not sent or len(sent) > 2 or sent[-1] != sent[0]:
        return ""
    return holder(sent[0])


def presents_key(headers: Headers, key: str) -> bool:
    """Whether this key was sent. The comparison takes as long for a wrong key as for the right one."""
    wanted = key.encode()
    return bool(wanted) and bool(key_holder(headers, lambda sent: "it" if hmac.compare_digest(sent, wanted) else ""))


def _sent_keys(headers: Headers) -> list[bytes]:
    bearers = [_bearer(value) for value in _all(headers, b"authorization")]
    return [key[:MAX_KEY] for key in (*bearers, *_all(headers, b"x-api-key")) if key]


def _bearer(value: bytes) -> bytes:
    scheme, _, rest = value.partition(b" ")
    return rest.strip() if scheme.lower() == b"bearer" else b""


def _check_site(method: str, headers: Headers, host: bytes) -> None:
    """Refuses what a page of another site asks for, as its browser says; a link that is followed is no such thing."""
    site = _one(headers, b"sec-fetch-site").lower()
    followed = _one(headers, b"sec-fetch-mode").lower() == b"navigate"
    alone = _one(headers, b"sec-fetch-dest").lower() in (b"", b"document")
    visiting = method in ("GET", "HEAD") and followed and alone
    elsewhere = site == b"cross-site" or (site == b"same-site" and not _is_loopback_name(_host_of(host)))
    if elsewhere and not visiting:
        raise Forbidden("requests from other web sites are not taken")
    for origin in _all(headers, b"origin"):
        if not _same_site(origin, host):
            raise Forbidden(
                f"requests from the web site `{_shown(origin)}` are not taken", hint="send the API key to allow it."
            )


def _is_browser(headers: Headers) -> bool:
    """It may act for a page. Sec-Fetch headers are not sent to plain HTTP of another machine; `Mozilla` is."""
    names = (b"origin", b"sec-fetch-site", b"sec-fetch-mode")
    return any(_all(headers, n) for n in names) or _one(headers, b"user-agent").lower().startswith(b"mozilla/")


def _same_site(origin: bytes, host: bytes) -> bool:
    """The page came from this machine: from the endpoint itself, or from some port of loopback."""
    try:
        parts = urlsplit(origin.decode("ascii"))
        name, netloc = parts.hostname or "", parts.netloc
    except ValueError:
        return False
    if parts.scheme not in ("http", "https") or not name:
        return False
    return _is_loopback_name(name) or netloc.casefold().encode() == host.lower()


def _is_own_host(access: Access, host: str) -> bool:
    return bool(host) and (_is_loopback_name(host) or _is_ip(host) or host in access.names)


def _is_loopback_name(name: str) -> bool:
    name = name.casefold().rstrip(".")
    return name == "localhost" or name.endswith(".localhost") or is_loopback(name)


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return True


def _host_of(value: bytes) -> str:
    """The host of a `Host` header in lower case, without port and brackets; empty where it is not of that form."""
    match = _HOST.match(value)
    return (match[1] or match[2]).decode("ascii").casefold().rstrip(".") if match else ""


def _all(headers: Headers, name: bytes) -> list[bytes]:
    return [v for n, v in headers if n == name]


def _one(headers: Headers, name: bytes) -> bytes:
    return next((v for n, v in headers if n == name), b"")


def _shown(value: bytes) -> str:
    return value[:80].decode("ascii", "replace")
