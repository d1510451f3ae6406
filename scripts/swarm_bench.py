"""What the cases of `scripts/bench swarm` share: what was asked for, the model that is sent, nodes to send it."""

from __future__ import annotations

import os
import random
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from netlab import NetLab
from swarm_lab import Children, Nodes, SwarmLabError
from swarm_table import Row

TENSOR_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for on the command line. `size` 0: the model of TIGHTWAD_TEST_F32; `mbit` each way."""

    cases: tuple[str, ...]
    leechers: tuple[int, ...]
    repeats: int
    mbit: float
    size: int
    peer: bool
    turns: int
    big_gb: int
    big_s: float


@dataclass
class Bench:
    """Where it runs, what is sent, and what came of it."""

    options: Options
    folder: Path
    trace: Path | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    _model: Path | None = None

    @property
    def model(self) -> Path:
        """The file that is sent; a synthetic one is made when it is first asked for."""
        if self._model is None:
            self._model = synthetic(self.folder / "model.gguf", self.options.size) if self.options.size else given()
        return self._model

    @contextmanager
    def nodes(self, lab: NetLab | None, n_leechers: int, **how: Any) -> Iterator[Nodes]:
        """A seed and leechers with nothing in their stores; all of it is gone afterwards."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder, Children(lab, Path(folder)) as children:
            trace = self.trace and self.trace / str(len(self.samples))
            if trace:
                trace.mkdir(parents=True, exist_ok=True)
            nodes = Nodes(children, n_leechers, trace=trace, **how)
            nodes.start()
            yield nodes

    def keep(self, case: str, **facts: Any) -> None:
        self.samples.append({"case": case, **facts})


def synthetic(path: Path, size: int, *, seed: int = 1) -> Path:
    """A GGUF of about `size` bytes of noise, in tensors of `TENSOR_BYTES`."""
    n = max(1, size // TENSOR_BYTES)
    dice = random.Random(seed)
    with path.open("wb") as file:
        file.write(gguf_header(n, TENSOR_BYTES))
        for _ in range(n):
            file.write(dice.randbytes(TENSOR_BYTES))
    return path


def given() -> Path:
    path = Path(os.environ.get("TIGHTWAD_TEST_F32", ""))
    if not path.is_file():
        raise SwarmLabError("TIGHTWAD_TEST_F32 must name a model that is there; scripts/bench sets it, or use --size")
    return path


def gguf_header(n: int, tensor_bytes: int) -> bytes:
    """Of `n` tensors of F32, one after the other; padded to where the first begins."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, n, 1)
    head += text("general.architecture") + struct.pack("<I", 8) + text("llama")
    for i in range(n):
        head += text(f"blk.{i}.w") + struct.pack("<IQIQ", 1, tensor_bytes // 4, 0, i * tensor_bytes)
    return head + bytes(-len(head) % 32)
