"""The commands about who belongs to the cluster. Heavy imports live inside them, so `--help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from tightwad_agent.cli_base import client_of, common, json_option


@click.group()
def token() -> None:
    """Make, list and revoke join tokens."""


@token.command("create")
@common
@json_option
@click.option("--ttl", default="1h", show_default=True, help="How long it is good for: 30m, 12h, 7d.")
@click.option(
    "--uses", type=click.IntRange(1, 1000), default=1, show_default=True, help="How many machines may use it."
)
@click.option(
    "--role",
    type=click.Choice(["node", "authority", "client"]),
    default="node",
    show_default=True,
    help="A client uses the cluster and gives nothing; an authority may let others in.",
)
@click.option("--no-addresses", is_flag=True, help="Leave this machine's addresses out; the joiner searches over mDNS.")
def token_create(
    state_dir: Path | None,
    config_file: Path | None,
    as_json: bool,
    ttl: str,
    uses: int,
    role: str,
    no_addresses: bool,
) -> None:
    """Print a token that lets another machine join."""
    from tightwad_agent import render
    from tightwad_agent.units import parse_duration

    params = {"ttl_s": parse_duration(ttl), "uses": uses, "role": role, "addresses": not no_addresses}
    render.token_created(client_of(state_dir, config_file).call("token.create", params), as_json=as_json)


@token.command("list")
@common
@json_option
def token_list(state_dir: Path | None, config_file: Path | None, as_json: bool) -> None:
    """List the tokens this authority has made."""
    from tightwad_agent import render

    render.tokens(client_of(state_dir, config_file).call("token.list"), as_json=as_json)


@token.command("revoke")
@common
@json_option
@click.argument("token_id", metavar="ID")
@click.option("--nodes", is_flag=True, help="Remove the machines that joined with it as well.")
def token_revoke(state_dir: Path | None, config_file: Path | None, as_json: bool, token_id: str, nodes: bool) -> None:
    """End a join token: nobody joins with it any more.

    ID is what `token list` shows, or its beginning.
    """
    from tightwad_agent import render_trust

    done = client_of(state_dir, config_file).call("token.revoke", {"id": token_id, "nodes": nodes})
    render_trust.token_revoked(done, as_json=as_json)


@click.command("remove-node")
@common
@json_option
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove_node(state_dir: Path | None, config_file: Path | None, as_json: bool, name: str, yes: bool) -> None:
    """Take a machine out of the cluster for good, whether it is there or not.

    Its certificate is refused everywhere within seconds. It comes back only with a new identity and a new token.
    """
    from tightwad_agent import render_trust

    if not yes and sys.stdin.isatty():
        click.confirm(f"Remove {name} from the cluster? Coming back takes `leave` there and a new token.", abort=True)
    done = client_of(state_dir, config_file).call("node.remove", {"node": name})
    render_trust.node_removed(done, as_json=as_json)


@click.command()
@common
@json_option
@click.argument("name")
def promote(state_dir: Path | None, config_file: Path | None, as_json: bool, name: str) -> None:
    """Make another machine an authority: it may let machines in and remove them, also when this one is lost."""
    from tightwad_agent import render_trust

    done = client_of(state_dir, config_file).call("node.promote", {"node": name})
    render_trust.promoted(done, as_json=as_json)


@click.group()
def ca() -> None:
    """The cluster's own key, which signs certificates and tokens."""


@ca.command()
@common
@json_option
@click.option("--overlap", default="30d", show_default=True, help="How long the old key counts beside the new one.")
@click.option("--force", is_flag=True, help="Also while another authority is away.")
def rotate(state_dir: Path | None, config_file: Path | None, as_json: bool, overlap: str, force: bool) -> None:
    """Give the cluster a new key; certificates are renewed by themselves.

    Machines that are away come back by themselves within the overlap, later only with a new token.
    """
    from tightwad_agent import render_trust
    from tightwad_agent.units import parse_duration

    params = {"overlap_s": parse_duration(overlap), "force": force}
    render_trust.rotated(client_of(state_dir, config_file).call("ca.rotate", params), as_json=as_json)


@ca.command("status")
@common
@json_option
def ca_status(state_dir: Path | None, config_file: Path | None, as_json: bool) -> None:
    """Say which machines are authorities, and what was revoked and removed."""
    from tightwad_agent import render_trust

    render_trust.ca_status(client_of(state_dir, config_file).call("ca.status"), as_json=as_json)


COMMANDS = (token, remove_node, promote, ca)
