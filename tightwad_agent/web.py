"""HTTP requests as `fetch` makes them: which addresses are allowed, whom to trust, how long to wait, what a fault is.

The only module that imports httpx.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import httpx
import trio

from tightwad_agent.errors import OriginError

Response = httpx.Response

MAX_REDIRECTS = 8
_CA_VARIABLES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_LINKED = "linked_etag"
_SHA256 = re.compile(r'(?:W/)?"?([0-9a-fA-F]{64})"?\Z')
RETRIED = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server may take. A download that came 1 MiB further since the last fault has all its tries again."""

    connect_s: float = 20.0
    read_s: float = 30.0
    window_s: float = 60.0
    window_bytes: int = 16 << 10
    """A server that sends less than this in a window is given up: silence is not the only way to stall."""
    n_tries: int = 4
    backoff_s: float = 1.0


Get = Callable[[str, dict[str, str]], AbstractAsyncContextManager[httpx.Response]]


class Retry(Exception):
    """A fault that may pass; the text is the reason."""


def _host_in(url: str) -> str:
    return shown(url).partition("://")[2].partition("/")[0].partition(":")[0]


def shown(url: str) -> str:
    """The address without what may be secret: credentials and query."""
    scheme, separator, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    path, question, _query = path.partition("?")
    host = place.rpartition("@")[2].partition("?")[0]
    return f"{scheme}{separator}{host}{slash}{path}{question}{'…' if question else ''}" if separator else url[:200]


@asynccontextmanager
async def client(patience: Patience, cert: str, trusted_hosts: tuple[str, ...]) -> AsyncIterator[Get]:
    """A function that opens a response; connection faults come out of it as `Retry` or `OriginError`."""
    tls = await trio.to_thread.run_sync(_tls_context, cert)
    timeout = httpx.Timeout(patience.read_s, connect=patience.connect_s)
    async with httpx.AsyncClient(verify=tls, timeout=timeout, headers={"User-Agent": "tightwad-agent"}) as http:

        @asynccontextmanager
        async def get(url: str, headers: dict[str, str]) -> AsyncIterator[httpx.Response]:
            try:
                response = await _follow(http, url, headers, trusted_hosts)
                try:
                    yield response
                finally:
                    with trio.CancelScope(shield=True), trio.move_on_after(1):
                        await response.aclose()
            except httpx.InvalidURL as exc:
                raise OriginError(f"{shown(url)}: no valid address: {exc}") from None
            except httpx.TransportError as exc:
                _raise_fault(url, exc)

        yield get


async def _follow(
    client: httpx.AsyncClient, url: str, headers: dict[str, str], trusted_hosts: tuple[str, ...]
) -> httpx.Response:
    request = client.build_request("GET", url, headers=headers)
    secure, linked = False, ""
    for _ in range(MAX_REDIRECTS):
        secure = _check_address(url, request.url, trusted_hosts, secure)
        response = await client.send(request, stream=True)
        linked = linked or str(response.headers.get("X-Linked-ETag", ""))
        if response.next_request is None:
            response.extensions[_LINKED] = linked
            return response
        await response.aclose()
        request = response.next_request
    raise OriginError(f"{shown(url)}: more than {MAX_REDIRECTS} redirects")


