"""Talking to the drafter's own llama-server: token ids in, token ids out, over connections that are kept.

Measured with b11434 and a model of 20 ms a token: a request of one token costs 0.8 ms beside the token itself (0.3 ms
more per 1,000 tokens of prompt), on a kept connection as on a new one. A stream costs nothing per token, but ends its
connection; it loses the ids of tokens that end inside a character; and when its client leaves, that is noticed with the
next token, when the one after it has begun: a new branch gave its first token after 2.6 token times instead of 1.7. So
branches are made of short requests, each answered whole.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import trio

from tightwad_agent.engine.argv import LOOPBACK
from tightwad_agent.engine.draft_turn import Made
from tightwad_agent.errors import EngineError
from tightwad_agent.streams import READ_SIZE

MAX_HEAD = 16 << 10
MAX_BODY = 4 << 20
KEPT_S = 4.0
"""llama-server closes a connection that was idle for five seconds."""

_ASKED = (
    b',"return_tokens":true,"cache_prompt":true,"temperature":0,"top_k":1,"samplers":["top_k"],'
    b'"response_fields":["tokens","stop_type","timings/prompt_ms","timings/predicted_ms"]}'
)


class Refused(EngineError):
    """The server lives, and does not do what was asked; the message is its reason."""


class Broken(EngineError):
    """The server is gone, silent, or not what it should be."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the server says of its model. `context`: tokens that one slot can hold."""

    n_vocab: int
    context: int


