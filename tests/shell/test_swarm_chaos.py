"""A real node among peers that do anything at all; `scripts/fuzz-peers` does the same for long."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import swarm_chaos as chaos

from tightwad_agent.swarm import part


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    chaos.make_fast(monkeypatch.setattr)


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_peers_do_the_right_file_comes(tmp_path: Path, seed: int) -> None:
    deeds = await chaos.run(seed, tmp_path)
    assert sum(deeds.values()) > 0


async def test_a_byte_that_is_stored_wrongly_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    real = part.pwrite_all

    def stores(fd: int, data: bytes, at: int) -> None:
        real(fd, data, at)
        os.pwrite(fd, b"!!", at)

    monkeypatch.setattr(part, "pwrite_all", stores)
    monkeypatch.setattr(chaos, "PATIENCE_S", 2.0)
    with pytest.raises(BaseExceptionGroup) as caught:
        await chaos.run(1, tmp_path)
    assert caught.group_contains(AssertionError, match="seed 1: wrong bytes")
