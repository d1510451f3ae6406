"""Models as they are shown: what rows say and what nodes tell, merged; tables, lines and bars of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from tightwad_agent import render_models, report, report_models
from tightwad_agent.decide import Entry
from tightwad_agent.ids import ModelId, SafeName
from tightwad_agent.rates import Rates
from tightwad_agent.swarm.inventory import ModelState
from tightwad_agent.testing import node_id
from tightwad_agent.wire.rows import ModelFacts

ME, OTHER, THIRD = node_id("attic"), node_id("cellar"), node_id("garage")
NAMES = {ME: "attic", OTHER: "cellar", THIRD: "garage"}
BIG, TINY = ModelId("ab" * 32), ModelId("cd" * 32)
FACTS = ModelFacts("llama", "Q4_1", 134515008, 30, 8192, 23040, "0123456789abcdef")
HOSTILE = "\x1b[31mred\x1b]0;title\x07[/] [bold red]x[/bold red]\r\x9b2J\x00"
ENTRIES = {BIG: Entry(BIG, SafeName("big.gguf"), 1000, FACTS, {ME: 1000, OTHER: 400})}


def state(have: int, phase: str, model: ModelId = BIG, **more: Any) -> ModelState:
    values = {"name": "big.gguf", "size": 1000, "in_place": False, "facts": FACTS, **more}
    return ModelState(model=model, have=have, phase=phase, **values)


def shown(*args: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        json.dumps(report_models.models(ENTRIES, NAMES, report.NOT_SERVING, *args), allow_nan=False)
    )
    return found


def nodes(found: list[dict[str, Any]], model: ModelId = BIG) -> dict[str, dict[str, Any]]:
    (m,) = [m for m in found if m["id"] == model]
    return {n["name"]: n for n in m["nodes"]}


def test_rows_alone_tell_how_much_is_where() -> None:
    found = nodes(shown())
    assert (found["attic"]["phase"], found["attic"]["copy"], found["attic"]["moving"]) == ("complete", None, False)
    assert (found["cellar"]["phase"], found["cellar"]["have"], found["cellar"]["moving"]) == ("fetching", 400, True)


def test_what_a_node_tells_is_nearer_than_its_row() -> None:
    told = {
        ME: [state(0, "problem", in_place=True, detail="/x is gone")],
        OTHER: [state(2000, "reusing", rate=5, sources=2, reused=300)],
    }
    found = nodes(shown(told))
    assert found["attic"] == {
        "id": str(ME),
        "name": "attic",
        "have": 0,
        "copy": "in place",
        "phase": "problem",
        "moving": False,
        "rate": 0,
        "sources": 0,
        "reused": 0,
        "problem": "/x is gone",
    }
    cellar = found["cellar"]
    assert (cellar["have"], cellar["phase"], cellar["moving"], cellar["copy"]) == (1000, "reusing", True, "own")
    assert (cellar["rate"], cellar["sources"], cellar["reused"]) == (5, 2, 300)


def test_a_node_without_room_is_there_though_its_row_has_nothing() -> None:
    found = nodes(shown({THIRD: [state(0, "no room", detail="needs 1,000")]}))
    assert (found["garage"]["phase"], found["garage"]["problem"]) == ("no room", "needs 1,000")
    assert report_models.on_its_way(shown({THIRD: [state(0, "no room")]}))


def test_nodes_that_are_to_have_it_are_waited_for() -> None:
    found = shown({ME: [state(1000, "complete")]}, {BIG: frozenset({ME, THIRD}), TINY: frozenset({ME})})
    assert (nodes(found)["garage"]["phase"], nodes(found)["garage"]["have"]) == ("waiting", 0)
    assert len(found) == 1


def test_what_no_row_offers_is_shown_and_nonsense_is_not() -> None:
    broken = state(0, "problem", TINY, name="tiny.gguf", size=10, in_place=True)
    odd = [state(0, "looking", ModelId("ef" * 32), name="../x"), state(0, "looking", ModelId("01" * 32), size=0)]
    found = shown({ME: [broken, *odd], OTHER: [broken]})
    assert [m["name"] for m in found] == ["big.gguf", "tiny.gguf"]
    assert set(nodes(found, TINY)) == {"attic", "cellar"}
    assert not report_models.on_its_way([m for m in found if m["id"] == TINY])
    assert not report_models.on_its_way([])


# Tables and lines


TOLD = {
    ME: [state(1000, "complete", in_place=True)],
    OTHER: [state(400, "fetching", sources=1, rate=50)],
    THIRD: [state(0, "no room", detail=HOSTILE)],
}


def test_the_table_says_whose_file_it_is_and_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    render_models.models({"models": shown(TOLD)}, as_json=False)
    out = capsys.readouterr().out
    for part in (
        "134.5 M",
        "attic (in place), cellar 40 % fetching, garage 0 % no room",
        "big.gguf on garage: no room: ",
    ):
        assert part in out, part
    assert "\x1b" not in out
    render_models.models({"models": shown({ME: [state(1000, "complete")]})}, as_json=False)
    assert "attic (own copy)" in capsys.readouterr().out


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds pass with each wait."""
    now = [0.0]

    def sleep(_s: float) -> None:
        now[0] += 2.0

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("time.monotonic", lambda: now[0])


