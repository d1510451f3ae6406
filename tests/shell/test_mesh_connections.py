"""Cutting connections: those of one node, or those over one address, and no others."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator

import pytest
import trio
from mesh_lab import PATIENCE_S, Box, Wires, check_echo, founder, links_of, member, read_to_end, start

from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.links import Links


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return founder(tmp_path_factory.mktemp("cut"), "one")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, one: Identity) -> Identity:
    return member(one, tmp_path_factory.mktemp("cut"), "two")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, one: Identity) -> Identity:
    return member(one, tmp_path_factory.mktemp("cut"), "three")


@pytest.fixture
async def wires() -> AsyncIterator[Wires]:
    async with Wires() as made:
        yield made


async def ends(stream: trio.abc.Stream) -> bool:
    """It ended, without an error of its own kind."""
    return await read_to_end(stream) == b""


async def works(stream: trio.abc.Stream) -> bool:
    with trio.fail_after(PATIENCE_S):
        await stream.send_all(b"x")
        return await stream.receive_some(1) == b"x"


@pytest.mark.parametrize("by_listener", [True, False])
async def test_the_connections_of_one_node_are_cut_and_others_are_not(
    nursery: trio.Nursery, one: Identity, two: Identity, three: Identity, wires: Wires, by_listener: bool
) -> None:
    box = await start(nursery, one)
    a, b = links_of(two), links_of(three)
    first, second, other = [await wires.dial(links, box) for links in (a, a, b)]
    assert await works(first)
    n_cut = box.links.cut(two.node) if by_listener else a.cut(one.node)
    assert n_cut == 2
    assert await ends(first)
    assert await ends(second)
    assert await works(other)
    await check_echo(a, box)  # it may come again


async def test_what_went_over_one_address_is_cut(
    nursery: trio.Nursery, one: Identity, two: Identity, wires: Wires
) -> None:
    near = await start(nursery, one, host="127.0.0.1")
    far = await start(nursery, one, host="127.0.0.2")
    links = links_of(two)
    kept, lost = await wires.dial(links, near), await wires.dial(links, far)
    assert links.cut(one.node, host="127.0.0.2") == 1
    assert await ends(lost)
    assert await works(kept)


async def test_a_peer_that_is_gone_already_is_no_error(
    nursery: trio.Nursery, one: Identity, two: Identity, wires: Wires
) -> None:
    box = await start(nursery, one)
    links = links_of(two)
    stream = await wires.dial(links, box)
    await stream.aclose()
    assert links.cut(one.node) == 0


async def test_connections_are_forgotten_with_their_streams(
    nursery: trio.Nursery, one: Identity, two: Identity
) -> None:
    box: Box = await start(nursery, one)
    links: Links = links_of(two)
    for _ in range(20):
        await check_echo(links, box)
    gc.collect()
    assert len(links._connections._open) < 5
