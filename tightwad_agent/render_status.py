"""The longest answers to a person: the status of the cluster, and what a measurement found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from tightwad_agent.terminal import Plain, add_row, print_json, say
from tightwad_agent.units import duration, percent, size

MAX_DRAFTERS = 3
"""Drafters that `status` has a line for."""

MAX_LINKS = 8
"""Machines whose link `status` has a line for."""

MAX_EVENTS = 20
"""The last events that `status` shows."""

MAX_DIFFERENCES = 5
"""Answers that differ are named, so many of them."""


# status


def status(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    cluster, coordinator = info["cluster"], info["coordinator"]
    target, spec = info["target"], info["speculation"]
    say(
        f"cluster      {cluster['id'][:8]}, {cluster['alive']} of {cluster['nodes']} nodes alive",
        f"this node    {info['node']['name']} ({info['node']['id'][:8]}), {info['node']['role']}",
        f"coordinator  {coordinator['name'] if coordinator else 'none'}, epoch {info['epoch']['counter']}",
        f"endpoint     {info['endpoint']}",
        f"engine       {info['engine']['build'] or 'none'} {info['engine']['problem']}".rstrip(),
        f"target       {target['model'] or 'nothing'}: {target['state']}"
        + (f", {target['detail']}" if target["detail"] not in ("", target["state"]) else ""),
    )
    if target["engine"]:
        workers = ", ".join(w["name"] for w in target["workers"])
        why = f" ({spec['engine_reason']})" if spec.get("engine_reason") else ""
        say(f"             {target['engine']}, " + (f"pooled over {workers}" if workers else "on one machine") + why)
    for reason in target["reasons"]:
        say(f"             {reason}")
    draft = info["draft"]
    say(f"draft        {draft['model'] or 'none'} ({draft['reason']})")
    for label, text in _speculation(spec):
        say(f"{label:<13}{text}")
    for t in info["transfers"]:
        say(f"transfer     {transfer_line(t)}")
    for problem in info["problems"]:
        say(f"problem      {problem}")
    for label, text in [*_reliability(info), *_links(info.get("links", ()))]:
        say(f"{label:<13}{text}")
    for event in _grouped(info["events"][-MAX_EVENTS:]):
        say(event)


def _reliability(info: Plain) -> Iterator[tuple[str, str]]:
    """When the pool was lost for the last time, and what that meant for answers."""
    if restart := info["target"].get("restart"):
        yield "restarted", f"{restart['at']} in {restart['took_s']:.1f} s, because of this: {restart['reason']}"
    if (answers := info.get("answers", {})).get("resumed"):
        longest = f"{answers['longest_pause_s']:.1f} s"
        yield "answers", f"{answers['resumed']} went on after their engine was lost, the longest pause was {longest}"


def _links(links: Sequence[Plain]) -> Iterator[tuple[str, str]]:
    for i, link in enumerate(links[:MAX_LINKS]):
        facts = [f"{link['rtt_ms']:.1f} ms"] if link["rtt_ms"] is not None else []
        facts += [f"{link['mbit_s']:.0f} Mbit/s"] if link["mbit_s"] is not None else []
        way = f"over {link['address']}" if link["address"] else "through others only"
        yield "" if i else "links", f"{link['name']} {way}" + (f" ({', '.join(facts)})" if facts else "")
    if len(links) > MAX_LINKS:
        yield "", f"and {len(links) - MAX_LINKS} more"


def _grouped(events: Sequence[Plain]) -> Iterator[str]:
    """Each once, at its last time, with how often it was told."""
    keys = [(e["kind"], e["text"]) for e in events]
    for i, (key, event) in enumerate(zip(keys, events, strict=True)):
        if key not in keys[i + 1 :]:
            times = f" ({keys.count(key)} times)" if keys.count(key) > 1 else ""
            yield f"{event['at']}  {event['kind']}: {event['text']}{times}"


def _speculation(spec: Plain) -> Iterator[tuple[str, str]]:
    """(label, text) of a few lines: what is done, what it brought, what it costs, and who drafts."""
    texts = [t for t in (spec.get("decision"), *_figures(spec), spec.get("rollback")) if t]
    yield from zip(["speculation", *[""] * len(texts)], texts, strict=False)
    drafters = spec.get("drafters") or []
    for drafter in drafters[:MAX_DRAFTERS]:
        yield "drafter", _drafter(drafter)
    if len(drafters) > MAX_DRAFTERS:
        yield "", f"and {len(drafters) - MAX_DRAFTERS} more"


def _figures(spec: Plain) -> Iterator[str]:
    if not spec["rounds"]:
        return
    each = f" of {_figure(spec.get('tokens_per_round'))} tokens" if spec.get("tokens_per_round") else ""
    share = f" ({_share(spec['accepted'] / spec['drafted'])})" if spec["drafted"] else ""
    yield f"{spec['rounds']} rounds{each}; {spec['accepted']} of {spec['drafted']} draft tokens accepted{share}"
    if at := spec.get("acceptance_at"):
        shares = " ".join(_figure(None if value is None else 100 * value, ".0f") for value in at)
        yield f"accepted at the 1st, 2nd, ... token of a draft: {shares} %"
    costs = [("a round takes", "verify_ms"), ("a draft token", "draft_ms")]
    told = [f"{what} {_figure(spec[key])} ms" for what, key in costs if spec.get(key) is not None]
    if spec.get("hidden") is not None:
        told.append(f"{_share(spec['hidden'])} of the drafting happens while a round runs")
    yield ", ".join(told)


def _drafter(d: Plain) -> str:
    """`cellar: drafting, 160 tokens/s, first token after 12.3 ms, 71 % accepted`"""
    facts = [
        ("tokens_per_s", "{:.0f} tokens/s", 1),
        ("first_token_ms", "first token after {:.1f} ms", 1),
        ("acceptance", "{:.0f} % accepted", 100),
    ]
    told = [form.format(d[key] * scale) for key, form, scale in facts if d[key] is not None]
    reason = f" ({d['reason']})" if d["reason"] else ""
    return ", ".join([f"{d['name']}: {d['state']}{reason}", *told])


def transfer_line(t: Plain) -> str:
    text = f"{t['name']}: {percent(t['have'], t['size'])}"
    if t["state"] not in ("fetching", "complete", "idle"):
        text += f", {t['state']}"
    if t["reused"]:
        text += f", {size(t['reused'])} were on this disk"
    if t["have"] < t["size"]:
        eta = f", {duration((t['size'] - t['have']) / t['rate'])} left" if t["rate"] > 0 else ""
        text += f", {size(t['rate'])}/s from {t['sources']} source(s){eta}"
    return f"{text}, {t['problem']}" if t["problem"] else text


# measuring


def bench(info: Plain, *, as_json: bool) -> None:
    if as_json:
        print_json(info)
        return
    at_once = "one request" if info["concurrency"] == 1 else f"{info['concurrency']} requests"
    say(
        f"{info['target']} on {info['engine'] or 'an unknown engine'}, draft {info['draft'] or 'none'};"
        f" at most {info['max_tokens']} tokens, {at_once} at a time"
    )
    if info["total"]:
        say(_bench_table(info))
    if info["measured"] < info["wanted"]:
        say(f"stopped after {info['measured']} of {info['wanted']} prompts")
    if info["total"] and info["total"]["compared"]:
        say(f"equal answers: {info['total']['equal']} of {info['total']['compared']}")
    for d in info["differences"][:MAX_DIFFERENCES]:
        say(f"  differs from character {d['at']} on: {d['prompt']}")
    for text in info["notes"]:
        say(f"note: {text}")


def _bench_table(info: Plain) -> Table:
    """A row for each kind, and one for all of them if there are several."""
    compared = bool(info["total"]["compared"])
    comparison = ["without drafts", "speed-up"] if compared else []
    columns = ["prompts", "tokens/s", *comparison, "drafts accepted", "tokens/round"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("kind", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    for row in [*info["kinds"], *([info["total"]] if len(info["kinds"]) > 1 else [])]:
        speeds = [_figure(row["without_per_s"]), _figure(row["speedup"], ".2f", " x")] if compared else []
        rest = (_share(row["acceptance"]), _figure(row["tokens_per_round"]))
        add_row(table, row["kind"], row["prompts"], _figure(row["drafts_per_s"]), *speeds, *rest)
    return table


def _figure(value: float | None, form: str = ".1f", unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _share(value: float | None) -> str:
    return _figure(None if value is None else 100 * value, ".0f", " %")
