"""Who a request is from, as far as sharing the engine goes: the name of its API key, else its address. Pure.

Nodes pass it on in a header, so that the coordinator, where the slots are, can be fair to clients of all nodes. An
address goes as a hash: that two requests are of one client is all that others need to know.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re

from tightwad_agent.ids import NodeId

CLIENT = b"x-tightwad-client"
"""On a request between nodes; set by nodes only."""
LOCAL = "local"
"""Programs on the machine that is asked, without a key."""
_KNOWN = re.compile(rb"(?:key:[A-Za-z0-9._-]{1,64}|ip:[0-9a-f]{16})\Z")


def plain_address(address: str) -> str:
    """One text for all forms of an address: an IPv4 address inside IPv6 is that address. What is no address stays as
    it is. (The machines of a home share the first 64 bits of their IPv6 addresses: all of it counts.)"""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(getattr(ip, "ipv4_mapped", None) or ip)


def caller(key_name: str, address: str, *, is_local: bool) -> str:
    """Of a request that came over a socket. `key_name`: of the API key that it showed, empty for none."""
    if key_name:
        return f"key:{key_name}"
    if is_local:
        return LOCAL
    return "ip:" + hashlib.sha256(plain_address(address).encode()).hexdigest()[:16]


def passed_caller(header: bytes | None, node: NodeId | None) -> str:
    """Of a request that `node` forwarded; of the node itself where it says nothing of use."""
    if header is not None and _KNOWN.match(header):
        return header.decode("ascii")
    return f"{LOCAL}:{node.short if node else ''}"
