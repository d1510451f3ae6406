"""Heads of requests: where one ends, and which are refused before anybody acts on them.

h11 frames messages; it is more lenient than a server with another one behind it should be. What two readers could read
in two ways is refused here: bare line feeds, folded lines, two ways of giving a length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import h11

from tightwad_agent.errors import UsageError
from tightwad_agent.ids import NodeId

Headers = Sequence[tuple[bytes, bytes]]
"""Names in lower case."""

MAX_HEADERS = 100
MAX_REQUEST_LINE = 8 << 10


class Peer(NamedTuple):
    """Who asks: an IP literal from the socket, or the node whose mesh stream it is."""

    address: str
    node: NodeId | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """A request's head. `target` is as sent (path and query)."""

    method: str
    target: str
    headers: Headers
    peer: Peer

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def header(self, name: bytes) -> bytes | None:
        """The first header of that (lower-case) name."""
        return next((value for key, value in self.headers if key == name), None)


class BadRequest(UsageError):
    """Bytes that are no acceptable HTTP request; `http_status` says in which way."""

    code = "bad_request"

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.http_status = status


class MethodNotAllowed(UsageError):
    """The path is there, the method is not."""

    code = "method_not_allowed"
    http_status = 405

    def __init__(self, method: str, allowed: Sequence[str]) -> None:
        super().__init__(f"{method[:20]} is not for this path; {', '.join(allowed)} is")
        self.allowed = ", ".join(allowed).encode()


class HeadScanner:
    """Finds the end of one request's head while it arrives; each byte is looked at once."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._scanned = 0
        self._n_lines = 0

    def feed(self, buffer: bytes | bytearray) -> int | None:
        """Where the head at the buffer's beginning ends (after the empty line), `None` while that has not come.

        `buffer` is what has come so far, longer with each call. Raises `BadRequest` for what two readers could read
        in two ways (bare CR or LF, folded lines, control bytes at the start), and for more than a head may have.
        """
        if buffer[:1] and buffer[0] <= 0x20:
            raise BadRequest("that is not HTTP")
        begin = max(0, self._scanned - 3)
        at = buffer.find(b"\r\n\r\n", begin)
        end = len(buffer) if at < 0 else at + 4
        self._check_size(buffer, end)
        if begin and buffer[begin] == 0x0A:
            begin += 1  # its CR was seen before
        self._check_lines(bytes(buffer[begin:end]))
        self._n_lines += buffer.count(b"\r\n", max(0, self._scanned - 1), end)
        if self._n_lines > MAX_HEADERS + 2:
            raise BadRequest(f"the request has more than {MAX_HEADERS} headers", 431)
        self._scanned = end
        return None if at < 0 else end

    def _check_size(self, buffer: bytes | bytearray, end: int) -> None:
        if end > MAX_REQUEST_LINE and buffer.find(b"\r\n", 0, MAX_REQUEST_LINE) < 0:
            raise BadRequest(f"the request's first line is longer than {MAX_REQUEST_LINE >> 10} KiB", 414)
        if end > self._max_bytes:
            raise BadRequest(
                f"the request's head is larger than {self._max_bytes >> 10} KiB; `max_head_bytes` raises the limit", 431
            )

    @staticmethod
    def _check_lines(part: bytes) -> None:
        rest = part.replace(b"\r\n", b"")
        if b"\n" in rest or b"\r" in rest[: -1 if part.endswith(b"\r") else None]:
            raise BadRequest("lines of a request must end with CR LF")
        if b"\n " in part or b"\n\t" in part:
            raise BadRequest("folded header lines are not taken")


def head_end(buffer: bytes | bytearray, max_bytes: int) -> int | None:
    """`HeadScanner.feed` for a head that came at once."""
    return HeadScanner(max_bytes).feed(buffer)


def check_framing(request: h11.Request) -> None:
    """Refuses heads whose body two readers could end in two places. Raises `BadRequest`."""
    names = [name for name, _ in request.headers]
    if request.http_version not in (b"1.0", b"1.1"):
        raise BadRequest("only HTTP/1.0 and HTTP/1.1 are spoken here", 505)
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version == b"1.0"):
        raise BadRequest("Content-Length and Transfer-Encoding contradict each other")
    if not request.target.startswith(b"/"):
        raise BadRequest("the request target must be a path")
    expect = [value.lower() for name, value in request.headers if name == b"expect"]
    if expect and expect != [b"100-continue"]:
        raise BadRequest("only `Expect: 100-continue` is understood", 417)


def has_body(request: h11.Request) -> bool:
    """Whether a body follows the head."""
    return any(n == b"transfer-encoding" or (n == b"content-length" and int(v)) for n, v in request.headers)
