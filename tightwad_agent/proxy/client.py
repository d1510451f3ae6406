"""An HTTP/1.1 client: h11 on any trio stream, one request each.

Connections are not reused: to llama-server on loopback a new one costs 0.2 ms, and a kept one may have died unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterable

import h11
import trio

from tightwad_agent.errors import PeerGone, PeerUnreachable, ProtocolError
from tightwad_agent.proxy.heads import Headers
from tightwad_agent.streams import READ_SIZE, peer_errors

MAX_HEAD_BYTES = 64 << 10
MAX_INFORMATIONAL = 16
CONNECT_S = 5.0


class Answer:
    """A response whose head has come. `headers` have lower-case names."""

    def __init__(self, status: int, headers: Headers, machine: h11.Connection, stream: trio.abc.ReceiveStream) -> None:
        self.status = status
        self.headers = headers
        self._machine = machine
        self._stream = stream

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)

    async def receive(self, *, deadline_s: float = math.inf) -> bytes:
        """The next part of the body as it came; empty at its end.

        Raises `PeerGone` where the body broke off, `ProtocolError`, or `PeerSilent` after `deadline_s`.
        """
        with peer_errors(deadline_s):
            while True:
                event = await _next_event(self._machine, self._stream)
                if isinstance(event, h11.Data) and event.data:
                    return bytes(event.data)
                if isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                    return b""

    async def read(self, max_bytes: int, *, deadline_s: float = math.inf) -> bytes:
        """The rest of the body whole. Raises as `receive`, and `ProtocolError` beyond `max_bytes`."""
        body = bytearray()
        while data := await self.receive(deadline_s=deadline_s):
            body += data
            if len(body) > max_bytes:
                raise ProtocolError(f"an answer of more than {max_bytes} bytes")
        return bytes(body)


async def ask(
    stream: trio.abc.Stream,
    method: str,
    target: str,
    headers: Headers = (),
    body: bytes | AsyncIterable[bytes] = b"",
    *,
    host: str = "localhost",
    deadline_s: float = math.inf,
) -> Answer:
    """Sends one request and waits for the head of its answer. The caller closes `stream`.

    `headers` must not frame the body: that is done here (a length for bytes, chunks otherwise). `deadline_s` is for
    request and head together. Raises `PeerGone`, `PeerSilent` or `ProtocolError`.
    """
    machine = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
    framing: list[tuple[bytes, bytes]] = [(b"host", host.encode()), (b"connection", b"close")]
    if not isinstance(body, bytes):
        framing.append((b"transfer-encoding", b"chunked"))
    elif body or method not in ("GET", "HEAD"):
        framing.append((b"content-length", str(len(body)).encode()))
    head = machine.send(h11.Request(method=method, target=target, headers=[*framing, *headers])) or b""
    with peer_errors(deadline_s):
        try:
            await _send(machine, stream, head, body)
        except trio.BrokenResourceError:
            # it may have answered before it closed: a refusal of the body, for one
            return await _read_head(machine, stream)
        return await _read_head(machine, stream)


async def _send(
    machine: h11.Connection, stream: trio.abc.SendStream, head: bytes, body: bytes | AsyncIterable[bytes]
) -> None:
    if isinstance(body, bytes):
        data = machine.send(h11.Data(data=body)) or b"" if body else b""
        await stream.send_all(head + data + (machine.send(h11.EndOfMessage()) or b""))
        return
    await stream.send_all(head)
    async for part in body:
        if part:
            await stream.send_all(machine.send(h11.Data(data=part)) or b"")
    await stream.send_all(machine.send(h11.EndOfMessage()) or b"")


async def _read_head(machine: h11.Connection, stream: trio.abc.ReceiveStream) -> Answer:
    for _ in range(MAX_INFORMATIONAL):
        event = await _next_event(machine, stream)
        if isinstance(event, h11.Response):
            return Answer(event.status_code, list(event.headers), machine, stream)
        if isinstance(event, h11.ConnectionClosed):
            raise PeerGone("the connection was closed before an answer came")
    raise ProtocolError("no answer among many informational ones")


async def _next_event(machine: h11.Connection, stream: trio.abc.ReceiveStream) -> h11.Event:
    ended = False
    while True:
        try:
            event = machine.next_event()
        except h11.RemoteProtocolError as exc:
            if ended:
                raise PeerGone("the connection ended inside an answer") from None
            raise ProtocolError(f"not an HTTP answer: {str(exc)[:200]}") from None
        if event is h11.NEED_DATA:
            data = await stream.receive_some(READ_SIZE)
            ended = not data
            machine.receive_data(bytes(data))
            continue
        if not isinstance(event, h11.Event):  # PAUSED: the peer wants to switch protocols
            raise ProtocolError("not an HTTP answer: it switches protocols")
        return event


async def connect_loopback(port: int, *, deadline_s: float = CONNECT_S) -> trio.SocketStream:
    """A connection to 127.0.0.1. Raises `PeerUnreachable` or `PeerSilent`."""
    sock = trio.socket.socket()
    try:
        with peer_errors(deadline_s):
            await sock.connect(("127.0.0.1", port))
        return trio.SocketStream(sock)
    except OSError as exc:
        sock.close()
        raise PeerUnreachable(f"nothing answers on 127.0.0.1 port {port}: {exc.strerror or exc}") from None
    except BaseException:
        sock.close()
        raise
