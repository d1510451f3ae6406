"""The short description of a node that mDNS carries, for boxes that have not joined and for people. Pure.

One TXT record of `_tightwad._tcp.local.`, keys of one or two letters:

    v=1                        version of this format
    c=<16 characters>          the cluster: first characters of its id
    id=<52 characters>         the node
    p=8089                     port between nodes
    n=attic                    name of the machine
    r=node | authority         role
    e=b11434                   engine build, empty without one
    d=CUDA0:24G;CUDA1:8192M    devices and their memory; `;+2` counts those that had no room
    mem=63G                    memory of the machine
    m=big.gguf:100;x.gguf:40   models and how many per cent are here, in steps of ten; `;+7` as above

Nothing in it is believed: it says whom to dial, and TLS decides. It never holds a token or a key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tightwad_agent.ids import ClusterId, NodeId, NodeName, SafeName
from tightwad_agent.wire.rows import NodeRow, Role

T = TypeVar("T")

SERVICE_TYPE = "_tightwad._tcp.local."
VERSION = "1"
CLUSTER_HASH_LENGTH = 16

MAX_STRING = 255
"""One string of a TXT record: key, `=` and value, in bytes (RFC 6763 section 6.1)."""
MAX_RECORD = 1000
"""The whole record with its length bytes, so that an answer with addresses fits one Ethernet frame."""

_MIB = 1 << 20
_GIB = 1 << 30
_SIZE = re.compile(r"(\d{1,9})([MG])\Z", re.ASCII)
_CLUSTER = re.compile(r"[a-z2-7]{16}\Z")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}\Z")
_NUMBER = re.compile(r"\d{1,5}\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class ShortDevice:
    """A device of the engine and its memory, about, in bytes."""

    name: str
    memory: int


@dataclass(frozen=True, slots=True)
class ShortModel:
    """A model and how much of it is on the node, in per cent, rounded down to tens."""

    name: SafeName
    percent: int


@dataclass(frozen=True, slots=True)
class Advert:
    """What a node announces. `memory_total` about, in bytes; `n_more_*` were left out for want of room."""

    cluster: str
    node: NodeId
    port: int
    name: NodeName
    role: Role = Role.NODE
    engine: str = ""
    devices: tuple[ShortDevice, ...] = ()
    n_more_devices: int = 0
    memory_total: int = 0
    models: tuple[ShortModel, ...] = ()
    n_more_models: int = 0


def cluster_hash(cluster: ClusterId) -> str:
    """As much of a cluster's id as tells clusters of one network apart."""
    return cluster[:CLUSTER_HASH_LENGTH]


def of_row(row: NodeRow, cluster: ClusterId, port: int) -> Advert:
    """The advert of a node; `port` is the one between nodes."""
    models = sorted(row.models, key=lambda m: (not m.complete, -m.size, m.name))
    return Advert(
        cluster=cluster_hash(cluster),
        node=row.node,
        port=port,
        name=row.name,
        role=row.role,
        engine=_label(row.capabilities.engine.build) if row.capabilities.engine.usable else "",
        devices=tuple(ShortDevice(_label(d.name), d.memory_total) for d in row.capabilities.devices),
        memory_total=row.capabilities.memory_total,
        models=tuple(ShortModel(m.name, _tens(m.have, m.size)) for m in models),
    )


def to_txt(advert: Advert) -> dict[str, str]:
    """The strings of the TXT record, each of at most 255 bytes, together at most 1,000."""
    devices = [f"{d.name}:{_size(d.memory)}" for d in advert.devices]
    models = [f"{m.name}:{m.percent}" for m in advert.models]
    return {
        "v": VERSION,
        "c": advert.cluster,
        "id": advert.node,
        "p": str(advert.port),
        "n": advert.name,
        "r": advert.role.value,
        "e": advert.engine,
        "mem": _size(advert.memory_total),
        "d": _joined(devices, advert.n_more_devices, MAX_STRING - len("d=")),
        "m": _joined(models, advert.n_more_models, MAX_STRING - len("m=")),
    }


def parse(properties: Mapping[bytes, bytes | None]) -> tuple[Advert | None, str]:
    """(advert, "") of a TXT record from the network, or (None, why it is none). Unknown keys are ignored."""
    n_bytes = sum(len(key) + len(value or b"") + 2 for key, value in properties.items())
    if n_bytes > MAX_RECORD:
        return None, f"a record of {n_bytes} bytes, at most {MAX_RECORD} are read"
    try:
        return _parse(properties), ""
    except ValueError as exc:  # UnicodeDecodeError too
        return None, str(exc)


def _parse(properties: Mapping[bytes, bytes | None]) -> Advert:
    def text(key: str) -> str:
        return (properties.get(key.encode()) or b"").decode("utf-8")

    if text("v") != VERSION:
        raise ValueError(f"announces version {text('v')[:20]!r}, this agent reads {VERSION}")
    devices, n_more_devices = _split(text("d"), _device)
    models, n_more_models = _split(text("m"), _model)
    return Advert(
        cluster=_matching(_CLUSTER, text("c"), "a cluster"),
        node=NodeId(text("id")),
        port=_number(text("p"), 1, 65535),
        name=NodeName(text("n")),
        role=Role(text("r")),
        engine=_matching(_LABEL, text("e"), "an engine build") if text("e") else "",
        devices=devices,
        n_more_devices=n_more_devices,
        memory_total=_n_bytes(text("mem")),
        models=models,
        n_more_models=n_more_models,
    )


def _device(item: str) -> ShortDevice:
    name, _, memory = item.rpartition(":")
    return ShortDevice(_matching(_LABEL, name, "a device"), _n_bytes(memory))


def _model(item: str) -> ShortModel:
    name, _, percent = item.rpartition(":")
    return ShortModel(SafeName(name), _number(percent, 0, 100))


def _split(text: str, read: Callable[[str], T]) -> tuple[tuple[T, ...], int]:
    items = text.split(";") if text else []
    n_more = _number(items.pop()[1:], 1, 99999) if items and items[-1].startswith("+") else 0
    return tuple(read(item) for item in items), n_more


def _joined(items: Sequence[str], n_more: int, room: int) -> str:
    """As many items as fit, in order, and `+N` for the others."""
    reserve = len(";+99999")
    kept: list[str] = []
    for item in items:
        if len(";".join([*kept, item])) + reserve <= room:
            kept.append(item)
    n_more = min(99999, n_more + len(items) - len(kept))
    return ";".join([*kept, f"+{n_more}"] if n_more else kept)


def _size(n_bytes: int) -> str:
    n_mib = max(0, round(n_bytes / _MIB))
    return f"{n_mib}M" if n_mib < 10 * 1024 else f"{round(n_mib / 1024)}G"


def _n_bytes(text: str) -> int:
    found = _SIZE.match(text)
    if found is None:
        raise ValueError(f"{text[:20]!r} is not a size")
    return int(found[1]) * (_GIB if found[2] == "G" else _MIB)


def _tens(part: int, whole: int) -> int:
    """Per cent in steps of ten: the record is announced anew at each step, not at each piece."""
    return 100 if part >= whole else max(0, part * 10 // whole * 10)


def _label(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:32] or "unnamed"


def _matching(pattern: re.Pattern[str], text: str, what: str) -> str:
    if pattern.match(text) is None:
        raise ValueError(f"{text[:40]!r} is not {what}")
    return text


def _number(text: str, low: int, high: int) -> int:
    if _NUMBER.match(text) is None or not low <= int(text) <= high:
        raise ValueError(f"{text[:20]!r} is not a number from {low} to {high}")
    return int(text)
