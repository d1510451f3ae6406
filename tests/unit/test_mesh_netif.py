from __future__ import annotations

import ipaddress
import socket
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.errors import ConfigError
from tightwad_agent.ids import Address
from tightwad_agent.mesh import netif
from tightwad_agent.mesh.netif import Choice, Interface, Kind, choose, dialable, same_subnet_first

ETH = Interface("eth0", True, ("192.168.1.10/24", "fd00:1::10/64", "fe80::1/64"))
WIFI = Interface("wlan0", True, ("192.168.1.11/24",), wireless=True)
LO = Interface("lo", True, ("127.0.0.1/8", "::1/128"), loopback=True)
DOCKER = Interface("docker0", True, ("172.17.0.1/16",))


def ips(choice: Choice) -> list[str]:
    return [a.ip for a in choice.addresses]


def reasons(choice: Choice) -> dict[str, str]:
    return {s.what: s.reason for s in choice.skipped}


def test_a_plain_box_announces_its_ethernet_and_says_what_it_left_out() -> None:
    choice = choose([LO, DOCKER, ETH])
    assert ips(choice) == ["192.168.1.10", "fd00:1::10"]
    assert reasons(choice) == {
        "lo": "is the loopback",
        "docker0": "is virtual (containers); --interface docker0 takes it anyway",
        "fe80::1": "is link-local",
    }


@pytest.mark.parametrize(
    "name",
    [
        "docker0", "docker_gwbridge", "br-0a1b2c3d4e5f", "veth12ab", "virbr0", "virbr0-nic", "vnet3", "cni0",
        "cni-podman0", "flannel.1", "cali1234", "cilium_host", "podman1", "lxcbr0", "lxdbr0", "tun0", "tap0", "wg0",
        "wg-home", "tailscale0", "utun4", "zt5u4y", "ppp0", "vmnet8", "VMware Network Adapter VMnet1", "vboxnet0",
        "VirtualBox Host-Only Network", "vEthernet (WSL)", "bridge100", "awdl0", "dummy0", "ifb0", "kube-ipvs0",
    ],
)  # fmt: skip
def test_virtual_interfaces_are_skipped(name: str) -> None:
    choice = choose([replace(ETH, name=name), WIFI])
    assert ips(choice) == ["192.168.1.11"]
    assert choice.skipped[0].reason.startswith("is virtual")
    assert str(choice.skipped[0]).startswith(f"{name}: is virtual")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("eth0", Kind.ETHERNET), ("eno1", Kind.ETHERNET), ("enp3s0f0", Kind.ETHERNET), ("enx00e04c", Kind.ETHERNET),
        ("bond0", Kind.ETHERNET), ("en0", Kind.ETHERNET), ("Ethernet 2", Kind.ETHERNET), ("em1", Kind.ETHERNET),
        ("p4p1", Kind.ETHERNET), ("wlan0", Kind.WIFI), ("wlp2s0", Kind.WIFI), ("Wi-Fi", Kind.WIFI),
        ("br0", Kind.OTHER), ("vmbr0", Kind.OTHER), ("usb0", Kind.OTHER),
    ],
)  # fmt: skip
def test_interfaces_of_real_machines_are_taken(name: str, kind: Kind) -> None:
    (own,) = choose([Interface(name, True, ("10.0.0.5/24",))]).addresses
    assert own.kind is kind


def test_ethernet_before_wifi_before_others_and_ipv4_before_ipv6() -> None:
    bridge = Interface("br0", True, ("10.9.0.1/24",))
    wifi = replace(WIFI, addresses=("fd00:2::1/64", "192.168.2.1/24"))
    renamed_wifi = Interface("foo0", True, ("192.168.3.1/24",), wireless=True)
    choice = choose([bridge, renamed_wifi, wifi, ETH])
    assert ips(choice) == ["192.168.1.10", "fd00:1::10", "192.168.3.1", "192.168.2.1", "fd00:2::1", "10.9.0.1"]


@pytest.mark.parametrize(
    ("interface", "what", "reason"),
    [
        (replace(ETH, is_up=False), "eth0", "is down"),
        (replace(ETH, addresses=()), "eth0", "has no address"),
        (replace(ETH, addresses=("169.254.7.7/16",)), "169.254.7.7", "is link-local"),
        (replace(ETH, addresses=("0.0.0.0/0",)), "0.0.0.0", "is not the address of a machine"),
        (replace(ETH, addresses=("ff02::1/8",)), "ff02::1", "is not the address of a machine"),
        (replace(ETH, addresses=("rubbish",)), "rubbish", "is no address that this agent can read"),
        (replace(ETH, addresses=("127.0.0.2/8",)), "127.0.0.2", "is a loopback address"),
        (replace(ETH, point_to_point=True), "eth0", "is a point-to-point link"),
    ],
)
def test_every_skip_has_its_reason(interface: Interface, what: str, reason: str) -> None:
    choice = choose([interface])
    assert choice.addresses == ()
    assert reasons(choice) == {what: reason}


