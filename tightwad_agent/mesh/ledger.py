"""The file in which an authority remembers its tokens and whom they admitted.

One line per fact, `CRC-32 JSON`, only ever appended and synced before anything is done with it:

    {"token": [id, public key, issued, ttl_s, uses, role]}
    {"admit": [token id, node id]}

A crash can tear only the last line, which nobody acted upon; it is dropped. Damage anywhere else is refused. Everything
here blocks on the disk, and may be called from several threads.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
import zlib
from pathlib import Path
from typing import Any

from tightwad_agent.errors import EnvironmentFault, StateDamaged, UsageError
from tightwad_agent.ids import NodeId
from tightwad_agent.mesh.files import FILE_MODE, read_private, sync_dir, write_private
from tightwad_agent.mesh.tokens import Entry, Token, Verdict, decide
from tightwad_agent.wire.rows import Role

log = logging.getLogger(__name__)

FILE = "tokens.ledger"
MAX_LEDGER_BYTES = 16 << 20
MAX_TOKENS = 1000
KEEP_EXPIRED_S = 30 * 86_400
"""How long `token list` shows a token after its end, and whom it admitted."""
_HINT = "restore it from a backup, or delete it: tokens that were not used yet then stop working, nodes stay members"


class Ledger:
    """All tokens of this authority."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / FILE
        self._lock = threading.Lock()
        self._entries: dict[bytes, Entry] = {}
        self._n_good = 0
        self._n_seen = -1
        self._refresh()

    def entries(self) -> list[Entry]:
        """What `token list` shows, oldest first."""
        with self._lock:
            self._refresh()
            return sorted(self._entries.values(), key=lambda e: e.issued)

    def find(self, token_id: bytes) -> Entry | None:
        """The token with this id, if it was made here."""
        with self._lock:
            self._refresh()
            return self._entries.get(token_id)

    def add(self, token: Token, now: float) -> None:
        """Remembers a new token; only then may its text be shown. Raises `UsageError` beyond 1,000 live tokens."""
        with self._lock:
            self._refresh()
            self._make_room(now)
            entry = Entry.of(token)
            self._append({"token": _plain(entry)})
            self._entries[entry.token_id] = entry

    def admit(self, token_id: bytes, node: NodeId, now: float) -> Verdict:
        """Decides, and puts a yes on the disk before it returns. Raises `EnvironmentFault` if it cannot."""
        with self._lock:
            self._refresh()
            entry = self._entries.get(token_id)
            verdict = decide(entry, node, now)
            if verdict is Verdict.ADMIT and entry is not None:
                self._append({"admit": [token_id.hex(), str(node)]})
                self._entries[token_id] = dataclasses.replace(entry, nodes=(*entry.nodes, node))
            return verdict

    def _refresh(self) -> None:
        """Reads the file anew if it is not as this object left it."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            size = 0
        except OSError as exc:
            raise StateDamaged(f"{self._path} cannot be read: {exc.strerror}", hint=_HINT) from None
        if size == self._n_seen:
            return
        data = read_private(self._path, MAX_LEDGER_BYTES, _HINT) if size else b""
        self._n_good = _n_whole(data)
        if self._n_good < len(data):
            log.warning("%s ends in a torn line of %d bytes; it is dropped", self._path, len(data) - self._n_good)
        self._entries = _replay(self._path, data[: self._n_good])
        self._n_seen = len(data)

    def _append(self, fact: dict[str, Any]) -> None:
        data = _line(fact)
        self._n_seen = -1  # until it is known to be on the disk, the file speaks for itself
        is_new = not self._path.exists()
        try:
            flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
            fd = os.open(self._path, flags, FILE_MODE)
            with os.fdopen(fd, "wb", buffering=0) as file:
                file.truncate(self._n_good)
                file.seek(self._n_good)
                whole = file.write(data) == len(data)
                os.fsync(file.fileno())
            if is_new:
                sync_dir(self._path.parent)
        except OSError as exc:
            raise EnvironmentFault(f"{self._path} cannot be written: {exc.strerror}") from exc
        if not whole:
            raise EnvironmentFault(f"{self._path} cannot be written: the disk is full")
        self._n_good += len(data)
        self._n_seen = self._n_good

    def _make_room(self, now: float) -> None:
        """Forgets tokens that ended long ago, all at once, when there are many."""
        if len(self._entries) < MAX_TOKENS:
            return
        kept = {i: e for i, e in self._entries.items() if now < e.expires + KEEP_EXPIRED_S}
        if len(kept) >= MAX_TOKENS:
            raise UsageError(f"there are {len(kept)} join tokens", hint="use one with more uses (--uses) instead")
        lines = []
        for entry in kept.values():
            lines.append(_line({"token": _plain(entry)}))
            lines += [_line({"admit": [entry.token_id.hex(), str(node)]}) for node in entry.nodes]
        self._n_seen = -1
        write_private(self._path, b"".join(lines))
        self._refresh()


def _n_whole(data: bytes) -> int:
    """Where the last whole line ends. Sectors that never reached the disk read as zeros, no line of ours has one."""
    end = data.rfind(b"\n") + 1
    start = data.rfind(b"\n", 0, max(0, end - 1)) + 1
    return start if b"\0" in data[start:end] else end


def _plain(entry: Entry) -> list[Any]:
    return [
        entry.token_id.hex(),
        entry.public_key.hex(),
        entry.issued,
        entry.ttl_s,
        entry.uses,
        entry.role.value,
    ]


def _line(fact: dict[str, Any]) -> bytes:
    text = json.dumps(fact, separators=(",", ":")).encode()
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def _replay(path: Path, data: bytes) -> dict[bytes, Entry]:
    entries: dict[bytes, Entry] = {}
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        checksum, _, text = line.partition(b" ")
        try:
            intact = int(checksum, 16) == zlib.crc32(text)
            if intact:
                _apply(entries, json.loads(text))
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise StateDamaged(f"{path}, line {number} is damaged", hint=_HINT)
    return entries


def _apply(entries: dict[bytes, Entry], fact: dict[str, Any]) -> None:
    if "token" in fact:
        token_id, public_key, issued, ttl_s, uses, role = fact["token"]
        entry = Entry(bytes.fromhex(token_id), bytes.fromhex(public_key), issued, ttl_s, uses, Role(role))
        entries[entry.token_id] = entry
        return
    token_id, node = fact["admit"]
    entry = entries[bytes.fromhex(token_id)]
    if node not in entry.nodes:
        entries[entry.token_id] = dataclasses.replace(entry, nodes=(*entry.nodes, NodeId(node)))
