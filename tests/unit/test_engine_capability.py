"""What the engine prints and answers, read into values."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightwad_agent.engine.build import step_of
from tightwad_agent.engine.capability import klass, offered, parse_devices
from tightwad_agent.engine.hello import RESPONSE_BYTES, RpcVersion, decode_response, encode_request, encode_response
from tightwad_agent.engine.pins import PINNED, build_flags, cache_name, platform_key
from tightwad_agent.engine.smoke import build_number
from tightwad_agent.errors import EngineMismatch, UsageError
from tightwad_agent.wire.codec import from_plain, to_plain
from tightwad_agent.wire.rows import MAX_DEVICES, Capabilities, Device

MIB, GIB = 1 << 20, 1 << 30

CUDA = """\
ggml_cuda_init: found 2 CUDA devices:
  Device 0: NVIDIA GeForce RTX 4090, compute capability 8.9, VMM: yes
Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24077 MiB, 23643 MiB free)
  Vulkan0: AMD Radeon (RADV (NAVI31)) (24560 MiB, 24000 MiB free)
  BLAS: Accelerate (0 MiB, 0 MiB free)
"""


def test_devices_are_read_with_their_memory_in_bytes() -> None:
    assert parse_devices(CUDA) == (
        Device("CUDA0", "NVIDIA GeForce RTX 4090", 24077 * MIB, 23643 * MIB),
        Device("Vulkan0", "AMD Radeon (RADV (NAVI31))", 24560 * MIB, 24000 * MIB),
        Device("BLAS", "Accelerate", 0, 0),
    )


@pytest.mark.parametrize(
    "text", ["", "Available devices:\n  (none)\n", "  CUDA0: before the heading (1 MiB, 1 MiB free)\n"]
)
def test_a_machine_with_only_a_cpu_lists_nothing(text: str) -> None:
    assert parse_devices(text) == ()


def test_more_free_than_there_is_and_twins_are_put_right() -> None:
    text = "Available devices:\n  A: x (1 MiB, 9 MiB free)\n  A: y (2 MiB, 2 MiB free)\n"
    assert parse_devices(text) == (Device("A", "x", MIB, MIB),)


@given(st.text(max_size=300), st.integers(0, 10**12 - 1))
def test_whatever_is_printed_fits_into_a_row(text: str, n: int) -> None:
    lines = "\n".join(f"  D{i}: {text} ({n} MiB, {n} MiB free)" for i in range(MAX_DEVICES + 3))
    for output in (text, f"Available devices:\n{text}\n{lines}"):
        devices = parse_devices(output)
        assert len(devices) <= MAX_DEVICES
        assert from_plain(Capabilities, to_plain(Capabilities(devices=devices))).devices == devices


def offer(devices: tuple[Device, ...], *allowed: str) -> list[str]:
    return [d.name for d in offered(devices, allowed, cpu="Xeon", memory_total=8 * GIB, memory_free=9 * GIB)]


def test_a_worker_offers_what_has_memory_or_else_the_cpu() -> None:
    devices = parse_devices(CUDA)
    assert offer(devices) == ["CUDA0", "Vulkan0"]
    assert offer(devices[2:]) == ["CPU"]
    assert offered((), (), cpu="Xeon", memory_total=8 * GIB, memory_free=9 * GIB) == (
        Device("CPU", "Xeon", 8 * GIB, 8 * GIB),
    )


def test_a_worker_offers_what_its_user_allows() -> None:
    devices = parse_devices(CUDA)
    assert offer(devices, "vulkan0", "VULKAN0") == ["Vulkan0"]
    assert offer(devices, "cpu", "cuda0") == ["CPU", "CUDA0"]
    with pytest.raises(UsageError, match="no device CUDA7") as caught:
        offer(devices, "CUDA7")
    assert "CUDA0, Vulkan0, CPU" in caught.value.hint


def rank(ram: float, *gpus: float) -> int:
    devices = tuple(Device(f"CUDA{i}", "", int(g * GIB), 0) for i, g in enumerate(gpus))
    return klass(Capabilities(memory_total=int(ram * GIB), devices=devices))


def test_gpu_memory_ranks_before_ram() -> None:
    assert rank(0) < rank(0.9) <= rank(2) < rank(4) < rank(7.6) < rank(15.5) < rank(31)
    assert rank(512) < rank(4, 6) < rank(8, 6) < rank(4, 12) < rank(4, 12, 12)


def test_small_differences_do_not_count() -> None:
    assert rank(15.3) == rank(16) == rank(17)
    assert rank(32, 23.5) == rank(32, 24)
    cpu = Device("CPU", "", 64 * GIB, 0)
    assert klass(Capabilities(memory_total=8 * GIB, devices=(cpu,))) == rank(8)


@given(st.integers(-(1 << 70), 1 << 70), st.integers(-(1 << 70), 1 << 70))
def test_no_machine_is_off_the_scale(ram: int, gpu: int) -> None:
    value = klass(Capabilities(memory_total=ram, devices=(Device("X", "", gpu, 0),)))
    assert 0 <= value < 64 * 64


# HELLO


def test_hello_as_the_sources_lay_it_out() -> None:
    assert encode_request() == bytes([14, 24, 0, 0, 0, 0, 0, 0, 0]) + bytes(24)
    answer = bytes([28, 0, 0, 0, 0, 0, 0, 0, 7, 0, 1, 0]) + bytes(24)
    assert encode_response((7, 0, 1)) == answer
    assert decode_response(answer) == RpcVersion(7, 0, 1)
    assert str(RpcVersion(7, 0, 1)) == "7.0.1"


def test_hello_that_is_not_whole_is_awaited() -> None:
    answer = encode_response((7, 0, 0))
    assert len(answer) == RESPONSE_BYTES
    assert [decode_response(answer[:n]) for n in range(RESPONSE_BYTES)] == [None] * RESPONSE_BYTES


@given(st.binary(min_size=8, max_size=64))
def test_an_answer_that_is_no_hello_is_refused(data: bytes) -> None:
    if data[:8] == encode_response((0, 0, 0))[:8]:
        return
    with pytest.raises(EngineMismatch):
        decode_response(data)


# Versions, progress, pins


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("version: 11434 (abcdef0)\nbuilt with GNU", 11434),
        ("version: 0.6.0 (build 11434, commit abcdef0)", 11434),
        ("version: 0.6.0-dev (build 0, commit unknown)", 0),
        ("warning\nversion: ", 0),
        ("version: b (build", 0),
        ("version: 99999999999 (x)", 0),
        ("", 0),
    ],
)
def test_the_build_number_is_a_hint(text: str, number: int) -> None:
    assert build_number(text) == number


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("[12/345] Building CXX object a.o", (12, 345, "steps")),
        ("[ 42%] Building CXX object a.o", (42, 100, "%")),
        ("[100%] Built target x", (100, 100, "%")),
        ("[999%] never", (100, 100, "%")),
        ("-- Configuring done", None),
        ("x [1/2] ", None),
    ],
)
def test_progress_is_read_from_ninja_and_make(line: str, step: tuple[int, int, str] | None) -> None:
    assert step_of(line) == step


def test_platforms_have_one_name_each() -> None:
    assert platform_key("linux", "x86_64") == "linux-x86_64"
    assert platform_key("linux", "aarch64") == platform_key("linux", "arm64") == "linux-arm64"
    assert platform_key("darwin", "arm64") == "macos-arm64"
    assert platform_key("win32", "AMD64") == "windows-x86_64"
    for key in ("linux-x86_64", "linux-arm64", "macos-arm64", "windows-x86_64"):
        assert PINNED.build in PINNED.archives[key].name


def test_a_build_finds_its_libraries_beside_itself() -> None:
    assert "-DCMAKE_INSTALL_RPATH=$ORIGIN" in build_flags(PINNED, cuda=False, system="linux")
    assert "-DCMAKE_INSTALL_RPATH=@loader_path" in build_flags(PINNED, cuda=False, system="darwin")
    assert "-DGGML_CUDA=ON" in build_flags(PINNED, cuda=True, system="linux")
    assert "-DGGML_CUDA=ON" not in build_flags(PINNED, cuda=False, system="linux")
    assert {"-DGGML_RPC=ON", "-DCMAKE_BUILD_TYPE=Release"} <= set(PINNED.flags)


def test_what_makes_binaries_differ_makes_their_folders_differ() -> None:
    names = {cache_name(PINNED, "build", *f) for f in ((), ("a",), ("b",), ("a", "b"), ("ab",))}
    assert len(names) == 5
    assert all(name.startswith("b11434-") for name in names)
