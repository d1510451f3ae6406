"""`state.yaml`: what a node remembers of itself between starts. Blocking; small."""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml

from tightwad_agent.errors import StateDamaged
from tightwad_agent.ids import NO_EPOCH, ClusterId, Epoch, NodeId, NodeName
from tightwad_agent.mesh.files import read_private, write_private
from tightwad_agent.wire.codec import Max, Mismatch, from_plain, to_plain
from tightwad_agent.wire.handshake import MAX_PEER_ADDRESSES, RememberedPeer
from tightwad_agent.wire.rows import ServeRecord

FILE = "state.yaml"
MAX_STATE_BYTES = 1 << 20
MAX_PEERS = 256
MAX_COUNTER = 2**53
_API_KEY = re.compile(r"twk_[A-Za-z0-9_-]{43}\Z")
_HEAD = b"# Written by tightwad-agent. It holds secrets and must not be edited while the agent runs.\n"
_HINT = (
    "restore the file from a backup; or run `tightwad-agent leave` (models are kept) and join again with a new token"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeState:
    """The node's own facts. `joined_at` is Unix seconds. Change it with `dataclasses.replace`, then `save`."""

    cluster: ClusterId
    cluster_name: NodeName
    node: NodeId
    name: NodeName
    joined_at: int
    api_key: str = field(repr=False)
    incarnation: int = 0
    epoch: Epoch = NO_EPOCH
    """The greatest epoch this node ever saw."""
    peers: Annotated[tuple[RememberedPeer, ...], Max(MAX_PEERS)] = ()
    serve: ServeRecord | None = None

    def remembering(self, peer: RememberedPeer) -> NodeState:
        """With this peer as the one met last; the one met longest ago is forgotten beyond 256."""
        others = tuple(p for p in self.peers if p.node != peer.node)
        trimmed = dataclasses.replace(peer, addresses=peer.addresses[:MAX_PEER_ADDRESSES])
        return dataclasses.replace(self, peers=(trimmed, *others)[:MAX_PEERS])

    def save(self, state_dir: Path) -> None:
        """Replaces `state.yaml` as one step, synced. Blocks on the disk. Raises `EnvironmentFault`."""
        plain = {f.name: _as_builtin(to_plain(getattr(self, f.name))) for f in dataclasses.fields(self)}
        text = yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
        write_private(state_dir / FILE, _HEAD + text.encode())

    @classmethod
    def load(cls, state_dir: Path) -> NodeState:
        """Reads and checks `state.yaml`. Raises `StateDamaged` with the file, the key, and what to do."""
        path = state_dir / FILE
        data = read_private(path, MAX_STATE_BYTES, _HINT)
        try:
            plain = yaml.safe_load(data)
        except (yaml.YAMLError, ValueError, RecursionError) as exc:
            # a YAML error quotes the lines around it, and one of them is the API key
            where = getattr(exc, "problem_mark", None)
            line = f" (line {where.line + 1})" if where is not None else ""
            raise StateDamaged(f"{path} is not YAML{line}", hint=_HINT) from None
        if not isinstance(plain, dict):
            raise StateDamaged(f"{path} is empty or holds no keys", hint=_HINT)
        try:
            return _from_map(plain)
        except (Mismatch, ValueError) as exc:
            raise StateDamaged(f"{path}: {exc}", hint=_HINT) from None


def _from_map(plain: dict[Any, Any]) -> NodeState:
    hints = typing.get_type_hints(NodeState, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(NodeState)}
    for key in plain:
        if key not in fields:
            raise ValueError(f"unknown key {str(key)[:40]!r}; was it written by a newer version?")
    values: dict[str, Any] = {}
    for name, spec in fields.items():
        if name in plain:
            try:
                values[name] = from_plain(hints[name], plain[name])
            except Mismatch as exc:
                raise ValueError(f"{name}: wrong value" if name == "api_key" else f"{name}{exc}") from None
        elif spec.default is dataclasses.MISSING:
            raise ValueError(f"{name} is missing")
    state = NodeState(**values)
    _check(state)
    return state


def _check(state: NodeState) -> None:
    if not is_api_key(state.api_key):
        raise ValueError("api_key: wrong value")
    for name, number in (
        ("joined_at", state.joined_at),
        ("incarnation", state.incarnation),
        ("epoch", state.epoch.counter),
    ):
        if not 0 <= number <= MAX_COUNTER:
            raise ValueError(f"{name}: {number} is out of range")


def is_api_key(text: str) -> bool:
    """Whether this has the form of the endpoint's key: `twk_` and 32 bytes in base64url."""
    return _API_KEY.match(text) is not None


def _as_builtin(value: Any) -> Any:
    """YAML's safe dumper takes `str`, not its subclasses."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, list):
        return [_as_builtin(v) for v in value]
    return value
