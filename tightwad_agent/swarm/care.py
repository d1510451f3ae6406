"""Care of what is on the disk: files compared with their hashes again, and what nobody needs any more.

Everything here blocks: call it in a thread. What was found is remembered in `.swarm/care`, so that a damaged file is
not offered again after a restart, and a repair that was interrupted goes on.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tightwad_agent.errors import ModelError, ProtocolError, UnknownModel
from tightwad_agent.ids import ModelId, SafeName
from tightwad_agent.swarm.files import Identity, Tick, no_tick, write_atomic
from tightwad_agent.swarm.manifest import Manifest
from tightwad_agent.swarm.source import CompleteFile
from tightwad_agent.swarm.store import Entry, Store
from tightwad_agent.wire.codec import NATURAL, Max, Mismatch, from_plain, pack, to_plain, unpack
from tightwad_agent.wire.rows import MAX_MODELS

log = logging.getLogger(__name__)

MAX_AGE_S = 14 * 86400
"""What nobody needs and nobody touched for so long is removed at a start."""
FRESH_S = 3600
"""A `.tmp` file that is younger may be being written."""
MAX_NOTES_BYTES = 1 << 20


# Comparing


@dataclass(frozen=True, slots=True)
class Verdict:
    """What comparing a model's file with its hashes found. `bad`: pieces that are not what they were; `entry` has the
    file's identity from before it was read."""

    entry: Entry
    manifest: Manifest
    bad: tuple[int, ...]
    problem: str

    @property
    def good(self) -> bool:
        return not self.bad and not self.problem

    @property
    def kept(self) -> frozenset[int]:
        """Pieces that are good."""
        return frozenset(range(len(self.manifest.pieces))) - set(self.bad)


def entry_of(store: Store, model: ModelId) -> Entry:
    """Also one that has a problem. Raises `UnknownModel`."""
    found = next((e for e in store.entries() if e.root == model), None)
    if found is None:
        raise UnknownModel(f"no complete model {model.short} is on this machine")
    return found


def compare(store: Store, model: ModelId, tick: Tick = no_tick) -> Verdict:
    """Reads every byte of a model again. Raises `UnknownModel`, or `ModelError` where there is nothing to compare."""
    entry, manifest = entry_of(store, model), store.manifest(model)
    seen = entry.now()
    if seen is None:
        raise ModelError(entry.problem(), hint="Bring the file back, or take the model out: remove.")
    if manifest is None:
        raise ModelError(f"the hashes of {entry.name} are lost", hint="Add the file again.")
    bad = tuple(_bad_pieces(CompleteFile(seen, manifest), tick))
    if entry.now() != seen:
        raise ModelError(f"{entry.where} changed while it was compared", hint="Verify it again.")
    as_it_should = tuple(i.size for i in seen.identities) == manifest.sizes
    problem = "" if as_it_should else f"it has {seen.size:,} bytes, {manifest.size:,} are right"
    return Verdict(seen, manifest, bad, problem)


def _bad_pieces(source: CompleteFile, tick: Tick) -> Iterable[int]:
    for index, piece in enumerate(source.manifest.pieces):
        tick(piece.offset)
        if source.read(index, 0, 1) is None:
            yield index
    tick(source.manifest.size)


# Remembering


@dataclass(frozen=True, slots=True)
class Mark:
    """A file that was found damaged, as it was then."""

    model: ModelId
    inode: Annotated[int, NATURAL]
    size: Annotated[int, NATURAL]
    mtime_ns: int

    @property
    def identity(self) -> Identity:
        return Identity(self.inode, self.size, self.mtime_ns)


@dataclass(frozen=True, slots=True)
class Notes:
    """What outlives a restart: damaged files, and models that are being repaired."""

    damaged: Annotated[tuple[Mark, ...], Max(MAX_MODELS)] = ()
    repairing: Annotated[tuple[ModelId, ...], Max(MAX_MODELS)] = ()

    def without(self, model: ModelId) -> Notes:
        return Notes(tuple(m for m in self.damaged if m.model != model), tuple(m for m in self.repairing if m != model))


def read_notes(store: Store) -> Notes:
    """What was kept; nothing where it cannot be read."""
    try:
        with _notes_path(store).open("rb") as file:
            return from_plain(Notes, unpack(file.read(MAX_NOTES_BYTES)))
    except FileNotFoundError:
        return Notes()
    except (OSError, ProtocolError, Mismatch) as exc:
        log.warning("what was known of damaged files cannot be read: %s", exc)
        return Notes()


def keep_notes(store: Store, notes: Notes) -> None:
    if notes != read_notes(store):
        write_atomic(_notes_path(store), pack(to_plain(notes)))


