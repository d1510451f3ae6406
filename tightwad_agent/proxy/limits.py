"""What one client, and all of them together, may take of the endpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tightwad_agent.config import Config
from tightwad_agent.errors import NotReady, TightwadError

RETRY_S = 5
RESERVED_LOCAL = 64


class Crowded(TightwadError):
    """Too much is asked at once: by this client (429), or by all together (503)."""

    code = "too_many_requests"
    http_status = 429

    def __init__(self, message: str, *, status: int = 429, hint: str = "", retry_after_s: int = RETRY_S) -> None:
        super().__init__(message, hint=hint)
        self.http_status = status
        self.retry_after_s = retry_after_s


class HoldsTooMuch(NotReady):
    """One client's requests and answers take more memory than its part."""

    code = "too_many_requests"
    http_status = 429


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client may take. Raising a number lets slower or larger clients in, and lets one hold more."""

    max_head_bytes: int = 32 << 10
    max_body_bytes: int = 64 << 20
    max_buffered_bytes: int = 256 << 20
    """Bodies of all requests together; of one client half of it, or one whole body if that is more."""
    head_s: float = 10.0
    """From a request's first byte (or the connection's begin) to the end of its head."""
    idle_s: float = 60.0
    """Between two requests of one connection."""
    body_grace_s: float = 30.0
    body_bytes_per_s: int = 16 << 10
    """A body may take `body_grace_s` plus what it needs at this rate."""
    send_s: float = 30.0
    """A client that does not take `SEND_BYTES` within this time is gone."""
    linger_s: float = 2.0
    """How long the rest of a refused body is read, so that the answer arrives instead of a reset."""
    max_connections: int = 512
    max_connections_per_client: int = 128
    """From one address of another machine."""
    reserved_local: int = RESERVED_LOCAL
    """Of all connections, kept for this machine itself."""
    max_requests: int = 256
    """Answered at once, or on their way to the node that answers them."""
    max_requests_per_client: int = 64

    @classmethod
    def of(cls, config: Config) -> Limits:
        """As the user has set them."""
        return cls(
            max_head_bytes=config.max_head_bytes,
            max_body_bytes=config.max_body_bytes,
            head_s=config.head_timeout_s,
            send_s=config.send_timeout_s,
            max_connections=config.max_connections,
            max_connections_per_client=config.max_connections_per_client,
            reserved_local=min(RESERVED_LOCAL, config.max_connections // 8),
            max_requests=config.max_requests,
            max_requests_per_client=config.max_requests_per_client,
        )


class Budget:
    """Bytes that all requests together may hold."""

    def __init__(self, n_bytes: int, n_bytes_each: int | None = None) -> None:
        self.left = n_bytes
        self._each = n_bytes if n_bytes_each is None else n_bytes_each
        self._held: Counter[str] = Counter()

    @classmethod
    def of(cls, limits: Limits) -> Budget:
        return cls(limits.max_buffered_bytes, max(limits.max_body_bytes, limits.max_buffered_bytes // 2))

    @contextmanager
    def share(self, client: str = "") -> Iterator[Callable[[int], None]]:
        """Gives a function that takes more bytes (`NotReady` when there are none left, `HoldsTooMuch` when this client
        holds its part of them); all come back at the end."""
        taken = 0

        def take(n_bytes: int) -> None:
            nonlocal taken
            if n_bytes > self.left:
                raise NotReady("too many large requests at once", retry_after_s=5)
            if self._held[client] + n_bytes > self._each:
                raise HoldsTooMuch(f"what this client's requests hold would be more than {self._each >> 20} MiB")
            self.left -= n_bytes
            self._held[client] += n_bytes
            taken += n_bytes

        try:
            yield take
        finally:
            self.left += taken
            self._held[client] -= taken
            if not self._held[client]:
                del self._held[client]


class Running:
    """Requests that run now, of all clients and of each."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._running: Counter[str] = Counter()

    @contextmanager
    def one(self, client: str) -> Iterator[None]:
        """Entered while one request runs. Raises `Crowded`."""
        limits = self._limits
        if self._running[client] >= limits.max_requests_per_client:
            raise Crowded(
                f"{limits.max_requests_per_client} requests of this client run already",
                hint="send fewer at once; `max_requests_per_client` raises the limit",
            )
        if self._running.total() >= limits.max_requests:
            raise Crowded(
                f"{limits.max_requests} requests run already", status=503, hint="`max_requests` raises the limit"
            )
        self._running[client] += 1
        try:
            yield
        finally:
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]
