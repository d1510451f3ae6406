"""Compute graphs made small on their way to a worker: an encoder at the coordinator, a decoder at the worker.

The engine sends messages `u8 command | u64 little-endian size | payload`. Whenever the size of a batch changes it sends
the whole graph anew (GRAPH_COMPUTE, 14 KB a layer), most often one that it sent shortly before, else one that hardly
differs from the last. Both ends remember the last graphs of a connection, and in their place go messages of the same
form with commands that the engine does not have:

    0xF0 PLAIN   empty                                   all that follows is the engine's own, to the end
    0xF1 SAME    u8 which                                the graph remembered there; it is the newest from now on
    0xF2 DELTA   u8 which | u32 length | difference      a graph of `length` bytes; it is the newest from now on

`which` counts from the newest, 0; 255 is a graph of zeros. Everything else passes as it is, whole or in parts, as it
comes: weights cost a comparison a chunk. Only a graph is held until it is whole. What does not begin as the engine's
RPC does, with HELLO, is not looked at.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from functools import cached_property

from tightwad_agent.engine.graph_delta import Columns, applied, columns, difference
from tightwad_agent.errors import ProtocolError
from tightwad_agent.filters import Chunk, Filter

VERSION = 1
"""Of the messages above; a worker that says another one, or none, is spoken to plainly."""

HELLO, GRAPH_COMPUTE, SET_TENSOR = 14, 10, 6
"""Of the engine. HELLO begins each connection; SET_TENSOR is not answered, and nothing begins with it."""
PLAIN, SAME, DELTA = 0xF0, 0xF1, 0xF2
FIRST_OWN = 0xF0
"""Commands from here on are ours."""

MIN_GRAPH = 4 << 10
MAX_GRAPH = 8 << 20
"""Payload bytes of a graph that is worth it, and of one that may be held."""
MAX_GRAPHS = 16
MAX_REMEMBERED = 16 << 20
"""Graphs of a connection that each end remembers, and their bytes; the encoder holds up to twice that."""
NOTHING = 255
_WORTH = 0.75
"""A difference larger than this part of the graph is not sent."""

_HEADER = struct.Struct("<BQ")
_WHICH = struct.Struct("<B")
_DELTA = struct.Struct("<BI")


class Graph:
    """A payload, and its columns once somebody has asked for them."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload

    @cached_property
    def columns(self) -> Columns:
        return columns(self.payload)


class Remembered:
    """The last graphs of a connection, the same at both ends."""

    def __init__(self) -> None:
        self._graphs: list[Graph] = []
        self._n_bytes = 0

    def add(self, graph: Graph) -> None:
        """As the newest; the oldest go, so that the bounds hold."""
        self._graphs.insert(0, graph)
        self._n_bytes += len(graph.payload)
        while len(self._graphs) > MAX_GRAPHS or self._n_bytes > MAX_REMEMBERED:
            self._n_bytes -= len(self._graphs.pop().payload)

    def reused(self, which: int) -> Graph:
        """The newest from now on. Raises `ProtocolError`."""
        graph = self[which]
        self._graphs.insert(0, self._graphs.pop(which))
        return graph

    def __getitem__(self, which: int) -> Graph:
        if which >= len(self._graphs):
            raise ProtocolError(f"graph {which} of {len(self._graphs)} that are remembered")
        return self._graphs[which]

    def same(self, payload: bytes) -> int | None:
        """Which one it is."""
        return next((which for which, graph in enumerate(self._graphs) if graph.payload == payload), None)

    def like(self, payload: bytes) -> int:
        """The newest of the same length: the nearest one is hardly ever nearer. `NOTHING` if there is none."""
        n = len(payload)
        return next((which for which, graph in enumerate(self._graphs) if len(graph.payload) == n), NOTHING)


