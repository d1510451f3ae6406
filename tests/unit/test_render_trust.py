"""What the commands about membership print, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tightwad_agent import render_trust

CASES: list[tuple[Callable[..., None], dict[str, Any], list[str], list[str]]] = [
    (render_trust.token_revoked, {"id": "ab12", "removed": []}, ["ab12 is revoked"], ["Removed"]),
    (render_trust.token_revoked, {"id": "ab12", "removed": ["b", "c"]}, ["Removed as well: b, c."], []),
    (render_trust.node_removed, {"name": "b", "id": "x" * 52, "was_authority": False}, ["b (xxxxxxxx)"], ["ca rotate"]),
    (render_trust.node_removed, {"name": "b", "id": "x" * 52, "was_authority": True}, ["ca rotate --overlap"], []),
    (render_trust.promoted, {"name": "b", "id": "x" * 52}, ["b (xxxxxxxx) is an authority"], []),
    (render_trust.rotated, {"until": 0, "renewed": ["a"], "waiting": []}, ["New certificates: a."], ["Not yet"]),
    (render_trust.rotated, {"until": 0, "renewed": ["a"], "waiting": ["b"]}, ["Not yet: b"], []),
    (
        render_trust.ca_status,
        {"authorities": ["a"], "changes": 0, "overlap_until": 0, "removed": 2, "revoked": 1},
        ["authorities", "2 machine(s)", "1 join token(s)"],
        ["old key"],
    ),
    (
        render_trust.ca_status,
        {"authorities": [], "changes": 1, "overlap_until": 1_800_000_000, "removed": 0, "revoked": 0},
        ["none is known", "old key counts   until 2027-"],
        [],
    ),
]


@pytest.mark.parametrize(("show", "info", "says", "not_says"), CASES)
def test_people_read_sentences_and_programs_what_was_answered(
    show: Callable[..., None],
    info: dict[str, Any],
    says: list[str],
    not_says: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    show(info, as_json=False)
    text = capsys.readouterr().out
    assert all(words in text for words in says), text
    assert not any(words in text for words in not_says), text
    show(info, as_json=True)
    assert json.loads(capsys.readouterr().out) == info
