"""What two nodes say to one another about one model.

A stream carries one conversation. The dialler begins with `GetManifest` (one answer, then the end) or with `Hello`:
both sides send theirs, then exchange pieces both ways until both have all, or either ends it.

A piece travels as `Block` frames of exactly `BLOCK_BYTES` (the last one shorter), in order, its bytes as payload. Every
`Request` gets exactly one answer: all blocks of the piece, or a `Reject`; also after a `Cancel`, which crosses the
blocks on their way.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from tightwad_agent.ids import ModelId
from tightwad_agent.wire.codec import Codec, Max

VERSION = 1

BLOCK_BYTES = 256 << 10
"""Payload of one `Block`. Small enough that other messages slip in between, and that a slow link still shows life."""

MAX_PIECES = 65_536
"""Pieces of one manifest; a have-map of 8 KiB."""

MAX_MANIFEST_BYTES = 4 << 20
"""A manifest of `MAX_PIECES` pieces has 2.9 MiB."""

MAX_QUEUED = 16
"""Requests one side may have unanswered at the other."""

MAX_UPDATE = 512
"""Pieces one `Update` may name."""

MAX_SWARM_HEADER = 16 << 10
"""The largest header of this conversation is a `Hello` with a full have-map."""


class Why(StrEnum):
    """Why a request was not answered with the piece."""

    CANCELLED = "cancelled"
    NOT_HERE = "not_here"  # not held, or no longer what it was


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of each side. `have`: one bit a piece, most significant bit first; `fetching` as in `Update`."""

    version: int
    model: ModelId
    have: Annotated[bytes, Max(MAX_PIECES // 8)]
    fetching: Annotated[tuple[int, ...], Max(MAX_UPDATE)] = ()


@dataclass(frozen=True, slots=True)
class GetManifest:
    """Asks for the manifest of a model."""

    model: ModelId


@dataclass(frozen=True, slots=True)
class ManifestIs:
    """The answer; the manifest is the payload."""


@dataclass(frozen=True, slots=True)
class Bye:
    """The last message: why the sender ends the conversation, for people."""

    reason: Annotated[str, Max(500)]


@dataclass(frozen=True, slots=True)
class Update:
    """`have`: pieces that are new since the last message. `fetching`: all pieces that are on their way right now; the
    others count them as copies when they look for the rarest."""

    have: Annotated[tuple[int, ...], Max(MAX_UPDATE)] = ()
    fetching: Annotated[tuple[int, ...], Max(MAX_UPDATE)] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """Asks for one piece."""

    piece: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """The piece is no longer needed; the answer still comes, as blocks that were on their way or as a `Reject`."""

    piece: int


@dataclass(frozen=True, slots=True)
class Block:
    """Part of a requested piece: its bytes from `offset` are the payload."""

    piece: int
    offset: int


@dataclass(frozen=True, slots=True)
class Reject:
    """The piece will not come."""

    piece: int
    why: Why


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """Sent when nothing else was, so that silence means death."""


CODEC = Codec(
    "swarm",
    {
        1: Hello,
        2: GetManifest,
        3: ManifestIs,
        4: Bye,
        5: Update,
        6: Request,
        7: Cancel,
        8: Block,
        9: Reject,
        10: KeepAlive,
    },
)
