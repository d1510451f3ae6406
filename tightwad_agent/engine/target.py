"""What is to be served, with what, and what is told about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from tightwad_agent.engine.argv import N_SLOTS
from tightwad_agent.engine.commands import Probe
from tightwad_agent.engine.frozen import FROZEN_S
from tightwad_agent.engine.plan import Plan
from tightwad_agent.engine.process import Spawner
from tightwad_agent.engine.verifying import VerifierClient
from tightwad_agent.engine.weights_codec import Weights
from tightwad_agent.ids import Epoch, ModelId, NodeId
from tightwad_agent.streams import Call, OpenStream


class ServedBy(StrEnum):
    """The program that computes the answers."""

    VERIFIER = "verifier"
    LLAMA_SERVER = "llama-server"

    @property
    def words(self) -> str:
        """As the beginning of a sentence takes it."""
        return "the verifier" if self is ServedBy.VERIFIER else "llama-server"


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """What to serve: the plan, and where the files lie on this machine. `alias` is the model's name in answers.

    Only llama-server loads the `draft`: those of the verifier come from elsewhere. `slots`: requests at once. Where the
    verifier cannot drive this engine, llama-server serves after all, and the pool's state says why.
    """

    model: Path
    draft: Path | None
    plan: Plan
    epoch: Epoch
    alias: str = ""
    served_by: ServedBy = ServedBy.LLAMA_SERVER
    slots: int = N_SLOTS


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a target went down. `node`: the machine it is about, if one. `excluded`: that machine (without one: this
    plan) does not fit, and the same plan must not be tried again. `crash`: the fault of the program that served, which
    counts towards giving up. `from_outside`: no request can have caused it."""

    node: NodeId | None
    reason: str
    excluded: bool = False
    crash: bool = False
    from_outside: bool = False

    @property
    def words(self) -> str:
        """The reason, with the machine it is about."""
        return self.reason if self.node is None else f"{self.node.short}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLimits:
    """Seconds. Loading may take `load_s` and one second more for each `load_bytes_per_s` of the files; a program that
    was stopped (SIGSTOP) for `frozen_s` is lost."""

    start_worker_s: float = 25.0
    hello_s: float = 10.0
    stop_worker_s: float = 5.0
    load_s: float = 60.0
    load_bytes_per_s: float = 4e6
    grace_s: float = 2.0
    frozen_s: float = FROZEN_S


@dataclass(kw_only=True)
class Tools:
    """What an attempt works with. `verifier`: the verifier's command line, given the number of its file descriptor.
    `weights`: what the file of a model holds, told in a thread; raises a `TightwadError` or an `OSError`."""

    spawner: Spawner
    probe: Probe
    call: Call
    open_stream: OpenStream
    verifier: Callable[[int], Sequence[str]]
    weights: Callable[[ModelId], Weights | None] = lambda _model: None
    threads: int = 0
    stall_s: float = 60.0
    in_flight: Callable[[], int] | None = None
    limits: PoolLimits = field(default_factory=PoolLimits)


class Report(Protocol):
    """Whoever is told how far an attempt is."""

    def going(self, loss: Loss) -> None:
        """It is lost, and ends."""
        ...

    def starting(self, text: str) -> None: ...

    def fell_back(self, reason: str) -> None:
        """llama-server serves instead of the verifier."""
        ...

    def loading(self, percent: int | None) -> None: ...

    def ready(self, port: int | None, verifier: VerifierClient | None) -> None:
        """Exactly one of the two is given."""
        ...
