from dataclasses import replace

from tightwad_agent.engine.restart import GiveUp, Restarter, RestartPolicy, StartAt

POLICY = RestartPolicy(first_delay_s=1, factor=2, max_delay_s=5, max_crashes=4, crash_window_s=10)


def crash(restarter: Restarter, now: float, *, after: float = 0.0, crash: bool = True) -> object:
    restarter.started(now)
    return restarter.exited(now + after, "SIGSEGV", crash=crash)


def test_delays_double_and_then_it_is_a_loop() -> None:
    restarter = Restarter(POLICY)
    assert [crash(restarter, t) for t in (0, 10, 20)] == [StartAt(1), StartAt(12), StartAt(24)]
    verdict = crash(restarter, 30)
    assert isinstance(verdict, GiveUp)
    assert "4 times in a row" in verdict.reason
    assert "SIGSEGV" in verdict.reason
    assert restarter.given_up == verdict
    assert restarter.restarts == 3


def test_once_given_up_it_stays_given_up_until_reset() -> None:
    restarter = Restarter(POLICY)
    for t in range(4):
        crash(restarter, t)
    assert isinstance(crash(restarter, 5, after=1000), GiveUp)
    restarter.reset()
    assert restarter.given_up is None
    assert crash(restarter, 2000) == StartAt(2001)


def test_a_healthy_run_is_forgiven() -> None:
    restarter = Restarter(POLICY)
    for t in range(3):
        crash(restarter, t)
    assert crash(restarter, 100, after=10) == StartAt(111)
    assert crash(restarter, 200) == StartAt(202)


def test_the_crash_window_is_open_at_its_end() -> None:
    restarter = Restarter(POLICY)
    crash(restarter, 0)
    assert crash(restarter, 10, after=9.5) == StartAt(19.5 + 2)


def test_faults_of_others_back_off_to_the_bound_and_never_give_up() -> None:
    restarter = Restarter(POLICY)
    waits = [crash(restarter, t, crash=False) for t in range(0, 700, 100)]
    assert waits == [StartAt(t + d) for t, d in zip(range(0, 700, 100), (1, 2, 4, 5, 5, 5, 5), strict=True)]


def test_faults_of_others_forgive_nothing() -> None:
    restarter = Restarter(POLICY)
    for t in range(3):
        crash(restarter, t)
    crash(restarter, 5, crash=False)
    assert isinstance(crash(restarter, 6), GiveUp)


def test_an_exit_without_a_start_counts_as_immediate() -> None:
    restarter = Restarter(POLICY)
    assert restarter.exited(50, "could not start") == StartAt(51)


def test_a_clock_that_went_back_does_no_harm() -> None:
    restarter = Restarter(POLICY)
    restarter.started(100)
    assert restarter.exited(50, "x") == StartAt(51)


def test_what_ran_for_a_while_is_started_at_once() -> None:
    restarter = Restarter(replace(POLICY, settled_s=5))
    assert crash(restarter, 0, after=4.5, crash=False) == StartAt(5.5)
    assert crash(restarter, 10, after=4.5, crash=False) == StartAt(16.5)
    assert crash(restarter, 20, after=5, crash=False) == StartAt(25)
    assert crash(restarter, 30, after=6, crash=False) == StartAt(36)
    assert crash(restarter, 40, after=4, crash=False) == StartAt(45)
    assert restarter.restarts == 5


def test_what_ran_for_a_while_and_crashes_again_and_again_is_given_up_all_the_same() -> None:
    restarter = Restarter(replace(POLICY, settled_s=5))
    assert [crash(restarter, t, after=6) for t in (0, 10, 20)] == [StartAt(6), StartAt(16), StartAt(26)]
    assert isinstance(crash(restarter, 30, after=6), GiveUp)
