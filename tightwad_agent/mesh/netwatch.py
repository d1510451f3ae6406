"""Wakes when the network interfaces of this machine may have changed: at once on Linux, else now and then."""

from __future__ import annotations

import socket
from types import TracebackType

import trio

_LINK, _IPV4, _IPV6 = 0x1, 0x10, 0x100
"""RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR."""
CALM_S = 0.2
"""Changes come in bursts."""
_READ_SIZE = 64 << 10
_MAX_READS = 256


class NetWatch:
    """Waits for changes; a context, because it may hold a socket."""

    def __init__(self) -> None:
        self._news = _subscription()

    def __enter__(self) -> NetWatch:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _exc: BaseException | None, _t: TracebackType | None) -> None:
        if self._news is not None:
            self._news.close()

    async def change(self, period_s: float) -> None:
        """Returns after the next burst of changes, or `period_s` without one."""
        with trio.move_on_after(period_s):
            if self._news is None:
                await trio.sleep_forever()
            else:
                await trio.lowlevel.wait_readable(self._news)
                await trio.sleep(CALM_S)
                _drain(self._news)


def _drain(news: socket.socket) -> None:
    for _ in range(_MAX_READS):
        try:
            news.recv(_READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            pass  # more came than it holds: that is a change, too


def _subscription() -> socket.socket | None:
    """A netlink socket; None where the system has none or does not allow it."""
    family = getattr(socket, "AF_NETLINK", None)
    if family is None:
        return None
    try:
        news = socket.socket(family, socket.SOCK_RAW, 0)
    except OSError:
        return None
    try:
        news.bind((0, _LINK | _IPV4 | _IPV6))
        news.setblocking(False)
    except OSError:
        news.close()
        return None
    return news
