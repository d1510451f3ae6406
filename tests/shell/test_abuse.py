"""The short form of `scripts/abuse`: changed tokens and forged requests, none of them accepted."""

from __future__ import annotations

import random
from pathlib import Path

import abuse


async def test_no_changed_token_and_no_forged_request_is_accepted(tmp_path: Path) -> None:
    found = await abuse.attack(4000, 7, tmp_path)
    assert found["accepted"] == 0
    assert found.total() == 4000
    requests = {reason for reason in found if reason.startswith("request")}
    assert {"request: forged", "request: expired", "request: unknown_token"} <= requests
    assert any("forged" in reason and not reason.startswith("request") for reason in found)


async def test_what_is_let_in_would_be_seen(tmp_path: Path) -> None:
    """The same ways with nothing changed lead in, so a hole would show."""
    where = abuse.office(tmp_path)
    assert await abuse.honest_request(where)
    assert not abuse._parsed(where.good.text)
    dice = random.Random(1)
    assert all(abuse.changed(b"abc", dice) != b"abc" for _ in range(1000))
