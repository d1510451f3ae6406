"""One connected drafter, as the coordinator holds it: asks go out, drafts come in to those who asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import trio

from tightwad_agent.engine.outbox import Outbox
from tightwad_agent.errors import ProtocolError
from tightwad_agent.streams import close_quietly
from tightwad_agent.wire.draft import (
    FROM_DRAFTER,
    MAX_DRAFT,
    MAX_HEADER,
    MAX_SESSIONS,
    TO_DRAFTER,
    Ask,
    Drafted,
    DrafterInfo,
    Extend,
    Forget,
    Hello,
    NoDraft,
)
from tightwad_agent.wire.verify import pack_tokens, unpack_tokens

Deliver = Callable[[Drafted | NoDraft], None]

NEAR_TOKENS = 2
NEAR_S = 0.003
"""A branch that has no more than so much left to make may have to be extended."""
MAX_REST_S = 0.05
WORTH_TOKENS = 2
"""Fewer tokens are not worth a rest."""

MAX_OUTBOX = 2 * MAX_HEADER
MAX_ANSWER = 1 << 16
_SMOOTH = 0.2


class DraftLink:
    """A drafter that said hello on `stream`. `run` moves what is sent and received until the stream ends; from then on
    the drafter is not `alive`. `n_vocab`: tokens of the target; a draft ends before any other."""

    def __init__(
        self, stream: trio.abc.Stream, hello: Hello, n_vocab: int, describe: Callable[[int], DrafterInfo]
    ) -> None:
        self.alive = True
        self.tokens_per_s = 0.0
        """Of one session, by the drafter's clock; 0 until known."""
        self.first_token_ms = 0.0
        """From asking to the first token, by ours; 0 until known."""
        self._stream = stream
        self._slots = hello.slots
        self._n_vocab = n_vocab
        self._describe = describe
        self._outbox = Outbox(stream, TO_DRAFTER, MAX_OUTBOX)
        self._sessions: dict[int, LinkSession] = {}
        self._n_ever = 0
        self._alarm = trio.Event()

    @property
    def info(self) -> DrafterInfo:
        return self._describe(self._slots)

    def open(self, deliver: Deliver) -> LinkSession:
        """A session of one request. `deliver` is called in trio's thread, also from within the session's methods."""
        self._n_ever += 1
        session = LinkSession(self, self._n_ever, deliver)
        if self.alive and len(self._sessions) < MAX_SESSIONS:
            self._sessions[session.number] = session
        return session

    async def run(self) -> str:
        """Until the stream ends; why. The stream is closed then, and every branch over."""
        why = "this node ended it"
        try:
            why = await self._outbox.carry(FROM_DRAFTER, MAX_ANSWER, self._take, self._rest)
            return why
        finally:
            self.alive = False
            for session in list(self._sessions.values()):
                session.lost(why)
            self._sessions.clear()
            await close_quietly(self._stream)

    def _take(self, messages: list[Any]) -> None:
        now = trio.current_time()
        for message in joined(messages):
            if not isinstance(message, Drafted | NoDraft):
                raise ProtocolError(f"a drafter says {type(message).__name__}")
            session = self._sessions.get(message.session)
            if session is not None:
                session.take(message, now)

    async def _rest(self) -> None:
        """Leaves what comes unread while nobody is in need of it: a few tokens at once cost as much as one."""
        rest_s = self._may_rest_s()
        if rest_s > 0:
            self._alarm = trio.Event()
            with trio.move_on_after(rest_s):
                await self._alarm.wait()

    def _may_rest_s(self) -> float:
        """Until a session is about to have all that it asked for, and may want to ask for more."""
        if not self.tokens_per_s:
            return 0.0
        near = NEAR_TOKENS + (self.info.rtt_s + NEAR_S) * self.tokens_per_s
        left = min((session.spare for session in self._sessions.values()), default=math.inf)
        if math.isinf(left):
            return 0.0  # nothing is to come: if something does, it is news
        rest_s = min((left - near) / self.tokens_per_s, MAX_REST_S)
        return rest_s if rest_s * self.tokens_per_s >= WORTH_TOKENS else 0.0

    # For its sessions

    def collect(self) -> None:
        """Takes what has arrived."""
        self._outbox.collect()

    def hurry(self) -> None:
        """Somebody is in need of what comes next."""
        self._alarm.set()

    def holds(self, number: int) -> bool:
        return number in self._sessions

    def post(self, message: Ask | Extend | Forget) -> None:
        self._outbox.post(message)

    def forget(self, number: int) -> None:
        if self._sessions.pop(number, None) is not None:
            self.post(Forget(number))

    def usable(self, tokens: list[int]) -> int:
        """How many of them, from the first on, the target knows."""
        return next((i for i, token in enumerate(tokens) if not 0 <= token < self._n_vocab), len(tokens))

    def measured(self, *, token_s: float | None = None, first_s: float | None = None) -> None:
        if token_s:
            old = 1 / self.tokens_per_s if self.tokens_per_s else token_s
            self.tokens_per_s = 1 / (old + _SMOOTH * (token_s - old))
        if first_s is not None:
            old = self.first_token_ms or first_s * 1e3
            self.first_token_ms = old + _SMOOTH * (first_s * 1e3 - old)


