"""The endpoint measured from outside: what a token costs the agent's processor, and what requests leave in its memory.

Two real agents on loopback: one serves with the verifier, the other drafts for it over the mesh. Without `--requests`
chat answers are streamed, one after the other, and processor time of each agent process alone (its children apart) is
told as the share of a core that 50 tokens a second take, the idle agent's own share included. `--profile` samples where
it goes. With `--requests` so many short ones of all kinds are made, some at the same time.

The last line of `--json` is one object. Exit code 1 if a bound is missed or something broke.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import endpoint_cpu
import endpoint_soak
import netlab
from endpoint_cpu import BOUND, RATE
from lab import LabError
from surroundings import environment

PROFILE_HZ = 500.0
FLAT = 200.0
"""Bytes a request that memory may grow by: 2 MB over 10,000, what the noise of an allocator is."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench endpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--answers", type=int, default=12, help="how many answers are measured")
    parser.add_argument("--tokens", type=int, default=192, help="of each answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="the higher, the fewer drafts are right")
    parser.add_argument("--workers", type=int, default=0, help="1: the target is pooled over the other machine")
    parser.add_argument("--profile", action="store_true", help="samples what the time goes into")
    parser.add_argument("--requests", type=int, default=0, help="so many short ones, and what they leave in memory")
    parser.add_argument("--seed", type=int, default=1, help="of the order of those requests")
    options = parser.parse_args(argv)
    before = environment()
    try:
        ok, figures = soaked(options) if options.requests else measured(options)
    except (LabError, netlab.NetLabError, OSError, ValueError) as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"name": "endpoint", "environment": before, "options": vars(options), "ok": ok, **figures}))
    else:
        (show_soak if options.requests else show)(figures)
    return 0 if ok else 1


def engine() -> Path:
    return Path(os.environ["TIGHTWAD_TEST_ENGINE"])


def measured(options: argparse.Namespace) -> tuple[bool, dict[str, Any]]:
    hz = PROFILE_HZ if options.profile else 0.0
    asked = endpoint_cpu.Options(options.answers, options.tokens, options.temperature, options.workers, hz)
    target, draft = Path(os.environ["TIGHTWAD_TEST_F32"]), Path(os.environ["TIGHTWAD_TEST_MODEL"])
    figures = endpoint_cpu.measure(engine(), target, draft, asked)
    return figures["agents"]["serving"]["share"] <= BOUND, figures


def soaked(options: argparse.Namespace) -> tuple[bool, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        models = endpoint_soak.tiny_pair(Path(folder))
        figures = endpoint_soak.soak(engine(), *models, options.requests, options.seed)
    flat = all(slope <= FLAT for slope in figures["bytes_per_request"].values())
    return flat and not figures["open"] and not figures["n_wrong"], figures


def show_soak(figures: dict[str, Any]) -> None:
    print(f"{sum(figures['requests'].values())} requests in {figures['took_s']} s, {figures['n_wrong']} went wrong")
    for wrong in figures["wrong"]:
        print(f"    {wrong}")
    print(f"still open: {figures['open'] or 'nothing'}")
    for at in (figures["memory"][0], figures["memory"][len(figures["memory"]) // 5], figures["memory"][-1]):
        serving, drafting, verifier = (n / 2**20 for n in at[1:])
        print(
            f"after {at[0]:6d}: serving {serving:6.1f} MiB, drafting {drafting:6.1f} MiB, verifier {verifier:6.1f} MiB"
        )
    for name, slope in figures["bytes_per_request"].items():
        print(f"{name:9s} {slope:8.1f} bytes a request after the warm-up")


def show(figures: dict[str, Any]) -> None:
    print(
        f"{figures['tokens']} tokens, {figures['tokens_per_s']:.1f} a second, "
        f"{figures['tokens_per_round']:.2f} a round, "
        f"{figures['acceptance']:.0%} of the drafts right; yardstick {figures['yardstick_ms']:.1f} ms"
    )
    for name, agent in figures["agents"].items():
        print(
            f"{name:9s} {agent['ms_per_token']:6.3f} ms a token, idle {agent['idle_share']:6.2%}; "
            f"{agent['share']:6.2%} of a core at {RATE:g} tokens/s"
        )
        for part, ms in agent["parts"].items():
            print(f"    {part:14s} {ms:7.3f} ms a token")
    for name, functions in figures["functions"].items():
        print(f"{name}: own share, share with what it calls")
        for call, own, within in functions:
            print(f"    {own:6.1%} {within:6.1%}  {call}")
