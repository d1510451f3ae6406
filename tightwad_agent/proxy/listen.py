"""Opening the endpoint's port."""

from __future__ import annotations

import errno
import ipaddress
import socket

import trio

from tightwad_agent.errors import ConfigError, EnvironmentFault, PortTaken

LOOPBACK = "127.0.0.1"
WILDCARDS = ("", "0.0.0.0", "::", "*")  # noqa: S104 - names of it, bound only when configured
BACKLOG = 256
FREE_PORT_TRIES = 8


async def listen(host: str, port: int) -> list[trio.SocketListener]:
    """Listeners for `host`: both families for a wildcard, and 127.0.0.1 in any case, for the command line's sake.

    All have the same port, also where `port` is 0. Raises `PortTaken`, `ConfigError` for an address that is not of
    this machine, or `EnvironmentFault`.
    """
    hosts = await _hosts(host)
    for tries_left in reversed(range(FREE_PORT_TRIES if port == 0 else 1)):
        sockets: list[trio.socket.SocketType] = []
        try:
            for one in hosts:
                await _add(sockets, one, port)
            return [trio.SocketListener(s) for s in sockets]
        except BaseException as exc:
            for open_one in sockets:
                open_one.close()
            if not isinstance(exc, PortTaken) or not tries_left:
                raise
    raise AssertionError("unreachable")


async def _hosts(host: str) -> list[str]:
    if host in WILDCARDS:
        return ["0.0.0.0", "::"]  # noqa: S104 - as configured
    try:
        found = await trio.socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ConfigError(f"endpoint_host: `{host}` is no address of this machine") from None
    hosts = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    return hosts if LOOPBACK in hosts else [*hosts, LOOPBACK]


async def _add(sockets: list[trio.socket.SocketType], host: str, port: int) -> None:
    wanted = port or (sockets[0].getsockname()[1] if sockets else 0)
    v6 = ipaddress.ip_address(host.partition("%")[0]).version == 6
    sock = None
    try:
        sock = trio.socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_STREAM)
        if v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await sock.bind((host, wanted))
        sock.listen(BACKLOG)
    except OSError as exc:
        if sock is not None:
            sock.close()
        if host == "::" and exc.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            return  # a machine without IPv6
        raise _explained(exc, host, wanted) from None
    sockets.append(sock)


def _explained(exc: OSError, host: str, port: int) -> Exception:
    if exc.errno == errno.EADDRINUSE:
        return PortTaken(
            f"port {port} belongs to another program", hint="stop it, or choose another port: --endpoint-port PORT"
        )
    if exc.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"endpoint_host: {host} is no address of this machine")
    if exc.errno in (errno.EACCES, errno.EPERM):
        return EnvironmentFault(f"port {port} may not be opened by this user", hint="choose one: --endpoint-port PORT")
    return EnvironmentFault(f"cannot listen on {host} port {port}: {exc.strerror or exc}")
