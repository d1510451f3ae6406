"""Every line a person sees, with plausible and with extreme data, as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from tightwad_agent import render, render_status, report, report_models, terminal
from tightwad_agent.conductor import Serving
from tightwad_agent.decide import DraftChoice, Entry
from tightwad_agent.engine.attempt import Loss
from tightwad_agent.engine.draft_plan import DrafterPlan, EngineChoice
from tightwad_agent.engine.plan import DeviceUse, Plan, WorkerUse
from tightwad_agent.engine.pool import Back
from tightwad_agent.events import Event, Kind
from tightwad_agent.ids import Address, ModelId, NodeName, SafeName
from tightwad_agent.mesh.advert import Advert, ShortDevice
from tightwad_agent.mesh.mdns import Sighting
from tightwad_agent.mesh.members import Reach, State
from tightwad_agent.mesh.paths import PathView
from tightwad_agent.mesh.service import PeerStatus
from tightwad_agent.proxy.ports import Timings
from tightwad_agent.proxy.tally import Tally
from tightwad_agent.report import DrafterView, Speculation, SpeculationView
from tightwad_agent.swarm.transfer import Phase, TransferStatus
from tightwad_agent.testing import node_id
from tightwad_agent.wire.rows import Capabilities, Device, EngineInfo, HeldModel, ModelFacts, NodeRow, Role

ME, OTHER = node_id("attic"), node_id("cellar")
BIG, TINY = ModelId("ab" * 32), ModelId("cd" * 32)
FACTS = ModelFacts("llama", "Q4_1", 134515008, 30, 8192, 23040, "0123456789abcdef")
HOSTILE = "\x1b[31mred\x1b]0;title\x07[/] [bold red]x[/bold red] [@click=f()]\r\x9b2J\x00"
"""Terminal escapes, and markup of the library that draws the tables."""


def row(name: str = "attic", text: str = "ok", models: tuple[HeldModel, ...] = ()) -> NodeRow:
    return NodeRow(
        node_id(name),
        NodeName(name),
        Role.AUTHORITY,
        1,
        2,
        1766000000,
        True,
        7,
        8088,
        (Address("fd00::10", 8089),),
        Capabilities(
            "linux-x86_64",
            text,
            16,
            67430879232,
            51539607552,
            10**12,
            (Device(text[:64], text, 25757220864, 25000000000),),
            EngineInfo("", "", "", text),
        ),
        models,
        text,
    )


def status_of(r: NodeRow | None, *, rtt_s: float | None = 0.00234) -> PeerStatus:
    address = r.addresses[0] if r else None
    return PeerStatus(ME if r else OTHER, State.ALIVE, Reach.DIRECT, "a reason", r, address, rtt_s)


HELD = (
    HeldModel(BIG, SafeName("Big-32B [x].gguf"), 19_000_000_000, 19_000_000_000, FACTS),
    HeldModel(TINY, SafeName("tiny.gguf"), 98_000_000, 97_999_999, FACTS),
)
ENTRIES = {
    BIG: Entry(BIG, SafeName("Big-32B [x].gguf"), 19_000_000_000, FACTS, {ME: 19_000_000_000, OTHER: 5}),
    TINY: Entry(TINY, SafeName("tiny.gguf"), 98_000_000, ModelFacts(), {OTHER: 98_000_000}),
}
PLAN = Plan(
    BIG,
    (WorkerUse(OTHER, (DeviceUse("CUDA0", 10**10),)),),
    TINY,
    8192,
    reasons=("it does not fit on attic",),
    excluded=((ME, "no engine"), (node_id("unknown"), "another build")),
)
SERVED_BY = EngineChoice("llama-server", "llama-server was asked for (--engine llama-server)")
SERVING = Serving("ready", "", ENTRIES[BIG], DraftChoice(TINY, "same vocabulary"), PLAN, 8192, (7, 3, ME), SERVED_BY)


def transfer_status(done: int = 5, total: int = 10, rate: float = 3.7, problem: str = "") -> TransferStatus:
    return TransferStatus(
        model=BIG,
        name="Big-32B.gguf",
        phase=Phase.FETCHING,
        done=done,
        total=total,
        rate=rate,
        sources=2,
        from_each_peer={OTHER: 5},
        uploaded=7,
        problem=problem,
    )


def cluster_status(serving: dict[str, Any], transfers: list[Any], **more: Any) -> dict[str, Any]:
    return {
        "cluster": {"id": "c" * 52, "name": "home", "nodes": 3, "alive": 2},
        "node": {"id": str(ME), "name": "attic", "role": "authority", "addresses": []},
        "epoch": {"counter": 7, "node": str(ME)},
        "coordinator": {"id": str(ME), "name": "attic"},
        "endpoint": "http://127.0.0.1:8088/v1",
        "engine": report.engine(EngineInfo("b11434", "ab" * 32, "7.0.0")),
        **serving,
        "transfers": transfers,
        "problems": ["mDNS is switched off (--no-mdns)"],
        "events": report.events([Event(1766000000.5, "started"), Event(0.0, HOSTILE)]),
        **more,
    }


# Reports are plain data


def all_plain(value: Any) -> Any:
    """Fails on anything JSON cannot carry, and gives it back."""
    return json.loads(json.dumps(value, allow_nan=False))


def test_a_peer_with_everything() -> None:
    plain = all_plain(report.peer(status_of(row(models=HELD)), ME, ME))
    assert plain["self"] is True
    assert plain["coordinator"] is True
    assert plain["rtt_ms"] == 2.34
    assert plain["address"] == "[fd00::10]:8089"
    assert [m["have"] for m in plain["models"]] == [19_000_000_000, 97_999_999]
    wanted = {"id", "name", "state", "coordinator", "address", "rtt_ms", "devices", "memory_total", "memory_free"}
    assert wanted | {"engine", "models"} <= set(plain)


def test_a_peer_of_which_nothing_is_known_has_the_same_keys() -> None:
    blank = all_plain(report.peer(status_of(None, rtt_s=None), ME, None))
    full = report.peer(status_of(row()), ME, None)
    assert set(blank) == set(full)
    assert blank["name"] == OTHER.short
    assert blank["rtt_ms"] is None
    assert blank["coordinator"] is False
    assert (blank["address"], blank["devices"], blank["models"]) == ("", [], [])


def test_serving_says_who_works_and_who_was_left_out() -> None:
    names = {ME: "attic", OTHER: "cellar"}
    plain = all_plain(
        report.serving(SERVING, names, ENTRIES, Speculation(10, 80, 60), {OTHER: 12345}, saved={OTHER: 345})
    )
    assert plain["target"]["model"] == "Big-32B [x]"
    worker = {"id": str(OTHER), "name": "cellar", "devices": ["CUDA0"], "bytes": 12345, "bytes_saved": 345}
    assert plain["target"]["workers"] == [worker]
    assert plain["target"]["reasons"][:2] == [SERVED_BY.reason, "it does not fit on attic"]
    assert plain["target"]["engine"] == "llama-server"
    assert "attic left out: no engine" in plain["target"]["reasons"]
    assert f"{node_id('unknown').short} left out: another build" in plain["target"]["reasons"]
    assert plain["target"]["version"] == [7, 3, str(ME)]
    assert plain["draft"] == {"model": "tiny", "id": str(TINY), "reason": "same vocabulary"}
    assert plain["speculation"].items() >= {"rounds": 10, "drafted": 80, "accepted": 60, "acceptance": 0.75}.items()


def test_the_draft_of_the_verifier_is_what_others_draft_with() -> None:
    plan = replace(PLAN, draft=None)
    choice = EngineChoice("verifier", "the model is pooled")
    drafted = replace(SERVING, plan=plan, engine=choice, drafters=DrafterPlan((OTHER,)))
    assert report.serving(drafted, {}, ENTRIES, SpeculationView(), {})["draft"]["id"] == str(TINY)
    alone = replace(drafted, drafters=DrafterPlan())
    assert report.serving(alone, {}, ENTRIES, SpeculationView(), {})["draft"]["id"] is None
    assert report.serving(alone, {}, ENTRIES, SpeculationView(), {})["target"]["engine"] == "verifier"


def test_not_serving_has_the_same_keys() -> None:
    full = report.serving(SERVING, {}, ENTRIES, Speculation(), {})
    for part in ("target", "draft", "speculation"):
        assert set(all_plain(report.NOT_SERVING)[part]) == set(full[part])
    assert report.NOT_SERVING["target"]["model"] is None
    assert report.NOT_SERVING["target"]["workers"] == []


def test_a_draft_that_was_chosen_and_is_not_used_is_none() -> None:
    plain = report.draft(DraftChoice(TINY, "its file does not come"), ENTRIES, None)
    assert plain == {"model": None, "id": None, "reason": "its file does not come"}
    assert report.draft(DraftChoice(TINY, "x"), {}, TINY)["model"] is None


def test_models_are_sorted_and_marked() -> None:
    serving = report.serving(SERVING, {}, ENTRIES, Speculation(), {})
    plain = all_plain(report_models.models(ENTRIES, {ME: "attic"}, serving))
    assert [(m["name"], m["served"], m["draft"]) for m in plain] == [
        ("Big-32B [x].gguf", True, False),
        ("tiny.gguf", False, True),
    ]
    assert {"id": str(ME), "name": "attic", "have": 19_000_000_000}.items() <= plain[0]["nodes"][0].items()
    assert plain[0]["nodes"][1]["name"] == OTHER.short
    assert report_models.models({}, {}, report.NOT_SERVING) == []


def test_how_others_are_reached_and_what_was_lost() -> None:
    used = PathView(Address("192.0.2.7", 8089), True, 0.0004, 117_500_000.0, True)
    other = PathView(Address("198.51.100.7", 8089), False, None, None, None)
    here = PeerStatus(OTHER, State.ALIVE, Reach.DIRECT, "", None, used.address, 0.0004, (other, used))
    silent = PeerStatus(ME, State.DEAD, Reach.NONE, "", None, None, None)
    far = PeerStatus(ME, State.SUSPECT, Reach.INDIRECT, "", None, None, None)
    assert all_plain(report.links([here, silent, far])) == [
        {"name": OTHER.short, "reach": "direct", "address": "192.0.2.7:8089", "rtt_ms": 0.4, "mbit_s": 940.0},
        {"name": ME.short, "reach": "indirect", "address": "", "rtt_ms": None, "mbit_s": None},
    ]
    tally = Tally()
    tally.paused(4.25)
    assert report.answers(tally) == {"resumed": 1, "longest_pause_s": 4.25, "paused_s": 4.25}
    back = Back(1766000000.0, 4.21, Loss(OTHER, "it stopped answering"))
    assert report.restart(back, {OTHER: "cellar"}) == {
        "at": "2025-12-17T19:33:20Z",
        "took_s": 4.2,
        "reason": "cellar: it stopped answering",
    }
    assert report.restart(replace(back, loss=Loss(None, "it crashed")), {})["reason"] == "it crashed"


def test_the_status_says_how_it_went(capsys: pytest.CaptureFixture[str]) -> None:
    target = {**report.NOT_SERVING["target"], "restart": {"at": "2025", "took_s": 4.2, "reason": "cellar: gone"}}
    link = {"name": "cellar", "reach": "direct", "address": "192.0.2.7:8089", "rtt_ms": 0.4, "mbit_s": 940.0}
    far = {"name": "den", "reach": "indirect", "address": "", "rtt_ms": None, "mbit_s": None}
    told = [Event(i, text, Kind.POOL) for i, text in enumerate(["early", *["again"] * 3, *map(str, range(17))])]
    info = cluster_status(
        {**report.NOT_SERVING, "target": target},
        [],
        links=[link, far, *[far] * 7],
        answers={"resumed": 3, "longest_pause_s": 4.25, "paused_s": 9.0},
    )
    render.status({**info, "events": report.events(told)}, as_json=False)
    out = capsys.readouterr().out
    assert "restarted    2025 in 4.2 s, because of this: cellar: gone" in out
    assert "answers      3 went on after their engine was lost, the longest pause was 4.2 s" in out
    assert "links        cellar over 192.0.2.7:8089 (0.4 ms, 940 Mbit/s)\n             den through others only\n" in out
    assert "and 1 more" in out
    assert "pool: again (3 times)\n" in out
    assert out.count("again") == 1
    assert "early" not in out


def test_times_of_events_are_utc() -> None:
    event = Event(1766000000.9, "x", Kind.POOL, {"took_s": 1.5}, "n", 4)
    assert report.events([event]) == [
        {"at": "2025-12-17T19:33:20Z", "kind": "pool", "text": "x", "facts": {"took_s": 1.5}, "seq": 4}
    ]
    assert report.events([]) == []


def test_strangers_nearby() -> None:
    advert = Advert("c" * 16, OTHER, 8089, NodeName("cellar"), devices=(ShortDevice("CUDA0", 24 * 10**9),))
    plain = all_plain(report.nearby(Sighting(OTHER, "c" * 16, (), advert)))
    assert plain["address"] == "?"
    assert "CUDA0" in plain["detail"]


# Speculation


def tally(*timings: Timings) -> Tally:
    found = Tally()
    for each in timings:
        found.generated(each)
    return found


TIMINGS = Timings(
    n_prompt=10,
    n_generated=40,
    rounds=10,
    drafted=32,
    accepted=24,
    tried_at=[10, 10, 8, 4],
    accepted_at=[9, 8, 5, 2],
    verify_ms=410,
    draft_ms=160,
    waited_ms=40,
    drafters={"cellar": 30, "n-gram": 2},
)
DRAFTERS = (
    DrafterView(
        name="cellar", state="drafting", id=str(OTHER), tokens_per_s=161.23456, first_token_ms=12.25, acceptance=0.714
    ),
    DrafterView(name="n-gram", state="standing by", reason="it finds nothing to copy"),
)
VIEW = SpeculationView.of(
    tally(TIMINGS, TIMINGS),
    engine="verifier",
    engine_reason="the model is pooled",
    decision="drafts of 4 tokens from cellar",
    drafters=DRAFTERS,
    rollback="",
)


def test_speculation_in_figures() -> None:
    plain = all_plain(report.speculation(VIEW))
    assert plain == {
        "engine": "verifier",
        "engine_reason": "the model is pooled",
        "decision": "drafts of 4 tokens from cellar",
        "rounds": 20,
        "drafted": 64,
        "accepted": 48,
        "acceptance": 0.75,
        "acceptance_at": [0.9, 0.8, 0.625, 0.5],
        "tokens_per_round": 3.4,
        "verify_ms": 41.0,
        "draft_ms": 5.0,
        "hidden": 0.75,
        "drafters": [
            {
                "name": "cellar",
                "state": "drafting",
                "id": str(OTHER),
                "reason": "",
                "tokens_per_s": 161.2346,
                "first_token_ms": 12.25,
                "acceptance": 0.714,
            },
            {
                "name": "n-gram",
                "state": "standing by",
                "id": "",
                "reason": "it finds nothing to copy",
                "tokens_per_s": None,
                "first_token_ms": None,
                "acceptance": None,
            },
        ],
        "rollback": "",
    }


def test_speculation_has_the_same_keys_whatever_serves_and_before_the_first_round() -> None:
    keys = report.speculation(VIEW).keys()
    assert report.speculation(Speculation(1, 2, 1)).keys() == keys
    empty = all_plain(report.speculation(SpeculationView.of(Tally(), engine="verifier")))
    assert empty.keys() == keys
    assert {key: empty[key] for key in ("tokens_per_round", "verify_ms", "draft_ms", "hidden", "acceptance")} == (
        dict.fromkeys(("tokens_per_round", "verify_ms", "draft_ms", "hidden", "acceptance"))
    )
    assert empty["acceptance_at"] == []


# Rendering

ON_DISPLAY = {
    "peers": [report.peer(status_of(row(text=HOSTILE, models=HELD)), ME, ME), report.peer(status_of(None), ME, None)],
    "nearby": [{"id": "x", "name": "stranger", "address": "?", "detail": HOSTILE}],
}
FULL_STATUS = cluster_status(
    report.serving(SERVING, {OTHER: HOSTILE}, ENTRIES, Speculation(10, 80, 60), {}),
    [report.transfer(transfer_status(problem=HOSTILE)), report.transfer(transfer_status(0, 0, 0.0))],
)
EMPTY_STATUS = cluster_status(
    report.NOT_SERVING, [], coordinator=None, engine=report.engine(EngineInfo()), problems=[], events=[]
)
MODELS = {
    "models": report_models.models(ENTRIES, {}, report.serving(SERVING, {}, ENTRIES, Speculation(), {})),
    "transfers": [report.transfer(transfer_status())],
}
ENGINE = {
    "dir": "/x",
    "build": "b1",
    "protocol": "7.0.0",
    "digest": "ab",
    "origin": "built",
    "devices": [],
    "skipped": [],
}
NO_ENGINE = {
    **dict.fromkeys(ENGINE),
    "devices": [],
    "skipped": [{"step": "PATH", "reason": HOSTILE}],
}
TOKENS = [
    {"id": "ab" * 8, "role": "node", "uses": 1, "uses_left": 0, "expires": 0, "state": "used up", "nodes": [HOSTILE]},
    {"id": "cd" * 8, "role": "authority", "uses": 5, "uses_left": 5, "expires": 9, "state": "valid", "nodes": []},
]
DRAFTING_STATUS = cluster_status(report.serving(SERVING, {OTHER: "cellar"}, ENTRIES, VIEW, {}), [])
HOSTILE_VIEW = SpeculationView(
    engine="verifier",
    engine_reason=HOSTILE,
    decision=HOSTILE,
    rollback=HOSTILE,
    acceptance_at=(None, 1.0),
    rounds=1,
    drafters=(DrafterView(name=HOSTILE, state=HOSTILE, reason=HOSTILE),) * 20,
)
HOSTILE_STATUS = cluster_status(report.serving(SERVING, {}, ENTRIES, HOSTILE_VIEW, {}), [])


@pytest.mark.parametrize(("detail", "line"), [("ready", "ready"), ("", "ready"), ("loading 5 %", "ready, loading 5 %")])
def test_what_is_served_says_its_state_once(detail: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    target = FULL_STATUS["target"] | {"model": "m", "state": "ready", "detail": detail}
    render.status({**FULL_STATUS, "target": target}, as_json=False)
    assert f"target       m: {line}\n" in capsys.readouterr().out


SERVED = {"target": FULL_STATUS["target"], "draft": {}, "endpoint": "http://x/v1", "warnings": [HOSTILE]}


def row_of(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "prompts": 4,
        "drafts_per_s": 38.25,
        "without_per_s": 15.3,
        "speedup": 2.5,
        "drafted": 100,
        "accepted": 71,
        "acceptance": 0.71,
        "acceptance_at": (0.9, 0.5),
        "tokens_per_round": 4.4,
        "hidden": 0.8,
        "compared": 4,
        "equal": 4,
        **more,
    }


BENCH = {
    "target": HOSTILE,
    "engine": "verifier",
    "draft": HOSTILE,
    "max_tokens": 96,
    "concurrency": 1,
    "wanted": 8,
    "measured": 8,
    "error": None,
    "kinds": [row_of("facts"), row_of("code", speedup=None)],
    "total": row_of("all", prompts=8, compared=8, equal=7),
    "differences": [{"kind": "code", "prompt": HOSTILE, "at": 57}],
    "notes": [HOSTILE],
    "answers": [],
}
ONE_COLUMN_BENCH = BENCH | {
    "engine": "llama-server",
    "draft": None,
    "concurrency": 4,
    "measured": 3,
    "kinds": [row_of("facts", without_per_s=None, speedup=None, tokens_per_round=None, hidden=None, compared=0)],
    "total": row_of("facts", without_per_s=None, speedup=None, tokens_per_round=None, hidden=None, compared=0),
    "differences": [],
}
NO_BENCH = BENCH | {"engine": "", "measured": 0, "kinds": [], "total": None, "differences": [], "notes": []}

CASES: dict[str, tuple[Callable[..., None], Any]] = {
    "joined": (render.joined, {"cluster": "c" * 52, "node": "n" * 52, "name": "attic", "role": "node"}),
    "left": (render.left, {"cluster": "c" * 52, "models_dir": "/home/x/[models]"}),
    "token": (
        render.token_created,
        {"token": "tw1x", "id": "ab", "expires": 1, "ttl_s": 3600, "uses": 1, "role": "node"},
    ),
    "token of many": (
        render.token_created,
        {"token": "tw1" + "x" * 400, "id": "", "expires": 1, "ttl_s": 1, "uses": 1000, "role": "node"},
    ),
    "tokens": (render.tokens, {"tokens": TOKENS}),
    "no tokens": (render.tokens, {"tokens": []}),
    "added": (
        render.added,
        {"id": "ab" * 32, "name": "a[b].gguf", "size": 1, "architecture": "llama", "quantisation": "Q4_1"},
    ),
    "added, no GGUF": (
        render.added,
        {"id": "ab" * 32, "name": "notes.txt", "size": 2**63, "architecture": "", "quantisation": ""},
    ),
    "models": (render.models, MODELS),
    "no models": (render.models, {"models": [], "transfers": []}),
    "removed": (
        render.removed,
        {
            "id": "ab",
            "name": "a",
            "dry_run": False,
            "nodes": ["attic"],
            "kept": [{"node": "x", "reason": HOSTILE}],
            "frees": [
                {"node": "attic", "bytes": 5, "in_place": False},
                {"node": HOSTILE, "bytes": 0, "in_place": True},
            ],
        },
    ),
    "removed from nowhere": (
        render.removed,
        {"id": "ab", "name": "a", "dry_run": True, "nodes": [], "kept": [], "frees": []},
    ),
    "served": (render.served, SERVED),
    "stopped": (render.stopped, {"stopped": True}),
    "peers": (render.peers, ON_DISPLAY),
    "no peers": (render.peers, {"peers": [], "nearby": []}),
    "status": (render.status, FULL_STATUS),
    "empty status": (render.status, EMPTY_STATUS),
    "drafting status": (render.status, DRAFTING_STATUS),
    "status with drafters of evil names": (render.status, HOSTILE_STATUS),
    "bench": (render.bench, BENCH),
    "bench of llama-server, stopped": (render.bench, ONE_COLUMN_BENCH),
    "bench of nothing": (render.bench, NO_BENCH),
    "engine": (render.engine, ENGINE),
    "no engine": (render.engine, NO_ENGINE),
    "version": (
        render.version,
        {"tightwad-agent": "0", "llama.cpp": "b1", "python": "3.11", "trio": "0.30", "openssl": "3"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_json_is_one_document_on_stdout(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    show, data = CASES[name]
    show(data, as_json=True)
    said = capsys.readouterr()
    value = json.loads(said.out)
    assert said.err == ""
    assert said.out.count("\n") == 1
    whole = {"tokens": "tokens", "no tokens": "tokens", "models": "models", "no models": "models"}
    whole |= {"peers": "peers", "no peers": "peers"}
    if name in whole:
        assert value == data[whole[name]]
    elif name == "key":
        assert value == {"key": data}
    else:
        assert value == all_plain(data)


@pytest.mark.parametrize("name", CASES)
def test_text_is_for_people_and_safe_for_their_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    show, data = CASES[name]
    show(data, as_json=False)
    said = capsys.readouterr()
    assert said.out.strip()
    assert said.err == ""
    assert not [c for c in said.out if (ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160]
    assert "None" not in said.out


def text_of(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    show, data = CASES[name]
    show(data, as_json=False)
    return capsys.readouterr().out


def test_nothing_a_peer_wrote_is_taken_for_markup_or_cut_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    out = text_of("peers", capsys)
    assert "[bold red]x[/bold red] [@click=f()]" in out
    assert "Big-32B [x].gguf, tiny.gguf 99 %" in out
    assert OTHER[:8] in out
    assert "…" not in out


def test_the_status_names_what_a_person_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    out = text_of("status", capsys)
    for part in (
        "2 of 3 nodes alive",
        "attic, epoch 7",
        "http://127.0.0.1:8088/v1",
        "Big-32B [x]: ready",
        "speculation  10 rounds; 60 of 80 draft tokens accepted (75 %)",
        "it does not fit on attic",
        "same vocabulary",
        "2025-12-17T19:33:20Z  agent: started",
        "50 %",
    ):
        assert part in out, part
    empty = text_of("empty status", capsys)
    assert "none, epoch" in empty
    assert "nothing: none, nothing to serve" in empty


def test_the_status_says_how_drafting_goes_in_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = text_of("drafting status", capsys).splitlines()
    assert "             verifier, pooled over cellar (the model is pooled)" in lines
    start = lines.index("speculation  drafts of 4 tokens from cellar")
    assert lines[start + 1 : start + 6] == [
        "             20 rounds of 3.4 tokens; 48 of 64 draft tokens accepted (75 %)",
        "             accepted at the 1st, 2nd, ... token of a draft: 90 80 62 50 %",
        "             a round takes 41.0 ms, a draft token 5.0 ms, 75 % of the drafting happens while a round runs",
        "drafter      cellar: drafting, 161 tokens/s, first token after 12.2 ms, 71 % accepted",
        "drafter      n-gram: standing by (it finds nothing to copy)",
    ]
    assert not [line for line in text_of("empty status", capsys).splitlines() if line.startswith("speculation")]


def test_many_drafters_are_counted_not_listed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = text_of("status with drafters of evil names", capsys).splitlines()
    assert len([line for line in lines if line.startswith("drafter ")]) == render_status.MAX_DRAFTERS
    assert "             and 17 more" in lines


def test_a_coordinator_that_tells_less_is_shown_too(capsys: pytest.CaptureFixture[str]) -> None:
    render.status({**DRAFTING_STATUS, "speculation": {"rounds": 3, "drafted": 0, "accepted": 0}}, as_json=False)
    assert "speculation  3 rounds; 0 of 0 draft tokens accepted\n" in capsys.readouterr().out


def test_a_measurement_is_a_table_with_what_to_know_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [" ".join(line.split()) for line in text_of("bench", capsys).splitlines()]
    assert "kind prompts tokens/s without drafts speed-up drafts accepted tokens/round" in lines
    assert "facts 4 38.2 15.3 2.50 x 71 % 4.4" in lines
    assert "code 4 38.2 15.3 - 71 % 4.4" in lines
    assert "all 8 38.2 15.3 2.50 x 71 % 4.4" in lines
    assert "equal answers: 7 of 8" in lines
    assert any(line.startswith("differs from character 57 on: ") for line in lines)
    assert not any(line.startswith("stopped") for line in lines)


def test_what_cannot_be_compared_has_no_column_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [" ".join(line.split()) for line in text_of("bench of llama-server, stopped", capsys).splitlines()]
    assert "kind prompts tokens/s drafts accepted tokens/round" in lines
    assert "facts 4 38.2 71 % -" in lines
    assert "stopped after 3 of 8 prompts" in lines
    assert lines[0].endswith("at most 96 tokens, 4 requests at a time")
    assert not any(line.startswith(("equal", "all ")) for line in lines)
    assert "stopped after 0 of 8 prompts" in text_of("bench of nothing", capsys)


def test_the_token_is_on_one_line_to_copy(capsys: pytest.CaptureFixture[str]) -> None:
    assert "    tightwad-agent --join tw1" + "x" * 400 + "\n" in text_of("token of many", capsys)
    render.founded({"name": "attic", "cluster": "c" * 52, "token": "tw1" + "y" * 400})
    assert "    tightwad-agent --join tw1" + "y" * 400 + "\n" in capsys.readouterr().out


@pytest.mark.parametrize("lan", ["", "http://192.168.1.10:8088/v1"])
def test_ready_shows_the_key_only_where_it_is_of_use(lan: str, capsys: pytest.CaptureFixture[str]) -> None:
    info = {"endpoint": "http://127.0.0.1:8088/v1", "lan": lan, "api_key": "secret", "models": []}
    render.ready({**info, "open_endpoint": False})
    closed = capsys.readouterr().out
    assert ("secret" in closed) == bool(lan)
    assert "add" in closed
    render.ready({**info, "open_endpoint": True, "models": ["a"]})
    opened = capsys.readouterr().out
    assert "WARNING" in opened
    assert "secret" not in opened
    assert "No model" not in opened


@pytest.mark.parametrize(("done", "total", "rate"), [(0, 1, 0.0), (0, 2**62, 1e-3), (2**62, 2**62, 1e30), (5, 3, 1.0)])
def test_transfers_at_their_extremes(done: int, total: int, rate: float, capsys: pytest.CaptureFixture[str]) -> None:
    plain = all_plain(report.transfer(transfer_status(done, total, rate)))
    render.status({**EMPTY_STATUS, "transfers": [plain]}, as_json=False)
    assert "Big-32B.gguf" in capsys.readouterr().out


def test_a_transfer_says_what_it_does_and_what_it_had(capsys: pytest.CaptureFixture[str]) -> None:
    told = replace(transfer_status(0, 10, 0.0, "needs 10 more bytes"), phase=Phase.NO_ROOM, reused=3_000_000)
    render.status({**EMPTY_STATUS, "transfers": [report.transfer(told)]}, as_json=False)
    out = capsys.readouterr().out
    assert "Big-32B.gguf: 0 %, no room, 3.0 MB were on this disk, 0 B/s from 2 source(s), needs 10 more bytes" in out


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60))
def test_any_text_of_a_peer_can_be_shown(capsys: pytest.CaptureFixture[str], text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    render.peers({"peers": [report.peer(status_of(row(text=text)), ME, ME)], "nearby": []}, as_json=False)
    shown = capsys.readouterr().out
    assert not any(ord(c) < 32 and c != "\n" for c in shown)


def test_watching_ends_with_ctrl_c(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _s: None)
    answers = [{"peers": [], "nearby": []}, ON_DISPLAY]

    def fetch() -> dict[str, Any]:
        if not answers:
            raise KeyboardInterrupt
        return answers.pop(0)

    render.watch_peers(fetch, as_json=True)
    lines = capsys.readouterr().out.splitlines()
    assert [len(json.loads(line)) for line in lines] == [0, 2]


def test_watching_on_a_terminal_takes_text_of_peers_as_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _s: None)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    consoles: list[Console] = []
    real = render.console

    def console(**options: Any) -> Console:
        consoles.append(real(**options))
        consoles[-1].width = 300
        return consoles[-1]

    monkeypatch.setattr(render, "console", console)
    answers = [ON_DISPLAY]

    def fetch() -> dict[str, Any]:
        if not answers:
            raise KeyboardInterrupt
        return answers.pop(0)

    render.watch_peers(fetch, as_json=False)
    out = capsys.readouterr().out
    assert len(consoles) == 1
    assert "[bold red]x[/bold red]" in out
    assert "\x1b]0;title" not in out


# Progress


def lines_of(capsys: pytest.CaptureFixture[str], *steps: tuple[str, int, int, str]) -> list[str]:
    with render.progress("add") as show:
        for step in steps:
            show(*step)
    said = capsys.readouterr()
    assert said.out == "", "stdout holds the result alone"
    return said.err.splitlines()


@pytest.mark.parametrize("total", [20, 97, 100, 1000, 98_441_600])
def test_a_line_for_each_twentieth(total: int, capsys: pytest.CaptureFixture[str]) -> None:
    stride = max(1, total // 1000)
    lines = lines_of(capsys, *[("hashing", n, total, "bytes") for n in [*range(0, total, stride), total, total, total]])
    assert len(lines) == 21
    assert lines[0].startswith("add: hashing 0 B of ")
    assert len(set(lines)) == 21


def test_a_line_more_only_for_progress(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [("copy", n, 100, "%") for n in (0, 3, 4, 5, 5, 2, 0, 9, 10, 101, 150, 2**70)]
    assert lines_of(capsys, *steps) == ["add: copy 0 %", "add: copy 5 %", "add: copy 10 %", "add: copy 101 %"]


def test_stages_are_counted_apart_and_unknown_totals_print_once(capsys: pytest.CaptureFixture[str]) -> None:
    steps = [("a", 0, 0, ""), ("b", 0, 2, ""), ("a", 5, 0, ""), ("b", 2, 2, ""), ("c", 7, 0, "bytes"), ("a", 0, 0, "")]
    assert lines_of(capsys, *steps) == ["add: a", "add: b 0/2", "add: b 2/2", "add: c 7 B"]


def test_a_stage_may_hold_anything(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = lines_of(capsys, (HOSTILE, 0, 0, ""))
    assert "\x1b" not in line
    assert "[bold red]" in line


def test_with_json_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with render.progress("add", as_json=True) as show:
        show("x", 1, 2, "bytes")
    said = capsys.readouterr()
    assert said.out + said.err == ""


def test_on_a_terminal_bars_are_drawn_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with render.progress("add") as show:
        show(HOSTILE, 0, 0, "bytes")
        for n in (0, 50, 100, 101):
            show("hashing [bold]", n, 100, "bytes")
    said = capsys.readouterr()
    assert said.out == ""
    assert "hashing [bold]" in said.err
    assert "\x1b]0;title" not in said.err


def test_numbers_never_break_a_line() -> None:
    for done, total, unit in ((0, 0, ""), (-1, 0, "bytes"), (2**70, 1, "bytes"), (1, 3, "layers"), (0, -5, "%")):
        assert isinstance(terminal.amount(done, total, unit), str)
    assert math.isfinite(render.WATCH_PERIOD_S)
