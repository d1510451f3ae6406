"""An answer's way back to the client: streams at once, everything else only when it is whole."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from tightwad_agent.errors import EngineStopped, NotBegun, PeerGone, TightwadError
from tightwad_agent.proxy.client import Answer
from tightwad_agent.proxy.heads import Headers
from tightwad_agent.proxy.http1 import Exchange
from tightwad_agent.proxy.openai import SseGate
from tightwad_agent.proxy.outlet import ClientOutlet
from tightwad_agent.wire.journal import (
    CONTENT_TYPE,
    Aside,
    Began,
    Broke,
    Ended,
    Entry,
    JournalDecoder,
    Said,
    Whole,
)

MAX_WHOLE_BYTES = 4 << 20
"""An answer that is no stream is held back until it is whole, so that it can be asked for again; a larger one is
passed on as it comes."""

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)


def passed_on(headers: Headers, dropped: frozenset[bytes]) -> list[tuple[bytes, bytes]]:
    """Without hop-by-hop headers, without what `Connection` names, and without `dropped`."""
    named = {token.strip().lower() for name, value in headers if name == b"connection" for token in value.split(b",")}
    gone = HOP_BY_HOP | dropped | named
    return [(n, v) for n, v in headers if n not in gone]


_LOSSES: dict[str, type[TightwadError]] = {kind.code: kind for kind in (NotBegun, EngineStopped)}

Receive = Callable[[], Awaitable[bytes]]
"""The next part of an answer's body, empty at its end; raises a `PeerError` where it broke off."""


class Passage:
    """Passes one answer back. Raises a `PeerError` where its source broke off, `NotBegun` where it never
    began with what remains; `outlet` knows what can be done then."""

    def __init__(self, exchange: Exchange, outlet: ClientOutlet) -> None:
        self._exchange = exchange
        self._outlet = outlet

    async def run(self, answer: Answer, receive: Receive, dropped: frozenset[bytes]) -> None:
        """`receive` brings the body. An error that cannot be another engine's to mend is not raised but told."""
        headers = [h for h in passed_on(answer.headers, dropped) if not h[0].startswith(b"access-control-")]
        kind = (answer.header(b"content-type") or b"").partition(b";")[0].strip().lower()
        if kind == CONTENT_TYPE:
            await self._journal(receive)
        elif kind == b"text/event-stream":
            await self._stream(receive, [h for h in headers if h[0] != b"content-length"])
        else:
            await self._whole(answer, receive, headers)

    async def _journal(self, receive: Receive) -> None:
        decoder = JournalDecoder()
        while data := await receive():
            for entry, payload in decoder.feed(data):
                if await self._entry(entry, payload):
                    return
        raise PeerGone("the answer ended without saying so")

    async def _entry(self, entry: Entry, payload: bytes) -> bool:
        """Whether it was the last."""
        outlet = self._outlet
        match entry:
            case Began():
                await outlet.begin(entry)
            case Said():
                await outlet.say(entry, payload)
            case Aside():
                await outlet.aside(payload)
            case Ended():
                await outlet.end(payload)
            case Whole():
                await outlet.whole(payload)
            case Broke():
                await self._broke(entry)
        return isinstance(entry, Ended | Whole | Broke)

    async def _broke(self, said: Broke) -> None:
        if said.lost:
            raise _LOSSES.get(said.code, PeerGone)(said.message)
        raise Told(said)

    async def _stream(self, receive: Receive, headers: Headers) -> None:
        gate = SseGate()
        while data := await receive():
            if ready := gate.feed(data):
                await self._outlet.events(ready, headers)
        await self._outlet.events(gate.rest(), headers)
        await self._outlet.finish(headers)

    async def _whole(self, answer: Answer, receive: Receive, headers: Headers) -> None:
        body = bytearray()
        while data := await receive():
            body += data
            if len(body) > MAX_WHOLE_BYTES and not self._exchange.started:
                await self._large(answer, receive, headers, bytes(body))
                return
        if self._outlet.streams:
            raise Told(_refusal(answer.status, bytes(body)))
        without = [h for h in headers if h[0] not in (b"content-length", b"content-type")]
        kind = answer.header(b"content-type") or b"application/octet-stream"
        await self._outlet.respond(answer.status, bytes(body), kind, without)

    async def _large(self, answer: Answer, receive: Receive, headers: Headers, first: bytes) -> None:
        await self._exchange.start(answer.status, headers)
        data = first
        while data:
            await self._exchange.send(data)
            data = await receive()
        await self._exchange.finish()


def _refusal(status: int, body: bytes) -> Broke:
    """What an answer that is no stream says to who has had the beginning of one."""
    try:
        found = json.loads(body)["error"]
        return Broke(str(found["code"])[:64], str(found["message"])[:4000], status=status)
    except (ValueError, RecursionError, LookupError, TypeError):
        return Broke("upstream", f"the engine that took over answered with status {status}", status=status)


class Told(TightwadError):
    """An error that another node found, as it is for the client."""

    def __init__(self, said: Broke) -> None:
        super().__init__(said.message, hint=said.hint)
        self.code = said.code
        self.http_status = said.status if 400 <= said.status < 600 else 502
