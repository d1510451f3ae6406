"""Framed, typed conversations over any trio byte stream; foreign exceptions become ours here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import trio

from tightwad_agent.direct import TAKE_SIZE, Direct
from tightwad_agent.errors import PeerGone, PeerSilent, ProtocolError
from tightwad_agent.ids import NodeId
from tightwad_agent.wire.codec import Codec
from tightwad_agent.wire.frames import MAX_HEADER, Frame, FrameDecoder, encode

READ_SIZE = 64 << 10
"""What a message's reader takes at a time; four full TLS records."""

StreamHandler = Callable[[NodeId, trio.abc.Stream, dict[str, Any]], Awaitable[None]]
"""Serves one incoming stream of a service: (authenticated peer, raw stream, arguments). The caller closes it."""

OpenStream = Callable[[NodeId, str, dict[str, Any]], Awaitable[trio.abc.Stream]]
"""Opens a stream to a service of another node; raises a `PeerError`. The one who opened it closes it."""

Call = Callable[[NodeId, str, dict[str, Any]], Awaitable[dict[str, Any]]]
"""One question to another node (or to this one) and its answer; raises a `PeerError`."""

MethodHandler = Callable[[NodeId, dict[str, Any]], Awaitable[dict[str, Any]]]
"""Answers one `Call`: (authenticated peer, parameters). A `TightwadError` it raises reaches the caller by code."""


@contextmanager
def peer_errors(deadline_s: float = math.inf) -> Iterator[None]:
    """Maps what trio raises for a broken stream to `PeerGone`, and for a missed deadline to `PeerSilent`."""
    try:
        with trio.fail_after(deadline_s):
            yield
    except trio.TooSlowError:
        raise PeerSilent(f"no answer within {deadline_s:g} s") from None
    except STREAM_ERRORS as exc:
        raise gone(exc) from None


STREAM_ERRORS = (trio.BrokenResourceError, trio.ClosedResourceError)


def gone(exc: BaseException) -> PeerGone:
    """What one of `STREAM_ERRORS` is for us."""
    return PeerGone(f"the connection broke: {exc.__cause__ or exc}")


class Framed:
    """Messages of one codec over a stream. One task may send while another receives; two senders must not."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        codec: Codec,
        *,
        max_header: int = MAX_HEADER,
        max_payload: int = 0,
        read_size: int = READ_SIZE,
    ) -> None:
        self.stream = stream
        self._read_size = read_size
        self._codec = codec
        self._decoder = FrameDecoder(max_header, max_payload)

    async def send(self, message: object, payload: bytes | memoryview = b"", *, deadline_s: float = math.inf) -> None:
        """Writes one message whole. Raises `PeerGone` or `PeerSilent`."""
        with peer_errors(deadline_s):
            await self.stream.send_all(encode(self._codec.encode(message), payload))

    async def send_together(self, messages: Sequence[object], *, deadline_s: float = math.inf) -> None:
        """Several small ones without payloads, as one write; no checkpoint where the system takes it at once.
        Raises as `send`."""
        data = b"".join([encode(self._codec.encode(message)) for message in messages])
        if not isinstance(self.stream, Direct) or len(data) > TAKE_SIZE:
            with peer_errors(deadline_s):
                await self.stream.send_all(data)
            return
        try:
            sent = self.stream.send_now(data)
        except STREAM_ERRORS as exc:
            raise gone(exc) from None
        if not sent:
            with peer_errors(deadline_s):
                await self.stream.send_rest()

    async def receive(self, *, deadline_s: float = math.inf) -> tuple[Any, bytes]:
        """The next message and its payload. Raises `PeerGone`, `PeerSilent` or `ProtocolError`."""
        frame = self._decoder.feed_one(b"")
        with peer_errors(deadline_s):
            if frame is None and isinstance(self.stream, Direct):
                frame = await self._receive_directly(self.stream)
            while frame is None:
                frame = self._fed(await self.stream.receive_some(self._read_size))
        return self._codec.decode(frame.header), frame.payload

    async def _receive_directly(self, stream: Direct) -> Frame:
        """Without a copy of what came, and a task switch for each part of it."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            stream.expect(self._decoder.missing)
            while (data := stream.take(self._read_size)) is None:
                await stream.readable()
            if (frame := self._fed(data)) is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return frame

    def _fed(self, data: bytes | bytearray | memoryview) -> Frame | None:
        if not data:
            self._decoder.eof()
            raise PeerGone("the connection was closed")
        return self._decoder.feed_one(data)

    async def expect(self, kind: type, *, deadline_s: float = math.inf) -> Any:
        """The next message, which must be a `kind`; anything else is a `ProtocolError`."""
        message, _ = await self.receive(deadline_s=deadline_s)
        if not isinstance(message, kind):
            raise ProtocolError(f"expected {kind.__name__}, got {type(message).__name__}")
        return message

    @property
    def buffered(self) -> bytes:
        """What came behind the last message; for somebody who reads the stream from here on."""
        return self._decoder.buffered

    def detach(self) -> trio.abc.Stream:
        """The raw stream from here on, with what was already read put back in front."""
        rest = self.buffered
        return Prefixed(self.stream, rest) if rest else self.stream


class Prefixed(trio.abc.Stream):
    """A stream whose first bytes were already read by somebody."""

    def __init__(self, stream: trio.abc.Stream, prefix: bytes) -> None:
        self._stream = stream
        self._prefix = prefix

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._prefix:
            await trio.lowlevel.checkpoint()
            cut = len(self._prefix) if max_bytes is None else max_bytes
            data, self._prefix = self._prefix[:cut], self._prefix[cut:]
            return data
        return await self._stream.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


async def close_quietly(stream: trio.abc.AsyncResource) -> None:
    """Closes without a goodbye and without waiting for the peer."""
    with trio.CancelScope(shield=True):
        await trio.aclose_forcefully(stream)


__all__ = [
    "READ_SIZE",
    "STREAM_ERRORS",
    "Call",
    "Frame",
    "Framed",
    "MethodHandler",
    "OpenStream",
    "Prefixed",
    "StreamHandler",
    "close_quietly",
    "gone",
    "peer_errors",
]
