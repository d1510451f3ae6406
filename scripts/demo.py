"""The demo: from nothing to an answer from a pooled model, through a node that is not the coordinator."""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import netlab
from lab import Agent, Lab, LabError, can_namespace
from prepare import demo_model, engine_dir, target_model

from tightwad_agent import render
from tightwad_agent.config import load
from tightwad_agent.errors import TightwadError
from tightwad_agent.units import percent, size

N_AGENTS = 3
N_WORKERS = 2
N_TIMED = 3
QUESTION = "In one sentence: why is the sky blue?"
MAX_TOKENS = 64
SWARM_DEADLINE_S = 300.0
SERVE_DEADLINE_S = 300.0


@dataclass
class Talk:
    """Says what happens: to stdout, or to stderr when stdout is for JSON."""

    to_stderr: bool
    began: float

    def say(self, text: str) -> None:
        stream = sys.stderr if self.to_stderr else sys.stdout
        print(f"[{time.monotonic() - self.began:5.1f} s] {text}", file=stream, flush=True)


def watch_swarm(lab: Lab, model_id: str, talk: Talk) -> dict[str, Any]:
    """Waits until every agent holds the model; who gave how much."""
    first = lab.agents[0]
    shown = ""

    def spread() -> bool:
        nonlocal shown
        (entry,) = [m for m in first.cli("models") if m["id"] == model_id]
        have = {n["name"]: n["have"] for n in entry["nodes"]}
        text = ", ".join(f"{name} {percent(n, entry['size'])}" for name, n in sorted(have.items()))
        if text != shown:
            shown = text
            talk.say(f"swarm: {text}")
        return len(have) == len(lab.agents) and min(have.values()) >= entry["size"]

    first.wait(spread, "for the swarm to bring the model everywhere", SWARM_DEADLINE_S)
    names = {p["id"]: p["name"] for p in first.cli("peers")}
    moved: dict[str, dict[str, int]] = {}
    for agent in lab.agents[1:]:
        for transfer in agent.status()["transfers"]:
            if transfer["id"] == model_id:
                moved[agent.name] = {names[node]: n for node, n in transfer["from_each_peer"].items()}
    total = sum(sum(sources.values()) for sources in moved.values())
    for name, sources in sorted(moved.items()):
        talk.say(f"swarm: {name} got " + ", ".join(f"{size(n)} from {s}" for s, n in sorted(sources.items())))
    return {"bytes": total, "from_each_peer": moved}


def other_than(lab: Lab, coordinator: Agent) -> Agent:
    return next(agent for agent in reversed(lab.agents) if agent is not coordinator)


def play(lab: Lab, target: str, draft: str, engine: dict[str, Any], talk: Talk) -> dict[str, Any]:
    """The whole story; what `--json` prints, less the wall time."""
    kind = "network namespaces on a bridge" if lab.namespaces else "loopback ports"
    talk.say(f"starting {N_AGENTS} agents on {kind}")
    lab.start()
    talk.say("all joined, with one token; each sees the others")
    first = lab.agents[0]
    swarm = {}
    for path in (target, draft):
        added = first.cli("add", path)
        talk.say(f"{first.name} shares {added['name']} ({size(added['size'])})")
        swarm[added["name"]] = watch_swarm(lab, added["id"], talk)
    names = list(swarm)
    talk.say(f"serving {names[0]} pooled over {N_WORKERS} workers, drafts from {names[1]}")
    options = ("--workers", str(N_WORKERS), "--draft", names[1], "--ctx", "2048")
    served = first.cli("serve", names[0], *options, timeout_s=SERVE_DEADLINE_S)
    coordinator = lab.coordinator()
    coordinator.wait(lambda: drafting(coordinator), "for a drafter", SERVE_DEADLINE_S)
    asked = other_than(lab, coordinator)
    talk.say(f"coordinator is {coordinator.name}; asking {asked.name}: {QUESTION}")
    reply = ask(asked, speculation=True)
    answer = reply["choices"][0]["message"]["content"].strip()
    talk.say(f"answer: {answer}")
    plain, drafted, equal = compare(asked)
    talk.say(f"{drafted:.1f} tokens/s with drafts, {plain:.1f} without: {drafted / plain:.2f} times as fast")
    talk.say("the answers are the same" if equal else "the answers differ")
    workers = [w["name"] for w in served["target"]["workers"]]
    return {
        "ok": bool(answer) and equal and len(workers) == N_WORKERS and asked is not coordinator,
        "answer": answer,
        "tokens": reply["usage"]["completion_tokens"],
        "tokens_per_s": round(drafted, 2),
        "tokens_per_s_without_drafts": round(plain, 2),
        "speed_up": round(drafted / plain, 2),
        "served_by": served["target"]["engine"],
        "coordinator": coordinator.name,
        "asked": asked.name,
        "peers": first.cli("peers"),
        "workers": workers,
        "drafters": [d["name"] for d in coordinator.status()["speculation"]["drafters"]],
        "swarm": swarm,
        "engine": {k: engine[k] for k in ("build", "origin", "protocol")},
    }


