"""Logging for people and for machines, without secrets.

`setup` installs one handler on the root logger. Its filter takes join tokens, API keys, credentials and private keys
out of messages, exception texts and extra fields before any formatter sees them. Lines for people are one line per
record (tracebacks follow, indented); control characters that came from another machine are shown, not obeyed.

Events carry fields: `log.info("piece.verified", extra={"model": …, "index": 3})`.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from contextvars import ContextVar
from typing import Any, TextIO

node: ContextVar[str] = ContextVar("tightwad_node", default="")
"""Name of the node this task works for; tasks inherit it when they are started."""

HIDDEN = "[hidden]"
QUIET = ("httpx", "httpcore", "zeroconf", "asyncio", "h11", "urllib3", "markdown_it")
"""Libraries whose own messages appear from warning upwards only."""

MAX_DEPTH = 6
"""Extra fields nested deeper than this are printed as `…`."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "tightwad_node"}

_PEM = r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY-----|\Z)"
_NAMED = (
    r"\b((?:proxy-)?authorization|x-api-key|api[-_ ]?key|password|secret)"  # a header, field or option
    r"(\\?['\"]?\s*[:=]\s*(?:b?\\?['\"])?|['\"],\s*b?['\"])"  # name: value, 'name': 'value', (b'name', b'value')
    r"(?!\[hidden\])(?:(?:bearer|basic|digest)\s+)?[^\s'\",;()\[\]{}\\]+"
)
_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(_PEM, re.DOTALL), HIDDEN),
    (re.compile(r"tw1[.:_-]?[A-Za-z0-9_-]{20,}={0,2}"), f"tw1{HIDDEN}"),
    (re.compile(r"twk_[A-Za-z0-9_-]{6,}"), f"twk_{HIDDEN}"),
    (re.compile(_NAMED, re.IGNORECASE), rf"\1\2{HIDDEN}"),
    (re.compile(r"\b(bearer)\s+(?!\[hidden\])[^\s'\",;()\[\]{}\\]{6,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
)

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def redact(text: str) -> str:
    """`text` without join tokens, API keys, credentials of HTTP headers and PEM private keys."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


class Redaction(logging.Filter):
    """Rewrites a record in place, so that nothing after it, here or in another handler, can print a secret."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(_message(record)), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        if record.stack_info:
            record.stack_info = redact(record.stack_info)
        for key, value in _extras(record).items():
            setattr(record, key, _clean(value))
        record.tightwad_node = node.get()
        return True


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError, KeyError) as exc:  # a wrong format string must not take the agent down
        return f"{record.msg!r} % {record.args!r} ({exc})"


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _clean(value: Any, depth: int = 0) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)  # JSON has no NaN
    if depth >= MAX_DEPTH:
        return "…"
    if isinstance(value, dict):
        return {redact(str(k)): _clean(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_clean(v, depth + 1) for v in value]
    return redact(str(value))


def _visible(text: str) -> str:
    return _UNPRINTABLE.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class ForPeople(logging.Formatter):
    """`12:34:56.789 warning [attic] mesh.links: lost beta: timed out peer=abcd`, in local time."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        name = record.name.removeprefix("tightwad_agent.")
        who = f" [{node_name}]" if (node_name := getattr(record, "tightwad_node", "")) else ""
        fields = "".join(f" {key}={value}" for key, value in _extras(record).items())
        message = record.getMessage().rstrip("\n").replace("\n", "\n    ")
        lines = [f"{clock}.{int(record.msecs):03d} {record.levelname.lower()}{who} {name}: {message}{fields}"]
        lines += [text for text in (record.exc_text, record.stack_info) if text]
        return _visible("\n".join(line.rstrip("\n") for line in lines))


class ForMachines(logging.Formatter):
    """One JSON object per line: `time` (Unix seconds), `level`, `logger`, `node`, `message`, extra fields, `exception`.

    An extra field with one of these names gets `_` behind it.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "node": getattr(record, "tightwad_node", ""),
            "message": record.getMessage(),
        }
        entry |= {f"{key}_" if key in entry else key: value for key, value in _extras(record).items()}
        if record.exc_text:
            entry["exception"] = record.exc_text
        if record.stack_info:
            entry["stack"] = record.stack_info
        return json.dumps(entry, default=str)


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, so that a second `setup` replaces the first."""


def setup(level: str = "info", json: bool = False, stream: TextIO | None = None) -> logging.Handler:
    """Sends the records of all loggers to `stream` (standard error by default), from `level` upwards.

    May be called again; the last call holds. Returns the handler.
    """
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _Handler)]:
        root.removeHandler(old)
    handler = _Handler(stream or sys.stderr)
    handler.addFilter(Redaction())
    handler.setFormatter(ForMachines() if json else ForPeople())
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    return handler
