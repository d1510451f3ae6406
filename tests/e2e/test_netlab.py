from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import netlab
import pytest
from netlab import NetLab, NetLabError

netns = pytest.mark.netns


def reaches(lab: NetLab, source: int, target: int, within_s: float = 5) -> bool:
    """Whether a TCP connection comes about (a neighbour that was away is asked for again after a second)."""
    with lab.socket(target) as listener, lab.socket(source) as dialler:
        listener.bind(("0.0.0.0", 7000))
        listener.listen()
        dialler.settimeout(within_s)
        try:
            dialler.connect((lab.nodes[target].address, 7000))
        except OSError:
            return False
        return True


def cut_off(lab: NetLab, source: int, target: int) -> bool:
    return not reaches(lab, source, target, within_s=0.3)


def leftovers(lab: NetLab) -> list[str]:
    return [name for name in os.listdir("/run/netns") if lab._id in name]


@netns
def test_nodes_reach_one_another_and_the_host_reaches_them() -> None:
    with NetLab(3) as lab:
        assert reaches(lab, 0, 1)
        assert reaches(lab, 2, 0)
        assert lab.run(1, ["cat", "/sys/class/net/eth0/operstate"]).strip() == "up"
        with lab.socket(0) as listener:
            listener.bind((lab.nodes[0].address, 7001))
            listener.listen()
            with socket.create_connection((lab.nodes[0].address, 7001), timeout=2) as here:
                assert here.getsockname()[0] == lab.host_address
        with lab.socket(2) as listener:
            listener.bind(("127.0.0.1", 7002))
            listener.listen()
            with lab.socket(2) as dialler:
                dialler.settimeout(2)
                dialler.connect(("127.0.0.1", 7002))


@netns
def test_multicast_reaches_every_node() -> None:
    with NetLab(3, host_leg=False) as lab:
        assert lab.host_address == ""
        group = "239.1.2.3"
        receivers = [lab.socket(i, socket.SOCK_DGRAM) for i in (1, 2)]
        for receiver, node in zip(receivers, lab.nodes[1:], strict=True):
            receiver.bind((group, 7003))
            membership = socket.inet_aton(group) + socket.inet_aton(node.address)
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
            receiver.settimeout(2)
        with lab.socket(0, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(lab.nodes[0].address))
            sender.sendto(b"hello", (group, 7003))
        for receiver in receivers:
            assert receiver.recv(100) == b"hello"
            receiver.close()


@netns
def test_a_partition_cuts_silently_and_heals() -> None:
    with NetLab(4) as lab:
        lab.partition([[0, 1], [2, lab.nodes[3]]])
        assert reaches(lab, 0, 1)
        assert reaches(lab, 2, 3)
        assert cut_off(lab, 0, 2)
        assert cut_off(lab, 3, 1)
        assert lab.run(2, ["cat", "/sys/class/net/eth0/carrier"]).strip() == "1"
        lab.partition([[0, 2], [1], [3]])
        assert reaches(lab, 0, 2)
        assert cut_off(lab, 0, 1)
        assert cut_off(lab, 1, 3)
        lab.heal()
        assert reaches(lab, 0, 1)
        assert reaches(lab, 1, 3)


@netns
def test_a_pulled_cable_is_noticed_and_can_be_put_back() -> None:
    with NetLab(2) as lab:
        lab.link_down(1)
        assert lab.run(1, ["cat", "/sys/class/net/eth0/carrier"]).strip() == "0"
        assert cut_off(lab, 0, 1)
        lab.link_up(1)
        assert lab.run(1, ["cat", "/sys/class/net/eth0/carrier"]).strip() == "1"
        assert reaches(lab, 0, 1)


def seconds_for(lab: NetLab, source: int, target: int, n_bytes: int) -> float:
    with lab.socket(target) as listener, lab.socket(source) as dialler:
        listener.bind(("0.0.0.0", 7004))
        listener.listen()
        dialler.connect((lab.nodes[target].address, 7004))
        far, _ = listener.accept()
        sender = threading.Thread(target=dialler.sendall, args=(bytes(n_bytes),))
        began = time.monotonic()
        sender.start()
        left = n_bytes
        while left:
            left -= len(far.recv(1 << 20))
        taken = time.monotonic() - began
        sender.join()
        far.close()
        return taken


