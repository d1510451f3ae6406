"""OpenAI's forms: error bodies, the model list, and the little of a request that is ours to check.

What a request may contain is llama-server's to judge; it gets every body whole and unchanged. Looked at here is only
what decides where a request goes: that the body is a JSON object, and which model it names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tightwad_agent.decide import stem
from tightwad_agent.errors import TightwadError, UnknownModel, UsageError

DEFAULT_ALIASES = frozenset({"", "default", "tightwad"})
"""Names that mean "whatever is served"."""

SHORT_ID = 12
"""Characters of a model id that are enough to name it."""

MAX_PARSED = 1 << 20
"""Bodies up to this size are parsed whole. Above it (images inside a chat) only the outermost keys are read: a parse
of 64 MiB would hold the whole agent, heartbeats included, for a second or more."""

MAX_TOKENS_SCANNED = 50_000
"""JSON tokens looked at in a large body before its model is left for llama-server to judge."""

MAX_EVENT = 1 << 20
"""Bytes of one unfinished server-sent event that are held back; a longer one goes out in parts."""

_SHOWN = 120


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One model of the catalogue: `model` is its id (hex), `name` its file name, `size` in bytes, `created` in Unix
    seconds. `served`: this one answers (or is being loaded). `meta` goes into the model list as it is."""

    model: str
    name: str
    size: int = 0
    served: bool = False
    created: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name people type: without `.gguf`."""
        return stem(self.name)

    def answers_to(self, wanted: str) -> bool:
        """By name (case aside, with or without `.gguf`), by id, or by at least `SHORT_ID` characters of it."""
        if stem(wanted).casefold() == self.label.casefold():
            return True
        return len(wanted) >= SHORT_ID and self.model.startswith(wanted.lower())


# Errors

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}


def error_object(exc: TightwadError, *, param: str | None = None) -> dict[str, Any]:
    """`{"message", "type", "code", "param"}`; the hint is part of the message, because that is all an SDK shows."""
    kind = _TYPES.get(exc.http_status, "invalid_request_error" if exc.http_status < 500 else "server_error")
    message = exc.message
    if exc.hint:
        message = f"{message.rstrip('.')}. {exc.hint}"
    if param is None:
        param = "model" if isinstance(exc, UnknownModel) else getattr(exc, "param", None)
    return {"message": message, "type": kind, "code": exc.code, "param": param}


def error_body(exc: TightwadError, *, state: Mapping[str, Any] | None = None) -> bytes:
    """JSON of an error answer. `state` says what is going on (`state`, `model`, `progress`, ...), for a 503."""
    body: dict[str, Any] = {"error": error_object(exc)}
    if state is not None:
        body["tightwad"] = dict(state)
    return dump(body)


def error_event(exc: TightwadError) -> bytes:
    """A server-sent event that ends a stream which cannot be completed; SDKs raise it as an API error."""
    return b"data: " + dump({"error": error_object(exc)}) + b"\n\n"


def error_headers(exc: TightwadError) -> list[tuple[bytes, bytes]]:
    """Headers that belong to an error: `Retry-After`, `WWW-Authenticate`."""
    if (retry_after_s := getattr(exc, "retry_after_s", None)) is not None:
        return [(b"retry-after", str(max(1, retry_after_s)).encode())]
    if exc.http_status == 401:
        return [(b"www-authenticate", b"Bearer")]
    return []


def dump(value: Any) -> bytes:
    """Compact JSON in ASCII; what JSON does not know (paths, times) as text."""
    return json.dumps(value, separators=(",", ":"), default=str).encode("ascii")


# Models


def models_page(entries: Sequence[ModelEntry]) -> dict[str, Any]:
    """`GET /v1/models`. `data` holds only what can be asked now, because clients fill their menus from it; what else
    the cluster has is under `tightwad`."""
    return {
        "object": "list",
        "data": [model_object(e) for e in entries if e.served],
        "tightwad": {"catalogue": [model_object(e) for e in entries]},
    }


def model_object(entry: ModelEntry) -> dict[str, Any]:
    """OpenAI's `model` object, with `meta` beside it."""
    return {
        "id": entry.label,
        "object": "model",
        "created": entry.created,
        "owned_by": "tightwad",
        "meta": {"id": entry.model, "file": entry.name, "size": entry.size, "served": entry.served, **entry.meta},
    }


