"""Opening the endpoint's port."""

from __future__ import annotations

import socket

import pytest
import trio

from tightwad_agent.errors import ConfigError, PortTaken
from tightwad_agent.proxy.listen import listen


async def close(listeners):
    for one in listeners:
        await one.aclose()


def names(listeners):
    return {one.socket.getsockname()[0] for one in listeners}


async def test_wildcard_is_both_families_on_one_port():
    listeners = await listen("0.0.0.0", 0)
    try:
        assert "0.0.0.0" in names(listeners)
        assert names(listeners) <= {"0.0.0.0", "::"}
        assert len(listeners) == (2 if socket.has_ipv6 else 1)
        ports = {one.socket.getsockname()[1] for one in listeners}
        assert len(ports) == 1
        (await trio.open_tcp_stream("127.0.0.1", ports.pop())).socket.close()
    finally:
        await close(listeners)


async def test_loopback_is_always_there():
    listeners = await listen("127.0.0.2", 0)
    assert names(listeners) == {"127.0.0.1", "127.0.0.2"}
    await close(listeners)
    listeners = await listen("127.0.0.1", 0)
    assert names(listeners) == {"127.0.0.1"}
    await close(listeners)


async def test_again_at_once_on_the_same_port():
    listeners = await listen("127.0.0.1", 0)
    port = listeners[0].socket.getsockname()[1]
    client = await trio.open_tcp_stream("127.0.0.1", port)
    served = await listeners[0].accept()
    await served.aclose()  # leaves TIME_WAIT behind
    await client.aclose()
    await close(listeners)
    await close(await listen("127.0.0.1", port))


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", "127.0.0.2"])
async def test_taken(host):
    other = socket.create_server(("127.0.0.1", 0))
    port = other.getsockname()[1]
    with other, pytest.raises(PortTaken, match=str(port)) as info:
        await listen(host, port)
    assert "--endpoint-port" in info.value.hint


async def test_taken_in_one_family_only():
    other = socket.socket(socket.AF_INET6)
    other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    with other:
        other.bind(("::1", 0))
        other.listen()
        with pytest.raises(PortTaken):
            await listen("0.0.0.0", other.getsockname()[1])


@pytest.mark.parametrize("host", ["203.0.113.77", "no such host"])
async def test_not_ours(host):
    with pytest.raises(ConfigError, match=host):
        await listen(host, 0)
