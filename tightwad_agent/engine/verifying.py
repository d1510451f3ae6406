"""The agent's end of the verifier process: requests, questions, and what becomes of them when the process ends."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import trio

from tightwad_agent.engine.framesocket import FrameSocket
from tightwad_agent.engine.open_request import Deliver, OpenRequest
from tightwad_agent.engine.questions import Questions
from tightwad_agent.engine.watchdog import Progress
from tightwad_agent.errors import (
    ContextOverflow,
    EngineStopped,
    NotBegun,
    NotReady,
    PeerGone,
    ProtocolError,
    RequestTooLarge,
    UsageError,
)
from tightwad_agent.wire.verify import (
    FROM_VERIFIER,
    MAX_HEADER,
    MAX_TEXT,
    MAX_TOKENS,
    TO_VERIFIER,
    Accepted,
    Detokenize,
    Failed,
    Load,
    Loaded,
    Loading,
    Open,
    Refused,
    Sampling,
    Text,
    Tokenize,
    Tokenized,
    pack_tokens,
    unpack_tokens,
)

MAX_REQUESTS = 256
MAX_OUTBOX = 2 * MAX_HEADER


class VerifierClient:
    """Speaks to one verifier process over `sock`, which it takes over; see `proxy.ports.Verifier`.

    `run` must run. It reads, and calls each request's `deliver` in place. A verifier is lost when the process or the
    connection ends, when it sends what it must not, or does not read what is sent: then `run` returns, each open
    request is told once, and each open question raises `PeerGone`. `call_s`: deadline of a question.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        call_s: float = 60.0,
        max_requests: int = MAX_REQUESTS,
        max_outbox: int = MAX_OUTBOX,
    ) -> None:
        self.percent: int | None = None
        """Of loading, as far as the verifier has said."""
        self.loaded: Loaded | None = None
        self.refused: Refused | None = None
        self.ended = trio.Event()
        """`run` is over."""
        self.broken = False
        """It was lost by its own doing, not by its end."""
        self._frames = FrameSocket(sock, max_header=MAX_HEADER, max_outbox=max_outbox)
        self._max_requests = max_requests
        self._requests: dict[int, OpenRequest] = {}
        self._questions = Questions(self.send, most=max_requests, deadline_s=call_s)
        self._n_opened = 0
        self._n_events = 0
        self._lost = ""
        self._error = PeerGone
        self._scope = trio.CancelScope()
        self._settled = trio.Event()

    # What is asked of it

    @property
    def info(self) -> Loaded:
        """Of the loaded model; an error in the caller before there is one."""
        assert self.loaded is not None
        return self.loaded

    @property
    def alive(self) -> bool:
        """Turns false for good when it is lost."""
        return not self._lost

    def load(self, load: Load) -> None:
        """The first message. `settled` says when there is an answer."""
        self.send(load)

    async def settled(self, patience_s: float) -> bool:
        """Waits at most so long; whether it has `loaded` or `refused`, or is lost."""
        with trio.move_on_after(patience_s):
            await self._settled.wait()
        return self._settled.is_set()

    async def tokenize(self, text: bytes, *, special: bool = True, begin: bool = True) -> list[int]:
        """Raises `PeerGone` if the verifier is lost, `PeerSilent` after the deadline, `NotReady` if too much is asked
        at once, `RequestTooLarge`."""
        if len(text) > MAX_TEXT:
            raise RequestTooLarge(f"a text of {len(text)} bytes; at most {MAX_TEXT} are taken")
        self._check_loaded()
        answer = await self._questions.ask(Tokenized, lambda number: Tokenize(number, text, special, begin))
        return unpack_tokens(answer.tokens)

    async def detokenize(self, tokens: Sequence[int]) -> bytes:
        """Raises as `tokenize` does."""
        if len(tokens) > MAX_TOKENS:
            raise RequestTooLarge(f"{len(tokens)} tokens; at most {MAX_TOKENS} are taken")
        self._check_loaded()
        packed = pack_tokens(tokens)
        answer = await self._questions.ask(Text, lambda number: Detokenize(number, packed))
        text: bytes = answer.text
        return text

    def open(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        max_tokens: int,
        n_probs: int = -1,
        said: Sequence[int] = (),
        deliver: Deliver,
    ) -> OpenRequest:
        """Raises `NotBegun` if the verifier is lost or holds too many requests, `ContextOverflow` or `UsageError` for
        what it would not read."""
        self._check_loaded()
        if not self.alive:
            raise NotBegun(self._lost)
        if len(self._requests) >= self._max_requests:
            raise NotBegun(f"{len(self._requests)} requests are open already")
        if len(prompt) + len(said) > MAX_TOKENS:
            raise ContextOverflow(f"a prompt of {len(prompt) + len(said)} tokens; {self.info.context} are served")
        try:
            known, said_ids = pack_tokens(prompt), pack_tokens(said)
            header = TO_VERIFIER.encode(Open(self._n_opened, known, sampling, max_tokens, n_probs, said_ids))
            TO_VERIFIER.decode(header)  # a client's own values: what the verifier could not read would be its end
        except (ProtocolError, OverflowError) as exc:
            raise UsageError(f"the verifier does not take this request: {exc}") from None
        request = OpenRequest(self, self._n_opened, len(prompt), deliver, len(said))
        self._n_opened += 1
        self._requests[request.id] = request
        self._send(header)
        return request

    async def progress(self, deadline_s: float) -> Progress:  # noqa: ARG002 - what it knows, it was told
        """For the watchdog. A long prompt gives no sign, nor need rounds that go on by themselves: then the verifier is
        asked something small, which it answers between two forward passes unless it hangs."""
        waiting = [request for request in self._requests.values() if request.waits]
        in_prompt = any(not request.prompted for request in waiting)
        busy = len(waiting) or len(self._questions)
        if self._requests and not self._questions and (in_prompt or not waiting):
            self._questions.put(Text, lambda number: Detokenize(number, b""))
        await trio.lowlevel.checkpoint()
        return Progress(busy, in_prompt, (self._n_events,))

    # Running

    async def run(self) -> str:
        """Until the verifier is lost; says why."""
        try:
            with self._scope:
                self._ends_with(await self._frames.run(self._take))
        finally:
            self.close()
        return self._lost

    def lose(self, reason: str, error: type[PeerGone] = PeerGone) -> None:
        """It counts as lost from now on; those who wait are told by `run`, with `error`."""
        if not self._lost:
            self._lost, self._error = reason, error
            self._scope.cancel()

    def close(self) -> None:
        """Idempotent. Whoever still waits is told."""
        self.lose("the verifier was stopped", EngineStopped)
        self._frames.close()
        self._settled.set()
        self.ended.set()
        self._questions.close(self._lost, self._error)
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.lose(self._error(self._lost))

    def send(self, message: object) -> None:
        """A message that is sure to be readable. Nothing once the verifier is gone."""
        self._send(TO_VERIFIER.encode(message))

    def forget(self, number: int) -> bool:
        """The request is closed by whoever opened it. Whether it was open."""
        return self._requests.pop(number, None) is not None

    def _send(self, header: bytes) -> None:
        if self.alive and not self._frames.send(header):
            self._break("the verifier does not read what is sent to it")

    def _ends_with(self, why: str) -> None:
        if why:
            self._break(f"the verifier sent what is no message: {why}")
        else:
            self.lose("the verifier closed its connection")

    def _break(self, reason: str) -> None:
        self.broken = self.broken or self.alive
        self.lose(reason)

    def _check_loaded(self) -> None:
        if self.loaded is None:
            raise NotReady(self._lost or "the model is being loaded")

    # What it says

    def _take(self, header: bytes) -> None:
        if self._lost:
            return
        self._n_events += 1
        try:
            message = FROM_VERIFIER.decode(header)
            if self.loaded is None:
                self._while_loading(message)
            else:
                self._once_loaded(message)
        except ProtocolError as exc:
            self._break(f"the verifier broke the protocol: {exc.message}")

    def _while_loading(self, message: Any) -> None:
        match message:
            case Loading():
                self.percent = min(99, message.percent)
            case Loaded():
                unpack_tokens(message.eog)  # it must be whole
                self.loaded = message
                self._settled.set()
            case Refused() if self.refused is None:
                self.refused = message
                self._settled.set()
            case _:
                raise ProtocolError(f"{type(message).__name__} before the model was loaded")

    def _once_loaded(self, message: Any) -> None:
        if isinstance(message, Accepted | Failed):
            self._event(message)
        elif isinstance(message, Tokenized | Text):
            self._answer(message)
        else:
            raise ProtocolError(f"{type(message).__name__} after the model was loaded")

    def _event(self, message: Accepted | Failed) -> None:
        request = self._requests.get(message.request)
        if request is not None:
            request.take(message)
        elif message.request >= self._n_opened:
            raise ProtocolError(f"an event for request {message.request}, which was never opened")

    def _answer(self, message: Tokenized | Text) -> None:
        if isinstance(message, Tokenized) and len(message.tokens) % 4:
            raise ProtocolError(f"{len(message.tokens)} bytes are no whole number of tokens")
        self._questions.answer(message.call, message)
