"""The one frozen configuration object, and the only reader of configuration files and environment variables.

Every value has a default that works without a file. A file is YAML with the same keys as `Config` (`mesh_port: 8089`);
flags win over the file, the file over the environment, the environment over defaults. Unknown keys and wrong types are
refused with their path: `name: yes` is a boolean in YAML, and is refused, not guessed at.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
import yaml

from tightwad_agent.errors import ConfigError, UsageError
from tightwad_agent.ids import Address, NodeName
from tightwad_agent.units import parse_size

APP = "tightwad-agent"
DEFAULT_ENDPOINT_PORT = 8088
DEFAULT_MESH_PORT = 8089
MAX_CONFIG_BYTES = 1 << 20
MAX_DRAFT_TOKENS = 64


def _state_dir() -> Path:
    return Path(platformdirs.user_state_dir(APP))


def _cache_dir() -> Path:
    return Path(platformdirs.user_cache_dir(APP))


def _host_name() -> NodeName:
    return NodeName.cleaned(socket.gethostname())


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How one agent runs."""

    state_dir: Path = field(default_factory=_state_dir)
    """Identity, keys and memory of this node, mode 0700. Two agents on one machine need two."""
    cache_dir: Path = field(default_factory=_cache_dir)
    """Engine builds, keyed by version and flags; may be shared by several agents and deleted at any time."""
    models_dir: Path | None = None
    """Where the swarm puts model files; `state_dir/models` by default."""
    max_models_bytes: int = 0
    """What own copies and files on their way may take together; 0 for no limit. In a file also `200GB` or `500MiB`."""
    name: NodeName = field(default_factory=_host_name)
    """What people call this machine."""

    mesh_port: int = DEFAULT_MESH_PORT
    """The one port between nodes. 0 takes a free one (for tests)."""
    endpoint_host: str = "0.0.0.0"  # noqa: S104 - other machines need the API key there
    """Where the OpenAI endpoint listens. `127.0.0.1` keeps it to this machine."""
    endpoint_port: int = DEFAULT_ENDPOINT_PORT
    open_endpoint: bool = False
    """Answer other machines without the API key. Anyone who reaches the port can use the models."""
    max_body_bytes: int = 64 << 20
    """Largest request body the endpoint takes; images in chat requests are the reason it is not smaller."""
    max_head_bytes: int = 32 << 10
    """Largest head of a request: its first line and headers."""
    max_requests: int = 256
    """Requests that the endpoint of this machine works on at once; more get 503."""
    max_requests_per_client: int = 64
    """Of one client: by its API key, else by its address. More get 429."""
    max_connections: int = 512
    """Connections to the endpoint at once."""
    max_connections_per_client: int = 128
    """From one address of another machine; raise it for a reverse proxy with many users."""
    head_timeout_s: float = 10.0
    """A client must have sent a request's head within this time."""
    send_timeout_s: float = 30.0
    """A client that takes nothing of its answer for this long is gone, and its request with it."""

    mdns: bool = True
    """Announce and find over mDNS."""
    interfaces: tuple[str, ...] = ()
    """Network interfaces to announce on; all that are up and not virtual by default."""
    seeds: tuple[Address, ...] = ()
    """Addresses of other nodes, where mDNS does not reach."""

    engine_dir: Path | None = None
    """A llama.cpp build of your own: the folder with `llama-server` and `ggml-rpc-server`."""
    engine_url: str | None = None
    """Base URL of the release host; the official one by default. A mirror, or a test."""
    threads: int = 0
    """Threads of a worker or server; 0 lets llama.cpp choose."""
    devices: tuple[str, ...] = ()
    """Devices to offer, as `--list-devices` names them; all by default."""
    workers: int = -1
    """Pool over this many other machines even if the model fits on one; -1 lets the planner decide."""
    max_draft_tokens: str = "auto"
    """Most draft tokens that one forward pass checks: `auto` follows measured times and acceptance; or a number."""
    stall_s: float = 60.0
    """A server whose decode loop does not turn for this long with requests waiting is restarted; sooner once its pace
    is known. Raise it for slow disks and huge prompts."""

    log_level: str = "info"
    log_json: bool = False

    @property
    def max_draft(self) -> int:
        """`max_draft_tokens` as a number, 0 for `auto`."""
        return draft_limit(self.max_draft_tokens)

    @property
    def models(self) -> Path:
        return self.models_dir or self.state_dir / "models"


ENVIRONMENT: Mapping[str, str] = {
    "TIGHTWAD_STATE_DIR": "state_dir",
    "TIGHTWAD_CACHE_DIR": "cache_dir",
    "TIGHTWAD_ENGINE_DIR": "engine_dir",
    "TIGHTWAD_LOG_LEVEL": "log_level",
}
"""Environment variables and the keys they set."""

