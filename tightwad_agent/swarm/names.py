"""Names of models: made safe, made distinct, and looked up as people type them."""

from __future__ import annotations

import re
from collections.abc import Collection

from tightwad_agent.ids import SafeName

MIN_ID_PREFIX = 4
_MAX_LENGTH = 200
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf\Z", re.DOTALL)
_EXTENSION = ".gguf"
_HEX = re.compile(r"[0-9a-f]+\Z")


def safe_name(text: str) -> SafeName:
    """The nearest valid file name to `text` (its last path component); never fails."""
    kept = re.sub(r"[^A-Za-z0-9 ._+@()\[\],=-]+", "-", re.split(r"[/\\]", text)[-1])
    kept = kept.lstrip(" ._+@()[],=-")[:_MAX_LENGTH].rstrip(" .")
    for candidate in (kept, f"model-{kept}"[:_MAX_LENGTH].rstrip(" .")):
        if kept and SafeName.is_valid(candidate):
            return SafeName(candidate)
    return SafeName("model.gguf")


def distinct(name: SafeName, taken: Collection[str]) -> SafeName:
    """`name`, or `name (2)`, … before its extension: the first that differs from all `taken` in more than case."""
    folded = {t.casefold() for t in taken}
    if name.casefold() not in folded:
        return name
    stem, dot, extension = name.rpartition(".")
    if not dot or len(extension) > 10:
        stem, extension = str(name), ""
    number = 2
    while True:
        tail = f" ({number})" + (f".{extension}" if extension else "")
        candidate = stem[: _MAX_LENGTH - len(tail)] + tail
        if candidate.casefold() not in folded:
            return SafeName(candidate)
        number += 1


def shard_of(name: str) -> tuple[str, int, int] | None:
    """(name of the model, number of the file from 1, how many there are) of NAME-00001-of-0000N.gguf, as the engine
    splits models; None for any other name."""
    match = _SHARD.match(name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return None
    return match[1] + _EXTENSION, int(match[2]), int(match[3])


def shard_texts(name: str, n: int) -> tuple[str, ...]:
    """What the `n` files of a model are called; the engine finds them beside one another by this."""
    stem = name.removesuffix(_EXTENSION)
    return tuple(f"{stem}-{i:05d}-of-{n:05d}{_EXTENSION}" for i in range(1, n + 1))


def shard_names(name: SafeName, n: int) -> tuple[SafeName, ...]:
    """`shard_texts`, checked."""
    return tuple(map(SafeName, shard_texts(name, n)))