def recall(store: Store) -> tuple[ModelId, ...]:
    """At a start: marks what was found damaged and is still the same file; returns what is to be repaired."""
    notes = read_notes(store)
    for mark in notes.damaged:
        entry = next((e for e in store.entries() if e.root == mark.model), None)
        now = entry.now() if entry is not None else None
        if now is not None and now.identity == mark.identity:
            store.mark_damaged(mark.model)
    here = {e.root for e in store.entries()}
    left = tuple(m for m in notes.repairing if m not in here)
    keep_notes(store, Notes(notes.damaged, left))
    return left


def note_damage(store: Store, verdict: Verdict) -> None:
    """The file is not offered any more, also after a restart."""
    entry = verdict.entry
    store.mark_damaged(entry.root)
    notes = read_notes(store).without(entry.root)
    mark = Mark(entry.root, *entry.identity)
    keep_notes(store, Notes((*notes.damaged, mark)[-MAX_MODELS:], notes.repairing))


def note_good(store: Store, verdict: Verdict) -> bool:
    """The file is offered (again); False if it changed meanwhile."""
    keep_notes(store, read_notes(store).without(verdict.entry.root))
    return store.reoffer(verdict.entry)


def is_ours(store: Store, verdict: Verdict) -> bool:
    """Whether the files are the very ones that were put there: a person may have put others in their place."""
    known = {e.root: e for e in store.entries()}.get(verdict.entry.root)
    return known is not None and [f.inode for f in known.files] == [f.inode for f in verdict.entry.files]


def begin_repair(store: Store, verdict: Verdict) -> None:
    """An own copy becomes a `.part` of its good pieces. Raises `ModelError` where the file is not ours to change."""
    model = verdict.entry.root
    notes = read_notes(store).without(model)
    store.unmake(model, verdict.kept)
    keep_notes(store, Notes(notes.damaged, (*notes.repairing, model)[-MAX_MODELS:]))


def _notes_path(store: Store) -> Path:
    return store.state_dir / "care"


# Cleaning up


@dataclass(frozen=True, slots=True)
class Litter:
    """Files that nobody needs: all of one model or of one download. `n_bytes` of them all, `age_s` since a change."""

    what: str
    paths: tuple[Path, ...]
    n_bytes: int
    age_s: float
    model: ModelId | None = None


def litter(store: Store, needed: Collection[ModelId], *, downloads: bool) -> list[Litter]:
    """What could go: of models that are neither complete here nor `needed`, of downloads if none is going on."""
    complete = {e.root for e in store.entries()}
    of_models: dict[ModelId, list[Path]] = {}
    others: list[tuple[str, Path]] = []
    for path in sorted(store.state_dir.iterdir()):
        root = path.name.partition(".")[0]  # also of ROOT.00002.part, of a model of several files
        if path.suffix in (".part", ".journal", ".manifest") and ModelId.is_valid(root):
            of_models.setdefault(ModelId(root), []).append(path)
        elif path.suffix == ".tmp" and _age(path) > FRESH_S:
            others.append(("an unfinished file", path))
    if downloads:
        others += [("an unfinished download", path) for path in sorted(store.downloads.iterdir())]
    found = [
        _litter(_called(store, root, paths), paths, root)
        for root, paths in of_models.items()
        if root not in complete and root not in needed
    ]
    return found + [_litter(what, [path]) for what, path in others]


def _called(store: Store, root: ModelId, paths: list[Path]) -> str:
    manifest = store.manifest(root)
    name = manifest.name if manifest is not None else SafeName(root.short)
    return f"part of {name}" if any(p.suffix == ".part" for p in paths) else f"the manifest of {name}"


def _litter(what: str, paths: list[Path], model: ModelId | None = None) -> Litter:
    n_bytes = sum(s.st_size for path in paths for s in _statuses(path) if not stat.S_ISDIR(s.st_mode))
    return Litter(what, tuple(paths), n_bytes, min(map(_age, paths)), model)


def _age(path: Path) -> float:
    """Seconds since anything of it was changed."""
    newest = max((s.st_mtime for s in _statuses(path)), default=0.0)
    return max(0.0, time.time() - newest)


def _statuses(path: Path) -> Iterable[os.stat_result]:
    """Of a file, or of a folder and all below it; links are not followed."""
    try:
        yield os.lstat(path)
        if path.is_dir() and not path.is_symlink():
            for child in path.iterdir():
                yield from _statuses(child)
    except OSError:
        return


def delete(paths: Iterable[Path]) -> None:
    """Files and folders; what cannot be deleted is left, with a log line."""
    for path in paths:
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as exc:
            log.warning("%s cannot be removed: %s", path, exc.strerror or exc)


def clean_old(store: Store, wanted: Collection[ModelId], max_age_s: float = MAX_AGE_S) -> list[Litter]:
    """At a start: removes what nobody touched for `max_age_s`, and says so in the log."""
    old = [item for item in litter(store, wanted, downloads=True) if item.age_s > max_age_s]
    for item in old:
        log.info("removed %s: %d bytes that nobody touched for %d days", item.what, item.n_bytes, item.age_s // 86400)
        if item.model is not None:
            delete(store.put_aside(item.model))
        else:
            delete(item.paths)
    return old
