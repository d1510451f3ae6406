"""Two streams joined, so that what comes from one goes to the other, both ways.

Two `Direct` streams are served by a thread of their own, without trio's scheduler: each token of an answer passes
through three or more tunnels, and the price of a task switch is most of the price of a message. Other streams are
carried by tasks.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable, Collection, Sequence

import trio

from tightwad_agent.direct import TAKE_SIZE, Direct, direct, run_in_thread
from tightwad_agent.errors import ProtocolError
from tightwad_agent.filters import Filter, Item
from tightwad_agent.streams import READ_SIZE, STREAM_ERRORS, close_quietly

Count = Callable[[int], None]
"""Told of each chunk that was passed on, in bytes; perhaps by the tunnel's thread."""

MAX_HELD = 32 << 10
HOLD_S = 0.001
"""So many bytes are held, so long, because more follows at once."""
PAUSE_S = 0.0001
"""So long nobody looks when several writes follow one another: to be woken by each costs both sides more."""
_LOOK_S = 0.1
"""A message that has begun is looked after that often, even if less of it has come than was expected."""


async def join(
    left: trio.abc.Stream,
    right: trio.abc.Stream,
    n_right: Count,
    n_left: Count,
    *,
    to_right: Filter | None = None,
    to_left: Filter | None = None,
) -> bool:
    """Joins two streams until either direction ends or the task is cancelled, then closes both.

    Whether it was the right one that ended or broke first. `n_right` counts what went there, `n_left` what came back;
    what is filtered is counted as it was before. Errors of the filters are raised.
    """
    left, right = direct(left), direct(right)
    to_right, to_left = to_right or Filter(), to_left or Filter()
    try:
        if isinstance(left, Direct) and isinstance(right, Direct):
            joint = _Joint(_Way(left, right, n_right, to_right), _Way(right, left, n_left, to_left))
            return await joint.run() is right
        return await _pump_both((left, right, n_right, to_right), (right, left, n_left, to_left)) is right
    finally:  # also when cancelled
        await close_quietly(left)
        await close_quietly(right)


def uncounted(_n: int) -> None:
    """Nobody wants to know."""


async def splice(left: trio.abc.Stream, right: trio.abc.Stream, n_bytes: Count = uncounted) -> None:
    """`join` for those who do not ask which side ended, or which way the bytes went."""
    await join(left, right, n_bytes, n_bytes)


# By a thread


class _Way:
    """One direction. All in the tunnel's thread."""

    def __init__(self, source: Direct, sink: Direct, n_bytes: Count, passes: Filter) -> None:
        self.source, self.sink = source, sink
        self._n_bytes, self._filter = n_bytes, passes
        self._rest: list[Item] = []
        self._held: list[Item] = []
        self._n_held = 0
        self.held_until = math.inf
        self.pauses = False
        """More was held, and more follows in several writes."""
        self._has_ended = False

    @property
    def is_full(self) -> bool:
        """The sink must take what it was given before more is taken from the source."""
        return self.sink.unsent  # and so it is while there is a rest

    @property
    def can_go_on(self) -> bool:
        """Without waiting for anything."""
        return self.source.has_more and not self.is_full

    @property
    def is_inside(self) -> bool:
        """The rest of a message is under way."""
        return self._filter.is_inside

    def step(self) -> Direct | None:
        """Passes on what is there, without waiting; which side ended or broke, if one did."""
        self.pauses = False
        try:
            if self.is_full and not self._give_rest():
                return None
            if self._has_ended:
                return self.source
        except STREAM_ERRORS:
            return self.sink
        try:
            data = self.source.take()
        except STREAM_ERRORS:
            return self._ended()
        if data is None:
            return None
        if not (n := len(data)):
            return self._ended()
        try:
            self._pass_on(data)
        except STREAM_ERRORS:
            return self.sink
        self._n_bytes(n)
        return None

    def release(self) -> Direct | None:
        """What was held is held no longer; the sink, if it broke."""
        try:
            self._give(self._no_longer_held())
        except STREAM_ERRORS:
            return self.sink
        return None

    def expect(self) -> None:
        """The source need not wake anybody for less than is of use."""
        self.source.expect(self._filter.missing)
        self.source.ask_for_plenty()

    def _ended(self) -> Direct | None:
        self._has_ended = True
        if self.release() is not None:
            return self.sink
        return None if self.is_full else self.source

    def _pass_on(self, data: memoryview) -> None:
        chunks = self._filter.feed(data)
        if self._filter.more_follows and self._hold(chunks):
            return
        self._give([*self._no_longer_held(), *chunks] if self._held else chunks)

    def _hold(self, chunks: Sequence[Item]) -> bool:
        """Whether they are kept for a moment: not if they are many, or have to be fetched."""
        ready = [chunk for chunk in chunks if not callable(chunk)]
        n_held = self._n_held + sum(map(len, ready))
        if len(ready) < len(chunks) or n_held > MAX_HELD:
            return False
        now = time.monotonic()
        if ready and not self._held:
            self.held_until = now + HOLD_S
        self.pauses = self._filter.in_bursts and now < self.held_until
        self._held += [bytes(chunk) for chunk in ready]
        self._n_held = n_held
        return True

    def _no_longer_held(self) -> list[Item]:
        held, self._held, self._n_held, self.held_until = self._held, [], 0, math.inf
        return held

    def _give_rest(self) -> bool:
        """Whether all of it is on its way."""
        if not self.sink.push():
            return False
        rest, self._rest = self._rest, []
        self._give(rest)
        return not self.is_full

    def _give(self, chunks: Sequence[Item]) -> None:
        """As one write if they fit into one; what the sink does not take is kept."""
        ready = [chunk for chunk in chunks if not callable(chunk)]
        if len(ready) == len(chunks) > 1 and sum(map(len, ready)) <= TAKE_SIZE:
            chunks = [b"".join(ready)]
        for number, chunk in enumerate(chunks):
            data = memoryview(chunk() if callable(chunk) else chunk)
            for start in range(0, len(data), TAKE_SIZE):
                if not self.sink.give(data[start : start + TAKE_SIZE]):
                    self._keep([data[start + TAKE_SIZE :], *chunks[number + 1 :]])
                    return

    def _keep(self, chunks: Sequence[Item]) -> None:
        """What was taken is overwritten by the next `take`."""
        self._rest.extend(chunk if callable(chunk) else bytes(chunk) for chunk in chunks if callable(chunk) or chunk)


