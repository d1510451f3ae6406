"""One peer's side of one conversation about one model. Pure: messages in, effects and messages out.

The shell gives every message that came to `handle` and performs the effects; it sends what `outgoing` says, one at a
time, so that nothing is read from disk before the line has room for it. Of what comes only the length matters here.
Whatever the peer does out of place, out of range or out of proportion is a `ProtocolError`, and the conversation is
over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

from tightwad_agent.errors import PeerRefused, ProtocolError
from tightwad_agent.ids import ModelId
from tightwad_agent.swarm.pieces import bits_of, pieces_of
from tightwad_agent.wire.swarm import (
    BLOCK_BYTES,
    MAX_QUEUED,
    MAX_UPDATE,
    VERSION,
    Block,
    Bye,
    Cancel,
    Hello,
    KeepAlive,
    Reject,
    Request,
    Update,
    Why,
)


@dataclass(frozen=True, slots=True)
class Joined:
    """The peer's hello: what it has, and what is on its way to it."""

    has: tuple[int, ...]
    fetching: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Updated:
    """`has`: new at the peer. `fetching`: all that is on its way to it now."""

    has: tuple[int, ...]
    fetching: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of something we asked for came; 0: it has to wait, but the peer lives."""

    n_bytes: int


@dataclass(frozen=True, slots=True)
class Received:
    """A block of a piece we asked for, in order; its bytes, as they were given, begin at `offset`. `last`: all of the
    piece have come."""

    piece: int
    data: Sized
    offset: int
    last: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """A piece we asked for will not come."""

    piece: int


Effect = Joined | Updated | Progress | Received | Refused


class Span(NamedTuple):
    """Bytes to read for a `Block`: `length` from `offset` inside `piece`."""

    piece: int
    offset: int
    length: int


class Outgoing(NamedTuple):
    """What to send next; `span` says what to read as its payload."""

    message: object
    span: Span | None = None


@dataclass(slots=True)
class _Incoming:
    """An answer that is under way. `n_bytes` have come."""

    n_bytes: int = 0
    cancelled: bool = False


class Conversation:
    """Both directions between us and one peer, after the stream was opened."""

    def __init__(self, model: ModelId, lengths: Sequence[int]) -> None:
        self._model = model
        self._lengths = lengths
        self._greeted = False
        self._asked: dict[int, _Incoming] = {}
        self._queue: dict[int, int] = {}
        self._shared: Collection[int] = ()
        self._out: deque[object] = deque()
        self._n_rejects = 0
        self._new: set[int] = set()
        self._fetching: tuple[int, ...] = ()
        self._told_fetching: tuple[int, ...] = ()
        self._peer_has: set[int] = set()

    # Us

    def hello(self, have: Collection[int], fetching: Sequence[int]) -> None:
        """Must be called first. `have` is the live collection of pieces that may be served."""
        self._shared = have
        self._fetching = self._told_fetching = tuple(fetching)[:MAX_UPDATE]
        bits = bits_of(have, len(self._lengths))
        self._out.append(Hello(VERSION, self._model, bits, self._told_fetching))

    @property
    def joined(self) -> bool:
        """The peer's hello has come."""
        return self._greeted

    @property
    def may_ask(self) -> bool:
        """Whether the peer still takes requests; cancelled ones count until they are answered."""
        return self._greeted and len(self._asked) < MAX_QUEUED

    @property
    def peer_complete(self) -> bool:
        return len(self._peer_has) == len(self._lengths)

    @property
    def n_queued(self) -> int:
        """Requests of the peer that are not answered."""
        return len(self._queue)

    @property
    def sending(self) -> int:
        """The piece of which blocks were sent and blocks are left; -1 if there is none."""
        for piece, offset in self._queue.items():
            return piece if offset else -1
        return -1

    @property
    def queued(self) -> Collection[int]:
        """Pieces that the peer waits for."""
        return self._queue.keys()

    def peer_has(self, piece: int) -> bool:
        return piece in self._peer_has

    def send_first(self, piece: int) -> None:
        """One of `queued` is to be sent next; when nothing is `sending`."""
        self._queue = {piece: self._queue[piece], **self._queue}

    def request(self, piece: int) -> None:
        """Asks for a piece. Asking again before the answer, or beyond `may_ask`, is a bug."""
        if piece in self._asked or not self.may_ask:
            raise ValueError(f"piece {piece} cannot be asked for now")
        self._asked[piece] = _Incoming()
        self._out.append(Request(piece))

    def is_asked(self, piece: int) -> bool:
        return piece in self._asked

    def wants(self, piece: int) -> bool:
        """It was asked for, and not taken back. May be called in any thread."""
        incoming = self._asked.get(piece)
        return incoming is not None and not incoming.cancelled

    def cancel(self, piece: int) -> None:
        """Takes a request back; its bytes are no longer of interest."""
        incoming = self._asked.get(piece)
        if incoming is not None and not incoming.cancelled:
            incoming.cancelled = True
            self._out.append(Cancel(piece))

    def we_have(self, pieces: Iterable[int]) -> None:
        """Pieces that are new here, to be told."""
        self._new.update(pieces)

    def we_fetch(self, pieces: Sequence[int]) -> None:
        """All pieces that are on their way to us now, to be told."""
        self._fetching = tuple(pieces)[:MAX_UPDATE]

    def keep_alive(self) -> None:
        if not self._out:
            self._out.append(KeepAlive())

    def bye(self, reason: str) -> None:
        """Drops what was to be sent and says why this ends."""
        self._queue.clear()
        self._out.clear()
        self._out.append(Bye(reason[:500]))

    @property
    def has_news(self) -> bool:
        """What is here, or on its way to us, has changed since the peer was told."""
        return bool(self._new) or self._fetching != self._told_fetching

    @property
    def speaks(self) -> bool:
        """There are messages to send, beside news and blocks."""
        return bool(self._out)

    def outgoing(self, *, news: bool = True, blocks: bool = True) -> Outgoing | None:
        """The next message to send, if there is any: messages first, then, where they are wanted, news, and the next
        block of the oldest request."""
        if self._out:
            message = self._out.popleft()
            self._n_rejects -= isinstance(message, Reject)
            return Outgoing(message)
        if news and self.has_news:
            have = tuple(sorted(self._new)[:MAX_UPDATE])
            self._new.difference_update(have)
            self._told_fetching = self._fetching
            return Outgoing(Update(have, self._fetching))
        if blocks:
            for piece, offset in self._queue.items():
                return self._next_block(piece, offset)
        return None

    def upload_failed(self, span: Span) -> None:
        """The span could not be read: whatever of its piece was sent, the peer learns that the rest will not come."""
        is_last = span.offset + span.length == self._lengths[span.piece]
        if self._queue.pop(span.piece, None) is not None or is_last:
            self._reject(span.piece, Why.NOT_HERE)

    # The peer

    def handle(self, message: Any, payload: Sized) -> list[Effect]:
        """What a message of the peer means. Raises `ProtocolError`, and `PeerRefused` for its `Bye`."""
        if len(payload) and not isinstance(message, Block):
            raise ProtocolError(f"swarm: {type(message).__name__} with a payload")
        if isinstance(message, Bye):
            raise PeerRefused(message.reason or "the peer ended the conversation")
        if isinstance(message, Hello):
            return self._on_hello(message)
        if not self._greeted:
            raise ProtocolError(f"swarm: {type(message).__name__} before the hello")
        match message:
            case Update():
                return self._on_update(message)
            case Request():
                return self._on_request(message)
            case Cancel():
                return self._on_cancel(message)
            case Block():
                return self._on_block(message, payload)
            case Reject():
                return self._on_reject(message)
            case KeepAlive():
                return [Progress(0)]
        raise ProtocolError(f"swarm: {type(message).__name__} in the middle of an exchange")

    def _on_hello(self, hello: Hello) -> list[Effect]:
        if self._greeted:
            raise ProtocolError("swarm: a second hello")
        if hello.version != VERSION:
            raise ProtocolError(f"swarm: the peer speaks version {hello.version}, we speak {VERSION}")
        if hello.model != self._model:
            raise ProtocolError(f"swarm: the peer speaks of model {hello.model.short}, we of {self._model.short}")
        try:
            has = tuple(pieces_of(hello.have, len(self._lengths)))
        except ValueError as exc:
            raise ProtocolError(f"swarm: {exc}") from None
        fetching = self._in_range(hello.fetching)
        self._greeted = True
        self._peer_has.update(has)
        return [Joined(has, fetching)]

    def _on_update(self, update: Update) -> list[Effect]:
        has, fetching = self._in_range(update.have), self._in_range(update.fetching)
        self._peer_has.update(has)
        return [Updated(has, fetching)]

    def _on_request(self, request: Request) -> list[Effect]:
        (piece,) = self._in_range((request.piece,))
        if piece in self._queue:
            raise ProtocolError(f"swarm: piece {piece} was asked for twice")
        if len(self._queue) + self._n_rejects >= MAX_QUEUED:
            raise ProtocolError(f"swarm: more than {MAX_QUEUED} requests at once")
        if piece in self._shared:
            self._queue[piece] = 0
        else:
            self._reject(piece, Why.NOT_HERE)
        return []

    def _on_cancel(self, cancel: Cancel) -> list[Effect]:
        (piece,) = self._in_range((cancel.piece,))
        if self._queue.pop(piece, None) is not None:
            self._reject(piece, Why.CANCELLED)
        return []  # else the last block and the cancel crossed on their way

    def _on_block(self, block: Block, payload: Sized) -> list[Effect]:
        incoming = self._asked.get(block.piece)
        if incoming is None:
            raise ProtocolError(f"swarm: piece {block.piece} came without having been asked for")
        left = self._lengths[block.piece] - incoming.n_bytes
        if block.offset != incoming.n_bytes or len(payload) != min(BLOCK_BYTES, left):
            raise ProtocolError(
                f"swarm: {len(payload)} bytes of piece {block.piece} from {block.offset}, "
                f"expected {min(BLOCK_BYTES, left)} from {incoming.n_bytes}"
            )
        incoming.n_bytes += len(payload)
        last = len(payload) == left
        if last:
            del self._asked[block.piece]
        effects: list[Effect] = [Progress(len(payload))]
        if not incoming.cancelled:
            effects.append(Received(block.piece, payload, block.offset, last))
        return effects

    def _on_reject(self, reject: Reject) -> list[Effect]:
        incoming = self._asked.pop(reject.piece, None)
        if incoming is None:
            raise ProtocolError(f"swarm: piece {reject.piece} was refused without having been asked for")
        if incoming.cancelled:
            return []
        if reject.why is Why.CANCELLED:
            raise ProtocolError(f"swarm: piece {reject.piece} was refused as cancelled, which it was not")
        self._peer_has.discard(reject.piece)
        return [Refused(reject.piece)]

    # How

    def _next_block(self, piece: int, offset: int) -> Outgoing:
        length = min(BLOCK_BYTES, self._lengths[piece] - offset)
        if offset + length == self._lengths[piece]:
            del self._queue[piece]
        else:
            self._queue[piece] = offset + length
        return Outgoing(Block(piece, offset), Span(piece, offset, length))

    def _reject(self, piece: int, why: Why) -> None:
        self._n_rejects += 1
        self._out.append(Reject(piece, why))

    def _in_range(self, pieces: tuple[int, ...]) -> tuple[int, ...]:
        for piece in pieces:
            if not 0 <= piece < len(self._lengths):
                raise ProtocolError(f"swarm: piece {piece} of {len(self._lengths)}")
        return pieces
