"""The socket to the agent: frames in and out, one reader, one writer, no threads."""

from __future__ import annotations

import select
import socket
from typing import Any

from tightwad_agent.errors import PeerSilent, ProtocolError
from tightwad_agent.wire.frames import FrameDecoder, encode
from tightwad_agent.wire.verify import FROM_VERIFIER, MAX_HEADER, TO_VERIFIER

WRITE_DEADLINE_S = 60.0
_CHUNK = 1 << 18


class Channel:
    """Owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder = FrameDecoder(max_header=MAX_HEADER)

    def read(self, wait_s: float | None) -> list[Any] | None:
        """Messages that are there, or come within `wait_s` (`None`: for ever, until the agent goes away); `None` at the
        end of the stream. Raises `ProtocolError`, and `PeerGone` for an end inside a frame."""
        data = self._receive()
        if data is None and wait_s != 0:
            select.select([self._sock], [], [], wait_s)
            data = self._receive()
        if data is None:
            return []
        if not data:
            self._decoder.eof()
            return None
        return [TO_VERIFIER.decode(_header(frame)) for frame in self._decoder.feed(data)]

    def send(self, *messages: object) -> bool:
        """All in one piece. `False`: the agent is gone. Raises `PeerSilent` if it does not read."""
        left = memoryview(b"".join(encode(FROM_VERIFIER.encode(message)) for message in messages))
        while left:
            try:
                left = left[self._sock.send(left) :]
            except BlockingIOError:
                if not select.select([], [self._sock], [], WRITE_DEADLINE_S)[1]:
                    raise PeerSilent(f"the agent took nothing for {WRITE_DEADLINE_S:.0f} s") from None
            except OSError:
                return False
        return True

    def ended(self) -> bool:
        """Whether the agent has hung up. What it sent before stays to be read."""
        try:
            return self._sock.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        self._sock.close()

    def _receive(self) -> bytes | None:
        try:
            return self._sock.recv(_CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            return b""  # reset: the agent was killed


def _header(frame: Any) -> bytes:
    if frame.payload:
        raise ProtocolError("verifier commands carry no payload")
    return bytes(frame.header)
