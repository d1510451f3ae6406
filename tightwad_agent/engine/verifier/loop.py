"""The verifier's loop: commands in, one forward pass over everything that is due, answers out.

Each turn takes the rounds of all requests that have one and a share of each prompt. Between turns it reads what has
come and never waits, except a moment for requests of the last turn whose next rounds are just on their way: without
that, two requests would alternate and each would pay for whole forward passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from tightwad_agent.engine.verifier import rounds, turn
from tightwad_agent.engine.verifier.desk import Desk
from tightwad_agent.engine.verifier.model import Model, Outcome, Piece
from tightwad_agent.engine.verifier.request import Request
from tightwad_agent.errors import EngineError, ProtocolError
from tightwad_agent.wire.verify import (
    MAX_ROUND,
    MAX_TEXT,
    Accepted,
    Close,
    Detokenize,
    Failed,
    Open,
    Rollback,
    Round,
    Text,
    Tokenize,
    Tokenized,
    TokenProbabilities,
    pack_tokens,
    unpack_tokens,
)

MAX_FAILURES = 3
"""Forward passes that may fail one after the other."""
_MAX_PIECE = 1024


class Wire(Protocol):
    """`channel.Channel`."""

    def read(self, wait_s: float | None) -> list[Any] | None: ...

    def send(self, *messages: object) -> bool: ...


class Part(NamedTuple):
    """A request's piece of a turn, and the place of its first token in the batch."""

    request: Request
    piece: Piece
    draft: list[int]
    start: int

    @property
    def end(self) -> int:
        """The position behind its last token."""
        return self.piece.position + len(self.piece.tokens)

    @property
    def first_output(self) -> int:
        return self.start + len(self.piece.tokens) - self.piece.n_outputs


