"""The coordinator's side of drafting: keeps the wanted drafters up, and hands out those that are ready.

A drafter is lost as a whole: when its stream ends, in whatever way, each of its branches gets a `NoDraft`, its handle
is dead for good, and the next one is a new handle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from tightwad_agent.engine.commands import (
    DRAFT,
    START_DRAFTER,
    STOP_DRAFTER,
    DrafterStarted,
    StartDrafter,
    plain_epoch,
)
from tightwad_agent.engine.draft_link import DraftLink
from tightwad_agent.engine.restart import Restarter, RestartPolicy, StartAt
from tightwad_agent.errors import EngineError, EngineMismatch, TightwadError
from tightwad_agent.ids import Epoch, ModelId, NodeId
from tightwad_agent.streams import Call, Framed, OpenStream, close_quietly, peer_errors
from tightwad_agent.wire.draft import FROM_DRAFTER, DrafterInfo, Hello

log = logging.getLogger(__name__)

POLICY = RestartPolicy(first_delay_s=0.2, max_delay_s=10.0, crash_window_s=10.0)
START_S = 30.0
HELLO_S = 10.0
STOP_S = 5.0
GIVEN_UP_S = 60.0
"""A drafter that its own machine has given up is asked for again after that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterSpec:
    """A drafter that is wanted. `n_vocab`: of the target; the draft model's may differ by a little. `rtt_s`: the round
    trip to its machine as it is now. `run`: another number asks for a fresh process."""

    node: NodeId
    name: str
    model: ModelId
    epoch: Epoch
    n_vocab: int
    context: int
    slots: int
    run: int = 0
    rtt_s: Callable[[], float] = field(default=lambda: 0.0, compare=False)

    @property
    def order(self) -> StartDrafter:
        return StartDrafter(self.epoch, self.model, self.context, self.slots, self.run)


@dataclass(frozen=True, slots=True)
class DraftingState:
    """One wanted drafter, for status. `phase`: starting, ready, waiting (`reason` says what went wrong; it is tried
    again) or refused (it cannot be used). `tokens_per_s` and `first_token_ms` as seen from here; 0 until known."""

    node: NodeId
    name: str
    model: ModelId
    phase: str
    reason: str = ""
    tokens_per_s: float = 0.0
    first_token_ms: float = 0.0