def _check_address(asked: str, url: httpx.URL, trusted_hosts: tuple[str, ...], secure: bool) -> bool:
    """Whether this hop is https; `OriginError` where http is not allowed."""
    if url.scheme == "https":
        return True
    if url.scheme != "http":
        raise OriginError(f"{shown(asked)}: {url.scheme or 'no'} scheme; only https addresses can be fetched")
    if secure:
        raise OriginError(f"{shown(asked)}: it redirects from https to plain http at {url.host}, which is refused")
    named = url.host if url.port is None else f"{url.host}:{url.port}"
    if not (_is_loopback(url.host) or url.host in trusted_hosts or named in trusted_hosts):
        raise OriginError(f"{shown(asked)}: plain http to {url.host} is refused", hint="use an https address")
    return False


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@asynccontextmanager
async def body_of(response: Response, chunks: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
    """The chunks of a body that may be left before its end.

    httpx stacks generators that do not close one another. So the connection is closed and the stack run to its error:
    left as it is, each of them would be a warning when it is collected.
    """
    try:
        yield chunks
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(1), suppress(httpx.HTTPError, httpx.StreamError):
            await response.aclose()
            async for _ in chunks:
                pass


class Pace:
    """Watches that each window of time brings enough bytes."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._ends = trio.current_time() + patience.window_s
        self._n_bytes = 0

    def count(self, n_bytes: int) -> None:
        self._n_bytes += n_bytes
        now = trio.current_time()
        if now < self._ends:
            return
        if self._n_bytes < self._patience.window_bytes:
            raise Retry(f"the server sends too slowly: {self._n_bytes} bytes in {self._patience.window_s:g} s")
        self._ends, self._n_bytes = now + self._patience.window_s, 0


def _raise_fault(url: str, exc: httpx.TransportError) -> NoReturn:
    """`OriginError` for what stays wrong, `Retry` for what may pass."""
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise OriginError(
                f"{shown(url)}: the certificate is not trusted: {cause.verify_message}",
                hint="behind a proxy with a certificate of its own, set SSL_CERT_FILE to its CA bundle",
            ) from None
        if isinstance(cause, ssl.SSLError):
            raise Retry(f"TLS failed: {cause.reason or cause}") from None
        if isinstance(cause, socket.gaierror):
            raise Retry(f"the name {_host_in(url)} cannot be resolved: {cause.strerror}") from None
        cause = cause.__cause__ or cause.__context__
    if isinstance(exc, httpx.TimeoutException):
        raise Retry("the server did not answer in time") from None
    if isinstance(exc, httpx.UnsupportedProtocol):
        raise OriginError(f"{shown(url)}: {exc}") from None
    raise Retry(f"the connection failed: {str(exc) or type(exc).__name__}") from None


def check_status(url: str, response: httpx.Response) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    if status in RETRIED:
        raise Retry(f"HTTP {status}")
    if status in (401, 403):
        raise OriginError(f"{shown(url)}: HTTP {status}: access refused", hint="it may need an access token")
    if status in (404, 410):
        raise OriginError(f"{shown(url)}: HTTP {status}: there is no such file")
    raise OriginError(f"{shown(url)}: HTTP {status}")


def length_in(response: httpx.Response) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() and len(text) < 20 else None


def start_in(response: httpx.Response) -> int:
    """First byte of a 206; -1 if it does not say."""
    head = response.headers.get("Content-Range", "").removeprefix("bytes").strip().partition("-")[0]
    return int(head) if head.isdecimal() and len(head) < 20 else -1


def total_in(response: httpx.Response) -> int | None:
    tail = response.headers.get("Content-Range", "").rpartition("/")[2].strip()
    return int(tail) if tail.isdecimal() and len(tail) < 20 else None


def validator_in(response: httpx.Response) -> str:
    """What If-Range may name: a strong entity tag, or the date."""
    etag = str(response.headers.get("ETag", ""))
    return etag if etag.startswith('"') else str(response.headers.get("Last-Modified", ""))


def sha256_in(response: httpx.Response) -> str:
    """The file's SHA-256 (hex) as a model hub says it: in the entity tag, or on the way there; empty if it does not."""
    for text in (response.extensions.get(_LINKED, ""), response.headers.get("ETag", "")):
        if match := _SHA256.match(text.strip()):
            return match[1].lower()
    return ""


def version_in(response: httpx.Response) -> str:
    """What tells this version of the file from others; empty if the server says nothing of that."""
    return sha256_in(response) or validator_in(response)


def _tls_context(cert: str) -> ssl.SSLContext:
    """The system's certificates, those that come with httpx, and what pip and its like were told to trust."""
    context = ssl.create_default_context()
    wanted = [os.environ.get(name, "") for name in _CA_VARIABLES] + [cert]
    certifi = importlib.util.find_spec("certifi")
    if certifi is not None and certifi.submodule_search_locations:
        wanted.append(str(Path(certifi.submodule_search_locations[0]) / "cacert.pem"))
    loaded = {os.path.realpath(os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().openssl_cafile)}
    for path in (Path(text) for text in wanted if text):
        if path.exists() and (real := os.path.realpath(path)) not in loaded:
            loaded.add(real)
            context.load_verify_locations(capath=path) if path.is_dir() else context.load_verify_locations(path)
    return context
