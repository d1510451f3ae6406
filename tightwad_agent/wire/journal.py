"""How an answer crosses from the node that makes it to the node whose client waits: `frames` inside an HTTP body.

Each frame is whole or worthless: what a client is to see, and the token ids that it stands for, come in one. So a node
that has lost its source knows to the token what its client has, and asks another for the rest with a `Resume`. An
answer that ends without `Ended`, `Whole` or `Broke` was cut off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tightwad_agent.errors import ProtocolError
from tightwad_agent.wire.codec import NATURAL, Codec, Max
from tightwad_agent.wire.frames import FrameDecoder, encode
from tightwad_agent.wire.verify import MAX_ROUND, Packed

Natural = Annotated[int, NATURAL]

CONTENT_TYPE = b"application/x-tightwad-journal"
MAX_CHOICES = 64
MAX_SAID_TEXT = 8 << 20
"""An answer that echoes its prompt begins with all of it."""
MAX_HEADER = MAX_SAID_TEXT + (1 << 16)
MAX_PAYLOAD = 64 << 20
"""Bytes for the client in one frame: a whole answer at most."""
MAX_RESUME = 16 << 20
"""Bytes of a `Resume`."""


@dataclass(frozen=True, slots=True)
class Began:
    """What stays the same in an answer whoever goes on with it.

    `created` in Unix seconds, `offset_s` east of UTC: the time that the chat template was told. `seed`: of its first
    choice. `prompt`: a digest of the prompts' token ids; with another one the answer cannot go on.
    """

    id: Annotated[str, Max(128)]
    created: Natural
    offset_s: int
    seed: Natural
    model: Annotated[str, Max(512)]
    fingerprint: Annotated[str, Max(128)]
    prompt: Annotated[bytes, Max(32)]
    stream: bool = True


@dataclass(frozen=True, slots=True)
class Said:
    """More of a choice: its token ids, and what of its text the payload shows (text may be held back, or let go).

    `n_cached`: tokens of the prompt that needed no evaluation, as far as known. `over`: the choice is complete, and had
    `n_answer` tokens.
    """

    index: Natural
    tokens: Annotated[bytes, Max(4 * MAX_ROUND)]
    text: Annotated[str, Max(MAX_SAID_TEXT)] = ""
    n_cached: Natural = 0
    over: bool = False
    n_answer: Natural = 0


@dataclass(frozen=True, slots=True)
class Aside:
    """A sign of life; the payload goes to the client, and means nothing."""


@dataclass(frozen=True, slots=True)
class Whole:
    """The payload is the body of an answer that is no stream, and its end."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a stream, behind its last event."""


@dataclass(frozen=True, slots=True)
class Broke:
    """There will be no more. `lost`: the engine went away, and another can go on; else an error that is the client's
    to know."""

    code: Annotated[str, Max(64)]
    message: Annotated[str, Max(4000)]
    hint: Annotated[str, Max(4000)] = ""
    status: Natural = 500
    lost: bool = False


JOURNAL = Codec("an answer's journal", {1: Began, 2: Said, 3: Aside, 4: Whole, 5: Ended, 6: Broke})
Entry = Began | Said | Aside | Whole | Ended | Broke


class JournalDecoder:
    """Bytes of an HTTP body in any cut; entries with their payloads. Raises `ProtocolError`."""

    def __init__(self) -> None:
        self._frames = FrameDecoder(MAX_HEADER, MAX_PAYLOAD)

    def feed(self, data: bytes) -> list[tuple[Entry, bytes]]:
        """All that `data` completes."""
        return [(JOURNAL.decode(frame.header), frame.payload) for frame in self._frames.feed(data)]


def entry(message: Entry, payload: bytes = b"") -> bytes:
    """The bytes of one entry."""
    return encode(JOURNAL.encode(message), payload)


# Going on elsewhere


@dataclass(frozen=True, slots=True)
class Choice:
    """What there is of a choice: all its token ids; `over` with `n_answer` as in `Said`."""

    index: Natural
    tokens: Packed
    n_cached: Natural = 0
    over: bool = False
    n_answer: Natural = 0


@dataclass(frozen=True, slots=True)
class Resume:
    """The beginning of an answer, for who is to go on with it. `opened`: the client has the events that a stream begins
    with."""

    began: Began
    choices: Annotated[tuple[Choice, ...], Max(MAX_CHOICES)]
    opened: bool = False


RESUME = Codec("an answer's beginning", {1: Resume})


def with_resume(resume: Resume, body: bytes) -> tuple[int, bytes]:
    """A request's body with the answer's beginning before it, and how many bytes that is."""
    head = RESUME.encode(resume)
    return len(head), head + body


def split_resume(n_bytes: int, body: bytes) -> tuple[Resume, bytes]:
    """The inverse. Raises `ProtocolError`."""
    if not 0 < n_bytes <= min(len(body), MAX_RESUME):
        raise ProtocolError(f"an answer's beginning of {n_bytes} bytes in a body of {len(body)}")
    return RESUME.decode(body[:n_bytes]), body[n_bytes:]
