"""A chat as the text its model was trained on: the template of the model's own file, rendered in a sandbox.

Rendering is bounded (`template_sandbox`), and pure: the time that some templates ask for is a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError

from tightwad_agent.errors import ModelError
from tightwad_agent.proxy.fields import BadField, unsupported
from tightwad_agent.proxy.messages import Message
from tightwad_agent.proxy.template_filters import strftime
from tightwad_agent.proxy.template_meter import Meter, Refused, metered
from tightwad_agent.proxy.template_sandbox import Sandbox

CHATML = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""For a model without a template of its own, as llama-server does."""

_FAULTS = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What compiling and running somebody else's template may raise."""
_OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})
_FUNCTIONS = frozenset({"raise_exception", "strftime_now", "range", "dict", "namespace", "cycler", "joiner"})
_PROBE = "kwZprobeQ"
_PROBE_BUDGET = 1 << 22
_PROBE_TIME = datetime(2024, 1, 1)  # noqa: DTZ001 - what a template prints is local time


class BadTemplate(ModelError):
    """The model's chat template cannot be used; completions still can."""

    code = "bad_chat_template"

    def __init__(self, why: str) -> None:
        super().__init__(
            f"the model's chat template cannot be used: {why}",
            hint="`/v1/completions` works without it; `serve MODEL --engine llama-server` may take it.",
        )


class ChatTemplate:
    """One model's template; an empty `source` is ChatML. Raises `BadTemplate`.

    `typed`: it wants contents as lists of parts. `takes_system`: it has a place for a system message; otherwise that is
    put before the first message, as llama-server does. Both are found out by trying.
    """

    def __init__(self, source: str, *, bos: str = "", eos: str = "") -> None:
        self._source = source or CHATML
        self._names = {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None}
        self._template = _compiled(self._source)
        self.typed = False
        self.typed = not self._shows("user") and self._shows("user", typed=True)
        self.takes_system = self._shows("system") or not self._shows("user")

    def render(
        self,
        messages: Sequence[Message],
        *,
        now: datetime,
        add_generation_prompt: bool = True,
        continues: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. `continues`: the last message is the beginning of the answer.

        Raises `BadField` where the template refuses the messages, `Unsupported` for an option it does not know,
        `BadTemplate` where it fails.
        """
        known = self._known(options or {})
        shown = messages[:-1] if continues else messages
        if not shown:
            raise BadField("`messages` needs a message before the assistant's", param="messages")
        names = {**known, "add_generation_prompt": add_generation_prompt or continues}
        text = self._run(self._adapted(shown), names, now)
        return text + messages[-1].content if continues else text

    def _run(self, messages: Sequence[Message], names: Mapping[str, Any], now: datetime) -> str:
        return self._metered(messages, names, now, Meter())

    def _metered(self, messages: Sequence[Message], names: Mapping[str, Any], now: datetime, meter: Meter) -> str:
        plain = [self._plain(message) for message in messages]
        given = {**names, **self._names, "messages": plain, "strftime_now": partial(strftime, now)}
        try:
            return metered(meter, partial(self._template.render, given))
        except Refused as exc:
            raise BadField(
                f"the model's chat template refuses these messages: {exc.message}", param="messages"
            ) from None
        except _FAULTS as exc:
            raise BadTemplate(_why(exc)) from None

    def _plain(self, message: Message) -> dict[str, Any]:
        content = [{"type": "text", "text": message.content}] if self.typed else message.content
        return {"role": message.role, "content": content, **message.extra}

    def _adapted(self, messages: Sequence[Message]) -> list[Message]:
        made = list(messages)
        if "developer" not in self._source:
            made = [replace(m, role="system") if m.role == "developer" else m for m in made]
        if made[0].role != "system" or self.takes_system:
            return made
        if len(made) == 1:
            return [replace(made[0], role="user")]
        return [replace(made[1], content=f"{made[0].content}\n{made[1].content}"), *made[2:]]

    def _known(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options that the template reads. Those that it does not read may only say no."""
        known = {}
        for name, value in options.items():
            where = name if name == "reasoning_effort" else f"chat_template_kwargs.{name}"
            if name in _OURS or name in _FUNCTIONS:
                raise BadField(f"`{where}` is not for requests to set", param=where)
            if name in self._source:
                known[name] = value
            elif value not in (None, False):
                raise unsupported(where, "means nothing to this model's chat template")
        return known

    def _shows(self, role: str, *, typed: bool = False) -> bool:
        """Whether a message of that role comes out."""
        before, self.typed = self.typed, typed or self.typed
        asked = [Message(role, _PROBE)] if role == "user" else [Message(role, _PROBE), Message("user", "a")]
        try:
            return _PROBE in self._metered(asked, {"add_generation_prompt": True}, _PROBE_TIME, Meter(_PROBE_BUDGET))
        except (BadField, BadTemplate):
            return False
        finally:
            self.typed = before


def _compiled(source: str) -> Template:
    try:
        return Sandbox().load(source)
    except _FAULTS as exc:
        raise BadTemplate(_why(exc)) from None


def _why(exc: BaseException) -> str:
    text = str(exc)[:200] or type(exc).__name__
    return text if isinstance(exc, TemplateError) else f"{type(exc).__name__}: {text}"
