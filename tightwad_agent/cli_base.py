"""What all commands share: options, the default command, how errors end them. Imports nothing heavy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from tightwad_agent.errors import CTRL_C, TightwadError

if TYPE_CHECKING:
    from tightwad_agent.config import Config
    from tightwad_agent.control import AgentClient

F = TypeVar("F", bound=Callable[..., Any])

COMMON = ("--state-dir", "--config")
UP = "up"
_AS_JSON = "tightwad_agent.as_json"


class DefaultUp(click.Group):
    """A group whose default command is `up`; options that every command takes may also stand before the command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        leading: list[str] = []
        rest = list(args)
        while rest and rest[0].partition("=")[0] in COMMON:
            width = 1 if "=" in rest[0] else 2
            leading, rest = leading + rest[:width], rest[width:]
        if not rest or (rest[0].startswith("-") and rest[0] not in ("--help", "-h", "--version")):
            rest = [UP, *rest]
        depth = self._depth(ctx, rest)
        return super().parse_args(ctx, [*rest[:depth], *(leading if depth else ()), *rest[depth:]])

    def _depth(self, ctx: click.Context, args: list[str]) -> int:
        """How many arguments name the command (`token create`: 2); 0 for one that takes no common options."""
        command: click.Command = self
        depth = 0
        while isinstance(command, click.Group):
            found = command.get_command(ctx, args[depth]) if depth < len(args) else None
            if found is None:
                return depth if isinstance(command, WithDefault) else 0
            command, depth = found, depth + 1
        takes = {option for p in command.params for option in p.opts}
        return depth if takes.issuperset(COMMON) else 0

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TightwadError as exc:
            _fail(exc, as_json=ctx.meta.get(_AS_JSON, False))
        except BaseExceptionGroup as group:
            if group.split(KeyboardInterrupt)[1] is None:
                _interrupted()
            if (single := _only(group)) is None:
                raise
            _fail(single, as_json=ctx.meta.get(_AS_JSON, False))
        except KeyboardInterrupt:
            _interrupted()


class WithDefault(click.Group):
    """A group that runs the command `default` where none is named."""

    def __init__(self, *args: Any, default: str, **more: Any) -> None:
        super().__init__(*args, **more)
        self._default = default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ("--help", "-h")):
            args = [self._default, *args]
        return super().parse_args(ctx, args)


def _only(group: BaseExceptionGroup[BaseException]) -> TightwadError | None:
    """The one foreseen error that a nursery wrapped, if that is all there is."""
    found = group
    while isinstance(found, BaseExceptionGroup) and len(found.exceptions) == 1:
        inner = found.exceptions[0]
        if isinstance(inner, TightwadError):
            return inner
        if not isinstance(inner, BaseExceptionGroup):
            return None
        found = inner
    return None


def _interrupted() -> NoReturn:
    """Ctrl-C where nobody waited for it. click would say "Aborted!" and exit with 1, as for a failure."""
    if sys.stderr.isatty():
        click.echo(err=True)  # ends the line with the ^C
    sys.exit(CTRL_C)


def _fail(exc: TightwadError, *, as_json: bool) -> None:
    if as_json:
        import json

        click.echo(json.dumps({"error": {"code": exc.code, "message": exc.message, "hint": exc.hint}}))
    else:
        click.echo(click.style("error: ", fg="red", bold=True) + exc.message, err=True)
        if exc.hint:
            click.echo(exc.hint, err=True)
    sys.exit(exc.exit_code)


def common(command: F) -> F:
    """Options that every command takes."""
    command = click.option(
        "--config",
        "config_file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="YAML file with settings; works without.",
    )(command)
    return click.option(
        "--state-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Where this node keeps its identity; one per agent.  [env: TIGHTWAD_STATE_DIR]",
    )(command)


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, callback=_noted, help="Print JSON.")(command)


def _noted(ctx: click.Context, _option: click.Parameter, as_json: bool) -> bool:
    ctx.meta[_AS_JSON] = as_json  # errors are printed where only the outermost context is left
    return as_json


def config_of(state_dir: Path | None, config_file: Path | None, **overrides: Any) -> Config:
    from tightwad_agent.config import load

    return load(config_file, {"state_dir": state_dir, **overrides})


def client_of(state_dir: Path | None, config_file: Path | None) -> AgentClient:
    from tightwad_agent.control import AgentClient

    return AgentClient(config_of(state_dir, config_file).state_dir)
