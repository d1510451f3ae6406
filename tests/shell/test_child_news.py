from __future__ import annotations

from typing import Any

import trio

from tightwad_agent.child_news import QUIET_S, Pauses, follow
from tightwad_agent.pulse import Pulse

PATIENCE_S = 30.0


async def test_each_new_trouble_is_told_once() -> None:
    changed, heard = Pulse(), Pulse()
    now: dict[str, tuple[int, str]] = {"worker": (0, "of before"), "drafter": (0, "")}
    told: list[str] = []

    def tell(text: str, /, **_facts: Any) -> None:
        told.append(text)
        heard.beat()

    async def set_to(what: str, trouble: tuple[int, str]) -> None:
        seen = heard.count
        now[what] = trouble
        changed.beat()
        with trio.fail_after(PATIENCE_S):
            await heard.wait(seen)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow, changed, {w: lambda w=w: now[w] for w in now}, tell)
        await trio.testing.wait_all_tasks_blocked()
        await set_to("worker", (1, "ended by SIGKILL"))
        changed.beat()
        await set_to("drafter", (0, "there is no model"))
        now["drafter"] = (1, "")
        changed.beat()
        await trio.testing.wait_all_tasks_blocked()
        await set_to("worker", (2, "ended by SIGKILL"))
        nursery.cancel_scope.cancel()
    assert told == ["worker: ended by SIGKILL", "drafter: there is no model", "worker: ended by SIGKILL"]


def test_answers_that_go_on_together_are_told_once() -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    now = 100.0
    pauses = Pauses(lambda text, /, **facts: told.append((text, facts)), lambda: now)
    pauses.paused(4.21)
    pauses.paused(4.3)
    now += QUIET_S
    pauses.paused(2.0)
    assert [text.partition(" in which")[0] for text, _ in told] == [
        "an answer goes on after 4.2 s",
        "an answer goes on after 2.0 s",
    ]
    assert told[1][0].endswith("; 3 did since the start")
    assert told[1][1]["n"] == 3
