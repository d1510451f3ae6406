"""The one RPC command the agent speaks itself: HELLO, which answers with the protocol version.

    request   u8 command = 14 | u64 length | capabilities of the connection (24 bytes, all zero: plain TCP)
    response  u64 length | u8 major | u8 minor | u8 patch | u8 padding | capabilities (24 bytes)

Integers are little endian: ggml sends them as they lie in memory, and it runs on nothing else. A worker serves one
client at a time, so a probe of a busy worker waits until its deadline: ask before the worker is given to a client.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import trio

from tightwad_agent.errors import EngineMismatch, PeerGone, PeerSilent

COMMAND = 14
N_CAPABILITIES = 24
_REQUEST = struct.Struct(f"<BQ{N_CAPABILITIES}s")
_LENGTH = struct.Struct("<Q")
_RESPONSE = struct.Struct(f"<BBBB{N_CAPABILITIES}s")
RESPONSE_BYTES = _LENGTH.size + _RESPONSE.size


class RpcVersion(NamedTuple):
    """Version of ggml's RPC protocol. A client needs the same major and no older minor at the server."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


def encode_request() -> bytes:
    """HELLO as a client sends it."""
    return _REQUEST.pack(COMMAND, N_CAPABILITIES, bytes(N_CAPABILITIES))


def encode_response(version: tuple[int, int, int]) -> bytes:
    """HELLO as a server answers it."""
    return _LENGTH.pack(_RESPONSE.size) + _RESPONSE.pack(*version, 0, bytes(N_CAPABILITIES))


def decode_response(data: bytes) -> RpcVersion | None:
    """The version, or None as long as bytes are missing. Raises `EngineMismatch` for what is no HELLO."""
    if len(data) >= _LENGTH.size and _LENGTH.unpack_from(data)[0] != _RESPONSE.size:
        raise EngineMismatch("the RPC server answered HELLO with something else", hint="it runs another llama.cpp")
    if len(data) < RESPONSE_BYTES:
        return None
    major, minor, patch, _padding, _capabilities = _RESPONSE.unpack_from(data, _LENGTH.size)
    return RpcVersion(major, minor, patch)


async def ask(stream: trio.abc.Stream, *, deadline_s: float = 5.0) -> RpcVersion:
    """The version of the RPC server behind `stream`, which is of no further use.

    Raises `EngineMismatch`, `PeerGone` (servers older than HELLO hang up) or `PeerSilent`.
    """
    data = b""
    try:
        with trio.fail_after(deadline_s):
            await stream.send_all(encode_request())
            while (version := decode_response(data)) is None:
                more = await stream.receive_some(RESPONSE_BYTES - len(data))
                if not more:
                    raise PeerGone("the RPC server hung up on HELLO")
                data += more
    except trio.TooSlowError:
        raise PeerSilent(f"the RPC server did not answer HELLO within {deadline_s:g} s; it serves one client") from None
    except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        raise PeerGone(f"the connection to the RPC server broke: {exc.__cause__ or exc}") from None
    return version


async def probe(port: int, *, host: str = "127.0.0.1", deadline_s: float = 5.0) -> RpcVersion:
    """The version of the RPC server on a port of this machine. Raises as `ask`; `PeerGone` if nobody listens."""
    try:
        with trio.fail_after(deadline_s):
            stream = await trio.open_tcp_stream(host, port)
    except trio.TooSlowError:
        raise PeerSilent(f"port {port} did not accept within {deadline_s:g} s") from None
    except OSError as exc:
        raise PeerGone(f"nothing listens on port {port}: {exc.strerror or exc}") from None
    async with stream:
        return await ask(stream, deadline_s=deadline_s)
