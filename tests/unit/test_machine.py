from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tightwad_agent import machine


@pytest.mark.parametrize(
    ("system", "arch", "name"),
    [
        ("linux", "x86_64", "linux-x86_64"),
        ("linux", "aarch64", "linux-aarch64"),
        ("darwin", "arm64", "macos-aarch64"),
        ("win32", "AMD64", "windows-x86_64"),
        ("linux", "riscv64", "linux-riscv64"),
        ("freebsd14", "", "freebsd14-unknown"),
    ],
)
def test_platform_names(system: str, arch: str, name: str) -> None:
    assert machine.platform_name(system, arch) == name


def root(tmp_path: Path, **files: str) -> Path:
    for name, text in files.items():
        path = tmp_path / name.replace("__", "/").replace("_dot_", ".").replace("_dash_", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\nmodel name\t: Intel(R)  Xeon(R)\t CPU\nmodel name\t: other\n", "Intel(R) Xeon(R) CPU"),
        ("processor : 0\nBogoMIPS : 108\nModel\t\t: Raspberry Pi 5 Model B\n", "Raspberry Pi 5 Model B"),
        ("model name : \x1b[31mred\x07 " + "x" * 500, ("[31mred " + "x" * 500)[:200]),
    ],
)
def test_the_name_of_the_processor(tmp_path: Path, cpuinfo: str, name: str) -> None:
    assert machine.cpu_name(root(tmp_path, proc__cpuinfo=cpuinfo)) == name


def test_a_board_without_a_processor_name_gives_its_own(tmp_path: Path) -> None:
    files = {"proc__cpuinfo": "processor : 0\n", "proc__device_dash_tree__model": "Jetson Orin\0"}
    assert machine.cpu_name(root(tmp_path, **files)) == "Jetson Orin"


def test_no_source_at_all_still_gives_text(tmp_path: Path) -> None:
    assert isinstance(machine.cpu_name(tmp_path), str)


def test_cores_are_those_the_process_may_use(tmp_path: Path) -> None:
    n_allowed = len(os.sched_getaffinity(0))
    assert machine.usable_cores(tmp_path) == n_allowed
    assert machine.usable_cores(root(tmp_path, sys__fs__cgroup__cpu_dot_max="max 100000\n")) == n_allowed
    assert machine.usable_cores(root(tmp_path, sys__fs__cgroup__cpu_dot_max="50000 100000\n")) == 1
    assert machine.usable_cores(root(tmp_path, sys__fs__cgroup__cpu_dot_max="99900000 100000\n")) == n_allowed
    assert machine.usable_cores(root(tmp_path, sys__fs__cgroup__cpu_dot_max="1 0\n")) == n_allowed


def test_memory_is_the_machines_where_nothing_limits_it(tmp_path: Path) -> None:
    total, available = machine.memory(tmp_path)
    assert 0 < available <= total
    no_limit = {"sys__fs__cgroup__memory__memory_dot_limit_in_bytes": str(2**63 - 4096)}
    assert machine.memory(root(tmp_path, **no_limit))[0] == total


@pytest.mark.parametrize(
    ("limit", "used", "stat"),
    [
        ("sys__fs__cgroup__memory_dot_max", "sys__fs__cgroup__memory_dot_current", "sys__fs__cgroup__memory_dot_stat"),
        (
            "sys__fs__cgroup__memory__memory_dot_limit_in_bytes",
            "sys__fs__cgroup__memory__memory_dot_usage_in_bytes",
            "sys__fs__cgroup__memory__memory_dot_stat",
        ),
    ],
)
def test_a_containers_limit_counts_and_its_page_cache_does_not(
    tmp_path: Path, limit: str, used: str, stat: str
) -> None:
    files = {limit: "64000000\n", used: "50000000\n", stat: "anon 1\ninactive_file 30000000\n"}
    assert machine.memory(root(tmp_path, **files)) == (64_000_000, 44_000_000)
    assert machine.memory(root(tmp_path, **{used: "99000000\n", stat: ""})) == (64_000_000, 0)


def test_free_disk_is_that_of_the_nearest_folder_there_is(tmp_path: Path) -> None:
    here = machine.disk_free(tmp_path)
    assert here > 0
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "not" / "yet", tmp_path / "file" / "below"):
        assert machine.disk_free(path) == pytest.approx(here, rel=0.5)


def test_a_disk_that_cannot_be_asked_has_nothing_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(_path: str) -> None:
        raise PermissionError

    monkeypatch.setattr(machine.psutil, "disk_usage", refuse)
    assert machine.disk_free(tmp_path) == 0


def test_all_facts_of_this_machine(tmp_path: Path) -> None:
    facts = machine.read(tmp_path)
    assert facts.platform.count("-") == 1
    assert facts.cpu
    assert 1 <= facts.n_cores <= facts.n_logical
    assert facts.memory_available <= facts.memory_total
    assert facts.disk_free > 0
    assert facts.boot_time > 1e9


def test_memory_that_a_process_holds_for_itself(tmp_path: Path) -> None:
    """What it mapped of a file is not of it, and one that is gone holds nothing."""
    size = 64 << 20
    (tmp_path / "mapped").write_bytes(bytes(size))
    code = (
        "import mmap, sys; held = bytearray(b'x' * (64 << 20)); file = open(sys.argv[1], 'rb');"
        "m = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ); sum(m[::4096]); print(flush=True); input()"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "mapped")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert size < machine.anonymous_memory([process.pid]) < 1.6 * size
        process.kill()
        process.wait()
        assert machine.anonymous_memory([process.pid]) == 0
    assert machine.anonymous_memory([]) == 0
