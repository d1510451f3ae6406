"""The commands about API keys. Heavy imports live inside them, so `--help` is quick."""

from __future__ import annotations

from pathlib import Path

import click

from tightwad_agent.cli_base import WithDefault, client_of, common, config_of, json_option


@click.group(cls=WithDefault, default="show")
def key() -> None:
    """Print the API key that other machines need for the endpoint; make, list and revoke further ones.

    Without a command, `show` runs.
    """


@key.command()
@common
@json_option
def show(state_dir: Path | None, config_file: Path | None, as_json: bool) -> None:
    """Print the cluster's first key, which every node holds."""
    from tightwad_agent import keyring, main, render_keys

    config = config_of(state_dir, config_file)
    text = main.api_key(config)
    keyring.check_default(config.state_dir, text)
    render_keys.key(text, as_json=as_json)


@key.command()
@common
@json_option
@click.argument("name")
@click.option("--expires", metavar="TIME", help="How long it is good for: 12h, 30d.  [default: until it is revoked]")
def create(state_dir: Path | None, config_file: Path | None, as_json: bool, name: str, expires: str | None) -> None:
    """Make a key called NAME and print it, this once: only a hash of it is kept."""
    from tightwad_agent import render_keys
    from tightwad_agent.units import parse_duration

    params = {"name": name, "expires_s": parse_duration(expires) if expires else 0}
    render_keys.created(client_of(state_dir, config_file).call("key.create", params), as_json=as_json)


@key.command("list")
@common
@json_option
def list_keys(state_dir: Path | None, config_file: Path | None, as_json: bool) -> None:
    """List all keys by name, with what was asked with each on this machine since its agent started."""
    from tightwad_agent import render_keys

    render_keys.keys(client_of(state_dir, config_file).call("key.list"), as_json=as_json)


@key.command()
@common
@json_option
@click.argument("name")
def revoke(state_dir: Path | None, config_file: Path | None, as_json: bool, name: str) -> None:
    """Revoke the key called NAME (or of that id) on all machines; `default` is the first one."""
    from tightwad_agent import render_keys

    render_keys.revoked(client_of(state_dir, config_file).call("key.revoke", {"which": name}), as_json=as_json)
