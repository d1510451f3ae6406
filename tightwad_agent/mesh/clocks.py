"""Whose clock is wrong, when a certificate is good but for its dates."""

from __future__ import annotations

from collections.abc import Callable

import trio

from tightwad_agent.errors import OutOfDate, PeerError
from tightwad_agent.ids import Address
from tightwad_agent.mesh import tls
from tightwad_agent.streams import Framed, close_quietly
from tightwad_agent.wire.handshake import LINK, MAX_STRANGER_OPENING, Hello

ASK_S = 3.0
TOLERATED_S = 600
"""Clocks that differ by less are not worth a word."""
_UNITS = ((86_400, "days"), (3600, "hours"), (60, "minutes"))


def difference(mine: float, theirs: int, name: str) -> str:
    """In words, such as "the clock of this machine is 26 hours behind b's"; empty if they agree. Unix seconds."""
    off_s = mine - theirs
    if theirs == 0 or abs(off_s) < TOLERATED_S:
        return ""
    size, unit = next((n, word) for n, word in _UNITS if abs(off_s) >= 2 * n)
    which = "ahead of" if off_s > 0 else "behind"
    return f"the clock of this machine is {round(abs(off_s) / size)} {unit} {which} {name}'s"


def worded(exc: OutOfDate, mine: float, theirs: Hello) -> OutOfDate:
    """The same error, with the clocks compared; what a peer says of its own is not proved."""
    said = difference(mine, theirs.clock_s, theirs.name)
    if not said:
        return exc
    return OutOfDate(f"{exc.message}: {said}", hint="set the clock that is wrong; time synchronisation keeps it right")


async def explained(exc: OutOfDate, address: Address, hello: Callable[[], Hello]) -> OutOfDate:
    """Asks the node at this address for its time, without a certificate. The error as it was if it does not say."""
    try:
        with trio.move_on_after(ASK_S):
            mine = hello()
            return worded(exc, mine.clock_s, await _hello_at(address, mine))
    except (PeerError, trio.BrokenResourceError, OSError):
        pass
    return exc


async def _hello_at(address: Address, mine: Hello) -> Hello:
    stream = await tls.connect(address, tls.stranger_context())
    try:
        framed = Framed(stream, LINK, max_header=MAX_STRANGER_OPENING)
        await framed.send(mine)
        theirs: Hello = await framed.expect(Hello)
    finally:
        await close_quietly(stream)
    return theirs
