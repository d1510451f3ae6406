"""The command line: arguments -> call -> render. Heavy imports live inside the commands, so `--help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tightwad_agent import __version__, cli_models, cli_trust
from tightwad_agent.cli_base import DefaultUp, client_of, common, config_of, json_option
from tightwad_agent.cli_events import events
from tightwad_agent.cli_keys import key


@click.group(cls=DefaultUp, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tightwad-agent")
def cli() -> None:
    """Turn the machines of a home lab into one OpenAI-compatible endpoint.

    Without a command, `up` runs: on the first machine it makes a cluster and prints what to type on the others.
    """


for command in cli_models.COMMANDS:
    cli.add_command(command)
cli.add_command(key)
cli.add_command(events)
for command in cli_trust.COMMANDS:
    cli.add_command(command)


@cli.command()
@common
@click.option(
    "--join", "token", metavar="TOKEN", help="Join the cluster that made this token; `-` reads it from stdin."
)
@click.option("--name", help="What to call this machine; its host name by default.")
@click.option("--mesh-port", type=int, help="Port between nodes.  [default: 8089]")
@click.option("--endpoint-port", type=int, help="Port of the OpenAI endpoint.  [default: 8088]")
@click.option("--endpoint-host", help="Address of the endpoint; 127.0.0.1 keeps it to this machine.")
@click.option("--open-endpoint", is_flag=True, default=None, help="Answer other machines without the API key.")
@click.option("--interface", "interfaces", multiple=True, help="Network interface to announce on; may be repeated.")
@click.option("--seed", "seeds", multiple=True, metavar="HOST:PORT", help="Address of a node; may be repeated.")
@click.option("--no-mdns", is_flag=True, help="Do not announce or search over mDNS.")
@click.option("--engine-dir", type=click.Path(path_type=Path), help="Folder of a llama.cpp build of your own.")
@click.option("--models-dir", type=click.Path(path_type=Path), help="Where the swarm puts model files.")
@click.option("--max-models-size", metavar="SIZE", help="Most room for them, such as 200GB; 0 for no limit.")
@click.option("--threads", type=int, help="Threads of a worker or server; 0 lets llama.cpp choose.")
@click.option("--device", "devices", multiple=True, help="Device to offer; may be repeated.  [default: all]")
@click.option("--workers", type=int, help="Pool over this many other machines even if one would do.")
@click.option("--max-draft-tokens", metavar="auto|N", help="Most draft tokens that one forward pass checks.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
@click.option("--log-json", is_flag=True, default=None, help="Log JSON lines.")
def up(
    state_dir: Path | None,
    config_file: Path | None,
    token: str | None,
    no_mdns: bool,
    interfaces: tuple[str, ...],
    seeds: tuple[str, ...],
    devices: tuple[str, ...],
    name: str | None,
    max_models_size: str | None,
    **flags: Any,
) -> None:
    """Run the agent until Ctrl-C (this is what happens without a command)."""
    from tightwad_agent import main

    config = config_of(
        state_dir,
        config_file,
        name=_node_name(name),
        mdns=False if no_mdns else None,
        interfaces=interfaces or None,
        seeds=_addresses(seeds),
        devices=devices or None,
        max_models_bytes=_size(max_models_size),
        **flags,
    )
    main.run_agent(config, _token(token))


@cli.command()
@common
@json_option
@click.argument("token")
@click.option("--name", help="What to call this machine; its host name by default.")
@click.option("--seed", "seeds", multiple=True, metavar="HOST:PORT", help="Where to look for the cluster.")
@click.option("--no-mdns", is_flag=True, help="Do not search over mDNS.")
@click.option("--interface", "interfaces", multiple=True, help="Network interface to search on; may be repeated.")
def join(
    state_dir: Path | None,
    config_file: Path | None,
    token: str,
    name: str | None,
    seeds: tuple[str, ...],
    no_mdns: bool,
    interfaces: tuple[str, ...],
    as_json: bool,
) -> None:
    """Enrol this machine with a TOKEN from `tightwad-agent token create`; `-` reads it from stdin."""
    from tightwad_agent import main, render

    config = config_of(
        state_dir,
        config_file,
        name=_node_name(name),
        seeds=_addresses(seeds),
        mdns=False if no_mdns else None,
        interfaces=interfaces or None,
    )
    render.joined(main.join(config, _token(token) or ""), as_json=as_json)


@cli.command()
@common
@json_option
@click.argument("model")
@click.option("--draft", default="auto", show_default=True, help="Draft model: a name, `auto` or `off`.")
@click.option("--ctx", type=click.IntRange(0, 1 << 24), default=0, help="Context in tokens.  [default: the model's]")
@click.option("--workers", type=click.IntRange(-1, 16), default=-1, help="Pool over exactly this many other machines.")
@click.option(
    "--engine",
    type=click.Choice(["auto", "verifier", "llama-server"]),
    default="auto",
    show_default=True,
    help="What runs the model: the verifier for pools and drafts from other machines, or llama-server.",
)
@click.option("--drafters", metavar="NAME,...", help="Machines that may draft.  [default: those with the least to do]")
@click.option("--max-draft-tokens", metavar="auto|N", help="Most draft tokens that one forward pass checks.")
@click.option("--allow-smaller", is_flag=True, help="Where it does not fit, serve a smaller quantisation of it.")
@click.option("--no-wait", is_flag=True, help="Return at once; `status` tells how it goes.")
def serve(
    state_dir: Path | None,
    config_file: Path | None,
    as_json: bool,
    model: str,
    draft: str,
    ctx: int,
    workers: int,
    engine: str,
    drafters: str | None,
    max_draft_tokens: str | None,
    allow_smaller: bool,
    no_wait: bool,
) -> None:
    """Serve MODEL on port 8088 of every node; it is spread and pooled as needed."""
    from tightwad_agent import render

    params = {
        "model": model,
        "draft": draft,
        "ctx": ctx,
        "workers": workers,
        "engine": engine,
        "drafters": [name for name in (drafters or "").split(",") if name],
        "max_draft_tokens": max_draft_tokens,
        "allow_smaller": allow_smaller,
        "wait": not no_wait,
    }
    with render.progress("serve", as_json=as_json) as show:
        served = client_of(state_dir, config_file).call("serve", params, show)
    render.served(served, as_json=as_json)


@cli.command()
@common
@json_option
def stop(state_dir: Path | None, config_file: Path | None, as_json: bool) -> None:
    """Stop serving; the agents stay up."""
    from tightwad_agent import render

    render.stopped(client_of(state_dir, config_file).call("stop"), as_json=as_json)


@cli.command()
@common
@json_option
@click.option("--watch", is_flag=True, help="Keep showing until Ctrl-C.")
def peers(state_dir: Path | None, config_file: Path | None, as_json: bool, watch: bool) -> None:
    """List the machines of the cluster."""
    from tightwad_agent import render

    client = client_of(state_dir, config_file)
    if watch:
        render.watch_peers(lambda: client.call("peers"), as_json=as_json)
    else:
        render.peers(client.call("peers"), as_json=as_json)


@cli.command()
@common
@json_option
def status(state_dir: Path | None, config_file: Path | None, as_json: bool) -> None:
    """Say what the cluster is doing, and why."""
    from tightwad_agent import render

    render.status(client_of(state_dir, config_file).call("status"), as_json=as_json)


@cli.command()
@common
@json_option
@click.option("--kinds", metavar="KIND,...", help="Of reasoning, code, facts, list and creative.  [default: all]")
@click.option("--per-kind", type=click.IntRange(1, 20), default=4, show_default=True, help="Prompts of each kind.")
@click.option("--max-tokens", type=click.IntRange(1, 4096), default=96, show_default=True, help="Longest answer.")
@click.option("--concurrency", type=click.IntRange(1, 16), default=1, show_default=True, help="Requests at once.")
def bench(
    state_dir: Path | None,
    config_file: Path | None,
    as_json: bool,
    kinds: str | None,
    per_kind: int,
    max_tokens: int,
    concurrency: int,
) -> None:
    """Measure what drafts bring here: prompts by kind, each answered with and without them.

    Ctrl-C prints what was measured so far.
    """
    from tightwad_agent import bench_run, render

    options = bench_run.Options(bench_run.parse_kinds(kinds), per_kind, max_tokens, concurrency)
    with render.progress("bench", as_json=as_json) as show:
        outcome = bench_run.bench(config_of(state_dir, config_file).state_dir, options, show)
    render.bench(outcome.plain, as_json=as_json)
    if outcome.problem is not None and not as_json:
        raise outcome.problem
    sys.exit(outcome.exit_code)


@cli.command()
@common
@json_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def leave(state_dir: Path | None, config_file: Path | None, as_json: bool, yes: bool) -> None:
    """Leave the cluster for good: tell the others, forget keys and certificate, keep model files."""
    from tightwad_agent import main, render

    if not yes and sys.stdin.isatty():
        click.confirm("Leave the cluster? Coming back needs a new token.", abort=True)
    render.left(main.leave(config_of(state_dir, config_file)), as_json=as_json)


@cli.group()
def engine() -> None:
    """Get llama.cpp, and say which one is used."""


@engine.command("install")
@common
@json_option
@click.option("--engine-dir", type=click.Path(path_type=Path), help="Folder of a llama.cpp build of your own.")
def engine_install(state_dir: Path | None, config_file: Path | None, as_json: bool, engine_dir: Path | None) -> None:
    """Download or build llama.cpp if it is not there, and test it."""
    from tightwad_agent import main, render

    config = config_of(state_dir, config_file, engine_dir=engine_dir)
    with render.progress("engine", as_json=as_json) as show:
        found = main.engine_install(config, show)
    render.engine(found, as_json=as_json)


@engine.command("status")
@common
@json_option
@click.option("--engine-dir", type=click.Path(path_type=Path), help="Folder of a llama.cpp build of your own.")
def engine_status(state_dir: Path | None, config_file: Path | None, as_json: bool, engine_dir: Path | None) -> None:
    """Say which llama.cpp would be used, and why not another."""
    from tightwad_agent import main, render

    render.engine(main.engine_status(config_of(state_dir, config_file, engine_dir=engine_dir)), as_json=as_json)


@cli.command()
@json_option
def version(as_json: bool) -> None:
    """Print versions of the agent and of what it stands on."""
    from tightwad_agent import main, render

    render.version(main.versions(), as_json=as_json)


def _token(text: str | None) -> str | None:
    return sys.stdin.readline().strip() if text == "-" else text


def _size(text: str | None) -> int | None:
    from tightwad_agent.errors import UsageError
    from tightwad_agent.units import parse_size

    try:
        return None if text is None else parse_size(text)
    except UsageError as exc:
        raise UsageError(f"--max-models-size: {exc.message}", hint=exc.hint) from None


def _node_name(name: str | None) -> Any:
    from tightwad_agent.errors import UsageError
    from tightwad_agent.ids import NodeName

    if name is None:
        return None
    try:
        return NodeName(name)
    except ValueError:
        raise UsageError(
            f"--name: {name!r} is no host name", hint="letters, digits, dots and dashes, at most 63"
        ) from None


def _addresses(seeds: tuple[str, ...]) -> Any:
    from tightwad_agent.config import DEFAULT_MESH_PORT
    from tightwad_agent.errors import UsageError
    from tightwad_agent.ids import Address

    try:
        return tuple(Address.parse(seed, DEFAULT_MESH_PORT) for seed in seeds) or None
    except ValueError as exc:
        raise UsageError(f"--seed: {exc}") from None
