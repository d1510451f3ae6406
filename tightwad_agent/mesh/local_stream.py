"""Streams to this very node: callers need not know where a service runs, and nothing leaves the process."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any

import trio

from tightwad_agent.errors import PeerRefused, TightwadError
from tightwad_agent.ids import NodeId
from tightwad_agent.streams import StreamHandler, close_quietly

log = logging.getLogger(__name__)


class LocalStreams:
    """`start` starts a task of the node `me`, whose `services` these are."""

    def __init__(self, me: NodeId, services: Mapping[str, StreamHandler], start: Callable[..., None]) -> None:
        self._me = me
        self._services = services
        self._start = start

    def open(self, service: str, args: dict[str, Any]) -> trio.abc.Stream:
        """Raises `PeerRefused` if there is no such service."""
        handler = self._services.get(service)
        if handler is None:
            raise PeerRefused(f"no service {service!r} here")
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        mine = trio.SocketStream(trio.socket.from_stdlib_socket(near))
        theirs = trio.SocketStream(trio.socket.from_stdlib_socket(far))
        self._start(self._serve, handler, theirs, args)
        return mine

    async def _serve(self, handler: StreamHandler, stream: trio.abc.Stream, args: dict[str, Any]) -> None:
        try:
            await handler(self._me, stream, args)
        except* (TightwadError, trio.BrokenResourceError, trio.ClosedResourceError) as group:
            log.debug("local stream closed: %s", group.exceptions[0])
        finally:
            await close_quietly(stream)
