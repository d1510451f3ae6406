"""New versions of a real model cost what they must at most, and the bench that says so measures what it claims."""

from __future__ import annotations

from pathlib import Path

import pytest
import swarm_kit as kit
from bench_swarm_delta import run_delta, with_text


def test_a_text_is_added_and_nothing_else_moves(tmp_path: Path) -> None:
    source = kit.write(tmp_path / "a.gguf", data := kit.llama(2))
    new = with_text(source, tmp_path / "b.gguf", "a.key", "x" * 1000).read_bytes()
    before, after = kit.read(data), kit.read(new)
    assert len(str(after.metadata["a.key"]).rstrip()) == 1000
    assert {**after.metadata, "a.key": None} == {**before.metadata, "a.key": None}
    assert after.tokens == before.tokens
    assert new[after.data_start :] == data[before.data_start :]


@pytest.mark.usefixtures("engine_dir", "demo_model")
def test_deltas_are_within_their_bounds() -> None:
    rows = {row["case"]: row for row in run_delta()}
    for case, bound in (("header changed by 1 KB", 3.0), ("Q4_K_S to Q4_K_M", 20.0)):
        row = rows[f"{case}: bytes over the network"]
        assert (row["unit"], row["bound"]) == ("%", bound)
        assert 0.1 < row["value"] <= bound
        assert row["value"] + rows[f"{case}: bytes from the disk"]["value"] == pytest.approx(100, abs=0.02)
