"""What happens round by round: listens in between generation, verifier and drafters, and says where time goes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tightwad_agent.proxy.ports import (
    Drafter,
    DrafterInfo,
    DraftEvent,
    DraftSession,
    Verifier,
    VerifierEvent,
    VerifierRequest,
)
from tightwad_agent.wire.draft import Drafted
from tightwad_agent.wire.verify import Accepted, Loaded, Sampling

Event = dict[str, Any]


@dataclass
class Trace:
    """Events in the order they happened; `ms` since the trace began. `context` is added to each."""

    events: list[Event] = field(default_factory=list)
    context: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def note(self, what: str, **facts: Any) -> None:
        ms = round((time.perf_counter() - self.began) * 1e3, 3)
        self.events.append({"ms": ms, "what": what, **facts, **self.context})

    def write(self, path: Path) -> None:
        """One JSON object a line."""
        path.write_text("".join(json.dumps(event) + "\n" for event in self.events), encoding="utf-8")


class TracedVerifier:
    """A `Verifier` that is listened to."""

    def __init__(self, verifier: Verifier, trace: Trace) -> None:
        self._verifier = verifier
        self._trace = trace
        self._n = 0

    @property
    def info(self) -> Loaded:
        return self._verifier.info

    async def tokenize(self, text: bytes, *, special: bool = True, begin: bool = True) -> list[int]:
        return await self._verifier.tokenize(text, special=special, begin=begin)

    async def detokenize(self, tokens: Sequence[int]) -> bytes:
        return await self._verifier.detokenize(tokens)

    def open(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int,
        n_probs: int = -1,
        said: Sequence[int] = (),
        deliver: Callable[[VerifierEvent], None],
    ) -> VerifierRequest:
        self._n += 1
        number, note = self._n, self._trace.note

        def heard(event: VerifierEvent) -> None:
            if isinstance(event, Accepted):
                facts = {name: getattr(event, name) for name in ("at", "n_draft", "n_accepted", "decode_us", "batch")}
                note("accepted", request=number, n=len(event.pieces), requests=event.requests, **facts)
            else:
                note("failed", request=number, reason=str(event))
            deliver(event)

        note("open", request=number, n=len(prompt))
        inner = self._verifier.open(prompt, sampling, max_tokens=max_tokens, n_probs=n_probs, said=said, deliver=heard)
        return TracedRequest(inner, number, self._trace)


class TracedRequest:
    """A `VerifierRequest` that is listened to."""

    def __init__(self, request: VerifierRequest, number: int, trace: Trace) -> None:
        self._request = request
        self._number = number
        self._trace = trace

    def round(self, at: int, draft: Sequence[int], free: int) -> None:
        self._trace.note("round", request=self._number, at=at, n=len(draft), free=free)
        self._request.round(at, draft, free)

    def close(self) -> None:
        self._trace.note("close", request=self._number)
        self._request.close()


class TracedDrafter:
    """A `Drafter` that is listened to."""

    def __init__(self, drafter: Drafter, trace: Trace) -> None:
        self._drafter = drafter
        self._trace = trace
        self._n = 0

    @property
    def info(self) -> DrafterInfo:
        return self._drafter.info

    @property
    def alive(self) -> bool:
        return self._drafter.alive

    def open(self, deliver: Callable[[DraftEvent], None]) -> DraftSession:
        self._n += 1
        number, note = self._n, self._trace.note

        def heard(event: DraftEvent) -> None:
            if isinstance(event, Drafted):
                n = len(event.tokens) // 4
                note("drafted", session=number, branch=event.branch, offset=event.offset, n=n, us=event.us)
            else:
                note("no draft", session=number, branch=event.branch, reason=event.reason)
            deliver(event)

        return TracedSession(self._drafter.open(heard), number, self._trace)


class TracedSession:
    """A `DraftSession` that is listened to."""

    def __init__(self, session: DraftSession, number: int, trace: Trace) -> None:
        self._session = session
        self._number = number
        self._trace = trace

    def ask(self, branch: int, keep: int, tokens: Sequence[int], n: int) -> None:
        self._trace.note("ask", session=self._number, branch=branch, keep=keep, tokens=len(tokens), n=n)
        self._session.ask(branch, keep, tokens, n)

    def extend(self, branch: int, n: int) -> None:
        self._trace.note("extend", session=self._number, branch=branch, n=n)
        self._session.extend(branch, n)

    def collect(self) -> None:
        self._session.collect()

    def patient(self, is_patient: bool) -> None:
        self._session.patient(is_patient)

    def forget(self) -> None:
        self._trace.note("forget", session=self._number)
        self._session.forget()


# What the events of one request at a time say


@dataclass(frozen=True, slots=True)
class RoundTimes:
    """One round. `waited_ms`: from the last answer to this order. `took_ms`: from the order to its answer; of it
    `decode_ms` in the verifier. A round that went on by itself has no order: both are counted from the last answer."""

    waited_ms: float
    took_ms: float
    decode_ms: float
    n_draft: int
    n_accepted: int
    n_tokens: int


def rounds(events: Sequence[Event]) -> list[RoundTimes]:
    """All rounds of requests that ran one at a time, without their prompts."""
    found = []
    last: float | None = None
    ordered: float | None = None
    for event in events:
        if event["what"] == "open":
            last = ordered = None
        elif event["what"] == "round":
            ordered = event["ms"] if ordered is None else ordered
        elif event["what"] == "accepted":
            if last is not None:
                start = last if ordered is None else max(ordered, last)
                found.append(
                    RoundTimes(
                        start - last,
                        event["ms"] - start,
                        event["decode_us"] / 1e3,
                        event["n_draft"],
                        event["n_accepted"],
                        event["n"],
                    )
                )
            last, ordered = event["ms"], None
    return found


def summary(times: Sequence[RoundTimes]) -> dict[str, float]:
    """Means per round, and the shares of time: waiting, outside the forward pass, in it."""
    if not times:
        return {}
    whole = sum(t.waited_ms + t.took_ms for t in times)
    n_tokens = sum(t.n_tokens for t in times)
    return {
        "rounds": len(times),
        "tokens_per_s": n_tokens / whole * 1e3,
        "tokens_per_round": n_tokens / len(times),
        "draft_per_round": statistics.fmean(t.n_draft for t in times),
        "accepted_per_round": statistics.fmean(t.n_accepted for t in times),
        "waited_ms": statistics.fmean(t.waited_ms for t in times),
        "decode_ms": statistics.fmean(t.decode_ms for t in times),
        "around_decode_ms": statistics.fmean(t.took_ms - t.decode_ms for t in times),
        "waited_share": sum(t.waited_ms for t in times) / whole,
    }


def by_length(times: Sequence[RoundTimes]) -> dict[int, dict[str, float]]:
    """Forward passes by draft length: how many, median milliseconds, mean accepted."""
    return {
        n: {
            "rounds": len(group),
            "decode_ms": statistics.median(t.decode_ms for t in group),
            "accepted": statistics.fmean(t.n_accepted for t in group),
        }
        for n in sorted({t.n_draft for t in times})
        if (group := [t for t in times if t.n_draft == n])
    }


def explain(trace: Trace) -> str:
    """Where the time of a round goes, by way and round trip."""
    lines = []
    for way, rtt_ms in dict.fromkeys((e["way"], e["rtt_ms"]) for e in trace.events):
        if "streams" in way:
            continue  # several at once have no rounds of their own
        times = rounds([e for e in trace.events if (e["way"], e["rtt_ms"]) == (way, rtt_ms)])
        figures = ", ".join(f"{name} {value:.2f}" for name, value in summary(times).items())
        lines.append(f"{way}, {rtt_ms:g} ms: {figures}")
        for n, group in by_length(times).items():
            lines.append(f"    draft of {n:2d}: " + ", ".join(f"{name} {value:.1f}" for name, value in group.items()))
    return "\n".join(lines)
