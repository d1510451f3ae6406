"""`GET /metrics`: what this node counts, in the text form that Prometheus reads (`families.page`).

Counters run from the start of the agent. Only the node that coordinates counts rounds and drafts: add up over nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tightwad_agent.proxy.tally import Tally
from tightwad_agent.proxy.usage import Used

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class WorkerTraffic:
    """Bytes between llama.cpp on this node and one worker, up towards the worker."""

    name: str
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsView:
    """What is to be shown, at one moment. `engine` and `model` are empty where nothing is served; `coordinating`:
    this node serves for the cluster. `peers` and `transfers` count by state."""

    version: str
    llama_cpp: str
    tally: Tally = field(default_factory=Tally)
    engine: str = ""
    model: str = ""
    is_ready: bool = False
    coordinating: bool = False
    in_flight: int = 0
    pool_restarts: int = 0
    workers: Sequence[WorkerTraffic] = ()
    peers: Mapping[str, int] = field(default_factory=dict)
    transfers: Mapping[str, int] = field(default_factory=dict)
    keys: Mapping[str, Used] = field(default_factory=dict)
