"""A model at a web address as one more source of pieces: parts of its files, by range requests over kept connections.

The server is asked for the version of a file that it named first. A file that is another one by now, that has other
bytes, or that cannot be had in parts is given up for as long as the source lives, with the reason in every later error.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_right
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from operator import itemgetter
from urllib.parse import urlsplit

import trio

from tightwad_agent.errors import OriginError
from tightwad_agent.fetch import Fetched
from tightwad_agent.swarm.manifest import MAX_PIECE_BYTES, Manifest, Piece
from tightwad_agent.web import (
    Get,
    Pace,
    Patience,
    Response,
    Retry,
    body_of,
    check_status,
    client,
    length_in,
    sha256_in,
    shown,
    start_in,
    total_in,
    version_in,
)

log = logging.getLogger(__name__)

MAX_FAILED_READS = 3
"""So many reads in a row may fail after all their tries; then the server is given up."""
MAX_BAD_PIECES = 2
READ_S = 900.0
"""The longest that one try of one part may take: 64 MiB at 73 kB/s."""


class WebSource:
    """See the module; made by `opened`. Reads may go on at the same time. `name` is the host, for people."""

    def __init__(self, manifest: Manifest, headers: Mapping[str, str], patience: Patience, *, on_hub: bool) -> None:
        self.name = urlsplit(manifest.origin).hostname or "the web"
        self._line = _Line({**headers, "Accept-Encoding": "identity"}, patience)
        facts = zip(manifest.origins, manifest.sizes, manifest.hashes, _pieces_of(manifest), strict=True)
        self._files = [
            _File(self._line, url, size, sha256.hex() if on_hub else "", pieces) for url, size, sha256, pieces in facts
        ]
        self._starts = manifest.starts

    @property
    def given_up(self) -> str:
        """Why nothing more is asked of a file there; empty while all are."""
        return next((file.given_up for file in self._files if file.given_up), "")

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly the `length` bytes from `offset` of the model, all in one file. Raises `OriginError`, also for a
        whole piece with a wrong hash."""
        index = max(0, bisect_right(self._starts, offset) - 1)
        return await self._files[index].read(offset - self._starts[index], length)

    async def aclose(self) -> None:
        await self._line.aclose()


def _pieces_of(manifest: Manifest) -> list[list[Piece]]:
    """Of each file; they count from its start."""
    found: list[list[Piece]] = [[] for _ in manifest.sizes]
    for index, piece in enumerate(manifest.pieces):
        file, offset = manifest.place(index)
        found[file].append(piece._replace(offset=offset))
    return found


class _Line:
    """The connections to the server, made when first needed."""

    def __init__(self, headers: Mapping[str, str], patience: Patience) -> None:
        self.headers = headers
        self.patience = patience
        self._get: Get | None = None
        self._opening = trio.Lock()
        self._stack = AsyncExitStack()

    async def get(self) -> Get:
        async with self._opening:
            if self._get is None:
                self._get = await self._stack.enter_async_context(client(self.patience, "", ()))
        return self._get

    async def aclose(self) -> None:
        await self._stack.aclose()


