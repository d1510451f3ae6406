"""Several addresses of one node tried side by side; the first that works ends the others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Generic, TypeVar

import trio

from tightwad_agent.errors import (
    DialledSelf,
    NodeRemoved,
    NotTrusted,
    OutOfDate,
    PeerError,
    PeerRefused,
    PeerSilent,
    PeerUnreachable,
    PortClosed,
)
from tightwad_agent.ids import Address
from tightwad_agent.streams import close_quietly

T = TypeVar("T", bound=trio.abc.AsyncResource)

MAX_TRIED = 32
"""Addresses of one dial; they come from mDNS, peers and tokens, where anybody may have put them."""


class Race(Generic[T]):
    """One dial. `winner` and `failures` are filled by `run`."""

    def __init__(self, attempt: Callable[[Address], Awaitable[T]], *, stagger_s: float) -> None:
        self._attempt = attempt
        self._stagger_s = stagger_s
        self.winner: tuple[Address, T] | None = None
        self.failures: dict[Address, PeerError] = {}

    async def run(self, addresses: Iterable[Address], *, deadline_s: float) -> tuple[Address, T] | None:
        """The first attempt that succeeded, in the caller's order with a head start each; None if all failed."""
        todo = list(dict.fromkeys(addresses))[:MAX_TRIED]
        try:
            with trio.move_on_after(deadline_s) as scope:
                await self._run_all(todo)
        except BaseException:
            if self.winner is not None:
                await close_quietly(self.winner[1])
            raise
        if scope.cancelled_caught and self.winner is None:
            for address in todo:
                self.failures.setdefault(address, PeerSilent(f"no answer within {deadline_s:g} s"))
        return self.winner

    async def _run_all(self, todo: list[Address]) -> None:
        async with trio.open_nursery() as nursery:
            for address in todo:
                over = trio.Event()
                nursery.start_soon(self._run_one, address, over, nursery.cancel_scope)
                with trio.move_on_after(self._stagger_s):
                    await over.wait()

    async def _run_one(self, address: Address, over: trio.Event, everybody: trio.CancelScope) -> None:
        try:
            got = await self._attempt(address)
        except PeerError as exc:
            self.failures[address] = exc
        else:
            if self.winner is not None:  # both crossed the line in one turn of the loop
                await close_quietly(got)
                return
            self.winner = (address, got)
            everybody.cancel()
        finally:
            over.set()


def defeat(what: str, failures: dict[Address, PeerError]) -> PeerError:
    """One error that names every address and why it failed; its kind is theirs if they agree."""
    if not failures:
        return PeerUnreachable(f"{what}: no address is known", hint="give one with --seed HOST:PORT")
    lines = [f"{address}: {exc.message}" for address, exc in failures.items()]
    kinds = {type(exc) for exc in failures.values()}
    kind = kinds.pop() if len(kinds) == 1 else PeerUnreachable
    if kind not in _TELLING:
        kind = PeerUnreachable
    text = lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines)
    hints = dict.fromkeys(exc.hint for exc in failures.values() if exc.hint)
    return kind(f"{what}: {text}", hint="; ".join(hints))


_TELLING: tuple[type[PeerError], ...] = (
    NotTrusted,
    OutOfDate,
    NodeRemoved,
    PeerRefused,
    DialledSelf,
    PortClosed,
)