def joined(messages: Iterable[Any]) -> list[Any]:
    """Tokens of a branch that came together as one message, so that they are dealt with together."""
    made: list[Any] = []
    places: dict[int, int] = {}
    for message in messages:
        at = places.get(message.session) if isinstance(message, Drafted) else None
        if at is not None and (both := _join(made[at], message)):
            made[at] = both
        else:
            if isinstance(message, Drafted | NoDraft):
                places[message.session] = len(made)
            made.append(message)
    return made


def _join(first: Any, then: Drafted) -> Drafted | None:
    if not isinstance(first, Drafted) or first.branch != then.branch or first.ended:
        return None
    if first.offset + len(first.tokens) / 4 != then.offset or len(first.tokens) + len(then.tokens) > 4 * MAX_DRAFT:
        return None
    return Drafted(first.session, first.branch, first.offset, first.tokens + then.tokens, then.us, then.ended)


class LinkSession:
    """One request at one drafter. Only the newest branch is heard of."""

    def __init__(self, link: DraftLink, number: int, deliver: Deliver) -> None:
        self.number = number
        self._link = link
        self._deliver = deliver
        self._branch = -1
        self._left = 0
        self._made = 0
        self._us = 0
        self._over = True
        self._forgotten = False
        self._patient = False
        self._asked_at = 0.0

    def ask(self, branch: int, keep: int, tokens: Sequence[int], n: int) -> None:
        """As `Ask`. Where the drafter is lost, or has sessions enough, the answer is a `NoDraft` at once."""
        if self._forgotten:
            return
        self._branch, self._left, self._made, self._us, self._over = branch, n, 0, 0, False
        self._asked_at = trio.current_time()
        if not self._link.holds(self.number):
            self.lost("the drafter is lost" if not self._link.alive else f"{MAX_SESSIONS} sessions are open")
        else:
            self._link.post(Ask(self.number, branch, keep, pack_tokens(tokens), n))
            self._link.hurry()

    def extend(self, branch: int, n: int) -> None:
        """As `Extend`; without effect on a branch that is over."""
        if branch == self._branch and not self._over:
            self._left += n
            self._link.post(Extend(self.number, branch, n))

    def collect(self) -> None:
        """See `proxy.ports.DraftSession`."""
        self._link.collect()

    def patient(self, is_patient: bool) -> None:
        """See `proxy.ports.DraftSession`. The first token of a branch is never waited for."""
        self._patient = is_patient
        if not is_patient and not self._over:
            self._link.hurry()

    @property
    def spare(self) -> float:
        """Tokens that may come without being looked at; infinite if none will."""
        if self._over or not self._left:
            return math.inf
        return self._left if self._patient and self._made else 0.0

    def forget(self) -> None:
        self._over = self._forgotten = True
        self._link.forget(self.number)

    def lost(self, why: str) -> None:
        """The newest branch, if it waits for tokens, gets none."""
        if not self._over:
            self._over = True
            self._deliver(NoDraft(self.number, self._branch, why[:500]))

    def take(self, message: Drafted | NoDraft, now: float) -> None:
        """Raises `ProtocolError` for tokens that nobody asked for."""
        if self._over or message.branch != self._branch:
            return
        if isinstance(message, NoDraft):
            self._over = True
            self._deliver(message)
            return
        tokens = unpack_tokens(message.tokens)
        if message.offset != self._made or not 0 < len(tokens) <= self._left:
            raise ProtocolError(f"{len(tokens)} draft tokens at {message.offset}, {self._left} are due at {self._made}")
        self._measure(message, len(tokens), now)
        self._made += len(tokens)
        self._left -= len(tokens)
        usable = self._link.usable(tokens)
        if usable == len(tokens):
            self._over = message.ended
            self._deliver(message)
        else:
            self._cut(message, tokens, usable)

    def _cut(self, message: Drafted, tokens: list[int], usable: int) -> None:
        if usable:
            cut = pack_tokens(tokens[:usable])
            self._deliver(Drafted(self.number, self._branch, message.offset, cut, message.us))
        self.lost(f"the draft has token {tokens[usable]}, which the target does not know")

    def _measure(self, message: Drafted, n: int, now: float) -> None:
        if message.offset == 0:
            self._link.measured(first_s=now - self._asked_at)
        elif message.us > self._us:
            self._link.measured(token_s=(message.us - self._us) / 1e6 / n)
        self._us = message.us
