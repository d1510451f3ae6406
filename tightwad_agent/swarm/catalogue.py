"""Which complete model is which file, and how to see that it changed; as it is kept on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tightwad_agent.ids import ModelId, SafeName
from tightwad_agent.swarm.files import Identity
from tightwad_agent.swarm.manifest import MAX_FILES, Manifest
from tightwad_agent.wire.codec import Max, Mismatch, from_plain, pack, to_plain, unpack
from tightwad_agent.wire.rows import MAX_MODELS, HeldModel, ModelFacts

VERSION = 1


@dataclass(frozen=True, slots=True)
class Shard:
    """One of several files of a model; fields as in `Entry`."""

    path: bytes
    inode: int
    size: int
    mtime_ns: int

    @property
    def where(self) -> Path:
        return Path(os.fsdecode(self.path))

    @property
    def identity(self) -> Identity:
        return Identity(self.inode, self.size, self.mtime_ns)


@dataclass(frozen=True, slots=True)
class Entry:
    """One complete model. `path` is absolute, as the system's bytes; the rest tells whether the file is still it.

    With several files, `shards` lists them all; `path`, `inode` and `mtime_ns` are those of the first, `size` of all.
    """

    root: ModelId
    name: SafeName
    path: bytes
    in_place: bool
    inode: int
    size: int
    mtime_ns: int
    facts: ModelFacts = field(default_factory=ModelFacts)
    shards: Annotated[tuple[Shard, ...], Max(MAX_FILES)] = ()

    @classmethod
    def of(cls, manifest: Manifest, paths: Sequence[Path], identities: Sequence[Identity], *, in_place: bool) -> Entry:
        shards = tuple(Shard(os.fsencode(p), *i) for p, i in zip(paths, identities, strict=True))
        first = shards[0]
        return cls(
            manifest.root,
            manifest.name,
            first.path,
            in_place,
            first.inode,
            manifest.size,
            first.mtime_ns,
            manifest.facts,
            shards if manifest.files else (),
        )

    @property
    def where(self) -> Path:
        """The (first) file."""
        return Path(os.fsdecode(self.path))

    @property
    def identity(self) -> Identity:
        """Of the model's one file; `identities` of several."""
        return Identity(self.inode, self.size, self.mtime_ns)

    @property
    def files(self) -> tuple[Shard, ...]:
        """All files in their order, also where it is one."""
        return self.shards or (Shard(self.path, self.inode, self.size, self.mtime_ns),)

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(f.where for f in self.files)

    @property
    def identities(self) -> tuple[Identity, ...]:
        return tuple(f.identity for f in self.files)

    def now(self) -> Entry | None:
        """The same with the identities that its files have now; None if one of them is gone."""
        found = [Identity.at(path) for path in self.paths]
        now = [i for i in found if i is not None]
        if len(now) < len(found):
            return None
        size = sum(i.size for i in now)
        shards = tuple(Shard(f.path, *i) for f, i in zip(self.shards, now, strict=False))
        return replace(self, inode=now[0].inode, size=size, mtime_ns=now[0].mtime_ns, shards=shards)

    def problem(self) -> str:
        """Why a file cannot be offered; empty if all can. Looks at file status only."""
        for file in self.files:
            now = Identity.at(file.where)
            if now is None:
                return f"{file.where} is gone"
            if now != file.identity:
                return f"{file.where} changed since it was added; add it again"
        return ""

    def held(self) -> HeldModel:
        return HeldModel(self.root, self.name, self.size, self.size, self.facts)


def encode(entries: Iterable[Entry]) -> bytes:
    return pack([VERSION, [to_plain(e) for e in entries]])


def decode(data: bytes) -> list[Entry]:
    """Raises `ProtocolError` or `Mismatch`."""
    plain: Any = unpack(data)
    if not isinstance(plain, list) or len(plain) != 2 or plain[0] != VERSION or not isinstance(plain[1], list):
        raise Mismatch(": not a catalogue of this version")
    return [from_plain(Entry, item) for item in plain[1][:MAX_MODELS]]
