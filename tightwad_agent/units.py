"""Durations and sizes as people write and read them."""

from __future__ import annotations

import re

from tightwad_agent.errors import UsageError

_DURATION = re.compile(r"(\d{1,9})\s*(s|m|h|d)?\Z")
_SIZE = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,3}))?\s*([kmgt]i?b?|b)?\Z", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, None: 1}


def parse_duration(text: str) -> int:
    """Seconds of `90`, `90s`, `30m`, `12h` or `7d`; `UsageError` otherwise."""
    match = _DURATION.match(text.strip())
    if match is None or not int(match[1]):
        raise UsageError(f"{text!r} is no duration", hint="write a number and s, m, h or d, such as 30m or 7d")
    return int(match[1]) * _SECONDS[match[2]]


def parse_size(text: str) -> int:
    """Bytes of `200GB`, `1.5 TB`, `500 MiB` or a mere number; 0 is allowed. `UsageError` otherwise."""
    match = _SIZE.match(text.strip())
    if match is None:
        raise UsageError(f"{text[:40]!r} is no size", hint="write a number and a unit, such as 200GB, 1.5TB or 500MiB")
    unit = (match[3] or "").lower()
    scale: int = (1024 if "i" in unit else 1000) ** (" kmgt".index(unit[0]) if unit[:1] in tuple("kmgt") else 0)
    return int(match[1]) * scale + int((match[2] or "0").ljust(3, "0")) * scale // 1000


def count(n: int) -> str:
    """`134.5 M`, `7.6 B`: how many parameters, as people say it."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= limit:
            return f"{n / limit:.1f} {unit}"
    return str(n)


def size(n_bytes: float) -> str:
    """`98.4 MB`: decimal units, three digits that matter."""
    value, unit = float(n_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    digits = 0 if unit == "B" or abs(value) >= 99.95 else 1
    return f"{value:.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """`45 s`, `3 min`, `2 h 5 min`, `3 d 4 h`."""
    s = round(seconds)
    if s < 120:
        return f"{s} s"
    if s < 7200:
        return f"{s // 60} min"
    if s < 172800:
        return f"{s // 3600} h {s % 3600 // 60} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"


def percent(part: float, whole: float) -> str:
    """`42 %`; `100 %` only when it is whole."""
    if whole <= 0 or part >= whole:
        return "100 %"
    return f"{max(0, min(99, int(100 * part / whole)))} %"