class _Joint:
    """Both directions and their thread."""

    def __init__(self, up: _Way, down: _Way) -> None:
        self._ways = (up, down)
        self._ends = (up.source, down.source)
        self._first: Direct | None = None
        self._error: ProtocolError | None = None
        self._stopped = False

    async def run(self) -> Direct | None:
        """Which end ended or broke first. Raises the filters' `ProtocolError`."""
        Direct.use_own_buffers(*self._ends)
        await run_in_thread(self._work, self._stop)
        if self._error is not None:
            raise self._error
        return self._first

    def _stop(self) -> None:
        self._stopped = True
        for end in self._ends:
            end.shut()

    def _work(self) -> None:
        try:
            self._first = self._serve()
        except ProtocolError as exc:
            self._error = exc

    def _serve(self) -> Direct | None:
        up, down = self._ways
        poll, full, awaited = select.poll(), None, dict[int, list[_Way]]()
        going_on = [up, down]
        while not self._stopped:
            for way in going_on:
                if (ended := way.step()) is not None:
                    return ended
            if (now := (up.is_full, down.is_full)) != full:
                full, awaited = now, self._watch(poll, awaited)
            if going_on := [way for way in self._ways if way.pauses]:
                time.sleep(PAUSE_S)
                continue
            going_on = [way for way in self._ways if way.can_go_on]
            came = poll.poll(0 if going_on else self._patience_ms())
            for fd, _ in came:
                going_on += [way for way in awaited[fd] if way not in going_on]
            if not came:
                going_on = going_on or [way for way in self._ways if way.is_inside]
            if (ended := self._release()) is not None:
                return ended
        return None

    def _patience_ms(self) -> float | None:
        """How long nothing has to be done but to wait."""
        patience_s = math.inf
        for way in self._ways:
            way.expect()
            if way.held_until < math.inf:
                patience_s = min(patience_s, max(0.0, way.held_until - time.monotonic()))
            elif way.is_inside:
                patience_s = min(patience_s, _LOOK_S)
        return None if patience_s == math.inf else patience_s * 1000

    def _release(self) -> Direct | None:
        """What was held long enough; the end that broke, if one did."""
        for way in self._ways:
            if way.held_until <= time.monotonic() and (broken := way.release()) is not None:
                return broken
        return None

    def _watch(self, poll: select.poll, before: Collection[int]) -> dict[int, list[_Way]]:
        """The sockets that are waited for, and by whom. Another one's news would come again and again."""
        for fd in before:
            poll.unregister(fd)
        awaited: dict[int, list[_Way]] = {}
        events: dict[int, int] = {}
        for way in self._ways:
            fd = (way.sink if way.is_full else way.source).fileno()
            awaited.setdefault(fd, []).append(way)
            events[fd] = events.get(fd, 0) | (select.POLLOUT if way.is_full else select.POLLIN)
        for fd, mask in events.items():
            poll.register(fd, mask)
        return awaited


# By tasks


async def pump(
    source: trio.abc.ReceiveStream, sink: trio.abc.SendStream, n_bytes: Count, passes: Filter | None = None
) -> trio.abc.AsyncResource:
    """Copies until the source ends or either side breaks; which of the two it was. The caller closes both."""
    passes = passes or Filter()
    while True:
        try:
            data = await source.receive_some(READ_SIZE)
        except STREAM_ERRORS:
            return source
        if not data:
            return source
        try:
            for item in passes.feed(data):
                await sink.send_all(await trio.to_thread.run_sync(item) if callable(item) else item)
        except STREAM_ERRORS:
            return sink
        n_bytes(len(data))


_Pumped = tuple[trio.abc.Stream, trio.abc.Stream, Count, Filter]


async def _pump_both(*ways: _Pumped) -> trio.abc.AsyncResource:
    first: list[trio.abc.AsyncResource] = []
    errors: list[ProtocolError] = []
    async with trio.open_nursery() as nursery:

        async def one_way(way: _Pumped) -> None:
            try:
                first.append(await pump(*way))
            except ProtocolError as exc:
                errors.append(exc)
            nursery.cancel_scope.cancel()

        for way in ways:
            nursery.start_soon(one_way, way)
    if errors:
        raise errors[0]
    return first[0]
