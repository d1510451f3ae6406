"""The endpoint's listeners, with a bound on the connections held at once, and a fair share of them for each client.

A connection whose client is being waited for gives way when all places are taken: that of the address with most such
connections, and of these the one that waits longest. One that is being answered stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import trio

from tightwad_agent.proxy.callers import plain_address
from tightwad_agent.proxy.heads import Peer
from tightwad_agent.proxy.http1 import Handler, Seat, canned, serve_connection
from tightwad_agent.proxy.limits import Budget, Crowded, Limits
from tightwad_agent.proxy.openai import error_body
from tightwad_agent.streams import READ_SIZE, close_quietly

RETRY_AFTER = b"retry-after: 1\r\n"


class Seats:
    """Who holds connections, and which of them only wait for their client."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.held: Counter[str] = Counter()
        self.n_local = 0
        self._waiting: dict[str, dict[Seat, None]] = {}
        self._is_local: dict[str, bool] = {}

    @property
    def n(self) -> int:
        return self.held.total()

    def sit(self, address: str, *, is_local: bool) -> Seat:
        """One more connection of this address."""
        self.held[address] += 1
        self._is_local[address] = is_local
        self.n_local += is_local
        return Seat(lambda seat, waits: self._waits(address, seat, waits))

    def leave(self, address: str) -> None:
        self.n_local -= self._is_local[address]
        self.held[address] -= 1
        if not self.held[address]:
            del self.held[address], self._is_local[address]

    def crowd(self, address: str) -> Crowded | None:
        """Makes room for the connection that `address` has just opened; why there is none, if there is none."""
        limits, is_local = self._limits, self._is_local[address]
        if not is_local and self.held[address] > limits.max_connections_per_client:
            if self._evict([address]):
                return None
            return Crowded(
                f"{limits.max_connections_per_client} connections from one address are open already",
                hint="`max_connections_per_client` raises the limit",
                retry_after_s=1,
            )
        others = self.n - self.n_local
        if self.n <= limits.max_connections and (is_local or others <= limits.max_connections - limits.reserved_local):
            return None
        if self._evict([a for a in self._waiting if is_local or not self._is_local[a]]):
            return None
        hint = "`max_connections` raises the limit"
        return Crowded("too many connections at once", status=503, hint=hint, retry_after_s=1)

    def _evict(self, among: Sequence[str]) -> bool:
        address = max(among, key=lambda a: len(self._waiting.get(a, ())), default=None)
        if address is None or not self._waiting.get(address):
            return False
        seat = next(iter(self._waiting[address]))
        self._waits(address, seat, False)
        seat.evict()
        return True

    def _waits(self, address: str, seat: Seat, waits: bool) -> None:
        if waits:
            self._waiting.setdefault(address, {})[seat] = None
        elif (seats := self._waiting.get(address)) is not None:
            seats.pop(seat, None)
            if not seats:
                del self._waiting[address]


class Server:
    """Serves listeners, with a bound on the connections held at once."""

    def __init__(self, handler: Handler, limits: Limits, is_local: Callable[[str], bool]) -> None:
        self.limits = limits
        self.budget = Budget.of(limits)
        self._seats = Seats(limits)
        self._handler = handler
        self._is_local = is_local

    @property
    def n_connections(self) -> int:
        return self._seats.n

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Runs until cancelled; closes the listeners then."""
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._accepted, listeners)
            task_status.started()

    async def _accepted(self, stream: trio.SocketStream) -> None:
        address = plain_address(_address_of(stream))
        seat = self._seats.sit(address, is_local=self._is_local(address))
        try:
            if (crowd := self._seats.crowd(address)) is not None:
                await self._turn_away(stream, crowd)
            else:
                peer = Peer(address)
                await serve_connection(stream, self._handler, self.limits, peer=peer, budget=self.budget, seat=seat)
        finally:
            self._seats.leave(address)

    async def _turn_away(self, stream: trio.SocketStream, exc: Crowded) -> None:
        try:
            if self.n_connections <= self.limits.max_connections * 2:  # beyond that not even a word
                with trio.move_on_after(1):
                    await stream.send_all(canned(exc.http_status, error_body(exc), RETRY_AFTER))
                    await stream.send_eof()
                    await stream.receive_some(READ_SIZE)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # gone before it was told
        finally:
            await close_quietly(stream)


def _address_of(stream: trio.SocketStream) -> str:
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:
        return ""  # reset before it was accepted; reading will say so
