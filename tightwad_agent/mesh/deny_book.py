"""The deny list of one node, on its disk: what was in force before a restart is in force after it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from tightwad_agent.errors import ProtocolError, StateDamaged
from tightwad_agent.ids import NodeId
from tightwad_agent.mesh.deny import MAX_KEPT, DenyList
from tightwad_agent.mesh.files import is_there, read_private, write_private
from tightwad_agent.mesh.identity import DENY_LIST, Identity
from tightwad_agent.wire.codec import Max, Mismatch, from_plain, pack, to_plain, unpack
from tightwad_agent.wire.trust import Denial

MAX_FILE_BYTES = 2 << 20
_HINT = "restore it from a backup, or delete it: the other nodes of the cluster tell what was in it"
_Entries = Annotated[tuple[Denial, ...], Max(MAX_KEPT)]


class DenyBook:
    """Loading and saving block on the disk; raises `StateDamaged`, `EnvironmentFault`."""

    def __init__(self, me: Identity, now: float) -> None:
        self._path: Path = me.state_dir / DENY_LIST
        self._list = DenyList()
        if is_there(self._path, _HINT):
            self._load(me.trusted_keys(now), now)

    @property
    def list(self) -> DenyList:
        return self._list

    def merge(self, entries: Iterable[Denial], trusted: Iterable[bytes], now: float) -> tuple[Denial, ...]:
        """As `DenyList.merge`; `save` writes it down."""
        self._list.expire(now)
        return self._list.merge(entries, frozenset(trusted), now)

    def save(self) -> None:
        write_private(self._path, pack(to_plain(self._list.entries)))

    def denies(self, node: NodeId) -> bool:
        return self._list.node(node) is not None

    def _load(self, trusted: frozenset[bytes], now: float) -> None:
        try:
            data = unpack(read_private(self._path, MAX_FILE_BYTES, _HINT))
            entries: tuple[Denial, ...] = from_plain(_Entries, data)
            self._list.merge(entries, trusted, now)
        except (ProtocolError, Mismatch) as exc:
            raise StateDamaged(f"{self._path} is damaged: {exc}", hint=_HINT) from None
