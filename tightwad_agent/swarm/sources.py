"""Which model of this node was added from which source, kept across restarts. Sources are hashes, never addresses.

models_dir/.swarm/sources   msgpack [1, {root: source}], at most `MAX_MODELS` of them
"""

from __future__ import annotations

import hashlib
import logging
import re

from tightwad_agent.errors import ProtocolError
from tightwad_agent.ids import ModelId
from tightwad_agent.swarm import files
from tightwad_agent.swarm.flight import N_DIGEST, Holding
from tightwad_agent.swarm.store import Store
from tightwad_agent.wire.codec import pack, unpack
from tightwad_agent.wire.rows import MAX_MODELS

log = logging.getLogger(__name__)

_VERSION = 1
_SOURCE = re.compile(r"(?:[0-9a-f]{64}){1,2}\Z")
_MAX_FILE = 1 << 20


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def source_of(digest: str, version: str) -> str:
    """As in `HeldModel.source`; without a version, `digest` alone."""
    return digest + (digest_of(version) if version else "")


class Sources:
    """See the module. `load` and `note` block; the others look at memory only."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._path = store.state_dir / "sources"
        self._known: dict[ModelId, str] = {}

    def load(self) -> None:
        """What was noted before; a damaged file is as good as none."""
        try:
            with self._path.open("rb") as file:
                self._known = _read(file.read(_MAX_FILE + 1))
        except OSError:
            self._known = {}
        except ProtocolError as exc:
            log.warning("%s cannot be read: %s", self._path, exc)
            self._known = {}

    def note(self, model: ModelId, source: str) -> None:
        """`model`, which is complete here, is what `source` has. Models that are gone are forgotten."""
        here = {e.root for e in self._store.entries()} | {model}
        self._known = {m: s for m, s in self._known.items() if m in here} | {model: source}
        files.write_atomic(self._path, pack([_VERSION, {str(m): s for m, s in self._known.items()}]))

    def of(self, model: ModelId) -> str:
        """Empty if it was not added from a source."""
        return self._known.get(model, "")

    def held(self, digest: str) -> tuple[Holding, ...]:
        """Complete, unchanged models that came from there."""
        found = [m for m, s in self._known.items() if s[:N_DIGEST] == digest]
        entries = [e for m in found if (e := self._store.entry(m)) is not None]
        return tuple(Holding(e.root, str(e.name), self._known[e.root]) for e in entries)


def _read(data: bytes) -> dict[ModelId, str]:
    plain = unpack(data) if len(data) <= _MAX_FILE else None
    if not isinstance(plain, list) or len(plain) != 2 or plain[0] != _VERSION or not isinstance(plain[1], dict):
        raise ProtocolError("not a list of sources of this version")
    pairs = list(plain[1].items())[:MAX_MODELS]
    return {ModelId(m): s for m, s in pairs if ModelId.is_valid(m) and isinstance(s, str) and _SOURCE.match(s)}
