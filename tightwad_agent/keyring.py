"""The API keys as this node keeps them: on the disk before a command has its answer, and with all others soon after.

Who has something to tell calls each living node until it has answered, and the answer holds what that one knows. A node
that starts anew is told anew, and while no key was made nobody calls. A node of a version without keys has no such
method, and is asked again rarely.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import trio
import yaml

from tightwad_agent.api_keys import KeyBook, digest_of
from tightwad_agent.errors import (
    EnvironmentFault,
    PeerError,
    PeerRefused,
    ProtocolError,
    RemoteError,
    StateDamaged,
    UsageError,
)
from tightwad_agent.ids import NodeId
from tightwad_agent.mesh.files import is_there, read_private, remove, write_private
from tightwad_agent.pulse import Pulse
from tightwad_agent.streams import Call, MethodHandler
from tightwad_agent.wire.codec import Mismatch, from_plain, to_plain
from tightwad_agent.wire.keys import MAX_RECORDS, ApiKey
from tightwad_agent.wire.rows import NodeRow, Role

log = logging.getLogger(__name__)

FILE = "api-keys.yaml"
METHOD = "keys.sync"
MAX_BYTES = 1 << 20
CALL_S = 3.0
AGAIN_S = 1.0
"""After a node did not answer."""
RARELY_S = 60.0
"""After a node said that it knows no such call."""
AT_ONCE = 8
_HEAD = b"# Written by tightwad-agent: SHA-256 of each API key, never a key itself.\n"
_HINT = "restore the file from a backup, or delete it: the other machines tell again what they know"

Living = Callable[[], Iterable[NodeRow]]
"""The rows of the living nodes but this one."""


class Keyring:
    """See the module. `tell` hears what other nodes did."""

    def __init__(
        self, state_dir: Path, default: str, *, wall: Callable[[], float], tell: Callable[[str], None]
    ) -> None:
        """Reads the file. Raises `StateDamaged`."""
        self._path = state_dir / FILE
        self._wall = wall
        self._tell = tell
        self._book = KeyBook(default)
        self._book.merge(_read(self._path), wall())
        self._news = Pulse()
        self._told: dict[NodeId, tuple[int, bytes]] = {}
        """Incarnation and fingerprint at which a node was last told."""
        self._wait: dict[NodeId, float] = {}
        self._saving = trio.Lock()

    def holder(self, key: bytes) -> str:
        """The name of a good key; empty for any other."""
        return self._book.holder(key, self._wall())

    def default_is_good(self) -> bool:
        return self._book.default_is_good()

    def records(self) -> tuple[ApiKey, ...]:
        return self._book.records()

    async def create(self, name: str, key: str, expires_s: int = 0) -> ApiKey:
        """Makes `key` good, for `expires_s` or for ever. Raises `UsageError`, or `EnvironmentFault` where the disk
        refuses: then it is good until this node ends."""
        now = self._wall()
        record = self._book.create(name, digest_of(key.encode()), now, int(now) + expires_s if expires_s else 0)
        await self._changed()
        return record

    async def revoke(self, which: str) -> tuple[ApiKey, ...]:
        """By name or id; in force at once, also where the disk refuses. Raises `UsageError` or `EnvironmentFault`."""
        revoked = self._book.revoke(which, self._wall())
        await self._changed()
        return revoked

    def methods(self) -> Mapping[str, MethodHandler]:
        """Calls from other nodes."""
        return {METHOD: self._answer}

    async def run(self, call: Call, living: Living, changed: Pulse) -> None:
        """Tells the others, until cancelled. `changed` beats when nodes come and go."""
        while True:
            coming, news = changed.count, self._news.count
            due_in_s = await self._tell_all(call, living())
            with trio.move_on_after(due_in_s):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_wait_then_cancel, changed, coming, nursery.cancel_scope)
                    nursery.start_soon(_wait_then_cancel, self._news, news, nursery.cancel_scope)

    async def _tell_all(self, call: Call, rows: Iterable[NodeRow]) -> float:
        """Once to each who is to be told; how long until somebody is to be asked again."""
        now, living = trio.current_time(), {row.node: row for row in rows}
        self._told = {node: what for node, what in self._told.items() if node in living}
        self._wait = {node: at for node, at in self._wait.items() if node in living and at > now}
        mine, at_once = self._book.fingerprint(), trio.CapacityLimiter(AT_ONCE)
        async with trio.open_nursery() as nursery:
            for node, row in living.items():
                is_told = not mine or self._told.get(node) == (row.incarnation, mine)
                if not is_told and node not in self._wait:
                    nursery.start_soon(self._tell_one, call, row, at_once)
        return min(self._wait.values(), default=now + RARELY_S) - now

    async def _tell_one(self, call: Call, row: NodeRow, at_once: trio.CapacityLimiter) -> None:
        async with at_once:
            mine, pause_s = self._book.fingerprint(), AGAIN_S
            with trio.move_on_after(CALL_S):
                try:
                    answer = await call(row.node, METHOD, {"keys": _plain(self.records())})
                    if row.role is not Role.CLIENT:  # a client is told, and not believed
                        await self._take(answer)
                except (RemoteError, PeerRefused):
                    pause_s = RARELY_S  # of a version without keys, or this node is a client
                except PeerError as exc:
                    log.debug("API keys were not told to %s: %s", row.node.short, exc.message)
                else:
                    self._told[row.node] = (row.incarnation, mine)
                    return
            self._wait[row.node] = trio.current_time() + pause_s

    async def _answer(self, _peer: NodeId, params: dict[str, Any]) -> dict[str, Any]:
        await self._take(params)
        return {"keys": _plain(self.records())}

    async def _take(self, message: Mapping[str, Any]) -> None:
        """What another node knows. Raises `ProtocolError`."""
        plain = message.get("keys")
        if not isinstance(plain, list) or len(plain) > MAX_RECORDS:
            raise ProtocolError("keys: a list is expected")
        try:
            records = [from_plain(ApiKey, entry) for entry in plain]
        except Mismatch as exc:
            raise ProtocolError(f"keys: {exc}") from None
        taken = self._book.merge(records, self._wall())
        for record in taken:
            self._tell(f"the API key {record.name} ({record.short}) is {'revoked' if record.revoked else 'good'} now")
        if taken:
            try:
                await self._changed()
            except EnvironmentFault as exc:
                self._tell(f"API keys not saved: {exc.message}")

    async def _changed(self) -> None:
        self._news.beat()
        async with self._saving:
            await trio.to_thread.run_sync(_write, self._path, self.records())


async def _wait_then_cancel(pulse: Pulse, seen: int, scope: trio.CancelScope) -> None:
    await pulse.wait(seen)
    scope.cancel()


def _plain(records: Iterable[ApiKey]) -> list[Any]:
    return [to_plain(r) for r in records]


def _read(path: Path) -> tuple[ApiKey, ...]:
    if not is_there(path, _HINT):
        return ()
    data = read_private(path, MAX_BYTES, _HINT)
    try:
        plain = yaml.safe_load(data)
        if not isinstance(plain, list) or len(plain) > MAX_RECORDS:
            raise ValueError("a list of keys is expected")  # noqa: TRY301
        return tuple(_record(entry) for entry in plain)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, Mismatch, RecursionError):
        raise StateDamaged(f"{path} is not as this program writes it", hint=_HINT) from None


def _record(entry: dict[str, Any]) -> ApiKey:
    plain = [bytes.fromhex(entry["sha256"]), entry["name"], entry["created"], entry["expires"], entry["revoked"]]
    return from_plain(ApiKey, plain)


def _write(path: Path, records: tuple[ApiKey, ...]) -> None:
    plain = [
        {"name": str(r.name), "sha256": r.digest.hex(), **{k: getattr(r, k) for k in ("created", "expires", "revoked")}}
        for r in records
    ]
    write_private(path, _HEAD + yaml.safe_dump(plain, sort_keys=False, width=200).encode())


def forget(state_dir: Path) -> None:
    """What `leave` does. Raises `EnvironmentFault`."""
    remove(state_dir / FILE)


def check_default(state_dir: Path, default: str) -> None:
    """Raises `UsageError` where the cluster's first key was revoked, as far as this machine knows."""
    book = KeyBook(default)
    book.merge(_read(state_dir / FILE), 0)
    if not book.default_is_good():
        raise UsageError(
            "the cluster's first API key was revoked", hint="`tightwad-agent key create NAME` makes another"
        )
