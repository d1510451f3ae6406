"""What all that people see is printed with: lines, tables, JSON, progress. Rich is used here and in `render` only."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tightwad_agent.units import size

Plain = dict[str, Any]
Show = Callable[[str, int, int, str], None]
"""Progress: (stage, done, total or 0 when unknown, unit: `bytes`, `%` or empty)."""

LINES = 20
"""Without a terminal a line is printed for each such part of the whole."""

WIDE = 10_000
"""Columns where there is no terminal: a name is not cut because a program reads it."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, markup=False, width=None if stream.isatty() else WIDE)


def clean(value: Any) -> str:
    """Text from elsewhere without the control characters by which it could repaint the terminal."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value))


def add_row(table: Table, *cells: Any) -> None:
    table.add_row(*(clean(cell) for cell in cells))


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2 if sys.stdout.isatty() else None))  # noqa: T201


def columns(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in names:
        right = column in ("size", "rtt", "memory free", "uses left")
        table.add_column(column, justify="right" if right else "left", no_wrap=column in ("name", "id", "model"))
    return table


def say(*lines: str | Table | Text) -> None:
    out = console()
    for line in lines:
        out.print(clean(line) if isinstance(line, str) else line, soft_wrap=isinstance(line, str))


# progress


def amount(done: int, total: int, unit: str) -> str:
    if unit == "bytes":
        return f"{size(done)} of {size(total)}" if total else size(done)
    if unit == "%":
        return f"{done} %"
    return f"{done}/{total} {unit}".strip() if total else ""


@contextmanager
def progress(what: str, *, as_json: bool = False) -> Iterator[Show]:
    """A bar per stage on a terminal, a line per 5 % otherwise; on stderr, so that stdout holds the result alone."""
    if as_json:
        yield lambda _stage, _done, _total, _unit: None
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield _line_printer(what)


@contextmanager
def _bars() -> Iterator[Show]:
    # No refresh thread: every update draws, at most ten times a second.
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True), auto_refresh=False, transient=False) as bars:
        tasks: dict[str, TaskID] = {}
        last = 0.0

        def show(stage: str, done: int, total: int, unit: str) -> None:
            nonlocal last
            if stage not in tasks:
                tasks[stage] = bars.add_task(clean(stage), total=None, amount="")
            bars.update(tasks[stage], completed=done, total=total or None, amount=amount(done, total, unit))
            if (now := time.monotonic()) - last > 0.1 or (total and done >= total):
                last = now
                bars.refresh()

        yield show
        bars.refresh()


def _line_printer(what: str) -> Show:
    shown: dict[str, int] = {}

    def show(stage: str, done: int, total: int, unit: str) -> None:
        step = min(done, total) * LINES // total if total else 0
        if shown.get(stage, -1) >= step:
            return
        shown[stage] = step
        line = f"{what}: {clean(stage)} {amount(done, total, unit)}".rstrip()
        print(line, file=sys.stderr, flush=True)  # noqa: T201

    return show
