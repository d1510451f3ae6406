"""Fuzzes for a given time: see `scripts/fuzz --help`. Findings are written out, and the exit code is then 1."""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import tempfile
import time
from pathlib import Path

import fuzz_targets
from fuzz_engine import Finding, Report, Target, fuzz, keep, shape

SLICE_S = 20.0


def main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    logging.disable()
    known = fuzz_targets.targets()
    if unknown := set(args.target) - known.keys():
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    chosen = [known[name] for name in args.target or known]
    if args.replay:
        for target in chosen:
            print(target.name, target.run(args.replay.read_bytes()))
        return 0
    return 1 if _rounds(chosen, args) else 0


def _rounds(chosen: list[Target], args: argparse.Namespace) -> int:
    """Each target for a while, with one seed after the other, until the time is over; how many findings there were."""
    end = time.monotonic() + args.seconds
    seed, found = args.seed, set()
    slice_s = min(SLICE_S, args.seconds / len(chosen))
    while time.monotonic() < end:
        for target in chosen:
            try:
                report = fuzz(target, seed, seconds=min(slice_s, max(0.0, end - time.monotonic())))
            except Finding as finding:
                if (what := f"{target.name} {shape(str(finding))}") not in found:
                    found.add(what)
                    _write_out(finding, seed, args.out)
                continue
            _say(report)
            if args.keep:
                print(f"  kept {keep(target.name, report.new)} more inputs")
        seed += 1
    print(f"{len(found)} findings")
    return len(found)


def _say(report: Report) -> None:
    print(
        f"{report.target}: seed {report.seed}, {report.runs} inputs, {report.accepted} accepted, "
        f"{len(report.outcomes)} different outcomes",
        flush=True,
    )


def _write_out(finding: Finding, seed: int, out: Path | None) -> None:
    out = out or Path(tempfile.mkdtemp(prefix="tightwad-fuzz-findings-"))
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{finding.target}-{hashlib.sha256(finding.data).hexdigest()[:12]}"
    path.write_bytes(finding.data)
    print(f"FOUND with seed {seed}: {finding}\n  again: scripts/fuzz --replay {path} {finding.target}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("target", nargs="*", help="what to fuzz; all if none is named")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together (60)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first round; each round adds one")
    parser.add_argument("--keep", action="store_true", help="add inputs with new outcomes to tests/data/fuzz")
    parser.add_argument("--out", type=Path, help="folder for findings; a new temporary one if not given")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run this one input and show its traceback")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