class DraftServer:
    """The llama-server behind a loopback port of this machine. Several tasks may ask at once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[_Connection] = []

    async def complete(self, prompts: Sequence[bytes], n: int, *, slot: int | None, deadline_s: float) -> list[Made]:
        """Up to `n` tokens for each prompt, greedily, all in the same forward passes. A prompt is its ids as JSON
        numbers between commas. Raises `Refused` or `Broken`."""
        body = b'{"prompt":[%s],"n_predict":%d' % (b",".join(b"[%s]" % prompt for prompt in prompts), n)
        body += (b"" if slot is None else b',"id_slot":%d' % slot) + _ASKED
        status, plain = await self._ask(_post(b"/completion", body), deadline_s)
        if status != 200:
            raise Refused(_reason(status, plain))
        answers = plain if isinstance(plain, list) else [plain]
        if len(answers) != len(prompts):
            raise Broken(f"llama-server answered {len(answers)} of {len(prompts)} prompts")
        return [_made(answer, n) for answer in answers]

    async def healthy(self, deadline_s: float) -> bool:
        """Whether the model is loaded."""
        try:
            status, _ = await self._ask(_get(b"/health"), deadline_s)
        except Broken:
            return False
        return status == 200

    async def facts(self, deadline_s: float) -> Facts:
        """Raises `Broken` for an answer that does not say it."""
        _, plain = await self._ask(_get(b"/v1/models"), deadline_s)
        match plain:
            case {"data": [{"meta": {"n_vocab": int(n_vocab), "n_ctx": int(n_ctx)}}]} if n_vocab > 0 and n_ctx > 0:
                return Facts(n_vocab, n_ctx)
        raise Broken("llama-server does not say how large its vocabulary is")

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _ask(self, request: bytes, deadline_s: float) -> tuple[int, Any]:
        with trio.CancelScope(deadline=trio.current_time() + deadline_s):
            try:
                return await self._exchange(request)
            except OSError as exc:
                raise Broken(f"the connection to llama-server broke: {exc.strerror or exc}") from None
        raise Broken(f"llama-server did not answer within {deadline_s:g} s")

    async def _exchange(self, request: bytes) -> tuple[int, Any]:
        """A kept connection may have been closed in the very moment: then, before any byte came, once again."""
        connection = self._kept()
        if connection is not None:
            try:
                return await self._over(connection, request)
            except (_Closed, ConnectionError):
                pass
        try:
            return await self._over(await _Connection.open(self._port), request)
        except _Closed:
            raise Broken("llama-server closed the connection without an answer") from None

    async def _over(self, connection: _Connection, request: bytes) -> tuple[int, Any]:
        keep = False
        try:
            status, plain, keep = await connection.exchange(request)
        finally:
            if not keep:
                connection.close()
        if keep:
            connection.used_at = trio.current_time()
            self._idle.append(connection)
        return status, plain

    def _kept(self) -> _Connection | None:
        now = trio.current_time()
        while self._idle:
            connection = self._idle.pop()
            if now - connection.used_at < KEPT_S:
                return connection
            connection.close()
        return None


class _Closed(Exception):
    """The server closed a connection before the first byte of an answer."""


class _Connection:
    """One HTTP/1.1 connection with one request at a time, as cpp-httplib answers it. On the plain socket: trio's own
    would go through its scheduler twice as often, which is most of what a token costs here."""

    def __init__(self, sock: socket.socket) -> None:
        self.used_at = 0.0
        self._sock = sock

    @classmethod
    async def open(cls, port: int) -> _Connection:
        with trio.socket.socket() as sock:
            await sock.connect((LOOPBACK, port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain = socket.socket(fileno=sock.detach())
        plain.setblocking(False)
        return cls(plain)

    def close(self) -> None:
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()

    async def exchange(self, request: bytes) -> tuple[int, Any, bool]:
        """Status, body, and whether the connection can be used again. Raises `Broken`, `_Closed` or `OSError`."""
        await self._send(request)
        buffer = bytearray()
        while (end := buffer.find(b"\r\n\r\n")) < 0:
            if len(buffer) > MAX_HEAD:
                raise Broken("llama-server's answer has no end of its headers")
            await self._more(buffer)
        status, length, keep = parse_head(bytes(buffer[:end]))
        end += 4
        while len(buffer) < end + length:
            await self._more(buffer)
        return status, _plain(bytes(buffer[end : end + length]), status), keep and len(buffer) == end + length

    async def _send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._sock.send(rest) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)

    async def _more(self, buffer: bytearray) -> None:
        await trio.lowlevel.wait_readable(self._sock)
        try:
            data = self._sock.recv(READ_SIZE)
        except BlockingIOError:
            return
        if not data:
            if buffer:
                raise Broken("llama-server's answer broke off")
            raise _Closed
        buffer += data


def parse_head(head: bytes) -> tuple[int, int, bool]:
    """Status, length of the body, and whether the connection stays open. Raises `Broken` for anything else."""
    first, *lines = head.lower().split(b"\r\n")
    fields = dict(line.split(b":", 1) for line in lines if b":" in line)
    length = fields.get(b"content-length", b"").strip()
    if not (first.startswith(b"http/1.1 ") and first[9:12].isdigit() and length.isdigit()):
        raise Broken(f"this is no answer of llama-server: {head[:60]!r}")
    if len(length) > 9 or int(length) > MAX_BODY:
        raise Broken(f"llama-server answers with {length[:20].decode()} bytes, at most {MAX_BODY} are taken")
    return int(first[9:12]), int(length), fields.get(b"connection", b"").strip() != b"close"


def _plain(body: bytes, status: int) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        if status == 200:
            raise Broken(f"llama-server's answer is no JSON: {body[:60]!r}") from None
        return None


def _made(plain: Any, n: int) -> Made:
    match plain:
        case {"tokens": list(tokens), "stop_type": str(stop)}:
            if len(tokens) <= n and all(type(token) is int for token in tokens):
                return Made(tokens, stop == "eos", _computed_s(plain))
    raise Broken(f"llama-server's answer is no completion: {repr(plain)[:60]}")


def _computed_s(plain: dict[str, Any]) -> float:
    times = [plain.get("timings/prompt_ms"), plain.get("timings/predicted_ms")]
    return sum(t for t in times if isinstance(t, float | int) and 0 <= t < 1e9) / 1e3


def _reason(status: int, plain: Any) -> str:
    match plain:
        case {"error": {"message": str(message)}}:
            return f"llama-server: {message[:300]}"
    return f"llama-server answered with status {status}"


def _get(path: bytes) -> bytes:
    return b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path


def _post(path: bytes, body: bytes) -> bytes:
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (path, len(body)) + body
