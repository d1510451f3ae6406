"""A loopback port on the coordinator that ends at the worker of another node."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import trio

from tightwad_agent.engine import weights_codec
from tightwad_agent.engine.argv import LOOPBACK
from tightwad_agent.engine.commands import GRAPHS, MODEL, RPC, WEIGHTS, plain_epoch
from tightwad_agent.engine.graph_codec import VERSION, GraphEncoder
from tightwad_agent.engine.weights_codec import Weights, WeightsEncoder
from tightwad_agent.errors import TightwadError
from tightwad_agent.filters import Chunk, Filter
from tightwad_agent.ids import Epoch, NodeId
from tightwad_agent.streams import OpenStream, peer_errors
from tightwad_agent.tunnel import Count, join

log = logging.getLogger(__name__)

CONNECT_S = 10.0


class Forwarder:
    """llama-server opens about 17 connections to a worker, one after the other, and keeps the last one as long as it
    runs. A connection that ends on the far side first therefore means that the worker is lost: `lost` is told at once,
    while llama-server itself would notice at the next request, and abort.

    `graphs`: the version of the graph codec that the worker understands; any but ours, and the engine's bytes go plain.
    `weights`: that of the weights codec, with `file` the one of `model` here.
    """

    def __init__(
        self,
        node: NodeId,
        epoch: Epoch,
        open_stream: OpenStream,
        lost: Callable[[NodeId, str], None],
        *,
        graphs: int = 0,
        weights: int = 0,
        model: str = "",
        file: Weights | None = None,
    ) -> None:
        self.node = node
        self.port = 0
        self.bytes_up = 0
        """Towards the worker, as the engine sent them."""
        self.bytes_saved = 0
        """Of those, bytes that did not have to cross."""
        self.bytes_down = 0
        self.connections = 0
        """Accepted so far."""
        self._epoch = epoch
        self._open_stream = open_stream
        self._lost = lost
        self._encodes = graphs == VERSION
        self._model = model
        self._counting = threading.Lock()
        """Each connection has a thread that counts."""
        self._file = file if file and file.places and weights == weights_codec.VERSION else None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accepts until cancelled."""
        listeners = await trio.open_tcp_listeners(0, host=LOOPBACK)
        self.port = listeners[0].socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._serve, listeners)

    async def _serve(self, local: trio.SocketStream) -> None:
        self.connections += 1
        try:
            with peer_errors(CONNECT_S):
                remote = await self._open_stream(self.node, RPC, self._args())
        except TightwadError as exc:
            self._lost(self.node, f"no connection to its worker: {exc.message}")
            return
        if await join(local, remote, self._up, self._down, to_right=self._requests()):
            self._lost(self.node, "the connection to its worker ended")

    def _args(self) -> dict[str, Any]:
        graphs = {GRAPHS: VERSION} if self._encodes else {}
        weights = {WEIGHTS: weights_codec.VERSION, MODEL: self._model} if self._file else {}
        return {"epoch": plain_epoch(self._epoch)} | graphs | weights

    def _requests(self) -> Filter:
        graphs = GraphEncoder() if self._encodes else None
        return _Requests(graphs, WeightsEncoder(self._file) if self._file else None, self._saved)

    def _saved(self, n_bytes: int) -> None:
        with self._counting:
            self.bytes_saved += n_bytes

    def _up(self, n_bytes: int) -> None:
        with self._counting:
            self.bytes_up += n_bytes

    def _down(self, n_bytes: int) -> None:
        with self._counting:
            self.bytes_down += n_bytes


class _Requests(Filter):
    """Of one connection, from the engine to the worker: made small where the worker's end can make them whole again."""

    def __init__(self, graphs: GraphEncoder | None, weights: WeightsEncoder | None, saved: Count) -> None:
        self._graphs, self._weights, self._saved = graphs, weights, saved
        self._follows = graphs or Filter()
        self.in_bursts = self._follows.in_bursts

    @property
    def missing(self) -> int:
        """See `Filter`; so the others."""
        return self._follows.missing

    @property
    def is_inside(self) -> bool:
        """A message has begun."""
        return self._follows.is_inside

    @property
    def more_follows(self) -> bool:
        """The worker waits for more."""
        return self._follows.more_follows

    def feed(self, data: Chunk) -> list[Chunk]:
        """What the worker's end is sent."""
        made: list[Chunk] = self._graphs.feed(data) if self._graphs else [data]
        if self._weights:
            made = [chunk for part in made for chunk in self._weights.feed(part)]
        self._saved(len(data) - sum(map(len, made)))
        return made
