"""What the commands that need no running agent do, and how an agent is started. Blocking; each runs trio once."""

from __future__ import annotations

import dataclasses
import logging
import platform
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any

import trio

from tightwad_agent import __version__, control, event_log, keyring, render
from tightwad_agent.agent import Agent, Ready
from tightwad_agent.config import Config
from tightwad_agent.engine import pins
from tightwad_agent.engine.provision import Installed, Request, ensure, locate
from tightwad_agent.errors import AgentNotRunning, AgentRunning, UsageError
from tightwad_agent.ids import Address, NodeId
from tightwad_agent.mesh import identity, netif, tokens
from tightwad_agent.mesh.advert import cluster_hash
from tightwad_agent.mesh.enrol import join as enrol
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.mdns import Gone, Mdns, News
from tightwad_agent.wire.rows import Role

log = logging.getLogger(__name__)

SEARCH_S = 30.0
"""How long a joiner looks for its cluster over mDNS when the token's addresses lead nowhere."""
QUIET_S = 0.7
LEAVE_S = 30.0


def run_agent(config: Config, token: str | None) -> None:
    """`up`: founds or joins a cluster at the first start, then runs until it is told to stop."""
    from tightwad_agent import log as logs  # noqa: PLC0415 - only an agent logs

    logs.setup(config.log_level, json=config.log_json)
    with control.StateLock(config.state_dir):
        control.retract(config.state_dir)
        me, is_new = _identity(config, token)
        me = _new_start(me, config)
        control.admin_key(config.state_dir)
        agent = Agent(config, me)

        def on_ready(ready: Ready) -> None:
            info = control.RunInfo(_pid(), ready.endpoint_port, ready.mesh_port)
            control.announce(config.state_dir, info)
            if is_new and me.can_issue:
                render.founded(_founded(agent))
            render.ready(_ready(agent))

        try:
            trio.run(agent.run, on_ready, strict_exception_groups=True)
        finally:
            control.retract(config.state_dir)


def _pid() -> int:
    import os  # noqa: PLC0415

    return os.getpid()


def _identity(config: Config, token: str | None) -> tuple[Identity, bool]:
    """This node's identity; made, by founding or joining, if there is none yet."""
    known = identity.load(config.state_dir)
    if token is not None:
        return trio.run(_enrol, config, token), known is None
    if known is not None:
        return known, False
    return identity.create_cluster(config.state_dir, config.name, time.time()), True


def _new_start(me: Identity, config: Config) -> Identity:
    """This start's incarnation, on the disk before anybody hears of it; and the name, if it was changed."""
    now = time.time()
    if me.can_issue and me.renewal_due(now):
        me = identity.renew_own(me, now)
    state = dataclasses.replace(me.state, incarnation=me.state.incarnation + 1, name=config.name)
    state.save(config.state_dir)
    return dataclasses.replace(me, state=state)


def _founded(agent: Agent) -> dict[str, Any]:
    book = agent.mesh.ledger
    assert book is not None
    made = identity.issue_token(agent.identity, book, time.time(), addresses=agent.mesh.addresses[:8])
    return {"name": str(agent.mesh.row.name), "cluster": str(agent.identity.cluster), "token": made.text}


def _ready(agent: Agent) -> dict[str, Any]:
    addresses = agent.mesh.addresses
    is_local = agent.config.endpoint_host in ("127.0.0.1", "localhost", "::1")
    lan = f"http://{Address(addresses[0].host, agent.endpoint_port)}/v1" if addresses and not is_local else ""
    return {
        "endpoint": f"http://127.0.0.1:{agent.endpoint_port}/v1",
        "lan": lan,
        "api_key": agent.identity.state.api_key,
        "open_endpoint": agent.config.open_endpoint,
        "models": [str(m.name) for m in agent.swarm.held()],
    }


# Joining


def join(config: Config, token: str) -> dict[str, Any]:
    """`join`: enrols this machine, which must not run an agent with the same state directory."""
    with control.StateLock(config.state_dir):
        me = trio.run(_enrol, config, token)
    return {"cluster": str(me.cluster), "node": str(me.node), "name": str(me.state.name), "role": str(me.role)}