def film() -> Iterator[dict[str, Any]]:
    for have in (400, 400, 700, 1000):
        phase = "complete" if have == 1000 else "fetching"
        yield {"models": shown({ME: [state(1000, "complete")], OTHER: [state(have, phase, sources=2, reused=100)]})}
    raise KeyboardInterrupt


@pytest.mark.usefixtures("clock")
def test_lines_are_printed_for_what_is_new_alone(capsys: pytest.CaptureFixture[str]) -> None:
    looks = film()
    render_models.watch(lambda: next(looks), as_json=False, until_complete=True)
    assert capsys.readouterr().out.splitlines() == [
        "big.gguf on attic: 100 % of 1.0 kB, complete",
        "big.gguf on cellar: 40 % of 1.0 kB, fetching, 2 sources, 100 B were on its disk",
        "big.gguf on cellar: 70 % of 1.0 kB, fetching, 75 B/s, 4 s left, 2 sources, 100 B were on its disk",
        "big.gguf on cellar: 100 % of 1.0 kB, complete, 100 B were on its disk",
    ]
    with pytest.raises(KeyboardInterrupt):
        next(looks)  # it had looked until all was there, and no longer


@pytest.mark.usefixtures("clock")
def test_json_is_a_line_for_each_look_until_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    looks = film()
    render_models.watch(lambda: next(looks), as_json=True, until_complete=False)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["moving"] for line in lines] == [True, True, True, False]
    cellar = [line["models"][0]["nodes"][1] for line in lines]
    assert [n["rate"] for n in cellar] == [0, 0, 75, 0]
    assert [n["eta_s"] for n in cellar] == [None, None, 4.0, None]


@pytest.mark.usefixtures("clock")
def test_an_empty_catalogue_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    looks = iter([{"models": []}, {"models": []}])

    def fetch() -> dict[str, Any]:
        try:
            return next(looks)
        except StopIteration:
            raise KeyboardInterrupt from None

    render_models.watch(fetch, as_json=False, until_complete=False)
    assert capsys.readouterr().out.count("The catalogue is empty") == 1


@pytest.mark.usefixtures("clock")
def test_on_a_terminal_there_is_a_bar_for_each_node(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    real = render_models.console

    def wide(**options: Any) -> Console:
        made = real(**options)
        made.width = 300
        return made

    monkeypatch.setattr(render_models, "console", wide)
    looks = iter([{"models": shown(TOLD)}, {"models": shown({ME: [state(1000, "complete")]})}])

    def fetch() -> dict[str, Any]:
        try:
            return next(looks)
        except StopIteration:
            raise KeyboardInterrupt from None

    render_models.watch(fetch, as_json=False, until_complete=False)
    out = capsys.readouterr().out
    for part in ("attic", "cellar", "40 %", "1 source", "no room", "━"):
        assert part in out, part
    assert "\x1b]0;title" not in out


def test_a_node_that_left_is_forgotten() -> None:
    rates = Rates()
    render_models.with_rates(shown(TOLD), rates, 0.0)
    render_models.with_rates(shown(TOLD)[:0], rates, 1.0)
    assert rates.rate((str(BIG), str(OTHER)), 100.0) is None


# Comparisons and cleaning up


def result(word: str, **more: Any) -> dict[str, Any]:
    plain = {"node": "attic", "name": "big.gguf", "size": 1000, "state": word, "pieces": 9, "damaged": 0, "ranges": []}
    return {**plain, "problem": "", "action": "", **more}


RANGES = [{"piece": i, "offset": i * 4096, "length": 4096} for i in range(12)]


@pytest.mark.parametrize(
    ("results", "code", "says"),
    [
        ([], 0, ["no complete model"]),
        ([result("good")], 0, ["big.gguf on attic: good (1.0 kB in 9 pieces)"]),
        (
            [result("good"), result("damaged", damaged=12, ranges=RANGES, action="put the right file there")],
            6,
            ["DAMAGED, 12 of 9 pieces", "bytes 0 to 4,095, 4,096 to 8,191", "and 4 more pieces", "  put the right"],
        ),
        ([result("failed", problem="/x is gone"), result("unchecked")], 6, ["could not be compared", "  /x is gone"]),
        ([result("unchecked", name="", problem="no answer")], 7, ["everything on attic: was not compared"]),
    ],
)
def test_comparisons_are_told_with_what_to_do(
    results: list[dict[str, Any]], code: int, says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    render_models.verified({"results": results}, as_json=False)
    out = capsys.readouterr().out
    for part in says:
        assert part in out, out
    assert render_models.verify_exit_code({"results": results}) == code
    render_models.verified({"results": results}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"results": results}


@pytest.mark.parametrize(("dry_run", "says"), [(True, "would be freed"), (False, "were freed")])
def test_what_was_cleaned_up_is_told(dry_run: bool, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    items = [{"what": "part of x.gguf", "bytes": 5_000_000, "age_s": 7200, "paths": ["/x"]}]
    info = {"items": items, "bytes": 5_000_000, "dry_run": dry_run}
    render_models.collected(info, as_json=False)
    out = capsys.readouterr().out
    assert "part of x.gguf: 5.0 MB, 2 h 0 min old" in out
    assert f"5.0 MB {says}" in out
    render_models.collected(info, as_json=True)
    assert json.loads(capsys.readouterr().out) == info
    render_models.collected({"items": [], "bytes": 0, "dry_run": False}, as_json=False)
    assert "nothing to clean up" in capsys.readouterr().out
