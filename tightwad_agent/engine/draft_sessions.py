"""What a drafter holds for its coordinators, and what its llama-server is to do next. Pure.

A session is a sequence of tokens of which the newest branch is being continued. The server works in turns: all branches
that have tokens to come go into one request of a token or a few, so that they share forward passes, and what arrived
meanwhile joins the next turn. A branch that is replaced costs no more than the turn it is in. Where much of a sequence
is new to the server (a prompt), it is a turn of its own beside the common one, so that the others do not wait for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tightwad_agent.engine.draft_turn import Key, Made, Member, Pace, Turn
from tightwad_agent.errors import ProtocolError
from tightwad_agent.wire.draft import MAX_DRAFT, MAX_SESSIONS, Ask, Drafted, Extend, NoDraft
from tightwad_agent.wire.verify import pack_tokens, unpack_tokens

ALONE_TOKENS = 32
"""More tokens than these that are new to the server are a turn of their own."""
SEAT_KEPT_S = 2.0
"""A session that has asked for nothing for so long gives its slot to another one."""


@dataclass(slots=True)
class _Session:
    """`made` of the newest branch's tokens exist, `left` are to come, and more may be asked for while it is `open`.
    `known`: how many of the tokens the server's slot holds, as far as the turns say."""

    serial: int
    branch: int = -1
    open: bool = False
    made: int = 0
    left: int = 0
    since: float = 0.0
    tokens: list[int] = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    ends: list[int] = field(default_factory=list)
    slot: int | None = None
    known: int = 0
    busy: bool = False
    alone: bool = False
    used_at: float = -math.inf

    def keep(self, n: int) -> None:
        del self.tokens[n:], self.ends[n:]
        del self.text[self.ends[-1] if self.ends else 0 :]
        self.known = min(self.known, n)

    def append(self, tokens: list[int]) -> None:
        """`text` is what the server is sent: written once per token, however often it is sent."""
        for token in tokens:
            self.text += b",%d" % token if self.text else b"%d" % token
            self.ends.append(len(self.text))
        self.tokens += tokens


