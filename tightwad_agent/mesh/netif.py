"""Which addresses of this machine other machines should dial, and which of theirs are worth dialling.

A home-lab box has more interfaces than networks: container bridges, VPNs and virtual machines offer addresses that
lead nowhere from next door. `choose` takes the facts about all interfaces and gives the addresses to announce, best
first, with a reason for each one left out. Everything here but `interfaces` decides over facts and reads nothing.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import psutil

from tightwad_agent.errors import ConfigError
from tightwad_agent.ids import Address

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_OWN_ADDRESSES = 16
"""More than a machine with two cards, both protocols and a few IPv6 prefixes has; the rest is left out, with reason."""

_VIRTUAL: tuple[tuple[str, str], ...] = (
    (r"docker|br-|podman|nerdctl|cni|flannel|cali|cilium|lxc|lxd|incus|weave|kube|nodelocaldns|hassio", "containers"),
    (r"veth|virbr|vnet|vmnet|vmware|vbox|virtualbox|vethernet|bridge1\d\d|macvtap", "virtual machines or containers"),
    (r"tun|tap|wg|tailscale|utun|zt|ppp|ipsec|gpd|nordlynx|proton|nebula|gif|stf|sit|gre|ip6tnl|teql", "a tunnel"),
    (r"awdl|llw|anpi|ap\d|dummy|ifb|vxlan|geneve", "no network of other machines"),
)
_WIFI = re.compile(r"wl|wifi|wi-fi|ath|ra\d|wwan")
_ETHERNET = re.compile(r"eth|en|em\d|p\d+p|bond|team|lan|net\d|igc|igb|re\d")


class Kind(IntEnum):
    """Order of preference."""

    ETHERNET = 0
    WIFI = 1
    OTHER = 2


@dataclass(frozen=True, slots=True)
class Interface:
    """Facts about one network interface; `addresses` as `IP/PREFIX` text, IPv6 without its scope."""

    name: str
    is_up: bool
    addresses: tuple[str, ...] = ()
    loopback: bool = False
    point_to_point: bool = False
    wireless: bool = False


@dataclass(frozen=True, slots=True)
class OwnAddress:
    """One address of this machine that others may dial."""

    interface: str
    ip: str
    network: IpNetwork
    kind: Kind


@dataclass(frozen=True, slots=True)
class Skipped:
    """What was left out: `what` is an interface or one of its addresses; `reason` completes "because it ..."."""

    interface: str
    what: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The addresses to announce, best first, and what was left out."""

    addresses: tuple[OwnAddress, ...]
    skipped: tuple[Skipped, ...]

    @property
    def networks(self) -> tuple[IpNetwork, ...]:
        return tuple(dict.fromkeys(a.network for a in self.addresses))

    @property
    def multicast_from(self) -> tuple[str, ...]:
        """One address per interface to send multicast from: IPv4, or IPv6 where the machine has no IPv4 at all."""
        for version in (4, 6):
            per_interface: dict[str, str] = {}
            for own in self.addresses:
                if own.network.version == version:
                    per_interface.setdefault(own.interface, own.ip)
            if per_interface:
                return tuple(per_interface.values())
        return ()

    def to_dial(self, port: int) -> tuple[Address, ...]:
        """The addresses with a port, for a `NodeRow` or a token."""
        return tuple(Address(own.ip, port) for own in self.addresses)


def choose(facts: Sequence[Interface], wanted: Sequence[str] = ()) -> Choice:
    """The addresses to announce and dial from.

    `wanted` names interfaces exactly and overrides every rule about kinds of interfaces (`lo` and a veth are then
    fine). Raises `ConfigError` if none of the machine's interfaces has such a name.
    """
    check_names(facts, wanted)
    own: list[OwnAddress] = []
    skipped: list[Skipped] = []
    for interface in facts:
        if reason := _why_not(interface, wanted):
            skipped.append(Skipped(interface.name, interface.name, reason))
            continue
        if not interface.addresses:
            skipped.append(Skipped(interface.name, interface.name, "has no address"))
        for text in interface.addresses:
            found = _own_address(interface, text, explicit=bool(wanted))
            (own if isinstance(found, OwnAddress) else skipped).append(found)  # type: ignore[arg-type]
    own.sort(key=lambda a: (a.kind, a.network.version, a.interface, ipaddress.ip_address(a.ip).packed))
    too_many = f"is one more than the {MAX_OWN_ADDRESSES} that are announced"
    skipped += [Skipped(a.interface, a.ip, too_many) for a in own[MAX_OWN_ADDRESSES:]]
    return Choice(tuple(own[:MAX_OWN_ADDRESSES]), tuple(skipped))


