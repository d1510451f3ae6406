from __future__ import annotations

import trio
import trio.testing

from tightwad_agent.pulse import Pulse


async def test_a_beat_before_the_wait_is_not_missed() -> None:
    pulse = Pulse()
    seen = pulse.count
    pulse.beat()
    with trio.fail_after(10):
        assert await pulse.wait(seen) == seen + 1


async def test_it_waits_until_a_beat_comes(autojump_clock: trio.testing.MockClock) -> None:
    pulse = Pulse()
    with trio.move_on_after(3600) as scope:
        await pulse.wait(pulse.count)
    assert scope.cancelled_caught


async def test_all_who_wait_wake_and_changes_between_waits_count_as_one(nursery: trio.Nursery) -> None:
    pulse = Pulse()
    woken: list[int] = []

    async def waiter() -> None:
        woken.append(await pulse.wait(0))

    for _ in range(5):
        nursery.start_soon(waiter)
    await trio.testing.wait_all_tasks_blocked()
    for _ in range(1000):
        pulse.beat()
    await trio.testing.wait_all_tasks_blocked()
    assert woken == [1000] * 5


async def test_no_beat_of_many_writers_is_lost(nursery: trio.Nursery) -> None:
    pulse = Pulse()
    state, seen_states = 0, []

    async def writer() -> None:
        nonlocal state
        for _ in range(50):
            state += 1
            pulse.beat()
            await trio.lowlevel.checkpoint()

    async def reader() -> None:
        seen = pulse.count
        while state < 200 or not seen_states or seen_states[-1] != 200:
            seen = await pulse.wait(seen)
            seen_states.append(state)

    for _ in range(4):
        nursery.start_soon(writer)
    with trio.fail_after(10):
        await reader()
    assert seen_states[-1] == 200


async def test_a_cancelled_wait_harms_nobody(nursery: trio.Nursery) -> None:
    pulse = Pulse()
    with trio.CancelScope() as scope:
        scope.cancel()
        await pulse.wait(0)
    assert scope.cancelled_caught
    pulse.beat()
    with trio.CancelScope() as scope:
        scope.cancel()
        await pulse.wait(0)
    assert scope.cancelled_caught, "also a wait that need not wait is a checkpoint"
    assert await pulse.wait(0) == 1
