"""Length-prefixed frames: a msgpack header, and payload bytes that msgpack never touches.

    u32 header length | u32 payload length | header | payload        (big endian)

The decoder takes bytes in any cut and gives whole frames; end of file is an input too. Both lengths are checked against
limits before a byte of the body is awaited, so a peer cannot make us hold more than the limits say.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from tightwad_agent.errors import PeerGone, ProtocolError

PREFIX = struct.Struct("!II")

MAX_HEADER = 1 << 20
"""Rows of a full cluster and have-maps of the largest manifests stay well below 1 MiB."""

MAX_PAYLOAD = 64 << 20
"""The largest piece a manifest may hold."""


class Frame(NamedTuple):
    """One whole frame as it came."""

    header: bytes
    payload: bytes


def encode(header: bytes, payload: bytes | memoryview = b"") -> bytes:
    """The bytes of one frame."""
    return PREFIX.pack(len(header), len(payload)) + header + payload


class FrameDecoder:
    """Bytes in, frames out.

    After a `ProtocolError` the decoder is done: the stream has no frame boundary left to find.
    """

    def __init__(self, max_header: int = MAX_HEADER, max_payload: int = 0) -> None:
        self._max_header = max_header
        self._max_payload = max_payload
        self._buffer = bytearray()

    @property
    def buffered(self) -> bytes:
        """What came after the last whole frame."""
        return bytes(self._buffer)

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """All frames that `data` completes. Raises `ProtocolError` at a length beyond the limits."""
        self._buffer += data
        frames = []
        at = 0
        while (frame := self._next(at)) is not None:
            frames.append(frame)
            at += PREFIX.size + len(frame.header) + len(frame.payload)
        del self._buffer[:at]
        return frames

    def feed_one(self, data: bytes | bytearray | memoryview) -> Frame | None:
        """The next frame, if it is complete; later bytes stay in `buffered`."""
        self._buffer += data
        frame = self._next(0)
        if frame is not None:
            del self._buffer[: PREFIX.size + len(frame.header) + len(frame.payload)]
        return frame

    @property
    def missing(self) -> int:
        """Bytes that the frame that has begun still lacks; 0 if that is not known."""
        if len(self._buffer) < PREFIX.size:
            return 0
        n_header, n_payload = PREFIX.unpack_from(self._buffer)
        return int(PREFIX.size + n_header + n_payload - len(self._buffer))

    def eof(self) -> None:
        """The stream ended. Raises `PeerGone` if it ended inside a frame."""
        if self._buffer:
            raise PeerGone(f"the connection ended inside a frame ({len(self._buffer)} bytes of it came)")

    def _next(self, at: int) -> Frame | None:
        """The frame that begins at byte `at`, if it is complete."""
        begin = at + PREFIX.size
        if len(self._buffer) < begin:
            return None
        n_header, n_payload = _lengths(self._buffer, at, self._max_header, self._max_payload)
        end = begin + n_header + n_payload
        if len(self._buffer) < end:
            return None
        with memoryview(self._buffer) as view:
            return Frame(bytes(view[begin : begin + n_header]), bytes(view[begin + n_header : end]))


class Begun(NamedTuple):
    """The header of a frame, and how many bytes of payload follow it."""

    header: bytes
    n_payload: int


class StreamingDecoder:
    """As `FrameDecoder`, but payloads are handed on as they come, without a copy."""

    def __init__(self, max_header: int = MAX_HEADER, max_payload: int = 0) -> None:
        self._max_header = max_header
        self._max_payload = max_payload
        self._head = bytearray()
        """Prefix and header of the frame that has begun, as far as they came."""
        self._n_head = PREFIX.size
        self._n_payload = 0
        self.left = 0
        """Bytes of the payload that has begun that have not come."""

    def feed(self, data: memoryview) -> Iterator[Begun | memoryview]:
        """For each frame its `Begun`, then its payload in parts of `data`. Raises `ProtocolError` as `FrameDecoder`."""
        while data:
            if self.left:
                part, data = data[: self.left], data[self.left :]
                self.left -= len(part)
                yield part
                continue
            n = self._n_head - len(self._head)
            self._head += data[:n]
            data = data[n:]
            if len(self._head) == self._n_head == PREFIX.size:
                n_header, self._n_payload = _lengths(self._head, 0, self._max_header, self._max_payload)
                self._n_head += n_header
            if len(self._head) == self._n_head:
                yield self._begin()

    def _begin(self) -> Begun:
        begun = Begun(bytes(self._head[PREFIX.size :]), self._n_payload)
        self._head.clear()
        self._n_head, self.left = PREFIX.size, self._n_payload
        return begun

    @property
    def missing(self) -> int:
        """Bytes that the frame that has begun still lacks; 0 if that is not known."""
        if len(self._head) < PREFIX.size:
            return self.left
        return self._n_head - len(self._head) + self._n_payload

    def eof(self) -> None:
        """The stream ended. Raises `PeerGone` if it ended inside a frame."""
        if self._head or self.left:
            raise PeerGone("the connection ended inside a frame")


def _lengths(buffer: bytearray, at: int, max_header: int, max_payload: int) -> tuple[int, int]:
    """Of header and payload of the frame that begins at byte `at`. Raises `ProtocolError` beyond the limits."""
    n_header, n_payload = PREFIX.unpack_from(buffer, at)
    if n_header > max_header or n_payload > max_payload:
        raise ProtocolError(f"frame of {n_header} + {n_payload} bytes, at most {max_header} + {max_payload} are taken")
    return n_header, n_payload