class DraftingService:
    """Keep `run` running; `call` and `open_stream` are the mesh's. `max_vocab_difference`: by how many tokens the
    vocabularies of target and draft may differ. `on_change` is called when a drafter's phase changes, `tell` with each
    loss, in words."""

    def __init__(
        self,
        *,
        call: Call,
        open_stream: OpenStream,
        max_vocab_difference: int = 128,
        on_change: Callable[[], None] = lambda: None,
        tell: Callable[[str], None] = lambda _text: None,
        policy: RestartPolicy = POLICY,
    ) -> None:
        self._call = call
        self._open_stream = open_stream
        self._max_difference = max_vocab_difference
        self._on_change = on_change
        self.tell = tell
        self.policy = policy
        self._kept: dict[NodeId, _Kept] = {}
        self._nursery: trio.Nursery | None = None

    def set_drafters(self, specs: Sequence[DrafterSpec]) -> None:
        """These, best first, and no others. What is wanted unchanged goes on undisturbed; the others are stopped."""
        wanted = {spec.node: spec for spec in specs}
        kept, self._kept = self._kept, {}
        for node, spec in wanted.items():
            old = kept.get(node)
            if old is not None and old.spec == spec:
                old.spec = spec  # with the newest way to ask for its round trip
                self._kept[node] = kept.pop(node)
            else:
                self._kept[node] = _Kept(self, spec)
        for old in kept.values():
            old.scope.cancel()
            if old.spec.node not in wanted and self._nursery is not None:
                self._nursery.start_soon(self._stop, old.spec)
        if self._nursery is not None:
            self._start_new(self._nursery)

    def ready(self) -> tuple[DraftLink, ...]:
        """The drafters that can be asked now, in the order they are wanted."""
        links = (kept.link for kept in self._kept.values())
        return tuple(link for link in links if link is not None and link.alive)

    def states(self) -> tuple[DraftingState, ...]:
        return tuple(kept.state for kept in self._kept.values())

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled. The far machines stop their drafters by themselves when nobody uses them."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                self._start_new(nursery)
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def _start_new(self, nursery: trio.Nursery) -> None:
        for kept in self._kept.values():
            if not kept.started:
                kept.started = True
                nursery.start_soon(kept.keep)

    async def _stop(self, spec: DrafterSpec) -> None:
        params = {"epoch": plain_epoch(spec.epoch), "run": spec.run}
        try:
            with peer_errors(STOP_S):
                await self._call(spec.node, STOP_DRAFTER, params)
        except TightwadError as exc:
            log.info("the drafter on %s was not told to stop: %s", spec.name, exc.message)

    # What one drafter needs

    async def connect(self, spec: DrafterSpec, describe: Callable[[int], DrafterInfo]) -> DraftLink:
        """A drafter that is started, checked and connected. Raises a `TightwadError`; `EngineMismatch`: for good."""
        with peer_errors(START_S):
            answer = await self._call(spec.node, START_DRAFTER, spec.order.to_params())
        self._check(spec, DrafterStarted.of_plain(answer).n_vocab, str(spec.model))
        with peer_errors(HELLO_S):
            stream = await self._open_stream(spec.node, DRAFT, {"epoch": plain_epoch(spec.epoch)})
        try:
            framed = Framed(stream, FROM_DRAFTER)
            hello: Hello = await framed.expect(Hello, deadline_s=HELLO_S)
            self._check(spec, hello.n_vocab, hello.model)
        except BaseException:
            await close_quietly(stream)
            raise
        return DraftLink(framed.detach(), hello, spec.n_vocab, describe)

    def _check(self, spec: DrafterSpec, n_vocab: int, model: str) -> None:
        if model != spec.model:
            raise EngineMismatch(f"it drafts with the model {model[:12]}, {spec.model.short} was asked for")
        if abs(n_vocab - spec.n_vocab) > self._max_difference:
            raise EngineMismatch(f"its vocabulary has {n_vocab} tokens, the target's {spec.n_vocab}")

    def changed(self) -> None:
        self._on_change()


class _Kept:
    """One wanted drafter and the task that keeps it."""

    def __init__(self, service: DraftingService, spec: DrafterSpec) -> None:
        self.spec = spec
        self.scope = trio.CancelScope()
        self.started = False
        self.link: DraftLink | None = None
        self._service = service
        self._phase = "starting"
        self._reason = ""

    @property
    def state(self) -> DraftingState:
        speed, first_ms = (self.link.tokens_per_s, self.link.first_token_ms) if self.link else (0.0, 0.0)
        return DraftingState(
            self.spec.node, self.spec.name, self.spec.model, self._phase, self._reason, speed, first_ms
        )

    async def keep(self) -> None:
        """Until cancelled: connected, or on the way to it."""
        restarter = Restarter(self._service.policy)
        with self.scope:
            while True:
                restarter.started(trio.current_time())
                given_up_s = 0.0
                try:
                    why = await self._once()
                except EngineMismatch as exc:
                    self._show("refused", exc.message)
                    self._service.tell(f"{self.spec.name} cannot draft: {exc.message}")
                    await trio.sleep_forever()
                except TightwadError as exc:
                    why = exc.message
                    given_up_s = GIVEN_UP_S if exc.code == EngineError.code else 0.0
                say = self._service.tell if self._phase == "ready" else log.info
                say(f"the drafter on {self.spec.name} was lost: {why}")
                self._show("waiting", why)
                decision = restarter.exited(trio.current_time(), why, crash=False)
                await trio.sleep(given_up_s)
                if isinstance(decision, StartAt):  # always: it is no crash of ours
                    await trio.sleep_until(decision.at)

    async def _once(self) -> str:
        """One connection, from its start to its end; how it ended."""
        self._show("starting")
        self.link = await self._service.connect(self.spec, self._info)
        try:
            self._show("ready")
            self._service.tell(f"{self.spec.name} drafts now")
            return await self.link.run()
        finally:
            self.link = None

    def _info(self, slots: int) -> DrafterInfo:
        spec = self.spec
        return DrafterInfo(spec.node, spec.name, str(spec.model), slots, spec.rtt_s())

    def _show(self, phase: str, reason: str = "") -> None:
        self._phase, self._reason = phase, reason
        self._service.changed()
