"""What a coordinator says to a worker and to a drafter, and the checks of what came from a peer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

from tightwad_agent.errors import ProtocolError
from tightwad_agent.ids import Epoch, ModelId
from tightwad_agent.wire.codec import Max, Mismatch, from_plain
from tightwad_agent.wire.verify import MAX_TOKENS

START = "worker.start"
STOP = "worker.stop"
RPC = "rpc"
GRAPHS = "graphs"
"""In the answer to `START`: the graph codec that the worker understands; in the arguments of `RPC`: what is spoken."""
WEIGHTS, MODEL = "weights", "model"
"""The same for weights that the worker has in its own copy of the model, and which model that is."""
START_DRAFTER = "draft.start"
STOP_DRAFTER = "draft.stop"
DRAFT = "draft"
MAX_DEVICES_PER_WORKER = 16
MIN_DRAFT_CONTEXT = 64
MAX_DRAFT_CONTEXT = MAX_TOKENS
MAX_DRAFT_SLOTS = 16

T = TypeVar("T")
_Names = tuple[Annotated[str, Max(64)], ...]


class Probe(Protocol):
    """HELLO to the idle RPC server behind a loopback port: its protocol version. Raises a `TightwadError`."""

    async def __call__(self, port: int, *, deadline_s: float) -> tuple[int, int, int]: ...


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Run a worker on these devices. `run` names one attempt of the coordinator: a start with another epoch, other
    devices or another run gets a fresh process, the same start twice gets the same one. `model`: what it will hold a
    part of; empty where the coordinator does not say."""

    epoch: Epoch
    devices: tuple[str, ...]
    run: int = 0
    model: str = ""

    def to_params(self) -> dict[str, Any]:
        epoch = plain_epoch(self.epoch)
        return {"epoch": epoch, "devices": list(self.devices), "run": self.run, MODEL: self.model}

    @classmethod
    def of_params(cls, params: dict[str, Any]) -> StartWorker:
        devices = _field(params, "devices", _Names)
        if not 0 < len(devices) <= MAX_DEVICES_PER_WORKER:
            raise ProtocolError(f"{START}: {len(devices)} devices, 1 to {MAX_DEVICES_PER_WORKER} are taken")
        return cls(epoch_of(params), devices, _field(params, "run", int, 0), model_of(params))


@dataclass(frozen=True, slots=True)
class Started:
    """The worker listens, and said HELLO with this protocol; `digest` is that of its engine's files. `graphs`: the
    version of `graph_codec` that its stream understands, `weights` that of `weights_codec`; 0 for none."""

    protocol: str
    digest: str
    graphs: int = 0
    weights: int = 0

    def to_plain(self) -> dict[str, Any]:
        return {"protocol": self.protocol, "digest": self.digest, GRAPHS: self.graphs, WEIGHTS: self.weights}

    @classmethod
    def of_plain(cls, plain: dict[str, Any]) -> Started:
        graphs, weights = _field(plain, GRAPHS, int, 0), _field(plain, WEIGHTS, int, 0)
        return cls(_field(plain, "protocol", str), _field(plain, "digest", str), graphs, weights)


@dataclass(frozen=True, slots=True)
class StartDrafter:
    """Draft with this model. `context`: tokens that all sessions together can hold, any one of them whole; `slots`:
    sessions that are drafted for at once. `run` as for a worker."""

    epoch: Epoch
    model: ModelId
    context: int
    slots: int
    run: int = 0

    def to_params(self) -> dict[str, Any]:
        return {
            "epoch": plain_epoch(self.epoch),
            "model": str(self.model),
            "context": self.context,
            "slots": self.slots,
            "run": self.run,
        }

    @classmethod
    def of_params(cls, params: dict[str, Any]) -> StartDrafter:
        context, slots = _field(params, "context", int), _field(params, "slots", int)
        if not MIN_DRAFT_CONTEXT <= context <= MAX_DRAFT_CONTEXT:
            raise ProtocolError(f"{START_DRAFTER}: a context of {context} tokens")
        if not 0 < slots <= MAX_DRAFT_SLOTS:
            raise ProtocolError(f"{START_DRAFTER}: {slots} slots, 1 to {MAX_DRAFT_SLOTS} are taken")
        return cls(epoch_of(params), _field(params, "model", ModelId), context, slots, _field(params, "run", int, 0))


@dataclass(frozen=True, slots=True)
class DrafterStarted:
    """The drafter has loaded its model. `context` may be less than was asked for."""

    n_vocab: int
    context: int
    slots: int

    def to_plain(self) -> dict[str, Any]:
        return {"n_vocab": self.n_vocab, "context": self.context, "slots": self.slots}

    @classmethod
    def of_plain(cls, plain: dict[str, Any]) -> DrafterStarted:
        return cls(_field(plain, "n_vocab", int), _field(plain, "context", int), _field(plain, "slots", int))


def plain_epoch(epoch: Epoch) -> list[int | str]:
    """An epoch as parameters carry it: plain, also where a call stays on its own node and is never packed."""
    return [epoch.counter, str(epoch.node)]


def epoch_of(params: dict[str, Any]) -> Epoch:
    """The checked `epoch` of parameters or stream arguments. Raises `ProtocolError`."""
    epoch: Epoch = _field(params, "epoch", Epoch)
    return epoch


def graphs_of(args: dict[str, Any]) -> int:
    """Which graph codec a stream is opened with, 0 for none. Raises `ProtocolError`."""
    graphs: int = _field(args, GRAPHS, int, 0)
    return graphs


def weights_of(args: dict[str, Any]) -> int:
    """Which weights codec a stream is opened with, 0 for none. Raises `ProtocolError`."""
    weights: int = _field(args, WEIGHTS, int, 0)
    return weights


def model_of(args: dict[str, Any]) -> str:
    """The model that weights are of, or empty text. Raises `ProtocolError`."""
    return str(_field(args, MODEL, ModelId)) if args.get(MODEL) else ""


def _field(params: dict[str, Any], key: str, kind: Any, default: Any = None) -> Any:
    try:
        return from_plain(kind, params.get(key, default))
    except Mismatch as exc:
        raise ProtocolError(f"{key}{exc}") from None
