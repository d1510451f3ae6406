"""One question to another node and its answer, on a stream of its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import trio

from tightwad_agent.errors import PeerRefused, ProtocolError, RemoteError, StaleEpoch, TightwadError
from tightwad_agent.ids import NodeId
from tightwad_agent.streams import Framed, MethodHandler, OpenStream, close_quietly
from tightwad_agent.wire.codec import pack, unpack
from tightwad_agent.wire.control import CALL, MAX_CALL, MAX_CONTROL, CallFailed, CallReply, CallRequest

log = logging.getLogger(__name__)

SERVICE = "call"
FAULT = "the other node hit a fault of its own; see its log"
REQUEST_DEADLINE_S = 10.0
ANSWER_DEADLINE_S = 120.0
"""The longest answer is a worker that starts; callers set shorter deadlines of their own."""


async def call(open_stream: OpenStream, node: NodeId, method: str, params: dict[str, Any]) -> dict[str, Any]:
    """Asks `node`. Raises `RemoteError` (its handler's error, by code), `StaleEpoch`, or another `PeerError`."""
    stream = await open_stream(node, SERVICE, {"method": method})
    try:
        framed = Framed(stream, CALL, max_header=MAX_CONTROL)
        await framed.send(CallRequest(pack(params)), deadline_s=REQUEST_DEADLINE_S)
        answer, _ = await framed.receive(deadline_s=ANSWER_DEADLINE_S)
    finally:
        await close_quietly(stream)
    if isinstance(answer, CallFailed):
        if answer.code == StaleEpoch.code:
            raise StaleEpoch(answer.message, hint=answer.hint)
        raise RemoteError(answer.message, code=answer.code, hint=answer.hint)
    if not isinstance(answer, CallReply):
        raise ProtocolError(f"call: expected a reply, got {type(answer).__name__}")
    return _plain_map(answer.result)


async def answer(
    methods: Mapping[str, MethodHandler], peer: NodeId, stream: trio.abc.Stream, args: dict[str, Any]
) -> None:
    """Serves one call; a `TightwadError` of the handler goes back to the caller, anything else is our fault."""
    framed = Framed(stream, CALL, max_header=MAX_CONTROL)
    request: CallRequest = await framed.expect(CallRequest, deadline_s=REQUEST_DEADLINE_S)
    name = args.get("method")
    try:
        handler = methods.get(name) if isinstance(name, str) else None
        if handler is None:
            raise PeerRefused(f"no method {str(name)[:40]!r} here")  # noqa: TRY301 - answered like any other error
        reply = CallReply(_packed(await handler(peer, _plain_map(request.params))))
    except TightwadError as exc:
        await framed.send(CallFailed(exc.code, exc.message[:4000], exc.hint[:2000]), deadline_s=REQUEST_DEADLINE_S)
    except Exception:
        log.exception("a fault of this program failed the call %r", name)
        await framed.send(CallFailed("fault", FAULT), deadline_s=REQUEST_DEADLINE_S)
    else:
        await framed.send(reply, deadline_s=REQUEST_DEADLINE_S)


def _packed(result: dict[str, Any]) -> bytes:
    data = pack(result)
    if len(data) > MAX_CALL:
        raise ValueError(f"a result of {len(data)} bytes, at most {MAX_CALL} can be sent")
    return data


def _plain_map(data: bytes) -> dict[str, Any]:
    plain = unpack(data)
    if not isinstance(plain, dict):
        raise ProtocolError("call: parameters and results are maps")
    return plain
