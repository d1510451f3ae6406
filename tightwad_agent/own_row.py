"""What this node says of itself: the machine, the engine and the models, kept up to date in its row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import trio

from tightwad_agent import machine
from tightwad_agent.config import Config
from tightwad_agent.engine import capability
from tightwad_agent.engine.devices import list_devices
from tightwad_agent.engine.process import Engine
from tightwad_agent.engine.provision import Installed, Request, ensure
from tightwad_agent.errors import TightwadError
from tightwad_agent.mesh.identity import Identity
from tightwad_agent.mesh.service import MeshService
from tightwad_agent.swarm.service import SwarmService
from tightwad_agent.wire.rows import Capabilities, Device, EngineInfo, NodeRow, Role

FACTS_PERIOD_S = 10.0
ENGINE_RETRY_S = 120.0
MEMORY_STEP = 64 << 20
"""Free memory is told in these steps: a row that changes all the time would be sent all the time."""


def first_row(identity: Identity, endpoint_port: int) -> NodeRow:
    """Before anything is known of the machine."""
    state = identity.state
    return NodeRow(
        node=identity.node,
        name=state.name,
        role=identity.role,
        incarnation=state.incarnation,
        version=0,
        joined_at=state.joined_at,
        eligible=identity.role is not Role.CLIENT,
        klass=0,
        endpoint_port=endpoint_port,
    )


class OwnRow:
    """`engine` is llama.cpp once it is there; until then `problem` says why it is not. `tell` hears what a person may
    ask about. `pids`: the processes that hold a part of a model, which ends with the next plan."""

    def __init__(self, mesh: MeshService, config: Config, tell: Callable[[str], None]) -> None:
        self.engine: Installed | None = None
        self.problem = "llama.cpp is being looked for"
        self.pids: Callable[[], list[int]] = list
        self._free_before = 0  # memory of the accelerators, when nothing was held
        self._mesh = mesh
        self._config = config
        self._tell = tell

    def current_engine(self) -> Engine | None:
        """What the services of the engine run, if it is there."""
        return self.engine

    async def read(self) -> None:
        """Looks at the machine once."""
        facts = await trio.to_thread.run_sync(machine.read, self._config.models)
        found = await self._devices()
        free = facts.memory_available // MEMORY_STEP * MEMORY_STEP
        capabilities = Capabilities(
            platform=facts.platform,
            cpu=facts.cpu,
            n_cores=facts.n_cores,
            memory_total=facts.memory_total,
            memory_free=free,
            disk_free=facts.disk_free // MEMORY_STEP * MEMORY_STEP,
            devices=capability.offered(
                found, self._config.devices, cpu=facts.cpu, memory_total=facts.memory_total, memory_free=free
            ),
            engine=self.info(),
            held=await self._held(found),
        )
        klass = capability.klass(capabilities)
        self._mesh.edit_row(lambda row: replace(row, capabilities=capabilities, klass=klass))

    async def keep(self) -> None:
        """Looks again and again, until cancelled."""
        while True:
            await trio.sleep(FACTS_PERIOD_S)
            await self.read()

    async def publish_models(self, swarm: SwarmService) -> None:
        """Keeps the models that are held and fetched in the row, until cancelled."""
        while True:
            revision = swarm.revision
            held, fetching = swarm.held(), swarm.fetching()
            self._mesh.edit_row(partial(replace, models=held, fetching=fetching))
            await swarm.wait_changed(revision)

    async def _held(self, accelerators: Sequence[Device]) -> int:
        """Bytes that are not free now, and will be when the next plan is carried out."""
        pids, free = self.pids(), sum(device.memory_free for device in accelerators)
        if not pids:
            self._free_before = free
            return 0
        there = max(0, self._free_before - free)
        here = await trio.to_thread.run_sync(machine.anonymous_memory, pids)
        return (there or here) // MEMORY_STEP * MEMORY_STEP

    # The engine

    def info(self) -> EngineInfo:
        """As others are told."""
        return self.engine.info if self.engine else EngineInfo(problem=self.problem[:500])

    async def _devices(self) -> tuple[Device, ...]:
        """Accelerators as the engine lists them, with what is free now."""
        if self.engine is None or not self.engine.devices:
            return ()
        try:
            return await list_devices(self.engine)
        except TightwadError as exc:
            self._tell(f"the devices could not be listed: {exc.message}")
            return self.engine.devices

    async def find_engine(self) -> None:
        """Gets llama.cpp if it is not there; says what it is doing, and why it cannot."""
        told = ""
        while self.engine is None:
            try:
                self.engine = await ensure(Request.of(self._config), self._engine_progress)
            except TightwadError as exc:
                self.problem = str(exc)
                if exc.message != told:  # it is tried again and again
                    self._tell(f"no engine: {exc.message}")
                told = exc.message
            self._mesh.edit_row(lambda row: replace(row, note=""))
            await self.read()
            if self.engine is None:
                await trio.sleep(ENGINE_RETRY_S)
        self._tell(f"engine {self.engine.build} ({self.engine.origin})")

    def _engine_progress(self, stage: str, done: int, total: int, _unit: str) -> None:
        share = f" {100 * done // total} %" if total else ""
        note = f"{stage}{share}"[:200]
        self.problem = f"llama.cpp is not ready: {note}"
        info = self.info()
        self._mesh.edit_row(lambda row: replace(row, note=note, capabilities=replace(row.capabilities, engine=info)))
