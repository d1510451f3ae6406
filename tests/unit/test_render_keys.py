"""What a person reads of API keys."""

from __future__ import annotations

import json
import time

import pytest

from tightwad_agent import render_keys

NOW = 1_700_000_000
KEYS = [
    {"name": "default", "id": "", "state": "valid", "created": None, "expires": None, "revoked": None}
    | {"requests": 0, "tokens": 0},
    {
        "name": "phone",
        "id": "ab12cd34",
        "state": "expired",
        "created": NOW - 7200,
        "expires": NOW - 600,
        "revoked": None,
    }
    | {"requests": 12, "tokens": 3456},
    {"name": "next", "id": "ffffffff", "state": "valid", "created": NOW, "expires": NOW + 30 * 86400, "revoked": None}
    | {"requests": 1, "tokens": 2},
]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: float(NOW))


def test_a_key_alone_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    render_keys.key("twk_x", as_json=False)
    assert capsys.readouterr().out == "twk_x\n"
    render_keys.key("twk_x", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"key": "twk_x"}


@pytest.mark.parametrize(("expires", "says"), [(None, "until it is revoked"), (NOW + 86400 * 3, "good for")])
def test_a_new_key_is_shown_once_and_whole(expires: int | None, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    info = {"key": "twk_" + "x" * 43, "name": "phone", "id": "ab", "expires": expires}
    render_keys.created(info, as_json=False)
    text = capsys.readouterr().out
    assert says in text
    assert f"    {info['key']}\n" in text
    assert "not shown again" in text
    render_keys.created(info, as_json=True)
    assert json.loads(capsys.readouterr().out) == info


def test_all_keys(capsys: pytest.CaptureFixture[str]) -> None:
    render_keys.keys({"keys": KEYS}, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", "default", "phone", "next"]
    assert all(word in lines[2] for word in ("ab12cd34", "expired", "2 h", "10 min ago", "12", "3456"))
    assert "never" in lines[1]
    assert "in 3" in lines[3] or "in 2" in lines[3]
    render_keys.keys({"keys": KEYS}, as_json=True)
    assert json.loads(capsys.readouterr().out) == KEYS


def test_revoked_ones_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    info = {"revoked": [{"name": "a", "id": "1"}, {"name": "a", "id": "2"}]}
    render_keys.revoked(info, as_json=False)
    assert capsys.readouterr().out.splitlines() == ["The key a (1) is revoked.", "The key a (2) is revoked."]
    render_keys.revoked(info, as_json=True)
    assert json.loads(capsys.readouterr().out) == info
