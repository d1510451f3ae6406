"""Measuring one address of a node: small questions, and answers of the size that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tightwad_agent.wire.codec import NATURAL, Codec

MAX_GAUGE = 256 << 10
"""Bytes of one answer."""
MAX_GAUGES = 16
"""Questions on one stream."""


@dataclass(frozen=True, slots=True)
class Gauge:
    """Answer at once, with `size` bytes of payload (at most MAX_GAUGE)."""

    size: Annotated[int, NATURAL] = 0


@dataclass(frozen=True, slots=True)
class Gauged:
    """The answer; its payload means nothing."""


GAUGE = Codec("gauge", {1: Gauge, 2: Gauged})