class DraftBook:
    """All sessions of one llama-server. `now` is in seconds on one clock; `context`: tokens that all slots together can
    hold."""

    def __init__(self, *, n_vocab: int, context: int, slots: int) -> None:
        self.pace = Pace()
        self._n_vocab = n_vocab
        self._context = context
        self._sessions: dict[Key, _Session] = {}
        self._seats: list[Key | None] = [None] * slots
        self._n_ever = 0
        self._together = False
        """A common turn is under way."""

    @property
    def n_sessions(self) -> int:
        return len(self._sessions)

    # What a coordinator says

    def ask(self, stream: int, asked: Ask, now: float) -> NoDraft | None:
        """Takes up a branch, or says why not. After a `NoDraft` a session may always begin again with `keep` 0."""
        key = (stream, asked.session)
        session = self._sessions.get(key)
        if session is None:
            if sum(at == stream for at, _ in self._sessions) >= MAX_SESSIONS:
                return _no(asked, f"{MAX_SESSIONS} sessions are open")
            self._n_ever += 1
            session = self._sessions[key] = _Session(self._n_ever)
        if asked.branch <= session.branch:
            return None  # overtaken
        session.branch, session.made, session.left, session.since = asked.branch, 0, 0, now
        why = self._replaced(session, asked) or self._seated(key, session, now)
        session.open = not why
        if why:
            return _no(asked, why)
        session.left = asked.n
        session.used_at = now
        return None

    def extend(self, stream: int, asked: Extend, now: float) -> NoDraft | None:
        """Asks for more of a branch; without effect on one that was replaced or is over."""
        key = (stream, asked.session)
        session = self._sessions.get(key)
        if session is None or session.branch != asked.branch or not session.open:
            return None
        if why := _too_many(session.left + asked.n) or self._seated(key, session, now):
            session.open, session.left = False, 0
            return _no(asked, why)
        session.left += asked.n
        session.used_at = now
        return None

    def forget(self, stream: int, number: int) -> None:
        session = self._sessions.pop((stream, number), None)
        if session is not None and session.slot is not None:
            self._seats[session.slot] = None

    def drop(self, stream: int) -> None:
        """The stream is gone."""
        for at, number in list(self._sessions):
            if at == stream:
                self.forget(at, number)

    def _replaced(self, session: _Session, asked: Ask) -> str:
        """Brings the tokens to what the branch begins with; why that cannot be, or empty text."""
        try:
            tokens = unpack_tokens(asked.tokens)
        except ProtocolError as exc:
            return exc.message
        if why := _too_many(asked.n):
            return why
        if asked.keep > len(session.tokens):
            return f"{asked.keep} tokens are to be kept, the session has {len(session.tokens)}"
        if foreign := [token for token in tokens if not 0 <= token < self._n_vocab]:
            return f"token {foreign[0]} is not among the model's {self._n_vocab}"
        if not asked.keep + len(tokens):
            return "there is nothing to continue"
        if asked.keep + len(tokens) + 1 >= self._context:
            return self._full()
        session.keep(asked.keep)
        session.append(tokens)
        return ""

    def _full(self) -> str:
        return f"the context of {self._context} tokens is full"

    def _seated(self, key: Key, session: _Session, now: float) -> str:
        """Sees that the session has a slot; why there is none, or empty text."""
        if session.slot is None:
            slot = self._free_slot(now)
            if slot is None:
                return f"all {len(self._seats)} slots are in use"
            self._leave(slot)
            self._seats[slot], session.slot, session.known = key, slot, 0
        return self._room(key, session, now)

    def _room(self, key: Key, session: _Session, now: float) -> str:
        """Sees that the context that all slots share holds one token more; why it does not, or empty text."""
        if len(session.tokens) + 1 >= self._context:
            return self._full()
        while self._held() + 1 >= self._context:
            slot = self._idle_slot(now, but=key)
            if slot is None:
                return f"{self._full()} with other requests"
            self._leave(slot)
        return ""

    def _held(self) -> int:
        return sum(len(self._sessions[key].tokens) for key in self._seats if key is not None)

    def _free_slot(self, now: float) -> int | None:
        return self._seats.index(None) if None in self._seats else self._idle_slot(now)

    def _idle_slot(self, now: float, but: Key | None = None) -> int | None:
        """The slot whose session has asked for nothing for longest, and for long enough."""
        held = [(self._sessions[key], at) for at, key in enumerate(self._seats) if key not in (None, but) and key]
        idle = [(s.used_at, at) for s, at in held if not s.left and not s.busy and now - s.used_at > SEAT_KEPT_S]
        return min(idle)[1] if idle else None

    def _leave(self, slot: int) -> None:
        key = self._seats[slot]
        if key is not None:
            session = self._sessions[key]
            session.slot, session.known = None, 0
        self._seats[slot] = None

    # What the server does

    def turns(self) -> list[Turn]:
        """What may be asked of the server now, besides what it is already asked."""
        waiting = [(key, self._sessions[key]) for key in self._seats if key is not None]
        waiting = [(key, session) for key, session in waiting if session.left and not session.busy]
        alone = [entry for entry in waiting if _is_alone(entry[1])]
        together = [entry for entry in waiting if not _is_alone(entry[1])]
        turns = [self._turn([entry], alone=True) for entry in alone]
        if together and not self._together:
            self._together = True
            turns.append(self._turn(together, alone=False))
        return turns

    def _turn(self, entries: list[tuple[Key, _Session]], *, alone: bool) -> Turn:
        sessions = [session for _, session in entries]
        n = self.pace.turn if all(session.made for session in sessions) else 1  # the first token at once
        n = min(n, *(s.left for s in sessions), *(self._context - 1 - len(s.tokens) for s in sessions))
        n_new = max(len(session.tokens) - session.known for session in sessions)
        for session in sessions:
            session.busy = True
            session.known = len(session.tokens)
        return Turn(
            tuple(Member(key, session.serial, session.branch) for key, session in entries),
            tuple(bytes(session.text) for session in sessions),
            max(1, n),
            n_new,
            sessions[0].slot if len(sessions) == 1 else None,
            alone,
        )

    def done(self, turn: Turn, made: list[Made], elapsed_s: float, now: float) -> list[tuple[int, Drafted | NoDraft]]:
        """What came of a turn; for whom it is."""
        if turn.n_new == 1 and not turn.alone:
            self.pace.took(elapsed_s, max(m.computed_s for m in made), turn.n)
        out: list[tuple[int, Drafted | NoDraft]] = []
        for member, got in zip(turn.members, made, strict=True):
            session = self._back(turn, member)
            if session is not None and session.branch == member.branch and session.left:
                session.alone = False
                out += [(member.key[0], message) for message in self._taken(member.key, session, got, now)]
        return out

    def failed(self, turn: Turn, reason: str) -> list[tuple[int, NoDraft]]:
        """The server would not. What failed together is tried alone: it may be the fault of one."""
        out = []
        for member in turn.members:
            session = self._back(turn, member)
            if session is None:
                continue
            session.known = 0
            session.alone = len(turn.members) > 1
            if not session.alone and session.branch == member.branch and session.left:
                out.append((member.key[0], _over(member.key[1], session, reason)))
        return out

    def lost(self, reason: str) -> list[tuple[int, NoDraft]]:
        """The server is gone: what every branch that still waits is told."""
        waiting = [(key, s) for key, s in self._sessions.items() if s.left]
        return [(key[0], _over(key[1], session, reason)) for key, session in waiting]

    def _back(self, turn: Turn, member: Member) -> _Session | None:
        """The session, if it is still there. The turn keeps it no longer."""
        if not turn.alone:
            self._together = False
        session = self._sessions.get(member.key)
        if session is None or session.serial != member.serial:
            return None
        session.busy = False
        return session

    def _taken(self, key: Key, session: _Session, made: Made, now: float) -> list[Drafted | NoDraft]:
        foreign = next((i for i, token in enumerate(made.tokens) if not 0 <= token < self._n_vocab), None)
        tokens = made.tokens[: session.left][:foreign]
        if not tokens:
            return [_over(key[1], session, "the model made no token")]
        us = max(0, round((now - session.since) * 1e6))
        out = Drafted(key[1], session.branch, session.made, pack_tokens(tokens), us, made.ended)
        session.append(tokens)
        session.known = len(session.tokens) - 1
        session.made += len(tokens)
        session.left -= len(tokens)
        session.used_at = now
        if made.ended:
            session.open, session.left = False, 0
        elif session.left and (why := self._room(key, session, now)):
            return [out, _over(key[1], session, why)]
        return [out]


def _is_alone(session: _Session) -> bool:
    """Also what the server holds nothing of: only a turn of its own can say in which slot it is to be."""
    return session.alone or not session.known or len(session.tokens) - session.known > ALONE_TOKENS


def _over(number: int, session: _Session, reason: str) -> NoDraft:
    session.open, session.left = False, 0
    return NoDraft(number, session.branch, reason[:500])


def _too_many(n: int) -> str:
    return f"{n} tokens are asked for ahead, {MAX_DRAFT} are the most" if n > MAX_DRAFT else ""


def _no(asked: Ask | Extend, reason: str) -> NoDraft:
    return NoDraft(asked.session, asked.branch, reason[:500])