async def _enrol(config: Config, text: str) -> Identity:
    """By the token's addresses and seeds; where they lead nowhere, by what mDNS finds."""
    token = tokens.parse(text)
    known = await trio.to_thread.run_sync(identity.load, config.state_dir)
    addresses: Sequence[Address] = config.seeds
    if known is None and not token.claims.addresses and not config.seeds:
        addresses = await _search(config, token)
    return await enrol(token, addresses, name=config.name, state_dir=config.state_dir, clock=time.time)


async def _search(config: Config, token: tokens.Token) -> list[Address]:
    """Addresses of members of the token's cluster, authorities first, as they announce themselves."""
    if not config.mdns:
        raise UsageError("the token holds no address, and mDNS is switched off", hint="give one: --seed HOST:PORT")
    wanted = cluster_hash(token.cluster)
    send, receive = trio.open_memory_channel[News](64)
    nobody = NodeId.of_spki(token.public_key)
    found: dict[NodeId, tuple[bool, tuple[Address, ...]]] = {}
    facts = await trio.to_thread.run_sync(netif.interfaces)
    netif.check_names(facts, config.interfaces)
    browser = Mdns(nobody, lambda: None, send, interfaces=config.interfaces)
    with trio.move_on_after(SEARCH_S) as patience:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(browser.run)
            async for news in receive:
                if isinstance(news, Gone) or news.cluster_hash != wanted:
                    continue
                found[news.node] = (news.advert.role is not Role.AUTHORITY, news.addresses)
                patience.deadline = min(patience.deadline, trio.current_time() + QUIET_S)
    if not found:
        why = f" ({browser.problem})" if browser.problem else ""
        raise AgentNotRunning(
            f"no machine of cluster {token.cluster.short} answered over mDNS within {SEARCH_S:g} s{why}",
            hint="check that its agent runs and that both are in one network; or give an address: --seed HOST:PORT",
        )
    return [address for _, addresses in sorted(found.values()) for address in addresses]


# The rest


def api_key(config: Config) -> str:
    """`key`."""
    me = identity.load(config.state_dir)
    if me is None:
        raise UsageError(f"{config.state_dir} belongs to no cluster yet", hint="start the agent: tightwad-agent")
    return me.state.api_key


def leave(config: Config) -> dict[str, Any]:
    """`leave`: stops the agent if it runs, then forgets the identity."""
    me = identity.load(config.state_dir) if config.state_dir.is_dir() else None
    if me is None:
        raise UsageError(f"{config.state_dir} belongs to no cluster")
    if control.running(config.state_dir) is not None:
        control.AgentClient(config.state_dir).call("leave")
    ends_at = time.monotonic() + LEAVE_S
    while True:
        try:
            with control.StateLock(config.state_dir):
                identity.destroy(config.state_dir)
                keyring.forget(config.state_dir)
                event_log.forget(config.state_dir)
                break
        except AgentRunning:
            if time.monotonic() > ends_at:
                raise
            time.sleep(0.1)
    return {"cluster": str(me.cluster), "models_dir": str(config.models)}


def engine_install(config: Config, show: Callable[[str, int, int, str], None]) -> dict[str, Any]:
    """`engine install`."""
    return _engine(trio.run(ensure, Request.of(config), show))


def engine_status(config: Config) -> dict[str, Any]:
    """`engine status`: looks, fetches nothing."""
    found = trio.run(locate, Request.of(config))
    return _engine(found.engine) if found.engine else {**_NO_ENGINE, "skipped": _skipped(found.skipped)}


_NO_ENGINE: dict[str, Any] = {
    "dir": None,
    "build": None,
    "protocol": None,
    "digest": None,
    "origin": None,
    "devices": [],
}


def _engine(engine: Installed) -> dict[str, Any]:
    return {
        "dir": str(engine.folder),
        "build": engine.build,
        "protocol": engine.protocol,
        "digest": engine.digest,
        "origin": engine.origin,
        "devices": [dataclasses.asdict(d) for d in engine.devices],
        "skipped": _skipped(engine.skipped),
    }


def _skipped(skipped: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"step": step, "reason": reason} for step, reason in skipped]


def versions() -> dict[str, str]:
    """`version`."""
    return {
        "tightwad-agent": __version__,
        "llama.cpp": pins.BUILD,
        "python": platform.python_version(),
        "trio": trio.__version__,
        "openssl": ssl.OPENSSL_VERSION,
    }
