"""What the commands about membership print."""

from __future__ import annotations

import time
from typing import Any

from tightwad_agent.terminal import print_json, say

Plain = dict[str, Any]


def token_revoked(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    say(f"Join token {info['id']} is revoked.")
    if info["removed"]:
        say(f"Removed as well: {', '.join(info['removed'])}.")


def node_removed(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    say(f"{info['name']} ({info['id'][:8]}) was removed from the cluster.")
    if info["was_authority"]:
        say("It holds the cluster's key. Give the cluster another one: tightwad-agent ca rotate --overlap 10m")


def promoted(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    say(f"{info['name']} ({info['id'][:8]}) is an authority now: it may make tokens and remove machines.")


def rotated(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    say(f"The cluster has a new key. The old one counts until {_when(info['until'])}.")
    say(f"New certificates: {', '.join(info['renewed'])}.")
    if info["waiting"]:
        say(f"Not yet: {', '.join(info['waiting'])}; they follow when they are there, until then.")


def ca_status(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    say(f"authorities      {', '.join(info['authorities']) or 'none is known'}")
    say(f"key changed      {info['changes']} time(s)")
    if info["overlap_until"]:
        say(f"old key counts   until {_when(info['overlap_until'])}")
    say(f"removed          {info['removed']} machine(s)")
    say(f"revoked          {info['revoked']} join token(s)")


def _when(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))