class Loop:
    """Serves requests until the agent hangs up. `clock` in seconds."""

    def __init__(self, model: Model, wire: Wire, clock: Callable[[], float] = time.perf_counter) -> None:
        self._model = model
        self._wire = wire
        self._clock = clock
        self._facts = model.facts
        self._desk = Desk(model, clock)
        self._pace = turn.Pace(model.facts.batch)
        self._last: list[Request] = []
        self._turn_s = 0.0
        self._answered_s = 0.0
        self._tight = False
        self._failures = 0
        self._gone = False

    def run(self, messages: Iterable[object] = ()) -> None:
        """`messages`: those that came with `Load`. Raises `PeerError` for what is no command, `EngineError` if the
        model computes no more."""
        for message in messages:
            self._handle(message)
        while self._gather():
            self._take_turn()

    # Commands

    def _gather(self) -> bool:
        """Reads until a turn should start. `False`: the agent is gone."""
        self._read(0.0)
        while not self._gone and (wait := self._wait()) != 0.0:
            self._read(wait)
        return not self._gone

    def _wait(self) -> float | None:
        if not self._desk.busy():
            return None
        absent = [request.delay_s for request in self._last if self._desk.has(request) and not request.due]
        return turn.worth_waiting(absent, self._clock() - self._answered_s, turn.patience(self._turn_s))

    def _read(self, wait_s: float | None) -> None:
        messages = self._wire.read(wait_s)
        self._gone = self._gone or messages is None
        for message in messages or ():
            self._handle(message)

    def _handle(self, message: object) -> None:
        match message:
            case Round(request=number):
                if request := self._desk.find(number):
                    request.ask(message, self._clock())
            case Close(request=number):
                if request := self._desk.find(number):
                    self._desk.over(request)
            case Open():
                if answer := self._desk.open(message):
                    self._send(answer)
            case Tokenize():
                found = self._model.tokenize(message.text, special=message.special, begin=message.begin)
                self._send(Tokenized(message.call, pack_tokens(found)))
            case Detokenize():
                self._send(Text(message.call, self._text(unpack_tokens(message.tokens))))
            case _:
                raise ProtocolError(f"{type(message).__name__} is not due")

    def _text(self, tokens: Sequence[int]) -> bytes:
        """Ids that are no tokens stand for nothing."""
        known = (token for token in tokens if 0 <= token < self._facts.n_vocab)
        return b"".join(self._model.piece(token, special=True) for token in known)[:MAX_TEXT]

    def _send(self, *messages: object) -> None:
        self._gone = not self._wire.send(*messages) or self._gone

    # Turns

    def _take_turn(self) -> None:
        parts = self._compose()
        began = self._clock()
        outcome = self._model.decode([part.piece for part in parts])
        if outcome is Outcome.DONE:
            self._failures, self._tight = 0, False
            self._finish(parts, began)
        elif outcome is Outcome.NO_ROOM:
            self._make_room(parts)
        else:
            self._failed(parts)

    def _compose(self) -> list[Part]:
        """Rounds first, then pieces of prompts."""
        due, filling = self._desk.due(), self._desk.filling()
        drafts = [self._draft(request) for request in due]
        shares = turn.divide(
            [len(draft) for draft in drafts],
            [n_left for _request, n_left in filling],
            batch=self._facts.batch,
            n_outputs=self._facts.n_outputs,
            chunk=self._pace.chunk(beside=bool(due)),
        )
        spare = self._facts.n_outputs - len(due) - sum(shares.drafts) - len(filling)
        parts: list[Part] = []
        start = 0
        for request, draft, n in zip(due, drafts, shares.drafts, strict=True):
            parts.append(_round(request, draft[:n], start))
            start += n + 1
        for (request, n_left), n in zip(filling, shares.prompts, strict=True):
            position = request.n_given - n_left
            n_wanted = request.n_outputs(position, n)
            n_taken = n - max(0, n_wanted - 1 - spare)
            parts.append(_chunk(request, position, n_taken, start))
            start += n_taken
            spare -= max(0, parts[-1].piece.n_outputs - 1)
        return parts

    def _draft(self, request: Request) -> list[int]:
        if self._tight or self._facts.rollback is Rollback.NONE:
            return []
        return request.draft(self._facts)

    def _make_room(self, parts: Sequence[Part]) -> None:
        """The cache is full: idle slots give theirs up, then drafts are left out, then the newest request fails,
        whether it is due or not."""
        if self._desk.evict():
            return
        if not self._tight and any(part.draft for part in parts):
            self._tight = True
            return
        held = f"{self._desk.held()} of the {self._facts.context} tokens of the context are in use"
        self._fail(self._desk.newest(), "cache", f"no room beside the other requests: {held}")

    def _failed(self, parts: Sequence[Part]) -> None:
        self._failures += 1
        for part in parts:
            self._fail(part.request, "internal", "the forward pass failed; the verifier's log says more")
        if self._failures >= MAX_FAILURES:
            raise EngineError(f"{self._failures} forward passes failed one after the other")

    def _fail(self, request: Request, code: str, reason: str) -> None:
        self._send(Failed(request.opened.request, code, reason))
        self._desk.drop(request)

    # What a turn brought

    def _finish(self, parts: Sequence[Part], began: float) -> None:
        echoes = [(part.request, echo) for part in parts for echo in self._retraced(part)]
        drawn = [(part, *self._draw(part)) for part in parts]
        for part, tokens, _probabilities in drawn:
            self._settle(part, tokens)
        self._turn_s = self._clock() - began
        self._learn(parts)
        answers = [
            (part.request, self._answer(part, parts, tokens, probabilities))
            for part, tokens, probabilities in drawn
            if tokens
        ]
        self._read(0.0)  # who has been closed meanwhile needs no answer
        self._send(*(echo for request, echo in echoes if self._desk.has(request)))
        self._reply([(request, answer) for request, answer in answers if self._desk.has(request)])

    def _retraced(self, part: Part) -> list[Accepted]:
        """What of the tokens that were said already this turn brings: with the first sample all that needed none, else
        those whose logits it has. Their samples are drawn once more, in order."""
        request, sampler = part.request, part.request.sampler
        if request.generating or not part.piece.n_outputs:
            return []
        if not request.retraced:
            return self._echoes(request, request.n_prompt, request.n_given, ())
        assert sampler is not None
        at = part.end - part.piece.n_outputs + 1
        probabilities = []
        for i, token in enumerate(request.tokens[at : min(part.end + 1, request.n_given)]):
            sampler.retrace(part.first_output + i, token)
            if request.opened.n_probs >= 0:
                known = self._model.probabilities(part.first_output + i, token, request.opened.n_probs)
                probabilities.append(known)
        return self._echoes(request, at, min(part.end + 1, request.n_given), tuple(probabilities))

    def _echoes(
        self, request: Request, at: int, end: int, probabilities: tuple[TokenProbabilities, ...]
    ) -> list[Accepted]:
        made = []
        for start in range(at, end, MAX_ROUND):
            tokens = request.tokens[start : min(end, start + MAX_ROUND)]
            pieces = tuple(self._model.piece(token)[:_MAX_PIECE] for token in tokens)
            shown = probabilities[start - at : start - at + len(tokens)]
            made.append(Accepted(request.opened.request, start, pack_tokens(tokens), pieces, probabilities=shown))
        return made

    def _draw(self, part: Part) -> tuple[list[int], tuple[TokenProbabilities, ...]]:
        """Samples, and moves the request on. Nothing for a piece of what was given that is not its last."""
        request, first, sampler = part.request, part.first_output, part.request.sampler
        if not request.generating:
            if part.end < request.n_given:
                return [], ()
            first = part.start + len(part.piece.tokens) - 1
        assert sampler is not None
        tokens = rounds.verify(part.draft, lambda i: sampler.sample(first + i), self._facts.eog)
        if request.generating:
            request.used()
        request.tokens += tokens
        n_top = request.opened.n_probs
        if n_top < 0:
            return tokens, ()
        return tokens, tuple(self._model.probabilities(first + i, token, n_top) for i, token in enumerate(tokens))

    def _settle(self, part: Part, tokens: Sequence[int]) -> None:
        """What was evaluated is in memory; what of a draft was wrong is taken out of it again."""
        cached = self._desk.cached(part.request)
        cached += part.piece.tokens
        n_wrong = len(part.draft) - rounds.agreed(part.draft, tokens)
        if n_wrong:
            del cached[-n_wrong:]
            if not self._model.keep(part.piece.seq, len(cached)):
                raise EngineError(f"the model's memory cannot be taken back to token {len(cached)}")

    def _learn(self, parts: Sequence[Part]) -> None:
        n_rounds = sum(part.piece.position >= part.request.n_given for part in parts)
        n_prompt = sum(len(part.piece.tokens) for part in parts if part.piece.position < part.request.n_given)
        self._pace.took(self._turn_s, n_rounds=n_rounds, n_prompt=n_prompt)

    def _answer(
        self, part: Part, parts: Sequence[Part], tokens: list[int], probabilities: tuple[TokenProbabilities, ...]
    ) -> Accepted | Failed:
        request, number = part.request, part.request.opened.request
        pieces = tuple(self._model.piece(token) for token in tokens)
        if any(len(piece) > _MAX_PIECE for piece in pieces):
            return Failed(number, "internal", f"a token stands for more than {_MAX_PIECE} bytes")
        at = len(request.tokens) - len(tokens)
        first = at == request.n_given
        return Accepted(
            number,
            at,
            pack_tokens(tokens),
            pieces,
            n_draft=len(part.draft),
            n_accepted=rounds.agreed(part.draft, tokens),
            ended=request.ended(self._facts.context, self._facts.eog),
            decode_us=int(1e6 * self._turn_s),
            batch=sum(len(other.piece.tokens) for other in parts),
            requests=len(parts),
            n_prompt=request.n_given if first else 0,
            n_cached=request.n_cached if first else 0,
            prompt_us=int(1e6 * (self._clock() - request.began_s)) if first else 0,
            probabilities=probabilities,
        )

    def _reply(self, answers: Sequence[tuple[Request, Accepted | Failed]]) -> None:
        if answers:
            self._send(*(answer for _request, answer in answers))
        self._answered_s = self._clock()
        self._last = [request for request, _answer in answers]
        for request, answer in answers:
            request.answered_s = self._answered_s
            if not isinstance(answer, Accepted) or answer.ended:
                self._desk.over(request)


def _round(request: Request, draft: list[int], start: int) -> Part:
    tokens = [request.tokens[-1], *draft]
    return Part(request, Piece(request.seq, len(request.tokens) - 1, tokens, len(tokens)), draft, start)


def _chunk(request: Request, position: int, n: int, start: int) -> Part:
    tokens = request.tokens[position : position + n]
    return Part(request, Piece(request.seq, position, tokens, request.n_outputs(position, n)), [], start)
