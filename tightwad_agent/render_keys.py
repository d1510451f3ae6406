"""What a person is told about API keys."""

from __future__ import annotations

import time

from tightwad_agent.terminal import Plain, add_row, columns, print_json, say
from tightwad_agent.units import duration


def key(api_key: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"key": api_key})
    else:
        print(api_key)  # noqa: T201


def created(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    until = f"good for {duration(info['expires'] - time.time())}" if info["expires"] else "good until it is revoked"
    say(f"The key {info['name']} ({until}). It is not shown again:", "")
    print(f"    {info['key']}")  # noqa: T201


def keys(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info["keys"])
        return
    table = columns("name", "id", "state", "made", "expires", "requests here", "tokens here")
    for k in info["keys"]:
        add_row(
            table,
            k["name"],
            k["id"] or "-",
            k["state"],
            _ago(k["created"]),
            _ahead(k["expires"]),
            k["requests"],
            k["tokens"],
        )
    say(table)


def revoked(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    for k in info["revoked"]:
        say(f"The key {k['name']} ({k['id']}) is revoked.")


def _ago(then: int | None) -> str:
    return "-" if then is None else f"{duration(max(0.0, time.time() - then))} ago"


def _ahead(then: int | None) -> str:
    if then is None:
        return "never"
    left = then - time.time()
    return f"in {duration(left)}" if left > 0 else f"{duration(-left)} ago"
