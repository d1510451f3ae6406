"""What rendering a template costs, and how much it may cost."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.runtime import LoopContext, Macro
from jinja2.utils import Cycler, Joiner, Namespace

MAX_VALUE = 8 << 20
"""Characters of one text."""
MAX_OUTPUT = 4 * MAX_VALUE
"""Characters written, blocks that are assigned to names included."""
MAX_ITEMS = 200_000
"""Items of one list or object, those inside it included."""
MAX_BITS = 256
BUDGET = 1 << 27
"""What one rendering may use: characters made, and `STEP` for each step."""
STEP = 256
OPEN_TYPES = (LoopContext, Macro, Namespace, Cycler, Joiner)
"""Not plain values: they may hold one another, so they have no size and are not written out."""


class TooMuch(TemplateError):
    """The template wants more than a chat template may use."""


class Refused(TemplateError):
    """The template called `raise_exception`: these messages are not for this model."""


class Meter:
    """What one rendering has left."""

    def __init__(self, budget: int = BUDGET) -> None:
        self.left = budget
        self.n_written = 0

    def pay(self, n: int) -> None:
        self.left -= n
        if self.left < 0:
            raise TooMuch("it runs for too long")

    def write(self, n_chars: int) -> None:
        self.n_written += n_chars
        if self.n_written > MAX_OUTPUT:
            raise TooMuch("it writes too much")

    def weigh(self, value: Any) -> Any:
        """The value, paid for. Raises `TooMuch`."""
        if isinstance(value, str):
            self.allow(len(value))
        elif isinstance(value, list | tuple | dict):
            self._weigh_all(value)
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise TooMuch("it makes a number that is too large")
        return value

    def allow(self, n_chars: int) -> None:
        """Before so many characters are made."""
        if n_chars > MAX_VALUE:
            raise TooMuch("it makes a text that is too long")
        self.pay(STEP + n_chars)

    def _weigh_all(self, value: Any) -> None:
        todo, n_items, n_chars = [value], 0, 0
        while todo:
            one = todo.pop()
            n_items += 1
            if isinstance(one, str):
                n_chars += len(one)
            elif isinstance(one, dict):
                todo += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple):
                todo += one
            elif isinstance(one, OPEN_TYPES):
                raise TooMuch("it puts a namespace into a list")
            if n_items + len(todo) > MAX_ITEMS or n_chars > MAX_VALUE:
                raise TooMuch("it makes a list that is too long")
        self.pay(STEP + 64 * n_items)


_current: ContextVar[Meter] = ContextVar("meter")


def metered(meter: Meter, render: Callable[[], str]) -> str:
    """Renders at the cost of `meter`."""
    token = _current.set(meter)
    try:
        return render()
    finally:
        _current.reset(token)


def meter() -> Meter:
    """Of the rendering that runs in this thread."""
    return _current.get()
