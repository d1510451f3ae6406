"""How the command line talks to the running agent on this machine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from tightwad_agent.errors import AgentNotRunning, PeerError, ProtocolError, RemoteError, TightwadError
from tightwad_agent.proxy.admin import NDJSON, PREFIX
from tightwad_agent.proxy.client import Answer, ask, connect_loopback
from tightwad_agent.proxy.openai import dump
from tightwad_agent.streams import close_quietly

MAX_LINE_BYTES = 64 << 20
"""One result: the catalogue and all peers of a large cluster stay far below."""
HEAD_S = 10.0


async def admin_call(
    port: int,
    key: str,
    command: str,
    params: dict[str, Any] | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
    *,
    deadline_s: float = math.inf,
) -> Any:
    """The result of `command` on the agent whose endpoint has `port` on this machine; `key` is its admin key.

    `on_progress` is told of each step. `deadline_s` is for the longest silence. Raises `AgentNotRunning`, or the
    command's own error as the class it was there.
    """
    try:
        stream = await connect_loopback(port)
    except PeerError:
        raise AgentNotRunning(
            f"no agent answers on port {port} of this machine", hint="start one: tightwad-agent up"
        ) from None
    headers = [
        (b"authorization", b"Bearer " + key.encode()),
        (b"accept", NDJSON),
        (b"content-type", b"application/json"),
    ]
    try:
        answer = await ask(
            stream, "POST", PREFIX + command, headers, dump(params or {}), host=f"127.0.0.1:{port}", deadline_s=HEAD_S
        )
        return await _outcome(answer, on_progress or (lambda _progress: None), deadline_s)
    except ProtocolError:
        raise AgentNotRunning(f"the program on port {port} is no tightwad-agent", hint=_OTHER_PORT) from None
    except PeerError as exc:
        if isinstance(exc, _Remote):
            raise exc.error from None
        raise AgentNotRunning(f"the agent stopped while it carried out `{command}`") from None
    finally:
        await close_quietly(stream)


_OTHER_PORT = "give the agent's own: --endpoint-port PORT"


class _Remote(PeerError):
    """Carries an error of the command past the handlers of errors on the way to it."""

    def __init__(self, error: TightwadError) -> None:
        super().__init__(error.message)
        self.error = error


async def _outcome(answer: Answer, on_progress: Callable[[dict[str, Any]], None], deadline_s: float) -> Any:
    buffer = bytearray()
    while data := await answer.receive(deadline_s=deadline_s):
        buffer += data
        if len(buffer) > MAX_LINE_BYTES:
            raise ProtocolError("an answer without end")
        *lines, rest = buffer.split(b"\n") if b"\n" in data else [buffer]
        for line in lines:
            if (end := _line(bytes(line), on_progress)) is not None:
                return end["result"]
        buffer = rest
    if buffer and (end := _line(bytes(buffer), on_progress)) is not None:
        return end["result"]
    raise ProtocolError("no result came")


def _line(line: bytes, on_progress: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
    """The line if it is the last one. Raises `_Remote` for an error."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ProtocolError("not JSON") from None
    if not isinstance(value, dict):
        raise ProtocolError("not an answer of an agent")
    if isinstance(progress := value.get("progress"), dict):
        on_progress(progress)
        return None
    if isinstance(error := value.get("error"), dict):
        raise _Remote(error_of(error))
    if "result" not in value:
        raise ProtocolError("not an answer of an agent")
    return value


def error_of(plain: dict[str, Any]) -> TightwadError:
    """The error that `admin.as_plain` described, as its own class where there is one with that code."""
    code, message, hint = (str(plain.get(name, "")) for name in ("code", "message", "hint"))
    kind = _by_code(TightwadError).get(code)
    if kind is None:
        return RemoteError(message, code=code or "remote", hint=hint)
    return kind(message, hint=hint)


def _by_code(root: type[TightwadError]) -> dict[str, type[TightwadError]]:
    """Classes that are made from a message and a hint and have a code of their own."""
    found = {} if root is RemoteError else {root.code: root}
    for child in root.__subclasses__():
        if child.__module__ == TightwadError.__module__:
            found = _by_code(child) | found
    return found
