"""Is llama-server getting anywhere? Not `/health`: with a stalled worker it says 200 for ever.

Nor is it enough that `/slots` answers: this build serves `/slots` and `/metrics` from a second thread while a decode
runs, and they answer within a millisecond when the decode hangs. What stands still is what they say: the token counters
of the slots at work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx
import trio

from tightwad_agent.engine.argv import LOOPBACK

POLL_MAX_S = 5.0
PROMPT_PATIENCE = 4.0
"""A batch of a prompt is up to 512 tokens of work without a sign of life, where a decode step is one."""
MAX_ANSWER_BYTES = 4 << 20
LEARNED = 5
REMEMBERED = 64
"""So many silences must be known before they count, and so many of the last are."""
PACE_S, PACE_FACTOR = 6.0, 4.0
"""A silence is a stall when it is longer than the longest of the last ones, so many times and so much."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What the slots at work say: `mark` changes whenever a decode call returned."""

    busy: int
    in_prompt: bool
    mark: tuple[Any, ...]


@dataclass(slots=True)
class StallClock:
    """Decides when a server stands still. Pure; `now` in seconds on one clock.

    It learns the pace: how long the server is silent while it works, in prompts and otherwise. `stall_s` is the most
    patience, and all of it until the pace is known.
    """

    stall_s: float
    max_gap_s: float = 3 * POLL_MAX_S
    """Looks further apart than this say that we were late, not the server."""
    _since: float | None = field(default=None, init=False)
    _seen: float | None = field(default=None, init=False)
    _mark: object = field(default=None, init=False)
    _waited: Progress | None = field(default=None, init=False)
    _silences: dict[bool, deque[float]] = field(
        default_factory=lambda: {kind: deque(maxlen=REMEMBERED) for kind in (False, True)}, init=False
    )

    def look(self, now: float, progress: Progress | None, moved: object = None) -> str:
        """Why the server counts as stalled, or empty text. `progress` is `None` if it did not answer; `moved` is
        anything that changes while work is done elsewhere (bytes to workers)."""
        late = self._seen is not None and now - self._seen > self.max_gap_s
        self._seen = now
        mark = (None if progress is None else progress.mark, moved)
        if late or self._since is None or mark != self._mark or (progress is not None and not progress.busy):
            if not late and mark != self._mark and self._since is not None:
                self._learn(now - self._since)
            self._since, self._mark, self._waited = now, mark, progress
            return ""
        patience_s = self.patience_s(in_prompt=progress is not None and progress.in_prompt)
        if now - self._since < patience_s:
            return ""
        if progress is None:
            return f"llama-server has not answered for {patience_s:.3g} s"
        requests = "1 request waits" if progress.busy == 1 else f"{progress.busy} requests wait"
        return f"no progress for {patience_s:.3g} s while {requests}: a worker or a device stands still"

    def patience_s(self, *, in_prompt: bool) -> float:
        """How long a silence may be from now on."""
        most = self.stall_s * (PROMPT_PATIENCE if in_prompt else 1)
        known = self._silences[in_prompt]
        return most if len(known) < LEARNED else min(most, PACE_S + PACE_FACTOR * max(known))

    def _learn(self, silence_s: float) -> None:
        """One is over in which something was waited for."""
        if self._waited is not None and self._waited.busy:
            self._silences[self._waited.in_prompt].append(silence_s)


class ServerClient:
    """The few questions the agent itself has for llama-server. No proxies, keys or certificates: it is loopback."""

    def __init__(self, port: int) -> None:
        self._http = httpx.AsyncClient(base_url=f"http://{LOOPBACK}:{port}", trust_env=False, verify=False)  # noqa: S501

    async def __aenter__(self) -> ServerClient:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await self._http.aclose()

    async def healthy(self, deadline_s: float) -> bool:
        """Whether the model is loaded."""
        try:
            answer = await self._http.get("/health", timeout=deadline_s)
        except httpx.HTTPError:
            return False
        return answer.status_code == httpx.codes.OK

    async def progress(self, deadline_s: float) -> Progress | None:
        """What the slots say, or `None` without an answer in time."""
        try:
            answer = await self._http.get("/slots", timeout=deadline_s)
            return parse_slots(answer.json())
        except (httpx.HTTPError, ValueError):
            return None


def parse_slots(plain: Any) -> Progress:
    """The body of `/slots`. Raises `ValueError` for anything else."""
    if not isinstance(plain, list) or not all(isinstance(slot, dict) for slot in plain):
        raise ValueError("not a list of slots")
    busy = [slot for slot in plain if slot.get("is_processing")]
    decoded = [_decoded(slot) for slot in busy]
    mark = tuple(
        (slot.get("id"), slot.get("id_task"), slot.get("n_prompt_tokens_processed"), n)
        for slot, n in zip(busy, decoded, strict=True)
    )
    return Progress(len(busy), any(not n for n in decoded), mark)


def _decoded(slot: dict[str, Any]) -> int:
    match slot.get("next_token"):
        case [{"n_decoded": int(n)}, *_]:
            return n
        case _:
            return 0


class Watched(Protocol):
    """Whoever can say how the work stands."""

    async def progress(self, deadline_s: float) -> Progress | None: ...


async def watch(
    client: Watched,
    *,
    stall_s: float,
    in_flight: Callable[[], int] | None = None,
    moved: Callable[[], object] = lambda: None,
    poll_s: float = POLL_MAX_S,
) -> str:
    """Looks at the server until it stalls; why. `in_flight`: requests that the endpoint has open; while there are none
    the server is left alone. `poll_s`: between two looks, at most."""
    interval_s = min(poll_s, stall_s / 4)
    clock = StallClock(stall_s, max_gap_s=max(3 * POLL_MAX_S, stall_s))
    while True:
        await trio.sleep(interval_s)
        if in_flight is not None and not in_flight():
            clock.look(trio.current_time(), Progress(0, False, ()))
            continue
        progress = await client.progress(interval_s)
        if why := clock.look(trio.current_time(), progress, moved()):
            return why