def drafting(coordinator: Agent) -> bool:
    return any(d["state"] == "ready" for d in coordinator.status()["speculation"]["drafters"])


def ask(agent: Agent, *, speculation: bool) -> dict[str, Any]:
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "speculation": speculation,
    }
    reply: dict[str, Any] = agent.post("/v1/chat/completions", body)
    return reply


def compare(agent: Agent) -> tuple[float, float, bool]:
    """Tokens a second without and with drafts, medians of runs in turn, and whether all answers were the same."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    answers = set()
    for _ in range(N_TIMED):
        for speculation in (False, True):
            reply = ask(agent, speculation=speculation)
            rates[speculation].append(reply["timings"]["predicted_per_second"])
            answers.add(reply["choices"][0]["message"]["content"])
    return statistics.median(rates[False]), statistics.median(rates[True]), len(answers) == 1


def goodbye(lab: Lab, asked: str) -> None:
    agent = next(a for a in lab.agents if a.name == asked)
    inside = " ".join([*agent.prefix, ""]) if agent.prefix else ""
    state = f"--state-dir {agent.state_dir}"
    command = os.path.relpath(Path(sys.executable).with_name("tightwad-agent"))
    print(
        "\nTry, in another terminal:\n"
        f"  {inside}curl {agent.url('/v1/chat/completions')} -H 'Content-Type: application/json' \\\n"
        '      -d \'{"messages": [{"role": "user", "content": "Tell me a joke."}]}\'\n'
        f"  {inside}{command} status {state}\n"
        f"  {inside}{command} peers --watch {state}\n"
        "Ctrl-C ends the demo and leaves nothing behind.",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the answer")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line of stdout")
    parser.add_argument("--loopback", action="store_true", help="no network namespaces, even as root")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    began = time.monotonic()
    talk = Talk(options.json, began)
    try:
        config = load()
        where = engine_dir(config)
        from tightwad_agent.main import engine_status

        engine = engine_status(config)
        model = demo_model(config)
        target = target_model(config, where, model)
        talk.say(f"engine {engine['build']} ({engine['origin']}), target {target.name}, draft {model.name}")
        threads = str(max(1, (os.cpu_count() or 1) // 2))  # one machine plays all of them
        namespaces = False if options.loopback else can_namespace()
        with Lab(N_AGENTS, namespaces=namespaces, flags=("--threads", threads)) as lab:
            result = play(lab, str(target), str(model), engine, talk)
            if not options.json:
                render.peers({"peers": result["peers"], "nearby": []}, as_json=False)
            if not options.once:
                goodbye(lab, result["asked"])
                signal.pause()
        result["wall_s"] = round(time.monotonic() - began, 1)
    except KeyboardInterrupt:
        return 130
    except (LabError, TightwadError, netlab.NetLabError) as exc:
        print(f"demo: {exc}", file=sys.stderr)
        if options.json:
            print(json.dumps({"ok": False, "error": str(exc), "wall_s": round(time.monotonic() - began, 1)}))
        return 1
    if options.json:
        print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
