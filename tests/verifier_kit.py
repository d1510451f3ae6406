"""A verifier child and the agent's side of its socket, for tests: blocking, with deadlines."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tightwad_agent.wire.frames import FrameDecoder, encode
from tightwad_agent.wire.verify import (
    FROM_VERIFIER,
    GREEDY,
    MAX_HEADER,
    TO_VERIFIER,
    Accepted,
    Close,
    Ended,
    Failed,
    Load,
    Loaded,
    Loading,
    Open,
    Round,
    Sampling,
    Tokenize,
    Tokenized,
    pack_tokens,
    unpack_tokens,
)

DEADLINE_S = 60.0

Drafter = Callable[[list[int]], Sequence[int]]
"""From the sequence so far (prompt included) to a draft of what follows."""


def no_draft(_tokens: list[int]) -> Sequence[int]:
    return ()


class Child:
    """A verifier process. `messages` that nobody waited for stay in order."""

    def __init__(self, *, stderr: int | None = None) -> None:
        ours, theirs = socket.socketpair()
        self.sock = ours
        fd = theirs.fileno()
        argv = [sys.executable, "-X", "faulthandler", "-I", "-m", "tightwad_agent.engine.verifier", str(fd)]
        self.process = subprocess.Popen(argv, pass_fds=[fd], stderr=stderr, stdin=subprocess.DEVNULL)
        theirs.close()
        self._decoder = FrameDecoder(max_header=MAX_HEADER)
        self._messages: deque[Any] = deque()
        self._number = 0

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.sock.close()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            if self.process.stderr is not None:
                self.process.stderr.close()

    def send(self, *messages: object) -> None:
        self.sock.sendall(b"".join(encode(TO_VERIFIER.encode(message)) for message in messages))

    def receive(self, deadline_s: float = DEADLINE_S) -> Any:
        """The next message; `EOFError` at the end of the stream."""
        end = time.monotonic() + deadline_s
        while not self._messages:
            self.sock.settimeout(max(0.001, end - time.monotonic()))
            data = self.sock.recv(1 << 18)
            if not data:
                raise EOFError
            self._messages.extend(FROM_VERIFIER.decode(frame.header) for frame in self._decoder.feed(data))
        return self._messages.popleft()

    def load(self, engine: Path, model: Path, *, context: int = 2048, threads: int = 1, **fields: Any) -> Loaded:
        """Until it is loaded."""
        self.send(Load(str(engine), str(model), context, threads=threads, **fields))
        while isinstance(message := self.receive(120), Loading):
            pass
        assert isinstance(message, Loaded), message
        return message

    def tokenize(self, text: str) -> list[int]:
        self.send(Tokenize(1, text.encode()))
        message = self.receive()
        assert isinstance(message, Tokenized)
        return unpack_tokens(message.tokens)

    def open(
        self,
        prompt: Sequence[int],
        sampling: Sampling = GREEDY,
        *,
        max_tokens: int = 32,
        n_probs: int = -1,
        said: Sequence[int] = (),
    ) -> int:
        """The number of the new request."""
        self._number += 1
        self.send(Open(self._number, pack_tokens(prompt), sampling, max_tokens, n_probs, pack_tokens(said)))
        return self._number

    def round(self, request: int, at: int, draft: Sequence[int] = (), free: int = 0) -> None:
        self.send(Round(request, at, pack_tokens(draft), free))

    def close(self, request: int) -> None:
        self.send(Close(request))

    def answers(
        self,
        prompt: Sequence[int],
        sampling: Sampling = GREEDY,
        *,
        max_tokens: int = 32,
        drafter: Drafter = no_draft,
        n_probs: int = -1,
        said: Sequence[int] = (),
    ) -> list[Accepted]:
        """One request, to its end."""
        return self.together([(prompt, sampling, drafter)], max_tokens=max_tokens, n_probs=n_probs, said=said)[0]

    def tokens(self, prompt: Sequence[int], sampling: Sampling = GREEDY, **options: Any) -> list[int]:
        """What one request brought."""
        return flat(self.answers(prompt, sampling, **options))

    def together(
        self,
        asked: Sequence[tuple[Sequence[int], Sampling, Drafter]],
        *,
        max_tokens: int = 32,
        n_probs: int = -1,
        said: Sequence[int] = (),
    ) -> list[list[Accepted]]:
        """Several requests at once, each to its end."""
        numbers = [self.open(p, s, max_tokens=max_tokens, n_probs=n_probs, said=said) for p, s, _drafter in asked]
        sequences = {number: list(p) for number, (p, _s, _d) in zip(numbers, asked, strict=True)}
        drafters = {number: d for number, (_p, _s, d) in zip(numbers, asked, strict=True)}
        answers: dict[int, list[Accepted]] = {number: [] for number in numbers}
        left = set(numbers)
        while left:
            answer = self.receive()
            assert isinstance(answer, Accepted), answer
            sequence = sequences[answer.request]
            assert answer.at == len(sequence)
            sequence += unpack_tokens(answer.tokens)
            answers[answer.request].append(answer)
            if not answer.batch and answer.ended is Ended.NOT and said:
                continue  # what was said comes back
            if answer.ended is Ended.NOT:
                self.round(answer.request, len(sequence), drafters[answer.request](sequence))
            else:
                left.remove(answer.request)
        return [answers[number] for number in numbers]

    def failure(self, prompt: Sequence[int], sampling: Sampling = GREEDY, **options: Any) -> Failed:
        self.open(prompt, sampling, **options)
        answer = self.receive()
        assert isinstance(answer, Failed), answer
        return answer


def flat(answers: Sequence[Accepted]) -> list[int]:
    """All tokens of a request's answers."""
    return [token for answer in answers for token in unpack_tokens(answer.tokens)]


def follows(recorded: Sequence[int], n: int) -> Drafter:
    """A drafter that knows the whole sequence (prompt included) beforehand."""
    return lambda tokens: recorded[len(tokens) : len(tokens) + n]