def test_a_named_interface_overrides_the_rules_and_excludes_all_others() -> None:
    veth = Interface("veth9", True, ("10.1.1.1/24", "169.254.1.1/16", "fe80::2/64"))
    choice = choose([ETH, veth, LO], ["veth9"])
    assert ips(choice) == [
        "10.1.1.1",
        "169.254.1.1",
    ]  # a direct cable has nothing but link-local; IPv6 would need a scope
    assert reasons(choice)["eth0"] == "is not among the interfaces that were chosen"
    assert ips(choose([ETH, LO], ["lo"])) == ["127.0.0.1", "::1"]
    assert ips(choose([ETH, LO, WIFI], ["wlan0", "eth0"])) == ["192.168.1.10", "fd00:1::10", "192.168.1.11"]


def test_a_named_interface_that_is_down_is_no_error() -> None:
    choice = choose([replace(ETH, is_up=False)], ["eth0"])
    assert reasons(choice) == {"eth0": "is down"}


def test_an_unknown_interface_name_lists_those_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        choose([WIFI, ETH], ["eth7"])
    assert "'eth7'" in caught.value.message
    assert caught.value.hint == "interfaces of this machine: eth0, wlan0"
    with pytest.raises(ConfigError, match="none"):
        choose([], ["eth0"])


def test_more_addresses_than_the_limit_are_left_out_with_a_reason() -> None:
    many = Interface("eth0", True, tuple(f"10.0.{i}.1/24" for i in range(30)))
    choice = choose([many])
    assert len(choice.addresses) == netif.MAX_OWN_ADDRESSES
    assert sum("one more than" in s.reason for s in choice.skipped) == 30 - netif.MAX_OWN_ADDRESSES


def test_multicast_goes_out_once_per_interface_over_ipv4_if_there_is_any() -> None:
    two = replace(ETH, addresses=("192.168.1.10/24", "192.168.1.12/24", "fd00:1::10/64"))
    assert choose([two, WIFI]).multicast_from == ("192.168.1.10", "192.168.1.11")
    assert choose([replace(ETH, addresses=("fd00:1::10/64",))]).multicast_from == ("fd00:1::10",)
    assert choose([LO]).multicast_from == ()


def test_to_dial_adds_the_port() -> None:
    assert choose([WIFI]).to_dial(8089) == (Address("192.168.1.11", 8089),)


def test_same_subnet_first_keeps_the_order_otherwise_and_drops_repetitions() -> None:
    own = choose([ETH]).networks
    far, near, near6, name = (Address(h, 8089) for h in ("10.0.0.1", "192.168.1.9", "fd00:1::9", "attic.lan"))
    assert same_subnet_first([name, near6, far, near, far], own) == [near, near6, far, name]
    later = Address("10.0.0.0", 1)
    assert same_subnet_first([far, later], own) == [far, later]


def test_what_a_peer_announces_is_dialled_only_where_it_can_lead_somewhere() -> None:
    own = choose([ETH]).networks
    nowhere = ["fe80::1", "127.0.0.1", "::1", "169.254.3.3", "224.0.0.1", "0.0.0.0", "::", "nonsense"]
    heard = ["192.168.1.9", *nowhere, "10.0.0.1", "192.168.1.9"]
    assert dialable(heard, own) == ("192.168.1.9", "10.0.0.1")
    assert dialable(["127.0.0.1", "::1", "127.0.0.9"], choose([LO], ["lo"]).networks) == (
        "127.0.0.1",
        "::1",
        "127.0.0.9",
    )


addresses = st.one_of(st.ip_addresses().map(lambda a: f"{a}/{a.max_prefixlen // 2}"), st.text(max_size=10))
interfaces = st.builds(
    Interface,
    name=st.one_of(st.text(max_size=15), st.sampled_from(["eth0", "lo", "docker0", "wlan0"])),
    is_up=st.booleans(),
    addresses=st.lists(addresses, max_size=20).map(tuple),
    loopback=st.booleans(),
    point_to_point=st.booleans(),
    wireless=st.booleans(),
)


@given(st.lists(interfaces, max_size=8), st.booleans())
def test_any_facts_give_a_choice_that_accounts_for_everything(facts: list[Interface], explicit: bool) -> None:
    choice = choose(facts, [facts[0].name] if facts and explicit else [])
    assert len(choice.addresses) <= netif.MAX_OWN_ADDRESSES
    for own in choice.addresses:
        ip = ipaddress.ip_address(own.ip)
        assert not (ip.version == 6 and ip.is_link_local)
        assert ip in own.network
    named = {a.interface for a in choice.addresses} | {s.interface for s in choice.skipped}
    assert named == {i.name for i in facts}


def test_the_door_reads_this_machine() -> None:
    found = {i.name: i for i in netif.interfaces()}
    loopback = next(i for i in found.values() if i.loopback)
    assert loopback.is_up
    assert "127.0.0.1/255.0.0.0" in loopback.addresses
    assert all(ipaddress.ip_interface(text) for i in found.values() for text in i.addresses)


@pytest.mark.parametrize(
    ("family", "address", "netmask", "text"),
    [
        (socket.AF_INET, "10.0.0.1", "255.255.0.0", "10.0.0.1/255.255.0.0"),
        (socket.AF_INET, "10.0.0.1", None, "10.0.0.1/32"),
        (socket.AF_INET6, "fe80::1%eth0", "ffff:ffff:ffff:ffff::", "fe80::1/64"),
        (socket.AF_INET6, "fd00::1", None, "fd00::1/64"),
        (17, "02:00:00:00:00:01", None, ""),
    ],
)
def test_psutil_addresses_become_prefixes(family: int, address: str, netmask: str | None, text: str) -> None:
    assert netif._with_prefix(family, address, netmask) == text