class _File:
    """One file. `sha256`, in hex, is compared with what the server says of it, unless empty."""

    def __init__(self, line: _Line, url: str, size: int, sha256: str, pieces: Sequence[Piece]) -> None:
        self.given_up = ""
        self._name = urlsplit(url).hostname or "the web"
        self._line = line
        self._url = url
        self._size = size
        self._sha256 = sha256
        self._version: str | None = None
        self._pieces = pieces
        self._n_failed = self._n_bad = 0

    async def read(self, offset: int, length: int) -> bytes:
        if not (offset >= 0 and 0 < length <= MAX_PIECE_BYTES and offset + length <= self._size):
            raise OriginError(f"{self._name}: {length} bytes from {offset} are no part of {self._size} bytes")
        reason = "no try was made"
        for attempt in range(self._line.patience.n_tries):
            if attempt:
                await trio.sleep(self._line.patience.backoff_s * 2 ** (attempt - 1))
            self._check_open()
            try:
                data = await self._try(offset, length)
            except Retry as exc:
                reason = str(exc)
                log.info("%s: %s", shown(self._url), reason)
                continue
            except OriginError as exc:
                self._give_up(exc.message)
                raise
            self._n_failed = 0
            await self._compare(offset, data)
            return data
        self._n_failed += 1
        if self._n_failed >= MAX_FAILED_READS:
            self._give_up(reason)
        raise OriginError(f"{shown(self._url)}: {reason}")

    async def _compare(self, offset: int, data: bytes) -> None:
        """The caller compares too; here it is to end a source that has another file before all of it came."""
        piece = self._pieces[bisect_right(self._pieces, offset, key=itemgetter(0)) - 1]
        if (piece.offset, piece.length) != (offset, len(data)):
            return
        if await trio.to_thread.run_sync(_sha256, data) == piece.sha256:
            return
        self._n_bad += 1
        if self._n_bad >= MAX_BAD_PIECES:
            self._give_up("it has other bytes than were added")
        raise OriginError(f"{shown(self._url)}: it has other bytes than were added")

    def _give_up(self, reason: str) -> None:
        """Every read fails from now on. The first reason stays."""
        if not self.given_up:
            self.given_up = reason
            log.warning("%s is asked no more: %s", shown(self._url), reason)

    def _check_open(self) -> None:
        if self.given_up:
            raise OriginError(f"{self._name} is asked no more: {self.given_up}")

    async def _try(self, offset: int, length: int) -> bytes:
        get = await self._line.get()
        wanted = {**self._line.headers, "Range": f"bytes={offset}-{offset + length - 1}"}
        with trio.move_on_after(READ_S):
            async with get(self._url, wanted) as response:
                self._check(response, offset)
                return await self._body(response, length)
        raise Retry(f"{length} bytes did not come within {READ_S:g} s")

    def _check(self, response: Response, offset: int) -> None:
        """Raises unless this is the answer to what was asked, about the file as it was."""
        where = shown(self._url)
        if response.status_code != 416:
            check_status(self._url, response)
        if response.status_code == 200:
            raise OriginError(f"{where}: the server answers no range requests")
        total = total_in(response)
        if total is not None and total != self._size:
            raise OriginError(f"{where}: the file there has {total} bytes by now, not {self._size}")
        if response.status_code == 416 or start_in(response) != offset:
            raise OriginError(f"{where}: the server answered with other bytes than asked")
        if self._sha256 and sha256_in(response) not in ("", self._sha256):
            raise OriginError(
                f"{where}: the file there is another by now: its SHA-256 is {sha256_in(response)}, not {self._sha256}"
            )
        version = version_in(response)
        if self._version not in (None, version):
            raise OriginError(f"{where}: the file there changed while it was read")
        self._version = version

    async def _body(self, response: Response, length: int) -> bytes:
        body, pace = bytearray(), Pace(self._line.patience)
        async with body_of(response, response.aiter_raw()) as chunks:
            async for chunk in chunks:
                body += chunk
                pace.count(len(chunk))
                if len(body) > length:
                    raise OriginError(f"{shown(self._url)}: more came than the {length} bytes that were asked")
        if len(body) != length:
            raise Retry(f"it ended after {len(body)} of {length} bytes")
        return bytes(body)


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@asynccontextmanager
async def opened(
    manifest: Manifest, headers: Mapping[str, str], *, on_hub: bool = False, patience: Patience | None = None
) -> AsyncIterator[WebSource]:
    """The source at `manifest.origin`, with connections that are closed at the end.

    `headers` go to that host alone, not after a redirect to another. `on_hub`: what the server says of the file's hash
    is compared with the manifest's.
    """
    source = WebSource(manifest, headers, patience or Patience(), on_hub=on_hub)
    try:
        yield source
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(1):
            await source.aclose()


async def version_of(url: str, headers: Mapping[str, str], patience: Patience | None = None) -> Fetched:
    """What the server says of the file, without the file. Raises `OriginError`."""
    wanted = {**headers, "Range": "bytes=0-0", "Accept-Encoding": "identity"}
    async with client(patience or Patience(), "", ()) as get:
        try:
            async with get(url, wanted) as response:
                check_status(url, response)
                has_ranges = response.status_code == 206
                total = total_in(response) if has_ranges else length_in(response)
                return Fetched(total or 0, version_in(response), has_ranges)
        except Retry as exc:
            raise OriginError(f"{shown(url)}: {exc}") from None
