"""The verifier's main function. The agent gives it one end of a socket pair."""

from __future__ import annotations

import gc
import signal
import socket
import sys
import time
from dataclasses import replace

from tightwad_agent.engine.verifier.channel import Channel
from tightwad_agent.engine.verifier.journal import Journal
from tightwad_agent.engine.verifier.loading import Abandoned, Refusal, bring_up
from tightwad_agent.engine.verifier.loop import Loop
from tightwad_agent.engine.verifier.model import Model
from tightwad_agent.errors import ProtocolError, TightwadError
from tightwad_agent.wire.verify import Load, Loading, Refused

TELL_S = 0.1


def main(fd: int) -> int:
    """Serves until the agent closes its end; what the process then exits with. `fd`: a connected stream socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all its processes; the agent decides
    inherited = socket.socket(fileno=fd)
    sock = inherited.dup()  # a low number, whatever the agent's was
    inherited.close()
    channel = Channel(sock)
    try:
        return _serve(channel)
    except TightwadError as exc:
        print(f"verifier: {exc}", file=sys.stderr, flush=True)  # noqa: T201 - standard error is the agent's log
        return 1
    finally:
        channel.close()


def _serve(channel: Channel) -> int:
    got = _first(channel)
    if got is None:
        return 0
    load, rest = got
    model = _load(channel, load)
    if model is None:
        return 0
    gc.collect()
    gc.freeze()  # what is here now stays; collections need not look at it
    Loop(model, channel).run(rest)
    return 0


def _first(channel: Channel) -> tuple[Load, list[object]] | None:
    while True:
        messages = channel.read(None)
        if messages is None:
            return None
        if messages:
            break
    first, *rest = messages
    if not isinstance(first, Load):
        raise ProtocolError(f"{type(first).__name__} before Load")
    return first, rest


def _load(channel: Channel, load: Load) -> Model | None:
    """`None`: it was refused and the agent knows, or the agent is gone."""
    began = time.monotonic()
    journal = Journal()
    try:
        model = bring_up(load, _Progress(channel), journal)
    except Abandoned:
        return None
    except Refusal as exc:
        channel.send(Refused(exc.kind, exc.reason[:4000], exc.needed, exc.device))
        return None
    except Exception as exc:
        channel.send(Refused("internal", f"{type(exc).__name__}: {exc}"[:4000]))
        raise
    load_ms = int(1000 * (time.monotonic() - began))
    return model if channel.send(replace(model.facts.loaded, load_ms=load_ms)) else None


class _Progress:
    """Tells the agent, not too often, and finds out when it has gone."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._next = 0.0

    def __call__(self, part: float) -> bool:
        now = time.monotonic()
        if now < self._next:
            return True
        self._next = now + TELL_S
        return not self._channel.ended() and self._channel.send(Loading(int(100 * min(1.0, max(0.0, part)))))
