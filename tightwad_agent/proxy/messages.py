"""The messages of a chat request: roles and texts; everything else by name refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tightwad_agent.proxy.fields import BadField, Fields, shown, unsupported
from tightwad_agent.proxy.neutral import empty

MAX_MESSAGES = 10_000
MAX_PARTS = 1_000


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat; `extra` are fields that are the template's to use (`name`, `reasoning_content`)."""

    role: str
    content: str
    extra: Mapping[str, str] = field(default_factory=dict)


_ROLES = frozenset({"system", "developer", "user", "assistant"})


def messages_of(fields: Fields) -> tuple[Message, ...]:
    """The `messages` of a chat. Raises `BadField` or `Unsupported`."""
    value = fields.take("messages")
    if value is None:
        raise BadField("`messages` is missing", param="messages")
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        raise fields.wrong("messages", f"a list of 1 to {MAX_MESSAGES} messages", value)
    return tuple(_message(i, message) for i, message in enumerate(value))


def _message(index: int, value: Any) -> Message:
    where = f"messages[{index}]"
    if not isinstance(value, dict):
        raise BadField(f"`{where}` must be an object, not {shown(value)}", param=where)
    fields = Fields(value, where + ".")
    role = fields.text("role")
    if role is None:
        raise BadField(f"`{where}.role` is missing", param=f"{where}.role")
    if role not in _ROLES:
        raise unsupported(f"{where}.role", f"cannot be {shown(role)} with the verifier, the engine that serves now")
    content = _content(fields, where, may_miss=role == "assistant")
    extra = {name: text for name in ("name", "reasoning_content") if (text := fields.text(name)) is not None}
    fields.refuse_rest({"tool_calls": empty, "annotations": empty, "refusal": empty})
    return Message(role, content, extra)


def _content(fields: Fields, where: str, *, may_miss: bool) -> str:
    value = fields.take("content")
    if isinstance(value, str):
        return value
    if value is None and may_miss:
        return ""
    if value is None:
        raise BadField(f"`{where}.content` is missing", param=f"{where}.content")
    if not isinstance(value, list) or len(value) > MAX_PARTS:
        raise fields.wrong("content", f"text, or a list of at most {MAX_PARTS} parts", value)
    return "\n".join(_part(f"{where}.content[{i}]", part) for i, part in enumerate(value))


def _part(where: str, value: Any) -> str:
    if not isinstance(value, dict):
        raise BadField(f"`{where}` must be an object, not {shown(value)}", param=where)
    fields = Fields(value, where + ".")
    kind = fields.text("type")
    if kind != "text":
        raise unsupported(f"{where}.type", f"cannot be {shown(kind)} with the verifier: it reads text only")
    text = fields.text("text")
    if text is None:
        raise BadField(f"`{where}.text` is missing", param=f"{where}.text")
    fields.refuse_rest({})
    return text