def check_names(facts: Sequence[Interface], wanted: Sequence[str]) -> None:
    """Raises `ConfigError` that names what exists if a wanted interface does not."""
    there = [i.name for i in facts]
    for name in wanted:
        if name not in there:
            raise ConfigError(
                f"no network interface is called {name!r}",
                hint="interfaces of this machine: " + (", ".join(sorted(there)) or "none"),
            )


def _why_not(interface: Interface, wanted: Sequence[str]) -> str:
    if wanted:
        if interface.name not in wanted:
            return "is not among the interfaces that were chosen"
    elif reason := _virtual(interface):
        return reason
    return "" if interface.is_up else "is down"


def _virtual(interface: Interface) -> str:
    if interface.loopback:
        return "is the loopback"
    for pattern, what in _VIRTUAL:
        if re.match(pattern, interface.name, re.IGNORECASE):
            return f"is virtual ({what}); --interface {interface.name} takes it anyway"
    return "is a point-to-point link" if interface.point_to_point else ""


def _kind(interface: Interface) -> Kind:
    name = interface.name.lower()
    if interface.wireless or _WIFI.match(name):
        return Kind.WIFI
    return Kind.ETHERNET if _ETHERNET.match(name) else Kind.OTHER


def _own_address(interface: Interface, text: str, *, explicit: bool) -> OwnAddress | Skipped:
    try:
        found = ipaddress.ip_interface(text)
    except ValueError:
        return Skipped(interface.name, text, "is no address that this agent can read")
    ip = found.ip
    if ip.is_link_local and (ip.version == 6 or not explicit):
        return Skipped(interface.name, str(ip), "is link-local")
    if ip.is_loopback and not explicit:
        return Skipped(interface.name, str(ip), "is a loopback address")
    if ip.is_multicast or ip.is_unspecified:
        return Skipped(interface.name, str(ip), "is not the address of a machine")
    return OwnAddress(interface.name, str(ip), found.network, _kind(interface))


def dialable(hosts: Iterable[str], own: Iterable[IpNetwork]) -> tuple[str, ...]:
    """Of the IP literals that a peer announced, those worth dialling.

    Link-local IPv6 has lost its scope on the way; loopback and IPv4 link-local lead to ourselves or nowhere unless this
    agent announces on such a network itself.
    """
    networks = tuple(own)
    kept = []
    for host in hosts:
        try:
            ip = ipaddress.ip_address(host)
        except ValueError:
            continue
        special = ip.is_loopback or ip.is_link_local
        if ip.is_multicast or ip.is_unspecified or (ip.version == 6 and ip.is_link_local):
            continue
        if special and not _inside(ip, networks):
            continue
        kept.append(str(ip))
    return tuple(dict.fromkeys(kept))


def same_subnet_first(candidates: Iterable[Address], own: Iterable[IpNetwork]) -> list[Address]:
    """Candidates without repetition: those in a network of ours first, IPv4 before IPv6 before host names.

    The order is otherwise kept.
    """
    networks = tuple(own)
    return sorted(dict.fromkeys(candidates), key=lambda a: _rank(a, networks))


def _rank(address: Address, networks: Sequence[IpNetwork]) -> tuple[bool, int]:
    try:
        ip = ipaddress.ip_address(address.host)
    except ValueError:
        return (True, 7)
    return (not _inside(ip, networks), ip.version)


def _inside(ip: IpAddress, networks: Sequence[IpNetwork]) -> bool:
    return any(ip in network for network in networks)


def interfaces() -> list[Interface]:
    """The facts as the operating system has them now: a few system calls; call it in a thread."""
    stats = psutil.net_if_stats()
    found = []
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        state = stats.get(name)
        flags = state.flags.split(",") if state else []
        found.append(
            Interface(
                name=name,
                is_up=bool(state and state.isup),
                addresses=tuple(text for a in addresses if (text := _with_prefix(a.family, a.address, a.netmask))),
                loopback="loopback" in flags or name in ("lo", "lo0"),
                point_to_point="pointopoint" in flags,
                wireless=Path("/sys/class/net", name, "wireless").exists(),
            )
        )
    return found


def _with_prefix(family: int, address: str, netmask: str | None) -> str:
    if family == socket.AF_INET:
        return f"{address}/{netmask or 32}"
    if family != socket.AF_INET6:
        return ""
    bits = int(ipaddress.IPv6Address(netmask.partition("/")[0])).bit_count() if netmask else 64
    return f"{address.partition('%')[0]}/{bits}"
