"""What a node says of the memory that its part of a pool holds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from tightwad_agent.config import Config
from tightwad_agent.own_row import MEMORY_STEP, OwnRow
from tightwad_agent.wire.rows import Device, NodeRow

HOLDS = "held = bytearray(b'x' * (300 << 20)); print(flush=True); input()"


class Mesh:
    """Nothing is told here."""

    def edit_row(self, _change: Callable[[NodeRow], NodeRow]) -> None: ...


def row(tmp_path: Path) -> OwnRow:
    return OwnRow(cast("Any", Mesh()), Config(state_dir=tmp_path), lambda _text: None)


async def test_what_a_child_holds_is_said_in_steps(tmp_path: Path) -> None:
    own = row(tmp_path)
    assert await own._held(()) == 0
    with subprocess.Popen([sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        own.pids = lambda: [process.pid]
        held = await own._held(())
        process.kill()
    assert 256 << 20 <= held <= 448 << 20
    assert held % MEMORY_STEP == 0
    assert await own._held(()) == 0, "it is gone"


async def test_on_accelerators_it_is_what_was_free_before(tmp_path: Path) -> None:
    own, gb = row(tmp_path), 1 << 30

    def gpu(free: int) -> tuple[Device, ...]:
        return (Device("CUDA0", "a GPU", 24 * gb, free),)

    assert await own._held(gpu(20 * gb)) == 0
    own.pids = lambda: [1 << 30]
    assert await own._held(gpu(8 * gb)) == 12 * gb
    assert await own._held(gpu(22 * gb)) == 0
    own.pids = list
    assert await own._held(gpu(21 * gb)) == 0
    own.pids = lambda: [1 << 30]
    assert await own._held(gpu(20 * gb)) == gb
