"""`events`. Heavy imports live inside, so `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tightwad_agent.cli_base import common, config_of, json_option
from tightwad_agent.events import MAX_EVENTS, Kind


@click.command()
@common
@json_option
@click.option("--since", metavar="TIME", help="Not older than this: 30m, 12h, 7d.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice([str(k) for k in Kind]), help="May be repeated.")
@click.option("--node", metavar="NAME", help="What this machine told, and what is about it.")
@click.option("-n", "n", type=click.IntRange(1, MAX_EVENTS), default=50, show_default=True, help="The last so many.")
@click.option("--follow", is_flag=True, help="Go on with what happens from now on, until Ctrl-C.")
def events(
    state_dir: Path | None,
    config_file: Path | None,
    as_json: bool,
    since: str | None,
    kinds: tuple[str, ...],
    node: str | None,
    n: int,
    follow: bool,
) -> None:
    """Say what happened in the cluster, when, and why.

    All machines that answer are asked; what several of them tell of the same is shown once. Where no agent runs, the
    events in this machine's files are shown.
    """
    from tightwad_agent import event_look
    from tightwad_agent.units import parse_duration

    since_s = parse_duration(since) if since else 0
    params: dict[str, Any] = {"since_s": since_s, "kinds": list(kinds), "node": node, "n": n}
    config = config_of(state_dir, config_file)
    event_look.look(config.state_dir, str(config.name), params, follow=follow, as_json=as_json)
