"""What the endpoint needs to know of everything else; the agent provides it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import trio

from tightwad_agent.ids import NodeId
from tightwad_agent.proxy.metrics import MetricsView
from tightwad_agent.proxy.openai import ModelEntry
from tightwad_agent.proxy.ports import Generator

Progress = Callable[[dict[str, Any]], None]
"""Told by a command how far it is; never blocks. JSON-plain values."""

Command = Callable[[dict[str, Any], Progress], Awaitable[Any]]
"""One command of the command line: parameters in, a JSON-plain result out, or a `TightwadError`. The command is
cancelled when the one who gave it leaves."""


@dataclass(frozen=True, slots=True)
class Local:
    """This node runs the server: 127.0.0.1, `port`. `slots`: requests that it works on at once."""

    port: int
    slots: int = 4


@dataclass(frozen=True, slots=True)
class Own:
    """This node runs the verifier."""

    generator: Generator


@dataclass(frozen=True, slots=True)
class Remote:
    """Another node does."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Nobody does, now. `state` is shown to the client (`state`, `model`, `progress`, ...).

    `hold`: it is expected back in moments (an election, a restart of the pool), so requests wait for it a while
    instead of being refused at once.
    """

    message: str
    state: Mapping[str, Any] = field(default_factory=dict)
    retry_after_s: int = 2
    hold: bool = False


Route = Local | Own | Remote | Unavailable


class Cluster(Protocol):
    """The endpoint's view of the agent. All but `open_stream` answer at once, from memory."""

    def status(self) -> dict[str, Any]:
        """What `GET /v1/tightwad/status` shows."""
        ...

    def peers(self) -> list[dict[str, Any]]:
        """What `GET /v1/tightwad/peers` shows."""
        ...

    def models(self) -> Sequence[ModelEntry]:
        """The catalogue; at most one entry is `served`."""
        ...

    def route(self) -> Route:
        """Where a request goes now."""
        ...

    def metrics(self) -> MetricsView:
        """What `GET /metrics` shows."""
        ...

    def alive(self, node: NodeId, /) -> bool:
        """False once `node` is known to be dead: what was forwarded to it is then given up."""
        ...

    def membership(self) -> Hashable:
        """Another value once a machine has died or come, or another coordinates."""
        ...

    async def open_stream(self, node: NodeId, service: str, args: dict[str, Any], /) -> trio.abc.Stream:
        """As `streams.OpenStream`."""
        ...

    def key_holder(self, key: bytes, /) -> str:
        """The name of an API key that is in force; empty for any other bytes."""
        ...

    def request_started(self) -> AbstractContextManager[None]:
        """Entered for as long as one request runs against this node's llama-server or verifier."""
        ...

    @property
    def commands(self) -> Mapping[str, Command]:
        """The commands that the command line may give, by name."""
        ...
