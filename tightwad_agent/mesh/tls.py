"""TLS 1.3 between nodes: contexts, connecting, and what OpenSSL's complaints mean.

Python's `ssl` has no verify callback and no exporter, hence: the cluster CA is the only trust anchor; the listener asks
for a certificate but takes a connection without one, for joiners; whom a certificate belongs to is compared afterwards;
no session tickets, which a server would write to a client that may never read.
"""

from __future__ import annotations

import os
import socket
import ssl
import time

import trio

from tightwad_agent.errors import (
    NotTrusted,
    OutOfDate,
    PeerError,
    PeerGone,
    PeerUnreachable,
    PortClosed,
    ProtocolError,
    StateDamaged,
)
from tightwad_agent.ids import Address
from tightwad_agent.mesh import certs
from tightwad_agent.mesh.identity import NODE_CERT, NODE_KEY, Identity
from tightwad_agent.mesh.tls_stream import TlsStream
from tightwad_agent.streams import close_quietly

KEEPALIVE_IDLE_S = 15
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 3
USER_TIMEOUT_S = 120
"""How long sent bytes may stay unacknowledged. Linux counts a living receiver that does not read as well (seen: a full
window ends the connection after just this time), so it must be longer than a healthy service ever stops reading.
Heartbeats find dead nodes long before."""


def server_context(identity: Identity) -> ssl.SSLContext:
    """For the mesh port: members show a leaf of the cluster, joiners nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    return _member(context, identity, ssl.CERT_OPTIONAL)


def client_context(identity: Identity) -> ssl.SSLContext:
    """For dialling members. Whose leaf it was must be compared after the handshake: addresses move."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    return _member(context, identity, ssl.CERT_REQUIRED)


def stranger_context() -> ssl.SSLContext:
    """For a joiner, which has no CA certificate yet: it checks the leaf against the token's pinned key itself."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _member(context: ssl.SSLContext, identity: Identity, mode: ssl.VerifyMode) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = mode
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    for ca in identity.anchors(time.time()):
        context.load_verify_locations(cadata=certs.der(ca))
    folder = identity.state_dir
    try:
        context.load_cert_chain(folder / NODE_CERT, folder / NODE_KEY)
    except (ssl.SSLError, OSError) as exc:
        raise StateDamaged(f"{folder / NODE_CERT} and {NODE_KEY} cannot be used: {exc}") from None
    return context


def tune(stream: trio.SocketStream) -> None:
    """Options of a mesh connection; those the system does not have are left out."""
    options = [
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", KEEPALIVE_PROBES),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", USER_TIMEOUT_S * 1000),
    ]
    for level, name, value in options:
        option = getattr(socket, name, None)
        if option is not None:
            try:
                stream.setsockopt(level, option, value)
            except OSError:
                pass  # a connection already reset, or an option only half there: neither is worth failing for


async def connect(address: Address, context: ssl.SSLContext) -> TlsStream:
    """TCP and the TLS handshake. Raises a `PeerError` that says why not; the caller sets the deadline."""
    try:
        transport = await trio.open_tcp_stream(address.host, address.port)
    except OSError as exc:
        cause = _innermost(exc)
        kind = PortClosed if isinstance(cause, ConnectionRefusedError) else PeerUnreachable
        raise kind(_why(cause)) from None
    tune(transport)
    tls = TlsStream(transport, context)
    try:
        await tls.do_handshake()
    except BaseException as exc:
        await close_quietly(tls)
        if isinstance(exc, trio.BrokenResourceError | OSError):
            raise fault(exc) from None
        raise
    return tls


async def refuse(tls: TlsStream) -> None:
    """After a failed handshake: sends the alert that says why, and waits for the peer to close.

    Without it the peer would see a connection that ends for no reason. Closing at once could let a reset overtake it.
    """
    n_left = 64 << 10
    transport = tls.transport_stream
    try:
        if alert := tls.alert():
            await transport.send_all(alert)
        await transport.send_eof()
        while n_left > 0 and (data := await transport.receive_some(4096)):
            n_left -= len(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass


def ends(transport: trio.SocketStream) -> tuple[Address, Address]:
    """(this side's address, the other side's). Raises `PeerGone` if the connection is gone already."""
    try:
        here, there = transport.socket.getsockname(), transport.socket.getpeername()
    except OSError:
        raise PeerGone("the connection was reset") from None
    return Address(here[0], here[1]), Address(there[0], there[1])


def fault(exc: BaseException) -> PeerError:
    """What a broken TLS connection means: a refused certificate, no TLS at all, or simply an end."""
    cause = _ssl_error(exc)
    if isinstance(cause, ssl.SSLCertVerificationError):
        if cause.verify_code in _DATES:
            return OutOfDate(f"its certificate is not trusted: {cause.verify_message}", hint=certs.COMPARE)
        return NotTrusted(f"its certificate is not of this cluster ({cause.verify_message})")
    if cause is None or isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return exc if isinstance(exc, PeerError) else PeerGone("the connection was closed")
    reason = str(cause.reason or "")
    if "ALERT" in reason and any(word in reason for word in ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")):
        said = reason.split("ALERT_", 1)[-1].replace("_", " ").lower()
        message = f"it does not trust this node's certificate ({said})"
        if said in _ABOUT_DATES:
            return OutOfDate(message, hint=certs.COMPARE)
        return NotTrusted(message, hint=_REPLACED if said == "unknown ca" else "")
    return ProtocolError(f"it does not speak our TLS ({reason.replace('_', ' ').lower() or 'broken'})")


_ABOUT_DATES = ("certificate expired", "bad certificate")
"""Alerts that OpenSSL sends for a certificate that is over, and for one that is not valid yet."""
_REPLACED = "was the cluster's key changed while this machine was away? tightwad-agent leave here, then join anew"
_DATES = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED


def _ssl_error(exc: BaseException | None) -> ssl.SSLError | None:
    while exc is not None:
        if isinstance(exc, ssl.SSLError):
            return exc
        exc = exc.__cause__ or exc.__context__
    return None


def _innermost(exc: BaseException) -> BaseException:
    """The reason itself: trio wraps one group of errors per address in another."""
    while True:
        if isinstance(exc, BaseExceptionGroup):
            exc = exc.exceptions[0]
        elif isinstance(exc, OSError) and exc.errno is None and exc.__cause__ is not None:
            exc = exc.__cause__
        else:
            return exc


def _why(exc: BaseException) -> str:
    if isinstance(exc, OSError) and (exc.errno or 0) > 0:
        return os.strerror(exc.errno or 0)
    return str(getattr(exc, "strerror", None) or exc)
