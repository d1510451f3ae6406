"""What a node says about itself, and what the cluster was told to serve.

A `NodeRow` is written only by its node and spreads to all others over authenticated links: newer `(incarnation,
version)` replaces older. The `ServeRecord` is the one shared record; greater `version` wins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from tightwad_agent.ids import Address, Epoch, ModelId, NodeId, NodeName, SafeName
from tightwad_agent.wire.codec import NATURAL, OMITTED, Max

Natural = Annotated[int, NATURAL]

MAX_MODELS = 512
MAX_DEVICES = 64
MAX_ADDRESSES = 32
MAX_DRAFTERS = 32
MAX_FETCHING = 16


class Role(StrEnum):
    """What a node may do. An authority is a node that also holds the CA key and enrols others. A client uses the
    cluster and looks on; it gives nothing and changes nothing."""

    NODE = "node"
    AUTHORITY = "authority"
    CLIENT = "client"


@dataclass(frozen=True, slots=True)
class Device:
    """One compute device as the engine names it; memory in bytes."""

    name: Annotated[str, Max(64)]
    description: Annotated[str, Max(200)]
    memory_total: Natural
    memory_free: Natural


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The llama.cpp build on a node: `build` such as `b11434`, `digest` SHA-256 (hex) over its files,
    `protocol` the RPC version such as `7.0.0`. All empty where there is none; `problem` says why."""

    build: Annotated[str, Max(64)] = ""
    digest: Annotated[str, Max(64)] = ""
    protocol: Annotated[str, Max(16)] = ""
    problem: Annotated[str, Max(500)] = ""

    @property
    def usable(self) -> bool:
        return bool(self.build) and not self.problem


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a machine is: sizes in bytes, `platform` such as `linux-x86_64`. `held`: what its worker holds of the
    memory that is not free; the next start of a worker frees it."""

    platform: Annotated[str, Max(64)] = ""
    cpu: Annotated[str, Max(200)] = ""
    n_cores: Natural = 0
    memory_total: Natural = 0
    memory_free: Natural = 0
    disk_free: Natural = 0
    devices: Annotated[tuple[Device, ...], Max(MAX_DEVICES)] = ()
    engine: EngineInfo = field(default_factory=EngineInfo)
    held: Natural = field(default=0, metadata=OMITTED)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What placement and draft choice need to know of a GGUF; zeros and empty text where it is no GGUF.

    `vocab` is a hash (16 hex characters or more) over tokenizer kind, tokens and special ids: equal means a draft fits.
    `kv_bytes_per_token` is for an f16 cache over all layers.
    """

    architecture: Annotated[str, Max(64)] = ""
    quantisation: Annotated[str, Max(32)] = ""
    n_params: Natural = 0
    n_layers: Natural = 0
    context_train: Natural = 0
    kv_bytes_per_token: Natural = 0
    vocab: Annotated[str, Max(64)] = ""


@dataclass(frozen=True, slots=True)
class HeldModel:
    """One model on one node: `have` of `size` bytes are here and checked.

    `source` says where it was added from without telling it: SHA-256 (hex) of the source, then that of the version the
    source had, 128 characters together; empty for files that were shared from a path or came from other nodes.
    """

    model: ModelId
    name: SafeName
    size: Natural
    have: Natural
    facts: ModelFacts = field(default_factory=ModelFacts)
    source: Annotated[str, Max(128)] = ""

    @property
    def complete(self) -> bool:
        return self.have >= self.size


@dataclass(frozen=True, slots=True)
class Fetching:
    """A source that a node downloads, or waits for another node to download.

    `digest` is SHA-256 (hex) of the source; the address itself stays on the node. `since` is Unix seconds, raised above
    those that others had announced before. Bytes; `total` 0: not known.
    """

    digest: Annotated[str, Max(64)]
    since: Natural
    done: Natural = 0
    total: Natural = 0


@dataclass(frozen=True, slots=True)
class NodeRow:
    """A node's own description of itself.

    `joined_at` is Unix seconds of enrolment (seniority). `eligible`: may become coordinator. `klass`: coarse rank of
    the machine, higher is stronger. `note`: what the node is busy with, for people.
    """

    node: NodeId
    name: NodeName
    role: Role
    incarnation: Natural
    version: Natural
    joined_at: Natural
    eligible: bool
    klass: Natural
    endpoint_port: Natural
    addresses: Annotated[tuple[Address, ...], Max(MAX_ADDRESSES)] = ()
    capabilities: Capabilities = field(default_factory=Capabilities)
    models: Annotated[tuple[HeldModel, ...], Max(MAX_MODELS)] = ()
    note: Annotated[str, Max(200)] = ""
    fetching: Annotated[tuple[Fetching, ...], Max(MAX_FETCHING)] = ()

    @property
    def stamp(self) -> tuple[int, int]:
        return (self.incarnation, self.version)


class Want(StrEnum):
    """Who decided what to serve."""

    AUTO = "auto"  # the coordinator chose; it may choose anew
    PINNED = "pinned"  # a person said `serve`
    NONE = "none"  # a person said `stop`


@dataclass(frozen=True, slots=True)
class ServeRecord:
    """What the cluster should serve. `context` 0: the model's own; `workers` -1: the planner decides.

    `draft`: `auto`, `off`, or a model id. `version` is (epoch counter, edit counter, node): greater wins. `engine`:
    `auto`, `verifier` or `llama-server`. `drafters`: the only nodes that may draft, any if empty. `max_draft`: most
    draft tokens of a round; 0 leaves it to the cost model, -1 to the coordinator's configuration. `allow_smaller`:
    where the model does not fit, a smaller quantisation of it may be served in the meantime.
    """

    want: Want = Want.AUTO
    model: ModelId | None = None
    draft: Annotated[str, Max(64)] = "auto"
    context: int = 0
    workers: int = -1
    version: tuple[int, int, str] = (0, 0, "")
    engine: Annotated[str, Max(32)] = "auto"
    drafters: Annotated[tuple[NodeId, ...], Max(MAX_DRAFTERS)] = ()
    max_draft: int = -1
    allow_smaller: bool = field(default=False, metadata=OMITTED)


@dataclass(frozen=True, slots=True)
class Stamp:
    """A coordinator claim as heartbeats carry it."""

    epoch: Epoch
    coordinator: NodeId | None
