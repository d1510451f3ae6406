"""The models of this node on disk: own copies in the models directory, and files shared where they lie.

    models_dir/NAME.gguf                 own copies, whole and checked; nothing else is ever put under such a name
    models_dir/NAME-00001-of-00003.gguf  the files of one model, which the engine finds beside one another
    models_dir/.swarm/catalogue          which model is which file, and how to see that it changed
    models_dir/.swarm/ROOT.manifest      one for each model that is here or on its way
    models_dir/.swarm/ROOT.part .journal what is on its way; ROOT.00002.part and so on for further files
    models_dir/.swarm/downloads/         what `add` fetches

Files get their final names in this order: bytes synced, catalogue entry with the final names written, files linked
there (which fails rather than replaces), folder synced, `.part` removed. `open` finishes what a crash left between two
steps. Until the last file of a model is in its place, the model is not offered.

All methods block and may be called from threads; those that say so only look at memory and file status.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tightwad_agent.errors import AgentRunning, BadGguf, BadManifest, EnvironmentFault, ModelError, ProtocolError
from tightwad_agent.ids import ModelId, SafeName
from tightwad_agent.swarm import files
from tightwad_agent.swarm.catalogue import VERSION as CATALOGUE_VERSION
from tightwad_agent.swarm.catalogue import Entry
from tightwad_agent.swarm.catalogue import decode as decode_catalogue
from tightwad_agent.swarm.catalogue import encode as encode_catalogue
from tightwad_agent.swarm.facts import facts_of
from tightwad_agent.swarm.files import FreeBytes, Identity, Tick, no_tick
from tightwad_agent.swarm.gguf import Gguf
from tightwad_agent.swarm.manifest import Manifest, decode
from tightwad_agent.swarm.measure import Opened, find, header, measure
from tightwad_agent.swarm.names import distinct, safe_name, shard_of
from tightwad_agent.swarm.part import PartFile, claimed_pieces, named_parts, part_paths
from tightwad_agent.swarm.quota import Quota
from tightwad_agent.swarm.reuse import Held
from tightwad_agent.wire.codec import Mismatch
from tightwad_agent.wire.rows import MAX_MODELS, ModelFacts
from tightwad_agent.wire.swarm import MAX_MANIFEST_BYTES

__all__ = ["CATALOGUE_VERSION", "Entry", "Store"]

log = logging.getLogger(__name__)

_NAME_TRIES = 100


class Store:
    """Owner of a models directory. `open` before all else, `close` at the end."""

    def __init__(self, models_dir: Path, *, free: FreeBytes = files.free_bytes, max_bytes: int = 0) -> None:
        """`max_bytes`: what own copies and files on their way may take together; 0 for no limit."""
        self.models_dir = models_dir.absolute()
        self.state_dir = self.models_dir / ".swarm"
        self.downloads = self.state_dir / "downloads"
        self.free = free
        self.quota = Quota(max_bytes, self.state_dir)
        self._mutex = threading.RLock()
        self._entries: dict[ModelId, Entry] = {}
        self._manifests: dict[ModelId, Manifest] = {}
        self._damaged: frozenset[ModelId] = frozenset()
        self._not_compared: set[ModelId] = set()
        self._lock_fd = -1

    def open(self) -> None:
        """Makes the directory, takes it for this process, reads the catalogue, finishes what a crash interrupted.

        Raises `AgentRunning` if another agent has it, `EnvironmentFault` if it cannot be written to.
        """
        try:
            self.downloads.mkdir(parents=True, exist_ok=True, mode=0o700)
            files.require_writable(self.models_dir, self.state_dir, self.downloads)
            self._lock_fd = _lock(self.state_dir / "lock")
        except OSError as exc:
            raise EnvironmentFault(
                f"cannot use the models directory {self.models_dir}: {exc.strerror or exc}",
                hint="Make it writable for the user who runs the agent, or choose another with --models-dir.",
            ) from None
        with self._mutex:
            self._entries = self._read_catalogue()
            for entry in list(self._entries.values()):
                self._recover(entry)
        for leftover in self.state_dir.glob("*.tmp"):
            leftover.unlink(missing_ok=True)

    def close(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # What is here

    def entries(self) -> tuple[Entry, ...]:
        """All, also those that have a `problem`. Memory only."""
        return tuple(self._entries.values())

    def entry(self, root: ModelId) -> Entry | None:
        """The complete model, if its file is unchanged. Looks at file status only."""
        entry = self._entries.get(root)
        return entry if entry is not None and not self.problem(entry) else None

    def problem(self, entry: Entry) -> str:
        """Why an entry is not offered; empty if it is. Looks at file status only."""
        if entry.root in self._damaged:
            return f"{entry.where} is damaged: its bytes are no longer what they were"
        return entry.problem()

    def problems(self) -> dict[ModelId, str]:
        """All entries that have a problem."""
        return {e.root: text for e in self.entries() if (text := self.problem(e))}

    def mark_damaged(self, root: ModelId) -> None:
        """The file's status is the same, but its bytes are not. Memory only: `share` finds out again."""
        self._damaged = self._damaged | {root}

    def manifest(self, root: ModelId) -> Manifest | None:
        """The manifest, if one is here; a damaged one is dropped."""
        if (known := self._manifests.get(root)) is not None:
            return known
        path = self._manifest_path(root)
        try:
            with path.open("rb") as file:
                manifest = decode(file.read(MAX_MANIFEST_BYTES + 1), root)
        except OSError:
            return None
        except BadManifest as exc:
            log.warning("dropped a damaged manifest: %s", exc)
            path.unlink(missing_ok=True)
            return None
        self._manifests[root] = manifest
        return manifest

    def keep_manifest(self, manifest: Manifest) -> None:
        """Remembers a manifest across restarts."""
        files.write_atomic(self._manifest_path(manifest.root), manifest.encode())
        self._manifests[manifest.root] = manifest

    def read_gguf(self, root: ModelId) -> Gguf:
        """The header of a complete model, of its first file if it has several.

        Raises `BadGguf`, or `ModelError` if the file is not there unchanged.
        """
        entry = self.entry(root)
        if entry is None:
            raise ModelError(f"model {root.short} is not complete on this machine")
        with Opened(entry.where) as fd:
            return header(fd, entry.identities[0].size)

    # What comes

    def share(self, path: Path, tick: Tick = no_tick) -> Entry:
        """Takes a GGUF into the catalogue where it lies, with the other files of its model. Paths that are known and
        unchanged are not read again.

        Raises `ModelError` (missing, unreadable, a folder, changed meanwhile, not all of its files) or `BadGguf`.
        """
        paths, name = find(path)
        known = self._known(paths)
        if known is not None:
            return known
        manifest, identities = measure(paths, name, tick)
        with self._mutex:
            present = self.entry(manifest.root)
            if present is not None:
                if self.manifest(present.root) is None:
                    self.keep_manifest(replace(manifest, name=present.name))
                return present
            name = self._distinct(manifest)
            entry = Entry.of(replace(manifest, name=name), paths, identities, in_place=True)
            self._keep(entry, manifest)
        return entry

    def adopt(self, temporary: Path, name: str, tick: Tick = no_tick) -> Entry:
        """Makes a downloaded GGUF an own copy. The file is moved, or removed if the model is here already."""
        return self.adopt_all([temporary], name, tick)

    def adopt_all(self, temporaries: Sequence[Path], name: str, tick: Tick = no_tick) -> Entry:
        """`adopt` of all files of a model, in their order; `name` is the model's, such as NAME.gguf."""
        manifest, identities = measure(temporaries, safe_name(name), tick)
        with self._mutex:
            present = self.entry(manifest.root)
            if present is not None:
                for temporary in temporaries:
                    temporary.unlink(missing_ok=True)
                return present
            for temporary, part in zip(temporaries, self._part_paths(manifest), strict=True):
                os.replace(temporary, part)
            return self._place(manifest, identities)

    def open_part(self, manifest: Manifest, tick: Tick = no_tick) -> PartFile:
        """The place where the pieces of a model are collected; raises `DiskFull`."""
        root = manifest.root
        with self.quota.promised(manifest.size, str(manifest.name), self.own_bytes(), root):
            return PartFile.open(self._part_path(root), self._journal_path(root), manifest, self.free, tick)

    def own_bytes(self) -> dict[str, int]:
        """Bytes of each own copy, by model. Memory only."""
        return {str(e.root): e.size for e in self.entries() if not e.in_place}

    def elsewhere(self, root: ModelId) -> Iterator[Held]:
        """What else is on this disk and has pieces: complete models, then what is on its way."""
        for entry in self.entries():
            manifest = None if entry.root == root or self.problem(entry) else self.manifest(entry.root)
            if manifest is not None and len(manifest.sizes) == len(entry.files):
                yield Held(manifest, entry.paths, entry.identities, range(len(manifest.pieces)))
        for journal in sorted(self.state_dir.glob("*.journal")):
            if journal.stem == root or not ModelId.is_valid(journal.stem):
                continue
            manifest = self.manifest(other := ModelId(journal.stem))
            if manifest is not None:
                pieces = claimed_pieces(self._part_path(other), journal, manifest)
                yield Held(manifest, self._part_paths(manifest), None, sorted(pieces))

    def missing_room(self, manifest: Manifest) -> bool:
        """Whether `open_part` would raise `DiskFull` now."""
        if self.quota.exceeded(manifest.size, self.own_bytes(), manifest.root):
            return True
        parts = [part for part in self._part_paths(manifest) if part.exists()]
        allocated = sum(getattr(part.stat(), "st_blocks", 0) * 512 for part in parts)
        return manifest.size - allocated > self.free(self.state_dir)

    def finish(self, part: PartFile) -> Entry:
        """Gives the files their final names, once every piece was compared as it came. The root stands for the pieces,
        which are all of it: reading everything back can wait (`not_compared`)."""
        manifest = part.manifest
        if len(part.have) != len(manifest.pieces):
            raise ValueError(f"{manifest.name}: {len(part.have)} of {len(manifest.pieces)} pieces are here")
        try:
            facts = facts_of(*(header(fd, n) for fd, n in zip(part.fds, manifest.sizes, strict=True)))
        except BadGguf as exc:
            log.warning("%s: %s", manifest.name, exc)
            facts = ModelFacts()
        for fd in part.fds:
            os.fsync(fd)
        with self._mutex:
            identities = tuple(Identity.of(os.fstat(fd)) for fd in part.fds)
            entry = self.entry(manifest.root) or self._place(replace(manifest, facts=facts), identities)
            self._not_compared.add(entry.root)
        return entry

    @property
    def not_compared(self) -> tuple[ModelId, ...]:
        """Models that came in this run and were not read back from the disk. Memory only."""
        return tuple(self._not_compared)

    def compared(self, root: ModelId) -> None:
        """It was read back."""
        self._not_compared.discard(root)

    # What is not as it was

    def reoffer(self, entry: Entry) -> bool:
        """Takes a file for good that was just compared; `entry` has the identity it had before. False if it changed."""
        with self._mutex:
            if entry.root not in self._entries or entry.problem():
                return False
            self._write_catalogue(self._entries | {entry.root: entry})
            self._damaged -= {entry.root}
        return True

    def unmake(self, root: ModelId, good: Collection[int]) -> None:
        """Makes a damaged own copy a `.part` again that holds the `good` pieces.

        A crash leaves the copy as it was (`open` moves it back), or the `.part`. Raises `ModelError` for a file that
        is not ours to change.
        """
        with self._mutex:
            entry, manifest = self._entries.get(root), self.manifest(root)
            if entry is None or entry.in_place or manifest is None or any(p.is_symlink() for p in entry.paths):
                raise ModelError(f"model {root.short} has no copy of its own here that could be repaired")
            self.drop_part(root)
            for path, part in zip(entry.paths, self._part_paths(manifest), strict=True):
                os.rename(path, part)
            PartFile.restart(self._part_path(root), self._journal_path(root), manifest, good)
            self._write_catalogue({r: e for r, e in self._entries.items() if r != root})
            self._damaged -= {root}

    # What goes

    def put_aside(self, root: ModelId) -> list[Path]:
        """Gives what was collected of an incomplete model, at once, the names of litter that `open` deletes."""
        with self._mutex:
            self._manifests.pop(root, None)
            paths = [*self._parts_of(root), self._journal_path(root), self._manifest_path(root)]
            return [path.rename(path.with_name(path.name + ".tmp")) for path in paths if os.path.lexists(path)]

    def remove(self, root: ModelId) -> None:
        """Forgets a model, and deletes what of it is our own; a file shared in place stays untouched."""
        with self._mutex:
            entry = self._entries.get(root)
            if entry is not None:
                self._write_catalogue({r: e for r, e in self._entries.items() if r != root})
                if not entry.in_place:
                    self._drop(entry.paths, entry.identities)
                    files.fsync_folder(self.models_dir)
            self.discard(root)

    def drop_part(self, root: ModelId) -> None:
        """Deletes what was collected of a model that came another way."""
        with self._mutex:
            self._journal_path(root).unlink(missing_ok=True)
            for part in self._parts_of(root):
                part.unlink(missing_ok=True)

    def discard(self, root: ModelId) -> None:
        """Deletes what was collected of an incomplete model, and its manifest."""
        with self._mutex:
            self.drop_part(root)
            self._manifest_path(root).unlink(missing_ok=True)
            self._manifests.pop(root, None)

    # How

    def _known(self, paths: tuple[Path, ...]) -> Entry | None:
        with self._mutex:
            for entry in self._entries.values():
                if entry.paths == paths and not self.problem(entry) and self.manifest(entry.root) is not None:
                    return entry
        return None

    def _keep(self, entry: Entry, manifest: Manifest) -> None:
        if len(self._entries) >= MAX_MODELS and entry.root not in self._entries:
            raise ModelError(f"the catalogue is full: {MAX_MODELS} models", hint="Remove one first.")
        self.keep_manifest(replace(manifest, name=entry.name, facts=entry.facts))
        self._write_catalogue(self._entries | {entry.root: entry})
        self._damaged -= {entry.root}

    def _place(self, manifest: Manifest, identities: Sequence[Identity]) -> Entry:
        """Gives files, whose bytes are checked and synced, their final names. Each is a `.part`, or where an attempt
        before moved it to."""
        old = self._entries.get(manifest.root)
        before = [[part] for part in self._part_paths(manifest)]
        if old is not None and not old.in_place and len(old.paths) == len(before):
            before = [[*paths, path] for paths, path in zip(before, old.paths, strict=True)]
        for _ in range(_NAME_TRIES):
            name = self._distinct(manifest, identities)
            named = replace(manifest, name=name)
            finals = [self.models_dir / text for text in named.file_names]
            entry = Entry.of(named, finals, identities, in_place=False)
            self._keep(entry, manifest)
            if all(map(_arrive, before, finals, identities)):
                self._tidy(entry, before)
                return entry
            for paths, final in zip(before, finals, strict=True):
                paths.append(final)
        raise ModelError(f"found no free name for {manifest.name} in {self.models_dir}")

    def _tidy(self, entry: Entry, before: Sequence[Sequence[Path]]) -> None:
        files.fsync_folder(self.models_dir)
        for paths, file in zip(before, entry.files, strict=True):
            self._drop([p for p in paths if p != file.where], [file.identity] * len(paths))
        self.drop_part(entry.root)

    def _drop(self, paths: Sequence[Path], identities: Sequence[Identity]) -> None:
        """Deletes files that are still what they were."""
        for path, identity in zip(paths, identities, strict=False):
            if Identity.at(path) == identity:
                path.unlink(missing_ok=True)

    def _recover(self, entry: Entry) -> None:
        """An own copy whose catalogue entry was written: finish moving it, if that was interrupted."""
        parts = named_parts(self._part_path(entry.root), len(entry.files))
        if entry.in_place or not any(map(_is, parts, entry.identities)):
            return
        if not entry.problem():
            self._tidy(entry, [[part] for part in parts])
        elif all(map(_is_at_one, zip(parts, entry.paths, strict=True), entry.identities)):
            manifest = self.manifest(entry.root)
            if manifest is not None and len(manifest.sizes) == len(parts):
                self._place(manifest, entry.identities)

    def _distinct(self, manifest: Manifest, own: Sequence[Identity] = ()) -> SafeName:
        """A name that no other model has, and, for an `own` copy, no file on the disk but itself."""
        taken = {str(e.name) for e in self._entries.values() if e.root != manifest.root}
        if own:
            on_disk = {name for name in os.listdir(self.models_dir) if Identity.at(self.models_dir / name) not in own}
            taken |= on_disk
            if manifest.files:
                taken |= {shard[0] for shard in map(shard_of, on_disk) if shard is not None}
        return distinct(manifest.name, taken)

    def _read_catalogue(self) -> dict[ModelId, Entry]:
        path = self.state_dir / "catalogue"
        try:
            entries = decode_catalogue(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (ProtocolError, Mismatch, OSError) as exc:
            log.warning("the catalogue of models cannot be read and is put aside as %s.damaged: %s", path, exc)
            os.replace(path, path.with_name("catalogue.damaged"))
            return {}
        return {entry.root: entry for entry in entries}

    def _write_catalogue(self, entries: dict[ModelId, Entry]) -> None:
        """Disk first; then the whole dict is exchanged, so that readers need no lock."""
        files.write_atomic(self.state_dir / "catalogue", encode_catalogue(entries.values()))
        self._entries = entries

    def _manifest_path(self, root: ModelId) -> Path:
        return self.state_dir / f"{root}.manifest"

    def _part_path(self, root: ModelId) -> Path:
        return self.state_dir / f"{root}.part"

    def _part_paths(self, manifest: Manifest) -> tuple[Path, ...]:
        return part_paths(self._part_path(manifest.root), manifest)

    def _parts_of(self, root: ModelId) -> list[Path]:
        """What there is, also without a manifest."""
        return sorted(self.state_dir.glob(f"{root}*.part"))

    def _journal_path(self, root: ModelId) -> Path:
        return self.state_dir / f"{root}.journal"


def _is(path: Path, identity: Identity) -> bool:
    return Identity.at(path) == identity


def _is_at_one(paths: Iterable[Path], identity: Identity) -> bool:
    return any(_is(path, identity) for path in paths)


def _arrive(before: Sequence[Path], final: Path, identity: Identity) -> bool:
    """Moves a file from one of the places where it was to its final name; False if that is taken."""
    return _is(final, identity) or _link(next((p for p in before if _is(p, identity)), before[0]), final)


def _link(part: Path, final: Path) -> bool:
    """Moves a file to a name that must be free; False if it is not."""
    try:
        os.link(part, final)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if os.path.lexists(final):
            return False
        os.rename(part, final)
    return True


def _lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        import fcntl  # noqa: PLC0415 - not on every system

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except OSError:
        os.close(fd)
        raise AgentRunning(f"another agent uses {path.parent.parent}", hint="Give each its own models_dir.") from None
    return fd