class _Messages(Filter, ABC):
    """Follows a stream of messages and takes some out of it."""

    def __init__(self) -> None:
        self._remembered = Remembered()
        self._is_plain = False
        self._left = 0  # of the message that passes: bytes of its payload still to come
        self._head = b""  # of the message that passes: its header as far as it came
        self._held = bytearray()  # of the message that is taken out
        self._due = 0  # bytes until it, or its header, is whole; 0: none is taken out
        self._last = -1  # the command of the last message

    def feed(self, data: Chunk) -> list[Chunk]:
        """What to pass on for it, in order; parts of `data` are not copied."""
        if self._is_plain:
            return [data]
        if len(data) <= self._left:
            self._left -= len(data)
            return [data]
        view, at, out = memoryview(data), 0, list[Chunk]()
        while at < len(view) and not self._is_plain:
            if not (self._left or self._head or self._due) and self._is_special(view[at]):
                self._meet(view[at], out)
            if self._due:
                at = self._hold(view, at, out)
            elif not self._is_plain:
                at = self._pass(view, at, out)
        if at < len(view):
            out.append(view[at:])
        return out

    def _pass(self, view: memoryview, start: int, out: list[Chunk]) -> int:
        """Over all messages up to a special one; where that begins, or the data ends."""
        at, n = start, len(view)
        while at < n:
            if self._left:
                step = min(self._left, n - at)
                self._left -= step
                at += step
            elif not self._head and self._is_special(view[at]):
                break
            else:
                at = self._pass_header(view, at)
        out.append(view[start:at])
        return at

    def _pass_header(self, view: memoryview, at: int) -> int:
        end = at + _HEADER.size - len(self._head)
        self._head += view[at:end]
        if len(self._head) == _HEADER.size:
            self._last, self._left = _HEADER.unpack(self._head)
            self._head = b""
        return min(end, len(view))

    def _hold(self, view: memoryview, at: int, out: list[Chunk]) -> int:
        end = at + self._due
        part = view[at:end]
        self._held += part
        self._due -= len(part)
        if not self._due:
            self._held_whole(out)
        return min(end, len(view))

    def _held_whole(self, out: list[Chunk]) -> None:
        """Its header is there, or all of it."""
        command, size = _HEADER.unpack_from(self._held)
        self._last = command
        if len(self._held) == _HEADER.size:
            if not self._is_taken(command, size):
                self._left = size
                out.append(self._released())
                return
            self._due = size
        if not self._due:
            self._take(command, bytes(memoryview(self._released())[_HEADER.size :]), out)

    def _released(self) -> bytearray:
        held, self._held = self._held, bytearray()
        return held

    @abstractmethod
    def _is_special(self, command: int) -> bool:
        """Whether a message that begins so may be more than one that passes."""

    @abstractmethod
    def _meet(self, command: int, out: list[Chunk]) -> None:
        """A special message begins: may have it held."""

    @abstractmethod
    def _is_taken(self, command: int, size: int) -> bool:
        """Whether it is held further, now that its size is known; else it passes."""

    @abstractmethod
    def _take(self, command: int, payload: bytes, out: list[Chunk]) -> None:
        """It is whole."""

    def _hold_header(self) -> None:
        self._due = _HEADER.size

    @property
    def missing(self) -> int:
        """Of the message that has begun; at least a header, if none has."""
        return 1 if self._is_plain else self._left or self._due or _HEADER.size - len(self._head)

    @property
    def is_inside(self) -> bool:
        """See `Filter`."""
        return not self._is_plain and bool(self._left or self._due or self._head)


class GraphEncoder(_Messages):
    """At the coordinator. Takes anything: what is no RPC passes."""

    in_bursts = True

    def __init__(self) -> None:
        super().__init__()
        self._has_begun = False

    @property
    def more_follows(self) -> bool:
        """See `Filter`."""
        return not self._is_plain and (self.is_inside or self._last == SET_TENSOR)

    def _is_special(self, command: int) -> bool:
        return command == GRAPH_COMPUTE or command >= FIRST_OWN or not self._has_begun

    def _meet(self, command: int, out: list[Chunk]) -> None:
        if command >= FIRST_OWN or not (self._has_begun or command == HELLO):
            out.append(_message(PLAIN))
            self._is_plain = True
        elif self._has_begun:
            self._hold_header()
        self._has_begun = True

    def _is_taken(self, command: int, size: int) -> bool:  # noqa: ARG002 - only one is held
        return MIN_GRAPH <= size <= MAX_GRAPH

    def _take(self, command: int, payload: bytes, out: list[Chunk]) -> None:
        which = self._remembered.same(payload)
        if which is not None:
            self._remembered.reused(which)
            out.append(_message(SAME, _WHICH.pack(which)))
            return
        graph, which = Graph(payload), self._remembered.like(payload)
        old = None if which == NOTHING else self._remembered[which].columns
        packed = difference(graph.columns, old)
        if len(packed) > _WORTH * len(payload):
            out.append(_message(command, payload))
            return
        self._remembered.add(graph)
        out.append(_message(DELTA, _DELTA.pack(which, len(payload)) + packed))


class GraphDecoder(_Messages):
    """At the worker. `feed` raises `ProtocolError` for what no encoder sends; the stream is of no use then."""

    def _is_special(self, command: int) -> bool:
        return command >= FIRST_OWN

    def _meet(self, command: int, out: list[Chunk]) -> None:  # noqa: ARG002 - nothing passes here
        if command > DELTA:
            raise ProtocolError(f"RPC command {command}", hint="the coordinator runs a newer tightwad-agent")
        self._hold_header()

    def _is_taken(self, command: int, size: int) -> bool:
        least, most = _SIZES[command]
        if not least <= size <= most:
            raise ProtocolError(f"an RPC message {command:#x} of {size} bytes; {least} to {most} are taken")
        return True

    def _take(self, command: int, payload: bytes, out: list[Chunk]) -> None:
        if command == PLAIN:
            self._is_plain = True
        elif command == SAME:
            out.extend(_graph(self._remembered.reused(payload[0])))
        else:
            out.extend(_graph(self._changed(payload)))

    def _changed(self, payload: bytes) -> Graph:
        which, length = _DELTA.unpack_from(payload)
        if not MIN_GRAPH <= length <= MAX_GRAPH:
            raise ProtocolError(f"a graph of {length} bytes; {MIN_GRAPH} to {MAX_GRAPH} are taken")
        old = bytes(length) if which == NOTHING else self._remembered[which].payload
        if len(old) != length:
            raise ProtocolError(f"a graph of {length} bytes made of one of {len(old)}")
        graph = Graph(applied(old, memoryview(payload)[_DELTA.size :]))
        self._remembered.add(graph)
        return graph


_SIZES = {PLAIN: (0, 0), SAME: (_WHICH.size, _WHICH.size), DELTA: (_DELTA.size, MAX_GRAPH)}


def _message(command: int, payload: bytes = b"") -> bytes:
    return _HEADER.pack(command, len(payload)) + payload


def _graph(graph: Graph) -> tuple[Chunk, Chunk]:
    return _HEADER.pack(GRAPH_COMPUTE, len(graph.payload)), graph.payload