def choose_model(wanted: str | None, entries: Sequence[ModelEntry]) -> ModelEntry | None:
    """The served entry that `wanted` names; `None` where nothing is served yet and the name is no mistake.

    Raises `UnknownModel` that names what is there.
    """
    served = next((e for e in entries if e.served), None)
    if wanted is None or wanted.strip().casefold() in DEFAULT_ALIASES:
        return served
    wanted = wanted.strip()
    if served is not None and served.answers_to(wanted):
        return served
    shown = wanted[:_SHOWN]
    known = next((e for e in entries if e.answers_to(wanted)), None)
    if known is not None:
        if served is None:
            return None
        raise UnknownModel(
            f"the model `{shown}` is in the catalogue but not served; `{served.label}` is",
            hint=f"`tightwad-agent serve {known.label}` changes that.",
        )
    if served is not None:
        raise UnknownModel(f"the model `{shown}` does not exist here; `{served.label}` is served")
    there = ", ".join(f"`{e.label}`" for e in entries[:20]) or "none"
    raise UnknownModel(f"the model `{shown}` does not exist here; in the catalogue: {there}")


# Requests


def wanted_model(body: bytes) -> str | None:
    """The `model` of a JSON request, `None` where it names none. Raises `UsageError` where `body` is no JSON object."""
    if len(body) > MAX_PARSED:
        return _scan_model(body)
    try:
        value = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as exc:
        raise UsageError(f"the request body is not UTF-8 (byte {exc.start})") from None
    except RecursionError:
        raise UsageError("the request body is nested too deeply") from None
    except ValueError as exc:
        raise UsageError(f"the request body is not JSON: {str(exc)[:_SHOWN]}") from None
    if not isinstance(value, dict):
        raise UsageError("the request body must be a JSON object")
    return _model_name(value.get("model"))


_MODEL_IS_TEXT = "`model` must be text"


def _model_name(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UsageError(_MODEL_IS_TEXT)
    return value


_TOKEN = re.compile(rb'("(?:[^"\\]++|\\.)*+")|([{}\[\]:,])|[^\s"{}\[\]:,]++', re.DOTALL)


def _scan_model(body: bytes) -> str | None:
    """The outermost `model` of a large object, without building what it holds."""
    depth = 0
    key: bytes | None = None
    last = b""
    model: str | None = None
    for n, token in enumerate(_TOKEN.finditer(body)):
        if n == 0 and token.group() != b"{":
            raise UsageError("the request body must be a JSON object")
        if n >= MAX_TOKENS_SCANNED:
            break
        text, mark = token.group(1, 2)
        if mark in (b"{", b"["):
            if depth == 1 and key == b'"model"':
                raise UsageError(_MODEL_IS_TEXT)
            depth += 1
        elif mark in (b"}", b"]"):
            depth -= 1
        elif depth == 1 and mark == b":":
            key = last
        elif depth == 1 and mark == b",":
            key = None
        elif depth == 1 and key == b'"model"':
            model = _model_name(_literal(text or token.group()))
        last = text if text is not None and len(text) <= 200 else b""
    return model


def _literal(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except ValueError:
        raise UsageError("the request body is not JSON") from None


# Streams


class SseGate:
    """Lets server-sent events through whole, so that an error can follow where the source broke off.

    `feed` gives what may go out now; `rest` is an event whose end has not come.
    """

    def __init__(self) -> None:
        self._held = bytearray()
        self.inside = False
        """An over-long event has gone out in part: what follows must close it first."""

    def feed(self, data: bytes) -> bytes:
        start = max(0, len(self._held) - 3)
        self._held += data
        cut = max(self._after(b"\n\n", start), self._after(b"\r\n\r\n", start), self._after(b"\r\r", start))
        if not cut and len(self._held) > MAX_EVENT:
            cut = len(self._held)
            self.inside = True
        elif cut:
            self.inside = False
        ready = bytes(self._held[:cut])
        del self._held[:cut]
        return ready

    def _after(self, mark: bytes, start: int) -> int:
        at = self._held.rfind(mark, start)
        return 0 if at < 0 else at + len(mark)

    def rest(self) -> bytes:
        """What is held, for a source that ended cleanly."""
        held, self._held = bytes(self._held), bytearray()
        return held