@netns
def test_a_rate_limits_both_directions_and_can_be_lifted() -> None:
    with NetLab(2) as lab:
        lab.set_rate(1, 40)
        n_bytes = 2_500_000  # half a second at 40 Mbit/s
        assert seconds_for(lab, 0, 1, n_bytes) > 0.35
        assert seconds_for(lab, 1, 0, n_bytes) > 0.35
        lab.set_rate(1, 80)
        lab.set_rate(1, None)
        lab.set_rate(1, None)
        assert "tbf" not in lab.run(1, ["tc", "qdisc", "show", "dev", "eth0"])


@netns
def test_close_removes_namespaces_interfaces_and_processes() -> None:
    with NetLab(2) as lab:
        sleeper = lab.popen(0, ["sleep", "1000"])
        stray = subprocess.Popen(lab.argv(1, ["sleep", "1000"]))  # not started by `popen`
        names = leftovers(lab)
        assert len(names) == 3
    assert sleeper.returncode == -signal.SIGKILL
    assert stray.wait(timeout=5) == -signal.SIGKILL
    assert leftovers(lab) == []
    assert lab._leg not in os.listdir("/sys/class/net")
    lab.close()


@netns
def test_two_labs_do_not_collide() -> None:
    with NetLab(2) as one, NetLab(2) as two:
        assert not one.network.overlaps(two.network)
        assert reaches(one, 0, 1)
        assert reaches(two, 0, 1)
        one.close()
        assert reaches(two, 0, 1)


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from netlab import NetLab
lab = NetLab(2)
lab.open()
lab.popen(0, ["sleep", "1000"])
print(lab._id, lab._leg, flush=True)
if sys.argv[2] == "end":
    sys.exit()
time.sleep(1000)
"""


def child(how: str) -> tuple[subprocess.Popen[str], str, str]:
    scripts = Path(netlab.__file__).parent
    process = subprocess.Popen([sys.executable, "-c", CHILD, scripts, how], stdout=subprocess.PIPE, text=True)
    lab, leg = process.stdout.readline().split()
    process.stdout.close()
    return process, lab, leg


def of_lab(lab: str) -> list[str]:
    return [name for name in os.listdir("/run/netns") if lab in name]


@netns
@pytest.mark.parametrize(("how", "status"), [("end", 0), ("wait", -signal.SIGTERM)])
def test_a_lab_goes_with_its_program(how: str, status: int) -> None:
    process, lab, leg = child(how)
    if how == "wait":
        process.terminate()
    assert process.wait(timeout=10) == status
    assert of_lab(lab) == []
    assert leg not in os.listdir("/sys/class/net")


@netns
def test_what_a_killed_lab_left_is_swept_and_living_labs_are_not() -> None:
    with NetLab(1) as living:
        process, lab, _leg = child("wait")
        assert set(of_lab(lab)).isdisjoint(netlab.sweep())
        process.kill()
        process.wait()
        assert len(of_lab(lab)) == 3
        netlab.sweep()
        assert of_lab(lab) == []
        assert len(leftovers(living)) == 2


@netns
def test_a_lab_that_cannot_be_finished_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = NetLab(2)
    monkeypatch.setattr(netlab, "_port", lambda _index: "a-name-that-is-too-long")
    with pytest.raises(NetLabError, match="ip -n"):
        lab.open()
    assert leftovers(lab) == []


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NetLabError, match="need root"):
        NetLab(1).open()


def test_without_iproute2_it_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(netlab, "_program", lambda name: str(tmp_path / name))
    with pytest.raises(NetLabError, match=r"`ip` is missing.*apt-get install iproute2"):
        NetLab(1).open()


def test_elsewhere_than_on_linux_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(NetLabError, match="Linux only"):
        NetLab(1).open()


def test_absurd_sizes_are_refused() -> None:
    for n in (0, 201):
        with pytest.raises(ValueError, match="1 to 200"):
            NetLab(n)
