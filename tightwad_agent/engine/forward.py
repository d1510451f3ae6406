"""A loopback port on the coordinator that ends at the worker of another node."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import trio

from tightwad_agent.engine import weights_codec
from tightwad_agent.engine.argv import LOOPBACK
from tightwad_agent.engine.commands import GRAPHS, MODEL, RPC, WEIGHTS, plain_epoch
from tightwad_agent.engine.graph_codec import VERSION, GraphEncoder
from tightwad_agent.engine.weights_codec import Weights, WeightsEncoder
from tightwad_agent.errors import TightwadError
from tightwad_agent.ids import Epoch, NodeId
from tightwad_agent.streams import Change, Chunk, OpenStream, join, peer_errors

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
        if await join(local, remote, self._up, self._down, self._encoder()):
            self._lost(self.node, "the connection to its worker ended")

    def _args(self) -> dict[str, Any]:
        graphs = {GRAPHS: VERSION} if self._encodes else {}
        weights = {WEIGHTS: weights_codec.VERSION, MODEL: self._model} if self._file else {}
        return {"epoch": plain_epoch(self._epoch)} | graphs | weights

    def _encoder(self) -> Change | None:
        """For one connection."""
        graphs = GraphEncoder() if self._encodes else None
        weights = WeightsEncoder(self._file) if self._file else None
        if graphs is None and weights is None:
            return None

        def change(data: Chunk) -> list[Chunk]:
            made = graphs.feed(data) if graphs else [data]
            if weights:
                made = [made_of for chunk in made for made_of in weights.feed(chunk)]
            self.bytes_saved += len(data) - sum(map(len, made))
            return made

        return change

    def _up(self, n_bytes: int) -> None:
        self.bytes_up += n_bytes

    def _down(self, n_bytes: int) -> None:
        self.bytes_down += n_bytes
