"""A small web server on loopback that does as a test says: ranges, cuts, silence, lies."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio


@dataclass
class Asked:
    path: str
    headers: dict[str, str]


Answer = Callable[[Asked, trio.abc.Stream], Awaitable[None]]


def head(status: int = 200, **headers: object) -> bytes:
    lines = [f"HTTP/1.1 {status} X", "Connection: close", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@dataclass
class Resource:
    """A file with an entity tag. `cuts`: the first answers break off after that many bytes of body."""

    data: bytes
    ranges: bool = True
    etag: bool = True
    cuts: list[int] = field(default_factory=list)
    extra: dict[str, object] = field(default_factory=dict)

    async def __call__(self, asked: Asked, stream: trio.abc.Stream) -> None:
        start, status = 0, 200
        headers: dict[str, object] = dict(self.extra)
        tag = f'"{hashlib.sha256(self.data).hexdigest()[:16]}"'
        if self.etag:
            headers["ETag"] = tag
        wanted = asked.headers.get("range", "")
        if self.ranges and wanted and asked.headers.get("if-range", tag) == tag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(self.data):
                await stream.send_all(head(416, Content_Range=f"bytes */{len(self.data)}", Content_Length=0))
                return
            status = 206
            headers["Content_Range"] = f"bytes {start}-{len(self.data) - 1}/{len(self.data)}"
        body = self.data[start:]
        headers["Content_Length"] = len(body)
        await stream.send_all(head(status, **headers))
        await stream.send_all(body[: self.cuts.pop(0)] if self.cuts else body)


def status(code: int, **headers: object) -> Answer:
    async def answer(_asked: Asked, stream: trio.abc.Stream) -> None:
        await stream.send_all(head(code, Content_Length=0, **headers))

    return answer


def page(body: bytes, content_type: str) -> Answer:
    async def answer(_asked: Asked, stream: trio.abc.Stream) -> None:
        await stream.send_all(head(200, Content_Length=len(body), Content_Type=content_type) + body)

    return answer


class WebHost:
    """Serves `routes` (path without query -> answer); everything else is 404. `asked` has all requests."""

    def __init__(self) -> None:
        self.routes: dict[str, Answer] = {}
        self.asked: list[Asked] = []
        self.url = ""

    async def start(self, nursery: trio.Nursery) -> WebHost:
        listeners = await nursery.start(
            lambda task_status: trio.serve_tcp(self._serve, 0, host="127.0.0.1", task_status=task_status)
        )
        self.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        return self

    async def _serve(self, stream: trio.SocketStream) -> None:
        data = b""
        try:
            async with stream:
                while b"\r\n\r\n" not in data:
                    more = await stream.receive_some(65536)
                    if not more:
                        return
                    data += more
                first, *lines = data.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
                pairs = [line.partition(":") for line in lines]
                asked = Asked(first.split()[1], {k.lower(): v.strip() for k, _, v in pairs})
                self.asked.append(asked)
                answer = self.routes.get(asked.path.partition("?")[0], status(404))
                await answer(asked, stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