_RANGES: Mapping[str, tuple[float, float]] = {
    "mesh_port": (0, 65535),
    "endpoint_port": (0, 65535),
    "max_body_bytes": (1 << 10, 1 << 32),
    "max_head_bytes": (1 << 10, 1 << 20),
    "max_requests": (1, 100_000),
    "max_requests_per_client": (1, 100_000),
    "max_connections": (8, 100_000),
    "max_connections_per_client": (1, 100_000),
    "head_timeout_s": (1, 3600),
    "send_timeout_s": (1, 86400),
    "threads": (0, 1024),
    "max_models_bytes": (0, 1 << 60),
    "workers": (-1, 16),
    "stall_s": (1, 86400),
}
_CHOICES: Mapping[str, tuple[str, ...]] = {"log_level": ("debug", "info", "warning", "error")}


def load(
    path: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """A checked `Config`. `overrides` are flags (already typed; `None` means not given).

    Raises `ConfigError` that names the file and the key.
    """
    values: dict[str, Any] = {}
    for variable, key in ENVIRONMENT.items():
        if text := (os.environ if environ is None else environ).get(variable):
            values[key] = _convert(key, text, f"${variable}")
    if path is not None:
        values |= _read(path)
    values |= {k: v for k, v in (overrides or {}).items() if v is not None}
    for key, value in values.items():
        _check_range(key, value)
    return Config(**values)


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_CONFIG_BYTES >> 20} MiB; this is no configuration file")
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror or exc}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as exc:  # ValueError: a date such as 2026-13-01, not UTF-8
        raise ConfigError(f"{path}: not YAML: {exc}") from None
    if plain is None:
        return {}
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got {type(plain).__name__}")
    return {key: _convert(key, value, f"{path}: {key}") for key, value in plain.items()}


def _convert(key: Any, value: Any, where: str) -> Any:
    known = {f.name for f in dataclasses.fields(Config)}
    if key not in known:
        raise ConfigError(f"{where}: unknown key", hint="known keys: " + ", ".join(sorted(known)))
    kind = typing.get_type_hints(Config)[key]
    if key == "max_draft_tokens" and type(value) is int:
        value = str(value)
    try:
        if key == "max_models_bytes" and isinstance(value, str):
            return parse_size(value)
        return _as(kind, value)
    except UsageError as exc:
        raise ConfigError(f"{where}: {exc.message}", hint=exc.hint) from None
    except (ValueError, TypeError, RuntimeError) as exc:  # RuntimeError: `~user` of nobody
        raise ConfigError(f"{where}: {exc}") from None


def _as(kind: Any, value: Any) -> Any:
    if isinstance(kind, types.UnionType):
        return None if value is None else _as(typing.get_args(kind)[0], value)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise TypeError(f"expected a list, got {_called(value)}")
        return tuple(_as(typing.get_args(kind)[0], v) for v in value)
    if kind is float and type(value) is int:
        return float(value)
    if kind in (bool, int, float):
        if type(value) is not kind:
            raise TypeError(f"expected {_NAMES[kind]}, got {_called(value)}")
        return value
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {_called(value)}")
    if kind is Path:
        if not value:
            raise ValueError("expected a path, got empty text")
        return Path(value).expanduser()
    if kind is Address:
        return Address.parse(value, DEFAULT_MESH_PORT)
    return kind(value)


_NAMES = {bool: "true or false", int: "a whole number", float: "a number"}


def _called(value: Any) -> str:
    kind = {
        bool: "true/false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a map",
    }
    return f"{kind.get(type(value), type(value).__name__)} ({str(value)[:40]!r})"


def _check_range(key: str, value: Any) -> None:
    if key in _RANGES and not _RANGES[key][0] <= value <= _RANGES[key][1]:
        low, high = _RANGES[key]
        raise ConfigError(f"{key}: {value} is out of range, {low:g} to {high:g} is allowed")
    if key in _CHOICES and value not in _CHOICES[key]:
        raise ConfigError(f"{key}: {value!r} is none of {', '.join(_CHOICES[key])}")
    if key == "max_draft_tokens":
        draft_limit(value)


def draft_limit(text: str) -> int:
    """`auto` as 0, or the number it says. Raises `ConfigError`."""
    if text == "auto":
        return 0
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:4]) <= MAX_DRAFT_TOKENS or len(text) > 3:
        raise ConfigError(
            f"max_draft_tokens: {text[:20]!r} is neither `auto` nor a number from 1 to {MAX_DRAFT_TOKENS}"
        )
    return int(text)
