"""What the command line asks of the running agent about API keys."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from tightwad_agent.api_keys import DEFAULT, state_of
from tightwad_agent.errors import UsageError
from tightwad_agent.keyring import Keyring
from tightwad_agent.mesh.identity import new_api_key
from tightwad_agent.proxy.cluster import Command, Progress
from tightwad_agent.proxy.usage import Usage
from tightwad_agent.wire.keys import ApiKey

Plain = dict[str, Any]
MAX_LIFE_S = 10 * 365 * 86400


class KeyCommands:
    """Each method is one command: parameters in, plain data out, or a `TightwadError`."""

    def __init__(self, keyring: Keyring, usage: Usage, tell: Callable[[str], None]) -> None:
        self._keyring = keyring
        self._usage = usage
        self._tell = tell

    def table(self) -> Mapping[str, Command]:
        return {"key.create": self.create, "key.list": self.list, "key.revoke": self.revoke}

    async def create(self, params: Plain, _progress: Progress) -> Plain:
        """{name, expires_s} -> {key, name, id, expires}; the only time that the key is said."""
        expires_s = params.get("expires_s", 0)
        if type(expires_s) is not int or not 0 <= expires_s <= MAX_LIFE_S:
            raise UsageError("--expires: at most ten years")
        key = new_api_key()
        record = await self._keyring.create(_text(params, "name"), key, expires_s)
        self._tell(f"an API key was made: {record.name} ({record.short})")
        return {"key": key, "name": str(record.name), "id": record.short, "expires": record.expires or None}

    async def list(self, _params: Plain, _progress: Progress) -> Plain:
        """-> {keys}: the default one first, with what was asked with each on this machine."""
        records = self._keyring.records()
        first = [] if any(r.name == DEFAULT for r in records) else [self._default()]
        return {"keys": first + [self._shown(r) for r in records]}

    async def revoke(self, params: Plain, _progress: Progress) -> Plain:
        """{which: a name or an id} -> {revoked}"""
        revoked = await self._keyring.revoke(_text(params, "which"))
        for record in revoked:
            self._tell(f"an API key was revoked: {record.name} ({record.short})")
        return {"revoked": [{"name": str(r.name), "id": r.short} for r in revoked]}

    def _default(self) -> Plain:
        plain = {"name": str(DEFAULT), "id": "", "state": "valid", "created": None, "expires": None, "revoked": None}
        return plain | self._used(DEFAULT)

    def _shown(self, record: ApiKey) -> Plain:
        return {
            "name": str(record.name),
            "id": record.short,
            "state": str(state_of(record, time.time())),
            "created": record.created or None,
            "expires": record.expires or None,
            "revoked": record.revoked or None,
        } | self._used(record.name)

    def _used(self, name: str) -> Plain:
        used = self._usage.of(name)
        return {"requests": used.requests, "tokens": used.tokens}


def _text(params: Plain, key: str) -> str:
    value = params.get(key)
    if not isinstance(value, str):
        raise UsageError(f"{key}: a text is expected")
    return value
